"""Gives each starter a network of its own, and keeps the books of what crosses it.

The kernel counts; we read. So whatever happens to this process, no byte is lost: a job goes on with its network, and
the next instance finds record, link and counts where they were. The order of things when a starter comes:

    record (intent) -> counters -> namespace and link -> descriptor to the starter -> "entered" -> we let go

and when the last process of a namespace has ended, the kernel removes the link, and tells us:

    link gone -> counts -> record is complete -> counters are removed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from ipaddress import IPv4Network, IPv6Network
from typing import Optional

from vmnode.accounting import addresses, lan, notes
from vmnode.accounting.admission import QUESTION_S, Admission
from vmnode.accounting.books import Books
from vmnode.accounting.ledger import FILE, Ledger
from vmnode.config import Config
from vmnode.errors import VmnodeError
from vmnode.host import accounts, clock, condor, files, links, uplink
from vmnode.host.counting import Rules
from vmnode.host.door import FILE as DOOR
from vmnode.host.door import Door, Visit
from vmnode.host.events import AccountingEvents
from vmnode.host.nftables import NftablesCounters

log = logging.getLogger("vmnoded")

GROUP = "vmnode"  # may read the ledger
USAGE = "usage.json"  # below [paths] run_dir
START_S = 10.0  # the daemon waits at most this long for us
RETRY_S = 10.0
SETTLE_S = 0.2  # what happens within this time is looked at together; more, if looking takes long:
LEISURE = 10  # times as long as a look took, the next one waits
MTU = 1500  # of a host without a way out


class Accountant:
    """From `start` to `close`. What it made stays when it closes, since the jobs stay."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._run_dir = config.paths.run_dir
        self._woken = asyncio.Event()
        self._admission: Optional[Admission] = None
        self._why = "it has just started"  # there is no admission
        self._known = asyncio.Event()  # whether it works
        self._addresses_changed = False
        self._said_no_ipv6 = False
        self._published = b""
        self._task: Optional[asyncio.Future[None]] = None

    async def start(self) -> None:
        """Returns when starters are served, or when it is known why not."""
        if self._config.accounting.enabled:
            self._task = asyncio.ensure_future(self._run())
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._known.wait(), START_S)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        """Answer at the door, with a network or with what is wrong, until we are cancelled."""
        while True:
            try:
                files.make_directory(self._run_dir / notes.DIRECTORY)
                async with Door(self._run_dir / DOOR, self._visit):
                    await self._work()
            except OSError as error:
                log.error("accounting does not work: %s", error)
                self._known.set()
            await asyncio.sleep(RETRY_S)

    async def _work(self) -> None:
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    await self._keep_books(stack)
            except (VmnodeError, OSError) as error:
                line = error.line if isinstance(error, VmnodeError) else str(error)
                if line != self._why:
                    log.error("accounting does not work: %s", line)
                self._why = line
                self._known.set()
            await asyncio.sleep(RETRY_S)

    async def _visit(self, visit: Visit) -> None:
        if self._admission is not None:
            await self._admission.visit(visit)
        elif await visit.hear(QUESTION_S):
            visit.tell(f"no {self._why}")

    async def _keep_books(self, stack: contextlib.AsyncExitStack) -> None:
        """Open the books and the door, and keep the books until something fails."""
        settings = self._config.accounting
        rules = await asyncio.to_thread(self._rules)
        counters = NftablesCounters(rules.tag)
        await counters.set_up(rules)
        ledger = Ledger(self._config.paths.state_dir / FILE, accounts.group(GROUP))
        stack.callback(ledger.close)
        books = Books(ledger, counters, rules, clock.now().boot_id)
        stack.push_async_callback(books.close)
        await books.recover()
        events = AccountingEvents(rules.links, self._links_gone, self._host_changed, self._woken.set)
        stack.callback(events.close)
        slips = self._run_dir / notes.DIRECTORY
        address_file = await condor.startd_address_file()
        self._admission = Admission(books, settings.exempt, address_file, uplink.mtu() or MTU, self._woken.set)
        stack.callback(self._send_away)
        self._known.set()
        log.info("accounting: jobs get addresses of %s, and nftables counts", rules.pool4)
        while True:
            began = time.monotonic()
            if self._addresses_changed:
                self._addresses_changed = False
                await books.change_rules(await asyncio.to_thread(self._rules))
            self._woken.clear()
            await books.look()
            for note in notes.left(slips):
                await self._admission.unaccounted(note)
            self._publish(books)
            await asyncio.sleep(max(SETTLE_S, LEISURE * (time.monotonic() - began)))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), settings.sample_s)

    def _send_away(self) -> None:
        self._admission = None

    def _links_gone(self, names: Optional[list[str]]) -> None:
        self._woken.set()

    def _host_changed(self) -> None:
        self._addresses_changed = True
        self._woken.set()

    def _rules(self) -> Rules:
        """What counts, with the host as it is now. Raises VmnodeError if jobs could not have a network."""
        settings = self._config.accounting
        tag = addresses.tag(str(self._run_dir))
        prefix = addresses.prefix(tag)
        pool4, pool6 = IPv4Network(settings.pool4), self._pool6()
        pools: list[uplink.Prefix] = [pool4] if pool6 is None else [pool4, pool6]
        for pool in pools:
            route = uplink.overlapping(pool, prefix)
            if route is not None:
                key = f"pool{pool.version}"
                what = f"[accounting] {key} {pool} overlaps the host's route {route}"
                raise VmnodeError(what, f"choose another {key}")
            uplink.forward(pool.version)
        lan4, lan6 = lan.prefixes(settings.lan, map(str, pools), links.local_addresses())
        return Rules(tag, prefix, pool4, pool6, lan4, lan6)

    def _pool6(self) -> Optional[IPv6Network]:
        """Jobs have IPv6 where the host has a way out by it, and does not lose that by forwarding."""
        if not uplink.default_routes(6):
            return None
        lost = uplink.lost_by_forwarding()
        if lost is None:
            return IPv6Network(self._config.accounting.pool6)
        if not self._said_no_ipv6:
            log.warning(
                "accounting: jobs have no IPv6: if this host forwarded it, it would lose its default route %s"
                " (hint: sysctl net.ipv6.conf.%s.accept_ra=2)",
                lost,
                lost.links[0],
            )
        self._said_no_ipv6 = True
        return None

    def _publish(self, books: Books) -> None:
        """What the startd's hook tells about running jobs."""
        slots = {}
        for record in books.running.values():
            if record.slot and record.job and record.total is not None:
                counts = {name: traffic.bytes for name, traffic in record.total._asdict().items()}
                slots[record.slot] = {"job": record.job, **counts}
        document = json.dumps({"version": 1, "slots": slots}).encode()
        if document != self._published:
            files.write_atomically(self._run_dir / USAGE, document)
            self._published = document
