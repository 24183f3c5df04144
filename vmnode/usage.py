"""The shared vocabulary of network use: what one job sent and received.

Always from the job's point of view: "in" is what it received. Bytes are those of layer 3, headers included, as the
kernel's forwarding sees the packets: a burst that travels as one segmentation-offloaded packet, or a datagram that
travels as fragments, counts its headers once.
"""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    bytes: int = 0
    packets: int = 0


class Usage(NamedTuple):
    """Counts that only grow."""

    lan_in: Traffic = Traffic()
    lan_out: Traffic = Traffic()
    wan_in: Traffic = Traffic()
    wan_out: Traffic = Traffic()


NONE = Usage()


def plus(one: Usage, other: Usage) -> Usage:
    return Usage(*(Traffic(a.bytes + b.bytes, a.packets + b.packets) for a, b in zip(one, other)))


def minus(one: Usage, other: Usage) -> Usage:
    return Usage(*(Traffic(a.bytes - b.bytes, a.packets - b.packets) for a, b in zip(one, other)))


def shrank(now: Usage, before: Usage) -> bool:
    """Whether any count is less than it was: it was started anew in between."""
    return any(count < 0 for traffic in minus(now, before) for count in traffic)


def since(before: Usage, now: Usage) -> Usage:
    """What was counted between two looks; a direction whose counts were started anew in between counts from zero."""
    gone = (a.bytes < b.bytes or a.packets < b.packets for a, b in zip(now, before))
    return minus(now, Usage(*(Traffic() if lost else b for lost, b in zip(gone, before))))
