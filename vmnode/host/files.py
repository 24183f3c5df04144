"""Files: written whole or not at all, watched, locked."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module: pathlib and typing would double its cost
    from pathlib import Path

_IN_MOVED_TO = 0x80  # inotify(7)
_IN_CREATE = 0x100
_IN_DELETE = 0x200
SIZE_LIMIT = 1 << 20  # bytes; a state file has some thousands
FLOCK = "hhqqi4x"  # struct flock of x86-64 and aarch64: l_type, l_whence, l_start, l_len, l_pid (fcntl(2))


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: temporary name, fsync, rename. Raises OSError and leaves no temporary file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a leftover of a process with our pid
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """A directory that anybody may read and only we may write; raises OSError, also for one that others may write."""
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "it belongs to another user, or others may write to it")


def read_whole(path: str) -> bytes:
    """The contents of a file, up to SIZE_LIMIT bytes; raises OSError, and never waits, as one would for a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read(SIZE_LIMIT) or b""


class DirectoryWatch:
    """Waits until a file in a directory is replaced, created or deleted (inotify(7)).

    A directory that is not there, or that is replaced by another, is looked for again at every wait.
    """

    def __init__(self, directory: str) -> None:
        import ctypes  # not at the top: who only prints once does not pay for it

        self._directory = directory
        self._libc = ctypes.CDLL(None)
        self._descriptor: int = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError("inotify_init1 failed: too many inotify instances (fs.inotify.max_user_instances)")
        self._look_for_it()

    def _look_for_it(self) -> None:
        mask = _IN_MOVED_TO | _IN_CREATE | _IN_DELETE  # adding a watch that exists changes nothing
        self._libc.inotify_add_watch(self._descriptor, os.fsencode(self._directory), mask)

    def wait(self, timeout_s: float, unless_closed: int) -> bool:
        """Wait for a change, at most `timeout_s` seconds; True if the reader of the pipe `unless_closed` is gone."""
        self._look_for_it()
        poller = select.poll()
        poller.register(unless_closed, 0)  # POLLERR is always reported
        poller.register(self._descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poller.poll(timeout_s * 1000)]
        if self._descriptor in ready:
            os.read(self._descriptor, 65536)
        return unless_closed in ready


def take_lock(path: Path) -> int | None:
    """Hold an exclusive lock on `path` for as long as the process lives; None if another process holds it.

    A record lock (fcntl(2)), since others can ask for its holder without taking it. Whoever may read the file can take
    a shared lock on it: a file that is held so is left to its holders and replaced.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if is_locked(str(path)):
                return None
        path.unlink(missing_ok=True)


def is_locked(path: str) -> bool:
    """Whether a living process holds the exclusive lock; needs only the right to read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:  # it cannot be found out; whoever goes on to read what the daemon wrote will say why
        return True
    except OSError:  # no file that a daemon could hold
        return False
    try:
        asked = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # only an exclusive lock is in its way
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
        return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)
