"""Which processes outlived the starter of their job, and which of them are to be ended. Pure.

A process belongs to a job by the network namespace that it is in, the far end of the job's link; or by the control
group that HTCondor made for the job: an ordinary user can leave the namespace (unshare -Un), but never the group, and
groups are there without accounting, too. A job is over when no starter of it lives. In doubt one does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Optional

from vmnode.accounting.record import Process, Record

SETTLE_S = 10.0  # HTCondor ends a job's processes after its starter too; what is gone by then is no leftover
KILL_AFTER_S = 10.0  # from SIGTERM to SIGKILL
MOST_FOUND = 32  # are told of in one look; the others in the next ones
_LONGEST = 256  # characters of a command line


class Policy(NamedTuple):
    """What is done about leftovers: `end` them, once a job has had some for `grace_s` seconds?

    Never those of the users `spared`: root's (somebody may look into a job's namespace) and HTCondor's daemons.
    """

    end: bool
    grace_s: float
    spared: frozenset[int] = frozenset({0})


class Starter(NamedTuple):
    """A starter that lives. `slot` is "slot1_1"; "" if it does not say it."""

    slot: str
    uid: int  # root's, unless HTCondor does not run as root
    namespace: int


class Resident(NamedTuple):
    """A process in a job's namespace or control group; `link` is that of its namespace, `group` is the job's, or ""."""

    process: Process
    name: str
    uid: int
    namespace: int
    link: str
    group: str


class Leftover(NamedTuple):
    """`place` is the job's: its link, or its control group."""

    resident: Resident
    place: str
    record: Optional[Record]  # None: the ledger does not know the job


# --- which are ----------------------------------------------------------------------------------------------------


def job_group(cgroups: str, base: str = "htcondor") -> str:
    """HTCondor's control group for the job in which a process with this /proc/PID/cgroup is; "" if it is in none.

    `base` is HTCondor's BASE_CGROUP. Below it there is one group for a slot: condor_var_lib_condor_execute_slot1_1@host
    (23) or _var_lib_condor_execute_slot1_1@host.slice (24.12), with groups below it. A job may be an HTCondor of its
    own: the outermost group counts.
    """
    if f"/{base}/" not in cgroups:
        return ""
    for line in cgroups.splitlines():
        before, found, below = line.split(":", 2)[-1].partition(f"/{base}/")
        if found and below:
            return f"{before}{found}{below.partition('/')[0]}"
    return ""


_SLOT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def slot_of(arguments: Sequence[str]) -> str:
    """The slot of a starter, by its arguments; "" if these do not say it.

    "-slot-name" says it always, "-a" unless STARTER_LOG_NAME_APPEND makes that the job's number (Starter.cpp).
    """
    for option in ("-slot-name", "-a"):
        for word, value in zip(arguments, arguments[1:]):
            if word == option:
                return value if _SLOT.fullmatch(value) else ""
    return ""


def find(
    residents: Iterable[Resident], starters: Sequence[Starter], living: Iterable[Process], records: Iterable[Record]
) -> list[Leftover]:
    """Those of the residents who have no starter any more.

    `starters` are all that live, outside of the jobs' control groups; `living` are those of the records' starters that
    do. Records are in the order in which they began.
    """
    alive = set(living)
    by_link: dict[str, Record] = {}
    by_slot: dict[str, Record] = {}
    for record in records:
        by_link[record.link] = by_slot[record.slot] = record
    inhabited = {starter.namespace for starter in starters}
    found = []
    for resident in residents:
        known: Optional[Record]
        if resident.link:
            over = resident.namespace not in inhabited
            known = by_link.get(resident.link)
        else:
            over = not _has_starter(resident, starters)
            known = next((by_slot[slot] for slot in by_slot if _names(resident.group, slot)), None)
        if over and (known is None or known.starter not in alive):
            found.append(Leftover(resident, resident.link or resident.group, known))
    return found


