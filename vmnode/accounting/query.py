"""Questions to the ledger, for readers: beside the daemon that writes it, and without one; never writes.

What is read stands in memory before it is handed on, and no transaction stays open: a pager that waits for a key must
not keep the daemon's WAL from being emptied.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar

from vmnode.accounting.ledger import VERSION, as_state_errors, of_another_version, rows
from vmnode.accounting.record import NEVER_COUNTED, Outcome, Record
from vmnode.errors import NotPermitted, StateError, UsageError
from vmnode.usage import Traffic, Usage

Answer = TypeVar("Answer")
AT_ONCE = 2000  # records
WAL_HEADER = 32  # bytes (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)
_HINT = "systemctl status vmnode; where vmnoded does not run any more, root can read it"


class Selection(NamedTuple):
    """Which records: those that meet all of these."""

    owner: Optional[str] = None  # "alice", in whatever domain, or "alice@example.org"
    since: Optional[float] = None  # started at this Unix time, or later
    job: Optional[str] = None  # "123", "123.0" or a GlobalJobId
    record: Optional[int] = None  # the one of this number
    running: bool = False  # only those that have not ended

    def condition(self) -> tuple[str, dict[str, Any]]:
        """An SQL condition and its arguments. Raises UsageError."""
        parts, arguments = ["1"], {**self._asdict()}
        if self.owner is not None:
            parts.append("(owner = :owner OR substr(owner, 1, length(:owner) + 1) = :owner || '@')")
        if self.since is not None:
            parts.append("started_at >= :since")
        if self.running:
            parts.append(f"outcome = '{Outcome.RUNNING.value}'")
        if self.record is not None:
            parts.append("id = :record")
        if self.job is not None:
            number = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?", self.job)
            if number:  # a GlobalJobId is <schedd>#<cluster>.<proc>#<time of submission>
                process = f"{int(number[2])}#" if number[2] else ""
                arguments["job"] = f"#{int(number[1])}.{process}"
                parts.append("instr(job, :job)")
            elif re.fullmatch(r"[^#]+#[0-9]+\.[0-9]+#[0-9]+", self.job):
                parts.append("job = :job")
            else:
                raise UsageError(
                    f"{self.job!r} names no job",
                    "a job is a cluster (123), cluster.proc (123.0) or a GlobalJobId (schedd#123.0#1790000000)",
                )
        return " AND ".join(parts), arguments


EVERYTHING = Selection()


def find(path: Path, selection: Selection = EVERYTHING) -> Iterator[Record]:
    """The records, oldest first. Raises UsageError, NotPermitted, StateError: at once, if they cannot be read now."""
    condition, arguments = selection.condition()
    rest = f"WHERE {condition} AND (started_at, id) > (:last_start, :last) ORDER BY started_at, id LIMIT {AT_ONCE}"
    first = _batch(path, rest, {**arguments, "last_start": float("-inf"), "last": 0})
    return _batches(path, rest, arguments, first)


def _batches(path: Path, rest: str, arguments: dict[str, Any], first: list[Record]) -> Iterator[Record]:
    batch = first
    while batch:
        yield from batch
        if len(batch) < AT_ONCE:
            return
        batch = _batch(path, rest, {**arguments, "last_start": batch[-1].started_at, "last": batch[-1].id})


def _batch(path: Path, rest: str, arguments: dict[str, Any]) -> list[Record]:
    return _ask(path, lambda database: list(rows(database, rest, arguments)))


class Sum(NamedTuple):
    """What the jobs of one user, or of one day, used together."""

    of: str  # the user; the day as "2026-11-20", in local time, on which the jobs started
    jobs: int
    not_counted: int  # of these, nothing is known
    partly_counted: int  # of these, something is missing
    usage: Optional[Usage]  # None: not one of the jobs was counted


_GROUPS = {"user": "owner", "day": "date(started_at, 'unixepoch', 'localtime')"}


def sums(path: Path, by: str, selection: Selection = EVERYTHING) -> list[Sum]:
    """Sums for each of `by`, in its order. Raises UsageError, NotPermitted, StateError."""
    condition, arguments = selection.condition()
    never = ", ".join(f"'{outcome.value}'" for outcome in NEVER_COUNTED)
    counts = [f"{direction}_{unit}" for direction in Usage._fields for unit in Traffic._fields]
    nothing = "usage_lan_in_bytes IS NULL AND guest_lan_in_bytes IS NULL"
    partly = f"partial_since IS NOT NULL OR why != '' OR outcome IN ({never})"
    # sum() leaves NULLs out, and of nothing else makes NULL: what was never counted is never a zero
    totals = [
        f"sum(CASE WHEN NOT ({nothing}) THEN ifnull(usage_{name}, 0) + ifnull(guest_{name}, 0) END)" for name in counts
    ]
    command = (
        f"SELECT {_GROUPS[by]}, count(*), sum({nothing}), sum(NOT ({nothing}) AND ({partly})), {', '.join(totals)}"
        f" FROM records WHERE {condition} GROUP BY 1 ORDER BY 1"
    )
    found = _ask(path, lambda database: database.execute(command, arguments).fetchall())
    return [Sum(str(row[0]), row[1], row[2], row[3], _usage(row[4:])) for row in found]


def _usage(counts: Sequence[Optional[int]]) -> Optional[Usage]:
    if counts[0] is None:
        return None
    return Usage(*(Traffic(counts[i] or 0, counts[i + 1] or 0) for i in range(0, len(counts), 2)))


def _ask(path: Path, question: Callable[[sqlite3.Connection], Answer]) -> Answer:
    """With nothing in its WAL the database is all there is, but who may not write here can neither make the files of
    the WAL nor begin to use an empty one: SQLite has to be told that the database does not change
    (https://www.sqlite.org/wal.html#read_only_databases), and we look whether that was true. With something in its WAL
    it must not be told so, though the daemon be dead: what is only there would be left out.
    """
    for _ in range(3):
        _look_at(path)
        rests = _at_rest(path)
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if rests else ''}"
        try:
            with as_state_errors(path, _HINT), closing(sqlite3.connect(uri, uri=True)) as database:
                answer = _answer(path, database, question)
        except StateError:
            if _at_rest(path) == rests:
                raise
        else:
            if not rests or _at_rest(path) == rests:
                return answer
    raise StateError(f"{path}: vmnoded started or stopped while the ledger was read", "try again")


def _at_rest(path: Path) -> Optional[tuple[int, int, int]]:
    """None if there is something in the WAL; else what changes when the database does."""
    try:
        if path.with_name(f"{path.name}-wal").stat().st_size > WAL_HEADER:
            return None
    except FileNotFoundError:
        pass
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _look_at(path: Path) -> None:
    try:
        kind = path.stat().st_mode
    except PermissionError:
        raise _not_permitted(path) from None
    except OSError as error:
        raise StateError(
            f"{path}: there is no ledger ({error.strerror})", "see [accounting] enabled, and [paths] state_dir"
        ) from None
    if not stat.S_ISREG(kind):
        raise StateError(f"{path}: the ledger is not a file", "see [paths] state_dir")
    if not os.access(path, os.R_OK):
        raise _not_permitted(path)


def _not_permitted(path: Path) -> NotPermitted:
    return NotPermitted(f"{path}: the ledger cannot be read", "it is for root and the group vmnode")


def _answer(path: Path, database: sqlite3.Connection, question: Callable[[sqlite3.Connection], Answer]) -> Answer:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:  # SQLite's default: an empty file, or somebody else's database
        raise StateError(f"{path}: this is no ledger, or one with nothing in it", "systemctl restart vmnode")
    if version != VERSION:
        raise of_another_version(path)
    return question(database)
