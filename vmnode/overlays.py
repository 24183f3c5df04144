"""The shared vocabulary of disk images in use: which base images the guests of this node were started on.

One file for each domain, <state_dir>/overlays/<domain>.json, written by root before the guest is started. A base must
not change while an overlay on it lives: the overlay holds only the differences.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from vmnode.errors import StateError
from vmnode.images import Image

VERSION = 1
DIRECTORY = "overlays"  # below [paths] state_dir


@dataclasses.dataclass(frozen=True)
class Overlay:
    """What a guest was started on."""

    domain: str
    job: str  # GlobalJobId
    owner: str
    started_at: float  # Unix time, s
    bases: tuple[Image, ...]


def document(overlay: Overlay) -> dict[str, Any]:
    return {**dataclasses.asdict(overlay), "bases": [base._asdict() for base in overlay.bases]}


def write(overlay: Overlay) -> bytes:
    return json.dumps({"version": VERSION, **document(overlay)}, indent=2).encode() + b"\n"


def read(data: bytes) -> Overlay:
    """The opposite of `write`; raises StateError."""
    try:
        found: dict[str, Any] = json.loads(data)
        if found.pop("version") != VERSION:
            raise StateError("it was written by another version of vmnode")
        bases = tuple(Image(**base) for base in found.pop("bases"))
        return Overlay(**found, bases=bases)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StateError("it is damaged") from None


def change(then: Image, size: int, mtime_ns: int, inode: int) -> str:
    """How an image differs from what it was; "" if it does not."""
    if inode != then.inode:
        return "it was replaced by another file"
    if size != then.size:
        return f"its size was {then.size} bytes and is {size} now"
    if mtime_ns != then.mtime_ns:
        return "it was written to"
    return ""
