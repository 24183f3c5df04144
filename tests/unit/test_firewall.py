"""What nft and iptables print, as captured from them."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnode.host.firewall import _translates, find_drop

DEFAULT = IPv4Network("192.168.122.0/24")

# Each file is what `nft monitor trace` of one release printed while iptables-nft's or a site's rules dropped a packet.
CAPTURED = Path(__file__).with_name("captured")
GUESTS, COUNTER, COMMENT = 'iifname "virbr0"', "counter packets 0 bytes 0", 'comment "no guests"'
RELEASES = ("0.9.8", "1.0.6", "1.1.3", "1.1.7")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("what", "culprit"),
    [
        ("policy", "table ip filter, chain FORWARD, its policy"),
        ("rule", f"table inet site, chain forward, rule: {GUESTS} ip daddr 10.0.0.0/8 {COUNTER} drop {COMMENT}"),
        ("reject", f"table ip filter, chain FORWARD, rule: {GUESTS} {COUNTER} reject"),
        ("accepted", None),
    ],
)
def test_where_a_packet_ended(release: str, what: str, culprit: Optional[str]) -> None:
    assert find_drop((CAPTURED / f"nft-{release}-{what}.txt").read_text()) == culprit


def test_an_accepted_packet_does_not_hide_a_dropped_one() -> None:
    accepted, dropped = ((CAPTURED / f"nft-1.0.6-{what}.txt").read_text() for what in ("accepted", "policy"))
    assert find_drop(accepted + dropped) == "table ip filter, chain FORWARD, its policy"


@pytest.mark.parametrize("printed", ["", "trace id 9b5a2f01 ip filter\n", "Error: Operation not permitted\n"])
def test_no_trace_names_nobody(printed: str) -> None:
    assert find_drop(printed) is None


@given(st.text(st.sampled_from("trace id 0c ip filter FORWARD policy drop rule (verdict drop) reject\n"), max_size=400))
def test_no_output_is_too_strange(printed: str) -> None:
    find_drop(printed)


def rule(*expressions: Any) -> dict[str, Any]:
    return {
        "rule": {"family": "ip", "table": "libvirt_network", "chain": "guest_nat", "handle": 5, "expr": [*expressions]}
    }


def source(address: str, length: int) -> dict[str, Any]:
    payload = {"payload": {"protocol": "ip", "field": "saddr"}}
    return {"match": {"op": "==", "left": payload, "right": {"prefix": {"addr": address, "len": length}}}}


def listing(*rules: Any) -> Any:
    """As printed by nft -j list table ip libvirt_network, where libvirt 11.3 has made the default network."""
    metainfo = {"metainfo": {"version": "1.1.3", "release_name": "Commodore Bullmoose #4", "json_schema_version": 1}}
    table = {"table": {"family": "ip", "name": "libvirt_network", "handle": 1}}
    return json.loads(json.dumps({"nftables": [metainfo, table, *rules]}))


COUNTED = {"counter": {"packets": 0, "bytes": 0}}


@pytest.mark.parametrize(
    ("document", "translates"),
    [
        (listing(rule(source("192.168.122.0", 24), COUNTED, {"masquerade": None})), True),
        (listing(rule(source("192.168.122.0", 24), COUNTED, {"masquerade": {"port": {"range": [1024, 65535]}}})), True),
        (listing(rule(source("192.168.122.0", 24), COUNTED, {"snat": {"addr": "10.0.0.5"}})), True),
        (listing(rule(source("192.168.123.0", 24), COUNTED, {"masquerade": None})), False),
        (listing(rule(source("192.168.122.0", 25), COUNTED, {"masquerade": None})), False),
        (listing(rule(source("192.168.122.0", 24), COUNTED, {"accept": None})), False),
        (listing(rule(COUNTED, {"masquerade": None})), False),
        (listing(), False),
        ({}, False),
    ],
)
def test_a_nat_rule_for_the_network(document: Any, translates: bool) -> None:
    assert _translates(document, DEFAULT) is translates
