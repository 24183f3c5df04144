"""The ledger: <state_dir>/ledger.db, an SQLite database in WAL mode. It is the authority on what jobs used.

Written by the daemon alone; root and the group vmnode may read it (see query.py), also while it is written. One row
for each record; what is written in one call is there as a whole or not at all, also after a crash of the daemon. When
the machine itself crashes, the last seconds may be missing: only checkpoints wait for the disk (synchronous = NORMAL).
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from vmnode.accounting.record import Outcome, Process, Record
from vmnode.errors import StateError
from vmnode.host import files
from vmnode.usage import Traffic, Usage

FILE = "ledger.db"  # below [paths] state_dir
VERSION = 1
_BUSY_S = 0.5  # the event loop stands still meanwhile; readers are in nobody's way in WAL mode
_USAGES = ("usage", "read", "guest", "guest_read")
_COUNTS = tuple(
    f"{usage}_{direction}_{unit}" for usage in _USAGES for direction in Usage._fields for unit in Traffic._fields
)
_PLAIN = {
    "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "boot_id": "TEXT NOT NULL",
    "link": "TEXT NOT NULL",
    "number": "INTEGER NOT NULL",
    "pid": "INTEGER NOT NULL",
    "pid_started": "INTEGER NOT NULL",
    "slot": "TEXT NOT NULL",
    "started_at": "REAL NOT NULL",
    "seen_at": "REAL NOT NULL",
    "job": "TEXT NOT NULL",
    "owner": "TEXT NOT NULL",
    "universe": "INTEGER",
    "ended_at": "REAL",
    "outcome": "TEXT NOT NULL",
    "partial_since": "REAL",
    "why": "TEXT NOT NULL",
}
_COLUMNS = (*_PLAIN, *_COUNTS)
# SQLite takes any value for any column (its STRICT tables are younger than EL 9's SQLite).
_TYPES = {"INTEGER": int, "REAL": float, "TEXT": str}
_KINDS = tuple({_TYPES[kind.split()[0]], type(None) if " " not in kind else None} for kind in _PLAIN.values())
_TIMES = ("started_at", "seen_at", "ended_at", "partial_since")
_LAST_TIME = 1e11  # the year 5138: what lies beyond is no time, and nothing that could be printed
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS records ({
    ", ".join([*(f"{name} {kind}" for name, kind in _PLAIN.items()), *(f"{name} INTEGER" for name in _COUNTS)])
});
CREATE INDEX IF NOT EXISTS by_outcome ON records (outcome) WHERE outcome = 'running';
CREATE INDEX IF NOT EXISTS by_start ON records (started_at);
"""
_ASIDE = "move it and the files beside it, -wal and -shm, aside, and restart vmnode, which begins a new one"


class Ledger:
    """The daemon's end."""

    def __init__(self, path: Path, group: Optional[int] = None) -> None:
        """Open it, or make it; `group` may read it. Raises StateError."""
        self.path = path
        before = os.umask(0o177)  # nobody else gets to see it before its mode is right
        try:
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            if group is not None:
                os.chown(path, -1, group)
            path.chmod(0o600 if group is None else 0o640)  # SQLite gives its other files the same mode and group
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"{path}: the ledger cannot be opened: {error}", "see [paths] state_dir") from None
        finally:
            os.umask(before)
        try:
            with as_state_errors(path):
                self._set_up()
            self._file = _identity(path)
        except StateError:
            self._database.close()
            raise

    def _set_up(self) -> None:
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise of_another_version(self.path)
        mode = self._database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StateError(
                f"{self.path}: the file system cannot hold an SQLite database in WAL mode",
                "give vmnode a local directory: [paths] state_dir",
            )
        self._database.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            self._database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    def add(self, record: Record) -> Record:
        """Write a new record, whose id is given by the ledger; returns it with that."""
        values = _values(record)
        names = [name for name in _COLUMNS if name != "id"]
        marks = ", ".join("?" for _ in names)
        with as_state_errors(self.path), self._database:
            cursor = self._database.execute(
                f"INSERT INTO records ({', '.join(names)}) VALUES ({marks})", [values[name] for name in names]
            )
        assert cursor.lastrowid is not None
        return dataclasses.replace(record, id=cursor.lastrowid)

    def skip_to(self, id_: int) -> None:
        """Give new records larger ids than this one."""
        with as_state_errors(self.path), self._database:
            seq = "SELECT max(?, coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'records'), 0))"
            (largest,) = self._database.execute(seq, [id_]).fetchone()
            self._database.execute("DELETE FROM sqlite_sequence WHERE name = 'records'")
            self._database.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('records', ?)", [largest])

    def write(self, records: Iterable[Record]) -> None:
        """Replace these records, all of them or none."""
        names = [name for name in _COLUMNS if name != "id"]
        command = f"UPDATE records SET {', '.join(f'{name} = :{name}' for name in names)} WHERE id = :id"
        with as_state_errors(self.path), self._database:  # commits, or rolls back
            self._database.execute("BEGIN")
            self._database.executemany(command, [_values(record) for record in records])

    def running(self) -> list[Record]:
        with as_state_errors(self.path):
            return list(rows(self._database, "WHERE outcome = ?", [Outcome.RUNNING.value]))

    def of_starter(self, starter: Process, boot_id: str) -> Optional[Record]:
        """The latest record of this starter, which is of this boot of the node."""
        condition = "WHERE pid = ? AND pid_started = ? AND boot_id = ? ORDER BY id DESC LIMIT 1"
        with as_state_errors(self.path):
            return next(rows(self._database, condition, [starter.pid, starter.started, boot_id]), None)

    def forget_before(self, ended_at: float) -> int:
        """Delete the records of jobs that ended before this time; returns how many.

        One whose end is not known, as of a job that was never counted, goes by its start; one that runs stays.
        """
        with as_state_errors(self.path), self._database:
            return self._database.execute(
                "DELETE FROM records WHERE coalesce(ended_at, started_at) < ? AND outcome != ?",
                [ended_at, Outcome.RUNNING.value],
            ).rowcount

    def check(self) -> None:
        """Raises StateError if the file is no longer where it was: nobody would find what is written."""
        if _identity(self.path) != self._file:
            raise StateError(
                f"{self.path}: the ledger was removed or replaced while vmnoded runs: another one is begun"
            )

    def close(self) -> None:
        self._database.close()


