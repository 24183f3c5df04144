"""libvirt, behind a deadline: every call runs in a worker that can be killed (`libvirt_worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Optional

from vmnode.errors import CommandFailed, DeadlineExceeded, VmnodeError
from vmnode.host import process

NETWORK_DIRECTORY = Path("/run/libvirt/network")  # where libvirt keeps the pid file of each network's dnsmasq
SOCKETS = {"virtqemud": Path("/run/libvirt/virtqemud-sock"), "libvirtd": Path("/run/libvirt/libvirt-sock")}
_PACKAGE_ROOT = Path(__file__).parents[2]


class LibvirtError(VmnodeError):
    """libvirt answered with an error, or could not be reached."""


@dataclass(frozen=True)
class Lease:
    mac: str
    address: str
    expires: int  # Unix time; 0 means never


@dataclass(frozen=True)
class VirtualNetwork:
    """A virtual network as libvirt describes it (formatnetwork.html)."""

    name: str
    active: bool
    autostart: bool
    forward_mode: str  # "nat", "route", "open", "bridge", …; "" for an isolated one
    bridge: str
    gateway: Optional[ipaddress.IPv4Interface]  # the bridge's own address
    ranges: tuple[tuple[ipaddress.IPv4Address, ipaddress.IPv4Address], ...]  # of DHCP, both ends included
    reserved: tuple[ipaddress.IPv4Address, ...]  # by <host>
    dns: bool
    leases: tuple[Lease, ...]

    @property
    def pid_file(self) -> Path:
        return NETWORK_DIRECTORY / f"{self.name}.pid"


@dataclass(frozen=True)
class NicLink:
    """The host's end of a domain's network interface: a tap, or a macvtap."""

    name: str
    index: int
    bridged: bool  # it is a port of a bridge of the kernel's


@dataclass(frozen=True)
class Nics:
    """A running domain's network interfaces."""

    count: int
    links: tuple[NicLink, ...]  # fewer than `count` with user networking, which has none


def parse_network(name: str, answer: Mapping[str, Any]) -> VirtualNetwork:
    """A worker's answer as a value; raises LibvirtError where the XML has no sense."""
    try:
        root = ElementTree.fromstring(answer["xml"])
        forward, bridge, dns = root.find("forward"), root.find("bridge"), root.find("dns")
        subnets = [ip for ip in root.iter("ip") if ip.get("family", "ipv4") == "ipv4"]
        subnets.sort(key=lambda ip: ip.find("dhcp") is None)  # of several, guests live in the one that has DHCP
        gateway, ranges, hosts = None, [], []
        for subnet in subnets[:1]:
            prefix = subnet.get("prefix") or subnet.get("netmask") or _classful(subnet.attrib["address"])
            gateway = ipaddress.IPv4Interface(f"{subnet.attrib['address']}/{prefix}")
            ranges = [
                (ipaddress.IPv4Address(element.attrib["start"]), ipaddress.IPv4Address(element.attrib["end"]))
                for element in subnet.iterfind("dhcp/range")
            ]
            hosts = [
                ipaddress.IPv4Address(element.attrib["ip"])
                for element in subnet.iterfind("dhcp/host")
                if "ip" in element.attrib
            ]
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise LibvirtError(f"network {name!r}: libvirt's description cannot be understood: {error}") from None
    return VirtualNetwork(
        name=name,
        active=answer["active"],
        autostart=answer["autostart"],
        forward_mode=(forward.get("mode", "nat") if forward is not None else ""),
        bridge=(bridge.get("name", "") if bridge is not None else ""),
        gateway=gateway,
        ranges=tuple(ranges),
        reserved=tuple(hosts),
        dns=dns is None or dns.get("enable", "yes") != "no",
        leases=tuple(Lease(lease["mac"], lease["address"], lease["expires"]) for lease in answer["leases"]),
    )


def _classful(address: str) -> int:
    """The prefix length that libvirt takes where the XML names none (virSocketAddrGetIPPrefix): the class of old."""
    first = ipaddress.IPv4Address(address).packed[0]
    return 8 if first < 128 else 16 if first < 192 else 24


