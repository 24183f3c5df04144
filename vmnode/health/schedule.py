"""When the next check runs, and how much it does. Pure: events and times in, decisions out.

Events come first, the period second. What disturbs others is rationed: a fresh MAC address makes dnsmasq deaf for three
seconds, and a connection to the collector is multiplied by the size of the pool.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Optional

from vmnode.conditions import Condition, Status
from vmnode.config import Health
from vmnode.health.check import Plan
from vmnode.health.decide import Thresholds, unsettled

# Events, by their source:
START = "start"  # the daemon started or read its configuration again
NETWORK = "network"  # libvirt: a network was started, stopped, defined, undefined
CONNECTION = "connection"  # libvirt: the connection was lost
DOMAIN = "domain"  # libvirt: a guest was started or stopped
PROCESS = "process"  # dnsmasq died
LINK = "link"  # the kernel: bridge, uplink, default route, forwarding
FIREWALL = "firewall"  # the kernel: a change of nftables' rules, by whomever

NEEDS_FRESH_DHCP = (START, NETWORK, PROCESS)

COALESCE_S = 0.1  # events come in swarms
OWN_GAP_S = 1.0  # between checks, when the events are about our network
FOREIGN_GAP_S = 10.0  # between checks that are made only because somebody changed firewall rules
CONFIRM_S = 1.0  # a verdict that waits for confirmation is checked again after this
BROKEN_INTERVAL_S = 10.0  # what is broken is looked at more often, so that a repair is seen soon


@dataclass(frozen=True)
class History:
    """When things last happened; CLOCK_BOOTTIME in seconds. `jitter` between 0.9 and 1.1 spreads a pool's nodes."""

    changed: float = float("-inf")  # one of NEEDS_FRESH_DHCP
    fresh_dhcp: float = float("-inf")  # a new guest's question was sent, whatever came of it
    checked: float = float("-inf")
    outbound: float = float("-inf")
    foreign: float = float("-inf")  # a check only because somebody changed firewall rules
    jitter: float = 1.0

    def heard(self, event: str, now: float) -> History:
        return replace(self, changed=now) if event in NEEDS_FRESH_DHCP else self

    def after(self, events: Collection[str], plan: Plan, asked_afresh: Optional[float], now: float) -> History:
        """After a check upon `events`; `asked_afresh` is when it sent a new guest's question, if it came to that."""
        return replace(
            self,
            checked=now,
            fresh_dhcp=self.fresh_dhcp if asked_afresh is None else asked_afresh,
            outbound=now if plan.outbound else self.outbound,
            foreign=now if _foreign(events) else self.foreign,
        )


def due(events: Collection[str], conditions: Collection[Condition], history: History, health: Health) -> float:
    """The CLOCK_BOOTTIME at which the next check has to start; in the past if it is overdue."""
    broken = any(condition.status in (Status.FAILED, Status.UNKNOWN) for condition in conditions)
    interval = min(health.interval_s, BROKEN_INTERVAL_S) if broken else health.interval_s
    candidates = [history.checked + (CONFIRM_S if unsettled(conditions) else interval)]
    if _foreign(events):  # the first change is looked at as soon as any event; those that keep coming are rationed
        candidates.append(max(history.checked + OWN_GAP_S, history.foreign + FOREIGN_GAP_S))
    elif events:
        candidates.append(history.checked + OWN_GAP_S)
    return min(candidates)


def _foreign(events: Collection[str]) -> bool:
    return set(events) == {FIREWALL}


def plan(
    events: Collection[str], conditions: Mapping[str, Condition], history: History, health: Health, now: float
) -> Plan:
    """What the check that starts now has to do."""
    way_out = any(
        name not in conditions or conditions[name].status is Status.UNKNOWN or _doubtful(name, conditions)
        for name in ("network.forwarding", "network.outbound")
    )
    return Plan(
        fresh_dhcp=history.changed >= history.fresh_dhcp
        or _doubtful("network.dhcp", conditions)
        or now - history.fresh_dhcp >= health.fresh_dhcp_interval_s,
        outbound=bool({START, NETWORK, PROCESS, LINK, FIREWALL} & set(events))
        or way_out
        or now - history.outbound >= health.outbound_interval_s * history.jitter,
    )


def _doubtful(name: str, conditions: Mapping[str, Condition]) -> bool:
    """Whether a verdict was reached by traffic that has to be repeated before it may change."""
    return name in conditions and (conditions[name].status is Status.FAILED or conditions[name].contrary > 0)


def thresholds(name: str, health: Health) -> Thresholds:
    fail_after = health.outbound_fail_after if name == "network.outbound" else health.fail_after
    return Thresholds(fail_after, health.recover_after)
