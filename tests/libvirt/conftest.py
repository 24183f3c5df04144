"""One booted node for each image that the matrix runs on, and the measured seconds at the end of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Callable

import pytest

from tests.lab.images import SUITES
from tests.lab.node import Node
from tests.libvirt.patient import Patient

Measured = Callable[[str, str], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes a patient runs on every image; with pytest-xdist each image has a process of its own."""
    if "patient" in metafunc.fixturenames:
        suites = [pytest.param(suite, marks=pytest.mark.xdist_group(suite)) for suite in SUITES]
        metafunc.parametrize("patient", suites, indirect=True, scope="session")


@pytest.fixture(scope="session")
def patient(request: pytest.FixtureRequest) -> Iterator[Patient]:
    with Node.boot(request.param, f"matrix-{request.param}-{os.getpid()}") as node:
        patient = Patient(node)
        try:
            patient.set_up()
            yield patient
        finally:
            patient.far.close()


@pytest.fixture
def measured(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Measured:
    """Adds a line to the table at the end: what was done, and what was measured."""

    def record(what: str, seconds: str) -> None:
        record_property("measured", (request.node.callspec.params["patient"], what, seconds))

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "measured"
    ]
    if rows:
        terminalreporter.section("measured")
        width = max(len(what) for _, what, _ in rows)
        for suite, what, seconds in sorted(rows, key=lambda row: row[0]):
            terminalreporter.write_line(f"{suite:7} {what:{width}}  {seconds}")
