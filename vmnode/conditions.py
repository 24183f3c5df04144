"""The shared vocabulary: what can be true of a node, and how we say it.

An `Observation` is what one probe saw once. A `Condition` is what vmnode stands for after the thresholds:
it carries the time since which it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Status(str, Enum):
    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"  # could not be found out: never shown as healthy, never a reason to repair anything
    DISABLED = "disabled"  # does not apply to this node: neutral everywhere


class Now(NamedTuple):
    """One moment. `boot` counts through suspend and is never stepped (CLOCK_BOOTTIME, clock_gettime(2))."""

    wall: float  # Unix time, s
    boot: float  # s
    boot_id: str  # which boot `boot` belongs to


@dataclass(frozen=True)
class Observation:
    """What one probe saw. `reason` is CamelCase and stable; `message` and `hint` are for a person."""

    name: str
    status: Status
    reason: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Condition:
    """A verdict about one aspect of the node.

    `since` is the CLOCK_BOOTTIME, in seconds, at which `status` was reached; the wall clock may be stepped.
    `contrary` counts the latest observations in a row that contradict `status`.
    """

    name: str
    status: Status
    reason: str
    message: str
    hint: str
    since: float
    contrary: int = 0


@dataclass(frozen=True)
class Kind:
    """One row of the table of conditions.

    `requires` are the conditions without which this one cannot be judged. `guest` tells whether a guest's
    start depends on it, so that it counts for `HasVirshDefaultNetwork`.
    """

    name: str
    requires: tuple[str, ...]
    guest: bool
    what: str


# In the order in which a node is built up: the first broken link stands first.
KINDS: tuple[Kind, ...] = (
    Kind("kvm", (), True, "the KVM device works, and QEMU's user may use it"),
    Kind("libvirt", (), True, "libvirt answers"),
    Kind("network.active", ("libvirt",), True, "the virtual network is defined and active"),
    Kind("network.bridge", ("network.active",), True, "its bridge is up and has its address"),
    Kind("network.dnsmasq", ("network.bridge",), True, "its dnsmasq runs"),
    Kind("network.dhcp", ("network.dnsmasq",), True, "a guest gets an address by DHCP"),
    Kind("network.dns", ("network.dhcp",), True, "a guest gets an answer from the network's name server"),
    Kind("network.forwarding", ("network.bridge",), True, "the host forwards a guest's packets"),
    Kind("network.outbound", ("network.dhcp", "network.forwarding"), True, "a guest reaches a target by TCP"),
    Kind("execute-dir", (), True, "the execute directory has room and QEMU's user can enter it"),
    Kind("canary", ("kvm", "network.outbound"), True, "a guest was really started and got an address"),
    Kind("qemu-img", (), False, "qemu-img runs"),
    Kind("images", (), False, "every image root answers"),
    Kind("conntrack", (), False, "the kernel's table of connections has room"),
    Kind("accounting", (), False, "jobs get a network that is counted"),
)
NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}


def ok(name: str, message: str) -> Observation:
    return Observation(name, Status.OK, "Ok", message)


def failed(name: str, reason: str, message: str, hint: str = "") -> Observation:
    return Observation(name, Status.FAILED, reason, message, hint)


def unknown(name: str, reason: str, message: str, hint: str = "") -> Observation:
    return Observation(name, Status.UNKNOWN, reason, message, hint)


def disabled(name: str, message: str) -> Observation:
    return Observation(name, Status.DISABLED, "NotApplicable", message)
