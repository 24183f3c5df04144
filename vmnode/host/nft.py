"""One table of our own in nftables (nft(8)): changed in transactions, and read back as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Any, Optional

from vmnode.errors import CommandFailed
from vmnode.host import process

_DEADLINE_S = 10.0


class Table:
    """Raises CommandFailed and DeadlineExceeded, naming nft."""

    def __init__(self, family: str, name: str) -> None:
        self.name = name
        self._family = family

    async def items(self) -> Optional[list[dict[str, Any]]]:
        """Its chains, rules and sets as nft describes them (libnftables-json(5)); None if it is not there."""
        listed = await process.run(["nft", "-j", "list", "table", self._family, self.name], _DEADLINE_S)
        if listed.status != 0:
            return None
        found: list[dict[str, Any]] = json.loads(listed.stdout)["nftables"]
        return found

    async def change(self, commands: str) -> None:
        """One transaction: all of it, or none."""
        done = await process.run(["nft", "-f", "-"], _DEADLINE_S, text=commands)
        if done.status != 0:
            raise CommandFailed(f"nft: the table {self._family} {self.name} cannot be changed: {done.stderr.strip()}")

    @property
    def removal(self) -> str:
        """The commands that remove it, whether it is there or not."""
        return f"add table {self._family} {self.name}\ndelete table {self._family} {self.name}\n"


def lan_sets(lan4: Iterable[IPv4Network], lan6: Iterable[IPv6Network]) -> str:
    """The sets `lan4` and `lan6` with these prefixes, which may overlap, for the block of a table."""
    return _interval_set("lan4", "ipv4_addr", map(str, collapse_addresses(lan4))) + _interval_set(
        "lan6", "ipv6_addr", map(str, collapse_addresses(lan6))
    )


def _interval_set(name: str, kind: str, prefixes: Iterable[str]) -> str:
    text = ", ".join(prefixes)
    elements = f" elements = {{ {text} }}" if text else ""
    return f"  set {name} {{ type {kind}; flags interval;{elements} }}\n"
