"""Several engines behind one server: side by side, in turns, on demand, on a card that training wants too."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from registry.base_models import BaseModel
from registry.cards import holder, marker, pick_card, try_lock
from registry.cloud_terms import CardSetting
from registry.errors import DoesNotFit, EngineError, WrongInput
from registry.project import Project
from registry.settings import Settings
from registry.store import Store
from serving.routes import Away, Route
from serving.vllm_process import engine_log, free_port
from tests.conftest import ROOT
from tests.serving.small_fleet import Running, add_champion, make_base, recipe_of, running, small_vllm

CPU = pick_card("cpu")
SETTINGS = Settings(drain_seconds=5, engine_start_seconds=30)
# Room for one small engine (2.5 GiB), not for two.
NARROW = Settings(drain_seconds=5, engine_start_seconds=30, cards={"cpu": CardSetting(memory_gb=4)})
ON_DEMAND: dict[str, Any] = {"start": "demand", "residence": "1s", "idle": "1h"}


@pytest.fixture
def project(project: Project) -> Project:
    """One whose base models and environments are its own, too."""
    for shared in (project.models, project.envs):
        shared.unlink()
        shared.mkdir()
    return project


@pytest.fixture
def bases(project: Project, store: Store) -> dict[str, BaseModel]:
    """Two base models, with a model that has a champion on each: `ants` on a, `bees` on b."""
    small_vllm(project)
    found = {name: make_base(project, name * size) for name, size in (("a", 1), ("b", 2))}
    add_champion(project, store, "ants", found["a"])
    add_champion(project, store, "bees", found["b"])
    return found


def test_each_model_is_answered_by_the_engine_of_its_base(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        port = free_port()
        with_port = SETTINGS.model_copy(update={"engine_port": port})
        async with running(project, store, with_port, recipe_of(bases, a={}, b={})) as here:
            await here.until(lambda: bool(here.answers("ants") and here.answers("bees")))
            assert [each.url.rpartition(":")[2] for _, each in here.statuses()] == [str(port), str(port + 1)]
            assert (await here.ask("ants"), await here.ask("bees")) == (bases["a"].folder, bases["b"].folder)
            assert not here.board.routes.closed, "what one engine does not serve the other does"
            await here.until(lambda: {here.state("a"), here.state("b")} == {"serving"})
            assert isinstance(here.board.routes.engines["a"], Route)
            assert holder(project, CPU) == f"ft serve, pid {os.getpid()}"
            assert engine_log(project, "a").exists()
            new = add_champion(project, store, "bees", bases["b"])
            await here.until(lambda: here.answers("bees") == new.name)
        assert not holder(project, CPU), "the card is free when both engines have ended"

    asyncio.run(test())


def test_a_killed_engine_comes_back_with_its_adapters_and_the_other_answers_meanwhile(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        async with running(project, store, SETTINGS, recipe_of(bases, a={}, b={})) as here:
            await here.until(lambda: bool(here.answers("ants") and here.answers("bees")))
            before = here.route("ants").engine
            here.kill("a")
            await here.until(lambda: "ants" in here.board.routes.away, 5)
            assert await here.ask("bees") == bases["b"].folder
            await here.until(lambda: here.answers("ants") == "ants@1")
            again = here.route("ants").engine
            assert again is not before
            assert "ants@1" in await again.models()  # type: ignore[attr-defined]
            assert await here.ask("ants") == bases["a"].folder
            assert [each.starts for _, each in here.statuses()] == [2, 1]

    asyncio.run(test())


def test_an_engine_that_cannot_start_does_not_take_the_others_with_it(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        (project.models / bases["a"].folder / "broken").touch()
        async with running(project, store, SETTINGS, recipe_of(bases, a={}, b={})) as here:
            await here.until(
                lambda: here.answers("bees") == "bees@1" and "cannot be served" in here.statuses()[0][1].reason
            )
            (project.models / bases["a"].folder / "broken").unlink()
            await here.until(lambda: here.answers("ants") == "ants@1")
        (project.models / bases["a"].folder / "broken").touch()
        with pytest.raises(EngineError, match="cannot be served"):
            async with running(project, store, SETTINGS, recipe_of(bases, a={})) as here:
                await asyncio.wait_for(here.working, 20)

    asyncio.run(test())


def test_two_on_demand_take_turns_where_they_do_not_fit_together(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        async with running(project, store, NARROW, recipe_of(bases, a=ON_DEMAND, b=ON_DEMAND)) as here:
            await asyncio.sleep(1)
            assert (here.state("a"), here.state("b")) == ("off", "off"), "nobody has asked"
            away = here.board.routes.away["ants"]
            assert (away.engine, away.hold, away.seconds) == ("a", True, 120.0)
            assert away.want is not None
            away.want()
            await here.until(lambda: here.answers("ants") == "ants@1")
            up = time.monotonic()
            slow = asyncio.create_task(here.ask("ants", seconds=2.5))
            await asyncio.sleep(0.05)
            here.board.demand.want("b")
            await here.until(lambda: here.board.demand.header("b").startswith("waiting for its turn; eta="), 3)
            await here.until(lambda: here.answers("bees") == "bees@1")
            assert time.monotonic() - up > 1.0, "at least its residence"
            assert await slow == bases["a"].folder, "what was under way was answered before it stopped"
            assert here.state("a") == "off"
            assert here.board.demand.header("b") == "up"
            here.board.demand.want("a")
            await here.until(lambda: here.answers("ants") == "ants@1" and here.state("b") == "off")
            assert here.board.demand.start_seconds["a"] > 0

    asyncio.run(test())


def test_one_on_demand_stops_when_nobody_asks_any_more(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        async with running(project, store, SETTINGS, recipe_of(bases, a={**ON_DEMAND, "idle": "1s"}, b={})) as here:
            here.board.demand.want("a")
            await here.until(lambda: here.answers("ants") == "ants@1")
            await here.ask("ants", seconds=1.5)
            assert here.state("a") == "serving", "busy is not idle"
            await here.until(lambda: here.state("a") == "off", 5)
            assert here.board.routes.away["ants"].engine == "a"
            assert here.answers("bees") == "bees@1"

    asyncio.run(test())


def test_enough_requests_with_a_word_start_an_engine(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        volume = {"requests": 2, "within": "1m", "keywords": ["계약서", "Contract"]}
        async with running(project, store, SETTINGS, recipe_of(bases, a={**ON_DEMAND, "volume": volume})) as here:
            for text in ("CONTRACT, please", "hello", "hello"):
                here.board.demand.count("a", text)
            await asyncio.sleep(0.7)
            assert here.state("a") == "off"
            here.board.demand.count("a", "이 계약서를 봐 주세요")
            await here.until(lambda: here.answers("ants") == "ants@1")

    asyncio.run(test())


def test_all_engines_of_a_card_give_way_to_training(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        async with running(project, store, SETTINGS, recipe_of(bases, a={}, b=ON_DEMAND)) as here:
            here.board.demand.want("b")
            await here.until(lambda: bool(here.answers("ants") and here.answers("bees")))
            with marker(project, CPU, "train"):
                await here.until(lambda: {here.state("a"), here.state("b")} == {"card given to training"})
                lock = try_lock(project, CPU, "a trainer")
                assert lock is not None
                assert not here.board.routes.away["bees"].hold
            here.board.demand.want("b")
            await here.until(lambda: {here.state("a"), here.state("b")} == {"waiting for the card"})
            lock.release()
            await here.until(lambda: bool(here.answers("ants") and here.answers("bees")))

    asyncio.run(test())


def test_one_that_sleeps_keeps_its_process_and_is_probed_again(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def test() -> None:
        what = recipe_of(bases, a={**ON_DEMAND, "idle": "1s", "sleep": True})
        async with running(project, store, SETTINGS, what) as here:
            engine = here.fleet.own["a"]
            # As on a GPU: a CPU's vLLM takes the request to sleep, and does nothing.
            engine.config = replace(engine.config, sleeps=True)
            here.board.demand.want("a")
            await here.until(lambda: here.answers("ants") == "ants@1")
            await here.until(lambda: here.state("a") == "asleep", 5)
            pid = here.fleet.statuses()["a"].pid
            assert isinstance(here.board.routes.engines["a"], Away)
            here.board.demand.want("a")
            await here.until(lambda: here.answers("ants") == "ants@1")
            status = here.fleet.statuses()["a"]
            assert (status.pid, status.starts) == (pid, 1)
            await here.until(lambda: here.state("a") == "asleep", 5)
            with marker(project, CPU, "train"):
                await here.until(lambda: here.fleet.statuses()["a"].pid is None)

    asyncio.run(test())


def test_engines_that_always_are_up_must_fit_at_once(
    project: Project, store: Store, bases: dict[str, BaseModel]
) -> None:
    async def start() -> None:
        async with running(project, store, NARROW, recipe_of(bases, a={}, b={})):
            pass

    with pytest.raises(DoesNotFit, match=r"'a' does not fit beside b: 5\.0 GiB of 4\.0") as raised:
        asyncio.run(start())
    assert "start: demand" in raised.value.fix


def test_four_bits_need_a_gpu(project: Project, store: Store, bases: dict[str, BaseModel]) -> None:
    async def start() -> None:
        async with running(project, store, SETTINGS, recipe_of(bases, a={"precision": "bitsandbytes"})):
            pass

    with pytest.raises(WrongInput, match="need a GPU"):
        asyncio.run(start())


def test_adapters_are_loaded_into_somebodys_vllm_and_again_when_it_was_restarted(
    project: Project, store: Store, bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        port = free_port()
        monkeypatch.setenv("BIG_KEY", "theirs")
        lent = {"url": f"http://127.0.0.1:{port}", "key": "${BIG_KEY}"}
        async with running(project, store, SETTINGS, recipe_of(bases, a=lent)) as here:
            await here.until(lambda: here.state("a") == "away")
            assert not here.board.routes.away["ants"].hold
            for _ in range(2):
                theirs = await _their_vllm(port, project, bases["a"])
                try:
                    await here.until(lambda: here.answers("ants") == "ants@1")
                    assert await here.ask("ants") == bases["a"].folder
                finally:
                    theirs.kill()
                    await theirs.wait()
                await here.until(lambda: here.state("a") == "away" and "ants" in here.board.routes.away)

    asyncio.run(test())


def test_somebodys_vllm_moves_with_the_env_file(
    project: Project, store: Store, bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(here: Running, port: int) -> bool:
        return here.answers("ants") == "ants@1" and here.route("ants").engine.url.endswith(str(port))

    async def test() -> None:
        first, second, env = free_port(), free_port(), project.root / ".env"
        monkeypatch.delenv("BIG_URL", raising=False)
        env.write_text(f"BIG_URL=http://127.0.0.1:{first}/\nBIG_KEY=theirs\n")
        lent = {"url": "${BIG_URL}", "key": "${BIG_KEY}"}
        theirs = [await _their_vllm(port, project, bases["a"]) for port in (first, second)]
        try:
            async with running(project, store, SETTINGS, recipe_of(bases, a=lent)) as here:
                await here.until(lambda: here.answers("ants") == "ants@1")
                env.write_text("BIG_KEY=theirs\n")
                await here.until(lambda: "url is empty" in dict(here.statuses())["a"].reason)
                assert await here.ask("ants") == bases["a"].folder, "it stays where it is"
                env.write_text(f"BIG_URL=http://127.0.0.1:{second}\nBIG_KEY=theirs\n")
                await here.until(lambda: moved(here, second))
                theirs[0].kill()
                assert await here.ask("ants") == bases["a"].folder
        finally:
            for each in theirs:
                with suppress(ProcessLookupError):
                    each.kill()
                await each.wait()

    asyncio.run(test())


async def _their_vllm(port: int, project: Project, base: BaseModel) -> asyncio.subprocess.Process:
    folder = project.models / base.folder
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.small_vllm", "--port", str(port), "--model", str(folder), cwd=ROOT,
        env={**os.environ, "VLLM_API_KEY": "theirs"},
    )  # fmt: skip
