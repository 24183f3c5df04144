"""vmnode-starter becomes the real starter, whatever happens before that, and leaves it nothing of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from vmnode.host.netns import Namespace

ROOT = Path(__file__).parents[2]
IGNORED = 0x1000 | 0x1000000  # SIGPIPE, SIGXFSZ


class Startd:
    """A shell by the name of condor_startd, with a condor_starter beside it that says what it finds."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        (self.run_dir / "unaccounted").mkdir(parents=True)
        self.config = directory / "vmnode.toml"
        self.config.write_text(f'[accounting]\nenabled = true\n[paths]\nrun_dir = "{self.run_dir}"\n')
        self._program = directory / "condor_startd"
        shutil.copy(shutil.which("dash") or "/bin/sh", self._program)
        starter = directory / "condor_starter"
        starter.write_text("#!/bin/sh\nls -l /proc/$$/fd; grep SigIgn /proc/$$/status; readlink /proc/$$/ns/net\n")
        starter.chmod(0o755)

    def start(self, inherited: tuple[int, ...] = ()) -> str:
        """What the starter found."""
        wrapper = f"{sys.executable} -m vmnode.commands.starter --config {self.config} -f -a slot1_1 schedd; exit $?"
        argv = [str(self._program), "-c", wrapper]
        ran = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=20, pass_fds=inherited)
        assert ran.returncode == 0
        return ran.stdout

    def notes(self) -> list[str]:
        return [path.read_text() for path in (self.run_dir / "unaccounted").iterdir()]

    @contextlib.contextmanager
    def vmnoded(self, answer: Callable[[socket.socket], None]) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(10)
            listener.bind(str(self.run_dir / "starter.sock"))
            listener.listen()
            thread = threading.Thread(target=lambda: answer(listener.accept()[0]))
            thread.start()
            yield
            thread.join()


@pytest.fixture
def startd(tmp_path: Path) -> Startd:
    return Startd(tmp_path)


def test_the_starter_finds_its_network_and_nothing_else_of_the_wrapper(startd: Startd) -> None:
    namespace = Namespace()
    name = str(Path(f"/proc/self/fd/{namespace.descriptor}").readlink())

    def answer(connection: socket.socket) -> None:
        with connection:
            assert connection.recv(100) == b"starter slot1_1"
            socket.send_fds(connection, [b"network"], [namespace.descriptor])
            assert connection.recv(100) == b"entered"

    read, write = os.pipe()
    try:
        with startd.vmnoded(answer):
            found = startd.start((read,))
    finally:
        os.close(read)
        os.close(write)
        namespace.close()
    assert found.splitlines()[-1] == name
    assert f" {read} -> pipe:" in found
    assert "net:[" not in found.partition("SigIgn")[0]
    assert "socket:[" not in found
    assert int(found.partition("SigIgn:")[2].split()[0], 16) & IGNORED == 0
    assert startd.notes() == []


def test_a_daemon_that_is_being_restarted_is_waited_for(startd: Startd) -> None:
    """First nobody is there, then one who goes without an answer, then one who has it."""
    namespace = Namespace()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(100)
            socket.send_fds(connection, [b"network"], [namespace.descriptor])
            connection.recv(100)

    found: list[str] = []
    starter = threading.Thread(target=lambda: found.append(startd.start()))
    starter.start()
    try:
        time.sleep(0.3)
        with startd.vmnoded(lambda connection: connection.close()):
            pass
        (startd.run_dir / "starter.sock").unlink()
        with startd.vmnoded(answer):
            starter.join()
        assert found[0].splitlines()[-1] == str(Path(f"/proc/self/fd/{namespace.descriptor}").readlink())
        assert startd.notes() == []
    finally:
        starter.join()
        namespace.close()


@pytest.mark.parametrize("said", [b"network", b"\xff\x00 garbage", b"no there is no room"])
def test_an_answer_without_a_network_lets_the_job_run_and_is_noted(startd: Startd, said: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(100)
            connection.send(said)

    with startd.vmnoded(answer):
        assert "SigIgn" in startd.start()
    assert [note.splitlines()[0] for note in startd.notes()] == ["slot1_1"]
