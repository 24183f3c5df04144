"""Every test has a network and mounts of its own, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kernel.world import links, tables, tool

CLONE_NEWNS, CLONE_NEWNET, MS_REC, MS_PRIVATE = 0x20000, 0x40000000, 0x4000, 1 << 18
TOOLS = ("ip", "nft", "iptables", "ipset", "dnsmasq", "nsenter", "tcpdump", "unshare")

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


@pytest.fixture(scope="session", autouse=True)
def capabilities() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, bridges, nftables")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture(autouse=True)
def own_world(capabilities: None) -> Iterator[None]:
    """New network and mount namespaces for the main thread and all that it starts; the host's are not touched."""
    mine = [(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY), flag) for kind, flag in NAMESPACES]
    here = Path.cwd()
    call("unshare", CLONE_NEWNET | CLONE_NEWNS)
    try:
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        tool("ip", "link", "set", "lo", "up")
        opened = descriptors()
        yield
        left = leftovers(opened)
    finally:
        for descriptor, flag in mine:
            call("setns", descriptor, flag)
            os.close(descriptor)
        os.chdir(here)
    assert left == [], f"the test left behind: {left}"


NAMESPACES = (("net", CLONE_NEWNET), ("mnt", CLONE_NEWNS))


def descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of iterdir itself
            found.add(f"{entry.name} -> {entry.readlink()}")
    return found


def processes() -> list[str]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(f"process {child.pid} {child.name()}")
    return found


def leftovers(opened: set[str]) -> list[str]:
    """Our links, tables, processes and descriptors that are still there a while after the test."""
    give_up = time.monotonic() + 3  # the kernel takes namespaces down in the background
    while True:
        gc.collect()
        left = [
            *(f"link {name}" for name in links() if name.startswith("vmn")),
            *(table for table in tables() if "vmn" in table),
            *processes(),
            *(f"descriptor {name}" for name in descriptors() - opened),
        ]
        if not left or time.monotonic() > give_up:
            return left
        time.sleep(0.05)
