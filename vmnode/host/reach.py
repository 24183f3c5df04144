"""Can a peer be reached? One DNS question over UDP, one TCP connection (RFC 1035, tcp(7))."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import secrets
import socket
import struct
from dataclasses import dataclass

from vmnode.errors import DeadlineExceeded
from vmnode.host import process

_TXT, _CHAOS = 16, 3


NO_IPV4 = "NoIPv4"  # the reason for not even trying a target


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


def tcp_socket(version: int = 4) -> socket.socket:
    """A TCP socket, for IPv4 (4) or IPv6 (6), of the namespace that this is called in."""
    return socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_STREAM)


def udp_socket() -> socket.socket:
    """A UDP socket of the namespace that this is called in."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


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


def version_question(transaction: int) -> bytes:
    """`version.bind. CH TXT`, which dnsmasq answers by itself: neither an upstream server nor /etc/hosts takes part."""
    return struct.pack("!6H", transaction, 0x0100, 1, 0, 0, 0) + b"\7version\4bind\0" + struct.pack("!2H", _TXT, _CHAOS)


def is_answer(data: bytes, transaction: int) -> bool:
    """Whether this is a name server's answer to `transaction`, whatever it says."""
    if len(data) < 12:
        return False
    seen, flags = struct.unpack_from("!2H", data)
    return bool(seen == transaction and flags & 0x8000)


async def dns(raw: socket.socket, server: ipaddress.IPv4Address, deadline_s: float) -> Reached:
    """Ask `server` one question over `raw`, a UDP socket of the wanted namespace, and close it."""
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    transaction = secrets.randbits(16)
    tries = 4
    try:
        raw.connect((str(server), 53))
        for _ in range(tries):
            await loop.sock_sendall(raw, version_question(transaction))
            try:
                data = await asyncio.wait_for(loop.sock_recv(raw, 2048), deadline_s / tries)
            except asyncio.TimeoutError:
                continue
            if is_answer(data, transaction):
                return Reached("", "answered")
        return Reached("TimedOut", f"no answer within {deadline_s:g} s")
    except OSError as error:
        return _refusal(error)
    finally:
        raw.close()


async def resolve(host: str, deadline_s: float) -> tuple[tuple[str, ...], str]:
    """The addresses of a host by the host's own resolver, and why there are none.

    A child asks (getent(1)), since getaddrinfo(3) cannot be stopped: it may try dead name servers for minutes.
    """
    with contextlib.suppress(ValueError):
        return (str(ipaddress.ip_address(host)),), ""
    try:
        finished = await process.run(["getent", "ahosts", "--", host], deadline_s, task=f"the addresses of {host}")
    except DeadlineExceeded:
        return (), f"the name did not resolve within {deadline_s:g} s"
    addresses = tuple(dict.fromkeys(line.split()[0] for line in finished.stdout.splitlines() if line.strip()))
    return addresses, "" if addresses else "the name does not resolve"