def _has_starter(resident: Resident, starters: Iterable[Starter]) -> bool:
    """Whether one of them may be that of the resident's control group.

    Of a starter that does not tell its slot everything is believed, if it is root's; if it is a user's, only what
    concerns that user: anybody can call a program of his own condor_starter.
    """
    return any(
        _names(resident.group, starter.slot) if starter.slot and starter.uid == 0 else starter.uid in (0, resident.uid)
        for starter in starters
    )


def _names(group: str, slot: str) -> bool:
    return bool(slot) and f"_{slot}@" in group


# --- what to do about them ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Watched:
    """A job's place that has leftovers, from one look to the next.

    What counts is how long the place has had some, not how old each is: else who forks in time would stay for ever.
    """

    since: float
    told: frozenset[Process] = frozenset()
    terminated_at: Optional[float] = None
    killed: frozenset[Process] = frozenset()


class Plan(NamedTuple):
    """What a look leads to; `watched` is to be handed to the next one."""

    watched: Mapping[str, Watched]
    found: Sequence[Leftover]
    terminate: Sequence[Leftover]
    kill: Sequence[Leftover]


def plan(before: Mapping[str, Watched], leftovers: Iterable[Leftover], now: float, policy: Policy) -> Plan:
    """`now` is in seconds of a clock that never jumps."""
    places: dict[str, list[Leftover]] = {}
    for leftover in leftovers:
        places.setdefault(leftover.place, []).append(leftover)
    watched: dict[str, Watched] = {}
    found: list[Leftover] = []
    terminate: list[Leftover] = []
    kill: list[Leftover] = []
    for place, there in places.items():
        state = before.get(place, Watched(now))
        processes = frozenset(leftover.resident.process for leftover in there)
        age = now - state.since
        told = state.told & processes
        if age >= SETTLE_S:
            news = [leftover for leftover in there if leftover.resident.process not in told]
            news = news[: MOST_FOUND - len(found)]
            found += news
            told |= {leftover.resident.process for leftover in news}
        state = dataclasses.replace(state, told=told, killed=state.killed & processes)
        if policy.end and age >= max(policy.grace_s, SETTLE_S):
            mortal = [leftover for leftover in there if leftover.resident.uid not in policy.spared]
            if state.terminated_at is None and mortal:
                terminate += mortal
                state = dataclasses.replace(state, terminated_at=now)
            elif state.terminated_at is not None and now - state.terminated_at >= KILL_AFTER_S:
                news = [leftover for leftover in mortal if leftover.resident.process not in state.killed]
                kill += news
                killed = state.killed | {leftover.resident.process for leftover in news}
                state = dataclasses.replace(state, killed=killed)
        watched[place] = state
    return Plan(watched, found, terminate, kill)


# --- in words -----------------------------------------------------------------------------------------------------


class Event(str, Enum):
    FOUND = "found"
    TERMINATED = "terminated"
    KILLED = "killed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line for the log. `for_s` is for how many seconds the job has had leftovers."""

    event: Event
    leftover: Leftover
    command: str  # as a person can read it
    user: str
    for_s: float

    @property
    def sentence(self) -> str:
        resident, record = self.leftover.resident, self.leftover.record
        job = f"job {record.job} of {record.owner or '?'}" if record and record.job else f"the job of {_where(self)}"
        who = f"process {resident.process.pid} of user {self.user} ({self.command})"
        if self.event is Event.TERMINATED:
            return f"{who}, left over from {job} for {self.for_s:.0f} s, was told to end (SIGTERM)"
        if self.event is Event.KILLED:
            return f"{who}, left over from {job} for {self.for_s:.0f} s, was killed (SIGKILL)"
        return f"{who} has outlived the starter of {job}, for {self.for_s:.0f} s at least"


def _where(finding: Finding) -> str:
    record = finding.leftover.record
    return record.slot if record and record.slot else readable(finding.leftover.place)


def readable(text: str) -> str:
    """Arguments parted by NUL, as one line: whatever would not show, or move the cursor, is a question mark."""
    line = "".join(char if char.isprintable() else "?" for char in text.rstrip("\0").replace("\0", " "))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
