"""The guests of running jobs: whose taps they are, and the kernel's counts of them; kept in step, round by round.

    start -> look -> counted, for each record -> look … and forget, when records have ended

What is known of a guest is written down (guests.json) before it is used: libvirt forgets a domain when it ends, and the
instance after us would not know whose the counts are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from vmnode.accounting import guests
from vmnode.accounting.guests import Guest
from vmnode.accounting.record import Record
from vmnode.errors import StateError
from vmnode.host import files
from vmnode.host.libvirt import Nics
from vmnode.host.taps import Tap, TapCounters, present
from vmnode.overlays import Overlay
from vmnode.usage import Usage

log = logging.getLogger("vmnoded")


class GuestBooks:
    """Raises CommandFailed and DeadlineExceeded, naming nft, and OSError if guests.json cannot be written."""

    def __init__(self, counters: TapCounters, file: Path, boot_id: str) -> None:
        self._counters = counters
        self._file = file
        self._boot_id = boot_id
        self._guests: dict[int, Guest] = {}
        self._started: set[int] = set()  # records of jobs for which a domain was written
        self._reading: Mapping[Tap, Usage] = {}
        self._anew = False  # the counts began at zero since the last look
        self._lan: tuple[Collection[IPv4Network], Collection[IPv6Network]] = ((), ())

    async def start(self, lan4: Collection[IPv4Network], lan6: Collection[IPv6Network]) -> None:
        """Count from now on, with these prefixes as the LAN; or go on, where an instance before us began."""
        self._lan = (lan4, lan6)
        self._anew = not await self._counters.set_up(lan4, lan6)
        try:
            self._guests = guests.read(files.read_whole(str(self._file)), self._boot_id)
        except FileNotFoundError:
            pass
        except StateError as error:
            log.warning("%s: the guests of running jobs are not known: %s", self._file, error.what)

    async def change_lan(self, lan4: Collection[IPv4Network], lan6: Collection[IPv6Network]) -> None:
        if (lan4, lan6) != self._lan:
            self._lan = (lan4, lan6)
            self._anew |= not await self._counters.set_up(lan4, lan6)

    async def look(self, running: Collection[Record], overlays: Iterable[Overlay], nics: Mapping[str, Nics]) -> None:
        """Learn what libvirt says now (`nics`) of the running jobs' guests, and read the kernel's counts."""
        overlays = list(overlays)
        jobs = {overlay.job for overlay in overlays}
        self._started |= {record.id for record in running if record.job in jobs}
        now = guests.known(self._guests, running, overlays, nics)
        if now != self._guests:
            files.write_atomically(self._file, guests.write(now, self._boot_id))
            self._guests = now
        reading = await self._counters.read()
        if reading is None:
            log.warning("accounting: somebody removed or changed the rules that count guests: they are made anew")
            await self._counters.set_up(*self._lan)
            reading, self._anew = {}, True
        self._reading = reading

    def counted(self, record: Record) -> Record:
        """A running job's record after the last look; as it was, if its guest is not known or cannot be counted.

        To be called before record.counted, which says that this is the last look.
        """
        if self._anew:
            record = guests.restarted(record)
        guest = self._guests.get(record.id)
        return record if guest is None else guests.counted(record, guest, self._reading)

    def why_incomplete(self, record: Record) -> str:
        """See guests.why_incomplete; for a record that ends after the last look. Without a guest nothing is missing."""
        if record.id not in self._started | self._guests.keys():
            return ""
        return guests.why_incomplete(record, self._guests.get(record.id))

    async def forget(self, running: Collection[Record]) -> None:
        """Let go what belongs to none of these, once all records of the last look are in the ledger."""
        self._anew = False
        ids = {record.id for record in running}
        self._started &= ids
        needed = [guest for id_, guest in self._guests.items() if id_ in ids]
        await self._counters.remove(guests.to_remove(self._reading, needed, present()))

    async def close(self) -> None:
        """No job runs: leave nothing."""
        await self._counters.tear_down()
