"""After an event was appended: see to it that a worker is there to decide on it, if any recipe has triggers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.project import Project, recipe_files

ON = re.compile(r"""^["']?on["']?\s*:""", re.MULTILINE)


@contextmanager
def noticing(project: Project) -> Iterator[None]:
    """Append events inside; a worker looks at them. Without recipes that have triggers none is started."""
    from jobs.worker_process import ensure_worker, submitting

    with submitting(project):
        yield
        if has_triggers(project):
            ensure_worker(project)


def has_triggers(project: Project) -> bool:
    """A quick look: does any recipe have a line that begins with `on:`?"""
    return any(ON.search(_text(file)) for file in recipe_files(project))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
