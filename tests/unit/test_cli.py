"""The command line: exit statuses, JSON, colours, and one sentence for whatever is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.samples import conditions
from vmnode import __version__
from vmnode.conditions import NAMES, Now, Status
from vmnode.config import Config, Loaded
from vmnode.host import clock
from vmnode.report.state import Snapshot, write

ROOT = Path(__file__).parents[2]
VMNODE = [sys.executable, "-m", "vmnode.commands.admin"]
VMNODED = [sys.executable, "-m", "vmnode.commands.daemon"]


def as_nobody(module: str) -> list[str]:
    """The command with the rights of nobody, who may not be able to enter the directory that Python lies in."""
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else ""
    return [
        sys.executable,
        "-c",
        f"import os, shutil, sys, encodings.ascii; import vmnode.commands.{module} as c\n{drop}\nsys.exit(c.main())",
    ]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Where an instance of its own would live, for every user to read."""
    directory = Path(tempfile.mkdtemp(prefix="vmnode-test-"))
    directory.chmod(0o755)
    (directory / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{directory}"\n')
    yield directory
    shutil.rmtree(directory)


def run(
    *arguments: str, run_dir: Path, command: list[str] = VMNODE, **environment: str
) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=30,
        cwd=ROOT,
        env={**os.environ, "VMNODE_CONFIG": str(run_dir / "vmnode.toml"), **environment},
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


@pytest.fixture
def publish(run_dir: Path) -> Iterator[Any]:
    """Publishes a check `age` seconds ago, with a living daemon's lock held unless told otherwise."""
    with open(run_dir / "lock", "w") as lock:

        def write_state(age: float = 1.0, alive: bool = True, **statuses: Status) -> None:
            now = clock.now()
            checked = Now(now.wall - age, now.boot - age, now.boot_id)
            (run_dir / "state.json").write_bytes(write(Snapshot(conditions(**statuses), (), checked), 900))
            fcntl.lockf(lock, fcntl.LOCK_EX if alive else fcntl.LOCK_UN)

        yield write_state


# --- exit statuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "status", "state"),
    [
        ({}, 0, "healthy"),
        ({"network_dhcp": Status.FAILED}, 1, "failed"),
        ({"network_dhcp": Status.UNKNOWN}, 2, "unknown"),
        ({"network_dhcp": Status.UNKNOWN, "kvm": Status.FAILED}, 1, "failed"),
        ({"images": Status.DISABLED}, 0, "healthy"),
    ],
)
def test_status_says_how_the_node_is(
    broken: dict[str, Status], status: int, state: str, publish: Any, run_dir: Path
) -> None:
    publish(**broken)
    for arguments in (["status"], ["status", "--json"]):
        ran = run(*arguments, run_dir=run_dir)
        assert (ran.returncode, ran.stderr) == (status, "")
        assert state in ran.stdout


def test_status_needs_no_root(publish: Any, run_dir: Path) -> None:
    publish()
    assert run("status", "--json", run_dir=run_dir, command=as_nobody("admin")).returncode == 0


def test_what_a_dead_daemon_left_is_shown_and_not_believed(publish: Any, run_dir: Path) -> None:
    publish(alive=False)
    ran = run("status", run_dir=run_dir)
    assert ran.returncode == 2
    assert "is unknown" in ran.stdout.splitlines()[0]
    assert "vmnoded does not run" in ran.stdout and "network.dhcp" in ran.stdout
    document = json.loads(run("status", "--json", run_dir=run_dir).stdout)
    assert document["state"] == "unknown"
    assert document["attributes"]["HasVirshDefaultNetwork"] is None
    assert {entry["status"] for entry in document["conditions"]} <= {"unknown", "disabled"}


def test_a_check_that_is_too_old_is_shown_and_not_believed(publish: Any, run_dir: Path) -> None:
    publish(age=901)
    ran = run("status", run_dir=run_dir)
    assert ran.returncode == 2
    assert "too old" in ran.stdout
    assert json.loads(run("status", "--json", run_dir=run_dir).stdout)["state"] == "unknown"
    publish(age=890)
    assert run("status", run_dir=run_dir).returncode == 0


def test_without_anything_published_the_status_is_unknown(run_dir: Path) -> None:
    for arguments in (["status"], ["status", "--json"]):
        ran = run(*arguments, run_dir=run_dir)
        assert ran.returncode == 2
        assert "vmnoded has published nothing yet" in ran.stderr and "hint: " in ran.stderr
        assert ran.stdout == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"version": 2}', b"[" * 100_000])
def test_a_damaged_state_file_is_one_sentence(content: bytes, run_dir: Path) -> None:
    (run_dir / "state.json").write_bytes(content)
    ran = run("status", run_dir=run_dir)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"vmnode: {run_dir}/state.json: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["status", "--nonsense"],
        ["status", "surplus"],
        ["check", "--nonsense"],
        ["config"],
        ["config", "nonsense"],
        ["--nonsense"],
        ["--config"],
        ["check", "network.dhpc"],
        ["check", "kvm", ""],
        ["check", "kvm\nlibvirt"],
    ],
)
def test_wrong_usage_is_64(arguments: list[str], run_dir: Path) -> None:
    ran = run(*arguments, run_dir=run_dir)
    assert ran.returncode == 64
    assert ran.stdout == "" and ran.stderr


