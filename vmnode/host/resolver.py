"""Name service in a job's network namespace where the host's resolver listens on the loopback only.

The job sees the host's /etc/resolv.conf, and 127.0.0.53 there (systemd-resolved; 127.0.0.1: dnsmasq, unbound) is in its
own namespace an address where nobody listens. The host's resolver would not take its questions from elsewhere either:
systemd-resolved binds its socket to the interface lo. So, step by step:

    job's namespace   a route to 127.0.0.53 that leaves by eth0, for the gateway; from the job's own address, so that
                      nothing has to be translated here; a job without capabilities cannot change it (see `lead`)
    host, prerouting  one rule for all jobs: to 127.0.0.0/8, port 53, from a job's link -> the relay (see `nft_rule`)
    host              the relay, on the gateway's address, asks the resolver on the loopback

The host's links to the jobs do not route the loopback (route_localnet): a job reaches nothing of it but this.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from typing import Any, NamedTuple, Optional

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


def iptables_rules(links: str, relay: IPv4Address, port: int) -> list[list[str]]:
    """The same for PREROUTING of iptables' table nat, as the words after "-A PREROUTING"."""
    to = f"{relay}:{port}"
    match = ["-i", f"{links}+", "-d", "127.0.0.0/8", "--dport", str(PORT)]
    return [["-p", protocol, *match, "-j", "DNAT", "--to-destination", to] for protocol in ("udp", "tcp")]


# --- the relay ----------------------------------------------------------------------------------------------------

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
        writer.transport.set_write_buffer_limits(
            0
        )  # drained is empty then: who does not read waits within the deadline
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
