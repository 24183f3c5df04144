"""The probe on a real bridge, with a real dnsmasq: what it gets, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Callable, TypeVar

import pytest

from tests.kernel.world import (
    FAR,
    GATEWAY,
    PORT,
    Dnsmasq,
    beyond,
    links,
    make_bridge,
    outside,
    running,
    tool,
    until,
)
from tests.unit import samples
from vmnode.conditions import Observation
from vmnode.errors import VmnodeError
from vmnode.health import traffic
from vmnode.health.traffic import GuestTraffic
from vmnode.host import dhcp
from vmnode.host.links import INSIDE, ProbePort, bridge, default_route_link, forwards, local_addresses
from vmnode.values import Target

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


def with_probe(act: Callable[[GuestTraffic], Awaitable[T]], identity: str = "one") -> T:
    """Give `act` a probe, and close it in the end."""

    async def run() -> T:
        probe = GuestTraffic(identity, lambda _: None)
        try:
            return await act(probe)
        finally:
            await probe.close()

    return asyncio.run(run())


def told(observation: Observation) -> tuple[str, str]:
    return observation.status.value, observation.reason


OK = ("ok", "Ok")


def test_a_lease_is_taken_and_held_and_given_back(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(probe: GuestTraffic) -> None:
            assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            (lease,) = server.leases()
            assert lease.mac == probe.port.mac
            assert probe.port.address == IPv4Interface(f"{lease.address}/24")
            began = time.monotonic()
            for _ in range(5):
                assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            assert time.monotonic() - began < 2  # a lease that is held is answered at once
            assert [held.mac for held in server.leases()] == [lease.mac]

        with_probe(act)
        until(lambda: server.leases() == [])
    until(lambda: not [name for name in links() if name.startswith("vmn")])


def test_a_guest_never_seen_before_gets_an_address_and_gives_it_back(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(probe: GuestTraffic) -> Observation:
            await probe.ask_for_address(server.network(), index, fresh=False)
            seen = await probe.ask_for_address(server.network(), index, fresh=True)
            until(lambda: [lease.mac for lease in server.leases()] == [probe.port.mac])
            return seen

        seen = with_probe(act)
        assert told(seen) == OK
        assert seen.message.endswith("to a new guest")
        assert server.log.read_text().count("DHCPRELEASE") == 2  # the new guest's, then ours


def test_a_lease_that_dnsmasq_forgot_is_taken_again(tmp_path: Path) -> None:
    index = make_bridge()

    async def act(probe: GuestTraffic) -> None:
        with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:
            await probe.ask_for_address(server.network(), index, fresh=False)
        server.lease_file.unlink()
        with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:
            assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            assert [lease.mac for lease in server.leases()] == [probe.port.mac]

    with_probe(act)


def test_as_libvirt_has_it_with_spanning_tree_and_pings(tmp_path: Path) -> None:
    """The slowest start there is: 4 s until the port forwards, then 3 s until dnsmasq has pinged the address."""
    index = make_bridge("virbr0", f"{GATEWAY}/24", "stp_state", "1", "forward_delay", "200")
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254", "--dhcp-lease-max=253") as server:

        async def act(probe: GuestTraffic) -> None:
            assert not probe.port.plug(index)
            assert links()[probe.port.name]["master"] == "virbr0"
            assert links()[probe.port.name]["linkinfo"]["info_slave_data"]["state"] in ("listening", "learning")
            assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            assert links()[probe.port.name]["linkinfo"]["info_slave_data"]["state"] == "forwarding"

        with_probe(act)


def test_a_server_that_refuses_is_heard(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254"):
        port = ProbePort("one")
        assert port.plug(index)
        raw = port.inside(lambda: dhcp.open_socket(INSIDE))

        async def act() -> None:
            client = dhcp.Client(raw, "vmnode-test")
            offer = await client.discover(port.mac, 5)
            assert offer is not None
            assert (str(offer.server), str(offer.router), offer.lease_s) == (GATEWAY, GATEWAY, 3600)
            wrong = replace(offer, address=IPv4Interface("10.9.9.9/24"))
            answer = await client.request(wrong, 5)
            assert answer is not None and answer.kind == dhcp.NAK

        asyncio.run(act())
        raw.close()
        port.unplug()


def test_silence_ends_with_the_deadline() -> None:
    port = ProbePort("one")
    assert port.plug(make_bridge())
    raw = port.inside(lambda: dhcp.open_socket(INSIDE))

    async def act() -> float:
        began = time.monotonic()
        assert await dhcp.Client(raw, "").discover(port.mac, 0.7) is None
        return time.monotonic() - began

    assert 0.6 < asyncio.run(act()) < 2
    raw.close()
    port.unplug()


def test_a_pool_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "FRESH_DEADLINE_S", 1.0)
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.9", "192.168.122.9") as server:

        async def take_the_only_one(first: GuestTraffic) -> None:
            assert told(await first.ask_for_address(server.network(), index, fresh=False)) == OK

            async def come_late(second: GuestTraffic) -> None:
                late = await second.ask_for_address(server.network(), index, fresh=False)
                assert told(late) == ("failed", "PoolExhausted")
                # Even if the list of leases does not show it, no address is no address.
                unaware = replace(server.network(), leases=())
                assert told(await second.ask_for_address(unaware, index, fresh=False)) == ("failed", "NoOffer")

            probe = GuestTraffic("two", lambda _: None)
            await come_late(probe)
            await probe.close()

        with_probe(take_the_only_one)


def test_a_guest_that_runs_a_dhcp_server_is_found_out(tmp_path: Path) -> None:
    index = make_bridge()
    with beyond("vnet0") as pid:
        tool("ip", "link", "set", "vnet0", "master", "virbr0")
        inside = ("nsenter", "-t", str(pid), "-n")
        tool(*inside, "ip", "address", "add", "192.168.122.66/24", "dev", "far0")
        with Dnsmasq(tmp_path, "192.168.122.100", "192.168.122.110", namespace=inside):

            async def act(probe: GuestTraffic) -> Observation:
                return await probe.ask_for_address(samples.network(), index, fresh=False)

            seen = with_probe(act)
            assert told(seen) == ("failed", "ForeignServer")
            assert "192.168.122.66" in seen.message


def test_what_a_guest_once_forged_does_not_stay(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(probe: GuestTraffic) -> None:
            await probe.ask_for_address(server.network(), index, fresh=False)
            lease = probe._lease
            assert lease is not None
            with pytest.raises(VmnodeError):  # no such router can be reached from there
                probe.port.configure(IPv4Interface(f"{lease.address.ip}/32"), IPv4Address("203.0.113.1"))
            probe._lease = replace(lease, router=IPv4Address("192.168.122.66"), lease_s=0)
            assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            routes = probe.port.inside(lambda: tool("ip", "-4", "route"))
            assert f"default via {GATEWAY} " in routes
            addresses = probe.port.inside(lambda: tool("ip", "-4", "-o", "address", "show", "dev", INSIDE))
            assert [line.split()[3] for line in addresses.splitlines()] == [str(lease.address)]

        with_probe(act)


def test_an_address_from_an_old_configuration_is_out_of_range(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.100", "192.168.122.110"):
        wanted = samples.network(ranges=[("192.168.122.2", "192.168.122.9")])

        async def act(probe: GuestTraffic) -> Observation:
            return await probe.ask_for_address(wanted, index, fresh=False)

        assert told(with_probe(act)) == ("failed", "OutOfRange")


def test_two_instances_do_not_disturb_each_other(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(first: GuestTraffic) -> None:
            second = GuestTraffic("two", lambda _: None)
            assert first.port.name != second.port.name and first.port.mac != second.port.mac
            for probe in (first, second):
                assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK
            assert {lease.mac for lease in server.leases()} == {first.port.mac, second.port.mac}
            await second.close()
            until(lambda: second.port.name not in links())
            assert told(await first.ask_for_address(server.network(), index, fresh=False)) == OK
            assert [lease.mac for lease in server.leases()] == [first.port.mac]

        with_probe(act)


def test_the_name_server_answers_a_guest_or_does_not(tmp_path: Path) -> None:
    index = make_bridge()

    async def act(probe: GuestTraffic) -> None:
        with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:
            await probe.ask_for_address(server.network(), index, fresh=False)
            assert told(await probe.ask_name_server(IPv4Address(GATEWAY))) == OK
        assert told(await probe.ask_name_server(IPv4Address(GATEWAY))) == ("failed", "Refused")

    with_probe(act)


def test_a_guest_connects_through_nat(tmp_path: Path) -> None:
    index = make_bridge()
    there, refused, here = Target(FAR, PORT), Target(FAR, 1), Target("10.0.0.2", 1)
    with outside() as pid, Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(probe: GuestTraffic) -> None:
            await probe.ask_for_address(server.network(), index, fresh=False)
            for from_host in (False, True):
                tried = await probe.connect([there, refused, here], from_host=from_host)
                assert [attempt.result.reason for attempt in tried] == ["", "Refused", "Refused"]
                assert [attempt.remote for attempt in tried] == [True, True, False]

        with_probe(act)
        assert "192.168.122" not in tool("nsenter", "-t", str(pid), "-n", "ip", "neighbour")
        assert "packets 0" not in tool("nft", "list", "chain", "ip", "libvirt_network", "guest_nat")


def test_a_port_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    index = make_bridge()
    with Dnsmasq(tmp_path, "192.168.122.2", "192.168.122.254") as server:

        async def act(probe: GuestTraffic) -> None:
            await probe.ask_for_address(server.network(), index, fresh=False)
            tool("ip", "link", "delete", probe.port.name)
            assert told(await probe.ask_for_address(server.network(), index, fresh=False)) == OK

        with_probe(act)


def test_a_port_follows_a_bridge_that_was_made_anew(tmp_path: Path) -> None:
    port = ProbePort("one")
    assert port.plug(make_bridge())
    tool("ip", "link", "delete", "virbr0")
    again = make_bridge()
    assert port.plug(again)
    assert links()[port.name]["master"] == "virbr0"
    port.unplug()


OWNER = """
import sys, time
from vmnode.host.links import ProbePort, bridge
port = ProbePort("one")
assert port.plug(bridge("virbr0").index)
print(port.name, flush=True)
time.sleep(600)
"""


def test_nothing_stays_when_the_owner_is_killed_and_the_next_one_starts_at_once() -> None:
    index = make_bridge()
    with running([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert name == ProbePort("one").name and name in links()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    successor = ProbePort("one")  # the same identity, as after a restart: the name may still be taken for a moment
    assert successor.plug(index)
    successor.unplug()
    until(lambda: name not in links())


def test_names_fit_the_kernel_and_mac_addresses_are_nobody_else_s() -> None:
    port = ProbePort("/run/vmnode")
    assert len(port.name) <= 15 and port.name.startswith("vmn")
    assert len({port.make_mac(number) for number in range(256)}) == 256
    first = int(port.mac[:2], 16)
    assert first & 2 and not first & 1  # locally administered, unicast


def test_what_iproute2_says_about_the_host_is_what_we_read() -> None:
    assert bridge("virbr0") is None
    assert default_route_link() is None
    index = make_bridge()
    found = bridge("virbr0")
    assert found is not None
    assert (found.index, found.up, found.addresses) == (index, True, (IPv4Interface(f"{GATEWAY}/24"),))
    tool("ip", "link", "set", "virbr0", "down")
    tool("ip", "address", "flush", "dev", "virbr0")
    found = bridge("virbr0")
    assert found is not None and (found.up, found.addresses) == (False, ())
    with beyond("eth0"):
        tool("ip", "address", "add", "10.0.0.2/24", "dev", "eth0")
        tool("ip", "route", "add", "default", "via", "10.0.0.1")
        assert default_route_link() == links()["eth0"]["ifindex"]
        assert {"10.0.0.2", "127.0.0.1", "::1"} <= local_addresses()
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    assert not forwards("virbr0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    assert forwards("virbr0")
