"""The fault matrix: what can go wrong on a worker node, and what vmnode says about it, how soon.

A table only. test_fault_matrix.py breaks and repairs booted nodes by it, docs/faults.md shows it to people:
`python -m tests.libvirt.faults` writes that page's tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tests.libvirt.patient import FAR_ADDRESS, Patient
from vmnode.conditions import NAMES
from vmnode.health.schedule import FOREIGN_GAP_S

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- written by python -m tests.libvirt.faults -->", "<!-- end -->"
EVENT, PERIOD = "event", "period"
IPTABLES, NFTABLES = "iptables", "nftables"

TIMEOUT_S = 5.0  # [libvirt] timeout_s
PERIOD_S = 5.0
EVERY_5_S = f"[health]\ninterval_s = {PERIOD_S}\n"
OFTEN_OUTSIDE = EVERY_5_S + "outbound_interval_s = 1\n"


@dataclass(frozen=True)
class Step:
    """Something done to a node: how the documentation says it, and how it is done."""

    text: str
    act: Callable[[Patient], object]


def shell(script: str, text: str = "") -> Step:
    """A script for the node's shell; `text` replaces it in the documentation."""
    return Step(text or f"`{script}`", lambda patient: patient.shell(script))


def nothing() -> Step:
    return Step("", lambda patient: None)


def refuse(port: int) -> Step:
    return Step(f"the target's port {port} refuses", lambda patient: patient.far.refuse(port))


def listen(port: int) -> Step:
    return Step(f"it listens on port {port} again", lambda patient: patient.far.listen(port))


@dataclass(frozen=True)
class Fault:
    """One row. `condition` "" says that the truth is that nothing is broken: the node stays healthy.

    `prepare` comes before the clock starts and `clean` after it has stopped. `settings` are vmnode's, as TOML: with the
    shipped ones only an event can be as quick as `detect_s`. `backend` is libvirt's firewall backend, "" for any.
    """

    name: str
    break_: Step
    repair: Step
    condition: str
    reason: str
    by: str
    detect_s: float
    recover_s: float
    settings: str = ""
    backend: str = ""
    prepare: Step = nothing()
    clean: Step = nothing()
    culprit: str = ""  # what the message has to name
    attribute_of_guests: bool = True  # whether HasVirshDefaultNetwork depends on it
    also: Callable[[Patient], str] = lambda patient: ""  # what else holds while it is broken
    needs: str = ""  # a capability of the machine
    quiet_s: float = 0.0  # vmnode looks at firewall changes at once, but only once in this time


RESTART_NETWORK = shell("virsh net-destroy default && virsh net-start default")
DNSMASQ = "$(cat /run/libvirt/network/default.pid)"
SITE_TABLE = "nft add table inet site; nft add chain inet site {hook} '{{ type filter hook {hook} priority 10; }}'"
DOCKER_POLICY = shell(
    "iptables -N DOCKER-USER; iptables -I FORWARD -j DOCKER-USER; iptables -P FORWARD DROP",
    "`iptables -P FORWARD DROP`, as Docker does",
)
NO_DOCKER = shell(
    "iptables -P FORWARD ACCEPT; iptables -D FORWARD -j DOCKER-USER; iptables -X DOCKER-USER",
    "`iptables -P FORWARD ACCEPT`",
)
RELOAD_RULES = shell("systemctl restart libvirtd")
EXECUTE = "/var/lib/condor/execute"
HUNG_ROOT, OTHER_ROOT = "/mnt/hung", "/srv/images"


def check_ends_in_time(patient: Patient) -> str:
    """However libvirt hangs, a whole check ends within timeout_s + 1 s."""
    seconds = patient.seconds_of_a_check()
    assert seconds <= TIMEOUT_S + 1, f"a check took {seconds:.1f} s while libvirt hung"
    return f"; a check takes {seconds:.1f} s (at most {TIMEOUT_S + 1:g})"


def other_root_is_listed(patient: Patient) -> str:
    assert patient.classad("VMNodeImageRoots") == f'"{OTHER_ROOT}"'
    return ""


