"""What vmnode stands for, given what it saw. Pure: no clock, no files, no machine.

    probe -> Observation -> decide(previous, observations, now) -> Condition

A condition fails after `fail_after` bad observations in a row and comes back after `recover_after` good ones. What
could not be found out is `unknown` at once: not knowing is never shown as healthy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Optional

from vmnode.conditions import BY_NAME, KINDS, Condition, Observation, Status, unknown


@dataclass(frozen=True)
class Thresholds:
    fail_after: int
    recover_after: int


def decide(previous: Optional[Condition], observation: Observation, now: float, thresholds: Thresholds) -> Condition:
    """The new verdict about one condition. `now` is CLOCK_BOOTTIME in seconds."""
    seen = Condition(
        observation.name, observation.status, observation.reason, observation.message, observation.hint, now
    )
    if previous is None:
        return seen
    if observation.status is previous.status:
        return replace(seen, since=previous.since)
    needed = {
        (Status.OK, Status.FAILED): thresholds.fail_after,
        (Status.UNKNOWN, Status.FAILED): thresholds.fail_after,
        (Status.FAILED, Status.OK): thresholds.recover_after,
    }.get((previous.status, observation.status), 1)
    if previous.contrary + 1 >= needed:
        return seen
    return replace(previous, contrary=previous.contrary + 1)


def decide_all(
    previous: Mapping[str, Condition],
    observations: Iterable[Observation],
    now: float,
    thresholds: Mapping[str, Thresholds],
) -> tuple[Condition, ...]:
    """The new verdicts, in the order of the table of conditions. What was not looked at stays as it was."""
    seen = {observation.name: observation for observation in observations}
    verdicts = {
        **previous,
        **{name: decide(previous.get(name), seen[name], now, thresholds[name]) for name in seen},
    }
    return tuple(verdicts[kind.name] for kind in KINDS if kind.name in verdicts)


def blocked_by(name: str, seen: Mapping[str, Observation]) -> Optional[str]:
    """The first broken link in the chain below `name`, or None if it can be judged.

    A prerequisite that does not apply blocks nothing by itself; its own prerequisites still count.
    """
    for required in BY_NAME[name].requires:
        deeper = blocked_by(required, seen)
        if deeper is not None:
            return deeper
        if required in seen and seen[required].status in (Status.FAILED, Status.UNKNOWN):
            return required
    return None


def blocked(name: str, by: Observation) -> Observation:
    return unknown(name, "Blocked", f"not checked: {by.name} is {by.status.value} ({by.reason})")


def unsettled(conditions: Iterable[Condition]) -> bool:
    """Whether a verdict waits for confirmation, so that the next check should come soon."""
    return any(condition.contrary for condition in conditions)


def state_of(conditions: Iterable[Condition]) -> str:
    """The node as a whole: "healthy", "failed" or "unknown"."""
    statuses = {condition.status for condition in conditions}
    if Status.FAILED in statuses:
        return "failed"
    return "unknown" if Status.UNKNOWN in statuses or not statuses else "healthy"


def has_default_network(conditions: Iterable[Condition]) -> Optional[bool]:
    """`HasVirshDefaultNetwork`: all conditions that a guest depends on, leaving out those that do not apply.

    None (undefined) when unknown, and where no virtual network was looked at.
    """
    guest = [condition for condition in conditions if BY_NAME[condition.name].guest]
    statuses = {condition.status for condition in guest}
    if Status.FAILED in statuses:
        return False
    network = [condition for condition in guest if condition.name == "network.active"]
    if Status.UNKNOWN in statuses or not any(condition.status is Status.OK for condition in network):
        return None
    return True


def first_broken(conditions: Iterable[Condition]) -> Optional[Condition]:
    """The failed condition that stands first in the table, else the first unknown one."""
    ordered = list(conditions)
    for status in (Status.FAILED, Status.UNKNOWN):
        for condition in ordered:
            if condition.status is status:
                return condition
    return None
