"""`ft serve` and `ft ask` where there is nothing to serve, and what they choose where there is."""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from cli.serve import what_to_serve
from registry import adapters
from registry.base_models import BaseModel
from registry.errors import NotFound, WrongInput
from registry.project import Project
from registry.serve_recipe import ServeRecipe
from registry.store import Store
from serving.server_keys import write_keys
from serving.server_record import ServerStatus, write_status
from serving.to_serve import ToServe
from tests.conftest import run_bounded
from tests.serving.small_fleet import save_base

SMALL = BaseModel("small", "1", "MIT", "digest-of-small", "small@1")
LARGE = BaseModel("large", "1", "MIT", "digest-of-large", "large@1")


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def champion(store: Store, model: str, base: BaseModel) -> None:
    body: dict[str, Any] = {"base": base.as_dict(), "rank": 8, "recipe": {"serve": {"max_context": 512}, "card": "cpu"}}
    adapters.add_version(store, model, 1, f"run-of-{model}", "", body)
    verdict = adapters.add_verdict(store, model, 1, "pass", {"champion": None}, None)
    adapters.promote(store, verdict, by_whom="test")


def test_without_a_server_each_command_says_so(project: Project, store: Store) -> None:
    code, out, _ = ft(project, "serve", "status", "--json")
    assert (code, json.loads(out)) == (1, {"state": "not running"})
    code, out, _ = ft(project, "serve", "down")
    assert (code, out) == (0, "no server runs\n")
    code, _, err = ft(project, "ask", "tickets", "hello")
    assert code == 1
    assert "ft serve up" in err


def test_the_one_champion_is_what_is_served(project: Project, store: Store) -> None:
    champion(store, "tickets", SMALL)
    champion(store, "letters", SMALL)
    what = what_to_serve(project, store, "", print)
    (terms,) = what.recipe.engines.values()
    assert (list(what.bases.values()), terms.max_context, terms.card) == ([SMALL], 512, "cpu")


def test_several_bases_need_a_choice(project: Project, store: Store) -> None:
    champion(store, "tickets", SMALL)
    champion(store, "letters", LARGE)
    with pytest.raises(WrongInput, match=r"tickets \(small\), letters \(large\)"):
        what_to_serve(project, store, "", print)
    assert what_to_serve(project, store, "letters", print).bases["engine"] == LARGE
    with pytest.raises(NotFound):
        what_to_serve(project, store, "nothing", print)


def test_nothing_to_serve_at_all(project: Project, store: Store) -> None:
    code, _, err = ft(project, "serve", "up")
    assert code == 2
    assert "ft run" in err


def test_a_serve_recipe_says_which_engines(project: Project, store: Store) -> None:
    project.models.unlink()  # the person's
    save_base(project.root / "small", 1)
    written = {"kind": "serve", "engines": {
        "small": {"base": "./small", "card": "cpu", "max_loras": 2},
        "theirs": {"url": "http://127.0.0.1:1"},
    }}  # fmt: skip
    path = project.root / "recipes" / "desk.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    what = what_to_serve(project, store, str(path), print)
    assert (what.recipe.name, list(what.own()), list(what.lent())) == ("desk", ["small"], [])
    assert list(what.bases) == ["small"], "an address without a base needs none"
    again = ToServe(ServeRecipe.model_validate_json(what.recipe.model_dump_json(by_alias=True)), what.bases)
    assert again == what


def test_a_wrong_serve_recipe_is_told_of_before_anything_starts(project: Project, store: Store) -> None:
    path = project.root / "recipes" / "desk.yaml"
    path.write_text("kind: serve\nengines:\n  a: {base: ./a, card: cuda:7}\n", encoding="utf-8")
    code, _, err = ft(project, "serve", "up", "recipes/desk.yaml")
    assert code == 2
    assert "no base model here" in err
    path.write_text("kind: serve\nengines:\n  a: {start: demand}\n", encoding="utf-8")
    code, _, err = ft(project, "serve", "up", "recipes/desk.yaml")
    assert (code, "an engine has a `base` (ours) or a `url`" in err) == (2, True)


def test_status_shows_somebodys_engines_and_what_they_lack(project: Project, store: Store) -> None:
    recipe = {"engines": {"far": {"url": "${BIG_URL}", "as": "llama"}, "near": {"url": "http://127.0.0.1:1"}}}
    status = ServerStatus(
        pid=1, state="serving", reason="", base={}, serve={}, card="", max_rank=0, gateway_url="http://127.0.0.1:1",
        elsewhere={"far": "not set: BIG_URL", "near": ""}, recipe=recipe,
    )  # fmt: skip
    write_status(store, status)
    with (store.home / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, _ = ft(project, "serve", "status")
    rows = [line.split(maxsplit=3) for line in out.splitlines()]
    assert code == 0
    assert ["far", "llama", "${BIG_URL}", "away: not set: BIG_URL"] in rows
    assert any(row[0] == "near" and row[-1].endswith("serving") for row in rows if row)


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_answer_that_is_no_stream_is_printed_too(kind: str, project: Project, store: Store) -> None:
    whole = {"choices": [{"message": {"content": "안녕"}}]}
    piece = {"choices": [{"delta": {"content": "안녕"}}]}
    said = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n" if kind.startswith("text") else json.dumps(whole, indent=1)

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever).start()
        write_keys(project, {"internal_key": "k", "gateway_url": f"http://127.0.0.1:{server.server_port}"})
        code, out, err = ft(project, "ask", "far", "hi")
        server.shutdown()
    assert (code, out) == (0, "안녕\n"), err