# In the order in which they are tested: what takes long lies between rows that have to wait for quiet.
FAULTS: tuple[Fault, ...] = (
    # --- found by an event, with the shipped settings ---------------------------------------------------------------
    Fault(
        "network destroyed",
        shell("virsh net-destroy default"),
        shell("virsh net-start default"),
        *("network.active", "Inactive", EVENT, 5, 25),
    ),
    Fault(
        "DNS refused",
        shell(
            SITE_TABLE.format(hook="input") + "; nft add rule inet site input iifname virbr0 udp dport 53 reject",
            "an nftables rule rejects the bridge's UDP port 53",
        ),
        shell("nft delete table inet site"),
        *("network.dns", "Refused", EVENT, 8, 20),
        quiet_s=FOREIGN_GAP_S,
    ),
    Fault(
        "network undefined",
        shell("virsh net-destroy default; virsh net-undefine default"),
        shell(
            "virsh net-define /tmp/default.xml; virsh net-autostart default; virsh net-start default",
            "`virsh net-define`, `virsh net-start`",
        ),
        *("network.active", "Undefined", EVENT, 5, 25),
        prepare=shell("virsh net-dumpxml --inactive default >/tmp/default.xml"),
    ),
    Fault(
        "libvirt's NAT rule gone (iptables)",
        shell("iptables -t nat -F LIBVIRT_PRT"),
        RELOAD_RULES,
        *("network.forwarding", "NatRuleMissing", EVENT, 8, 20),
        backend=IPTABLES,
        quiet_s=FOREIGN_GAP_S,
    ),
    Fault(
        "network never started after boot",
        Step("the node boots, and the network is not marked to start", Patient.reboot),
        Step("`virsh net-autostart default; virsh net-start default`", Patient.start_network),
        *("network.active", "Inactive", EVENT, 20, 25),
        prepare=shell("virsh net-autostart --disable default; virsh net-destroy default"),
    ),
    Fault(
        "FORWARD policy DROP as Docker sets it; libvirt uses iptables",
        DOCKER_POLICY,
        NO_DOCKER,
        *("", "", EVENT, 20, 20),  # libvirt's own rules stand in the same chain and accept first
        backend=IPTABLES,
    ),
    Fault(
        "bridge down",
        shell("ip link set virbr0 down"),
        shell("ip link set virbr0 up"),
        *("network.bridge", "Down", EVENT, 5, 20),
    ),
    Fault(
        "bridge address removed",
        shell("ip address del 192.168.122.1/24 dev virbr0"),
        shell("ip address add 192.168.122.1/24 dev virbr0"),
        *("network.bridge", "AddressMissing", EVENT, 5, 15),
    ),
    Fault(
        "IP forwarding off",
        shell("sysctl -qw net.ipv4.ip_forward=0"),
        shell("sysctl -qw net.ipv4.ip_forward=1"),
        *("network.forwarding", "IpForwardOff", EVENT, 10, 15),
    ),
    Fault(
        "default route gone",
        shell("ip route del default"),
        Step("`ip route add default …`", lambda patient: patient.add_default_route()),
        *("network.outbound", "NoRoute", EVENT, 15, 15),
    ),
    Fault(
        "dnsmasq killed",
        shell(f"kill -KILL {DNSMASQ}", "`kill -KILL` of dnsmasq"),
        RESTART_NETWORK,
        *("network.dnsmasq", "NotRunning", EVENT, 5, 25),
    ),
    Fault(
        "FORWARD policy DROP as Docker sets it; libvirt uses nftables",
        DOCKER_POLICY,
        NO_DOCKER,
        *("network.forwarding", "ForwardPolicyDrop", EVENT, 8, 20),
        backend=NFTABLES,
        culprit="table ip filter, chain FORWARD, its policy",
        quiet_s=FOREIGN_GAP_S,
    ),
    Fault(
        "libvirtd stopped, with its sockets",
        # Killed, since libvirtd 11 at times takes 30 s to stop; stopped, since it would be started again.
        shell(
            "systemctl stop libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket;"
            " systemctl kill -s KILL libvirtd.service; systemctl stop libvirtd.service"
        ),
        shell("systemctl start libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service"),
        *("libvirt", "NoConnection", EVENT, 5, 25),
    ),
    Fault(
        "libvirt's NAT rule gone (nftables)",
        shell("nft flush chain ip libvirt_network guest_nat"),
        RELOAD_RULES,
        *("network.forwarding", "NatRuleMissing", EVENT, 8, 20),
        backend=NFTABLES,
        quiet_s=FOREIGN_GAP_S,
    ),
    Fault(
        "libvirtd hung",
        shell("systemctl kill --signal=STOP libvirtd.service", "`kill -STOP` of libvirtd"),
        shell("systemctl kill --signal=CONT libvirtd.service", "`kill -CONT`"),
        *("libvirt", "Hung", EVENT, 30, 25),
        also=check_ends_in_time,
    ),
    Fault(
        "a foreign nftables table drops the bridge's traffic",
        shell(
            SITE_TABLE.format(hook="forward") + "; nft add rule inet site forward iifname virbr0 counter drop",
            "`nft add rule inet site forward iifname virbr0 counter drop`",
        ),
        shell("nft delete table inet site"),
        *("network.forwarding", "ForeignDrop", EVENT, 8, 20),
        backend=NFTABLES,
        culprit="table inet site, chain forward, rule: iifname",
        quiet_s=FOREIGN_GAP_S,
    ),
    # --- found by the next periodic check ---------------------------------------------------------------------------
    Fault(
        "dnsmasq stopped",
        shell(f"kill -STOP {DNSMASQ}", "`kill -STOP` of dnsmasq"),
        shell(f"kill -CONT {DNSMASQ}", "`kill -CONT`"),
        *("network.dnsmasq", "Stopped", PERIOD, 9, 15),
        settings=EVERY_5_S,
    ),
    Fault(
        "libvirt's socket gone",
        shell("rm /run/libvirt/libvirt-sock"),
        shell("systemctl stop libvirtd.service; systemctl restart libvirtd.socket"),
        *("libvirt", "NoConnection", PERIOD, 9, 20),
        settings=EVERY_5_S,
    ),
    Fault(
        "/dev/kvm missing",
        shell("rm /dev/kvm"),
        shell("mknod -m 0666 /dev/kvm c 10 232; chgrp kvm /dev/kvm"),
        *("kvm", "DeviceMissing", PERIOD, 9, 15),
        settings=EVERY_5_S,
        needs="/dev/kvm",
    ),
    Fault(
        "/dev/kvm not permitted",
        shell("chmod 0600 /dev/kvm"),
        shell("chmod 0666 /dev/kvm"),
        *("kvm", "NotPermitted", PERIOD, 9, 15),
        settings=EVERY_5_S,
        needs="/dev/kvm",
    ),
    Fault(
        "/dev/kvm for its group only",
        shell("chmod 0660 /dev/kvm"),
        shell("chmod 0666 /dev/kvm"),
        *("kvm", "NotPermittedToJobs", PERIOD, 9, 15),
        settings=EVERY_5_S,
        needs="/dev/kvm",
    ),
    Fault(
        "qemu-img missing",
        shell("mv /usr/bin/qemu-img /usr/bin/qemu-img.away"),
        shell("mv /usr/bin/qemu-img.away /usr/bin/qemu-img"),
        *("qemu-img", "Missing", PERIOD, 9, 15),
        settings=EVERY_5_S,
        attribute_of_guests=False,
    ),
    Fault(
        "execute directory full",
        shell(f"dd if=/dev/zero of={EXECUTE}/filler bs=1M count=48 status=none", "a file fills it"),
        shell(f"rm {EXECUTE}/filler"),
        *("execute-dir", "Full", PERIOD, 9, 15),
        settings=EVERY_5_S + '[execute]\nmin_free = "32M"\n',
        prepare=shell(f"mount -t tmpfs -o size=64M,mode=0755 tmpfs {EXECUTE}"),
        clean=shell(f"umount {EXECUTE}"),
    ),
    Fault(
        "execute directory not traversable",
        shell(f"chmod 0700 {EXECUTE}"),
        shell(f"chmod 0755 {EXECUTE}"),
        *("execute-dir", "NotTraversable", PERIOD, 9, 15),
        settings=EVERY_5_S,
    ),
    Fault(
        "target refuses",
        refuse(9618),
        listen(9618),
        *("network.outbound", "Refused", PERIOD, 12, 15),
        settings=OFTEN_OUTSIDE,
    ),
    Fault(
        "one of two targets refuses",
        refuse(9619),
        listen(9619),
        *("", "", PERIOD, 20, 15),
        settings=OFTEN_OUTSIDE + f'[network]\ntargets = ["tcp://{FAR_ADDRESS}:9619", "tcp://{FAR_ADDRESS}:9618"]\n',
        prepare=listen(9619),
        clean=refuse(9619),
    ),
    Fault(
        "an image root hangs",
        shell("kill -STOP $(pidof bindfs)", "`kill -STOP` of the FUSE server below it"),
        shell("kill -CONT $(pidof bindfs)", "`kill -CONT`"),
        *("images", "Hung", PERIOD, 12, 15),
        settings=EVERY_5_S + f'[images]\ntimeout_s = 2\nroots = ["{HUNG_ROOT}", "{OTHER_ROOT}"]\n',
        prepare=shell(f"mkdir -p {HUNG_ROOT} {OTHER_ROOT}; bindfs {OTHER_ROOT} {HUNG_ROOT}"),
        clean=shell(f"umount {HUNG_ROOT}"),
        attribute_of_guests=False,
        also=other_root_is_listed,
    ),
    Fault(
        "DHCP pool used up",
        Step("guests take every address that is left", Patient.take_the_last_address),
        Step("a guest gives its address back", Patient.give_the_address_back),
        *("network.dhcp", "PoolExhausted", PERIOD, 15, 20),
        settings=EVERY_5_S,
        prepare=Step("the range has two addresses", Patient.shrink_the_pool),
        clean=Step("", Patient.restore_the_pool),
    ),
)


