"""Do base images stay what they were when the guests that run on them were started?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from vmnode import overlays
from vmnode.conditions import Observation, failed
from vmnode.errors import DeadlineExceeded, StateError
from vmnode.host import files, process
from vmnode.images import Image
from vmnode.overlays import Overlay

STARTING_S = 120.0  # at most, between the record and the domain: libvirt is asked for it right away


def recorded(directory: Path) -> list[tuple[Path, Overlay]]:
    """What was recorded of the guests, with its files; what cannot be read is left out."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append((path, overlays.read(files.read_whole(str(path)))))
        except (OSError, StateError):
            continue
    return found


def forget_ended(directory: Path, running: Iterable[str], before: Iterable[str]) -> list[Overlay]:
    """The records of guests that run; those of guests that have ended are removed.

    `running` are the names of the domains that libvirt has now, `before` those of the last time.
    """
    alive = []
    for path, overlay in recorded(directory):
        if overlay.domain in running:
            alive.append(overlay)
        elif overlay.domain in before or time.time() - overlay.started_at > STARTING_S:
            path.unlink(missing_ok=True)
    return alive


async def observe(alive: Iterable[Overlay], deadline_s: float) -> Optional[Observation]:
    """The failure of condition images if a base changed under a running guest, naming the jobs."""
    guests: dict[Image, list[Overlay]] = {}
    for overlay in alive:
        for base in overlay.bases:
            guests.setdefault(base, []).append(overlay)
    changes = await asyncio.gather(*(_change(base, deadline_s) for base in guests))
    bad = [
        f"{base.path}: {change}; running on it: {', '.join(guest.job or guest.domain for guest in guests[base])}"
        for base, change in zip(guests, changes)
        if change
    ]
    if not bad:
        return None
    return failed(
        "images",
        "BaseChanged",
        f"a base image changed under a running guest: {'; '.join(bad)}",
        "what these guests read may be damaged: remove the jobs; give a new image a new name, never change an old one",
    )


async def _change(base: Image, deadline_s: float) -> str:
    """How a base image changed; "" also if nobody can tell: whether its root answers is another question."""
    argv = ["stat", "-c", "%s %.9Y %i", "--", base.path]
    try:
        finished = await process.run(argv, deadline_s, task=f"base {base.path}")
    except DeadlineExceeded:
        return ""
    if finished.status != 0:
        return "it was removed" if "No such file" in finished.stderr else ""
    size, mtime, inode = finished.stdout.split()
    return overlays.change(base, int(size), int(mtime.replace(".", "")), int(inode))
