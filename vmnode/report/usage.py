"""What the jobs used, for people (tables, with bars) and for programs (JSON documents, CSV). Pure.

What was never counted is shown as nothing, never as zero. Names come from users: what could steer a terminal or a
spreadsheet is taken out of them here. Times are Unix time in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmnode.accounting.query import Sum
from vmnode.accounting.record import NEVER_COUNTED, VM, Outcome, Record
from vmnode.report.table import duration, size
from vmnode.usage import Traffic, Usage, plus

Cell = Union[str, int, float]

# condor_includes/condor_universe.h; others are shown by number.
UNIVERSES = {5: "vanilla", 7: "scheduler", 9: "grid", 10: "java", 11: "parallel", 12: "local", 13: "vm"}
LONGEST_NAME = 40  # in a table
SHORTEST_NAME = 12
LONGEST_BAR = 24  # characters
SHORTEST_BAR = 10


class Marks(NamedTuple):
    """The characters that not every terminal has."""

    nothing: str
    more: str
    lan: str
    wan: str


FINE = Marks("–", "…", "█", "░")
PLAIN = Marks("-", "~", "#", ".")


def marks(encoding: str) -> Marks:
    try:
        "".join(FINE).encode(encoding)
    except (LookupError, UnicodeError):
        return PLAIN
    return FINE


def visible(text: str) -> str:
    r"""The text with everything that cannot be seen, or that a terminal would obey, as an escape: `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_vm(record: Record) -> bool:
    return record.universe == VM or record.guest is not None


def end(record: Record) -> Optional[float]:
    """When the job ended, if somebody was there to see it: of one on the host's network, vmnoded has seen the start."""
    return None if record.outcome in NEVER_COUNTED else record.ended_at


def lasted(record: Record, now: float) -> Optional[float]:
    """Seconds; None if nobody knows."""
    until = now if record.outcome is Outcome.RUNNING else end(record)
    return None if until is None else max(until - record.started_at, 0.0)


# --- tables -------------------------------------------------------------------------------------------------------


def job_lines(records: Iterable[Record], now: float, marks: Marks) -> Iterator[tuple[str, str]]:
    """The lines of `vmnode accounting jobs`, each with its style; not a rich table, which takes a millisecond for each
    of a hundred thousand rows.
    """
    headings = ("JOB", "OWNER", "SLOT", "UNIVERSE", "STARTED", "FOR", "LAN IN", "LAN OUT", "WAN IN", "WAN OUT", "ENDED")
    lines: list[tuple[Sequence[str], str]] = [(headings, "bold")]
    for record in records:
        lines += _job(record, now, marks)
    widths = [max(_width(cells[column]) for cells, _ in lines) for column in range(len(headings) - 1)]
    for cells, style in lines:
        padded = [cell + " " * (width - _width(cell)) for cell, width in zip(cells[:5], widths)]
        padded += [" " * (width - _width(cell)) + cell for cell, width in zip(cells[5:-1], widths[5:])]
        yield "  ".join([*padded, cells[-1]]).rstrip(), style


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _job(record: Record, now: float, marks: Marks) -> Iterator[tuple[Sequence[str], str]]:
    seconds = lasted(record, now)
    yield (
        (
            _short(_cluster_and_process(record.job), marks),
            _short(record.owner, marks),
            _short(record.slot, marks),
            marks.nothing if record.universe is None else UNIVERSES.get(record.universe, str(record.universe)),
            _minute(record.started_at),
            marks.nothing if seconds is None else duration(seconds),
            *_sizes(record.total, marks),
            ending(record),
        ),
        "yellow" if record.outcome in NEVER_COUNTED or record.partial_since is not None or record.why else "",
    )
    if is_vm(record):
        for part, usage in (("  guest", record.guest), ("  sandbox", record.usage)):
            yield (part, "", "", "", "", "", *_sizes(usage, marks), ""), "dim"


def ending(record: Record) -> str:
    """`complete`, `recovered, partial since 2026-11-20 12:00`, `unaccounted: vmnoded did not answer`"""
    partial = "" if record.partial_since is None else f", partial since {_minute(record.partial_since)}"
    return record.outcome.value + partial + (f": {visible(record.why)}" if record.why else "")


def _cluster_and_process(job: str) -> str:
    parts = job.split("#")  # <schedd>#<cluster>.<proc>#<time of submission>
    return parts[1] if len(parts) == 3 else job


def _short(name: str, marks: Marks, longest: int = LONGEST_NAME) -> str:
    shown = visible(name) or marks.nothing
    return shown if len(shown) <= longest else shown[: longest - 1] + marks.more


def _minute(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _sizes(usage: Optional[Usage], marks: Marks) -> tuple[str, ...]:
    return (marks.nothing,) * 4 if usage is None else tuple(size(traffic.bytes) for traffic in usage)


def report(sums: Sequence[Sum], by: str, marks: Marks, width: int) -> RenderableType:
    """The screen of `vmnode accounting report`: the bars beside the numbers, or below them on a narrow one."""
    if not sums:
        return Text("no jobs")
    whole = total(sums)
    lines = [_numbers(one, marks) for one in (*sums, whole)]
    headings = ("JOBS", "NOT", "PARTLY", "LAN IN", "LAN OUT", "WAN IN", "WAN OUT")
    taken = sum(2 + max(len(heading), *map(len, column)) for heading, column in zip(headings, zip(*lines)))
    longest = max(len(by), len("total"), *(_width(_short(one.of, marks)) for one in sums))
    beside = width >= longest + taken + 2 + SHORTEST_BAR
    limit = longest if beside else min(longest, max(width - taken, SHORTEST_NAME))
    names = [_short(one.of, marks, limit) for one in sums]
    most = max(_bytes(one.usage) for one in sums)
    length = min(width - limit - 2 - (taken if beside else 0), LONGEST_BAR)
    bars = [_bar(one.usage, most, length, marks) for one in sums]

    table = _table(by.upper(), "total" if len(sums) > 1 else "")
    for heading, sum_of_all in zip(headings, lines[-1]):
        table.add_column(heading, sum_of_all if len(sums) > 1 else "", justify="right", no_wrap=True, overflow="fold")
    key = Text.assemble("LAN ", (marks.lan, "cyan"), " WAN ", (marks.wan, "magenta"))
    if beside:
        table.add_column(key, no_wrap=True)
    for name, line, bar in zip(names, lines, bars):
        incomplete = [Text(count, "yellow" if count != "0" else "") for count in line[1:3]]
        table.add_row(Text(name), line[0], *incomplete, *line[3:], *([bar] if beside else []))
    parts: list[RenderableType] = [table]
    if not beside:
        chart = _table(by.upper(), "")
        chart.add_column(key, no_wrap=True)
        for name, bar in zip(names, bars):
            chart.add_row(Text(name), bar)
        parts += [Text(""), chart]
    if whole.not_counted or whole.partly_counted:
        parts.append(Text(f"\nJobs NOT counted: {whole.not_counted}; only PARTLY: {whole.partly_counted}"))
    return Group(*parts)


def _table(heading: str, footer: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", footer_style="bold", show_footer=bool(footer))
    table.add_column(heading, footer, no_wrap=True, overflow="fold")
    return table


def _numbers(one: Sum, marks: Marks) -> tuple[str, ...]:
    return (str(one.jobs), str(one.not_counted), str(one.partly_counted), *_sizes(one.usage, marks))


def _bar(usage: Optional[Usage], most: int, longest: int, marks: Marks) -> Text:
    """As long as its bytes compared with the most; whatever is not nothing is seen."""
    if usage is None or not _bytes(usage):
        return Text("")
    lan = usage.lan_in.bytes + usage.lan_out.bytes
    wan = _bytes(usage) - lan
    length = max(round(longest * _bytes(usage) / most), bool(lan) + bool(wan))
    of_lan = min(max(round(length * lan / (lan + wan)), bool(lan)), length - bool(wan))
    return Text.assemble((marks.lan * of_lan, "cyan"), (marks.wan * (length - of_lan), "magenta"))


def _bytes(usage: Optional[Usage]) -> int:
    return 0 if usage is None else sum(traffic.bytes for traffic in usage)


def ranked(sums: Iterable[Sum]) -> list[Sum]:
    """Who used most comes first."""
    return sorted(sums, key=lambda one: (-_bytes(one.usage), one.of))


def total(sums: Iterable[Sum]) -> Sum:
    whole = Sum("total", 0, 0, 0, None)
    for one in sums:
        usage = plus(whole.usage or Usage(), one.usage) if one.usage is not None else whole.usage
        whole = Sum(
            whole.of,
            whole.jobs + one.jobs,
            whole.not_counted + one.not_counted,
            whole.partly_counted + one.partly_counted,
            usage,
        )
    return whole


# --- JSON ---------------------------------------------------------------------------------------------------------


def job_document(record: Record, now: float) -> dict[str, Any]:
    """One of the "jobs" of `vmnode accounting jobs --json`: a VM job's guest and sandbox both, and always the total."""
    return {
        "job": record.job or None,
        "owner": record.owner or None,
        "slot": record.slot,
        "universe": record.universe,
        "started_at": record.started_at,
        "ended_at": end(record),
        "duration_s": lasted(record, now),
        "outcome": record.outcome.value,
        "partial_since": record.partial_since,
        "why": record.why,
        "total": _usage_document(record.total),
        "vm": {"guest": _usage_document(record.guest), "sandbox": _usage_document(record.usage)}
        if is_vm(record)
        else None,
    }


def report_document(sums: Sequence[Sum], by: str, since: Optional[float]) -> dict[str, Any]:
    """What `vmnode accounting report --json` adds to version and host."""
    groups = [{by: one.of or None, **_sum_document(one)} for one in sums]
    return {"by": by, "since": since, "groups": groups, "total": _sum_document(total(sums))}


def _sum_document(one: Sum) -> dict[str, Any]:
    return {
        "jobs": one.jobs,
        "not_counted": one.not_counted,
        "partly_counted": one.partly_counted,
        "usage": _usage_document(one.usage),
    }


def _usage_document(usage: Optional[Usage]) -> Optional[dict[str, dict[str, int]]]:
    return None if usage is None else {name: traffic._asdict() for name, traffic in usage._asdict().items()}


# --- CSV ----------------------------------------------------------------------------------------------------------

_COUNTS = tuple(f"{direction}_{unit}" for direction in Usage._fields for unit in Traffic._fields)
_ABOUT_A_JOB = (
    *("job", "owner", "slot", "universe", "started_at", "ended_at", "duration_s", "outcome", "partial_since", "why"),
)
JOB_COLUMNS = (*_ABOUT_A_JOB, *_COUNTS, *(f"{part}_{count}" for part in ("guest", "sandbox") for count in _COUNTS))


def job_cells(record: Record, now: float) -> list[Cell]:
    """One line of `vmnode accounting jobs --csv`. Times are UTC; guest and sandbox are empty for other than VM jobs."""
    seconds = lasted(record, now)
    return [
        _safe(record.job),
        _safe(record.owner),
        _safe(record.slot),
        "" if record.universe is None else record.universe,
        _second(record.started_at),
        _second(end(record)),
        "" if seconds is None else round(seconds, 3),
        record.outcome.value,
        _second(record.partial_since),
        _safe(record.why),
        *_counts(record.total),
        *_counts(record.guest if is_vm(record) else None),
        *_counts(record.usage if is_vm(record) else None),
    ]


def report_columns(by: str) -> tuple[str, ...]:
    return (by, "jobs", "not_counted", "partly_counted", *_COUNTS)


def report_cells(one: Sum) -> list[Cell]:
    """One line of `vmnode accounting report --csv`."""
    return [_safe(one.of), one.jobs, one.not_counted, one.partly_counted, *_counts(one.usage)]


def _counts(usage: Optional[Usage]) -> list[Cell]:
    return [""] * len(_COUNTS) if usage is None else [count for traffic in usage for count in traffic]


def _second(at: Optional[float]) -> str:
    return "" if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _safe(text: str) -> str:
    """A spreadsheet takes what begins so for a formula, and runs it (OWASP, "CSV Injection")."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
