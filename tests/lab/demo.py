"""The demonstration: a pool of one node tells the truth about its network while that is broken and repaired; a VM job
runs on a shared base image; and what jobs send and receive is counted.

Everything shown is what a user would type and see on such a node; the seconds are measured at the collector,
that is, where the rest of the pool reads them.
"""

from __future__ import annotations

import re
import shutil
import textwrap
import time
from pathlib import Path

from tests.lab import accounting, guest
from tests.lab.manual import example
from tests.lab.node import Node
from tests.lab.progress import progress
from tests.lab.screen import HOME, show, wait_for_output

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
        show(node, STATUS)
        with progress("letting the node come to rest"):
            time.sleep(REST_S)

        print("Now the network that every VM job needs is taken away:\n")
        broken_at = time.monotonic()
        show(node, ["virsh", "net-destroy", "default"])
        with progress("waiting for the collector to know"):
            _wait_until_listed(BAD, node, FAILED_TIMEOUT_S)
        print(f"{time.monotonic() - broken_at:.1f} s later the collector knows, and no VM job is sent here:\n")
        show(node, STATUS)
        show(node, ["vmnode", "status"])

        print("And it is repaired:\n")
        repaired_at = time.monotonic()
        show(node, ["virsh", "net-start", "default"])
        with progress("waiting for the collector to know"):
            _wait_until_listed(GOOD, node, HEALTHY_TIMEOUT_S)
        print(f"{time.monotonic() - repaired_at:.1f} s later the node takes VM jobs again:\n")
        show(node, STATUS)

        _offer_images(node)
        accounting.switch_on(node)
        _run_vm_job(node)
        accounting.show_accounts(node, ORDINARY_JOB)
    print(
        "Seen: true, then not true with its reason, then true again; a VM job's way on a shared image, and one refused;"
        " what jobs sent and received."
    )
    print("The node has been removed.")


IMAGE = "/images/el9.qcow2"  # as the submit file of docs/vm-nfs.md has it
SETTINGS = "/etc/vmnode/conf.d/20-images.toml"
VM_JOB, ORDINARY_JOB = 1, 3  # clusters
RUN_JOB = """\
#!/bin/sh
ping -q -c 5 -s 972 {peer}
echo "run-job: up for $(cut -d ' ' -f 1 /proc/uptime) s, $(ip -4 -o address show dev eth0 | cut -d ' ' -f 2-7)"
echo "run-job: the text has $(wc -w </mnt/user/input/text) words"
"""
JOB_TIMEOUT_S = 180.0
"""Most of it is HTCondor's: it asks for a guest's state every VM_STATUS_INTERVAL, 30 s."""


def _offer_images(node: Node) -> None:
    """A shared image, and what a user needs for a job on it."""
    with progress("making an image"):
        image = guest.guest_image()
    node.run(["mkdir", "/images"])
    shutil.copyfile(image, node.path("/tmp/guest.raw"))
    node.run(["qemu-img", "convert", "-O", "qcow2", "/tmp/guest.raw", IMAGE])
    # The guest is emulated: that there is a /dev/kvm does not mean that it works.
    node.write("/etc/vmnode/conf.d/30-lab.toml", '[kvm]\naccel = "tcg"\n')
    node.write(SETTINGS, '[images]\nroots = ["/images"]\n')
    node.write(f"{HOME}/job.sub", "".join(re.findall(r"^[^#\n].*\n", example("vm-nfs.md", "queue"), re.MULTILINE)))
    run_job = RUN_JOB.replace("{peer}", accounting.PEER)
    guest.io_disk(node.path(f"{HOME}/io.raw"), run_job, {"text": " ".join(["word"] * 42)})
    node.run(["chown", "alice:", f"{HOME}/job.sub", f"{HOME}/io.raw"])

    print("VM jobs can have their disks on shared base images. The administrator says where these lie:\n")
    show(node, ["cat", SETTINGS])
    show(node, ["systemctl", "reload", "vmnode"])


def _run_vm_job(node: Node) -> None:
    """A VM job from condor_submit to its output, and one that is refused; beside it, an ordinary one."""
    print(
        "A user submits a job with a disk on such an image, and one with the program, which comes back with output:\n"
    )
    show(node, ["cat", "job.sub"], "alice")
    submitted_at = time.monotonic()
    show(node, ["condor_submit", "job.sub"], "alice")
    print("And the same once more, with an image that is not there:\n")
    other = "transfer_input_files = nfs:///images/el10.qcow2:disk.qcow2, io.raw"
    show(node, ["condor_submit", "job.sub", "-append", other], "alice")

    with progress("waiting for the guest"):
        wait_for_output(node, ["virsh", "list", "--name", "--state-running"], 60.0)
    print(
        f"{time.monotonic() - submitted_at:.1f} s after condor_submit the guest is started, and no image was copied:\n"
    )
    show(node, ["vmnode", "images"])
    with progress("waiting for HTCondor to hold the second job"):
        wait_for_output(node, ["condor_q", "-all", "-hold", "-af", "ClusterId"], 60.0)
    print("The second job is held, and says why (the subcode is 256 times the plugin's exit status, 66):\n")
    show(node, ["condor_q", "-hold", "-af", "ClusterId", "HoldReasonSubCode", "HoldReason"], "alice")
    accounting.submit(node)
    with progress("waiting for the guest to end, and for HTCondor to notice"):
        wait_for_output(node, ["condor_history", str(VM_JOB), "-af", "ClusterId"], JOB_TIMEOUT_S)
    print(
        f"{time.monotonic() - submitted_at:.1f} s after condor_submit the disk is back, with what the program said:\n"
    )
    show(node, ["ls", "-l", "io-1.0.raw"], "alice")
    # The node has no e2fsprogs, which the user would have on the machine that jobs are submitted from.
    print(f"  alice@{node.name}$ debugfs -R 'cat run-job.log' io-1.0.raw")
    print(textwrap.indent(guest.read_io(node.path(f"{HOME}/io-1.0.raw"), "run-job.log"), "  "))


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
