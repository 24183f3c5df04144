"""Judgements about the virtual network: facts in, observations out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from typing import Optional

import pytest

from tests.unit.samples import network
from vmnode.conditions import Observation, Status
from vmnode.health.network import (
    Attempt,
    Path,
    free_addresses,
    judge_active,
    judge_bridge,
    judge_dnsmasq,
    judge_path,
    lost_on_the_way,
)
from vmnode.health.traffic import judge_offer
from vmnode.host.dhcp import OFFER, Answer
from vmnode.host.dnsmasq import Dnsmasq
from vmnode.host.libvirt import Lease, LibvirtError, parse_network
from vmnode.host.links import Bridge
from vmnode.host.reach import NO_IPV4, Reached
from vmnode.values import Target

NOW = 1_790_000_000.0


def told(observation: Optional[Observation]) -> tuple[str, str]:
    assert observation is not None
    assert observation.message and (observation.hint or observation.status is Status.OK)
    return observation.status.value, observation.reason


# --- active, bridge, dnsmasq --------------------------------------------------------------------------------------


def test_a_network_is_undefined_inactive_or_active() -> None:
    assert told(judge_active("default", None)) == ("failed", "Undefined")
    assert told(judge_active("default", network(active=False))) == ("failed", "Inactive")
    assert told(judge_active("default", network())) == ("ok", "Ok")


def test_a_network_that_will_not_start_at_boot_either_is_told_so() -> None:
    assert "net-autostart" not in judge_active("default", network(active=False)).hint
    assert "virsh net-autostart default" in judge_active("default", network(active=False, autostart=False)).hint


GATEWAY = IPv4Interface("192.168.122.1/24")


@pytest.mark.parametrize(
    ("bridge", "expected"),
    [
        (None, ("failed", "Missing")),
        (Bridge(3, False, (GATEWAY,)), ("failed", "Down")),
        (Bridge(3, True, ()), ("failed", "AddressMissing")),
        (Bridge(3, True, (IPv4Interface("192.168.122.1/25"),)), ("failed", "AddressMissing")),
        (Bridge(3, True, (GATEWAY,)), ("ok", "Ok")),
        (Bridge(3, True, (IPv4Interface("10.0.0.1/8"), GATEWAY)), ("ok", "Ok")),
    ],
)
def test_bridge(bridge: Optional[Bridge], expected: tuple[str, str]) -> None:
    assert told(judge_bridge(network(), bridge)) == expected


def test_a_network_without_address_asks_none_of_its_bridge() -> None:
    assert told(judge_bridge(network(gateway="", ranges=()), Bridge(3, True, ()))) == ("ok", "Ok")


def test_dnsmasq() -> None:
    assert told(judge_dnsmasq(network(), None)) == ("failed", "NotRunning")
    assert told(judge_dnsmasq(network(), Dnsmasq(42, stopped=True))) == ("failed", "Stopped")
    assert judge_dnsmasq(network(), Dnsmasq(42, stopped=True)).hint == "kill -CONT 42"
    assert told(judge_dnsmasq(network(), Dnsmasq(42, stopped=False))) == ("ok", "Ok")


# --- the pool of addresses ----------------------------------------------------------------------------------------


def leases(*addresses: str, expires: int = int(NOW) + 1) -> list[Lease]:
    return [Lease(f"52:54:00:00:00:{number:02x}", address, expires) for number, address in enumerate(addresses)]


@pytest.mark.parametrize(
    ("ranges", "taken", "reserved", "free"),
    [
        # .2 to .254 are 253 addresses; the gateway .1 lies outside.
        ([("192.168.122.2", "192.168.122.254")], [], [], 253),
        ([("192.168.122.2", "192.168.122.254")], ["192.168.122.2", "192.168.122.254"], [], 251),
        # A range of one.
        ([("192.168.122.9", "192.168.122.9")], [], [], 1),
        ([("192.168.122.9", "192.168.122.9")], ["192.168.122.9"], [], 0),
        # The gateway inside of the range cannot be leased: .1 to .10 are nine.
        ([("192.168.122.1", "192.168.122.10")], [], [], 9),
        # Two ranges, ten and five; one lease in each, one outside of both.
        (
            [("192.168.122.10", "192.168.122.19"), ("192.168.122.100", "192.168.122.104")],
            ["192.168.122.10", "192.168.122.104", "192.168.122.50"],
            [],
            13,
        ),
        # A reserved address is nobody else's, and leased to its owner it counts once.
        ([("192.168.122.2", "192.168.122.11")], [], ["192.168.122.2"], 9),
        ([("192.168.122.2", "192.168.122.11")], ["192.168.122.2"], ["192.168.122.2"], 9),
        ([("192.168.122.2", "192.168.122.11")], [], ["192.168.122.200"], 10),
        # An IPv6 lease takes no IPv4 address.
        ([("192.168.122.2", "192.168.122.3")], ["fd00::2"], [], 2),
        ([], [], [], 0),
    ],
)
def test_free_addresses(
    ranges: Iterable[tuple[str, str]], taken: Sequence[str], reserved: Sequence[str], free: int
) -> None:
    assert free_addresses(network(ranges=ranges, leases=leases(*taken), reserved=reserved), NOW) == free


@pytest.mark.parametrize(("expires", "free"), [(0, 0), (int(NOW) + 1, 0), (int(NOW), 1), (int(NOW) - 1, 1)])
def test_a_lease_counts_until_it_expires_and_zero_is_never(expires: int, free: int) -> None:
    one = network(ranges=[("192.168.122.9", "192.168.122.9")], leases=leases("192.168.122.9", expires=expires))
    assert free_addresses(one, NOW) == free


# --- offers -------------------------------------------------------------------------------------------------------


def offer(address: str = "192.168.122.17", server: str = "192.168.122.1") -> Answer:
    return Answer(
        OFFER, "06:76:6d:00:00:00", IPv4Interface(f"{address}/24"), IPv4Address(server), bytes(6), GATEWAY.ip, 3600
    )


def test_an_offer_of_libvirt_s_dnsmasq_in_range_is_right() -> None:
    assert judge_offer(network(), offer()) is None
    assert judge_offer(network(), offer("192.168.122.2")) is None
    assert judge_offer(network(), offer("192.168.122.254")) is None


def test_what_is_wrong_with_an_offer() -> None:
    assert told(judge_offer(network(), None)) == ("failed", "NoOffer")
    assert told(judge_offer(network(), offer(server="192.168.122.66"))) == ("failed", "ForeignServer")
    assert told(judge_offer(network(), offer("192.168.122.1"))) == ("failed", "OutOfRange")
    assert told(judge_offer(network(), offer("192.168.123.17"))) == ("failed", "OutOfRange")


def test_an_address_that_is_reserved_may_lie_out_of_range() -> None:
    narrow = network(ranges=[("192.168.122.2", "192.168.122.9")], reserved=["192.168.122.99"])
    assert judge_offer(narrow, offer("192.168.122.99")) is None


# --- the way out --------------------------------------------------------------------------------------------------

FIRST, SECOND = Target("a.org", 9618), Target("b.org", 443)
ANSWERS, REFUSES = Reached("", "connected"), Reached("Refused", "connection refused")
SILENT, NO_ROUTE = Reached("TimedOut", "no answer within 3 s"), Reached("NoRoute", "network is unreachable")


def tries(*results: Reached, remote: bool = True) -> tuple[Attempt, ...]:
    return tuple(Attempt(target, remote, result) for target, result in zip((FIRST, SECOND), results))


def path(
    guest: Sequence[Attempt] = (),
    host: Sequence[Attempt] = (),
    *,
    forwards: bool = True,
    translates: Optional[bool] = True,
    culprit: Optional[str] = None,
) -> Path:
    return Path("virbr0", forwards, translates, guest, host, culprit)


OK = ("ok", "Ok")


@pytest.mark.parametrize(
    ("known", "forwarding"),
    [
        (path(), OK),
        (path(forwards=False), ("failed", "IpForwardOff")),
        (path(translates=False), ("failed", "NatRuleMissing")),
        (path(forwards=False, translates=False), ("failed", "IpForwardOff")),
        (path(translates=None), OK),  # it could not be found out, or is not needed: nothing is held against it
    ],
)
def test_without_packets_the_rules_are_believed(known: Path, forwarding: tuple[str, str]) -> None:
    judged, outbound = judge_path(known)
    assert told(judged) == forwarding
    assert outbound is None


@pytest.mark.parametrize("known", [path(tries(ANSWERS)), path(tries(ANSWERS), translates=False)])
def test_packets_that_came_through_outrank_what_the_rules_look_like(known: Path) -> None:
    assert [told(observation) for observation in judge_path(known)] == [OK, OK]


def test_a_target_on_this_very_host_proves_nothing_about_forwarding() -> None:
    here = tries(ANSWERS, remote=False)
    assert [told(observation) for observation in judge_path(path(here))] == [OK, OK]
    assert told(judge_path(path(here, forwards=False))[0]) == ("failed", "IpForwardOff")
    assert told(judge_path(path(here, translates=False))[0]) == ("failed", "NatRuleMissing")


@pytest.mark.parametrize("other", [REFUSES, SILENT, NO_ROUTE])
def test_one_target_that_answers_is_enough(other: Reached) -> None:
    for guest in (tries(ANSWERS, other), tries(other, ANSWERS)):
        assert [told(observation) for observation in judge_path(path(guest))] == [OK, OK]


@pytest.mark.parametrize(("result", "reason"), [(REFUSES, "Refused"), (SILENT, "TimedOut"), (NO_ROUTE, "NoRoute")])
def test_a_target_that_the_host_does_not_reach_either_is_the_target_s_fault(result: Reached, reason: str) -> None:
    forwarding, outbound = judge_path(path(tries(result), tries(result)))
    assert told(forwarding) == OK
    assert told(outbound) == ("failed", reason)


def test_what_the_host_saw_is_nearer_to_the_cause() -> None:
    # Without a default route the guest hears "unreachable" from the host, and the host itself has no route.
    unreachable = Reached("Unreachable", "no route to host")
    _, outbound = judge_path(path(tries(unreachable), tries(NO_ROUTE)))
    assert told(outbound) == ("failed", "NoRoute")


def test_targets_that_fail_in_different_ways_have_no_single_reason_and_every_one_is_told() -> None:
    _, outbound = judge_path(path(tries(REFUSES, SILENT), tries(REFUSES, SILENT)))
    assert told(outbound) == ("failed", "NoTarget")
    assert outbound is not None
    assert "tcp://a.org:9618: connection refused" in outbound.message
    assert "tcp://b.org:443: no answer within 3 s" in outbound.message


def test_a_target_that_only_the_host_reaches_means_that_packets_are_dropped() -> None:
    lost = path(tries(SILENT), tries(ANSWERS))
    assert lost_on_the_way(lost) == FIRST
    assert told(judge_path(lost)[0]) == ("failed", "Dropped")


def test_of_two_targets_one_that_only_the_host_reaches_is_enough() -> None:
    assert lost_on_the_way(path(tries(SILENT, SILENT), tries(REFUSES, ANSWERS))) == SECOND
    assert lost_on_the_way(path(tries(SILENT, SILENT), tries(REFUSES, SILENT))) is None


def test_targets_that_have_no_ipv4_address_say_nothing_about_a_network_of_ipv4() -> None:
    no_ipv4 = Reached(NO_IPV4, "it has no IPv4 address")
    forwarding, outbound = judge_path(path(tries(no_ipv4, no_ipv4, remote=False)))
    assert told(forwarding) == OK
    assert outbound is not None and outbound.status is Status.DISABLED
    _, outbound = judge_path(path(tries(no_ipv4, SILENT), tries(no_ipv4, SILENT)))
    assert outbound is not None and outbound.status is Status.FAILED


def test_a_nat_rule_that_cannot_be_looked_at_is_proven_by_a_packet_or_unknown() -> None:
    unread = Path("virbr0", True, None, unread=True)
    forwarding, _ = judge_path(unread)
    assert (forwarding.status, forwarding.reason) == (Status.UNKNOWN, "NatRuleUnknown")
    assert told(judge_path(replace(unread, guest=tries(ANSWERS)))[0]) == OK
    assert told(judge_path(replace(unread, forwards=False))[0]) == ("failed", "IpForwardOff")


def test_a_local_service_that_refuses_guests_is_no_fault_of_forwarding() -> None:
    local = path(tries(REFUSES, remote=False), tries(ANSWERS, remote=False))
    assert lost_on_the_way(local) is None
    assert told(judge_path(local)[0]) == OK


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [
        (None, "Dropped"),
        ("table ip filter, chain FORWARD, its policy", "ForwardPolicyDrop"),
        ("table inet site, chain forward, rule: iifname virbr0 drop", "ForeignDrop"),
    ],
)
def test_who_drops_the_packets_is_named(culprit: Optional[str], reason: str) -> None:
    judged, _ = judge_path(path(tries(SILENT), tries(ANSWERS), culprit=culprit))
    assert told(judged) == ("failed", reason)
    assert culprit is None or culprit in judged.message


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (path(tries(SILENT), tries(ANSWERS), forwards=False), "IpForwardOff"),
        (path(tries(SILENT), tries(ANSWERS), translates=False), "NatRuleMissing"),
        (path(tries(SILENT), tries(SILENT), forwards=False), "IpForwardOff"),
    ],
)
def test_a_suspicion_that_the_packets_confirm_is_the_reason(known: Path, reason: str) -> None:
    forwarding, outbound = judge_path(known)
    assert told(forwarding) == ("failed", reason)
    assert outbound is not None and outbound.status is Status.FAILED


# --- libvirt's XML ------------------------------------------------------------------------------------------------

# virsh net-dumpxml default, libvirt 9.0
DEFAULT = """
<network>
  <name>default</name>
  <uuid>2b1c0f5e-25a4-4b8d-9b3f-4a2fd1ad3b4d</uuid>
  <forward mode='nat'>
    <nat>
      <port start='1024' end='65535'/>
    </nat>
  </forward>
  <bridge name='virbr0' stp='on' delay='0'/>
  <mac address='52:54:00:9c:0f:1e'/>
  <ip family='ipv6' address='fd00:1::1' prefix='64'>
    <dhcp><range start='fd00:1::2' end='fd00:1::ff'/></dhcp>
  </ip>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp>
      <range start='192.168.122.2' end='192.168.122.254'/>
      <host mac='52:54:00:00:00:01' name='one' ip='192.168.122.9'/>
      <host mac='52:54:00:00:00:02' name='two'/>
    </dhcp>
  </ip>
