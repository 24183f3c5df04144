"""Forked children, without an event loop: answers, rights that are gone for good, and deadlines that hold."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest

from tests.kernel.conftest import descriptors
from tests.kernel.test_process import SLEEP, DeadFileSystem, sleepers
from tests.kernel.world import tool, until
from vmnode import errors
from vmnode.errors import CommandFailed, DeadlineExceeded, VmnodeError
from vmnode.host import child
from vmnode.host.child import Identity

NOBODY = Identity(65534, 65534, [65534, 4711])
HANGS = {
    "sleeps": f"sleep {SLEEP}",
    "ignores signals": f"trap '' TERM INT HUP; sleep {SLEEP}",
    "is stopped": f"kill -STOP $$; sleep {SLEEP}",
    "has children": f"sleep {SLEEP} & sleep {SLEEP} & wait",
    "left a child behind with its output": f"sleep {SLEEP} & exit 0",
}
EMPTY: dict[str, str] = {}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmnodeError)]


def ask(question: Callable[[], Any], deadline_s: float = 10.0, **options: Any) -> Any:
    return child.ask(question, deadline_s, "/nfs/x.qcow2", **options)


def sleep_for_ever() -> None:
    subprocess.run(["sleep", SLEEP])


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "ä€\udcff\0\n", [], [1, [None]], {"a": {"b": [1]}}])
def test_an_answer_comes_back_as_it_was(value: Any) -> None:
    assert ask(lambda: value) == value


def test_an_answer_may_be_longer_than_a_pipe() -> None:
    assert ask(lambda: "x" * 900_000) == "x" * 900_000


def test_the_question_is_answered_by_another_process() -> None:
    mine = [1]

    def answer() -> list[int]:
        mine.append(2)
        return [os.getpid(), os.getsid(0)]

    pid, session = ask(answer)
    assert mine == [1] and pid not in (os.getpid(), 0)
    assert session == pid  # in a session of its own: no signal from a terminal reaches it


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_as_it_was(kind: type[VmnodeError]) -> None:
    def fail() -> None:
        raise kind("no 'image'\n", "a\thint")

    with pytest.raises(VmnodeError) as raised:
        ask(fail)
    assert type(raised.value) is kind
    assert (raised.value.what, raised.value.hint) == ("no 'image'\n", "a\thint")
    assert raised.value.exit_status == kind.exit_status


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ESTALE, errno.ENOSPC])
def test_an_error_of_the_kernel_s_comes_back_with_its_number(number: int) -> None:
    def fail() -> None:
        raise OSError(number, "said otherwise", "/some/file")

    with pytest.raises(OSError) as raised:
        ask(fail)
    assert (raised.value.errno, raised.value.strerror) == (number, os.strerror(number))
    assert type(raised.value) is type(OSError(number, ""))


def test_a_missing_file_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        ask(lambda: Path("/nonexistent").stat().st_size)


@pytest.mark.parametrize(
    "question, said",
    [
        (lambda: os.open("/a\0b", os.O_RDONLY), r"status 127: ValueError\('embedded null byte'\)"),
        (lambda: EMPTY["ä"], r"status 127: KeyError\('\\xe4'\)"),
        (lambda: b"no JSON", "status 127: TypeError.*not JSON serializable"),
        (lambda: os._exit(3), "status 3: no answer"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "status -9: no answer"),
        (lambda: os.write(1, b'{"ans') and os._exit(0), "status 0: no answer"),
    ],
    ids=["ValueError", "KeyError", "no JSON", "exit", "killed", "half"],
)
def test_a_child_that_stumbles_says_over_what(question: Callable[[], Any], said: str) -> None:
    with pytest.raises(CommandFailed, match=f"^/nfs/x.qcow2: a child of vmnode ended with {said}"):
        ask(question)


def test_a_child_that_exits_does_not_run_what_its_parent_would(tmp_path: Path) -> None:
    """No exit handler, no finally of the parent's, no buffer of the parent's that is written twice."""
    with open(tmp_path / "file", "w") as file:
        file.write("once")
        try:
            ask(lambda: None)
            with pytest.raises(CommandFailed):
                ask(lambda: EMPTY["?"])
        finally:
            (tmp_path / f"finally-{os.getpid()}").touch()
    assert (tmp_path / "file").read_text() == "once"
    assert [path.name for path in tmp_path.glob("finally-*")] == [f"finally-{os.getpid()}"]


# --- rights -------------------------------------------------------------------------------------------------------


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_rights_are_another_user_s_and_no_others() -> None:
    status = ask(lambda: status_of(os.getpid()), identity=NOBODY)
    assert status["Uid"].split() == ["65534"] * 4  # real, effective, saved, file system
    assert status["Gid"].split() == ["65534"] * 4
    assert status["Groups"].split() == ["4711", "65534"]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0


def test_without_an_identity_the_rights_are_ours() -> None:
    assert ask(lambda: [os.getresuid(), os.getgroups()]) == [list(os.getresuid()), os.getgroups()]


@pytest.mark.parametrize(
    "back",
    [
        lambda: os.setuid(0),
        lambda: os.seteuid(0),
        lambda: os.setresuid(-1, -1, 0),
        lambda: os.setgid(0),
        lambda: os.setresgid(-1, -1, 0),
        lambda: os.setgroups([0]),
    ],
)
def test_there_is_no_way_back_to_root(back: Callable[[], None]) -> None:
    with pytest.raises(PermissionError):
        ask(back, identity=NOBODY)


def test_the_kernel_judges_by_these_rights() -> None:
    tool("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/mnt")
    file = Path("/mnt/file")
    file.write_text("x")
    for mode, identity, readable in (
        (0o600, NOBODY, False),
        (0o604, NOBODY, True),
        (0o640, NOBODY, False),
        (0o640, Identity(65534, 65534, [0]), True),  # by the group
        (0o600, None, True),
    ):
        file.chmod(mode)
        assert ask(lambda: os.access(file, os.R_OK), identity=identity) is readable
        if readable:
            assert ask(lambda: file.read_text(), identity=identity) == "x"
        else:
            with pytest.raises(PermissionError):
                ask(lambda: file.read_text(), identity=identity)


def test_who_may_not_become_another_user_is_not_asked() -> None:
    """An ordinary user's program that asks with another identity gets no answer, not one with its own rights."""

    def nested() -> str:
        try:
            return str(child.ask(lambda: "answered", 10, "inner", Identity(1, 1, [1])))
        except CommandFailed as error:
            return error.what

    said = ask(nested, identity=NOBODY)
    assert said == "inner: a child of vmnode ended with status 127: Operation not permitted"


