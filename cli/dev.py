"""`ft dev`: try things without an account."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cli.dev_programs import Keys

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def dev() -> None:
    """Try things without an account: a stand-in for RunPod, and an S3."""


@app.command()
def runpod(
    port: Annotated[int, typer.Option(help="Where the stand-in for RunPod listens, on loopback")] = 8390,
    s3_port: Annotated[int, typer.Option(help="First of the eight ports of the S3")] = 8391,
    no_s3: Annotated[bool, typer.Option("--no-s3", help="No S3: you have a bucket of your own")] = False,
    faults: Annotated[Path | None, typer.Option(help="YAML file of what shall go wrong: docs/dev-runpod.md")] = None,
    price_factor: Annotated[float, typer.Option(help="Multiplies all prices")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the variables as JSON")] = False,
) -> None:
    """Run a stand-in for RunPod whose pods are processes of this machine, until Ctrl-C; nothing is left then.

    It prints the lines that point this project to it: put them into .env, and take them out again afterwards.

    Example: ft dev runpod
    """
    from cli import dev_programs
    from cli.console import print_json, say
    from registry.errors import NotFound
    from registry.project import cache_folder, find_project

    if faults and not faults.is_file():
        raise NotFound("there is no such file", place=str(faults), fix="docs/dev-runpod.md shows one")
    folder = find_project().home / "dev-runpod"
    keys = dev_programs.keys_of(folder)
    more = ["--price-factor", str(price_factor), "--image-env", f"FT_CACHE={cache_folder()}"]
    more += ["--faults", str(faults.resolve())] if faults else []
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        url = stack.enter_context(dev_programs.runpod(folder, port, keys.runpod, more))
        s3 = "" if no_s3 else stack.enter_context(dev_programs.s3(folder / "s3", s3_port, keys))
        variables = _variables(url, s3, keys)
        if as_json:
            print_json(variables)
        else:
            say("\n".join(f"{name}={value}" for name, value in variables.items()))
            say(f"\n# The lines above are for .env. Pods and their logs: {folder / 'pods'}")
            say("# Ctrl-C ends it and all pods.")
        _until_the_end()
    if not as_json:
        say("ended; nothing is left")


def _variables(url: str, s3: str, keys: Keys) -> dict[str, str]:
    cloud = {
        "FT_RUNPOD_URL": url, "FT_RUNPOD_SERVERLESS_URL": f"{url}/v2", "FT_RUNPOD_API_KEY": keys.runpod,
        "FT_RUNPOD_IMAGE": "ft-standin:dev",
    }  # fmt: skip
    bucket = {
        "FT_BUCKET": "s3://ft-jobs/dev", "FT_S3_ENDPOINT": s3,
        "FT_S3_ACCESS_KEY": keys.s3[0], "FT_S3_SECRET_KEY": keys.s3[1],
        "FT_POD_S3_ACCESS_KEY": keys.pod_s3[0], "FT_POD_S3_SECRET_KEY": keys.pod_s3[1],
    }  # fmt: skip
    return cloud | (bucket if s3 else {})


def _until_the_end() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C, so that programs end in their order."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
