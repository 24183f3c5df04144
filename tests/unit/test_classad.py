"""The machine ad, as text. What HTCondor's own parser makes of it: test_classad_parser.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.samples import conditions
from vmnode import __version__
from vmnode.conditions import NAMES, Status
from vmnode.report.classad import attribute_of, attributes, machine_ad, quote, string_list

anything = st.text(st.characters(), max_size=200)  # surrogates, NUL and all


@pytest.mark.parametrize(
    ("condition", "attribute"),
    [
        ("kvm", "VMNodeKvmOK"),
        ("network.dhcp", "VMNodeNetworkDhcpOK"),
        ("qemu-img", "VMNodeQemuImgOK"),
        ("execute-dir", "VMNodeExecuteDirOK"),
        ("images", "VMNodeImagesOK"),
    ],
)
def test_the_contract_s_attribute_of_a_condition(condition: str, attribute: str) -> None:
    assert attribute_of(condition) == attribute


def test_no_two_conditions_share_an_attribute() -> None:
    assert len({attribute_of(name).lower() for name in NAMES}) == len(NAMES)  # ClassAds ignore case


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("", '""'),
        ("plain", '"plain"'),
        ('say "no"', "\"say 'no'\""),
        ("C:\\x", '"C:/x"'),
        ("a\nHasVM = true", '"a HasVM = true"'),
        ("tab\tnul\0esc\x1b[31m", '"tab nul esc [31m"'),
        ("\ud800", '" "'),
        ("Köln", '"Köln"'),
    ],
)
def test_quoting(text: str, literal: str) -> None:
    assert quote(text) == literal


def test_a_string_is_cut_at_1024_bytes_and_never_inside_a_character() -> None:
    assert quote("x" * 10_240) == '"' + "x" * 1024 + '"'
    assert quote("€" * 1000) == '"' + "€" * 341 + '"'  # three bytes each: 1023


@given(anything)
def test_a_literal_is_one_printable_line_between_two_quotes(text: str) -> None:
    literal = quote(text)
    assert literal[0] == literal[-1] == '"' and len(literal) >= 2
    inside = literal[1:-1]
    assert inside.isprintable() and '"' not in inside and "\\" not in inside
    assert len(inside.encode()) <= 1024


def test_a_list_ends_at_a_whole_item() -> None:
    items = [f"/images/{number:04}" for number in range(200)]  # 12 characters each, 13 with the comma
    published = string_list(items)[1:-1].split(",")
    assert published == items[:78]  # 78 * 13 - 1 = 1013; one more would be 1026
    assert string_list(["a" * 1025]) == '""'
    assert string_list([]) == '""'


def test_every_attribute_of_the_contract_is_there() -> None:
    values = attributes(conditions(), ())
    assert set(values) == {
        "HasVirshDefaultNetwork",
        "VMNodeState",
        "VMNodeFailed",
        "VMNodeReason",
        "VMNodeImageRoots",
        *map(attribute_of, NAMES),
    }
    names = [line.partition(" = ")[0] for line in machine_ad(values, 1_790_000_000, 900)]
    assert names == ["VMNodeVersion", "VMNodeLastCheck", *values]


def test_a_healthy_node() -> None:
    values = attributes(conditions(canary=Status.DISABLED), [Path("/a"), Path("/b")])
    assert values["HasVirshDefaultNetwork"] is True
    assert values["VMNodeState"] == "Healthy"
    assert values["VMNodeFailed"] == []
    assert values["VMNodeReason"] == ""
    assert values["VMNodeImageRoots"] == ["/a", "/b"]
    assert values["VMNodeKvmOK"] is True
    assert values["VMNodeCanaryOK"] is None


def test_a_failed_node_names_what_failed_and_why() -> None:
    values = attributes(conditions(network_dhcp=Status.FAILED, network_dns=Status.UNKNOWN, images=Status.FAILED), ())
    assert values["HasVirshDefaultNetwork"] is False
    assert values["VMNodeState"] == "Failed"
    assert values["VMNodeFailed"] == ["network.dhcp", "images"]
    assert values["VMNodeReason"] == "network.dhcp: Seen: network.dhcp is failed"
    assert values["VMNodeNetworkDhcpOK"] is False
    assert values["VMNodeNetworkDnsOK"] is None


def test_the_lines_of_an_ad() -> None:
    lines = machine_ad({"HasVirshDefaultNetwork": True, "VMNodeState": "Healthy", "VMNodeKvmOK": None}, 1790000000.4, 9)
    fresh = "time() - VMNodeLastCheck < 9 && time() - VMNodeLastCheck >= -60"
    assert lines == (
        f'VMNodeVersion = "{__version__}"',
        "VMNodeLastCheck = 1790000000",
        f"HasVirshDefaultNetwork = ifThenElse({fresh}, true, undefined)",
        f'VMNodeState = ifThenElse({fresh}, "Healthy", "Unknown")',
        "VMNodeKvmOK = undefined",
    )
