"""What a starter is told: into a network of its own, or to the host's. And what becomes known of the job later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Callable, Optional

from vmnode.accounting import addresses
from vmnode.accounting.books import Books
from vmnode.accounting.notes import Note
from vmnode.accounting.record import Outcome, Process, Record
from vmnode.errors import DeadlineExceeded, VmnodeError
from vmnode.host import condor, jobnet, processes, resolver
from vmnode.host.jobnet import Ends
from vmnode.host.netns import Namespace
from vmnode.host.starter_socket import Connection

log = logging.getLogger("vmnoded")

QUESTION_S = 1.0  # who connects says what it wants within this time
ENTER_S = 2.0  # a starter that was given its network enters it within this time
END_S = 20.0  # a namespace that nobody is in any more is gone within this time, also among many
COMMAND = "run"  # in place of a slot: a command of the administrator's


class Admission:
    """Answers those who want a network."""

    def __init__(
        self,
        books: Books,
        exempt: str,
        mtu: int,
        name_servers: Sequence[IPv4Address],
        wake: Callable[[], None],
    ) -> None:
        """`name_servers` are those on the host's loopback."""
        self._books = books
        self._exempt = exempt
        self._startd_address: Optional[Path] = None  # known when somebody asks for the first time
        self._mtu = mtu
        self._name_servers = name_servers
        self._wake = wake
        self._asking = asyncio.Lock()
        self._asked = 0  # times that the startd was asked
        self._said: Optional[asyncio.Future[str]] = None  # what it said last

    async def serve(self, connection: Connection) -> None:
        """From the question to the answer, and for a command to its end."""
        try:
            word, _, rest = (await connection.receive(QUESTION_S)).partition(" ")
            process = Process(connection.peer.pid, processes.started(connection.peer.pid))
            if word == "starter":
                await self._admit_starter(connection, process, rest)
            elif word == COMMAND:
                await self._admit_command(connection, process, rest)
            else:
                connection.send("ok")
        except ProcessLookupError:
            pass
        except VmnodeError as error:
            log.warning("accounting: %s", error.line)

    async def _admit_starter(self, connection: Connection, process: Process, slot: str) -> None:
        record: Optional[Record] = None
        try:
            claim = await self._claim(slot)
            if not connection.waits:  # its note tells; when many come at once, others still have time
                raise VmnodeError(f"process {process.pid} did not wait for its network")
            if claim.exempt:
                record = self._books.note(process, slot, time.time())
                await self._books.drop(told(record, claim), Outcome.EXEMPT, "")
                connection.send("host")
                return
            if claim.docker:
                record = self._books.note(process, slot, time.time())
                await self._books.drop(told(record, claim), Outcome.OUTSIDE, "its container's network is dockerd's")
                connection.send("host")
                return
            record = self._books.open(process, slot)
            self._books.write(told(record, claim))
            await self._give_network(connection, record)
        except VmnodeError as error:
            log.error("accounting: %s: the job is not counted: %s", slot, error.line)
            if record is not None:
                await self._books.drop(self._books.latest(record), Outcome.UNACCOUNTED, error.what)
            connection.send(f"no {error.what}")

    async def _claim(self, slot: str) -> condor.Claim:
        if self._startd_address is None:
            self._startd_address = await condor.startd_address_file()
        if self._startd_address is None:
            raise VmnodeError("HTCondor's STARTD_ADDRESS_FILE is not known", "condor_config_val STARTD_ADDRESS_FILE")
        return condor.claim_of(await self._slots(self._startd_address), slot)

    async def _slots(self, address_file: Path) -> str:
        """What the startd says after this was called: those who come while it is asked share the next answer."""
        came = self._asked
        async with self._asking:
            if self._asked == came:
                self._asked += 1
                self._said = asyncio.ensure_future(condor.slots(address_file, self._exempt))
            assert self._said is not None
            await asyncio.wait([self._said])
            return self._said.result()

    async def _give_network(self, connection: Connection, record: Record) -> None:
        """Make the job's network and hand it over; it lives on by whoever is in it."""
        await self._books.count(record)
        numbered = addresses.of_number(record.number, self._books.rules.pool4, self._books.rules.pool6)
        families = [Ends(numbered.job4, numbered.gateway4)]
        if numbered.job6 is not None and numbered.gateway6 is not None:
            families.append(Ends(numbered.job6, numbered.gateway6))
        try:
            namespace: Namespace = await asyncio.to_thread(jobnet.attach, record.link, families, self._mtu)
        except (OSError, RuntimeError) as error:  # no descriptors left, or threads
            raise VmnodeError(f"the link {record.link} cannot be made: {error}") from None
        try:
            namespace.run(lambda: resolver.lead(self._name_servers, numbered.gateway4, numbered.job4))
            self._books.attached(record)
            connection.send("network", namespace.descriptor)
            self._wake()
            with contextlib.suppress(DeadlineExceeded):  # it may still do so, or be dead; without, it leaves a note
                await connection.receive(ENTER_S)
        finally:
            namespace.close()

    async def _admit_command(self, connection: Connection, process: Process, owner: str) -> None:
        """A command of the administrator's, which waits for its account."""
        record: Optional[Record] = None
        try:
            record = self._books.open(process, COMMAND)
            self._books.write(replace(record, owner=owner))
            await self._give_network(connection, record)
        except VmnodeError as error:
            if record is not None:
                await self._books.drop(self._books.latest(record), Outcome.UNACCOUNTED, error.what)
            connection.send(f"no {error.what}")
            return
        while (word := await connection.receive(None)) != "ended":
            if not word:  # it died
                return
        give_up = time.monotonic() + END_S
        while record.id in self._books.running and time.monotonic() < give_up:
            self._wake()
            await asyncio.sleep(0.05)
        connection.send(f"record {record.id}")

    async def unaccounted(self, note: Note) -> None:
        """A starter went without a network: the ledger has to say so."""
        record = self._books.of_starter(note.starter) or self._books.note(note.starter, note.slot, note.at)
        if not record.job:
            try:
                if processes.started(note.starter.pid) == note.starter.started:  # so its slot still works for this job
                    record = told(record, await self._claim(note.slot))
            except (VmnodeError, ProcessLookupError):
                pass
        await self._books.drop(record, Outcome.UNACCOUNTED, note.why)
        note.path.unlink(missing_ok=True)


def told(record: Record, claim: condor.Claim) -> Record:
    return replace(record, job=claim.job, owner=claim.owner, universe=claim.universe)
