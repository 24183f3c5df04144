"""DNS on the wire (RFC 1035), and names that do not resolve."""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnode.host import child
from vmnode.host.reach import is_answer, resolve, version_question


def test_the_question_byte_by_byte() -> None:
    # What dnsmasq answers by itself, without an upstream server: version.bind, TXT, CHAOS.
    assert version_question(0xABCD) == (
        b"\xab\xcd"  # transaction
        b"\x01\x00"  # recursion desired
        b"\x00\x01\x00\x00\x00\x00\x00\x00"  # one question
        b"\x07version\x04bind\x00"
        b"\x00\x10\x00\x03"
    )


@pytest.mark.parametrize(
    ("transaction", "flags", "answer"),
    [
        (7, 0x8180, True),
        (7, 0x8185, True),  # refused: but somebody is there
        (7, 0x0100, False),  # a question
        (8, 0x8180, False),  # to somebody else
    ],
)
def test_what_is_an_answer(transaction: int, flags: int, answer: bool) -> None:
    assert is_answer(struct.pack("!6H", transaction, flags, 1, 0, 0, 0), 7) is answer


@given(st.binary(max_size=40), st.integers(0, 0xFFFF))
def test_any_bytes_are_an_answer_or_not(data: bytes, transaction: int) -> None:
    assert not (is_answer(data, transaction) and len(data) < 12)


def test_addresses_need_no_resolver() -> None:
    assert asyncio.run(resolve("192.0.2.1", 3)) == (("192.0.2.1",), "")
    assert asyncio.run(resolve("::1", 3)) == (("::1",), "")


@pytest.mark.parametrize("host", ["a" * 64 + ".example.org", "a..b", ".a", "x" * 300])
def test_a_name_that_no_host_can_have_is_told_as_one(host: str) -> None:
    addresses, why = asyncio.run(resolve(host, 10))
    assert addresses == ()
    assert why == "the name does not resolve"


def test_dead_name_servers_cost_the_deadline_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "getent").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "getent").chmod(0o755)
    monkeypatch.setitem(child.ENVIRONMENT, "PATH", f"{tmp_path}:{child.ENVIRONMENT['PATH']}")
    monkeypatch.setenv("PATH", child.ENVIRONMENT["PATH"])  # where the program is looked for
    began = time.monotonic()
    assert asyncio.run(resolve("cm.example.org", 0.3)) == ((), "the name did not resolve within 0.3 s")
    assert time.monotonic() - began < 5
