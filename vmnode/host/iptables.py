"""Counts the jobs' packets with iptables, ip6tables and ipset: chains of our own, whose rules never change.

    raw     PREROUTING   -> vmnode<tag>-out    after defragmentation (kernel, NF_IP_PRI_RAW)
    mangle  POSTROUTING  -> vmnode<tag>-in     after the addresses were translated back
    nat     POSTROUTING  -> vmnode<tag>-nat

A packet of others meets one comparison of its link's name; a job's packet two to four lookups in the sets of ipsets.py,
however many jobs there are. The sets know a job by its address: a packet from a job's link under an address to which
the link does not lead is no job's, and is dropped (an ordinary user can send such with IPV6_FREEBIND).

Works with both kinds of iptables, nft and legacy. No rule or set of others is touched.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Optional

from pyroute2 import IPRoute

from vmnode.errors import CommandFailed, VmnodeError
from vmnode.host import process
from vmnode.host.counting import Link, Rules
from vmnode.host.ipsets import FAMILIES, Sets
from vmnode.host.netns import Namespace
from vmnode.host.resolver import iptables_rules
from vmnode.usage import Traffic, Usage

LONGEST_TAG = 18  # of a chain's name the kernel takes 28 characters, of a set's 31
_DEADLINE_S = 10.0
_WAIT_S = 5  # for the lock of iptables-legacy
_TOOL = {4: "iptables", 6: "ip6tables"}
_ATTEMPTS = 3  # others may change the rules between our look and our change
_RELEASED_S = 3.0  # the kernel lets go of the sets of deleted rules in the background


class _Chain(NamedTuple):
    """A chain of ours, as iptables-save prints it."""

    table: str
    hook: str
    name: str
    jump: str
    rules: tuple[str, ...]


class IptablesCounters:
    """See counting.Counters."""

    def __init__(self, tag: str, enter: Sequence[str] = ()) -> None:
        """`enter`: a command that runs ours in another network namespace, for a trial."""
        assert len(tag) <= LONGEST_TAG
        self._prefix = f"vmnode{tag}"
        self._sets = Sets(self._prefix)
        self._enter = tuple(enter)
        self._rules: Optional[Rules] = None
        self._elements: dict[str, set[str]] = {}  # of the sets, by link
        self._whole: set[str] = set()  # the links of which none is missing
        self._changes = 0  # a reading that one of these overlaps does not know what there is

    async def set_up(self, rules: Rules) -> bool:
        await self._ipset(self._sets.making(rules))
        changed = [await self._have(family, self._chains(rules, family)) for family in FAMILIES]
        self._rules = rules
        await self.read()
        return not any(changed)

    async def add(self, links: Iterable[Link]) -> None:
        new = [link for link in links if link.name not in self._whole]
        self._changes += 1
        for link in new:
            self._elements.setdefault(link.name, set()).update(self._sets.elements(link))
        await self._ipset(self._sets.adding(new))
        self._changes += 1
        self._whole |= {link.name for link in new}

    async def remove(self, links: Iterable[Link]) -> None:
        """Goes by the names: who removes may not know the addresses any more."""
        gone = list(links)
        known = [self._elements.get(link.name, set()) | self._sets.elements(link) for link in gone]
        self._changes += 1
        await self._ipset(self._sets.removing(set().union(*known)))
        self._changes += 1
        for link in gone:
            self._elements.pop(link.name, None)
            self._whole.discard(link.name)

    async def read(self) -> Optional[Mapping[str, Usage]]:
        rules = self._rules
        if rules is None:
            return None
        families = [family for family in FAMILIES if self._chains(rules, family)[0].rules]
        changes = self._changes
        checks = [self._as_made(family, chain) for family in families for chain in self._chains(rules, family)]
        saved, made = await asyncio.gather(
            self._run("ipset", "restore", text=self._sets.listing()), asyncio.gather(*checks)
        )
        if saved.status != 0 and "does not exist" not in saved.stderr:
            raise CommandFailed(f"ipset: the counts of the jobs cannot be read: {saved.stderr.strip()}")
        listed = self._sets.parse(saved.stdout) if saved.status == 0 else None
        if changes == self._changes:
            self._elements = {} if listed is None else listed.elements
            self._whole = set() if listed is None else set(listed.usages)
        if listed is None or not all(made) or not self._sets.lan_as_made(listed, rules):
            return None
        return listed.usages

    async def tear_down(self) -> None:
        for family in FAMILIES:
            await self._have(family, self._chains(None, family))
        names = self._sets.all_of((await self._checked("ipset", "list", "-n")).stdout.split())
        give_up = asyncio.get_running_loop().time() + _RELEASED_S
        while names:
            try:
                await self._ipset(self._sets.destroying(names))
            except CommandFailed:
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(0.05)
            names = self._sets.all_of((await self._checked("ipset", "list", "-n")).stdout.split())
        self._rules, self._elements, self._whole = None, {}, set()

    # --- the chains ---------------------------------------------------------------------------------------------------

    def _chains(self, rules: Optional[Rules], family: int) -> list[_Chain]:
        """What there has to be; without rules, what must not be there."""
        pool = None if rules is None else (rules.pool4 if family == 4 else rules.pool6)
        chains = []
        for table, hook, end, guard in _PLACES:
            name = f"{self._prefix}-{end}"
            if rules is None or pool is None:
                chains.append(_Chain(table, hook, name, "", ()))
                continue
            bodies = {
                "out": (*self._counting(family, "out", "dst", "src,src"), "-m rpfilter --invert -j DROP"),
                "in": self._counting(family, "in", "src", "dst,dst"),
                "nat": (f"-s {pool} ! -o {rules.links}+ -j MASQUERADE",),
                "names": tuple(iptables_rules(rules.links, *rules.relay)) if rules.relay and family == 4 else (),
            }
            jump = f"-A {hook} {guard.format(rules.links)}-j {name}"
            chains.append(_Chain(table, hook, name, jump, tuple(f"-A {name} {rule}" for rule in bodies[end])))
        return chains

    def _counting(self, family: int, way: str, far: str, near: str) -> tuple[str, str]:
        lan = self._sets.lan(family)
        lan_set, wan_set = (self._sets.counting(f"{where}_{way}", family) for where in ("lan", "wan"))
        return (
            f"-m set --match-set {lan} {far} -m set --match-set {lan_set} {near} -j RETURN",
            f"-m set ! --match-set {lan} {far} -m set --match-set {wan_set} {near} -j RETURN",
        )

    async def _as_made(self, family: int, chain: _Chain) -> bool:
        return _same(await self._save(family, chain.table), chain)

    async def _have(self, family: int, chains: Sequence[_Chain]) -> bool:
        """Bring one family's chains into this form, each table at one blow; whether that changed anything."""
        for _ in range(_ATTEMPTS):
            try:
                saved = [await self._save(family, chain.table) for chain in chains]
            except CommandFailed:
                if not any(chain.rules for chain in chains):
                    return False  # no ip6tables: then there is nothing of ours in it
                raise
            text = "".join(_change(table, chain) for table, chain in zip(saved, chains))
            if not text:
                return False
            done = await self._run(f"{_TOOL[family]}-restore", "-w", str(_WAIT_S), "--noflush", text=text)
            if done.status == 0:
                return True
        raise CommandFailed(f"{_TOOL[family]}: the jobs' rules cannot be made: {_said(done)}")

    async def _save(self, family: int, table: str) -> list[str]:
        return (await self._checked(f"{_TOOL[family]}-save", "-t", table)).stdout.splitlines()

    # --- the tools ----------------------------------------------------------------------------------------------------

    async def _ipset(self, commands: str) -> None:
        if commands:
            done = await self._run("ipset", "restore", "-exist", text=commands)
            if done.status != 0:
                raise CommandFailed(f"ipset: the sets {self._prefix}-* cannot be changed: {_said(done)}")

    async def _checked(self, *argv: str) -> process.Finished:
        done = await self._run(*argv)
        if done.status != 0:
            raise CommandFailed(f"{' '.join(argv)} ended with status {done.status}: {_said(done)}")
        return done

    async def _run(self, *argv: str, text: Optional[str] = None) -> process.Finished:
        return await process.run([*self._enter, *argv], _DEADLINE_S, task=" ".join(argv), text=text)


