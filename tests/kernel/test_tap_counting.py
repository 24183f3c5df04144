"""What guests send and receive, counted on real taps of a real bridge, to the byte; tcpdump on the tap is the oracle.

A guest is a tap and who holds it open, as QEMU does: it writes frames, and the host does with them what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from tests.kernel.world import FAR, GATEWAY, beyond, links, make_bridge, outside, running, script, tables, tool, until
from vmnode.host.taps import Tap, TapCounters, present
from vmnode.usage import NONE, Traffic, Usage

pytestmark = pytest.mark.nft_owner

LAN4 = [IPv4Network("192.168.122.0/24"), IPv4Network("255.255.255.255")]
LAN6 = [IPv6Network("fd00::/8")]
ICMP = 1  # what is in these packets is no message that anybody would answer
EVERYBODY = b"\xff" * 6
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000  # linux/if_tun.h
BR_NETFILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


# --- the guests ---------------------------------------------------------------------------------------------------


class Guest:
    def __init__(self, number: int, bridge: str = "virbr0", name: str = "") -> None:
        self.name = name or f"vnet{number}"
        self.address, self.address6 = f"192.168.122.{number}", f"fd00::{number:x}"
        self.mac = bytes([0x52, 0x54, 0, 0, 0, number])
        self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.descriptor, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), IFF_TAP | IFF_NO_PI))
        tool("ip", "link", "set", self.name, "master", bridge, "up")
        self.tap = Tap(self.name, links()[self.name]["ifindex"])
        until(lambda: links()[self.name].get("operstate") != "DOWN")

    def send(self, packet: bytes, to: bytes = EVERYBODY, kind: bytes = b"", *, least: int = 0) -> None:
        """One frame, padded with zeros to `least` bytes; `kind` is its type, if the packet does not tell."""
        kind = kind or (b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd")
        os.write(self.descriptor, (to + self.mac + kind + packet).ljust(least, b"\0"))

    def close(self) -> None:
        os.close(self.descriptor)


@contextlib.contextmanager
def guests(*numbers: int) -> Iterator[list[Guest]]:
    """These, on virbr0, known to the host as if it had asked for their addresses.

    The host has nothing to say by itself: neighbour discovery and multicast reports would be counted, too.
    """
    for which in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")
    make_bridge("virbr0", f"{GATEWAY}/24", "forward_delay", "0", "mcast_snooping", "0")
    made: list[Guest] = []
    try:
        for number in numbers:
            made.append(Guest(number))
        for guest in made:  # the bridge takes the least address of its ports, and forgets its neighbours when it does
            mac = ":".join(f"{byte:02x}" for byte in guest.mac)
            tool("ip", "neighbour", "replace", guest.address, "lladdr", mac, "dev", "virbr0", "nud", "permanent")
        yield made
    finally:
        for guest in made:
            guest.close()


def host_mac() -> bytes:
    return bytes.fromhex(links()["virbr0"]["address"].replace(":", ""))


def packet4(source: str, target: str, length: int, protocol: int = 17, port: int = 9) -> bytes:
    """An IPv4 packet of `length` bytes, header included (RFC 791); UDP to `port`, without a checksum."""
    ends = IPv4Address(source).packed + IPv4Address(target).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0, 64, protocol, 0) + ends
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    body = struct.pack("!4H", 4000, port, length - 20, 0) if protocol == 17 else b""
    return (head + body).ljust(length, b"x")[:length]


def packet6(source: str, target: str, length: int) -> bytes:
    """An IPv6 packet of `length` bytes with nothing that anybody knows in it (RFC 8200, no next header)."""
    head = struct.pack("!IHBB", 6 << 28, length - 40, 59, 64)
    return (head + IPv6Address(source).packed + IPv6Address(target).packed).ljust(length, b"x")


def host_sends(target: str, length: int) -> None:
    """A UDP datagram of the host's own, of `length` bytes at layer 3."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"virbr0")
        sender.sendto(b"x" * (length - 28), (target, 9))


# --- what is counted ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counting() -> Iterator[TapCounters]:
    counters = TapCounters("test")
    asyncio.run(counters.set_up(LAN4, LAN6))
    try:
        yield counters
    finally:
        asyncio.run(counters.tear_down())
        assert tables() == [] or all("vmnode" not in table for table in tables())


