"""One vLLM as a process: started for a base model on a card, waited for until healthy, stopped whole."""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from registry.admission import RANKS
from registry.base_models import BaseModel, base_path, context_length
from registry.cards import GIB, Card, CardLock
from registry.errors import EngineError, MissingPart
from registry.plan_serving import Served
from registry.project import Project
from registry.recipe import Serve
from registry.settings import Settings
from serving import keeper
from serving.engine import BASE, Engine
from serving.vllm_env import ensure_vllm

# No larger than the adapters need: on a CPU every token pays for the engine's largest rank, not for its adapter's
# (8 answers at once on 2 cores: 15 tokens/s at rank 64, 86 at rank 8).
LEAST_RANK = 8
PORTS = range(20_000, 32_000)
# Champion, previous, and one or two that are being judged, at once in a batch; more are kept in host memory.
MAX_LORAS, MAX_CPU_LORAS = 4, 16
INNER_WEIGHT = re.compile(r".*\.\d+\.(?:.*\.)?(\w+)\.weight")
NO_LORA = {"gate", "router"}  # of mixtures of experts: vLLM wraps neither
LOG_BYTES = 10_000_000
STOP_SECONDS = keeper.GRACE_SECONDS + 10
# Of a vLLM that shares its card, beside weights and KV cache: CUDA's context, activations, LoRA slots.
SHARED_ROOM = round(1.5 * GIB)


# The one engine of `ft serve up MODEL`, and of an evaluation.
ONLY = "engine"


@dataclass(frozen=True)
class EngineConfig:
    """What one vLLM is started for; `max_rank` is the largest LoRA rank it takes.

    `planned` is the planner's word on precision, context, and its part of a GPU; vLLM's own defaults without one.
    `sleeps`: it can be put to sleep. `number`: which of a server's engines it is; with FT_ENGINE_PORT their ports count
    up from there.
    """

    base: BaseModel
    serve: Serve
    card: Card
    max_rank: int = LEAST_RANK
    name: str = ONLY
    precision: Literal["auto", "bf16", "bitsandbytes"] = "auto"
    max_loras: int = MAX_LORAS
    max_cpu_loras: int = MAX_CPU_LORAS
    planned: Served | None = None
    sleeps: bool = False
    number: int = 0

    @property
    def in_4_bits(self) -> bool:
        """Is the base held in 4 bits?"""
        said = self.planned.serving.precision if self.planned else self.precision
        return said == "bitsandbytes" and not self.card.is_cpu


class VllmProcess:
    """A running vLLM, its client, and the pipe whose end of file makes its keeper end it."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, engine: Engine, log: Path, log_start: int) -> None:
        self._process, self._pipe = process, pipe
        self.engine, self.log, self.log_start = engine, log, log_start

    @property
    def pid(self) -> int:
        """Of the keeper, which is also the process group that vLLM is in."""
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    async def ended(self, poll: float = 0.1) -> None:
        """Return when it has ended, for whatever reason."""
        while self.running:
            await asyncio.sleep(poll)

    async def stop(self) -> None:
        """End it whole and free the card; nothing if it has ended already."""
        await self.engine.close()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended(), STOP_SECONDS)
        # Also when the keeper has ended: somebody may have killed the keeper alone.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.ended()

    def last_words(self, lines: int = 12) -> str:
        """The end of what this vLLM wrote to its log."""
        with self.log.open("rb") as source:
            source.seek(max(self.log_start, self.log.stat().st_size - 20_000))
            return "\n".join(source.read().decode(errors="replace").splitlines()[-lines:])


async def start_vllm(project: Project, settings: Settings, config: EngineConfig, lock: CardLock) -> VllmProcess:
    """Start vLLM under the card's lock and wait until it answers.

    Raises EngineError, MissingPart, BaseModelError.
    """
    python = await asyncio.to_thread(ensure_vllm, project, settings, config.card)
    folder = await asyncio.to_thread(base_path, project, config.base)
    port = settings.engine_port + config.number if settings.engine_port else free_port()
    key = settings.engine_key or secrets.token_urlsafe(32)
    log = _open_log(project, config.name)
    process, pipe = _spawn(
        [
            str(python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            *vllm_arguments(config, folder, port, settings.engine_host),
        ],
        {**_environment(config), "VLLM_API_KEY": key},
        lock,
        log,
    )
    engine = Engine(f"http://{settings.engine_host}:{port}", key)
    engine.in_4_bits = config.in_4_bits
    started = VllmProcess(process, pipe, engine, log, log.stat().st_size)
    try:
        await _until_healthy(started, settings.engine_start_seconds)
    except BaseException:
        await asyncio.shield(started.stop())
        raise
    return started


def vllm_arguments(config: EngineConfig, folder: Path, port: int, host: str = "127.0.0.1") -> list[str]:
    """The command line of vLLM 0.32 for that base. The key is not in it: others on this host can read it."""
    options: dict[str, Any] = {
        "model": folder,
        "served-model-name": BASE,
        "host": host,
        "port": port,
        # More than one forgets: run-time LoRA loading reaches only one of several API servers.
        "api-server-count": 1,
        "max-loras": config.max_loras,
        "max-cpu-loras": config.max_cpu_loras,
        "max-lora-rank": config.max_rank,
        "max-model-len": min(config.serve.max_context, context_length(folder)),
        "max-num-seqs": config.serve.concurrency,
        "dtype": "bfloat16",
        "uvicorn-log-level": "warning",
    }
    if not config.card.is_cpu:
        options |= _gpu_options(config, folder)
    eager = bool(options.pop("enforce-eager", config.card.is_cpu))
    flags = [
        "--enable-lora",
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if eager else []),
        *(["--enable-sleep-mode"] if config.sleeps else []),
    ]
    modules = ["--lora-target-modules", *lora_modules(folder)]
    return [*flags, *modules, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def _gpu_options(config: EngineConfig, folder: Path) -> dict[str, Any]:
    if config.planned is not None:
        planned = config.planned.vllm_options()
        return planned | {"max-model-len": min(planned["max-model-len"], context_length(folder))}
    options: dict[str, Any] = {"quantization": "bitsandbytes"} if config.in_4_bits else {}
    if config.card.serve == "share":
        # vLLM refuses to start where less than this part of the card is free, and else takes nine tenths of it.
        options["gpu-memory-utilization"] = round(engine_memory(folder, config) / config.card.memory, 3)
    return options


def engine_memory(folder: Path, config: EngineConfig) -> int:
    """Bytes that a vLLM without a plan is given on a card that it shares: weights, `serve.memory_gb` of KV cache, and
    some room."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights + round(config.serve.memory_gb * GIB) + SHARED_ROOM


