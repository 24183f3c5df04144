"""Tells of processes that outlive their starter, and ends them where that is configured; also with accounting off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Callable

from vmnode.accounting import addresses
from vmnode.accounting.leftovers import Policy
from vmnode.accounting.record import Record
from vmnode.accounting.sweep import Sweep
from vmnode.config import Config
from vmnode.errors import VmnodeError
from vmnode.host import accounts, condor

log = logging.getLogger("vmnoded")

PERIOD_S = 10.0


async def leftovers(config: Config, running: Callable[[], Sequence[Record]]) -> None:
    """Until cancelled. `running` are the records of jobs whose link is there."""
    settings = config.accounting
    if settings.leftovers == "off":
        return
    base = ""
    with contextlib.suppress(VmnodeError):
        base = (await condor.settings(["BASE_CGROUP"])).get("BASE_CGROUP", "")
    spared = frozenset({0} | {uid for uid in [accounts.uid("condor")] if uid is not None})
    policy = Policy(settings.leftovers == "end", settings.leftovers_grace_s, spared)
    links = addresses.prefix(addresses.tag(str(config.paths.run_dir))) if settings.enabled else ""
    sweep = Sweep(policy, links, base)
    complaint = ""
    while True:
        await asyncio.sleep(PERIOD_S)
        try:
            for finding in await sweep.look(time.monotonic(), running()):
                log.warning("%s", finding.sentence)
            complaint = ""
        except (OSError, VmnodeError) as error:
            if str(error) != complaint:
                log.error("leftover processes cannot be looked for: %s", error)
            complaint = str(error)
