"""Which processes outlived their starter, what is done about them, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import pytest

from vmnode.accounting.leftovers import (
    MOST_FOUND,
    Event,
    Finding,
    Leftover,
    Plan,
    Policy,
    Resident,
    Starter,
    Watched,
    find,
    job_group,
    plan,
    readable,
    slot_of,
)
from vmnode.accounting.record import Process, Record

GROUP_23 = "/system.slice/condor.service/htcondor/condor_var_lib_condor_execute_slot1_1@wn7"
GROUP_25 = "/htcondor/_var_lib_condor_execute_slot1_1@wn7.slice"
STARTER = Process(1230, 5000)
ALICE, BOB = 1001, 1002


def record(**changes: object) -> Record:
    given = {"id": 7, "boot_id": "b", "link": "vmnj7", "number": 7, "starter": STARTER, "slot": "slot1_1"}
    return Record(**{**given, "started_at": 100.0, "seen_at": 100.0, "job": "ap#12.0#1", "owner": "alice", **changes})  # type: ignore[arg-type]


def resident(pid: int = 1300, *, uid: int = ALICE, link: str = "", group: str = "", namespace: int = 77) -> Resident:
    return Resident(Process(pid, 6000), "sleep", uid, namespace, link, group)


def pids(leftovers: list[Leftover]) -> list[int]:
    return [leftover.resident.process.pid for leftover in leftovers]


# --- control groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroups", "group"),
    [
        (f"0::{GROUP_23}\n", GROUP_23),
        (f"0::{GROUP_25}/_var_lib_condor_execute_slot1_1@wn7.scope\n", GROUP_25),
        (f"0::{GROUP_23}/sshd\n", GROUP_23),
        (f"0::{GROUP_25}/x.scope/htcondor/_home_alice_execute_slot1@pilot.slice/y.scope\n", GROUP_25),
        ("4:memory:/htcondor/condor_x_slot2@wn7\n0::/\n", "/htcondor/condor_x_slot2@wn7"),
        ("0::/system.slice/condor.service\n", ""),
        ("0::/htcondor\n", ""),
        ("0::/htcondor/\n", ""),
        ("0::/user.slice/my-htcondor/x\n", ""),
        ("", ""),
    ],
)
def test_the_group_of_a_job_is_the_outermost_below_the_base(cgroups: str, group: str) -> None:
    assert job_group(cgroups) == group


def test_the_base_is_as_configured() -> None:
    assert job_group("0::/batch/condor_x_slot1@wn7\n", "batch") == "/batch/condor_x_slot1@wn7"
    assert job_group(f"0::{GROUP_23}\n", "batch") == ""


@pytest.mark.parametrize(
    ("arguments", "slot"),
    [
        ("condor_starter -f -local-name slot_type_1 -a slot1_1 ap.example.org", "slot1_1"),
        ("condor_starter -f -a 12 -slot-name slot1_1 ap.example.org", "slot1_1"),
        ("condor_starter -f -a 12.0 ap.example.org", ""),
        ("condor_starter -f ap.example.org", ""),
        ("condor_starter -f -a", ""),
        ("condor_starter -f -a slot1_1@x ap.example.org", ""),
    ],
)
def test_a_starter_s_arguments_tell_its_slot(arguments: str, slot: str) -> None:
    assert slot_of(arguments.split()) == slot


# --- which are leftovers ------------------------------------------------------------------------------------------


def test_in_a_namespace_whose_starter_lives_there_is_no_leftover() -> None:
    assert find([resident(link="vmnj7")], [], [STARTER], [record()]) == []


def test_in_a_namespace_whose_starter_is_gone_everybody_is_left_over() -> None:
    found = find([resident(link="vmnj7"), resident(1301, link="vmnj7", uid=BOB)], [], [], [record()])
    assert found == [
        Leftover(resident(link="vmnj7"), "vmnj7", record()),
        Leftover(resident(1301, link="vmnj7", uid=BOB), "vmnj7", record()),
    ]


def test_another_process_with_the_starter_s_id_is_not_the_starter() -> None:
    assert pids(find([resident(link="vmnj7")], [], [Process(1230, 9999)], [record()])) == [1300]


def test_a_starter_in_the_namespace_is_believed_without_a_record() -> None:
    assert find([resident(link="vmnj7", namespace=77)], [Starter("slot1_1", 0, 77)], [], []) == []
    assert pids(find([resident(link="vmnj7", namespace=77)], [Starter("slot1_1", 0, 78)], [], [])) == [1300]


@pytest.mark.parametrize("group", [GROUP_23, GROUP_25])
def test_without_accounting_the_group_tells(group: str) -> None:
    left = resident(group=group)
    assert find([left], [Starter("slot1_1", 0, 1)], [], []) == []
    assert find([left], [Starter("slot1_10", 0, 1), Starter("slot1", 0, 1)], [], []) == [Leftover(left, group, None)]


def test_who_left_the_namespace_is_found_by_group_and_named_by_the_slot_s_last_record() -> None:
    old = record(id=3, link="vmnj3", job="ap#9.0#1", starter=Process(800, 1))
    left = resident(group=GROUP_25, namespace=99)
    assert find([left], [], [], [old, record()]) == [Leftover(left, GROUP_25, record())]
    assert find([left], [], [STARTER], [old, record()]) == []


def test_a_starter_of_root_that_does_not_tell_its_slot_may_be_everybody_s() -> None:
    assert find([resident(group=GROUP_23)], [Starter("", 0, 1)], [], []) == []


def test_a_starter_of_a_user_protects_nobody_else() -> None:
    both = [resident(1300, uid=ALICE, group=GROUP_23), resident(1301, uid=BOB, group=GROUP_23)]
    assert pids(find(both, [Starter("slot1_1", ALICE, 1)], [], [])) == [1301]


# --- what is done -------------------------------------------------------------------------------------------------

REPORT, END = Policy(end=False, grace_s=60.0), Policy(end=True, grace_s=60.0)


def left(pid: int = 1300, uid: int = ALICE, place: str = "vmnj7") -> Leftover:
    return Leftover(resident(pid, uid=uid, link=place), place, record(link=place))


class Watch:
    """Looks, one after the other."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.watched: Mapping[str, Watched] = {}

    def look(self, now: float, *leftovers: Leftover) -> tuple[list[int], list[int], list[int]]:
        """Who is told of, terminated, killed."""
        result: Plan = plan(self.watched, leftovers, now, self.policy)
        self.watched = result.watched
        return pids(list(result.found)), pids(list(result.terminate)), pids(list(result.kill))