def test_the_user_cannot_reach_into_a_child_that_has_these_rights() -> None:
    """Its answer is for root: with ptrace(2), its memory or its pipe, the user could write it himself."""
    told, tell = os.pipe()
    go_on, resume = os.pipe()
    answers: list[Any] = []

    def wait() -> int:
        os.write(tell, str(os.getpid()).encode())
        return len(os.read(go_on, 1))

    waiting = threading.Thread(target=lambda: answers.append(ask(wait, identity=NOBODY)))
    waiting.start()
    pid = int(os.read(told, 20))

    def reach() -> dict[str, int]:
        results = {}
        for name, flags in (("mem", os.O_RDWR), ("fd/1", os.O_WRONLY), ("environ", os.O_RDONLY)):
            try:
                os.close(os.open(f"/proc/{pid}/{name}", flags))
                results[name] = 0
            except OSError as error:
                results[name] = error.errno or -1
        return results

    assert ask(reach, identity=NOBODY) == dict.fromkeys(["mem", "fd/1", "environ"], errno.EACCES)
    assert ask(reach) == dict.fromkeys(["mem", "fd/1", "environ"], 0)  # root can: so it is the rights that decide
    os.write(resume, b"x")
    waiting.join()
    assert answers == [1]
    for descriptor in (told, tell, go_on, resume):
        os.close(descriptor)


# --- commands -----------------------------------------------------------------------------------------------------