def counts(counters: TapCounters) -> Mapping[Tap, Usage]:
    found = asyncio.run(counters.read())
    assert found is not None
    return found


@contextlib.contextmanager
def dumps(directory: Path, *watched: Guest) -> Iterator[list[Usage]]:
    """What tcpdump saw on these taps; complete when the block is left."""
    files = [(guest, way, directory / f"{guest.name}-{way}.pcap") for guest in watched for way in ("in", "out")]
    found: list[Usage] = []
    with contextlib.ExitStack() as stack:
        for guest, way, file in files:
            argv = ["tcpdump", "-i", guest.name, "-Q", way, "-U", "-Z", "root", "--immediate-mode", "-w", str(file)]
            child = stack.enter_context(running(argv, stderr=subprocess.PIPE))
            assert child.stderr is not None and "listening" in child.stderr.readline()
            stack.callback(child.wait, 10)
            stack.callback(child.send_signal, signal.SIGINT)
        yield found
    for (_, _, sent), (_, _, received) in zip(files[::2], files[1::2]):
        lan_out, wan_out = lengths_in(sent, "dst")
        lan_in, wan_in = lengths_in(received, "src")
        found.append(Usage(lan_in, lan_out, wan_in, wan_out))


def lengths_in(file: Path, end: str) -> tuple[Traffic, Traffic]:
    """What the packets' own headers say of their lengths: of those whose other end is near, and of the others."""
    near = f"({end} net 192.168.122.0/24 or {end} host 255.255.255.255 or {end} net fd00::/8)"
    found = []
    for which in (near, f"not {near}"):
        lengths: list[int] = []
        for behind in ("", "vlan and "):  # a filter looks behind a tag only if it says so
            text = tool("tcpdump", "-nn", "-v", "-r", str(file), f"{behind}(ip or ip6) and {which}")
            lengths += [int(length) for length in re.findall(r"IP \(tos .*, length (\d+)\)", text)]
            lengths += [int(length) + 40 for length in re.findall(r"IP6 \(.*payload length: (\d+)\)", text)]
        found.append(Traffic(sum(lengths), len(lengths)))
    return found[0], found[1]


ECHO = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
    far.bind(({FAR!r}, 9))
    print("ready", flush=True)
    while True:
        data, back = far.recvfrom(9000)
        far.sendto(data + b"12", back)
