"""The hook's life: as long as the startd's, exactly one of it, and cheap when it is broken."""

from __future__ import annotations

import time

from tests.pool.promise import on_every_version
from tests.pool.worker import HOOK, SLOTS, STARTD_LOG, Worker

PERIOD_S = 10  # of 50-vmnode.conf


@on_every_version
def test_a_killed_hook_is_started_again_and_the_attributes_stay(worker: Worker) -> None:
    began = time.monotonic()
    old = worker.kill_hooks()

    def another() -> bool:
        assert worker.everywhere("true")
        return worker.one_hook(other_than=old) is not None

    worker.until(another, "another hook")
    worker.report(
        f"hook killed (-9): started again after {time.monotonic() - began:.1f} s, attributes true all the time"
    )


@on_every_version
def test_reconfiguration_keeps_the_hook(worker: Worker) -> None:
    before = worker.hooks()
    worker.reconfigure()
    worker.reconfigure()
    assert worker.hooks() == before
    assert len(before) == 1


@on_every_version
def test_the_hook_ends_by_itself_when_the_startd_is_killed_and_the_next_startd_has_one(worker: Worker) -> None:
    (old,) = worker.hooks()
    startd = worker.pid("condor_startd")
    began = time.monotonic()
    worker.node.run(["kill", "-9", str(startd)])
    worker.until(lambda: old not in worker.hooks(), "the end of the hook", 5)
    ended = time.monotonic() - began
    worker.until(lambda: worker.one_hook(), "the next startd's hook", 60)
    assert worker.pid("condor_startd") != startd
    worker.seconds_until("true", began)
    assert len(worker.hooks()) == 1
    worker.report(f"startd killed (-9): its hook ended after {ended:.1f} s")


@on_every_version
def test_a_restart_leaves_one_hook_and_a_fast_shutdown_none(worker: Worker) -> None:
    old = worker.hooks()
    worker.node.run(["condor_restart", "-fast", "-startd"])
    worker.until(lambda: worker.one_hook(other_than=old), "one new hook", 60)
    worker.node.run(["condor_off", "-fast", "-startd"])
    worker.until(lambda: worker.node.run(["pgrep", "-x", "condor_startd"], check=False).returncode, "no startd")
    assert worker.hooks() == []
    worker.node.run(["condor_on", "-startd"])
    worker.until(lambda: worker.one_hook(), "one hook")
    worker.seconds_until("true", time.monotonic())


CRASHED = "/tmp/hook-crashed"


@on_every_version
def test_a_hook_that_crashes_at_once_is_started_every_ten_seconds_and_costs_nothing(worker: Worker) -> None:
    startd = worker.pid("condor_startd")
    pattern = r"STARTD_CRON job VMNODE started"
    before = worker.node.read(STARTD_LOG).count(pattern)

    def starts() -> int:
        return worker.node.read(STARTD_LOG).count(pattern) - before

    crash = f'open("{CRASHED}", "w"); raise SystemExit(1)'
    worker.shell(f"mv {HOOK} {HOOK}.good; sed '2i {crash}' {HOOK}.good >{HOOK}; chmod 755 {HOOK}; rm -f {CRASHED}")
    try:
        cpu, began = worker.cpu_seconds(startd), time.monotonic()
        worker.kill_hooks()
        worker.until(lambda: worker.shell(f"ls {CRASHED}", check=False), "a hook that was started, and crashed", 20)
        assert starts() == 1
    finally:
        worker.shell(f"mv {HOOK}.good {HOOK}")
    worker.until(lambda: worker.one_hook(), "a working hook", 20)
    seconds = time.monotonic() - began
    used = worker.cpu_seconds(startd) - cpu
    assert starts() == 2
    assert seconds >= 2 * PERIOD_S - 1
    assert used / seconds < 0.02
    worker.report(f"crash loop: 2 starts in {seconds:.0f} s, {100 * used / seconds:.2f} % of a core (startd and hooks)")


PERIODIC = """\
STARTD_CRON_VMNODE_MODE = Periodic
STARTD_CRON_VMNODE_PERIOD = 3s
STARTD_CRON_VMNODE_ARGS =
UPDATE_INTERVAL = 3600
"""


@on_every_version
def test_in_periodic_mode_the_startd_knows_within_the_period_and_pushes_nothing(worker: Worker) -> None:
    worker.site(PERIODIC)
    worker.until(lambda: not worker.hooks(), "a hook that comes and goes")
    _await_in_startd(worker, "true")  # a job whose mode changes is a new one to the startd: it starts without an ad
    before = worker.updates(), worker.collector("HasVirshDefaultNetwork")
    worker.node.run(["virsh", "net-destroy", "default"])
    began = time.monotonic()
    _await_in_startd(worker, "false")
    seconds = time.monotonic() - began
    assert (worker.updates(), worker.collector("HasVirshDefaultNetwork")) == before
    worker.report(f"Periodic, 3 s: the startd knows after {seconds:.1f} s, collector updates: 0")


def _await_in_startd(worker: Worker, value: str) -> None:
    wanted = [(value,)] * len(SLOTS)
    worker.until(lambda: worker.startd("HasVirshDefaultNetwork") == wanted, f"{value} in the startd", 10)