def run(*argv: str, deadline_s: float = 10.0, **options: Any) -> tuple[int, str, str]:
    return child.run(argv, deadline_s, **options)


def test_a_command_tells_status_and_what_it_printed_where() -> None:
    assert run("sh", "-c", "echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert run("sh", "-c", "kill -TERM $$") == (-15, "", "")
    assert run("printf", r"\377") == (0, "\ufffd", "")


def test_both_streams_are_read_at_once() -> None:
    status, output, complaint = run("sh", "-c", "head -c 300000 /dev/zero >&2; head -c 300000 /dev/zero")
    assert (status, len(output), len(complaint)) == (0, 300000, 300000)


def test_a_command_reads_the_text_to_its_end() -> None:
    assert run("cat", text="ä\n" * 20000)[1] == "ä\n" * 20000
    assert run("cat")[1] == ""
    assert run("true", text="x" * 65536)[0] == 0  # it does not want to know


def test_text_that_nobody_reads_does_not_outlive_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        run("sleep", SLEEP, text="x" * 65536, deadline_s=0.3)


def test_arguments_are_no_shell_s() -> None:
    assert run("echo", "$(id); *", "a b")[1] == "$(id); * a b\n"


def test_a_command_s_environment_is_the_same_whoever_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/tmp/evil.so")
    monkeypatch.setenv("PATH", "/tmp")
    assert set(run("env")[1].splitlines()) == {f"{name}={value}" for name, value in child.ENVIRONMENT.items()}


def test_a_command_runs_in_its_directory(tmp_path: Path) -> None:
    assert run("pwd")[1] == "/\n"
    assert run("pwd", directory=str(tmp_path))[1] == f"{tmp_path}\n"


@pytest.mark.parametrize(
    "argv, directory, why",
    [
        (["no-such-command"], "/", "No such file or directory"),
        (["/etc/passwd"], "/", "Permission denied"),
        (["true"], "/nonexistent", "No such file or directory"),
    ],
)
def test_a_command_that_cannot_be_started_is_named(argv: list[str], directory: str, why: str) -> None:
    with pytest.raises(CommandFailed, match=f"^{argv[0]}: cannot be started: {why}$"):
        run(*argv, directory=directory)


def test_no_descriptor_of_ours_gets_into_a_command(tmp_path: Path) -> None:
    with open(tmp_path / "ours", "w"):
        printed = run("sh", "-c", "exec ls -l /proc/self/fd")[1]
    opened = dict(re.findall(r"(\d+) -> (.*)", printed))
    assert str(tmp_path / "ours") not in opened.values()
    pipes = [opened.pop(number) for number in "012"]
    assert all(where.startswith("pipe:") for where in pipes) and len(set(pipes)) == 3
    assert not set(pipes) & set(opened.values())


def test_limits_are_applied_hard() -> None:
    wanted = {
        resource.RLIMIT_AS: 1 << 30,
        resource.RLIMIT_CPU: 7,
        resource.RLIMIT_FSIZE: 12345,
        resource.RLIMIT_CORE: 0,
    }
    lines = run("cat", "/proc/self/limits", limits=wanted)[1].splitlines()
    found = {line[:25].strip(): line[25:].split()[:2] for line in lines}
    assert found["Max address space"] == [str(1 << 30)] * 2
    assert found["Max cpu time"] == ["7"] * 2
    assert found["Max file size"] == ["12345"] * 2
    assert found["Max core file size"] == ["0"] * 2
    ours = Path("/proc/self/limits").read_text()
    assert run("cat", "/proc/self/limits")[1] == ours


def test_a_limit_stops_what_it_should(tmp_path: Path) -> None:
    limits = {resource.RLIMIT_FSIZE: 1 << 20}
    status, _, complaint = run("dd", "if=/dev/zero", f"of={tmp_path}/big", "bs=64k", "count=100", limits=limits)
    assert status != 0 and "File too large" in complaint
    assert (tmp_path / "big").stat().st_size == 1 << 20


def test_a_limit_that_is_stricter_already_stays() -> None:
    """An administrator's ulimit: an ordinary user may not raise it, and root should not."""

    def limited() -> list[Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return list(child.run(["sh", "-c", "ulimit -H -f"], 10, limits={resource.RLIMIT_FSIZE: 1 << 30}))

    assert ask(limited, identity=NOBODY) == [0, "1\n", ""]  # in blocks of 512 bytes, rounded down


# --- deadlines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", HANGS.values(), ids=HANGS.keys())
def test_a_deadline_ends_a_command_and_all_that_it_started(script: str) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^sh: no answer within 0\.3 s$"):
        run("sh", "-c", script, deadline_s=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    until(lambda: sleepers() == [])


@pytest.mark.parametrize(
    "question",
    [sleep_for_ever, lambda: os.kill(os.getpid(), signal.SIGSTOP), lambda: signal.pause()],
    ids=["started another", "stopped", "waits"],
)
def test_a_deadline_ends_a_question_and_all_that_it_started(question: Callable[[], Any]) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^/nfs/x.qcow2: no answer within 0\.3 s$"):
        ask(question, 0.3, identity=NOBODY)
    assert 0.3 <= time.monotonic() - began < 2
    until(lambda: sleepers() == [])


def test_a_command_that_closes_its_output_and_goes_on_is_ended() -> None:
    with pytest.raises(DeadlineExceeded, match=r"^sh: it does not end$"):
        run("sh", "-c", f"exec >&- 2>&-; sleep {SLEEP}")
    until(lambda: sleepers() == [])


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_command_that_prints_without_end_is_ended(stream: str) -> None:
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"^sh printed more than 1 MiB$"):
        run("sh", "-c", f"exec yes {stream}", deadline_s=20)
    assert time.monotonic() - began < 10


def test_what_is_printed_up_to_the_limit_is_whole() -> None:
    assert len(run("head", "-c", str(child.OUTPUT_LIMIT), "/dev/zero")[1]) == child.OUTPUT_LIMIT


def test_an_interrupt_takes_the_child_along() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident or 0, signal.SIGINT)).start()
            run("sleep", SLEEP)
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: sleepers() == [])


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[tuple[Path, DeadFileSystem]]:
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    directory = tmp_path / "dead"
    directory.mkdir()
    file_system = DeadFileSystem(directory)
    yield directory, file_system
    file_system.cut(directory)


