"""The ledger's promises: written whole, read by root and a group beside the daemon and without it, and never a zero for
what was not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmnode.accounting.ledger import VERSION, Ledger
from vmnode.accounting.query import AT_ONCE, Selection, Sum, find, sums
from vmnode.accounting.record import NEVER_COUNTED, Outcome, Process, Record, counted, ended, restarted
from vmnode.errors import StateError, UsageError
from vmnode.usage import NONE, Traffic, Usage, plus, shrank, since

GROUP = 54321  # of the readers in these tests; needs no name
NOBODY = 65534
ROOT = Path(__file__).parents[2]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")


def usage(first: int = 1) -> Usage:
    """Eight different counts, so that none can stand for another."""
    return Usage(*(Traffic(first + 2 * i, first + 2 * i + 1) for i in range(4)))


def record(**changes: Any) -> Record:
    made = Record(
        id=0,
        boot_id="8a1b9c3e-0f6d-4a55-9f2b-1c2d3e4f5a6b",
        link="vmnj12ab1",
        number=2,
        starter=Process(4242, 99_000),
        slot="slot1_1",
        started_at=1_790_000_000.0,
        seen_at=1_790_000_005.0,
        job="submit.example.org#123.0#1789999990",
        owner="alice@example.org",
        universe=5,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A state_dir that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="vmnode-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(path)) as opened:
        yield opened


# --- records ------------------------------------------------------------------------------------------------------


def test_counts_are_added_up_from_look_to_look() -> None:
    seen = counted(counted(record(), usage(10), now=100.0), usage(25), now=105.0)
    assert seen.usage == usage(25)
    assert (seen.read, seen.seen_at, seen.partial_since) == (usage(25), 105.0, None)


def test_counters_that_began_anew_leave_a_gap_and_never_a_zero() -> None:
    before = counted(record(), Usage(*[Traffic(1000, 10)] * 4), now=100.0)
    after = counted(before, Usage(*[Traffic(30, 1)] * 4), now=105.0)
    assert after.usage == Usage(*[Traffic(1030, 11)] * 4)
    assert after.partial_since == 100.0  # the last look at the old counts


def test_one_direction_that_began_anew_does_not_count_the_others_twice() -> None:
    before = counted(record(), Usage(*[Traffic(1000, 10)] * 4), now=100.0)
    reading = Usage(Traffic(1000, 10), Traffic(1500, 15), Traffic(40, 1), Traffic(1000, 10))
    after = counted(before, reading, now=105.0)
    assert after.usage == Usage(Traffic(1000, 10), Traffic(1500, 15), Traffic(1040, 11), Traffic(1000, 10))
    assert after.partial_since == 100.0


def test_packets_alone_tell_of_a_new_beginning() -> None:
    """Ten small packets before, one that is as large as all of them after."""
    before = counted(record(), Usage(lan_in=Traffic(600, 10)), now=100.0)
    after = counted(before, Usage(lan_in=Traffic(1400, 1)), now=105.0)
    assert after.usage == Usage(lan_in=Traffic(2000, 11))
    assert after.partial_since == 100.0


def test_the_first_gap_is_the_one_that_is_told() -> None:
    seen = counted(record(), usage(10), now=100.0)
    seen = counted(restarted(seen), usage(5), now=105.0)
    seen = counted(restarted(seen), usage(7), now=110.0)
    assert seen.partial_since == 100.0
    assert seen.usage == plus(plus(usage(10), usage(5)), usage(7))


def test_counts_after_a_known_new_beginning_count_whole_however_large_they_are() -> None:
    seen = restarted(counted(record(), usage(10), now=100.0))
    assert counted(seen, usage(50), now=105.0).usage == plus(usage(10), usage(50))


@pytest.mark.parametrize("outcome", NEVER_COUNTED)
def test_a_job_that_was_never_counted_has_no_numbers(outcome: Outcome) -> None:
    over = ended(record(), outcome, 1_790_000_060.0, "vmnoded did not answer")
    assert (over.usage, over.total, over.ended_at) == (None, None, 1_790_000_060.0)


@pytest.mark.parametrize(
    ("sandbox", "guest", "total"),
    [
        (Usage(Traffic(1, 2)), None, Usage(Traffic(1, 2))),
        (Usage(Traffic(1, 2)), Usage(Traffic(10, 20)), Usage(Traffic(11, 22))),
        (None, Usage(Traffic(10, 20)), Usage(Traffic(10, 20))),
        (None, None, None),
    ],
)
def test_the_total_is_of_what_was_counted(sandbox: Any, guest: Any, total: Any) -> None:
    assert record(usage=sandbox, guest=guest).total == total


def test_what_came_since_is_found_for_each_direction() -> None:
    assert since(NONE, usage(3)) == usage(3)
    assert since(Usage(Traffic(5, 5), Traffic(9, 1)), Usage(Traffic(7, 6), Traffic(3, 1))) == Usage(
        Traffic(2, 1), Traffic(3, 1)
    )
    assert shrank(Usage(wan_out=Traffic(1, 1)), Usage(wan_out=Traffic(1, 2)))
    assert not shrank(usage(3), usage(3))


# --- what is written is read again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"usage": usage(), "read": usage(10), "guest": usage(20), "guest_read": usage(30), "universe": 13},
        {"usage": None, "outcome": Outcome.EXEMPT, "ended_at": 1_790_000_001.5, "why": "as configured"},
        {"usage": None, "guest": usage(5), "outcome": Outcome.UNACCOUNTED},
        {"outcome": Outcome.RECOVERED, "partial_since": 1_790_000_000.25},
        {"job": "", "owner": "", "universe": None, "link": ""},
        {"owner": "Zoë\x1b[31m'; DROP TABLE records; --\0end", "slot": "slot1_1\n"},
        {"usage": Usage(*[Traffic(2**63 - 1, 2**63 - 1)] * 4)},
    ],
)
def test_a_record_comes_back_as_it_was(changes: dict[str, Any], ledger: Ledger) -> None:
    added = ledger.add(record(**changes))
    assert added == record(**changes, id=1)
    assert list(find(ledger.path)) == [added]
    later = dataclasses.replace(added, seen_at=1_790_000_009.0, why="later", guest=usage(70))
    ledger.write([later])
    assert list(find(ledger.path)) == [later]


def test_each_count_has_a_column_of_its_own_and_of_its_name(ledger: Ledger) -> None:
    ledger.add(record(usage=usage(1), read=usage(11), guest=usage(21), guest_read=usage(31)))
    with contextlib.closing(sqlite3.connect(ledger.path)) as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute("SELECT * FROM records").fetchone())
    assert [row[f"usage_{name}"] for name in ("lan_in_bytes", "lan_in_packets", "lan_out_bytes")] == [1, 2, 3]
    assert [row[f"usage_wan_{name}"] for name in ("in_bytes", "in_packets", "out_bytes", "out_packets")] == [5, 6, 7, 8]
    assert (row["read_lan_in_bytes"], row["guest_lan_in_bytes"], row["guest_read_wan_out_packets"]) == (11, 21, 38)


def test_numbers_of_records_never_come_back(path: Path) -> None:
    """The names of links are made of them."""
    with contextlib.closing(Ledger(path)) as ledger:
        first = ledger.add(record(outcome=Outcome.COMPLETE, ended_at=1.0))
        second = ledger.add(record(outcome=Outcome.COMPLETE, ended_at=1.0))
        assert ledger.forget_before(2.0) == 2
    with contextlib.closing(Ledger(path)) as ledger:
        assert (first.id, second.id, ledger.add(record()).id) == (1, 2, 3)


def test_what_runs_is_found_after_a_restart(path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        ledger.add(record(outcome=Outcome.COMPLETE))
        runs = ledger.add(record(usage=usage()))
    with contextlib.closing(Ledger(path)) as ledger:
        assert ledger.running() == [runs]


def test_retention_goes_by_the_end_of_a_job_and_spares_what_runs(ledger: Ledger) -> None:
    old = ledger.add(record(started_at=100.0, ended_at=200.0, outcome=Outcome.COMPLETE))
    long = ledger.add(record(started_at=100.0, ended_at=900.0, outcome=Outcome.COMPLETE))
    runs = ledger.add(record(started_at=100.0))
    unseen = ledger.add(record(started_at=400.0, outcome=Outcome.EXEMPT, usage=None))
    assert ledger.forget_before(300.0) == 1
    assert {one.id for one in find(ledger.path)} == {long.id, runs.id, unseen.id} and old.id == 1
    assert ledger.forget_before(800.0) == 1
    assert {one.id for one in find(ledger.path)} == {long.id, runs.id}


# --- whole or not at all ------------------------------------------------------------------------------------------

WRITER = """
import dataclasses, sys
from pathlib import Path
from tests.unit.test_ledger import record
from vmnode.accounting.ledger import Ledger
from vmnode.usage import Traffic, Usage

