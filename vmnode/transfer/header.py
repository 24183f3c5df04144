"""What the bytes of a disk image say that it is. Pure, and strict: what is not known is refused.

QEMU would guess a format from the first bytes, which a guest can write; so nobody but this file looks at them, and what
it finds is told to QEMU. (QEMU, docs/interop/qcow2.rst; the magic numbers: block/*.c.)
"""

from __future__ import annotations

import re
import struct

from vmnode.errors import BadImage

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from typing import Optional

HEAD = 1 << 16  # bytes of the beginning that are looked at
TAIL = 512  # bytes of the end: some formats have a footer

_QCOW2 = b"QFI\xfb"
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)
# A VMDK may be text that names other files: QEMU knows it by its version, other programs by its type.
_DESCRIPTOR = re.compile(
    rb'# Disk DescriptorFile|(#[^\n]*\n|[ \r]*\n)*version=[123]\r?\n|[\t-\r -~]*?createType="', re.IGNORECASE
)
_FOOTERS = ((b"conectix", "vpc"), (b"koly", "dmg"))

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # to the offset 72, where version 2 ends
_FEATURES = struct.Struct(">QQQII")  # version 3: incompatible, compatible, autoclear, refcount_order, header_length
_EXTENSION = struct.Struct(">II")
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_BACKING_FORMAT, _ENCRYPTION, _DATA_FILE_NAME, _BITMAPS = 0xE2792ACA, 0x0537BE77, 0x44415441, 0x23852875
_MOST_L1_BYTES, _MOST_REFCOUNT_BYTES = 32 << 20, 8 << 20  # QEMU's own limits (QCOW_MAX_L1_SIZE, …_REFTABLE_SIZE)


class Header:
    """What an image says of itself. `backing` is the name of its backing file, as it stands in it."""

    def __init__(self, virtual_size: int, backing: Optional[str] = None, backing_format: Optional[str] = None) -> None:
        self.virtual_size = virtual_size  # bytes
        self.backing = backing
        self.backing_format = backing_format


def detect(head: bytes, tail: bytes) -> str:
    """The format that the bytes look like: "raw" if like none that has a name. Never a reason to trust them."""
    if head.startswith(_QCOW2):
        return "qcow2" if head[4:8] != b"\0\0\0\1" else "qcow"
    for offset, magic, name in _MAGIC:
        if head[offset:].startswith(magic):
            return name
    if _DESCRIPTOR.match(head):
        return "vmdk"
    return next((name for magic, name in _FOOTERS if tail.startswith(magic)), "raw")


def raw(size: int) -> Header:
    """A raw image of `size` bytes: QEMU shows it in whole sectors."""
    if size == 0:
        raise BadImage("it is empty")
    return Header((size + 511) & ~511)


def qcow2(head: bytes, size: int) -> Header:
    """The header of a qcow2 image whose file has `size` bytes; raises BadImage."""
    if len(head) < _FIXED.size or not head.startswith(_QCOW2):
        raise BadImage("it is no qcow2 image")
    (_, version, backing_offset, backing_length, cluster_bits, virtual_size, encryption, l1_entries, l1_offset,
     refcount_offset, refcount_clusters, snapshots, snapshots_offset) = _FIXED.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise BadImage(f"it is qcow2 of version {version}, which is not known")
    if not 9 <= cluster_bits <= 21:
        raise BadImage(f"its cluster size, 2^{cluster_bits}, is none that qcow2 has")
    cluster = 1 << cluster_bits
    features, header_length = 0, _FIXED.size
    if version == 3:
        features, header_length = _version_3(head, cluster)
    if encryption:
        raise BadImage("it is encrypted")
    if virtual_size == 0:
        raise BadImage("its size is 0")
    per_table = cluster // (16 if features & _EXTENDED_L2 else 8)
    tables = -(-virtual_size // (cluster * per_table))
    if l1_entries < tables or l1_entries * 8 > _MOST_L1_BYTES:
        raise BadImage(f"its first table has {l1_entries} entries where its size needs {tables}")
    _inside("first table", l1_offset, l1_entries * 8, cluster, size)
    _inside("table of reference counts", refcount_offset, refcount_clusters * cluster, cluster, size)
    if not 0 < refcount_clusters * cluster <= _MOST_REFCOUNT_BYTES:
        raise BadImage(f"its table of reference counts has {refcount_clusters} clusters")
    if snapshots_offset % cluster or snapshots > 65536 or snapshots_offset + snapshots * 40 > size:
        raise BadImage("its table of snapshots lies outside of the file")
    backing, end = None, min(cluster, len(head))
    if backing_offset:
        if not (header_length <= backing_offset and 0 < backing_length <= 1023):
            raise BadImage("the name of its backing file lies outside of its header")
        if backing_offset + backing_length > end:
            raise BadImage("the name of its backing file lies outside of its first cluster")
        backing = head[backing_offset : backing_offset + backing_length].decode("utf-8", "backslashreplace")
        end = backing_offset
    return Header(virtual_size, backing, _extensions(head[header_length:end]))


def _version_3(head: bytes, cluster: int) -> tuple[int, int]:
    """The incompatible features, all of them known, and the length of the header."""
    if len(head) < _FIXED.size + _FEATURES.size:
        raise BadImage("its header is cut off")
    features, _, _, refcount_order, header_length = _FEATURES.unpack_from(head, _FIXED.size)
    if features & _DATA_FILE:
        raise BadImage("it keeps its data in another file (external data file)")
    if features & _CORRUPT:
        raise BadImage("it is marked as corrupt: qemu-img check -r all")
    if features & _DIRTY:
        raise BadImage("it was not closed, or is still open for writing: qemu-img check -r all")
    if features & _EXTENDED_L2 and cluster < 1 << 14:
        raise BadImage(f"its clusters of {cluster} bytes are too small to be divided (extended L2 entries)")
    if features & ~(_COMPRESSION | _EXTENDED_L2):
        raise BadImage(f"it has incompatible features that are not known ({features:#x})")
    if refcount_order > 6 or not 104 <= header_length <= cluster or header_length % 8:
        raise BadImage("its header has no sense")
    compression = head[104] if header_length > 104 and len(head) > 104 else 0
    if compression > 1 or bool(features & _COMPRESSION) != bool(compression):
        raise BadImage(f"its compression, {compression}, is not known")
    return features, header_length


def _inside(what: str, offset: int, length: int, cluster: int, size: int) -> None:
    if offset % cluster or offset < cluster or offset + length > size:
        raise BadImage(f"its {what} lies outside of the file")


def _extensions(area: bytes) -> Optional[str]:
    """Looks through the header extensions; the format of the backing file, where one says it."""
    backing_format, position = None, 0
    while position + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, position)
        position += _EXTENSION.size
        if position + length > len(area):
            raise BadImage("its header extensions do not end")
        if kind == 0:
            return backing_format
        if kind == _DATA_FILE_NAME:
            raise BadImage("it names an external data file")
        if kind == _BITMAPS and length != 24:
            raise BadImage("its bitmaps have no sense")
        if kind == _ENCRYPTION:
            raise BadImage("it is encrypted")
        if kind == _BACKING_FORMAT and length >= 16:
            raise BadImage("the format of its backing file has no sense")
        if kind == _BACKING_FORMAT:
            backing_format = area[position : position + length].decode("ascii", "backslashreplace")
        position += (length + 7) & ~7
    if area[position:].strip(b"\0"):
        raise BadImage("its header extensions do not end")
    return backing_format
