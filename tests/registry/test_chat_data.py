"""Chat data: what is accepted, and that every error comes at once with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.chat_data import Row, check_dataset, load_rows, write_rows
from registry.errors import DataError
from tests.dvc_projects import chat, write_splits

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def line(*turns: tuple[str, object], **more: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **more})


def errors(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_rows(path)
    return caught.value.what.splitlines()


def test_rows_are_read_with_a_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = GOOD + "\r\n\r\n" + line(("system", "s"), ("user", "é\u2028x"), ("assistant", "ja"), id=7)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = load_rows(path)
    assert first == Row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert (second.id, second.answer, [each["role"] for each in second.prompt]) == ("7", "ja", ["system", "user"])


def test_a_character_that_only_unicode_takes_for_a_newline_does_not_cut_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(json.loads(GOOD)).replace('"a"', '"a\u2028b"') + "\n", encoding="utf-8")
    assert load_rows(path)[0].messages[0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{nonsense", "not valid JSON"),
        ("[1]", "a row is a JSON object, not a list"),
        ("null", "a row is a JSON object, not null"),
        ("{}", "no messages"),
        ('{"messages": "hi"}', "messages must be a list, not text"),
        ('{"messages": [3]}', "message 1 must be an object with role and content, not a number"),
        (line(("user", "a")), "no assistant turn, so nothing to learn"),
        (line(("assistant", "a")), "no user turn"),
        (
            line(("user", "a"), ("assistant", "b"), ("user", "c")),
            "the last message must be the assistant's, not the user's",
        ),
        (line(("user", "a"), ("system", "s"), ("assistant", "b")), "a system message may only come first"),
        (line(("human", "a"), ("assistant", "b")), "message 1 has role 'human'; there are: system, user, assistant"),
        (line(("user", "  "), ("assistant", "b")), "message 1 has no text in content"),
        (line(("user", "a"), ("assistant", 5)), "message 2 has no text in content"),
        (line(("user", "a\ud800"), ("assistant", "b")), "half a Unicode character"),
        (line(("user", "a"), ("assistant", "b"), weight=2), "unknown key 'weight'"),
        ('{"messages": [{"role": "user", "content": "a", "name": "x"}]}', "message 1 has the unknown key 'name'"),
        (line(("user", "a"), ("assistant", "b"), id=[1]), "id must be text or a number"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n\n" + text + "\n", encoding="utf-8")
    (error,) = errors(path)
    assert error.startswith(f"{path}:3: ")
    assert said in error


def test_all_errors_come_at_once_and_many_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b'{"messages": [\xff]}', b"{", *[b"{}"] * 40]))
    found = errors(path)
    assert found[0] == f"{path}:2: not UTF-8 text (byte 15 of the line)"
    assert found[1].startswith(f"{path}:3: not valid JSON")
    assert (len(found), found[-1]) == (21, "and 22 more")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "{path}: no such file"),
        (b"", "{path}: the file is empty"),
        (b"\xef\xbb\xbf\n \n", "{path}: the file is empty"),
        (GOOD.encode("utf-16"), "{path}:1: not UTF-8 text but UTF-16; save it as UTF-8"),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert errors(path) == [said.format(path=path)]


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [chat("a\nb \u2028", "ü"), Row(chat("c", "d").messages, id="x1")]
    write_rows(tmp_path / "a.jsonl", rows)
    assert load_rows(tmp_path / "a.jsonl") == rows


def test_a_dataset_is_counted(tmp_path: Path) -> None:
    write_splits(tmp_path, rows=4)
    assert check_dataset(tmp_path) == {"train": 4, "eval": 4, "test": 4}


def test_the_errors_of_all_splits_and_questions_in_two_of_them_come_together(tmp_path: Path) -> None:
    write_splits(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as out:
        out.write(chat("HELLO  train 1", "no").as_json() + "\n{\n")
    with pytest.raises(DataError) as caught:
        check_dataset(tmp_path)
    found = caught.value.what.splitlines()
    assert found[0] == f"{tmp_path}/eval.jsonl: no such file"
    assert found[1].startswith(f"{tmp_path}/test.jsonl:5: not valid JSON")
    assert found[2] == f"{tmp_path}/test.jsonl:4: the same question as in train.jsonl:2"
