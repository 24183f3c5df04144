"""Each row of the fault matrix on a real libvirtd, kernel and firewall: broken, found, told, repaired, healthy."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.libvirt.conftest import Measured
from tests.libvirt.faults import FAULTS, Fault
from tests.libvirt.patient import Patient

SLOW_REPAIR_S = 2.0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, patient: Patient, measured: Measured) -> None:
    if fault.needs and not Path(fault.needs).exists():
        pytest.skip(f"this machine has no {fault.needs}")
    patient.rest()
    fault.prepare.act(patient)
    try:
        patient.use_backend(fault.backend)
        patient.configure(fault.settings)
        patient.wait_healthy()
        patient.wait_quiet(fault.quiet_s)
        try:
            found = assert_found(fault, patient) if fault.condition else assert_unharmed(fault, patient)
            found += fault.also(patient)
        finally:
            began = time.monotonic()
            fault.repair.act(patient)
            repaired = time.monotonic()
        patient.wait_healthy(fault.recover_s)
        recovered = f"healthy again after {time.monotonic() - repaired:4.1f} s (at most {fault.recover_s:g})"
        slow = f"; the repair itself took {repaired - began:.1f} s" if repaired - began > SLOW_REPAIR_S else ""
        measured(fault.name, f"{found}  {recovered}{slow}")
        assert patient.classad("HasVirshDefaultNetwork") == "true"
    finally:
        fault.clean.act(patient)


def assert_found(fault: Fault, patient: Patient) -> str:
    """The condition fails for the right reason and in time, stands first, and takes the attribute with it.

    The clock starts with the command that breaks the node, and the node is watched while that command still runs.
    """

    def found() -> bool:
        entry = patient.condition(fault.condition)
        return bool(entry) and (entry["status"], entry["reason"]) == ("failed", fault.reason)

    with ThreadPoolExecutor(1) as beside:
        began = time.monotonic()
        breaking = beside.submit(fault.break_.act, patient)
        patient.wait(found, f"{fault.condition}: {fault.reason}", fault.detect_s)
        seconds = time.monotonic() - began
        breaking.result()
    entry = patient.wait(lambda: patient.condition(fault.condition), fault.condition, fault.detect_s)
    assert fault.culprit in entry["message"]
    assert patient.first_broken() == f"{fault.condition}: {fault.reason}"
    assert patient.status().returncode == 1
    expected = "false" if fault.attribute_of_guests else "true"
    assert patient.classad("HasVirshDefaultNetwork") == expected
    return f"{seconds:5.1f} s (at most {fault.detect_s:g}) by {fault.by}: {fault.condition} {fault.reason}"


def assert_unharmed(fault: Fault, patient: Patient) -> str:
    """Nothing is broken, and the daemon does not say so either, although it looks; nor does a check from nothing."""
    fault.break_.act(patient)
    patient.wait_for_checks(2 if fault.by == "period" else 1, fault.detect_s)
    assert patient.healthy()
    check = patient.node.run(["vmnode", "check"], check=False)
    assert check.returncode == 0, check.stdout
    assert patient.healthy()
    return "stays healthy"
