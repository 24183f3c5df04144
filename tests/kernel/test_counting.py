"""What is counted of jobs' traffic, by each backend, on real links: to the byte."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import pytest

from tests.kernel.crossroads import HOST, LAN, RULES, WAN, Crossroads, Job, Witness, crossroads, job
from tests.kernel.world import script, tool
from vmnode.host.counting import Counters, Link, Rules
from vmnode.host.iptables import LONGEST_TAG, IptablesCounters, obstacle
from vmnode.host.nftables import NftablesCounters
from vmnode.usage import NONE, Traffic, Usage, minus

T = TypeVar("T")
LEGACY = Path("/usr/sbin/xtables-legacy-multi")


class Backend(NamedTuple):
    name: str
    make: Callable[[str], Counters]


BACKENDS = {
    "nftables": Backend("nftables", NftablesCounters),
    "iptables-nft": Backend("iptables", IptablesCounters),
    "iptables-legacy": Backend("iptables", IptablesCounters),
}


def marked(name: str, *others: str) -> Any:
    """A parameter; Debian 11's nft has another syntax for sets with counters, too."""
    return pytest.param(name, *others, marks=[pytest.mark.nft_owner] if name == "nftables" else [])


@pytest.fixture(params=map(marked, BACKENDS))
def backend(own_world: None, request: pytest.FixtureRequest) -> Backend:
    if request.param == "iptables-legacy":
        if not LEGACY.exists():
            pytest.skip("there is no iptables-legacy")
        tool("mount", "--bind", str(LEGACY), "/usr/sbin/xtables-nft-multi")  # for this test's mount namespace
        assert "legacy" in tool("iptables", "-V")
    return BACKENDS[request.param]


@pytest.fixture
def counters(backend: Backend) -> Iterator[Counters]:
    counters = backend.make(RULES.tag)
    yield counters
    do(counters.tear_down())
    assert ours() == []


@pytest.fixture
def roads(own_world: None) -> Iterator[Crossroads]:
    with crossroads() as roads:
        yield roads


def do(awaitable: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(awaitable)


def reading(counters: Counters) -> dict[str, Usage]:
    found = do(counters.read())
    assert found is not None
    return dict(found)


def ruleset() -> list[str]:
    """All rules, chains and sets of this network namespace, as the tools tell of them, without counts."""
    found = tool("nft", "list", "ruleset").splitlines() if "legacy" not in tool("iptables", "-V") else []
    for command in ("iptables", "ip6tables"):
        for table in ("raw", "mangle", "nat", "filter"):
            found += tool(f"{command}-save", "-t", table).splitlines()
    found += [" ".join(line.split()[:3]) for line in tool("ipset", "save").splitlines()]
    return [line for line in found if not line.startswith(("#", ":PREROUTING", ":OUTPUT", ":POSTROUTING", ":INPUT"))]


def ours(word: str = "vmn") -> list[str]:
    return [line for line in ruleset() if word in line]


# --- traffic ----------------------------------------------------------------------------------------------------------

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
Place = Callable[[Callable[[], Any]], Any]


def here(function: Callable[[], T]) -> T:
    """On the host itself."""
    return function()


def version(address: str) -> int:
    return 6 if ":" in address else 4


def make_socket(place: Place, address: str, kind: int, port: int = 0) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(FAMILY[version(address)], kind)
        made.settimeout(10)
        if kind == socket.SOCK_DGRAM and version(address) == 4:
            # Fragments for what is larger than the MTU, as in IPv6: IP_MTU_DISCOVER, IP_PMTUDISC_DONT (linux/in.h).
            made.setsockopt(socket.IPPROTO_IP, 10, 0)
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    made: socket.socket = place(make)
    return made


def udp(near: Place, source: str, far: Place, destination: str, sizes: Sequence[int]) -> None:
    """Datagrams of these sizes, and an answer to each that is as large."""
    server, client = make_socket(far, destination, socket.SOCK_DGRAM), make_socket(near, source, socket.SOCK_DGRAM)
    with closing(server), closing(client):
        client.connect(server.getsockname())
        for size in sizes:
            client.send(b"x" * size)
            data, sender = server.recvfrom(1 << 16)
            assert len(data) == size
            server.sendto(data, sender)
            assert len(client.recv(1 << 16)) == size


def tcp(near: Place, source: str, far: Place, destination: str, sent: int, answered: int) -> None:
    """A connection that carries so many bytes there and so many back."""
    with closing(make_socket(far, destination, socket.SOCK_STREAM)) as listener:
        address = listener.getsockname()

        def serve() -> None:
            connection, _ = listener.accept()
            with closing(connection):
                connection.settimeout(10)
                assert swallow(connection) == sent
                connection.sendall(bytes(answered))

        server = threading.Thread(target=serve)
        server.start()
        with closing(near(lambda: socket.create_connection(address[:2], 10, (source, 0)))) as client:
            client.sendall(bytes(sent))
            client.shutdown(socket.SHUT_WR)
            assert swallow(client) == answered
        server.join()


def swallow(connection: socket.socket) -> int:
    total = 0
    while True:
        data = connection.recv(1 << 16)
        if not data:
            return total
        total += len(data)


def ping(near: Place, source: str, destination: str, size: int) -> None:
    """An echo request with `size` bytes of data, and its reply."""
    four = version(destination) == 4
    protocol = socket.IPPROTO_ICMP if four else socket.IPPROTO_ICMPV6
    kind, answer = (8, 0) if four else (128, 129)
    message = struct.pack("!BBHHH", kind, 0, 0, 7, 1) + bytes(size)
    if four:
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]  # IPv6: the kernel's
    with closing(near(lambda: socket.socket(FAMILY[version(destination)], socket.SOCK_RAW, protocol))) as raw:
        raw.settimeout(10)
        raw.bind((source, 0))
        raw.sendto(message, (destination, 0))
        while True:
            data = raw.recv(1 << 16)[20 if four else 0 :]
            if data[0] == answer and len(data) == len(message):
                return