def lora_modules(folder: Path) -> list[str]:
    """Names of the linear layers inside the blocks of the base model in `folder`: where an adapter may reach.

    The output head is not among them. With it, vLLM 0.32 keeps a LoRA slot of the whole vocabulary, and ends with
    an einsum error when prompt logprobs (the parity probe) are asked for while other requests run.
    """
    from safetensors import safe_open

    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                module = INNER_WEIGHT.fullmatch(name)
                if module and len(weights.get_slice(name).get_shape()) == 2:
                    found.add(module[1])
    return sorted(found - NO_LORA)


def engine_rank(rank: int) -> int:
    """The least --max-lora-rank that vLLM knows and that holds an adapter of `rank`."""
    return min(each for each in RANKS if each >= max(rank, LEAST_RANK))


def free_port() -> int:
    """A port of loopback that nobody listens on, below the range that the system hands to outgoing connections.

    vLLM binds it seconds later: a port that the system had picked was somebody's outgoing connection by then.
    """
    for port in random.sample(PORTS, k=100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise MissingPart("no free port on loopback", place=f"{PORTS[0]} to {PORTS[-1]}", fix="end what listens there")


def _environment(config: EngineConfig) -> dict[str, str]:
    # PYTHON*: our own search path (a project has a folder `datasets`) must not leak into vLLM's environment.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FT_", "MLFLOW_"))}
    card = (
        {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.serve.memory_gb)))}
        if config.card.is_cpu
        else {"CUDA_VISIBLE_DEVICES": str(config.card.index)}
    )
    # The paths of dev mode (sleep and wake, and worse) are loopback's only, and in no list of the gateway's.
    sleep = {"VLLM_SERVER_DEV_MODE": "1"} if config.sleeps else {}
    return {
        **kept,
        **card,
        **sleep,
        "PYTHONSAFEPATH": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _spawn(
    command: list[str], environment: dict[str, str], lock: CardLock, log: Path
) -> tuple[subprocess.Popen[bytes], int]:
    ours, theirs = os.pipe()[::-1]
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(keeper.__file__)), str(theirs), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs, lock.fd),
            )
    except OSError as error:
        os.close(ours)
        raise EngineError(f"vLLM cannot be started: {error}", place=command[0]) from error
    finally:
        os.close(theirs)
    return process, ours


def engine_log(project: Project, name: str) -> Path:
    """Where the vLLM of the engine of that name writes."""
    return project.logs / ("engine.log" if name == ONLY else f"engine-{name}.log")


def _open_log(project: Project, name: str) -> Path:
    project.logs.mkdir(parents=True, exist_ok=True)
    log = engine_log(project, name)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    log.touch()
    return log


async def _until_healthy(started: VllmProcess, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await started.engine.healthy():
        if not started.running:
            raise EngineError(f"vLLM ended while it started:\n{started.last_words()}", place=str(started.log),
                              fix="its log says more; `ft doctor` shows what is missing")  # fmt: skip
        if time.monotonic() > deadline:
            raise EngineError(f"vLLM did not answer within {seconds:.0f} s:\n{started.last_words()}",
                              place=str(started.log), fix="allow more: FT_ENGINE_START_SECONDS")  # fmt: skip
        await asyncio.sleep(0.2)