def _identity(path: Path) -> Optional[tuple[int, int]]:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def lock(path: Path) -> int:
    """A descriptor; until it is closed, no other vmnoded writes here: it would end our records. Raises StateError."""
    try:
        held = files.take_lock(path.with_name(f"{path.name}.lock"))
    except OSError as error:
        raise StateError(f"{path}: the ledger cannot be locked: {error}", "see [paths] state_dir") from None
    if held is None:
        hint = "a second instance needs its own [paths] state_dir, too"
        raise StateError(f"{path}: another vmnoded keeps this ledger", hint)
    return held


@contextmanager
def as_state_errors(path: Path, hint: str = "see [paths] state_dir") -> Iterator[None]:
    """Whatever is wrong with the database, or with what shall go in or came out of it: a StateError."""
    try:
        yield
    except (sqlite3.Error, UnicodeError, OverflowError) as error:
        if type(error) is sqlite3.DatabaseError:  # none of its kinds: SQLITE_CORRUPT, SQLITE_NOTADB
            raise StateError(f"{path}: the ledger is damaged: {error}", _ASIDE) from None
        raise StateError(f"{path}: the ledger cannot be used: {error}", hint) from None


def of_another_version(path: Path) -> StateError:
    return StateError(f"{path}: the ledger was written by another version of vmnode", f"use that version, or {_ASIDE}")


def _values(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(record, name) for name in _PLAIN if hasattr(record, name)}
    values.update(pid=record.starter.pid, pid_started=record.starter.started, outcome=record.outcome.value)
    for name in _USAGES:
        usage: Optional[Usage] = getattr(record, name)
        counts: list[Optional[int]] = [None] * 8 if usage is None else [count for traffic in usage for count in traffic]
        start = 8 * _USAGES.index(name)
        values.update(zip(_COUNTS[start : start + 8], counts))
    return values


def rows(
    database: sqlite3.Connection, rest: str, arguments: Union[Sequence[Any], Mapping[str, Any]]
) -> Iterator[Record]:
    """The records that an SQL text after FROM selects. Raises what `as_state_errors` understands."""
    for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM records {rest}", arguments):
        values = dict(zip(_PLAIN, row))
        counts = row[len(_PLAIN) :]
        try:
            if not all(type(value) in kinds for value, kinds in zip(row, _KINDS)):
                raise ValueError("a value has the wrong type")
            if not all(0 <= (values[name] or 0) < _LAST_TIME for name in _TIMES):
                raise ValueError("a time is none")
            starter = Process(values.pop("pid"), values.pop("pid_started"))
            outcome = Outcome(values.pop("outcome"))
            usages = [_usage(counts[first : first + 8]) for first in range(0, len(counts), 8)]
        except (ValueError, TypeError) as error:
            raise sqlite3.DatabaseError(f"record {row[0]}: {error}") from None
        yield Record(**values, **dict(zip(_USAGES, usages)), starter=starter, outcome=outcome)  # type: ignore[arg-type]


def _usage(counts: Sequence[Optional[int]]) -> Optional[Usage]:
    """Of the eight columns of one usage; TypeError if some are NULL and others not, or hold no numbers."""
    if counts[0] is None:
        return None
    sum(counts)  # type: ignore[arg-type]  # that is the fast way to find out
    return Usage(Traffic(*counts[0:2]), Traffic(*counts[2:4]), Traffic(*counts[4:6]), Traffic(*counts[6:8]))  # type: ignore[arg-type]
