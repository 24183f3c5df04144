"""The disks of a virtual machine, as they are when it is about to start: also those that the user brought, or rewrote.

Runs, as the policy does, with the rights of the job's user.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Mapping
from typing import Any, Optional

from vmnode.errors import BadImage, NoSuchImage, NotPermitted, TryAgain
from vmnode.host import tree
from vmnode.host.tree import Walk
from vmnode.images import Image, Settings
from vmnode.transfer import policy
from vmnode.transfer.url import FORMATS
from vmnode.transfer.vmjob import Disk as Asked


@dataclasses.dataclass(frozen=True)
class Found:
    """A disk as it was found: one of the user's own, an overlay on `base`, or, with a `path`, the base itself."""

    format: str
    base: Optional[Image]
    path: str = ""


def from_json(answer: Mapping[str, Any]) -> Found:
    """A Found that came from a child as JSON, dataclasses.asdict."""
    return Found(answer["format"], Image(*answer["base"]) if answer["base"] else None, answer["path"])


def find(asked: Asked, scratch: str, images: Settings) -> Found:
    """A disk that a job's vm_disk names: a file in its scratch directory, or, read-only, an image in a root.

    Raises as `base`.
    """
    if asked.file.startswith("/"):
        if asked.writable:
            raise NotPermitted(
                f"vm_disk names {asked.file} as writable, which only a disk in the scratch directory can be",
                f"transfer_input_files = nfs://{asked.file}:NAME makes a disk NAME on it",
            )
        found = policy.base(asked.file, asked.format, images)
        return Found(found.format, found, found.path)
    try:
        with Walk(scratch) as directory:
            descriptor = tree.open_entry(directory.descriptor, asked.file)
            try:
                return _look_at_disk(descriptor, asked, images)
            finally:
                os.close(descriptor)
    except FileNotFoundError:
        raise NoSuchImage(
            f"vm_disk names {asked.file}, which is not in the job's scratch directory",
            "transfer_input_files has to bring it; nfs:///images/x.qcow2:NAME makes NAME",
        ) from None
    except OSError as error:
        raise TryAgain(f"the disk {asked.file} cannot be looked at: {os.strerror(error.errno or 0)}") from None


def _look_at_disk(descriptor: int, asked: Asked, images: Settings) -> Found:
    name = asked.file
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else policy.kind(status.st_mode)
        raise BadImage(f"the disk {name} is {kind}, not a regular file")
    if not tree.may(descriptor, os.R_OK) or (asked.writable and not tree.may(descriptor, os.W_OK)):
        wanted = "read and write" if asked.writable else "read"
        raise NotPermitted(f"QEMU, which runs with your rights, may not {wanted} the disk {name}", "see chmod(1)")
    try:
        said, read = policy.look(descriptor, status.st_size)
    except BadImage as error:
        raise BadImage(f"the disk {name} cannot be used: {error.what}") from None
    if asked.format not in (None, said):
        raise BadImage(
            f"vm_disk says that {name} is {asked.format}, and it is {said}", f"write {said} as its fourth field"
        )
    if read.backing is None:
        return Found(said, None)
    if not read.backing.startswith("/"):
        raise BadImage(
            f"the disk {name} has the backing file {read.backing!r}, which is no path in an image root",
            "flatten it with qemu-img convert -O qcow2",
        )
    if read.backing_format not in (None, *FORMATS):
        raise BadImage(f"the disk {name} has a backing file of the format {read.backing_format!r}")
    return Found(said, policy.base(read.backing, read.backing_format, images))
