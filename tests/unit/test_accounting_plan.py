"""Addresses and names of links, what is LAN, what the startd and the kernel say: decided without touching anything."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from vmnode.accounting import addresses, lan
from vmnode.errors import TryAgain
from vmnode.host.condor import Claim, direct, parse_claim
from vmnode.host.events import is_foreign_change, removes_ours

POOL4, POOL6 = IPv4Network("100.64.0.0/29"), IPv6Network("fd00::/64")

# --- addresses ----------------------------------------------------------------------------------------------------


def test_a_number_is_the_same_place_in_both_pools() -> None:
    numbered = addresses.of_number(5, POOL4, POOL6)
    assert (numbered.job4, numbered.job6) == (IPv4Address("100.64.0.5"), IPv6Address("fd00::5"))
    assert (numbered.gateway4, numbered.gateway6) == (IPv4Address("100.64.0.1"), IPv6Address("fd00::1"))


@pytest.mark.parametrize(
    ("used", "last", "expected"),
    [
        (set(), 2, 3),  # .1 is the gateway's, .2 the probe's
        ({3}, 2, 4),
        (set(), 3, 4),  # 3 was given back: it comes again as late as possible
        (set(), 6, 3),  # .7 is the broadcast address
        ({3, 4, 6}, 5, 5),
        (set(), 0, 3),
    ],
)
def test_numbers_go_round_and_none_is_given_twice(used: set[int], last: int, expected: int) -> None:
    assert addresses.free_number(used, last, POOL4, None) == expected


def test_a_pool_that_is_used_up_says_how_large_it_is() -> None:
    with pytest.raises(TryAgain, match="all 4 addresses for jobs are in use"):
        addresses.free_number({3, 4, 5, 6}, 3, POOL4, None)


def test_the_smaller_pool_counts() -> None:
    assert addresses.free_number(set(), 6, IPv4Network("100.64.0.0/16"), IPv6Network("fd00::/125")) == 3


def test_names_of_links_fit_and_are_never_the_same() -> None:
    names = [addresses.link("1a2b", record) for record in (0, 1, 35, 36, 36**7 - 1)]
    assert names == ["vmnj1a2b0", "vmnj1a2b1", "vmnj1a2bz", "vmnj1a2b10", "vmnj1a2bzzzzzzz"]
    assert all(len(name) <= 15 for name in [*names, addresses.probe("1a2b")])


# --- LAN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "near",
    ["10.1.2.3", "100.64.0.9", "192.0.2.7", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.53"],
)
def test_these_are_lan(near: str) -> None:
    four, _ = lan.prefixes(["10.0.0.0/8"], ["100.64.0.0/16"], ["192.0.2.7"])
    assert any(IPv4Address(near) in prefix for prefix in four)


@pytest.mark.parametrize("near", ["fe80::1", "ff02::1", "fd00::7", "2001:db8::1"])
def test_these_are_lan_by_ipv6(near: str) -> None:
    _, six = lan.prefixes([], ["fd00::/64"], ["2001:db8::1"])
    assert any(IPv6Address(near) in prefix for prefix in six)


@pytest.mark.parametrize("far", ["11.0.0.1", "192.0.2.8", "8.8.8.8"])
def test_all_else_is_wan(far: str) -> None:
    four, _ = lan.prefixes(["10.0.0.0/8"], ["100.64.0.0/16"], ["192.0.2.7"])
    assert not any(IPv4Address(far) in prefix for prefix in four)


# --- the startd's word --------------------------------------------------------------------------------------------

# As condor_status -af:tV of 23.9 and 25.14 printed it.
BUSY = '"slot1_1@node"\t"node#2.0#1795275969"\t"alice@node"\t5\tfalse\tundefined'


def test_a_claimed_slot_tells_its_job() -> None:
    assert parse_claim(BUSY, "slot1_1") == Claim("node#2.0#1795275969", "alice@node", 5, exempt=False, docker=False)


@pytest.mark.parametrize(
    "line",
    [
        BUSY.replace("slot1_1", "slot1_10"),
        '"slot1@node"\tundefined\tundefined\tundefined\tfalse\tundefined',
        "",
        "condor_status: something",
    ],
)
def test_other_slots_and_those_without_a_job_tell_nothing(line: str) -> None:
    assert parse_claim(line, "slot1_1") is None
    assert parse_claim(line, "slot1") is None


def test_what_keeps_a_job_on_the_host_is_read() -> None:
    exempt = parse_claim(BUSY.replace("false", "true"), "slot1_1")
    docker = parse_claim(BUSY.replace("undefined", "true"), "slot1_1")
    assert exempt is not None and (exempt.exempt, exempt.docker) == (True, False)
    assert docker is not None and (docker.exempt, docker.docker) == (False, True)


def test_the_startd_is_asked_directly_and_not_by_its_broker() -> None:
    address = "<198.51.100.7:9618?addrs=198.51.100.7-9618&CCBID=198.51.100.1:9618#4&PrivNet=ap&sock=startd_1>"
    assert direct(address) == "<198.51.100.7:9618?addrs=198.51.100.7-9618&sock=startd_1>"
    assert direct("<198.51.100.7:9618>") == "<198.51.100.7:9618>"


# --- the kernel's word --------------------------------------------------------------------------------------------

NEWRULE, DELRULE, DELTABLE, DELSETELEM, NEWGEN = ((10 << 8) | message for message in (6, 8, 2, 14, 15))


def message(kind: int, table: str) -> tuple[int, bytes]:
    name = table.encode() + b"\0"
    return kind, bytes(4) + struct.pack("=HH", 4 + len(name), 1) + name + bytes(-len(name) % 4)


def test_our_own_jobs_are_no_change_of_the_firewall() -> None:
    jobs = [message(DELSETELEM, "vmnode1a2b"), (NEWGEN, bytes(8))]
    assert not is_foreign_change(jobs) and not removes_ours(jobs)


def test_rules_of_ours_that_go_are_noticed_and_those_of_others_that_come() -> None:
    assert removes_ours([message(DELTABLE, "vmnode1a2b")])
    assert removes_ours([message(DELRULE, "vmnode1a2b")])
    assert not removes_ours([message(DELRULE, "filter"), message(NEWRULE, "vmnode1a2b")])
    assert is_foreign_change([message(NEWRULE, "filter")])


def test_messages_that_were_lost_may_have_been_any() -> None:
    assert is_foreign_change([(-1, b"")]) and removes_ours([(-1, b"")])
