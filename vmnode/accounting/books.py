"""The jobs that are counted now: in the ledger, in the kernel's counters and in memory; these three kept in step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Optional

from vmnode.accounting import addresses
from vmnode.accounting.guest_books import GuestBooks
from vmnode.accounting.ledger import Ledger
from vmnode.accounting.record import VM, Outcome, Process, Record, counted, ended, restarted
from vmnode.host import jobnet
from vmnode.host.counting import Counters, Link, Rules
from vmnode.host.libvirt import Nics
from vmnode.overlays import Overlay
from vmnode.usage import NONE

log = logging.getLogger("vmnoded")


class _Batch:
    """Links whose counters are made in one transaction."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.made: Optional[asyncio.Future[None]] = None


class Books:
    """All methods are for the event loop; what a record says is what `running` has at that moment."""

    def __init__(
        self, ledger: Ledger, counters: Counters, guests: Optional[GuestBooks], rules: Rules, boot_id: str
    ) -> None:
        self.rules = rules
        self._guests = guests
        self.running: dict[int, Record] = {}
        self._ledger = ledger
        self._counters = counters
        self._boot_id = boot_id
        self._disturbed = False  # the rules were not there since the last look
        self._attached: set[int] = set()  # those whose link was there
        self._last_number = addresses.PROBE
        self._foreign: frozenset[int] = frozenset()  # numbers that links have which are in no record
        self._counting = asyncio.Lock()
        self._batch = _Batch()

    # --- a job comes ----------------------------------------------------------------------------------------------

    def forget_before(self, ended_at: float) -> int:
        """Delete old records; returns how many."""
        return self._ledger.forget_before(ended_at)

    def open(self, starter: Process, slot: str) -> Record:
        """A new record, with addresses and a link's name that nobody else has. Raises TryAgain, StateError."""
        used = {record.number for record in self.running.values()} | self._foreign
        number = addresses.free_number(used, self._last_number, self.rules.pool4, self.rules.pool6)
        record = self.note(starter, slot, time.time(), number)
        record = replace(record, link=addresses.link(self.rules.tag, record.id))
        self._ledger.write([record])
        self.running[record.id] = record
        self._last_number = number
        return record

    def note(self, starter: Process, slot: str, at: float, number: int = 0) -> Record:
        """A record of a job that has no link."""
        return self._ledger.add(Record(0, self._boot_id, "", number, starter, slot, started_at=at, seen_at=at))

    async def count(self, record: Record) -> None:
        """From now on, what crosses the record's link is counted. Raises CommandFailed, DeadlineExceeded.

        Those who come while the counters of others are made share the next transaction.
        """
        batch = self._batch
        batch.links.append(self.link(record))
        async with self._counting:
            if batch.made is None:
                self._batch = _Batch()
                batch.made = asyncio.ensure_future(self._counters.add(batch.links))
                await asyncio.wait([batch.made])
        batch.made.result()

    def attached(self, record: Record) -> None:
        """The link is there: when it is gone, the job has ended."""
        self._attached.add(record.id)

    def write(self, record: Record) -> None:
        """Something else about a running job has become known."""
        self.running[record.id] = record
        self._ledger.write([record])

    async def drop(self, record: Record, outcome: Outcome, why: str) -> None:
        """The job of this record has no network of its own; there may be a record of it already, or a link."""
        self.running.pop(record.id, None)
        self._attached.discard(record.id)
        self._ledger.write([ended(record, outcome, time.time(), why)])
        if record.link:
            await self._counters.remove([self.link(record)])

    def latest(self, record: Record) -> Record:
        return self.running.get(record.id, record)

    def of_starter(self, starter: Process) -> Optional[Record]:
        """The record of a starter of this boot, whether it runs or has ended."""
        return self._ledger.of_starter(starter, self._boot_id)

    async def close(self) -> None:
        """Leave the rules to the jobs that run; without any, leave nothing."""
        if not self.running:
            await self._counters.tear_down()
            if self._guests is not None:
                await self._guests.close()

    async def change_rules(self, rules: Rules) -> None:
        """The host has other addresses."""
        if rules != self.rules:
            self._disturbed |= not await self._counters.set_up(rules)
            if self._guests is not None:
                await self._guests.change_lan(rules.lan4, rules.lan6)
            self.rules = rules

    def link(self, record: Record) -> Link:
        if not record.number < self.rules.pool4.num_addresses:  # it began when the pool was another one
            return Link(record.link, self.rules.pool4[0], None)
        numbered = addresses.of_number(record.number, self.rules.pool4, self.rules.pool6)
        return Link(record.link, numbered.job4, numbered.job6)

    # --- while it runs, and when it ends --------------------------------------------------------------------------

    async def look(self, overlays: Iterable[Overlay] = (), nics: Optional[Mapping[str, Nics]] = None) -> None:
        """Read the counters, and close the records of jobs whose link is gone; their counts are final.

        `overlays` and `nics` are what is known of running guests. Raises StateError.
        """
        self._ledger.check()
        attached = set(self._attached)
        present = await asyncio.to_thread(jobnet.present, self.rules.links)
        reading = await self._counters.read()
        now = time.time()
        if reading is None:
            await self._counters.set_up(self.rules)
            self._disturbed = True
            reading = await self._counters.read() or {}
        disturbed, self._disturbed = self._disturbed, False
        if disturbed:
            log.warning("accounting: somebody removed or changed the rules that count: they were made anew")
        if self._guests is not None:
            await self._guests.look(list(self.running.values()), overlays, nics or {})
        looked_at = [record for record in self.running.values() if record.id in attached]
        lost = [record for record in looked_at if record.link not in reading]
        if lost:
            log.warning("accounting: %d jobs were not counted for a while: their records say since when", len(lost))
            # One of its elements may be there, with its count: all begin at zero again, as `restarted` has it.
            await self._counters.remove([self.link(record) for record in lost])
            await self._counters.add([self.link(record) for record in lost if record.link in present])
        changed, gone = [], []
        for record in [self.running[record.id] for record in looked_at if record.id in self.running]:
            new = record if self._guests is None else self._guests.counted(record)
            new = counted(new, reading[record.link], now) if record.link in reading else restarted(new)
            if disturbed and new.partial_since is None:
                new = replace(new, partial_since=record.seen_at)
            if record.link not in present:
                new = ended(new, Outcome.COMPLETE, now, self._why_incomplete(new))
                gone.append(new)
            if replace(new, seen_at=0, read=NONE) != replace(record, seen_at=0, read=NONE):
                changed.append(new)
            self.running[record.id] = new
        self._ledger.write(changed)
        await self._forget(gone)
        if self._guests is not None:
            await self._guests.forget(list(self.running.values()))

    def _why_incomplete(self, record: Record) -> str:
        if self._guests is not None:
            return self._guests.why_incomplete(record)
        return "its guest is not counted: that takes nftables on bridges" if record.universe == VM else ""

    async def _forget(self, records: Collection[Record]) -> None:
        for record in records:
            del self.running[record.id]
            self._attached.discard(record.id)
        await self._counters.remove([self.link(record) for record in records])

    # --- what the instance before us left -------------------------------------------------------------------------

    async def recover(self, undisturbed: bool) -> None:
        """Take over what runs, and close what has ended meanwhile; with the rules set up.

        `undisturbed` tells whether they were there all the time.
        """
        now = time.time()
        present = await asyncio.to_thread(jobnet.present, self.rules.links)
        reading = await self._counters.read() or {}
        closed = []
        for record in self._ledger.running():
            self._last_number = max(self._last_number, record.number)
            if record.boot_id != self._boot_id:
                closed.append(ended(record, Outcome.RECOVERED, record.seen_at, "the node was booted anew"))
                continue
            if undisturbed and record.link not in reading:
                closed.append(ended(record, Outcome.UNACCOUNTED, now, "vmnoded ended before its network was made"))
                continue
            new = counted(record, reading[record.link], now) if record.link in reading else restarted(record)
            if not undisturbed and new.partial_since is None:
                new = replace(new, partial_since=record.seen_at)
            if record.link in present:
                self.running[record.id] = new
                self._attached.add(record.id)
            else:
                closed.append(ended(new, Outcome.RECOVERED, now))
        self._ledger.write([*closed, *self.running.values()])
        uncounted = [self.link(record) for record in self.running.values() if record.link not in reading]
        await self._counters.remove(uncounted)  # some of their elements may be there, with their counts
        await self._counters.add(uncounted)
        ours = {record.link for record in self.running.values()}
        await self._counters.remove(
            Link(name, self.rules.pool4[0], None) for name in reading if name not in ours | present
        )
        foreign = sorted(present - ours - {addresses.probe(self.rules.tag)})
        for name in foreign:
            log.warning("accounting: the link %s is in no record: what its job uses is not counted", name)
        if foreign:  # of another ledger: what its jobs have, ours must not get
            self._ledger.skip_to(max(addresses.record_of(self.rules.tag, name) for name in foreign))
            routed = await asyncio.to_thread(jobnet.routed, self.rules.links)
            first = {pool.version: int(pool[0]) for pool in (self.rules.pool4, self.rules.pool6) if pool}
            self._foreign = frozenset(int(address) - first.get(address.version, 0) for address in routed)
        if closed or self.running:
            log.info("accounting: %d jobs run, %d ended meanwhile", len(self.running), len(closed))
