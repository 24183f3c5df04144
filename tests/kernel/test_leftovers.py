"""Processes that outlive their starter: real ones, in real namespaces and control groups."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, Optional

import psutil
import pytest

from tests.kernel.world import beyond, running, until
from vmnode.accounting.leftovers import Event, Finding, Policy
from vmnode.accounting.record import Process, Record
from vmnode.accounting.sweep import Sweep
from vmnode.host import processes

# Other HTCondors may run on this machine: their groups, slots and links are not called like this.
BASE = f"vmntest{os.getpid()}"
SLOT = "slotvmn1_1"
LINKS = "vmnj0a1b"
USER = 64242  # of this number nobody has a name
END = Policy(end=True, grace_s=60.0)


def namespace_of(pid: int) -> int:
    return int(os.readlink(f"/proc/{pid}/ns/net")[5:-1])  # noqa: PTH115


@contextlib.contextmanager
def job(
    *argv: str, within: Optional[int] = None, group: Optional[Path] = None, uid: int = USER, name: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A program of a job's user, in the namespace of the process `within` and in a control group, once it runs."""
    entering = ["nsenter", "-t", str(within), "-n"] if within else []
    words = [*entering, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *argv]
    with running(words, stdin=subprocess.DEVNULL) as child:
        until(lambda: name_of(child.pid) == (name or Path(argv[0]).name)[:15])
        if group is not None:
            (group / "cgroup.procs").write_text(str(child.pid))
        yield child


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


@pytest.fixture
def groups() -> Iterator[Path]:
    """Where HTCondor's groups of the jobs are; emptied and removed after the test."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    tree = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if tree is None:
        pytest.skip("needs a tree of control groups, version 2")
    base = tree / BASE
    base.mkdir()
    try:
        yield base
    finally:
        for group in sorted((path for path in base.rglob("*") if path.is_dir()), reverse=True):
            remove(group)
        base.rmdir()


def remove(group: Path) -> None:
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def group_23(base: Path) -> Path:
    group = base / f"condor_var_lib_condor_execute_{SLOT}@wn7"
    group.mkdir()
    return group


def group_25(base: Path) -> Path:
    group = base / f"_var_lib_condor_execute_{SLOT}@wn7.slice" / f"_var_lib_condor_execute_{SLOT}@wn7.scope"
    group.mkdir(parents=True)
    return group


@contextlib.contextmanager
def starter(directory: Path, *arguments: str, within: Optional[int] = None) -> Iterator[subprocess.Popen[str]]:
    """A program called condor_starter, of root, with a starter's arguments: what is seen of one from outside."""
    program = directory / "condor_starter"
    shutil.copy("/bin/sh", program)
    entering = ["nsenter", "-t", str(within), "-n"] if within else []
    with running([*entering, str(program), "-c", "read x", *arguments], stdin=subprocess.PIPE) as child:
        until(lambda: name_of(child.pid) == "condor_starter")
        yield child


def record(link: str, pid: int, job: str = "ap#12.0#1") -> Record:
    seen = processes.details(pid)
    process = Process(pid, seen.started if seen else 0)
    return Record(7, "boot", link, 7, process, SLOT, started_at=100.0, seen_at=100.0, job=job, owner="alice")


