"""What a worker does as one of several hosts: says that it lives, knows who leads, and hands a lost host's runs on.

The leader, which is the first by name of the hosts that live in the folder that leads, is alone in starting runs from
events and rows, in carrying out wishes, and in handing on. Two that both believe to lead, for the seconds in which one
is taken for lost, do no harm: every start is keyed by the run's id, and the durable engine takes results only from the
latest owner.
"""

from __future__ import annotations

import time

from dbos import DBOS

from jobs import runtime
from registry import runs
from registry.events import append, new_event
from registry.folders import folder_id, is_away, leads
from registry.hosts import Host, Pulse, beat, host_id, hosts, leave, looked_after_by, pauses, served_cards
from registry.project import Project
from registry.settings import Settings
from registry.store import Store


class Post:
    """This host's place among the hosts."""

    def __init__(self, project: Project, store: Store, settings: Settings) -> None:
        self.project, self.store, self.settings = project, store, settings
        self.name, self.cards, self._leads = host_id(), served_cards(), False
        self._started, self._pulse, self._beaten = time.time(), Pulse(settings.lost_seconds), 0.0
        self._beat_seconds = settings.lost_seconds / 6
        self._living: list[Host] = []
        self._minded: tuple[bool, set[str]] | None = None

    def keep(self) -> None:
        """Beat, look at the others and at paused cards, as often as is due."""
        if time.monotonic() - self._beaten < self._beat_seconds:
            return
        self._beaten = time.monotonic()
        here, cards = folder_id(self.project.home), served_cards(self.settings.cards)  # what is taken changes
        beat(self.store, self.name, self._started, cards, here, self.settings.bucket)
        known = hosts(self.store)
        self._leads = leads(self.project, self.store)
        self._living = self._pulse.living(known)
        if self.leads:
            for lost in (each for each in known if each not in self._living):
                self._hand_on(lost)

    @property
    def leads(self) -> bool:
        """Does this host look after the runs of all?"""
        here = folder_id(self.project.home)
        living = [each.id for each in self._living if not is_away(each.folder, here)]
        return self._leads and self.name == min(living, default=self.name)

    def mind_cards(self, busy: bool) -> None:
        """Paused cards of this host take no work; all are looked after more often while runs are on."""
        paused = {each for each in pauses(self.store) if each.startswith(f"{self.name}/")}
        if (wanted := (busy, paused)) != self._minded:
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
        if self._minded_there(run, lost, workflow.executor_id):
            runs.set_wish(self.store, run.id, "replan")
            return True
        if workflow.executor_id == lost:
            DBOS.resume_workflow(run.id, queue_name=runtime.CONTROL)
            return True
        return False

    @staticmethod
    def _minded_there(run: runs.Run, lost: str, executor: str | None) -> bool:
        """Who rents for a run is in no queue: its child is where the parent is, and would be waited for for ever."""
        if looked_after_by(run.result) == lost and "/" not in str(run.body.get("card", "")):
            return True
        rents = run.result.get("rent_to_evaluate" if "training" in run.result else "rent")
        return executor == lost and bool(rents)
