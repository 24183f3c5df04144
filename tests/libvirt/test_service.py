"""vmnoded as a service of systemd: what it tells, what it takes, how it ends."""

from __future__ import annotations

import time

from tests.libvirt.patient import Patient

EXTRA = "/etc/vmnode/conf.d/40-service.toml"


def unit(patient: Patient, name: str) -> str:
    return patient.node.run(["systemctl", "show", "--value", "--property", name, "vmnode"]).stdout.strip()


def journal_since(patient: Patient, since: str) -> str:
    return patient.node.run(["journalctl", "--unit", "vmnode", "--output", "cat", "--since", since]).stdout


def test_it_is_ready_when_its_first_verdict_is_published(patient: Patient) -> None:
    patient.configure("")
    patient.shell("systemctl stop vmnode; rm /run/vmnode/state.json")
    patient.shell("systemctl start vmnode")  # returns at READY=1
    assert patient.healthy(), patient.status().stdout
    assert unit(patient, "StatusText") == "healthy"
    assert unit(patient, "Before").split().count("condor.service") == 1


def test_its_status_line_is_the_first_broken_link(patient: Patient) -> None:
    patient.configure("")
    patient.wait_healthy()
    patient.shell("virsh net-destroy default")
    try:
        patient.wait(lambda: patient.condition("network.active")["status"] == "failed", "the fault", 5)
        assert unit(patient, "StatusText") == "failed: network.active: Inactive: network 'default' is not active"
    finally:
        patient.shell("virsh net-start default")
    patient.wait_healthy()


def test_a_reload_takes_a_right_configuration_and_refuses_a_wrong_one(patient: Patient) -> None:
    patient.configure("")
    patient.wait_healthy()
    pid = unit(patient, "MainPID")
    patient.node.write(EXTRA, "[images]\nroots = ['/srv']\n")
    try:
        patient.shell("systemctl reload vmnode")
        patient.wait(lambda: patient.state()["attributes"].get("VMNodeImageRoots") == ["/srv"], "the new root", 20)
        patient.node.write(EXTRA, "[images]\nroots = ['/srv']\ntimeout_s = 'soon'\n")
        said = patient.node.run(["vmnode", "config", "check"], check=False)
        assert said.returncode == 78
        assert f"{EXTRA}: [images] timeout_s = 'soon': must be a number of seconds" in said.stderr
        before = time.strftime("%Y-%m-%d %H:%M:%S")
        patient.shell("systemctl reload vmnode")
        refusal = f"the old one stays in force: {EXTRA}: [images] timeout_s = 'soon': must be a number of seconds"
        patient.wait(lambda: refusal in journal_since(patient, before), "the refusal", 20)
        patient.wait_healthy()
        assert patient.state()["attributes"]["VMNodeImageRoots"] == ["/srv"]
        assert unit(patient, "MainPID") == pid
    finally:
        patient.shell(f"rm {EXTRA}; systemctl reload vmnode")
    patient.wait(lambda: patient.condition("images")["status"] == "disabled", "no roots", 20)


def test_a_wrong_configuration_fails_the_start_with_one_sentence_and_no_traceback(patient: Patient) -> None:
    patient.node.write(EXTRA, "[helth]\ninterval_s = 5\n")
    try:
        started = patient.node.run(["vmnoded"], check=False)
    finally:
        patient.shell(f"rm {EXTRA}")
    assert started.returncode == 78
    assert f"{EXTRA}: [helth]: no such section (did you mean 'health'?)" in started.stderr
    assert "Traceback" not in started.stderr


def test_a_daemon_whose_loop_stands_still_is_restarted_by_the_watchdog(patient: Patient) -> None:
    patient.configure("")
    drop_in = "/etc/systemd/system/vmnode.service.d/watchdog.conf"
    patient.node.write(drop_in, "[Service]\nWatchdogSec=3\n")
    try:
        patient.shell("systemctl daemon-reload; systemctl restart vmnode")
        pid = unit(patient, "MainPID")
        time.sleep(7)  # more than twice the watchdog's time: a loop that turns is left alone
        assert unit(patient, "MainPID") == pid
        patient.shell(f"kill -STOP {pid}")
        patient.wait(lambda: unit(patient, "MainPID") not in (pid, "0"), "another daemon", 20)
    finally:
        patient.shell(f"rm {drop_in}; systemctl daemon-reload; systemctl restart vmnode")
    patient.wait_healthy()


def test_however_often_it_is_killed_it_comes_back(patient: Patient) -> None:
    patient.configure("")
    for _ in range(8):
        patient.shell("systemctl kill --signal KILL vmnode")
        patient.wait(lambda: unit(patient, "MainPID") != "0", "another daemon", 5)
    patient.wait(lambda: unit(patient, "SubState") == "running", "its first verdict", 30)
    patient.wait_healthy()
    assert len(patient.probe_ports()) == 1


def test_a_clean_stop_is_quick_and_takes_the_probe_and_its_lease_away(patient: Patient) -> None:
    patient.configure("")
    patient.wait_healthy()
    assert len(patient.probe_ports()) == 1
    assert len(patient.probe_leases()) == 1
    began = time.monotonic()
    patient.shell("systemctl stop vmnode")
    assert time.monotonic() - began < 5
    try:
        assert unit(patient, "Result") == "success"
        assert patient.node.run(["vmnode", "status"], check=False).returncode == 2
        patient.wait(lambda: not patient.probe_ports() and not patient.probe_leases(), "nothing left", 5)
    finally:
        patient.shell("systemctl start vmnode")
    patient.wait_healthy()


def test_the_unit_is_exposed_to_4_0_at_the_most(patient: Patient) -> None:
    last = patient.node.run(["systemd-analyze", "security", "--no-pager", "vmnode"]).stdout.strip().splitlines()[-1]
    exposure = float(last.rpartition("vmnode.service: ")[2].split()[0])
    assert exposure <= 4.0
    text = patient.node.read("/usr/lib/systemd/system/vmnode.service")
    granted = [
        line.partition("=")[2].split() for line in text.splitlines() if line.startswith("CapabilityBoundingSet=")
    ]
    explained = [line for line in text.splitlines() if line.startswith("#   CAP_")]
    assert len(explained) == len([names for names in granted if names])
