"""Is the virtual network there, and does it let packets through? Judgements only: facts in, observations out."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from vmnode.conditions import Observation, disabled, failed, ok, unknown
from vmnode.host import reach
from vmnode.host.dnsmasq import Dnsmasq
from vmnode.host.libvirt import Lease, VirtualNetwork
from vmnode.host.links import Bridge
from vmnode.host.reach import Reached
from vmnode.values import Target


def judge_active(name: str, network: Optional[VirtualNetwork]) -> Observation:
    if network is None:
        return failed(
            "network.active",
            "Undefined",
            f"libvirt has no network {name!r}",
            f"define it: virsh net-define /usr/share/libvirt/networks/{name}.xml",
        )
    if not network.active:
        forgotten = "" if network.autostart else f", and not marked to start at boot: virsh net-autostart {name}"
        return failed(
            "network.active", "Inactive", f"network {name!r} is not active", f"virsh net-start {name}{forgotten}"
        )
    return ok("network.active", f"network {name!r} is active")


def judge_bridge(network: VirtualNetwork, bridge: Optional[Bridge]) -> Observation:
    restart = f"virsh net-destroy {network.name} && virsh net-start {network.name}"
    if bridge is None:
        return failed("network.bridge", "Missing", f"there is no link {network.bridge}", restart)
    if not bridge.up:
        return failed("network.bridge", "Down", f"{network.bridge} is down", f"ip link set {network.bridge} up")
    if network.gateway is not None and network.gateway not in bridge.addresses:
        return failed(
            "network.bridge",
            "AddressMissing",
            f"{network.bridge} lacks its address {network.gateway}",
            f"ip address add {network.gateway} dev {network.bridge}",
        )
    return ok("network.bridge", f"{network.bridge} is up")


def judge_dnsmasq(network: VirtualNetwork, dnsmasq: Optional[Dnsmasq]) -> Observation:
    restart = f"virsh net-destroy {network.name} && virsh net-start {network.name}"
    if dnsmasq is None:
        return failed(
            "network.dnsmasq",
            "NotRunning",
            f"no dnsmasq runs for network {network.name!r}",
            f"libvirt does not start it again by itself: {restart}",
        )
    if dnsmasq.stopped:
        return failed(
            "network.dnsmasq",
            "Stopped",
            f"dnsmasq (process {dnsmasq.pid}) is stopped",
            f"kill -CONT {dnsmasq.pid}",
        )
    return ok("network.dnsmasq", f"dnsmasq runs (process {dnsmasq.pid})")


def free_addresses(network: VirtualNetwork, now: float) -> int:
    """How many addresses of the DHCP ranges could still be leased. `now` is Unix time."""
    taken = {ipaddress.IPv4Address(lease.address) for lease in network.leases if _holds(lease, now)}
    taken.update(network.reserved)
    if network.gateway is not None:
        taken.add(network.gateway.ip)
    size = sum(int(last) - int(first) + 1 for first, last in network.ranges)
    return size - sum(any(first <= address <= last for first, last in network.ranges) for address in taken)


def _holds(lease: Lease, now: float) -> bool:
    return ":" not in lease.address and (lease.expires == 0 or lease.expires > now)


@dataclass(frozen=True)
class Attempt:
    """A connection that was tried. `remote` tells that the host has to forward packets for it."""

    target: Target
    remote: bool
    result: Reached


@dataclass(frozen=True)
class Path:
    """What is known about the way out of the network.

    `forwards` is the kernel's switch for the bridge; `translates` tells whether libvirt's NAT rule is there (None:
    unknown, or not needed). `guest` are the attempts from the probe and `host` those from the host itself, () when none
    was made. `culprit` is where the probe's packets were dropped.
    """

    bridge: str
    forwards: bool
    translates: Optional[bool]
    guest: Sequence[Attempt] = ()
    host: Sequence[Attempt] = ()
    culprit: Optional[str] = None
    unread: bool = False  # the NAT rule is needed, and cannot be looked at


def suspicion(path: Path) -> Optional[Observation]:
    """What speaks against forwarding before any packet was sent."""
    if not path.forwards:
        return failed(
            "network.forwarding",
            "IpForwardOff",
            f"the kernel does not forward IPv4 packets from {path.bridge}",
            "sysctl -w net.ipv4.ip_forward=1",
        )
    if path.translates is False:
        return failed(
            "network.forwarding",
            "NatRuleMissing",
            "libvirt's NAT rule for the network is gone",
            "something flushed the firewall: systemctl restart libvirtd (or virtnetworkd) puts the rules back",
        )
    return None


def lost_on_the_way(path: Path) -> Optional[Target]:
    """A remote target that the host reaches and the probe does not: then forwarding is the fault."""
    lost = {attempt.target for attempt in path.guest if attempt.remote and attempt.result.reason}
    return next((attempt.target for attempt in path.host if attempt.target in lost and not attempt.result.reason), None)


def judge_path(path: Path) -> tuple[Observation, Optional[Observation]]:
    """The verdicts on `network.forwarding` and `network.outbound`; None for the latter when nothing was tried.

    Real packets outrank what the rules look like: as long as a remote target answers, no rule is called missing.
    """
    suspected = suspicion(path)
    forwarding = suspected or ok("network.forwarding", f"nothing stands against packets from {path.bridge}")
    reached = [attempt for attempt in path.guest if not attempt.result.reason]
    if path.guest and all(attempt.result.reason == reach.NO_IPV4 for attempt in path.guest):
        outbound = disabled("network.outbound", "no target has an IPv4 address, and the network gives guests no other")
        return forwarding, outbound
    if not path.guest:
        return _unproven() if path.unread and suspected is None else forwarding, None
    if reached:
        outbound = ok("network.outbound", f"{reached[0].target} answers")
        if any(attempt.remote for attempt in reached):
            return ok("network.forwarding", f"packets from {path.bridge} are forwarded"), outbound
        return forwarding, outbound
    outbound = judge_unreached(path)
    if suspected is None and lost_on_the_way(path) is not None:
        return judge_dropped(path), outbound
    return forwarding, outbound


def _unproven() -> Observation:
    return unknown(
        "network.forwarding",
        "NatRuleUnknown",
        "libvirt's NAT rule cannot be looked at, and no packet was sent",
        "install nft (nftables) and iptables",
    )


def judge_dropped(path: Path) -> Observation:
    message = f"packets from {path.bridge} are dropped"
    if path.culprit is None:
        return failed(
            "network.forwarding",
            "Dropped",
            f"{message}, although the host itself reaches the target",
            "look for a rule that drops forwarded packets: nft list ruleset; iptables -S FORWARD",
        )
    reason = "ForwardPolicyDrop" if path.culprit.endswith("its policy") else "ForeignDrop"
    return failed(
        "network.forwarding",
        reason,
        f"{message} by {path.culprit}",
        f"accept packets from and to {path.bridge} there",
    )


def judge_unreached(path: Path) -> Observation:
    """No target answers. What the host itself saw is nearer to the cause than what the probe saw."""
    attempts = path.host or path.guest
    reasons = {attempt.result.reason for attempt in attempts if attempt.result.reason}
    reason = reasons.pop() if len(reasons) == 1 else "NoTarget"
    detail = "; ".join(f"{attempt.target}: {attempt.result.detail}" for attempt in path.guest)
    return failed(
        "network.outbound",
        reason or "NoTarget",
        f"a guest reaches no target: {detail}",
        "check the host's default route and the targets ([network] targets)",
    )
