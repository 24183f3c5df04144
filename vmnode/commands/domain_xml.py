"""vmnode-domain-xml: HTCondor's LIBVIRT_XML_SCRIPT. Root decides here what QEMU may open for a job.

    vmnode-domain-xml [--config FILE] SCRIPT < job ad > domain XML

SCRIPT is HTCondor's own, $(LIBEXEC)/libvirt_simple_script.awk, which writes the domain. Every disk of the job is looked
at with the rights of the job's user and has to pass the image policy; QEMU then runs with these rights, too. vm-gahp
starts this program, once for each virtual machine, as root.

It always writes XML and ends with status 0: where its script fails, vm-gahp describes the domain by itself, unchecked
(KVMType::CreateVirshConfigFile, "generating defaults"). What is not to be started gets XML that libvirt refuses: so
that the job is held, if it is the job's fault; so that the worker takes no more VM jobs, if it is the worker's.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmnode import __version__, images, overlays
from vmnode.commands.arguments import Parser
from vmnode.config import Config, load
from vmnode.errors import CommandFailed, MalformedRequest, UsageError, VmnodeError
from vmnode.host import accounts, child, files, kvm, syslog
from vmnode.host.child import Identity
from vmnode.overlays import Overlay
from vmnode.transfer import disks, domain, vmjob
from vmnode.transfer.disks import Found
from vmnode.transfer.vmjob import Job

MOST_INPUT = 8 << 20  # bytes; a job ad has some thousands
SCRIPT_DEADLINE_S = 20.0
KVM_DEADLINE_S = 5.0


def main() -> int:
    parser = Parser(prog="vmnode-domain-xml", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--config", metavar="FILE", type=Path, help="instead of /etc/vmnode/vmnode.toml")
    parser.add_argument("--version", action="version", version=f"vmnode {__version__}")
    parser.add_argument("script", metavar="SCRIPT", help="HTCondor's own script, which writes the domain")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config).config
        xml = describe(sys.stdin.buffer.read(MOST_INPUT + 1), arguments.script, config)
    except Exception as error:  # noqa: BLE001 - whatever it is, there has to be XML
        why = error.line if isinstance(error, VmnodeError) else repr(error)
        tell(f"no virtual machine can be started on this worker: {why}")
        xml = domain.failed_worker(why)
    sys.stdout.write(xml)
    return 0


def describe(data: bytes, script: str, config: Config) -> str:
    """The domain XML for the job whose ad is given, or XML that holds the job.

    Raises VmnodeError for what is wrong with this worker.
    """
    user = job_user(os.environ)
    in_qemu = identity_in_qemu(user)
    name = vmjob.name_in(data)
    try:
        job = vmjob.parse(decode(data))
        found = look_at_disks(job, user, config)
    except VmnodeError as error:
        tell(f"{name} is refused: {error.line}")
        return domain.refused_job(name, error.line)
    except Exception as error:  # noqa: BLE001 - a job that makes us stumble must not take the worker with it
        tell(f"{name} is refused: vmnode failed: {error!r}")
        return domain.refused_job(name, f"vmnode failed: {error!r}")
    if config.kvm.accel == "kvm":
        check_kvm(in_qemu)
    status, text, complaint = child.run([script], SCRIPT_DEADLINE_S, text=job.ad())
    if status != 0:
        raise CommandFailed(f"{script} ended with status {status}: {complaint.strip()[-200:]}")
    xml = domain.complete(text, job, found, config.kvm.accel, in_qemu.label)
    record(job, found, config.paths.state_dir)
    return xml


def job_user(environment: Mapping[str, str]) -> Identity:
    """The job's user, as vm-gahp was told by the starter (vm_gahp_server.cpp)."""
    try:
        uid, gid = int(environment["VMGAHP_USER_UID"]), int(environment["VMGAHP_USER_GID"])
    except (KeyError, ValueError):
        raise UsageError("VMGAHP_USER_UID and VMGAHP_USER_GID are not set", "vm-gahp starts this program") from None
    if uid == 0:
        raise CommandFailed("the job's user is root: QEMU would have all rights", "see SLOT<N>_USER and UID_DOMAIN")
    return accounts.user(uid, gid)


def identity_in_qemu(user: Identity) -> Identity:
    """Whom QEMU will run as for this user."""
    qemu = accounts.qemu()
    if qemu is None:
        raise CommandFailed(f"there is no {accounts.QEMU_DIRECTORY}", "is libvirt's QEMU driver installed?")
    return accounts.in_qemu(user, qemu)


def decode(data: bytes) -> str:
    if len(data) > MOST_INPUT:
        raise MalformedRequest(f"the job ad has more than {MOST_INPUT >> 20} MiB")
    return data.decode("utf-8", "backslashreplace")


def look_at_disks(job: Job, user: Identity, config: Config) -> list[Found]:
    """Every disk, in the job's order, as it is found with the rights of the job's user; raises VmnodeError."""
    settings = images.settings(config.images)

    def look() -> list[dict[str, Any]]:
        return [dataclasses.asdict(disks.find(disk, job.scratch, settings)) for disk in job.disks]

    answers = child.ask(look, settings.timeout_s, f"the disks of {job.name}", user)
    return [disks.from_json(answer) for answer in answers]


def check_kvm(in_qemu: Identity) -> None:
    asker = in_qemu._replace(uid=accounts.any_job().uid)  # not as the job's user, who could kill the child
    if not child.ask(lambda: os.access(kvm.DEVICE, os.R_OK | os.W_OK), KVM_DEADLINE_S, str(kvm.DEVICE), asker):
        raise CommandFailed(
            f"QEMU, running as a job's user with the group {in_qemu.gid}, may not use {kvm.DEVICE}",
            f"chmod 0666 {kvm.DEVICE}, as systemd and EL have it; or setfacl -m g:{in_qemu.gid}:rw {kvm.DEVICE}",
        )


def record(job: Job, found: Sequence[Found], state_dir: Path) -> None:
    """Remember the base images, so that the daemon finds out if one of them changes."""
    bases = tuple(disk.base for disk in found if disk.base is not None)
    path = state_dir / overlays.DIRECTORY / f"{job.name}.json"
    try:
        files.make_directory(path.parent)
        files.write_atomically(path, overlays.write(Overlay(job.name, job.id, job.owner, time.time(), bases)))
    except OSError as error:  # no reason to keep a guest from starting
        tell(f"{path}: cannot be written, so nobody will know if a base image of {job.name} changes: {error.strerror}")


def tell(line: str) -> None:
    """To vm-gahp's log, and to the system's: vm-gahp keeps what a failing script says to itself."""
    clean = "".join(c if c.isprintable() else " " for c in line)  # the names of files in it are the user's
    print(f"vmnode-domain-xml: {clean}", file=sys.stderr)
    syslog.write("vmnode-domain-xml", clean)


if __name__ == "__main__":
    sys.exit(main())
