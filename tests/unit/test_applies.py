"""Which conditions apply to a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.samples import network
from vmnode.conditions import NAMES
from vmnode.config import Accounting, Config, Health, Images, Kvm, Network
from vmnode.health.applies import (
    collector_targets,
    networking_types,
    not_applicable,
    not_on_this_network,
    targets_of,
    with_prerequisites,
)
from vmnode.host.condor import parse_dump
from vmnode.values import Target

WITH_ROOTS = Config(images=Images(roots=(Path("/images"),)), accounting=Accounting(enabled=True))
NETWORK = {name for name in NAMES if name.startswith("network.")}
VM_NODE = {"VM_TYPE": "kvm", "VM_NETWORKING": "True", "VM_NETWORKING_TYPE": "nat"}


def left_out(condor: Mapping[str, str], config: Config = WITH_ROOTS) -> set[str]:
    return set(not_applicable(config, condor))


def test_all_but_the_canary_apply_to_a_node_for_virtual_machines() -> None:
    assert left_out(VM_NODE) == {"canary"}


def test_without_htcondor_nothing_is_concluded_from_it() -> None:
    assert left_out({}) == {"canary"}


def test_without_image_roots_images_does_not_apply() -> None:
    assert left_out(VM_NODE, replace(WITH_ROOTS, images=Images())) == {"canary", "images"}


def test_emulated_guests_need_no_kvm() -> None:
    assert left_out(VM_NODE, replace(WITH_ROOTS, kvm=Kvm(accel="tcg"))) == {"canary", "kvm"}


@pytest.mark.parametrize("condor", [{"VM_TYPE": ""}, {"VM_NETWORKING": "True"}])
def test_a_node_without_the_vm_universe_is_judged_by_what_does_not_depend_on_it(condor: Mapping[str, str]) -> None:
    assert set(NAMES) - left_out(condor) == {"images", "conntrack", "accounting"}


def test_xen_needs_no_kvm() -> None:
    assert left_out({**VM_NODE, "VM_TYPE": "xen"}) == {"canary", "kvm"}
    assert left_out({**VM_NODE, "VM_TYPE": "KVM"}) == {"canary"}


@pytest.mark.parametrize("kinds", ["bridge", "user", "bridge, user", ""])
def test_guests_that_are_not_on_a_virtual_network_need_none(kinds: str) -> None:
    assert left_out({**VM_NODE, "VM_NETWORKING_TYPE": kinds}) == {"canary"} | NETWORK


@pytest.mark.parametrize("networking", ["False", "", "false", "0"])
def test_guests_without_network_need_none(networking: str) -> None:
    assert left_out({**VM_NODE, "VM_NETWORKING": networking}) == {"canary"} | NETWORK


@pytest.mark.parametrize("kinds", ["nat", '"nat, bridge"', "bridge,NAT", "user nat"])
def test_one_kind_of_networking_that_is_nat_is_enough(kinds: str) -> None:
    assert left_out({**VM_NODE, "VM_NETWORKING_TYPE": kinds}) == {"canary"}


def test_networking_types_as_vm_gahp_reads_them() -> None:
    assert networking_types({"VM_NETWORKING_TYPE": '"NAT, bridge"'}) == ["nat", "bridge"]
    assert networking_types({}) == []


def test_what_an_administrator_names_is_looked_at_whatever_htcondor_says() -> None:
    config = replace(WITH_ROOTS, health=Health(conditions=("network.dns", "images")))
    expected = {
        "accounting",
        "images",
        "network.dns",
        "network.dhcp",
        "network.dnsmasq",
        "network.bridge",
        "network.active",
        "libvirt",
    }
    assert set(NAMES) - left_out({"VM_TYPE": ""}, config) == expected


def test_switched_off_means_all_of_it() -> None:
    """But accounting is no matter of health, and START may depend on it."""
    off = replace(WITH_ROOTS, health=Health(enabled=False))
    assert left_out(VM_NODE, off) == set(NAMES) - {"accounting"}
    assert left_out(VM_NODE, replace(off, accounting=Accounting(enabled=False))) == set(NAMES)


def test_without_accounting_its_condition_does_not_apply() -> None:
    assert "accounting" in left_out(VM_NODE, Config())


def test_every_reason_names_what_decided_it() -> None:
    assert "VM_TYPE" in not_applicable(WITH_ROOTS, {"VM_TYPE": ""})["kvm"]
    reasons = not_applicable(WITH_ROOTS, {**VM_NODE, "VM_NETWORKING_TYPE": "bridge"})
    assert "VM_NETWORKING_TYPE is bridge" in reasons["network.dhcp"]
    assert "[images] roots" in not_applicable(Config(), {})["images"]


def test_prerequisites_of_prerequisites_come_along() -> None:
    assert with_prerequisites(["network.dnsmasq"]) == {"network.dnsmasq", "network.bridge", "network.active", "libvirt"}
    assert with_prerequisites([]) == frozenset()


# --- the kind of virtual network ----------------------------------------------------------------------------------


def test_everything_has_a_meaning_on_the_default_network() -> None:
    assert not_on_this_network(network()) == {}


def test_an_isolated_network_has_no_way_out() -> None:
    assert set(not_on_this_network(network(forward_mode=""))) == {"network.forwarding", "network.outbound"}


def test_a_network_without_dhcp_gives_a_probe_no_address() -> None:
    without = not_on_this_network(network(ranges=()))
    assert set(without) == {"network.dhcp", "network.dns", "network.outbound"}
    assert "no DHCP range" in without["network.dhcp"]


def test_a_network_without_address_has_no_dhcp_either() -> None:
    without = not_on_this_network(network(gateway="", ranges=()))
    assert {"network.dhcp", "network.dns", "network.outbound"} <= set(without)


def test_without_dns_nobody_is_asked_for_names_but_dnsmasq_still_leases() -> None:
    assert set(not_on_this_network(network(dns=False))) == {"network.dns"}


def test_without_dhcp_and_dns_libvirt_starts_no_dnsmasq() -> None:
    assert "network.dnsmasq" in not_on_this_network(network(dns=False, ranges=()))


@pytest.mark.parametrize("mode", ["bridge", "private", "vepa", "passthrough", "hostdev"])
def test_on_a_foreign_bridge_libvirt_runs_nothing(mode: str) -> None:
    assert set(not_on_this_network(network(forward_mode=mode))) == NETWORK - {"network.active"}


@pytest.mark.parametrize("mode", ["nat", "route", "open"])
def test_where_libvirt_makes_the_bridge_all_is_checked(mode: str) -> None:
    assert not_on_this_network(network(forward_mode=mode)) == {}


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collector_host", "targets"),
    [
        ("", ()),
        ("cm.example.org", (Target("cm.example.org", 9618),)),
        ("cm.example.org:9619", (Target("cm.example.org", 9619),)),
        ("10.0.0.1:9620", (Target("10.0.0.1", 9620),)),
        ("cm.example.org:9618?sock=collector", (Target("cm.example.org", 9618),)),
        ("<10.0.0.1:9618?addrs=10.0.0.1-9618&alias=cm&noUDP&sock=collector>", (Target("10.0.0.1", 9618),)),
        ("[fd00::1]:9618", (Target("fd00::1", 9618),)),
        ("[fd00::1]", (Target("fd00::1", 9618),)),
        ("fd00::1", (Target("fd00::1", 9618),)),
        ("<[fd00::1]:9618?addrs=[fd00--1]-9618>", (Target("fd00::1", 9618),)),
        ("a.org, b.org:1  c.org", (Target("a.org", 9618), Target("b.org", 1), Target("c.org", 9618))),
        # No guest can connect to these.
        ("cm.example.org:0", ()),
        ("cm.example.org:99999, b.org", (Target("b.org", 9618),)),
        (",", ()),
    ],
)
def test_every_form_of_collector_host(collector_host: str, targets: tuple[Target, ...]) -> None:
    assert collector_targets(collector_host) == targets


def test_configured_targets_outrank_the_collector_and_an_empty_list_means_none() -> None:
    condor = {"COLLECTOR_HOST": "cm.example.org"}
    own = (Target("a.org", 1),)
    assert targets_of(Config(), condor) == (Target("cm.example.org", 9618),)
    assert targets_of(Config(network=Network(targets=own)), condor) == own
    assert targets_of(Config(network=Network(targets=())), condor) == ()
    assert targets_of(Config(), {}) == ()


# --- condor_config_val --------------------------------------------------------------------------------------------

# Printed by HTCondor 23.9.6: condor_config_val -subsystem STARTD -dump -expand ^VM_TYPE$ ^EXECUTE$ ^COLLECTOR_HOST$
DUMPED = """\
# Parameters with names that match ^VM_TYPE$:
VM_TYPE = kvm
# Parameters with names that match ^EXECUTE$:
EXECUTE = /var/lib/condor/execute
# Parameters with names that match ^COLLECTOR_HOST$:
COLLECTOR_HOST = cm.example.org:9618?sock=collector
# Parameters with names that match ^VM_NETWORKING$:
vm_networking =
# Contributing configuration file(s):
#\t/etc/condor/condor_config
"""


def test_what_condor_config_val_prints_is_understood() -> None:
    assert parse_dump(DUMPED) == {
        "VM_TYPE": "kvm",
        "EXECUTE": "/var/lib/condor/execute",
        "COLLECTOR_HOST": "cm.example.org:9618?sock=collector",
        "VM_NETWORKING": "",
    }
    assert parse_dump("") == {}
