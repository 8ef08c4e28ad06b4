"""MLflow's aliases follow ours: what has moved since MLflow was told last is told again until it is taken."""

from __future__ import annotations

from registry import adapters
from registry.mlflow_store import Tracker
from registry.store import Store


def mirror_aliases(store: Store, tracker: Tracker, model: str) -> int:
    """Tell MLflow of the model's moved aliases; how many. Raises TrackerError; what is not told stays for later."""
    moved = [each for each in adapters.unprojected_aliases(store) if each[0] == model]
    for _, alias, version in moved:
        tracker.set_alias(model, alias, version)
        adapters.mark_projected(store, model, alias, version)
    return len(moved)
