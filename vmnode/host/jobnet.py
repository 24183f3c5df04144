"""A job's network: an anonymous namespace with loopback and one veth, whose other end stays with the host.

    host   vmnj…  the gateway's address, the same on every job's link; a route to the job's one address
    job    eth0   the job's address; a default route by the gateway

Neighbours are permanent on both ends, and there are no link-local addresses: nothing but the job's own packets crosses
the link. The namespace lives for as long as a descriptor, a process or a socket is in it, and the kernel removes the
veth with it (see netns.py). Holds to the API of pyroute2 0.5.14.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, NamedTuple, Union

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmnode.host.links import netlink
from vmnode.host.netns import Namespace

INSIDE = "eth0"
_HOST_MAC = "fe:76:6d:6e:00:01"  # locally administered; each link has two ends only
_JOB_MAC = "06:76:6d:6e:00:02"
_SCOPE_LINK, _PERMANENT, _NODAD = 253, 0x80, 0x02  # linux/rtnetlink.h, linux/neighbour.h, linux/if_addr.h
_LOOPBACK = 1
_ACTIVATION_S = 1.0  # it takes longer only on a machine on which much else is going on
# By pyroute2's own name for it, 0.5.14 says NLM_F_EXCL too, which is NLM_F_BULK to kernels that know that, and refused.
_DELETE = (17, 1 | 4)  # RTM_DELLINK; NLM_F_REQUEST and NLM_F_ACK


class Ends(NamedTuple):
    """The addresses of one family at both ends of a link."""

    job: Union[IPv4Address, IPv6Address]
    gateway: Union[IPv4Address, IPv6Address]


def attach(link: str, families: list[Ends], mtu: int) -> Namespace:
    """Make a namespace and its link to the host. Raises VmnodeError, and leaves nothing behind then."""
    namespace = Namespace()
    try:
        with netlink(f"the link {link} cannot be made") as ipr:
            peer = {"ifname": INSIDE, "net_ns_fd": namespace.descriptor, "address": _JOB_MAC, "mtu": mtu}
            ipr.link("add", ifname=link, kind="veth", address=_HOST_MAC, mtu=mtu, peer=peer)
            index = ipr.link_lookup(ifname=link)[0]
            _without_link_local(link)
            ipr.link("set", index=index, state="up")
            for ends in families:
                _add_address(ipr, index, ends.gateway)
                _add_neighbour(ipr, index, ends.job, _JOB_MAC)
                _add_route(ipr, index, ends.job)
            namespace.run(lambda: _set_up_inside(families))
            _await_activation(ipr, index)
    except BaseException:
        namespace.close()
        raise
    return namespace


def _set_up_inside(families: list[Ends]) -> None:
    with netlink("the job's end of the link cannot be set up") as ipr:
        index = ipr.link_lookup(ifname=INSIDE)[0]
        _without_link_local(INSIDE)
        ipr.link("set", index=_LOOPBACK, state="up")
        ipr.link("set", index=index, state="up")
        for ends in families:
            _add_address(ipr, index, ends.job)
            _add_neighbour(ipr, index, ends.gateway, _HOST_MAC)
            _add_route(ipr, index, ends.gateway)
            ipr.route("add", family=_family(ends.job), dst="default", gateway=str(ends.gateway), oif=index)


def _await_activation(ipr: IPRoute, index: int) -> None:
    """Until then the kernel drops what is sent by this end, without a word: it came up when the other one did.

    Both happens in the kernel's own time (linkwatch_do_dev): the operational state, and the queue of packets.
    """
    give_up = time.monotonic() + _ACTIVATION_S
    while ipr.get_links(index)[0].get_attr("IFLA_OPERSTATE") != "UP" and time.monotonic() < give_up:
        time.sleep(0.001)


def remove(link: str) -> None:
    """Take a link away that is ours by its name, with the job's end; one that is not there is no error."""
    with netlink(f"the link {link} cannot be removed") as ipr:
        for index in ipr.link_lookup(ifname=link):
            try:
                ipr.link(_DELETE, index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise


def present(prefix: str) -> frozenset[str]:
    """The names of the links there are that begin so."""
    with netlink("the links of this host cannot be listed") as ipr:
        names = (link.get_attr("IFLA_IFNAME") for link in ipr.get_links())
        return frozenset(name for name in names if name and name.startswith(prefix))


def routed(prefix: str) -> frozenset[Union[IPv4Address, IPv6Address]]:
    """The addresses that the links with names that begin so lead to."""
    with netlink("the routes of this host cannot be listed") as ipr:
        ours = {link["index"] for link in ipr.get_links() if (link.get_attr("IFLA_IFNAME") or "").startswith(prefix)}
        routes = [*ipr.get_routes(family=socket.AF_INET), *ipr.get_routes(family=socket.AF_INET6)]
        found = (route.get_attr("RTA_DST") for route in routes if route.get_attr("RTA_OIF") in ours)
        return frozenset(ip_address(destination) for destination in found if destination)


def _family(address: Union[IPv4Address, IPv6Address]) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _add_address(ipr: IPRoute, index: int, address: Union[IPv4Address, IPv6Address]) -> None:
    options: dict[str, Any] = {} if address.version == 4 else {"flags": _NODAD}
    ipr.addr("add", index=index, address=str(address), prefixlen=address.max_prefixlen, **options)


def _add_neighbour(ipr: IPRoute, index: int, address: Union[IPv4Address, IPv6Address], mac: str) -> None:
    ipr.neigh("add", family=_family(address), dst=str(address), lladdr=mac, ifindex=index, state=_PERMANENT)


def _add_route(ipr: IPRoute, index: int, address: Union[IPv4Address, IPv6Address]) -> None:
    destination = f"{address}/{address.max_prefixlen}"
    ipr.route("add", family=_family(address), dst=destination, oif=index, scope=_SCOPE_LINK)


def _without_link_local(link: str) -> None:
    """Keep the kernel from giving the link an address of its own, and from talking about it (ip-sysctl.rst)."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{link}/addr_gen_mode").write_text("1", encoding="ascii")
