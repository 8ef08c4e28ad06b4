"""What must not stand in a log: keys, and what tells who somebody is. Pure.

Found by its form, so it errs on the side of taking too much: a long number may be no telephone's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Looked at beyond the cut: what begins before it is then seen whole, and does not stand there by half.
MARGIN = 512

KEY = (
    r"\b(?:sk|pk|rk|rpa|hf|ghp|gho|ghs|ghu|github_pat|glpat|xox[abeprs]|ft|AKIA|ASIA|AIza)[-_]?[A-Za-z0-9_-]{12,}"
    r"|\bey[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]{4,}){1,4}"  # JSON web tokens
    r"|(?i:\bbearer\s+[^\s\"',;]{8,})"
    # What follows the word, as people write it: `password: x`, `"api_key": "x"`, `비밀번호는 x`.
    r"|(?i:(?:token|api[-_ ]?key|password|passwd|secret|비밀번호|패스워드|암호)"
    r"[\"']?\s*(?:[:=은는]|is\b)\s*[\"']?[^\s\"',;]{4,}[\"']?)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.{0,4096}?)(?:-----END[A-Z ]*-----|\Z)"
    r"|(?<![A-Za-z0-9+/_-])(?=[A-Za-z+/_-]{0,40}[0-9])[A-Za-z0-9+/_-]{32,}={0,2}"
)
EMAIL = r"[^\s@<>()\[\],;:\"'/]{1,64}@(?:[^\s@<>()\[\],;:\"'./]{1,63}\.){1,8}[^\W\d_]{2,24}"
# \d is any script's digit: full-width ones are common in Korean text.
DASH = r"[\s.\-‐-―−－]"
RESIDENT = rf"(?<!\d)\d{{6}}{DASH}{{0,3}}[1-8１-８]\d{{6}}(?!\d)"  # residents' and foreigners' numbers
CARD = rf"(?<!\d)\d{{4}}(?:{DASH}?\d{{4}}){{3}}(?:{DASH}?\d{{1,3}})?(?!\d)"
PHONE = (
    rf"[+＋]\d(?:{DASH}|[()]|\d){{6,18}}\d"
    rf"|(?<!\d)[(（]?[0０]\d{{1,3}}[)）]?{DASH}{{0,2}}\d{{3,4}}{DASH}{{0,2}}\d{{4}}(?!\d)"
    rf"|(?<!\d)1[568]\d\d{DASH}\d{{4}}(?!\d)"  # 1588-0000
    rf"|(?<!\d)\(?\d{{3}}\)?{DASH}\d{{3}}{DASH}\d{{4}}(?!\d)"
)
OURS = {"key": KEY, "e-mail": EMAIL, "number": rf"{RESIDENT}|{CARD}|{PHONE}"}


class Redaction:
    """`patterns`: regular expressions of what else must not stand there, from the recipe."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        ours = [(f"[{name}]", re.compile(pattern)) for name, pattern in OURS.items()]
        self._patterns = [*((("[redacted]", re.compile(each))) for each in patterns), *ours]

    def __call__(self, text: str, characters: int) -> str:
        """So many characters of the text, with a mark for each thing that was taken out."""
        head = text[: characters + MARGIN]
        pieces, at = [], 0
        for start, end, mark in _merged(self._found(head)):
            if start >= characters:
                break
            pieces += [head[at:start], mark]
            at = end
        return "".join([*pieces, head[at:characters]])

    def _found(self, head: str) -> list[tuple[int, int, str]]:
        return sorted(
            (found.start(), found.end(), mark)
            for mark, pattern in self._patterns
            for found in pattern.finditer(head)
            if found.end() > found.start()
        )


def _merged(spans: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Those that overlap are one, with the mark of the first."""
    merged: list[tuple[int, int, str]] = []
    for start, end, mark in spans:
        if merged and start < merged[-1][1]:
            before = merged[-1]
            merged[-1] = (before[0], max(before[1], end), before[2])
        else:
            merged.append((start, end, mark))
    return merged
