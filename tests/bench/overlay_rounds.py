"""Runs in a node, as an ordinary user, in an empty directory: overlays by the installed plugin, and other ways.

    python3 overlay_rounds.py by_turns ROUNDS SMALL LARGE   the seconds of each, by turns
    python3 overlay_rounds.py together COUNT BASE           COUNT overlays that are asked for at the same moment
    python3 overlay_rounds.py copies ROUNDS BASE            the seconds of cp, and of an overlay on the same base

Prints JSON. Ends with an error if anything that it started fails, or makes a disk that is not what was asked for.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

PLUGIN = "/usr/libexec/condor/vm-nfs-plugin"
INTERPRETER = ("/usr/bin/python3", "-IS")  # as in the plugin's first line
RESULTS_ROOM = 20_000  # bytes; HTCondor fills the file for the results with blanks before it starts a plugin

# The plugin with a clock at its joints. Prints the seconds of each part; the rest of its time is in none of them.
PARTS = """
import sys, time
begun, loaded = float(sys.argv[1]), time.monotonic()
sys.path.insert(0, "/usr/lib/vmnode")
from vmnode.commands import nfs_plugin
from vmnode.transfer import overlay
parts = {"interpreter": loaded - begun, "imports": time.monotonic() - loaded}
def clocked(function, name):
    def call(*arguments):
        started = time.monotonic()
        try:
            return function(*arguments)
        finally:
            parts[name] = time.monotonic() - started
    return call
overlay.find_base = clocked(overlay.find_base, "policy")
overlay.create = clocked(overlay.create, "qemu-img")
assert nfs_plugin.perform(["-infile", "in", "-outfile", "out"]) == 0
print(parts)
"""


def by_turns(rounds: int, small: str, large: str) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        seen.setdefault(name, []).append(seconds)

    def overlay(name: str, base: str) -> None:
        prepare("job", base)
        note(name, timed([PLUGIN, "-infile", "in", "-outfile", "out"], "job"))
        check("job", base)
        shutil.rmtree("job")

    def bare() -> None:
        Path("bare").mkdir()
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", small, "./disk.qcow2"]
        note("bare", timed(argv, "bare"))
        shutil.rmtree("bare")

    def parts() -> None:
        prepare("job", small)
        began = time.monotonic()
        argv = [*INTERPRETER, "-c", PARTS, str(began)]
        done = subprocess.run(argv, cwd="job", stdout=subprocess.PIPE, text=True, check=True)
        whole = time.monotonic() - began
        found: dict[str, float] = ast.literal_eval(done.stdout)
        for name, seconds in found.items():
            note(f"part {name}", seconds)
        note("part rest", whole - sum(found.values()))
        shutil.rmtree("job")

    turns = [
        bare,
        lambda: overlay("small", small),
        lambda: overlay("large", large),
        lambda: note("interpreter", timed([*INTERPRETER, "-c", "pass"], ".")),
        parts,
    ]
    for number in range(rounds):
        for turn in range(len(turns)):  # each follows each, so that none has always the same one before it
            turns[(number + turn * (1 + number % 4)) % len(turns)]()
    return seen


def together(count: int, base: str) -> dict[str, list[float]]:
    """Seconds for one overlay: of `count` at once, of as many one after the other, and of CPU time, at once."""
    seen: dict[str, list[float]] = {"at once": [], "in turn": [], "cpu": []}
    argv = [PLUGIN, "-infile", "in", "-outfile", "out"]
    directories = [f"job{number}" for number in range(count)]

    def clean() -> None:
        for directory in directories:
            check(directory, base)
            shutil.rmtree(directory)

    for _ in range(3):
        for directory in directories:
            prepare(directory, base)
        seen["in turn"].append(sum(timed(argv, directory) for directory in directories) / count)
        clean()
        for directory in directories:
            prepare(directory, base)
        began = time.perf_counter()
        started = [start(argv, directory) for directory in directories]
        cpu = sum(end(process) for process in started)
        seen["at once"].append((time.perf_counter() - began) / count)
        seen["cpu"].append(cpu / count)
        clean()
    return seen


def copies(rounds: int, base: str) -> dict[str, list[float]]:
    """`cp` is what it takes until it returns, `on disk` until all of it is written; the base is in the page cache."""
    seen: dict[str, list[float]] = {"cp": [], "on disk": [], "overlay": []}
    for _ in range(rounds):
        os.sync()
        for _ in range(5):
            prepare("job", base)
            seen["overlay"].append(timed([PLUGIN, "-infile", "in", "-outfile", "out"], "job"))
            check("job", base)
            shutil.rmtree("job")
        wall = timed(["cp", "--reflink=never", "--sparse=never", base, "copy"], ".")
        seen["cp"].append(wall)
        seen["on disk"].append(wall + timed(["sync", "copy"], "."))
        Path("copy").unlink()
    return seen


def prepare(directory: str, base: str) -> None:
    """A scratch directory as the starter leaves it to the plugin."""
    Path(directory).mkdir()
    scratch = Path(directory).resolve()
    ad = f'[ Url = "nfs://{base}:disk.qcow2"; LocalFileName = "{scratch}/{Path(base).name}:disk.qcow2" ]\n'
    (scratch / "in").write_text(ad)
    (scratch / "out").write_text(" " * RESULTS_ROOM)


def check(directory: str, base: str) -> None:
    """qemu-img has to find the overlay that was asked for, HTCondor the plugin's word that it is there."""
    said = subprocess.run(
        ["qemu-img", "info", "--output=json", "disk.qcow2"],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(said.stdout)
    is_there = [found["format"], found["backing-filename"], found["backing-filename-format"], found["virtual-size"]]
    wanted = ["qcow2", base, "raw", Path(base).stat().st_size]
    result = (Path(directory) / "out").read_text()
    if is_there != wanted or "TransferSuccess = true" not in result:
        raise SystemExit(f"{directory}: wanted {wanted}, found {is_there}; the plugin said {result.strip()}")


def timed(argv: Sequence[str], directory: str) -> float:
    """Seconds of a command that must not fail."""
    began = time.perf_counter()
    end(start(argv, directory))
    return time.perf_counter() - began


def start(argv: Sequence[str], directory: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def end(process: subprocess.Popen[bytes]) -> float:
    """Wait for it; the seconds of CPU time that it took, its children included."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{process.args!r} ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime


def main(what: str, count: str, *bases: str) -> None:
    ways: dict[str, Callable[..., Any]] = {"by_turns": by_turns, "together": together, "copies": copies}
    print(json.dumps(ways[what](int(count), *bases)))


main(*sys.argv[1:])