class Client:
    """The client of one worker, which is started when it is needed and killed when it does not answer.

    `on_event` is called, in the event loop, with one word when a network changes, a guest starts or stops, or the
    connection is lost.
    """

    def __init__(self, uri: str, timeout_s: float, on_event: Callable[[str], None]) -> None:
        self.uri = uri
        self.timeout_s = timeout_s
        self._on_event = on_event
        self._asking = asyncio.Lock()
        self._worker: Optional[asyncio.subprocess.Process] = None
        self._readers: list[asyncio.Task[None]] = []
        self._complaint = ""  # the last line of the worker's stderr
        self._pending: Optional[asyncio.Future[Mapping[str, Any]]] = None

    async def ask(self, verb: str, **arguments: Any) -> Any:
        """The answer of one of libvirt_worker's verbs.

        Raises DeadlineExceeded when libvirt hangs, LibvirtError when it refuses, CommandFailed when nobody could ask.
        """
        async with self._asking:
            self._pending = asyncio.get_running_loop().create_future()
            try:
                if self._worker is None or self._worker.returncode is not None:
                    await self._start()
                assert self._worker is not None and self._worker.stdin is not None
                self._worker.stdin.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                document = await asyncio.wait_for(self._pending, self.timeout_s)
            except (asyncio.TimeoutError, ConnectionError):
                await self.close()
                raise DeadlineExceeded(f"{self.uri}: no answer within {self.timeout_s:g} s") from None
        if "error" in document:
            raise LibvirtError(f"{self.uri}: {document['error']['message']}")
        return document["answer"]

    async def _start(self) -> None:
        self._worker = await process.start(
            [sys.executable, "-m", "vmnode.host.libvirt_worker", self.uri],
            stdin=asyncio.subprocess.PIPE,
            environment={"PYTHONPATH": str(_PACKAGE_ROOT)},
        )
        self._complaint = ""
        loop = asyncio.get_running_loop()
        complaints = loop.create_task(self._read_complaints(self._worker))
        self._readers = [complaints, loop.create_task(self._read_answers(self._worker, complaints))]

    async def _read_answers(self, worker: asyncio.subprocess.Process, complaints: asyncio.Task[None]) -> None:
        assert worker.stdout is not None
        async for line in worker.stdout:
            document = json.loads(line)
            if "event" in document:
                self._happened(document["event"])
            elif self._pending is not None and not self._pending.done():
                self._pending.set_result(document)
        await complaints
        if self._pending is not None and not self._pending.done():
            last = self._complaint or f"exit status {worker.returncode}"
            self._pending.set_exception(CommandFailed(f"the libvirt worker ended: {last}"))  # libvirt said nothing

    def _happened(self, event: str) -> None:
        self._on_event(event)

    async def _read_complaints(self, worker: asyncio.subprocess.Process) -> None:
        """libvirt logs to stderr: unread, it would stop the worker one day when the pipe is full."""
        assert worker.stderr is not None
        async for line in worker.stderr:
            self._complaint = line.decode("utf-8", "replace").strip() or self._complaint

    async def close(self) -> None:
        """Kill the worker. A worker that cannot be killed is left behind; the next question starts another."""
        worker, self._worker = self._worker, None
        for reader in self._readers:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        self._readers = []
        if worker is not None:
            await process.end(worker, f"libvirt worker {worker.pid}")


class Libvirt(Client):
    """What a check asks.

    `domains` are the running ones' names as of the last answer; None if there was none. `nics` are their network
    interfaces, as of the last answer, too, but only as long as nothing has happened since.
    """

    domains: Optional[frozenset[str]] = None
    nics: Mapping[str, Nics] = MappingProxyType({})

    async def network(self, name: str) -> Optional[VirtualNetwork]:
        """What libvirt knows about a network; None if it is not defined. Raises as `ask` does."""
        self.domains = None
        self.nics = {}
        answer = await self.ask("look", network=name)
        self.domains = frozenset(answer["domains"])
        self.nics = {
            name: Nics(each["count"], tuple(NicLink(**link) for link in each["links"]))
            for name, each in (answer["nics"] or {}).items()
        }
        return None if answer["network"] is None else parse_network(name, answer["network"])

    def _happened(self, event: str) -> None:
        self.nics = {}
        super()._happened(event)
