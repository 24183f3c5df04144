"""Which image an ordinary user may have as a base: with real users, real directories, and images made by qemu-img."""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

import pytest

from tests.kernel import images
from tests.kernel.images import (
    ALICE,
    ALICE_UID,
    BOB_UID,
    CREW_GID,
    GOOD,
    HOME,
    HOSTILE,
    MIB,
    OTHER_ROOT,
    ROOT,
    SITE,
    Good,
    Hostile,
    base,
    give,
    info,
    overlay,
    qcow2,
    raw,
    settings,
)
from tests.kernel.test_tree import Swapper
from tests.kernel.world import tool
from vmnode.errors import (
    BadImage,
    DeadlineExceeded,
    MalformedRequest,
    NoSuchImage,
    NotPermitted,
    TryAgain,
    VmnodeError,
)
from vmnode.host import child, tree
from vmnode.images import Image, Settings
from vmnode.transfer import policy

SECRET = SITE / "secret"  # in no root; everybody may read what lies there


@pytest.fixture(autouse=True)
def site() -> None:
    images.make_site()
    SECRET.mkdir()


def refused(path: object, kind: type[VmnodeError], sentence: str, chosen: Optional[Settings] = None) -> VmnodeError:
    """The policy refuses `path` with exactly this kind of error, and a sentence that has this in it."""
    with pytest.raises(VmnodeError) as raised:
        base(path, images=chosen)
    assert re.search(sentence, raised.value.what), raised.value.what
    assert type(raised.value) is kind
    return raised.value


# --- where it lies ------------------------------------------------------------------------------------------------


def test_an_image_in_a_root_is_found_with_all_that_is_known_of_it() -> None:
    path = qcow2(ROOT / "el9.qcow2")
    status = path.stat()
    found = base(path)
    assert found == Image(str(path), "qcow2", 64 * MIB, status.st_size, status.st_mtime_ns, status.st_ino)


@pytest.mark.parametrize("path", ["el9/disk.img", "a/b/c/d/disk.img"])
def test_an_image_may_lie_deep_in_a_root(path: str) -> None:
    (ROOT / path).parent.mkdir(parents=True)
    assert base(raw(ROOT / path)).path == f"{ROOT}/{path}"


def test_an_image_outside_of_the_roots_is_refused_with_what_is_allowed() -> None:
    raw(SECRET / "disk")
    error = refused(SECRET / "disk", NotPermitted, "/mnt/secret/disk is not inside an image root of this worker: ")
    assert error.what.endswith(": /mnt/images, /mnt/images2")
    assert "VMNodeImageRoots" in error.hint


def test_without_roots_the_administrator_is_told_where_to_name_them() -> None:
    raw(SECRET / "disk")
    nowhere = Settings((), (), (), 20.0)
    error = refused(SECRET / "disk", NotPermitted, "this worker: there is none", nowhere)
    assert "[images] roots" in error.hint


def test_a_directory_whose_name_begins_like_a_root_s_is_not_in_it() -> None:
    for name in ("images3", "images.old", "image", "imagess"):
        (SITE / name).mkdir()
        refused(raw(SITE / name / "disk"), NotPermitted, "is not inside an image root", settings(ROOT))


def test_the_root_itself_and_a_file_as_a_root_hold_no_image() -> None:
    refused(ROOT, BadImage, "is a directory, not an image", settings(ROOT))
    refused(raw(ROOT / "disk"), NotPermitted, "is not inside an image root", settings(ROOT / "disk"))


def test_dots_do_not_lead_out_of_a_root() -> None:
    raw(SECRET / "disk")
    (ROOT / "sub").mkdir()
    raw(ROOT / "disk")
    refused(f"{ROOT}/../secret/disk", NotPermitted, "which is /mnt/secret/disk, is not inside an image root")
    refused(f"{ROOT}/sub/../../secret/disk", NotPermitted, "which is /mnt/secret/disk, is not inside an image root")
    assert base(f"{ROOT}/sub/../disk").path == f"{ROOT}/disk"
    assert base(f"/mnt/secret/../images/./disk").path == f"{ROOT}/disk"  # noqa: F541


