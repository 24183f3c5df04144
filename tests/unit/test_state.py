"""The state file: what one daemon writes, the command line, the hook and the next daemon read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.samples import BOOT_ID, condition, conditions, snapshot
from vmnode.conditions import KINDS, Condition, Now, Status
from vmnode.errors import StateError
from vmnode.report.state import Snapshot, document, read, write

WRITTEN = write(snapshot(network_dhcp=Status.FAILED, network_dns=Status.UNKNOWN), 900)

texts = st.text(max_size=40)
verdicts = st.builds(
    Condition,
    name=st.sampled_from([verdict.name for verdict in conditions()]),
    status=st.sampled_from(list(Status)),
    reason=texts,
    message=texts,
    hint=texts,
    since=st.floats(0, 1e9),
    contrary=st.integers(0, 100),
)


@given(
    st.lists(verdicts, max_size=13),
    st.lists(st.sampled_from(["/a", "/nfs/images", "/ü"]), max_size=3),
    st.floats(0, 4e9),
    st.floats(0, 1e9),
)
def test_what_was_written_is_read_back(drawn: list[Condition], roots: list[str], wall: float, boot: float) -> None:
    before = Snapshot(tuple(drawn), tuple(map(Path, roots)), Now(wall, boot, BOOT_ID))
    assert read(write(before, 900)) == (before, 900.0)


def test_a_file_cut_short_anywhere_is_refused_and_never_half_believed() -> None:
    for length in range(len(WRITTEN) - 1):  # the last byte is a line feed, which nobody needs
        with pytest.raises(StateError):
            read(WRITTEN[:length])


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_file_is_refused_or_understood_but_never_another_error(data: st.DataObject) -> None:
    damaged = bytearray(WRITTEN)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        damaged[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    try:
        read(bytes(damaged))
    except StateError as error:
        assert "\n" not in error.what


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inside for place in places(item, (*here, key)))]


@settings(max_examples=500)
@given(st.sampled_from(places(json.loads(WRITTEN))), json_values)
def test_any_other_value_anywhere_is_refused_or_understood(place: tuple[Any, ...], value: Any) -> None:
    state = json.loads(WRITTEN)
    if place:
        holder = state
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
    else:
        state = value
    try:
        understood, max_age_s = read(json.dumps(state).encode())
    except StateError:
        return
    assert max_age_s == max_age_s and abs(max_age_s) != float("inf")
    for verdict in understood.conditions:
        assert isinstance(verdict.message, str) and verdict.since == verdict.since


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"version"',
        b"\xff\xfe",
        b"\0" * 4096,
        b'{"version": 1}',
        b"[" * 100_000,
        WRITTEN.replace(b'"version": 1,', b'"version": "1",'),
        WRITTEN.replace(b'"contrary": 0', b'"contrary": Infinity'),
        WRITTEN.replace(b'"contrary": 0', b'"contrary": 1e400'),
        WRITTEN.replace(b'"since_boot": 50.0', b'"since_boot": NaN'),
        WRITTEN.replace(b'"since_boot": 50.0', b'"since_boot": ' + b"9" * 400),
        WRITTEN.replace(b'"max_age_s": 900', b'"max_age_s": NaN'),
        WRITTEN.replace(b'"max_age_s": 900', b'"max_age_s": true'),
        WRITTEN.replace(b'"boot": 1000.0', b'"boot": "1000.0"'),
    ],
)
def test_what_is_no_state_file_is_refused(data: bytes) -> None:
    assert data != WRITTEN
    with pytest.raises(StateError):
        read(data)


def test_a_file_of_a_later_version_is_refused_by_its_number() -> None:
    with pytest.raises(StateError, match="has version 2, this program reads version 1"):
        read(WRITTEN.replace(b'"version": 1', b'"version": 2'))


def test_conditions_of_another_program_version_are_left_out() -> None:
    extended = json.loads(WRITTEN)
    extended["conditions"].append({**extended["conditions"][0], "name": "network.ipv6"})
    assert read(json.dumps(extended).encode())[0].conditions == read(WRITTEN)[0].conditions


# --- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3600, -3600, 1e9])
def test_a_clock_step_changes_no_age(step: float) -> None:
    checked = snapshot(wall=1_790_000_000, boot=1000)
    assert checked.age_s(Now(1_790_000_030 + step, 1030, BOOT_ID)) == 30


def test_a_check_of_another_boot_or_of_the_future_has_no_age() -> None:
    checked = snapshot(boot=1000)
    assert checked.age_s(Now(1_790_000_030, 1030, "another")) == float("inf")
    assert checked.age_s(Now(1_790_000_030, 999, BOOT_ID)) == float("inf")


@pytest.mark.parametrize("step", [0, 3600, -3600])
def test_times_are_told_in_terms_of_the_clock_as_it_stands_now(step: float) -> None:
    told = document(snapshot(wall=1_790_000_000, boot=1000), Now(1_790_000_030 + step, 1030, BOOT_ID))
    assert told["checked_at"] == 1_790_000_000 + step
    assert told["conditions"][0]["since"] == 1_790_000_000 - 950 + step  # since 50 s after boot


# --- the contract -------------------------------------------------------------------------------------------------


def test_the_document_has_the_contract_s_shape() -> None:
    told = document(snapshot(network_dhcp=Status.FAILED), Now(1_790_000_030, 1030, BOOT_ID))
    assert list(told) == ["version", "host", "checked_at", "state", "conditions", "attributes"]
    assert (told["version"], told["state"]) == (1, "failed")
    assert told["attributes"]["HasVirshDefaultNetwork"] is False
    assert [list(entry) for entry in told["conditions"]] == len(KINDS) * [
        ["name", "status", "reason", "message", "hint", "since"]
    ]
    assert {entry["status"] for entry in told["conditions"]} == {"ok", "failed"}


def test_the_file_s_ad_ends_by_the_same_age_as_the_file() -> None:
    state = json.loads(write(snapshot(), 123))
    assert state["max_age_s"] == 123
    assert any("< 123 &&" in line for line in state["classad"])
    assert state["classad"][1] == "VMNodeLastCheck = 1790000000"


def test_what_the_next_daemon_needs_is_in_the_file() -> None:
    waiting = replace(snapshot(), conditions=(condition("kvm", since=7.25, contrary=2),))
    assert read(write(waiting, 900))[0].conditions[0] == condition("kvm", since=7.25, contrary=2)
