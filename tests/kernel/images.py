"""A worker's image roots, a job's scratch directory and its user, in the test's own mounts; and images of every kind.

/mnt/images, /mnt/images2     roots, root's           /mnt/home/alice       alice's
/mnt/execute/dir_7            alice's scratch         /mnt/state            vmnode's state_dir
/mnt/lib, /mnt/libexec        vmnode, as installed    /etc/passwd, group    with alice, bob and QEMU's user
/var/lib                      with libvirt's directory for QEMU, and nothing else
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.kernel.conftest import call
from tests.kernel.world import running, tool, until
from vmnode.host import child
from vmnode.host.accounts import QEMU_DIRECTORY
from vmnode.host.child import Identity
from vmnode.images import Image, Settings
from vmnode.transfer import policy

CHECKOUT = Path(__file__).parents[2]
SITE = Path("/mnt")
ROOT, OTHER_ROOT = SITE / "images", SITE / "images2"
HOME, SCRATCH, STATE = SITE / "home" / "alice", SITE / "execute" / "dir_7", SITE / "state"
LIB, LIBEXEC = SITE / "lib", SITE / "libexec"

# No account of the machine has these.
ALICE_UID, BOB_UID, QEMU_GID, CREW_GID = 21001, 21002, 21064, 21100
ALICE = Identity(ALICE_UID, ALICE_UID, [ALICE_UID, CREW_GID])
BOB = Identity(BOB_UID, BOB_UID, [BOB_UID])
PASSWD = f"""root:x:0:0::/root:/bin/sh
alice:x:{ALICE_UID}:{ALICE_UID}::{HOME}:/bin/sh
bob:x:{BOB_UID}:{BOB_UID}::/:/bin/sh
libvirt-qemu:x:{QEMU_GID}:{QEMU_GID}::/:/bin/false
"""
GROUP = f"root:x:0:\nalice:x:{ALICE_UID}:\nlibvirt-qemu:x:{QEMU_GID}:\ncrew:x:{CREW_GID}:alice,bob\n"

MIB, GIB = 1 << 20, 1 << 30
MS_BIND = 0x1000


def mount_tmpfs(directory: Path) -> None:
    """By the system call: some hundred tests do it."""
    call("mount", b"tmpfs", os.fsencode(directory), b"tmpfs", 0, b"mode=0755")


def bind(source: Path, place: Path) -> None:
    call("mount", os.fsencode(source), os.fsencode(place), None, MS_BIND, None)


def make_site() -> None:
    """On a tmpfs, which is gone with the test's mounts."""
    mount_tmpfs(SITE)
    for directory in (ROOT, OTHER_ROOT, HOME, SCRATCH, STATE, LIB, LIBEXEC):
        directory.mkdir(parents=True)
    for directory, mode in ((HOME, 0o755), (SCRATCH, 0o700)):
        directory.chmod(mode)
        os.chown(directory, ALICE_UID, ALICE_UID)
    for name, text in (("passwd", PASSWD), ("group", GROUP)):
        (SITE / name).write_text(text)
        bind(SITE / name, Path("/etc", name))
    mount_tmpfs(Path("/var/lib"))
    QEMU_DIRECTORY.mkdir(parents=True)
    os.chown(QEMU_DIRECTORY, QEMU_GID, QEMU_GID)
    QEMU_DIRECTORY.chmod(0o750)  # as on Debian


def settings(*roots: Path, user_roots: tuple[Path, ...] = (), raw: tuple[Path, ...] = ()) -> Settings:
    as_text = [tuple(map(str, paths)) for paths in (roots or (ROOT, OTHER_ROOT), user_roots, raw)]
    return Settings(as_text[0], as_text[1], as_text[2], timeout_s=20.0)


def base(path: object, format: Optional[str] = None, images: Optional[Settings] = None) -> Image:
    """What the policy answers to alice; raises as it does."""
    chosen = images or settings()
    return Image(*child.ask(lambda: policy.base(str(path), format, chosen), 20.0, str(path), ALICE))


@functools.cache
def _package() -> tempfile.TemporaryDirectory[str]:
    """The package, compiled as a package manager does it: an ordinary user's Python would do it again each time."""
    directory = tempfile.TemporaryDirectory(prefix="vmnode-test-")
    Path(directory.name).chmod(0o755)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "vmnode", Path(directory.name, "vmnode"), ignore=ignored)
    tool("/usr/bin/python3", "-m", "compileall", "-q", directory.name)
    return directory


