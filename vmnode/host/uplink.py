"""The host's own routing, as far as jobs behind a veth need it: the way out, forwarding, conntrack's table.

Holds to the API of pyroute2 0.5.14 (see links.py). Nothing is changed here but the two switches for forwarding, which
are for the whole host; they stay on, as libvirt and Docker leave them too, since others may have come to need them.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from vmnode.errors import NotPermitted, VmnodeError
from vmnode.host.links import netlink

Prefix = Union[IPv4Network, IPv6Network]

_MAIN = 254  # linux/rtnetlink.h: RT_TABLE_MAIN
_UNICAST, _LOCAL = 1, 2  # RTN_*; what is unreachable, prohibited or a black hole leads nowhere
_BY_ADVERTISEMENT = 9  # RTPROT_RA
_CLONED = 0x200  # RTM_F_CLONED: no route, but an exception to one (a path MTU, say)
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_FORWARDING = {4: Path("/proc/sys/net/ipv4/ip_forward"), 6: Path("/proc/sys/net/ipv6/conf/all/forwarding")}
_UNREAD = "the host's routes cannot be read"
_CONNTRACK = Path("/proc/sys/net/netfilter")


@dataclass(frozen=True)
class Route:
    """A route that leads somewhere. `links` are the names of those that packets leave by, in the kernel's order."""

    destination: Prefix
    links: tuple[str, ...]
    metric: int
    advertised: bool  # by a router (RFC 4861)
    main: bool  # in the main table, not one that only some packets look at

    def __str__(self) -> str:
        return f"{self.destination} by {', '.join(self.links)}" if self.links else str(self.destination)


class Conntrack(NamedTuple):
    """How full the table of connections is (nf_conntrack-sysctl.rst)."""

    used: int
    limit: int


def routes(version: int) -> tuple[Route, ...]:
    """All routes of IPv4 (4) or IPv6 (6), in all tables, those to the host's own addresses included."""
    with netlink(_UNREAD) as ipr:
        found = (_route(message, version) for message in ipr.get_routes(family=_FAMILIES[version]))
        return tuple(route for route in found if route is not None)


def default_routes(version: int) -> tuple[Route, ...]:
    """Those of the main table, the preferred one first."""
    ways = [route for route in routes(version) if route.destination.prefixlen == 0 and route.main and route.links]
    return tuple(sorted(ways, key=lambda route: route.metric))


def mtu() -> Optional[int]:
    """That of the link which the default route leaves by; the least if IPv4 and IPv6 go apart, None without a way."""
    names = {ways[0].links[0] for ways in map(default_routes, _FAMILIES) if ways}
    with netlink(_UNREAD) as ipr:
        found = [ipr.get_links(index)[0].get_attr("IFLA_MTU") for index in map(socket.if_nametoindex, sorted(names))]
    return min(found) if found else None


def overlapping(prefix: Prefix, own_links: str) -> Optional[Route]:
    """A route which leads to addresses of `prefix`, and by another link than ours, whose names begin with `own_links`.

    Default routes do not count, nor do those that lead nowhere: nobody is hidden by our more specific ones.
    """
    for route in routes(prefix.version):
        ours = bool(route.links) and all(name.startswith(own_links) for name in route.links)
        if route.destination.prefixlen > 0 and not ours and prefix.overlaps(route.destination):
            return route
    return None


def forwards(version: int) -> bool:
    """Whether the host forwards packets of IPv4 (4) or IPv6 (6); False too where the kernel has no IPv6."""
    try:
        return _FORWARDING[version].read_text(encoding="ascii").strip() != "0"
    except FileNotFoundError:
        return False


def forward(version: int) -> None:
    """Have the host forward packets, between all of its links (ip-sysctl.rst). Raises VmnodeError."""
    if forwards(version):  # also for IPv4, writing the switch anew would reset settings of the links
        return
    try:
        _FORWARDING[version].write_text("1", encoding="ascii")
    except PermissionError:
        raise NotPermitted(f"{_FORWARDING[version]} cannot be set to 1", "forwarding needs root") from None
    except OSError as error:
        raise VmnodeError(f"{_FORWARDING[version]} cannot be set to 1: {error.strerror}") from None


def lost_by_forwarding() -> Optional[Route]:
    """The IPv6 default route that the host would lose if it forwarded IPv6; None if it does already.

    A router does not believe other routers: with forwarding, the kernel forgets the default routes that it took from
    advertisements, and takes no more, unless accept_ra is 2 (ip-sysctl.rst; rt6_purge_dflt_routers in route.c).
    Routes that NetworkManager or systemd-networkd took from advertisements stay: accept_ra is 0 then.
    """
    if forwards(6):
        return None
    for route in default_routes(6):
        if route.advertised and any(_accept_ra(link) == "1" for link in route.links):
            return route
    return None


def _accept_ra(link: str) -> str:
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{link}/accept_ra").read_text(encoding="ascii").strip()
    except OSError:  # the link has just gone, and its routes with it
        return ""


def conntrack() -> Optional[Conntrack]:
    """None where the kernel keeps no such table, or none yet."""
    try:
        return Conntrack(*(int((_CONNTRACK / f"nf_conntrack_{what}").read_text()) for what in ("count", "max")))
    except OSError:
        return None


def _route(message: Any, version: int) -> Optional[Route]:
    if message["type"] not in (_UNICAST, _LOCAL) or message["flags"] & _CLONED:
        return None
    anywhere = "0.0.0.0" if version == 4 else "::"
    hops = message.get_attr("RTA_MULTIPATH")
    indices = [hop["oif"] for hop in hops] if hops else [message.get_attr("RTA_OIF")]
    names = []
    for index in filter(None, indices):
        with contextlib.suppress(OSError):  # gone meanwhile
            names.append(socket.if_indextoname(index))
    return Route(
        destination=ip_network((message.get_attr("RTA_DST") or anywhere, message["dst_len"])),
        links=tuple(names),
        metric=message.get_attr("RTA_PRIORITY") or 0,
        advertised=message["proto"] == _BY_ADVERTISEMENT,
        main=message.get_attr("RTA_TABLE") == _MAIN,
    )
