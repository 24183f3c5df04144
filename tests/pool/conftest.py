"""A pool per version of HTCondor: the oldest and the newest that matter, each a node with vmnode installed.

Most of a test here is waiting for HTCondor, so every promise is tried on all versions at the same time.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Callable

import pytest

from tests.lab.images import SUITES
from tests.lab.node import Node
from tests.pool.traffic import PORT, WAN
from tests.pool.worker import CHECKOUT, Worker

# Sixteen CPUs to match with, whatever the machine below has; a slot of either kind; what VM jobs may ask for.
POOL = """\
NUM_CPUS = 16
SLOT_TYPE_1 = cpus=12, memory=75%, disk=75%
NUM_SLOTS_TYPE_2 = 1
SLOT_TYPE_2 = cpus=1, memory=20%, disk=20%
SLOT_TYPE_2_PARTITIONABLE = False
VM_NETWORKING_TYPE = nat, bridge
VM_NETWORKING_BRIDGE_INTERFACE = virbr0
VM_MAX_NUMBER = 12
STARTD_DEBUG = D_CRON D_SUB_SECOND
CLAIM_WORKLIFE = 0
"""

_measured: list[str] = []


class Pools:
    """All workers."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    def each(self, promise: Callable[[Worker], None]) -> None:
        """Keep a promise on every version at once; all that fail are told."""
        with ThreadPoolExecutor() as threads:
            runs = [(worker, threads.submit(_on_repaired, worker, promise)) for worker in self._workers]
        broken = [f"HTCondor {worker.version}:\n{_trace(run)}" for worker, run in runs if run.exception()]
        if broken:
            pytest.fail("\n".join(broken), pytrace=False)


def _on_repaired(worker: Worker, promise: Callable[[Worker], None]) -> None:
    worker.repair()
    promise(worker)


def _trace(run: Future[None]) -> str:
    error = run.exception()
    assert error is not None
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node.boot(suite, f"pool-{suite}-{os.getpid()}")) for suite in SUITES]
        with ThreadPoolExecutor() as threads:
            workers = list(threads.map(_start, nodes))
        yield Pools(workers)
        for worker in workers:
            _measured.extend(worker.measured)


def _start(node: Node) -> Worker:
    node.write("/etc/condor/config.d/20-pool.conf", POOL)
    node.install_vmnode(CHECKOUT)
    node.start_condor()
    for address in (node.world.address, WAN):
        node.world.respond(address, PORT)
    node.run(["runuser", "-u", "alice", "--", "truncate", "-s", "1M", "/home/alice/disk.img"])
    return Worker(node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("measured")
        for line in sorted(_measured):
            terminalreporter.write_line(line)
