"""A job's guest from its first packet to its last, with a daemon that is started anew and rules that others remove."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

from tests.kernel.test_tap_counting import Guest, guests, host_mac, packet4
from tests.kernel.world import FAR, links, tool, until
from vmnode.accounting.guest_books import GuestBooks
from vmnode.accounting.record import Process, Record
from vmnode.host.libvirt import NicLink, Nics
from vmnode.host.taps import TapCounters
from vmnode.usage import NONE, Traffic, Usage

pytestmark = pytest.mark.nft_owner

LAN = [IPv4Network("192.168.122.0/24")]
DOMAIN = "alice_pool_12.0"
RECORD = Record(17, "b00t", "vmnj17", 3, Process(1230, 98765), "slot1_1", 100.0, 160.0, "s#12.0#1", "alice@pool", 13)


def nics(guest: Guest) -> Mapping[str, Nics]:
    return {DOMAIN: Nics(1, (NicLink(guest.tap.name, guest.tap.index, bridged=True),))}


def sent(*lengths: int) -> Usage:
    return Usage(wan_out=Traffic(sum(lengths), len(lengths)))


class Daemon:
    def __init__(self, directory: Path) -> None:
        self.file = directory / "guests.json"
        self.counters = TapCounters("test")
        self.books = GuestBooks(self.counters, self.file, "b00t")
        asyncio.run(self.books.start(LAN, []))

    def round(self, record: Record, seen: Mapping[str, Nics], *, ends: bool = False) -> Record:
        asyncio.run(self.books.look([record], [], seen))
        record = self.books.counted(record)
        asyncio.run(self.books.forget([] if ends else [record]))
        return record


def test_a_guest_is_counted_from_the_first_packet_to_the_last(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with guests(7) as (one,):
        first = daemon.books.counted(RECORD)
        asyncio.run(daemon.books.forget([RECORD]))
        assert first.partial_since == RECORD.seen_at  # this job was there before the rules
        one.send(packet4(one.address, FAR, 100), host_mac())
        record = daemon.round(RECORD, {})
        assert record.guest is None  # nobody knows yet whose it is
        record = daemon.round(record, nics(one))
        assert (record.guest, record.partial_since) == (sent(100), None)
        one.send(packet4(one.address, FAR, 30), host_mac())
    until(lambda: "vnet7" not in links())
    for _ in range(2):
        record = daemon.round(record, {})
        assert record.guest == sent(100, 30)
    assert asyncio.run(daemon.counters.read()) == {one.tap: sent(100, 30)}
    assert daemon.books.why_incomplete(record) == ""
    assert daemon.round(record, {}, ends=True).guest == sent(100, 30)
    assert asyncio.run(daemon.counters.read()) == {}
    asyncio.run(daemon.counters.tear_down())


def test_a_daemon_that_is_started_anew_misses_nothing(tmp_path: Path) -> None:
    with guests(7) as (one,):
        Daemon(tmp_path)
        one.send(packet4(one.address, FAR, 100), host_mac())
        before = Daemon(tmp_path)
        asyncio.run(before.books.look([RECORD], [], nics(one)))  # and is killed before it writes the ledger
        one.send(packet4(one.address, FAR, 30), host_mac())
    until(lambda: "vnet7" not in links())
    daemon = Daemon(tmp_path)
    record = daemon.round(RECORD, {})
    assert (record.guest, record.partial_since) == (sent(100, 30), None)
    daemon.file.write_text("{")
    assert Daemon(tmp_path).round(RECORD, {}).guest is None  # not zero
    asyncio.run(daemon.counters.tear_down())


def test_rules_that_others_removed_are_a_gap(tmp_path: Path) -> None:
    with guests(7) as (one,):
        daemon = Daemon(tmp_path)
        daemon.round(RECORD, {})
        one.send(packet4(one.address, FAR, 100), host_mac())
        record = daemon.round(RECORD, nics(one))
        tool("nft", "flush", "ruleset")
        one.send(packet4(one.address, FAR, 1000), host_mac())
        record = replace(daemon.round(record, nics(one)), seen_at=200.0)
        assert (record.guest, record.partial_since) == (sent(100), RECORD.seen_at)
        one.send(packet4(one.address, FAR, 200), host_mac())
        record = daemon.round(record, nics(one))
        assert (record.guest, record.partial_since) == (sent(100, 200), RECORD.seen_at)
        asyncio.run(daemon.counters.tear_down())


def test_other_guests_cost_nothing_once_they_are_gone(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with guests(7, 8) as (one, other):
        other.send(packet4(other.address, FAR, 100), host_mac())
        daemon.round(RECORD, nics(one))
        assert asyncio.run(daemon.counters.read()) == {other.tap: sent(100)}
        assert daemon.books.counted(RECORD).guest == NONE
    until(lambda: "vnet8" not in links())
    daemon.round(RECORD, nics(one))
    assert asyncio.run(daemon.counters.read()) == {}
    assert [entry["domain"] for entry in json.loads(daemon.file.read_text())["guests"]] == [DOMAIN]
    asyncio.run(daemon.counters.tear_down())
