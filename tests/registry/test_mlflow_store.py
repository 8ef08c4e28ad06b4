"""MLflow, the real one: what is logged and registered, once however often it is tried, also while it is away."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from registry.errors import TrackerError
from registry.job_folder import JobFolder
from registry.manifest import broken_files, write_manifest
from registry.mlflow_store import RUN_TAG, RunFacts, Tracker, environment, git_commit
from registry.project import Project
from registry.recipe import Finetune
from tests.mlflow_server import free_port, mlflow_server

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

HASH = "0123456789abcdef0123456789abcdef.dir"
RECIPE = Finetune.model_validate({
    "kind": "finetune", "name": "support", "model": "tickets", "base": {"model": "org/base"},
    "data": {"path": "datasets/tickets"}, "evaluate": {"task": "label", "labels": ["a", "b"]},
    "train": {"learning_rate": 1e-3},
})  # fmt: skip
FACTS = RunFacts(
    run_id="support-1",
    recipe=RECIPE,
    recipe_digest="d" * 64,
    dataset={"path": "datasets/tickets", "hash": HASH, "rows": {"train": 360, "eval": 48, "test": 60}},
    base={"source": "org/base", "revision": "r1", "licence": "MIT"},
    commit="c" * 40,
)


@pytest.fixture
def tracker(project: Project) -> Tracker:
    project.home.mkdir()
    return Tracker(project)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": np.arange(6, dtype=np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    write_manifest(folder)
    return folder


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "job")
    folder.write_spec({})
    for batch in (1, 2):
        lines = [
            {"time": 1000.0 + step, "step": step, "loss": 1 / step, "memory": 7} for step in (2 * batch - 1, 2 * batch)
        ]
        folder.add_progress(1, batch, [*lines, {"time": 1010.0, "stage": "fingerprint"}])
    return folder


def client_of(tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)


def losses(tracker: Tracker, run_id: str) -> list[tuple[int, float]]:
    history = client_of(tracker).get_metric_history(run_id, "loss")
    return sorted((metric.step, metric.value) for metric in history)


def test_a_run_is_begun_once_with_all_that_it_rests_on(tracker: Tracker) -> None:
    tracked = tracker.begin(FACTS)
    assert tracker.begin(FACTS) == tracked
    client = client_of(tracker)
    assert [run.info.run_id for run in client.search_runs([tracked.experiment_id])] == [tracked.run_id]
    run = client.get_run(tracked.run_id)
    experiment = client.get_experiment(tracked.experiment_id)
    assert experiment.name == "tickets"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert run.info.run_name == "support-1"
    assert run.data.params["train.learning_rate"] == "0.001"
    assert run.data.params["evaluate.labels"] == '["a", "b"]'
    assert run.data.params["base"] == "org/base"
    expected = {RUN_TAG: "support-1", "ft.recipe": "support", "ft.dataset_hash": HASH, "ft.base_revision": "r1",
                "ft.licence": "MIT", "mlflow.source.git.commit": "c" * 40,
                "mlflow.source.name": "recipe support"}  # fmt: skip
    assert expected.items() <= run.data.tags.items()
    [dataset_input] = run.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("datasets/tickets", HASH)
    assert {tag.key: tag.value for tag in dataset_input.tags} == {"mlflow.data.context": "training", "dvc.md5": HASH}
    assert json.loads(dataset_input.dataset.source)["dvc_hash"] == HASH
    names = {each.path for each in client.list_artifacts(tracked.run_id)}
    assert names == {"recipe.json", "environment.json"}


def test_a_beginning_that_was_cut_off_is_made_whole(tracker: Tracker) -> None:
    client = client_of(tracker)
    experiment = client.create_experiment("tickets", artifact_location=tracker.artifacts)
    cut_off = client.create_run(experiment, tags={RUN_TAG: "support-1"})
    tracked = tracker.begin(FACTS)
    assert tracked.run_id == cut_off.info.run_id
    run = client.get_run(tracked.run_id)
    assert run.data.params["base"] == "org/base"
    assert len(run.inputs.dataset_inputs) == 1


def test_progress_becomes_metrics_by_step_and_is_sent_once(tracker: Tracker, job: JobFolder) -> None:
    tracked = tracker.begin(FACTS)
    assert tracker.send_progress(tracked, job) == 2
    assert tracker.send_progress(tracked, job) == 0
    job.add_progress(2, 1, [{"time": 2000.0, "step": 5, "loss": 0.2}])
    assert tracker.send_progress(tracked, job) == 1
    assert losses(tracker, tracked.run_id) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2)]
    (job.path / "mlflow_sent").unlink()  # killed between sending and noting so
    tracker.send_progress(tracked, job)
    assert len(losses(tracker, tracked.run_id)) == 5


def test_an_adapter_is_registered_once_and_can_be_had_again(tracker: Tracker, adapter: Path, tmp_path: Path) -> None:
    import mlflow

    tracked = tracker.begin(FACTS)
    facts = {"base": "org/base", "dataset_hash": HASH, "rank": 8}
    version = tracker.register(tracked, "tickets", "support-1", adapter, facts)
    assert version == tracker.register(tracked, "tickets", "support-1", adapter, facts) == 1
    assert tracker.register(tracked, "tickets", "support-2", adapter, facts) == 2
    client = client_of(tracker)
    assert len(client.search_model_versions("name = 'tickets'")) == 2
    registered = client.get_model_version("tickets", "1")
    expected = {RUN_TAG: "support-1", "ft.base": "org/base", "ft.dataset_hash": HASH, "ft.rank": "8"}
    assert expected.items() <= registered.tags.items()
    assert (registered.run_id, registered.status) == (tracked.run_id, "READY")
    assert registered.source.startswith("models:/m-")
    logged = client.get_logged_model(registered.source.removeprefix("models:/"))
    assert str(logged.status) in ("READY", "LoggedModelStatus.READY")
    outputs = client.get_run(tracked.run_id).outputs.model_outputs
    assert logged.model_id in {each.model_id for each in outputs}, "the run's page shows what came out of it"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    try:
        had = mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(tmp_path / "had"))
    finally:
        mlflow.set_tracking_uri(before)
    assert broken_files(Path(had)) == []
    assert load_file(Path(had) / "adapter_model.safetensors")["lora_A"].tolist() == [0, 1, 2, 3, 4, 5]


def test_verdict_scores_aliases_and_the_end_are_shown(tracker: Tracker, adapter: Path) -> None:
    tracked = tracker.begin(FACTS)
    version = tracker.register(tracked, "tickets", "support-1", adapter, {})
    for _ in range(2):
        tracker.log_scores(tracked, {"candidate": {"exact_match": 0.8}, "base": {"exact_match": 0.1}})
        tracker.tag_verdict("tickets", version, "pass", {"checks": [{"name": "min", "ok": True}] * 5000})
        tracker.set_alias("tickets", "champion", version)
        tracker.end(RECIPE, FACTS.run_id, "FINISHED")
    client = client_of(tracker)
    run = client.get_run(tracked.run_id)
    assert run.data.metrics["test/candidate/exact_match"] == 0.8
    assert run.data.metrics["test/base/exact_match"] == 0.1
    assert run.info.status == "FINISHED"
    champion = client.get_model_version_by_alias("tickets", "champion")
    assert (int(champion.version), champion.tags["ft.verdict"]) == (version, "pass")


def test_a_run_that_failed_is_on_again_when_it_is_resumed(tracker: Tracker) -> None:
    tracker.end(RECIPE, FACTS.run_id, "FAILED")  # never begun, so there is nothing to end
    tracked = tracker.begin(FACTS)
    client = client_of(tracker)
    for status in ("FAILED", "KILLED"):
        tracker.end(RECIPE, FACTS.run_id, status)
        assert client.get_run(tracked.run_id).info.status == status
        assert tracker.begin(FACTS) == tracked
        assert client.get_run(tracked.run_id).info.status == "RUNNING"


def test_where_it_is_logged(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tracker(project).uri == f"sqlite:///{project.home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert Tracker(project).uri == "http://tracker:5000"
    assert Tracker(project, "http://mine").uri == "http://mine"


def test_a_server_that_is_away_is_said_soon_and_progress_waits_for_it(
    project: Project, job: JobFolder, tmp_path: Path
) -> None:
    port = free_port()
    tracker = Tracker(project, f"http://user:secret@127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(TrackerError, match="MLflow: cannot begin the run") as caught:
        tracker.begin(FACTS)
    assert time.monotonic() - began < 15
    assert "secret" not in str(caught.value)
    with mlflow_server(port, tmp_path / "server"):
        tracked = tracker.begin(FACTS)
        assert tracker.send_progress(tracked, job) == 2
    job.add_progress(1, 3, [{"time": 2000.0, "step": 5, "loss": 0.2}])
    began = time.monotonic()
    with pytest.raises(TrackerError, match="MLflow: cannot log metrics"):
        tracker.send_progress(tracked, job)
    assert time.monotonic() - began < 15
    with mlflow_server(port, tmp_path / "server"):
        assert tracker.send_progress(tracked, job) == 1
        assert [step for step, _ in losses(tracker, tracked.run_id)] == [1, 2, 3, 4, 5]


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "untracked").touch()
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == commit + "+changes"


def test_the_environment_has_the_versions_that_decide() -> None:
    found = environment()
    assert {"python", "platform", "mlflow", "dvc"} <= found.keys()
