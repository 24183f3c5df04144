"""The vm-nfs URL: which base image a job asks for, and what its disk is to be called. Pure.

    nfs://<absolute path>[:<name>][?format=raw|qcow2][&size=20G]      and the same with nfs:/<path>

Characters with a meaning, and those that cannot be printed, are written as %XX.
"""

from __future__ import annotations

import os
import re

from vmnode.errors import MalformedRequest

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from typing import Optional

METHOD = "nfs"
EXAMPLE = "nfs:///images/el9.qcow2:disk.qcow2"
FORMATS = ("raw", "qcow2")
# A name has to survive vm_disk, which HTCondor splits at colons, commas and blanks, and puts into XML as it stands.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")
_SIZE = re.compile(r"([0-9]{1,16})([KMGT]?)")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
MOST_BYTES = 1 << 50


class Request:
    """What a URL asks for. `size` is bytes; None: as large as the base."""

    def __init__(self, path: str, name: str, format: Optional[str], size: Optional[int]) -> None:
        self.path = path
        self.name = name
        self.format = format
        self.size = size


def parse(url: str) -> Request:
    """Raises MalformedRequest with a sentence that says what is wrong."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() != METHOD:
        raise _wrong(url, f"it does not begin with {METHOD}:")
    if not url.isprintable() or " " in url:
        raise _wrong(url, "it holds blanks or characters that cannot be printed; write %20 for a blank")
    rest, question, query = rest.partition("?")
    if "#" in rest + query:
        raise _wrong(url, "it holds a #; write %23")
    if rest.startswith("//") and not rest.startswith("///"):
        host = rest[2:].partition("/")[0]
        raise _wrong(
            url, f"it names a host, {host!r}: images lie in the worker's own file system, so write {METHOD}:///"
        )
    location, colon, name = rest.rpartition(":")
    if not colon:
        location, name = rest, ""
    elif "/" in name:
        raise _wrong(
            url, "what follows the colon is the name of the disk, without /; a colon in the path is written %3A"
        )
    path = _decode(url, location)
    if not path.startswith("/"):
        raise _wrong(url, "its path is not absolute")
    if ".." in path.split("/"):
        raise _wrong(url, "its path holds '..'")
    path = os.path.normpath("/" + path.lstrip("/"))
    if path == "/" or location.endswith("/"):
        raise _wrong(url, "it names a directory, not an image")
    if colon and not name:
        raise _wrong(url, "the name after the colon is empty")
    disk = _decode(url, name) or path.rpartition("/")[2]
    if not plain(disk):
        hint = "" if name else f": give it another one, as in {EXAMPLE}"
        raise _wrong(url, f"{disk!r} cannot be the name of a disk (letters, digits, and _ . + = @ - within){hint}")
    options = _options(url, query) if question else {}
    return Request(path, disk, options.get("format"), _size(url, options))


def plain(name: str) -> bool:
    """Whether a file of this name can be a job's disk."""
    return _NAME.fullmatch(name) is not None


def _options(url: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in query.split("&"):
        key, equals, value = option.partition("=")
        if key not in ("format", "size") or not equals:
            raise _wrong(url, f"{option!r} is no option; the options are format=raw, format=qcow2 and size=20G")
        if key in options:
            raise _wrong(url, f"{key} is given twice")
        options[key] = _decode(url, value)
    if options.get("format", "raw") not in FORMATS:
        raise _wrong(url, f"format={options['format']} is none of {', '.join(FORMATS)}")
    return options


def _size(url: str, options: dict[str, str]) -> Optional[int]:
    if "size" not in options:
        return None
    match = _SIZE.fullmatch(options["size"])
    size = int(match[1]) << _SHIFTS[match[2]] if match else 0
    if not 0 < size <= MOST_BYTES or size % 512:
        raise _wrong(
            url,
            f"size={options['size'][:40]} is no size; write 20G (K, M, G, T: powers of 1024; bytes: multiples of 512),"
            " at most 1024T",
        )
    return size


def _decode(url: str, text: str) -> str:
    """Percent-encoding (RFC 3986) of UTF-8."""
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise _wrong(url, "a % is followed by two hexadecimal digits; a % itself is written %25")
    raw = re.sub(rb"%(..)", lambda match: bytes([int(match[1], 16)]), text.encode("utf-8", "surrogateescape"))
    try:
        decoded = raw.decode()
    except UnicodeDecodeError:
        raise _wrong(url, "what its %XX stand for is not UTF-8") from None
    if not decoded.isprintable():
        raise _wrong(url, "it holds a character that cannot be printed")
    return decoded


def _wrong(url: str, why: str) -> MalformedRequest:
    shown = "".join(c if c.isprintable() else "?" for c in url[:200])
    return MalformedRequest(f"the URL {shown} cannot be used: {why}", f"the form is {EXAMPLE}")
