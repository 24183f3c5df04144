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
import os
import time
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from vmnode.accounting import addresses, guests, notes, query, rules, way_out
from vmnode.accounting.admission import QUESTION_S, Admission
from vmnode.accounting.books import Books
from vmnode.accounting.gatekeeper import Gatekeeper
from vmnode.accounting.guest_books import GuestBooks
from vmnode.accounting.ledger import FILE, Ledger, lock
from vmnode.accounting.record import Record
from vmnode.config import Config
from vmnode.errors import CommandFailed, VmnodeError
from vmnode.host import accounts, clock, files, uplink
from vmnode.host.counting import Rules
from vmnode.host.dns_relay import Relay
from vmnode.host.events import AccountingEvents, happened
from vmnode.host.jobnet import Ends
from vmnode.host.libvirt import Nics
from vmnode.host.resolver import loopback_servers
from vmnode.host.starter_socket import FILE as SOCKET
from vmnode.host.starter_socket import Connection, Listener
from vmnode.host.taps import TapCounters
from vmnode.overlays import Overlay
from vmnode.values import Target

log = logging.getLogger("vmnoded")

GROUP = "vmnode"  # may read the ledger
USAGE = "usage.json"  # below [paths] run_dir
RESOLV_CONF = Path("/etc/resolv.conf")
START_S = 20.0  # the daemon waits at most this long for us
GRACE_S, CLOSE_S = 2.0, 5.0
PATIENCE_S = 1.5  # who comes while we start is kept waiting: a starter waits for two seconds
RETRY_S = 10.0
SETTLE_S = 0.2  # what happens within this time is looked at together; more, if looking takes long:
LEISURE = 10  # times as long as a look took, the next one waits
FORGET_S = 3600.0  # old records are looked for this often
MTU = 1500  # of a host without a way out


class Sources(NamedTuple):
    """What others know, asked anew each time."""

    nics: Callable[[], Mapping[str, Nics]]  # the running guests' network interfaces, by domain
    overlays: Callable[[], Sequence[Overlay]]  # what the guests were started on
    targets: Callable[[], Sequence[Target]]  # whom a job should reach


