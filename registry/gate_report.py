"""A verdict as a report: markdown for people, JUnit XML for CI systems, JSON for programs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from typing import Any, Literal

from registry.adapters import Verdict

Form = Literal["markdown", "junit", "json"]
# XML 1.0 has no way to write these at all.
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKS = {"pass": "passes", "fail": "fails", "undecided": "cannot be decided"}


def report(verdict: Verdict, form: Form) -> str:
    """The whole verdict in that form."""
    return {"markdown": markdown, "junit": junit, "json": as_json}[form](verdict)


def markdown(verdict: Verdict) -> str:
    """A heading, the checks, and the scores of all subjects; fit for a CI system's summary page."""
    body = verdict.body
    lines = [f"## {verdict.model}@{verdict.version} {MARKS[verdict.outcome]}", ""]
    lines += ["| check | outcome | |", "|---|---|---|"]
    lines += [f"| {_cell(each['name'])} | {each['outcome']} | {_cell(each['text'])} |" for each in body["checks"]]
    if scores := body.get("scores"):
        lines += ["", *_score_table(scores, body)]
    if "rows" in body:
        lines += ["", f"{body['rows']} rows, metric {body['metric']}, champion {_champion(body)}, "
                      f"{body['resamples']} resamples with seed {body['seed']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def junit(verdict: Verdict) -> str:
    """One test case per check. What is undecided is a failure too: a CI job must hold the promotion back."""
    checks = verdict.body["checks"]
    failures = sum(check["outcome"] != "pass" for check in checks)
    name = f"{verdict.model}@{verdict.version}"
    suite = ET.Element("testsuite", name=name, tests=str(len(checks)), failures=str(failures), errors="0")
    for check in checks:
        case = ET.SubElement(suite, "testcase", classname=f"gate.{verdict.model}", name=check["name"])
        text = NOT_IN_XML.sub("?", check["text"])
        if check["outcome"] == "pass":
            ET.SubElement(case, "system-out").text = text
        else:
            ET.SubElement(case, "failure", type=check["outcome"], message=text).text = text
    ET.SubElement(suite, "system-out").text = NOT_IN_XML.sub("?", as_json(verdict))
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"


def as_json(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _score_table(scores: dict[str, dict[str, float]], body: dict[str, Any]) -> list[str]:
    metrics = sorted({metric for each in scores.values() for metric in each})
    head = f"| | {' | '.join(metrics)} | unanswered |"
    rule = "|---" * (len(metrics) + 2) + "|"
    rows = []
    for role, each in scores.items():
        cells = [f"{each[metric]:.3f}" if metric in each else "-" for metric in metrics]
        rows.append(f"| {role} | {' | '.join(cells)} | {body['failures'][role]} |")
    return [head, rule, *rows]


def _champion(body: dict[str, Any]) -> str:
    return "none (compared with the bare base)" if body.get("champion") is None else f"version {body['champion']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
