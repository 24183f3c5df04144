"""Values that many tests start from."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface

from vmnode.conditions import KINDS, Condition, Now, Observation, Status
from vmnode.host.libvirt import Lease, VirtualNetwork
from vmnode.report.state import Snapshot

BOOT_ID = "8a1b9c3e-0f6d-4a55-9f2b-1c2d3e4f5a6b"


def network(
    *,
    forward_mode: str = "nat",
    gateway: str = "192.168.122.1/24",
    ranges: Iterable[tuple[str, str]] = (("192.168.122.2", "192.168.122.254"),),
    reserved: Iterable[str] = (),
    dns: bool = True,
    leases: Iterable[Lease] = (),
    active: bool = True,
    autostart: bool = True,
) -> VirtualNetwork:
    """libvirt's default network, as it ships."""
    return VirtualNetwork(
        name="default",
        active=active,
        autostart=autostart,
        forward_mode=forward_mode,
        bridge="virbr0",
        gateway=IPv4Interface(gateway) if gateway else None,
        ranges=tuple((IPv4Address(first), IPv4Address(last)) for first, last in ranges),
        reserved=tuple(IPv4Address(address) for address in reserved),
        dns=dns,
        leases=tuple(leases),
    )


def observation(name: str, status: Status = Status.OK, reason: str = "Seen", message: str = "") -> Observation:
    return Observation(name, status, reason, message or f"{name} is {status.value}", "do something")


def condition(name: str, status: Status = Status.OK, *, since: float = 50.0, contrary: int = 0) -> Condition:
    return Condition(name, status, "Seen", f"{name} is {status.value}", "do something", since, contrary)


def conditions(**statuses: Status) -> tuple[Condition, ...]:
    """All conditions, ok but for those named (dots and dashes written as _)."""
    chosen = [statuses.pop(kind.name.replace(".", "_").replace("-", "_"), Status.OK) for kind in KINDS]
    assert not statuses, f"no such conditions: {statuses}"
    return tuple(condition(kind.name, status) for kind, status in zip(KINDS, chosen))


def snapshot(wall: float = 1_790_000_000.0, boot: float = 1000.0, **statuses: Status) -> Snapshot:
    return Snapshot(conditions(**statuses), (), Now(wall, boot, BOOT_ID))
