"""vmnode-startd-cron --usage: what the startd is told about running jobs, and when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import classad2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnode.host import files
from vmnode.report.samples import Sample, Told, news, read

ROOT = Path(__file__).parents[2]
HOOK = [sys.executable, "-m", "vmnode.commands.startd_cron", "--usage"]
ONE = "ap#1.0#1790000000"
TWO = "ap#1.1#1790000000"


def document(**slots: tuple[str, int]) -> bytes:
    """usage.json, where a job has used n, n + 1, n + 2 and n + 3 bytes."""
    entries = {
        slot: {"job": job, "lan_in": n, "lan_out": n + 1, "wan_in": n + 2, "wan_out": n + 3}
        for slot, (job, n) in slots.items()
    }
    return json.dumps({"version": 1, "slots": entries}).encode()


def sample(job: str, n: int) -> Sample:
    return read(document(slot1_1=(job, n)))["slot1_1"]


class Startd:
    """What a startd makes of the blocks: each replaces the ad of its tag (startd_cron_job.cpp, Publish)."""

    def __init__(self) -> None:
        self._ads: dict[str, classad2.ClassAd] = {}
        self.pushed = False

    def take(self, lines: list[str]) -> None:
        pending: list[str] = []
        self.pushed = False
        for line in lines:
            if not line.startswith("-"):
                pending.append(line)
                continue
            dash, tag, update = line.split(" ")
            assert dash == "-" and update in ("update:true", "update:false")
            self._ads[tag] = classad2.ClassAd("[" + ";".join(pending) + "]")
            self.pushed |= update == "update:true"
            pending = []
        assert not pending

    def of(self, job: Optional[str]) -> dict[str, int]:
        """The attributes that a slot with this job gets."""
        slot = classad2.ClassAd({"GlobalJobId": job} if job else {})
        merged: dict[str, int] = {}
        for ad in self._ads.values():
            if classad2.ExprTree(str(ad.lookup("SlotMergeConstraint"))).eval(slot) is True:
                merged.update({name: ad[name] for name in ad if name != "SlotMergeConstraint"})
        return merged


def used(n: int) -> dict[str, int]:
    return {
        "NetLanInBytesUsage": n,
        "NetLanOutBytesUsage": n + 1,
        "NetWanInBytesUsage": n + 2,
        "NetWanOutBytesUsage": n + 3,
    }


def test_a_job_gets_its_own_numbers_and_no_other_slot_gets_them() -> None:
    startd = Startd()
    lines, _ = news("slot1_1", sample(ONE, 1000), None, now=0)
    startd.take(lines)
    assert startd.pushed
    assert startd.of(ONE) == used(1000)
    assert startd.of(TWO) == startd.of(None) == {}


def test_the_next_job_on_a_slot_is_not_charged_with_what_the_one_before_it_used() -> None:
    """Neither before anything is known of it, nor afterwards, though it uses less."""
    startd = Startd()
    lines, told = news("slot1_1", sample(ONE, 1000), None, now=0)
    startd.take(lines)
    assert startd.of(TWO) == {}
    lines, told = news("slot1_1", sample(TWO, 7), told, now=1)
    startd.take(lines)
    assert startd.of(TWO) == used(7)
    assert startd.of(ONE) == {}


def test_a_job_that_starts_anew_on_its_slot_starts_from_its_new_numbers_at_once() -> None:
    startd = Startd()
    _, told = news("slot1_1", sample(ONE, 1000), None, now=0)
    lines, _ = news("slot1_1", sample(ONE, 7), told, now=1)
    startd.take(lines)
    assert startd.of(ONE) == used(7)


def test_of_a_slot_without_a_counted_job_nothing_is_left() -> None:
    startd = Startd()
    lines, told = news("slot1_1", sample(ONE, 1000), None, now=0)
    startd.take(lines)
    lines, told = news("slot1_1", None, told, now=1)
    startd.take(lines)
    assert startd.of(ONE) == {} and not startd.pushed
    assert news("slot1_1", None, told, now=2) == ([], None)


# A job that sends all the time: it is told of at once, after five seconds, after half its age, at last each minute.
TOLD_AT = [0, 5, 10, 15, 23, 35, 53, 80, 120, 180, 240, 300]


def test_a_young_job_is_told_of_often_and_an_old_one_each_minute() -> None:
    told: Optional[Told] = None
    at = []
    for second in range(301):
        lines, told = news("slot1_1", sample(ONE, second), told, second)
        if lines:
            at.append(second)
    assert at == TOLD_AT


def test_a_job_that_does_nothing_is_told_of_until_its_starter_can_have_heard_it() -> None:
    """STARTER_INITIAL_UPDATE_INTERVAL is 8 s; before, the startd writes no ad for it (Resource::refresh_sandbox_ad)."""
    told: Optional[Told] = None
    at = []
    for second in range(200):
        lines, told = news("slot1_1", sample(ONE, 0), told, second)
        if lines:
            at.append(second)
    assert at == [0, 5, 10, 15]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"version": 2, "slots": {}}',
        b'{"version": 1}',
        b'{"version": 1, "slots": []}',
        document(slot1_1=('a"; HasVM = true; b = "', 1)),
        document(slot1_1=("a\nb", 1)),
        document(slot1_1=("a\\", 1)),
        document(slot1_1=(ONE, -5)),
        document(slot1_1=(ONE, 1)).replace(b": 2", b": 2.5"),
        document(slot1_1=(ONE, 1)).replace(b": 2", b": true"),
        document(slot1_1=(ONE, 1)).replace(b": 2", b": NaN"),
    ],
    ids=lambda data: data[:60].decode(),
)
def test_a_file_that_is_not_the_daemon_s_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read(data)


@given(st.binary(max_size=300), st.integers(0, 200), st.integers(0, 60))
def test_a_damaged_file_is_read_or_refused(noise: bytes, start: int, length: int) -> None:
    damaged = bytearray(document(slot1_1=(ONE, 1000), slot1_2=(TWO, 5)))
    damaged[start : start + length] = noise
    try:
        samples = read(bytes(damaged))
    except ValueError:
        return
    for slot, found in samples.items():
        Startd().take(news(slot, found, None, 0)[0])


@pytest.mark.parametrize("slot", ["slot1 1", "", "a:b", "slot1_1\nX = 1", "-"])
def test_a_slot_whose_name_is_no_tag_is_left_out(slot: str) -> None:
    samples = read(document(**{slot: (ONE, 1), "slot1_1": (TWO, 1)}))
    assert set(samples) - {"-"} == {"slot1_1"}


class Hook:
    """The hook as the startd runs it."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{run_dir}"\n')
        self._run_dir = run_dir
        self.process = subprocess.Popen(
            [*HOOK, "--config", str(run_dir / "vmnode.toml")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def publish(self, data: bytes) -> None:
        files.write_atomically(self._run_dir / "usage.json", data)

    def block(self) -> list[str]:
        """The next block that it prints."""
        lines: list[str] = []
        assert self.process.stdout is not None
        while not lines or not lines[-1].startswith("-"):
            lines.append(self.process.stdout.readline().rstrip("\n"))
            assert self.process.poll() is None
        return lines


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    running = Hook(tmp_path)
    yield running
    running.process.kill()
    running.process.communicate()


def test_what_the_daemon_writes_is_told_at_once_and_the_end_too(hook: Hook) -> None:
    startd = Startd()
    hook.publish(document(slot1_1=(ONE, 1000)))
    startd.take(hook.block())
    assert startd.of(ONE) == used(1000)
    hook.publish(document(slot1_2=(TWO, 5)))
    startd.take([*hook.block(), *hook.block()])
    assert startd.of(ONE) == {} and startd.of(TWO) == used(5)


def test_damage_is_logged_once_and_what_was_told_stands(hook: Hook) -> None:
    hook.publish(document(slot1_1=(ONE, 1000)))
    hook.block()
    hook.publish(b"{")
    hook.publish(b"[")
    assert hook.process.stderr is not None
    assert hook.process.stderr.readline().startswith("vmnode-startd-cron: usage.json: ")
    hook.publish(document(slot1_1=(TWO, 7)))
    startd = Startd()
    startd.take(hook.block())  # nothing was printed in between
    assert startd.of(TWO) == used(7)


def test_it_ends_with_the_startd(hook: Hook) -> None:
    hook.publish(document(slot1_1=(ONE, 1000)))
    hook.block()
    assert hook.process.stdout is not None
    hook.process.stdout.close()
    assert hook.process.wait(timeout=10) == 0
