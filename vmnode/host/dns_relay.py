"""Hands the jobs' questions to the host's resolver on its loopback, and the answers back (see resolver.py)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Optional

from vmnode.errors import VmnodeError
from vmnode.host.resolver import PORT

_IP_FREEBIND = 15  # linux/in.h: the gateway's address is there only as long as there is a job
_SO_RCVBUFFORCE, _ROOM = 33, 1 << 20  # asm-generic/socket.h; a job that floods it is not to fill it at once
_MOST_QUESTIONS, _MOST_CONNECTIONS = 512, 128  # at a time
_EACH_QUESTIONS, _EACH_CONNECTIONS = 64, 16  # of one job
_QUESTION_S = 5.0  # the C library asks again after five seconds (resolv.conf(5), RES_TIMEOUT)
_IDLE_S, _CONNECTION_S = 10.0, 60.0
_BATCH = 64  # datagrams that are taken before others get their turn
_HEADER = 12  # bytes (RFC 1035, 4.1.1)
_LARGEST = 1 << 16


class Relay:
    """Hands the jobs' questions to the host's resolver, and its answers back: what they say is not looked at.

    Answers nobody but `clients`, the jobs' pool. Not open until `open` was called; `port` is known from then on.
    """

    def __init__(self, address: IPv4Address, clients: IPv4Network, servers: Sequence[IPv4Address]) -> None:
        self.servers = servers  # may be replaced at any time
        self.port = 0
        self._address = str(address)
        self._clients = clients
        self._datagrams: Optional[socket.socket] = None
        self._listener: Optional[asyncio.AbstractServer] = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()

    async def open(self) -> None:
        """On port 53, or on any other if something else has that: the rule leads there. Raises VmnodeError."""
        try:
            datagrams, listener = _bind(self._address)
        except OSError as error:
            raise VmnodeError(f"the relay for the jobs' DNS cannot listen on {self._address}: {error}") from None
        self.port = datagrams.getsockname()[1]
        self._datagrams = datagrams
        asyncio.get_running_loop().add_reader(datagrams, self._readable, datagrams)
        self._listener = await asyncio.start_server(self._connected, sock=listener)

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._datagrams is not None:
            asyncio.get_running_loop().remove_reader(self._datagrams)
            self._datagrams.close()
            self._datagrams = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_client(self, host: str) -> bool:
        return IPv4Address(host) in self._clients

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- UDP

    def _readable(self, datagrams: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                question, client = datagrams.recvfrom(_LARGEST)
            except OSError:  # nothing more, or an error of what was sent before
                return
            host = client[0]
            full = sum(self._questions.values()) >= _MOST_QUESTIONS or self._questions[host] >= _EACH_QUESTIONS
            if full or not is_question(question) or not self._is_client(host):
                continue  # who means it asks again
            self._questions[host] += 1
            self._start(self._answer(question, client))

    async def _answer(self, question: bytes, client: tuple[str, int]) -> None:
        try:
            for server in self.servers:
                answer = await _ask(question, server, _QUESTION_S / len(self.servers))
                if answer is None:
                    continue
                if self._datagrams is not None:
                    with contextlib.suppress(OSError):  # the job may have ended
                        self._datagrams.sendto(answer, client)
                return
        finally:
            _less(self._questions, client[0])

    # --- TCP

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = writer.get_extra_info("peername")[0]
        full = sum(self._connections.values()) >= _MOST_CONNECTIONS
        if not self._is_client(host) or full or self._connections[host] >= _EACH_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections[host] += 1
        self._start(self._serve(reader, writer, host))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._connect_through(reader, writer), _CONNECTION_S)
        finally:
            writer.transport.abort()  # of a whole answer nothing is left in it: see below
            _less(self._connections, host)

    async def _connect_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # "drained" means empty: who does not read meets the deadline
        async with _upstream(self.servers) as (answers, questions):
            forth = asyncio.ensure_future(_copy(reader, questions))
            try:
                await _copy(answers, writer)
            finally:
                forth.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError, asyncio.TimeoutError):
                    await forth


def is_question(data: bytes) -> bool:
    """Whether this may be one: an answer to it is no question, so that two relays cannot talk for ever."""
    return len(data) >= _HEADER and not data[2] & 0x80


def is_answer_to(question: bytes, data: bytes) -> bool:
    return len(data) >= _HEADER and data[:2] == question[:2] and bool(data[2] & 0x80)


async def _ask(question: bytes, server: IPv4Address, deadline_s: float) -> Optional[bytes]:
    """The answer; None if there is none in time. By a socket of its own: its port is a secret of this question."""
    loop = asyncio.get_running_loop()

    async def receive(upstream: socket.socket) -> bytes:
        while True:
            data = await loop.sock_recv(upstream, _LARGEST)
            if is_answer_to(question, data):
                return data
            await asyncio.sleep(0)

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as upstream:
            upstream.connect((str(server), PORT))
            upstream.send(question)
            return await asyncio.wait_for(receive(upstream), deadline_s)
    except (OSError, asyncio.TimeoutError):
        return None


@contextlib.asynccontextmanager
async def _upstream(
    servers: Sequence[IPv4Address],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the first server that takes one. Raises OSError."""
    for server in servers:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(str(server), PORT), _QUESTION_S)
        except (OSError, asyncio.TimeoutError):
            continue
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
        return
    raise ConnectionRefusedError(errno.ECONNREFUSED, "no name server takes a connection")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the end, which is passed on. Raises OSError, TimeoutError."""
    while True:
        chunk = await asyncio.wait_for(reader.read(_LARGEST), _IDLE_S)
        if not chunk:
            writer.write_eof()
            return
        writer.write(chunk)
        await asyncio.wait_for(writer.drain(), _IDLE_S)


def _less(counts: Counter[str], host: str) -> None:
    counts[host] -= 1
    if not counts[host]:
        del counts[host]


def _bind(address: str) -> tuple[socket.socket, socket.socket]:
    """One port for both protocols: 53, or any. Raises OSError."""
    for port in (PORT, 0, 0, 0):
        with contextlib.ExitStack() as opened:
            listener = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            datagrams = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last instance
            with contextlib.suppress(PermissionError):
                datagrams.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
            for each in (listener, datagrams):
                each.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            try:
                listener.bind((address, port))
                datagrams.bind((address, listener.getsockname()[1]))
                listener.listen(_MOST_CONNECTIONS)
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # EACCES: without CAP_NET_BIND_SERVICE
                    raise
                continue
            opened.pop_all()
            return datagrams, listener
    raise OSError(errno.EADDRINUSE, "no port is free for both UDP and TCP")
