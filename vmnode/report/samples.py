"""What the running jobs have used so far, as ads for the startd, and when it is worth telling. Pure.

A slot's ad holds for one job: where GlobalJobId is another, the startd leaves it out. So no job is charged with what
was counted for the one before it, however late we are. It is an ordinary ad, replaced whole each time; the startd's
own aggregation (METRICS) would keep the peak of what it was told, also of the job before (startd_named_classad.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Optional

VERSION = 1
ATTRIBUTES = {  # in usage.json, and in the ad
    "lan_in": "NetLanInBytesUsage",
    "lan_out": "NetLanOutBytesUsage",
    "wan_in": "NetWanInBytesUsage",
    "wan_out": "NetWanOutBytesUsage",
}
FIRST_S = 5.0
PERIOD_S = 60.0  # a running job is told about at least this often, if it did anything
SETTLED_S = 15.0  # what is told before is told again: the startd keeps it from a starter that has just begun
SHARE = 0.5  # and sooner while it is young: what a job did in the last third of its time, or minute, is not told


class Sample(NamedTuple):
    job: str  # GlobalJobId
    counts: tuple[int, ...]  # bytes, as in ATTRIBUTES


class Told(NamedTuple):
    """What the startd was told about a slot, and when; monotonic time, in seconds."""

    sample: Sample
    first: float
    last: float

    @property
    def due(self) -> float:
        return self.last + min(PERIOD_S, max(FIRST_S, SHARE * (self.last - self.first)))


def read(data: bytes) -> dict[str, Sample]:
    """The samples of usage.json, by slot. Raises ValueError."""
    try:
        document = json.loads(data)
        if document["version"] != VERSION:
            raise ValueError("it is of another version")
        return {slot: _sample(entry) for slot, entry in document["slots"].items() if _is_word(slot)}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from None


def _sample(entry: Mapping[str, object]) -> Sample:
    job = entry["job"]
    if not isinstance(job, str) or not job.isprintable() or any(c in '"\\' for c in job):
        raise ValueError(f"{job!r} is no GlobalJobId")
    return Sample(job, tuple(_count(entry[name]) for name in ATTRIBUTES))


def _count(raw: object) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 0:
        raise ValueError(f"{raw!r} is no count")
    return raw


def _is_word(slot: str) -> bool:
    """Whether it can be the tag of an ad."""
    return slot != "" and all(c.isalnum() or c in "_-." for c in slot)


def news(slot: str, sample: Optional[Sample], told: Optional[Told], now: float) -> tuple[list[str], Optional[Told]]:
    """The lines to print about a slot now, and what it was told then. No sample: it has no job that is counted."""
    if sample is None:
        return (_ad(slot, None, push=False), None) if told else ([], None)
    if told is None or sample.job != told.sample.job or _any_less(sample, told.sample):  # the same job, anew
        return _ad(slot, sample, push=True), Told(sample, now, now)
    if now < told.due or (sample == told.sample and told.last - told.first >= SETTLED_S):
        return [], told
    return _ad(slot, sample, push=True), told._replace(sample=sample, last=now)


def _any_less(one: Sample, other: Sample) -> bool:
    return any(a < b for a, b in zip(one.counts, other.counts))


def _ad(slot: str, sample: Optional[Sample], push: bool) -> list[str]:
    return [*_lines(sample), f"- {slot} update:{str(push).lower()}"]


def _lines(sample: Optional[Sample]) -> Iterator[str]:
    if sample is None:
        yield "SlotMergeConstraint = false"
        return
    yield f'SlotMergeConstraint = GlobalJobId =?= "{sample.job}"'
    for attribute, count in zip(ATTRIBUTES.values(), sample.counts):
        yield f"{attribute} = {count}"