def test_a_link_in_a_root_that_leads_out_is_not_followed_there() -> None:
    raw(SECRET / "disk")
    (ROOT / "link").symlink_to(SECRET / "disk")
    (ROOT / "directory").symlink_to("../secret")
    refused(ROOT / "link", NotPermitted, "/mnt/images/link, which is /mnt/secret/disk, is not inside an image root")
    refused(ROOT / "directory" / "disk", NotPermitted, "which is /mnt/secret/disk, is not inside an image root")


def test_a_link_from_anywhere_leads_to_an_image_in_a_root() -> None:
    raw(ROOT / "el9-20261101.img")
    (ROOT / "el9.img").symlink_to("el9-20261101.img")
    (HOME / "mine").symlink_to(ROOT / "el9.img")
    assert base(ROOT / "el9.img").path == base(HOME / "mine").path == f"{ROOT}/el9-20261101.img"


def test_a_root_that_is_a_link_counts_for_what_it_leads_to() -> None:
    (SITE / "nfs").symlink_to(SECRET)
    raw(SECRET / "disk")
    linked = settings(SITE / "nfs")
    assert base(SITE / "nfs" / "disk", images=linked).path == "/mnt/secret/disk"
    assert base(SECRET / "disk", images=linked).path == "/mnt/secret/disk"


def test_a_root_that_is_mounted_elsewhere_too_counts_in_both_places() -> None:
    raw(ROOT / "disk")
    (SITE / "again").mkdir()
    tool("mount", "--bind", str(ROOT), str(SITE / "again"))
    assert base(SITE / "again" / "disk").path == "/mnt/again/disk"


