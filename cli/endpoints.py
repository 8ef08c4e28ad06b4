"""`ft endpoints`: a model's champion on RunPod's serverless cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.endpoints import Deployed
    from registry.runpod_api import RunPod
    from registry.settings import Settings
    from registry.store import Store
    from serving.endpoint_plan import Plan

app = typer.Typer(add_completion=False, invoke_without_command=True, rich_markup_mode=None)
ID = typer.Argument(metavar="ID", help="An endpoint: its id, its name, or its model")
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking")]
ADAPTER = typer.Option(
    "--adapter-path",
    help="Where a worker finds the adapter: on the volume, or a hub id  [/runpod-volume/adapters/{model}/{version}]",
)
BASE = typer.Option("--base-path", help="Where a worker finds the base model, if it is on no hub")
POOL = typer.Option("--pool", help="RunPod's name of a pool of cards; may be repeated  [ADA_24]")
MIN_WORKERS = typer.Option("--min-workers", min=0, help="Workers that never sleep, and always cost  [0]")
IDLE = typer.Option("--idle", min=1, max=3600, help="Seconds until a worker without work sleeps  [60]")
PRICE = typer.Option("--max-usd-per-hour", min=0.01, help="What all workers together may cost  [2]")
SECRET = typer.Option("--hf-secret", help="Name of a RunPod secret with the hub's token; HF_TOKEN is given otherwise")
WAIT = typer.Option("--wait", min=1, help="Seconds; a cold worker loads the model first")


@app.callback()
def endpoints(context: typer.Context, as_json: AsJson = False) -> None:
    """List this project's serverless endpoints, with what their workers do just now.

    Example: ft endpoints
    """
    if context.invoked_subcommand:
        return
    from cli.console import ago, print_json, say, table

    store, settings, runpod = _opened()
    with runpod:
        lines = _lines(store, settings, runpod)
    if as_json:
        print_json(lines)
        return
    if not lines:
        say("no endpoints; `ft endpoints deploy MODEL` makes one")
        return
    rows = [
        [each["id"], each["answers"], each["state"], f"{each['workers_min']} to {each['workers_max']}",
         f"{each['usd_per_hour']:.2f}", ago(each["created"])] for each in lines
    ]  # fmt: skip
    table(["id", "answers", "state", "workers", "USD/h at most", "created"], rows)


@app.command()
def deploy(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its champion is deployed")],
    adapter_path: Annotated[str | None, ADAPTER] = None,
    volume: Annotated[str | None, typer.Option("--volume", help="Id of a RunPod network volume")] = None,
    base_path: Annotated[str | None, BASE] = None,
    pool: Annotated[list[str] | None, POOL] = None,
    data_center: Annotated[list[str] | None, typer.Option("--data-center", help="May be repeated  [any]")] = None,
    image: Annotated[str | None, typer.Option("--image", help="An image of your own, made from worker-vllm")] = None,
    disk: Annotated[int | None, typer.Option("--disk", min=5, help="Disk of a worker in GB  [60]")] = None,
    min_workers: Annotated[int | None, MIN_WORKERS] = None,
    max_workers: Annotated[int | None, typer.Option("--max-workers", min=1, help="At most so many  [1]")] = None,
    idle: Annotated[int | None, IDLE] = None,
    max_usd_per_hour: Annotated[float | None, PRICE] = None,
    hf_secret: Annotated[str | None, SECRET] = None,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds for old workers to be replaced")] = 120.0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make an endpoint for a model's champion, or bring the one that there is up to date. Shows the price and asks.

    Run it again after a promotion or a rollback; what was said once is kept.

    Example: ft endpoints deploy tickets --volume 2q9m7x4c --pool ADA_24
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from serving.endpoint_plan import plan_endpoint
    from serving.serverless import deploy as deploy_plan
    from serving.serverless import settle

    said = {
        "adapter_path": adapter_path, "volume": volume, "base_path": base_path, "pools": _tuple(pool),
        "data_centers": _tuple(data_center), "image": image, "disk_gb": disk, "workers_min": min_workers,
        "workers_max": max_workers, "idle_seconds": idle, "max_usd_per_hour": max_usd_per_hour, "hf_secret": hf_secret,
    }  # fmt: skip
    store, settings, runpod = _opened()
    with runpod:
        given = {name: value for name, value in said.items() if value is not None}
        plan = plan_endpoint(find_project(), store, runpod, settings, model, given)
        if not as_json:
            _print_plan(plan)
        if plan.does != "nothing":
            _confirm(f"{plan.does} {plan.order.name}?", yes)
        row = deploy_plan(store, runpod, plan, settle_seconds=settings.settle_seconds)
        tell = (lambda _: None) if as_json else (lambda stale: say(f"{stale} workers still have the old version"))
        row = settle(store, runpod, row, wait, tell)
    done = {**_facts(row), "did": plan.does, "changed": list(plan.changes)}
    print_json(done) if as_json else _print_done(row)


@app.command()
def upload(
    version: Annotated[str, typer.Argument(metavar="MODEL[@N]", help="A version; a MODEL alone: its champion")],
    volume: Annotated[str, typer.Option("--volume", help="Id of a RunPod network volume")],
    data_center: Annotated[str, typer.Option("--data-center", help="Where the volume is: EU-RO-1")],
    adapter_path: Annotated[str | None, ADAPTER] = None,
    s3_url: Annotated[str, typer.Option("--s3-url", help="S3 endpoint, if it is not RunPod's")] = "",
    as_json: AsJson = False,
) -> None:
    """Copy an adapter to a network volume, where the workers of an endpoint look for it.

    It needs an S3 API key of RunPod: RUNPOD_S3_ACCESS_KEY and RUNPOD_S3_SECRET_KEY in .env.

    Example: ft endpoints upload tickets --volume 2q9m7x4c --data-center EU-RO-1
    """
    from cli.console import print_json, say
    from registry.adapters import find_version
    from registry.endpoints import ADAPTER_PATH
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.volume_upload import upload_adapter

    project = find_project()
    found = find_version(open_store(project), version)
    path = upload_adapter(
        project, load_settings(project), found, volume, data_center, adapter_path or ADAPTER_PATH, s3_url
    )  # fmt: skip
    done = {"version": found.name, "volume": volume, "path": path}
    print_json(done) if as_json else say(f"{found.name} is on volume {volume}, for workers at {path}")


@app.command()
def scale(
    endpoint: Annotated[str, ID],
    workers: Annotated[int, typer.Argument(metavar="N", min=0, help="At most so many workers; 0 ends all of them")],
    min_workers: Annotated[int, typer.Option("--min-workers", min=0, help="Workers that never sleep")] = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Change how many workers an endpoint may have. With 0 it costs nothing, and the gateway no longer asks it.

    Example: ft endpoints scale tickets 0
    """
    from cli.console import print_json, say
    from registry.endpoints import find_deployed
    from serving.endpoint_bills import refuse_spent
    from serving.serverless import scale as scale_to

    store, settings, runpod = _opened()
    with runpod:
        row = find_deployed(store, endpoint)
        if workers:
            refuse_spent(store, runpod, settings)
            dear = float(row.body["usd_per_worker"])
            if not as_json:
                say(f"{row.name}: up to ${dear * workers:.2f} an hour at work, ${dear * min_workers:.2f} idle")
            _confirm(f"up to {workers} workers?", yes)
        row = scale_to(store, runpod, row, workers, min_workers)
    print_json(_facts(row)) if as_json else say(f"{row.name}: {row.body['workers_min']} to {workers} workers")


