"""Keeps the jobs' way through the host's firewalls open, and knows whether it is.

A job whose packets are dropped would be worse off than one that nobody counts, and with a queue behind it the node
would be a black hole. So whoever gives jobs their networks asks here first (`complaint`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Callable, Optional

from vmnode.accounting.way_out import NAME, Passage, Probe, admit
from vmnode.conditions import Observation, Status, unknown
from vmnode.errors import VmnodeError
from vmnode.host.events import happened
from vmnode.values import Target

log = logging.getLogger("vmnoded")

GAP_S = 2.0  # between looks at the firewalls, when others change rules all the time
PERIOD_S = 10.0  # and when nobody says anything: a flush of iptables-legacy does not
PROOF_S = 600.0  # between connections to a target, when nothing changes: the collector hears from the whole pool
CONFIRM_S = 2.0  # jobs lose their network by two bad proofs in a row


class Gatekeeper:
    """`own_links` is how the jobs' links begin, `versions` the IP versions they have; `targets` is asked before each
    proof, for HTCondor may be configured anew.
    """

    def __init__(
        self, probe: Probe, own_links: str, versions: Sequence[int], targets: Callable[[], Sequence[Target]]
    ) -> None:
        self._probe, self._own_links, self._versions, self._targets = probe, own_links, versions, targets
        self._told = asyncio.Event()
        self._passage: Optional[Passage] = None
        self._changed = True  # since the last proof began
        self._proof_due = 0.0  # time.monotonic()
        self._said = ""
        self.seen = unknown(NAME, "NotProven", "whether jobs have network has not been tried yet")

    @property
    def complaint(self) -> str:
        """Why no job should be given a network now, a sentence; "" if nothing is known against it."""
        return self.seen.message if self.seen.status is Status.FAILED else ""

    def firewall_changed(self) -> None:
        """Somebody changed rules that are not ours."""
        self._changed = True
        self._told.set()

    async def keep(self) -> None:
        """Until cancelled. The first look is `look`'s caller's, who wants to know what came of it."""
        while True:
            await happened(self._told, PERIOD_S)
            self._told.clear()
            await self.look()
            await asyncio.sleep(GAP_S)

    async def look(self) -> None:
        """Open what is shut, and prove it if that is due. Raises nothing that a firewall can do to us."""
        try:
            passage = await admit(self._own_links, self._versions)
            if passage != self._passage:
                log.info("accounting: %s", passage)
                self._passage, self._changed = passage, True
            if self._changed or time.monotonic() >= self._proof_due:
                await self._prove()
        except VmnodeError as error:
            self._say(f"the jobs' way out cannot be looked after: {error.line}")

    async def _prove(self) -> None:
        self._changed = False
        seen = await self._probe.check(self._targets())
        if seen.status is Status.FAILED and self.seen.status is not Status.FAILED:
            await asyncio.sleep(CONFIRM_S)
            seen = await self._probe.check(self._targets())
        self.seen = seen
        settled = seen.status is not Status.FAILED
        self._proof_due = time.monotonic() + (PROOF_S * random.uniform(0.9, 1.1) if settled else PERIOD_S)
        self._say("" if settled else _line(seen))

    def _say(self, complaint: str) -> None:
        """Log what changes."""
        if complaint and complaint != self._said:
            log.error("accounting: %s", complaint)
        elif self._said and not complaint:
            log.info("accounting: jobs have their network again")
        self._said = complaint


def _line(seen: Observation) -> str:
    return f"{seen.message} (hint: {seen.hint})" if seen.hint else seen.message