ledger = Ledger(Path(sys.argv[1]), *map(int, sys.argv[2:]))
records = ledger.running() or [ledger.add(record()) for _ in range(40)]
round = records[0].usage.lan_in.bytes
print("ready", flush=True)
while True:
    round += 1
    records = [dataclasses.replace(one, usage=Usage(*[Traffic(round, round)] * 4)) for one in records]
    ledger.write(records)
"""


def test_a_writer_that_is_killed_leaves_all_of_a_round_or_nothing_of_it(path: Path) -> None:
    last = 0
    for delay in (0.0, 0.011, 0.023, 0.05, 0.1):
        with writing(path):
            time.sleep(delay)
        seen = {one.usage for one in find(path)}
        assert len(seen) == 1
        rounds = {count for one in seen if one for traffic in one for count in traffic}
        assert len(rounds) == 1 and min(rounds) >= last
        last = min(rounds)
    with contextlib.closing(Ledger(path)) as ledger:
        assert len(ledger.running()) == 40
    assert last > 0


@contextlib.contextmanager
def writing(path: Path, *group: int) -> Iterator[None]:
    """A process that writes all the time, until it is killed."""
    command = [sys.executable, "-c", WRITER, str(path), *map(str, group)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        yield
    finally:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()


def test_a_round_with_one_bad_record_is_not_written(ledger: Ledger) -> None:
    good, bad = ledger.add(record()), ledger.add(record())
    for broken in ({"owner": "\udc80"}, {"usage": Usage(Traffic(2**63, 0))}):
        with pytest.raises(StateError, match="the ledger cannot be used"):
            ledger.write([dataclasses.replace(good, why="new"), dataclasses.replace(bad, **broken)])
        with pytest.raises(StateError, match="the ledger cannot be used"):
            ledger.add(record(**broken))
        assert list(find(ledger.path)) == [good, bad]
    ledger.write([dataclasses.replace(good, why="new")])
    assert [one.why for one in find(ledger.path)] == ["new", ""]


def test_a_disk_that_is_full_is_an_error_and_leaves_what_was_there(path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk."""
    code = """
import resource, sys
from pathlib import Path
from tests.unit.test_ledger import record
from vmnode.accounting.ledger import Ledger
from vmnode.errors import StateError

ledger = Ledger(Path(sys.argv[1]))
first = ledger.add(record())
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
added = 1
try:
    while True:
        ledger.add(record(why="x" * 5000))
        added += 1
except StateError as error:
    assert "the ledger cannot be used" in str(error), error
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.add(first)
print(added + 1)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert len(list(find(path))) == int(ran.stdout) > 2


# --- who may read -------------------------------------------------------------------------------------------------


def test_the_ledger_is_for_its_owner_alone_if_there_is_no_group(directory: Path, ledger: Ledger) -> None:
    ledger.add(record())
    assert modes(directory) == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}


@needs_root
def test_the_ledger_is_for_root_and_the_group(directory: Path, path: Path) -> None:
    with contextlib.closing(Ledger(path, GROUP)) as ledger:
        ledger.add(record())
        assert modes(directory) == {"ledger.db": 0o640, "ledger.db-wal": 0o640, "ledger.db-shm": 0o640}
        assert {(file.stat().st_uid, file.stat().st_gid) for file in directory.iterdir()} == {(0, GROUP)}


@needs_root
def test_a_group_that_comes_later_may_read_too(directory: Path, path: Path) -> None:
    Ledger(path).close()
    with contextlib.closing(Ledger(path, GROUP)) as ledger:
        ledger.add(record())
        assert set(modes(directory).values()) == {0o640}
        assert len(as_reader(path)["records"]) == 1


def modes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o7777 for file in directory.iterdir()}


def as_reader(path: Path, group: int = GROUP) -> Any:
    """What an ordinary user finds: {"records": [[id, bytes of lan_in], …]} or {"error": …, "status": …}."""
    code = f"""
