"""What the host's routing allows jobs to have, found out at start: before anything is made, and refused by name."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple, Optional

from vmnode.errors import ConfigurationError
from vmnode.host import uplink

_DEFAULT_MTU = 1500  # of a host without a way out, which may still get one


class Ground(NamedTuple):
    mtu: int  # for the jobs' links
    pool6: Optional[IPv6Network]  # None: jobs have no IPv6
    without_ipv6: str  # the reason for that, a sentence; "" if they have it
    hint: str  # what would help against that


def survey(pool4: IPv4Network, pool6: IPv6Network, own_links: str) -> Ground:
    """Changes nothing. Raises ConfigurationError if a pool is in use elsewhere, VmnodeError for unreadable routes."""
    _refuse_overlap("pool4", pool4, own_links)
    mtu = uplink.mtu() or _DEFAULT_MTU
    ways = uplink.default_routes(6)
    if not ways:
        return Ground(mtu, None, "jobs have no IPv6, since this host has no IPv6 default route", "")
    _refuse_overlap("pool6", pool6, own_links)
    lost = uplink.lost_by_forwarding()
    if lost is not None:
        link = lost.links[0]
        return Ground(
            mtu,
            None,
            f"jobs have no IPv6, since with IPv6 forwarding this host would lose its own default route by {link}, "
            "which it has from a router's advertisement",
            f"sysctl -w net.ipv6.conf.{link}.accept_ra=2 (and in /etc/sysctl.d), then restart vmnode",
        )
    return Ground(mtu, pool6, "", "")


def prepare(ground: Ground) -> None:
    """Switch forwarding on. Raises VmnodeError."""
    uplink.forward(4)
    if ground.pool6 is not None:
        uplink.forward(6)


def _refuse_overlap(key: str, pool: uplink.Prefix, own_links: str) -> None:
    route = uplink.overlapping(pool, own_links)
    if route is not None:
        raise ConfigurationError(
            f"[accounting] {key} = {str(pool)!r} overlaps this host's route to {route}",
            f"choose a prefix for {key} that is in use nowhere: jobs could not reach what this route leads to",
        )
