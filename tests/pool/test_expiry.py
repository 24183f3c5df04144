"""What was published cannot go stale, whoever dies: it says undefined, or expires by itself where it lies."""

from __future__ import annotations

import time

from tests.pool.jobs import NAT, REQUIREMENT, VANILLA
from tests.pool.promise import on_every_version
from tests.pool.worker import SETTINGS_FILE, SLOTS, Worker

# The shortest life, renewed in time by checks and by the startd's own updates.
SHORT_LIFE = "[health]\ninterval_s = 2\nmax_age_s = 10\n"
OFTEN = "UPDATE_INTERVAL = 3\n"


@on_every_version
def test_a_stopped_daemon_is_undefined_in_the_collector_within_thirty_seconds_with_the_reason(worker: Worker) -> None:
    """And with the policy, the node takes no nat job then."""
    worker.install_policy()
    began = time.monotonic()
    worker.node.run(["systemctl", "stop", "vmnode"])
    seconds = worker.seconds_until("undefined", began, 30)
    expected = ("Unknown", "vmnode: the daemon does not run", "undefined", "undefined")
    attributes = ("VMNodeState", "VMNodeReason", "VMNodeFailed", "VMNodeNetworkDhcpOK")
    assert worker.collector(*attributes) == [expected] * len(SLOTS)
    worker.report(f"systemctl stop vmnode -> undefined in the collector after {seconds:.1f} s")
    kept_off = [worker.submit(NAT), worker.submit(VANILLA + REQUIREMENT)]
    worker.await_match(worker.submit(VANILLA))
    worker.await_rejection(*kept_off)


@on_every_version
def test_a_restarted_daemon_is_not_gone(worker: Worker) -> None:
    pushes = len(worker.pushes())
    worker.node.write(SETTINGS_FILE, "[health]\nmax_age_s = 800\n")
    worker.node.run(["systemctl", "restart", "vmnode"])
    worker.until(lambda: all("< 800" in raw for (raw,) in worker.raw("VMNodeState")), "the new settings")
    assert worker.everywhere("true")
    assert len(worker.pushes()) == pushes + 1  # for the settings, and none that said undefined


def _shorten(worker: Worker) -> None:
    worker.settings(SHORT_LIFE)
    worker.site(OFTEN)
    worker.until(lambda: all("< 10" in raw for (raw,) in worker.raw("VMNodeState")), "the new settings")
    began = time.monotonic()
    while time.monotonic() - began < 12:  # longer than it lives: renewed all the time, it does not expire
        assert worker.everywhere("true")


def _expect_expired(ads: list[tuple[str, ...]]) -> None:
    assert ads == [("undefined", "Unknown", "vmnode: no recent check", "undefined")] * len(SLOTS)


ATTRIBUTES = ("HasVirshDefaultNetwork", "VMNodeState", "VMNodeReason", "VMNodeNetworkDhcpOK")


@on_every_version
def test_with_daemon_hook_and_startd_frozen_the_attributes_expire_by_themselves(worker: Worker) -> None:
    _shorten(worker)
    # First the daemon hangs, and the hook is killed; the startd, which goes on publishing, starts another.
    began = time.monotonic()
    old = worker.hooks()
    worker.shell("pkill -STOP -x vmnoded")
    worker.kill_hooks()
    seconds = worker.seconds_until("undefined", began, 20)
    _expect_expired(worker.collector(*ATTRIBUTES))
    _expect_expired(worker.startd(*ATTRIBUTES))
    worker.report(f"daemon stopped (SIGSTOP), hook killed: expired {seconds:.1f} s later (max_age_s 10)")
    worker.until(lambda: worker.one_hook(other_than=old), "another hook")
    _expect_expired(worker.startd(*ATTRIBUTES))
    worker.shell("pkill -CONT -x vmnoded")
    worker.seconds_until("true", time.monotonic())

    # Then nobody is left who could tell the collector anything.
    began = time.monotonic()
    worker.shell("pkill -STOP -x 'vmnoded|condor_startd'")
    worker.kill_hooks()
    seconds = worker.seconds_until("undefined", began, 20)
    _expect_expired(worker.collector(*ATTRIBUTES))
    worker.await_rejection(worker.submit(VANILLA + REQUIREMENT))
    worker.report(f"the startd stopped, too: expired in the collector {seconds:.1f} s later, and for matchmaking")
