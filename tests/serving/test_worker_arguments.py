"""What worker-vllm makes of our environment, read by the argument parser of a real vLLM."""

from __future__ import annotations

import json
import shlex

import pytest

from registry.cards import pick_card
from registry.endpoints import Loaded, worker_env
from registry.project import Project
from registry.recipe import Serve
from registry.settings import Settings
from serving.vllm_env import ensure_vllm
from tests.conftest import run_bounded

# As worker-vllm v2.25.2 turns variables into arguments: these by another name, the rest by their own.
ALIASES = {
    "MODEL_NAME": "--model",
    "MODEL_REVISION": "--revision",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "--served-model-name",
}
NOT_FLAGS = {"MAX_CONCURRENCY", "VLLM_NO_USAGE_STATS", "VLLM_EXTRA_ARGS"}
FLAGS = {"ENABLE_LORA"}
READ = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
modules = [[each.name, each.path] for each in found.lora_modules]
print(json.dumps([modules, found.enable_lora, found.max_loras, found.max_cpu_loras, found.max_lora_rank, found.model,
                  found.revision, found.served_model_name, found.max_model_len, found.max_num_seqs]))
"""
OLD = Loaded("tickets", 3, 8, "/runpod-volume/adapters/tickets/3")
NEW = Loaded("tickets", 4, 16, "me/tickets-4")


def arguments(env: dict[str, str]) -> list[str]:
    found = [part for name in sorted(FLAGS & env.keys()) for part in [f"--{name.replace('_', '-').lower()}"]]
    for name in sorted(env.keys() - NOT_FLAGS - FLAGS):
        found += [ALIASES.get(name, f"--{name.replace('_', '-').lower()}"), env[name]]
    return [*found, *shlex.split(env.get("VLLM_EXTRA_ARGS", ""))]


@pytest.mark.engine
def test_a_real_vllm_reads_what_a_worker_gives_it(project: Project) -> None:
    python = ensure_vllm(project, Settings(), pick_card("cpu"), print)
    for loaded in ([NEW], [NEW, OLD]):
        env = worker_env("Qwen/Qwen2.5-0.5B-Instruct", "abc", Serve(max_context=1024, concurrency=4), loaded)
        done = run_bounded([python, "-c", READ, *arguments(env)], 300, env={"PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == [
            [[f"{each.model}@{each.version}", each.path] for each in loaded],
            True, 2, 4, 16, "Qwen/Qwen2.5-0.5B-Instruct", "abc", ["base"], 1024, 4,
        ]  # fmt: skip
