"""Links, addresses and routes (rtnetlink(7)), and the probe's port on the bridge.

Holds to the API of pyroute2 0.5.14, which is what EPEL 9 has.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmnode.errors import VmnodeError
from vmnode.host.netns import Namespace

T = TypeVar("T")
_BR_STATE_FORWARDING = 3  # linux/if_bridge.h
_IFF_UP = 1
_SIOCSIFADDR = 0x8916  # linux/sockios.h; the address 0.0.0.0 removes what is there
_STALE_LINK_S = 2.0  # the kernel destroys a dead instance's namespace in the background
INSIDE = "vmn0"  # the probe's interface, as seen in its namespace


@dataclass(frozen=True)
class Bridge:
    index: int
    up: bool
    addresses: tuple[ipaddress.IPv4Interface, ...]


@contextmanager
def netlink(what: str) -> Iterator[IPRoute]:
    """A socket to the kernel. A link may go while we ask about it, a list may change while it is read: VmnodeError."""
    with IPRoute() as ipr:
        try:
            yield ipr
        except (NetlinkError, IndexError, OSError) as error:
            raise VmnodeError(f"{what}: {error}") from None


def bridge(name: str) -> Optional[Bridge]:
    """The bridge as the kernel has it; None if there is no such link."""
    with netlink(f"the link {name} cannot be examined") as ipr:
        indices = ipr.link_lookup(ifname=name)
        if not indices:
            return None
        link = ipr.get_links(indices[0])[0]
        addresses = ipr.get_addr(family=socket.AF_INET, index=indices[0])
        return Bridge(
            index=indices[0],
            up=bool(link["flags"] & _IFF_UP),
            addresses=tuple(
                ipaddress.IPv4Interface((address.get_attr("IFA_LOCAL"), address["prefixlen"])) for address in addresses
            ),
        )


def default_route_link() -> Optional[int]:
    """The index of the link that the IPv4 default route of the main table leaves by; None without one."""
    with netlink("the default route cannot be read") as ipr:
        for route in ipr.get_default_routes(family=socket.AF_INET):
            index = route.get_attr("RTA_OIF")
            if index is not None:
                return int(index)
    return None


def local_addresses() -> frozenset[str]:
    """All addresses of this host, as text."""
    with netlink("the addresses of this host cannot be read") as ipr:
        return frozenset(
            str(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")) for address in ipr.get_addr()
        )


def forwards(link: str) -> bool:
    """Whether the kernel forwards IPv4 packets that come in by this link (ip-sysctl.rst, conf/<link>/forwarding)."""
    return Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").read_text(encoding="ascii").strip() == "1"


class ProbePort:
    """A port on the bridge that belongs to us: a veth whose other end lies in an anonymous namespace.

    It is kept from check to check, since a new port of a bridge with STP forwards nothing for four seconds. Names and
    MAC addresses come from `identity`, so that instances do not meet; the kernel removes all of it with the process.
    """

    def __init__(self, identity: str) -> None:
        digest = hashlib.sha256(identity.encode()).digest()
        self.name = f"vmnp{digest[:4].hex()}"
        self._mac = bytes([0x06, 0x76, 0x6D, digest[0], digest[1]])  # locally administered, "vm"
        self.mac = self.make_mac(0)
        self._namespace: Optional[Namespace] = None
        self._configured: Optional[tuple[ipaddress.IPv4Interface, Optional[ipaddress.IPv4Address]]] = None

    def make_mac(self, number: int) -> str:
        """The MAC address of our port (0), or of an imaginary guest behind it (1 to 255)."""
        return ":".join(f"{byte:02x}" for byte in [*self._mac, number])

    def plug(self, bridge_index: int) -> bool:
        """Have a port on that bridge; returns True once it forwards. Raises VmnodeError."""
        with netlink(f"the probe's port {self.name} cannot be set up") as ipr:
            if self._namespace is None or not ipr.link_lookup(ifname=self.name):
                self.unplug()
                self._make(ipr)
            index = ipr.link_lookup(ifname=self.name)[0]
            link = ipr.get_links(index)[0]
            if link.get_attr("IFLA_MASTER") != bridge_index or not link["flags"] & _IFF_UP:
                ipr.link("set", index=index, master=bridge_index)
                ipr.link("set", index=index, state="up")
                link = ipr.get_links(index)[0]
            port = link.get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_SLAVE_DATA")
            return port is not None and bool(port.get_attr("IFLA_BRPORT_STATE") == _BR_STATE_FORWARDING)

    def _make(self, ipr: IPRoute) -> None:
        namespace = Namespace()
        give_up = time.monotonic() + _STALE_LINK_S
        while True:
            try:
                peer = {"ifname": INSIDE, "net_ns_fd": namespace.descriptor, "address": self.mac}
                ipr.link("add", ifname=self.name, kind="veth", address=f"fe{self.mac[2:]}", peer=peer)
                break
            except NetlinkError as error:
                if error.code != errno.EEXIST or time.monotonic() > give_up:
                    namespace.close()
                    raise
            time.sleep(0.05)
        self._namespace = namespace
        self._configured = None
        self.inside(_bring_up)

    def configure(self, address: ipaddress.IPv4Interface, gateway: Optional[ipaddress.IPv4Address]) -> None:
        """Give the probe this address and default route, in place of what it had."""
        if self._configured == (address, gateway):
            return
        self._configured = None  # as long as it is half done
        self.inside(lambda: _set_address(address, gateway))
        self._configured = (address, gateway)

    @property
    def address(self) -> Optional[ipaddress.IPv4Interface]:
        return self._configured[0] if self._configured else None

    def inside(self, function: Callable[[], T]) -> T:
        """Call `function` in the probe's namespace; sockets that it opens stay there."""
        if self._namespace is None:
            raise VmnodeError("the probe has no port on the bridge")
        return self._namespace.run(function)

    def unplug(self) -> None:
        """Let the namespace go, and the port with it."""
        if self._namespace is not None:
            self._namespace.close()
        self._namespace = None
        self._configured = None


def _bring_up() -> None:
    with netlink("the probe's interface cannot be brought up") as ipr:
        ipr.link("set", index=ipr.link_lookup(ifname=INSIDE)[0], state="up")


def _set_address(address: ipaddress.IPv4Interface, gateway: Optional[ipaddress.IPv4Address]) -> None:
    with netlink(f"the probe cannot be given the address {address}") as ipr:
        index = ipr.link_lookup(ifname=INSIDE)[0]
        _forget_address()
        ipr.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        if gateway is not None:
            ipr.route("replace", dst="0.0.0.0/0", gateway=str(gateway), oif=index)


def _forget_address() -> None:
    """Take the IPv4 address away, if there is one (netdevice(7)).

    With pyroute2 0.5.14 neither flush_addr nor addr("delete") does: its flag NLM_F_EXCL is NLM_F_BULK to kernels that
    know it (5.19 and later, EL 9), and refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        none = struct.pack("16sHH4s16x", INSIDE.encode(), socket.AF_INET, 0, bytes(4))  # struct ifreq
        fcntl.ioctl(anything, _SIOCSIFADDR, none)
