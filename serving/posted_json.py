"""JSON as strangers post it: UTF-8, no half characters, finite numbers, not too deep. Pure."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from serving.http_messages import Refusal

# What is deeper meets Python's own limit later, where nobody can refuse it any more.
MAX_DEPTH = 64
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(raw: bytes) -> Any:
    """The value. Raises Refusal (400) for what is no JSON, or could not be kept or read again."""
    try:
        text = raw.decode()
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if not _is_flat(text, found):
            raise ValueError(f"it is more than {MAX_DEPTH} levels deep")
        if HALF_CHARACTER.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refusal("it has half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise _refusal(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _refusal(f"it is more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise _refusal(str(error)) from None
    return found


def read_object(raw: bytes) -> dict[str, Any]:
    found = read_json(raw)
    if not isinstance(found, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    return found


def _is_flat(text: str, found: Any) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return True
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [child for each in level for child in _children(each)]
        if not level:
            return True
    return False


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _refusal(why: str) -> Refusal:
    return Refusal(400, f"the body is not JSON that can be taken: {why}", "invalid_json")