def test_who_is_gone_within_ten_seconds_is_not_told_of() -> None:
    watch = Watch(REPORT)
    assert watch.look(0, left()) == ([], [], [])
    assert watch.look(9.9, left()) == ([], [], [])
    assert watch.look(12) == ([], [], [])


def test_each_is_told_of_once() -> None:
    watch = Watch(REPORT)
    watch.look(0, left(1300))
    assert watch.look(10, left(1300)) == ([1300], [], [])
    assert watch.look(15, left(1300), left(1301)) == ([1301], [], [])
    assert watch.look(5000, left(1300), left(1301)) == ([], [], [])


def test_a_process_id_that_is_given_anew_is_another_process() -> None:
    watch = Watch(REPORT)
    watch.look(0, left())
    watch.look(10, left())
    other = left()._replace(resident=resident(link="vmnj7")._replace(process=Process(1300, 7000)))
    assert watch.look(15, other) == ([1300], [], [])


def test_many_are_told_of_a_few_at_a_time() -> None:
    watch = Watch(REPORT)
    crowd = [left(pid) for pid in range(2000, 2050)]
    watch.look(0, *crowd)
    assert watch.look(10, *crowd)[0] == list(range(2000, 2000 + MOST_FOUND))
    assert watch.look(15, *crowd)[0] == list(range(2000 + MOST_FOUND, 2050))
    assert watch.look(20, *crowd)[0] == []


def test_after_the_grace_they_are_terminated_once_and_ten_seconds_later_killed_once() -> None:
    watch = Watch(END)
    watch.look(0, left())
    assert watch.look(59, left()) == ([1300], [], [])
    assert watch.look(60, left()) == ([], [1300], [])
    assert watch.look(65, left()) == ([], [], [])
    assert watch.look(70, left()) == ([], [], [1300])
    assert watch.look(75, left()) == ([], [], [])


def test_without_grace_they_are_told_of_before_they_end() -> None:
    watch = Watch(Policy(end=True, grace_s=0.0))
    assert watch.look(0, left()) == ([], [], [])
    assert watch.look(10, left()) == ([1300], [1300], [])


def test_who_forks_in_time_gains_nothing() -> None:
    watch = Watch(END)
    ended = [watch.look(second, left(2000 + second))[1:] for second in range(0, 80, 5)]
    assert ended[:12] == [([], [])] * 12
    assert ended[12:] == [([2060], []), ([], []), ([], [2070]), ([], [2075])]


def test_each_job_has_a_grace_of_its_own() -> None:
    watch = Watch(END)
    watch.look(0, left(1300, place="vmnj7"))
    watch.look(30, left(1300, place="vmnj7"), left(1400, place="vmnj8"))
    assert watch.look(60, left(1300, place="vmnj7"), left(1400, place="vmnj8")) == ([1400], [1300], [])


def test_a_place_that_was_empty_starts_anew() -> None:
    watch = Watch(END)
    watch.look(0, left(1300))
    watch.look(50)
    assert watch.look(60, left(1301)) == ([], [], [])


def test_root_s_and_htcondor_s_are_told_of_and_never_ended() -> None:
    watch = Watch(Policy(end=True, grace_s=60.0, spared=frozenset({0, 100})))
    there = (left(1300, uid=0), left(1301, uid=100), left(1302, uid=ALICE))
    watch.look(0, *there)
    assert watch.look(10, *there) == ([1300, 1301, 1302], [], [])
    assert watch.look(60, *there) == ([], [1302], [])
    assert watch.look(70, *there) == ([], [], [1302])


# --- in words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "known", "sentence"),
    [
        (
            Event.FOUND,
            record(),
            "process 1300 of user alice (true) has outlived the starter of job ap#12.0#1 of alice, for 12 s at least",
        ),
        (
            Event.TERMINATED,
            record(job="", owner=""),
            "process 1300 of user alice (true), left over from the job of slot1_1 for 12 s, was told to end (SIGTERM)",
        ),
        (
            Event.KILLED,
            None,
            "process 1300 of user alice (true), left over from the job of vmnj7 for 12 s, was killed (SIGKILL)",
        ),
    ],
)
def test_a_finding_is_a_line_for_a_person(event: Event, known: Optional[Record], sentence: str) -> None:
    leftover = Leftover(resident(link="vmnj7"), "vmnj7", known)
    assert Finding(event, leftover, "true", "alice", 12.4).sentence == sentence


def test_a_command_line_is_one_short_line_without_control_characters() -> None:
    assert readable("sh\0-c\0echo  x\0") == "sh -c echo  x"
    assert readable("a\x1b[2Jb\nc\td\u202ee\x7f") == "a?[2Jb?c?d?e?"
    assert readable("x" * 5000) == "x" * 255 + "…"
    assert readable("\udcff") == "?"