import json, os, sys
from pathlib import Path
from vmnode.accounting.query import find, sums
from vmnode.errors import VmnodeError
os.setgroups([{group}]); os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    found = [[one.id, one.usage.lan_in.bytes] for one in find(Path(sys.argv[1]))]
    summed = [one.jobs for one in sums(Path(sys.argv[1]), "user")]
    assert sum(summed) == len(found), summed
    print(json.dumps({{"records": found}}))
except VmnodeError as error:
    print(json.dumps({{"error": error.what, "status": error.exit_status}}))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@needs_root
def test_a_user_of_the_group_reads_beside_the_daemon_without_it_and_after_it_was_killed(path: Path) -> None:
    with contextlib.closing(Ledger(path, GROUP)) as ledger:
        one = ledger.add(record(usage=usage(7)))
        assert as_reader(path) == {"records": [[1, 7]]}
        ledger.write([dataclasses.replace(one, usage=usage(9))])
        assert as_reader(path) == {"records": [[1, 9]]}
    assert not Path(f"{path}-wal").exists()
    assert as_reader(path) == {"records": [[1, 9]]}
    assert not Path(f"{path}-wal").exists()
    with writing(path, GROUP):
        pass
    assert Path(f"{path}-wal").exists()
    assert len(as_reader(path)["records"]) == 1  # the writer went on with what ran


