"""What counts as LAN: the configured prefixes, and what is always near. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

_ALWAYS = (
    "0.0.0.0/8",  # this host on this network (RFC 1122): who asks for an address by DHCP
    "127.0.0.0/8",  # a name server on the host's loopback (see host/resolver.py)
    "169.254.0.0/16",  # link-local (RFC 3927)
    "224.0.0.0/4",  # multicast (RFC 5771)
    "255.255.255.255/32",  # limited broadcast
    "fe80::/10",  # link-local (RFC 4291)
    "ff00::/8",  # multicast (RFC 4291)
    "::/128",  # no address yet
)


def prefixes(
    configured: Iterable[str], pools: Iterable[str], own: Iterable[str]
) -> tuple[tuple[IPv4Network, ...], tuple[IPv6Network, ...]]:
    """The LAN's prefixes of both families; `own` are the host's addresses."""
    networks = sorted({ip_network(text, strict=False) for text in (*configured, *pools, *own, *_ALWAYS)}, key=str)
    return (
        tuple(network for network in networks if isinstance(network, IPv4Network)),
        tuple(network for network in networks if isinstance(network, IPv6Network)),
    )
