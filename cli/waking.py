"""After an event was appended: see to it that a worker is there, if a recipe has triggers or ft.yaml has sinks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.project import Project, recipe_files

ON = re.compile(r"""^["']?on["']?\s*:""", re.MULTILINE)
SINKS = re.compile(r"""^["']?sinks["']?\s*:""", re.MULTILINE)


@contextmanager
def noticing(project: Project) -> Iterator[None]:
    """Append events inside; a worker looks at them. Without triggers and sinks none is started."""
    from jobs.worker_process import ensure_worker, submitting

    with submitting(project):
        yield
        if has_triggers(project) or has_sinks(project):
            ensure_worker(project)


def has_triggers(project: Project) -> bool:
    """A quick look: does any recipe have a line that begins with `on:`?"""
    return any(ON.search(_text(file)) for file in recipe_files(project))


def has_sinks(project: Project) -> bool:
    """The same of ft.yaml: does a line begin with `sinks:`?"""
    return (project.root / "ft.yaml").is_file() and bool(SINKS.search(_text(project.root / "ft.yaml")))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
