"""Files of others as chats, and the split."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from registry.chat_data import Row
from registry.data_import import Mapping, Splits, import_rows, split_rows
from registry.errors import DataError
from tests.dvc_projects import chat

PLAIN = Mapping(prompt="text", answer="label")


def put(tmp_path: Path, text: str, name: str = "a.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def said(path: Path, mapping: Mapping = PLAIN) -> str:
    with pytest.raises(DataError) as caught:
        import_rows(path, mapping)
    return str(caught.value)


def many(labels: int, each: int) -> list[Row]:
    return [chat(f"question {n} of {label}", f"label{label}") for label in range(labels) for n in range(each)]


def split(rows: list[Row], **how: object) -> Splits:
    return split_rows(rows, **{"eval_part": 0.1, "test_part": 0.1, "seed": 17, **how})  # type: ignore[arg-type]


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = put(tmp_path, '\ufefftext,label,extra\r\n"a, ""b""\nc", yes ,\r\n\r\nd,no,x\r\n')
    assert [(row.prompt[0]["content"], row.answer) for row in import_rows(path, PLAIN)] == [
        ('a, "b"\nc', "yes"),
        ("d", "no"),
    ]


def test_template_system_and_keep(tmp_path: Path) -> None:
    path = put(tmp_path, "title,text,label\nT,x,a\nU,y,b\nV,z,c\n")
    mapping = Mapping(answer="label", template="{title}: {text}!", system="Be brief.", keep={"label": ["a", "c"]})
    rows = import_rows(path, mapping)
    assert [row.messages for row in rows] == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in [("T: x!", "a"), ("V: z!", "c")]
    ]


def test_plain_objects_of_jsonl_keep_structured_answers_as_json(tmp_path: Path) -> None:
    path = put(tmp_path, '{"text": "a", "label": {"city": "Köln", "n": 2}}\n{"text": 3, "label": true}\n', "a.jsonl")
    assert [row.answer for row in import_rows(path, PLAIN)] == ['{"city": "Köln", "n": 2}', "true"]


def test_chats_get_a_system_message_only_where_they_have_none(tmp_path: Path) -> None:
    with_system = Row([{"role": "system", "content": "old"}, *chat("b", "c").messages])
    path = put(tmp_path, chat("a", "b").as_json() + "\n" + with_system.as_json(), "a.jsonl")
    rows = import_rows(path, Mapping(system="new"))
    assert [row.messages[0]["content"] for row in rows] == ["new", "old"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text,label\na,b\nc\nd,e,f\n", ["a.csv:3: 1 columns, and the header has 2", "a.csv:4: 3 columns"]),
        ('text,label\n"a,b\n', ["a.csv:2: not valid CSV"]),
        ('text,label\n"x\ny",1\n"a"b,c\n', ["a.csv:4: not valid CSV"]),
        ("text,text\na,b\n", ["a.csv:1: the header has two columns 'text'"]),
        ("text,,label\na,b,c\n", ["a.csv:1: a column of the header has no name"]),
        ("text;label\na;b\n", ["a.csv:1: the columns are separated by ';'"]),
        ("text,label\n", ["there are no rows"]),
        ("", ["a.csv: the file is empty"]),
        ("text,label\na,\n ,b\n", ["a.csv:2: 'label' is empty", "a.csv:3: 'text' is empty"]),
        ("txt,label\na,b\n", ["no column 'text'; did you mean 'txt'?", "its columns are: txt, label"]),
    ],
)
def test_wrong_csv_is_refused_with_all_of_its_lines(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = said(put(tmp_path, text))
    assert all(each in found for each in expected), found


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\na,b\n\xe9,c\n")
    assert "not UTF-8 text (line 3)" in said(path)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (Mapping(), "which columns are question and answer? There are: text, label"),
        (Mapping(prompt="text"), "--answer is missing"),
        (Mapping(answer="label"), "--prompt or --template is missing"),
        (Mapping(prompt="text", template="{text}", answer="label"), "both say what the question is"),
        (Mapping(template="no column", answer="label"), "--template names no {column}"),
        (Mapping(template="{texd}", answer="label"), "no column 'texd'; did you mean 'text'?"),
        (Mapping(prompt="text", answer="label", keep={"label": ["refnd"]}), "no row has label 'refnd'; did you mean"),
        (Mapping(keep={"label": ["refund"]}), "--keep needs columns"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path: Path, mapping: Mapping, expected: str) -> None:
    assert expected in said(put(tmp_path, "text,label\na,refund\n"), mapping)


def test_files_of_other_kinds_and_missing_ones(tmp_path: Path) -> None:
    assert "files named '*.xlsx' cannot be read" in said(put(tmp_path, "x", "a.xlsx"))
    assert "no such file" in said(tmp_path / "none.csv")
    assert "--prompt COLUMN --answer COLUMN" in said(put(tmp_path, '{"text": "a", "label": "b"}', "a.jsonl"), Mapping())


def test_every_label_is_in_every_split_in_proportion() -> None:
    found = split(many(labels=5, each=20))
    for rows, count in ((found.train, 16), (found.eval, 2), (found.test, 2)):
        assert sorted(row.answer for row in rows) == sorted(f"label{n}" for n in range(5) for _ in range(count))
    assert found.labels == [f"label{n}" for n in range(5)]


def test_free_answers_are_split_as_a_whole() -> None:
    found = split([chat(f"q{n}", f"free answer {n}") for n in range(50)])
    assert (len(found.train), len(found.eval), len(found.test), found.labels) == (40, 5, 5, None)


def test_the_split_does_not_hang_on_the_order_of_rows_but_on_the_seed() -> None:
    rows = many(labels=4, each=25)
    shuffled = rows[:]
    random.Random(3).shuffle(shuffled)
    assert split(rows) == split(shuffled)
    assert split(rows).test != split(rows, seed=18).test


def test_rows_added_later_leave_nearly_all_others_where_they_were() -> None:
    before, after = split(many(labels=4, each=100)), split(many(labels=4, each=110))
    trained, tested = {row.question for row in before.train}, {row.question for row in after.test}
    assert len(trained & tested) <= 4  # of 40 test rows: a split by shuffling would give about 32


def test_a_question_asked_twice_is_kept_once_and_never_in_two_splits() -> None:
    rows = many(labels=3, each=20)
    found = split([*rows, *[chat(row.prompt[0]["content"].upper(), "other") for row in rows]])
    everywhere = [row.question for name in found.by_name().values() for row in name]
    assert (len(everywhere), len(set(everywhere)), found.repeated) == (60, 60, 60)
    assert "other" not in {row.answer for row in found.train}


def test_a_test_file_is_the_whole_test_split_and_its_questions_leave_the_others() -> None:
    rows = many(labels=3, each=20)
    found = split(rows, test_rows=rows[:5])
    assert {row.question for row in found.test} == {row.question for row in rows[:5]}
    assert found.repeated == 5
    assert not {row.question for row in rows[:5]} & {row.question for row in [*found.train, *found.eval]}


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="too few rows"):
        split(many(labels=2, each=1))
    with pytest.raises(DataError, match="nothing would be left for test"):
        split(many(labels=2, each=20), test_part=0.0)
