"""`python -m jobs.pod_reaper`: compares for ever what is rented with what the ledger wants, and ends what it does not.

Runs in every worker too; as many as there are do no harm. Only pods whose names begin as this installation's do are
ever touched. Also reads the real bills, and tells of budgets that are nearly used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from jobs.reap_decision import Act, Look, decide
from jobs.rent import Cloud
from registry import endpoints, ledger
from registry.cloud_terms import Budgets
from registry.errors import CloudError, FtError, NotFound, WrongKey
from registry.events import append, new_event, newest
from registry.ledger import PODS
from registry.project import find_project
from registry.rentals import any_open, get, is_ours, rented_pods
from registry.runpod_api import open_runpod
from registry.runpod_shapes import Pod
from registry.settings import Settings, load_settings
from registry.spending import paid_until, warn
from registry.store import Store, open_store

LOOK_SECONDS, IDLE_SECONDS = 10.0, 60.0
BILL_SECONDS = 300.0
# RunPod's bill of an ended pod is complete after this, and asked for no more after that.
FINAL_SECONDS, UNBILLED_SECONDS = 3 * 3600.0, 7 * 86400.0
LONGEST_PAUSE = 60.0
STUCK_AFTER, TELL_STUCK_SECONDS = 3, 3600.0
SAY_SECONDS = 300.0
# A look may not last: what outlives its reservation is to be ended within a minute, also when RunPod hangs.
PATIENCE_SECONDS, TIMEOUT_SECONDS = 5.0, 15.0
T = TypeVar("T")


class BillingCloud(Cloud, Protocol):
    """It knows the bills of serverless endpoints too."""

    def endpoint_billing(self, since: float | None = None, endpoint: str | None = None) -> dict[str, float]: ...


@dataclass
class _Tries:
    """At ending one pod: how many did not work, why, and when the next is due (monotonic)."""

    failed: int = 0
    error: str = ""
    due: float = float("-inf")


@dataclass
class Reaper:
    """One who looks again and again; what it remembers of earlier looks only makes it wait, never end anything."""

    store: Store
    cloud: BillingCloud
    budgets: Budgets
    settle_seconds: float
    final_seconds: float = FINAL_SECONDS
    _since: dict[str, float] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _tries: dict[str, _Tries] = field(default_factory=dict)
    _billed_at: float = float("-inf")
    _foreign: set[str] = field(default_factory=set)
    _said: dict[str, float] = field(default_factory=dict)

    def run(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Look for ever, whatever happens."""
        while True:
            for part in (self.look, self.bill, lambda: warn(self.store, self.budgets)):
                self._survive(part)
            idle = self._survive(lambda: any_open(self.store)) is False and not self._tries
            sleep(IDLE_SECONDS if idle else LOOK_SECONDS)

    def look(self, *, dry_run: bool = False) -> list[Act]:
        """Compare once; what was done, or (`dry_run`) would be."""
        pods = self._listed()
        look = self._load(pods)
        acts = decide(look)
        self._since = {key: since for key, since in self._since.items() if key in self._asked}
        self._asked.clear()
        if dry_run:
            return acts
        for pod in pods or []:
            ledger.note_pod(self.store, pod.name, pod.id, _price(pod, look), _created(pod, look))
        self._tries = {pod: each for pod, each in self._tries.items() if look.is_listed(pod) or pod in look.rented}
        return [act for act in acts if self._survive(partial(self._apply, act, look)) is True]

    def bill(self, *, at_once: bool = False) -> None:
        """Write down what RunPod says that pods have cost, every few minutes."""
        if not at_once and time.monotonic() - self._billed_at < BILL_SECONDS:
            return
        self._billed_at, now = time.monotonic(), time.time()
        self._bill_endpoints(now)
        open_ = [each for each in rented_pods(self.store, since=now - UNBILLED_SECONDS) if not each.final]
        if not open_:
            return
        billed = self.cloud.billing(min(each.created for each in open_) - 86400)
        for each in open_:
            if each.pod in billed:
                final = each.ended is not None and now - each.ended >= self.final_seconds
                ledger.note_billed(self.store, each.pod, billed[each.pod], final=final)
        self._look_at_unknown(set(billed) - {each.pod for each in rented_pods(self.store)})

    def _bill_endpoints(self, now: float) -> None:
        """They count in the budgets of the day and the month."""
        rows = self.store.read("SELECT min(created) AS first FROM endpoints WHERE ended IS NULL OR ended >= ?",
                               (now - UNBILLED_SECONDS,))  # fmt: skip
        if rows[0]["first"] is not None:
            endpoints.note_billed(self.store, self.cloud.endpoint_billing(rows[0]["first"] - 86400))

    def _listed(self) -> list[Pod] | None:
        """Pods with a name of ours that may cost; None without a list: what is overdue is ended all the same."""
        is_one = is_ours(self.store)
        try:
            ours = [each for each in self.cloud.pods() if is_one(each.name)]
        except WrongKey:
            raise
        except CloudError as error:
            self._say(str(error))
            return None
        return [each for each in ours if each.status != "TERMINATED" or self._note_dead(each)]

    def _note_dead(self, pod: Pod) -> bool:
        """It will be on the bill, though nobody may have seen it alive."""
        if self.store.first("SELECT 1 AS one FROM rented_pods WHERE pod = ?", (pod.id,)) is None:
            ledger.note_pod(
                self.store, pod.name, pod.id, pod.usd_per_hour, min(pod.created or time.time(), time.time())
            )
            ledger.note_gone(self.store, pod.id, time.time())
        return False

    def _load(self, pods: list[Pod] | None) -> Look:
        """The ledger, read after the list of pods."""
        rentals = {each.name: each for each in ledger.rentals(self.store, open_=True)}
        for name in {each.name for each in pods or []} - set(rentals):
            with suppress(NotFound):
                rentals[name] = get(self.store, name)
        listed = {each.id for each in pods or []}
        recent = rented_pods(self.store, since=time.time() - 2 * self.settle_seconds)
        rented = {each.pod: each for each in recent if each.ended is None or each.pod in listed}
        paid = {name: until for name, each in rentals.items()
                if each.state == "live" and (until := paid_until(self.store, each)) is not None}  # fmt: skip
        return Look(
            now=time.time(), settle=self.settle_seconds, pods=pods, rentals=rentals, rented=rented, paid_until=paid,
            wants=lambda job: job_wants(self.store, job), quiet=self._quiet,
        )  # fmt: skip

    def _quiet(self, key: str) -> float:
        """For how many seconds, on this process's clock, it was seen to be so."""
        self._asked.add(key)
        return time.monotonic() - self._since.setdefault(key, time.monotonic())

    def _apply(self, act: Act, look: Look) -> bool:
        """Do it; False if there was nothing to do (yet)."""
        match act.kind:
            case "adopt":
                pod = next(each for each in look.pods or [] if each.id == act.pod)
                return ledger.note_live(self.store, act.name, pod.id, pod.usd_per_hour, adopted=True) is not None
            case "want_ended":
                done = ledger.want_ended(self.store, act.name, act.reason)
                return self._end(act) if act.pod else done
            case "end" | "reap":
                return self._end(act)
            case "ask":
                return self._ask(act)
            case "void":
                return ledger.void(self.store, act.name, act.reason)
            case "close":
                return ledger.note_ended(self.store, act.name, reason=act.reason)

    def _end(self, act: Act) -> bool:
        tries = self._tries.setdefault(act.pod, _Tries())
        if time.monotonic() < tries.due:
            return False
        if tries.failed >= STUCK_AFTER:
            self._tell_stuck(act, tries)
        tries.due = time.monotonic() + min(LONGEST_PAUSE, 2.0**tries.failed)
        tries.failed += 1  # if it works, the pod is listed no more, and this is forgotten
        tries.error = "RunPod said yes, but it lives"
        try:
            self.cloud.terminate(act.pod)
        except CloudError as error:
            tries.error = error.what
            ledger.note_failure(self.store, act.name, error.what)
            raise
        ledger.note_gone(self.store, act.pod, time.time())
        if act.kind == "reap":
            data = {"pod": act.pod, "reason": act.reason}
            append(self.store, new_event(PODS, "pod.reaped", act.name, data, key=f"reaped {act.pod}"))
        return True

    def _tell_stuck(self, act: Act, tries: _Tries) -> None:
        last = newest(self.store, 1, type_="pod.stuck", subject=act.name)
        if not last or time.time() - last[0].time >= TELL_STUCK_SECONDS:
            data = {"pod": act.pod, "reason": tries.error, "attempts": tries.failed}
            append(self.store, new_event(PODS, "pod.stuck", act.name, data))

    def _ask(self, act: Act) -> bool:
        pod = self.cloud.pod(act.pod)
        if pod is not None and pod.status != "TERMINATED":
            return False
        ledger.note_gone(self.store, act.pod, time.time())
        return True

    def _look_at_unknown(self, pods: set[str]) -> None:
        """Pods on the bill that no list ever showed us: ours, if they were made and gone while nobody looked."""
        ours = is_ours(self.store)
        for id_ in sorted(pods - self._foreign):
            pod = self.cloud.pod(id_)
            if pod is not None and ours(pod.name):
                ledger.note_pod(self.store, pod.name, pod.id, pod.usd_per_hour, pod.created or time.time())
            else:
                self._foreign.add(id_)

    def _survive(self, part: Callable[[], T]) -> T | None:
        """One line instead of an end: RunPod is away, the store is locked, or there is a defect."""
        try:
            return part()
        except FtError as error:
            self._say(str(error))
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")
        return None

    def _say(self, text: str) -> None:
        """The same words not more often than every few minutes."""
        now = time.monotonic()
        if now - self._said.get(text, float("-inf")) > SAY_SECONDS:
            self._said = {**{old: at for old, at in self._said.items() if now - at < SAY_SECONDS}, text: now}
            print(f"pods: {text}", file=sys.stderr, flush=True)


