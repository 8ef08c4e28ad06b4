"""`ft`: finds the command, runs it, and turns every error into one red paragraph and an exit code.

Commands are imported when they are called, so that `ft --help` stays instant.
Exit codes: 0 done, 1 it failed, 2 you asked wrongly, 3 the gate said no (or cannot decide).
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from registry.errors import FtError, Trouble, WrongInput

# name -> (module, function or sub-app, what --help says)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": ("cli.init", "init", "Make a project: recipes/, datasets/, git, DVC and an example that runs"),
    "run": ("cli.run", "run", "Run a recipe: train, judge, promote, serve"),
    "plan": ("cli.plan", "plan", "On which cards a recipe fits, how long it takes, what it costs"),
    "runs": ("cli.runs", "runs", "List runs"),
    "show": ("cli.show", "show", "Show one run: steps, scores, verdict, where time went"),
    "logs": ("cli.logs", "logs", "Show what a run's trainer says; -f follows"),
    "cancel": ("cli.cancel", "cancel", "Stop a run and free its card"),
    "pause": ("cli.pause", "pause", "Let a run stand still, with its card free"),
    "resume": ("cli.resume", "resume", "Let a paused, interrupted, failed or cancelled run go on"),
    "approve": ("cli.approve", "approve", "Say yes or no to a version that waits for a person"),
    "data": ("cli.data", "app", "Import, list and check datasets"),
    "recipe": ("cli.recipe", "app", "Check recipes; print their JSON schema"),
    "eval": ("cli.eval", "eval_", "Score versions on a test split"),
    "gate": ("cli.gate", "gate", "Judge a version again; exit 0 pass, 3 fail or undecided"),
    "models": ("cli.models", "models", "List models, versions and aliases"),
    "promote": ("cli.promote", "promote", "Make a version the champion"),
    "rollout": ("cli.rollout", "rollout", "Show a canary, send it to its next step, or end it"),
    "rollback": ("cli.rollback", "rollback", "Make the previous champion answer again"),
    "serve": ("cli.serve", "app", "Start and stop the gateway and its vLLM"),
    "endpoints": ("cli.endpoints", "app", "Serve a model on RunPod's serverless cards, paid by the second"),
    "keys": ("cli.keys", "app", "Who may ask the gateway, what, and how often"),
    "feedback": ("cli.feedback", "app", "What people said of answers, by version; write it to a file"),
    "ask": ("cli.ask", "ask", "Ask a served model"),
    "events": ("cli.events", "app", "What happened, what followed from it, and why"),
    "prune": ("cli.prune", "prune", "Delete what has had its time: runs, checkpoints, job folders, events"),
    "worker": ("cli.worker", "worker", "Run the worker in the foreground"),
    "cards": ("cli.cards", "app", "Show all hosts' cards, what runs on them and what waits; pause and resume one"),
    "pods": ("cli.pods", "app", "Show what is rented at RunPod; end what nobody wants"),
    "cost": ("cli.cost", "cost", "Show what rented pods have cost, by run, recipe or month; a forecast"),
    "up": ("cli.up", "up", "Start the whole platform on this machine, and keep it on"),
    "down": ("cli.down", "down", "Stop what `ft up` started"),
    "dev": ("cli.dev", "app", "Try things without an account: a stand-in for RunPod"),
    "doctor": ("cli.doctor", "doctor", "Say what is missing on this machine, and what settings are in force"),
}


class LazyGroup(TyperGroup):
    """Knows all commands by name, imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if _only_listing():
            return typer.core.TyperCommand(cmd_name, help=COMMANDS[cmd_name][2])
        module, attribute, help_ = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(module), attribute)
        return _command(cmd_name, found, help_)


app = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def root(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error")) -> None:
    """Event-driven fine-tuning: a dataset and a recipe become a judged adapter that is served.

    Example: ft run recipes/tickets.yaml
    """
    if debug:
        os.environ["FT_DEBUG"] = "1"


def main() -> None:
    """The console script."""
    try:
        _refuse_broken_text(sys.argv[1:])
        app(prog_name="ft")
    except FtError as error:
        if os.environ.get("FT_DEBUG"):
            raise
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _leave_quietly()
    except SystemExit as end:
        # Typer turns a reader that has gone (`ft runs | head -1`) into exit code 1, and wraps the output on the way.
        if end.code == 1 and type(sys.stdout).__name__ == "PacifyFlushWrapper":
            _leave_quietly()
        raise
    except Exception as error:
        if os.environ.get("FT_DEBUG"):
            raise
        _print_error(Trouble(f"a defect of ft: {type(error).__name__}: {error}", fix="`ft --debug ...` shows where"))
        sys.exit(1)


def _leave_quietly() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(0)


def _refuse_broken_text(arguments: list[str]) -> None:
    """Bytes that are no UTF-8 come as lone surrogates, which neither SQLite nor a file takes."""
    for argument in arguments:
        if any("\ud800" <= each <= "\udfff" for each in argument):
            raise WrongInput("an argument is not UTF-8 text", place=ascii(argument), fix="type it again")


def _print_error(error: FtError) -> None:
    if "--json" in sys.argv:
        import json

        print(json.dumps(error.as_dict(), ensure_ascii=False), flush=True)
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{error}{plain}", file=sys.stderr, flush=True)


def _only_listing() -> bool:
    return not any(argument in COMMANDS for argument in sys.argv[1:])


def _command(name: str, found: Any, help_: str) -> Any:
    if isinstance(found, typer.Typer):
        found.info.help = found.info.help or help_
        command = typer.main.get_command(found)
        command.name = name
        return command
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name)(found)
    return typer.main.get_command(single)


if __name__ == "__main__":
    main()
