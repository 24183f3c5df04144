"""DHCP on the wire (RFC 2131, 2132): what we send, as tcpdump reads it; what we make of what we hear."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import struct
import subprocess
import time
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnode.host.dhcp import ACK, DISCOVER, NAK, OFFER, RELEASE, REQUEST, Answer, Client, frame, message, parse_frame

MAC = "06:76:6d:12:34:05"
TRANSACTION = 0xDEADBEEF
OURS, SERVER = IPv4Address("192.168.122.17"), IPv4Address("192.168.122.1")
SERVER_MAC = bytes.fromhex("5254009c0f1e")


def tcpdump(data: bytes, directory: Path) -> str:
    """What tcpdump says about a frame; the capture file (pcap-savefile(5)) is written by hand."""
    assert shutil.which("tcpdump"), "this test needs tcpdump"
    header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)  # version 2.4, Ethernet
    capture = directory / "frame.pcap"
    capture.write_bytes(header + struct.pack("=IIII", 0, 0, len(data), len(data)) + data)
    read = subprocess.run(
        ["tcpdump", "-r", str(capture), "-e", "-n", "-vv", "-K"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return " ".join(read.stdout.split())


def test_a_discover_as_tcpdump_reads_it(tmp_path: Path) -> None:
    read = tcpdump(frame(message(DISCOVER, TRANSACTION, MAC, host_name="vmnode-probe"), MAC), tmp_path)
    for words in (
        f"{MAC} > ff:ff:ff:ff:ff:ff, ethertype IPv4 (0x0800), length 342:",  # 14 + 20 + 8 + 300
        "0.0.0.0.68 > 255.255.255.255.67",
        f"BOOTP/DHCP, Request from {MAC}, length 300, xid 0xdeadbeef, Flags [Broadcast] (0x8000)",
        f"Client-Ethernet-Address {MAC}",
        "Message (53), length 1: Discover",
        'Hostname (12), length 12: "vmnode-probe"',
        "Parameter-Request (55), length 5:",
        "Subnet-Mask (1), Default-Gateway (3), Domain-Name-Server (6), Lease-Time (51) Server-ID (54)",
    ):
        assert words in read
    assert "Client-IP" not in read and "bad" not in read


def test_a_request_as_tcpdump_reads_it(tmp_path: Path) -> None:
    read = tcpdump(frame(message(REQUEST, TRANSACTION, MAC, wanted=OURS, server=SERVER), MAC), tmp_path)
    for words in (
        "0.0.0.0.68 > 255.255.255.255.67",
        "Flags [Broadcast] (0x8000)",
        "Message (53), length 1: Request",
        "Requested-IP (50), length 4: 192.168.122.17",
        "Server-ID (54), length 4: 192.168.122.1",
    ):
        assert words in read


def test_a_release_as_tcpdump_reads_it(tmp_path: Path) -> None:
    body = message(RELEASE, TRANSACTION, MAC, client=OURS, server=SERVER)
    read = tcpdump(frame(body, MAC, to_mac=SERVER_MAC, source=OURS, destination=SERVER), tmp_path)
    for words in (
        f"{MAC} > 52:54:00:9c:0f:1e, ethertype IPv4",
        "192.168.122.17.68 > 192.168.122.1.67",
        "Flags [none] (0x0000)",
        "Client-IP 192.168.122.17",
        "Message (53), length 1: Release",
        "Server-ID (54), length 4: 192.168.122.1",
    ):
        assert words in read
    assert "Requested-IP" not in read and "Parameter-Request" not in read  # RFC 2131, table 5: MUST NOT


def test_tcpdump_would_notice_a_wrong_checksum(tmp_path: Path) -> None:
    """It does look at the IP header's checksum: the tests above mean something."""
    sent = bytearray(frame(message(DISCOVER, TRANSACTION, MAC), MAC))
    sent[24] ^= 1
    read = subprocess_with_checksums(bytes(sent), tmp_path)
    assert "bad cksum" in read
    assert "bad cksum" not in subprocess_with_checksums(frame(message(DISCOVER, TRANSACTION, MAC), MAC), tmp_path)