def checksum(message: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(message) // 2}H", message))
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("place", ["lan", "wan", "host"])
def test_a_datagram_and_its_answer_count_as_their_size_says(
    counters: Counters, roads: Crossroads, family: int, place: str
) -> None:
    index = 0 if family == 4 else 1
    far = {"lan": LAN, "wan": WAN, "host": HOST}[place][index]
    run = {"lan": roads.lan.run, "wan": roads.wan.run, "host": here}[place]
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        udp(one.namespace.run, one.address(family), run, far, [0, 1, 1000])
        headers = {4: 20, 6: 40}[family] + 8
        each = Traffic(1001 + 3 * headers, 3)
        if place == "wan":
            assert reading(counters) == {one.name: Usage(wan_in=each, wan_out=each)}
        else:
            assert reading(counters) == {one.name: Usage(lan_in=each, lan_out=each)}


def test_fragments_count_as_the_datagram_that_they_are(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, Witness(one.name) as witness:
        do(counters.add([one.link]))
        udp(one.namespace.run, one.address(4), roads.wan.run, WAN[0], [4000])
        udp(one.namespace.run, one.address(6), roads.wan.run, WAN[1], [4000, 60000])
        udp(one.namespace.run, one.address(4), here, HOST[0], [4000])
        wan, lan = Traffic(4028 + 4048 + 60048, 3), Traffic(4028, 1)
        assert witness.usage == Usage(lan_in=lan, lan_out=lan, wan_in=wan, wan_out=wan)
        assert reading(counters) == {one.name: witness.usage}


def test_all_that_crosses_a_job_s_link_is_counted_to_the_byte(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as other, Witness(one.name) as witness, Witness(other.name) as second:
        do(counters.add([one.link, other.link]))
        inside = one.namespace.run
        for index, family in enumerate((4, 6)):
            own = one.address(family)
            for run, far in ((roads.lan.run, LAN[index]), (roads.wan.run, WAN[index]), (here, HOST[index])):
                tcp(inside, own, run, far, 3_000_000, 10)
                tcp(inside, own, run, far, 10, 3_000_000)
                for _ in range(20):
                    tcp(inside, own, run, far, 0, 1)
                udp(inside, own, run, far, [0, 1, 1400, 1472, 9000])
                ping(inside, own, far, 56)
            # The host begins; a job talks to another; nobody listens.
            tcp(here, HOST[index], inside, own, 100_000, 100_000)
            tcp(other.namespace.run, other.address(family), inside, own, 200_000, 5)
            for far in (LAN[index], WAN[index], HOST[index]):
                with pytest.raises(ConnectionRefusedError):
                    inside(partial(socket.create_connection, (far, 9), 5))
        assert reading_when_quiet(counters, witness, second) == {one.name: witness.usage, other.name: second.usage}
        assert min(traffic.bytes for traffic in witness.usage) > 6_000_000
        assert second.usage.wan_in == second.usage.wan_out == Traffic()


def reading_when_quiet(counters: Counters, *witnesses: Witness) -> dict[str, Usage]:
    for witness in witnesses:
        assert witness.usage
    return reading(counters)


def test_what_is_lost_beyond_the_host_was_sent_all_the_same(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, Witness(one.name) as witness:
        do(counters.add([one.link]))
        with closing(make_socket(one.namespace.run, one.address(4), socket.SOCK_DGRAM)) as client:
            for _ in range(3):
                client.sendto(b"x" * 72, ("203.0.113.1", 9))  # no route: the host answers for it
        used = witness.usage
        answers = used.lan_in.packets  # the kernel limits their rate
        assert used == Usage(lan_in=Traffic(answers * (20 + 8 + 100), answers), wan_out=Traffic(3 * 100, 3))
        assert reading(counters) == {one.name: used}


def test_a_job_cannot_send_uncounted_under_another_address(counters: Counters, roads: Crossroads) -> None:
    """IPV6_FREEBIND lets an ordinary user take any source address (ipv6(7), net/ipv6/ip6_output.c)."""
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as other, ExitStack() as sockets:
        do(counters.add([one.link, other.link]))
        server = sockets.enter_context(closing(make_socket(roads.wan.run, WAN[1], socket.SOCK_DGRAM)))

        def send_from(source: str) -> None:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
                client.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
                client.bind((source, 0))
                client.sendto(b"x" * 52, server.getsockname())

        one.namespace.run(partial(send_from, one.address(6)))
        assert len(server.recv(100)) == 52
        for source in ("2001:db8:bad::1", other.address(6)):
            one.namespace.run(partial(send_from, source))
        arrived = 1
        server.settimeout(0.5)
        with pytest.raises(socket.timeout):
            while server.recv(100):
                arrived += 1
        found = reading(counters)
        assert found[other.name].wan_out == Traffic()
        assert arrived == 1  # an answer would be counted as the other job's
        assert found[one.name].wan_out.packets >= arrived
        assert found[one.name].wan_out.bytes == 100 * found[one.name].wan_out.packets


def test_rules_of_others_do_not_end_the_way_to_ours(counters: Counters, roads: Crossroads) -> None:
    for command in ("iptables", "ip6tables"):
        tool(command, "-t", "raw", "-A", "PREROUTING", "-j", "ACCEPT")
        tool(command, "-t", "mangle", "-A", "POSTROUTING", "-j", "ACCEPT")
        tool(
            command, "-t", "nat", "-A", "POSTROUTING", "-d", "203.0.113.0/24" if command == "iptables" else "fd99::/16"
        )
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        udp(one.namespace.run, one.address(4), roads.wan.run, WAN[0], [100])
        each = Traffic(128, 1)
        assert reading(counters) == {one.name: Usage(wan_in=each, wan_out=each)}


def test_only_jobs_are_counted(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as unknown:
        do(counters.add([one.link]))
        udp(here, HOST[0], roads.lan.run, LAN[0], [100])
        udp(unknown.namespace.run, unknown.address(4), roads.wan.run, WAN[0], [100])
        udp(unknown.namespace.run, unknown.address(6), roads.wan.run, WAN[1], [100])
        assert reading(counters) == {one.name: NONE}


# --- add, remove, set up ----------------------------------------------------------------------------------------------


def send(one: Job, roads: Crossroads) -> Usage:
    """100 bytes each way to the WAN; what that is."""
    udp(one.namespace.run, one.address(4), roads.wan.run, WAN[0], [100])
    return Usage(wan_in=Traffic(128, 1), wan_out=Traffic(128, 1))


def twice(usage: Usage) -> Usage:
    return Usage(*(Traffic(2 * each.bytes, 2 * each.packets) for each in usage))


def test_adding_again_keeps_the_counts(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as other:
        do(counters.add([one.link]))
        sent = send(one, roads)
        do(counters.add([one.link, other.link]))
        assert reading(counters) == {one.name: sent, other.name: NONE}


def test_who_is_removed_is_forgotten_and_begins_at_zero(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as other:
        do(counters.add([one.link, other.link]))
        sent = send(other, roads)
        send(one, roads)
        do(counters.remove([one.link]))
        do(counters.remove([one.link, Link("vmnjcafe99", RULES.pool4[99], None)]))
        send(one, roads)
        assert reading(counters) == {other.name: sent}
        do(counters.add([one.link]))
        assert reading(counters) == {one.name: NONE, other.name: sent}


def test_who_comes_in_the_place_of_another_begins_at_zero(counters: Counters, roads: Crossroads) -> None:
    """The kernel may give an element the memory, and the counts, of one that was deleted."""
    links = [Link(f"{RULES.links}{n:x}", RULES.pool4[n], None) for n in range(3000, 7000)]
    do(counters.set_up(RULES))
    with job(2) as one:
        before = [one.link._replace(address6=None), *links]
        do(counters.add(before))
        sent = send(one, roads)
        for _ in range(3):
            do(counters.remove([before[0], *links[::2]]))
            do(counters.add([before[0], *links[::2]]))
            assert reading(counters)[one.name] == NONE
            assert send(one, roads) == sent == reading(counters)[one.name]


def test_a_link_is_removed_by_its_name(backend: Backend, counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one, job(3) as other:
        do(counters.add([one.link, other.link]))
        sent = send(other, roads)
        restarted = backend.make(RULES.tag)
        do(restarted.set_up(RULES))
        do(restarted.remove([Link(one.name, RULES.pool4[0], None)]))
        assert reading(restarted) == {other.name: sent}


def test_changes_while_the_counts_are_read(counters: Counters, roads: Crossroads) -> None:
    links = [Link(f"{RULES.links}{n:x}", RULES.pool4[n], None) for n in range(3000, 3040)]

    async def run() -> None:
        await asyncio.gather(*(counters.read() for _ in range(5)), *(counters.add([link]) for link in links))
        await asyncio.gather(*(counters.read() for _ in range(5)), *(counters.remove([link]) for link in links[::2]))
        await asyncio.gather(*(counters.read() for _ in range(5)), counters.add([one.link]))

    do(counters.set_up(RULES))
    with job(2) as one:
        do(run())
        sent = send(one, roads)
        do(counters.add([one.link, *links]))
        assert reading(counters) == {**{link.name: NONE for link in links}, one.name: sent}


def test_jobs_that_come_and_go_do_not_disturb_the_counts_of_others(counters: Counters, roads: Crossroads) -> None:
    links = [Link(f"{RULES.links}{n:x}", RULES.pool4[n], None) for n in range(3000, 5000)]
    do(counters.set_up(RULES))
    with job(2) as one, Witness(one.name) as witness:
        do(counters.add([one.link]))
        done = threading.Event()

        def flood() -> None:
            with closing(make_socket(one.namespace.run, one.address(4), socket.SOCK_DGRAM)) as client:
                while not done.is_set():
                    client.sendto(b"x" * 72, (LAN[0], 9))

        sender = threading.Thread(target=flood)
        sender.start()
        for start in range(0, len(links), 100):
            do(counters.add(links[start : start + 100]))
            do(counters.remove(links[start : start + 50]))
        done.set()
        sender.join()
        assert witness.usage.lan_out.packets > 10_000
        assert reading(counters)[one.name] == witness.usage


def test_nobody_is_added_or_removed_without_error(counters: Counters) -> None:
    do(counters.set_up(RULES))
    do(counters.add([]))
    do(counters.remove([]))
    assert reading(counters) == {}


def test_a_job_without_ipv6_is_counted(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES._replace(pool6=None)))
    with job(2) as one:
        do(counters.add([one.link._replace(address6=None)]))
        assert reading(counters) == {one.name: NONE}
        sent = send(one, roads)
        assert reading(counters) == {one.name: sent}
        do(counters.set_up(RULES))
        do(counters.set_up(RULES._replace(pool6=None)))
        assert reading(counters) == {one.name: sent}


def test_setting_up_again_keeps_the_counts_and_changes_nothing(
    backend: Backend, counters: Counters, roads: Crossroads
) -> None:
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        sent = send(one, roads)
        before = ruleset()
        do(counters.set_up(RULES))
        assert sorted(without_counts(ruleset())) == sorted(without_counts(before))
        restarted = backend.make(RULES.tag)
        do(restarted.set_up(RULES))
        assert sorted(without_counts(ruleset())) == sorted(without_counts(before))
        assert reading(restarted) == {one.name: sent}
        send(one, roads)
        assert reading(restarted) == {one.name: twice(sent)}


def without_counts(lines: Sequence[str]) -> list[str]:
    """nft's listing has the jobs' counts on the lines of elements."""
    return [line for line in lines if "packets" not in line]


def test_another_lan_counts_from_now_on(counters: Counters, roads: Crossroads) -> None:
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        first = send(one, roads)
        do(counters.set_up(RULES._replace(lan4=(IPv4Network("198.51.100.0/24"),))))
        send(one, roads)
        expected = first._replace(lan_in=first.wan_in, lan_out=first.wan_out)
        assert reading(counters) == {one.name: expected}


@pytest.mark.parametrize(
    ("lan4", "is_lan"),
    [
        ((), False),
        (("0.0.0.0/0",), True),
        (("0.0.0.0/0", "198.51.100.2/32", "198.0.0.0/8"), True),
        (("198.51.100.2/32", "198.51.100.0/24", "198.51.100.2/32"), True),
        (("198.51.100.0/31", "198.51.100.3/32", "198.51.100.4/30"), False),
        (("198.51.100.0/31", "198.51.100.2/31"), True),
    ],
)
def test_lan_prefixes_may_overlap_touch_and_be_none(
    counters: Counters, roads: Crossroads, lan4: Sequence[str], is_lan: bool
) -> None:
    do(counters.set_up(RULES._replace(lan4=tuple(map(IPv4Network, lan4)), lan6=(IPv6Network("::/0"),))))
    with job(2) as one:
        do(counters.add([one.link]))
        sent = send(one, roads)
        expected = Usage(lan_in=sent.wan_in, lan_out=sent.wan_out) if is_lan else sent
        assert reading(counters) == {one.name: expected}
        udp(one.namespace.run, one.address(6), roads.wan.run, WAN[1], [100])
        six = minus(reading(counters)[one.name], expected)
        assert six == Usage(lan_in=Traffic(148, 1), lan_out=Traffic(148, 1))


def test_the_longest_names(backend: Backend, roads: Crossroads) -> None:
    counters = backend.make("x" * LONGEST_TAG)
    do(counters.set_up(RULES._replace(tag="x" * LONGEST_TAG)))
    try:
        with job(2, "vmnjcafezzzzzzz") as one:  # 15 characters, of which a link's name has no more
            do(counters.add([one.link]))
            sent = send(one, roads)
            assert reading(counters) == {one.name: sent}
    finally:
        do(counters.tear_down())
    assert ours() == []


def test_two_instances_do_not_meet(backend: Backend, counters: Counters, roads: Crossroads) -> None:
    other = backend.make("cafe0")
    do(counters.set_up(RULES))
    do(other.set_up(RULES._replace(tag="cafe0", links="vmnjdead", pool4=IPv4Network("100.65.0.0/16"))))
    with job(2) as one:
        do(counters.add([one.link]))
        sent = send(one, roads)
        assert reading(other) == {}
        do(other.tear_down())
        do(other.tear_down())
        assert reading(counters) == {one.name: sent}


# --- a thousand -------------------------------------------------------------------------------------------------------


def test_a_thousand_jobs_are_read_at_once(counters: Counters, roads: Crossroads) -> None:
    assert RULES.pool6 is not None
    links = [Link(f"{RULES.links}{n:x}", RULES.pool4[n], RULES.pool6[n]) for n in range(1000, 2000)]
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([*links, one.link]))
        sent = send(one, roads)
        started = time.monotonic()
        found = reading(counters)
        assert time.monotonic() - started < 2.0
        assert found == {**{link.name: NONE for link in links}, one.name: sent}
        do(counters.remove(links))
        assert reading(counters) == {one.name: sent}


# --- others on the same host ------------------------------------------------------------------------------------------

FLUSHES = {
    "nftables": [
        "nft flush ruleset",
        "nft flush table inet vmnodecafe",
        "nft delete chain inet vmnodecafe in",
        "nft flush set inet vmnodecafe lan4",
    ],
    "iptables": [
        "iptables -t raw -F",
        "iptables -t mangle -F POSTROUTING",
        "iptables -t nat -F vmnodecafe-nat",
        "iptables -t nat -D POSTROUTING 1",
        "ip6tables -t raw -F",
        "ip6tables -t raw -D vmnodecafe-out 3",
        "ip6tables -t mangle -I POSTROUTING -o vmnjcafe+ -j vmnodecafe-in",  # all would count twice
        "ipset flush vmnodecafe-lan4",
        "ipset add vmnodecafe-lan6 2001:db8:51::/64",
        """
        for command in iptables ip6tables; do
            for table in raw mangle nat; do $command -t $table -F; $command -t $table -X; done
        done
        sleep 0.5  # the kernel lets go of the sets in the background
        ipset destroy
        """,
    ],
}


@pytest.mark.parametrize(
    ("backend", "flush"),
    [marked(param, flush) for param, backend in BACKENDS.items() for flush in FLUSHES[backend.name]],
    indirect=["backend"],
)
def test_a_flush_is_noticed_and_repaired(backend: Backend, counters: Counters, roads: Crossroads, flush: str) -> None:
    assert do(counters.read()) is None
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        sent = send(one, roads)
        subprocess.run(["sh", "-c", flush], check=True)
        assert do(counters.read()) is None
        do(counters.set_up(RULES))
        do(counters.add([one.link]))
        before = reading(counters)[one.name]
        assert before in (sent, NONE)
        send(one, roads)
        assert minus(reading(counters)[one.name], before) == sent
        assert before == sent or "ruleset" in flush or "destroy" in flush


def test_a_job_of_which_an_element_is_gone_is_not_read(backend: Backend, counters: Counters, roads: Crossroads) -> None:
    flush = {"nftables": "nft flush set inet vmnodecafe wan_in", "iptables": "ipset flush vmnodecafe-wi4"}
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        subprocess.run(flush[backend.name].split(), check=True)
        assert do(counters.read()) in (None, {})
        do(counters.set_up(RULES))
        do(counters.add([one.link]))
        before = reading(counters)[one.name]
        sent = send(one, roads)
        assert minus(reading(counters)[one.name], before) == sent


def test_what_others_made_survives_all_of_it(backend: Backend, counters: Counters, roads: Crossroads) -> None:
    tool("ipset", "create", "vmnode", "hash:ip", "counters")
    tool("ipset", "add", "vmnode", "192.0.2.1")
    for command in ("iptables", "ip6tables"):
        tool(command, "-t", "raw", "-N", "site")
        tool(command, "-t", "raw", "-A", "PREROUTING", "-i", "vmnj+", "-j", "site")
        tool(command, "-t", "raw", "-A", "site", "-p", "tcp", "--dport", "7", "-j", "DROP")
        tool(command, "-t", "nat", "-A", "POSTROUTING", "-o", "elsewhere", "-j", "MASQUERADE")
        tool(
            command,
            "-t",
            "mangle",
            "-A",
            "POSTROUTING",
            "-m",
            "comment",
            "--comment",
            "-j vmnodecafe-in",
            "-j",
            "ACCEPT",
        )
    if "legacy" not in tool("iptables", "-V"):
        script("table inet vmnode {\n set cafe { type ifname; }\n chain c { type filter hook input priority 0; }\n}\n")
    before = without_counts(ruleset())
    do(counters.set_up(RULES))
    with job(2) as one:
        do(counters.add([one.link]))
        send(one, roads)
        do(counters.set_up(RULES._replace(lan4=())))
        do(counters.remove([one.link]))
        others = [line for line in without_counts(ruleset()) if "cafe" not in line or "comment" in line]
        assert [line for line in before if line not in others and "cafe" not in line] == []
    do(counters.tear_down())
    assert [line for line in before if line not in without_counts(ruleset())] == []
    assert ours("vmnodecafe-") in ([], [line for line in before if "vmnodecafe-" in line])
    if "legacy" not in tool("iptables", "-V"):
        script("delete table inet vmnode\n")
    for command in ("iptables", "ip6tables"):
        for table in ("raw", "mangle", "nat"):
            tool(command, "-t", table, "-F")
    tool("ipset", "destroy", "vmnode")


def test_nothing_to_tear_down_is_no_error(counters: Counters) -> None:
    do(counters.tear_down())
    do(counters.set_up(RULES))
    do(counters.tear_down())
    assert ours() == []
    assert do(counters.read()) is None


# --- whether iptables can do it here ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [RULES, RULES._replace(pool6=None), RULES._replace(lan4=(IPv4Network("0.0.0.0/0"),))])
def test_iptables_works_here_and_finding_out_leaves_no_trace(rules: Rules) -> None:
    before = ruleset()
    assert do(obstacle(rules)) is None
    assert ruleset() == before


@pytest.mark.parametrize(
    ("file", "says"),
    [("ipset", "ipset"), ("xtables-nft-multi", "iptables")],
)
def test_what_is_missing_for_iptables_is_named(file: str, says: str) -> None:
    found = [path / file for path in map(Path, ("/usr/sbin", "/sbin")) if (path / file).exists()]
    tool("mount", "--bind", "/bin/false", str(found[0].resolve()))
    assert says in (do(obstacle(RULES)) or "")
