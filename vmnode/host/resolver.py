"""Name service in a job's network namespace where the host's resolver listens on the loopback only.

The job sees the host's /etc/resolv.conf, and 127.0.0.53 there (systemd-resolved; 127.0.0.1: dnsmasq, unbound) is in its
own namespace an address where nobody listens. The host's resolver would not take its questions from elsewhere either:
systemd-resolved binds its socket to the interface lo. So, step by step:

    job's namespace   a route to 127.0.0.53 that leaves by eth0, for the gateway; from the job's own address, so that
                      nothing has to be translated here; a job without capabilities cannot change it (see `lead`)
    host, prerouting  one rule for all jobs: to 127.0.0.0/8, port 53, from a job's link -> the relay (see `nft_rule`)
    host              the relay (dns_relay.py), on the gateway's address, asks the resolver on the loopback

The host's links to the jobs do not route the loopback (route_localnet): a job reaches nothing of it but this.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections.abc import Sequence
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NamedTuple

from vmnode.errors import VmnodeError
from vmnode.host import rtnetlink

PORT = 53

# --- the host's resolver ------------------------------------------------------------------------------------------

_MOST_SERVERS = 3  # as many as the C library asks (resolv.conf(5), MAXNS)


class Servers(NamedTuple):
    """The name servers of the host that are on its loopback."""

    relayed: tuple[IPv4Address, ...]
    lost: tuple[IPv6Address, ...]  # the kernel takes no packet for ::1 from a link but lo (ip6_rcv_core)


def loopback_servers(resolv_conf: str) -> Servers:
    """What /etc/resolv.conf says; without any name server it means the one on this machine (resolv.conf(5))."""
    words = [line.split() for line in resolv_conf.splitlines()]
    named = [entry[1] for entry in words if len(entry) > 1 and entry[0] == "nameserver"] or ["127.0.0.1"]
    relayed, lost = [], []
    for name in named[:_MOST_SERVERS]:
        with contextlib.suppress(AddressValueError):
            address = IPv4Address(name)
            if address.is_loopback:
                relayed.append(address)
            continue
        with contextlib.suppress(AddressValueError):
            address6 = IPv6Address(name.partition("%")[0])
            if address6.is_loopback:
                lost.append(address6)
    return Servers(tuple(dict.fromkeys(relayed)), tuple(dict.fromkeys(lost)))


# --- the way there ------------------------------------------------------------------------------------------------

_ROUTE = "=BBBBBBBBI"  # struct rtmsg, and fib_rule_hdr
_TABLE_LOCAL, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _UNICAST, _ONLINK = 255, 4, 0, 1, 4  # linux/rtnetlink.h
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_FRA_DST, _FRA_PRIORITY, _FRA_IP_PROTO, _FRA_SPORT_RANGE, _FRA_DPORT_RANGE = 1, 6, 22, 23, 24  # linux/fib_rules.h
_TO_TABLE = 1
_LINK = "=BxHiII"  # struct ifinfomsg
_IFLA_AF_SPEC, _IFLA_INET_CONF, _DEVCONF_ROUTE_LOCALNET = 26, 1, 26  # linux/if_link.h, linux/ip.h

_OWN = IPv4Address("127.0.0.1")
_TABLE_DNS = 53
_LOCAL_PRIORITY = 100

Request = tuple[int, int, bytes]


def lead(servers: Sequence[IPv4Address], gateway: IPv4Address, own: IPv4Address, interface: str = "eth0") -> None:
    """Lead packets for `servers` to the gateway. To be called once in the job's namespace, with its link up.

    Routes in the table "local", which is asked first: /32 is longer than the kernel's own 127.0.0.0/8. The answers come
    from a loopback address, which the kernel takes from another link only with route_localnet.

    127.0.0.1 is the job's own, but for port 53: that takes rules, which the kernel applies to each packet of the job,
    so only who needs it has them. One is for the answers, since the kernel looks up the way back to their sender too
    (fib_validate_source) by the same ports. Raises VmnodeError.
    """
    if not servers:
        return
    try:
        index = socket.if_nametoindex(interface)
        requests = [_route_localnet(index)]
        for server in servers:
            table = _TABLE_DNS if server == _OWN else _TABLE_LOCAL
            requests.append(_route(server, table, gateway, own, index))
        if _OWN in servers:
            requests += _rules(_OWN)
        with rtnetlink.connect() as kernel:
            rtnetlink.execute(kernel, requests)
    except OSError as error:
        named = ", ".join(map(str, servers))
        raise VmnodeError(f"the way to the name servers {named} cannot be made in a job's namespace: {error}") from None


def _route_localnet(index: int) -> Request:
    setting = rtnetlink.attribute(_DEVCONF_ROUTE_LOCALNET, struct.pack("=I", 1))
    family = rtnetlink.attribute(socket.AF_INET, rtnetlink.attribute(_IFLA_INET_CONF, setting))
    link = struct.pack(_LINK, 0, 0, index, 0, 0)
    return rtnetlink.SETLINK, 0, link + rtnetlink.attribute(_IFLA_AF_SPEC, family)


def _route(server: IPv4Address, table: int, gateway: IPv4Address, own: IPv4Address, index: int) -> Request:
    head = (socket.AF_INET, 32, 0, 0, table, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _UNICAST, _ONLINK)
    payload = (
        struct.pack(_ROUTE, *head)
        + rtnetlink.attribute(_RTA_DST, server.packed)
        + rtnetlink.attribute(_RTA_GATEWAY, gateway.packed)
        + rtnetlink.attribute(_RTA_PREFSRC, own.packed)
        + rtnetlink.attribute(_RTA_OIF, struct.pack("=i", index))
    )
    return rtnetlink.NEWROUTE, rtnetlink.CREATE | rtnetlink.REPLACE, payload


def _rules(server: IPv4Address) -> list[Request]:
    """To and from port 53 of `server` by the table of its own; the table "local" comes after that, instead of first."""
    local = struct.pack(_ROUTE, socket.AF_INET, 0, 0, 0, _TABLE_LOCAL, 0, 0, _TO_TABLE, 0)
    later = local + rtnetlink.attribute(_FRA_PRIORITY, struct.pack("=I", _LOCAL_PRIORITY))
    requests = [(rtnetlink.NEWRULE, rtnetlink.CREATE, later), (rtnetlink.DELRULE, 0, local)]
    head = struct.pack(_ROUTE, socket.AF_INET, 32, 0, 0, _TABLE_DNS, 0, 0, _TO_TABLE, 0)
    for priority, (protocol, ports) in enumerate(
        itertools.product(_PROTOCOLS, (_FRA_DPORT_RANGE, _FRA_SPORT_RANGE)), 1
    ):
        rule = (
            head
            + rtnetlink.attribute(_FRA_DST, server.packed)
            + rtnetlink.attribute(_FRA_PRIORITY, struct.pack("=I", priority))
            + rtnetlink.attribute(_FRA_IP_PROTO, bytes([protocol]))
            + rtnetlink.attribute(ports, struct.pack("=HH", PORT, PORT))
        )
        requests.append((rtnetlink.NEWRULE, rtnetlink.CREATE, rule))
    return requests


_PROTOCOLS = (socket.IPPROTO_UDP, socket.IPPROTO_TCP)


def nft_rule(links: str, relay: IPv4Address, port: int) -> str:
    """For a chain "type nat hook prerouting priority dstnat" of the family inet; `links` is how their names begin."""
    matches = f'iifname "{links}*" ip daddr 127.0.0.0/8 meta l4proto {{ tcp, udp }} th dport {PORT}'
    return f"{matches} dnat ip to {relay}:{port}"


def iptables_rules(links: str, relay: IPv4Address, port: int) -> list[str]:
    """The same for iptables' table nat, as iptables-save prints what follows "-A <chain>"."""
    to = f"-j DNAT --to-destination {relay}:{port}"
    match = f"-d 127.0.0.0/8 -i {links}+"
    return [f"{match} -p {protocol} -m {protocol} --dport {PORT} {to}" for protocol in ("udp", "tcp")]
