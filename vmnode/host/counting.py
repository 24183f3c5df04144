"""What counts the jobs' packets: the contract that nftables.py and iptables.py fulfil.

Counting is done on the host's side of each job's veth, out of the job's reach, in the kernel: vmnode may die, and no
byte is lost. The rules are the same for one job and for a thousand; a job is an element of a set.

    out  every packet that comes from the job, before routing: as the job sent it, reassembled
    in   every packet that leaves for the job, after the addresses were translated back
    LAN  the far address lies in one of the LAN prefixes; WAN is all else

Jobs that the rules do not know are not counted, and nothing that does not cross a job's link is looked at twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, Optional, Protocol

from vmnode.usage import Usage


class Rules(NamedTuple):
    """What does not depend on the jobs."""

    tag: str  # of this instance of vmnode, for the names of what we make: letters and digits
    links: str  # how the names of the jobs' links begin
    pool4: IPv4Network  # the jobs' addresses: translated when they leave by another link than a job's
    pool6: Optional[IPv6Network]  # None: jobs have no IPv6
    lan4: tuple[IPv4Network, ...]  # as configured; may overlap
    lan6: tuple[IPv6Network, ...]
    relay: Optional[tuple[IPv4Address, int]] = None  # who answers what jobs ask a name server on the loopback


class Link(NamedTuple):
    """A job's link, as the host sees it, and the addresses at its other end."""

    name: str
    address4: IPv4Address
    address6: Optional[IPv6Address]


class Counters(Protocol):
    """One backend. All of it is idempotent, and raises CommandFailed or DeadlineExceeded, naming the tool."""

    async def set_up(self, rules: Rules) -> bool:
        """Have the rules, at one blow; the counts of links that are known already are kept.

        False if the rules were not there, LAN prefixes aside: packets may have passed uncounted until now.
        """

    async def add(self, links: Iterable[Link]) -> None:
        """Count these from zero on, unless they are counted already."""

    async def remove(self, links: Iterable[Link]) -> None:
        """Forget these; one that is not known is no error."""

    async def read(self) -> Optional[Mapping[str, Usage]]:
        """The counts of all links, by name, read whole and never reset; None if the rules are not as we made them."""

    async def tear_down(self) -> None:
        """Remove all that `set_up` and `add` made."""
