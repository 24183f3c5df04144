"""Where a node lives on the host, who owns it, and how all of it is removed.

    CACHE/nodes/<name>/
        owner       the process for whose sake the node exists: "<pid> <start time>"
        upper/      what the node changed of its image; work/ is overlayfs's own
        root/       where the overlay is mounted, inside the node's private mount namespace only
        uplink      where the node's network namespace is pinned, in the same mount namespace
        console     what systemd-nspawn and the node's systemd said

Every process of a node runs below the control group ``vmnode-lab.<name>``. Mounts, links and network
namespaces live only as long as these processes, so to kill the group and to remove two directories is
to remove the node, whoever does it and whatever happened to its owner.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tests.lab.cache import CACHE, locked, remove_tree
from tests.lab.errors import LabError

NODES = CACHE / "nodes"
CGROUP_PREFIX = "vmnode-lab."
KILL_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class ProcessId:
    """A process for good: the kernel gives a pid away again, but not with the same start time."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Optional[ProcessId]:
        """The living process ``pid``, or None if there is none (a zombie does not live)."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks and parentheses
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def lives(self) -> bool:
        return ProcessId.of(self.pid) == self


def claim(name: str) -> Path:
    """Make the home of the node ``name``, owned by this process; raises LabError if a living one owns it."""
    home = NODES / name
    with locked("nodes", "waiting for another process to remove dead nodes"):
        _remove_dead()
        if home.exists():
            raise LabError(f"the node {name} exists already; it {_described(owner(home))}")
        for part in ("upper", "work", "root"):
            (home / part).mkdir(parents=True)
        (home / "uplink").touch()
        give(home, os.getpid())
    return home


def give(home: Path, pid: int) -> None:
    """Make the process ``pid`` the owner of ``home``."""
    process = ProcessId.of(pid)
    if process is None:
        raise LabError(f"the node {home.name} cannot be given to process {pid}: it is gone")
    written = home / "owner.new"
    written.write_text(f"{process.pid} {process.start}\n")
    written.rename(home / "owner")


def owner(home: Path) -> Optional[ProcessId]:
    """The living owner of ``home``, or None."""
    try:
        pid, start = (home / "owner").read_text().split()
    except FileNotFoundError:
        return None
    process = ProcessId(int(pid), int(start))
    return process if process.lives() else None


def remove_dead() -> list[str]:
    """Remove the nodes whose owners are gone; returns their names."""
    with locked("nodes", "waiting for another process to remove dead nodes"):
        return _remove_dead()


def _remove_dead() -> list[str]:
    dead = [home.name for home in NODES.glob("*") if owner(home) is None]
    for name in dead:
        remove(name)
    return dead


def remove(name: str) -> None:
    """Kill what runs in the node ``name`` and remove all that it has on the host; fine if there is nothing."""
    for group in cgroups(name):
        if (group / "cgroup.kill").exists():
            (group / "cgroup.kill").write_text("1")
            _wait_until_empty(name, group)
    for group in cgroups(name):
        for directory, _, _ in os.walk(group, topdown=False):
            Path(directory).rmdir()
    remove_tree(NODES / name)


def make_cgroup(name: str) -> Path:
    """Make the node's control group in the unified hierarchy."""
    group = next(root for root, unified in _hierarchies() if unified) / f"{CGROUP_PREFIX}{name}"
    group.mkdir()
    return group


def cgroups(name: str) -> list[Path]:
    """The node's control groups: one, or two where systemd-nspawn mirrors it in a v1 hierarchy."""
    groups = [root / f"{CGROUP_PREFIX}{name}" for root, _ in _hierarchies()]
    return [group for group in groups if group.is_dir()]


def _hierarchies() -> Iterator[tuple[Path, bool]]:
    """The mounted hierarchies that systemd uses, and whether each is the unified one (v2)."""
    found = False
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found = found or kind == "cgroup2"
            yield Path(where), kind == "cgroup2"
    if not found:
        raise LabError("the lab needs a mounted cgroup2 file system: mount -t cgroup2 none /sys/fs/cgroup")


def _wait_until_empty(name: str, group: Path) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while "populated 1" in (group / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise LabError(f"the node {name} has processes that survive SIGKILL; see {group}/cgroup.procs")
        time.sleep(0.02)


def _described(process: Optional[ProcessId]) -> str:
    return "has just lost its owner: try again" if process is None else f"belongs to process {process.pid}"
