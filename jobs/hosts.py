"""What a worker does as one of several hosts: says that it lives, knows who leads, and hands a lost host's runs on.

The leader, which is the first by name of the hosts that live, is alone in starting runs from events and rows, in
carrying out wishes, and in handing on. Two that both believe to lead, for the seconds in which one is taken for lost,
do no harm: every start is keyed by the run's id, and the durable engine takes results only from the latest owner.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from dbos import DBOS

from jobs import runtime
from registry import runs
from registry.cloud_terms import CardSetting
from registry.events import append, new_event
from registry.hosts import AS_THEY_ARE, Host, Pulse, beat, host_id, hosts, leave, looked_after_by, pauses, served_cards
from registry.store import Store


class Post:
    """This host's place among the hosts."""

    def __init__(self, store: Store, lost_seconds: float, settings: Mapping[str, CardSetting] = AS_THEY_ARE) -> None:
        self.store, self.name, self.cards, self.settings = store, host_id(), served_cards(), settings
        self._started, self._pulse, self._beaten = time.time(), Pulse(lost_seconds), 0.0
        self._beat_seconds = lost_seconds / 6
        self._living: list[Host] = []
        self._minded: tuple[bool, set[str]] | None = None

    def keep(self) -> None:
        """Beat, look at the others and at paused cards, as often as is due."""
        if time.monotonic() - self._beaten < self._beat_seconds:
            return
        self._beaten = time.monotonic()
        beat(self.store, self.name, self._started, served_cards(self.settings))  # what is taken changes
        known = hosts(self.store)
        self._living = self._pulse.living(known)
        if self.leads:
            for lost in (each for each in known if each not in self._living):
                self._hand_on(lost)

    @property
    def leads(self) -> bool:
        """Does this host look after the runs of all?"""
        return self.name == min((each.id for each in self._living), default=self.name)

    def mind_cards(self, busy: bool) -> None:
        """Paused cards of this host take no work; all are looked after more often while runs are on."""
        paused = {each for each in pauses(self.store) if each.startswith(f"{self.name}/")}
        if (wanted := (busy, paused)) != self._minded:
            runtime.mind_cloud(busy=busy)
            for card in self.cards:
                runtime.mind_card(card, busy=busy, is_open=f"{self.name}/{card.name}" not in paused)
            self._minded = wanted

    def others(self) -> set[str]:
        """The other hosts that live."""
        return {each.id for each in self._living} - {self.name}

    def leave(self) -> None:
        leave(self.store, self.name)

    def _hand_on(self, lost: Host) -> None:
        """Runs whose workflow or card was there go on elsewhere; the host is forgotten until it beats again."""
        handed = [run.id for run in runs.listed(self.store, active=True, limit=1000) if self._take_from(run, lost.id)]
        leave(self.store, lost.id)
        append(self.store, new_event("ft/hosts", "host.lost", lost.id, {"runs": handed},
                                     key=f"{lost.id}/{lost.started}/{lost.beat}"))  # fmt: skip

    def _take_from(self, run: runs.Run, lost: str) -> bool:
        """A run whose card or rented pod that host looked after is planned again, others only change their parent."""
        workflow = DBOS.get_workflow_status(run.id)
        if run.wish or workflow is None or workflow.status in runtime.TERMINAL:
            return False
        if looked_after_by(run.result) == lost and "/" not in str(run.body.get("card", "")):
            runs.set_wish(self.store, run.id, "replan")
            return True
        if workflow.executor_id == lost:
            DBOS.resume_workflow(run.id, queue_name=runtime.CONTROL)
            return True
        return False
