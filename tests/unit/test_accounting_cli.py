"""vmnode accounting jobs and report: what is shown, to people and to programs, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import VMNODE, as_nobody, on_a_terminal, run
from tests.unit.test_cli import run_dir as run_dir
from tests.unit.test_ledger import record
from vmnode.accounting.ledger import FILE, Ledger
from vmnode.accounting.query import Sum
from vmnode.accounting.record import NEVER_COUNTED, Outcome
from vmnode.commands.accounting import since
from vmnode.errors import UsageError
from vmnode.report import usage as report
from vmnode.usage import NONE, Traffic, Usage

MIB = 1 << 20
SMALL = Usage(Traffic(2 * MIB, 20), Traffic(512, 5), Traffic(3 << 30, 3000), Traffic(1536, 15))
GUEST = Usage(Traffic(MIB, 10), Traffic(512, 5), Traffic(1 << 30, 1000), Traffic(512, 1))


@pytest.fixture
def ledger(run_dir: Path) -> Iterator[Ledger]:
    """The ledger of a daemon that lives."""
    (run_dir / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{run_dir}"\nstate_dir = "{run_dir}"\n')
    with open(run_dir / "lock", "w") as lock, contextlib.closing(Ledger(run_dir / FILE)) as opened:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield opened


def fill(ledger: Ledger) -> None:
    """1790000000 is 2026-09-21T14:13:20Z."""
    done = {"ended_at": 1_790_000_600.0, "outcome": Outcome.COMPLETE}
    ledger.add(record(job="a.example.org#12.0#1", owner="alice@example.org", usage=SMALL, **done))
    ledger.add(record(job="a.example.org#12.1#1", usage=SMALL, guest=GUEST, universe=13, **done))
    ledger.add(
        record(
            job="b.example.org#7.0#1",
            owner="bob@example.org",
            started_at=1_790_100_000.0,
            ended_at=1_790_100_090.0,
            outcome=Outcome.UNACCOUNTED,
            usage=None,
            why="vmnoded did not answer in 2 s",
        )
    )
    ledger.add(
        record(
            job="b.example.org#8.0#1",
            owner="carol@example.org",
            started_at=1_790_100_001.0,
            ended_at=1_790_100_060.0,
            outcome=Outcome.RECOVERED,
            partial_since=1_790_100_030.0,
            usage=Usage(lan_in=Traffic(100, 1)),
        )
    )


def accounting(*arguments: str, run_dir: Path, **environment: Any) -> str:
    ran = run("accounting", *arguments, run_dir=run_dir, TZ="UTC", **environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def rows(text: str) -> list[list[str]]:
    """The cells of a table whose columns stand two blanks apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_jobs_are_a_table_with_a_line_for_each_record(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    began = ["slot1_1", "vanilla", "2026-09-21 14:13", "10 min"]
    vm = ["slot1_1", "vm", "2026-09-21 14:13", "10 min"]
    later = ["slot1_1", "vanilla", "2026-09-22 18:00"]
    unaccounted = "unaccounted: vmnoded did not answer in 2 s"
    partial = "recovered, partial since 2026-09-22 18:00"
    assert rows(accounting("jobs", run_dir=run_dir)) == [
        ["JOB", "OWNER", "SLOT", "UNIVERSE", "STARTED", "FOR", "LAN IN", "LAN OUT", "WAN IN", "WAN OUT", "ENDED"],
        ["12.0", "alice@example.org", *began, "2.0 MiB", "512 B", "3.0 GiB", "1.5 KiB", "complete"],
        ["12.1", "alice@example.org", *vm, "3.0 MiB", "1.0 KiB", "4.0 GiB", "2.0 KiB", "complete"],
        ["guest", "1.0 MiB", "512 B", "1.0 GiB", "512 B"],
        ["sandbox", "2.0 MiB", "512 B", "3.0 GiB", "1.5 KiB"],
        ["7.0", "bob@example.org", *later, *["–"] * 5, unaccounted],
        ["8.0", "carol@example.org", *later, "59 s", "100 B", "0 B", "0 B", "0 B", partial],
    ]


def test_the_columns_of_the_table_are_aligned(ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(usage=SMALL, owner="用户@example.org"))
    ledger.add(record(usage=NONE, owner="a-user-with-a-very-long-name-indeed@a-very-long-domain.example.org"))
    head, *lines = accounting("jobs", run_dir=run_dir).splitlines()
    end = head.index("WAN IN") + len("WAN IN")
    wide = [line.encode("utf-16-be").decode("utf-16-be").replace("用户", "用户__", 1) for line in lines]
    assert [line[:end].split()[-2:] for line in wide] == [["3.0", "GiB"], ["0", "B"]]
    assert "a-user-with-a-very-long-name-indeed@a-v… " in lines[1]


def test_a_job_that_runs_is_shown_with_what_it_used_up_to_now(ledger: Ledger, run_dir: Path) -> None:
    now = time.time()
    ledger.add(record(usage=SMALL, started_at=now - 200, seen_at=now - 2))
    cells = rows(accounting("jobs", run_dir=run_dir))[1]
    assert cells[5:] == ["3 min", "2.0 MiB", "512 B", "3.0 GiB", "1.5 KiB", "running"]
    [job] = json.loads(accounting("jobs", "--json", run_dir=run_dir))["jobs"]
    assert (job["outcome"], job["ended_at"]) == ("running", None)
    assert 200 <= job["duration_s"] < 260


def test_the_json_of_jobs_has_both_parts_of_a_vm_job_and_all_numbers(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    document = json.loads(accounting("jobs", "--json", run_dir=run_dir))
    assert set(document) == {"version", "host", "jobs"} and document["version"] == 1
    plain, vm, unaccounted, partial = document["jobs"]
    assert plain == {
        "job": "a.example.org#12.0#1",
        "owner": "alice@example.org",
        "slot": "slot1_1",
        "universe": 5,
        "started_at": 1_790_000_000.0,
        "ended_at": 1_790_000_600.0,
        "duration_s": 600.0,
        "outcome": "complete",
        "partial_since": None,
        "why": "",
        "total": {
            "lan_in": {"bytes": 2_097_152, "packets": 20},
            "lan_out": {"bytes": 512, "packets": 5},
            "wan_in": {"bytes": 3_221_225_472, "packets": 3000},
            "wan_out": {"bytes": 1536, "packets": 15},
        },
        "vm": None,
    }
    assert vm["total"]["wan_in"] == {"bytes": 4_294_967_296, "packets": 4000}
    assert vm["vm"]["guest"]["wan_in"] == {"bytes": 1_073_741_824, "packets": 1000}
    assert vm["vm"]["sandbox"]["wan_in"] == {"bytes": 3_221_225_472, "packets": 3000}
    assert (unaccounted["total"], unaccounted["vm"], unaccounted["outcome"]) == (None, None, "unaccounted")
    assert (unaccounted["ended_at"], unaccounted["duration_s"]) == (None, None)
    assert partial["partial_since"] == 1_790_100_030.0


def test_the_csv_of_jobs_has_bytes_and_packets(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    plain, vm, unaccounted, partial = csv.DictReader(io.StringIO(accounting("jobs", "--csv", run_dir=run_dir)))
    assert (plain["job"], plain["owner"]) == ("a.example.org#12.0#1", "alice@example.org")
    assert (plain["started_at"], plain["duration_s"]) == ("2026-09-21T14:13:20Z", "600.0")
    assert [plain[name] for name in ("lan_in_bytes", "lan_in_packets", "wan_out_bytes")] == ["2097152", "20", "1536"]
    assert plain["guest_lan_in_bytes"] == plain["sandbox_lan_in_bytes"] == ""
    assert [vm[f"{part}lan_in_bytes"] for part in ("", "guest_", "sandbox_")] == ["3145728", "1048576", "2097152"]
    assert {value for name, value in unaccounted.items() if name.endswith(("bytes", "packets"))} == {""}
    assert partial["partial_since"] == "2026-09-22T18:00:30Z"


@pytest.mark.parametrize("outcome", NEVER_COUNTED)
def test_what_was_never_counted_is_never_a_zero(outcome: Outcome, ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(outcome=outcome, usage=None, owner="alice"))
    assert rows(accounting("jobs", run_dir=run_dir))[1][5:] == ["–"] * 5 + [outcome.value]
    assert rows(accounting("report", run_dir=run_dir))[1] == ["alice", "1", "1", "0", "–", "–", "–", "–"]
    document = json.loads(accounting("report", "--json", run_dir=run_dir))
    assert document["groups"][0]["usage"] is None and document["total"]["usage"] is None
    [line] = csv.DictReader(io.StringIO(accounting("report", "--csv", run_dir=run_dir)))
    assert line["lan_in_bytes"] == line["wan_out_packets"] == ""


def test_a_vm_job_whose_guest_could_not_be_counted_shows_that(ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(universe=13, usage=SMALL, outcome=Outcome.COMPLETE, ended_at=1_790_000_600.0, why="no tap"))
    lines = rows(accounting("jobs", run_dir=run_dir))
    assert lines[1][-1] == "complete: no tap"
    assert lines[2] == ["guest", "–", "–", "–", "–"]
    [job] = json.loads(accounting("jobs", "--json", run_dir=run_dir))["jobs"]
    assert job["vm"]["guest"] is None and job["vm"]["sandbox"]["lan_out"]["bytes"] == 512
    assert json.loads(accounting("report", "--json", run_dir=run_dir))["total"]["partly_counted"] == 1


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_sums_by_user_and_who_used_most_comes_first(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    assert rows(accounting("report", run_dir=run_dir)) == [
        ["USER", "JOBS", "NOT", "PARTLY", "LAN IN", "LAN OUT", "WAN IN", "WAN OUT", "LAN █ WAN ░"],
        ["alice@example.org", "2", "0", "0", "5.0 MiB", "1.5 KiB", "7.0 GiB", "3.5 KiB", "█" + 23 * "░"],
        ["carol@example.org", "1", "0", "1", "100 B", "0 B", "0 B", "0 B", "█"],
        ["bob@example.org", "1", "1", "0", "–", "–", "–", "–"],
        ["total", "4", "1", "1", "5.0 MiB", "1.5 KiB", "7.0 GiB", "3.5 KiB"],
        [""],
        ["Jobs NOT counted: 1; only PARTLY: 1"],
    ]


def test_on_a_narrow_terminal_the_bars_stand_below_the_numbers_and_nothing_is_cut_off(
    ledger: Ledger, run_dir: Path
) -> None:
    fill(ledger)
    ledger.add(record(owner="a-user-with-a-long-name@example.org", usage=SMALL))
    shown = on_a_terminal(["accounting", "report"], run_dir, NO_COLOR="1", COLUMNS="80", TZ="UTC")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80
    table = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert table[1] == ["alice@example.org", "2", "0", "0", "5.0 MiB", "1.5 KiB", "7.0 GiB", "3.5 KiB"]
    assert table[2][0].startswith("a-user-with-a-long-n") and table[2][0].endswith("…")
    assert table[7:9] == [["USER", "LAN █ WAN ░"], ["alice@example.org", "█" + 23 * "░"]]


def test_the_report_by_day_is_in_the_order_of_days(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    table = rows(accounting("report", "--by", "day", run_dir=run_dir))
    assert [row[:4] for row in table[1:4]] == [
        ["2026-09-21", "2", "0", "0"],
        ["2026-09-22", "2", "1", "1"],
        ["total", "4", "1", "1"],
    ]
    document = json.loads(accounting("report", "--by", "day", "--json", run_dir=run_dir))
    assert [group["day"] for group in document["groups"]] == ["2026-09-21", "2026-09-22"]


def test_the_json_of_the_report_has_the_groups_and_the_total(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    document = json.loads(accounting("report", "--json", "--since", "2026-09-22", run_dir=run_dir))
    assert (document["version"], document["by"], document["since"]) == (1, "user", 1_790_035_200.0)
    usage = {name: {"bytes": 0, "packets": 0} for name in ("lan_out", "wan_in", "wan_out")}
    usage["lan_in"] = {"bytes": 100, "packets": 1}
    carol = {"user": "carol@example.org", "jobs": 1, "not_counted": 0, "partly_counted": 1, "usage": usage}
    bob = {"user": "bob@example.org", "jobs": 1, "not_counted": 1, "partly_counted": 0, "usage": None}
    assert document["groups"] == [carol, bob]
    assert document["total"] == {"jobs": 2, "not_counted": 1, "partly_counted": 1, "usage": usage}


def test_the_csv_of_the_report_has_no_total_that_would_be_summed_again(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    lines = list(csv.DictReader(io.StringIO(accounting("report", "--csv", run_dir=run_dir))))
    assert [line["user"] for line in lines] == ["alice@example.org", "carol@example.org", "bob@example.org"]
    assert (lines[0]["jobs"], lines[0]["lan_in_bytes"], lines[0]["wan_in_packets"]) == ("2", "5242880", "7000")


@pytest.mark.parametrize(
    ("lan", "wan", "bar"),
    [
        (1000, 0, 24 * "#"),
        (0, 500, 12 * "."),
        (500, 500, 12 * "#" + 12 * "."),
        (250, 750, 6 * "#" + 18 * "."),
        (1, 999, "#" + 23 * "."),
        (999, 1, 23 * "#" + "."),
        (1, 0, "#"),
        (1, 1, "#."),
        (0, 0, ""),
    ],
)
def test_bars_are_as_long_as_what_they_stand_for_and_hide_nothing(lan: int, wan: int, bar: str) -> None:
    sums = [
        Sum("one", 1, 0, 0, Usage(lan_in=Traffic(lan, 1), wan_out=Traffic(wan, 1))),
        Sum("most", 1, 0, 0, Usage(lan_in=Traffic(1000, 1))),
    ]
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160)
    console.print(report.report(sums, "user", report.PLAIN, 160))
    line = console.file.getvalue().splitlines()[1]  # type: ignore[attr-defined]
    assert line.split(" B ")[-1].strip() == bar


# --- which jobs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        ([], ["12.0", "12.1", "7.0", "8.0"]),
        (["--user", "alice"], ["12.0", "12.1"]),
        (["--user", "bob@example.org"], ["7.0"]),
        (["--user", "nobody"], []),
        (["--since", "2026-09-22"], ["7.0", "8.0"]),
        (["--since", "2026-09-22T18:01"], []),
        (["--since", "2026-09-22T18:00:01"], ["8.0"]),
        (["--job", "12"], ["12.0", "12.1"]),
        (["--job", "12.1"], ["12.1"]),
        (["--job", "b.example.org#7.0#1"], ["7.0"]),
        (["--user", "alice", "--job", "7"], []),
    ],
)
def test_jobs_are_chosen_by_user_start_and_id(
    arguments: list[str], jobs: list[str], ledger: Ledger, run_dir: Path
) -> None:
    fill(ledger)
    document = json.loads(accounting("jobs", "--json", *arguments, run_dir=run_dir))
    assert [job["job"].split("#")[1] for job in document["jobs"]] == jobs
    assert json.loads(accounting("report", "--json", *arguments, run_dir=run_dir))["total"]["jobs"] == len(jobs)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("7d", 1_790_000_000 - 604_800),
        ("12h", 1_790_000_000 - 43_200),
        ("30m", 1_790_000_000 - 1_800),
        ("0m", 1_790_000_000),
        ("2026-09-20", 1_789_862_400),
        ("2026-09-20T12:00", 1_789_905_600),
        ("2026-09-20T12:00:01", 1_789_905_601),
        ("999999999d", 1_790_000_000 - 999_999_999 * 86_400),
    ],
)
def test_since_is_a_day_a_minute_or_a_span(text: str, moment: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        assert since(text, 1_790_000_000.0) == moment
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    [
        *("", "7", "d", "-7d", "7 d", "7y", "7D", "1.5h", "9999999999d", "\u0667d", "yesterday", "\x1b[31m"),
        *("2026-9-2", "2026-02-30", "2026-09-20 12:00", "2026-09-20T25:00", "2026-09-20T12", "2026-09-20T12:00Z"),
    ],
)
def test_what_is_no_moment_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="is no moment") as raised:
        since(text, 1_790_000_000.0)
    assert "2026-11-20, 2026-11-20T12:00, and spans such as 7d, 12h, 30m" in raised.value.hint
    assert raised.value.what.isprintable()


def test_a_moment_that_is_yet_to_come_is_refused() -> None:
    with pytest.raises(UsageError, match="yet to come"):
        since("2030-01-01", 1_790_000_000.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "--since", "yesterday"],
        ["report", "--since", "7"],
        ["jobs", "--job", "12."],
        ["report", "--job", "twelve"],
        ["jobs", "--json", "--csv"],
        ["report", "--by", "week"],
        ["jobs", "surplus"],
        ["jobs", "--by", "day"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage_is_64(arguments: list[str], ledger: Ledger, run_dir: Path) -> None:
    ran = run("accounting", *arguments, run_dir=run_dir)
    assert (ran.returncode, ran.stdout) == (64, "") and ran.stderr


@pytest.mark.parametrize("verb", [[], ["jobs"], ["report"]])
def test_every_verb_has_help(verb: list[str], run_dir: Path) -> None:
    ran = run("accounting", *verb, "--help", run_dir=run_dir)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("usage: vmnode accounting")


# --- terminals, spreadsheets --------------------------------------------------------------------------------------

HOSTILE = "eve\x1b[2J\x07\r\n\x9b31m\u202e\x7f,\"'[red]"
SHOWN = "eve\\x1b[2J\\x07\\r\\n\\x9b31m\\u202e\\x7f,\"'[red]"


def test_a_name_cannot_steer_a_terminal(ledger: Ledger, run_dir: Path) -> None:
    job = "x\x1b]0;t\x07#1.0#1#2"
    ledger.add(record(owner=HOSTILE, slot="slot\x1bc", job=job, why="because\nof\x1b[1m", usage=SMALL))
    for verb in ("jobs", "report"):
        for form in ([], ["--csv"], ["--json"]):
            printed = accounting(verb, *form, run_dir=run_dir)
            assert [c for c in printed if not c.isprintable() and c != "\n"] == [], (verb, form)
    assert len(accounting("jobs", run_dir=run_dir).splitlines()) == 2
    assert SHOWN[:39] in accounting("jobs", run_dir=run_dir)
    for verb in ("jobs", "report"):
        bright = on_a_terminal(["accounting", verb], run_dir)
        assert re.sub(r"\x1b\[[0-9;]*m|\r\n", "", bright).isprintable()
    [shown] = json.loads(accounting("jobs", "--json", run_dir=run_dir))["jobs"]
    assert (shown["owner"], shown["job"]) == (HOSTILE, job)  # a program gets the name as it is


def test_csv_is_parseable_whatever_the_names_are_and_holds_no_formula(ledger: Ledger, run_dir: Path) -> None:
    for owner in (HOSTILE, "=cmd|'/C calc'!A0", "+1", "-1", "@sum", 'a"b', "a,b;c"):
        ledger.add(record(owner=owner, usage=SMALL))
    for verb, column in (("jobs", "owner"), ("report", "user")):
        lines = list(csv.DictReader(io.StringIO(accounting(verb, "--csv", run_dir=run_dir)), strict=True))
        assert {line["lan_in_bytes"] for line in lines} == {"2097152"}
        names = ["'+1", "'-1", "'=cmd|'/C calc'!A0", "'@sum", 'a"b', "a,b;c", SHOWN]
        assert sorted(line[column] for line in lines) == sorted(names)


def test_colour_is_for_terminals_and_the_bars_can_be_read_without(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    assert "\x1b[36m█\x1b[0m\x1b[35m░" in on_a_terminal(["accounting", "report"], run_dir, COLUMNS="160")
    assert "\x1b[33m7.0 " in on_a_terminal(["accounting", "jobs"], run_dir)
    for verb in ("jobs", "report"):
        plain = on_a_terminal(["accounting", verb], run_dir, NO_COLOR="1", COLUMNS="160")
        assert not re.search(r"\x1b\[(\d+;)*3\dm", plain)
        assert "\x1b" not in accounting(verb, run_dir=run_dir)
    assert "█░░░" in plain


def test_a_terminal_without_unicode_gets_plain_characters(ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(owner="zoë", outcome=Outcome.EXEMPT, usage=None))
    ledger.add(record(owner="bob", usage=Usage(lan_in=Traffic(1, 1), wan_in=Traffic(1, 1))))
    for verb in ("jobs", "report"):
        assert r"zo\xeb" in accounting(verb, run_dir=run_dir, PYTHONIOENCODING="ascii")
        assert "zoë" in accounting(verb, run_dir=run_dir, PYTHONIOENCODING="utf-8")
    assert "############............" in accounting("report", run_dir=run_dir, PYTHONIOENCODING="ascii")


def test_lines_of_a_table_are_not_folded_where_nobody_looks(ledger: Ledger, run_dir: Path) -> None:
    fill(ledger)
    ledger.add(record(why="a long story " * 30, outcome=Outcome.UNACCOUNTED, usage=None))
    assert len(accounting("jobs", run_dir=run_dir, COLUMNS="40").splitlines()) == 8


# --- what can be wrong --------------------------------------------------------------------------------------------


def test_nothing_to_show_is_no_error(ledger: Ledger, run_dir: Path) -> None:
    assert accounting("report", run_dir=run_dir) == "no jobs\n"
    assert len(accounting("jobs", run_dir=run_dir).splitlines()) == 1
    assert json.loads(accounting("jobs", "--json", run_dir=run_dir))["jobs"] == []
    assert json.loads(accounting("report", "--json", run_dir=run_dir))["groups"] == []
    assert len(accounting("jobs", "--csv", run_dir=run_dir).splitlines()) == 1


def without_rights() -> list[str]:
    """vmnode as nobody, who may not be able to enter the directory that Python and rich lie in."""
    command = as_nobody("admin")
    return [*command[:2], "import vmnode.accounting.query, vmnode.report.usage\n" + command[2]]


@pytest.mark.parametrize("arguments", [["jobs"], ["report"], ["jobs", "--json"], ["report", "--csv"]])
def test_a_ledger_that_cannot_be_used_is_a_sentence_and_a_hint(arguments: list[str], run_dir: Path) -> None:
    (run_dir / "vmnode.toml").write_text(f'[paths]\nrun_dir = "{run_dir}"\nstate_dir = "{run_dir}"\n')
    path = run_dir / FILE

    def fails(status: int, what: str, command: list[str] = VMNODE) -> None:
        ran = run("accounting", *arguments, run_dir=run_dir, command=command)
        assert (ran.returncode, ran.stdout) == (status, "")
        assert ran.stderr.startswith(f"vmnode: {path}: {what}") and "hint: " in ran.stderr

    fails(69, "there is no ledger")
    path.write_bytes(b"\xff" * 5000)
    fails(69, "the ledger is damaged")
    path.chmod(0o600)
    if os.geteuid() == 0:
        fails(77, "the ledger cannot be read", without_rights())
    path.unlink()
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 9")
    fails(69, "the ledger was written by another version")


def test_without_the_daemon_what_runs_is_shown_as_it_was_last_seen(ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(usage=SMALL))
    ledger.close()
    (run_dir / "lock").unlink()
    for verb in ("jobs", "report"):
        ran = run("accounting", verb, "--json", run_dir=run_dir)
        assert ran.returncode == 0 and json.loads(ran.stdout)
        assert ran.stderr == "vmnode: vmnoded does not run, so jobs that run are shown as it last saw them\n"


def test_a_reader_that_has_seen_enough_is_no_error_of_ours(ledger: Ledger, run_dir: Path) -> None:
    for _ in range(3000):
        ledger.add(record())
    for form in ("", "--json", "--csv"):
        command = f'"$@" accounting jobs {form} | head -n 1'
        ran = run(run_dir=run_dir, command=["sh", "-c", command, "sh", *VMNODE])
        assert (ran.returncode, ran.stderr) == (0, "") and len(ran.stdout.splitlines()) == 1


def test_a_hundred_thousand_records_are_summed(ledger: Ledger, run_dir: Path) -> None:
    ledger.add(record(usage=SMALL, guest=GUEST))
    with contextlib.closing(sqlite3.connect(ledger.path)) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(records)") if row[1] not in ("id", "owner")]
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)"
            f" INSERT INTO records (owner, {', '.join(columns)})"
            f" SELECT 'user' || i % 100, {', '.join(columns)} FROM n, records WHERE id = 1"
        )
    document = json.loads(accounting("report", "--json", run_dir=run_dir))
    assert document["total"]["jobs"] == 100_000
    assert document["total"]["usage"]["lan_out"] == {"bytes": 100_000 * 1024, "packets": 100_000 * 10}
