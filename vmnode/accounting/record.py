"""One record of the ledger: a job's stay on this node, and what it used. Pure."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Optional

from vmnode.usage import NONE, Usage, plus, shrank, since

VM = 13  # the VM universe's number (condor_universe.h)


class Outcome(str, Enum):
    """How much a record is worth."""

    RUNNING = "running"
    COMPLETE = "complete"  # vmnoded was there when it ended
    RECOVERED = "recovered"  # it ended while vmnoded was not there: counted to the end, unless the node was booted anew
    UNACCOUNTED = "unaccounted"  # it ran on the host's network, since accounting failed
    EXEMPT = "exempt"  # it ran on the host's network, as the configuration says
    OUTSIDE = "outside"  # others started it, and gave it a network: Docker's containers


NEVER_COUNTED = (Outcome.UNACCOUNTED, Outcome.EXEMPT, Outcome.OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process for as long as the node runs: its id alone would come back."""

    pid: int
    started: int  # clock ticks after the boot (proc_pid_stat(5), starttime)


@dataclasses.dataclass(frozen=True)
class Record:
    """What the ledger knows. Times are Unix time, in seconds.

    `usage` is what was counted in the starter's namespace: the job, and the transfer of its sandbox; of a job that was
    never counted it is None, not zero. `guest` is what was counted on the tap of a VM job's guest, None without one.
    `read` and `guest_read` are the kernel's counts at the last look, which was at `seen_at`.
    """

    id: int
    boot_id: str
    link: str  # the host's side of the veth; "" if it has none
    number: int  # of its addresses in the pools
    starter: Process
    slot: str  # "slot1_1"
    started_at: float
    seen_at: float
    job: str = ""  # GlobalJobId; "" as long as it is not known
    owner: str = ""
    universe: Optional[int] = None
    ended_at: Optional[float] = None
    outcome: Outcome = Outcome.RUNNING
    partial_since: Optional[float] = None  # packets after this moment may be missing: the rules were gone for a while
    why: str = ""  # it is not complete: a sentence for a person
    usage: Optional[Usage] = NONE
    read: Usage = NONE
    guest: Optional[Usage] = None
    guest_read: Usage = NONE

    @property
    def total(self) -> Optional[Usage]:
        """All that the job used, guest and sandbox."""
        if self.usage is None or self.guest is None:
            return self.usage if self.guest is None else self.guest
        return plus(self.usage, self.guest)


def counted(record: Record, reading: Usage, now: float) -> Record:
    """The record after a look at the kernel's counts.

    Counts that became less were started anew: what passed between the last look and that is lost. Each direction is
    judged by itself, since each has a set of its own, which others can flush alone: in doubt too little is counted,
    and called partial, and nothing twice.
    """
    assert record.usage is not None
    usage = plus(record.usage, since(record.read, reading))
    if shrank(reading, record.read):
        record = restarted(record)
    return dataclasses.replace(record, usage=usage, read=reading, seen_at=now)


def restarted(record: Record) -> Record:
    """The kernel's counts begin at zero again: packets since the last look may be missing."""
    return dataclasses.replace(record, read=NONE, partial_since=record.partial_since or record.seen_at)


def ended(record: Record, outcome: Outcome, now: float, why: str = "") -> Record:
    usage = None if outcome in NEVER_COUNTED else record.usage
    return dataclasses.replace(record, outcome=outcome, ended_at=now, usage=usage, why=why)
