"""Whom QEMU runs as, for a job and otherwise, and what they may do."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from typing import Optional

from vmnode.errors import UsageError
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


def user(uid: int, gid: int) -> Identity:
    """A job's user."""
    return Identity(uid, gid, _groups(uid, gid))


def named(name: str) -> tuple[Identity, str]:
    """A user by name, with all groups, and the home directory. Raises UsageError."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no user {name!r}", "getent passwd") from None
    return Identity(entry.pw_uid, entry.pw_gid, _groups(entry.pw_uid, entry.pw_gid)), entry.pw_dir


def in_qemu(job: Identity, qemu: Identity) -> Identity:
    """A job's user as QEMU runs for the job, by a DAC label.

    With the user's own group where that is enough to enter libvirt's directory, as on EL; on Debian with QEMU's.
    """
    gid = job.gid if QEMU_DIRECTORY.stat().st_mode & 0o001 else qemu.gid
    return Identity(job.uid, gid, sorted({*job.groups, gid}))


def any_job() -> Identity:
    """A job's user of whom nothing is known."""
    return Identity(_NOBODY, _NOBODY, [_NOBODY])


def _groups(uid: int, gid: int) -> list[int]:
    """All groups of a user and `gid`, as libvirt gives them to QEMU (virGetGroupList)."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return [gid]
    return sorted({*os.getgrouplist(entry.pw_name, entry.pw_gid), gid})


def uid(name: str) -> Optional[int]:
    """The number of a user; None if there is none of that name."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group(name: str) -> Optional[int]:
    """The number of a group; None if there is none of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


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
