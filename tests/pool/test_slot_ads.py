"""50-vmnode.conf as it is shipped: every attribute of the contract is in every slot ad, and jobs can ask for it."""

from __future__ import annotations

import json
import time

from tests.pool.jobs import VANILLA
from tests.pool.promise import on_every_version
from tests.pool.worker import SLOTS, Worker

# The contract's attributes, on a node that is healthy; canary and image roots are not there, so neither ok nor not.
# accel = "tcg" or "kvm" is the lab's choice: the kvm condition is true or does not apply.
HEALTHY = {
    "HasVirshDefaultNetwork": "true",
    "VMNodeState": "Healthy",
    "VMNodeFailed": "",
    "VMNodeReason": "",
    "VMNodeLibvirtOK": "true",
    "VMNodeNetworkActiveOK": "true",
    "VMNodeNetworkBridgeOK": "true",
    "VMNodeNetworkDnsmasqOK": "true",
    "VMNodeNetworkDhcpOK": "true",
    "VMNodeNetworkDnsOK": "true",
    "VMNodeNetworkForwardingOK": "true",
    "VMNodeNetworkOutboundOK": "true",
    "VMNodeExecuteDirOK": "true",
    "VMNodeCanaryOK": "undefined",
    "VMNodeQemuImgOK": "true",
    "VMNodeImagesOK": "undefined",
    "VMNodeImageRoots": "",
}


@on_every_version
def test_every_attribute_of_the_contract_is_in_static_and_partitionable_slots(worker: Worker) -> None:
    kinds = worker.collector("PartitionableSlot =?= true")
    assert kinds == [("true",), ("false",)]
    assert worker.collector(*HEALTHY) == [tuple(HEALTHY.values())] * len(SLOTS)
    version = worker.node.run(["vmnode", "--version"]).stdout.split()[-1]
    assert worker.collector("VMNodeVersion") == [(version,)] * len(SLOTS)
    assert worker.collector("VMNodeKvmOK") in ([("true",)] * len(SLOTS), [("undefined",)] * len(SLOTS))
    now = time.time()
    assert all(now - 120 < int(checked) <= now + 1 for (checked,) in worker.collector("VMNodeLastCheck"))


@on_every_version
def test_jobs_that_require_the_attribute_run_on_a_healthy_node_and_wait_for_a_broken_one(worker: Worker) -> None:
    forms = ("TARGET.HasVirshDefaultNetwork == True", "TARGET.HasVirshDefaultNetwork =?= True")
    worker.await_match(*(worker.submit(f"{VANILLA}requirements = ({form})") for form in forms))
    worker.node.run(["virsh", "net-destroy", "default"])
    worker.seconds_until("false", time.monotonic())
    waiting = [worker.submit(f"{VANILLA}requirements = ({form})") for form in forms]
    worker.await_rejection(*waiting)
    worker.node.run(["virsh", "net-start", "default"])
    worker.await_match(*waiting)


EVIL = (
    "quote \" and 'quote' \\\" \\\\ backslash\\n"
    "\nSmuggled = true\r\nSmuggled = true\x0bSmuggled = true\x00\x85Smuggled = true\u2028Smuggled = true"
    '"; Smuggled = true; x = "\n- update:true\n-\nSlotMergeConstraint = false\n'
    "$(START) $ENV(HOME) ${x} %d \u202e \U0001f4a9 \udcff" + "\n" * 50 + "ö" * 2000
)

# A daemon that saw something nasty: it holds the lock and publishes as vmnoded does.
NASTY_DAEMON = """
import sys, time
sys.path.insert(0, "/usr/lib/vmnode")
from pathlib import Path
from vmnode.conditions import KINDS, Condition, Status
from vmnode.host import clock, files
from vmnode.report.state import Snapshot, write

evil = {evil!r}
lock = files.take_lock(Path("/run/vmnode/lock"))
assert lock is not None
now = clock.now()
conditions = tuple(Condition(kind.name, Status.FAILED, evil, evil, evil, now.boot) for kind in KINDS)
data = write(Snapshot(conditions, (Path("/" + evil.replace("\\0", "")), Path("/images")), now), 900)
files.write_atomically(Path("/run/vmnode/state.json"), data)
time.sleep(600)
"""


@on_every_version
def test_no_string_from_the_host_smuggles_an_attribute_into_the_ad(worker: Worker) -> None:
    ordinary = _attributes(worker)
    worker.node.run(["systemctl", "stop", "vmnode"])
    nasty = worker.node.popen(["python3", "-I", "-c", NASTY_DAEMON.format(evil=EVIL)])
    try:
        worker.seconds_until("false", time.monotonic())
        assert _attributes(worker) - ordinary <= {"Command", "VMNodePushed"}  # of condor_update_machine_ad
        for reason, state in worker.collector("VMNodeReason", "VMNodeState"):
            assert state == "Failed"
            assert reason.startswith("kvm: quote ' and 'quote' /' // backslash/n Smuggled = true  Smuggled = true")
            assert 1000 < len(reason.encode()) <= 1024
        roots = worker.collector("VMNodeImageRoots")
        assert all(len(value.encode()) <= 1024 for (value,) in roots)
        assert worker.collector("VMNodeNetworkDhcpOK") == [("false",)] * len(SLOTS)
    finally:
        nasty.kill()
        nasty.wait()


def _attributes(worker: Worker) -> set[str]:
    """The names of all attributes in the slot ads, as condor_status parses them."""
    ads = json.loads(worker.node.run(["condor_status", "-json"]).stdout)
    assert len(ads) == len(SLOTS)
    return {name for ad in ads for name in ad}
