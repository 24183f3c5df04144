"""A DHCP client that configures nothing: it asks, and says what it was told (RFC 2131, RFC 2132).

It speaks raw Ethernet, so that it can ask as a guest whose MAC address no interface has. The broadcast flag is always
set, so that the answers reach us whatever that address is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import struct
from dataclasses import dataclass
from typing import Optional

DISCOVER, OFFER, REQUEST, ACK, NAK, RELEASE = 1, 2, 3, 5, 6, 7  # option 53
_COOKIE = b"\x63\x82\x53\x63"
_BROADCAST_MAC = b"\xff" * 6
_RETRY_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # an unanswered message is sent again after these
_ETH_P_IP = 0x0800
_LEAST_SIZE = 300  # bytes of a BOOTP message (RFC 1542, 2.1)

_ANY = ipaddress.IPv4Address("0.0.0.0")
_EVERYBODY = ipaddress.IPv4Address("255.255.255.255")


@dataclass(frozen=True)
class Answer:
    """What a server said. `lease_s` is the length of the lease in seconds."""

    kind: int
    mac: str
    address: ipaddress.IPv4Interface
    server: ipaddress.IPv4Address
    server_mac: bytes
    router: Optional[ipaddress.IPv4Address]
    lease_s: int


def message(
    kind: int,
    transaction: int,
    mac: str,
    *,
    client: ipaddress.IPv4Address = _ANY,
    wanted: Optional[ipaddress.IPv4Address] = None,
    server: Optional[ipaddress.IPv4Address] = None,
    host_name: str = "",
) -> bytes:
    """The BOOTP message with its options."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    flags = 0 if kind == RELEASE else 0x8000
    fixed = struct.pack("!4BIHH4s12s", 1, 1, 6, 0, transaction, 0, flags, client.packed, bytes(12))
    options = [(53, bytes([kind]))]
    if wanted is not None:
        options.append((50, wanted.packed))
    if server is not None:
        options.append((54, server.packed))
    if host_name:
        options.append((12, host_name.encode("ascii")))
    if kind != RELEASE:
        options.append((55, bytes([1, 3, 6, 51, 54])))  # mask, router, name servers, lease time, server
    encoded = b"".join(struct.pack("!BB", code, len(value)) + value for code, value in options)
    body = fixed + hardware.ljust(16, b"\0") + bytes(192) + _COOKIE + encoded + b"\xff"
    return body.ljust(_LEAST_SIZE, b"\0")


def frame(
    payload: bytes,
    mac: str,
    *,
    to_mac: bytes = _BROADCAST_MAC,
    source: ipaddress.IPv4Address = _ANY,
    destination: ipaddress.IPv4Address = _EVERYBODY,
) -> bytes:
    """An Ethernet frame from a client's port 68 to a server's port 67. The UDP checksum is left out (RFC 768)."""
    udp = struct.pack("!4H", 68, 67, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, source.packed, destination.packed)
    checksum = sum(struct.unpack("!10H", header))
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    checksum = ~((checksum & 0xFFFF) + (checksum >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", checksum) + header[12:]
    return to_mac + bytes.fromhex(mac.replace(":", "")) + struct.pack("!H", _ETH_P_IP) + header + udp


def parse_frame(data: bytes, transaction: int) -> Optional[Answer]:
    """The server's answer to `transaction` in this frame; None for any other or malformed frame."""
    try:
        if data[12:14] != b"\x08\x00" or data[14] >> 4 != 4 or data[23] != 17:
            return None
        start = 14 + (data[14] & 15) * 4
        if struct.unpack_from("!2H", data, start) != (67, 68):
            return None
        bootp = data[start + 8 :]
        if bootp[0] != 2 or struct.unpack_from("!I", bootp, 4)[0] != transaction or bootp[236:240] != _COOKIE:
            return None
        options = _options(bootp[240:])
        mask = ipaddress.IPv4Address(options.get(1, b"\xff\xff\xff\xff"))
        address = ipaddress.IPv4Interface(f"{ipaddress.IPv4Address(bootp[16:20])}/{mask}")
        return Answer(
            kind=options[53][0],
            mac=":".join(f"{byte:02x}" for byte in bootp[28:34]),
            address=address,
            server=ipaddress.IPv4Address(options[54]),
            server_mac=data[6:12],
            router=ipaddress.IPv4Address(options[3][:4]) if 3 in options else None,
            lease_s=struct.unpack("!I", options[51])[0] if 51 in options else 0,
        )
    except (IndexError, KeyError, ValueError, struct.error):
        return None


def _options(data: bytes) -> dict[int, bytes]:
    options: dict[int, bytes] = {}
    position = 0
    while data[position] != 0xFF:
        if data[position] == 0:
            position += 1
            continue
        length = data[position + 1]
        options[data[position]] = data[position + 2 : position + 2 + length]
        position += 2 + length
    return options


def open_socket(interface: str) -> socket.socket:
    """A raw socket on an interface of the current namespace (packet(7)); needs CAP_NET_RAW."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_IP))
    raw.bind((interface, _ETH_P_IP))
    return raw


class Client:
    """Exchanges over one raw socket, one after the other."""

    def __init__(self, raw: socket.socket, host_name: str) -> None:
        self._raw = raw
        self._host_name = host_name

    async def discover(self, mac: str, deadline_s: float) -> Optional[Answer]:
        """What a server offers; None if none does within the deadline, in seconds."""
        return await self._ask(DISCOVER, mac, deadline_s, None)

    async def request(self, offer: Answer, deadline_s: float) -> Optional[Answer]:
        """Take the offer: an Answer of kind ACK or NAK; None if there is none within the deadline, in seconds."""
        return await self._ask(REQUEST, offer.mac, deadline_s, offer)

    def release(self, lease: Answer) -> None:
        """Give a lease back. There is no answer to this message."""
        body = message(RELEASE, secrets.randbits(32), lease.mac, client=lease.address.ip, server=lease.server)
        data = frame(body, lease.mac, to_mac=lease.server_mac, source=lease.address.ip, destination=lease.server)
        with contextlib.suppress(OSError):  # the port may be gone, and the lease will expire
            self._raw.send(data)

    async def _ask(self, kind: int, mac: str, deadline_s: float, offer: Optional[Answer]) -> Optional[Answer]:
        transaction = secrets.randbits(32)
        wanted = offer.address.ip if offer else None
        server = offer.server if offer else None
        body = message(kind, transaction, mac, wanted=wanted, server=server, host_name=self._host_name)
        expected = (OFFER,) if kind == DISCOVER else (ACK, NAK)
        sender = asyncio.ensure_future(self._send_repeatedly(frame(body, mac)))
        try:
            return await asyncio.wait_for(self._receive(transaction, expected, wanted), deadline_s)
        except asyncio.TimeoutError:
            return None
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send_repeatedly(self, data: bytes) -> None:
        self._raw.send(data)
        for pause in _RETRY_S:
            await asyncio.sleep(pause)
            self._raw.send(data)

    async def _receive(
        self, transaction: int, expected: tuple[int, ...], wanted: Optional[ipaddress.IPv4Address]
    ) -> Answer:
        loop = asyncio.get_running_loop()
        while True:
            answer = parse_frame(await loop.sock_recv(self._raw, 2048), transaction)
            if answer is not None and answer.kind in expected and (answer.kind != ACK or answer.address.ip == wanted):
                return answer
            await asyncio.sleep(0)  # sock_recv waits only for an empty queue: a guest that floods us is to stop nobody