@needs_root
@pytest.mark.parametrize("left", [b"", b"\x37\x7f\x06\x82" + bytes(28)])
def test_a_wal_with_nothing_in_it_is_in_nobody_s_way(left: bytes, path: Path) -> None:
    """A daemon that is killed may leave one, and root's own readers do; who may not write cannot use it."""
    with contextlib.closing(Ledger(path, GROUP)) as ledger:
        ledger.add(record(usage=usage(7)))
    for name, content in (("wal", left), ("shm", bytes(32768))):
        file = Path(f"{path}-{name}")
        file.write_bytes(content)
        os.chown(file, 0, GROUP)
        file.chmod(0o640)
    assert as_reader(path) == {"records": [[1, 7]]}


@needs_root
def test_what_only_the_wal_holds_is_read_also_if_a_reader_was_the_last_to_close(path: Path) -> None:
    ledger = Ledger(path, GROUP)
    reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    assert reader.execute("SELECT count(*) FROM records").fetchone() == (0,)
    ledger.add(record(usage=usage(7)))
    ledger.close()
    reader.close()
    assert as_reader(path) == {"records": [[1, 7]]}


@needs_root
def test_others_may_not_read_and_are_told_who_may(directory: Path, path: Path) -> None:
    refused = {"error": f"{path}: the ledger cannot be read", "status": 77}
    with contextlib.closing(Ledger(path, GROUP)):
        assert as_reader(path, NOBODY) == refused
    assert as_reader(path, NOBODY) == refused
    directory.chmod(0o700)
    assert as_reader(path) == refused


def test_a_reader_neither_writes_nor_leaves_files(directory: Path, path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        ledger.add(record())
    before = path.stat()
    assert len(list(find(path))) == 1
    assert [file.name for file in directory.iterdir()] == ["ledger.db"]
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)


def test_readers_see_whole_rounds_while_the_daemon_writes(path: Path) -> None:
    with writing(path):
        seen = set()
        for _ in range(30):
            usages = {one.usage for one in find(path)}
            assert len(usages) == 1
            seen |= usages
            [one] = sums(path, "user")
            assert one.usage is not None and one.usage.lan_in.bytes % 40 == 0
        assert len(seen) > 1


def test_readers_do_not_stumble_over_a_daemon_that_comes_and_goes(path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        ledger.add(record())
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with contextlib.closing(Ledger(path)) as ledger:
                ledger.write(ledger.running())

    daemon = threading.Thread(target=come_and_go)
    daemon.start()
    try:
        for _ in range(200):
            try:
                assert len(list(find(path))) == 1
            except StateError as error:
                assert "try again" in error.hint
    finally:
        stop.set()
        daemon.join()


def test_a_reader_that_waits_does_not_keep_the_wal_from_being_emptied(path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        runs = [ledger.add(record()) for _ in range(AT_ONCE + 1)]
        waiting = find(path)
        next(waiting)
        with contextlib.closing(sqlite3.connect(path)) as other:
            ledger.write(runs[:10])
            busy, in_wal, emptied = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (busy, in_wal, emptied) == (0, 0, 0)
        assert len(list(waiting)) == AT_ONCE


# --- what is not a ledger -----------------------------------------------------------------------------------------


def test_a_ledger_that_is_not_there_is_one_sentence(path: Path) -> None:
    with pytest.raises(StateError, match=r"there is no ledger \(No such file") as raised:
        find(path)
    assert "[accounting] enabled" in raised.value.hint
    with pytest.raises(StateError, match="there is no ledger"):
        sums(path, "user")
    with pytest.raises(StateError, match="there is no ledger"):
        find(path / "below" / "a" / "missing" / "directory")


def test_what_is_no_file_is_not_waited_for(directory: Path, path: Path) -> None:
    os.mkfifo(path)
    for strange in (path, directory):
        with pytest.raises(StateError, match="is not a file"):
            find(strange)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 100, b"\0" * 8192])
