"""What an overlay through the installed plugin costs, beside bare qemu-img and beside the copy that it stands for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tests.bench import Row
from tests.lab.node import Node
from tests.lab.progress import progress

SCRIPT = Path(__file__).with_name("overlay_rounds.py")
ROOT = "/images"
SMALL, LARGE, COPIED = f"{ROOT}/64M.raw", f"{ROOT}/64G.raw", f"{ROOT}/copied.raw"
SCRATCH = "/var/lib/condor/execute/bench"
PARSED = "/run/vmnode/images.json"  # where the daemon leaves the configuration for the plugin

ROUNDS = 40
AT_ONCE = 64
COPIES = 3
COPIED_GB = 6
PARTS = ("interpreter", "imports", "policy", "qemu-img", "rest")


def rows(node: Node) -> list[Row]:
    prepare(node)
    try:
        with progress("making overlays"):
            seen = measure(node, "by_turns", ROUNDS, SMALL, LARGE)
            crowd = measure(node, "together", AT_ONCE, SMALL)
        return [*alone(seen), at_once(crowd), against_copy(node)]
    finally:
        node.run(["rm", "-rf", ROOT, SCRATCH])


def prepare(node: Node) -> None:
    node.run(["install", "-d", "-m", "0755", ROOT])
    node.run(["install", "-d", "-o", "alice", "-g", "alice", SCRATCH])
    # Random, so that no format is in it; the large one is a hole but for the same beginning.
    node.run(["sh", "-ec", f"head -c 64M /dev/urandom >{SMALL}; head -c 64K {SMALL} >{LARGE}; truncate -s 64G {LARGE}"])
    node.write("/etc/vmnode/conf.d/80-bench.toml", f'[images]\nroots = ["{ROOT}"]\n')
    node.run(["systemctl", "reload", "vmnode"])
    node.wait_until(lambda: ROOT in node.run(["cat", PARSED], check=False).stdout, "the daemon to have read the roots")


def measure(node: Node, what: str, count: int, *bases: str) -> Any:
    user = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "--reset-env"]
    argv = [*user, "env", "-C", SCRATCH, "python3", "-c", SCRIPT.read_text(), what, str(count), *bases]
    return json.loads(node.run(argv, timeout=900).stdout)


def alone(seen: dict[str, list[float]]) -> list[Row]:
    ours, bare, floor = (median(seen[name]) for name in ("small", "bare", "interpreter"))
    parts = " + ".join(f"{name} {ms(seen[f'part {name}'])}" for name in PARTS)
    return [
        (
            f"an overlay by the plugin, against bare qemu-img create, {ROUNDS} of each by turns",
            f"{ours * 1000:.1f} / {bare * 1000:.1f} ms = {ours / bare:.2f} x",
            "<= 6 x",
        ),
        (
            "... where the time goes, in ms",
            parts,
            f"python3 -IS -c pass: {floor * 1000:.1f}",
        ),
        (
            "... on a base of 64 MB, and of 64 GB (sparse); in brackets the middle half of them",
            f"{spread(seen['small'])}, {spread(seen['large'])} ms",
            "equal within noise",
        ),
    ]


def at_once(seen: dict[str, list[float]]) -> Row:
    cores = os.cpu_count() or 1
    allowed = median(seen["cpu"]) / cores
    return (
        f"{AT_ONCE} overlays at once, all right: wall time per overlay, median of 3",
        f"{ms(seen['at once'])} ms (one after the other: {ms(seen['in turn'])} ms)",
        f"{allowed * 1000:.1f} ms: their CPU time on {cores} cores",
    )


def against_copy(node: Node) -> Row:
    """cp of COPIED_GB that are really there; less where the disk has not three times as much room."""
    free = int(node.run(["df", "--output=avail", "-B1", SCRATCH]).stdout.split()[1])
    size = min(COPIED_GB, free // (3 << 30))
    if size == 0:
        return (f"cp of {COPIED_GB} GB against an overlay", "not measured: no room", "")
    with progress(f"copying {size} GB {COPIES} times"):
        node.run(["sh", "-ec", f"head -c {size}G /dev/urandom >{COPIED}"], timeout=600)
        try:
            seen = measure(node, "copies", COPIES, COPIED)
        finally:
            node.run(["rm", "-f", COPIED])
    copied, on_disk, overlay = (median(seen[name]) for name in ("cp", "on disk", "overlay"))
    scaled = "" if size == COPIED_GB else f" (only {size} GB: the disk has no room for more)"
    return (
        f"cp of {size} GB on the same disk, against an overlay on them{scaled}",
        f"{copied:.1f} s ({on_disk:.1f} s until on disk) / {overlay * 1000:.1f} ms = {copied / overlay:,.0f} x",
        "",
    )


def ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1000:.1f}"


def spread(seconds: Sequence[float]) -> str:
    low, middle, high = (value * 1000 for value in quantiles(seconds, n=4))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"
