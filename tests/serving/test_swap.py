"""Swaps with a real vLLM and real adapters: under load, with a failing probe, across a kill, around a training.

The tests share one server and are run in order; each says in its first lines what it needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from registry import events
from registry.cards import marker, try_lock
from registry.errors import AdmissionError
from serving.control import engine_for
from serving.engine import BASE
from tests.serving.conftest import MODEL, SERVE, Served

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "Who are you?"}]
WORDS = {"ALPHA": "alpha", "BETA": "beta"}


@dataclass(frozen=True)
class Answer:
    status: int
    adapter: str
    text: str
    began: float
    ended: float
    retry_after: str = ""

    @property
    def word(self) -> str:
        """Which adapter must have said this: 'alpha', 'beta', or '' for neither (or a mixture)."""
        said = {name for word, name in WORDS.items() if word in self.text}
        return said.pop() if len(said) == 1 else ""


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    *,
    model: str = MODEL,
    stream: bool = False,
    headers: dict[str, str] | None = None,
    max_tokens: int = 12,
) -> Answer:
    body = {"model": model, "messages": QUESTION, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    began = time.time()
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as got:
        raw = await got.text()
        text = _stream_text(raw) if stream and got.status == 200 else _plain_text(raw, got.status)
        label, later = got.headers.get("x-ft-adapter", ""), got.headers.get("retry-after", "")
        assert got.headers["x-request-id"]
        return Answer(got.status, label, text, began, time.time(), later)


def _plain_text(raw: str, status: int) -> str:
    body = json.loads(raw)
    return str(body["choices"][0]["message"]["content"] if status == 200 else body["error"]["message"])


def _stream_text(raw: str) -> str:
    parts = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    assert parts[-1] == "[DONE]", raw
    assert '"error"' not in raw, raw
    return "".join(json.loads(part)["choices"][0]["delta"].get("content") or "" for part in parts[:-1])


def ask_once(served: Served, **options: object) -> Answer:
    async def once() -> Answer:
        async with aiohttp.ClientSession() as session:
            return await ask(session, served.url, **options)  # type: ignore[arg-type]

    return asyncio.run(once())


def wait_until(what: Callable[[], bool], seconds: float, why: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s: {why}"
        time.sleep(0.1)


def test_the_champion_answers_and_says_who_it_is(served: Served) -> None:
    for stream in (False, True):
        answer = ask_once(served, stream=stream)
        assert (answer.status, answer.adapter, answer.word) == (200, f"{MODEL}@1", "alpha")
    (event,) = events.read(served.store, type_="adapter.served")
    assert event.subject == f"{MODEL}@1"
    assert event.data["parity"]["outcome"] == "pass"
    assert set(event.data["seconds"]) == {"admit", "load", "warm", "probe", "flip"}


def test_swaps_under_load_lose_and_mislabel_nothing(served: Served) -> None:
    total, flips = 80, []

    async def load() -> list[Answer]:
        answers: list[Answer] = []
        asked = iter(range(total))

        async def caller(session: aiohttp.ClientSession, url: str) -> None:
            for number in asked:
                answers.append(await ask(session, url, stream=number % 2 == 0))

        async def swaps() -> None:
            for count, change in ((total // 4, lambda: served.promote(beta)), (total // 2, served.roll_back)):
                while len(answers) < count:
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(change)

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(swaps(), *(caller(session, served.url) for _ in range(8)))
        return answers

    beta = served.register("beta")
    answers = asyncio.run(load())
    words = {f"{MODEL}@1": "alpha", beta.name: "beta"}
    assert Counter(each.status for each in answers) == {200: total}
    assert [each for each in answers if words[each.adapter] != each.word] == []
    assert {each.adapter for each in answers} == set(words)
    flips = [each["at"] for each in served.status.swaps if each["from"]]
    assert len(flips) >= 1
    across = [each for each in answers for flip in flips if each.began < flip < each.ended]
    assert across, "no answer was under way at a flip"
    wait_until(lambda: served.status.routes == {MODEL: f"{MODEL}@1"}, 10, "rolled back")
    told = events.read(served.store, type_="adapter.served")
    assert [each.subject for each in told] == [f"{MODEL}@1", beta.name, f"{MODEL}@1"]
    assert set(told[2].data["seconds"]) == {"flip"}, "a rollback loads and probes nothing"
    assert {f"{MODEL}@1", beta.name} <= set(served.status.loaded), "previous is kept loaded"


def test_a_failed_probe_leaves_the_old_version_serving(served: Served) -> None:
    before = served.status.routes[MODEL]
    wrong = served.register("beta", fingerprint_of="alpha")
    served.promote(wrong)
    wait_until(lambda: bool(_refusals(served, wrong.name)), 20, "refused")
    time.sleep(2)  # several rounds: a refused version is not tried again and again
    (refusal,) = _refusals(served, wrong.name)
    assert refusal.data["parity"]["bf16_distance"] > 1
    answer = ask_once(served)
    assert (answer.status, answer.adapter, answer.word) == (200, before, "alpha")
    assert wrong.name not in served.status.loaded
    assert "parity" in served.status.refused[wrong.name]
    served.roll_back()
    served.promote(wrong)  # who promotes it again gets a second answer
    wait_until(lambda: len(_refusals(served, wrong.name)) == 2, 20, "tried and refused again")
    served.roll_back()


def test_an_adapter_that_was_changed_is_not_loaded(served: Served) -> None:
    before = served.status.routes[MODEL]
    changed = served.register("beta")
    weights = served.project.home / changed.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    served.promote(changed)
    wait_until(lambda: bool(_refusals(served, changed.name)), 20, "refused")
    assert ask_once(served).adapter == before
    served.roll_back()


def test_an_unjudged_version_needs_the_internal_key(served: Served) -> None:
    unjudged = served.register("beta")
    folder = served.project.home / unjudged.folder

    async def borrow() -> None:
        async with (
            engine_for(served.project, served.store, served.settings, served.base, SERVE, served.card) as engine,
            aiohttp.ClientSession() as session,
        ):
            await engine.load(unjudged.name, folder)
            await engine.load(unjudged.name, folder)
            with pytest.raises(AdmissionError, match="loaded already"):
                await engine.load(unjudged.name, served.made / "alpha")
            assert (await engine.models())[unjudged.name] == str(folder)
            ids = await engine.tokenize(unjudged.name, QUESTION)
            scores = await engine.prompt_logprobs(unjudged.name, ids)
            assert len(scores) == len(ids) - 1
            assert max(scores) <= 0
            reply = await engine.chat(unjudged.name, QUESTION, max_tokens=12, temperature=0)
            assert "BETA" in reply.text
            assert reply.prompt_tokens == len(ids)
            await asyncio.sleep(1.5)  # the server's rounds leave an evaluation's versions alone
            assert (await ask(session, served.url, model=unjudged.name)).status == 404
            known = await ask(session, served.url, model=unjudged.name, headers=served.internal)
            assert (known.status, known.adapter, known.word) == (200, unjudged.name, "beta")
            base = await ask(session, served.url, model=BASE, headers=served.internal)
            assert (base.status, base.word) == (200, "")

    asyncio.run(borrow())
    wait_until(lambda: unjudged.name not in served.status.loaded, 10, "unloaded after the evaluation")


def test_a_killed_engine_comes_back_with_its_adapters(served: Served) -> None:
    group = served.status.engine_pid
    starts, before = served.status.engine_starts, served.status.routes[MODEL]
    assert group is not None

    async def kill_in_mid_stream() -> bytes:
        body = {"model": MODEL, "messages": QUESTION, "max_tokens": 300, "ignore_eos": True, "stream": True}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{served.url}/v1/chat/completions", json=body) as got,
        ):
            assert got.status == 200
            await got.content.readany()
            os.kill(_vllm_of(group), signal.SIGKILL)
            return await got.content.read()

    rest = asyncio.run(kill_in_mid_stream())
    assert b'"code": "engine_broke"' in rest
    assert b"[DONE]" not in rest
    refused = ask_once(served)
    assert (refused.status, refused.retry_after) == (503, "5")
    wait_until(lambda: not members(group), 20, "nothing of the killed engine is left")
    wait_until(lambda: served.status.state == "serving" and bool(served.status.routes), 400, "restored")
    assert served.status.engine_starts == starts + 1
    answer = ask_once(served)
    assert (answer.status, answer.adapter, answer.word) == (200, before, "alpha")


def test_the_card_is_given_to_training_and_taken_back_for_an_evaluation(served: Served) -> None:
    with marker(served.project, served.card, "train"):
        wait_until(lambda: served.status.state == "card given to training", 60, "given")
        lock = try_lock(served.project, served.card, "a training")
        assert lock is not None
        answer = ask_once(served)
        assert (answer.status, answer.retry_after) == (503, "30")
        assert answer.ended - answer.began < 1, "a training is not waited for"
        lock.release()

        async def evaluate() -> str:
            async with engine_for(
                served.project, served.store, served.settings, served.base, SERVE, served.card
            ) as engine:
                return (await engine.chat(BASE, QUESTION, max_tokens=4)).text

        assert asyncio.run(evaluate())
    wait_until(lambda: served.status.state == "serving", 400, "serving again")
    assert ask_once(served).word == "alpha"


def _refusals(served: Served, name: str) -> list[events.Event]:
    return events.read(served.store, type_="adapter.refused", subject=name)


def members(group: int | None) -> list[int]:
    """Living processes of a process group."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            fields = _stat(each)
            if len(fields) > 2 and fields[2] == str(group) and fields[0] != "Z":
                found.append(int(each.name))
    return found


def _vllm_of(keeper: int) -> int:
    """The keeper's child: vLLM's first process."""
    return next(pid for pid in members(keeper) if _stat(Path(f"/proc/{pid}"))[1] == str(keeper))


def _stat(process: Path) -> list[str]:
    """State, parent, group... of a process; [] if it has just ended."""
    try:
        return (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
