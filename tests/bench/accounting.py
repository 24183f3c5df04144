"""What accounting costs: the packets that pass, the network that comes and goes, the job that waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from tests.bench import Row, attaching, crossings, starting
from tests.bench.crossings import BASE, JOBS, VARIANTS, Rates, ratio
from tests.lab.node import Node
from tests.lab.progress import progress

UNITS = {"udp": (1e3, "k/s"), "tcp": (1e3, "GB/s")}
WAYS = {
    "udp out": "64-byte UDP packets out through NAT",
    "udp in": "64-byte UDP packets in through NAT",
    "tcp out": "TCP out through NAT",
    "tcp in": "TCP in through NAT",
}


def rows() -> list[Row]:
    """What needs no node."""
    with progress("sending through NAT"), tempfile.TemporaryDirectory() as directory:
        passed = through_nat(crossings.measure(Path(directory)))
    with progress("attaching and detaching"):
        # Network and mounts of its own.
        argv = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.bench.attaching"]
        seen = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout)
    return [*passed, *attached(seen), *read(seen), daemon(seen)]


def rows_of_node(node: Node) -> list[Row]:
    seen = starting.seconds(node)
    figure = f"{spread(seen)} ms"
    return [(f"what vmnode-starter adds to a job's start, median of {len(seen)} jobs", figure, "<= 120 ms")]


def through_nat(rates: Rates) -> list[Row]:
    found = []
    for what, name in WAYS.items():
        divisor, unit = UNITS[what.partition(" ")[0]]
        for jobs in JOBS:
            alone = median(rates[what, BASE, jobs]) / divisor
            ratios = ", ".join(f"{variant} {ratio(rates, what, variant, jobs):.2f}" for variant in VARIANTS)
            found.append((f"{name}, jobs: {jobs} ({BASE}: {alone:.3g} {unit})", ratios, ">= 0.95 of it, flat"))
    return found


def attached(seen: attaching.Figures) -> list[Row]:
    ours = [one + other for one, other in zip(seen["attach"], seen["detach"])]
    figure = f"{ms(seen['attach'])} + {ms(seen['detach'])} = {spread(ours)} ms"
    found = [(f"attach + detach, one after the other, median of {len(ours)}", figure, "<= 60 ms")]
    if "cni attach" not in seen:
        return [*found, ("... against CNI's ptp and host-local", "not measured: not installed", "<= 0.6 x")]
    theirs = [one + other for one, other in zip(seen["cni attach"], seen["cni detach"])]
    figure = f"{ms(seen['cni attach'])} + {ms(seen['cni detach'])} = {spread(theirs)} ms; "
    figure += f"{median(ours) / median(theirs):.2f} x"
    return [*found, ("... against CNI's ptp and host-local, by turns", figure, "<= 0.6 x")]


def read(seen: attaching.Figures) -> list[Row]:
    return [
        (f"reading all counters of {attaching.MANY} jobs, {name}", f"{spread(seen[f'read {name}'])} ms", "<= 100 ms")
        for name in ("nftables", "iptables")
    ]


def daemon(seen: attaching.Figures) -> Row:
    before, after = seen["pss"]
    figure = f"{before:.1f} -> {after:.1f} MB PSS: {after - before:+.1f} MB"
    return f"the daemon with {attaching.CROWD} jobs, against none", figure, "<= +20 MB"


def ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1000:.0f}"


def spread(seconds: Sequence[float]) -> str:
    low, middle, high = (value * 1000 for value in quantiles(seconds, n=4))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"
