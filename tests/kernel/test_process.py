"""Children: deadlines that hold, groups that die whole, and the one that cannot be killed."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kernel.conftest import call
from tests.kernel.world import until
from vmnode.errors import CommandFailed, DeadlineExceeded
from vmnode.host import accounts, child, process

SLEEP = "86399"  # an argument that no other process has


def run(argv: Sequence[str], deadline_s: float = 5.0, **options: Any) -> process.Finished:
    return asyncio.run(process.run(argv, deadline_s, **options))


def sleepers() -> list[int]:
    return [found.pid for found in psutil.process_iter(["cmdline"]) if SLEEP in (found.info["cmdline"] or [])]


def test_a_child_that_ends_tells_status_and_output() -> None:
    finished = run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (finished.status, finished.stdout, finished.stderr) == (3, "out\n", "err\n")
    assert run(["sh", "-c", "kill -TERM $$"]).status == -15
    assert run(["printf", r"\377"]).stdout == "\ufffd"


def test_a_child_s_environment_is_the_same_whoever_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/tmp")
    printed = run(["env"], environment={"CONDOR_CONFIG": "/x"}).stdout.splitlines()
    assert set(printed) - {"PWD=/"} == {f"PATH={child.ENVIRONMENT['PATH']}", "LC_ALL=C", "CONDOR_CONFIG=/x"}
    assert run(["pwd"]).stdout == "/\n"


def test_arguments_are_no_shell_s() -> None:
    assert run(["echo", "$(id); *", "a b"]).stdout == "$(id); * a b\n"


def test_standard_input_is_empty() -> None:
    assert run(["cat"]).stdout == ""


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandFailed, match="no-such-command: cannot be started: No such file"):
        run(["no-such-command"])


def test_as_another_user_with_that_user_s_groups_only() -> None:
    finished = run(["id"], identity=accounts.any_job())
    assert finished.stdout.startswith("uid=65534(nobody)")
    assert "(root)" not in finished.stdout


def test_a_deadline_ends_the_child_and_all_of_its_group() -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
        run(["sh", "-c", f"sleep {SLEEP} & sleep {SLEEP}"], 0.3)
    assert time.monotonic() - began < 2
    until(lambda: sleepers() == [])


def test_a_child_that_ignores_signals_is_killed_all_the_same() -> None:
    with pytest.raises(DeadlineExceeded):
        run(["sh", "-c", f"trap '' TERM INT HUP; sleep {SLEEP}"], 0.3)
    until(lambda: sleepers() == [])


def test_a_stopped_child_is_killed_too() -> None:
    with pytest.raises(DeadlineExceeded):
        run(["sh", "-c", f"kill -STOP $$; sleep {SLEEP}"], 0.3)


def test_a_grandchild_that_keeps_the_output_open_does_not_outlive_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        run(["sh", "-c", f"sleep {SLEEP} & exit 0"], 0.5)
    until(lambda: sleepers() == [])


def test_a_check_that_is_given_up_takes_its_child_along() -> None:
    async def give_up() -> None:
        task = asyncio.ensure_future(process.run(["sleep", SLEEP], 60))
        await asyncio.sleep(0.2)
        assert len(sleepers()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    until(lambda: sleepers() == [])


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_child_that_prints_without_end_is_ended_before_it_fills_the_memory(stream: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(CommandFailed, match="printed more than 16 MiB"):
        run(["sh", "-c", f"exec yes {stream}"], 20)
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_output_up_to_the_limit_is_whole() -> None:
    size = process.OUTPUT_LIMIT
    assert len(run(["head", "-c", str(size), "/dev/zero"], 20).stdout) == size


# --- a child that cannot be killed --------------------------------------------------------------------------------

FUSE_INIT = 26


class DeadFileSystem:
    """A FUSE file system that answers nothing but INIT, as a dead NFS server would (linux/fuse.h).

    A request that the server has read and not answered waits uninterruptibly: its process survives SIGKILL until the
    connection is cut.
    """

    def __init__(self, directory: Path) -> None:
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.asked = 0
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other"
        call("mount", b"dead", os.fsencode(directory), b"fuse", 0, options.encode())
        self.server = threading.Thread(target=self._serve, daemon=True)
        self.server.start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, 1 << 20)
            except OSError:  # ENODEV: unmounted
                return
            _, opcode, unique = struct.unpack_from("=IIQ", request)
            if opcode == FUSE_INIT:
                body = struct.pack("=IIIIHHIIHHI", 7, 31, 4096, 0, 4, 4, 65536, 1, 0, 0, 0) + bytes(24)
                os.write(self.device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
            else:
                self.asked += 1

    def cut(self, directory: Path) -> None:
        """MNT_FORCE aborts the connection: whoever waits gets an error. Once is enough."""
        if self.device < 0:
            return
        force, detach = 1, 2
        for flag in (force, detach):
            ctypes.CDLL(None).umount2(os.fsencode(directory), flag)
        self.server.join(5)
        os.close(self.device)
        self.device = -1


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[tuple[Path, DeadFileSystem]]:
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    directory = tmp_path / "dead"
    directory.mkdir()
    file_system = DeadFileSystem(directory)
    yield directory, file_system
    file_system.cut(directory)


def test_a_child_that_cannot_be_killed_is_left_behind_and_not_started_twice(
    dead: tuple[Path, DeadFileSystem],
) -> None:
    directory, file_system = dead
    ask = ["stat", "-f", "--", f"{directory}/."]

    async def check() -> None:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
            await process.run(ask, 0.3, task="root /dead")
        assert time.monotonic() - began < 2
        stuck = [found for found in psutil.Process().children() if found.name() == "stat"]
        assert [found.status() for found in stuck] == [psutil.STATUS_DISK_SLEEP]
        asked = file_system.asked

        for _ in range(3):  # each later try costs nothing, and says why
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=rf"the last try still hangs \(process {stuck[0].pid} "):
                await process.run(ask, 0.3, task="root /dead")
            assert time.monotonic() - began < 0.1
        assert file_system.asked == asked

        assert (await process.run(["true"], 5, task="root /alive")).status == 0  # others are not affected

        file_system.cut(directory)  # the server came back, or an administrator let the mount go
        await asyncio.to_thread(until, lambda: not psutil.pid_exists(stuck[0].pid))
        await asyncio.sleep(0.1)
        assert (await process.run(["true"], 5, task="root /dead")).status == 0

    asyncio.run(check())