_PLACES = (
    ("raw", "PREROUTING", "out", "-i {}+ "),
    ("mangle", "POSTROUTING", "in", "-o {}+ "),
    ("nat", "POSTROUTING", "nat", ""),
    ("nat", "PREROUTING", "names", "-i {}+ "),
)


def _said(done: process.Finished) -> str:
    return " ".join(done.stderr.split()) or f"status {done.status}"


def _jumps(saved: Iterable[str], chain: _Chain) -> list[str]:
    return [line for line in saved if line.startswith("-A ") and line.split()[-2:] == ["-j", chain.name]]


def _body(saved: Iterable[str], chain: _Chain) -> list[str]:
    return [line for line in saved if line.startswith(f"-A {chain.name} ")]


def _same(saved: Sequence[str], chain: _Chain) -> bool:
    return _jumps(saved, chain) == ([chain.jump] if chain.rules else []) and _body(saved, chain) == list(chain.rules)


def _change(saved: Sequence[str], chain: _Chain) -> str:
    """What iptables-restore has to be told; nothing if all is as it should be."""
    there = any(line.startswith(f":{chain.name} ") for line in saved)
    lines = [line.replace("-A", "-D", 1) for line in _jumps(saved, chain)]
    if chain.rules and not _same(saved, chain):
        # The chain's own line empties it. First of all rules: an ACCEPT of others would end the way through the table.
        jump = chain.jump.replace(f"-A {chain.hook}", f"-I {chain.hook} 1", 1)
        lines = [f":{chain.name} - [0:0]", *lines, jump, *chain.rules]
    elif not chain.rules and there:
        lines += [f"-F {chain.name}", f"-X {chain.name}"]
    else:
        return ""
    return "\n".join([f"*{chain.table}", *lines, "COMMIT", ""])


