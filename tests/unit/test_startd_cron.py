"""vmnode-startd-cron as the startd runs it: what is printed, whatever it finds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.samples import conditions
from vmnode.commands import startd_cron
from vmnode.conditions import Now, Status
from vmnode.host import clock
from vmnode.report.state import Snapshot, write

HOOK = [sys.executable, "-m", "vmnode.commands.startd_cron"]
ROOT = Path(__file__).parents[2]


def hook(*arguments: str, run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    config = run_dir / "vmnode.toml"
    if not config.exists():
        config.write_text(f'[paths]\nrun_dir = "{run_dir}"\n')
    return subprocess.run(
        [*HOOK, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        env={**os.environ, "VMNODE_CONFIG": str(config), **environment},
    )


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """A run_dir whose lock is held, as by a living vmnoded."""
    with open(tmp_path / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield tmp_path


def publish(run_dir: Path, checked: Now, **statuses: Status) -> bytes:
    data = write(Snapshot(conditions(**statuses), (), checked), 900)
    (run_dir / "state.json").write_bytes(data)
    return data


def ad_of(printed: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in printed.splitlines() if not line.startswith("-"))


def test_the_published_ad_is_printed_as_it_stands(daemon: Path) -> None:
    state = json.loads(publish(daemon, clock.now()))
    ran = hook(run_dir=daemon)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert [line.partition(" = ")[0] for line in lines[:-1]] == [line.partition(" = ")[0] for line in state["classad"]]
    assert [line for line in lines[:-1] if "LastCheck =" not in line] == [
        line for line in state["classad"] if "LastCheck =" not in line
    ]
    assert lines[-1].startswith("-") and lines[-1].endswith("update:false")


@pytest.mark.parametrize("step", [0, 3600, -3600])
def test_a_clock_step_neither_freezes_nor_ages_the_ad(daemon: Path, step: float) -> None:
    """The state was written 30 s ago, when the wall clock was `step` ahead of what it is now."""
    now = clock.now()
    publish(daemon, Now(now.wall - 30 + step, now.boot - 30, now.boot_id))
    last_check = int(ad_of(hook(run_dir=daemon).stdout)["VMNodeLastCheck"])
    assert abs(time.time() - 30 - last_check) < 10


def unknown(ran: subprocess.CompletedProcess[str]) -> str:
    """The reason of an ad that claims nothing."""
    ad = ad_of(ran.stdout)
    assert ad["HasVirshDefaultNetwork"] == "undefined" and ad["VMNodeState"] == '"Unknown"'
    assert "Traceback" not in ran.stderr
    return ad["VMNodeReason"]


def test_without_a_daemon_nothing_is_claimed(tmp_path: Path) -> None:
    publish(tmp_path, clock.now())
    ran = hook(run_dir=tmp_path)
    assert ran.returncode == 0
    assert unknown(ran) == '"vmnode: the daemon does not run"'


def test_a_daemon_that_has_published_nothing(daemon: Path) -> None:
    assert "has published nothing" in unknown(hook(run_dir=daemon))


@pytest.mark.parametrize("checked", [Now(1, 1, "another boot"), Now(1e10, 1e10, "")])
def test_a_check_of_another_boot_or_of_the_future_is_none(daemon: Path, checked: Now) -> None:
    publish(daemon, checked._replace(boot_id=checked.boot_id or clock.now().boot_id))
    assert "no check since the node was booted" in unknown(hook(run_dir=daemon))


def test_a_file_of_another_version(daemon: Path) -> None:
    data = publish(daemon, clock.now())
    (daemon / "state.json").write_bytes(data.replace(b'"version": 1', b'"version": 2'))
    assert "another version" in unknown(hook(run_dir=daemon))


def test_a_run_dir_that_is_none_is_told_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{tmp_path}/vmnode.toml"\n')
    ran = hook(run_dir=tmp_path)
    assert ran.returncode == 0
    unknown(ran)


def test_a_wrong_configuration_is_told_to_the_pool_and_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "vmnode.toml").write_text("[paths]\nrun_dir = 3\n")
    ran = hook(run_dir=tmp_path)
    assert ran.returncode == 78
    assert "[paths] run_dir = 3: must be an absolute path" in ran.stderr
    assert "configuration" in unknown(ran)


@pytest.mark.parametrize("arguments", [["--bogus"], ["--config"], ["x"]])
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    ran = hook(*arguments, run_dir=tmp_path)
    assert ran.returncode == 64
    assert ran.stdout == "" and "usage: vmnode-startd-cron" in ran.stderr


def test_help(tmp_path: Path) -> None:
    ran = hook("--help", run_dir=tmp_path)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: vmnode-startd-cron")


@pytest.mark.parametrize(
    ("main", "drop_in", "expected"),
    [
        ("", "", "/run/vmnode"),
        ('[paths]\nrun_dir = "/run/a"\n', "", "/run/a"),
        ("", '[paths]\nrun_dir = "/run/b"\n', "/run/b"),
        ('[paths]\nrun_dir = "/run/a"\n', '[paths]\nrun_dir = "/run/b"\n', "/run/b"),
        ('# run_dir = "/run/a"\n', "", "/run/vmnode"),
    ],
)
def test_where_it_looks(main: str, drop_in: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "vmnode.toml").write_text(main)
    (tmp_path / "conf.d" / "1.toml").write_text(drop_in)
    assert startd_cron.run_dir_of(str(tmp_path / "vmnode.toml")) == expected


def test_what_is_worth_an_update_is_all_but_the_time_and_the_figures_in_a_reason() -> None:
    told = startd_cron.substance(["VMNodeLastCheck = 1", 'VMNodeReason = "3.1 GiB free"', "A = 1"])
    assert told == startd_cron.substance(["VMNodeLastCheck = 2", 'VMNodeReason = "2.9 GiB free"', "A = 1"])
    assert told != startd_cron.substance(["VMNodeLastCheck = 1", 'VMNodeReason = "3.1 GiB free"', "A = 2"])


@pytest.mark.parametrize(("max_age_s", "refresh_s"), [(900, 60), (60, 15), (2, 1)])
def test_the_ad_is_printed_again_long_before_it_expires(max_age_s: int, refresh_s: float, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(write(Snapshot(conditions(), (), clock.now()), max_age_s))
    assert startd_cron.published(str(tmp_path))[1] == refresh_s


WRITTEN = write(Snapshot(conditions(), (), clock.now()), 900)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_damaged_state_file_is_an_ad_all_the_same(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(WRITTEN)
    start = data.draw(st.integers(0, len(damaged) - 1))
    damaged[start : start + data.draw(st.integers(0, 300))] = data.draw(st.binary(max_size=20))
    (tmp_path / "state.json").write_bytes(damaged)
    lines, refresh_s = startd_cron.published(str(tmp_path))
    assert lines and all("\n" not in line for line in lines)
    assert 1 <= refresh_s <= 60


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"classad": [', b'"classad": "HasVirshDefaultNetwork = true", "old": ['),
        (b'"classad": [', b'"classad": {"a": 1}, "old": ['),
        (b'"classad": [', b'"classad": [1, '),
        (b'"boot": ', b'"boot": NaN, "old": '),
        (b'"boot": ', b'"boot": -Infinity, "old": '),
        (b'"boot": ', b'"boot": "1", "old": '),
        (b'"checked": {', b'"checked": [], "old": {'),
        (b"{", b"[" * 100_000 + b"{"),
        (b'"max_age_s": ', b'"max_age_s": "900", "old": '),
    ],
    ids=lambda text: text[:20].decode(),
)
def test_values_of_a_wrong_type_are_damage(old: bytes, new: bytes, tmp_path: Path) -> None:
    assert old in WRITTEN
    (tmp_path / "state.json").write_bytes(WRITTEN.replace(old, new, 1))
    assert startd_cron.published(str(tmp_path))[0][0] == "HasVirshDefaultNetwork = undefined"


@pytest.mark.parametrize("name", ["state.json", "lock"])
def test_a_pipe_in_the_place_of_a_file_holds_up_nothing(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    printed = hook(run_dir=tmp_path)  # has a deadline
    assert ad_of(printed.stdout)["HasVirshDefaultNetwork"] == "undefined"
    assert (printed.returncode, printed.stderr) == (0, "")


def test_no_file_is_read_without_end(daemon: Path) -> None:
    (daemon / "state.json").symlink_to("/dev/zero")
    printed = hook(run_dir=daemon)
    assert ad_of(printed.stdout)["VMNodeReason"] == '"vmnode: the state file is damaged"'


def test_a_lock_that_is_a_loop_of_links_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("lock")
    printed = hook(run_dir=tmp_path)
    assert ad_of(printed.stdout)["VMNodeReason"] == '"vmnode: the daemon does not run"'
    assert (printed.returncode, printed.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["--continuous"]])
@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_an_output_that_takes_nothing_is_74_and_no_traceback(arguments: list[str], stdout: str, daemon: Path) -> None:
    (daemon / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{daemon}"\n')
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {stdout}', "sh", *HOOK, "--config", str(daemon / "vmnode.toml"), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
    )
    assert ran.returncode == 74
    assert "Traceback" not in ran.stderr


def test_a_pipe_that_does_not_wait_gets_every_block_whole(daemon: Path) -> None:
    data = publish(daemon, clock.now())
    (daemon / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{daemon}"\n')
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 1024)
    with subprocess.Popen([*HOOK, "--config", str(daemon / "vmnode.toml")], stdout=writer, cwd=ROOT) as running:
        os.close(writer)
        time.sleep(0.5)  # long enough to find the pipe full
        with open(reader, encoding="utf-8") as lines:
            printed = [line for line in lines.read().splitlines() if line]
    assert running.returncode == 0
    assert len(printed) == len(json.loads(data)["classad"]) + 1
    assert printed[-1] == "- update:false"
