"""A vLLM that somebody else runs and into which our adapters are loaded: the same reconciler, and no process of ours.

It must see the project's adapter folders under the same paths (a shared folder), be started with
`--served-model-name base --enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and be one API server alone.
"""

from __future__ import annotations

import time

from registry.admission import RANKS
from registry.base_models import BaseModel
from registry.cards import Card
from registry.errors import RecipeError, Trouble
from registry.recipe import Serve, expand
from registry.serve_recipe import EngineTerms, is_local
from serving.engine import BASE, Engine
from serving.engine_site import Site, itself
from serving.env_file import EnvFile
from serving.own_engine import HEALTH_SECONDS, POLL_SECONDS
from serving.reconciler import Reconciler
from serving.routes import Away, Route, Routes
from serving.server_record import EngineState, EngineStatus
from serving.vllm_process import EngineConfig

ELSEWHERE = "elsewhere"


class LentEngine:
    """The state between looks: its client, and the reconciler of the time since it last came back."""

    def __init__(self, site: Site, name: str, terms: EngineTerms, base: BaseModel) -> None:
        """Raises RecipeError where the environment lacks what its address or key is made of."""
        self.site, self.name, self.terms = site, name, terms
        serve = Serve(max_context=terms.max_context, concurrency=terms.concurrency, memory_gb=terms.memory_gb)
        # Which ranks it takes only it knows: what is too large for it, it refuses.
        self.config = EngineConfig(base, serve, Card(ELSEWHERE, "somebody's", 0), max(RANKS), name=name)
        self._env = EnvFile(site.project.root)
        self.url, self.key = self._there()
        self.engine: Engine | None = None
        self._left: list[Engine] = []
        self.reconciler: Reconciler | None = None
        self.state: EngineState = "starting"
        self.reason = ""
        self.starts = 0

    async def prepare(self) -> None:
        self.engine = Engine(self.url, self.key, local=is_local(self.terms.model_copy(update={"url": self.url})))
        await self._flip_away("it has not answered yet", hold=True)

    async def run(self) -> None:
        """One look after another, until cancelled; then `close` it."""
        while True:
            seen = self.site.board.pokes
            try:
                await self._follow_env()
                assert self.engine is not None
                await self._look(self.engine)
            except (Trouble, RecipeError) as error:
                self._say(self.state, error.what)
            await self.site.board.poked(seen, POLL_SECONDS)

    async def close(self) -> None:
        for each in filter(None, (*self._left, self.engine)):
            await each.close()

    def status(self) -> EngineStatus:
        here = self.reconciler
        public = self.site.board.part(self.name).public.items()
        return EngineStatus(
            name=self.name, state=self.state, reason=self.reason, base=self.config.base.as_dict(),
            serve=self.config.serve.model_dump(), card=ELSEWHERE, max_rank=self.config.max_rank, precision="its own",
            url=self.url, starts=self.starts,
            routes={name: route.adapter for name, route in public if "@" not in name},
            loaded=sorted(here.loaded) if here else [], refused=here.refused if here else {},
            swaps=here.swaps if here else [],
        )  # fmt: skip

    async def _follow_env(self) -> None:
        """Go on at another address, or with another key; what is under way at the old one may end. Raises RecipeError,
        and stays where it is, while a variable is not set."""
        self._env.look()
        if (there := self._there()) == (self.url, self.key):
            return
        self.url, self.key = there
        self._left += filter(None, (self.engine,))
        self.reconciler = None
        await self.prepare()
        self._say("starting", "its address or key has changed in .env")

    def _there(self) -> tuple[str, str]:
        """Its address and key, by the environment and the `.env` of now. Raises RecipeError for what is not set."""
        place, values = f"engines.{self.name}", self._env.values
        url, key = expand(self.terms.url, f"{place}.url", values), expand(self.terms.key, f"{place}.key", values)
        if not url:
            raise RecipeError("its url is empty", place=place, fix=f"set {self.terms.url} in .env")
        return url.rstrip("/"), key or ""

    async def _look(self, engine: Engine) -> None:
        if not await engine.healthy(HEALTH_SECONDS):
            if self.state != "away":
                await self._flip_away("its engine does not answer", hold=False)  # callers hear no address
                self.reconciler = None
                self._say("away", f"{self.url} does not answer")
            return
        if self.reconciler is None:
            site = self.site
            self.reconciler = site.reconciler(engine, self.config, self.terms)
            self.starts += 1
        await self.reconciler.step()
        self.site.board.put(itself(self.name), Routes(engines={self.name: Route(BASE, engine)}))
        self._say("serving")

    async def _flip_away(self, reason: str, *, hold: bool) -> None:
        await self.site.flip_away(self.name, self.config.base, Away(reason, hold=hold))

    def _say(self, state: EngineState, reason: str = "") -> None:
        if (state, reason) != (self.state, self.reason):
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {state}{': ' if reason else ''}{reason}", flush=True)
            self.state, self.reason = state, reason
            self.site.changed()