def install() -> None:
    """The package and its launchers as `make install` has them, but below /mnt: an ordinary user has to get there."""
    bind(Path(_package().name), LIB)
    launcher = LIBEXEC / "vm-nfs-plugin"
    launcher.write_text(
        f'#!/usr/bin/python3 -IS\nimport sys\n\nsys.path.insert(0, "{LIB}")\n'
        "from vmnode.commands.nfs_plugin import main\n\nsys.exit(main())\n"
    )
    script = (CHECKOUT / "condor-config" / "vmnode-domain-xml.sh").read_text()
    assert "/usr/lib/vmnode" in script
    (LIBEXEC / "vmnode-domain-xml").write_text(script.replace("/usr/lib/vmnode", str(LIB)))
    for file in LIBEXEC.iterdir():
        file.chmod(0o755)


def configure(text: str) -> Path:
    """A configuration file of the test."""
    file = SITE / "vmnode.toml"
    file.write_text(text)
    return file


def give(path: Path, mode: int = 0o600, identity: Identity = ALICE) -> Path:
    """Make a file that user's."""
    os.chown(path, identity.uid, identity.gid, follow_symlinks=False)
    path.chmod(mode)
    return path


# --- images -------------------------------------------------------------------------------------------------------


def qemu_img(*arguments: object) -> str:
    return tool("qemu-img", *map(str, arguments))


def info(path: Path, format: str) -> dict[str, Any]:
    """The independent opinion; raises CalledProcessError where QEMU does not open it."""
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", format, path))
    return found


def qcow2(path: Path, *options: str, size: object = "64M") -> Path:
    """A qcow2 image with nothing in it."""
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", ",".join(options)] if options else []), path, size)
    return path


def raw(path: Path, size: int = MIB, start: bytes = b"", end: bytes = b"") -> Path:
    """A sparse file of `size` bytes that begins and ends with these."""
    with open(path, "wb") as file:
        file.truncate(size)
        file.write(start)
        file.seek(size - len(end))
        file.write(end)
    return path


def patch(path: Path, offset: int, layout: str, *values: int) -> Path:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, *values))
    return path


def overlay(path: Path, backing: str, format: str = "qcow2", size: object = "64M") -> Path:
    """A qcow2 image that names a backing file, whatever that is: nobody looks."""
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, path, size)
    return path


@functools.cache
def _encrypted(format: str, key: str) -> bytes:
    """An image whose contents are encrypted with LUKS. Finding the number of iterations takes a second, and fails on a
    busy machine ("Unable to get accurate CPU usage").
    """
    options = f"{key}key-secret=s,{key}iter-time=10" + (",encrypt.format=luks" if key else "")
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        for _ in range(30):
            with contextlib.suppress(subprocess.CalledProcessError):
                secret = ("--object", "secret,id=s,data=x")
                qemu_img("create", "-q", *secret, "-f", format, "-o", options, image, "1M")
                return image.read_bytes()
    raise AssertionError("qemu-img cannot encrypt here")


def _luks_in_qcow2(path: Path) -> Path:
    path.write_bytes(_encrypted("qcow2", "encrypt."))
    return path


def _left_open(path: Path) -> Path:
    """QEMU was killed while it wrote: with lazy reference counts, that leaves the dirty bit."""
    qcow2(path, "lazy_refcounts=on")
    subprocess.run(["qemu-io", "-c", "write 0 64k", "-c", "abort", str(path)], capture_output=True, timeout=20)
    return path


def _cut(path: Path, size: int) -> Path:
    os.truncate(qcow2(path), size)
    return path


def _with_extension(path: Path, kind: int, length: int, cluster: int = 0x10000) -> Path:
    """Over what comes first after the header; what it holds is 0."""
    return patch(qcow2(path, f"cluster_size={cluster}"), 112, ">IIQQ", kind, length, 0, 0)


