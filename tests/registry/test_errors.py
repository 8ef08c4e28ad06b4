"""Errors: exit codes, the words, and there and back through JSON."""

from __future__ import annotations

import inspect

import pytest

from registry import errors
from registry.errors import FtError, GateClosed, NotFound, Trouble, WrongInput, from_dict

ALL = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, FtError)]


def test_an_error_says_what_where_and_what_next() -> None:
    assert str(NotFound("no run 'x'")) == "no run 'x'"
    assert str(NotFound("no run 'x'", place="here")) == "here: no run 'x'"
    assert str(NotFound("no run 'x'", place="here", fix="`ft runs`")) == "here: no run 'x'\n  -> `ft runs`"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: str(kind.__name__))
def test_each_error_comes_back_from_json_as_itself(kind: type[FtError]) -> None:
    again = from_dict(kind("what", place="where", fix="next").as_dict())
    assert type(again) is kind
    assert (again.what, again.place, again.fix) == ("what", "where", "next")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: str(kind.__name__))
def test_exit_codes_go_by_the_branch_of_the_tree(kind: type[FtError]) -> None:
    expected = 2 if issubclass(kind, WrongInput) else 3 if issubclass(kind, GateClosed) else 1
    assert kind.exit_code == expected


def test_every_error_is_drawn_in_the_tree() -> None:
    for kind in ALL:
        assert kind.__name__ in str(errors.__doc__)


def test_an_error_of_a_newer_version_is_trouble() -> None:
    again = from_dict({"error": "NotYetInvented", "what": "it broke"})
    assert type(again) is Trouble
    assert str(again) == "it broke"
