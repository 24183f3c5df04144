"""VM jobs that are really started: the images they stand on, what they bring, and what the node knows of them.

The guest is the lab's own, which boots within seconds under TCG; where nothing has to run in it, an empty disk will do.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import classad2

from tests.lab import guest
from tests.pool.worker import EXECUTE, HOME, VM_GAHP_LOG, Worker

ROOT = "/images"
GUEST = f"{ROOT}/guest.img"
BLANK = f"{ROOT}/blank.img"  # nothing boots from it: the guest stays in its firmware
SETTINGS = f'[images]\nroots = ["{ROOT}"]\n[kvm]\naccel = "tcg"\n'
RECORDS = "/var/lib/vmnode/overlays"
TRANSFER_LOG = "/var/log/condor/transfer_history"

# To be completed by vm_disk and transfer_input_files.
SMALL = f"""\
universe = vm
executable = guest
vm_type = kvm
vm_memory = {guest.MEMORY_MIB}
vm_networking = false
vm_no_output_vm = true
should_transfer_files = yes
when_to_transfer_output = on_exit
request_cpus = 1
request_disk = 10M
"""


def disk_on(url: str, vm_disk: str = "disk.qcow2:vda:w:qcow2") -> str:
    """A job whose disk is made on a shared image."""
    return f"{SMALL}vm_disk = {vm_disk}\ntransfer_input_files = {url}\n"


def own_disk(vm_disk: str) -> str:
    """A job that brings its disk itself, from the user's home."""
    return f"{SMALL}vm_disk = {vm_disk}\ntransfer_input_files = {vm_disk.partition(':')[0]}\n"


def connected(run_on: str) -> str:
    """A job on GUEST with a network, and with the I/O disk `run_on` from the user's home, which does not come back."""
    disks = f"vm_disk = disk.qcow2:vda:w:qcow2, {run_on}:vdb:w:raw\n"
    files = f"transfer_input_files = nfs://{GUEST}:disk.qcow2, {run_on}\n"
    return f"{SMALL}vm_networking = true\nvm_networking_type = nat\n{disks}{files}"


def share(worker: Worker, *images: str, settings: str = SETTINGS) -> None:
    """As the administrator: offer the lab's guest under these names, and configure vmnode."""
    raw = "/tmp/guest.img"
    shutil.copyfile(guest.guest_image(), worker.node.path(raw))
    for image in images:
        format = "qcow2" if image.endswith(".qcow2") else "raw"
        worker.shell(f"mkdir -p $(dirname {image}); qemu-img convert -O {format} {raw} {image}; chmod 0644 {image}")
    worker.settings(settings)


def share_blank(worker: Worker, *images: str, settings: str = SETTINGS) -> None:
    """The same with disks that hold nothing."""
    for image in images:
        worker.shell(f"mkdir -p $(dirname {image}); rm -f {image}; truncate -s 1M {image}; chmod 0644 {image}")
    worker.settings(settings)


def bring_io_disk(worker: Worker, path: str, run_job: str, inputs: Mapping[str, str]) -> None:
    """As the user: make the disk that the guest finds its job on."""
    guest.io_disk(worker.node.path(path), run_job, inputs)
    worker.shell(f"chown alice: {path}")


def fingerprint(worker: Worker, file: str) -> str:
    """What would tell of a write or of another owner, even of one that was undone: the last is the inode's own time."""
    return worker.shell(f"sha256sum {file}; stat -c '%u:%g %a %s %i %y %z' {file}")


def known_overlays(worker: Worker) -> list[dict[str, Any]]:
    """`vmnode images`: the guests and what they run on."""
    overlays: list[dict[str, Any]] = json.loads(worker.node.run(["vmnode", "images", "--json"]).stdout)["overlays"]
    return overlays


@dataclass(frozen=True)
class Guest:
    """The virtual machine of one job on one node."""

    worker: Worker
    job: str

    @property
    def domain(self) -> str:
        """Its name in libvirt, as the starter makes it."""
        return f"alice_{self.worker.node.name}_{self.job}"

    def await_running(self) -> None:
        self.worker.until(lambda: self.domain in self.worker.domains("--state-running"), f"{self.domain} to run", 60)

    def address(self) -> str:
        """Its IPv4 address on libvirt's network; "" if it has no lease."""
        told = self.worker.node.run(["virsh", "domifaddr", self.domain], check=False).stdout
        found = re.search(r" ipv4 +([0-9.]+)/", told)
        return found.group(1) if found else ""

    def connect(self, port: int) -> bool:
        """Whether a connection to a port of the guest was made; it is closed at once."""
        to = f"exec 3<>/dev/tcp/{self.address() or '0.0.0.0'}/{port}"
        return self.worker.node.run(["timeout", "2", "bash", "-c", to], check=False).returncode == 0

    def qemu_log(self) -> str:
        """What libvirt and QEMU said of each start of it; "" if there was none."""
        return self.worker.shell(f"cat /var/log/libvirt/qemu/{self.domain}.log", check=False)

    def refusal(self) -> str:
        """What vmnode-domain-xml said of the job, in vm-gahp's log; "" if nothing."""
        lines = self.worker.node.read(VM_GAHP_LOG).splitlines()
        return "\n".join(line for line in lines if f"vmnode-domain-xml: {self.domain} is refused: " in line)

    def qemu(self) -> int:
        """QEMU's pid."""
        return int(self.worker.node.read(f"/run/libvirt/qemu/{self.domain}.pid"))

    def qemu_users(self) -> set[int]:
        """Whose rights QEMU has: its real, effective, saved and file system user."""
        said = self.worker.node.run(["ps", "-o", "ruid=,euid=,suid=,fsuid=", "-p", str(self.qemu())]).stdout
        return {int(uid) for uid in said.split()}

    def open_disks(self) -> set[str]:
        """The files that QEMU holds open, of those that could be a disk."""
        opened = self.worker.shell(f"find /proc/{self.qemu()}/fd -type l -printf '%l\\n'").splitlines()
        return {file for file in opened if file.startswith((EXECUTE, ROOT, HOME, "/srv/"))}

    def global_id(self) -> str:
        return self.worker.node.run(["condor_q", self.job, "-af", "GlobalJobId"]).stdout.strip()

    def history(self, *expressions: str) -> list[str]:
        """The values of expressions in the ad of the job, which has ended."""
        said = self.worker.node.run(["condor_history", self.job, "-limit", "1", "-af:t", *expressions]).stdout
        return said.rstrip("\n").split("\t")

    def transfers(self, protocol: str) -> list[Mapping[str, Any]]:
        """What the starter recorded of each file that came by this protocol (FILE_TRANSFER_STATS_LOG)."""
        texts = re.split(r"^\*\*\*$", self.worker.node.read(TRANSFER_LOG), flags=re.MULTILINE)
        ads = [classad2.parseOne(text) for text in texts if text.strip()]
        wanted = (*(int(number) for number in self.job.split(".")), protocol)
        return [ad for ad in ads if (ad["JobClusterId"], ad["JobProcId"], ad["TransferProtocol"]) == wanted]


def submit(worker: Worker, description: str) -> Guest:
    return Guest(worker, worker.submit(description))
