"""QEMU's user, and what it may do."""

from __future__ import annotations

import pwd
import re
from pathlib import Path
from typing import Optional

from vmnode.host import process

QEMU_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
_BUILT_IN = ("libvirt-qemu", "qemu")  # Debian's and EL's; the build-time default cannot be asked for


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


async def may(user: str, path: Path, rights: str, deadline_s: float) -> bool:
    """Whether `user` has all of `rights` ("rw", "x") on `path`, as the kernel judges it.

    A child with the user's identity asks, so that ACLs, groups and every parent directory count.
    """
    argv = ["test"]
    for right in rights:
        argv += [*(["-a"] if len(argv) > 1 else []), f"-{right}", str(path)]
    finished = await process.run(argv, deadline_s, task=f"access to {path} as {user}", user=user)
    return finished.status == 0
