"""Whom QEMU runs as, for a job and otherwise, and what they may do."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Optional

from vmnode.host import process
from vmnode.host.child import Identity

# libvirt gives it to QEMU's user and group when it starts (qemuStateInitialize), whether these are from qemu.conf or
# built in; and QEMU has to get in.
QEMU_DIRECTORY = Path("/var/lib/libvirt/qemu")
_NOBODY = 65534


def qemu() -> Optional[Identity]:
    """Whom libvirt runs QEMU as, if a domain says nothing else; None where there is no libvirt for QEMU."""
    try:
        status = QEMU_DIRECTORY.stat()
    except OSError:
        return None
    return Identity(status.st_uid, status.st_gid, _groups(status.st_uid, status.st_gid))


def job_in_qemu(uid: int, gid: int, group: int) -> Identity:
    """A job's user as QEMU runs with a DAC label of `uid` and `group`: with all of the user's own groups."""
    return Identity(uid, group, sorted({*_groups(uid, gid), group}))


def any_job_in_qemu(group: int) -> Identity:
    """The same for a job's user of whom nothing is known: what QEMU may do for every job."""
    return Identity(_NOBODY, group, [group])


def _groups(uid: int, gid: int) -> list[int]:
    """All groups of a user and `gid`, as libvirt gives them to QEMU (virGetGroupList)."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return [gid]
    return sorted({*os.getgrouplist(entry.pw_name, entry.pw_gid), gid})


def name_of(identity: Identity) -> str:
    """The user's name, or number."""
    try:
        return pwd.getpwuid(identity.uid).pw_name
    except KeyError:
        return str(identity.uid)


async def may(identity: Identity, path: Path, rights: str, deadline_s: float) -> bool:
    """Whether `identity` has all of `rights` ("rw", "x") on `path`, as the kernel judges it.

    A child with that identity asks, so that ACLs, groups and every parent directory count.
    """
    argv = ["test"]
    for right in rights:
        argv += [*(["-a"] if len(argv) > 1 else []), f"-{right}", str(path)]
    finished = await process.run(argv, deadline_s, task=f"access to {path} as {identity.label}", identity=identity)
    return finished.status == 0
