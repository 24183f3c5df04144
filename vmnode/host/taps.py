"""Counts what virtual machines send and receive, on the taps by which they hang on the host's bridges, with nftables.

    table bridge vmnode<tag>
      lan4 lan6                          the LAN's prefixes
      lan_in lan_out wan_in wan_out      an element for each tap that had a packet, with a counter
      lan_in_padded …                    the same of short packets, for each length

    out  every packet that the guest sent and its bridge took, before anybody could drop it
    in   every packet that goes into the guest's tap, after everybody could drop it: also what the host itself sends,
         and copies of what goes to all

Nobody has to tell about a tap: its first packet makes the element (nft(8), "SET STATEMENT"), so that no packet comes
before its rule. An element is keyed by the tap's name and index, and an index is never used twice: libvirt may give the
name vnet0 to the next guest, and the counts of the last one stay what they were until they are removed.

Only IPv4 and IPv6 packets are counted, as they are in the bridge: without the Ethernet header and without an 802.1Q tag
(the kernel takes both off before: eth_type_trans(), skb_vlan_untag()). What pads a frame to Ethernet's least size does
stay on the packet: such packets are counted by the length that they give themselves. The bridge module of netfilter
(br_netfilter) is not needed, and makes no difference.

Not seen here: what the bridge never took, as in the seconds before a new port of a bridge with a spanning tree
forwards; what the host says on the tap itself and not on the bridge (the neighbour discovery of the tap's own IPv6
address, some 400 bytes in a guest's life); and taps that are no port of a bridge of the kernel's. What the guest is too
slow to take from its tap is counted, as it is on a job's veth. Without br_netfilter's defragmentation every fragment is
a packet here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Optional

from vmnode.errors import CommandFailed
from vmnode.host.nft import Table, lan_sets
from vmnode.usage import Traffic, Usage

_COUNTING = Usage._fields  # the names of the sets
_PADDED = "_padded"
# Taps at a time, those of ended guests that are not removed yet included; beyond that nothing is counted. A bound for
# the kernel's memory: an element takes some 200 bytes, and 16 for each processor.
_MOST_TAPS = 4096
_MOST_LENGTHS = 65535
_LEAST = 46  # bytes: Ethernet's least frame, 60, without its header
_HEADER6 = 40
# linux/netfilter_bridge.h: NF_BR_PRI_FIRST; and one before NF_BR_PRI_LAST, where br_netfilter takes packets away.
_FIRST, _LAST = -(1 << 31), (1 << 31) - 2
_LOOKS = 5


@dataclass(frozen=True)
class Tap:
    """A tap, for as long as the node runs."""

    name: str
    index: int


def present() -> frozenset[int]:
    """The indices of the host's links, taps and others."""
    return frozenset(_indices().values())


class TapCounters:
    """Raises CommandFailed and DeadlineExceeded, naming nft; all of it is idempotent."""

    def __init__(self, tag: str) -> None:
        self._table = Table("bridge", f"vmnode{tag}")
        self._made: Any = None  # the rules as they are listed, with their handles

    async def set_up(self, lan4: Iterable[IPv4Network], lan6: Iterable[IPv6Network]) -> bool:
        """Have the rules, in one transaction, with these prefixes, which may overlap; the counts are kept.

        False if the rules were not there, so that packets may have passed uncounted until now.
        """
        before = await self._table.items()
        text = _text(self._table.name, lan4, lan6)
        try:
            await self._table.change(text)
        except CommandFailed:  # another version's table: the types of sets cannot be changed
            await self._table.change(self._table.removal + text)
        listed = await self._table.items()
        self._made = None if listed is None else _rules(listed)
        return before is not None and listed is not None and _shape(before) == _shape(listed)

    async def read(self) -> Optional[Mapping[Tap, Usage]]:
        """The counts of all taps that had a packet, also of those that are gone, until they are removed.

        None if the rules are not as we made them.
        """
        for _ in range(_LOOKS):
            before = _indices()
            listed = await self._table.items()
            if listed is None or _rules(listed) != self._made:
                return None
            after = _indices()
            # nft writes the index of a link that is there as its name. An index never comes again: a name that meant
            # one and the same before and after meant it between.
            certain = {name: index for name, index in after.items() if before.get(name) == index}
            counts = _counts(listed, certain)
            if counts is not None:
                return counts
        raise CommandFailed("nft: the host's links change faster than their counts can be read")

    async def remove(self, taps: Iterable[Tap]) -> None:
        """Forget these, which are gone; one that is not known is no error."""
        gone = set(taps)
        commands = []
        for item in (await self._table.items() or []) if gone else []:
            for element in _elements(item.get("set", {})):
                name, index, *length = element["val"]["concat"]
                if str(index).isdecimal() and Tap(name, int(index)) in gone:
                    key = " . ".join([f'"{name}"', str(index), *map(str, length)])
                    commands.append(f"delete element bridge {self._table.name} {item['set']['name']} {{ {key} }}\n")
        if commands:
            await self._table.change("".join(commands))

    async def tear_down(self) -> None:
        await self._table.change(self._table.removal)


