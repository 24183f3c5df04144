"""The conditions that need no network: KVM, the execute directory, qemu-img, the image roots."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from vmnode.conditions import Observation, disabled, failed, ok, unknown
from vmnode.errors import CommandFailed, DeadlineExceeded
from vmnode.host import accounts, kvm, process, starter_socket
from vmnode.host.uplink import Conntrack

DEADLINE_S = 5.0
ANSWER_S = 2.0  # a starter waits as long
_NEARLY_FULL = 0.9  # of the table of connections
_KVM_API_VERSION = 12  # Documentation/virt/kvm/api.rst: "Applications should refuse to run" with any other


async def observe_kvm() -> Observation:
    try:
        version = await asyncio.wait_for(asyncio.to_thread(kvm.create_vm), DEADLINE_S)
    except asyncio.TimeoutError:
        return failed("kvm", "Hung", f"{kvm.DEVICE} does not answer within {DEADLINE_S:g} s", "see the kernel's log")
    except OSError as error:
        return judge_kvm_error(error)
    if version != _KVM_API_VERSION:
        return failed("kvm", "WrongVersion", f"{kvm.DEVICE} speaks API version {version}, not {_KVM_API_VERSION}")
    qemu = accounts.qemu()
    if qemu is None:
        return no_qemu_user("kvm")
    if not await accounts.may(qemu, kvm.DEVICE, "rw", DEADLINE_S):
        user = accounts.name_of(qemu)
        return failed(
            "kvm",
            "NotPermitted",
            f"QEMU's user {user!r} may not read and write {kvm.DEVICE}",
            f"the group kvm owns {kvm.DEVICE}, and {user} is in it: udevadm trigger {kvm.DEVICE}",
        )
    in_job = accounts.in_qemu(accounts.any_job(), qemu)
    if not await accounts.may(in_job, kvm.DEVICE, "rw", DEADLINE_S):
        return failed(
            "kvm",
            "NotPermittedToJobs",
            f"QEMU runs as the job's user with the group {in_job.gid}, and may not read and write {kvm.DEVICE}",
            f"chmod 0666 {kvm.DEVICE}, as systemd and EL have it; or setfacl -m g:{in_job.gid}:rw {kvm.DEVICE}",
        )
    return ok("kvm", "a virtual machine can be created")


def no_qemu_user(name: str) -> Observation:
    return unknown(
        name,
        "NoQemuUser",
        "the account that libvirt runs QEMU as is not known",
        f"libvirt makes {accounts.QEMU_DIRECTORY} for it: is its QEMU driver installed?",
    )


def judge_kvm_error(error: OSError) -> Observation:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return failed(
            "kvm",
            "DeviceMissing",
            f"there is no {kvm.DEVICE}",
            "load kvm_intel or kvm_amd; is virtualization switched on in the firmware?",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return failed("kvm", "NotPermitted", f"{kvm.DEVICE} may not be opened: {error.strerror}", "run this as root")
    if error.errno == errno.EBUSY:
        return failed("kvm", "Busy", "another hypervisor holds the processor's virtualization", "lsmod; stop it")
    return failed(
        "kvm",
        "CreateFailed",
        f"no virtual machine can be created: {os.strerror(error.errno or 0)}",
        "see the kernel's log",
    )


async def observe_execute_dir(directory: Path, min_free: int) -> Observation:
    """Room for sandboxes, and a way in for QEMU, which opens the disks under its own user."""
    where = f"{directory}/."
    try:
        finished = await process.run(
            ["stat", "-f", "-c", "%a %S", "--", where], DEADLINE_S, task=f"room in {directory}"
        )
    except DeadlineExceeded as error:
        return failed("execute-dir", "Hung", error.what, "is it on a network file system?")
    if finished.status != 0:
        return failed(
            "execute-dir",
            "Missing",
            f"{directory} cannot be examined: {_last_words(finished.stderr)}",
            "compare [execute] dir with HTCondor's EXECUTE: condor_config_val EXECUTE",
        )
    blocks, size = finished.stdout.split()
    free = int(blocks) * int(size)
    if free < min_free:
        return failed(
            "execute-dir",
            "Full",
            f"{directory} has {_gib(free)} GiB free, less than {_gib(min_free)} GiB",
            "remove leftovers: condor_preen; or lower [execute] min_free",
        )
    qemu = accounts.qemu()
    if qemu is None:
        return no_qemu_user("execute-dir")
    if not await accounts.may(qemu, directory, "x", DEADLINE_S):
        return failed(
            "execute-dir",
            "NotTraversable",
            f"QEMU's user {accounts.name_of(qemu)!r} cannot enter {directory}",
            f"namei -l {directory}; every directory of the path needs the right x for others",
        )
    return ok("execute-dir", f"{directory} has {_gib(free)} GiB free")


async def observe_qemu_img() -> Observation:
    try:
        finished = await process.run(["qemu-img", "--version"], DEADLINE_S)
    except CommandFailed as error:
        return failed("qemu-img", "Missing", error.what, "install qemu-img (EL) or qemu-utils (Debian)")
    except DeadlineExceeded as error:
        return failed("qemu-img", "Hung", error.what)
    if finished.status != 0:
        return failed("qemu-img", "Broken", f"qemu-img --version: {_last_words(finished.stderr)}", "reinstall it")
    return ok("qemu-img", finished.stdout.partition("\n")[0])


async def observe_images(roots: Sequence[Path], deadline_s: float) -> tuple[Observation, tuple[Path, ...]]:
    """The condition, and the roots that answer. Each root is asked by a child of its own, all at once."""
    results = await asyncio.gather(*(_ask_root(root, deadline_s) for root in roots))
    bad = [(root, reason, detail) for root, (reason, detail) in zip(roots, results) if reason]
    good = tuple(root for root, (reason, _) in zip(roots, results) if not reason)
    if bad:
        details = "; ".join(f"{root}: {detail}" for root, _, detail in bad)
        hint = f"on this node: ls {bad[0][0]}" + ("; the other roots are not affected" if good else "")
        return failed("images", bad[0][1], f"{len(bad)} of {len(roots)} image roots: {details}", hint), good
    return ok("images", "all image roots answer"), good


async def _ask_root(root: Path, deadline_s: float) -> tuple[str, str]:
    """("", "") for a directory whose file system answers, else reason and detail."""
    try:  # statfs(2) asks the server, where stat(2) is content with the client's cache
        finished = await process.run(["stat", "-f", "-c", "%T", "--", f"{root}/."], deadline_s, task=f"root {root}")
    except DeadlineExceeded:
        return "Hung", f"no answer within {deadline_s:g} s"
    if finished.status == 0:
        return "", ""
    words = _last_words(finished.stderr)
    return ("Missing" if words.endswith(("No such file or directory", "Not a directory")) else "Unreadable"), words


def _last_words(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"


async def observe_accounting(socket: Path) -> Observation:
    """Asked as a starter would ask, but for a network."""
    hint = "journalctl -u vmnode; meanwhile jobs start as [accounting] on_error says"
    try:
        answer = await starter_socket.ping(socket, ANSWER_S)
    except (OSError, DeadlineExceeded) as error:
        return failed("accounting", "NoAnswer", f"vmnoded does not answer starters: {error}", hint)
    if answer != "ok":
        return failed("accounting", "NotWorking", answer.partition(" ")[2], hint)
    return ok("accounting", "starters get a network that is counted")


def judge_conntrack(found: Optional[Conntrack]) -> Observation:
    """Every connection of a job takes an entry: for its NAT, and on the host's side too."""
    if found is None:
        return disabled("conntrack", "the kernel does not track connections")
    used = f"{found.used} of {found.limit} entries are in use"
    if found.used >= _NEARLY_FULL * found.limit:
        return failed(
            "conntrack",
            "NearlyFull",
            f"the table of connections is nearly full: {used}; the kernel drops new connections when it is",
            f"sysctl -w net.netfilter.nf_conntrack_max={2 * found.limit}; conntrack -L shows whose they are",
        )
    return ok("conntrack", f"{used}")
