"""`python -m worker.keeper`: runs the maintenance services until it is told to stop. Any number may run; one leads."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from shared import failpoints, logs
from shared.errors import FarmError, Unavailable
from shared.services import Services, open_services
from worker.keeper import keeper_services
from worker.keeper.leader import Leader

logger = logging.getLogger("worker.keeper")


def keep(services: Services, stopping: threading.Event) -> None:
    """One round of every service each `keeper_seconds`, while we lead."""
    leader = Leader(services.engine)
    chores = keeper_services()
    led = False
    while not stopping.is_set():
        leads = leader.leads()
        if leads != led:
            logger.info("leading" if leads else "standing by")
            led = leads
        for name, run in chores.items() if leads else ():
            failpoints.hit("before_chore")
            try:
                run(services)
            except Unavailable as error:
                logger.warning("%s: %s", name, error)
            except Exception:
                logger.exception("%s failed; the other services go on", name)
        stopping.wait(services.settings.keeper_seconds)
    leader.resign()


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        services = open_services("imagefarm keeper", pool_size=2)
    except FarmError as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(services.settings.log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    keep(services, stopping)
    return 0


if __name__ == "__main__":
    sys.exit(main())