class Accountant:
    """From `start` to `close`. What it made stays when it closes, as long as jobs stay."""

    def __init__(self, config: Config, sources: Sources) -> None:
        self.config = config
        self._sources = sources
        self._run_dir = config.paths.run_dir
        self._woken = asyncio.Event()
        self._closing = False
        self._known = asyncio.Event()  # whether it works
        self._why = "vmnoded has just started and gives no networks yet"  # there is no admission
        self._admission: Optional[Admission] = None
        self._books: Optional[Books] = None
        self._gatekeeper: Optional[Gatekeeper] = None
        self._addresses_changed = False
        self._published = b""
        self._task: Optional[asyncio.Future[None]] = None

    async def start(self) -> None:
        """Returns when starters are served, or when it is known why not."""
        if self.config.accounting.enabled or self._has_running():
            self._task = asyncio.ensure_future(self._run())
            await happened(self._known, START_S)

    def _has_running(self) -> bool:
        """Whether there are jobs whose records have to be kept to their end, though no more are let in."""
        path = self.config.paths.state_dir / FILE
        try:
            return path.exists() and any(query.find(path, query.Selection(running=True)))
        except VmnodeError as error:
            log.error("%s", error.line)
            return False

    async def close(self) -> None:
        self._closing = True
        self._woken.set()
        if self._task is not None:  # it comes to its end by itself, unless it waits for something
            await asyncio.wait({self._task}, timeout=GRACE_S)
        while self._task is not None and not self._task.done():  # wait_for may forget a cancellation (events.happened)
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CLOSE_S)

    @property
    def running(self) -> Sequence[Record]:
        """The jobs whose link is there, in the order in which they began."""
        return [] if self._books is None else list(self._books.running.values())

    # --- the starters' socket --------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Answer starters, with a network or with what is wrong, until we are cancelled."""
        while not self._closing:
            if not self.config.accounting.enabled:
                await self._work()
                return
            try:
                files.make_directory(self._run_dir / notes.DIRECTORY)
                async with Listener(self._run_dir / SOCKET, self._serve):
                    await self._work()
                continue
            except OSError as error:
                log.error("accounting does not work: %s", error)
                self._known.set()
            await asyncio.sleep(RETRY_S)

    async def _serve(self, connection: Connection) -> None:
        await happened(self._known, PATIENCE_S)
        why = self._gatekeeper.complaint if self._gatekeeper is not None else ""
        if self._admission is not None and not why:
            await self._admission.serve(connection)
        else:
            with contextlib.suppress(VmnodeError):  # the peer has gone, or says nothing
                if await connection.receive(QUESTION_S):
                    connection.send(f"no {why or self._why}")

    async def _work(self) -> None:
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    await self._keep_books(stack)
                return
            except (VmnodeError, OSError) as error:
                line = error.line if isinstance(error, VmnodeError) else str(error)
                if line != self._why:
                    log.error("accounting does not work: %s", line)
                self._why = line
                self._known.set()
            except Exception as error:  # whatever it is: else no job would be counted, and nobody would know
                log.exception("accounting does not work, which is a fault of vmnode")
                self._why = f"a fault of vmnode: {type(error).__name__}: {error}"
                self._known.set()
            await asyncio.sleep(RETRY_S)

    # --- the books ------------------------------------------------------------------------------------------------

    async def _keep_books(self, stack: contextlib.AsyncExitStack) -> None:
        """Set everything up, let starters in, and keep the books until something fails.

        Where accounting has been switched off nobody is let in, and this ends with the last job.
        """
        settings = self.config.accounting
        file = self.config.paths.state_dir / FILE
        stack.callback(os.close, lock(file))
        plan = await asyncio.to_thread(rules.plan, settings, self._run_dir)
        mtu = await asyncio.to_thread(uplink.mtu) or MTU
        plan, servers = await self._open_relay(stack, plan)
        counters, backend, undisturbed = await rules.set_up(settings.backend, plan)
        ledger = Ledger(file, accounts.group(GROUP))
        stack.callback(ledger.close)
        books = Books(ledger, counters, await self._open_guest_books(plan), plan, clock.now().boot_id)
        stack.push_async_callback(self._close_books, books)
        await books.recover(undisturbed)
        self._books = books
        stack.callback(self._send_away)
        gatekeeper = self._gatekeeper = await self._open_gate(stack, plan, mtu)
        events = AccountingEvents(
            plan.links, self._woken.set, self._host_changed, self._woken.set, gatekeeper.firewall_changed
        )
        stack.callback(events.close)
        admission = Admission(books, settings.exempt, mtu, servers, self._woken.set)
        if settings.enabled:
            self._admission = admission
            log.info("accounting: jobs get addresses of %s, and %s counts", plan.pool4, backend)
        else:
            log.info("accounting is switched off; the jobs that run are counted to their end")
        self._known.set()
        await self._look(books, admission)

    async def _close_books(self, books: Books) -> None:
        """Without jobs, leave nothing, also in the firewalls of others."""
        await books.close()
        if not books.running:
            await way_out.dismiss(books.rules.links)

    async def _look(self, books: Books, admission: Admission) -> None:
        settings = self.config.accounting
        slips = self._run_dir / notes.DIRECTORY
        forget_due = 0.0
        while not self._closing and (settings.enabled or books.running):
            began = time.monotonic()
            self._woken.clear()
            if self._addresses_changed:
                self._addresses_changed = False
                await books.change_rules(await asyncio.to_thread(rules.with_host, books.rules, settings))
            await books.look(self._sources.overlays(), self._sources.nics())
            await asyncio.gather(*(admission.unaccounted(note) for note in notes.left(slips)))
            self._publish(books)
            if began >= forget_due:
                forget_due = began + FORGET_S
                books.forget_before(time.time() - settings.keep_days * 86400)
            await asyncio.sleep(max(SETTLE_S, LEISURE * (time.monotonic() - began)))
            await happened(self._woken, settings.sample_s)

    def _send_away(self) -> None:
        self._admission = self._gatekeeper = self._books = None

    def _host_changed(self) -> None:
        self._addresses_changed = True
        self._woken.set()

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

    # --- what it is made of ---------------------------------------------------------------------------------------

    async def _open_relay(self, stack: contextlib.AsyncExitStack, plan: Rules) -> tuple[Rules, Sequence[IPv4Address]]:
        """Where the host's name servers are on its loopback, somebody has to ask them for the jobs."""
        try:
            servers = loopback_servers(RESOLV_CONF.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return plan, ()
        for lost in servers.lost:
            log.warning("accounting: jobs cannot ask the host's name server %s: it is an IPv6 loopback address", lost)
        if not servers.relayed:
            return plan, ()
        gateway = plan.pool4[addresses.GATEWAY]
        relay = Relay(gateway, plan.pool4, servers.relayed)
        await relay.open()
        stack.push_async_callback(relay.close)
        return plan._replace(relay=(gateway, relay.port)), servers.relayed

    async def _open_guest_books(self, plan: Rules) -> Optional[GuestBooks]:
        books = GuestBooks(TapCounters(plan.tag), self._run_dir / guests.FILE, clock.now().boot_id)
        try:
            await books.start(plan.lan4, plan.lan6)
        except CommandFailed as error:
            log.warning("accounting: the guests of VM jobs are not counted: %s", error.line)
            return None
        return books

    async def _open_gate(self, stack: contextlib.AsyncExitStack, plan: Rules, mtu: int) -> Gatekeeper:
        numbered = addresses.of_number(addresses.PROBE, plan.pool4, plan.pool6)
        families = [Ends(numbered.job4, numbered.gateway4)]
        if numbered.job6 is not None and numbered.gateway6 is not None:
            families.append(Ends(numbered.job6, numbered.gateway6))
        link = addresses.probe(plan.tag)
        probe = way_out.Probe(link, link, families, mtu)
        gatekeeper = Gatekeeper(probe, plan.links, [ends.job.version for ends in families], self._sources.targets)
        await gatekeeper.look()
        task = asyncio.ensure_future(gatekeeper.keep())
        stack.callback(task.cancel)
        return gatekeeper
