"""Heads of disk images, made byte by byte as the formats' documents say (QEMU: docs/interop/qcow2.rst)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Optional

MIB, GIB = 1 << 20, 1 << 30

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16

# Header extensions.
END, BACKING_FORMAT, FEATURE_NAMES, BITMAPS, ENCRYPTION, DATA_FILE_NAME = (
    0x00000000,
    0xE2792ACA,
    0x6803F857,
    0x23852875,
    0x0537BE77,
    0x44415441,
)


def qcow2(
    *,
    version: int = 3,
    cluster_bits: int = 9,
    virtual_size: int = MIB,
    backing: bytes = b"",
    backing_offset: Optional[int] = None,
    backing_length: Optional[int] = None,
    encryption: int = 0,
    l1_entries: int = 32,
    l1_offset: Optional[int] = None,
    refcount_offset: Optional[int] = None,
    refcount_clusters: int = 1,
    incompatible: int = 0,
    compatible: int = 0,
    autoclear: int = 0,
    refcount_order: int = 4,
    header_length: int = 104,
    compression: bytes = b"",
    extensions: Sequence[tuple[int, bytes]] = (),
    ended: bool = True,
    clusters: int = 4,
) -> bytes:
    """An empty image of four clusters: header, first table, table of reference counts, reference counts.

    With clusters of 512 bytes, a second-level table has 64 entries and stands for 32 KiB: 1 MiB takes 32 of them.
    """
    cluster = 1 << cluster_bits
    area = b"".join(
        struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        for kind, data in [*extensions, *([(END, b"")] if ended else [])]
    )
    fixed = 72 if version == 2 else header_length
    if backing_offset is None:
        backing_offset = fixed + len(area) if backing else 0
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        backing_offset,
        len(backing) if backing_length is None else backing_length,
        cluster_bits,
        virtual_size,
        encryption,
        l1_entries,
        cluster if l1_offset is None else l1_offset,
        2 * cluster if refcount_offset is None else refcount_offset,
        refcount_clusters,
        0,
        0,
    )
    if version != 2:
        header += struct.pack(">QQQII", incompatible, compatible, autoclear, refcount_order, header_length)
        header += compression.ljust(max(0, header_length - 104), b"\0")
    first = (header + area + backing).ljust(cluster, b"\0")
    tables = [bytes(cluster), struct.pack(">Q", 3 * cluster).ljust(cluster, b"\0")]
    counts = struct.pack(">4H", 1, 1, 1, 1).ljust(cluster, b"\0")
    return b"".join([first, *tables, counts])[: clusters * cluster].ljust(clusters * cluster, b"\0")
