"""Who holds something for a while, in a row that several hosts see: a lease ends by time, or with its process."""

from __future__ import annotations

import os
import socket
import time
import uuid

# What a watcher waits beyond a lease's end, for clocks that do not run alike.
MARGIN_SECONDS = 2.0
# Of its term, after how much a lease is renewed.
RENEWED_AFTER = 0.2


def new_lease() -> str:
    """Names this process, and this one lease of it."""
    return f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"


def clock() -> float:
    """Seconds by which leases are judged, each host by its own; they go on while a machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def is_gone(lease: str) -> bool:
    """Was it a process of this host that is no more? Of another host nobody knows; its lease has an end."""
    host, _, rest = lease.partition(" ")
    pid = rest.partition(" ")[0]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