def _indices() -> dict[str, int]:
    return {name: index for index, name in socket.if_nameindex()}


def _counts_packets(name: str) -> bool:
    return name.partition(_PADDED)[0] in _COUNTING


def _rules(listed: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that packets do not change. Handles are never used twice, so what was made anew differs."""
    return [
        item
        for item in listed
        if {"chain", "rule"} & item.keys() or ("set" in item and not _counts_packets(item["set"]["name"]))
    ]


def _shape(listed: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """What can be the same in rules that were made anew."""
    return [
        (kind, {key: value for key, value in body.items() if key not in ("handle", "elem", "count")})
        for item in listed
        for kind, body in item.items()
        if kind in ("chain", "rule", "set")
    ]


def _counts(listed: Iterable[dict[str, Any]], indices: Mapping[str, int]) -> Optional[dict[Tap, Usage]]:
    """The counts by tap; None if a link's name is not in `indices`.

    Every packet is in one element alone: elements are read one after the other, and still no sum can become less.
    """
    counts: dict[Tap, dict[str, Traffic]] = {}
    for item in listed:
        for element in _elements(item.get("set", {})):
            name, link, *length = element["val"]["concat"]
            index = indices.get(str(link), int(link) if str(link).isdecimal() else None)
            if index is None:
                return None
            found = counts.setdefault(Tap(name, index), dict(zip(_COUNTING, Usage())))
            direction, counter = item["set"]["name"].partition(_PADDED)[0], element["counter"]
            size = counter["packets"] * own_length(length[0]) if length else counter["bytes"]
            found[direction] = Traffic(found[direction].bytes + size, found[direction].packets + counter["packets"])
    return {tap: Usage(**found) for tap, found in counts.items()}


def own_length(field: int) -> int:
    """A packet's length by its header: IPv4 gives the whole, which is 20 or more; IPv6 what follows its header."""
    return field if field >= 20 else _HEADER6 + field


def _elements(set_: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if _counts_packets(set_.get("name", "")):
        for item in set_.get("elem", []):
            yield item["elem"]


def _text(table: str, lan4: Iterable[IPv4Network], lan6: Iterable[IPv6Network]) -> str:
    """One transaction, which leaves what was counted alone."""
    sets = "".join(
        f"  set {name} {{ type ifname . iface_index; size {_MOST_TAPS}; flags dynamic; }}\n"
        f"  set {name}{_PADDED} {{ typeof iifname . iif . ip length; size {_MOST_LENGTHS}; flags dynamic; }}\n"
        for name in _COUNTING
    )
    return f"""\
table bridge {table} {{
{lan_sets((), ())}{sets}{"".join(f"  chain {name} {{ }}{chr(10)}" for name in _COUNTING)}\
  chain out {{ type filter hook prerouting priority {_FIRST}; }}
  chain in {{ type filter hook postrouting priority {_LAST}; }}
}}
flush table bridge {table}
flush set bridge {table} lan4
flush set bridge {table} lan6
table bridge {table} {{
{lan_sets(lan4, lan6)}\
{"".join(_count(name, "o" if name.endswith("in") else "i") for name in _COUNTING)}\
{_chain("out", "iifkind", "daddr")}{_chain("in", "oifkind", "saddr")}}}
"""


def _count(name: str, way: str) -> str:
    """The chain that counts a packet of this direction at the tap where it comes in ("i") or goes out ("o")."""
    tap = f"{way}ifname . {way}if"
    padded = f"update @{name}{_PADDED} {{ {tap}"
    return f"""\
  chain {name} {{
    meta length {_LEAST} meta protocol ip ip length 20-{_LEAST - 1} {padded} . ip length counter }} return
    meta length {_LEAST} meta protocol ip6 ip6 length < {_LEAST - _HEADER6} {padded} . ip6 length counter }} return
    update @{name} {{ {tap} counter }}
  }}
"""


def _chain(way: str, kind: str, far: str) -> str:
    """Only taps ("tun" is their kind, tun.c), only IP; all else of the host's bridges meets one comparison."""
    return f"""\
  chain {way} {{
    meta {kind} != "tun" return
    meta protocol ip ip {far} @lan4 goto lan_{way}
    meta protocol ip6 ip6 {far} @lan6 goto lan_{way}
    meta protocol {{ ip, ip6 }} goto wan_{way}
  }}
"""
