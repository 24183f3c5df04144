"""How fast packets get through a host that counts them, beside one that only translates addresses.

Each variant has a world of its own, and the same bursts go through all of them by turns, so that what else the machine
does meets all alike. Every job but one is an element of the sets (or four rules) only: that one, in the middle of them,
sends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple, Union

from tests.kernel.crossroads import RULES, WAN, crossroads, job
from tests.kernel.world import script
from vmnode.host.counting import Counters, Link
from vmnode.host.iptables import IptablesCounters
from vmnode.host.netns import Namespace
from vmnode.host.nftables import NftablesCounters

JOBS = (1, 64, 1024)
ROUNDS = 12
PACKETS, MEGABYTES = 40_000, 400  # of a burst, each way: a tenth of a second at most
FIRST = 2  # number of the first job
Set = Callable[[int], None]


class World(NamedTuple):
    """A host, a job of his, and someone far away."""

    host: Namespace
    near: Namespace
    far: Namespace
    stack: ExitStack

    def close(self) -> None:
        self.host.run(self.stack.close)
        self.host.close()


def links(count: int) -> list[Link]:
    assert RULES.pool6 is not None
    return [Link(f"{RULES.links}{n}", RULES.pool4[n], RULES.pool6[n]) for n in range(FIRST, FIRST + count)]


def make(jobs: int, rules: Set) -> World:
    host, stack = Namespace(), ExitStack()

    def inside() -> World:
        roads = stack.enter_context(crossroads())
        near = stack.enter_context(job(FIRST + jobs // 2)).namespace
        rules(jobs)
        return World(host, near, roads.wan, stack)

    return host.run(inside)


def nat_alone(jobs: int) -> None:
    script('table ip nat { chain c { type nat hook postrouting priority srcnat; oifname "wan0" masquerade\n}\n}')


def hooks(jobs: int) -> None:
    """Where ours count, without a rule: what the kernel takes for coming by there."""
    places = (("out", "prerouting", "raw"), ("in", "postrouting", "mangle"))
    chains = "".join(f"chain {name} {{ type filter hook {hook} priority {at}; }}\n" for name, hook, at in places)
    nat_alone(jobs)
    script(f"table inet t {{\n{chains}}}\n")


def counting(make_counters: Callable[[str], Counters]) -> Set:
    def rules(jobs: int) -> None:
        async def set_up() -> None:
            counters = make_counters(RULES.tag)
            await counters.set_up(RULES)
            await counters.add(links(jobs))

        asyncio.run(set_up())

    return rules


def recipe(jobs: int) -> None:
    """Four rules for each job, one after the other: https://osgtech.blogspot.com/2011/09/per-batch-job-network-statistics.html"""
    lan = IPv4Network("192.168.0.0/16")
    lines = ["*nat", "-A POSTROUTING -o wan0 -j MASQUERADE", "COMMIT", "*filter"]
    back = "-m state --state RELATED,ESTABLISHED"
    for link in links(jobs):
        lines += [f"-A FORWARD -i {link.name} -o wan0 {no}--dst {lan} -j ACCEPT" for no in ("", "! ")]
        lines += [f"-A FORWARD -i wan0 -o {link.name} {back} {no}--src {lan} -j ACCEPT" for no in ("", "! ")]
    text = "\n".join([*lines, "COMMIT", ""])
    subprocess.run(["iptables-restore"], input=text, text=True, check=True, timeout=60)


BASE = "NAT alone"
VARIANTS = {
    "nftables": counting(NftablesCounters),
    "(two empty chains)": hooks,
    "iptables": counting(IptablesCounters),
    "recipe": recipe,
}
KINDS = {"udp": PACKETS, "tcp": MEGABYTES}
Rates = dict[tuple[str, str, int], list[float]]  # by what is sent ("udp out"), variant and jobs; one of each round


def measure(directory: Path, rounds: int = ROUNDS) -> Rates:
    program = compiled(directory)
    worlds: dict[tuple[str, int], World] = {}
    rates: Rates = {}
    try:
        for jobs in JOBS:
            for variant, rules in {BASE: nat_alone, **VARIANTS}.items():
                worlds[variant, jobs] = make(jobs, rules)
        for _ in range(rounds):
            for (variant, jobs), world in worlds.items():
                for kind, amount in KINDS.items():
                    for way, rate in zip(("out", "in"), burst(program, kind, world, amount)):
                        rates.setdefault((f"{kind} {way}", variant, jobs), []).append(rate)
    finally:
        for world in worlds.values():
            world.close()
    return rates


def compiled(directory: Path) -> Path:
    program = directory / "crossing"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(Path(__file__).with_name("crossing.c"))], check=True)
    return program


def burst(program: Path, kind: str, world: World, amount: int) -> tuple[float, float]:
    ends = [f"/proc/{os.getpid()}/fd/{end.descriptor}" for end in (world.near, world.far)]
    argv: list[Union[str, Path]] = [program, kind, *ends, WAN[0], str(amount)]
    forth, back = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.split()
    return float(forth), float(back)


def ratio(rates: Rates, what: str, variant: str, jobs: int) -> float:
    """Against NAT alone in the same round; the median."""
    pairs = zip(rates[what, variant, jobs], rates[what, BASE, jobs])
    return median(one / alone for one, alone in pairs)
