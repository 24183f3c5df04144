"""From what was seen to what is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.samples import condition, conditions, observation
from vmnode.conditions import BY_NAME, KINDS, NAMES, Condition, Observation, Status
from vmnode.health.decide import (
    Thresholds,
    blocked,
    blocked_by,
    decide,
    decide_all,
    first_broken,
    has_default_network,
    state_of,
    unsettled,
)

OK, FAILED, UNKNOWN, DISABLED = Status.OK, Status.FAILED, Status.UNKNOWN, Status.DISABLED
LETTERS = {"o": OK, "f": FAILED, "u": UNKNOWN, "d": DISABLED}
statuses = st.sampled_from(list(Status))


def story(seen: str, fail_after: int, recover_after: int) -> str:
    """The verdicts after each of these observations, a letter each."""
    verdict: Optional[Condition] = None
    told = ""
    for moment, letter in enumerate(seen):
        verdict = decide(
            verdict, observation("kvm", LETTERS[letter]), float(moment), Thresholds(fail_after, recover_after)
        )
        told += verdict.status.value[0]
    return told


@pytest.mark.parametrize(
    ("seen", "fail_after", "recover_after", "told"),
    [
        # One bad check is enough to fail, two good ones in a row bring it back: the defaults.
        ("ofoo", 1, 2, "offo"),
        ("ofofoo", 1, 2, "offffo"),
        # Three bad ones in a row, as network.outbound has it; a good one between starts the count afresh.
        ("offf", 3, 2, "ooof"),
        ("offoff", 3, 2, "oooooo"),
        ("offofffoo", 3, 2, "ooooooffo"),
        ("ofoooo", 1, 4, "offffo"),
        # What cannot be found out is unknown at once, and what is found out then holds at once.
        ("ou", 3, 3, "ou"),
        ("fu", 3, 3, "fu"),
        ("uo", 3, 3, "uo"),
        # but for a failure, which takes its time from there, too.
        ("uf", 1, 3, "uf"),
        ("ufff", 3, 3, "uuuf"),
        ("oufff", 3, 3, "ouuuf"),
        # The first observation stands for itself.
        ("f", 3, 3, "f"),
        ("o", 3, 3, "o"),
        # Not applicable holds at once, in both directions.
        ("od", 3, 3, "od"),
        ("do", 3, 3, "do"),
        ("fd", 3, 3, "fd"),
        ("df", 3, 3, "df"),
    ],
)
def test_thresholds(seen: str, fail_after: int, recover_after: int, told: str) -> None:
    assert story(seen, fail_after, recover_after) == told


def test_since_is_kept_while_the_status_holds_and_the_words_are_the_latest() -> None:
    before = condition("kvm", FAILED, since=10)
    after = decide(before, Observation("kvm", FAILED, "Busy", "now it is busy", "wait"), 99, Thresholds(1, 2))
    assert (after.since, after.reason, after.message, after.hint) == (10, "Busy", "now it is busy", "wait")


def test_since_is_the_moment_of_the_change() -> None:
    limits = Thresholds(2, 2)
    first = decide(condition("kvm", OK, since=10), observation("kvm", FAILED), 20, limits)
    assert (first.status, first.since, first.contrary) == (OK, 10, 1)
    second = decide(first, observation("kvm", FAILED), 30, limits)
    assert (second.status, second.since, second.contrary) == (FAILED, 30, 0)


def test_a_verdict_that_waits_for_confirmation_keeps_its_words_and_is_unsettled() -> None:
    waiting = decide(condition("kvm", OK), observation("kvm", FAILED, "DeviceMissing"), 1, Thresholds(2, 2))
    assert waiting.reason == "Seen"
    assert unsettled([condition("libvirt"), waiting])
    assert not unsettled([condition("libvirt")])


@given(st.lists(statuses, min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 5))
def test_a_failure_that_lasts_is_told_in_the_end_and_unknown_is_never_shown_as_healthy(
    seen: Sequence[Status], fail_after: int, recover_after: int
) -> None:
    verdict: Optional[Condition] = None
    for moment, status in enumerate(seen):
        verdict = decide(verdict, observation("kvm", status), float(moment), Thresholds(fail_after, recover_after))
        if status in (UNKNOWN, DISABLED):
            assert verdict.status is status
        run = 0
        for earlier in reversed(seen[: moment + 1]):
            if earlier is not status:
                break
            run += 1
        if run >= max(fail_after, recover_after):
            assert verdict.status is status
        assert verdict.contrary < max(fail_after, recover_after)


def test_verdicts_come_in_the_order_of_the_table_and_thresholds_are_each_condition_s_own() -> None:
    limits = {name: Thresholds(3 if name == "network.outbound" else 1, 2) for name in NAMES}
    before = {kind.name: condition(kind.name) for kind in KINDS}
    verdicts = decide_all(before, [observation(name, FAILED) for name in reversed(NAMES)], 60, limits)
    assert tuple(verdict.name for verdict in verdicts) == NAMES
    assert [verdict.name for verdict in verdicts if verdict.status is OK] == ["network.outbound"]


def test_what_was_not_looked_at_this_time_stays_as_it_was() -> None:
    limits = dict.fromkeys(NAMES, Thresholds(1, 2))
    before = {kind.name: condition(kind.name) for kind in KINDS}
    seen = [observation(name) for name in NAMES if name != "network.outbound"]
    verdicts = {verdict.name: verdict for verdict in decide_all(before, seen, 60, limits)}
    assert verdicts["network.outbound"] == before["network.outbound"]


def test_what_was_never_looked_at_is_not_made_up() -> None:
    limits = dict.fromkeys(NAMES, Thresholds(1, 2))
    assert [verdict.name for verdict in decide_all({}, [observation("kvm")], 60, limits)] == ["kvm"]


# --- blocked -----------------------------------------------------------------------------------------------------


def all_ok(**others: Status) -> dict[str, Observation]:
    seen = {name: observation(name) for name in NAMES}
    for name, status in others.items():
        seen[name.replace("_", ".")] = observation(name.replace("_", "."), status)
    return seen


@pytest.mark.parametrize(
    ("broken", "dependants"),
    [
        (
            "libvirt",
            {
                "network.active",
                "network.bridge",
                "network.dnsmasq",
                "network.dhcp",
                "network.dns",
                "network.forwarding",
                "network.outbound",
                "canary",
            },
        ),
        (
            "network.bridge",
            {
                "network.dnsmasq",
                "network.dhcp",
                "network.dns",
                "network.forwarding",
                "network.outbound",
                "canary",
            },
        ),
        ("network.dnsmasq", {"network.dhcp", "network.dns", "network.outbound", "canary"}),
        ("network.forwarding", {"network.outbound", "canary"}),
        ("kvm", {"canary"}),
        ("execute-dir", set()),
        ("images", set()),
    ],
)
@pytest.mark.parametrize("status", [FAILED, UNKNOWN])
def test_a_broken_link_blocks_all_that_hangs_on_it_and_nothing_else(
    broken: str, dependants: set[str], status: Status
) -> None:
    seen = {**{name: observation(name) for name in NAMES}, broken: observation(broken, status)}
    assert {name for name in NAMES if blocked_by(name, seen) is not None} == dependants
    assert {blocked_by(name, seen) for name in dependants} <= {broken}


def test_the_first_broken_link_is_named_through_the_whole_chain() -> None:
    # libvirt hangs, so everything behind it was unknown in this check; the admin is to read "libvirt".
    seen = {name: observation(name, UNKNOWN) for name in NAMES}
    seen["kvm"] = observation("kvm")
    seen["libvirt"] = observation("libvirt", FAILED)
    for name in NAMES:
        if name.startswith("network.") or name == "canary":
            assert blocked_by(name, seen) == "libvirt"


def test_of_two_broken_branches_the_earlier_one_is_named() -> None:
    seen = all_ok(network_forwarding=FAILED, network_dnsmasq=FAILED)
    assert blocked_by("network.outbound", seen) == "network.dnsmasq"


def test_a_prerequisite_that_does_not_apply_blocks_nothing_but_its_own_prerequisites_do() -> None:
    assert blocked_by("network.outbound", all_ok(network_forwarding=DISABLED)) is None
    seen = all_ok(network_dnsmasq=DISABLED, network_bridge=FAILED)
    assert blocked_by("network.dhcp", seen) == "network.bridge"


def test_a_blocked_condition_is_unknown_and_says_by_what() -> None:
    seen = blocked("network.dns", Observation("network.dhcp", FAILED, "NoOffer", "silence"))
    assert (seen.name, seen.status, seen.reason) == ("network.dns", UNKNOWN, "Blocked")
    assert seen.message == "not checked: network.dhcp is failed (NoOffer)"


def test_prerequisites_stand_before_what_needs_them() -> None:
    for kind in KINDS:
        assert all(NAMES.index(required) < NAMES.index(kind.name) for required in kind.requires)


# --- the node as a whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (conditions(), True),
        (conditions(canary=DISABLED), True),
        (conditions(kvm=FAILED), False),
        (conditions(kvm=UNKNOWN), None),
        (conditions(network_dhcp=FAILED, network_dns=UNKNOWN), False),
        (conditions(execute_dir=FAILED), False),
        (conditions(execute_dir=UNKNOWN), None),
        # These count for the state of the node, not for this attribute.
        (conditions(qemu_img=FAILED, images=FAILED), True),
        (conditions(qemu_img=UNKNOWN, images=UNKNOWN), True),
        # No virtual network was looked at: nothing is claimed about one.
        (conditions(network_active=DISABLED), None),
        ((), None),
        ((condition("kvm"),), None),
    ],
)
def test_has_default_network(verdicts: Sequence[Condition], expected: Optional[bool]) -> None:
    assert has_default_network(verdicts) is expected


@given(st.lists(statuses, min_size=len(KINDS), max_size=len(KINDS)))
def test_the_attribute_is_never_true_when_anything_it_needs_is_not_ok(drawn: Sequence[Status]) -> None:
    verdicts = [condition(kind.name, status) for kind, status in zip(KINDS, drawn)]
    needed = [verdict.status for verdict in verdicts if BY_NAME[verdict.name].guest]
    value = has_default_network(verdicts)
    if FAILED in needed:
        assert value is False
    elif UNKNOWN in needed:
        assert value is None
    else:
        assert value is (True if verdicts[NAMES.index("network.active")].status is OK else None)


def test_the_contract_names_what_counts_for_the_attribute() -> None:
    counts = {"kvm", "libvirt", "execute-dir", "canary"} | {name for name in NAMES if name.startswith("network.")}
    assert {kind.name for kind in KINDS if kind.guest} == counts


@pytest.mark.parametrize(
    ("verdicts", "state"),
    [
        (conditions(), "healthy"),
        (conditions(images=DISABLED, canary=DISABLED), "healthy"),
        (tuple(condition(name, DISABLED) for name in NAMES), "healthy"),
        (conditions(images=FAILED), "failed"),
        (conditions(images=UNKNOWN), "unknown"),
        (conditions(images=UNKNOWN, kvm=FAILED), "failed"),
        ((), "unknown"),
    ],
)
def test_the_state_of_the_node(verdicts: Sequence[Condition], state: str) -> None:
    assert state_of(verdicts) == state


def test_the_first_broken_is_the_first_failed_and_only_without_one_the_first_unknown() -> None:
    broken = first_broken(conditions(kvm=UNKNOWN, network_dhcp=FAILED, images=FAILED))
    assert broken is not None and broken.name == "network.dhcp"
    broken = first_broken(conditions(kvm=UNKNOWN, network_dhcp=UNKNOWN))
    assert broken is not None and broken.name == "kvm"
    assert first_broken(conditions(kvm=DISABLED)) is None
