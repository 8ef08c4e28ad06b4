"""`python docs/make_picture.py CAPTURE OUT.svg`: the picture in README, from what `make demo` really printed.

Shows the first run, the two answers, and the closing table; repeated progress lines are thinned, nothing is changed.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH = 118
# Rich's template loads its fonts from the network; the reader's own monospace font will do.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
PARTS = ("version 1: train", "ask the bare base", "ask the tuned model", "roll back")


def main() -> None:
    capture, target = Path(sys.argv[1]), Path(sys.argv[2])
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in chosen(capture.read_text(encoding="utf-8").splitlines()):
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="ellipsis", no_wrap=True)
    target.write_text(console.export_svg(title="make demo", code_format=FORMAT), encoding="utf-8")


def chosen(lines: list[str]) -> list[str]:
    """The lines of the wanted parts, then everything from the closing table on."""
    kept: list[str] = []
    wanted = False
    for at, line in enumerate(lines):
        if "what happened" in line and "took" in line:
            return [*kept, "", *(each for each in lines[at:] if "the project stays" not in each)]
        if line.startswith("\033[1m$ "):
            wanted = any(part in line for part in PARTS)
        if wanted and not _is_repeat(line, kept):
            kept.append(line)
    return kept


def _is_repeat(line: str, kept: list[str]) -> bool:
    """A further line of training (every third is kept) or of waiting for the engine."""
    stage = re.match(r"\[ *[\d.]+ s\] (train|starting|evaluate)", line)
    before = [each for each in kept[-4:] if stage and stage[1] in each]
    return bool(stage) and len(before) > 0 and int(float(line[1:8])) // 10 % 3 != 0


if __name__ == "__main__":
    main()
