"""What is known, as a machine ClassAd that cannot go stale. Pure.

Every attribute but `VMNodeVersion` and `VMNodeLastCheck` is an expression over `VMNodeLastCheck`, so that it stops
holding by itself, wherever the ad lies, when the last check is too old or claims to lie in the future.
Attribute values are old-syntax ClassAd expressions, one a line (HTCondor manual, "Startd Cron").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Union

from vmnode import __version__
from vmnode.conditions import KINDS, Condition, Status
from vmnode.health.decide import first_broken, has_default_network, state_of

LAST_CHECK = "VMNodeLastCheck"
MAX_FUTURE_S = 60
MAX_STRING = 1024  # bytes
WHEN_EXPIRED = {"VMNodeState": "Unknown", "VMNodeReason": "vmnode: no recent check"}  # all others: undefined

Value = Union[bool, str, list[str], None]  # a list is published as a string list


def attribute_of(condition: str) -> str:
    """`network.dhcp` -> `VMNodeNetworkDhcpOK`"""
    return "VMNode" + "".join(word.capitalize() for word in re.split(r"[.-]", condition)) + "OK"


def quote(text: str) -> str:
    """A ClassAd string literal of at most 1 KiB of printable UTF-8.

    Nothing in it is escaped, since old and new ClassAds disagree about the backslash: a double quote becomes a single
    one, a backslash a slash, whatever cannot be printed a space.
    """
    clean = "".join(c if c.isprintable() else " " for c in text.replace("\\", "/").replace('"', "'"))
    return '"' + clean.encode("utf-8", "replace")[:MAX_STRING].decode("utf-8", "ignore") + '"'


def string_list(items: Iterable[str]) -> str:
    """A ClassAd string list; items beyond 1 KiB are left out whole."""
    text = ""
    for item in items:
        longer = f"{text},{item}" if text else item
        if len(longer.encode("utf-8", "replace")) > MAX_STRING:
            break
        text = longer
    return quote(text)


def literal(value: Value) -> str:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return string_list(value)
    return {True: "true", False: "false", None: "undefined"}[value]


def attributes(conditions: Sequence[Condition], image_roots: Iterable[Path]) -> dict[str, Value]:
    """The attributes of the contract that say something about the node, but for version and time."""
    by_name = {condition.name: condition for condition in conditions}
    broken = first_broken(conditions)
    values: dict[str, Value] = {
        "HasVirshDefaultNetwork": has_default_network(conditions),
        "VMNodeState": state_of(conditions).capitalize(),
        "VMNodeFailed": [condition.name for condition in conditions if condition.status is Status.FAILED],
        "VMNodeReason": sentence(broken) if broken else "",
        "VMNodeImageRoots": [str(root) for root in image_roots],
    }
    for kind in KINDS:
        status = by_name[kind.name].status if kind.name in by_name else Status.UNKNOWN
        values[attribute_of(kind.name)] = {Status.OK: True, Status.FAILED: False}.get(status)
    return values


def machine_ad(values: Mapping[str, Value], checked_at: float, max_age_s: float) -> tuple[str, ...]:
    """The lines of the ad. `checked_at` is Unix time of the last completed check."""
    age = f"time() - {LAST_CHECK}"
    fresh = f"{age} < {max_age_s:.0f} && {age} >= -{MAX_FUTURE_S}"
    lines = [f"VMNodeVersion = {quote(__version__)}", f"{LAST_CHECK} = {checked_at:.0f}"]
    for name, value in values.items():
        now, later = literal(value), literal(WHEN_EXPIRED.get(name))
        lines.append(f"{name} = {now}" if now == later else f"{name} = ifThenElse({fresh}, {now}, {later})")
    return tuple(lines)


def sentence(condition: Condition) -> str:
    return f"{condition.name}: {condition.reason}: {condition.message}"
