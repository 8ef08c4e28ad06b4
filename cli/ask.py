"""`ft ask`: one question to a served model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from http.client import HTTPResponse

PATIENCE_SECONDS = 600


def ask(
    model: Annotated[str, typer.Argument(help="A model, a version (MODEL@N), or `base` for the bare base model")],
    text: Annotated[str, typer.Argument(help="The question")],
    system: Annotated[str, typer.Option("--system", help="A system message before it")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer")] = 256,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print words as they come")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and version as JSON")] = False,
) -> None:
    """Ask a served model; the first line on standard error says which version answers.

    Example: ft ask tickets "My parcel has not come"
    """
    import sys
    import time

    from cli.console import print_json, say

    messages = [{"role": "system", "content": system}] if system else []
    request = {"model": model, "messages": [*messages, {"role": "user", "content": text}], "max_tokens": max_tokens}
    began = time.monotonic()
    with _post({**request, "temperature": 0, "stream": stream and not as_json}) as answer:
        version = answer.headers.get("x-ft-adapter", "")
        if as_json:
            said = _whole(answer)
            print_json(
                {"model": model, "version": version, "text": said, "seconds": round(time.monotonic() - began, 3)}
            )
            return
        print(version, file=sys.stderr, flush=True)
        for part in _parts(answer) if _is_stream(answer) else [_whole(answer)]:
            print(part, end="", flush=True)
        say("")


def _post(body: dict[str, Any]) -> HTTPResponse:
    import json
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from registry.errors import EngineError
    from registry.project import find_project
    from serving.server_keys import read_keys

    keys = read_keys(find_project())
    if not keys:
        raise EngineError("no server runs in this project", fix="start one with `ft serve up`")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {keys['internal_key']}"}
    request = Request(keys["gateway_url"] + "/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        answer: HTTPResponse = urlopen(request, timeout=PATIENCE_SECONDS)
    except HTTPError as error:
        raise _explained(error.code, error.read()) from None
    except (URLError, OSError) as error:
        raise EngineError(f"the gateway cannot be reached: {error}", place=keys["gateway_url"],
                          fix="`ft serve status`, then `ft serve up`") from error  # fmt: skip
    return answer


def _explained(status: int, raw: bytes) -> Exception:
    import json

    from registry.errors import EngineError, NotFound, WrongInput

    try:
        message = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = raw[:500].decode(errors="replace")
    if status == 404:
        return NotFound(message, fix="`ft serve status` shows what is served")
    if status < 500:
        return WrongInput(message)
    return EngineError(message, fix="`ft serve status` says more")


def _whole(answer: HTTPResponse) -> str:
    import json

    return str(json.loads(answer.read())["choices"][0]["message"].get("content") or "")


def _is_stream(answer: HTTPResponse) -> bool:
    """Some providers answer whole, though they were asked for a stream."""
    return answer.headers.get_content_type() == "text/event-stream"


def _parts(answer: HTTPResponse) -> Iterator[str]:
    import json

    from registry.errors import EngineError

    for line in answer:
        data = line.decode("utf-8").removeprefix("data: ").strip()
        if data in ("", "[DONE]"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise EngineError(event["error"]["message"], fix="ask again; `ft serve status` says more")
        yield from (choice["delta"].get("content") or "" for choice in event["choices"])