@app.command()
def delete(endpoint: Annotated[str, ID], yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an endpoint; jobs that wait there are lost.

    Example: ft endpoints delete tickets
    """
    from cli.console import print_json, say
    from registry.endpoints import find_deployed
    from serving.serverless import delete as delete_it

    store, _, runpod = _opened()
    with runpod:
        row = find_deployed(store, endpoint)
        _confirm(f"delete {row.name} ({row.id})?", yes)
        delete_it(store, runpod, row)
    print_json({"id": row.id, "name": row.name, "state": "deleted"}) if as_json else say(f"{row.name} is deleted")


@app.command()
def cost(as_json: AsJson = False) -> None:
    """What each endpoint has been billed since it was made, those that were deleted too.

    Example: ft endpoints cost
    """
    from cli.console import print_json, say, table
    from registry.endpoints import deployed
    from serving.endpoint_bills import note_bills

    store, _, runpod = _opened()
    with runpod:
        note_bills(store, runpod)
    found: list[dict[str, Any]] = [{"id": each.id, "model": each.model, "usd": each.billed_usd, "ended": each.ended}
             for each in deployed(store, ended=True)]  # fmt: skip
    if as_json:
        print_json(found)
        return
    rows = [[str(each["id"]), str(each["model"]), f"{each['usd']:.4f}", "deleted" if each["ended"] else "on"]
            for each in found]  # fmt: skip
    table(["id", "model", "USD", ""], rows)
    say(f"together ${sum(each['usd'] for each in found):.4f}; bills lag behind by an hour or so")


@app.command()
def ask(
    endpoint: Annotated[str, ID],
    text: Annotated[str, typer.Argument(help="The question")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer")] = 256,
    wait: Annotated[float, WAIT] = 900.0,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Ask an endpoint itself, past the gateway, as a job in its queue. It wakes a worker, which costs.

    Example: ft endpoints ask tickets "My parcel has not come"
    """
    from cli.console import print_json, say
    from registry.endpoints import find_deployed
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.serverless_jobs import EndpointJobs

    project = find_project()
    row = find_deployed(open_store(project), endpoint)
    jobs = EndpointJobs(load_settings(project), row.id)
    try:
        said = jobs.chat(row.answers, text, max_tokens=max_tokens, seconds=wait)
    finally:
        jobs.close()
    print_json({"endpoint": row.id, "version": row.answers, "text": said}) if as_json else say(said)


def _opened() -> tuple[Store, Settings, RunPod]:
    from registry.project import find_project
    from registry.runpod_api import open_runpod
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    settings = load_settings(project)
    return open_store(project), settings, open_runpod(settings)


def _lines(store: Store, settings: Settings, runpod: RunPod) -> list[dict[str, Any]]:
    from serving.serverless import look

    rows, lost = look(store, runpod)
    found = [{**_facts(row), "state": _state(settings, row) + _behind(store, row)} for row in rows]
    for each in lost:
        found.append({
            "id": each.id, "name": each.name, "answers": "?", "state": "in no row; deploying its model adopts it",
            "workers_min": each.workers_min, "workers_max": each.workers_max, "usd_per_hour": 0.0,
            "created": each.created,
        })  # fmt: skip
    return found


def _facts(row: Deployed) -> dict[str, Any]:
    body = row.body
    return {
        "id": row.id, "name": row.name, "model": row.model, "answers": row.answers,
        "wanted": f"{row.model}@{body['wanted']}", "workers_min": body["workers_min"],
        "workers_max": body["workers_max"], "usd_per_hour": body["usd_per_worker"] * body["workers_max"],
        "billed_usd": row.billed_usd, "created": row.created,
    }  # fmt: skip


def _state(settings: Settings, row: Deployed) -> str:
    """What the job API says of its workers; an endpoint that cannot be asked is told of all the same."""
    from registry.errors import FtError
    from serving.serverless_jobs import EndpointJobs

    if not row.is_on:
        return "scaled to zero"
    jobs = EndpointJobs(settings, row.id)
    try:
        health = jobs.health()
        workers, queue = health.get("workers", {}), health.get("jobs", {})
    except FtError as error:
        return error.what
    finally:
        jobs.close()
    state = f"{workers.get('running', 0)} at work, {workers.get('idle', 0)} idle, {queue.get('inQueue', 0)} waiting"
    return state if row.version == row.body["wanted"] else f"{state}; @{row.body['wanted']} is being brought in"


def _behind(store: Store, row: Deployed) -> str:
    from registry.adapters import aliases

    champion = aliases(store, row.model).get("champion")
    return "" if champion in (None, row.body["wanted"]) else f"; the champion is @{champion}: deploy it again"


def _print_plan(plan: Plan) -> None:
    from cli.console import say

    order, terms = plan.order, plan.terms
    say(f"{plan.does}: {order.name} answers as {plan.version.name}")
    say(f"image {order.image}, base {order.env['MODEL_NAME']}, rank up to {order.env['MAX_LORA_RANK']}")
    say(f"adapter {plan.paths[str(plan.version.version)]}{f' on volume {terms.volume}' if terms.volume else ''}"
        " (it must lie there already: `ft endpoints upload`)")  # fmt: skip
    if "HF_TOKEN" in order.env:
        say(f"the workers get {f'the RunPod secret {terms.hf_secret}' if terms.hf_secret else 'your HF_TOKEN'}")
    if plan.changes and plan.found:
        say(f"changes: {', '.join(plan.changes)}; workers are replaced one by one")
    say(f"cards of {', '.join(order.pools)}, {terms.workers_min} to {terms.workers_max} workers, asleep after "
        f"{terms.idle_seconds} s: at most ${plan.usd_per_hour:.2f} an hour, "
        f"${plan.idle_usd_per_hour:.2f} an hour while nobody asks")  # fmt: skip


def _print_done(row: Deployed) -> None:
    from cli.console import say

    if row.version != row.body["wanted"]:
        say(f"{row.answers} still answers; `ft endpoints deploy {row.model}` goes on waiting for its old workers")
        return
    say(f"{row.name} ({row.id}) answers as {row.answers}; the gateway asks it where no engine here serves {row.model}")


def _confirm(question: str, yes: bool) -> None:
    """Raises WrongInput where nobody can be asked, and Abort at a no."""
    import sys

    from registry.errors import WrongInput

    if yes:
        return
    if not sys.stdin.isatty():
        raise WrongInput("this spends money or ends what answers, and nobody is here to ask", fix="add --yes")
    typer.confirm(question, abort=True)


def _tuple(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None