@dataclass(frozen=True)
class OwnFault:
    """A row about vmnode itself; test_own_faults.py has a proof of each promise."""

    name: str
    what: str
    promise: str


OWN_FAULTS: tuple[OwnFault, ...] = (
    OwnFault(
        "vmnoded killed",
        "`kill -KILL`, and once more during the next daemon's first check",
        "undefined at once; systemd starts it again; every since-time survives; still one probe port and one lease",
    ),
    OwnFault(
        "vmnoded stopped",
        "`systemctl stop vmnode`",
        "undefined at once; the probe's port, namespace and lease are gone",
    ),
    OwnFault(
        "a second instance",
        "another vmnoded with its own `run_dir`, killed, started again, stopped",
        "neither disturbs the other; after `kill -KILL` only a lease is left, and after the next stop nothing",
    ),
    OwnFault(
        "one instance started twice",
        "`vmnoded` beside the service",
        "refused with one sentence; the service does not notice",
    ),
    OwnFault(
        "a check beside the daemon",
        "`vmnode check`",
        "says the same as the daemon and leaves neither port nor lease",
    ),
    OwnFault(
        "HTCondor's configuration broken",
        "a file with a syntax error in `/etc/condor/config.d`",
        "the last settings stay in force, and faults are found as ever",
    ),
    OwnFault("state file truncated", "half of it is left", "undefined; the next daemon starts without a history"),
    OwnFault("state file corrupt", "bytes that are no JSON", "undefined; the next daemon starts without a history"),
    OwnFault("state file of another version", '`"version": 2`', "undefined; the next daemon starts without a history"),
    OwnFault(
        "state file from the future",
        "its check lies an hour ahead on the boot clock",
        "undefined; the next daemon starts without a history",
    ),
    OwnFault(
        "disk full in run_dir",
        "a file fills it, then the network is destroyed",
        "the attribute is not true within 5 s; what can still be published is the truth, else nothing is",
    ),
    OwnFault(
        "clock stepped an hour back",
        "`CLOCK_REALTIME` of vmnode and of HTCondor's evaluation",
        "the attribute stays true, the hook follows within 15 s, and faults are found as ever",
    ),
    OwnFault(
        "clock stepped an hour forward",
        "`CLOCK_REALTIME` of vmnode and of HTCondor's evaluation",
        "the attribute stays true, the hook follows within 15 s, and faults are found as ever",
    ),
)


