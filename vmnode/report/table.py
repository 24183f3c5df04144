"""What is known, for people: an aligned table, the first broken link on top, its hint under it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmnode.conditions import Condition, Status
from vmnode.health.decide import first_broken, state_of
from vmnode.overlays import Overlay
from vmnode.report.state import Snapshot
from vmnode.transfer.catalogue import Root

_STYLES = {Status.OK: "green", Status.FAILED: "bold red", Status.UNKNOWN: "yellow", Status.DISABLED: "dim"}
_STATE_STYLES = {"healthy": "bold green", "failed": "bold red", "unknown": "bold yellow"}


def duration(seconds: float) -> str:
    """`42 s`, `5 min`, `3 h`, `12 d`"""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def overview(host: str, snapshot: Snapshot, age_s: float, now_boot: float) -> RenderableType:
    """The whole screen of `vmnode status` and `vmnode check`. Times are CLOCK_BOOTTIME in seconds."""
    state = state_of(snapshot.conditions)
    when = "just now" if age_s < 1 else f"{duration(age_s)} ago"
    parts: list[RenderableType] = [
        Text.assemble(f"{host} is ", (state, _STATE_STYLES[state]), f" (checked {when})"),
    ]
    broken = first_broken(snapshot.conditions)
    if broken is not None:
        style = _STYLES[broken.status]
        parts.append(Text.assemble("\n", (f"{broken.name}: {broken.reason}", style), f": {broken.message}"))
        if broken.hint:
            parts.append(Text(f"  hint: {broken.hint}"))
    parts.append(Text(""))
    parts.append(_conditions(snapshot.conditions, now_boot))
    return Group(*parts)


def _conditions(conditions: Sequence[Condition], now_boot: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("CONDITION", "STATUS", "FOR", "REASON", "WHAT"):
        table.add_column(heading, no_wrap=heading != "WHAT", overflow="fold")
    for condition in conditions:
        reason = "" if condition.status in (Status.OK, Status.DISABLED) else condition.reason
        waiting = " (to be confirmed)" if condition.contrary else ""
        table.add_row(
            condition.name,
            Text(condition.status.value, style=_STYLES[condition.status]),
            duration(now_boot - condition.since),
            reason,
            Text(condition.message + waiting),
        )
    return table


def size(count: int) -> str:
    """`512 B`, `64.0 MiB`, `6.0 GiB`"""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} B"


def images(roots: Sequence[Root], overlays: Sequence[Overlay], now: float) -> RenderableType:
    """The screen of `vmnode images`. `now` is Unix time in seconds."""
    parts: list[RenderableType] = []
    for root in roots:
        if root.problem:
            parts.append(Text.assemble(root.path, ": ", (root.problem, _STYLES[Status.FAILED])))
    listed = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("IMAGE", "FORMAT", "GUEST SEES", "FILE HAS", "PROBLEM"):
        listed.add_column(heading, no_wrap=heading != "PROBLEM", overflow="fold")
    for image in (image for root in roots for image in root.images):
        seen = size(image.virtual_size) if not image.problem else ""
        listed.add_row(Text(image.path), Text(image.format), seen, size(image.size), Text(image.problem))
    running = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("JOB", "OWNER", "FOR", "RUNS ON"):
        running.add_column(heading, no_wrap=heading != "RUNS ON", overflow="fold")
    for overlay in overlays:
        bases = ", ".join(base.path for base in overlay.bases) or "disks of its own"
        running.add_row(Text(overlay.job), Text(overlay.owner), duration(now - overlay.started_at), Text(bases))
    parts.append(listed if listed.row_count else Text("no images"))
    parts += [Text(""), running if running.row_count else Text("no guests run on them")]
    return Group(*parts)
