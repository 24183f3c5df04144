"""Nothing false: a healthy node is found healthy, check after check."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

import tests.lab
from tests.libvirt.conftest import Measured
from tests.libvirt.patient import Patient

CHECK_ROUNDS = Path(tests.lab.__file__).with_name("check_rounds.py")


@pytest.mark.timeout(1800)
def test_a_healthy_node_is_never_called_anything_else(
    patient: Patient, measured: Measured, request: pytest.FixtureRequest
) -> None:
    rounds = 1000 if request.config.getoption("--soak") else 50
    patient.configure("")
    patient.wait_healthy()
    run = patient.node.run(["python3", "-c", CHECK_ROUNDS.read_text(), str(rounds)], timeout=1700)
    seen = json.loads(run.stdout)
    assert seen["bad"] == []
    assert len(seen["wall_s"]) == rounds
    assert patient.healthy()
    wall, cpu = statistics.median(seen["wall_s"]), statistics.median(seen["cpu_s"])
    measured(f"{rounds} healthy checks", f"{wall * 1000:.0f} ms wall, {cpu * 1000:.0f} ms CPU each (median)")
