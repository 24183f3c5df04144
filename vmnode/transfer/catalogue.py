"""What lies in the image roots, for people: each image with what the policy finds in it."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from typing import Optional

from vmnode.errors import BadImage, DeadlineExceeded, VmnodeError
from vmnode.host import child
from vmnode.images import Settings
from vmnode.transfer import policy

MOST_IMAGES = 2000
_SECTOR = 512  # a raw image has whole sectors; other files in a root, a README say, seldom do


@dataclasses.dataclass(frozen=True)
class Listed:
    """One file in a root. `problem` is why it can be no base image; then `virtual_size`, in bytes, is 0."""

    path: str
    format: str
    virtual_size: int
    size: int
    problem: str


@dataclasses.dataclass(frozen=True)
class Root:
    """One image root, and why it does not answer, if so."""

    path: str
    problem: str
    images: tuple[Listed, ...]


def root(path: str, settings: Settings) -> Root:
    """List a root, with the rights of the caller; a root that hangs is left alone after its deadline."""
    try:
        found = child.ask(
            lambda: [dataclasses.astuple(image) for image in _scan(path, settings)], settings.timeout_s, path
        )
    except DeadlineExceeded:
        return Root(path, f"no answer within {settings.timeout_s:g} s", ())
    except VmnodeError as error:
        return Root(path, error.what, ())
    except OSError as error:
        return Root(path, os.strerror(error.errno or 0), ())
    return Root(path, "", tuple(Listed(*image) for image in found))


def _scan(path: str, settings: Settings) -> Iterator[Listed]:
    os.listdir(path)  # where os.walk would be silent
    count = 0
    for directory, directories, names in os.walk(path):
        directories.sort()
        for name in sorted(names):
            file = f"{directory}/{name}"
            if file.isprintable():
                listed = _look(file, settings)
            else:
                listed = Listed(ascii(file), "", 0, 0, "its name cannot be printed")
            if listed is not None and count < MOST_IMAGES:
                count += 1
                yield listed


def _look(path: str, settings: Settings) -> Optional[Listed]:
    """None for what is no image: not a regular file, or not whole sectors of anything."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone by now
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        format, header = policy.look(descriptor, status.st_size, "raw" if path in settings.raw else None)
        if header.backing is not None:
            raise BadImage(f"it has a backing file of its own, {header.backing!r}")
        if format == "raw" and status.st_size % _SECTOR:
            return None
        return Listed(path, format, header.virtual_size, status.st_size, "")
    except BadImage as error:
        return Listed(path, "", 0, status.st_size, error.what)
    except OSError as error:
        return Listed(path, "", 0, status.st_size, os.strerror(error.errno or 0))
    finally:
        os.close(descriptor)
