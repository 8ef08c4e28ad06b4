"""Data of others as chats: JSONL or CSV in, rows out; then the split into train, eval and test.

`import_rows` reads a file as the mapping says, all errors at once; `split_rows` is pure.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.chat_data import Row, file_bytes, read_lines, read_rows, refuse
from registry.errors import DataError

COLUMN = re.compile(r"\{([^{}]+)\}")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
FEW_LABELS = 100

Record = dict[str, Any]


@dataclass(frozen=True)
class Mapping:
    """How columns become chats. Without `answer`, the file holds chats already ({"messages": ..})."""

    prompt: str | None = None
    answer: str | None = None
    template: str | None = None
    system: str | None = None
    keep: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Splits:
    """Rows of each split; `repeated` rows were left out because their question was there already."""

    train: list[Row]
    eval: list[Row]
    test: list[Row]
    repeated: int

    def by_name(self) -> dict[str, list[Row]]:
        return {"train": self.train, "eval": self.eval, "test": self.test}

    @property
    def labels(self) -> list[str] | None:
        """The different answers where they are few enough, and repeated enough, to be labels."""
        return labels_of([*self.train, *self.eval, *self.test])


def import_rows(path: Path, mapping: Mapping) -> list[Row]:
    """The file's chats. Raises DataError with every error, or where mapping and file do not fit."""
    _check_mapping(mapping)
    if mapping.answer is None:
        return [_with_system(row, mapping.system) for row in _chats(path)]
    records = _records(path)
    _check_columns(path, records, mapping)
    kept = [(line, each) for line, each in records if _is_kept(each, mapping.keep)]
    return _mapped(path, kept, mapping)


def split_rows(
    rows: list[Row], *, eval_part: float, test_part: float, seed: int, test_rows: list[Row] | None = None
) -> Splits:
    """Split by rank of sha256(seed, question) in each label, or over all rows where answers are no labels.

    A row's hash does not depend on the others, so rows added later leave nearly all of them in their split.
    Rows of `test_rows` are the whole test split. Raises DataError where a split would be empty.
    """
    held_out, repeated = _without_repeats(test_rows or [], set())
    pool, more = _without_repeats(rows, {row.question for row in held_out})
    chosen: dict[str, list[Row]] = {"train": [], "eval": [], "test": held_out}
    for group in _groups(pool):
        ranked = sorted(group, key=lambda row: _rank(row, seed))
        tests = 0 if test_rows is not None else _part(len(ranked), test_part)
        evals = tests + _part(len(ranked), eval_part)
        chosen["test"] += ranked[:tests]
        chosen["eval"] += ranked[tests:evals]
        chosen["train"] += ranked[evals:]
    empty = [name for name, found in chosen.items() if not found]
    if empty:
        raise DataError(
            f"too few rows ({len(pool)} different questions): nothing would be left for {', '.join(empty)}",
            fix="bring more rows, or set --eval-part and --test-part",
        )
    mixed = {name: sorted(found, key=lambda row: _rank(row, seed)) for name, found in chosen.items()}
    return Splits(**mixed, repeated=repeated + more)


def labels_of(rows: list[Row]) -> list[str] | None:
    """The sorted answers if they are labels: at most 100 different, each given twice or more on average."""
    answers = sorted({row.answer for row in rows})
    return answers if len(answers) <= FEW_LABELS and 2 * len(answers) <= len(rows) else None


def _check_mapping(mapping: Mapping) -> None:
    if mapping.prompt and mapping.template:
        raise DataError("--prompt and --template both say what the question is", fix="give one of them")
    if bool(mapping.prompt or mapping.template) != bool(mapping.answer):
        missing = "--answer" if mapping.prompt or mapping.template else "--prompt or --template"
        raise DataError(
            f"{missing} is missing", fix="a question and an answer are needed: --prompt text --answer label"
        )
    if mapping.keep and not mapping.answer:
        raise DataError("--keep needs columns", fix="use it with --prompt (or --template) and --answer")


def _chats(path: Path) -> list[Row]:
    if path.suffix.lower() not in JSON_LINES:
        columns = list(dict.fromkeys(name for _, each in _records(path) for name in each))
        raise DataError(
            f"which columns are question and answer? There are: {', '.join(columns)}",
            place=str(path),
            fix=f"--prompt {columns[0]} --answer {columns[-1]}",
        )
    rows, problems = read_rows(path)
    flat = not rows and any("unknown key" in each and "no messages" in each for each in problems)
    naming = "rows of plain columns need their names: --prompt COLUMN --answer COLUMN"
    refuse(problems, fix=naming if flat else "correct these lines")
    return [row for _, row in rows]