def test_a_file_that_is_no_database_is_damaged_for_both_ends(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    for use in (find, Ledger):
        with pytest.raises(StateError, match="the ledger is damaged") as raised:
            use(path)
        assert "move it and the files beside it" in raised.value.hint
    assert path.read_bytes() == content


def test_an_empty_file_is_no_ledger_yet_and_the_daemon_makes_it_one(path: Path) -> None:
    path.touch()
    with pytest.raises(StateError, match="this is no ledger"):
        find(path)
    Ledger(path).close()
    assert list(find(path)) == []


def test_the_ledger_of_another_version_is_left_alone(path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        ledger.add(record())
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    content = path.read_bytes()
    for use in (find, Ledger, lambda path: sums(path, "day")):
        with pytest.raises(StateError, match="another version of vmnode") as raised:
            use(path)
        assert "move it" in raised.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize("part", [1, 5, 9])
def test_a_page_that_was_overwritten_is_damage(part: int, path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        for _ in range(100):
            ledger.add(record(why="x" * 500))
    content = bytearray(path.read_bytes())
    content[part * 4096 : part * 4096 + 200] = b"\xee" * 200
    path.write_bytes(content)
    with pytest.raises(StateError, match="the ledger is damaged"):
        list(find(path))


def test_a_file_that_was_cut_off_is_damage(path: Path) -> None:
    with contextlib.closing(Ledger(path)) as ledger:
        for _ in range(100):
            ledger.add(record(why="x" * 500))
    os.truncate(path, 3 * 4096)
    with pytest.raises(StateError, match="the ledger is damaged"):
        list(find(path))


@pytest.mark.parametrize(
    "change",
    [
        "outcome = 'nonsense'",
        "usage_lan_out_packets = NULL",
        "usage_wan_out_bytes = 'many'",
        "started_at = 'noon'",
        "started_at = 1e300",
        "ended_at = -1e300",
        "owner = x'00ff'",
        "universe = 'vanilla'",
    ],
)
def test_a_row_that_makes_no_sense_is_damage_and_is_named(change: str, ledger: Ledger) -> None:
    ledger.add(record())
    ledger.add(record())
    with contextlib.closing(sqlite3.connect(ledger.path)) as database, database:
        database.execute(f"UPDATE records SET {change} WHERE id = 2")
    with pytest.raises(StateError, match="the ledger is damaged: record 2: "):
        find(ledger.path)
    with pytest.raises(StateError, match="the ledger is damaged: record 2: "):
        ledger.running()
        list(find(ledger.path))


def test_a_lock_that_somebody_holds_is_an_error_and_no_end(ledger: Ledger) -> None:
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateError, match="database is locked"):
            ledger.add(record())
        other.execute("ROLLBACK")
    assert ledger.add(record()).id == 1


# --- questions ----------------------------------------------------------------------------------------------------


def add_some(ledger: Ledger) -> None:
    for number, (owner, job, started_at) in enumerate(
        [
            ("alice@example.org", "a.example.org#12.0#1789999990", 100.0),
            ("alice@other.org", "a.example.org#12.1#1789999990", 200.0),
            ("alice2@example.org", "b.example.org#112.0#1789999990", 150.0),
            ("", "", 300.0),
            ("al%ce", "b.example.org#12.0#1", 400.0),
        ]
    ):
        ledger.add(record(owner=owner, job=job, started_at=started_at, usage=usage(number)))


@pytest.mark.parametrize(
    ("selection", "ids"),
    [
        (Selection(), [1, 3, 2, 4, 5]),  # by their start
        (Selection(owner="alice"), [1, 2]),
        (Selection(owner="alice@example.org"), [1]),
        (Selection(owner="ALICE"), []),
        (Selection(owner="al%ce"), [5]),
        (Selection(owner="' OR 1 --"), []),
        (Selection(owner=""), [4]),
        (Selection(since=150.0), [3, 2, 4, 5]),
        (Selection(since=150.5), [2, 4, 5]),
        (Selection(job="12"), [1, 2, 5]),
        (Selection(job="012.0"), [1, 5]),
        (Selection(job="112"), [3]),
        (Selection(job="2"), []),
        (Selection(job="12.1"), [2]),
        (Selection(job="a.example.org#12.0#1789999990"), [1]),
        (Selection(job="c.example.org#12.0#1789999990"), []),
        (Selection(owner="alice", since=150.0, job="12"), [2]),
        (Selection(record=3), [3]),
        (Selection(record=9), []),
    ],
)
def test_records_are_selected_by_user_start_and_job(selection: Selection, ids: list[int], ledger: Ledger) -> None:
    add_some(ledger)
    assert [one.id for one in find(ledger.path, selection)] == ids
    assert sum(one.jobs for one in sums(ledger.path, "user", selection)) == len(ids)


@pytest.mark.parametrize("job", ["", "12.", ".0", "12.0.0", "twelve", "12 ", "-1", "#12.0#", "a#b", "12%", "١٢"])
def test_what_is_no_name_of_a_job_is_wrong_usage(job: str, ledger: Ledger) -> None:
    for ask in (lambda: find(ledger.path, Selection(job=job)), lambda: sums(ledger.path, "day", Selection(job=job))):
        with pytest.raises(UsageError, match="names no job") as raised:
            ask()
        assert "cluster.proc" in raised.value.hint


def test_more_records_than_are_read_at_once_come_each_once_and_in_order(ledger: Ledger) -> None:
    with contextlib.closing(sqlite3.connect(ledger.path)) as database, database:
        ledger.add(record())
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) INSERT INTO records"
            " (boot_id, link, number, pid, pid_started, slot, started_at, seen_at, job, owner, outcome, why)"
            " SELECT '', '', 0, 0, 0, '', 5000 - i / 3.0, 0, '', '', 'exempt', '' FROM n",
            [2 * AT_ONCE],
        )
    found = [(one.started_at, one.id) for one in find(ledger.path)]
    assert len(found) == 2 * AT_ONCE + 1
    assert found == sorted(set(found))