def job_wants(store: Store, job: str) -> bool:
    """May the job have a pod? A job without a run is ended by whoever began it."""
    row = store.first("SELECT state FROM runs WHERE id = ?", (job,))
    if row is None:
        return store.first("SELECT 1 AS one FROM pruned_runs WHERE id = ?", (job,)) is None
    return row["state"] in ("submitted", "running")


def keep_reaped(store: Store, settings: Settings) -> None:
    """The reaper in a thread of the worker. Returns at once where there is no key."""
    try:
        with open_runpod(settings, patience_s=PATIENCE_SECONDS, timeout_s=TIMEOUT_SECONDS) as cloud:
            Reaper(store, cloud, settings.budgets, settings.settle_seconds).run()
    except WrongKey:
        return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.pod_reaper", description=__doc__)
    parser.add_argument("--final-seconds", type=float, default=FINAL_SECONDS, help="when a bill is taken for complete")
    asked = parser.parse_args()
    try:
        project = find_project()
        store, settings = open_store(project), load_settings(project)
        with open_runpod(settings, patience_s=PATIENCE_SECONDS, timeout_s=TIMEOUT_SECONDS) as cloud:
            Reaper(store, cloud, settings.budgets, settings.settle_seconds, asked.final_seconds).run()
    except FtError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _price(pod: Pod, look: Look) -> float:
    """RunPod says 0 of a pod that stands still."""
    rental = look.rentals.get(pod.name)
    if rental is None:
        return pod.usd_per_hour
    return pod.usd_per_hour + rental.disk_usd_per_hour if pod.usd_per_hour else rental.usd_per_hour


def _created(pod: Pod, look: Look) -> float:
    """RunPod's clock may be another than ours; before it was intended there was no pod."""
    rental = look.rentals.get(pod.name)
    return min(max(pod.created or look.now, rental.intended if rental else 0.0), look.now)


if __name__ == "__main__":
    main()
