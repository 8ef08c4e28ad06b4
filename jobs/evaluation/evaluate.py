"""Evaluation: candidate, champion and bare base answer the same held-out rows, where they will serve.

`EvalRequest` says who is asked what; `evaluate` asks those who have no kept score yet and returns all scores.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.evaluation.ask_rows import Answer, Asked, Patience, Progress, ask_rows
from jobs.evaluation.metrics import as_label, mark, schema_validator
from jobs.evaluation.prompts import PROMPT_VERSION, spell_out
from registry.adapters import Version, aliases, get_version, refuse_pruned
from registry.admission import RANKS, admit
from registry.base_models import BaseModel
from registry.chat_data import Row, load_rows
from registry.errors import EngineError
from registry.manifest import manifest_digest
from registry.project import Project
from registry.recipe import Evaluate, Finetune
from registry.sampling import pick_rows
from registry.scores import Scored, find_score, keep_score, metric_for, score_key
from registry.store import Store
from serving.engine import BASE, Engine

CANDIDATE, CHAMPION = "candidate", "champion"


@dataclass(frozen=True)
class Subject:
    """Who is asked. `folder` is relative to the project's `.ft`; the base has neither it nor a version."""

    role: str
    name: str
    digest: str
    base: str
    version: int | None = None
    folder: str = ""
    rank: int = 0

    @classmethod
    def of(cls, project: Project, role: str, version: Version) -> Subject:
        refuse_pruned(version.model, version.version, version.pruned)
        digest = manifest_digest(project.home / version.folder)
        base = str(version.body["base"]["digest"])
        return cls(role, version.name, digest, base, version.version, version.folder, int(version.body["rank"]))

    @classmethod
    def bare(cls, base: BaseModel) -> Subject:
        return cls(BASE, BASE, base.digest, base.digest)


@dataclass(frozen=True)
class EvalRequest:
    """Who is asked what: `task` is the recipe's evaluate section, `labels` what the base is told there is.

    `dataset` is DVC's hash of the dataset version, `base` the digest of the base model that the engine has.
    """

    task: Evaluate
    labels: tuple[str, ...]
    test_file: Path
    max_test: int | None
    seed: int
    dataset: str
    base: str
    asked: tuple[Subject, ...]

    @classmethod
    def for_version(
        cls,
        project: Project,
        store: Store,
        recipe: Finetune,
        base: BaseModel,
        dataset: Mapping[str, Any],
        data: Path,
        **versions: int | None,
    ) -> EvalRequest:
        """`versions` are numbers of the recipe's model by role (candidate, champion); the base comes last.

        `dataset` has the `hash` of the version whose splits lie in the folder `data`. A candidate that is the
        champion is compared with the bare base.
        """
        if versions.get(CHAMPION) == versions.get(CANDIDATE):
            versions[CHAMPION] = None
        subjects = [
            Subject.of(project, role, get_version(store, recipe.model, number))
            for role, number in versions.items()
            if number is not None
        ]
        return cls.made(recipe, base, str(dataset["hash"]), data, [*subjects, Subject.bare(base)])

    @classmethod
    def made(
        cls, recipe: Finetune, base: BaseModel, dataset: str, data: Path, subjects: Sequence[Subject]
    ) -> EvalRequest:
        """Raises RecipeError, before anything is asked, for a schema or metric that could not be scored."""
        task = recipe.evaluate
        metric_for(task.task, recipe.gate.metric)
        if task.json_schema is not None:
            schema_validator(task.json_schema)
        return cls(
            task=task,
            labels=tuple(_labels(task, data / "train.jsonl")),
            test_file=data / "test.jsonl",
            max_test=recipe.data.max_test,
            seed=recipe.train.seed,
            dataset=dataset,
            base=base.digest,
            asked=tuple(subjects),
        )

    @staticmethod
    def subjects(state: Mapping[str, Any]) -> tuple[Scored, Scored | None, Scored]:
        """Candidate, champion (if there was one) and base, for the gate; from plain JSON by role."""
        scores = {role: Scored.from_dict(stored) for role, stored in state["scores"].items()}
        return scores[CANDIDATE], scores.get(CHAMPION), scores[BASE]


async def evaluate(
    project: Project,
    store: Store,
    engine: Engine,
    request: EvalRequest,
    progress: Progress,
    patience: Patience | None = None,
) -> dict[str, Scored]:
    """Scores by role. What is kept from before is not asked again; `progress(done, total)` counts rows.

    Adapters that the engine does not have are loaded as `model@N` for the time of their questions. Raises
    EngineError if the engine fails, AdmissionError for an adapter that must not be loaded.
    """
    rows = picked_rows(request)
    found = kept_scores(store, request)
    waiting = [subject for subject in request.asked if subject.role not in found]
    for at, subject in enumerate(waiting):
        count = counted(progress, at * len(rows), len(waiting) * len(rows))
        async with _loaded(project, store, engine, subject):
            scored, answers = await score_subject(engine, request, subject, rows, count, patience or Patience())
        if not scored.failed:  # an answer that failed once may come next time
            keep_score(store, subject_key(request, subject, rows), scored, [each.as_dict() for each in answers])
        found[subject.role] = scored
    return {subject.role: found[subject.role] for subject in request.asked}


