"""The shared vocabulary of base images: what is configured about them, and one of them as it was found.

The file transfer plugin lives for milliseconds, and reading TOML would take most of them. So the daemon leaves what the
configuration says, parsed and checked, in <run_dir>/images.json, together with the state of the files that it is from.
A reader compares that with the files as they are now: what is not of these very files is not used.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from typing import Any, Optional

    from vmnode import config

    Files = list[list[Any]]

DEFAULT_CONFIG = "/etc/vmnode/vmnode.toml"
PARSED = "/run/vmnode/images.json"  # of the default configuration and run_dir only
_VERSION = 1


class Image(NamedTuple):
    """A disk image as it was found. Sizes are bytes; `virtual_size` is what a guest sees; times are Unix time."""

    path: str  # real: absolute, and free of symbolic links when it was resolved
    format: str  # "raw" or "qcow2"
    virtual_size: int
    size: int
    mtime_ns: int
    inode: int


class Settings(NamedTuple):
    """The section [images]. Paths are absolute."""

    roots: tuple[str, ...]
    user_roots: tuple[str, ...]
    raw: tuple[str, ...]
    timeout_s: float


def settings(images: config.Images) -> Settings:
    """The section as it is used here, by those who have parsed the configuration anyway."""
    roots, user_roots, raw = (tuple(map(str, paths)) for paths in (images.roots, images.user_roots, images.raw))
    return Settings(roots, user_roots, raw, images.timeout_s)


def write(parsed: Settings, files: Files) -> bytes:
    """What `read` takes: settings that are from these very `files`."""
    return json.dumps({"version": _VERSION, "files": files, **parsed._asdict()}).encode()


def read(path: str = PARSED, main: str = DEFAULT_CONFIG) -> Optional[Settings]:
    """The settings that the daemon left, if they are of the configuration's files as they are now."""
    try:
        with open(path, "rb") as file:
            document: dict[str, Any] = json.load(file)
        if document.pop("version") != _VERSION or document.pop("files") != files_now(main):
            return None
        timeout_s = document.pop("timeout_s")
        return Settings(**{key: tuple(value) for key, value in document.items()}, timeout_s=timeout_s)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def files_now(main: str = DEFAULT_CONFIG) -> Files:
    """Which files the configuration has, and what distinguishes them from what they were (see config.files)."""
    drop_ins = f"{os.path.dirname(main)}/conf.d"
    names = sorted(name for name in os.listdir(drop_ins) if name.endswith(".toml")) if os.path.isdir(drop_ins) else []
    found: Files = []
    for path in [*([main] if os.path.exists(main) else []), *(f"{drop_ins}/{name}" for name in names)]:
        status = os.stat(path)
        found.append([path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return found