def ignored(pid: int) -> int:
    """The signals that a process ignores, as bits (proc_pid_status(5))."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)


def look(sweep: Sweep, now: float, *records: Record) -> list[Finding]:
    return asyncio.run(sweep.look(now, records))


def told(findings: Sequence[Finding]) -> list[tuple[Event, int]]:
    return [(finding.event, finding.leftover.resident.process.pid) for finding in findings]


DEAD = 1 << 22  # no process has such an id (PID_MAX_LIMIT)


# --- /proc --------------------------------------------------------------------------------------------------------


def test_every_living_process_is_seen_with_its_namespace() -> None:
    with job("sleep", "600") as child:
        seen = {there.pid: there for there in processes.everywhere()}
        assert seen[child.pid].namespace == namespace_of(child.pid)
        assert seen[child.pid].cgroups == Path(f"/proc/{child.pid}/cgroup").read_text()
        assert seen[os.getpid()].namespace == namespace_of(os.getpid())


def test_who_a_process_is() -> None:
    with job("sleep", "600") as child:
        seen = processes.details(child.pid)
        assert seen is not None
        assert (seen.pid, seen.parent, seen.name, seen.uid) == (child.pid, os.getpid(), "sleep", USER)
        assert Path(seen.program).samefile(shutil.which("sleep") or "")
        ticks = os.sysconf("SC_CLK_TCK")
        assert abs(seen.started / ticks + psutil.boot_time() - psutil.Process(child.pid).create_time()) < 1


def test_a_zombie_and_a_process_that_is_gone_are_nobody() -> None:
    child = subprocess.Popen(["true"])
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert processes.details(child.pid) is None
    assert child.pid not in {there.pid for there in processes.everywhere()}
    child.wait()
    assert (processes.details(child.pid), processes.whereabouts(child.pid)) == (None, None)
    assert processes.arguments(child.pid) == []
    assert asyncio.run(processes.command_line(child.pid)) == ""


@pytest.mark.parametrize("name", ["a) R 1 (b", "x\nUid:\t0", "\x1b[2J", ") ", "é\xff"])
def test_a_name_deceives_nobody(name: str) -> None:
    rename = f"open('/proc/self/comm', 'wb').write({name.encode()!r})"
    become = f"import os, time; {rename}; os.setuid({USER}); print(flush=True); time.sleep(600)"
    with running([sys.executable, "-c", become], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == "\n"
        seen = processes.details(child.pid)
        assert seen is not None
        assert (seen.parent, seen.uid, seen.name) == (os.getpid(), USER, name)


def test_a_long_command_line_is_read_in_part() -> None:
    with running(["sleep", "600", *(["0" * 1000] * 1000)]) as child:
        until(lambda: name_of(child.pid) == "sleep")
        assert asyncio.run(processes.command_line(child.pid)) == "\0".join(["sleep", "600", "0" * 1000, "0" * 13])


def test_processes_that_come_and_go_disturb_nothing() -> None:
    with running(["sh", "-c", "while :; do /bin/true; done"]):
        for _ in range(20):
            assert os.getpid() in {there.pid for there in processes.everywhere()}
            for there in processes.everywhere()[-20:]:
                processes.details(there.pid)


def test_the_kernel_says_which_link_leads_to_which_namespace() -> None:
    with beyond(f"{LINKS}1") as one, beyond(f"{LINKS}2") as two, beyond("vmnj9999") as foreign:
        found = processes.behind_links(LINKS, processes.everywhere())
        assert found == {namespace_of(one): f"{LINKS}1", namespace_of(two): f"{LINKS}2"}
        assert namespace_of(foreign) not in found
    assert processes.behind_links(LINKS, processes.everywhere()) == {}


# --- signals ------------------------------------------------------------------------------------------------------


def test_a_signal_goes_to_the_process_that_was_seen_and_to_no_other() -> None:
    with job("sleep", "600") as child:
        there, seen = processes.whereabouts(child.pid), processes.details(child.pid)
        assert there is not None and seen is not None
        assert not processes.send(signal.SIGKILL, there, seen.started + 1)
        assert not processes.send(signal.SIGKILL, there._replace(namespace=1), seen.started)
        assert not processes.send(signal.SIGKILL, there._replace(cgroups="0::/x\n"), seen.started)
        assert not processes.send(signal.SIGKILL, there._replace(pid=DEAD), seen.started)
        assert child.poll() is None
        assert processes.send(signal.SIGKILL, there, seen.started)
        assert child.wait(5) == -signal.SIGKILL
        assert not processes.send(signal.SIGKILL, there, seen.started)


# --- by namespace -------------------------------------------------------------------------------------------------


def test_in_a_namespace_the_starter_s_death_makes_leftovers(tmp_path: Path) -> None:
    link = f"{LINKS}1"
    sweep = Sweep(Policy(end=False, grace_s=0.0), LINKS, BASE)
    with beyond(link) as holder, job("sleep", "611", within=holder) as left, job("sleep", "612"):
        with starter(tmp_path, "-a", SLOT, within=holder) as living:
            known = record(link, living.pid)
            for now in (0.0, 20.0, 40.0):
                assert look(sweep, now, known) == []
                assert look(sweep, now) == []  # even if the ledger forgot it
        assert look(sweep, 100.0, known) == []
        findings = look(sweep, 110.0, known)
        assert sorted(told(findings)) == sorted([(Event.FOUND, holder), (Event.FOUND, left.pid)])
        (finding,) = (one for one in findings if one.leftover.resident.process.pid == left.pid)
        assert finding.sentence == (
            f"process {left.pid} of user {USER} (sleep 611) has outlived the starter of job ap#12.0#1 of alice, "
            "for 10 s at least"
        )
        assert look(sweep, 120.0, known) == []


def test_another_process_may_have_the_starter_s_id() -> None:
    link = f"{LINKS}1"
    with beyond(link) as holder:
        living = record(link, os.getpid())
        other = Record(7, "boot", link, 7, Process(os.getpid(), 1), SLOT, started_at=100.0, seen_at=100.0)
        for known, count in ((living, 0), (other, 1)):
            sweep = Sweep(Policy(end=False, grace_s=0.0), LINKS, BASE)
            look(sweep, 0.0, known)
            assert told(look(sweep, 10.0, known)) == [(Event.FOUND, holder)] * count


def test_they_are_told_to_end_and_then_killed_but_never_root_s_nor_anybody_outside() -> None:
    link = f"{LINKS}1"
    sweep = Sweep(END, LINKS, BASE)
    deaf = "trap '' TERM; while :; do sleep 1; done"
    with (
        beyond(link) as holder,
        job("sleep", "611", within=holder) as polite,
        job("sleep", "612") as outside,
        job("sh", "-c", deaf, within=holder) as stubborn,
    ):
        until(lambda: ignored(stubborn.pid) & 1 << signal.SIGTERM - 1)
        known = record(link, DEAD)
        look(sweep, 0.0, known)
        look(sweep, 10.0, known)
        assert all(event is Event.FOUND for event, _ in told(look(sweep, 59.0, known)))  # its children come and go
        ended = told(look(sweep, 60.0, known))
        assert {(Event.TERMINATED, polite.pid), (Event.TERMINATED, stubborn.pid)} <= set(ended)
        assert polite.wait(5) == -signal.SIGTERM
        assert all(event is Event.FOUND for event, _ in told(look(sweep, 69.0, known)))
        assert stubborn.poll() is None
        assert (Event.KILLED, stubborn.pid) in told(look(sweep, 70.0, known))
        assert stubborn.wait(5) == -signal.SIGKILL
        look(sweep, 80.0, known)
        assert psutil.pid_exists(holder) and namespace_of(holder) and outside.poll() is None


# --- by control group ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [group_23, group_25])
def test_without_accounting_the_group_tells(make: Callable[[Path], Path], groups: Path, tmp_path: Path) -> None:
    group = make(groups)
    sweep = Sweep(END, "", BASE)
    with job("sleep", "611", group=group) as left:
        with starter(tmp_path, "-f", "-a", SLOT, "ap.example.org"):
            for now in (0.0, 70.0, 80.0):
                assert look(sweep, now) == []
        assert left.poll() is None
        look(sweep, 100.0)
        assert told(look(sweep, 110.0)) == [(Event.FOUND, left.pid)]
        assert told(look(sweep, 160.0)) == [(Event.TERMINATED, left.pid)]
        assert left.wait(5) == -signal.SIGTERM


def test_who_left_the_namespace_is_still_in_the_group(groups: Path) -> None:
    link, group = f"{LINKS}1", group_25(groups)
    sweep = Sweep(END, LINKS, BASE)
    leave = ("unshare", "-Un", "sleep", "611")
    with beyond(link) as holder, job(*leave, within=holder, group=group, name="sleep") as left:
        assert namespace_of(left.pid) != namespace_of(holder)
        known = record(link, DEAD)
        look(sweep, 0.0, known)
        findings = look(sweep, 10.0, known)
        assert (Event.FOUND, left.pid) in told(findings)
        assert {finding.leftover.record for finding in findings} == {known}
        assert told(look(sweep, 60.0, known)) == [(Event.TERMINATED, left.pid)]
        assert left.wait(5) == -signal.SIGTERM


def test_a_job_cannot_pretend_to_have_a_starter(groups: Path, tmp_path: Path) -> None:
    group = group_23(groups)
    fake = tmp_path / "condor_starter"
    shutil.copy("/bin/sh", fake)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    sweep = Sweep(Policy(end=False, grace_s=0.0), "", BASE)
    with job(str(fake), "-c", "sleep 611 & wait", "-a", SLOT, group=group) as one:
        with job("sleep", "612", group=group) as two:
            look(sweep, 0.0)
            assert {(Event.FOUND, one.pid), (Event.FOUND, two.pid)} <= set(told(look(sweep, 10.0)))
        for child in psutil.Process(one.pid).children():
            child.kill()


def test_a_thousand_processes_are_looked_at_in_a_moment() -> None:
    started = time.perf_counter()
    count = len(processes.everywhere())
    each_ms = (time.perf_counter() - started) * 1000 / count
    assert each_ms < 0.5  # 0.016 were measured; a loaded machine may take its time
