"""After an event was appended: see to it that a worker is there, if a recipe has triggers or ft.yaml has sinks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from registry.project import Project, has_triggers, recipe_files, text_of

SINKS = re.compile(r"""^["']?sinks["']?\s*:""", re.MULTILINE)


@contextmanager
def noticing(project: Project) -> Iterator[None]:
    """Append events inside; a worker looks at them. Without triggers and sinks none is started."""
    from jobs.worker_process import ensure_worker, submitting

    with submitting(project):
        yield
        if any_triggers(project) or has_sinks(project):
            ensure_worker(project)


def any_triggers(project: Project) -> bool:
    """A quick look: does any recipe have a line that begins with `on:`?"""
    return any(has_triggers(text_of(file)) for file in recipe_files(project))


def has_sinks(project: Project) -> bool:
    """The same of ft.yaml: does a line begin with `sinks:`?"""
    return (project.root / "ft.yaml").is_file() and bool(SINKS.search(text_of(project.root / "ft.yaml")))
