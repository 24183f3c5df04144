"""Runs in a node, as root: one healthy check after another, each timed with the CPU seconds of every process it needs.

    python3 check_rounds.py ROUNDS  ->  {"wall_s": [...], "cpu_s": [...], "bad": ["network.dhcp: NoOffer: ...", ...]}

Each round asks for the held lease, asks the name server and connects to the targets; every hundredth one also asks for
an address as a new guest.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, "/usr/lib/vmnode")

from vmnode.conditions import Status
from vmnode.config import load
from vmnode.health.check import EVERYTHING, Checker, Plan


def cpu_s(worker: int) -> float:
    """CPU seconds of this process, its ended children, and the libvirt worker."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    checker = Checker(load().config, f"rounds {os.getpid()}")
    try:
        await checker.check(EVERYTHING)
        worker = next(int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        wall, cpu, bad = [], [], []
        for number in range(1, int(sys.argv[1]) + 1):
            started, used = time.monotonic(), cpu_s(worker)
            result = await checker.check(Plan(fresh_dhcp=number % 100 == 0, outbound=True))
            bad += [
                f"round {number}: {seen.name}: {seen.reason}: {seen.message}"
                for seen in result.observations.values()
                if seen.status not in (Status.OK, Status.DISABLED)
            ]
            wall.append(time.monotonic() - started)
            cpu.append(cpu_s(worker) - used)
    finally:
        await checker.close()
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "bad": bad}))


asyncio.run(main())
