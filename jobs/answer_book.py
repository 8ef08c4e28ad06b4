"""What an engine has answered in a job, by question: kept in the job's checkpoints, so no pod asks it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import Any

from jobs.evaluation.ask_rows import Asked, Messages
from registry.job_folder import JobFolder
from registry.manifest import write_manifest

FILE = "answers.json"
KEPT = 2


@dataclass(frozen=True)
class Said:
    text: str


class AnswerBook:
    """Begins with what the newest complete checkpoint has. Errors are not kept: they are asked again."""

    def __init__(self, job: JobFolder, epoch: int) -> None:
        self.job, self.epoch = job, epoch
        newest = next(iter(job.complete_checkpoints()), None)
        text = (newest / FILE).read_text(encoding="utf-8") if newest else "{}"
        self.answers: dict[str, str] = json.loads(text)
        self.saved = len(self.answers)

    def over(self, engine: Asked) -> Asked:
        """The engine, asked only what is not in the book."""
        return _Remembering(engine, self.answers)

    def save(self) -> None:
        """A checkpoint of all answers up to now, if there are new ones."""
        answers = dict(self.answers)
        if len(answers) == self.saved:
            return
        folder = self.job.checkpoints / f"{self.epoch:04d}-{len(answers)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / FILE).write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
        write_manifest(folder)
        self.job.prune_checkpoints(KEPT)
        self.saved = len(answers)


class _Remembering:
    def __init__(self, engine: Asked, answers: dict[str, str]) -> None:
        self.engine, self.answers = engine, answers

    async def chat(self, name: str, messages: Messages, **options: Any) -> Said:
        asked = json.dumps({"model": name, "messages": messages, **options}, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(asked.encode()).hexdigest()
        if key not in self.answers:
            self.answers[key] = (await self.engine.chat(name, messages, **options)).text
        return Said(self.answers[key])