def _created(format: str, *options: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        qemu_img("create", "-q", "-f", format, *(["-o", ",".join(options)] if options else []), path, "64M")
        return path

    return make


# Offsets in the header: QEMU, docs/interop/qcow2.rst.
VERSION, BACKING_OFFSET, CLUSTER_BITS, SIZE, CRYPT, L1_SIZE, L1_OFFSET, REFCOUNT_OFFSET = 4, 8, 20, 24, 32, 36, 40, 48
REFCOUNT_CLUSTERS, INCOMPATIBLE, REFCOUNT_ORDER, HEADER_LENGTH, COMPRESSION = 56, 72, 96, 100, 104


@dataclasses.dataclass(frozen=True)
class Hostile:
    """An image that must not be used, whoever brings it: how it is made, and what is said of it."""

    name: str
    make: Callable[[Path], object]
    sentence: str  # a regular expression

    def __str__(self) -> str:
        return self.name


HOSTILE = (
    Hostile(
        "external data file",
        lambda path: qcow2(path, f"data_file={path}.data", "data_file_raw=on"),
        r"it keeps its data in another file \(external data file\)",
    ),
    Hostile(
        "name of a data file without its bit",
        lambda path: patch(qcow2(path, f"data_file={path}.data", "data_file_raw=on"), INCOMPATIBLE, ">Q", 0),
        "it names an external data file",
    ),
    Hostile("encrypted with LUKS", _luks_in_qcow2, "it is encrypted"),
    Hostile("encrypted with AES", lambda path: patch(qcow2(path), CRYPT, ">I", 1), "it is encrypted"),
    Hostile(
        "header of LUKS without its number",
        lambda path: patch(_luks_in_qcow2(path), CRYPT, ">I", 0),
        "it is encrypted",
    ),
    Hostile("marked as corrupt", lambda path: patch(qcow2(path), INCOMPATIBLE, ">Q", 2), "it is marked as corrupt"),
    Hostile("not closed", _left_open, "it was not closed, or is still open for writing"),
    Hostile(
        "unknown incompatible feature",
        lambda path: patch(qcow2(path), INCOMPATIBLE, ">Q", 1 << 40),
        r"it has incompatible features that are not known \(0x10000000000\)",
    ),
    Hostile("version 1", _created("qcow"), "it looks like a qcow image; only raw and qcow2 are used"),
    Hostile("version 4", lambda path: patch(qcow2(path), VERSION, ">I", 4), "it is qcow2 of version 4, which is not"),
    Hostile("only a magic number", lambda path: raw(path, 60, b"QFI\xfb\0\0\0\3"), "it is no qcow2 image"),
    Hostile("cut in the header", lambda path: _cut(path, 80), "its header is cut off"),
    Hostile("cut after the header", lambda path: _cut(path, 65536), "its first table lies outside of the file"),
    Hostile("cut in the first table", lambda path: _cut(path, 3 * 65536), "its first table lies outside of the file"),
    Hostile(
        "no clusters", lambda path: patch(qcow2(path), CLUSTER_BITS, ">I", 30), r"its cluster size, 2\^30, is none"
    ),
    Hostile("no size", lambda path: patch(qcow2(path), SIZE, ">Q", 0), "its size is 0"),
    Hostile("2^63 bytes", lambda path: patch(qcow2(path), SIZE, ">Q", 1 << 63), "its first table has 1 entries where"),
    Hostile(
        "first table of 2^32 entries",
        lambda path: patch(qcow2(path), L1_SIZE, ">I", 0xFFFFFFFF),
        "its first table has 4294967295 entries where its size needs 1",
    ),
    Hostile(
        "first table beyond the end",
        lambda path: patch(qcow2(path), L1_OFFSET, ">Q", 1 << 40),
        "its first table lies outside of the file",
    ),
    Hostile(
        "first table in the header",
        lambda path: patch(qcow2(path), L1_OFFSET, ">Q", 0),
        "its first table lies outside of the file",
    ),
    Hostile(
        "reference counts beyond the end",
        lambda path: patch(qcow2(path), REFCOUNT_OFFSET, ">Q", 1 << 40),
        "its table of reference counts lies outside of the file",
    ),
    Hostile(
        "no reference counts",
        lambda path: patch(qcow2(path), REFCOUNT_CLUSTERS, ">I", 0),
        "its table of reference counts has 0 clusters",
    ),
    Hostile(
        "reference counts of 2^200 bits",
        lambda path: patch(qcow2(path), REFCOUNT_ORDER, ">I", 200),
        "its header has no sense",
    ),
    Hostile(
        "header of 1 GiB",
        lambda path: patch(qcow2(path), HEADER_LENGTH, ">I", 1 << 30),
        "its header has no sense",
    ),
    Hostile(
        "unknown compression",
        lambda path: patch(patch(qcow2(path), INCOMPATIBLE, ">Q", 8), COMPRESSION, ">B", 7),
        "its compression, 7, is not known",
    ),
    Hostile(
        "name of the backing file beyond the header",
        lambda path: patch(qcow2(path), BACKING_OFFSET, ">QI", 65530, 100),
        "the name of its backing file lies outside of its first cluster",
    ),
    Hostile(
        "name of the backing file in the header",
        lambda path: patch(qcow2(path), BACKING_OFFSET, ">QI", 8, 8),
        "the name of its backing file lies outside of its header",
    ),
    Hostile("extension for encryption", lambda path: _with_extension(path, 0x0537BE77, 16), "it is encrypted"),
    Hostile(
        "extension without end",
        lambda path: _with_extension(path, 0x12345678, 0x7FFFFFFF),
        "its header extensions do not end",
    ),
    Hostile("vmdk", _created("vmdk"), "it looks like a vmdk image"),
    Hostile("vmdk, a description", _created("vmdk", "subformat=monolithicFlat"), "it looks like a vmdk image"),
    Hostile("vmdk, compressed", _created("vmdk", "subformat=streamOptimized"), "it looks like a vmdk image"),
    Hostile("vdi", _created("vdi"), "it looks like a vdi image"),
    Hostile("vhdx", _created("vhdx"), "it looks like a vhdx image"),
    Hostile("vpc", _created("vpc"), "it looks like a vpc image"),
    Hostile("vpc, of a fixed size", _created("vpc", "subformat=fixed"), "it looks like a vpc image"),
    Hostile("qed", _created("qed"), "it looks like a qed image"),
    Hostile("luks", lambda path: path.write_bytes(_encrypted("luks", "")), "it looks like a luks image"),
    Hostile("parallels", lambda path: raw(path, start=b"WithouFreSpacExt"), "it looks like a parallels image"),
    Hostile("parallels, older", lambda path: raw(path, start=b"WithoutFreeSpace"), "it looks like a parallels image"),
    Hostile("dmg", lambda path: raw(path, end=b"koly" + bytes(508)), "it looks like a dmg image"),
    Hostile("bochs", lambda path: raw(path, start=b"Bochs Virtual HD Image"), "it looks like a bochs image"),
    Hostile(
        "cloop",
        lambda path: raw(path, start=b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0"),
        "it looks like a cloop image",
    ),
    Hostile("empty", lambda path: raw(path, 0), "it is empty"),
)


@dataclasses.dataclass(frozen=True)
class Good:
    """An image that may be used."""

    name: str
    make: Callable[[Path], object]
    format: str
    virtual_size: int

    def __str__(self) -> str:
        return self.name


def _with_zstd(path: Path) -> None:
    try:
        qcow2(path, "compression_type=zstd")
    except subprocess.CalledProcessError as error:
        assert "Invalid parameter 'zstd'" in error.stderr, error.stderr
        pytest.skip("needs a qemu-img that was built with zstd")


def _compressed(path: Path) -> None:
    source = raw(path.with_name("source"), 8 * MIB, b"guest" * 100000)
    qemu_img("convert", "-c", "-O", "qcow2", source, path)
    source.unlink()


def _with_snapshot(path: Path) -> None:
    qemu_img("snapshot", "-c", "before", qcow2(path))


def _with_bitmap(path: Path) -> None:
    qemu_img("bitmap", "--add", qcow2(path), "changed")


GOOD = (
    Good("qcow2", qcow2, "qcow2", 64 * MIB),
    Good("qcow2 of version 2", lambda path: qcow2(path, "compat=0.10"), "qcow2", 64 * MIB),
    Good("zstd", _with_zstd, "qcow2", 64 * MIB),
    Good("extended L2", lambda path: qcow2(path, "extended_l2=on", "cluster_size=128k"), "qcow2", 64 * MIB),
    Good("small clusters", lambda path: qcow2(path, "cluster_size=512"), "qcow2", 64 * MIB),
    Good("large clusters", lambda path: qcow2(path, "cluster_size=2M"), "qcow2", 64 * MIB),
    Good("lazy reference counts, closed", lambda path: qcow2(path, "lazy_refcounts=on"), "qcow2", 64 * MIB),
    Good("reference counts of 1 bit", lambda path: qcow2(path, "refcount_bits=1"), "qcow2", 64 * MIB),
    Good("reference counts of 64 bits", lambda path: qcow2(path, "refcount_bits=64"), "qcow2", 64 * MIB),
    Good("allocated", lambda path: qcow2(path, "preallocation=metadata"), "qcow2", 64 * MIB),
    Good("16 TiB", lambda path: qcow2(path, size="16T"), "qcow2", 16 << 40),
    Good("a sector more", lambda path: qcow2(path, size=MIB + 512), "qcow2", MIB + 512),
    Good("compressed", _compressed, "qcow2", 8 * MIB),
    Good("with a snapshot", _with_snapshot, "qcow2", 64 * MIB),
    Good("with a bitmap", _with_bitmap, "qcow2", 64 * MIB),
    Good("raw", raw, "raw", MIB),
    Good("raw, 64 GiB", lambda path: raw(path, 64 * GIB), "raw", 64 * GIB),
    Good("raw, no whole sectors", lambda path: raw(path, MIB + 1), "raw", MIB + 512),
    Good("raw, with a boot sector", lambda path: raw(path, MIB, bytes(510) + b"\x55\xaa"), "raw", MIB),
)


# --- a root that hangs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(source: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """`directory` shows `source`, by way of a server: whoever stops that makes the directory hang."""
    directory.mkdir(exist_ok=True)
    options = ("-f", "-o", "attr_timeout=0,entry_timeout=0,negative_timeout=0")
    with running(["bindfs", *options, str(source), str(directory)]) as server:
        until(lambda: os.path.ismount(directory))
        try:
            yield server
        finally:
            server.kill()
            server.wait()
            call("umount2", os.fsencode(directory), 3)  # MNT_FORCE and MNT_DETACH