def subprocess_with_checksums(data: bytes, directory: Path) -> str:
    tcpdump(data, directory)
    read = subprocess.run(
        ["tcpdump", "-r", str(directory / "frame.pcap"), "-n", "-vv"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return read.stdout


def test_the_ip_header_s_checksum_is_right_for_every_address() -> None:
    for source in ("0.0.0.0", "255.255.255.254", "10.1.2.3", "192.168.122.17"):
        header = frame(b"x" * 300, MAC, source=IPv4Address(source), destination=SERVER)[14:34]
        total = sum(struct.unpack("!10H", header))
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        assert total == 0xFFFF  # RFC 1071: the sum of a right header is all ones


# --- answers ------------------------------------------------------------------------------------------------------


def reply(
    *options: bytes, kind: int = OFFER, transaction: int = TRANSACTION, op: int = 2, ports: tuple[int, int] = (67, 68)
) -> bytes:
    """A server's frame, put together by hand; the IP header carries no options and no checksum."""
    bootp = struct.pack("!4BIHH", op, 1, 6, 0, transaction, 0, 0x8000)
    bootp += bytes(4) + OURS.packed + SERVER.packed + bytes(4)  # ciaddr, yiaddr, siaddr, giaddr
    bootp += bytes.fromhex(MAC.replace(":", "")) + bytes(10) + bytes(192) + b"\x63\x82\x53\x63"
    bootp += bytes([53, 1, kind]) + b"".join(options) + b"\xff"
    udp = struct.pack("!4H", *ports, 8 + len(bootp), 0) + bootp
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + SERVER.packed + b"\xff" * 4
    return b"\xff" * 6 + SERVER_MAC + b"\x08\x00" + ip + udp


SERVER_ID = bytes([54, 4]) + SERVER.packed
MASK = bytes([1, 4, 255, 255, 255, 0])
ROUTER = bytes([3, 4]) + SERVER.packed
LEASE_TIME = bytes([51, 4]) + struct.pack("!I", 3600)


def test_an_offer() -> None:
    assert parse_frame(reply(SERVER_ID, MASK, ROUTER, LEASE_TIME), TRANSACTION) == Answer(
        kind=OFFER,
        mac=MAC,
        address=IPv4Interface("192.168.122.17/24"),
        server=SERVER,
        server_mac=SERVER_MAC,
        router=SERVER,
        lease_s=3600,
    )


def test_what_an_answer_may_leave_out() -> None:
    bare = parse_frame(reply(SERVER_ID, kind=ACK), TRANSACTION)
    assert bare is not None
    assert (bare.kind, bare.router, bare.lease_s, str(bare.address)) == (ACK, None, 0, "192.168.122.17/32")
    refused = parse_frame(reply(SERVER_ID, kind=NAK), TRANSACTION)
    assert refused is not None and refused.kind == NAK


def test_padding_between_options_and_more_than_one_router() -> None:
    routers = bytes([3, 8]) + SERVER.packed + OURS.packed
    answer = parse_frame(reply(b"\0\0\0", routers, b"\0", SERVER_ID), TRANSACTION)
    assert answer is not None and answer.router == SERVER


def test_ip_options_move_the_rest() -> None:
    plain = reply(SERVER_ID)
    longer = plain[:14] + b"\x46" + plain[15:34] + bytes(4) + plain[34:]
    assert parse_frame(longer, TRANSACTION) == parse_frame(plain, TRANSACTION) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        reply(SERVER_ID, transaction=1),
        reply(SERVER_ID, op=1),
        reply(SERVER_ID, ports=(68, 67)),
        reply(),  # no server is named
        reply(bytes([54, 3, 1, 2, 3])),
        reply(SERVER_ID, bytes([1, 4, 255, 0, 255, 0])),  # no mask
        reply(SERVER_ID)[:-1],  # no end
        reply(SERVER_ID, bytes([51, 2, 1, 1])),
        reply(SERVER_ID).replace(b"\x63\x82\x53\x63", b"\0\0\0\0"),
        reply(SERVER_ID).replace(b"\x08\x00\x45", b"\x86\xdd\x45"),
        frame(message(DISCOVER, TRANSACTION, MAC), MAC),  # our own question
    ],
)
def test_what_is_no_answer_to_us(data: bytes) -> None:
    assert parse_frame(data, TRANSACTION) is None


@given(st.binary(max_size=600))
def test_any_bytes_are_an_answer_or_none(data: bytes) -> None:
    assert parse_frame(data, TRANSACTION) is None


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_answer_is_an_answer_or_none_but_never_an_error(data: st.DataObject) -> None:
    damaged = bytearray(reply(SERVER_ID, MASK, ROUTER, LEASE_TIME))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(damaged)))
    parse_frame(bytes(damaged[:length]), TRANSACTION)


@given(st.binary(max_size=120))
def test_any_options_after_a_right_head_raise_nothing(options: bytes) -> None:
    parse_frame(reply(options), TRANSACTION)
    parse_frame(reply(SERVER_ID, options), TRANSACTION)


# --- guests that mean harm ----------------------------------------------------------------------------------------


class Bridge(socket.socket):
    """A socket on which a frame waits whenever anybody listens: `frames` make them of the question's transaction."""

    question = b""

    def send(self, data: bytes, *_: int) -> int:  # type: ignore[override]
        self.question = data
        return len(data)

    def recv(self, *_: int) -> bytes:
        transaction = struct.unpack_from("!I", self.question, 14 + 20 + 8 + 4)[0]
        return next(self.frames)(transaction)

    def __init__(self, *frames: Callable[[int], bytes]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.setblocking(False)
        self.frames = itertools.cycle(frames)


def test_a_flood_does_not_move_the_deadline() -> None:
    with Bridge(lambda transaction: reply(SERVER_ID, kind=NAK, transaction=transaction)) as raw:
        began = time.monotonic()
        assert asyncio.run(Client(raw, "").discover(MAC, 0.2)) is None
        assert time.monotonic() - began < 5


def test_an_acknowledgement_of_an_address_that_nobody_asked_for_is_none() -> None:
    offer = parse_frame(reply(SERVER_ID, MASK), TRANSACTION)
    assert offer is not None
    forged = OURS.packed, IPv4Address("192.168.122.66").packed
    with Bridge(
        lambda transaction: reply(SERVER_ID, kind=ACK, transaction=transaction).replace(*forged),
        lambda transaction: reply(SERVER_ID, MASK, kind=ACK, transaction=transaction),
    ) as raw:
        granted = asyncio.run(Client(raw, "").request(offer, 2))
    assert granted is not None and granted.address == offer.address
