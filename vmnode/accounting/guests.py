"""Which taps belong to which job, and what its guest used. Pure.

    domain -> job    the record that vmnode-domain-xml made before the guest was started (overlays.py); where a site has
                     HTCondor's own script in its place, by the domain's name, which HTCondor makes of user and job id
    domain -> taps   libvirt's answer, with the kernel's indices
    tap -> counts    taps.TapCounters, which needs none of that: it counts before anybody knows whose it is

A job keeps all taps that its guest ever had, and their counts are removed only when the job's record has ended: so the
sum does not become less. A guest that begins and ends while nobody asks libvirt stays unknown; the ledger says that of
it, and never zero.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from vmnode.accounting.record import VM, Record
from vmnode.errors import StateError
from vmnode.host.libvirt import Nics
from vmnode.host.taps import Tap
from vmnode.overlays import Overlay
from vmnode.usage import NONE, Usage, minus, plus, shrank

FILE = "guests.json"  # below [paths] run_dir
VERSION = 1


@dataclass(frozen=True)
class Guest:
    """The virtual machine of a job, as far as its network goes."""

    domain: str
    taps: frozenset[Tap] = frozenset()  # also those that are gone
    uncounted: str = ""  # why not all that it uses is counted: a sentence for a person


# --- whose it is --------------------------------------------------------------------------------------------------


def domain_name(owner: str, job: str) -> Optional[str]:
    """The domain of a job, as HTCondor names it (vm_univ_utils.cpp, create_name_for_VM).

    `owner` is the user with his domain, "alice@pool"; `job` is the GlobalJobId, "schedd#12.0#1790000000".
    """
    parts = job.rsplit("#", 2)
    return f"{owner.replace('@', '_')}_{parts[1]}" if len(parts) == 3 and owner else None


def by_domain(running: Iterable[Record], overlays: Iterable[Overlay]) -> dict[str, int]:
    """The ids of the records of running VM jobs, by the names of their domains."""
    ids: dict[str, int] = {}
    found: dict[str, int] = {}
    for record in sorted(running, key=lambda record: (record.started_at, record.id)):  # the last of one job wins
        if record.universe == VM and record.job:
            ids[record.job] = record.id
            name = domain_name(record.owner, record.job)
            if name is not None:
                found[name] = record.id
    found.update((overlay.domain, ids[overlay.job]) for overlay in overlays if overlay.job in ids)
    return found


def known(
    before: Mapping[int, Guest], running: Collection[Record], overlays: Iterable[Overlay], domains: Mapping[str, Nics]
) -> dict[int, Guest]:
    """The guests of running records, by record, with what libvirt says now of running domains, if anything.

    `before` is what was known. It stays as long as the record does: a domain ends before its job, and with it its
    overlay's record.
    """
    ids = {record.id for record in running}
    guests = {id_: guest for id_, guest in before.items() if id_ in ids}
    for domain, id_ in by_domain(running, overlays).items():
        if domain in domains:
            guests[id_] = _seen(guests.get(id_, Guest(domain)), domains[domain])
    return guests


def _seen(guest: Guest, nics: Nics) -> Guest:
    taps = {Tap(link.name, link.index) for link in nics.links if link.bridged}
    astray = [link.name for link in nics.links if not link.bridged]
    without = nics.count - len(nics.links)
    if without:
        why = f"{without} of the guest's {nics.count} network interfaces have no tap (vm_networking_type = user)"
    elif astray:
        why = f"the guest's {', '.join(astray)} is no port of a bridge"
    else:
        why = ""
    return replace(guest, taps=guest.taps | taps, uncounted=why)


def to_remove(reading: Iterable[Tap], guests: Iterable[Guest], present: Collection[int]) -> list[Tap]:
    """Taps whose counts nobody needs any more: they are not `present`, and belong to no running record."""
    needed = {tap for guest in guests for tap in guest.taps}
    return [tap for tap in reading if tap not in needed and tap.index not in present]


# --- what it used -------------------------------------------------------------------------------------------------


def counted(record: Record, guest: Guest, reading: Mapping[Tap, Usage]) -> Record:
    """The record after a look at the taps' counts. Of a guest that has no tap to count on, `guest` stays None.

    Counts that became less were started anew: what passed between the last look (`seen_at`, which is left to
    record.counted) and that is lost.
    """
    if guest.uncounted and not guest.taps:
        return record
    now = NONE
    for tap in guest.taps:  # one that had no packet yet is in no reading
        now = plus(now, reading.get(tap, NONE))
    if shrank(now, record.guest_read):
        record = restarted(record)
    return replace(record, guest=plus(record.guest or NONE, minus(now, record.guest_read)), guest_read=now)


def why_incomplete(record: Record, guest: Optional[Guest]) -> str:
    """What is missing of a record that ends now, as a sentence for a person; "" if nothing."""
    if record.universe != VM:
        return ""
    return "its guest was not seen: libvirt was not asked, or did not answer" if guest is None else guest.uncounted


def restarted(record: Record) -> Record:
    """The counts of taps begin at zero again: packets since the last look may be missing."""
    if record.universe != VM:
        return record
    return replace(record, guest_read=NONE, partial_since=record.partial_since or record.seen_at)


# --- so that the next instance knows ------------------------------------------------------------------------------


def write(guests: Mapping[int, Guest], boot_id: str) -> bytes:
    """For a file that is written whenever the guests differ from before: libvirt forgets a domain when it ends."""
    listed = [
        {
            "record": id_,
            "domain": guest.domain,
            "taps": sorted([tap.name, tap.index] for tap in guest.taps),
            "uncounted": guest.uncounted,
        }
        for id_, guest in sorted(guests.items())
    ]
    return json.dumps({"version": VERSION, "boot_id": boot_id, "guests": listed}).encode() + b"\n"


def read(data: bytes, boot_id: str) -> dict[int, Guest]:
    """The opposite of `write`; nothing if it is of another boot, since indices begin anew. Raises StateError."""
    try:
        document: dict[str, Any] = json.loads(data)
        if document["version"] != VERSION:
            raise StateError("it was written by another version of vmnode")
        if document["boot_id"] != boot_id:
            return {}
        return {
            int(entry["record"]): Guest(
                str(entry["domain"]),
                frozenset(Tap(str(name), int(index)) for name, index in entry["taps"]),
                str(entry["uncounted"]),
            )
            for entry in document["guests"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StateError("it is damaged") from None
