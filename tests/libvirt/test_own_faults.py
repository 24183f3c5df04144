"""What happens when vmnode itself is hurt: a proof for each row of OWN_FAULTS."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

import pytest

from tests.libvirt.conftest import Measured
from tests.libvirt.faults import OWN_FAULTS, OwnFault
from tests.libvirt.patient import RUN_DIR, Patient

STATE = f"{RUN_DIR}/state.json"
EVENT_S = 5.0
EVENTS_ARE_OVER_S = 2.0  # an event is followed by a check after a second at the most
HOUR_S = 3600


@pytest.mark.parametrize("fault", OWN_FAULTS, ids=lambda fault: fault.name)
def test_own_fault(fault: OwnFault, patient: Patient, measured: Measured) -> None:
    patient.configure("")
    patient.wait_healthy()
    patient.wait_quiet(EVENTS_ARE_OVER_S)
    measured(fault.name, PROOFS[fault.name](patient))
    patient.wait_healthy()
    assert patient.classad("HasVirshDefaultNetwork") == "true"


# --- killed, stopped, doubled ---------------------------------------------------------------------------------------


def killed(patient: Patient) -> str:
    def since() -> dict[str, float]:
        return {entry["name"]: entry["since_boot"] for entry in patient.state()["conditions"]}

    before, ports, leases = since(), patient.probe_ports(), patient.probe_leases()
    assert (len(ports), len(leases)) == (1, 1)
    began = time.monotonic()
    kill_the_daemon(patient)
    assert patient.classad("HasVirshDefaultNetwork") == "undefined"
    patient.wait(patient.probe_ports, "the next daemon's probe", 15)
    kill_the_daemon(patient)
    wait_for_a_new_check(patient, 40)
    seconds = time.monotonic() - began
    patient.wait_healthy()
    assert since() == before
    assert patient.probe_ports() == ports
    patient.wait(lambda: patient.probe_leases() == leases, f"no lease but {leases}", 5)
    return f"{seconds:5.1f} s from the first kill to the first check of the third daemon"


def kill_the_daemon(patient: Patient) -> None:
    patient.shell("systemctl kill --signal=KILL --kill-whom=main vmnode")


def wait_for_a_new_check(patient: Patient, timeout_s: float) -> None:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)  # the node shares it
    patient.wait(lambda: patient.state()["checked"]["boot"] > now, "a new check", timeout_s)


def stopped(patient: Patient) -> str:
    patient.shell("systemctl stop vmnode")
    began = time.monotonic()
    assert patient.classad("HasVirshDefaultNetwork") == "undefined"
    assert patient.status().returncode == 2
    wait_until_nothing_is_left(patient)
    seconds = time.monotonic() - began
    patient.shell("systemctl start vmnode")
    return f"{seconds:5.1f} s until nothing is left"


def wait_until_nothing_is_left(patient: Patient) -> None:
    patient.wait(lambda: not patient.probe_ports(), "no probe port", 5)
    patient.wait(lambda: not patient.probe_leases(), "no lease of a probe", 5)
    assert "vmn_" not in patient.shell("nft list tables")


def second_instance(patient: Patient) -> str:
    first_port, first_lease = patient.probe_ports(), patient.probe_leases()
    before = patient.state()["conditions"]
    patient.shell("mkdir -p /etc/second; cp -r /etc/vmnode/conf.d /etc/second/")
    patient.node.write("/etc/second/vmnode.toml", '[paths]\nrun_dir = "/run/second"\n')
    start = (
        "systemd-run --quiet --unit=second --service-type=notify --property=KillMode=process"
        " vmnoded --config /etc/second/vmnode.toml"
    )
    check = "vmnode --config /etc/second/vmnode.toml status >/dev/null"

    patient.shell(f"{start} && {check}")
    assert len(patient.probe_ports()) == 2
    assert len(patient.probe_leases()) == 2

    patient.shell("systemctl kill --signal=KILL --kill-whom=main second")
    patient.wait(lambda: patient.probe_ports() == first_port, "the dead instance's port to go", 5)
    patient.wait(lambda: workers(patient) == 1, "the dead instance's libvirt worker to end", 5)
    patient.shell("systemctl reset-failed second")
    assert len(patient.probe_leases()) == 2

    patient.shell(f"{start} && {check} && systemctl stop second")
    patient.wait(lambda: patient.probe_ports() == first_port, "the stopped instance's port to go", 5)
    patient.wait(lambda: patient.probe_leases() == first_lease, f"no lease but {first_lease}", 5)
    after = patient.state()["conditions"]
    assert [entry["since_boot"] for entry in after] == [entry["since_boot"] for entry in before]
    return "undisturbed"


def workers(patient: Patient) -> int:
    return len(patient.shell("pgrep -f '[l]ibvirt_worker' || true").split())


def started_twice(patient: Patient) -> str:
    second = patient.node.run(["vmnoded"], check=False, timeout=10)
    assert second.returncode == 69
    assert "another vmnoded runs here" in second.stderr
    assert "Traceback" not in second.stderr
    assert patient.healthy()
    return "refused"


def check_beside(patient: Patient) -> str:
    ports, leases = patient.probe_ports(), patient.probe_leases()
    began = time.monotonic()
    check = patient.node.run(["vmnode", "check", "--json"], check=False)
    seconds = time.monotonic() - began
    assert check.returncode == 0, check.stderr
    assert json.loads(check.stdout)["attributes"] == patient.state()["attributes"]
    patient.wait(lambda: (patient.probe_ports(), patient.probe_leases()) == (ports, leases), "what was there before", 5)
    return f"{seconds:5.1f} s for the check"


def condor_broken(patient: Patient) -> str:
    patient.node.write("/etc/condor/config.d/99-broken.conf", "if nonsense\n")
    try:
        began = time.monotonic()
        patient.shell("virsh net-destroy default")
        patient.wait(lambda: patient.condition("network.active")["status"] == "failed", "the fault", EVENT_S)
        seconds = time.monotonic() - began
        patient.shell("virsh net-start default")
        patient.wait_healthy()
    finally:
        patient.shell("rm /etc/condor/config.d/99-broken.conf")
    return f"{seconds:5.1f} s to find a fault"


# --- the state file -------------------------------------------------------------------------------------------------


def truncated(state: str) -> str:
    return state[: len(state) // 2]


def corrupt(state: str) -> str:
    return state.replace('"', "\ufffd\0")


def of_version_2(state: str) -> str:
    return state.replace('"version": 1', '"version": 2', 1)


def from_the_future(state: str) -> str:
    document = json.loads(state)
    document["checked"]["boot"] += HOUR_S
    return json.dumps(document)


def damaged(damage: Callable[[str], str]) -> Callable[[Patient], str]:
    """While the daemon runs readers see the damage, and say undefined; the next daemon starts anew."""

    def proof(patient: Patient) -> str:
        patient.node.write(STATE, damage(patient.node.read(STATE)))
        hook = patient.node.run(["/usr/libexec/condor/vmnode-startd-cron"])
        assert "HasVirshDefaultNetwork = undefined" in hook.stdout.splitlines()
        assert "Traceback" not in hook.stderr
        assert patient.classad("HasVirshDefaultNetwork") == "undefined"
        status = patient.status()
        assert status.returncode == 2
        assert "Traceback" not in status.stderr
        began = time.monotonic()
        patient.shell("systemctl restart vmnode")
        wait_until_published(patient)
        log = patient.shell("journalctl --quiet -u vmnode --output=cat | grep -v systemd | tail -n 20")
        assert "starting without a history" in log, log
        return f"{time.monotonic() - began:5.1f} s from the restart to the truth"

    return proof


def wait_until_published(patient: Patient) -> None:
    patient.wait(lambda: patient.classad("HasVirshDefaultNetwork") == "true", "the attribute", 20)


def disk_full(patient: Patient) -> str:
    patient.shell(
        f"systemctl stop vmnode; mount -t tmpfs -o size=32k,mode=0755 tmpfs {RUN_DIR}; systemctl start vmnode"
    )
    try:
        patient.wait_healthy()
        patient.shell(f"dd if=/dev/zero of={RUN_DIR}/filler bs=1k status=none || true")
        began = time.monotonic()
        patient.shell("virsh net-destroy default")
        patient.wait(lambda: patient.classad("HasVirshDefaultNetwork") != "true", "the truth, or nothing", EVENT_S)
        seconds = time.monotonic() - began
        assert patient.status().returncode != 0
        value = patient.classad("HasVirshDefaultNetwork")
        patient.shell(f"rm {RUN_DIR}/filler; virsh net-start default")
        patient.wait_healthy()
    finally:
        patient.shell(f"systemctl stop vmnode; umount {RUN_DIR}; systemctl start vmnode")
    return f"{seconds:5.1f} s until the attribute is {value}"


# --- the clock ------------------------------------------------------------------------------------------------------

CLOCK = "/run/clock"  # the offset of vmnode's clock in seconds: read at every call, so that writing it is a step
HOOK_SAYS = "/tmp/hook"


def stepped(step_s: int) -> Callable[[Patient], str]:
    """The wall clock of vmnode, its hook and HTCondor's evaluation is stepped while they run; the machine's is not."""

    def proof(patient: Patient) -> str:
        with fake_clock(patient) as under_it, continuous_hook(patient, under_it):
            patient.wait_healthy()
            set_clock(patient, step_s)
            began = time.monotonic()
            now = float(patient.node.run([*under_it, "date", "+%s"]).stdout)
            assert abs(now - time.time() - step_s) < HOUR_S / 60, "the clock was not stepped"
            patient.wait(lambda: abs(last_printed(patient) - now) < HOUR_S / 30, "the hook to follow the clock", 15)
            seconds = time.monotonic() - began
            status = patient.node.run([*under_it, "vmnode", "status"])  # fails if that is stale
            assert re.search(r"is healthy \(checked (just now|\d+ s ago)\)", status.stdout)
            assert patient.classad("HasVirshDefaultNetwork", under_it) == "true"
            patient.shell("virsh net-destroy default")
            patient.wait(lambda: patient.condition("network.active")["status"] == "failed", "the fault", EVENT_S)
            assert patient.classad("HasVirshDefaultNetwork", under_it) == "false"
            patient.shell("virsh net-start default")
            patient.wait_healthy()
            assert patient.classad("HasVirshDefaultNetwork", under_it) == "true"
        return f"{seconds:5.1f} s until the hook has followed"

    return proof


@contextmanager
def fake_clock(patient: Patient) -> Iterator[list[str]]:
    """vmnoded runs under a wall clock of its own; yields what makes another command run under it too."""
    variables = {
        "LD_PRELOAD": patient.shell("ls /usr/lib/*/faketime/libfaketimeMT.so.1").strip(),
        "FAKETIME_TIMESTAMP_FILE": CLOCK,
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a step moves CLOCK_REALTIME, and never the boot clock
    }
    settings = [f"{name}={value}" for name, value in variables.items()]
    set_clock(patient, 0)
    drop_in = "/run/systemd/system/vmnode.service.d/clock.conf"
    patient.node.write(drop_in, "[Service]\n" + "".join(f"Environment={setting}\n" for setting in settings))
    patient.shell("systemctl daemon-reload; systemctl restart vmnode")
    try:
        yield ["env", *settings]
    finally:
        patient.shell(f"rm {drop_in}; systemctl daemon-reload; systemctl restart vmnode")


def set_clock(patient: Patient, offset_s: int) -> None:
    patient.shell(f"echo {offset_s:+d} >{CLOCK}.new; mv {CLOCK}.new {CLOCK}")


@contextmanager
def continuous_hook(patient: Patient, under_it: list[str]) -> Iterator[None]:
    """The hook as the startd runs it, but that it writes to HOOK_SAYS."""
    command = f"exec /usr/libexec/condor/vmnode-startd-cron --continuous >{HOOK_SAYS}"
    hook = patient.node.popen([*under_it, "sh", "-c", command])
    try:
        patient.wait(lambda: last_printed(patient) > 0, "the hook's first words", 5)
        yield
    finally:
        hook.kill()
        hook.communicate()


def last_printed(patient: Patient) -> float:
    """The latest VMNodeLastCheck that the hook has printed; 0 if there is none."""
    lines = patient.node.path(HOOK_SAYS).read_text().splitlines() if patient.node.path(HOOK_SAYS).exists() else []
    times = [float(line.split("=")[1]) for line in lines if line.startswith("VMNodeLastCheck =")]
    return times[-1] if times else 0.0


PROOFS: dict[str, Callable[[Patient], str]] = {
    "vmnoded killed": killed,
    "vmnoded stopped": stopped,
    "a second instance": second_instance,
    "one instance started twice": started_twice,
    "a check beside the daemon": check_beside,
    "HTCondor's configuration broken": condor_broken,
    "state file truncated": damaged(truncated),
    "state file corrupt": damaged(corrupt),
    "state file of another version": damaged(of_version_2),
    "state file from the future": damaged(from_the_future),
    "disk full in run_dir": disk_full,
    "clock stepped an hour back": stepped(-HOUR_S),
    "clock stepped an hour forward": stepped(HOUR_S),
}
