"""Whose tap it is, and what a job's guest used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmnode.accounting.guests import (
    Guest,
    by_domain,
    counted,
    domain_name,
    known,
    read,
    restarted,
    to_remove,
    why_incomplete,
    write,
)
from vmnode.accounting.record import Process, Record
from vmnode.errors import StateError
from vmnode.host.libvirt import NicLink, Nics
from vmnode.host.taps import Tap
from vmnode.overlays import Overlay
from vmnode.usage import NONE, Traffic, Usage

BOOT = "b00t"
JOB = "submit.example.org#12.0#1790000000"
RECORD = Record(
    id=17,
    boot_id=BOOT,
    link="vmnjab12h",
    number=3,
    starter=Process(1230, 98765),
    slot="slot1_1",
    started_at=1790000100.0,
    seen_at=1790000160.0,
    job=JOB,
    owner="alice@example.org",
    universe=13,
)
DOMAIN = "alice_example.org_12.0"
ONE, OTHER = Tap("vnet0", 7), Tap("vnet0", 9)


def overlay(domain: str, job: str = JOB) -> Overlay:
    return Overlay(domain, job, "alice", 1790000110.0, ())


def nics(*links: NicLink, without: int = 0) -> Nics:
    return Nics(len(links) + without, links)


def on_bridge(tap: Tap) -> NicLink:
    return NicLink(tap.name, tap.index, bridged=True)


def usage(lan_in: int = 0, wan_out: int = 0) -> Usage:
    """Packets of 100 bytes."""
    return Usage(lan_in=Traffic(100 * lan_in, lan_in), wan_out=Traffic(100 * wan_out, wan_out))


# --- from domains to jobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "job", "name"),
    [
        ("alice@example.org", JOB, "alice_example.org_12.0"),
        ("alice@a@b", "a#b#3.14#5", "alice_a_b_3.14"),  # every @; and a schedd may have any name
        ("", JOB, None),
        ("alice@example.org", "", None),
    ],
)
def test_the_name_that_htcondor_gives_to_a_domain(owner: str, job: str, name: str) -> None:
    assert domain_name(owner, job) == name


def test_a_domain_is_known_by_its_record_or_else_by_its_name() -> None:
    assert by_domain([RECORD], []) == {DOMAIN: 17}
    assert by_domain([RECORD], [overlay("any_name")]) == {DOMAIN: 17, "any_name": 17}
    assert by_domain([RECORD], [overlay("any_name", job="another#1.0#1")]) == {DOMAIN: 17}


def test_a_domain_s_record_says_more_than_its_name() -> None:
    other = replace(RECORD, id=18, job="elsewhere.example.org#12.0#1790000001")
    found = by_domain([RECORD, other], [overlay(DOMAIN)])  # two schedds with the same job id and user
    assert found == {DOMAIN: 17}


def test_other_universes_have_no_guests() -> None:
    assert by_domain([replace(RECORD, universe=5), replace(RECORD, job="")], [overlay(DOMAIN)]) == {}


def test_a_job_that_comes_again_is_another_record() -> None:
    again = replace(RECORD, id=18, started_at=RECORD.started_at + 60)
    assert by_domain([again, RECORD], [overlay(DOMAIN)]) == {DOMAIN: 18}


# --- from domains to taps -----------------------------------------------------------------------------------------


def test_a_guest_s_taps_are_all_that_it_ever_had() -> None:
    first = known({}, [RECORD], [], {DOMAIN: nics(on_bridge(ONE)), "foreign": nics(on_bridge(Tap("vnet1", 8)))})
    assert first == {17: Guest(DOMAIN, frozenset([ONE]))}
    assert known(first, [RECORD], [], {}) == first  # it has ended, or libvirt does not answer
    second = known(first, [RECORD], [], {DOMAIN: nics(on_bridge(OTHER))})  # it was started once more
    assert second == {17: Guest(DOMAIN, frozenset([ONE, OTHER]))}
    assert known(second, [], [], {DOMAIN: nics(on_bridge(OTHER))}) == {}


def test_a_guest_stays_known_when_its_domain_has_ended() -> None:
    first = known({}, [RECORD], [overlay("any_name")], {"any_name": nics(on_bridge(ONE))})
    assert first == {17: Guest("any_name", frozenset([ONE]))}
    assert known(first, [RECORD], [], {}) == first


def test_a_guest_that_nobody_saw_is_not_known() -> None:
    assert known({}, [RECORD], [overlay(DOMAIN)], {}) == {}


@pytest.mark.parametrize(
    ("seen", "taps", "why"),
    [
        (nics(), [], ""),
        (nics(on_bridge(ONE)), [ONE], ""),
        (nics(without=1), [], "1 of the guest's 1 network interfaces have no tap (vm_networking_type = user)"),
        (nics(on_bridge(ONE), without=2), [ONE], "2 of the guest's 3 network interfaces have no tap"),
        (nics(NicLink("macvtap0", 7, bridged=False)), [], "the guest's macvtap0 is no port of a bridge"),
    ],
)
def test_what_cannot_be_counted_is_said(seen: Nics, taps: list[Tap], why: str) -> None:
    guest = known({}, [RECORD], [], {DOMAIN: seen})[17]
    assert guest.taps == set(taps)
    assert guest.uncounted.startswith(why) and bool(guest.uncounted) == bool(why)


def test_a_guest_that_was_seen_before_its_tap_was_there_is_no_different() -> None:
    early = known({}, [RECORD], [], {DOMAIN: nics(without=1)})
    assert early[17].uncounted
    assert counted(RECORD, early[17], {}) == RECORD
    assert known(early, [RECORD], [], {DOMAIN: nics(on_bridge(ONE))}) == {17: Guest(DOMAIN, frozenset([ONE]))}


def test_counts_are_removed_when_nobody_needs_them() -> None:
    reading = [ONE, OTHER, Tap("vnet5", 12)]
    guests = [Guest(DOMAIN, frozenset([ONE]))]
    assert to_remove(reading, guests, present={1, 2, 12}) == [OTHER]  # another's that is there may belong to a job yet
    assert to_remove(reading, [], present={1, 2, 9, 12}) == [ONE]


# --- what it used -------------------------------------------------------------------------------------------------


def test_the_taps_of_a_guest_are_added_up() -> None:
    guest = Guest(DOMAIN, frozenset([ONE, OTHER]))
    reading = {ONE: usage(2, 3), OTHER: usage(5), Tap("vnet1", 8): usage(1000)}
    found = counted(RECORD, guest, reading)
    assert found.guest == Usage(lan_in=Traffic(700, 7), wan_out=Traffic(300, 3))
    assert found.usage == NONE and found.partial_since is None
    assert counted(found, guest, reading) == found
    assert counted(found, guest, {**reading, OTHER: usage(6)}).guest == usage(8, 3)


def test_a_guest_that_is_silent_has_used_nothing_and_one_that_is_not_counted_has_no_number() -> None:
    assert counted(RECORD, Guest(DOMAIN), {}).guest == NONE
    assert counted(RECORD, Guest(DOMAIN, frozenset([ONE])), {}).guest == NONE
    assert counted(RECORD, Guest(DOMAIN, uncounted="no tap"), {}).guest is None
    assert counted(RECORD, Guest(DOMAIN, frozenset([ONE]), "one more has no tap"), {ONE: usage(1)}).guest == usage(1)


def test_counts_that_began_anew_are_a_gap_and_no_zero() -> None:
    guest = Guest(DOMAIN, frozenset([ONE]))
    record = counted(RECORD, guest, {ONE: usage(10)})
    found = counted(record, guest, {ONE: usage(2)})
    assert (found.guest, found.partial_since) == (usage(12), RECORD.seen_at)
    known_to_be_lost = counted(restarted(record), guest, {ONE: usage(30)})
    assert (known_to_be_lost.guest, known_to_be_lost.partial_since) == (usage(40), RECORD.seen_at)
    assert restarted(replace(RECORD, partial_since=5.0)).partial_since == 5.0
    assert restarted(replace(RECORD, universe=5)) == replace(RECORD, universe=5)


def test_why_a_record_is_not_complete() -> None:
    assert why_incomplete(RECORD, Guest(DOMAIN)) == ""
    assert why_incomplete(RECORD, Guest(DOMAIN, uncounted="no tap")) == "no tap"
    assert why_incomplete(RECORD, None).startswith("its guest was not seen")
    assert why_incomplete(replace(RECORD, universe=5), None) == ""


# --- the file -----------------------------------------------------------------------------------------------------


def test_the_next_instance_knows_the_guests_unless_the_node_was_booted() -> None:
    guests = {17: Guest(DOMAIN, frozenset([ONE, OTHER])), 18: Guest("bob_example.org_1.0", uncounted="no tap")}
    assert read(write(guests, BOOT), BOOT) == guests
    assert read(write(guests, BOOT), "another") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"version": 2, "boot_id": "b00t", "guests": []}',
        b'{"version": 1, "boot_id": "b00t", "guests": [{"record": 17}]}',
        b'{"version": 1, "boot_id": "b00t", "guests": [{"record": 1, "domain": "", "taps": [["a"]], "uncounted": ""}]}',
    ],
)
def test_a_damaged_file_is_refused(data: bytes) -> None:
    with pytest.raises(StateError):
        read(data, BOOT)
