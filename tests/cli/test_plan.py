"""`ft plan`: what fits where, in words and as JSON, quickly once the tokens are counted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.plan import time_span
from registry.calibration import note_measured
from registry.card_profiles import GIB
from registry.dataset_versions import store_version
from registry.geometry import geometry_of
from registry.plan import Measured
from registry.project import Project
from registry.store import open_store
from registry.train_memory import Training
from tests.conftest import TinyBase, run_bounded
from tests.dvc_projects import make_project, write_splits
from tests.fakes.runpod.started import standin

HEAVY = ("torch", "transformers", "dbos", "sqlalchemy", "mlflow", "httpx2", "boto3", "dvc.repo", "datasets", "numpy")
# The shape of a model of 7.6 billion parameters.
MIDDLE = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
          "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768}  # fmt: skip


@dataclass(frozen=True)
class Desk:
    """A project on a machine whose only card is the CPU."""

    project: Project
    base: Path

    def recipe(self, **more: Any) -> Path:
        path = self.project.root / "recipes" / "tickets.yaml"
        body = {"kind": "finetune", "base": str(self.base), "data": {"path": "datasets/tickets"},
                "evaluate": {"task": "label"}, **more}  # fmt: skip
        path.write_text(yaml.safe_dump(body), encoding="utf-8")
        return path

    def ft(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli.main", "plan", "recipes/tickets.yaml", *arguments]
        return run_bounded(command, 120, env={"FT_HOST": "desk", **env}, cwd=self.project.root)

    def json(self, *arguments: str, **env: str) -> dict[str, Any]:
        done = self.ft("--json", *arguments, **env)
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if found["chosen"] else 2), done.stderr
        return found

    def settings(self, **written: Any) -> None:
        (self.project.root / "ft.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, because to count tokens takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def desk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: TinyBase) -> Desk:
    monkeypatch.setenv("FT_CACHE", str(cache))
    monkeypatch.setenv("FT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    made = make_project(tmp_path / "project")
    store_version(made, "tickets", write_splits, replace=False)
    base = Path(shutil.copytree(tiny_base.folder, tmp_path / "base"))
    found = Desk(Project(made.root, tmp_path / "home", cache), base)
    found.recipe()
    return found


def of_7_billion(desk: Desk) -> None:
    config = json.loads((desk.base / "config.json").read_text())
    config.pop("head_dim", None)
    (desk.base / "config.json").write_text(json.dumps({**config, **MIDDLE}))


def names(found: dict[str, Any]) -> list[str]:
    return [each["name"] for each in found["candidates"]]


def test_a_plan_says_where_it_would_run_and_how_long_it_takes(desk: Desk, tmp_path: Path) -> None:
    done = desk.ft(FT_CACHE=str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    first, about, _, row, takes, serving = done.stdout.splitlines()
    assert first == "counting the tokens of 9 rows, once for this version of datasets/tickets"
    assert "3 rows with" in about
    assert row.split()[:4] == [">", "desk/cpu", "cpu", "yes"]
    assert takes.startswith("`ft run` takes desk/cpu: batch 8 x accumulate 1, 1 steps; limited by speed")
    assert serving.startswith("serving on desk/cpu: yes, ")
    again = desk.ft(FT_CACHE=str(tmp_path / "new"))
    assert again.stdout.splitlines() == done.stdout.splitlines()[1:]
    assert not (desk.project.home / "jobs").exists()


def test_once_counted_a_plan_imports_nothing_heavy(desk: Desk) -> None:
    desk.ft()
    code = (
        "import sys; sys.argv = ['ft', 'plan', 'recipes/tickets.yaml']\nfrom cli.main import main\n"
        f"try: main()\nfinally: print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = run_bounded([sys.executable, "-c", code], 60, cwd=desk.project.root)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_what_does_not_fit_is_an_error_with_a_way_out_after_the_table(desk: Desk) -> None:
    of_7_billion(desk)
    desk.settings(cards={"cpu": {"memory_gb": 6}})
    done = desk.ft()
    assert done.returncode == 2
    assert "desk/cpu" in done.stdout
    assert "of 6.0 GiB" in done.stdout
    assert "desk/cpu: memory: " in done.stdout
    assert "fits on no card that the recipe allows" in done.stderr
    assert "GiB too much" in done.stderr
    assert "would do, for about $" in done.stderr
    found = desk.json()
    assert (found["chosen"], found["refusal"]["error"]) == (None, "DoesNotFit")
    assert found["candidates"][0]["limit"].startswith("memory: ")


def test_rented_cards_come_with_runpods_prices_and_the_cheapest_run_is_chosen(desk: Desk, tmp_path: Path) -> None:
    of_7_billion(desk)
    desk.settings(cards={"cpu": {"memory_gb": 6}})
    desk.recipe(cloud={"max_usd_per_hour": 0.5}, train={"batch": 1})
    with standin(tmp_path / "cloud") as cloud:
        found = desk.json(**cloud.environment)
        words = desk.ft(**cloud.environment).stdout
    assert found["prices"]["asked"] > 0
    rented = [each for each in found["candidates"] if each["kind"] == "runpod"]
    assert {each["cloud"] for each in rented} == {"secure"}
    fitting = [each for each in rented if each["fits"]]
    assert found["chosen"] == min(fitting, key=lambda each: each["usd"]["mid"])["name"]
    assert found["chosen"].startswith("runpod/")
    assert f">  {found['chosen']}" in words
    assert "prices: RunPod's catalogue, 0 min ago" in words


def test_all_shows_every_card_of_runpod_once_and_that_its_prices_are_old(desk: Desk) -> None:
    found = desk.json("--all")
    rented = [each for each in found["candidates"] if each["kind"] == "runpod"]
    assert len({each["gpu"] for each in rented}) == len(rented) >= 10
    assert {each["why_not"] for each in rented} == {"the recipe has no `cloud`, so nothing is rented"}
    assert found["prices"]["asked"] is None
    assert "the lowest of March 2026, not today's" in desk.ft("--all").stdout
    assert names(desk.json()) == ["desk/cpu"]


def test_a_card_that_the_recipe_names_is_shown_though_its_price_is_not_known(desk: Desk) -> None:
    desk.recipe(cloud={"gpus": ["NVIDIA A40"]})
    found = desk.json()
    assert names(found) == ["desk/cpu", "runpod/A40 secure"]
    assert found["candidates"][1]["why_not"] == "its price is not known"


def test_what_finished_runs_measured_makes_the_plan_surer(desk: Desk) -> None:
    before = desk.json()["candidates"][0]
    shape = geometry_of(json.loads((desk.base / "config.json").read_text()))
    training = Training(batch=8, longest=30)
    row = Measured("cpu", str(desk.base), "trl", shape, training, peak=GIB, step_seconds=None, memory=GIB)
    note_measured(open_store(desk.project), "run-1", row)
    after = desk.json()["candidates"][0]
    assert after["memory"]["high"] / after["memory"]["low"] < before["memory"]["high"] / before["memory"]["low"]


def test_a_plan_says_whether_the_base_can_be_served_on_ones_own_card(desk: Desk) -> None:
    of_7_billion(desk)
    desk.settings(cards={"cpu": {"memory_gb": 12}})
    done, found = desk.ft(), desk.json()["candidates"][0]
    assert "serving on desk/cpu: no; memory: " in done.stdout
    assert (found["serving"]["fits"], found["serving"]["serving"]["precision"]) == (False, "bf16")
    desk.settings(cards={"cpu": {"memory_gb": 12, "serve": "never"}})
    assert "serving on desk/cpu: not at all (ft.yaml)" in desk.ft().stdout
    assert desk.json()["candidates"][0]["serving"] is None


def test_lengths_that_are_estimated_are_said_to_be(desk: Desk, tmp_path: Path) -> None:
    nobody = {"FT_TRAINER_PYTHON": "nowhere", "FT_CACHE": str(tmp_path / "new")}
    done = desk.ft(**nobody)
    assert done.returncode == 0, done.stderr
    assert "tokens (about median" in done.stdout
    assert "note: token lengths are estimated: the tokens cannot be counted" in done.stdout
    assert desk.json(**nobody)["tokens"]["estimated"]


def test_packs_are_counted_and_their_steps_told(desk: Desk) -> None:
    desk.recipe(train={"packing": True, "batch": 1})
    told = desk.json()
    number, tokens = told["tokens"]["packs"], told["tokens"]["in_an_epoch"]
    assert tokens / 1024 <= number < told["tokens"]["rows"]
    assert told["candidates"][0]["steps"] == number
    assert f" in {number} packs of at most 1024" in desk.ft().stdout
    desk.recipe(train={"batch": 4})
    assert desk.json()["tokens"]["packs"] is None


def test_rows_that_are_too_long_are_told_of_before_the_run(desk: Desk) -> None:
    desk.recipe(train={"max_length": 20})
    assert "note: 3 rows are longer than max_length 20: the trainer refuses them" in desk.ft().stdout
    assert desk.json()["tokens"]["over_max_length"] == 3


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (40, 80, "40-80 s"),
        (60, 240, "1-4 min"),
        (1800, 7100, "30-118 min"),
        (5000, 20000, "1.4-5.6 h"),
        (40000, 90000, "11-25 h"),
        (100000, 400000, "1.2-4.6 d"),
        (1000000, 4000000, "12-46 d"),
    ],
)
def test_times_are_told_as_fine_as_they_mean_anything(low: float, high: float, said: str) -> None:
    assert time_span(low, high) == said
