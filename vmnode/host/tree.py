"""Paths, resolved one component after the other through directory descriptors: nothing can be swapped under us.

openat(2), O_PATH and O_NOFOLLOW for every component; symbolic links are read and followed here (path_resolution(7)).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from vmnode.host.files import FLOCK

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from types import TracebackType
    from typing import Optional

_MOST_LINKS = 40  # as the kernel has it (path_resolution(7))


class Walk:
    """The way from / to a file or directory, held open: `path` is its real path, `entries` are all on the way.

    Use as a context manager. Raises OSError as the kernel would.
    """

    def __init__(self, path: str) -> None:
        self._names: list[str] = []
        self._open: list[int] = []
        try:
            self._open.append(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            self._follow(path)
        except BaseException:
            self.close()
            raise

    def _follow(self, path: str) -> None:
        pending = path.split("/")[::-1]
        links = 0
        while pending:
            name = pending.pop()
            if name in (".", ".."):
                os.stat(".", dir_fd=self._open[-1])  # as the kernel: it has to be a directory that we may enter
                if name == ".." and self._names:
                    self._names.pop()
                    os.close(self._open.pop())
                continue
            if not name:
                if not pending and not stat.S_ISDIR(os.fstat(self._open[-1]).st_mode):
                    raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                continue
            descriptor = open_entry(self._open[-1], name)
            if not stat.S_ISLNK(os.fstat(descriptor).st_mode):
                self._open.append(descriptor)
                self._names.append(name)
                continue
            links += 1
            try:
                target = os.readlink("", dir_fd=descriptor)
            finally:
                os.close(descriptor)
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.startswith("/"):
                while self._names:
                    self._names.pop()
                    os.close(self._open.pop())
            pending += target.split("/")[::-1]

    @property
    def path(self) -> str:
        return "/" + "/".join(self._names)

    @property
    def descriptor(self) -> int:
        """What the path leads to, open with O_PATH."""
        return self._open[-1]

    def entries(self) -> list[os.stat_result]:
        """The status of all on the way, from / on; the last is the end of it."""
        return [os.fstat(descriptor) for descriptor in self._open]

    def may_write(self) -> list[bool]:
        """For each of `entries`, whether we may write to it."""
        return [may(descriptor, os.W_OK) for descriptor in self._open]

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


def open_entry(directory: int, name: str) -> int:
    """An O_PATH descriptor of an entry, also if it is a symbolic link."""
    # An automount point has to be walked over before it is opened, or we hold what lies under the mount (autofs(5)).
    os.access(f"{name}/.", os.X_OK, dir_fd=directory)
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def may(descriptor: int, right: int) -> bool:
    """Whether we have `right` (os.R_OK, os.W_OK) on an open file, as the kernel judges it."""
    return os.access(f"/proc/self/fd/{descriptor}", right)


def read_ends(descriptor: int, head: int, tail: int) -> tuple[bytes, bytes]:
    """The first `head` and the last `tail` bytes of a regular file that is open with O_PATH."""
    # The link in /proc leads to the very file that is open, whatever its name stands for by now.
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.fstat(opened).st_size
        return os.pread(opened, head, 0), os.pread(opened, tail, max(0, size - tail))
    finally:
        os.close(opened)


def is_locked(descriptor: int, offsets: tuple[int, ...]) -> bool:
    """Whether somebody holds a record lock on one of these bytes of a regular file that is open with O_PATH.

    False where the file system knows no locks.
    """
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for offset in offsets:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
            answer = struct.unpack(FLOCK, fcntl.fcntl(opened, fcntl.F_OFD_GETLK, asked))
            if answer[0] != fcntl.F_UNLCK:
                return True
        return False
    except OSError:
        return False
    finally:
        os.close(opened)