def test_a_condition_with_a_slip_is_refused_with_the_right_one_named(run_dir: Path) -> None:
    said = run("check", "network.dhpc", run_dir=run_dir).stderr
    assert "there is no condition 'network.dhpc' (did you mean 'network.dhcp'?)" in said
    assert all(name in said for name in NAMES)


@pytest.mark.parametrize(("module", "arguments"), [("admin", ["check", "kvm"]), ("daemon", [])])
def test_without_root_nothing_is_probed_and_the_status_is_77(module: str, arguments: list[str], run_dir: Path) -> None:
    ran = run(*arguments, run_dir=run_dir, command=as_nobody(module))
    assert ran.returncode == 77
    assert "needs root" in ran.stderr and "hint: " in ran.stderr


@pytest.mark.parametrize(
    "arguments", [["status"], ["check"], ["classad"], ["config", "show"], ["config", "check"], ["status", "--json"]]
)
def test_a_wrong_configuration_is_78_for_every_verb(arguments: list[str], run_dir: Path) -> None:
    (run_dir / "vmnode.toml").write_text("[health]\ninterval = 3\n")
    ran = run(*arguments, run_dir=run_dir)
    assert (ran.returncode, ran.stdout) == (78, "")
    assert f"{run_dir}/vmnode.toml: [health] interval: no such key (did you mean 'interval_s'?)" in ran.stderr


def test_the_daemon_refuses_a_wrong_configuration_too(run_dir: Path) -> None:
    (run_dir / "vmnode.toml").write_text("[health]\ninterval_s = 0\n")
    ran = run(run_dir=run_dir, command=VMNODED)
    assert ran.returncode == 78
    assert "[health] interval_s = 0: must be between 1 and 3600 seconds" in ran.stderr


@pytest.mark.parametrize(
    "name", ["/absent.toml", "/", "x" * 5000, "/dev/null/x", "/root/x/../../root", "\udcff", "", "/proc/self/mem"]
)
@pytest.mark.parametrize("verb", [["status"], ["classad"], ["config", "show"]])
def test_no_file_name_is_too_strange(verb: list[str], name: str, run_dir: Path) -> None:
    ran = run("--config", name, *verb, run_dir=run_dir)
    assert ran.returncode == 78
    assert ran.stderr.startswith("vmnode: ")


def test_names_that_are_not_utf_8_are_shown_somehow(run_dir: Path) -> None:
    odd = run_dir / "\udcff.toml"
    odd.write_text('[kvm]\naccel = "tcg"\n')
    ran = run("--config", str(odd), "config", "show", run_dir=run_dir)
    assert ran.returncode == 0
    assert 'accel = "tcg"' in ran.stdout


def test_a_run_dir_that_is_a_file_is_one_sentence(run_dir: Path) -> None:
    (run_dir / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{run_dir}/vmnode.toml"\n')
    assert run("status", run_dir=run_dir).returncode == 2
    assert run("classad", run_dir=run_dir).returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_who_closes_an_output_gets_the_exit_status(closed: str, publish: Any, run_dir: Path) -> None:
    publish(network_active=Status.FAILED)
    ran = run("status", run_dir=run_dir, command=["sh", "-c", f'exec "$@" {closed}', "sh", *VMNODE])
    assert (ran.returncode, ran.stderr) == (1, "")


def test_an_output_that_is_full_is_one_sentence(publish: Any, run_dir: Path) -> None:
    publish()
    ran = run("status", run_dir=run_dir, command=["sh", "-c", 'exec "$@" >/dev/full', "sh", *VMNODE])
    assert (ran.returncode, ran.stderr) == (74, "vmnode: [Errno 28] No space left on device\n")


def test_a_pipe_in_the_place_of_the_state_file_holds_up_nothing(run_dir: Path) -> None:
    os.mkfifo(run_dir / "state.json")
    assert run("status", run_dir=run_dir).returncode == 2


def test_a_reader_that_goes_away_is_no_error_of_ours(publish: Any, run_dir: Path) -> None:
    publish()
    closed, ours = os.pipe()
    os.close(closed)
    try:
        ran = subprocess.run(
            [*VMNODE, "status", "--json"],
            stdout=ours,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=30,
            env={**os.environ, "VMNODE_CONFIG": str(run_dir / "vmnode.toml")},
        )
    finally:
        os.close(ours)
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr
    assert ran.returncode == 74


# --- what is printed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["status"], ["check"], ["classad"], ["config"]], ids=lambda verb: verb[0] if verb else "vmnode"
)
def test_every_verb_has_help(arguments: list[str], run_dir: Path) -> None:
    ran = run(*arguments, "--help", run_dir=run_dir)
    assert ran.returncode == 0 and ran.stderr == ""
    assert ran.stdout.startswith("usage: vmnode") and "--config" in ran.stdout


