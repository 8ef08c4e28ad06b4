"""Other gateways, each in an environment of its own below .ft/peers, started as one worker in front of one upstream.

Made by their ordinary clients (pip by way of uv, npm), once; nginx is taken if the machine has it. What cannot be
installed or does not come up is named in the result, and the others are measured without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.http_wire import KEY, MODEL

PEERS = Path(".ft/peers").absolute()
INSTALL_SECONDS = 900
ROUTER, LITELLM, PORTKEY = "vllm-router==0.1.17", "litellm[proxy]==1.106.2", "@portkey-ai/gateway@1.15.2"

NGINX = """daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}
"""
LITELLM_CONFIG = """model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
"""


@dataclass(frozen=True)
class Start:
    """How one is started; `headers` are what its requests need beside the body."""

    command: list[str]
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = PEERS


def peers() -> dict[str, Callable[[int, int, Path], Start]]:
    """Name -> what makes it ready: (upstream's port, its own port, a folder for its files) -> Start.

    They raise OSError or subprocess.SubprocessError where it cannot be installed.
    """
    return {"nginx": nginx, "vllm-router": vllm_router, "portkey": portkey, "litellm": litellm}


def nginx(upstream: int, port: int, folder: Path) -> Start:
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise FileNotFoundError("nginx is not installed (Debian: apt-get install nginx-light)")
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, upstream=upstream, port=port), encoding="utf-8")
    return Start([found, "-c", str(config), "-p", str(folder)])


def vllm_router(upstream: int, port: int, folder: Path) -> Start:
    program = _environment("vllm-router", ROUTER) / "vllm-router"
    return Start([str(program), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", "--log-level",
                  "error", "--prometheus-port", str(port + 1), "--worker-urls",
                  f"http://127.0.0.1:{upstream}"])  # fmt: skip


def portkey(upstream: int, port: int, folder: Path) -> Start:
    home = PEERS / "portkey"
    program = home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not program.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text("{}", encoding="utf-8")
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", PORTKEY], home)
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1",
               "authorization": "Bearer none"}  # fmt: skip
    # Since 1.15 it forwards to no private address that is not named.
    trusted = {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1", "NODE_ENV": "production"}
    return Start(["node", str(program), "--headless", f"--port={port}"], headers, trusted, home)


def litellm(upstream: int, port: int, folder: Path) -> Start:
    program = _environment("litellm", LITELLM) / "litellm"
    config = folder / "litellm.yaml"
    key = f"sk-{KEY}"
    config.write_text(LITELLM_CONFIG.format(model=MODEL, upstream=upstream, key=key), encoding="utf-8")
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Start(command, {"authorization": f"Bearer {key}"}, environment, folder)


def _environment(name: str, package: str) -> Path:
    """The folder of programs of an environment with just that package."""
    programs = PEERS / name / "bin"
    if not (programs / name).exists():
        _run([sys.executable, "-m", "uv", "venv", "-q", "--clear", str(PEERS / name)], Path.cwd())
        _run([sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(programs / "python"), package],
             Path.cwd())  # fmt: skip
    return programs


def _run(command: list[str], where: Path) -> None:
    subprocess.run(command, cwd=where, check=True, capture_output=True, timeout=INSTALL_SECONDS)
