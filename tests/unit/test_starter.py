"""vmnode-starter: whatever fails, the job starts, unless it is not to; and nobody believes that it was counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmnode.accounting import notes
from vmnode.accounting.record import Process
from vmnode.commands import starter
from vmnode.host import processes

INHERIT = "292 <198.51.100.7:9618?addrs=198.51.100.7-9618&sock=startd_281_5233> 1 13*3*0"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "run" / notes.DIRECTORY).mkdir(parents=True)
    file = tmp_path / "vmnode.toml"
    file.write_text(f'[paths]\nrun_dir = "{tmp_path}/run"\n[accounting]\nenabled = true\n')
    return file


def test_the_slot_is_where_the_startd_writes_it() -> None:
    """STARTER_LOG_NAME_APPEND says which of the two."""
    assert starter.slot_of(["-f", "-local-name", "slot_type_1", "-a", "slot1_1", "198.51.100.7"]) == "slot1_1"
    assert starter.slot_of(["-f", "-a", "12.0", "-slot-name", "slot1_1", "198.51.100.7"]) == "slot1_1"
    assert starter.slot_of(["-f"]) == ""


def test_in_a_namespace_the_starter_knows_that_the_hosts_addresses_are_not_there() -> None:
    environment = {"CONDOR_INHERIT": INHERIT, starter.COOKIE: "x", "PATH": "/bin"}
    starter.change_environment(environment)
    assert environment == {
        "CONDOR_INHERIT": INHERIT,
        "PATH": "/bin",
        "_CONDOR_BIND_ALL_INTERFACES": "true",
        "_CONDOR_NETWORK_INTERFACE": "*",
        "_CONDOR_TCP_FORWARDING_HOST": "198.51.100.7",
    }


@pytest.mark.parametrize("inherit", ["", "292", "292 nonsense"])
def test_without_the_startds_address_it_is_told_none(inherit: str) -> None:
    environment = {"CONDOR_INHERIT": inherit}
    starter.change_environment(environment)
    assert "_CONDOR_TCP_FORWARDING_HOST" not in environment


def test_an_ipv6_address_is_told_without_its_brackets() -> None:
    environment = {"CONDOR_INHERIT": "292 <[2001:db8::7]:9618?sock=x> 1"}
    starter.change_environment(environment)
    assert environment["_CONDOR_TCP_FORWARDING_HOST"] == "2001:db8::7"


def test_without_a_daemon_the_job_goes_and_leaves_a_note(config: Path) -> None:
    why = starter.enter_network("slot1_1", str(config))
    assert "No such file" in why
    assert starter.may_go_without(why, "slot1_1", str(config))
    (note,) = notes.left(config.parent / "run" / notes.DIRECTORY)
    assert note.starter == Process(os.getpid(), processes.started(os.getpid()))
    assert (note.slot, note.why) == ("slot1_1", why)


def test_closed_means_that_it_does_not_go(config: Path) -> None:
    config.write_text(config.read_text() + 'on_error = "closed"\n')
    assert not starter.may_go_without("no", "slot1_1", str(config))
    assert notes.left(config.parent / "run" / notes.DIRECTORY) == []


def test_where_nobody_accounts_there_is_nobody_to_tell(config: Path) -> None:
    config.write_text(config.read_text().replace("true", "false") + 'on_error = "closed"\n')
    assert starter.may_go_without("no", "slot1_1", str(config))
    assert notes.left(config.parent / "run" / notes.DIRECTORY) == []


ELSEWHERE = "[accounting]\nenabled = true\n[paths]\nrun_dir = '/nonexistent'\n"


@pytest.mark.parametrize("text", ["[accounting", "[accounting]\non_error = 7\n", ELSEWHERE])
def test_a_configuration_that_is_wrong_keeps_no_job_from_going(
    config: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    assert starter.enter_network("slot1_1", str(config)) != ""
    assert starter.may_go_without("no", "slot1_1", str(config))
    assert capfd.readouterr().err.startswith("vmnode-starter: nobody could be told that this job is not counted: ")


def test_a_starter_that_cannot_be_started_is_said_and_no_traceback(tmp_path: Path) -> None:
    """Our parent is no startd, and here is no HTCondor."""
    code = "import sys; from vmnode.commands import starter; starter.STARTER = '/nonexistent'; sys.exit(starter.main())"
    ran = subprocess.run([sys.executable, "-c", code, "-classad"], capture_output=True, text=True, timeout=20)
    assert (ran.returncode, ran.stdout) == (75, "")
    assert ran.stderr == "vmnode-starter: /nonexistent: No such file or directory\n"


def test_what_is_no_note_is_removed_and_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "12-34").write_text("slot1_1\nno answer\n")
    (tmp_path / "nonsense").write_text("x")
    (tmp_path / ".56-78").write_text("half")  # being written
    assert [(note.starter, note.slot, note.why) for note in notes.left(tmp_path)] == [
        (Process(12, 34), "slot1_1", "no answer")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".56-78", "12-34"]
    assert notes.left(tmp_path / "absent") == []
