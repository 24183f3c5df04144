"""A change reaches the collector within seconds; a state that does not change costs it nothing."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone

from tests.pool.promise import on_every_version
from tests.pool.worker import SLOTS, Worker

DETECT_S = 10.0  # "within seconds"; the figure to reach is a bench's affair
EXECUTE = "/var/lib/condor/execute"
RECOVER_S = 30.0  # a new bridge forwards after 4 s, dnsmasq offers after 3 s, and recovery has to be confirmed


def _break_and_repair(worker: Worker, how: str, fault: str, repair: str, reason: str) -> None:
    worker.until(lambda: _seconds_since_last_push(worker) > 5, "a node that does not flap")
    began = time.monotonic()
    worker.shell(fault)
    detected = worker.seconds_until("false", began, DETECT_S)
    assert all(why.startswith(reason) for (why,) in worker.collector("VMNodeReason"))
    assert worker.collector("VMNodeState") == [("Failed",)] * len(SLOTS)
    began = time.monotonic()
    worker.shell(repair)
    recovered = worker.seconds_until("true", began, RECOVER_S)
    assert worker.collector("VMNodeReason", "VMNodeState") == [("", "Healthy")] * len(SLOTS)
    worker.report(f"{how} -> false in the collector after {detected:.1f} s, repaired -> true after {recovered:.1f} s")


def _seconds_since_last_push(worker: Worker) -> float:
    now = datetime.fromtimestamp(time.time(), timezone.utc).replace(tzinfo=None)
    return (now - worker.pushes()[-1]).total_seconds()


@on_every_version
def test_a_destroyed_network_is_in_the_collector_within_seconds_and_so_is_its_repair(worker: Worker) -> None:
    _break_and_repair(
        worker,
        "virsh net-destroy default",
        "virsh net-destroy default",
        "virsh net-start default",
        "network.active: ",
    )


@on_every_version
def test_a_killed_dnsmasq_is_in_the_collector_within_seconds_and_so_is_its_repair(worker: Worker) -> None:
    _break_and_repair(
        worker,
        "kill -9 of dnsmasq",
        "pkill -9 dnsmasq",
        "virsh net-destroy default; virsh net-start default",
        "network.dnsmasq: ",
    )


@on_every_version
def test_a_steady_state_causes_no_update_of_the_collector_and_yet_stays_fresh_in_the_startd(worker: Worker) -> None:
    worker.settings("[health]\ninterval_s = 1\nmax_age_s = 12\n")  # so that the hook prints every 3 s
    worker.until(lambda: all("< 12" in raw for (raw,) in worker.raw("VMNodeState")), "the new settings")
    for autopublish in ("Never", "If_Changed"):
        worker.site(f"UPDATE_INTERVAL = 3600\nSTARTD_CRON_AUTOPUBLISH = {autopublish}\n")
        _await_fresher(worker, 1)  # the updates that reconfiguration itself causes are over
        before = worker.updates(), worker.collector("VMNodeLastCheck")
        seconds = _await_fresher(worker, 4)
        assert (worker.updates(), worker.collector("VMNodeLastCheck")) == before
        worker.report(f"AUTOPUBLISH {autopublish}: printed 4 times in {seconds:.0f} s, steady: 0 collector updates")


def _await_fresher(worker: Worker, times: int) -> float:
    """Wait until VMNodeLastCheck has grown so often in every slot of the startd; the seconds that took."""
    began = time.monotonic()
    for _ in range(times):
        before = max(worker.last_checks())

        def grown(before: int = before) -> bool:
            checks = worker.last_checks()
            return len(checks) == 1 and checks.pop() > before

        worker.until(grown, "a fresher VMNodeLastCheck in the startd")
    return time.monotonic() - began


@on_every_version
def test_a_flapping_node_is_pushed_at_most_once_in_five_seconds(worker: Worker) -> None:
    worker.settings("[health]\ninterval_s = 1\nrecover_after = 1\n")
    told = len(worker.pushes())
    flips = 0
    began = time.monotonic()
    try:
        while time.monotonic() - began < 17:
            mode, verdict = (
                ("0755", "healthy") if flips % 2 else ("0700", "failed")
            )  # QEMU's user cannot enter the second
            worker.node.run(["chmod", mode, EXECUTE])
            _await_verdict(worker, verdict)
            flips += 1
    finally:
        worker.node.run(["chmod", "0755", EXECUTE])
    pushes = worker.pushes()[told:]
    gaps = [(later - earlier).total_seconds() for earlier, later in zip(pushes, pushes[1:])]
    assert len(gaps) >= 2
    assert min(gaps) >= 4.9  # the log of the startd, which reads the hook's pipe a moment later
    assert flips > 2 * len(pushes)
    worker.report(f"flapping {flips} times within 17 s: {len(pushes)} pushes, at least {min(gaps):.1f} s apart")


def _await_verdict(worker: Worker, verdict: str) -> None:
    status = ["vmnode", "status", "--json"]
    worker.until(lambda: json.loads(worker.node.run(status, check=False).stdout)["state"] == verdict, verdict)