def test_another_file_system_below_a_root_is_in_it() -> None:
    (ROOT / "server").mkdir()
    tool("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(ROOT / "server"))
    assert base(raw(ROOT / "server" / "disk")).path == f"{ROOT}/server/disk"


def test_a_loop_of_links_and_a_name_that_is_too_long_are_the_request_s_fault() -> None:
    (ROOT / "loop").symlink_to("loop")
    refused(ROOT / "loop", MalformedRequest, "cannot be followed: Too many levels of symbolic links")
    refused(ROOT / ("x" * 256), MalformedRequest, "cannot be followed: File name too long")


@pytest.mark.parametrize("name", ["b\udcff", "b\n", "b\x1b[31m", "b\u202e"])
def test_a_real_path_that_cannot_be_printed_is_refused(name: str) -> None:
    (ROOT / name).mkdir()
    raw(ROOT / name / "disk")
    (ROOT / "link").symlink_to(name)
    refused(ROOT / "link" / "disk", BadImage, "the real path of /mnt/images/link/disk holds what cannot be printed")


# --- what is missing, and what may pass -----------------------------------------------------------------------------


def test_a_missing_image_is_missing_for_good() -> None:
    error = refused(ROOT / "nothing", NoSuchImage, "^there is no /mnt/images/nothing on this worker$")
    assert error.exit_status == 66 and "/mnt/images2" in error.hint
    raw(ROOT / "disk")
    refused(ROOT / "disk" / "x", NoSuchImage, "there is no /mnt/images/disk/x")
    (ROOT / "dangling").symlink_to("gone")
    refused(ROOT / "dangling", NoSuchImage, "there is no /mnt/images/dangling")
    refused("/nonexistent", NoSuchImage, "there is no /nonexistent on this worker")


def test_a_missing_root_may_be_there_later() -> None:
    gone = settings(ROOT, SITE / "unmounted")
    error = refused(SITE / "unmounted" / "disk", TryAgain, "the image root /mnt/unmounted is not there", gone)
    assert error.exit_status == 75
    refused(ROOT / "disk", NoSuchImage, "there is no /mnt/images/disk", gone)
    assert base(raw(ROOT / "disk"), images=gone).path == f"{ROOT}/disk"  # another root is not missed


def test_a_root_that_a_user_may_not_enter_is_no_way_for_him() -> None:
    raw(ROOT / "disk")
    raw(OTHER_ROOT / "disk")
    ROOT.chmod(0)
    refused(ROOT / "disk", NotPermitted, "^you may not read /mnt/images/disk: Permission denied$")
    assert base(OTHER_ROOT / "disk").path == f"{OTHER_ROOT}/disk"
    refused(raw(SECRET / "disk"), NotPermitted, "is not inside an image root")


# --- what kind of file it is ----------------------------------------------------------------------------------------


def test_only_a_regular_file_is_an_image() -> None:
    (ROOT / "directory").mkdir()
    os.mkfifo(ROOT / "fifo", 0o644)
    os.mknod(ROOT / "null", stat.S_IFCHR | 0o644, os.makedev(1, 3))
    os.mknod(ROOT / "loop0", stat.S_IFBLK | 0o644, os.makedev(7, 0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(ROOT / "socket"))
    began = time.monotonic()
    refused(ROOT / "directory", BadImage, "/mnt/images/directory is a directory, not an image")
    refused(ROOT / "fifo", BadImage, "/mnt/images/fifo is a pipe or a socket, not a regular file")
    refused(ROOT / "socket", BadImage, "/mnt/images/socket is a pipe or a socket, not a regular file")
    refused(ROOT / "null", BadImage, "/mnt/images/null is a device, not a regular file")
    refused(ROOT / "loop0", BadImage, "/mnt/images/loop0 is a device, not a regular file")
    assert time.monotonic() - began < 10  # a FIFO that was opened would have waited for a writer


# --- whose it is --------------------------------------------------------------------------------------------------


def test_an_image_has_to_be_readable() -> None:
    raw(ROOT / "disk").chmod(0o600)
    refused(ROOT / "disk", NotPermitted, "^you may not read /mnt/images/disk$")
    os.chown(ROOT / "disk", 0, CREW_GID)
    (ROOT / "disk").chmod(0o640)
    assert base(ROOT / "disk").path == f"{ROOT}/disk"  # by a group of hers


@pytest.mark.parametrize(
    "uid, gid, mode", [(0, 0, 0o646), (0, CREW_GID, 0o664), (ALICE_UID, 0, 0o644), (0, ALICE_UID, 0o060)]
)
def test_an_image_that_the_user_may_write_to_is_refused(uid: int, gid: int, mode: int) -> None:
    os.chown(raw(ROOT / "disk"), uid, gid)
    (ROOT / "disk").chmod(mode)
    refused(ROOT / "disk", NotPermitted, "^you may write to /mnt/images/disk, and a base image must not change")


def test_an_image_that_the_user_owns_is_refused_even_if_it_is_read_only() -> None:
    """Whoever owns a file can make it writable again."""
    give(raw(ROOT / "disk"), 0o444)
    refused(ROOT / "disk", NotPermitted, "^/mnt/images/disk belongs to you, and a base image must not change")


@pytest.mark.parametrize("writable", [".", "a", "a/b"])
def test_an_image_below_a_directory_that_the_user_may_write_to_is_refused(writable: str) -> None:
    (ROOT / "a" / "b").mkdir(parents=True)
    raw(ROOT / "a" / "b" / "disk")
    assert base(ROOT / "a" / "b" / "disk").format == "raw"
    (ROOT / writable).chmod(0o757)
    refused(ROOT / "a" / "b" / "disk", NotPermitted, "^you may replace /mnt/images/a/b/disk, since you may write to")


def test_a_directory_that_the_user_owns_is_one_that_he_may_write_to() -> None:
    (ROOT / "a").mkdir()
    raw(ROOT / "a" / "disk")
    give(ROOT / "a", 0o555)
    refused(ROOT / "a" / "disk", NotPermitted, "^you may replace /mnt/images/a/disk")


def test_a_directory_above_the_root_counts_too() -> None:
    root = SITE / "outer" / "images"
    root.mkdir(parents=True)
    raw(root / "disk")
    (SITE / "outer").chmod(0o777)
    refused(root / "disk", NotPermitted, "^you may replace /mnt/outer/images/disk", settings(root))


def test_in_a_sticky_directory_only_what_is_the_user_s_own_may_be_replaced() -> None:
    (ROOT / "tmp").mkdir()
    (ROOT / "tmp" / "a").mkdir()
    raw(ROOT / "tmp" / "disk")
    raw(ROOT / "tmp" / "a" / "disk")
    (ROOT / "tmp").chmod(0o1777)
    assert base(ROOT / "tmp" / "disk").format == "raw"
    assert base(ROOT / "tmp" / "a" / "disk").format == "raw"
    give(ROOT / "tmp" / "a", 0o555)
    refused(ROOT / "tmp" / "a" / "disk", NotPermitted, "^you may replace /mnt/images/tmp/a/disk")
    give(ROOT / "tmp" / "disk", 0o444)
    refused(ROOT / "tmp" / "disk", NotPermitted, "belongs to you")
    give(ROOT / "tmp", 0o1777)  # the directory's owner may rename what is others', sticky or not
    refused(raw(ROOT / "tmp" / "other"), NotPermitted, "^you may replace /mnt/images/tmp/other")


def test_access_control_lists_count() -> None:
    raw(ROOT / "disk").chmod(0o600)
    tool("setfacl", "-m", f"u:{ALICE_UID}:r", str(ROOT / "disk"))
    assert base(ROOT / "disk").format == "raw"
    tool("setfacl", "-m", f"u:{ALICE_UID}:rw", str(ROOT / "disk"))
    refused(ROOT / "disk", NotPermitted, "^you may write to /mnt/images/disk")
    tool("setfacl", "-m", f"u:{ALICE_UID}:r", str(ROOT / "disk"))
    tool("setfacl", "-m", f"g:{CREW_GID}:rwx", str(ROOT))
    refused(ROOT / "disk", NotPermitted, "^you may replace /mnt/images/disk")
    tool("setfacl", "-b", str(ROOT))
    (ROOT / "disk").chmod(0o644)
    tool("setfacl", "-m", f"u:{ALICE_UID}:-,u:{BOB_UID}:r", str(ROOT / "disk"))
    refused(ROOT / "disk", NotPermitted, "^you may not read /mnt/images/disk$")


def test_in_a_user_root_users_may_own_and_replace_images_but_not_write_to_them() -> None:
    chosen = settings(ROOT, OTHER_ROOT, user_roots=(ROOT,))
    (ROOT / "alice").mkdir()
    give(ROOT / "alice", 0o755)
    give(raw(ROOT / "alice" / "disk"), 0o444)
    assert base(ROOT / "alice" / "disk", images=chosen).path == f"{ROOT}/alice/disk"
    (ROOT / "alice" / "disk").chmod(0o644)
    refused(ROOT / "alice" / "disk", NotPermitted, "^you may write to", chosen)
    give(raw(OTHER_ROOT / "disk"), 0o444)
    refused(OTHER_ROOT / "disk", NotPermitted, "belongs to you", chosen)  # that is another root


def test_of_a_root_in_a_root_the_inner_one_says_whose_its_images_may_be() -> None:
    inner = ROOT / "users"
    inner.mkdir()
    give(raw(inner / "disk"), 0o444)
    assert base(inner / "disk", images=settings(ROOT, inner, user_roots=(inner,))).path == f"{inner}/disk"
    refused(inner / "disk", NotPermitted, "belongs to you", settings(ROOT, inner, user_roots=(ROOT,)))


# --- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", GOOD, ids=str)
def test_what_is_found_in_a_good_image_is_what_qemu_finds(good: Good) -> None:
    good.make(ROOT / "disk")
    found = base(ROOT / "disk")
    assert (found.format, found.virtual_size) == (good.format, good.virtual_size)
    said = info(ROOT / "disk", found.format)
    assert (said["format"], said["virtual-size"]) == (good.format, good.virtual_size)
    assert base(ROOT / "disk", good.format) == found
    other = "raw" if good.format == "qcow2" else "qcow2"
    with pytest.raises(BadImage, match=f"/mnt/images/disk is {good.format}, not {other}"):
        base(ROOT / "disk", other)


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_a_hostile_image_is_refused_with_a_sentence_of_its_own(hostile: Hostile) -> None:
    hostile.make(ROOT / "disk")
    error = refused(ROOT / "disk", BadImage, f"^/mnt/images/disk cannot be a base image: {hostile.sentence}")
    assert "qemu-img convert" in error.hint


def test_a_base_image_has_no_backing_file_however_harmless() -> None:
    raw(ROOT / "lower")
    for backing in ("/mnt/images/lower", "lower", "/etc/shadow", "json:{}", "nbd://10.0.0.1/x"):
        overlay(ROOT / "disk", backing, "raw")
        refused(ROOT / "disk", BadImage, f"it has a backing file of its own, {re.escape(repr(backing))}")
    refused(ROOT / "disk", BadImage, "backing file of its own", settings(user_roots=(ROOT,)))


def test_raw_is_what_the_administrator_says_is_raw() -> None:
    """A guest can write any magic number into its first sector: only who knows the image can say that it is raw."""
    disk = raw(ROOT / "disk", MIB, b"QFI\xfb\0\0\0\3" + bytes(92))
    refused(disk, BadImage, "cannot be a base image")
    refused(disk, BadImage, "cannot be a base image", settings(raw=(ROOT / "another",)))
    found = base(disk, "raw", settings(raw=(disk,)))
    assert (found.format, found.virtual_size) == ("raw", MIB)
    assert info(disk, "raw")["virtual-size"] == MIB
    whole = overlay(ROOT / "whole", "/etc/shadow", "raw")
    assert base(whole, images=settings(raw=(whole,))).format == "raw"  # QEMU is told so, and follows no backing file
    assert "backing-filename" not in info(whole, "raw")


def test_asked_for_as_raw_an_image_that_looks_otherwise_stays_refused() -> None:
    with pytest.raises(BadImage, match="is qcow2, not raw"):
        base(qcow2(ROOT / "disk"), "raw")


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=512", "extended_l2=on"])
def test_where_a_damaged_header_is_accepted_qemu_finds_the_same_in_it(options: str) -> None:
    """Every word of the header, with values that hurt; but for the table of snapshots, which is not looked at, and for
    the features that clear themselves, one of which QEMU 5.2 did not know to ignore.
    """
    good = qcow2(ROOT / "good", *([options] if options else []), size=MIB).read_bytes()
    chosen = random.Random(options)
    disk = ROOT / "disk"
    accepted = 0
    for offset in [*range(4, 60, 4), *range(72, 88, 4), *range(96, 112, 4)]:
        for value in (0, 1, 4, 0xFFFFFFFF, chosen.getrandbits(32)):
            disk.write_bytes(good[:offset] + value.to_bytes(4, "big") + good[offset + 4 :])
            try:
                found = base(disk)
            except BadImage:
                continue
            said = info(disk, "qcow2")
            assert said["virtual-size"] == found.virtual_size // 512 * 512, (offset, value)
            assert not {"backing-filename", "encrypted"} & set(said), (offset, value)
            assert "data-file" not in said["format-specific"]["data"], (offset, value)
            accepted += 1
    assert accepted >= 10


# --- a root that hangs ----------------------------------------------------------------------------------------------


@pytest.fixture
def hung() -> Iterator[Path]:
    """A root whose server was stopped, with an image in it."""
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    (SITE / "behind").mkdir()
    raw(SITE / "behind" / "disk")
    with images.served(SITE / "behind", SITE / "hung") as server:
        assert base(SITE / "hung" / "disk", images=settings(SITE / "hung")).path == "/mnt/hung/disk"
        tool("kill", "-STOP", str(server.pid))
        yield SITE / "hung"


def test_an_image_in_a_root_that_hangs_is_given_up_in_time_and_others_work(hung: Path) -> None:
    chosen = settings(hung, ROOT)
    raw(ROOT / "disk")
    (HOME / "link").symlink_to(ROOT / "disk")
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^disk: no answer within 0\.5 s$"):
        child.ask(lambda: policy.base(f"{hung}/disk", None, chosen), 0.5, "disk", ALICE)
    assert 0.5 <= time.monotonic() - began < 2
    assert base(ROOT / "disk", images=chosen).path == f"{ROOT}/disk"
    assert base(HOME / "link", images=chosen).path == f"{ROOT}/disk"
    refused(ROOT / "nothing", NoSuchImage, "there is no /mnt/images/nothing", chosen)


# --- races, forced --------------------------------------------------------------------------------------------------


class AsRoot:
    """Does something with root's rights when a child without them asks for it."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._asked, self._ask = os.pipe()
        self._done, self._tell = os.pipe()
        self.acted = False
        self._act = act
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        if os.read(self._asked, 1):
            self._act()
            self.acted = True
            os.write(self._tell, b"x")

    def __call__(self) -> None:
        """For the child."""
        os.write(self._ask, b"x")
        os.read(self._done, 1)

    def close(self) -> None:
        os.close(self._ask)
        self._thread.join()
        for descriptor in (self._asked, self._done, self._tell):
            os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def users_link(here: Path) -> tuple[Path, Path]:
    (here / "way").symlink_to(here / "images" / "a")
    (here / "other").symlink_to(here / "secret")
    return here / "way", here / "other"


def directory(here: Path) -> tuple[Path, Path]:
    (here / "other").symlink_to(here / "secret")
    return here / "images" / "a", here / "other"


def root_directory(here: Path) -> tuple[Path, Path]:
    (here / "elsewhere" / "a").mkdir(parents=True)
    raw(here / "elsewhere" / "a" / "disk").chmod(0o666)
    return here / "images", here / "elsewhere"


def image(make: Callable[[Path], object]) -> Callable[[Path], tuple[Path, Path]]:
    def prepare(here: Path) -> tuple[Path, Path]:
        make(here / "other")
        return here / "images" / "a" / "disk", here / "other"

    return prepare


# What is swapped for what, and how the policy refuses when that was early enough.
RACES: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "the user's link leads elsewhere": (users_link, "is not inside an image root"),
    "a directory becomes a link that leads out": (directory, "is not inside an image root"),
    "the root is another directory": (root_directory, "you may write to|is not inside an image root"),
    "a link that leads out": (image(lambda path: path.symlink_to("../../secret/disk")), "is not inside an image root"),
    "a FIFO": (image(lambda path: os.mkfifo(path, 0o666)), "is a pipe or a socket"),
    "the user's own": (image(lambda path: give(raw(path), 0o400)), "belongs to you"),
    "writable": (image(lambda path: raw(path).chmod(0o666)), "you may write to"),
    "unreadable": (image(lambda path: raw(path).chmod(0o600)), "you may not read"),
    "a hostile one": (image(lambda path: overlay(path, "/etc/shadow")), "it has a backing file of its own"),
}


@pytest.mark.parametrize("race", RACES.values(), ids=RACES.keys())
def test_whatever_is_swapped_between_two_steps_only_the_image_that_was_checked_is_answered(
    monkeypatch: pytest.MonkeyPatch, race: tuple[Callable[[Path], tuple[Path, Path]], str]
) -> None:
    prepare, sentence = race
    outcomes = []
    for step in itertools.count():
        here = SITE / f"step{step}"
        (here / "images" / "a").mkdir(parents=True)
        (here / "secret").mkdir()
        raw(here / "secret" / "disk")
        good = qcow2(here / "images" / "a" / "disk").stat()
        one, other = prepare(here)
        path = here / ("way" if prepare is users_link else "images/a") / "disk"
        swap = AsRoot(lambda: exchange(one, other))  # noqa: B023 - called within this turn
        try:
            with monkeypatch.context() as patched:
                patched.setattr(tree, "os", Swapper(step, swap))
                found = base(path, images=settings(here / "images"))
            expected = Image(f"{here}/images/a/disk", "qcow2", 64 * MIB, good.st_size, good.st_mtime_ns, good.st_ino)
            assert found == expected
            outcomes.append("answered")
        except VmnodeError as error:
            assert re.search(sentence, error.what), error.what
            outcomes.append("refused")
        finally:
            swap.close()
        if not swap.acted:
            break
    assert outcomes == sorted(outcomes, reverse=True)  # up to some step it is refused, from then on it does not matter
    assert set(outcomes) == {"answered", "refused"}


def test_an_image_that_is_rewritten_while_it_is_looked_at_is_taken_as_one_of_the_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In place, so that it stays the same file: what is judged was read at once, not bit by bit."""
    good = qcow2(ROOT / "disk").read_bytes()
    hostile = overlay(ROOT / "hostile", "/etc/shadow").read_bytes()
    outcomes = set()
    for step in itertools.count():
        (ROOT / "disk").write_bytes(good)
        swap = AsRoot(lambda: (ROOT / "disk").write_bytes(hostile))
        try:
            with monkeypatch.context() as patched:
                patched.setattr(tree, "os", Swapper(step, swap))
                outcomes.add(base(ROOT / "disk").format)
        except BadImage as error:
            assert re.search("it has a backing file of its own", error.what)
            outcomes.add("refused")
        finally:
            swap.close()
        if not swap.acted:
            break
    assert outcomes == {"qcow2", "refused"}
