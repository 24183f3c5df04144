"""QEMU's user, a job's user, and what they may do."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from typing import Optional

from vmnode.host import process
from vmnode.host.child import Identity

QEMU_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
QEMU_DIRECTORY = Path("/var/lib/libvirt/qemu")  # libvirt gives it to QEMU's user and group (qemuStateInitialize)
_BUILT_IN = ("libvirt-qemu", "qemu")  # Debian's and EL's; the build-time default cannot be asked for
_NOBODY = 65534


def qemu_user() -> Optional[str]:
    """The account that libvirt runs QEMU as; None if there is none."""
    try:
        text = QEMU_CONFIGURATION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r'^\s*user\s*=\s*"\+?([^"]+)"', text, re.MULTILINE)
    for name in (match[1],) if match else _BUILT_IN:
        try:
            return pwd.getpwuid(int(name)).pw_name if name.isdecimal() else pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


def qemu_group() -> Optional[int]:
    """The group that libvirt runs QEMU with, which may enter libvirt's directories; None if there is none."""
    try:
        return QEMU_DIRECTORY.stat().st_gid
    except OSError:
        return None


def job_in_qemu(uid: int, gid: int, group: int) -> Identity:
    """A job's user as QEMU runs with a DAC label of `uid` and `group`: with all of the user's own groups.

    libvirt takes them from the group database (virGetGroupList); a user without a name has only `gid`.
    """
    try:
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        groups = [gid]
    return Identity(uid, group, sorted({*groups, group}))


def any_job_in_qemu(group: int) -> Identity:
    """The same for a job's user of whom nothing is known: what QEMU may do for every job."""
    return Identity(_NOBODY, group, [group])


def identity_of(user: str) -> Identity:
    """An account with all of its groups; raises KeyError if there is none."""
    entry = pwd.getpwnam(user)
    return Identity(entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid))


async def may(identity: Identity, path: Path, rights: str, deadline_s: float) -> bool:
    """Whether `identity` has all of `rights` ("rw", "x") on `path`, as the kernel judges it.

    A child with that identity asks, so that ACLs, groups and every parent directory count.
    """
    argv = ["test"]
    for right in rights:
        argv += [*(["-a"] if len(argv) > 1 else []), f"-{right}", str(path)]
    finished = await process.run(argv, deadline_s, task=f"access to {path} as {identity.label}", identity=identity)
    return finished.status == 0
