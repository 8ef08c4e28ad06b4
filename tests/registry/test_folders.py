"""Folders: their names, which one leads, and whose cards can be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.cards import Card
from registry.errors import Conflict, Trouble, WrongInput
from registry.folders import folder_id, is_away, leading, leads, refuse_lending, take_lead
from registry.hosts import Host, HostCard, beat, choose_card, cut_off, hosts
from registry.project import Project
from registry.store import Store, open_store
from tests.conftest import all_at_once
from tests.postgres_server import PostgresServer

CPU = Card("cpu", "CPU", 8)
NAME = "from pathlib import Path\nfrom registry.folders import folder_id\n"


@pytest.fixture
def both(project: Project, postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Project]:
    """Two folders on one database."""
    monkeypatch.setenv("FT_DATABASE_URL", postgres.new_database(f"folders-{tmp_path.name}"))
    return [project, replace(project, home=tmp_path / "other" / ".ft")]


def test_a_folder_has_one_name_whoever_looks_first(tmp_path: Path) -> None:
    names = all_at_once(6, NAME, f"print(folder_id(Path({str(tmp_path / '.ft')!r})))", tmp_path)
    assert len(set(names)) == 1
    assert folder_id(tmp_path / ".ft") == names[0]
    assert folder_id(tmp_path / "other") != names[0]


def test_the_first_folder_leads_until_another_is_told_to(both: list[Project]) -> None:
    first, second = both
    stores = [open_store(each) for each in both]
    assert leading(stores[0]) == ""
    assert [leads(each, store) for each, store in zip(both, stores, strict=True)] == [True, False]
    refuse_lending(first, stores[0])
    with pytest.raises(Conflict, match="only lends it cards"):
        refuse_lending(second, stores[1])
    take_lead(second, stores[1])
    assert [leads(each, store) for each, store in zip(both, stores, strict=True)] == [False, True]


def test_a_folder_that_is_alone_leads(project: Project, store: Store) -> None:
    assert leads(project, store)
    refuse_lending(project, store)
    assert leading(store) in ("", folder_id(project.home))  # a database in the folder need not say so


def test_a_host_is_known_with_its_folder_and_one_of_an_older_ft_shares_it(store: Store) -> None:
    beat(store, "attic", 1.0, [CPU], "b", "s3://x/y")
    beat(store, "cellar", 1.0, [CPU])
    with store.writing() as connection:  # as an ft wrote it that knew no folders
        connection.execute("UPDATE hosts SET body = ? WHERE id = 'cellar'", ('{"cards": [], "pid": 7}',))
    assert [(each.id, each.folder, each.bucket) for each in hosts(store)] == [
        ("attic", "b", "s3://x/y"), ("cellar", "", ""),
    ]  # fmt: skip
    assert [is_away(each.folder, "a") for each in hosts(store)] == [True, False]


@pytest.mark.parametrize("damaged", [b"", b"x\0y", b"\xff" * 32, b"0123456789abcdef" * 3, None])
def test_a_damaged_name_is_told_and_not_taken_for_one(tmp_path: Path, damaged: bytes | None) -> None:
    path = tmp_path / "folder.id"
    path.mkdir() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(Trouble, match="the folder's name") as told:
        folder_id(tmp_path)
    assert told.value.place == str(path)


@pytest.mark.parametrize(
    ("its", "ours", "why"),
    [
        ("s3://x/y", "s3://x/y", None),
        ("s3://x/y", "", "no `bucket:` is set"),
        ("", "s3://x/y", "it has no `bucket:`"),
        ("s3://x/z", "s3://x/y", "its `bucket:` is s3://x/z, here it is s3://x/y"),
    ],
)
def test_whose_cards_can_be_had(its: str, ours: str, why: str | None) -> None:
    known = [Host("attic", 0, 1, 0, (CPU,), 1, "b", its), Host("den", 0, 1, 0, (CPU,), 1, "a", "")]
    there = [HostCard("desk", CPU), HostCard("attic", CPU, "b"), HostCard("den", CPU, "a")]
    cut = cut_off(known, "a", ours)
    assert set(cut) == ({"attic"} if why else set())
    busy = {"desk/cpu": 1, "den/cpu": 1}
    assert choose_card("auto", there, (), busy, cut).name == ("desk/cpu" if why else "attic/cpu")
    if why:
        with pytest.raises(WrongInput, match=why):
            choose_card("attic/cpu", there, (), {}, cut)
