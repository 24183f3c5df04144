"""Which conditions apply to this node, and why the others do not. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmnode.conditions import BY_NAME, KINDS, NAMES
from vmnode.config import Config
from vmnode.host.libvirt import VirtualNetwork
from vmnode.values import Target

# The knobs of HTCondor that decide it, and those that give defaults to our own settings.
CONDOR_KNOBS = (
    "VM_TYPE",
    "VM_NETWORKING",
    "VM_NETWORKING_TYPE",
    "EXECUTE",
    "COLLECTOR_HOST",
)
_COLLECTOR_PORT = 9618
Targets = tuple[Target, ...]
_NETWORK = tuple(name for name in NAMES if name.startswith("network."))
_OWN_BRIDGE = ("nat", "route", "open", "")  # forward modes in which libvirt makes the bridge and runs dnsmasq


def not_applicable(config: Config, condor: Mapping[str, str]) -> dict[str, str]:
    """The conditions that are disabled by the configuration, with the reason for each.

    `condor` holds the CONDOR_KNOBS; it is empty where HTCondor is not installed, and then nothing is concluded from it.
    """
    without = _of_health(config, condor)
    without.pop("accounting", None)  # it is no matter of a guest's health, and START may depend on it
    if not config.accounting.enabled:
        without["accounting"] = "jobs are not accounted ([accounting] enabled)"
    return without


def _of_health(config: Config, condor: Mapping[str, str]) -> dict[str, str]:
    if not config.health.enabled:
        return dict.fromkeys(NAMES, "health checks are switched off ([health] enabled)")
    without: dict[str, str] = {}
    if not config.images.roots:
        without["images"] = "no image roots are configured ([images] roots)"
    if config.kvm.accel == "tcg":
        without["kvm"] = "guests run emulated ([kvm] accel)"
    without["canary"] = "this version starts no canary guest"
    if config.health.conditions is not None:
        wanted = with_prerequisites(config.health.conditions)
        without.update((name, "not in [health] conditions") for name in NAMES if name not in wanted)
        return without
    if condor:
        vm_type = condor.get("VM_TYPE", "").lower()
        if not vm_type:
            for kind in KINDS:
                if kind.guest or kind.name == "qemu-img":
                    without[kind.name] = "no VM universe here (HTCondor's VM_TYPE is empty)"
        elif vm_type != "kvm":
            without["kvm"] = f"the VM universe is {vm_type}"
        if vm_type and not _true(condor.get("VM_NETWORKING", "")):
            without.update(dict.fromkeys(_NETWORK, "VM jobs have no network (HTCondor's VM_NETWORKING)"))
        elif vm_type and "nat" not in networking_types(condor):
            kinds = ", ".join(networking_types(condor)) or "empty"
            why = f"VM jobs are not attached to a virtual network (HTCondor's VM_NETWORKING_TYPE is {kinds})"
            without.update(dict.fromkeys(_NETWORK, why))
    return without


def with_prerequisites(names: Iterable[str]) -> frozenset[str]:
    """These conditions, and all without which they could not be judged."""
    wanted: set[str] = set()
    for name in names:
        wanted |= {name} | with_prerequisites(BY_NAME[name].requires)
    return frozenset(wanted)


def not_on_this_network(network: VirtualNetwork) -> dict[str, str]:
    """The conditions that have no meaning for this kind of virtual network, with the reason for each."""
    without: dict[str, str] = {}
    label = f"network {network.name!r}"
    if network.forward_mode not in _OWN_BRIDGE:
        why = f"{label} uses forward mode {network.forward_mode!r}: libvirt runs no bridge of its own"
        return {name: why for name in _NETWORK if name != "network.active"}
    if not network.ranges or network.gateway is None:
        for name in ("network.dhcp", "network.dns", "network.outbound"):
            without[name] = f"{label} has no DHCP range, so no probe can get an address"
        if not network.dns:
            without["network.dnsmasq"] = f"{label} has neither DHCP nor DNS"
    if not network.dns:
        without["network.dns"] = f"{label} has DNS switched off"
    if network.forward_mode == "":
        for name in ("network.forwarding", "network.outbound"):
            without[name] = f"{label} is isolated (no <forward>)"
    return without


def networking_types(condor: Mapping[str, str]) -> list[str]:
    """VM_NETWORKING_TYPE as vm-gahp reads it: quotes off, lower case, split at commas and blanks."""
    return condor.get("VM_NETWORKING_TYPE", "").strip("\"'").lower().replace(",", " ").split()


def collector_targets(collector_host: str) -> Targets:
    """The pool's collectors as targets. COLLECTOR_HOST is a list of host, host:port or sinful strings."""
    targets = []
    for word in collector_host.replace(",", " ").split():
        address = word.strip("<>").partition("?")[0]
        host, _, port = address.rpartition(":") if _has_port(address) else (address, "", "")
        number = int(port) if port.isdecimal() else _COLLECTOR_PORT
        if host and 0 < number < 1 << 16:  # port 0: the collector chooses one, and writes it into its address file
            targets.append(Target(host.strip("[]"), number))
    return tuple(targets)


def _has_port(address: str) -> bool:
    return "]:" in address if address.startswith("[") else address.count(":") == 1


def _true(value: str) -> bool:
    return value.strip().lower() in ("true", "t", "yes", "y", "1")


def targets_of(config: Config, condor: Mapping[str, str]) -> Targets:
    if config.network.targets is not None:
        return config.network.targets
    return collector_targets(condor.get("COLLECTOR_HOST", ""))
