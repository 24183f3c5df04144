"""Do jobs behind a veth have network? A probe is attached as a job is, and connects to a target as a job would.

Before that, a way is made through the firewalls of others that have a place for it (firewalld, iptables' FORWARD); what
drops the probe's packets all the same is named. The probe's packets are not counted: the counters do not know its link.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Optional

from vmnode.conditions import Observation, disabled, failed, ok, unknown
from vmnode.host import firewall, firewalld, forward_chain, jobnet, links, reach, uplink
from vmnode.host.jobnet import Ends
from vmnode.host.netns import Namespace
from vmnode.host.reach import Reached
from vmnode.values import Target

NAME = "accounting"
TCP_DEADLINE_S = 3.0
TRACE_DEADLINE_S = 0.5  # to see where a packet is dropped, one is enough
RESOLVE_DEADLINE_S = 3.0
_SWITCH = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


# --- the way through the firewalls of others ----------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """What had to be done so that others let jobs through. Equal to the one before if nothing has changed."""

    zone: Optional[str]  # firewalld's, None where it does not run
    past_policy: tuple[int, ...]  # the IP versions whose FORWARD chain of iptables drops by policy

    def __str__(self) -> str:
        """For a log, when it has changed."""
        said = [f"firewalld has the jobs' links in its zone {self.zone!r}"] if self.zone else []
        said += [
            f"two rules take jobs past the policy DROP of {forward_chain.TOOLS[version]}' chain FORWARD"
            for version in self.past_policy
        ]
        return "; ".join(said) or "no firewall needs to be told of the jobs' links"


async def admit(own_links: str, versions: Sequence[int]) -> Passage:
    """Have the jobs' links admitted wherever they have to be; changes nothing if they are.

    For the start, for every change of the firewall, and for every ten seconds or so: firewalld forgets what it was told
    at its reload, and whoever flushes a chain tells nobody. Raises CommandFailed or DeadlineExceeded.
    """
    zone = await firewalld.admit(own_links)
    past = [version for version in versions if await forward_chain.admit(own_links, version)]
    return Passage(zone, tuple(past))


async def dismiss(own_links: str) -> None:
    """Take all of it back, when accounting is switched off for good: with it, running jobs may lose their network."""
    await firewalld.dismiss(own_links)
    for version in _SWITCH:
        await forward_chain.dismiss(own_links, version)


# --- the proof ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """A connection that was tried. `remote` tells that the host has to forward packets for it."""

    target: Target
    address: str
    remote: bool
    result: Reached


class Probe:
    """An imaginary job. `families` are its addresses and the gateways, which no job has; `link` is its alone, too."""

    def __init__(self, identity: str, link: str, families: Sequence[Ends], mtu: int) -> None:
        self._identity, self._link, self._families, self._mtu = identity, link, list(families), mtu

    async def check(self, targets: Sequence[Target]) -> Observation:
        """Connect to all targets at once, as a job; where that fails also as the host, and find the rule that drops."""
        if not targets:
            return disabled(NAME, "there is no target to prove the jobs' network by ([network] targets)")
        off = [ends.job.version for ends in self._families if not uplink.forwards(ends.job.version)]
        if off:
            return forwarding_off(off[0])
        async with self._attached() as namespace:
            tried = await self._connect(targets, namespace)
            reached = _best(tried)
            if reached is not None:
                return ok(NAME, f"jobs have network: {reached.target} answers")
            from_host = await self._connect(targets, None)
            lost = _lost(tried, from_host)
            if lost is None:
                return unreached(from_host)
            return dropped(lost, await self._culprit(lost, namespace))

    @contextlib.asynccontextmanager
    async def _attached(self) -> AsyncIterator[Namespace]:
        namespace = await asyncio.to_thread(jobnet.attach, self._link, self._families, self._mtu)
        try:
            yield namespace
        finally:
            namespace.close()
            # The kernel would do it in the background, and the next probe might find the old link and its routes.
            await asyncio.to_thread(jobnet.remove, self._link)

    async def _connect(self, targets: Sequence[Target], inside: Optional[Namespace]) -> list[Attempt]:
        versions = [ends.job.version for ends in self._families]
        ours = await asyncio.to_thread(links.local_addresses)

        async def attempt(target: Target) -> Attempt:
            addresses, complaint = await reach.resolve(target.host, RESOLVE_DEADLINE_S)
            usable = [address for address in addresses if ipaddress.ip_address(address).version in versions]
            if not usable:
                detail = complaint or "it has no address of the jobs' families"
                return Attempt(target, "", False, Reached("Unresolved", detail))
            result = await self._try(usable[0], target.port, inside, TCP_DEADLINE_S)
            return Attempt(target, usable[0], usable[0] not in ours, result)

        return list(await asyncio.gather(*(attempt(target) for target in targets)))

    async def _try(self, address: str, port: int, inside: Optional[Namespace], deadline_s: float) -> Reached:
        version = ipaddress.ip_address(address).version
        opened = inside.run(lambda: reach.tcp_socket(version)) if inside else reach.tcp_socket(version)
        return await reach.tcp(opened, address, port, deadline_s)

    async def _culprit(self, lost: Attempt, namespace: Namespace) -> Optional[str]:
        version = ipaddress.ip_address(lost.address).version
        source = next(str(ends.job) for ends in self._families if ends.job.version == version)
        async with firewall.DropTrace(self._identity, self._link, source, lost.target.port) as trace:
            await self._try(lost.address, lost.target.port, namespace, TRACE_DEADLINE_S)
        return trace.culprit


def _best(tried: Sequence[Attempt]) -> Optional[Attempt]:
    """The connection that proves most: one to a target that is not this host."""
    reached = [attempt for attempt in tried if not attempt.result.reason]
    return next((attempt for attempt in reached if attempt.remote), reached[0] if reached else None)


def _lost(tried: Sequence[Attempt], from_host: Sequence[Attempt]) -> Optional[Attempt]:
    """One that the host reaches and a job does not: then a way through the host is the fault."""
    reached = {attempt.target for attempt in from_host if not attempt.result.reason}
    return next((attempt for attempt in tried if attempt.target in reached and attempt.address), None)


# --- the words ----------------------------------------------------------------------------------------------------


def forwarding_off(version: int) -> Observation:
    return failed(
        NAME,
        "IpForwardOff",
        f"jobs have no network: somebody has switched {_SWITCH[version]} off",
        f"sysctl -w {_SWITCH[version]}=1, and look into /etc/sysctl.d for who sets it to 0",
    )


def unreached(from_host: Sequence[Attempt]) -> Observation:
    detail = "; ".join(f"{attempt.target}: {attempt.result.detail}" for attempt in from_host)
    return unknown(
        NAME,
        "NoTarget",
        f"whether jobs have network cannot be told, as this host itself reaches no target: {detail}",
        "check the host's default route and the targets ([network] targets)",
    )


def dropped(lost: Attempt, culprit: Optional[str]) -> Observation:
    message = f"jobs do not reach {lost.target} ({lost.result.detail}), though this host does"
    if culprit is None:
        return failed(
            NAME,
            "Dropped",
            message,
            "look for a rule that drops forwarded packets: nft list ruleset; iptables -S FORWARD",
        )
    reason = "ForwardPolicyDrop" if culprit.endswith("its policy") else "ForeignDrop"
    hint = "accept packets from and to vmnj* there"
    if culprit.startswith("table inet firewalld,"):
        hint = 'firewall-cmd --get-zone-of-interface=vmnj+ should say "vmnode"; else: firewall-cmd --reload'
    return failed(NAME, reason, f"{message}: dropped by {culprit}", hint)
