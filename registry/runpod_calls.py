"""How RunPod is called over HTTP: what is tried again, what never, and which error each status becomes.

The dear mistake is a second create after a first one whose answer was lost: two pods, of which nobody knows one. So a
create is sent again only where RunPod said that it did nothing (429). What asks or ends can be repeated, and is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn

from registry.errors import AnswerLost, CloudError, NoCapacity, NoCredit, WrongKey

if TYPE_CHECKING:
    import httpx2

Query = dict[str, str | int]
KEY_FIX = "set RUNPOD_API_KEY in .env to a key of your account that may write (RunPod's console, Settings, API keys)"
SHORT_WAIT, LONG_WAIT = 0.2, 8.0
LONGEST_TEXT = 500
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Calls:
    """One client, kept connections. One call is repeated for `patience_s`, and one answer may take `timeout_s`."""

    def __init__(self, url: str, key: str, *, patience_s: float, timeout_s: float) -> None:
        import httpx2

        self._key, self._patience_s = _usable(key), patience_s
        address = _address(url)
        self._client = httpx2.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {self._key}", "User-Agent": "ft", "Accept": "application/json"},
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10)),
            trust_env=address.host not in LOOPBACK,  # a proxy for the internet does not reach this machine
        )

    def ask(
        self, method: str, path: str, *, params: Query | None = None, body: Any = None, may_be_gone: bool = False
    ) -> Any:
        """For calls that may be done twice. None for an answer without a body, and for 404 of what `may_be_gone`."""
        import httpx2

        clock = _Patience(self._patience_s)
        while True:
            try:
                answer = self._client.request(method, path, params=params, json=body)
            except httpx2.RequestError as error:
                if not isinstance(error, httpx2.LocalProtocolError) and clock.wait(None):
                    continue
                raise self._unreachable(method, path, error) from None
            if (answer.status_code == 429 or answer.status_code >= 500) and clock.wait(_retry_after(answer)):
                continue
            return None if answer.status_code == 404 and may_be_gone else self._read(method, path, answer)

    def create(self, path: str, body: Any) -> Any:
        """Sent once; again only after 429. Raises AnswerLost when it may have been done all the same."""
        clock = _Patience(self._patience_s)
        while True:
            answer = self._send(path, body)
            if answer.status_code == 429 and clock.wait(_retry_after(answer)):
                continue
            self._refuse_create(path, answer)
            return self._read("POST", path, answer)

    @contextmanager
    def lines(self, path: str, params: Query, headers: dict[str, str], quiet_s: float) -> Iterator[Iterator[str]]:
        """The lines of an event stream, which ends when nothing has come for `quiet_s`."""
        import httpx2

        timeout = httpx2.Timeout(max(quiet_s, 0.1), connect=10)
        try:
            with self._client.stream("GET", path, params=params, headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._read("GET", path, answer)
                yield _until_quiet(answer)
        except httpx2.RequestError as error:
            raise self._unreachable("GET", path, error) from None

    def close(self) -> None:
        self._client.close()

    def _send(self, path: str, body: Any) -> httpx2.Response:
        import httpx2

        try:
            return self._client.post(path, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.LocalProtocolError) as error:
            raise self._unreachable("POST", path, error) from None
        except httpx2.RequestError as error:
            raise _lost(path, f"no answer: {type(error).__name__}") from None

    def _refuse_create(self, path: str, answer: httpx2.Response) -> None:
        """400 stands for a broken rule and for no capacity, 403 for a pool that the account may not use: RunPod says
        to go on to the next candidate after both."""
        if answer.status_code in (400, 403):
            raise NoCapacity(
                self._detail(answer), place=f"RunPod, POST {path}", fix="allow other cards in `cloud.gpus`"
            )
        if answer.status_code == 408 or answer.status_code >= 500:
            raise _lost(path, f"status {answer.status_code}: {self._detail(answer)}")
        if answer.is_success and not _is_object(answer):
            raise _lost(path, "the answer cannot be read")

    def _read(self, method: str, path: str, answer: httpx2.Response) -> Any:
        if not answer.is_success:
            self._fail(method, path, answer)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise CloudError(
                "the answer is no JSON", place=f"RunPod, {method} {path}", fix="is the setting `runpod_url` right?"
            ) from None

    def _fail(self, method: str, path: str, answer: httpx2.Response) -> NoReturn:
        place, detail = f"RunPod, {method} {path}", self._detail(answer)
        if answer.status_code in (401, 403):
            raise WrongKey(f"RunPod does not take the key: {detail}", place=place, fix=KEY_FIX)
        if answer.status_code == 402:
            raise NoCredit(f"no credit left: {detail}", place=place, fix="add credit in RunPod's console, Billing")
        if answer.status_code == 429:
            raise CloudError(f"too many requests: {detail}", place=place, fix="wait some minutes, and try again")
        later = "try again later" if answer.status_code >= 500 else ""
        raise CloudError(f"RunPod says {answer.status_code}: {detail}", place=place, fix=later)

    def _detail(self, answer: httpx2.Response) -> str:
        """What the problem+json says, with the single violations of a 422."""
        try:
            said = answer.json()
        except ValueError:
            said = None
        if not isinstance(said, dict):
            text = answer.text.strip() or answer.reason_phrase
        else:
            errors = said.get("errors")
            parts = [said.get("detail") or said.get("title"), *(errors if isinstance(errors, list) else [])]
            text = "; ".join(str(each) for each in parts if each)
        return text.replace(self._key, "***")[:LONGEST_TEXT]

    def _unreachable(self, method: str, path: str, error: Exception) -> CloudError:
        said = str(error).replace(self._key, "***") or type(error).__name__
        return CloudError(
            f"RunPod cannot be reached: {said}", place=f"{self._client.base_url} ({method} {path})",
            fix="is there a network, and is the setting `runpod_url` right?",
        )  # fmt: skip


class _Patience:
    """How long to go on. Waits grow, with chance in them, so that many clients do not come back all at once."""

    def __init__(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._end, self._next, self._sleep = time.monotonic() + seconds, SHORT_WAIT, sleep

    def wait(self, told: float | None) -> bool:
        """Wait as long as was told, or longer each time; False at once if that is beyond the patience."""
        wait = told if told is not None else random.uniform(self._next / 2, self._next)
        self._next = min(2 * self._next, LONG_WAIT)
        if time.monotonic() + wait > self._end:
            return False
        self._sleep(wait)
        return True


def _usable(key: str) -> str:
    """The HTTP library would print a key with a line break in it, in its error."""
    if not key:
        raise WrongKey("there is no RunPod key", place="RUNPOD_API_KEY", fix=KEY_FIX)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise WrongKey("the RunPod key has characters that no key has", place="RUNPOD_API_KEY", fix=KEY_FIX)
    return key


def _address(url: str) -> httpx2.URL:
    import httpx2

    fix = "write it like https://api.runpod.io"
    try:
        found = httpx2.URL(url.rstrip("/"))
    except httpx2.InvalidURL as error:
        raise CloudError(f"no address: {error}", place="the setting `runpod_url`", fix=fix) from None
    if found.scheme not in ("http", "https") or not found.host:
        raise CloudError(f"no address: {url}", place="the setting `runpod_url`", fix=fix)
    return found


def _retry_after(answer: httpx2.Response) -> float | None:
    """Seconds, or a date by the server's own clock."""
    told = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        now = parsedate_to_datetime(answer.headers["Date"])
        return max(0.0, (parsedate_to_datetime(told) - now).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


def _until_quiet(answer: httpx2.Response) -> Iterator[str]:
    import httpx2

    try:
        yield from answer.iter_lines()
    except httpx2.ReadTimeout:
        return


def _is_object(answer: httpx2.Response) -> bool:
    try:
        return isinstance(answer.json(), dict)
    except ValueError:
        return False


def _lost(path: str, why: str) -> AnswerLost:
    return AnswerLost(
        f"nobody knows whether it was done: {why}", place=f"RunPod, POST {path}", fix="`ft pods` shows what is there"
    )
