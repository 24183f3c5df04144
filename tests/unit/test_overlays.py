"""What is remembered of the guests and the images under them: written, read back, and never believed when damaged."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmnode.errors import StateError
from vmnode.images import Image
from vmnode.overlays import Overlay, change, document, read, write

BASE = Image("/images/el9.qcow2", "qcow2", 10737418240, 6442450944, 1790000000123456789, 12)
OVERLAY = Overlay("alice_node_9.0", "node#9.0#1795267985", "alice", 1790000000.25, (BASE,))
WRITTEN = write(OVERLAY)

images = st.builds(
    Image,
    path=st.text(max_size=20).map("/{}".format),
    format=st.sampled_from(["raw", "qcow2"]),
    virtual_size=st.integers(1, 2**63),
    size=st.integers(0, 2**63),
    mtime_ns=st.integers(-(2**63), 2**64),
    inode=st.integers(0, 2**64),
)
overlays = st.builds(
    Overlay,
    domain=st.text(max_size=20),
    job=st.text(max_size=20),
    owner=st.text(max_size=20),
    started_at=st.floats(allow_nan=False, allow_infinity=False),
    bases=st.lists(images, max_size=3).map(tuple),
)


def refusal(data: bytes) -> str:
    with pytest.raises(StateError) as caught:
        read(data)
    return caught.value.what


def test_what_the_file_holds() -> None:
    assert json.loads(WRITTEN) == {
        "version": 1,
        "domain": "alice_node_9.0",
        "job": "node#9.0#1795267985",
        "owner": "alice",
        "started_at": 1790000000.25,
        "bases": [
            {
                "path": "/images/el9.qcow2",
                "format": "qcow2",
                "virtual_size": 10737418240,
                "size": 6442450944,
                "mtime_ns": 1790000000123456789,
                "inode": 12,
            }
        ],
    }
    assert WRITTEN.endswith(b"}\n")
    assert json.loads(json.dumps(document(OVERLAY))) == {k: v for k, v in json.loads(WRITTEN).items() if k != "version"}


@given(overlays)
@example(OVERLAY)
@example(dataclasses.replace(OVERLAY, bases=(), owner='"\\\n\u2028€'))
def test_what_is_written_is_read_back(overlay: Overlay) -> None:
    assert read(write(overlay)) == overlay


@pytest.mark.parametrize("version", [b"2", b"0", b"null", b'"1"', b"1.5"])
def test_another_version_s_file_is_not_guessed_at(version: bytes) -> None:
    assert refusal(WRITTEN.replace(b'"version": 1', b'"version": ' + version)) == (
        "it was written by another version of vmnode"
    )


@pytest.mark.parametrize("length", range(len(WRITTEN) - 1))
def test_a_file_that_is_cut_off_is_damaged(length: int) -> None:
    assert refusal(WRITTEN[:length]) == "it is damaged"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1,', ""),
        ('"domain": "alice_node_9.0",', ""),
        ('"domain"', '"name"'),
        ('"domain"', '"x": 1, "domain"'),
        ('"path"', '"x": 1, "path"'),
        ('"inode": 12', '"i": 12'),
        ('"bases": [', '"bases": [[], '),
        ('"bases": [', '"bases": [null, '),
        ('"bases": [', '"bases": 1, "old": ['),
        ('"bases": [', '"bases": null, "old": ['),
        ("{", "[" * 100_000 + "{"),
        ("{", "[{"),
        ("}\n", "}]\n"),
        ("alice", "\udcff"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_is_not_as_it_was_written_is_damage(old: str, new: str) -> None:
    text = WRITTEN.decode()
    assert old in text
    assert refusal(text.replace(old, new, 1).encode("utf-8", "surrogateescape")) == "it is damaged"


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"1", b'"x"', b"{}", b"\xff", b"NaN", b"{" * 100_000])
def test_what_is_no_such_file_at_all_is_damaged(data: bytes) -> None:
    assert refusal(data) == "it is damaged"


@settings(max_examples=500)
@given(st.data())
def test_any_damage_is_found_or_harmless(data: st.DataObject) -> None:
    damaged = bytearray(WRITTEN)
    start = data.draw(st.integers(0, len(damaged) - 1))
    damaged[start : start + data.draw(st.integers(0, 20))] = data.draw(
        st.binary(max_size=5) | st.sampled_from([b"{", b"[", b"null", b'"', b"1", b"NaN", b"\\ud800"])
    )
    try:
        found: Any = read(bytes(damaged))
    except StateError:
        return
    assert isinstance(found, Overlay) and all(isinstance(base, Image) for base in found.bases)


@pytest.mark.parametrize(
    ("size", "mtime_ns", "inode", "said"),
    [
        (6442450944, 1790000000123456789, 12, ""),
        (6442450944, 1790000000123456790, 12, "it was written to"),
        (6442450944, 1790000000123456788, 12, "it was written to"),
        (6442450945, 1790000000123456789, 12, "its size was 6442450944 bytes and is 6442450945 now"),
        (6442450945, 1790000000123456790, 12, "its size was 6442450944 bytes and is 6442450945 now"),
        (6442450944, 1790000000123456789, 13, "it was replaced by another file"),
        (1, 2, 3, "it was replaced by another file"),
    ],
)
def test_how_an_image_changed(size: int, mtime_ns: int, inode: int, said: str) -> None:
    assert change(BASE, size, mtime_ns, inode) == said
