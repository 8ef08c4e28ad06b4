"""After an event was appended: see to it that a worker is there to decide on it, if any recipe has triggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.project import Project


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
    files = (project.root / "recipes").glob("*.y*ml")
    return any(line.startswith("on:") for file in files for line in file.read_text(encoding="utf-8").splitlines())
