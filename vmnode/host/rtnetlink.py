"""Requests to the kernel's networking in their plainest form (netlink(7), rtnetlink(7)): a few bytes, one answer each.

For what a full library is too slow or too old for; links.py does the rest.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

GETLINK, SETLINK, NEWROUTE, NEWRULE, DELRULE, GETNSID = 18, 19, 24, 32, 33, 90  # linux/rtnetlink.h
CREATE, REPLACE = 0x400, 0x100
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_DUMP_INTR = 0x10
_TRIES = 3


def connect() -> socket.socket:
    """A socket to the kernel, in the network namespace of the calling thread."""
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    link.settimeout(5.0)  # the kernel answers at once, or never
    return link


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data.ljust((len(data) + 3) & ~3, b"\0")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (kind, value) pairs; what was cut off is left out."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def execute(link: socket.socket, requests: Sequence[tuple[int, int, bytes]]) -> None:
    """Have all of (kind, flags, payload) done, in one call. Raises the first OSError; the others are tried as well."""
    data = b"".join(
        _message(kind, flags | _ACK, number, payload) for number, (kind, flags, payload) in _numbered(requests)
    )
    link.send(data)
    waiting = len(requests)
    first = 0
    while waiting:
        for kind, _, payload in _receive(link):
            if kind == _ERROR:
                waiting -= 1
                first = first or -struct.unpack_from("=i", payload)[0]
    if first:
        raise OSError(first, os.strerror(first))


def ask(link: socket.socket, kind: int, payload: bytes) -> bytes:
    """The payload of the one answer. Raises OSError."""
    link.send(_message(kind, 0, 1, payload))
    for answer, _, data in _receive(link):
        if answer != _ERROR:
            return data
        code = -struct.unpack_from("=i", data)[0]
        raise OSError(code, os.strerror(code))
    raise OSError(0, "no answer")


def dump(link: socket.socket, kind: int, payload: bytes) -> list[bytes]:
    """The payloads of all answers; asked again if something changed while the kernel told. Raises OSError."""
    for _ in range(_TRIES):
        link.send(_message(kind, _DUMP, 1, payload))
        found: list[bytes] = []
        whole, done = True, False
        while not done:
            for answer, flags, data in _receive(link):
                whole = whole and not flags & _DUMP_INTR
                if answer == _ERROR:
                    code = -struct.unpack_from("=i", data)[0]
                    raise OSError(code, os.strerror(code))
                done = done or answer == _DONE
                if answer != _DONE:
                    found.append(data)
        if whole:
            return found
    raise InterruptedError("the list changed while it was read")


def _numbered(requests: Sequence[tuple[int, int, bytes]]) -> Iterable[tuple[int, tuple[int, int, bytes]]]:
    return enumerate(requests, 1)


def _message(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    length = 16 + len(payload)
    return struct.pack("=IHHII", length, kind, flags | _REQUEST, number, 0) + payload.ljust(
        (len(payload) + 3) & ~3, b"\0"
    )


def _receive(link: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """The (kind, flags, payload) of one datagram."""
    data = link.recv(1 << 17)
    while len(data) >= 16:
        length, kind, flags = struct.unpack_from("=IHH", data)
        if not 16 <= length <= len(data):
            return
        yield kind, flags, data[16:length]
        data = data[(length + 3) & ~3 :]
