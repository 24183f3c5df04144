"""What the kernel tells by itself, and what we hear of it."""

from __future__ import annotations

import asyncio
import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

import pytest

from tests.kernel.world import beyond, links, make_bridge, script, tool
from vmnode.host.events import KernelEvents

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def heard(happen: Callable[[], object], watched: Sequence[str] = ("virbr0",), pid: Optional[int] = None) -> set[str]:
    """The kinds of events that we hear of when `happen` happens; links are watched by name."""
    events: set[str] = set()

    async def run() -> None:
        kernel = KernelEvents(events.add)
        kernel.watch({links()[name]["ifindex"] for name in watched}, pid)
        await asyncio.sleep(0.05)
        events.clear()
        await asyncio.to_thread(happen)
        await asyncio.sleep(0.15)
        kernel.close()

    asyncio.run(run())
    return events


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ([], "link set virbr0 down"),
        (["link set virbr0 down"], "link set virbr0 up"),
        ([], "address delete 192.168.122.1/24 dev virbr0"),
        ([], "address add 192.168.122.2/24 dev virbr0"),
        ([], "link delete virbr0"),
        ([], "route add default via 192.168.122.254"),
        (["route add default via 192.168.122.254"], "route delete default"),
    ],
)
def test_what_happens_to_our_bridge_and_to_the_default_route_is_heard(before: list[str], words: str) -> None:
    make_bridge()
    for command in before:
        tool("ip", *command.split())
    assert heard(lambda: tool("ip", *words.split())) == {"link"}


def test_forwarding_switched_off_is_heard() -> None:
    make_bridge()
    FORWARD.write_text("1")
    assert heard(lambda: FORWARD.write_text("0")) == {"link"}
    per_link = Path("/proc/sys/net/ipv4/conf/virbr0/forwarding")
    assert heard(lambda: per_link.write_text("1")) == {"link"}


def test_foreign_links_are_not_heard() -> None:
    make_bridge()
    with beyond("eth0"):
        for words in (
            "link set eth0 down",
            "link set eth0 up",
            "address add 10.0.0.2/24 dev eth0",
            "address delete 10.0.0.2/24 dev eth0",
            "link add other type bridge",
            "link delete other",
        ):
            assert heard(functools.partial(tool, "ip", *words.split())) == set(), words


def test_as_long_as_nothing_is_known_every_link_is_news() -> None:
    assert heard(lambda: tool("ip", "link", "add", "other", "type", "bridge"), watched=()) == {"link"}


@pytest.mark.parametrize(
    "change", [lambda: script("add table ip site"), lambda: tool("iptables", "-A", "FORWARD", "-j", "ACCEPT")]
)
def test_a_change_of_the_firewall_is_heard(change: Callable[[], object]) -> None:
    make_bridge()
    assert heard(change) == {"firewall"}


def test_reading_the_firewall_is_no_change() -> None:
    make_bridge()
    script("add table ip site")
    assert heard(lambda: tool("nft", "list", "ruleset")) == set()


def test_the_death_of_the_process_is_heard_once() -> None:
    make_bridge()
    child = subprocess.Popen(["sleep", "600"])

    def kill() -> None:
        child.kill()
        child.wait()

    assert heard(kill, pid=child.pid) == {"process"}


def test_a_process_that_is_dead_already_is_news_and_one_that_lives_is_not() -> None:
    events: list[str] = []

    async def run(pid: Optional[int]) -> None:
        kernel = KernelEvents(events.append)
        for _ in range(2):
            kernel.watch((), pid)
        kernel.watch((), None)
        kernel.close()

    dead = subprocess.Popen(["true"])
    dead.wait()
    asyncio.run(run(dead.pid))
    assert set(events) == {"process"}
    events.clear()
    with subprocess.Popen(["sleep", "600"]) as alive:
        asyncio.run(run(alive.pid))
        alive.kill()
    assert events == []


def test_many_messages_at_once_lose_nothing_that_matters() -> None:
    """More than the socket holds: then everything may have changed."""
    make_bridge()
    flood = "\n".join(f"link set virbr0 alias {number:0200}" for number in range(3000))
    assert heard(lambda: subprocess.run(["ip", "-batch", "-"], input=flood, text=True, check=True)) == {"link"}
