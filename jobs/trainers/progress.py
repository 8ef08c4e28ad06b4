"""Turns what a training loop logs into progress lines: step, loss, tokens/s, memory, eta."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any


class ProgressMeter:
    """Counts from where this attempt began, so that a resumed job's rate and eta are of this attempt."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.report = report
        self.first = self.steps = 0
        self.tokens = 0
        self.started = time.monotonic()

    def begin(self, step: int, steps: int) -> None:
        self.first, self.steps, self.started = step, steps, time.monotonic()
        self.report({"step": step, "steps": steps})

    def log(self, step: int, logs: dict[str, float], memory: int) -> None:
        """Raises FloatingPointError when the loss is no number any more: more steps would not mend it."""
        seconds, done = time.monotonic() - self.started, step - self.first
        self.tokens = int(logs.get("num_tokens", self.tokens))
        line: dict[str, Any] = {
            "step": step,
            "steps": self.steps,
            "memory": memory,
            "seconds": round(seconds, 2),
        }
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if name in logs:
                line[name] = logs[name]
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {step}")
        if done > 0 and seconds > 0:
            line["tokens_per_second"] = round(self.tokens / seconds, 1)
            line["eta"] = round(seconds / done * (self.steps - step), 1)
        self.report(line)