def _records(path: Path) -> list[tuple[int, Record]]:
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, *JSON_LINES):
        raise DataError(
            f"files named '*{suffix}' cannot be read",
            place=str(path),
            fix="bring a .jsonl, .csv or .tsv file",
        )
    read = _csv_records(path, DELIMITERS[suffix]) if suffix in DELIMITERS else _json_records(path)
    records, problems = [], []
    for line, record, wrong in read:
        if wrong:
            problems.append(f"{path}:{line}: {wrong}" if line else f"{path}: {wrong}")
        else:
            records.append((line, record))
    refuse(problems or ([] if records else [f"{path}: there are no rows"]))
    return records


def _json_records(path: Path) -> Iterator[tuple[int, Record, str]]:
    for line, value, wrong in read_lines(path):
        if wrong or not isinstance(value, dict):
            yield line, {}, wrong or "a row is a JSON object of columns"
        else:
            yield line, value, ""


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, Record, str]]:
    text, wrong = _text(path)
    if wrong:
        yield 0, {}, wrong
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # What follows a broken quote is read as part of it: more errors would be noise.
            yield line, {}, f"not valid CSV: {error}"
            return
        if cells is None:
            return
        if not header:
            header, wrong = [cell.strip() for cell in cells], _wrong_header(cells, delimiter)
            if wrong:
                yield line, {}, wrong
                return
        elif cells and len(cells) != len(header):
            yield line, {}, f"{len(cells)} columns, and the header has {len(header)}"
        elif cells:
            yield line, dict(zip(header, cells, strict=True)), ""


def _text(path: Path) -> tuple[str, str]:
    raw, wrong = file_bytes(path)
    if wrong:
        return "", wrong
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        return "", "the file is empty"
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return "", f"not UTF-8 text (line {line}); save it as UTF-8"
    if "\0" in text:
        return "", f"not text: line {text[: text.index(chr(0))].count(chr(10)) + 1} has a zero byte"
    return text, ""


def _wrong_header(cells: list[str], delimiter: str) -> str:
    names = [cell.strip() for cell in cells]
    if "" in names:
        return "a column of the header has no name"
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        return f"the header has two columns '{repeated[0]}'"
    if len(names) == 1 and delimiter == "," and ";" in names[0]:
        return "the columns are separated by ';', and a .csv file needs ','"
    return ""


def _check_columns(path: Path, records: list[tuple[int, Record]], mapping: Mapping) -> None:
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    named = [mapping.prompt, mapping.answer, *COLUMN.findall(mapping.template or ""), *mapping.keep]
    problems = [f"no column '{name}'{_nearest(name, columns)}" for name in named if name and name not in columns]
    if mapping.template and not COLUMN.search(mapping.template):
        problems.append("--template names no {column}")
    if not problems:
        problems = [wrong for name, values in mapping.keep.items() for wrong in _wrong_keep(records, name, values)]
    refuse([f"{path}: {each}" for each in problems], fix=f"its columns are: {', '.join(columns)}")


def _wrong_keep(records: list[tuple[int, Record]], column: str, values: list[str]) -> Iterator[str]:
    there = sorted({_cell(record, column) for _, record in records})
    for value in values:
        if value not in there:
            yield f"no row has {column} '{value}'{_nearest(value, there)}"


def _is_kept(record: Record, keep: dict[str, list[str]]) -> bool:
    return all(_cell(record, column) in values for column, values in keep.items())


def _mapped(path: Path, records: list[tuple[int, Record]], mapping: Mapping) -> list[Row]:
    rows, problems = [], []
    for line, record in records:
        question = _question(record, mapping)
        answer = _cell(record, mapping.answer or "")
        if not question.strip() or not answer:
            empty = f"'{mapping.answer}'" if question.strip() else f"'{mapping.prompt or mapping.template}'"
            problems.append(f"{path}:{line}: {empty} is empty")
            continue
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(_with_system(Row(chat), mapping.system))
    refuse(problems, fix="fill or remove these rows")
    return rows


def _question(record: Record, mapping: Mapping) -> str:
    if mapping.template is None:
        return _cell(record, mapping.prompt or "")
    return COLUMN.sub(lambda found: _cell(record, found[1]), mapping.template)


def _cell(record: Record, column: str) -> str:
    """A cell as text; what is no text in JSON (an answer with fields, say) stays JSON."""
    value = record.get(column)
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_system(row: Row, system: str | None) -> Row:
    if not system or row.messages[0]["role"] == "system":
        return row
    return Row([{"role": "system", "content": system}, *row.messages], row.id)


def _without_repeats(rows: list[Row], seen: set[str]) -> tuple[list[Row], int]:
    kept = {row.question: row for row in reversed(rows) if row.question not in seen}
    return list(reversed(kept.values())), len(rows) - len(kept)


def _groups(rows: list[Row]) -> list[list[Row]]:
    labels = labels_of(rows)
    if labels is None:
        return [rows]
    return [[row for row in rows if row.answer == label] for label in labels]


def _part(rows: int, part: float) -> int:
    """At least one row of three or more, never the last one."""
    return min(max(round(rows * part), 1 if rows >= 3 and part > 0 else 0), rows - 1) if rows else 0


def _rank(row: Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{row.question}".encode()).hexdigest()


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
