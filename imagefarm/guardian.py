"""Ends the processes of a local farm when the farm itself was killed and can end them no more.

Run as a script of its own, in its own session. Standard input is a pipe from the farm; lines add and drop wards:

    + PID STAGE SIGNAL      - PID

The end of the pipe means that the farm is gone, by whatever way: all wards are then ended, stage by stage. The farm's
lock is inherited and so stays held until this is done. Standard library only: it starts at once and stays small.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return True


def end(pids: list[int], signals: dict[int, int], seconds: float) -> None:
    """Ask these processes to end; kill those that still run after `seconds`, with what they started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signals[pid])
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if is_running(pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Watch the pipe; then end what is left. The one argument: seconds granted to each stage."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stages: dict[int, int] = {}
    signals: dict[int, int] = {}
    for line in sys.stdin:
        verb, pid, *rest = line.split()
        if verb == "+":
            stages[int(pid)], signals[int(pid)] = int(rest[0]), int(rest[1])
        else:
            stages.pop(int(pid), None)
    for stage in sorted(set(stages.values())):
        end([pid for pid in stages if stages[pid] == stage], signals, float(sys.argv[1]))


if __name__ == "__main__":
    main()
