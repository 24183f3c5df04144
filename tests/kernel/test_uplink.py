"""What the host's routing says, on routes made by iproute2, with a router that really advertises itself."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from tests.kernel.world import beyond, make_bridge, tool, until
from vmnode.conditions import Status
from vmnode.health.machine import judge_conntrack
from vmnode.host import uplink
from vmnode.host.uplink import Conntrack

POOL4, POOL6 = IPv4Network("100.64.0.0/16"), IPv6Network("fd76:6d6e:6f64:6500::/64")
OURS = "vmnj0123"

# One advertisement (RFC 4861, 4.2): a router for half an hour, from its link-local address, to all nodes on the link.
ADVERTISE = """
import socket, struct
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex("far0"))
s.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0), ("ff02::1", 0))
"""


def switch(name: str) -> Path:
    return Path("/proc/sys/net") / name


def ip(*words: str) -> None:
    tool("ip", *words)


def give_way_out(metric: str = "0") -> None:
    ip("address", "add", "10.0.0.2/24", "dev", "eth0")
    ip("route", "add", "default", "via", "10.0.0.1", "dev", "eth0", "metric", metric)


def advertise(router: int) -> None:
    """Have the router beyond eth0 advertise itself until the kernel has the route."""

    def arrived() -> bool:
        subprocess.run(["nsenter", "-t", str(router), "-n", sys.executable, "-c", ADVERTISE], timeout=20)
        return "default via fe80::1 dev eth0 proto ra" in tool("ip", "-6", "route")

    ip("link", "set", "eth0", "addrgenmode", "eui64")
    tool(*("nsenter", "-t", str(router), "-n"), "ip", "address", "add", "fe80::1/64", "dev", "far0", "nodad")
    until(arrived)


# --- MTU ----------------------------------------------------------------------------------------------------------


def test_a_host_without_a_way_out_has_no_mtu_for_jobs() -> None:
    make_bridge()
    assert uplink.mtu() is None


def test_the_mtu_is_that_of_the_preferred_default_route_s_link() -> None:
    make_bridge()
    with beyond("eth0"):
        ip("link", "set", "eth0", "mtu", "1400")
        give_way_out(metric="50")
        ip("route", "add", "default", "via", "192.168.122.9", "dev", "virbr0", "metric", "100")
        assert uplink.mtu() == 1400
        ip("route", "add", "default", "via", "192.168.122.9", "dev", "virbr0", "metric", "10")
        assert uplink.mtu() == 1500


def test_the_mtu_suits_both_families_where_they_go_apart() -> None:
    make_bridge()
    with beyond("eth0"):
        give_way_out()
        ip("link", "set", "virbr0", "mtu", "1280")
        ip("-6", "address", "add", "2001:db8::2/64", "dev", "virbr0", "nodad")
        ip("-6", "route", "add", "default", "via", "2001:db8::1", "dev", "virbr0")
        assert uplink.mtu() == 1280


def test_a_default_route_by_several_links_has_the_first_one_s_mtu() -> None:
    make_bridge()
    with beyond("eth0"):
        ip("link", "set", "eth0", "mtu", "9000")
        ip("address", "add", "10.0.0.2/24", "dev", "eth0")
        hops = ("nexthop", "via", "10.0.0.1", "dev", "eth0", "nexthop", "via", "192.168.122.9", "dev", "virbr0")
        ip("route", "add", "default", *hops)
        assert [route.links for route in uplink.default_routes(4)] == [("eth0", "virbr0")]
        assert uplink.mtu() == 9000


# --- pools that are in use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "named"),
    [
        (["100.64.7.0/24", "dev", "virbr0"], "100.64.7.0/24 by virbr0"),
        (["100.0.0.0/8", "via", "192.168.122.9"], "100.0.0.0/8 by virbr0"),
        (["100.64.9.9", "dev", "virbr0"], "100.64.9.9/32 by virbr0"),
        (["100.64.0.0/10", "dev", "virbr0", "table", "77"], "100.64.0.0/10 by virbr0"),
    ],
    ids=["inside", "around", "one host", "in a table of its own"],
)
def test_a_pool_that_overlaps_a_route_is_found_with_the_route_s_name(route: list[str], named: str) -> None:
    make_bridge()
    assert uplink.overlapping(POOL4, OURS) is None
    ip("route", "add", *route)
    assert str(uplink.overlapping(POOL4, OURS)) == named


def test_an_address_of_the_host_inside_a_pool_is_an_overlap() -> None:
    make_bridge()
    ip("address", "add", "100.64.3.3/32", "dev", "virbr0")
    assert str(uplink.overlapping(POOL4, OURS)) == "100.64.3.3/32 by virbr0"


def test_a_pool_of_ipv6_is_compared_too() -> None:
    make_bridge()
    ip("-6", "address", "add", "2001:db8::2/64", "dev", "virbr0", "nodad")
    ip("-6", "route", "add", "default", "via", "2001:db8::1", "dev", "virbr0")
    assert uplink.overlapping(POOL6, OURS) is None
    ip("-6", "route", "add", "fd76:6d6e:6f64::/48", "dev", "virbr0")
    assert str(uplink.overlapping(POOL6, OURS)) == "fd76:6d6e:6f64::/48 by virbr0"


def test_our_own_links_and_routes_to_nowhere_overlap_nothing() -> None:
    for name in (f"{OURS}1", "vmnjffff1"):
        ip("link", "add", name, "type", "bridge")
        ip("link", "set", name, "up")
    ip("route", "add", "100.64.0.2", "dev", f"{OURS}1")
    ip("route", "add", "default", "dev", f"{OURS}1")
    ip("route", "add", "blackhole", "100.64.0.0/10")
    assert uplink.overlapping(POOL4, OURS) is None
    ip("route", "add", "100.64.0.3", "dev", "vmnjffff1")
    assert (
        str(uplink.overlapping(POOL4, OURS)) == "100.64.0.3/32 by vmnjffff1"
    )  # of another vmnode, which has the same pool
    for name in (f"{OURS}1", "vmnjffff1"):
        ip("link", "delete", name)


# --- forwarding ---------------------------------------------------------------------------------------------------


def test_forwarding_is_switched_on_and_left_alone_where_it_is() -> None:
    for version, name in ((4, "ipv4/ip_forward"), (6, "ipv6/conf/all/forwarding")):
        switch(name).write_text("0")
        assert not uplink.forwards(version)
        uplink.forward(version)
        assert switch(name).read_text() == "1\n" and uplink.forwards(version)
    make_bridge()
    switch("ipv4/conf/virbr0/forwarding").write_text("0")  # an administrator's, which the switch for all would undo
    uplink.forward(4)
    assert switch("ipv4/conf/virbr0/forwarding").read_text() == "0\n"


def test_a_default_route_that_forwarding_would_cost_the_host_is_found() -> None:
    with beyond("eth0") as router:
        assert uplink.lost_by_forwarding() is None
        advertise(router)
        assert str(uplink.lost_by_forwarding()) == "::/0 by eth0"
        uplink.forward(6)
        assert "default" not in tool("ip", "-6", "route")


def test_with_accept_ra_2_no_route_is_in_danger() -> None:
    with beyond("eth0") as router:
        advertise(router)
        switch("ipv6/conf/eth0/accept_ra").write_text("2")
        assert uplink.lost_by_forwarding() is None
        uplink.forward(6)
        assert "default via fe80::1" in tool("ip", "-6", "route")


def test_a_route_that_networkmanager_took_from_an_advertisement_is_not_in_danger() -> None:
    with beyond("eth0"):
        ip("link", "set", "eth0", "addrgenmode", "eui64")
        switch("ipv6/conf/eth0/accept_ra").write_text("0")
        ip("-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0", "proto", "ra")
        assert uplink.lost_by_forwarding() is None
        uplink.forward(6)
        assert "default via fe80::1" in tool("ip", "-6", "route")


# --- conntrack ----------------------------------------------------------------------------------------------------


def test_the_table_of_connections_is_read_as_the_kernel_lists_it() -> None:
    tool("iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")  # something that tracks
    tool("ping", "-c", "1", "127.0.0.1") if Path("/bin/ping").exists() else tool(sys.executable, "-c", LOOP)
    found = uplink.conntrack()
    assert found is not None
    assert found.used == len(Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines()) > 0
    assert found.limit == int(tool("sysctl", "-n", "net.netfilter.nf_conntrack_max"))


LOOP = "import socket\ns = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(s.getsockname())"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (None, Status.DISABLED),
        (Conntrack(0, 65536), Status.OK),
        (Conntrack(58982, 65536), Status.OK),  # nine tenths are 58,982.4
        (Conntrack(58983, 65536), Status.FAILED),
        (Conntrack(65536, 65536), Status.FAILED),
    ],
)
def test_a_table_of_connections_that_is_nine_tenths_full_fails(found: Conntrack, status: Status) -> None:
    assert judge_conntrack(found).status is status


def test_a_table_that_is_nearly_full_says_so_with_numbers() -> None:
    observed = judge_conntrack(Conntrack(65000, 65536))
    assert (observed.name, observed.reason) == ("conntrack", "NearlyFull")
    assert "65000 of 65536 entries are in use" in observed.message
    assert "nf_conntrack_max=131072" in observed.hint