# --- the page -------------------------------------------------------------------------------------------------------


def tables() -> str:
    """The tables of docs/faults.md: faults of the node in the order of the conditions, then vmnode's own."""
    lines = [
        "| fault | how it is made | how it is repaired | condition, reason | found by | within | repaired after |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in sorted(FAULTS, key=lambda fault: NAMES.index(fault.condition) if fault.condition else len(NAMES)):
        cells = [fault.name, fault.break_.text, fault.repair.text]
        if fault.condition:
            cells += [f"`{fault.condition}` {fault.reason}", *found(fault), f"{fault.recover_s:g} s"]
        else:
            cells += ["nothing is broken, the node stays healthy", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| fault of vmnode itself | how it is made | what is promised |", "|---|---|---|"]
    lines += [f"| {fault.name} | {fault.what} | {fault.promise} |" for fault in OWN_FAULTS]
    return "\n".join(lines) + "\n"


def found(fault: Fault) -> tuple[str, str]:
    """By what, and after how long at most with the shipped settings."""
    if fault.by == EVENT:
        return "an event", f"{fault.detect_s:g} s"
    period = "outbound_interval_s" if fault.settings.startswith(OFTEN_OUTSIDE) else "interval_s"
    return "the next check", f"{period} + {fault.detect_s - PERIOD_S:g} s"


def page_with_tables(page: str) -> str:
    """The page with its tables replaced by the present ones."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
