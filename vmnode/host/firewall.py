"""What the host's firewall does to the guests' packets: read, and never changed.

The one thing that we add, for a second and only while traffic fails, is a table of our own that marks the probe's
packets for tracing (nft(8), "nftrace"). It belongs to the process that made it: the kernel removes it with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from ipaddress import IPv4Network
from typing import Any, Optional

from vmnode.errors import CommandFailed, DeadlineExceeded
from vmnode.host import process

_DEADLINE_S = 5.0


async def nat_rule_exists(network: IPv4Network) -> Optional[bool]:
    """Whether a rule of libvirt's translates the source addresses of `network`; None if it cannot be found out.

    libvirt keeps such rules in a table of its own (nftables, the default from 10.4) or in the chain LIBVIRT_PRT
    (iptables); before 5.1 they stood in POSTROUTING itself.
    """
    try:
        listed = await process.run(["nft", "-j", "list", "table", "ip", "libvirt_network"], _DEADLINE_S)
        if listed.status == 0 and _translates(json.loads(listed.stdout), network):
            return True
    except (CommandFailed, DeadlineExceeded, ValueError):
        listed = None
    for chain in ("LIBVIRT_PRT", "POSTROUTING"):
        try:
            rules = await process.run(["iptables", "-w", "2", "-t", "nat", "-S", chain], _DEADLINE_S)
        except (CommandFailed, DeadlineExceeded):
            return False if listed is not None and listed.status == 0 else None
        if rules.status == 0 and re.search(rf"-s {re.escape(str(network))} .*-j (MASQUERADE|SNAT)", rules.stdout):
            return True
    return False


def _translates(document: Any, network: IPv4Network) -> bool:
    """Whether `nft -j list` shows a masquerade or snat for packets from `network`."""
    for item in document.get("nftables", []):
        expressions = item.get("rule", {}).get("expr", [])
        if not any("masquerade" in expression or "snat" in expression for expression in expressions):
            continue
        for expression in expressions:
            match = expression.get("match", {})
            left, right = match.get("left", {}), match.get("right", {})
            prefix = right.get("prefix", {}) if isinstance(right, dict) else {}
            source = left.get("payload", {}) if isinstance(left, dict) else {}
            if source.get("field") == "saddr" and prefix == {
                "addr": str(network.network_address),
                "len": network.prefixlen,
            }:
                return True
    return False


class DropTrace:
    """Finds which rule drops a probe's packets.

        async with DropTrace(identity, "virbr0", "192.168.122.17", 9618) as trace:
            … try to connect …
        trace.culprit  # "table ip filter, chain FORWARD, its policy"

    Sees rules of nftables and of iptables-nft; those of iptables-legacy leave no trace. Answers are followed from where
    the kernel knows whose they are, which is before all rules of filters but the earliest.
    """

    def __init__(self, identity: str, bridge: str, source: str, port: int) -> None:
        family = "ip6" if ":" in source else "ip"
        self._script = (
            f"add table inet vmn_trace_{identity} {{ flags owner; }}\n"
            f"add chain inet vmn_trace_{identity} probe {{ type filter hook prerouting priority -350; }}\n"
            f'add rule inet vmn_trace_{identity} probe iifname "{bridge}" {family} saddr {source} tcp dport {port}'
            " meta nftrace set 1\n"
            f"add chain inet vmn_trace_{identity} answers {{ type filter hook prerouting priority -199; }}\n"
            f"add rule inet vmn_trace_{identity} answers ct direction reply ct original {family} saddr {source}"
            f" tcp sport {port} meta nftrace set 1\n"
        )
        self._children: list[asyncio.subprocess.Process] = []
        self.culprit: Optional[str] = None

    async def __aenter__(self) -> DropTrace:
        try:
            monitor = await process.start(["nft", "monitor", "trace"])
            self._children.append(monitor)
            owner = await process.start(["nft", "-i"], stdin=asyncio.subprocess.PIPE)
            self._children.append(owner)
        except CommandFailed:
            return self
        assert owner.stdin is not None
        owner.stdin.write(self._script.encode())
        await asyncio.sleep(0.3)  # both have to be in place before the first packet
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.2)
        output = b""
        for child in self._children:
            await process.end(child, "nft trace")
        if self._children and self._children[0].stdout is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                output = await asyncio.wait_for(self._children[0].stdout.read(), 1.0)
        self.culprit = find_drop(output.decode("utf-8", "replace"))


_TRACE = re.compile(r"^trace id \w+ (?P<family>\w+) (?P<table>\S+) (?P<chain>\S+) (?P<rest>.*)$", re.MULTILINE)


def find_drop(text: str) -> Optional[str]:
    """The place in `nft monitor trace`'s output where a packet ended."""
    for line in _TRACE.finditer(text):
        place = f"table {line['family']} {line['table']}, chain {line['chain']}"
        if line["rest"].startswith("policy drop"):
            return f"{place}, its policy"
        rule = re.match(r"rule (?P<rule>.*) \(verdict drop\)$", line["rest"])
        if rule or (line["rest"].startswith("rule ") and " reject" in line["rest"]):
            body = rule["rule"] if rule else line["rest"][5:].split(" (verdict")[0]
            return f"{place}, rule: {body}"
    return None
