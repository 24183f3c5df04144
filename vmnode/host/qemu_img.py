"""qemu-img, under limits and a deadline."""

from __future__ import annotations

import resource

from vmnode.errors import CommandFailed
from vmnode.host import child

# What it takes for an overlay of any size is far below; what a hostile image might make of it is not.
LIMITS = {
    resource.RLIMIT_AS: 4 << 30,
    resource.RLIMIT_CPU: 20,  # s
    resource.RLIMIT_FSIZE: 1 << 30,
    resource.RLIMIT_CORE: 0,
}


def create_overlay(directory: str, name: str, base: str, base_format: str, size: int, deadline_s: float) -> None:
    """Make `directory`/`name` a qcow2 overlay of `size` bytes on `base`.

    The base is not opened (-u): it was inspected, and its size is known. Raises CommandFailed, DeadlineExceeded.
    """
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", base_format, "-b", base, f"./{name}", str(size)]
    status, _, complaint = child.run(argv, deadline_s, directory=directory, limits=LIMITS)
    if status != 0:
        lines = complaint.strip().splitlines()
        said = lines[-1] if lines else "it says nothing"
        raise CommandFailed(f"qemu-img create ended with status {status}: {said}")
