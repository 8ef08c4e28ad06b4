"""Everything that can go wrong, as one tree.

    FtError
    ├── WrongInput        exit 2   you asked wrongly
    │   ├── RecipeError            a recipe that cannot be read (all of its errors at once)
    │   ├── DataError              a data file or dataset that cannot be used
    │   ├── BaseModelError         a base model that is not there, or may not be used so
    │   ├── NotFound               a run, model, version or recipe that does not exist
    │   ├── Conflict               it is on already, or has changed meanwhile
    │   ├── DoesNotFit             a model that fits no card or pod that the recipe allows
    │   └── BudgetError            a budget that is missing, or does not pay for it
    ├── Trouble           exit 1   it failed
    │   ├── StoreError             the project's database cannot be used
    │   ├── TrackerError           MLflow cannot be reached or refused
    │   ├── AdmissionError         an adapter that must not be loaded
    │   ├── JobError               a trainer failed or was lost
    │   ├── TimedOut               a step took longer than the recipe allows
    │   ├── EngineError            vLLM did not start or did not answer
    │   ├── MissingPart            something is missing on this machine
    │   ├── BucketError            the bucket of job folders cannot be used
    │   └── CloudError             RunPod cannot be reached, or refused
    │       ├── WrongKey               no key, or one that it does not take
    │       ├── NoCredit               the account has no money left
    │       ├── NoCapacity             none of that card is free just now
    │       └── AnswerLost             nobody knows whether it was done: look before trying again
    └── GateClosed        exit 3   the gate said no, or cannot decide

Each names the thing and the place, and, where there is one, the next command.
"""

from __future__ import annotations

from typing import Any, ClassVar


class FtError(Exception):
    """`what` went wrong, the `place` where, and `fix`: the next command or step."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, place: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.place, self.fix = what, place, fix

    def __str__(self) -> str:
        text = f"{self.place}: {self.what}" if self.place else self.what
        return f"{text}\n  -> {self.fix}" if self.fix else text

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, as stored in run rows and printed with --json."""
        return {"error": type(self).__name__, "what": self.what, "place": self.place, "fix": self.fix}


class WrongInput(FtError):
    exit_code = 2


class RecipeError(WrongInput):
    pass


class DataError(WrongInput):
    pass


class BaseModelError(WrongInput):
    pass


class NotFound(WrongInput):
    pass


class Conflict(WrongInput):
    pass


class DoesNotFit(WrongInput):
    pass


class BudgetError(WrongInput):
    pass


class Trouble(FtError):
    pass


class StoreError(Trouble):
    pass


class TrackerError(Trouble):
    pass


class AdmissionError(Trouble):
    pass


class JobError(Trouble):
    pass


class TimedOut(Trouble):
    pass


class EngineError(Trouble):
    pass


class MissingPart(Trouble):
    pass


class BucketError(Trouble):
    pass


class CloudError(Trouble):
    pass


class WrongKey(CloudError):
    pass


class NoCredit(CloudError):
    pass


class NoCapacity(CloudError):
    pass


class AnswerLost(CloudError):
    pass


class GateClosed(FtError):
    exit_code = 3


def _tree(root: type[FtError]) -> dict[str, type[FtError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_dict(stored: dict[str, Any]) -> FtError:
    """The error that `as_dict` wrote down; an unknown class (a newer version's) becomes Trouble."""
    kind = _tree(FtError).get(str(stored.get("error")), Trouble)
    return kind(str(stored.get("what")), place=str(stored.get("place", "")), fix=str(stored.get("fix", "")))
