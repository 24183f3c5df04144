"""The demonstration: a pool of one node tells the truth about its network while that is broken and repaired.

Everything shown is what a user would type and see on such a node; the seconds are measured at the collector,
that is, where the rest of the pool reads them.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.lab.node import Node
from tests.lab.progress import progress

CHECKOUT = Path(__file__).resolve().parents[2]
ATTRIBUTES = ("HasVirshDefaultNetwork", "VMNodeState", "VMNodeReason")
GOOD = "HasVirshDefaultNetwork =?= true"
BAD = "HasVirshDefaultNetwork =!= true && size(VMNodeReason) > 0"
STATUS = ["condor_status", "-af:h", "Machine", *ATTRIBUTES]

HEALTHY_TIMEOUT_S = 90.0
"""From HTCondor's start, or from the repair, to an attribute that is true: a few checks and pushes."""

FAILED_TIMEOUT_S = 60.0

REST_S = 6.0
"""A node tells the collector of changes at most every 5 s, and HTCondor's start was one; without a rest the demo
would measure that limit."""


def demo(suite: str) -> None:
    """Run the demonstration on a fresh node; raises LabError unless all of it was seen to happen."""
    print(f"A pool of one worker node: Debian {suite}, HTCondor, libvirt, and vmnode from {CHECKOUT}\n")
    with boot_pool(suite, "demo") as node:
        version = node.run(["condor_version"]).stdout.split()[1]
        print(f"The node is up and runs HTCondor {version}. Its machine ad says, through vmnode:\n")
        with progress("waiting for a healthy node"):
            _wait_until_listed(GOOD, node, HEALTHY_TIMEOUT_S)
        _show(node, STATUS)
        with progress("letting the node come to rest"):
            time.sleep(REST_S)

        print("Now the network that every VM job needs is taken away:\n")
        broken_at = time.monotonic()
        _show(node, ["virsh", "net-destroy", "default"])
        with progress("waiting for the collector to know"):
            _wait_until_listed(BAD, node, FAILED_TIMEOUT_S)
        print(f"{time.monotonic() - broken_at:.1f} s later the collector knows, and no VM job is sent here:\n")
        _show(node, STATUS)
        _show(node, ["vmnode", "status"])

        print("And it is repaired:\n")
        repaired_at = time.monotonic()
        _show(node, ["virsh", "net-start", "default"])
        with progress("waiting for the collector to know"):
            _wait_until_listed(GOOD, node, HEALTHY_TIMEOUT_S)
        print(f"{time.monotonic() - repaired_at:.1f} s later the node takes VM jobs again:\n")
        _show(node, STATUS)
    print("Seen: true, then not true with its reason, then true again. The node has been removed.")


def boot_pool(suite: str, name: str) -> Node:
    """A running node with vmnode and HTCondor, as an administrator would have set it up."""
    with progress(f"booting a {suite} node"):
        node = Node.boot(suite, name)
    try:
        with progress("installing vmnode"):
            node.install_vmnode(CHECKOUT)
        with progress("starting HTCondor"):
            node.start_condor()
    except BaseException:
        node.stop()
        raise
    return node


def _wait_until_listed(constraint: str, node: Node, timeout: float) -> None:
    """Wait until the collector has the node's ad and ``constraint`` holds in it."""
    query = ["condor_status", "-constraint", constraint, "-af", "Name"]
    node.wait_until(lambda: node.run(query, check=False).stdout, f"{constraint} in the collector", timeout)


def _show(node: Node, command: list[str]) -> None:
    done = node.run(command, check=False)
    print(f"  {node.name}$ {' '.join(command)}")
    for line in (done.stdout + done.stderr).rstrip().splitlines():
        print(f"  {line}".rstrip())
    print(flush=True)
