"""What the first bytes of an image say: made by hand here; what the real qemu-img writes is read in tests/kernel."""

from __future__ import annotations

import io
import struct
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.images import (
    BACKING_FORMAT,
    BITMAPS,
    COMPRESSION,
    CORRUPT,
    DATA_FILE,
    DATA_FILE_NAME,
    DIRTY,
    ENCRYPTION,
    END,
    EXTENDED_L2,
    FEATURE_NAMES,
    GIB,
    MIB,
    qcow2,
)
from vmnode.errors import EXIT_BAD_IMAGE, BadImage
from vmnode.transfer import header
from vmnode.transfer.header import HEAD, TAIL, Header, detect


def look(image: bytes) -> Header:
    """The header of a qcow2 image, as the policy reads it out of a file."""
    assert detect(image[:HEAD], image[-TAIL:]) == "qcow2"
    return header.qcow2(image[:HEAD], len(image))


def refusal(image: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        header.qcow2(image[:HEAD], len(image))
    assert caught.value.exit_status == EXIT_BAD_IMAGE == 65
    return caught.value.what


def said(read: Header) -> tuple[int, Optional[str], Optional[str]]:
    return read.virtual_size, read.backing, read.backing_format


# --- what is good -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "virtual_size"),
    [
        ({}, MIB),
        ({"version": 2}, MIB),
        ({"virtual_size": 1, "l1_entries": 1}, 1),
        ({"virtual_size": 32 * 1024, "l1_entries": 1}, 32 * 1024),  # what one second-level table stands for
        ({"l1_entries": 33}, MIB),  # room to grow
        ({"cluster_bits": 16, "virtual_size": 20 * GIB, "l1_entries": 40}, 20 * GIB),  # 512 MiB each
        ({"cluster_bits": 21, "virtual_size": 20 * GIB, "l1_entries": 1}, 20 * GIB),  # 512 GiB each
        ({"header_length": 112}, MIB),
        ({"header_length": 112, "compression": b"\1", "incompatible": COMPRESSION}, MIB),
        ({"header_length": 128}, MIB),  # of a later QEMU
        ({"header_length": 512, "ended": False}, MIB),  # the whole cluster
        ({"l1_offset": 1536, "l1_entries": 64}, MIB),  # to the end of the file
        ({"refcount_offset": 1536}, MIB),
        # Entries of 16 bytes: 1,024 clusters of 16 KiB each.
        ({"incompatible": EXTENDED_L2, "cluster_bits": 14, "virtual_size": 64 * MIB, "l1_entries": 4}, 64 * MIB),
        ({"compatible": 0xFFFF, "autoclear": 0xFF}, MIB),  # what need not be known
        ({"refcount_order": 6}, MIB),
        ({"extensions": [(FEATURE_NAMES, b"x" * 48), (0x12345678, b"anything")]}, MIB),
        ({"extensions": [(BITMAPS, b"x" * 24)]}, MIB),
        ({"extensions": [(0x12345678, b"12345")], "ended": False}, MIB),  # the end of the cluster is one, too
        # 104 + 8 + 392 + 8 = 512
        ({"extensions": [(FEATURE_NAMES, b"x" * 392), (0x12345678, b"")], "ended": False}, MIB),
        ({"extensions": [(END, b""), (DATA_FILE_NAME, b"x"), (ENCRYPTION, b"x")]}, MIB),  # nobody reads on
    ],
)
def test_a_good_image(fields: dict[str, Any], virtual_size: int) -> None:
    assert said(look(qcow2(**fields))) == (virtual_size, None, None)


@pytest.mark.parametrize("version", [2, 3])
def test_a_backing_file_is_named_with_its_format(version: int) -> None:
    named = qcow2(version=version, backing=b"/images/el9.qcow2", extensions=[(BACKING_FORMAT, b"qcow2")])
    assert said(look(named)) == (MIB, "/images/el9.qcow2", "qcow2")
    assert said(look(qcow2(version=version, backing=b"../x"))) == (MIB, "../x", None)
    assert look(qcow2(version=version, backing=b"/x", ended=False)).backing == "/x"  # right behind the header
    strange = qcow2(version=version, backing=b"json:{\xff\0}", extensions=[(BACKING_FORMAT, b"v\xffdk\0")])
    assert said(look(strange)) == (MIB, "json:{\\xff\0}", "v\\xffdk\0")


