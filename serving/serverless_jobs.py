"""Jobs of a serverless endpoint through the `runpod` SDK (1.12), with its traps closed.

The SDK reads no RUNPOD_API_KEY and keeps its base URL in the module, so both are given to each client. It retries
nothing over https, knows no deadline where a stream was cancelled, and throws away why a job failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from registry.errors import CloudError, EngineError, JobError, NotFound, TimedOut, WrongInput, WrongKey
from registry.settings import Settings

# As of the job API; the SDK's own FINAL_STATES lacks CANCELLED, and its stream of such a job never ends.
FINAL = frozenset({"COMPLETED", "FAILED", "TIMED_OUT", "CANCELLED"})
CHAT = "/v1/chat/completions"
POLL_SECONDS, CALL_SECONDS = 0.5, 30
RETRIED = (429, 502, 503, 504)


class EndpointJobs:
    """The job API of one endpoint. Every verb raises CloudError, and WrongKey and NotFound of it; close it."""

    def __init__(self, settings: Settings, endpoint: str, *, poll: float = POLL_SECONDS) -> None:
        import runpod

        key = settings.runpod_api_key or os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise WrongKey("there is no RunPod key", place="RUNPOD_API_KEY", fix="set RUNPOD_API_KEY in .env")
        self.id, self._poll = endpoint, poll
        self._endpoint = runpod.Endpoint(endpoint, api_key=key)
        self._client = self._endpoint.rp_client
        self._client.endpoint_url_base = settings.runpod_serverless_url.rstrip("/")
        _retry_reads(self._client.rp_session)

    def start(self, input_: dict[str, Any]) -> str:
        """Put a job into the queue; its id. Raises WrongInput for an empty one, which the SDK would wrap twice."""
        if not input_:
            raise WrongInput(
                "a job needs an input", place=f"endpoint {self.id}", fix='give {"route": ..., "body": ...}'
            )
        with self._said("run"):
            return str(self._endpoint.run({"input": input_}).job_id)

    def status(self, job: str) -> dict[str, Any]:
        """`status`, and `output` or `error` where there is one already."""
        with self._said(f"status/{job}"):
            return dict(self._client.get(f"{self.id}/status/{job}", timeout=CALL_SECONDS))

    def output(self, job: str, seconds: float) -> Any:
        """Wait for the end of the job; what it gave. Raises JobError if it failed or was cancelled, TimedOut."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.status(job)
            if found["status"] in FINAL:
                self._refuse_failed(job, found)
                return found.get("output")
            self._pause(job, deadline, seconds)

    def stream(self, job: str, seconds: float) -> Iterator[Any]:
        """The parts that its worker yields, as they come. Raises as `output` does."""
        deadline = time.monotonic() + seconds
        while True:
            with self._said(f"stream/{job}"):
                found = self._client.get(f"{self.id}/stream/{job}", timeout=CALL_SECONDS)
            parts = found.get("stream") or []
            yield from (each["output"] for each in parts)
            if found["status"] in FINAL and not parts:
                self._refuse_failed(job, found)
                return
            if not parts:
                self._pause(job, deadline, seconds)

    def cancel(self, job: str) -> str:
        """Its status afterwards; a job that has ended stays as it is."""
        with self._said(f"cancel/{job}"):
            return str(self._client.post(f"{self.id}/cancel/{job}", None, timeout=CALL_SECONDS)["status"])

    def health(self) -> dict[str, Any]:
        """`jobs` (completed, failed, inProgress, inQueue, retried) and `workers` (idle, running, ...)."""
        with self._said("health"):
            return dict(self._endpoint.health(timeout=CALL_SECONDS))

    def purge(self) -> int:
        """Drop the jobs that wait; how many there were."""
        with self._said("purge-queue"):
            return int(self._endpoint.purge_queue(timeout=CALL_SECONDS).get("removed", 0))

    def chat(self, adapter: str, text: str, *, max_tokens: int, seconds: float) -> str:
        """One question to `model@N` by the queue, as its worker answers it. Cancelled if it takes too long."""
        body = {"model": adapter, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens,
                "temperature": 0}  # fmt: skip
        job = self.start({"route": CHAT, "method": "POST", "body": body})
        try:
            return answer_of(self.output(job, seconds), f"endpoint {self.id}")
        except TimedOut:
            self.cancel(job)
            raise

    def close(self) -> None:
        self._client.rp_session.close()

    def _pause(self, job: str, deadline: float, seconds: float) -> None:
        if time.monotonic() + self._poll > deadline:
            raise TimedOut(f"job {job} has not ended within {seconds:g} s", place=f"endpoint {self.id}",
                           fix="a cold worker loads the base model first: wait longer, or look at its log in RunPod's "
                           "console")  # fmt: skip
        time.sleep(self._poll)

    def _refuse_failed(self, job: str, found: dict[str, Any]) -> None:
        if found["status"] != "COMPLETED":
            why = str(found.get("error") or found.get("output") or "RunPod does not say why")[:500]
            raise JobError(f"job {job} is {found['status']}: {why}", place=f"endpoint {self.id}",
                           fix="the worker's log is in RunPod's console, Serverless")  # fmt: skip

    @contextmanager
    def _said(self, call: str) -> Iterator[None]:
        """The SDK's errors as ours, without the key that requests may quote."""
        import requests

        place = f"endpoint {self.id}, {call}"
        try:
            yield
        except requests.HTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status == 404:
                raise NotFound(
                    "there is no such endpoint or job", place=place, fix="`ft endpoints` lists them"
                ) from None
            raise CloudError(f"RunPod says {status}", place=place, fix="try again later") from None
        except requests.RequestException as error:
            raise CloudError(f"RunPod cannot be reached: {type(error).__name__}", place=place,
                             fix="is there a network, and is `runpod_serverless_url` right?") from None  # fmt: skip
        except RuntimeError:
            raise WrongKey("RunPod does not take the key", place=place, fix="set RUNPOD_API_KEY in .env") from None
        except (KeyError, TypeError, ValueError) as error:
            raise CloudError(f"RunPod's answer is strange: {type(error).__name__}", place=place) from None


def answer_of(output: Any, place: str) -> str:
    """The text of a chat answer in what worker-vllm gave: a list of what it yielded. Raises EngineError."""
    first = output[0] if isinstance(output, list) and output else output
    if isinstance(first, dict) and isinstance(first.get("error"), dict):
        raise EngineError(f"the worker refused: {str(first['error'].get('message'))[:500]}", place=place)
    try:
        return str(first["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise EngineError(f"the worker's answer is strange: {str(output)[:200]}", place=place) from None


def _retry_reads(session: Any) -> None:
    """GETs only: a second /run would be a second job."""
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    again = Retry(
        total=3, backoff_factor=0.2, status_forcelist=RETRIED, allowed_methods=("GET",), raise_on_status=False
    )
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=again))
