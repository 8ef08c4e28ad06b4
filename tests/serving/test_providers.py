"""OpenAI as a provider, switched by a `.env` that changes under a running gateway; engines at other addresses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.project import load_dotenv
from registry.serve_recipe import EngineTerms, RouteTerms, ServeRecipe, is_local
from serving.ask import Ask
from serving.chain import Chain
from serving.engine import Engine
from serving.env_file import EnvFile
from serving.outside import Outside
from serving.providers import Providers, for_openai
from serving.remote_engine import RemoteEngine, RemoteEngines
from serving.routes import Away, Board, Route, Routes
from tests.fakes.canned_engine import CannedEngine, canned_engine
from tests.fakes.told import Told

CHAT = "/v1/chat/completions"
NAMES = ("FT_PROVIDER", "OPENAI_API_KEY", "OPENAI_BASE_URL", "FT_FROM_DOTENV", "FT_INTERNAL_KEY", "BIG_URL", "BIG_KEY")


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:  # set first, so that what a test puts there is taken away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def write(root: Path, text: str | bytes) -> None:
    """As editors do: another file in its place."""
    new = root / ".env.new"
    new.write_bytes(text.encode() if isinstance(text, str) else text)
    new.replace(root / ".env")


def test_what_changes_in_the_file_wins_over_what_was_loaded_from_it(tmp_path: Path) -> None:
    write(tmp_path, "FT_PROVIDER=openai\nOPENAI_API_KEY=one\n")
    load_dotenv(tmp_path)
    assert os.environ["FT_PROVIDER"] == "openai"
    env = EnvFile(tmp_path)
    assert (env.values["FT_PROVIDER"], env.look()) == ("openai", False)
    write(tmp_path, "FT_PROVIDER=local\nOPENAI_API_KEY=two\n")
    assert env.look()
    assert (env.values["FT_PROVIDER"], env.values["OPENAI_API_KEY"]) == ("local", "two")
    write(tmp_path, "OPENAI_API_KEY=two\n")
    assert env.look()
    assert "FT_PROVIDER" not in env.values
    assert os.environ["FT_PROVIDER"] == "openai"  # of this process nothing is changed


def test_the_real_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_PROVIDER", "local")
    write(tmp_path, "FT_PROVIDER=openai\nOPENAI_API_KEY=one\n")
    load_dotenv(tmp_path)
    env = EnvFile(tmp_path)
    write(tmp_path, "FT_PROVIDER=openai\nOPENAI_API_KEY=three\n")
    assert env.look()
    assert (env.values["FT_PROVIDER"], env.values["OPENAI_API_KEY"]) == ("local", "three")


def test_a_child_knows_what_its_parent_took_from_the_file(tmp_path: Path) -> None:
    write(tmp_path, "FT_PROVIDER=openai\n")
    load_dotenv(tmp_path)
    load_dotenv(tmp_path)  # as the child does, with the parent's environment
    env = EnvFile(tmp_path)
    write(tmp_path, "FT_PROVIDER=local\n")
    env.look()
    assert env.values["FT_PROVIDER"] == "local"


@pytest.mark.parametrize("broken", [b"FT_PROVIDER=\xff\xfe\n", b"FT_PROVIDER=a\0b\n"])
def test_a_broken_file_keeps_the_last_good_one_and_is_said_once(broken: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    write(tmp_path, "FT_PROVIDER=openai\n")
    env = EnvFile(tmp_path, said.append)
    write(tmp_path, broken)
    assert not any(env.look() for _ in range(3))
    assert env.values["FT_PROVIDER"] == "openai"
    assert len(said) == 1
    assert ".env" in said[0]
    write(tmp_path, "FT_PROVIDER=local\n")
    assert env.look()
    write(tmp_path, broken)
    env.look()
    assert len(said) == 2


def test_a_file_that_is_just_being_written_is_not_taken_for_empty(tmp_path: Path) -> None:
    write(tmp_path, "FT_PROVIDER=openai\n")
    env = EnvFile(tmp_path)
    (tmp_path / ".env").write_text("")
    assert not env.look()
    assert env.values["FT_PROVIDER"] == "openai"
    assert env.look()  # it stays so
    assert "FT_PROVIDER" not in env.values
    write(tmp_path, "FT_PROVIDER=openai\n")
    assert env.look()
    (tmp_path / ".env").unlink()
    assert not env.look()
    assert env.look()
    assert "FT_PROVIDER" not in env.values


def test_a_switch_there_and_back_needs_no_restart(tmp_path: Path) -> None:
    async def test(ours: CannedEngine, openai: CannedEngine, board: Board, chain: Chain) -> None:
        terms = RouteTerms(model="tickets", openai="gpt-x")
        plain = RouteTerms(model="tickets")
        assert await label(chain, terms) == "tickets@2"
        write(tmp_path, f"FT_PROVIDER=openai\nOPENAI_API_KEY=first-key\nOPENAI_BASE_URL={openai.url}/v1\n")
        await until(chain, terms, "openai/gpt-x")
        assert openai.seen[-1][0]["Authorization"] == "Bearer first-key"
        assert "first-key" not in str(ours.seen)
        assert await label(chain, plain) == "tickets@2"
        assert await label(chain, RouteTerms(model="tickets", openai="gpt-x", provider="local")) == "tickets@2"
        # An answer that is under way ends with the key that it began with.
        openai.faults = ["stall"]
        told = Told()
        streaming = asyncio.create_task(chain.answer(ask(terms, stream=True), told.send))
        await told.begun.wait()
        write(tmp_path, f"FT_PROVIDER=openai\nOPENAI_API_KEY=second-key\nOPENAI_BASE_URL={openai.url}/v1\n")
        async with asyncio.timeout(3):
            while openai.seen[-1][0]["Authorization"] != "Bearer second-key":
                await label(chain, terms)
                await asyncio.sleep(0.02)
        openai.gate.set()
        await streaming
        assert told.is_whole
        write(tmp_path, "FT_PROVIDER=local\n")
        await until(chain, terms, "tickets@2")

    asyncio.run(with_env(tmp_path, test))


def test_a_provider_that_is_none_and_a_key_that_is_missing(tmp_path: Path) -> None:
    async def run() -> None:
        said: list[str] = []
        providers = Providers(Board(), {"FT_PROVIDER": "openai"}, said.append)
        assert str(providers.default) == "openai"
        found = providers.openai("gpt-x")
        assert isinstance(found, Away)
        assert "OPENAI_API_KEY" in found.reason
        providers.put({"FT_PROVIDER": "opnai"})
        assert (str(providers.default), len(said)) == ("openai", 1)
        providers.put({})
        assert str(providers.default) == "local"
        await providers.close()

    asyncio.run(run())


def test_openais_own_name_for_the_length_of_an_answer() -> None:
    request = {"model": "x", "max_tokens": 5}
    assert for_openai(CHAT, request) == {"model": "x", "max_completion_tokens": 5}
    assert for_openai("/v1/completions", request) == request


@pytest.mark.parametrize(
    ("status", "body", "expected", "says"),
    [
        (401, b'{"error": {"message": "Incorrect API key provided: sk-secret"}}', (503, "provider_away"), "key"),
        (403, b"no", (503, "provider_away"), "key"),
        (404, b"{}", (503, "provider_away"), "model"),
        (429, b'{"error": {"code": "rate_limit_exceeded"}}', (429, "provider_busy"), "just now"),
        (429, b'{"error": {"code": "insufficient_quota"}}', (503, "provider_away"), "credit"),
        (500, b"Traceback at https://far.example", (503, "provider_away"), "500"),
        (
            400,
            b'{"error": {"message": "bad at https://far.example", "code": "c", "param": "p"}}',
            (400, "c"),
            "bad at …",
        ),
        (400, b'{"object": "error", "message": "old form"}', (400, "refused"), "old form"),
        (422, b"[" * 100_000, (422, "refused"), "refused"),
    ],
)
def test_what_goes_wrong_there_betrays_neither_address_nor_key(
    status: int, body: bytes, expected: tuple[int, str], says: str
) -> None:
    async def run() -> None:
        engine = RemoteEngine("big", "https://far.example", "sk-secret", local=False)
        refusal = engine.refusal(status, body)
        assert refusal is not None
        assert (refusal.status, refusal.code) == expected
        assert says in refusal.message
        assert "far.example" not in str(refusal.body)
        assert "sk-secret" not in str(refusal.body)
        assert engine.refusal(200, b"{}") is None
        await engine.close()

    asyncio.run(run())


def test_engines_elsewhere_are_looked_at_and_come_and_go() -> None:
    async def run() -> None:
        async with canned_engine() as big:
            recipe = recipe_of(
                big={"url": "${BIG_URL}/v1/", "key": "${BIG_KEY}"}, named={"url": big.url, "as": "large"},
                dead={"url": "http://127.0.0.1:9"}, ours={"base": "x/y"}, fleet={"url": big.url, "base": "x/y"},
            )  # fmt: skip
            clock = [0.0]
            engines = RemoteEngines(recipe, {}, lambda: clock[0])
            routes = await engines.look()
            assert set(routes.engines) == {"big", "named", "dead"}
            assert isinstance(routes.engines["big"], Away)
            assert routes.engines["big"].reason == "not set: BIG_URL, BIG_KEY"
            engines.put({"BIG_URL": big.url})
            routes = await engines.look()
            assert getattr(routes.engines["big"], "reason", "") == "not set: BIG_KEY"
            engines.put({"BIG_URL": big.url, "BIG_KEY": "k-1"})
            routes = await settled(engines, "big")
            found = routes.engines["big"]
            assert isinstance(found, Route)
            assert (found.adapter, found.engine.url, found.engine.local) == ("base", big.url, True)
            assert isinstance(routes.engines["named"], Route)
            assert routes.engines["named"].adapter == "large"
            assert isinstance(routes.engines["dead"], Away)
            assert await settled(engines, "big") == routes
            engines.put({"BIG_URL": "http://127.0.0.1:9", "BIG_KEY": "k-1"})
            clock[0] += 60
            assert isinstance((await settled(engines, "big")).engines["big"], Away)
            await engines.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000", True), ("http://localhost:8000", True), ("http://[::1]:8000", True),
        ("http://localhost.evil.com", False), ("http://127.0.0.1.evil.com", False), ("http://desk.local:8000", False),
        ("http://127.evil.com", False), ("http://127.0.0.1@evil.com", False), ("${BIG_URL}", False),
        ("http://[::1", False), ("https://user:pass@127.0.0.1", True),
    ],
)  # fmt: skip
def test_only_loopback_is_local_by_itself(url: str, local: bool) -> None:
    assert is_local(EngineTerms(url=url)) is local
    assert is_local(EngineTerms(url=url, local=True))


def recipe_of(**engines: Any) -> ServeRecipe:
    return ServeRecipe.model_validate({"kind": "serve", "name": "all", "engines": engines})


async def settled(engines: RemoteEngines, name: str) -> Routes:
    """After those that are due have been asked."""
    await engines.look()
    for each in engines._all.values():
        if each.looking:
            await each.looking
    return await engines.look()


def ask(terms: RouteTerms, **more: Any) -> Ask:
    request = {"model": "tickets", "messages": [], **more}
    return Ask(CHAT, request, "tickets", "tickets", terms, False, [], user="someone")


async def label(chain: Chain, terms: RouteTerms) -> str:
    told = Told()
    await chain.answer(ask(terms), told.send)
    return told.headers["x-ft-adapter"]


async def until(chain: Chain, terms: RouteTerms, expected: str) -> None:
    async with asyncio.timeout(3):
        while await label(chain, terms) != expected:
            await asyncio.sleep(0.02)


async def with_env(root: Path, test: Callable[[CannedEngine, CannedEngine, Board, Chain], Awaitable[None]]) -> None:
    async with canned_engine() as ours, canned_engine() as openai, Engine(ours.url, "engine-key") as engine:
        board = Board()
        board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
        outside = Outside(root, recipe_of(ours={"base": "x/y"}, big={"url": openai.url}), board, 0.05)
        running = asyncio.create_task(outside.run())
        try:
            await test(ours, openai, board, Chain(board, 0.3, providers=outside.providers))
            assert isinstance(board.routes.engines["big"], Route)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await outside.close()
