"""Can a peer be reached? One DNS question over UDP, one TCP connection (RFC 1035, tcp(7))."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import secrets
import socket
import struct
from dataclasses import dataclass

_PTR, _IN = 12, 1
RCODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


@dataclass(frozen=True)
class Reached:
    """How an attempt ended: `reason` is "" on success, else a CamelCase word; `detail` is for a person."""

    reason: str
    detail: str


_REASONS = {
    errno.ECONNREFUSED: "Refused",
    errno.ENETUNREACH: "NoRoute",
    errno.EHOSTUNREACH: "Unreachable",
    errno.EACCES: "Prohibited",
    errno.EPERM: "Prohibited",
    errno.ETIMEDOUT: "TimedOut",
}


def _refusal(error: OSError) -> Reached:
    return Reached(_REASONS.get(error.errno or 0, "NetworkError"), os.strerror(error.errno or 0).lower())


async def tcp(raw: socket.socket, address: str, port: int, deadline_s: float) -> Reached:
    """Connect `raw`, a TCP socket of the wanted namespace, within `deadline_s` seconds, and close it."""
    raw.setblocking(False)
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(raw, (address, port)), deadline_s)
        return Reached("", "connected")
    except asyncio.TimeoutError:
        return Reached("TimedOut", f"no answer within {deadline_s:g} s")
    except OSError as error:
        return _refusal(error)
    finally:
        raw.close()


def reverse_question(transaction: int, address: ipaddress.IPv4Address) -> bytes:
    labels = address.reverse_pointer.encode("ascii").split(b".")
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack("!6H", transaction, 0x0100, 1, 0, 0, 0) + name + struct.pack("!2H", _PTR, _IN)


def parse_rcode(data: bytes, transaction: int) -> str:
    """The response code in an answer to `transaction`; "" for anything else."""
    if len(data) < 12:
        return ""
    seen, flags = struct.unpack_from("!2H", data)
    if seen != transaction or not flags & 0x8000:
        return ""
    return RCODES.get(flags & 15, f"RCODE{flags & 15}")


async def dns(
    raw: socket.socket, server: ipaddress.IPv4Address, about: ipaddress.IPv4Address, deadline_s: float
) -> Reached:
    """Ask `server` for the name of `about` over `raw`, a UDP socket of the wanted namespace, and close it.

    The question is about a leased address, which dnsmasq answers by itself: an upstream server takes no part.
    """
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    transaction = secrets.randbits(16)
    tries = 4
    try:
        raw.connect((str(server), 53))
        for _ in range(tries):
            await loop.sock_sendall(raw, reverse_question(transaction, about))
            try:
                rcode = parse_rcode(await asyncio.wait_for(loop.sock_recv(raw, 2048), deadline_s / tries), transaction)
            except asyncio.TimeoutError:
                continue
            if rcode in ("NOERROR", "NXDOMAIN"):
                return Reached("", rcode)
            if rcode:
                return Reached("Refused" if rcode == "REFUSED" else "ServerError", f"the answer is {rcode}")
        return Reached("TimedOut", f"no answer within {deadline_s:g} s")
    except OSError as error:
        return _refusal(error)
    finally:
        raw.close()


async def resolve(host: str, deadline_s: float) -> tuple[tuple[str, ...], str]:
    """The addresses of a host by the host's own resolver, and why there are none."""
    loop = asyncio.get_running_loop()
    try:
        found = await asyncio.wait_for(loop.getaddrinfo(host, None, type=socket.SOCK_STREAM), deadline_s)
    except asyncio.TimeoutError:
        return (), f"the name did not resolve within {deadline_s:g} s"
    except OSError as error:
        return (), f"the name does not resolve: {error.strerror}"
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), ""
