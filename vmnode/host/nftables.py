"""Counts the jobs' packets with nftables (nft(8)): one table of our own, whose rules never change.

    table inet vmnode<tag>
      lan4 lan6                          the LAN's prefixes
      lan_in lan_out wan_in wan_out      an element for each job's link, and a counter for each element

A packet meets one comparison of its link's name; a job's packet two or three lookups, however many jobs there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

from vmnode.host.counting import Link, Rules
from vmnode.host.nft import Table, lan_sets
from vmnode.host.resolver import nft_rule
from vmnode.usage import Traffic, Usage

_COUNTING = Usage._fields  # the names of the sets


class NftablesCounters:
    """See counting.Counters."""

    def __init__(self, tag: str) -> None:
        self._table = Table("inet", f"vmnode{tag}")
        self._made: Any = None  # the rules as they are listed, with their handles

    async def set_up(self, rules: Rules) -> bool:
        before = await self._table.items()
        await self._table.change(_text(self._table.name, rules))
        listed = await self._table.items()
        self._made = None if listed is None else _rules(listed)
        return before is not None and listed is not None and _shape(before) == _shape(listed)

    async def add(self, links: Iterable[Link]) -> None:
        names = ", ".join(f'"{link.name}"' for link in links)
        if names:
            await self._table.change(
                "".join(f"add element inet {self._table.name} {set_} {{ {names} }}\n" for set_ in _COUNTING)
            )

    async def remove(self, links: Iterable[Link]) -> None:
        names = [link.name for link in links]
        if not names:
            return
        # An element that is not there would fail the transaction: "add" first, which is nothing for those that are.
        text = ", ".join(f'"{name}"' for name in names)
        commands = [
            f"{verb} element inet {self._table.name} {set_} {{ {text} }}\n" for set_ in _COUNTING for verb in _TWICE
        ]
        await self._table.change("".join(commands))

    async def read(self) -> Optional[Mapping[str, Usage]]:
        listed = await self._table.items()
        return None if listed is None or _rules(listed) != self._made else _counts(listed)

    async def tear_down(self) -> None:
        await self._table.change(self._table.removal)


_TWICE = ("add", "delete")


def _rules(listed: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that does not depend on the jobs. Handles are never used twice, so what was made anew differs."""
    return [
        item
        for item in listed
        if {"chain", "rule"} & item.keys() or ("set" in item and item["set"]["name"] not in _COUNTING)
    ]


def _shape(listed: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chains and rules, whoever made them and when."""
    items = [item.get("chain") or item.get("rule") for item in listed]
    return [{key: value for key, value in item.items() if key != "handle"} for item in items if item]


def _counts(listed: Iterable[dict[str, Any]]) -> dict[str, Usage]:
    sets = {item["set"]["name"]: item["set"] for item in listed if "set" in item}
    counts = {name: dict(_elements(sets.get(name, {}))) for name in _COUNTING}
    # A link of which one element is missing is not counted as it should be.
    links = set.intersection(*(set(elements) for elements in counts.values()))
    return {link: Usage(*(counts[name][link] for name in _COUNTING)) for link in links}


def _elements(set_: dict[str, Any]) -> Iterator[tuple[str, Traffic]]:
    for item in set_.get("elem", []):
        element = item["elem"]
        yield element["val"], Traffic(element["counter"]["bytes"], element["counter"]["packets"])


def _text(table: str, rules: Rules) -> str:
    """One transaction, which leaves the jobs' elements alone."""
    ours = f'"{rules.links}*"'
    nat6 = f"    ip6 saddr {rules.pool6} oifname != {ours} masquerade\n" if rules.pool6 else ""
    # Anybody may send from any IPv6 address (IPV6_FREEBIND): the answers would be another job's. Once for each flow.
    own6 = f"    iifname {ours} meta nfproto ipv6 fib saddr . iif oif missing drop\n" if rules.pool6 else ""
    dns = f"    {nft_rule(rules.links, *rules.relay)}\n" if rules.relay else ""
    sets = "".join(f"  set {name} {{ type ifname; counter; }}\n" for name in _COUNTING)
    return f"""\
table inet {table} {{
{lan_sets((), ())}{sets}  chain out {{ type filter hook prerouting priority raw; }}
  chain in {{ type filter hook postrouting priority mangle; }}
  chain nat {{ type nat hook postrouting priority srcnat; }}
  chain flows {{ type nat hook prerouting priority dstnat; }}
}}
flush table inet {table}
flush set inet {table} lan4
flush set inet {table} lan6
table inet {table} {{
{lan_sets(rules.lan4, rules.lan6)}  chain out {{
    iifname != {ours} return
    ip6 saddr :: return
    ip daddr @lan4 iifname @lan_out return
    ip6 daddr @lan6 iifname @lan_out return
    iifname @wan_out return
  }}
  chain in {{
    oifname != {ours} return
    ip6 saddr :: return
    ip saddr @lan4 oifname @lan_in return
    ip6 saddr @lan6 oifname @lan_in return
    oifname @wan_in return
  }}
  chain nat {{
    ip saddr {rules.pool4} oifname != {ours} masquerade
{nat6}  }}
  chain flows {{
{own6}{dns}  }}
}}
"""
