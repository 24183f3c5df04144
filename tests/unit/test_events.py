"""What the kernel's messages say; made by hand with the layouts of linux/netlink.h and linux/rtnetlink.h."""

from __future__ import annotations

import struct
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnode.host.events import concerns, messages

RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_NEWNEIGH, RTM_NEWNETCONF = 24, 25, 28, 80
AF_INET, UP = 2, 1
OURS, FOREIGN = 7, 8


def nlmsg(kind: int, payload: bytes) -> bytes:
    """struct nlmsghdr: length, type, flags, sequence, port; padded to four bytes."""
    whole = struct.pack("=IHHII", 16 + len(payload), kind, 0, 0, 0) + payload
    return whole + bytes(-len(whole) % 4)


def ifinfomsg(index: int) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, UP, 0xFFFFFFFF)


def ifaddrmsg(index: int) -> bytes:
    return struct.pack("=BBBBi", AF_INET, 24, 0, 0, index)


def rtmsg(destination_bits: int, table: int) -> bytes:
    return struct.pack("=8BI", AF_INET, destination_bits, 0, 0, table, 3, 0, 1, 0)


def netconfmsg(index: int) -> bytes:
    return struct.pack("=B3x", AF_INET) + struct.pack("=HHi", 8, 1, index)  # attribute NETCONFA_IFINDEX comes first


@pytest.mark.parametrize(
    ("kind", "payload", "links", "ours"),
    [
        (RTM_NEWLINK, ifinfomsg(OURS), {OURS}, True),
        (RTM_DELLINK, ifinfomsg(OURS), {3, OURS}, True),
        (RTM_NEWLINK, ifinfomsg(FOREIGN), {OURS}, False),
        (RTM_NEWLINK, ifinfomsg(FOREIGN), set(), False),
        (RTM_DELADDR, ifaddrmsg(OURS), {OURS}, True),
        (RTM_NEWADDR, ifaddrmsg(FOREIGN), {OURS}, False),
        (RTM_DELROUTE, rtmsg(0, 254), {OURS}, True),  # the default route of the main table
        (RTM_NEWROUTE, rtmsg(0, 254), set(), True),
        (RTM_NEWROUTE, rtmsg(24, 254), {OURS}, False),
        (RTM_NEWROUTE, rtmsg(0, 100), {OURS}, False),  # the default route of some other table
        (RTM_NEWNETCONF, netconfmsg(-1), {OURS}, True),  # net.ipv4.ip_forward
        (RTM_NEWNETCONF, netconfmsg(OURS), {OURS}, True),
        (RTM_NEWNETCONF, netconfmsg(FOREIGN), {OURS}, False),
        (RTM_NEWNEIGH, ifinfomsg(OURS), {OURS}, False),
    ],
)
def test_which_messages_concern_us(kind: int, payload: bytes, links: Collection[int], ours: bool) -> None:
    assert concerns(kind, payload, links) is ours


def test_a_datagram_of_several_messages() -> None:
    data = nlmsg(RTM_NEWLINK, b"abcde") + nlmsg(RTM_DELADDR, b"") + nlmsg(2575, b"xy")
    assert messages(data) == [(RTM_NEWLINK, b"abcde"), (RTM_DELADDR, b""), (2575, b"xy")]


def test_what_was_cut_off_is_left_out() -> None:
    data = nlmsg(RTM_NEWLINK, ifinfomsg(OURS)) + nlmsg(RTM_NEWLINK, ifinfomsg(FOREIGN))
    for length in range(32, len(data)):
        assert messages(data[:length]) == [(RTM_NEWLINK, ifinfomsg(OURS))]
    assert messages(b"") == []


@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(data: bytes) -> None:
    for kind, payload in messages(data):
        assert 0 <= kind < 1 << 16 and len(payload) <= len(data)
