"""Names and addresses of the jobs' links: from the instance and the record's number, never from the job. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, Optional

from vmnode.errors import TryAgain

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
GATEWAY, PROBE = 1, 2  # numbers in both pools; jobs have those that follow


class Addresses(NamedTuple):
    """Both ends of a job's link: the job's own addresses, and the gateway's, which is the same for all jobs."""

    job4: IPv4Address
    gateway4: IPv4Address
    job6: Optional[IPv6Address]
    gateway6: Optional[IPv6Address]


def tag(run_dir: str) -> str:
    """What distinguishes this instance of vmnode from others on the machine: four hexadecimal digits."""
    return hashlib.sha256(run_dir.encode()).hexdigest()[:4]


def prefix(tag_: str) -> str:
    """How the names of all our jobs' links begin. The probe's is "vmnp"."""
    return f"vmnj{tag_}"


def link(tag_: str, record: int) -> str:
    """The link of a record: at most 15 characters (IFNAMSIZ) for the first 78 billion records; never used twice."""
    digits = ""
    while record:
        record, digit = divmod(record, 36)
        digits = _DIGITS[digit] + digits
    return prefix(tag_) + (digits or "0")


def record_of(tag_: str, name: str) -> int:
    """The record that a link of this name belongs to; 0 if `link` gives no such name."""
    digits = name[len(prefix(tag_)) :]
    return int(digits, 36) if digits and not set(digits) - set(_DIGITS) else 0


def probe(tag_: str) -> str:
    """The link of the probe that is attached as a job is: no record's link has a hyphen."""
    return f"{prefix(tag_)}-probe"


def of_number(number: int, pool4: IPv4Network, pool6: Optional[IPv6Network]) -> Addresses:
    return Addresses(pool4[number], pool4[GATEWAY], pool6[number] if pool6 else None, pool6[GATEWAY] if pool6 else None)


def free_number(used: Collection[int], last: int, pool4: IPv4Network, pool6: Optional[IPv6Network]) -> int:
    """The next number after `last` that nobody has; raises TryAgain if the pools are used up.

    Going round, an address comes back as late as possible: whoever still sends to it would reach the next job.
    """
    smallest = min(pool4.num_addresses, pool6.num_addresses if pool6 else pool4.num_addresses)
    first, after = PROBE + 1, smallest - 1  # the last one of pool4 is a broadcast address
    count = after - first
    for step in range(1, count + 1):
        number = first + (max(last, first - 1) - first + step) % count
        if number not in used:
            return number
    raise TryAgain(f"all {max(count, 0)} addresses for jobs are in use", "make [accounting] pool4 and pool6 larger")
