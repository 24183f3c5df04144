"""The directory on the host that the lab keeps its images and nodes in."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.progress import progress

CACHE = Path(os.environ.get("VMNODE_LAB_CACHE", "/var/cache/vmnode-lab"))
"""Not on overlayfs (as in a Docker container): the kernel refuses to stack a node's overlay on it."""


@contextmanager
def locked(name: str, waiting: str) -> Iterator[int]:
    """Hold the lock ``name`` of the cache; yields its file descriptor.

    The kernel drops the lock with the last process that has the descriptor, however that ends.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress(waiting):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def remove_tree(tree: Path) -> None:
    """Remove ``tree`` if it is there, without ever crossing into something mounted below it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=True)
