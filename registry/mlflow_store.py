"""MLflow: where runs are logged and adapters are registered. The truth of aliases is our own store.

Every write is keyed by our run's id (a tag), so that what is repeated after a crash adopts what is there.
Importing mlflow takes seconds, so it happens inside the functions of `Tracker`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import TrackerError
from registry.job_folder import JobFolder
from registry.mlflow_server import artifact_root, own_server, own_store
from registry.project import Project, user_name
from registry.recipe import Recipe, expand

RUN_TAG = "ft.run"
BEGUN_TAG = "ft.begun"
METRICS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory")
# Without it MLflow's UI takes the runs for an agent's evaluations.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_process_wide = threading.Lock()
# The packages whose versions decide what an adapter becomes.
STACK = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "mlflow", "dvc", "dbos")


@dataclass(frozen=True)
class Tracked:
    """Names of our run in MLflow."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class RunFacts:
    """What is logged of a run: `dataset` has path, hash (DVC) and rows; `base` is a BaseModel's dict."""

    run_id: str
    recipe: Recipe
    recipe_digest: str
    dataset: dict[str, Any]
    base: dict[str, Any]
    commit: str


class Tracker:
    """One MLflow store: the recipe's `tracking.uri`, else MLFLOW_TRACKING_URI, else the project's own.

    That is `.ft/mlflow.db`, through its server while `ft up` has one.
    """

    def __init__(self, project: Project, uri: str | None = None) -> None:
        named, server = uri or os.environ.get("MLFLOW_TRACKING_URI"), own_server(project)
        self.uri = named or server or own_store(project)
        own = self.uri.startswith("sqlite") or self.uri.rstrip("/") == server
        self.artifacts = artifact_root(project) if own else None

    def begin(self, facts: RunFacts) -> Tracked:
        """The MLflow run of our run: the one that is there, or a new one with params, recipe and dataset."""
        with self._client("cannot begin the run") as client:
            experiment = self._experiment(client, _experiment_name(facts.recipe))
            found = _run_of(client, experiment, facts.run_id)
            run = found or client.create_run(experiment, run_name=facts.run_id, tags=_run_tags(facts))
            tracked = Tracked(experiment, run.info.run_id)
            if BEGUN_TAG not in run.data.tags:  # new, or its beginning was cut off: each part of it replaces itself
                _log_params(client, tracked, facts)
                _log_dataset(client, tracked, facts)
                client.log_dict(tracked.run_id, facts.recipe.model_dump(mode="json"), "recipe.json")
                client.log_dict(tracked.run_id, environment(), "environment.json")
                client.set_tag(tracked.run_id, BEGUN_TAG, "true")
            if run.info.status != "RUNNING":  # it had failed, and was resumed
                client.update_run(tracked.run_id, status="RUNNING")
            return tracked

    def send_progress(self, tracked: Tracked, job: JobFolder) -> int:
        """Send the progress that was not sent yet; what MLflow did not take stays in the folder for next time."""
        from mlflow.entities import Metric

        sent = _sent(job)
        files = [file for file in job.progress_files() if file.name > sent]
        for file in files:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            metrics = [
                Metric(name, float(line[name]), int(line["time"] * 1000), int(line["step"]))
                for line in lines
                for name in METRICS
                if name in line and "step" in line
            ]
            with self._client("cannot log metrics") as client:
                client.log_batch(tracked.run_id, metrics=metrics)
            (job.path / "mlflow_sent").write_text(file.name, encoding="utf-8")
        return len(files)

    def register(self, tracked: Tracked, model: str, run_id: str, folder: Path, facts: dict[str, Any]) -> int:
        """Adapter as LoggedModel and registered model version with lineage tags; the version's number."""
        with self._client("cannot register the adapter") as client:
            _ensure_model(client, model)
            done = [
                each for each in client.search_model_versions(f"name = '{model}'") if each.tags.get(RUN_TAG) == run_id
            ]
            if done:
                return int(done[0].version)
            logged = self._logged_model(client, tracked, model, run_id, folder)
            tags = {RUN_TAG: run_id, **{f"ft.{name}": _text(value) for name, value in facts.items()}}
            with _resolving_at(self.uri):
                made = client.create_model_version(
                    model, source=logged.model_uri, run_id=tracked.run_id, tags=tags, model_id=logged.model_id
                )
            return int(made.version)

    def log_scores(self, tracked: Tracked, scores: dict[str, dict[str, float]]) -> None:
        """Final metrics by subject: `test/candidate/exact_match`, ..."""
        with self._client("cannot log scores") as client:
            for subject, metrics in scores.items():
                for name, value in metrics.items():
                    client.log_metric(tracked.run_id, f"test/{subject}/{name}", value)

    def tag_verdict(self, model: str, version: int, outcome: str, body: dict[str, Any]) -> None:
        with self._client("cannot write the verdict") as client:
            client.set_model_version_tag(model, str(version), "ft.verdict", outcome)
            client.set_model_version_tag(model, str(version), "ft.verdict.numbers", _text(body)[:90_000])

    def set_alias(self, model: str, alias: str, version: int) -> None:
        with self._client("cannot set an alias") as client:
            client.set_registered_model_alias(model, alias, str(version))

    def delete_alias(self, model: str, alias: str) -> None:
        with self._client("cannot delete an alias") as client:
            client.delete_registered_model_alias(model, alias)

    def aliases(self, model: str) -> dict[str, int] | None:
        """None if MLflow does not know the model."""
        from mlflow.exceptions import MlflowException

        with self._client("cannot read aliases") as client:
            try:
                found = client.get_registered_model(model).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return {alias: int(version) for alias, version in found.items()}

    def tag_refused(self, model: str, version: int, reason: str) -> None:
        """Say at the version why its alias was put back; a version that is gone needs no word."""
        from mlflow.exceptions import MlflowException

        with self._client("cannot write why an alias was refused") as client:
            try:
                client.set_model_version_tag(model, str(version), "ft.refused", reason)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def end(self, recipe: Recipe, run_id: str, status: str) -> None:
        """End the MLflow run of our run, if it was ever begun. `status` is FINISHED, FAILED or KILLED."""
        with self._client("cannot end the run") as client:
            experiment = client.get_experiment_by_name(_experiment_name(recipe))
            run = _run_of(client, experiment.experiment_id, run_id) if experiment else None
            if run:
                client.set_terminated(run.info.run_id, status)

    def _experiment(self, client: Any, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name, artifact_location=self.artifacts, tags=EXPERIMENT_TAGS))
        except MlflowException:  # another run of the same model was a moment faster
            return str(client.get_experiment_by_name(name).experiment_id)

    def _logged_model(self, client: Any, tracked: Tracked, model: str, run_id: str, folder: Path) -> Any:
        from mlflow.entities import LoggedModelOutput

        found = client.search_logged_models([tracked.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'")
        ready = [each for each in found if str(each.status) in ("READY", "LoggedModelStatus.READY")]
        if ready:
            return ready[0]
        logged = client.create_logged_model(
            tracked.experiment_id,
            name=model,
            source_run_id=tracked.run_id,
            tags={RUN_TAG: run_id},
            model_type="lora",
        )
        client.log_model_artifacts(logged.model_id, str(folder))
        client.log_outputs(tracked.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return client.finalize_logged_model(logged.model_id, "READY")

    @contextmanager
    def _client(self, what: str) -> Iterator[Any]:
        # One retry of ten seconds: our own steps come back later, and training must not wait for a tracker.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import requests
        import sqlalchemy.exc
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            yield MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise TrackerError(
                f"MLflow: {what}: {_first_line(error)}",
                place=_without_password(self.uri),
                fix="start it again (or check MLFLOW_TRACKING_URI); nothing of the run is lost, `ft resume` goes on",
            ) from error


@contextmanager
def _resolving_at(uri: str) -> Iterator[None]:
    """The registry resolves `models:/m-...` by MLflow's process-wide tracking URI, whatever the client's is."""
    import mlflow

    with _process_wide:
        # set_tracking_uri writes the environment variable too, and a later `Tracker` would read it there.
        before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            if variable is not None:
                os.environ["MLFLOW_TRACKING_URI"] = variable


def tracker_for(project: Project, recipe: Recipe) -> Tracker:
    return Tracker(project, expand(recipe.tracking.uri, "tracking.uri"))


def environment() -> dict[str, str]:
    """Versions that decide what comes out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in STACK:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(root: Path) -> str:
    """The commit that is checked out, with `+changes` where tracked files differ from it; '' outside of git."""
    head = _git(root, "rev-parse", "HEAD")
    return head + ("+changes" if head and _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _experiment_name(recipe: Recipe) -> str:
    return recipe.tracking.experiment or recipe.model


def _run_of(client: Any, experiment: str, run_id: str) -> Any:
    found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
    return found[0] if found else None


def _run_tags(facts: RunFacts) -> dict[str, str]:
    return {
        RUN_TAG: facts.run_id,
        "ft.recipe": facts.recipe.name,
        "ft.recipe_digest": facts.recipe_digest,
        "ft.dataset": facts.dataset["path"],
        "ft.dataset_hash": facts.dataset["hash"],
        "ft.base": facts.base["source"],
        "ft.base_revision": facts.base["revision"],
        "ft.licence": facts.base["licence"],
        "mlflow.user": user_name(),
        "mlflow.source.name": f"recipe {facts.recipe.name}",
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": facts.commit,
    }


def _log_params(client: Any, tracked: Tracked, facts: RunFacts) -> None:
    from mlflow.entities import Param

    body = facts.recipe.model_dump(mode="json", include={"train", "gate", "evaluate", "data"})
    params = [Param(name, _text(value)[:6000]) for name, value in _flat(body)]
    client.log_batch(tracked.run_id, params=[*params, Param("base", facts.base["source"])])


def _log_dataset(client: Any, tracked: Tracked, facts: RunFacts) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    path, digest = facts.dataset["path"], facts.dataset["hash"]
    source = json.dumps({"path": path, "dvc_hash": digest, "git_commit": facts.commit})
    # MLflow's digest is 36 characters at most: a DVC directory hash (`<32 hex>.dir`) is just that.
    dataset = Dataset(path, digest[:36], "dvc", source, profile=json.dumps({"rows": facts.dataset["rows"]}))
    tags = [InputTag("mlflow.data.context", "training"), InputTag("dvc.md5", digest)]
    client.log_inputs(tracked.run_id, [DatasetInput(dataset, tags)])


def _first_line(error: Exception) -> str:
    said = str(error).strip() or repr(error)
    return _without_password(said.splitlines()[0])[:300]


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)


def _ensure_model(client: Any, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)


def _sent(job: JobFolder) -> str:
    try:
        return (job.path / "mlflow_sent").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _flat(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