# --- does it work here? -----------------------------------------------------------------------------------------------

_PROBE = b"vmnode"
_PROBE_USAGE = Traffic(20 + 8 + len(_PROBE), 1)  # IPv4 and UDP headers


async def obstacle(rules: Rules) -> Optional[str]:
    """Why these rules would not count here, as a sentence; None if they do.

    Makes them in a network namespace that lives for this moment, where the loopback is the job's link, and counts a
    packet.
    """
    try:
        namespace = Namespace()
    except VmnodeError as error:
        return error.what
    try:
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace.descriptor}"]
        counters = IptablesCounters(rules.tag, enter)
        await counters.set_up(rules._replace(links="lo"))
        await counters.add([Link("lo", IPv4Address("127.0.0.1"), IPv6Address("::1") if rules.pool6 else None)])
        namespace.run(_send)
        counts = await counters.read()
        if counts is None:
            return "iptables-save and ipset list other rules and sets than they were told to make"
        usage = counts.get("lo", Usage())
        if {_PROBE_USAGE, Traffic()} != set(usage) or usage.lan_in != usage.lan_out:
            return f"iptables and ipset do not count as they should: of one packet on the loopback, {usage}"
        await counters.tear_down()
        return None
    except VmnodeError as error:
        return error.what
    finally:
        namespace.close()


def _send() -> None:
    with IPRoute() as ipr:
        ipr.link("set", index=1, state="up")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(_PROBE, receiver.getsockname())
        receiver.settimeout(1.0)
        receiver.recv(len(_PROBE))