</network>
"""


def answer(xml: str) -> dict[str, object]:
    return {"xml": xml, "active": True, "autostart": True, "leases": []}


def test_libvirt_s_description_of_the_default_network() -> None:
    assert parse_network("default", answer(DEFAULT)) == network(reserved=["192.168.122.9"])


def test_leases_come_as_libvirt_tells_them() -> None:
    lease = {"mac": "52:54:00:00:00:01", "address": "192.168.122.9", "expires": 1790000000}
    found = parse_network("default", {**answer(DEFAULT), "leases": [lease]})
    assert found.leases == (Lease("52:54:00:00:00:01", "192.168.122.9", 1790000000),)


def test_a_bare_network() -> None:
    found = parse_network("x", answer("<network><name>x</name><bridge name='virbr1'/></network>"))
    assert (found.forward_mode, found.gateway, found.ranges, found.dns) == ("", None, (), True)
    assert not parse_network("x", answer("<network><dns enable='no'/></network>")).dns
    assert parse_network("x", answer("<network><forward/></network>")).forward_mode == "nat"  # libvirt's default


def test_of_two_subnets_the_one_with_dhcp_is_the_guests() -> None:
    plain, served = "<ip address='10.1.0.1' prefix='24'/>", DEFAULT[DEFAULT.index("<ip address") :]
    found = parse_network("default", answer(f"<network>{plain}{served}"))
    assert (found.gateway, found.ranges) == (network().gateway, network().ranges)


@pytest.mark.parametrize(
    ("address", "prefix"), [("10.0.0.1", 8), ("127.255.0.1", 8), ("172.16.0.1", 16), ("192.168.1.1", 24)]
)
def test_an_address_without_a_prefix_has_that_of_its_class(address: str, prefix: int) -> None:
    found = parse_network("x", answer(f"<network><ip address='{address}'/></network>"))
    assert str(found.gateway) == f"{address}/{prefix}"


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<network>",
        "<network><ip address='192.168.122.999'/></network>",
        "<network><ip netmask='255.255.255.0'/></network>",
        "<network><ip address='10.0.0.1' netmask='255.0.255.0'/></network>",
        "<network><ip address='10.0.0.1'><dhcp><range start='10.0.0.2'/></dhcp></ip></network>",
    ],
)
def test_xml_without_sense_is_an_error_of_libvirt_s(xml: str) -> None:
    with pytest.raises(LibvirtError, match="'default': libvirt's description cannot be understood"):
        parse_network("default", answer(xml))
