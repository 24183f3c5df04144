"""Which disk images may be used: the one place where that is decided, for the plugin and for root.

Runs with the rights of the job's user, in a child that may be lost with a file server: every question about access is
the kernel's to answer. Nothing is remembered: an image is looked at each time that it is named.
"""

# Hot: vm-nfs-plugin imports it.

from __future__ import annotations

import errno
import os
import stat

from vmnode.errors import BadImage, MalformedRequest, NoSuchImage, NotPermitted, TryAgain
from vmnode.host import tree
from vmnode.host.tree import Walk
from vmnode.images import Image
from vmnode.transfer import header
from vmnode.transfer.header import Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Optional

    from vmnode.images import Settings

# QEMU's locks on an image: on byte 100 + n for the permission n that it uses, on 200 + n for one that it forbids to
# others (file-posix.c). Who reads a backing file needs 0 (consistent read), and forbids 1 (write) and 3 (resize).
_IN_A_READERS_WAY = (200, 101, 103)

# What a file server has to do with: it may be otherwise in a minute, or on another node.
_PASSING = {
    errno.ESTALE,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}


def base(path: str, asked_format: Optional[str], images: Settings) -> Image:
    """A base image that an overlay may stand on.

    Raises NoSuchImage, NotPermitted, BadImage, TryAgain: each says what was asked for, what is allowed, what to do.
    """
    try:
        with Walk(path) as found:
            if not found.path.isprintable():  # nor is a name that is not UTF-8
                raise BadImage(f"the real path of {path} holds what cannot be printed", "let it be renamed")
            if stat.S_ISDIR(found.entries()[-1].st_mode):
                raise BadImage(f"{path} is a directory, not an image", "name a file in it")
            root = _root_of(found, path, images)
            _check_rights(found, path, root, images)
            return _look_into(found, asked_format, images)
    except OSError as error:
        raise _explain(error, path, images) from None


# --- where it lies ------------------------------------------------------------------------------------------------


def _root_of(found: Walk, path: str, images: Settings) -> str:
    """The image root in which a path really ends; identity of directories, not of names, decides."""
    on_the_way = {(entry.st_dev, entry.st_ino) for entry in found.entries()[:-1]}
    for root in _likely_first(images.roots, path, found.path):
        try:
            with Walk(root) as walk:
                end = walk.entries()[-1]
        except OSError:
            continue
        if (end.st_dev, end.st_ino) in on_the_way:
            return root
    whither = f", which is {found.path}," if found.path != path else ""
    raise NotPermitted(
        f"{path}{whither} is not inside an image root of this worker: {_list(images.roots)}",
        "use an image that lies there; the machine attribute VMNodeImageRoots names the roots"
        if images.roots
        else "the administrator names the roots: [images] roots in /etc/vmnode/vmnode.toml",
    )


def _likely_first(roots: Sequence[str], *paths: str) -> list[str]:
    """The roots that contain a path by name come first, since another may hang; and of these the innermost."""
    return sorted(roots, key=lambda root: (not any(path.startswith(f"{root}/") for path in paths), -len(root)))


def _list(roots: Sequence[str]) -> str:
    return ", ".join(roots) or "there is none"


# --- whose it is --------------------------------------------------------------------------------------------------


def _check_rights(found: Walk, path: str, root: str, images: Settings) -> None:
    entries, writable = found.entries(), found.may_write()
    file = entries[-1]
    if not stat.S_ISREG(file.st_mode):
        raise BadImage(f"{path} is {kind(file.st_mode)}, not a regular file", "name a disk image")
    if not tree.may(found.descriptor, os.R_OK):
        raise NotPermitted(f"you may not read {path}", "ask whoever keeps the image for the right to read it")
    if writable[-1]:
        own = file.st_uid == os.geteuid()
        raise NotPermitted(
            f"you may write to {path}, and a base image must not change while guests run on it",
            f"chmod a-w {path}" if own else "tell whoever keeps the image that others may write to it",
        )
    if root in images.user_roots:
        return
    user = os.geteuid()
    if file.st_uid == user:
        raise NotPermitted(
            f"{path} belongs to you, and a base image must not change while guests run on it",
            "let the administrator keep it, or list this root in [images] user_roots",
        )
    for directory, entry, may_write in zip(entries, entries[1:], writable):
        sticky = directory.st_mode & stat.S_ISVTX and user not in (directory.st_uid, entry.st_uid)
        if (may_write and not sticky) or directory.st_uid == user:
            raise NotPermitted(
                f"you may replace {path}, since you may write to a directory above it,"
                " and a base image must not change while guests run on it",
                "let the administrator keep it, or list this root in [images] user_roots",
            )


def kind(mode: int) -> str:
    """What a file is that is no regular file, by its st_mode."""
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "a pipe or a socket"


# --- what it is ---------------------------------------------------------------------------------------------------


class UnknownFormat(BadImage):
    """It begins as an image of another format would."""


def _look_into(found: Walk, asked_format: Optional[str], images: Settings) -> Image:
    """Format and size of a base; its own bytes have to agree with whatever is said of it."""
    status = found.entries()[-1]
    declared_raw = found.path in images.raw
    try:
        said, read = look(found.descriptor, status.st_size, "raw" if declared_raw else None)
        if read.backing is not None:
            raise BadImage(f"it has a backing file of its own, {read.backing!r}")
    except BadImage as error:
        ways = ["tell whoever keeps the image: qemu-img convert -O qcow2 makes one that will do"]
        if isinstance(error, UnknownFormat):
            ways.append("one that is raw although it looks otherwise is listed in [images] raw")
        raise BadImage(f"{found.path} cannot be a base image: {error.what}", "; ".join(ways)) from None
    if asked_format not in (None, said):
        raise BadImage(f"{found.path} is {said}, not {asked_format}", f"write format={said}, or leave it out")
    if tree.is_locked(found.descriptor, _IN_A_READERS_WAY):
        raise TryAgain(
            f"somebody writes to {found.path}, or keeps QEMU from reading it by a lock",
            "the job may be tried again; /proc/locks shows who it is",
        )
    return Image(found.path, said, read.virtual_size, status.st_size, status.st_mtime_ns, status.st_ino)


def look(descriptor: int, size: int, declared: Optional[str] = None) -> tuple[str, Header]:
    """The format, as `declared` or by its bytes, and the header of an image that is open with O_PATH.

    Raises BadImage.
    """
    head, tail = tree.read_ends(descriptor, header.HEAD, header.TAIL)
    format = declared or header.detect(head, tail)
    if format == "raw":
        return format, header.raw(size)
    if format == "qcow2":
        return format, header.qcow2(head, size)
    raise UnknownFormat(f"it looks like a {format} image; only raw and qcow2 are used")


# --- what went wrong ----------------------------------------------------------------------------------------------


def _explain(error: OSError, path: str, images: Settings) -> Exception:
    reason = os.strerror(error.errno or 0)
    if error.errno in _PASSING:
        return TryAgain(f"{path} cannot be reached on this worker now: {reason}", "the job may be tried again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(
            f"you may not read {path}: {reason}", "ask whoever keeps the image for the right to read it"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        for root in _likely_first(images.roots, path):
            if path.startswith(f"{root}/") and not os.path.isdir(root):
                return TryAgain(f"the image root {root} is not there on this worker", "the job may be tried again")
        return NoSuchImage(f"there is no {path} on this worker", f"the image roots are: {_list(images.roots)}")
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return MalformedRequest(f"{path} cannot be followed: {reason}")
    return TryAgain(f"{path} cannot be used on this worker: {reason}", "the job may be tried again")