def test_a_child_that_cannot_be_killed_is_left_behind(dead: tuple[Path, DeadFileSystem]) -> None:
    directory, file_system = dead
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^/nfs/x.qcow2: no answer within 0\.3 s$"):
        ask(lambda: (directory / "x").stat().st_size, 0.3)
    assert time.monotonic() - began < 2
    (stuck,) = psutil.Process().children()
    assert stuck.status() == psutil.STATUS_DISK_SLEEP
    file_system.cut(directory)
    assert os.waitpid(stuck.pid, 0)[1] == signal.SIGKILL


# --- nothing stays ------------------------------------------------------------------------------------------------


def test_neither_zombies_nor_descriptors_stay_whatever_becomes_of_a_child() -> None:
    def once() -> None:
        ask(lambda: 1)
        run("true")
        for failing in (
            lambda: ask(lambda: os._exit(1)),
            lambda: ask(sleep_for_ever, 0.05),
            lambda: ask(lambda: Path("/nonexistent").stat().st_size),
            lambda: run("no-such-command"),
            lambda: run("sleep", SLEEP, deadline_s=0.05),
            lambda: run("yes"),
        ):
            with pytest.raises((VmnodeError, OSError)):
                failing()

    once()
    before = descriptors()
    for _ in range(5):
        once()
        assert psutil.Process().children() == []
        assert len(descriptors()) == len(before)


def test_sixty_four_at_once_get_each_their_own_answer() -> None:
    """Descriptors that one child inherits from another's pipes must not keep them open."""
    answers: dict[int, Any] = {}

    def one(number: int) -> None:
        answers[number] = ask(lambda: json.loads(json.dumps([number, os.getpid()])), 60)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number][0] for number in range(64)] == list(range(64))
    assert len({pid for _, pid in answers.values()}) == 64
