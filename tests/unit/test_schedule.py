"""When the next check runs and how much it does; times are CLOCK_BOOTTIME in seconds."""

from __future__ import annotations

import pytest

from tests.unit.samples import condition, conditions
from vmnode.conditions import Condition, Status
from vmnode.config import Health
from vmnode.health.check import Plan
from vmnode.health.schedule import CONNECTION, FIREWALL, LINK, NETWORK, PROCESS, START, History, due, plan, thresholds

HEALTH = Health()  # a check every 60 s, outbound every 600 s, a fresh MAC address every 3600 s
HEALTHY = {verdict.name: verdict for verdict in conditions()}
CHECKED = History(checked=1000, fresh_dhcp=1000, outbound=1000)


def with_verdict(verdict: Condition) -> dict[str, Condition]:
    return {**HEALTHY, verdict.name: verdict}


def test_the_first_check_is_due_at_once() -> None:
    assert due({START}, (), History(), HEALTH) < 0


def test_a_quiet_healthy_node_is_checked_every_interval() -> None:
    assert due((), HEALTHY.values(), CHECKED, HEALTH) == 1060


@pytest.mark.parametrize("event", [START, NETWORK, CONNECTION, PROCESS, LINK])
def test_an_event_about_our_network_is_followed_within_a_second_of_the_last_check(event: str) -> None:
    assert due({event}, HEALTHY.values(), CHECKED, HEALTH) == 1001


def test_foreign_firewall_changes_alone_are_rationed_to_one_check_in_ten_seconds() -> None:
    assert due({FIREWALL}, HEALTHY.values(), CHECKED, HEALTH) == 1001
    rationed = CHECKED.after({FIREWALL}, Plan(fresh_dhcp=False, outbound=True), None, 1002)
    assert due({FIREWALL}, HEALTHY.values(), rationed, HEALTH) == 1012
    assert due({FIREWALL, LINK}, HEALTHY.values(), rationed, HEALTH) == 1003


def test_an_event_long_after_the_last_check_is_overdue_at_once() -> None:
    assert due({LINK}, HEALTHY.values(), History(checked=1000), HEALTH) <= 1059


def test_a_verdict_that_waits_for_confirmation_is_looked_at_after_a_second() -> None:
    waiting = with_verdict(condition("kvm", contrary=1))
    assert due((), waiting.values(), CHECKED, HEALTH) == 1001


@pytest.mark.parametrize("status", [Status.FAILED, Status.UNKNOWN])
def test_a_broken_node_is_looked_at_every_ten_seconds(status: Status) -> None:
    broken = with_verdict(condition("kvm", status))
    assert due((), broken.values(), CHECKED, HEALTH) == 1010
    assert due((), broken.values(), CHECKED, Health(interval_s=5)) == 1005


def test_disabled_conditions_change_no_time() -> None:
    assert due((), with_verdict(condition("images", Status.DISABLED)).values(), CHECKED, HEALTH) == 1060


def test_a_periodic_check_of_a_healthy_node_disturbs_nobody() -> None:
    assert plan((), HEALTHY, CHECKED, HEALTH, 1060) == Plan(fresh_dhcp=False, outbound=False)


@pytest.mark.parametrize(
    ("event", "fresh", "outbound"),
    [
        (START, True, True),
        (NETWORK, True, True),
        (PROCESS, True, True),
        (LINK, False, True),
        (FIREWALL, False, True),
        (CONNECTION, False, False),
    ],
)
def test_what_each_event_asks_for(event: str, fresh: bool, outbound: bool) -> None:
    assert plan({event}, HEALTHY, CHECKED.heard(event, 1000.5), HEALTH, 1001) == Plan(fresh, outbound)


def test_a_fresh_mac_address_asks_hourly_and_targets_are_tried_every_ten_minutes() -> None:
    hour = History(checked=4590, fresh_dhcp=1000, outbound=4590)
    assert not plan((), HEALTHY, hour, HEALTH, 4599).fresh_dhcp
    assert plan((), HEALTHY, hour, HEALTH, 4600).fresh_dhcp
    assert not plan((), HEALTHY, CHECKED, HEALTH, 1599).outbound
    assert plan((), HEALTHY, CHECKED, HEALTH, 1600).outbound


def test_jitter_spreads_the_nodes_of_a_pool() -> None:
    early = History(checked=1000, fresh_dhcp=1000, outbound=1000, jitter=0.9)
    assert not plan((), HEALTHY, early, HEALTH, 1539).outbound
    assert plan((), HEALTHY, early, HEALTH, 1540).outbound


@pytest.mark.parametrize(
    "doubt",
    [
        condition("network.outbound", Status.FAILED),
        condition("network.outbound", Status.UNKNOWN),
        condition("network.outbound", contrary=1),
        condition("network.forwarding", Status.FAILED),
    ],
)
def test_targets_are_tried_as_long_as_the_way_out_is_in_doubt(doubt: Condition) -> None:
    assert plan((), with_verdict(doubt), CHECKED, HEALTH, 1001) == Plan(fresh_dhcp=False, outbound=True)


def test_other_troubles_do_not_load_the_collector() -> None:
    assert not plan((), with_verdict(condition("kvm", Status.FAILED)), CHECKED, HEALTH, 1010).outbound


def test_a_node_without_targets_is_not_in_doubt() -> None:
    assert not plan((), with_verdict(condition("network.outbound", Status.DISABLED)), CHECKED, HEALTH, 1010).outbound


def test_history_remembers_what_was_done() -> None:
    tried = CHECKED.after((), Plan(fresh_dhcp=False, outbound=True), 1000, 2000)
    assert tried == History(checked=2000, fresh_dhcp=1000, outbound=2000)
    asked = CHECKED.after((), Plan(fresh_dhcp=True, outbound=False), 1995, 2000)
    assert asked == History(checked=2000, fresh_dhcp=1995, outbound=1000)


def test_a_new_guests_question_that_could_not_be_asked_stays_owed() -> None:
    changed = CHECKED.heard(NETWORK, 1500)
    blocked = changed.after((), Plan(fresh_dhcp=True, outbound=True), None, 1501)
    assert plan((), HEALTHY, blocked, HEALTH, 1511).fresh_dhcp
    asked = changed.after((), Plan(fresh_dhcp=True, outbound=True), 1505, 1508)
    assert not plan((), HEALTHY, asked, HEALTH, 1511).fresh_dhcp


def test_an_event_before_the_question_was_sent_is_answered_by_it() -> None:
    heard_during_the_check = CHECKED.heard(NETWORK, 1502).after((), Plan(True, True), 1505, 1508)
    assert not plan({NETWORK}, HEALTHY, heard_during_the_check, HEALTH, 1509).fresh_dhcp


def test_a_failed_dhcp_condition_comes_back_only_by_a_new_guests_proof() -> None:
    failed = with_verdict(condition("network.dhcp", Status.FAILED))
    recovering = with_verdict(condition("network.dhcp", Status.FAILED, contrary=1))
    assert plan((), failed, CHECKED, HEALTH, 1010).fresh_dhcp
    assert plan((), recovering, CHECKED, HEALTH, 1010).fresh_dhcp


def test_only_outbound_has_a_patience_of_its_own() -> None:
    assert thresholds("network.outbound", HEALTH).fail_after == 3
    assert thresholds("network.dhcp", HEALTH).fail_after == 1
    assert thresholds("network.dhcp", HEALTH).recover_after == 2