def test_the_name_of_a_backing_file_may_end_with_the_cluster() -> None:
    image = bytearray(qcow2(backing=b"/images/x", backing_offset=503))
    image[503:512] = b"/images/x"
    assert look(bytes(image)).backing == "/images/x"


def test_the_longest_name_of_a_backing_file() -> None:
    name = b"/" + b"x" * 1022
    assert look(qcow2(cluster_bits=11, backing=name)).backing == name.decode()
    assert "lies outside of its header" in refusal(qcow2(cluster_bits=11, backing=name + b"x"))


# --- what is refused ----------------------------------------------------------------------------------------------

INCOMPATIBLE = "it has incompatible features that are not known"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"version": 4}, "it is qcow2 of version 4, which is not known"),
    ({"version": 0}, "it is qcow2 of version 0"),
    ({"version": 0xFFFFFFFF}, "it is qcow2 of version 4294967295"),
    ({"encryption": 1}, "it is encrypted"),
    ({"encryption": 2}, "it is encrypted"),
    ({"version": 2, "encryption": 2}, "it is encrypted"),
    ({"extensions": [(ENCRYPTION, bytes(16))]}, "it is encrypted"),
    ({"incompatible": DATA_FILE}, "it keeps its data in another file (external data file)"),
    ({"incompatible": DATA_FILE | DIRTY | CORRUPT | 1 << 40}, "external data file"),
    ({"extensions": [(DATA_FILE_NAME, b"/etc/shadow")]}, "it names an external data file"),
    ({"version": 2, "extensions": [(DATA_FILE_NAME, b"/etc/shadow")]}, "it names an external data file"),
    ({"extensions": [(FEATURE_NAMES, b"x" * 47), (DATA_FILE_NAME, b"x")]}, "it names an external data file"),
    ({"incompatible": CORRUPT}, "it is marked as corrupt: qemu-img check -r all"),
    ({"incompatible": DIRTY}, "it was not closed"),
    ({"incompatible": 1 << 5}, f"{INCOMPATIBLE} (0x20)"),
    ({"incompatible": 1 << 63}, f"{INCOMPATIBLE} (0x8000000000000000)"),
    ({"incompatible": EXTENDED_L2, "l1_entries": 64}, "its clusters of 512 bytes are too small to be divided"),
    ({"incompatible": EXTENDED_L2, "cluster_bits": 13, "l1_entries": 1}, "its clusters of 8192 bytes are too small"),
    ({"incompatible": COMPRESSION}, "its compression, 0, is not known"),
    ({"incompatible": COMPRESSION, "header_length": 112}, "its compression, 0, is not known"),
    ({"header_length": 112, "compression": b"\1"}, "its compression, 1, is not known"),
    ({"incompatible": COMPRESSION, "header_length": 112, "compression": b"\2"}, "its compression, 2, is not known"),
    ({"refcount_order": 7}, "its header has no sense"),
    ({"header_length": 96}, "its header has no sense"),
    ({"header_length": 105}, "its header has no sense"),
    ({"header_length": 520, "cluster_bits": 9}, "its header has no sense"),
    ({"cluster_bits": 8}, "its cluster size, 2^8, is none that qcow2 has"),
    ({"virtual_size": 0}, "its size is 0"),
    ({"l1_entries": 31}, "its first table has 31 entries where its size needs 32"),
    ({"l1_entries": 0}, "its first table has 0 entries"),
    ({"virtual_size": MIB + 1}, "its first table has 32 entries where its size needs 33"),
    ({"virtual_size": 2**64 - 1}, "its first table has 32 entries where its size needs 562949953421312"),
    ({"l1_entries": (32 * MIB) // 8 + 1}, "its first table has 4194305 entries"),
    (
        {"incompatible": EXTENDED_L2, "cluster_bits": 14, "virtual_size": 64 * MIB, "l1_entries": 3},
        "its first table has 3 entries where its size needs 4",
    ),
    ({"refcount_clusters": 0}, "its table of reference counts has 0 clusters"),
    ({"backing": b"x", "backing_length": 0}, "the name of its backing file lies outside"),
    ({"backing": b"x", "backing_length": 1024}, "the name of its backing file lies outside"),
    ({"backing": b"x", "backing_length": 0xFFFFFFFF}, "the name of its backing file lies outside"),
    ({"backing": b"x", "backing_offset": 8}, "the name of its backing file lies outside of its header"),
    ({"backing": b"x", "backing_offset": 103}, "the name of its backing file lies outside of its header"),
    ({"backing": b"/x", "backing_offset": 511}, "the name of its backing file lies outside of its first cluster"),
    ({"backing": b"x", "backing_offset": 512}, "the name of its backing file lies outside of its first cluster"),
    ({"backing": b"x", "backing_offset": 2**63}, "the name of its backing file lies outside"),
    ({"backing": b"x", "extensions": [(BACKING_FORMAT, b"x" * 16)]}, "the format of its backing file has no sense"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[f"{words} {n}" for n, (_, words) in enumerate(REFUSED)])
def test_what_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(qcow2(**fields))


@pytest.mark.parametrize("what", ["l1", "refcount"])
@pytest.mark.parametrize("offset", [0, 1, 511, 513, 2048, 2**32, 2**63, 2**64 - 512])
def test_tables_outside_of_the_file_are_refused(what: str, offset: int) -> None:
    """The file has four clusters of 512 bytes; the first of them is the header's own."""
    table = {"l1": "first table", "refcount": "table of reference counts"}[what]
    fields: dict[str, Any] = {f"{what}_offset": offset}
    assert refusal(qcow2(**fields)) == f"its {table} lies outside of the file"


def test_tables_that_end_outside_of_the_file_are_refused() -> None:
    assert look(qcow2(l1_offset=1536)).virtual_size == MIB  # 32 entries of 8 bytes: up to 1792 of 2048
    # 65 x 8 = 520 bytes from 1536 on.
    assert "first table lies outside" in refusal(qcow2(l1_offset=1536, l1_entries=65))
    assert "reference counts lies outside" in refusal(qcow2(refcount_offset=1536, refcount_clusters=2))
    assert "reference counts lies outside" in refusal(qcow2(refcount_clusters=0xFFFFFFFF))


def test_a_table_that_qemu_would_not_read_is_refused() -> None:
    """At most 8 MiB of reference counts, and 32 MiB of a first table, however large the file is."""
    image = qcow2(cluster_bits=20, l1_entries=1, refcount_clusters=8)
    assert header.qcow2(image[:HEAD], GIB).virtual_size == MIB
    image = qcow2(cluster_bits=20, l1_entries=1, refcount_clusters=9)
    with pytest.raises(BadImage, match="its table of reference counts has 9 clusters"):
        header.qcow2(image[:HEAD], GIB)
    assert header.qcow2(qcow2(l1_entries=4 * MIB), GIB).virtual_size == MIB  # of 8 bytes each
    with pytest.raises(BadImage, match="its first table has 4194305 entries"):
        header.qcow2(qcow2(l1_entries=4 * MIB + 1), GIB)


@pytest.mark.parametrize(
    ("number", "offset", "good"),
    [
        (0, 0, True),
        (1, 512, True),
        (12, 1536, True),  # 12 x 40 = 480 of the last 512 bytes
        (13, 1536, False),
        (1, 2048, False),
        (1, 513, False),
        (0, 1, False),
        (65537, 512, False),
        (0xFFFFFFFF, 0, False),
        (1, 2**64 - 512, False),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_the_table_of_snapshots_lies_within_the_file(version: int, number: int, offset: int, good: bool) -> None:
    image = bytearray(qcow2(version=version))
    struct.pack_into(">IQ", image, 60, number, offset)
    if good:
        assert look(bytes(image)).virtual_size == MIB
    else:
        assert refusal(bytes(image)) == "its table of snapshots lies outside of the file"


@pytest.mark.parametrize(("number", "good"), [(65536, True), (65537, False)])
def test_more_snapshots_than_qemu_takes_are_refused_in_a_file_of_any_size(number: int, good: bool) -> None:
    image = bytearray(qcow2())
    struct.pack_into(">IQ", image, 60, number, 4096)
    if good:
        assert header.qcow2(bytes(image), GIB).virtual_size == MIB
    else:
        with pytest.raises(BadImage, match="table of snapshots"):
            header.qcow2(bytes(image), GIB)


def test_the_table_of_snapshots_ends_with_the_file_at_the_latest() -> None:
    image = bytearray(qcow2())
    struct.pack_into(">IQ", image, 60, 12, 1536)  # 12 x 40 = 480
    assert look(bytes(image[:2016])).virtual_size == MIB
    assert refusal(bytes(image[:2015])) == "its table of snapshots lies outside of the file"


def test_clusters_of_more_than_2_mib_are_refused() -> None:
    image = bytearray(qcow2())
    struct.pack_into(">I", image, 20, 22)
    assert refusal(bytes(image)) == "its cluster size, 2^22, is none that qcow2 has"


def test_another_magic_is_no_qcow2_image() -> None:
    assert refusal(b"QFI\xfa" + qcow2()[4:]) == refusal(bytes(4096)) == "it is no qcow2 image"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", [0, FEATURE_NAMES, BACKING_FORMAT, DATA_FILE_NAME, 1])
def test_extensions_that_do_not_end_are_refused(version: int, kind: int) -> None:
    image = bytearray(qcow2(version=version))
    start = 72 if version == 2 else 104
    struct.pack_into(">II", image, start, kind, 512 - start - 8 + 1)  # one byte more than the cluster has
    assert refusal(bytes(image)) == "its header extensions do not end"
    image = bytearray(qcow2(version=version))
    struct.pack_into(">II", image, start, FEATURE_NAMES, 512 - start - 8)
    assert look(bytes(image)).virtual_size == MIB


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("length", range(121))
def test_an_image_that_is_cut_off_is_refused(version: int, length: int) -> None:
    whole = qcow2(version=version, backing=b"/images/x", extensions=[(BACKING_FORMAT, b"raw")])
    look(whole)
    said = refusal(whole[:length])
    if length < 72:
        assert said == "it is no qcow2 image"
    elif version == 3 and length < 104:
        assert said == "its header is cut off"
    else:
        assert said == "its first table lies outside of the file"


# --- other formats ------------------------------------------------------------------------------------------------

# As QEMU's block drivers have them: block/*.c, the functions called …_probe.
DESCRIPTOR = b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/shadow" 0\n'
FORMATS: list[tuple[str, bytes]] = [
    ("qcow2", b"QFI\xfb\x00\x00\x00\x02"),
    ("qcow2", b"QFI\xfb\x00\x00\x00\x03"),
    ("qcow2", b"QFI\xfb\x00\x00\x00\x63"),
    ("qcow2", b"QFI\xfb"),
    ("qcow", b"QFI\xfb\x00\x00\x00\x01"),
    ("qed", b"QED\x00"),
    ("vmdk", b"KDMV"),
    ("vmdk", b"COWD"),
    ("vmdk", DESCRIPTOR),
    ("vmdk", DESCRIPTOR.replace(b"\n", b"\r\n")),
    ("vmdk", b"version=1\n"),
    ("vmdk", b"version=3\r\n"),
    ("vmdk", b"# a comment\n\n  \r\n#\nversion=2\n"),
    ("vmdk", b'CREATETYPE="monolithicFlat"'),
    ("vmdk", b'\n\tencoding="UTF-8"\ncreateType="custom"'),
    ("vdi", b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe"),
    ("vdi", b"\x80" * 64 + b"\x7f\x10\xda\xbe"),
    ("vpc", b"conectix"),
    ("vhdx", b"vhdxfile"),
    ("luks", b"LUKS\xba\xbe\x00\x01"),
    ("luks", b"LUKS\xba\xbe\x00\x02"),
    ("parallels", b"WithoutFreeSpace"),
    ("parallels", b"WithouFreSpacExt"),
    ("bochs", b"Bochs Virtual HD Image"),
    ("cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),
]


@pytest.mark.parametrize(("name", "magic"), FORMATS, ids=[f"{name} {n}" for n, (name, _) in enumerate(FORMATS)])
def test_each_magic_is_known_at_its_place(name: str, magic: bytes) -> None:
    assert detect(magic, b"") == name
    image = magic.ljust(MIB, b"\0")
    assert detect(image[:HEAD], image[-TAIL:]) == name
    assert detect((b"\0" + image)[:HEAD], image[-TAIL:]) == "raw"  # and nowhere else
    if magic[:-1].strip(b"\0"):
        damaged = bytes([image[0] ^ 0x80]) + image[1:64] + bytes(MIB - 64)
        assert detect(damaged[:HEAD], damaged[-TAIL:]) == "raw"


@pytest.mark.parametrize(("name", "magic"), [("vpc", b"conectix"), ("dmg", b"koly")])
def test_a_format_with_a_footer_is_known_by_it(name: str, magic: bytes) -> None:
    image = bytes(MIB - 512) + magic.ljust(512, b"\0")
    assert detect(image[:HEAD], image[-TAIL:]) == name
    assert detect(image[:HEAD], bytes(TAIL)) == "raw"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\0",
        b"QFI",
        b"text of a user's own, such as a shell script or a table of figures\n",
        b"#!/bin/sh\necho version=1\n",
        b" version=1\n",
        b"version=4\n",
        b'\0createType="custom"',
        b'\xffcreateType="custom"',
        b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa",  # a boot sector
    ],
)
def test_what_has_no_other_format_s_magic_is_raw(head: bytes) -> None:
    assert detect(head, head[-TAIL:]) == "raw"


@pytest.mark.parametrize(("size", "virtual_size"), [(1, 512), (511, 512), (512, 512), (513, 1024), (GIB, GIB)])
def test_a_raw_image_has_whole_sectors(size: int, virtual_size: int) -> None:
    assert said(header.raw(size)) == (virtual_size, None, None)


def test_an_empty_file_is_no_image() -> None:
    with pytest.raises(BadImage, match="it is empty"):
        header.raw(0)


# --- anything at all ----------------------------------------------------------------------------------------------

GOOD = [
    qcow2(),
    qcow2(version=2),
    qcow2(backing=b"/images/x", extensions=[(BACKING_FORMAT, b"raw"), (FEATURE_NAMES, b"x" * 48)]),
    qcow2(version=2, backing=b"/images/x", extensions=[(BACKING_FORMAT, b"qcow2")]),
    qcow2(header_length=112, compression=b"\1", incompatible=COMPRESSION),
    qcow2(incompatible=EXTENDED_L2, cluster_bits=14, l1_entries=4),
]
# Where the fields of the header lie, and how long they are.
FIELDS = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
FIELDS += [(72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 4), (108, 4)]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good image with bits flipped, fields replaced, and its end cut off or drawn out."""
    image = bytearray(draw(st.sampled_from(GOOD)))
    for bit in draw(st.lists(st.integers(32, 140 * 8 - 1), max_size=4)):
        image[bit // 8] ^= 1 << bit % 8
    for offset, length in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        most = (1 << 8 * length) - 1
        value = draw(st.sampled_from([0, 1, 2, 3, 8, 15, 16, 104, 512, 1024, 65536, most, most // 2]))
        image[offset : offset + length] = (value & most).to_bytes(length, "big")
    end = draw(st.sampled_from([len(image)] * 5 + [0, 71, 72, 103, 104, 512, 1024, 4096]))
    return bytes(image[:end]).ljust(end, b"\0")


@settings(max_examples=2000)
@given(st.one_of(damaged(), st.binary(max_size=200), st.binary(max_size=200).map(b"QFI\xfb\0\0\0\3".__add__)))
@example(b"QFI\xfb")
def test_any_bytes_are_a_header_with_sense_or_a_bad_image(image: bytes) -> None:
    format = detect(image[:HEAD], image[-TAIL:])
    assert (format == "qcow2") <= image.startswith(b"QFI\xfb")
    try:
        read = header.qcow2(image[:HEAD], len(image))
    except BadImage as error:
        assert error.what.isprintable()
        return
    assert format == "qcow2"
    assert read.virtual_size > 0
    # Written again, by hand: each table within the file, and nothing that leads out of it.
    version, backing, backing_length, bits, size, encryption, l1, l1_at, counts_at, counts = struct.unpack_from(
        ">IQIIQIIQQI", image, 4
    )
    assert version in (2, 3) and not encryption and size == read.virtual_size
    assert l1_at + 8 * l1 <= len(image) and counts_at + (counts << bits) <= len(image)
    assert (read.backing is None) == (backing == 0)
    if read.backing is not None:
        assert image[backing : backing + backing_length].decode("utf-8", "backslashreplace") == read.backing
    if version == 3:
        assert struct.unpack_from(">Q", image, 72)[0] & ~(COMPRESSION | EXTENDED_L2) == 0


# --- what OpenStack says of the same bytes ------------------------------------------------------------------------


# A partition table, or a CD-ROM's file system, is the guest's affair: to QEMU such an image is raw.
CONTENTS = ("raw", "gpt", "iso")


@pytest.fixture(scope="module")
def inspector() -> Any:
    return pytest.importorskip(
        "oslo_utils.imageutils.format_inspector", reason="oslo.utils, which judges images too, is not installed"
    )


def judged_by_openstack(inspector: Any, image: bytes) -> tuple[str, set[str]]:
    """The format, and what makes it unsafe. More than one format at once does."""
    wrapper = inspector.InspectWrapper(io.BytesIO(image))
    while wrapper.read(512):
        pass
    wrapper.close()
    found = [one for one in wrapper.formats if one.NAME not in CONTENTS]
    complaints = {"formats"} if len(found) > 1 else set()
    for one in found:
        try:
            one.safety_check()
        except inspector.SafetyCheckFailed as error:
            complaints |= set(error.failures)
        except inspector.ImageFormatError:
            complaints.add("incomplete")
    return ",".join(sorted(map(str, found))) or "raw", complaints


def judged_here(image: bytes) -> tuple[str, bool]:
    """The same, as the policy has it for a base image."""
    format = detect(image[:HEAD], image[-TAIL:])
    if format != "qcow2":
        return format, format == "raw"
    try:
        return format, header.qcow2(image[:HEAD], len(image)).backing is None
    except BadImage:
        return format, False


@settings(max_examples=1000)
@given(image=damaged())
def test_what_openstack_calls_an_unsafe_qcow2_image_is_refused(inspector: Any, image: bytes) -> None:
    name, complaints = judged_by_openstack(inspector, image)
    if name != "qcow2":
        return
    (version,) = struct.unpack_from(">I", image, 4)
    (features,) = struct.unpack_from(">Q", image, 72)
    if version == 2:  # oslo.utils reads features there that this version has not
        complaints.discard("data_file")
    elif features & ~(COMPRESSION | EXTENDED_L2) == 0:  # and knows none that QEMU has had since 5.2
        complaints.discard("unknown_features")
    if complaints:
        assert not judged_here(image)[1]


magics = st.sampled_from([*(magic for _, magic in FORMATS), b"#", b"\n", b"\x55\xaa"])


@st.composite
def disguised(draw: st.DrawFn) -> bytes:
    """Magic numbers at the places where one format or another looks for them."""
    image = bytearray(draw(st.sampled_from([b"\0", b"\n", b"a", b"\xff"])) * 2048)
    for magic in draw(st.lists(magics, min_size=1, max_size=3)):
        at = draw(st.sampled_from([0, 0, 0, 1, 0x40, 510, 512, len(image) - 512]))
        image[at : at + len(magic)] = magic
    return bytes(image)


@settings(max_examples=300)
@given(image=disguised())
@example(image=DESCRIPTOR.ljust(2048, b"\n"))
@example(image=b'a="b"\nCreateType="streamOptimized"'.ljust(2048, b" "))
def test_no_image_is_raw_where_openstack_sees_another_format(inspector: Any, image: bytes) -> None:
    if judged_by_openstack(inspector, image)[0] != "raw":
        assert judged_here(image)[0] != "raw"


@pytest.mark.parametrize(
    ("image", "name", "safe"),
    [
        (qcow2(), "qcow2", True),
        (qcow2(version=2), "qcow2", True),
        (qcow2(backing=b"/etc/shadow"), "qcow2", False),
        (qcow2(incompatible=DATA_FILE), "qcow2", False),
        (qcow2(incompatible=1 << 5), "qcow2", False),
        (qcow2(version=4), "qcow2", False),
        (bytes(4096), "raw", True),
    ],
)
def test_both_judge_alike(inspector: Any, image: bytes, name: str, safe: bool) -> None:
    assert judged_here(image) == (name, safe)
    there, complaints = judged_by_openstack(inspector, image)
    assert (there, not complaints) == (name, safe)
