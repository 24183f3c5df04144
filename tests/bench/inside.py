"""Runs in a node, as root: times whole checks, with the CPU time of every process that they need. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, "/usr/lib/vmnode")

from vmnode.config import load
from vmnode.health.check import EVERYTHING, Checker, Plan

ROUNDS = 10


def cpu_s(worker: int) -> float:
    """CPU seconds of this process, its ended children, and the libvirt worker."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    checker = Checker(load().config, f"bench {os.getpid()}")
    try:
        await checker.check(EVERYTHING)
        worker = next(int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        wall, cpu = [], []
        for _ in range(ROUNDS):
            started, used = time.monotonic(), cpu_s(worker)
            await checker.check(Plan(fresh_dhcp=False, outbound=True))
            wall.append(time.monotonic() - started)
            cpu.append(cpu_s(worker) - used)
    finally:
        await checker.close()
    print(json.dumps({"wall_s": wall, "cpu_s": cpu}))


asyncio.run(main())
