"""What the kernel tells by itself: links, addresses, routes, forwarding, the firewall, the death of a process.

Only "something of this kind happened" is taken from a message; what is true is read afresh by the check that follows. A
message that was lost (ENOBUFS) is an event of every kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Collection
from typing import Callable, Optional

_NETLINK_NETFILTER = 12  # linux/netlink.h
# Multicast groups as bits (linux/rtnetlink.h): link, IPv4 address, IPv4 route, IPv4 netconf.
_ROUTE_GROUPS = sum(1 << (group - 1) for group in (1, 5, 7, 24))
_NFTABLES_GROUP = 1 << (7 - 1)  # linux/netfilter/nfnetlink.h, NFNLGRP_NFTABLES
_RTM_LINK, _RTM_ADDRESS, _RTM_ROUTE, _RTM_NETCONF = (16, 17), (20, 21), (24, 25), (80, 81)
_NEWGEN = (10 << 8) | 15  # linux/netfilter/nf_tables.h, NFT_MSG_NEWGEN: a transaction was committed
_RT_TABLE_MAIN = 254
_NETCONF_ALL = -1
_ACCOUNTING_GROUPS = sum(1 << (group - 1) for group in (1, 5, 9))  # link, IPv4 address, IPv6 address
_RTM_DELLINK = 17
_LINK_HEADER, _ADDRESS_HEADER, _NFGENMSG = 16, 8, 4  # bytes
_IFLA_IFNAME, _IFA_LABEL = 3, 3
OUR_TABLES = "vmnode"
_REMOVALS = tuple((10 << 8) | message for message in (2, 5, 8, 11))  # NFT_MSG_DELTABLE, DELCHAIN, DELRULE, DELSET


async def happened(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set, or the time is up; whether it is set.

    Not asyncio.wait_for, which before Python 3.12 forgets a cancellation that comes together with the event
    (https://github.com/python/cpython/issues/86296): whoever cancelled would wait for ever.
    """
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiter}, timeout=timeout_s)
    finally:
        waiter.cancel()
    return event.is_set()


def messages(data: bytes) -> list[tuple[int, bytes]]:
    """The (type, payload) pairs of a netlink datagram (netlink(7)); a message that was cut off is left out."""
    found = []
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if not 16 <= length <= len(data):
            break
        found.append((kind, data[16:length]))
        data = data[(length + 3) & ~3 :]
    return found


def concerns(kind: int, payload: bytes, links: Collection[int]) -> bool:
    """Whether a routing message is about one of `links`, or about the default route, or about all of forwarding."""
    if kind in _RTM_LINK or kind in _RTM_ADDRESS:
        return struct.unpack_from("=i", payload, 4)[0] in links
    if kind in _RTM_ROUTE:
        return payload[1] == 0 and payload[4] == _RT_TABLE_MAIN
    if kind in _RTM_NETCONF:
        return struct.unpack_from("=i", payload, 8)[0] in (*links, _NETCONF_ALL)
    return False


