"""The request log: nothing in it tells who somebody is, no file grows without end, and nobody waits for it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from registry.request_log_terms import RequestLog
from serving.redaction import Redaction
from serving.request_log import WAITING, Asked, RequestLogFile, excerpt
from tests.conftest import ROOT

# Put together here, so that whoever looks for keys in this repository finds none.
WORD = "Abc123def456GHI789jkl"
PEM = "-----{} RSA PRIVATE " + "KEY-----"
PRIVATE = [
    *(prefix + WORD for prefix in ("sk-proj-", "sk-ant-api03-", "hf_", "AKIA", "ghp_", "rpa_", "ft_")),
    "Bearer abc.def.ghijkl", "password: hunter22", 'api_key="s3cr3t-value"', "비밀번호는 hunter22",
    "ey" + WORD + "." + WORD + "." + WORD, "0f1e2d3c" * 8, f"{PEM.format('BEGIN')}\n{WORD}\nabcd\n{PEM.format('END')}",
    "kim.minsu+shop@example.co.kr", "홍길동@예시.한국", "a_b-c@sub.mail.example.com",
    "010-1234-5678", "01012345678", "010 1234 5678", "010.1234.5678", "02-123-4567", "(031) 123-4567", "0505-123-4567",
    "+82 10-1234-5678", "+82(10)12345678", "+1 (415) 555-0132", "+442079460958", "(415) 555-0132", "1588-1234",
    "０１０－１２３４－５６７８", "900101-1234567", "9001011234567", "900101 - 2234567", "９００１０１－１２３４５６７",
    "4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111",
]  # fmt: skip
HARMLESS = [
    "Where is order 48213?", "환불은 며칠 걸리나요? 2026-11-29 까지 부탁드립니다.", "it costs 12,000 won",
    "3.5% less", "at 14:30", "the token interval is 0.035 s", "basic training, secret service",
    "user@localhost is no address", "version 1.10.2", "call me @ noon", "1234567", "room 0101",
    "https://example.com/help/return-policy", "반품 주소는 어디인가요",
]  # fmt: skip


def asked(prompt: str = "hello", request: str = "r1", **more: Any) -> Asked:
    return Asked(request, "tickets", "shop", "tickets@3", 200, 0.123456, prompt=prompt, **more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("text", PRIVATE)
def test_what_is_private_goes_and_what_is_around_it_stays(text: str) -> None:
    found = Redaction()(f"앞 before {text} after 뒤", 500)
    assert found.startswith("앞 before [")
    assert found.endswith("] after 뒤")
    assert not any(part in found for part in text.replace("-----", "").split() if len(part) > 3)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_harmless_stays(text: str) -> None:
    assert Redaction()(text, 500) == text


@pytest.mark.parametrize("text", ["010-1234-5678", "kim.minsu@example.com", "900101-1234567"])
def test_korean_words_that_touch_it_hide_nothing(text: str) -> None:
    assert not any(part in Redaction()(f"제 연락처는{text}입니다", 500) for part in ("1234", "minsu", "900101"))


def test_a_cut_leaves_no_half_of_anything() -> None:
    chance = random.Random(7)
    for _ in range(500):
        private = chance.choice(PRIVATE)
        start = chance.randrange(40)
        cut = start + chance.randrange(len(private) + 5)
        found = Redaction()("가" * start + " " + private + " tail", cut)
        assert found.startswith("가" * min(start, cut))
        rest = found[start + 1 :]
        assert not rest or rest[0] == "[", (private, cut, found)
        assert len(Redaction()("가" * 9999, cut)) == cut


def test_patterns_of_the_recipe_come_first() -> None:
    redact = Redaction([r"EMP-\d{6}", "(?i)project falcon"])
    assert redact("EMP-123456 in Project Falcon", 99) == "[redacted] in [redacted]"


def test_what_overlaps_leaves_nothing_between() -> None:
    assert Redaction(["secret [a-z]+", "[a-z]+ word"])("a secret magic word b", 99) == "a [redacted] b"


def test_a_long_prompt_is_redacted_in_milliseconds() -> None:
    chance = random.Random(1)
    for alphabet in ("a", "1", "1-", "a@", "a.", "가나다 ", "0123456789-+() .", "ey.", "Bearer "):
        text = "".join(chance.choice(alphabet) for _ in range(3000))
        start = time.thread_time()
        Redaction()(text, 2000)
        assert time.thread_time() - start < 0.25, alphabet


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]}, "hello"),
        ({"messages": [{"content": [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {}},
                                    {"type": "text", "text": " this"}]}]}, "what is this"),
        ({"prompt": "once"}, "once"), ({"prompt": ["once", " more"]}, "once more"), ({"input": "embed"}, "embed"),
        ({"prompt": [1, 2, 3]}, ""), ({"messages": []}, ""), ({"messages": ["hello"]}, ""), ({"messages": {}}, ""),
        ({"messages": [{"content": None}]}, ""), ({"messages": [{"content": {"text": 5}}]}, ""), ({}, ""),
    ],
)  # fmt: skip
def test_the_beginning_of_what_was_asked(request_: dict[str, Any], text: str) -> None:
    assert excerpt(request_, 200) == text
    assert excerpt(request_, 0) == ""


def test_an_excerpt_of_a_huge_body_is_small_and_quick() -> None:
    start = time.thread_time()
    for content in ("x" * (8 << 20), [""] * 2_000_000, ["x" * 1000] * 8000):
        assert len(excerpt({"messages": [{"content": content}]}, 200)) < 1000
    assert time.thread_time() - start < 0.1


def test_a_line_has_what_is_known_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "requests.jsonl"
    log = RequestLogFile(RequestLog(on=True, prompt_characters=30), path)
    log.write(asked("mail kim@example.com and tell me a very long story", prompt_tokens=7, first=0.04567))
    log.write(Asked("r2", "", "", "", 404, 0.001, code="model_not_found"))
    log.close()
    first, second = lines(path)
    assert first.pop("time").endswith("Z")
    assert first == {
        "request": "r1", "route": "tickets", "key": "shop", "adapter": "tickets@3", "status": 200, "seconds": 0.1235,
        "first": 0.0457, "prompt_tokens": 7, "prompt": "mail [e-mail] and tell ",
    }  # fmt: skip
    assert second.keys() == {"time", "request", "status", "seconds", "code"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_nobody_can_write_a_line_of_his_own(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLogFile(RequestLog(on=True), path)
    log.write(asked('x\n{"status": 200}\r\n\x00\u2028 \ud800 "'))
    log.close()
    assert len(path.read_bytes().splitlines()) == 1
    assert lines(path)[0]["prompt"].startswith('x\n{"status": 200}')


@pytest.mark.parametrize("keep", [0, 2])
def test_files_are_set_aside_and_the_oldest_goes(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLogFile(RequestLog(on=True, max_mb=1, keep=keep, prompt_characters=4_000), path)
    for n in range(400):  # some 4.8 MB
        log.write(asked("가나" * 2000, request=f"r{n}"))
    log.close(30)
    files = [path, *(tmp_path / f"requests.jsonl.{n}" for n in range(1, keep + 1))]
    assert sorted(os.listdir(tmp_path)) == sorted(each.name for each in files)
    assert all(each.stat().st_size <= 1 << 20 for each in files)
    numbers = [int(line["request"][1:]) for each in reversed(files) for line in lines(each)]
    assert numbers == list(range(numbers[0], 400))  # in order, and none is missing but the oldest


def test_a_restart_goes_on_behind_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"request": "whole"}\n{"request": "ha')
    log = RequestLogFile(RequestLog(on=True), path)
    log.write(asked())
    log.close()
    assert [each[:12] for each in path.read_text().splitlines()] == ['{"request": ', '{"request": ', '{"time": "20']
    assert json.loads(path.read_text().splitlines()[2])["request"] == "r1"


def test_a_disk_that_hangs_stops_no_request(tmp_path: Path) -> None:
    """A pipe that nobody reads: writing to it waits for ever."""
    path = tmp_path / "requests.jsonl"
    dropped: list[int] = []
    os.mkfifo(path)
    log = RequestLogFile(RequestLog(on=True), path, dropped.append)
    start = time.perf_counter()
    for _ in range(3 * WAITING):
        log.write(asked("x" * 600))
    assert time.perf_counter() - start < 20  # seconds, where a wait would be for ever
    assert WAITING // 2 < sum(dropped) < 3 * WAITING
    start = time.perf_counter()
    log.close(0.2)
    assert time.perf_counter() - start < 20
    with path.open("rb") as reader:  # let the thread end
        os.set_blocking(reader.fileno(), False)
        end = time.monotonic() + 20
        while log.busy and time.monotonic() < end:
            reader.read(1 << 16)
            log.close(0.05)
    assert not log.busy


def test_a_full_disk_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "requests.jsonl"
    dropped: list[int] = []
    path.symlink_to("/dev/full")
    log = RequestLogFile(RequestLog(on=True), path, dropped.append)
    for _ in range(5):
        log.write(asked("my name is Kim"))
    until(lambda: sum(dropped) == 5)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "Kim" not in caplog.text
    path.unlink()  # there is room again
    log.write(asked())
    log.close()
    assert len(lines(path)) == 1


# The system takes a part of a line at the limit of a file's size, and nothing after it; then there is room again.
HALF = """
import resource, sys, time
from pathlib import Path
from registry.request_log_terms import RequestLog
from serving.request_log import Asked, RequestLogFile
path, dropped = Path(sys.argv[1]), []
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
log = RequestLogFile(RequestLog(on=True), path, dropped.append)
def write(name):
    log.write(Asked(name, "", "", "", 200, 0.1, prompt="x" * 150))
    while log.waiting:
        time.sleep(0.01)
for n in range(5):
    write(f"early {n}")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write("late")
log.close()
print(sum(dropped))
"""


def test_a_line_that_was_written_by_half_is_counted_as_lost_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    command = [sys.executable, "-c", HALF, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    whole = [each for each in path.read_text().splitlines() if each.endswith("}")]
    found = [json.loads(each)["request"] for each in whole]
    assert found == [*(f"early {n}" for n in range(len(found) - 1)), "late"]
    assert int(done.stdout) == 6 - len(found)


def test_what_cannot_be_written_down_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    dropped: list[int] = []
    log = RequestLogFile(RequestLog(on=True), path, dropped.append)
    log.write(asked(5))  # type: ignore[arg-type]
    log.write(asked())
    log.close()
    assert (sum(dropped), len(lines(path))) == (1, 1)


@pytest.mark.parametrize(
    "given", [{"redact": ["("]}, {"redact": ["x*"]}, {"redact": [r"\s"]}, {"redact": [""]}, {"max_mb": 0}, {"keep": -1},
              {"prompt_characters": 10**9}, {"headers": True}, {"redact": ["x"] * 99}],
)  # fmt: skip
def test_bad_terms_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RequestLog(**given)


def until(happened: Any) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