def kept_scores(store: Store, request: EvalRequest) -> dict[str, Scored]:
    """Scores by role that need no engine: kept ones, and that of a version which this engine cannot have."""
    rows = picked_rows(request)
    kept = {subject: find_score(store, subject_key(request, subject, rows)) for subject in request.asked}
    found = {}
    for subject, scored in kept.items():
        if scored is not None:
            # Equal adapters (the same recipe on the same data) share their score, but not their name.
            found[subject.role] = replace(scored, subject=subject.name, version=subject.version)
        elif subject.base != request.base:
            why = f"it stands on another base model; `ft eval {subject.name}` on this dataset scores it there"
            found[subject.role] = Scored(subject.name, subject.version, missing=why)
    return found


def picked_rows(request: EvalRequest) -> list[Row]:
    """The rows that are asked. Raises DataError if the file cannot be read."""
    return pick_rows(load_rows(request.test_file), request.max_test, request.seed)


@asynccontextmanager
async def _loaded(project: Project, store: Store, engine: Engine, subject: Subject) -> AsyncIterator[None]:
    """The engine has the subject while the block runs; what was there before stays."""
    if not subject.folder or subject.name in await engine.models():
        yield
        return
    folder = project.home / subject.folder
    await asyncio.to_thread(admit, folder, subject.base, max(RANKS))
    await engine.load(subject.name, folder)
    try:
        yield
    finally:
        if not _is_wanted(store, subject):
            with suppress(EngineError):  # of an engine that is gone nothing needs to be unloaded
                await engine.unload(subject.name)


def _is_wanted(store: Store, subject: Subject) -> bool:
    """Was it promoted meanwhile? Then the server answers with it, and it must not be taken away."""
    named = aliases(store, subject.name.partition("@")[0])
    return subject.version in (named.get("champion"), named.get("previous"))


async def score_subject(
    engine: Asked,
    request: EvalRequest,
    subject: Subject,
    rows: list[Row],
    progress: Progress,
    patience: Patience,
) -> tuple[Scored, list[Answer]]:
    """What one subject, which the engine has, gets on the rows, with its answers in their order."""
    task = request.task
    prompts = [row.prompt for row in rows]
    if not subject.folder:
        prompts = [spell_out(prompt, task, request.labels) for prompt in prompts]
    answers = await ask_rows(
        engine,
        subject.name,
        prompts,
        max_tokens=task.max_new_tokens,
        concurrency=task.concurrency,
        patience=patience,
        progress=progress,
    )
    marks = mark(task.task, task.json_schema, [row.answer for row in rows], [each.text for each in answers])
    scored = Scored(
        subject=subject.name,
        version=subject.version,
        rows=_digest(rows),
        metrics=marks.metrics,
        values=marks.values,
        pairs=marks.pairs,
        failed=[at for at, answer in enumerate(answers) if answer.text is None],
        detail=marks.detail,
        probes=await _ask_probes(engine, request, subject, patience),
    )
    return scored, answers


async def _ask_probes(engine: Asked, request: EvalRequest, subject: Subject, patience: Patience) -> dict[str, str]:
    """The recipe's probes, asked of all subjects in the same bare words; an answer that fails is empty."""
    probes = request.task.probes
    answers = await ask_rows(
        engine,
        subject.name,
        [[{"role": "user", "content": probe}] for probe in probes],
        max_tokens=request.task.max_new_tokens,
        concurrency=request.task.concurrency,
        patience=replace(patience, tolerated=1.0),
        progress=lambda done, total: None,
    )
    return {probe: answer.text or "" for probe, answer in zip(probes, answers, strict=True)}


def _labels(task: Evaluate, train_file: Path) -> list[str]:
    """The labels that there are: the recipe's, else the different answers of the train split."""
    if task.task != "label":
        return []
    answers = task.labels if task.labels is not None else [row.answer for row in load_rows(train_file)]
    return sorted({as_label(answer): answer.strip() for answer in answers}.values())


def subject_key(request: EvalRequest, subject: Subject, rows: list[Row]) -> str:
    """All that the subject's answers and their score rest on; labels come from the task or the dataset."""
    facts = {
        "subject": subject.digest,
        "dataset": request.dataset,
        "task": request.task.model_dump(mode="json", exclude={"concurrency"}),
        "rows": _digest(rows),
        "prompt": PROMPT_VERSION,
    }
    return score_key(facts)


def _digest(rows: list[Row]) -> str:
    text = json.dumps([row.messages for row in rows], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def counted(progress: Progress, before: int, total: int) -> Progress:
    """Of one subject among several."""
    return lambda done, _: progress(before + done, total)
