"""Does the virtual network carry a guest's traffic? A probe on the bridge asks as a guest would.

The probe keeps its port, its namespace and its lease. A lease that is held is answered in milliseconds; for a MAC
address that dnsmasq has not seen it first pings for three seconds, during which other guests wait. So a fresh one asks
rarely.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import time
from collections.abc import Sequence
from typing import Callable, Optional

from vmnode.conditions import Observation, failed, ok
from vmnode.errors import VmnodeError
from vmnode.health.network import Attempt, free_addresses
from vmnode.host import clock, dhcp, links, reach
from vmnode.host.libvirt import VirtualNetwork
from vmnode.values import Target

FORWARDING_DEADLINE_S = 35.0  # twice the largest usual forward delay of STP
HELD_DEADLINE_S = 10.0  # dnsmasq may be busy pinging for some guests
FRESH_DEADLINE_S = 12.0
DNS_DEADLINE_S = 4.0
TCP_DEADLINE_S = 3.0
TRACE_DEADLINE_S = 0.5  # to see where a packet is dropped, one is enough
RESOLVE_DEADLINE_S = 3.0
_FOREVER = 0xFFFFFFFF


class GuestTraffic:
    """The probe. `identity` keeps instances apart; `progress` is told what a person has to wait for."""

    def __init__(self, identity: str, progress: Callable[[str], None]) -> None:
        self.port = links.ProbePort(identity)
        self._progress = progress
        self._client: Optional[dhcp.Client] = None
        self._raw: Optional[socket.socket] = None
        self._lease: Optional[dhcp.Answer] = None
        self._leased_at = 0.0  # time.monotonic()
        self.asked_afresh: Optional[float] = None  # CLOCK_BOOTTIME
        self.host_name = f"vmnode-probe-{self.port.name[4:]}"

    async def ask_for_address(self, network: VirtualNetwork, bridge_index: int, fresh: bool) -> Observation:
        """Ask for the address that we hold, or for a first one; with `fresh` also as a guest never seen before."""
        await self._plug(network.bridge, bridge_index)
        ours = any(lease.mac.lower() == self.port.mac for lease in network.leases)
        if free_addresses(network, time.time()) <= 0:
            return failed(
                "network.dhcp",
                "PoolExhausted",
                f"all addresses of network {network.name!r} are leased",
                f"virsh net-dhcp-leases {network.name}; shorten the lease time or widen the range",
            )
        if not ours:
            self.asked_afresh = clock.now().boot
            self._progress("asking for an address (dnsmasq pings it first, about 3 s)")
        offer = await self._dhcp_client().discover(self.port.mac, HELD_DEADLINE_S if ours else FRESH_DEADLINE_S)
        wrong = judge_offer(network, offer)
        if wrong is not None:
            return wrong
        assert offer is not None
        refused = await self._hold(offer, listed=ours)
        if refused is not None:
            return refused
        if fresh and ours:
            self._progress("asking for an address as a new guest (about 3 s)")
            return await self._ask_as_new_guest(network)
        return ok("network.dhcp", f"{offer.server} leases {offer.address.ip}")

    async def _plug(self, bridge: str, index: int) -> None:
        give_up = time.monotonic() + FORWARDING_DEADLINE_S
        said = False
        while not await asyncio.to_thread(self.port.plug, index):
            if not said:
                self._progress(f"waiting until {bridge} forwards for the new port (spanning tree, about 4 s)")
                said = True
            if time.monotonic() > give_up:
                raise VmnodeError(f"the probe's port on {bridge} does not forward after {FORWARDING_DEADLINE_S:g} s")
            await asyncio.sleep(0.1)

    def _dhcp_client(self) -> dhcp.Client:
        """The raw socket belongs to the namespace: a new namespace needs a new one."""
        if self.port.address is None or self._client is None:
            if self._raw is not None:
                self._raw.close()
            self._raw = self.port.inside(lambda: dhcp.open_socket(links.INSIDE))
            self._client = dhcp.Client(self._raw, self.host_name)
        return self._client

    async def _hold(self, offer: dhcp.Answer, listed: bool) -> Optional[Observation]:
        """Take the lease, or renew it in the second half of its time, or when dnsmasq has forgotten or changed it.

        What stands in an answer may come from a guest: the next one that differs is believed in its place.
        """
        assert self._client is not None
        age = time.monotonic() - self._leased_at
        held = self._lease
        ours = (
            listed
            and held is not None
            and (held.address, held.router) == (offer.address, offer.router)
            and held.address == self.port.address
        )
        if ours and held is not None and (held.lease_s in (0, _FOREVER) or age < held.lease_s / 2):
            return None
        answer = await self._client.request(offer, HELD_DEADLINE_S)
        if answer is None or answer.kind != dhcp.ACK:
            return _not_granted(offer, answer)
        self._lease, self._leased_at = answer, time.monotonic()
        await asyncio.to_thread(self.port.configure, answer.address, answer.router)
        return None

    async def _ask_as_new_guest(self, network: VirtualNetwork) -> Observation:
        assert self._raw is not None
        self.asked_afresh = clock.now().boot
        mac = self.port.make_mac(random.randint(1, 255))
        guest = dhcp.Client(self._raw, "")  # with our name, dnsmasq would take the name from the lease that we hold
        offer = await guest.discover(mac, FRESH_DEADLINE_S)
        wrong = judge_offer(network, offer)
        if wrong is not None:
            return wrong
        assert offer is not None
        answer = await guest.request(offer, HELD_DEADLINE_S)
        if answer is None or answer.kind != dhcp.ACK:
            return _not_granted(offer, answer)
        guest.release(answer)
        return ok("network.dhcp", f"{offer.server} leases {offer.address.ip} to a new guest")

    async def ask_name_server(self, server: ipaddress.IPv4Address) -> Observation:
        raw = self.port.inside(reach.udp_socket)
        result = await reach.dns(raw, server, DNS_DEADLINE_S)
        if result.reason:
            return failed(
                "network.dns",
                result.reason,
                f"the name server {server} does not answer guests: {result.detail}",
                "a firewall on the host may block UDP port 53 on the bridge: nft list ruleset",
            )
        return ok("network.dns", f"{server} answers")

    async def connect(
        self, targets: Sequence[Target], *, from_host: bool, deadline_s: float = TCP_DEADLINE_S
    ) -> list[Attempt]:
        """Try every target at once, from the probe or from the host itself."""
        ours = await asyncio.to_thread(links.local_addresses)

        async def attempt(target: Target) -> Attempt:
            addresses, complaint = await reach.resolve(target.host, RESOLVE_DEADLINE_S)
            usable = [address for address in addresses if ":" not in address]  # the network gives guests IPv4 only
            if not usable:
                reason = reach.NO_IPV4 if addresses else "Unresolved"
                return Attempt(target, False, reach.Reached(reason, complaint or "it has no IPv4 address"))
            opened = reach.tcp_socket() if from_host else self.port.inside(reach.tcp_socket)
            result = await reach.tcp(opened, usable[0], target.port, deadline_s)
            return Attempt(target, usable[0] not in ours, result)

        return list(await asyncio.gather(*(attempt(target) for target in targets)))

    async def close(self) -> None:
        """Give the lease back and let the port go."""
        if self._client is not None and self._lease is not None:
            self._client.release(self._lease)
            await asyncio.sleep(0.05)  # the kernel drops what is still queued in a namespace that ends
        if self._raw is not None:
            self._raw.close()
        self._client = self._raw = self._lease = None
        self.port.unplug()


def judge_offer(network: VirtualNetwork, offer: Optional[dhcp.Answer]) -> Optional[Observation]:
    """What is wrong with an offer, or None."""
    if offer is None:
        return failed(
            "network.dhcp",
            "NoOffer",
            f"no DHCP offer on {network.bridge}",
            "a firewall on the host may block UDP port 67 on the bridge: nft list ruleset",
        )
    if network.gateway is not None and offer.server != network.gateway.ip:
        return failed(
            "network.dhcp",
            "ForeignServer",
            f"{offer.server} answers on {network.bridge}, which is not libvirt's dnsmasq",
            "find the guest that runs a DHCP server: bridge fdb show",
        )
    inside = any(first <= offer.address.ip <= last for first, last in network.ranges)
    if not inside and offer.address.ip not in network.reserved:
        return failed(
            "network.dhcp",
            "OutOfRange",
            f"{offer.server} offers {offer.address.ip}, outside of the network's range",
            f"dnsmasq runs with an old configuration: virsh net-dumpxml {network.name}",
        )
    return None


def _not_granted(offer: dhcp.Answer, answer: Optional[dhcp.Answer]) -> Observation:
    said = "says no (NAK)" if answer is not None else "is silent"
    return failed(
        "network.dhcp",
        "NotGranted",
        f"{offer.server} offers {offer.address.ip}, then {said}",
        "journalctl -t dnsmasq-dhcp",
    )
