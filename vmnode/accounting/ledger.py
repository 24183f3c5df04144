"""The ledger: <state_dir>/ledger.db, an SQLite database in WAL mode. It is the authority on what jobs used.

Written by the daemon alone; root and the group vmnode may read it, also while it is written. One row for each record;
what is written in one call is there as a whole or not at all, also after a crash of the daemon.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Optional

from vmnode.accounting.record import Outcome, Process, Record
from vmnode.errors import NotPermitted, StateError
from vmnode.usage import Traffic, Usage

FILE = "ledger.db"  # below [paths] state_dir
VERSION = 1
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
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS records ({
    ", ".join([*(f"{name} {kind}" for name, kind in _PLAIN.items()), *(f"{name} INTEGER" for name in _COUNTS)])
});
CREATE INDEX IF NOT EXISTS by_outcome ON records (outcome) WHERE outcome = 'running';
CREATE INDEX IF NOT EXISTS by_start ON records (started_at);
"""


class Ledger:
    """The daemon's end."""

    def __init__(self, path: Path, group: Optional[int] = None) -> None:
        """Open it, or make it; `group` may read it. Raises StateError."""
        self.path = path
        before = os.umask(0o137 if group is not None else 0o177)  # SQLite gives its other files the same mode
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            if group is not None:
                os.chown(path, -1, group)
            with self._database:
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
                version = self._database.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, VERSION):
                    raise StateError(f"{path}: it was written by another version of vmnode", "move it aside")
                self._database.executescript(_SCHEMA)
                self._database.execute(f"PRAGMA user_version = {VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"{path}: the ledger cannot be opened: {error}", "see [paths] state_dir") from None
        finally:
            os.umask(before)

    def add(self, record: Record) -> Record:
        """Write a new record, whose id is given by the ledger; returns it with that."""
        values = _values(record)
        names = [name for name in _COLUMNS if name != "id"]
        marks = ", ".join("?" for _ in names)
        with _as_state_errors(self.path), self._database:
            cursor = self._database.execute(
                f"INSERT INTO records ({', '.join(names)}) VALUES ({marks})", [values[name] for name in names]
            )
        assert cursor.lastrowid is not None
        return dataclasses.replace(record, id=cursor.lastrowid)

    def write(self, records: Iterable[Record]) -> None:
        """Replace these records, all of them or none."""
        names = [name for name in _COLUMNS if name != "id"]
        command = f"UPDATE records SET {', '.join(f'{name} = :{name}' for name in names)} WHERE id = :id"
        with _as_state_errors(self.path), self._database:  # commits, or rolls back
            self._database.execute("BEGIN")
            self._database.executemany(command, [_values(record) for record in records])

    def running(self) -> list[Record]:
        with _as_state_errors(self.path):
            return list(_rows(self._database, "WHERE outcome = ?", [Outcome.RUNNING.value]))

    def of_starter(self, starter: Process, boot_id: str) -> Optional[Record]:
        """The latest record of this starter, which is of this boot of the node."""
        condition = "WHERE pid = ? AND pid_started = ? AND boot_id = ? ORDER BY id DESC LIMIT 1"
        with _as_state_errors(self.path):
            return next(_rows(self._database, condition, [starter.pid, starter.started, boot_id]), None)

    def forget_before(self, started_at: float) -> int:
        """Delete the ended records of jobs that started before this time; returns how many."""
        with _as_state_errors(self.path), self._database:
            return self._database.execute(
                "DELETE FROM records WHERE started_at < ? AND outcome != ?", [started_at, Outcome.RUNNING.value]
            ).rowcount

    def close(self) -> None:
        self._database.close()


def find(path: Path, condition: str = "", arguments: Sequence[Any] = (), daemon_runs: bool = True) -> list[Record]:
    """The records for which an SQL condition holds, oldest first; for readers. Raises NotPermitted, StateError.

    Without the daemon the files of the WAL are gone, and who may not write cannot make them: SQLite needs to be told
    that nobody writes (https://www.sqlite.org/wal.html#read_only_databases).
    """
    if not path.exists():
        raise StateError(f"{path}: there is no ledger", "see [accounting] enabled, and [paths] state_dir")
    if not os.access(path, os.R_OK):
        raise NotPermitted(f"{path}: the ledger cannot be read", "it is for root and the group vmnode")
    uri = f"{path.absolute().as_uri()}?mode=ro{'' if daemon_runs else '&immutable=1'}"
    with _as_state_errors(path), closing(sqlite3.connect(uri, uri=True)) as database:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise StateError(f"{path}: it was written by another version of vmnode")
        where = f"WHERE {condition} " if condition else ""
        return list(_rows(database, f"{where}ORDER BY started_at, id", arguments))


@contextmanager
def _as_state_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StateError(f"{path}: the ledger cannot be used: {error}") from None


def _values(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(record, name) for name in _PLAIN if hasattr(record, name)}
    values.update(pid=record.starter.pid, pid_started=record.starter.started, outcome=record.outcome.value)
    for name in _USAGES:
        usage: Optional[Usage] = getattr(record, name)
        counts: list[Optional[int]] = [None] * 8 if usage is None else [count for traffic in usage for count in traffic]
        start = 8 * _USAGES.index(name)
        values.update(zip(_COUNTS[start : start + 8], counts))
    return values


def _rows(database: sqlite3.Connection, rest: str, arguments: Sequence[Any]) -> Iterator[Record]:
    for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM records {rest}", arguments):
        values = dict(zip(_PLAIN, row))
        starter = Process(values.pop("pid"), values.pop("pid_started"))
        outcome = Outcome(values.pop("outcome"))
        counts = row[len(_PLAIN) :]
        usages: dict[str, Any] = {name: _usage(counts[8 * i : 8 * i + 8]) for i, name in enumerate(_USAGES)}
        yield Record(**values, **usages, starter=starter, outcome=outcome)


def _usage(counts: Sequence[Optional[int]]) -> Optional[Usage]:
    if counts[0] is None:
        return None
    return Usage(*(Traffic(counts[i] or 0, counts[i + 1] or 0) for i in range(0, 8, 2)))
