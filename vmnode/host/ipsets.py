"""The sets of the iptables backend (ipset(8)): what is told to the tool, and what it says.

    vmnode<tag>-lan4 -lan6                     hash:net: the LAN's prefixes
    vmnode<tag>-li4 -lo4 -wi4 -wo4 -li6 …      hash:net,iface: an address and a link for each job, with counters

The counters of one job are found by a hash of its address. The link beside it keeps a job that sends under the address
of another from being taken for that one, and gives the name under which the job is known. One address alone with many
links would not do: the kernel takes 64 of these at most, and goes through them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_network
from typing import NamedTuple, Optional, Union

from vmnode.host.counting import Link, Rules
from vmnode.usage import Traffic, Usage

Network = Union[IPv4Network, IPv6Network]
FAMILIES = (4, 6)
_FAMILY = {4: "inet", 6: "inet6"}
_COUNTING = {"lan_in": "li", "lan_out": "lo", "wan_in": "wi", "wan_out": "wo"}
_TYPE = "hash:net,iface"
# The kernel copies elements when it makes a set larger, or a bucket of it (mtype_resize, mtype_add), and loses what a
# packet adds to the old one meanwhile: so many buckets that jobs hardly ever share one. They take 4 MB in all.
_HASH_SIZE = 65536


class Listed(NamedTuple):
    """What is in the sets."""

    usages: dict[str, Usage]  # by link
    elements: dict[str, set[str]]  # by link: "vmnode<tag>-li4 100.64.0.2,vmnj…"
    lan: dict[int, frozenset[Network]]  # by family


class Sets:
    """The names of the sets of one instance."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._counting = {
            f"{prefix}-{short}{family}": (direction, family)
            for family in FAMILIES
            for direction, short in _COUNTING.items()
        }

    def lan(self, family: int) -> str:
        return f"{self._prefix}-lan{family}"

    def _new(self, family: int) -> str:
        return f"{self._prefix}-new{family}"

    def counting(self, direction: str, family: int) -> str:
        return f"{self._prefix}-{_COUNTING[direction]}{family}"

    def in_use(self) -> list[str]:
        return [*map(self.lan, FAMILIES), *self._counting]

    def all_of(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are ours, be they from a run that was broken off."""
        ours = {*self.in_use(), *map(self._new, FAMILIES)}
        return [name for name in names if name in ours]

    # --- what is told to `ipset restore -exist` -----------------------------------------------------------------------

    def making(self, rules: Rules) -> str:
        """Each family's LAN is replaced at one blow; what is counted is left alone."""
        lines = [
            f"create {name} {_TYPE} family {_FAMILY[family]} hashsize {_HASH_SIZE} counters"
            for name, (_, family) in self._counting.items()
        ]
        for family, prefixes in zip(FAMILIES, _lan(rules)):
            old, new, kind = self.lan(family), self._new(family), f"hash:net family {_FAMILY[family]}"
            lines += [f"create {old} {kind}", f"create {new} {kind}", f"flush {new}"]
            lines += [f"add {new} {prefix}" for prefix in sorted(prefixes, key=str)]
            lines += [f"swap {new} {old}", f"destroy {new}"]
        return _text(lines)

    def adding(self, links: Iterable[Link]) -> str:
        """New ones. Without numbers, one may inherit those of a deleted one (kernel, ip_set_init_counter)."""
        return _text(f"add {element} packets 0 bytes 0" for link in links for element in self.elements(link))

    def removing(self, elements: Iterable[str]) -> str:
        return _text(f"del {element}" for element in elements)

    def listing(self) -> str:
        return _text(f"save {name}" for name in self.in_use())

    def destroying(self, names: Iterable[str]) -> str:
        return _text(f"destroy {name}" for name in self.all_of(names))

    def elements(self, link: Link) -> set[str]:
        addresses: Mapping[int, Union[IPv4Address, IPv6Address, None]] = {4: link.address4, 6: link.address6}
        return {
            f"{name} {addresses[family]},{link.name}"
            for name, (_, family) in self._counting.items()
            if addresses[family] is not None
        }

    # --- and what it says ---------------------------------------------------------------------------------------------

    def parse(self, saved: str) -> Optional[Listed]:
        """What `listing` brings; None if a set is of another kind than ours.

        A link of which an element is missing is not counted as it should be, and is left out.
        """
        counts: dict[int, dict[str, dict[str, Traffic]]] = {4: {}, 6: {}}
        elements: dict[str, set[str]] = {}
        lan: dict[str, set[Network]] = {self.lan(family): set() for family in FAMILIES}
        for line in saved.splitlines():
            verb, name, *words = line.split()
            if name in lan:
                if verb == "add":
                    lan[name].add(ip_network(words[0]))
            elif verb == "create":
                if words[0] != _TYPE or "counters" not in words:
                    return None
            else:
                direction, family = self._counting[name]
                link = words[0].partition(",")[2]
                numbers = dict(zip(words[1::2], words[2::2]))
                traffic = Traffic(int(numbers["bytes"]), int(numbers["packets"]))
                counts[family].setdefault(link, {})[direction] = traffic
                elements.setdefault(link, set()).add(f"{name} {words[0]}")
        usages = {
            link: _sum(found, counts[6].get(link))
            for link, found in counts[4].items()
            if len(found) == len(_COUNTING) and len(counts[6].get(link, found)) == len(_COUNTING)
        }
        return Listed(usages, elements, {family: frozenset(lan[self.lan(family)]) for family in FAMILIES})

    def lan_as_made(self, listed: Listed, rules: Rules) -> bool:
        return list(listed.lan.values()) == list(map(frozenset, _lan(rules)))


def _sum(four: Mapping[str, Traffic], six: Optional[Mapping[str, Traffic]]) -> Usage:
    none = Traffic()
    pairs = [(four[direction], six[direction] if six else none) for direction in Usage._fields]
    return Usage(*(Traffic(a.bytes + b.bytes, a.packets + b.packets) for a, b in pairs))


def _lan(rules: Rules) -> tuple[list[Network], list[Network]]:
    """Without overlaps; and a hash:net takes no prefix of length 0, but both halves of it (ipset(8))."""
    return _halves(collapse_addresses(rules.lan4)), _halves(collapse_addresses(rules.lan6))


def _halves(prefixes: Iterable[Network]) -> list[Network]:
    return [part for prefix in prefixes for part in ([prefix] if prefix.prefixlen else prefix.subnets())]


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
