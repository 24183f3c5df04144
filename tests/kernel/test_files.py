"""Files on real file systems: full disks, locks between processes, watched directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.kernel.conftest import call
from tests.kernel.world import running, until
from vmnode.host.files import DirectoryWatch, is_locked, make_directory, take_lock, write_atomically

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    call("mount", b"vmnode-test", os.fsencode(directory), b"tmpfs", 0, b"size=64k")
    yield directory
    call("umount2", os.fsencode(directory), 0)


def test_on_a_full_disk_the_old_file_stays_whole_and_nothing_else_is_left(small_disk: Path) -> None:
    file = small_disk / "state.json"
    write_atomically(file, b"old" * 1000)
    (small_disk / "filler").write_bytes(bytes(48 * 1024))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new" * 20_000)
    assert file.read_bytes() == b"old" * 1000
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "state.json"]
    (small_disk / "filler").unlink()
    write_atomically(file, b"new" * 2000)
    assert file.read_bytes() == b"new" * 2000


def test_a_reader_sees_the_old_file_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    versions = [bytes([65 + number]) * 200_000 for number in range(3)]
    write_atomically(file, versions[0])
    done = threading.Event()

    def rewrite() -> None:
        for number in range(60):
            write_atomically(file, versions[number % 3])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert file.read_bytes() in versions
    writer.join()


def test_everybody_may_read_what_was_written_and_nobody_may_write(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "run")
    write_atomically(tmp_path / "a" / "run" / "state.json", b"{}")
    assert (tmp_path / "a" / "run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a" / "run" / "state.json").stat().st_mode & 0o777 == 0o644
    make_directory(tmp_path / "a" / "run")


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "state.json", b"{}")


# --- locks --------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from vmnode.host.files import take_lock
print("held" if take_lock(Path(sys.argv[1])) is not None else "refused", flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    argv = [sys.executable, "-c", HOLDER, str(lock)]
    assert not is_locked(str(lock))
    with running(argv, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_locked(str(lock))
        assert is_locked(str(lock))  # asking takes nothing away
        assert take_lock(lock) is None
        with running(argv, stdout=subprocess.PIPE, cwd=ROOT) as second:
            assert second.stdout is not None and second.stdout.readline() == "refused\n"
        assert is_locked(str(lock))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not is_locked(str(lock))
        descriptor = take_lock(lock)
        assert descriptor is not None
        os.close(descriptor)


SQUATTER = """
import fcntl, os, sys, time
fcntl.lockf(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""


def test_a_reader_of_the_lock_file_can_neither_keep_the_daemon_out_nor_pass_for_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with running([sys.executable, "-c", SQUATTER, str(lock)], stdout=subprocess.PIPE, cwd=ROOT) as squatter:
        assert squatter.stdout is not None and squatter.stdout.readline() == "held\n"
        assert not is_locked(str(lock))
        argv = [sys.executable, "-c", HOLDER, str(lock)]
        with running(argv, stdout=subprocess.PIPE, cwd=ROOT) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert is_locked(str(lock))


SHARER = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.lockf(file, fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""


def test_who_may_only_read_the_lock_file_can_neither_pass_for_the_daemon_nor_keep_it_out(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with running([sys.executable, "-c", SHARER, str(lock)], stdout=subprocess.PIPE) as sharer:
        assert sharer.stdout is not None and sharer.stdout.readline() == "held\n"
        assert not is_locked(str(lock))
        descriptor = take_lock(lock)
        assert descriptor is not None
        with running([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, cwd=ROOT) as second:
            assert second.stdout is not None and second.stdout.readline() == "refused\n"
        os.close(descriptor)


@pytest.mark.parametrize("path", ["/dev/null/lock", "/absent/lock"])
def test_where_no_lock_can_be_nobody_holds_one(path: str) -> None:
    assert not is_locked(path)


def test_a_run_dir_that_others_may_write_is_refused(tmp_path: Path) -> None:
    for name, owner, mode in (("theirs", 65534, 0o755), ("anybody's", 0, 0o1777), ("a group's", 0, 0o775)):
        directory = tmp_path / name
        directory.mkdir()
        os.chown(directory, owner, -1)
        directory.chmod(mode)
        with pytest.raises(PermissionError, match="others may write"):
            make_directory(directory)


def test_nothing_is_written_through_a_link_in_the_temporary_file_s_place(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / f".state.json.{os.getpid()}").symlink_to(precious)
    write_atomically(tmp_path / "state.json", b"{}")
    assert precious.read_bytes() == b"precious"
    assert (tmp_path / "state.json").read_bytes() == b"{}"


# --- watching -----------------------------------------------------------------------------------------------------


class Watched:
    """A directory that is watched, and a pipe whose reader may go away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reader, self.writer = os.pipe()
        self.watch = DirectoryWatch(str(directory))

    def wait(self, happen: Callable[[], object] = lambda: None, timeout_s: float = 3.0) -> tuple[bool, float]:
        """Whether the reader is gone, and how long the wait took when `happen` happens after 50 ms."""
        timer = threading.Timer(0.05, happen)
        timer.start()
        began = time.monotonic()
        closed = self.watch.wait(timeout_s, unless_closed=self.writer)
        took = time.monotonic() - began
        timer.join()
        return closed, took

    def drain(self) -> None:
        while self.watch.wait(0.05, unless_closed=self.writer) is False and self.wait(timeout_s=0.1)[1] < 0.1:
            pass


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    directory = tmp_path / "run"
    directory.mkdir()
    made = Watched(directory)
    yield made
    for descriptor in (made.reader, made.writer, made.watch._descriptor):
        try:
            os.close(descriptor)
        except OSError:
            assert descriptor == made.reader


def test_a_file_that_is_replaced_wakes_at_once(watched: Watched) -> None:
    for _ in range(3):
        closed, took = watched.wait(lambda: write_atomically(watched.directory / "state.json", b"{}"))
        assert not closed and 0.04 < took < 1
        watched.drain()


def test_a_file_that_is_deleted_wakes_at_once(watched: Watched) -> None:
    write_atomically(watched.directory / "state.json", b"{}")
    watched.drain()
    closed, took = watched.wait((watched.directory / "state.json").unlink)
    assert not closed and took < 1


def test_without_a_change_the_wait_ends_in_its_time(watched: Watched) -> None:
    closed, took = watched.wait(timeout_s=0.3)
    assert not closed and 0.25 < took < 1


def test_a_reader_that_goes_away_ends_the_wait(watched: Watched) -> None:
    closed, took = watched.wait(lambda: os.close(watched.reader))
    assert closed and took < 1


def test_a_directory_that_is_made_anew_is_watched_again(watched: Watched) -> None:
    watched.directory.rmdir()
    watched.drain()
    watched.directory.mkdir()
    watched.wait(timeout_s=0.1)
    closed, took = watched.wait(lambda: write_atomically(watched.directory / "state.json", b"{}"))
    assert not closed and took < 1


def test_a_directory_that_is_not_there_yet_is_found_when_it_comes(tmp_path: Path) -> None:
    late = Watched(tmp_path / "late")
    assert late.wait(timeout_s=0.1)[0] is False
    (tmp_path / "late").mkdir()
    late.wait(timeout_s=0.1)
    _, took = late.wait(lambda: write_atomically(tmp_path / "late" / "state.json", b"{}"))
    assert took < 1
    for descriptor in (late.reader, late.writer, late.watch._descriptor):
        os.close(descriptor)
    until(lambda: True)
