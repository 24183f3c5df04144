"""The machine ad, as HTCondor's own parser and evaluator see it (classad2 of HTCondor's Python bindings)."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.samples import conditions
from vmnode.commands.startd_cron import unknown_ad
from vmnode.conditions import Status
from vmnode.report.classad import Value, attributes, machine_ad, quote

# HTCondor's library reads a configuration when it is first used, and asks DNS for this host's own name.
os.environ.update(CONDOR_CONFIG="ONLY_ENV", _CONDOR_NETWORK_INTERFACE="127.0.0.1", _CONDOR_NO_DNS="True")
os.environ.update(_CONDOR_DEFAULT_DOMAIN_NAME="example.org")
import classad2

OLD, NEW = classad2.ParserType.Old, classad2.ParserType.New

hostile = st.one_of(
    st.text(st.characters(), max_size=60),
    st.text(st.sampled_from('\\"\n\r\0\t,;[]=()\u2028\x85\x1b aA€\ud800'), max_size=60),
    st.text(st.sampled_from('x"\\€\n'), min_size=1, max_size=4).map(lambda text: text * 2600),  # up to 10 KB
)


def parse(lines: tuple[str, ...], syntax: Any) -> Any:
    """The ad that HTCondor reads. Its tools know old syntax, one attribute a line, and new: [ a; b; ]."""
    text = "\n".join(lines) if syntax is OLD else "[" + ";".join(lines) + "]"
    return classad2.parseOne(text, syntax)


def evaluate(lines: tuple[str, ...], attribute: str) -> Union[bool, str, int, None]:
    """The value of an attribute; None for undefined."""
    value = parse(lines, OLD).eval(attribute)
    if value == classad2.Value.Undefined:
        return None
    assert isinstance(value, (bool, str, int))
    return value


def names_of(lines: tuple[str, ...]) -> list[str]:
    return [line.partition(" = ")[0] for line in lines]


@settings(max_examples=300)
@given(hostile)
@example('" ; HasVirshDefaultNetwork = true ; X = "')
@example("\\")
@example('\\"')
@example("x\nHasVirshDefaultNetwork = true\n")
@example("x\r\nHasVirshDefaultNetwork = true")
@example("a" * 1023 + "\\")
def test_a_quoted_string_is_read_back_as_it_was_published(text: str) -> None:
    literal = quote(text)
    for syntax in (OLD, NEW):
        ad = parse((f"Text = {literal}",), syntax)
        assert list(ad.keys()) == ["Text"]
        assert ad.eval("Text") == literal[1:-1]


@settings(max_examples=200)
@given(hostile, hostile)
@example('"; HasVirshDefaultNetwork = true; Z = "', "\\")
def test_no_string_of_the_host_s_smuggles_an_attribute_into_the_ad(message: str, root: str) -> None:
    verdicts = conditions(kvm=Status.FAILED)
    verdicts = (replace(verdicts[0], message=message, reason=message, hint=message), *verdicts[1:])
    lines = machine_ad(attributes(verdicts, [Path("/" + root)]), time.time(), 900)
    for line in lines:
        assert len(line.splitlines()) == 1
        assert [key.lower() for key in parse((line,), OLD)] == [line.partition(" = ")[0].lower()]
    for syntax in (OLD, NEW):
        ad = parse(lines, syntax)
        assert sorted(ad.keys()) == sorted(names_of(lines))
        assert ad.eval("HasVirshDefaultNetwork") is False


@given(st.lists(st.text(st.sampled_from("ab/€"), min_size=1, max_size=300), max_size=40))
def test_htcondor_finds_each_published_item_of_a_string_list_whole(items: list[str]) -> None:
    line = machine_ad({"VMNodeImageRoots": items}, time.time(), 900)
    published = evaluate(line, "VMNodeImageRoots")
    assert isinstance(published, str)
    kept = published.split(",") if published else []
    assert kept == items[: len(kept)]
    for item in kept:
        ad = parse(line, OLD)
        ad["Wanted"] = item
        ad["Found"] = classad2.ExprTree("stringListMember(Wanted, VMNodeImageRoots)")
        assert ad.eval("Found") is True


# The default max_age_s is 900 s. The check "lies in the future" when a clock was stepped back: at most 60 s are borne.
@pytest.mark.parametrize(
    ("age", "holds"), [(0, True), (899, True), (900, False), (901, False), (-60, True), (-61, False), (1e9, False)]
)
@pytest.mark.parametrize(
    ("attribute", "published", "expired"),
    [
        ("HasVirshDefaultNetwork", False, None),
        ("VMNodeState", "Failed", "Unknown"),
        ("VMNodeFailed", "network.dhcp", None),
        ("VMNodeReason", "network.dhcp: Seen: network.dhcp is failed", "vmnode: no recent check"),
        ("VMNodeImageRoots", "/images", None),
        ("VMNodeKvmOK", True, None),
        ("VMNodeNetworkDhcpOK", False, None),
        ("VMNodeCanaryOK", None, None),
    ],
)
def test_every_attribute_stops_holding_by_itself(
    attribute: str, published: Value, expired: Value, age: float, holds: bool
) -> None:
    values = attributes(conditions(network_dhcp=Status.FAILED, canary=Status.DISABLED), [Path("/images")])
    while True:
        now = int(time.time())
        seen = evaluate(machine_ad(values, now - age, 900), attribute)
        if int(time.time()) == now:  # time() in the ad counts whole seconds: the same one on both sides
            break
    assert seen == (published if holds else expired)


@pytest.mark.parametrize("requirement", ["HasVirshDefaultNetwork =?= True", "HasVirshDefaultNetwork == True"])
@pytest.mark.parametrize(("age", "broken", "matches"), [(0, False, True), (0, True, False), (901, False, False)])
def test_jobs_match_by_what_they_write_today(requirement: str, age: int, broken: bool, matches: bool) -> None:
    verdicts = conditions(network_dhcp=Status.FAILED if broken else Status.OK)
    ad = parse(machine_ad(attributes(verdicts, ()), time.time() - age, 900), OLD)
    ad["Match"] = classad2.ExprTree(requirement)
    assert (ad.eval("Match") is True) == matches


def test_version_and_time_are_plain_values() -> None:
    lines = machine_ad(attributes(conditions(), ()), 1_790_000_000, 900)
    assert evaluate(lines, "VMNodeLastCheck") == 1_790_000_000
    assert isinstance(evaluate(lines, "VMNodeVersion"), str)


def test_what_the_hook_says_without_a_daemon_is_an_ad_too() -> None:
    lines = tuple(unknown_ad("the daemon does not run"))
    assert evaluate(lines, "HasVirshDefaultNetwork") is None
    assert evaluate(lines, "VMNodeState") == "Unknown"
    assert evaluate(lines, "VMNodeReason") == "vmnode: the daemon does not run"
