"""Looks for leftovers every period, and ends them where that is configured: leftovers.py decides, this one acts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vmnode.accounting import leftovers
from vmnode.accounting.leftovers import Event, Finding, Leftover, Policy, Resident, Starter, Watched
from vmnode.accounting.record import Process, Record
from vmnode.host import processes
from vmnode.host.processes import Details, Whereabouts

_STARTER = "condor_starter"
_SIGNALS = {Event.TERMINATED: 15, Event.KILLED: 9}


class Sweep:
    """To be asked every period, by one who logs what it says.

    `links` is how the names of the jobs' links begin, "" without accounting; `base` is HTCondor's BASE_CGROUP.
    """

    def __init__(self, policy: Policy, links: str, base: str = "htcondor") -> None:
        self._policy = policy
        self._links = links
        self._base = base or "htcondor"
        self._watched: Mapping[str, Watched] = {}
        self._seen: Mapping[int, Whereabouts] = {}
        self._commands: dict[Process, str] = {}  # of what was told of, for later

    async def look(self, now: float, records: Sequence[Record]) -> list[Finding]:
        """Look once, act, and return what is to be logged: each process once for each thing that happened to it.

        `now` is in seconds of a clock that never jumps; `records` are those of this boot that can have left something:
        the running ones, and those that ended, until their link is gone. Raises OSError if the kernel does not tell.
        """
        seen = self._find(records)
        still = {leftover.resident.process for leftover in seen}
        self._commands = {process: command for process, command in self._commands.items() if process in still}
        plan = leftovers.plan(self._watched, seen, now, self._policy)
        self._watched = plan.watched
        findings = [await self._finding(Event.FOUND, leftover, now) for leftover in plan.found]
        for event, chosen in ((Event.TERMINATED, plan.terminate), (Event.KILLED, plan.kill)):
            for leftover in chosen:
                if self._send(_SIGNALS[event], leftover):
                    findings.append(await self._finding(event, leftover, now))
        return findings

    def _find(self, records: Sequence[Record]) -> list[Leftover]:
        everybody = processes.everywhere()
        links = processes.behind_links(self._links, everybody) if self._links else {}
        seen: dict[int, Whereabouts] = {}
        residents = []
        for there in everybody:
            link = links.get(there.namespace, "")
            group = leftovers.job_group(there.cgroups, self._base)
            if not link and not group:
                continue
            details = processes.details(there.pid)
            if details is not None and there.pid != os.getpid():
                residents.append(_resident(details, there, link, group))
                seen[there.pid] = there
        self._seen = seen
        if not residents:
            return []
        # After the residents: who started a job meanwhile is there to be seen.
        living = [record.starter for record in records if _lives(record.starter)]
        return leftovers.find(residents, self._starters(), living, records)

    def _starters(self) -> list[Starter]:
        """All starters that live; one in a job's control group is a job's own."""
        found = []
        for there in processes.everywhere():
            if leftovers.job_group(there.cgroups, self._base) or not processes.is_called(there.pid, _STARTER):
                continue
            details = processes.details(there.pid)
            if details is None or details.program.rpartition("/")[2].split(" ")[0] != _STARTER:
                continue
            slot = leftovers.slot_of(processes.arguments(there.pid)) if details.uid == 0 else ""
            found.append(Starter(slot, details.uid, there.namespace))
        return found

    def _send(self, number: int, leftover: Leftover) -> bool:
        resident = leftover.resident
        there = self._seen[resident.process.pid]
        return processes.send(number, there, resident.process.started)

    async def _finding(self, event: Event, leftover: Leftover, now: float) -> Finding:
        resident = leftover.resident
        if resident.process not in self._commands:
            command = await processes.command_line(resident.process.pid)
            self._commands[resident.process] = leftovers.readable(command or f"[{resident.name}]")
        return Finding(
            event,
            leftover,
            self._commands[resident.process],
            await processes.user_name(resident.uid),
            now - self._watched[leftover.place].since,
        )


def _lives(starter: Process) -> bool:
    details = processes.details(starter.pid)
    return details is not None and details.started == starter.started


def _resident(details: Details, there: Whereabouts, link: str, group: str) -> Resident:
    process = Process(details.pid, details.started)
    return Resident(process, details.name, details.uid, there.namespace, link, group)