"""


@contextlib.contextmanager
def far_echo() -> Iterator[None]:
    """Beyond NAT somebody sends back what comes, and two bytes more."""
    with outside() as world:
        argv = ["nsenter", "-t", str(world), "-n", sys.executable, "-c", ECHO]
        with running(argv, stdout=subprocess.PIPE) as far:
            assert far.stdout is not None and far.stdout.readline() == "ready\n"
            until(far_answers)  # a link that has just come up loses packets for a moment
            yield


def far_answers() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.2)
        asking.sendto(b"?", (FAR, 9))
        with contextlib.suppress(socket.timeout):
            return asking.recv(9) == b"?12"
    return False


def test_every_direction_is_counted_to_the_byte(tmp_path: Path) -> None:
    with far_echo(), guests(7, 8) as (one, other), counting() as counters, dumps(tmp_path, one, other) as dumped:
        for length in (28, 100, 1498):
            one.send(packet4(one.address, FAR, length), host_mac())
        one.send(packet4(one.address, GATEWAY, 64, ICMP), host_mac())
        one.send(packet4(one.address, other.address, 500), other.mac)
        one.send(packet4("0.0.0.0", "255.255.255.255", 328))  # as for a lease
        one.send(packet6(one.address6, other.address6, 61), other.mac)
        one.send(packet6(one.address6, "2001:db8::1", 1280), host_mac())
        other.send(packet4(other.address, one.address, 77, ICMP), one.mac)
        other.send(packet6("2001:db8::1", one.address6, 99), one.mac)
        host_sends(one.address, 200)
        host_sends("192.168.122.255", 300)
        until(lambda: counts(counters)[one.tap].wan_in.packets == 4)
        found = counts(counters)
    assert found[one.tap] == Usage(
        lan_in=Traffic(77 + 200 + 300, 3),
        lan_out=Traffic(64 + 500 + 328 + 61, 4),
        wan_in=Traffic(30 + 102 + 1500 + 99, 4),
        wan_out=Traffic(28 + 100 + 1498 + 1280, 4),
    )
    # The source 0.0.0.0 is in no prefix that was given; and the broadcasts of others are what a guest receives, too.
    assert found[other.tap] == Usage(
        lan_in=Traffic(500 + 61 + 300, 3), lan_out=Traffic(77 + 99, 2), wan_in=Traffic(328, 1), wan_out=Traffic()
    )
    assert dumped == [found[one.tap], found[other.tap]]


def test_what_pads_a_short_frame_is_not_counted(tmp_path: Path) -> None:
    """60 bytes is Ethernet's least; the packets' own lengths are what is counted."""
    with guests(7, 8) as (one, other), counting() as counters, dumps(tmp_path, one, other) as dumped:
        for length in (28, 28, 40, 45, 46, 47):
            one.send(packet4(one.address, other.address, length), other.mac, least=60)
        one.send(packet4(one.address, FAR, 40), host_mac(), least=60)
        for length in (40, 43, 46):
            one.send(packet6(one.address6, other.address6, length), other.mac, least=60)
        one.send(packet4(one.address, other.address, 31), other.mac)  # and one that nobody padded
        until(lambda: counts(counters)[other.tap].lan_in.packets == 10)
        found = counts(counters)
    everything = Traffic(28 + 28 + 40 + 45 + 46 + 47 + 40 + 43 + 46 + 31, 10)
    assert found[one.tap] == Usage(lan_out=everything, wan_out=Traffic(40, 1))
    assert found[other.tap] == Usage(lan_in=everything)
    assert dumped == [found[one.tap], found[other.tap]]


def test_only_ip_is_counted(tmp_path: Path) -> None:
    with guests(7, 8) as (one, other), counting() as counters, dumps(tmp_path, one, other) as dumped:
        one.send(bytes(28), kind=b"\x08\x06")  # ARP
        one.send(bytes(50), to=bytes.fromhex("0180c200000e"), kind=b"\x88\xcc")  # LLDP
        one.send(bytes(50), kind=b"\x88\xb5")  # IEEE 802's, for experiments
        one.send(b"\xaa\xaa\x03" + bytes(60), kind=b"\x00\x3f")  # a length, not a type
        one.send(packet4(one.address, other.address, 100), other.mac)
        until(lambda: other.tap in counts(counters))
        found = counts(counters)
    assert found == {one.tap: Usage(lan_out=Traffic(100, 1)), other.tap: Usage(lan_in=Traffic(100, 1))}
    assert dumped == [found[one.tap], found[other.tap]]


def test_a_tag_is_not_part_of_the_packet(tmp_path: Path) -> None:
    tag = b"\x81\x00\x00\x05"
    with guests(7, 8) as (one, other), counting() as counters, dumps(tmp_path, one, other) as dumped:
        one.send(packet4(one.address, other.address, 100), other.mac, tag + b"\x08\x00")
        one.send(packet6(one.address6, other.address6, 200), other.mac, tag + b"\x86\xdd")
        until(lambda: other.tap in counts(counters))
        found = counts(counters)
    assert found == {one.tap: Usage(lan_out=Traffic(300, 2)), other.tap: Usage(lan_in=Traffic(300, 2))}
    assert dumped == [found[one.tap], found[other.tap]]


@pytest.mark.parametrize("br_netfilter", ["0", "1"])
def test_with_and_without_br_netfilter_the_counts_are_the_same(tmp_path: Path, br_netfilter: str) -> None:
    if BR_NETFILTER.exists():
        BR_NETFILTER.write_text(br_netfilter)
    elif br_netfilter == "1":
        pytest.skip("needs br_netfilter in the kernel")
    tool("iptables", "-t", "mangle", "-A", "POSTROUTING", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    with far_echo(), guests(7, 8) as (one, other), counting() as counters, dumps(tmp_path, one, other) as dumped:
        one.send(packet4(one.address, FAR, 100), host_mac())
        one.send(packet4(one.address, FAR, 40), host_mac(), least=60)
        one.send(packet4(one.address, other.address, 28), other.mac, least=60)
        one.send(packet4(one.address, other.address, 1500), other.mac)
        host_sends(one.address, 60)
        until(lambda: counts(counters)[one.tap].wan_in.packets == 2)
        found = counts(counters)
    assert found[one.tap] == Usage(
        lan_out=Traffic(1528, 2), wan_out=Traffic(140, 2), wan_in=Traffic(102 + 42, 2), lan_in=Traffic(60, 1)
    )
    assert found[other.tap] == Usage(lan_in=Traffic(28 + 1500, 2))
    assert dumped == [found[one.tap], found[other.tap]]


# --- whose it is --------------------------------------------------------------------------------------------------


def test_a_tap_is_counted_from_its_first_packet_on_without_being_named() -> None:
    with counting() as counters, guests(7, 8) as (one, other):
        assert counts(counters) == {}
        one.send(packet4(one.address, other.address, 100), other.mac)
        assert counts(counters) == {one.tap: Usage(lan_out=Traffic(100, 1)), other.tap: Usage(lan_in=Traffic(100, 1))}


def test_a_name_that_comes_again_is_another_tap() -> None:
    with guests(7, 8) as (one, other), counting() as counters:
        one.send(packet4(one.address, other.address, 100), other.mac)
        one.send(packet4(one.address, other.address, 28), other.mac, least=60)
        one.close()
        until(lambda: one.name not in links())
        again = Guest(7)
        assert again.name == one.name and again.tap != one.tap
        again.send(packet4(again.address, FAR, 33), host_mac(), least=60)
        received = Usage(lan_in=Traffic(128, 2))
        before = {one.tap: Usage(lan_out=Traffic(128, 2)), other.tap: received}
        assert counts(counters) == {**before, again.tap: Usage(wan_out=Traffic(33, 1))}
        for _ in range(2):  # the second time there is nothing to do
            asyncio.run(counters.remove([one.tap]))
            assert counts(counters) == {other.tap: received, again.tap: Usage(wan_out=Traffic(33, 1))}
        one.descriptor = again.descriptor


def test_a_tap_that_is_renamed_stays_itself() -> None:
    with guests(7, 8) as (one, other), counting() as counters:
        one.send(packet4(one.address, other.address, 100), other.mac)
        tool("ip", "link", "set", one.name, "name", "renamed")
        assert counts(counters)[one.tap] == Usage(lan_out=Traffic(100, 1))
        tool("ip", "link", "set", "renamed", "name", one.name)


CONNECT = f"""
import socket
socket.create_connection(({GATEWAY!r}, 9999), 5)
"""


def test_any_name_will_do_and_other_ports_are_left_alone() -> None:
    with guests(8) as (other,), counting() as counters, beyond("port0") as pid:
        tool("ip", "link", "set", "port0", "master", "virbr0")
        tool("nsenter", "-t", str(pid), "-n", "sysctl", "-qw", "net.ipv6.conf.far0.disable_ipv6=1")
        tool("nsenter", "-t", str(pid), "-n", "ip", "address", "add", "192.168.122.9/24", "dev", "far0")
        named = Guest(7, name="lemon")
        try:
            with socket.create_server((GATEWAY, 9999)):
                tool("nsenter", "-t", str(pid), "-n", sys.executable, "-c", CONNECT)
            assert all(usage.lan_out == Traffic() for usage in counts(counters).values())
            named.send(packet4(named.address, other.address, 100), other.mac)
            assert set(counts(counters)) == {named.tap, other.tap}
        finally:
            named.close()


def test_a_tap_is_present_until_it_is_closed() -> None:
    with guests(7, 8) as (one, other):
        assert {one.tap.index, other.tap.index} < present()
        extra = Guest(9)
        assert extra.tap.index in present()
        extra.close()
        until(lambda: extra.tap.index not in present())


# --- beside others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "arrives"), [("prerouting", False), ("forward", False), ("postrouting", False), ("input", True)]
)
def test_what_others_drop_was_sent_and_not_received(hook: str, arrives: bool) -> None:
    priority = {"prerouting": -2147483647, "postrouting": 2147483645}.get(hook, 0)
    with guests(7, 8) as (one, other):
        for our_table_is_first in (True, False):
            chain = f"chain c {{ type filter hook {hook} priority {priority}; ip protocol udp drop\n }}"
            if not our_table_is_first:
                script(f"table bridge site {{ {chain}\n }}")
            with counting() as counters:
                if our_table_is_first:
                    script(f"table bridge site {{ {chain}\n }}")
                one.send(packet4(one.address, other.address, 100), other.mac)
                found = counts(counters)
                assert found[one.tap] == Usage(lan_out=Traffic(100, 1))
                assert found.get(other.tap, NONE) == (Usage(lan_in=Traffic(100, 1)) if arrives else NONE)
            tool("nft", "delete", "table", "bridge", "site")


def test_what_the_host_s_firewall_refuses_was_sent() -> None:
    with far_echo(), guests(7) as (one,), counting() as counters:
        for chain in ("FORWARD", "INPUT"):
            tool("iptables", "-P", chain, "DROP")
        one.send(packet4(one.address, FAR, 100), host_mac())
        one.send(packet4(one.address, GATEWAY, 50), host_mac())
        assert counts(counters) == {one.tap: Usage(lan_out=Traffic(50, 1), wan_out=Traffic(100, 1))}


def test_a_port_that_does_not_forward_yet_takes_nothing() -> None:
    with guests(7) as (one,), counting() as counters:
        tool("bridge", "link", "set", "dev", one.name, "state", "1")  # listening
        one.send(packet4(one.address, GATEWAY, 100, ICMP), host_mac())
        tool("bridge", "link", "set", "dev", one.name, "state", "3")  # forwarding
        one.send(packet4(one.address, GATEWAY, 50, ICMP), host_mac())
        assert counts(counters) == {one.tap: Usage(lan_out=Traffic(50, 1))}


# --- the rules ----------------------------------------------------------------------------------------------------


def test_rules_that_are_there_already_are_kept_with_their_counts() -> None:
    with guests(7, 8) as (one, other), counting() as counters:
        one.send(packet4(one.address, other.address, 100), other.mac)
        before = counts(counters)
        successor = TapCounters("test")  # of a daemon that was started anew
        assert asyncio.run(successor.read()) is None
        assert asyncio.run(successor.set_up(LAN4, LAN6))
        assert counts(successor) == before
        assert asyncio.run(successor.set_up([IPv4Network("10.0.0.0/8")], []))
        one.send(packet4(one.address, other.address, 33), other.mac)
        assert counts(successor)[one.tap] == Usage(lan_out=Traffic(100, 1), wan_out=Traffic(33, 1))


@pytest.mark.parametrize(
    "command",
    [
        "flush ruleset",
        "delete table bridge vmnodetest",
        "flush chain bridge vmnodetest out",
        "flush set bridge vmnodetest lan4",
        "insert rule bridge vmnodetest in accept",
    ],
)
def test_rules_that_others_changed_are_noticed_and_made_anew(command: str) -> None:
    with guests(7, 8) as (one, other), counting() as counters:
        one.send(packet4(one.address, other.address, 100), other.mac)
        tool("nft", *command.split())
        assert asyncio.run(counters.read()) is None
        assert asyncio.run(counters.set_up(LAN4, LAN6)) is (command.startswith("flush set"))
        one.send(packet4(one.address, other.address, 33), other.mac)
        lost = command.split()[1] in ("ruleset", "table")
        assert counts(counters)[one.tap].lan_out == (Traffic(33, 1) if lost else Traffic(133, 2))


def test_a_table_of_another_version_is_replaced() -> None:
    script("table bridge vmnodetest { set lan_in { type ifname; }; chain c { type filter hook input priority 0; }; }")
    with guests(7, 8) as (one, other):
        counters = TapCounters("test")
        assert asyncio.run(counters.set_up(LAN4, LAN6)) is False
        one.send(packet4(one.address, other.address, 100), other.mac)
        assert counts(counters)[one.tap] == Usage(lan_out=Traffic(100, 1))
        assert "hook input" not in tool("nft", "list", "ruleset")
        asyncio.run(counters.tear_down())


def test_nothing_is_left_and_nothing_of_others_is_touched() -> None:
    script("table bridge site { chain c { type filter hook forward priority 0; }; }")
    with counting():
        assert tables() == ["table bridge site", "table bridge vmnodetest"]
    asyncio.run(TapCounters("test").tear_down())
    assert tables() == ["table bridge site"]