def test_sums_tell_apart_what_was_counted_not_counted_and_counted_in_part(ledger: Ledger) -> None:
    one = Usage(Traffic(1, 2), Traffic(3, 4), Traffic(5, 6), Traffic(7, 8))
    ten = Usage(*(Traffic(10 * a, 10 * b) for a, b in one))
    ledger.add(record(owner="alice", usage=one))
    ledger.add(record(owner="alice", usage=one, guest=ten, universe=13, outcome=Outcome.COMPLETE))
    ledger.add(record(owner="alice", usage=one, partial_since=5.0, outcome=Outcome.COMPLETE))
    ledger.add(record(owner="alice", usage=one, outcome=Outcome.RECOVERED, why="the node was booted anew"))
    ledger.add(record(owner="alice", usage=None, outcome=Outcome.EXEMPT))
    ledger.add(record(owner="alice", usage=None, guest=ten, universe=13, outcome=Outcome.UNACCOUNTED))
    ledger.add(record(owner="bob", usage=None, outcome=Outcome.OUTSIDE, why="Docker"))
    alice = Usage(Traffic(24, 48), Traffic(72, 96), Traffic(120, 144), Traffic(168, 192))
    assert sums(ledger.path, "user") == [Sum("alice", 6, 1, 3, alice), Sum("bob", 1, 1, 0, None)]


def test_a_day_is_a_local_one(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """1790000000 is 2026-09-21T14:13:20Z."""
    ledger.add(record(started_at=1_790_000_000.0, usage=usage()))
    try:
        for zone, day in (("UTC", "2026-09-21"), ("XYZ-11", "2026-09-22"), ("XYZ15", "2026-09-20")):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert [one.of for one in sums(ledger.path, "day")] == [day]
    finally:
        monkeypatch.undo()
        time.tzset()
