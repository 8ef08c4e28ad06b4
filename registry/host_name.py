"""What this machine is called. A module of its own, because cards need it and hosts need cards."""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """`FT_HOST`, or the machine's hostname, in letters that queues and rows can have."""
    name = os.environ.get("FT_HOST") or socket.gethostname()
    return "".join(each if each.isascii() and each.isalnum() else "-" for each in name.lower()) or "host"