class KernelEvents:
    """Calls `on_event` with "link" or "firewall", in the event loop, until closed.

    `watch` says which links matter, and whose death; any new link matters as long as none of them is known.
    """

    def __init__(self, on_event: Callable[[str], None]) -> None:
        self._on_event = on_event
        self._links: Collection[int] = ()
        self._pid = 0
        self._pidfd: Optional[int] = None
        self._loop = asyncio.get_running_loop()
        self._route = _listen(socket.NETLINK_ROUTE, _ROUTE_GROUPS)
        self._loop.add_reader(self._route, self._route_readable)
        self._firewall: Optional[socket.socket] = None
        with contextlib.suppress(OSError):  # without nf_tables in the kernel the period has to do
            self._firewall = _listen(_NETLINK_NETFILTER, _NFTABLES_GROUP)
            self._loop.add_reader(self._firewall, self._firewall_readable)

    def watch(self, links: Collection[int], pid: Optional[int]) -> None:
        """Links by index; the process whose death is an event of kind "process"."""
        self._links = links
        if (pid or 0) == self._pid:
            return
        self._forget_process()
        if pid is None:
            return
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # gone already: the check that found it has yet to say so
            self._on_event("process")
            return
        self._pid = pid
        self._loop.add_reader(self._pidfd, self._process_died)

    def _process_died(self) -> None:
        self._forget_process()
        self._on_event("process")

    def _forget_process(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._pidfd, self._pid = None, 0

    def _route_readable(self) -> None:
        for kind, payload in _receive(self._route):
            if kind < 0 or concerns(kind, payload, self._links) or (not self._links and kind in _RTM_LINK):
                self._on_event("link")

    def _firewall_readable(self) -> None:
        assert self._firewall is not None
        if is_foreign_change(_receive(self._firewall)):
            self._on_event("firewall")

    def close(self) -> None:
        self._forget_process()
        for listener in (self._route, self._firewall):
            if listener is not None:
                self._loop.remove_reader(listener)
                listener.close()


class AccountingEvents:
    """Calls, in the event loop, until closed: what accounting has to know about the kernel, each at once.

    `on_links_gone` when links are no more that begin with `prefix`; `on_addresses` when an address of the host came or
    went that is on none of those; `on_rules_gone` when rules of ours were removed, by whomever; `on_firewall` when
    others changed theirs. Whenever messages were lost, all of it may have happened.
    """

    def __init__(
        self,
        prefix: str,
        on_links_gone: Callable[[], None],
        on_addresses: Callable[[], None],
        on_rules_gone: Callable[[], None],
        on_firewall: Callable[[], None],
    ) -> None:
        self._prefix = prefix
        self._on_links_gone, self._on_addresses = on_links_gone, on_addresses
        self._on_rules_gone, self._on_firewall = on_rules_gone, on_firewall
        self._loop = asyncio.get_running_loop()
        self._route = _listen(socket.NETLINK_ROUTE, _ACCOUNTING_GROUPS)
        self._loop.add_reader(self._route, self._route_readable)
        self._firewall: Optional[socket.socket] = None
        with contextlib.suppress(OSError):
            self._firewall = _listen(_NETLINK_NETFILTER, _NFTABLES_GROUP)
            self._loop.add_reader(self._firewall, self._firewall_readable)

    def _route_readable(self) -> None:
        received = _receive(self._route)
        lost = any(kind < 0 for kind, _ in received)
        gone = (_text(payload, _LINK_HEADER, _IFLA_IFNAME) for kind, payload in received if kind == _RTM_DELLINK)
        if lost or any(name.startswith(self._prefix) for name in gone):
            self._on_links_gone()
        if lost or any(kind in _RTM_ADDRESS and not self._is_ours(payload) for kind, payload in received):
            self._on_addresses()

    def _is_ours(self, payload: bytes) -> bool:
        """Whether an address is on a job's link: a label has its name, and IPv6 addresses have none."""
        try:
            return socket.if_indextoname(struct.unpack_from("=i", payload, 4)[0]).startswith(self._prefix)
        except OSError:  # the link is gone, and its addresses with it
            return _text(payload, _ADDRESS_HEADER, _IFA_LABEL).startswith(self._prefix)

    def _firewall_readable(self) -> None:
        assert self._firewall is not None
        received = _receive(self._firewall)
        if removes_ours(received):
            self._on_rules_gone()
        if is_foreign_change(received):
            self._on_firewall()

    def close(self) -> None:
        for listener in (self._route, self._firewall):
            if listener is not None:
                self._loop.remove_reader(listener)
                listener.close()


def is_foreign_change(received: list[tuple[int, bytes]]) -> bool:
    """Whether nftables tells of a change to tables that are not ours alone (linux/netfilter/nf_tables.h).

    In each message of a transaction the attribute number 1 is the table's name; at its end stands NEWGEN.
    """
    if any(kind < 0 for kind, _ in received):
        return True
    tables = [_text(payload, _NFGENMSG, 1) for kind, payload in received if kind != _NEWGEN]
    return any(not name.startswith(OUR_TABLES) for name in tables)


def removes_ours(received: list[tuple[int, bytes]]) -> bool:
    """Whether a table, chain, rule or set of ours was removed; elements of sets come and go with the jobs."""
    return any(
        kind < 0 or (kind in _REMOVALS and _text(payload, _NFGENMSG, 1).startswith(OUR_TABLES))
        for kind, payload in received
    )


def _text(payload: bytes, header: int, wanted: int) -> str:
    """The attribute `wanted` of a message, which is text; "" if it has none (netlink(7), struct nlattr)."""
    position = header
    while position + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, position)
        if length < 4:
            break
        if kind & 0x3FFF == wanted:
            return payload[position + 4 : position + length].rstrip(b"\0").decode("utf-8", "replace")
        position += (length + 3) & ~3
    return ""


def _listen(family: int, groups: int) -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family)
    try:
        listener.bind((0, groups))
    except OSError:
        listener.close()
        raise
    return listener


def _receive(listener: socket.socket) -> list[tuple[int, bytes]]:
    """All that waits; (-1, b"") stands for messages that were lost."""
    found: list[tuple[int, bytes]] = []
    while True:
        try:
            found += messages(listener.recv(1 << 16))
        except BlockingIOError:
            return found
        except OSError:
            found.append((-1, b""))
