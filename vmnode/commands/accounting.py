"""vmnode accounting: the verbs over the ledger."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, Optional

from vmnode.commands.arguments import Parser
from vmnode.config import Config
from vmnode.errors import UsageError
from vmnode.host import files

if TYPE_CHECKING:
    from rich.console import Console

    from vmnode.accounting.query import Selection

Verb = Callable[[argparse.Namespace, Config], int]

_SPANS = {"d": 86400, "h": 3600, "m": 60}  # seconds
_MOMENTS = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S")


def add_parsers(verbs: Any, common: Parser, configuration: Callable[[argparse.Namespace], Config]) -> None:
    """Add `accounting` with its own verbs to the verbs of vmnode."""
    description = "What the jobs of this node sent and received."
    group = verbs.add_parser("accounting", parents=[common], help=description, description=description)
    own = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)

    def add(name: str, verb: Verb, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = own.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(verb=lambda arguments: verb(arguments, configuration(arguments)))
        return added

    jobs = add("jobs", show_jobs, "Each job, and what it used; of one that runs, up to the last sample.")
    report = add("report", show_report, "Sums by user or by the day on which the jobs started.")
    report.add_argument("--by", choices=("user", "day"), default="user", help="what is summed up (user)")
    for verb in (jobs, report):
        form = verb.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="print JSON")
        form.add_argument("--csv", action="store_true", help="print CSV; bytes and packets, times in UTC")
        verb.add_argument("--user", metavar="U", help="only jobs of this user, as alice or alice@example.org")
        verb.add_argument(
            "--since", metavar="T", help="only jobs that started since then: 2026-11-20, 2026-11-20T12:00, 7d, 12h, 30m"
        )
        verb.add_argument("--job", metavar="ID", help="only this job: a cluster, cluster.proc or a GlobalJobId")
    run = add("run", run_command, "Run a command in a network of its own, and tell on stderr what it used (root).")
    run.add_argument("--json", action="store_true", help="tell it as JSON")
    run.add_argument("--user", metavar="NAME", help="run it as this user")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="and its arguments")


def run_command(arguments: argparse.Namespace, config: Config) -> int:
    from vmnode.commands import accounted

    return accounted.run(arguments, config)


# --- jobs, report -------------------------------------------------------------------------------------------------


def show_jobs(arguments: argparse.Namespace, config: Config) -> int:
    from vmnode.accounting import ledger, query
    from vmnode.report import usage

    now = time.time()
    records = query.find(config.paths.state_dir / ledger.FILE, selection(arguments, now))
    warn_without_daemon(config)
    if arguments.json:
        print_jobs_as_json(usage.job_document(record, now) for record in records)
    elif arguments.csv:
        print_csv(usage.JOB_COLUMNS, (usage.job_cells(record, now) for record in records))
    else:
        print_lines(usage.job_lines(records, now, usage.marks(sys.stdout.encoding)))
    return 0


def show_report(arguments: argparse.Namespace, config: Config) -> int:
    from vmnode.accounting import ledger, query
    from vmnode.report import usage

    chosen = selection(arguments, time.time())
    sums = query.sums(config.paths.state_dir / ledger.FILE, arguments.by, chosen)
    warn_without_daemon(config)
    if arguments.by == "user":
        sums = usage.ranked(sums)
    if arguments.json:
        print(json.dumps({**heading(), **usage.report_document(sums, arguments.by, chosen.since)}, indent=2))
    elif arguments.csv:
        print_csv(usage.report_columns(arguments.by), (usage.report_cells(one) for one in sums))
    else:
        screen = console()
        screen.print(usage.report(sums, arguments.by, usage.marks(sys.stdout.encoding), screen.width))
    return 0


def warn_without_daemon(config: Config) -> None:
    if not files.is_locked(str(config.paths.run_dir / "lock")):
        print("vmnode: vmnoded does not run, so jobs that run are shown as it last saw them", file=sys.stderr)


# --- which --------------------------------------------------------------------------------------------------------


def selection(arguments: argparse.Namespace, now: float) -> Selection:
    from vmnode.accounting.query import Selection

    moment = None if arguments.since is None else since(arguments.since, now)
    return Selection(arguments.user, moment, arguments.job)


def since(text: str, now: float) -> float:
    """The moment that a person means, in local time; Unix time in seconds. Raises UsageError."""
    span = re.fullmatch(r"([0-9]{1,9})([dhm])", text)
    if span:
        return now - int(span[1]) * _SPANS[span[2]]
    moment = _moment(text)
    if moment is None:
        raise UsageError(
            f"--since {text!r} is no moment", "allowed are 2026-11-20, 2026-11-20T12:00, and spans such as 7d, 12h, 30m"
        )
    if moment > now:
        raise UsageError(f"--since {text!r} is yet to come", "no job can have started since then")
    return moment


def _moment(text: str) -> Optional[float]:
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2})?)?", text):
        for form in _MOMENTS:
            try:
                return time.mktime(time.strptime(text, form))
            except (ValueError, OverflowError):
                continue
    return None


# --- output -------------------------------------------------------------------------------------------------------


def heading() -> dict[str, Any]:
    return {"version": 1, "host": socket.gethostname()}


def print_jobs_as_json(documents: Any) -> None:
    """One document, a line for each job, of which there may be more than memory should hold."""
    print(json.dumps(heading())[:-1] + ', "jobs": [', end="")
    separator = "\n"
    for document in documents:
        print(separator + json.dumps(document), end="")
        separator = ",\n"
    print("\n]}")


def print_csv(columns: Any, lines: Any) -> None:
    show_odd_characters()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)


def print_lines(lines: Any) -> None:
    """Styled lines, which are not folded; only those with a style are worth rich's time."""
    from rich.text import Text

    styled = console()
    colours = styled.is_terminal
    for line, style in lines:
        if style and colours:
            styled.print(Text(line, style), soft_wrap=True)
        else:
            print(line)


def console() -> Console:
    from rich.console import Console

    show_odd_characters()
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show_odd_characters() -> None:
    """A name with characters that this terminal's encoding lacks is shown as escapes, and no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
