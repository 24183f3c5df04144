"""Notes of starters that went to work without a network of their own, since nobody gave them one in time.

Each leaves <run_dir>/unaccounted/<pid>-<start time>, a line with its slot, and one that says why. The daemon makes a
record of it as soon as it can: a job that was not counted is in the ledger, and never as a zero.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from vmnode.accounting.record import Process
from vmnode.host import files

DIRECTORY = "unaccounted"  # below [paths] run_dir


class Note(NamedTuple):
    path: Path
    starter: Process
    at: float  # Unix time
    slot: str
    why: str


def left(directory: Path) -> list[Note]:
    """All notes; what is none is removed. Raises nothing: the directory is root's alone."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.name.startswith("."):  # being written
            continue
        try:
            pid, started = map(int, path.name.split("-"))
            slot, why = [*files.read_whole(str(path)).decode("utf-8", "replace").split("\n"), "", ""][:2]
            found.append(Note(path, Process(pid, started), path.stat().st_mtime, slot, why))
        except (ValueError, OSError):
            with contextlib.suppress(OSError):
                path.unlink()
    return found