def test_the_daemon_has_help_and_both_know_their_version(run_dir: Path) -> None:
    assert run("--help", run_dir=run_dir, command=VMNODED).stdout.startswith("usage: vmnoded")
    for command in (VMNODE, VMNODED):
        assert run("--version", run_dir=run_dir, command=command).stdout == f"vmnode {__version__}\n"


def test_the_json_of_status_is_the_contract_s(publish: Any, run_dir: Path) -> None:
    publish(network_dhcp=Status.FAILED)
    document = json.loads(run("status", "--json", run_dir=run_dir).stdout)
    assert set(document) == {"version", "host", "checked_at", "state", "conditions", "attributes"}
    assert document["version"] == 1
    assert document["state"] == "failed"
    dhcp = next(entry for entry in document["conditions"] if entry["name"] == "network.dhcp")
    assert set(dhcp) == {"name", "status", "reason", "message", "hint", "since"}
    assert dhcp["status"] == "failed"
    assert document["attributes"]["HasVirshDefaultNetwork"] is False


def test_the_first_broken_link_stands_on_top_with_its_hint_under_it(publish: Any, run_dir: Path) -> None:
    publish(network_dhcp=Status.FAILED, network_dns=Status.UNKNOWN, images=Status.FAILED)
    lines = [line for line in run("status", run_dir=run_dir).stdout.splitlines() if line]
    assert "is failed (checked 1 s ago)" in lines[0]
    assert lines[1].startswith("network.dhcp: Seen: ")
    assert lines[2] == "  hint: do something"
    assert lines[3].split() == ["CONDITION", "STATUS", "FOR", "REASON", "WHAT"]
    assert [line.split()[0] for line in lines[4:]] == list(NAMES)
    column = lines[3].index("STATUS")
    assert [line[column:].split()[0] for line in lines[4:8]] == ["ok", "ok", "ok", "ok"]


def on_a_terminal(arguments: list[str], run_dir: Path, **environment: str) -> str:
    ours, theirs = pty.openpty()
    env = {**os.environ, "VMNODE_CONFIG": str(run_dir / "vmnode.toml"), "TERM": "xterm-256color", **environment}
    try:
        child = subprocess.Popen([*VMNODE, *arguments], stdout=theirs, stderr=theirs, cwd=ROOT, env=env)
        os.close(theirs)
        printed = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not chunk:
                break
            printed += chunk
        child.wait(timeout=30)
    finally:
        os.close(ours)
    return printed.decode()


def test_colour_is_for_terminals_and_no_color_takes_it_away(publish: Any, run_dir: Path) -> None:
    publish(kvm=Status.FAILED)
    assert "\x1b[1;31m" in on_a_terminal(["status"], run_dir)
    plain = on_a_terminal(["status"], run_dir, NO_COLOR="1")
    assert "kvm" in plain and "\x1b[31m" not in plain and ";31m" not in plain and "\x1b[32m" not in plain
    assert "\x1b" not in run("status", run_dir=run_dir).stdout


def test_classad_prints_what_the_startd_gets(publish: Any, run_dir: Path) -> None:
    publish(network_dhcp=Status.FAILED)
    ran = run("classad", run_dir=run_dir)
    hook = run(run_dir=run_dir, command=[sys.executable, "-m", "vmnode.commands.startd_cron"])
    assert ran.returncode == 0
    assert [line for line in ran.stdout.splitlines() if "LastCheck =" not in line] == [
        line for line in hook.stdout.splitlines() if "LastCheck =" not in line
    ]
    assert "HasVirshDefaultNetwork = ifThenElse(" in ran.stdout


def test_config_show_lists_every_setting_with_its_source(run_dir: Path) -> None:
    (run_dir / "conf.d").mkdir()
    (run_dir / "conf.d" / "1.toml").write_text("[health]\nfail_after = 7\n")
    shown = run("config", "show", run_dir=run_dir).stdout
    section, seen = "", {}
    for line in shown.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            assignment, _, source = line.rpartition("  # ")
            key, _, value = assignment.partition(" = ")
            seen[section, key] = (value.strip(), source)
    entries = list(Loaded(Config(), {}).entries())
    assert set(seen) == {(entry.section, entry.key) for entry in entries}
    assert seen["health", "fail_after"] == ("7", f"{run_dir}/conf.d/1.toml")
    assert seen["paths", "run_dir"] == (f'"{run_dir}"', f"{run_dir}/vmnode.toml")
    assert seen["health", "interval_s"] == ("60", "default")
    assert seen["canary", "enabled"] == ("true", "default; not built yet")
    for entry in entries:
        assert seen[entry.section, entry.key][1].endswith("; not built yet") != entry.setting.built


def test_config_check_counts_what_was_set(run_dir: Path) -> None:
    ran = run("config", "check", run_dir=run_dir)
    assert ran.returncode == 0
    assert ran.stdout == "the configuration is right (values set: 1, in files: 1)\n"
