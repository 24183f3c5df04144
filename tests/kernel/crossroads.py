"""A host with jobs between a LAN and a WAN, and what crosses the jobs' links, as a packet socket sees it.

    job (100.64.0.2, fd00:64::2) ---- vmnj…   the test's namespace   lan0 ---- 192.168.7.2, fd00:7::2
                                              is the host            wan0 ---- 198.51.100.2, 2001:db8:51::2

Neither peer knows a way back to the jobs, but through NAT.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any, NamedTuple, Union

from tests.kernel.world import links, tool, until
from vmnode.host.counting import Link, Rules
from vmnode.host.jobnet import Ends, attach
from vmnode.host.netns import Namespace
from vmnode.usage import Traffic, Usage

Address = Union[IPv4Address, IPv6Address]
LAN, WAN, HOST = ("192.168.7.2", "fd00:7::2"), ("198.51.100.2", "2001:db8:51::2"), ("192.168.7.1", "fd00:7::1")
# /16 holds the /24; what is always near and the host's own addresses are for the caller to add.
_LAN4 = tuple(
    map(
        IPv4Network,
        (
            "192.168.7.0/24",
            "192.168.0.0/16",
            "100.64.0.0/16",
            "198.51.100.1/32",
            "0.0.0.0/8",
            "224.0.0.0/4",
            "255.255.255.255/32",
        ),
    )
)
_LAN6 = tuple(map(IPv6Network, ("fd00:7::/64", "fd00::/16", "fd00:7::/64", "2001:db8:51::1/128", "::/128", "ff00::/8")))
RULES = Rules(
    tag="cafe",
    links="vmnjcafe",
    pool4=IPv4Network("100.64.0.0/16"),
    pool6=IPv6Network("fd00:64::/64"),
    lan4=_LAN4,
    lan6=_LAN6,
)
MTU = 1500
_ETHERNET = 14
_PACKET_STATISTICS, _SOL_PACKET, _SO_RCVBUFFORCE = 6, 263, 33  # linux/if_packet.h, asm-generic/socket.h
_OUTGOING = 4  # PACKET_OUTGOING


class Job(NamedTuple):
    link: Link
    namespace: Namespace

    @property
    def name(self) -> str:
        return self.link.name

    def address(self, family: int) -> str:
        return str(self.link.address4 if family == 4 else self.link.address6)


class Crossroads(NamedTuple):
    lan: Namespace
    wan: Namespace

    def far(self, address: str) -> Namespace:
        return self.lan if address in LAN else self.wan


@contextlib.contextmanager
def crossroads() -> Iterator[Crossroads]:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    with _peer("lan0", HOST, LAN) as lan, _peer("wan0", ("198.51.100.1", "2001:db8:51::1"), WAN) as wan:
        yield Crossroads(lan, wan)


@contextlib.contextmanager
def _peer(link: str, here: tuple[str, str], there: tuple[str, str]) -> Iterator[Namespace]:
    namespace = Namespace()
    try:
        path = f"/proc/{os.getpid()}/fd/{namespace.descriptor}"
        enter = ("nsenter", f"--net={path}", "ip")
        tool("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", path)
        tool("ip", "link", "set", link, "up")
        tool(*enter, "link", "set", "lo", "up")
        tool(*enter, "link", "set", "eth0", "up")
        for length, near, far in zip((24, 64), here, there):
            options = [] if length == 24 else ["nodad"]
            tool("ip", "address", "add", f"{near}/{length}", "dev", link, *options)
            tool(*enter, "address", "add", f"{far}/{length}", "dev", "eth0", *options)
        yield namespace
    finally:
        namespace.close()
        until(lambda: link not in links())


@contextlib.contextmanager
def job(number: int, name: str = "") -> Iterator[Job]:
    """A job, as the daemon attaches it."""
    assert RULES.pool6 is not None
    link = Link(name or f"{RULES.links}{number}", RULES.pool4[number], RULES.pool6[number])
    families = [Ends(RULES.pool4[number], RULES.pool4[1]), Ends(RULES.pool6[number], RULES.pool6[1])]
    namespace = attach(link.name, families, MTU)
    try:
        yield Job(link, namespace)
    finally:
        namespace.close()  # with which the link goes
        until(lambda: link.name not in links())


class Witness:
    """Counts what crosses a job's link, packet by packet, by the definition in vmnode/usage.py.

    A packet socket gets a segmentation-offloaded burst as the one packet that it is to the kernel. Fragments are put
    together: what counts is the datagram.
    """

    def __init__(self, link: str) -> None:
        self._link = link
        while True:  # until nothing comes between the first look of both
            self._before = _statistics(link)
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
            self._socket.bind((link, 3))  # ETH_P_ALL
            if self._before == _statistics(link):
                break
            self._socket.close()
        self._socket.settimeout(0.1)
        self._counts: dict[str, list[int]] = {direction: [0, 0] for direction in Usage._fields}
        self._frames = [[0, 0], [0, 0]]  # in, out
        self._last = time.monotonic()
        self._stop = False
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        self._socket.close()

    @property
    def usage(self) -> Usage:
        """What crossed the link, once it is quiet."""
        give_up = time.monotonic() + 20
        while time.monotonic() - self._last < 0.4:
            assert time.monotonic() < give_up, "the link does not become quiet"
            time.sleep(0.05)
        lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        assert lost == 0
        # The link's own counters are a second witness, of the frames.
        grown = [[now - then for now, then in zip(*pair)] for pair in zip(_statistics(self._link), self._before)]
        assert grown == self._frames
        return Usage(*(Traffic(*self._counts[direction]) for direction in Usage._fields))

    def _watch(self) -> None:
        buffer = bytearray(128)
        while not self._stop:
            try:
                length, (_, _, kind, *_) = self._socket.recvfrom_into(buffer, 0, socket.MSG_TRUNC)
            except socket.timeout:
                continue
            self._count(bytes(buffer[_ETHERNET:]), length - _ETHERNET, kind == _OUTGOING)
            self._last = time.monotonic()

    def _count(self, header: bytes, length: int, outgoing: bool) -> None:
        way = "in" if outgoing else "out"
        frames = self._frames[0 if outgoing else 1]
        frames[0] += length + _ETHERNET
        frames[1] += 1
        source, destination, size, first = _packet(header, length)
        if source.is_unspecified:
            return  # no job's: the kernels tell each other which multicast groups they listen to (MLD)
        far = source if outgoing else destination
        prefixes = RULES.lan4 if far.version == 4 else RULES.lan6
        where = "lan" if any(far in prefix for prefix in prefixes) else "wan"
        count = self._counts[f"{where}_{way}"]
        count[0] += size
        count[1] += first


def _statistics(link: str) -> list[list[int]]:
    """Bytes and packets that the host sent to the job, and got from it."""
    found: dict[str, Any] = json.loads(tool("ip", "-s", "-j", "link", "show", "dev", link))[0]["stats64"]
    return [[found[way]["bytes"], found[way]["packets"]] for way in ("tx", "rx")]


def _packet(header: bytes, length: int) -> tuple[Address, Address, int, int]:
    """Source, destination, the bytes that count, and whether it counts as a packet."""
    if header[0] >> 4 == 4:
        headers = (header[0] & 15) * 4
        later = struct.unpack("!H", header[6:8])[0] & 0x1FFF != 0
        return ip_address(header[12:16]), ip_address(header[16:20]), length - later * headers, not later
    source, destination = ip_address(header[8:24]), ip_address(header[24:40])
    if header[6] != 44:  # a fragment's header, which the datagram does not have
        return source, destination, length, 1
    later = struct.unpack("!H", header[42:44])[0] >> 3 != 0
    return source, destination, length - 8 - later * 40, not later
