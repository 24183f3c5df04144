"""The walk along a path: to where the kernel gets, with the kernel's errors, and nothing can be swapped under it."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.kernel.conftest import descriptors
from tests.kernel.images import ALICE, SITE
from tests.kernel.world import tool
from vmnode.host import child, tree
from vmnode.host.tree import Walk

TOP = SITE / "top"


@pytest.fixture(autouse=True)
def site() -> None:
    tool("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(SITE))
    TOP.mkdir()


@pytest.fixture(autouse=True)
def nothing_stays_open(site: None) -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


Answer = tuple[Optional[int], str, int, int]  # an error, or none and the real path, and which file it is


def walked(path: str) -> Answer:
    try:
        with Walk(path) as walk:
            found = os.fstat(walk.descriptor)
            return None, walk.path, found.st_dev, found.st_ino
    except OSError as error:
        return error.errno, "", 0, 0


def by_the_kernel(path: str) -> Answer:
    """Where one open(2) of the whole path gets, and how /proc names that."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        return error.errno, "", 0, 0
    try:
        found = os.fstat(descriptor)
        return None, str(Path(f"/proc/self/fd/{descriptor}").readlink()), found.st_dev, found.st_ino
    finally:
        os.close(descriptor)


# --- as the kernel ------------------------------------------------------------------------------------------------


def make_tree() -> None:
    (TOP / "a" / "b" / "c").mkdir(parents=True)
    (TOP / "a" / "file").write_text("x")
    (TOP / "a" / "b" / "c" / "deep").write_text("x")
    for name, target in {
        "absolute": f"{TOP}/a/b",
        "relative": "a/b",
        "up": "a/b/c/../../..",
        "up-and-out": "../../../../../../../..",
        "to-a-file": "a/file",
        "through-a-file": "a/file/x",
        "dangling": "nothing/here",
        "self": "self",
        "loop1": "loop2",
        "loop2": "a/../loop1",
        "slashes": "//mnt///top//a/./b//",
        "dot": ".",
        "a/back": "../a/b/c",
        "a/b/out": f"{TOP}/to-a-file",
        "a/b/c/root": "/",
    }.items():
        (TOP / name).symlink_to(target)
    os.mkfifo(TOP / "fifo")
    os.mknod(TOP / "device", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(TOP / "socket"))


@pytest.mark.parametrize(
    "path",
    [
        *("/", "//", "/.", "/..", "/mnt/top", "/mnt/top/", "/mnt//top/.", "/mnt/top/a/..", "/mnt/../mnt/top/a/./b/c"),
        *("/mnt/top/absolute", "/mnt/top/relative/c/deep", "/mnt/top/up/a", "/mnt/top/up-and-out/mnt/top/a/file"),
        *("/mnt/top/to-a-file", "/mnt/top/slashes/c", "/mnt/top/dot/dot/dot/a", "/mnt/top/a/back/root/mnt/top"),
        *("/mnt/top/absolute/..", "/mnt/top/relative/../file", "/mnt/top/a/b/out", "/mnt/top/absolute/out"),
        *("/mnt/top/nothing", "/mnt/top/nothing/..", "/mnt/top/dangling", "/mnt/top/dangling/.."),
        *("/mnt/top/a/file/x", "/mnt/top/through-a-file", "/mnt/top/self", "/mnt/top/loop1", "/mnt/top/loop2/x"),
        *("/mnt/top/fifo", "/mnt/top/device", "/mnt/top/socket", "/mnt/top/fifo/x"),
        *("/mnt/top/a/file/", "/mnt/top/a/file/.", "/mnt/top/a/file/..", "/mnt/top/to-a-file/", "/mnt/top/fifo/.."),
        "/mnt/top/" + "x" * 255,
        "/mnt/top/" + "x" * 256,
        "/mnt/top/" + "ä" * 128,
    ],
)
def test_a_walk_ends_where_the_kernel_does(path: str) -> None:
    make_tree()
    assert walked(path) == by_the_kernel(path)


def test_names_that_are_not_text_are_walked_too() -> None:
    Path("/mnt/top/b\udcff").mkdir()
    Path("/mnt/top/odd").symlink_to("b\udcff")
    assert walked("/mnt/top/odd")[:2] == (None, "/mnt/top/b\udcff")
    assert walked("/mnt/top/odd") == by_the_kernel("/mnt/top/odd")


@pytest.mark.parametrize("links", [1, 39, 40, 41, 60])
def test_as_many_links_as_the_kernel_follows(links: int) -> None:
    """path_resolution(7): 40."""
    (TOP / "link0").mkdir()
    for number in range(links):
        (TOP / f"link{number + 1}").symlink_to(f"link{number}")
    answer = walked(f"{TOP}/link{links}")
    assert answer == by_the_kernel(f"{TOP}/link{links}")
    assert answer[0] == (None if links <= 40 else errno.ELOOP)


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_are_walked_as_the_kernel_does(seed: int) -> None:
    chosen = random.Random(seed)
    names = ["a", "b", "c", "d"]
    places = [TOP, *(TOP / one for one in names), *(TOP / one / two for one in names[:2] for two in names)]
    for place in places[1:]:
        kind = chosen.random()
        if not place.parent.is_dir() or os.path.lexists(place):
            continue
        if kind < 0.5:
            place.mkdir()
        elif kind < 0.6:
            place.touch()
        else:
            parts = [chosen.choice([*names, "..", ".", ""]) for _ in range(chosen.randint(1, 4))]
            start = chosen.choice(["", f"{TOP}/", "/mnt/top/../top/"])
            place.symlink_to((start + "/".join(parts)) or "a")
    outcomes = set()
    for _ in range(1500):
        parts = [chosen.choice([*names, *names, "..", ".", ""]) for _ in range(chosen.randint(1, 6))]
        path = f"{TOP}/" + "/".join(parts)
        answer = walked(path)
        assert answer == by_the_kernel(path), path
        outcomes.add(answer[0])
    assert {None, errno.ENOENT} <= outcomes


def test_a_user_gets_no_further_than_the_kernel_lets_him() -> None:
    make_tree()
    (TOP / "closed").mkdir(mode=0o700)
    (TOP / "closed" / "file").touch()
    (TOP / "listed").mkdir(mode=0o744)  # may be listed, not entered
    (TOP / "listed" / "file").touch()
    (TOP / "entered").mkdir(mode=0o711)  # the other way round
    (TOP / "entered" / "file").touch(mode=0o600)
    (TOP / "into").symlink_to("closed/file")
    paths = [
        *("closed", "closed/file", "closed/nothing", "closed/..", "closed/.", "closed/", "closed/../a/file"),
        *("listed", "listed/file", "listed/../a", "entered", "entered/file", "entered/../a", "into"),
    ]
    questions = [f"{TOP}/{path}" for path in paths]
    answers = child.ask(lambda: [[walked(path), by_the_kernel(path)] for path in questions], 10, "walk", ALICE)
    assert {path: answer for path, (answer, _) in zip(paths, answers)} == {
        path: kernel for path, (_, kernel) in zip(paths, answers)
    }
    errors = {path: answer[0] for path, (answer, _) in zip(paths, answers)}
    assert errors["closed"] is None and errors["entered/file"] is None
    assert errors["closed/file"] == errors["listed/file"] == errors["into"] == errno.EACCES


def test_the_kernel_s_own_links_are_followed_by_their_text() -> None:
    """/proc's lead where no path may; taken as text, they lead to what the path stands for, or nowhere."""
    assert walked("/proc/self/root/mnt")[1] == "/mnt"
    assert walked("/proc/self/cwd")[1] == os.getcwd()  # noqa: PTH109
    gone = TOP / "gone"
    with open(gone, "w") as file:
        gone.unlink()
        assert by_the_kernel(f"/proc/self/fd/{file.fileno()}")[0] is None
        assert walked(f"/proc/self/fd/{file.fileno()}")[0] == errno.ENOENT


# --- what is held -------------------------------------------------------------------------------------------------


def test_all_on_the_way_is_held_and_described() -> None:
    make_tree()
    with Walk("/mnt/top/relative/c/deep") as walk:
        expected = ["/", "/mnt", "/mnt/top", "/mnt/top/a", "/mnt/top/a/b", "/mnt/top/a/b/c", "/mnt/top/a/b/c/deep"]
        assert [entry.st_ino for entry in walk.entries()] == [os.stat(path).st_ino for path in expected]  # noqa: PTH116
        assert walk.path == expected[-1]
        assert walk.may_write() == [True] * 7


def test_what_a_user_may_write_to_is_what_the_kernel_says() -> None:
    (TOP / "closed").mkdir(mode=0o755)
    (TOP / "open").mkdir()
    (TOP / "open").chmod(0o777)
    (TOP / "open" / "file").touch()
    (TOP / "open" / "file").chmod(0o646)

    def ask() -> list[bool]:
        with Walk("/mnt/top/open/file") as walk:
            return walk.may_write()

    assert child.ask(ask, 10, "walk", ALICE) == [False, False, False, True, True]
    tool("mount", "-o", "remount,ro", str(SITE))
    assert child.ask(ask, 10, "walk", ALICE) == [False] * 5


def test_a_walk_that_fails_holds_nothing() -> None:
    make_tree()
    before = descriptors()
    for path in ("/mnt/top/a/nothing", "/mnt/top/self", "/mnt/top/a/file/x", "/mnt/top/\0"):
        with pytest.raises((OSError, ValueError)):
            Walk(path)
        assert descriptors() == before


@pytest.mark.parametrize("size", [0, 1, 10, 16, 100])
def test_the_ends_of_a_file_are_its_first_and_last_bytes(size: int) -> None:
    data = bytes(range(size))
    (TOP / "file").write_bytes(data)
    with Walk("/mnt/top/file") as walk:
        assert tree.read_ends(walk.descriptor, 16, 8) == (data[:16], data[-8:] if size > 8 else data)


def test_the_ends_are_those_of_the_file_that_is_held() -> None:
    (TOP / "file").write_bytes(b"held")
    with Walk("/mnt/top/file") as walk:
        (TOP / "file").rename(TOP / "moved")
        (TOP / "file").write_bytes(b"swapped")
        assert tree.read_ends(walk.descriptor, 16, 0)[0] == b"held"
        (TOP / "moved").unlink()
        assert tree.read_ends(walk.descriptor, 16, 0)[0] == b"held"


# --- races, forced ------------------------------------------------------------------------------------------------


class Swapper:
    """Stands for the module os in tree.py: before its `step`-th call into the kernel, something is swapped."""

    def __init__(self, step: int, swap: Callable[[], object]) -> None:
        self._left = step
        self._swap = swap
        self.swapped = False

    def __getattr__(self, name: str) -> Any:
        there = getattr(os, name)
        if name not in ("open", "readlink", "fstat", "access", "pread", "stat", "close"):
            return there

        def call(*arguments: Any, **options: Any) -> Any:
            if not self._left:
                self._swap()
                self.swapped = True
            self._left -= 1
            return there(*arguments, **options)

        return call


def exchange(one: Path, other: Path) -> Callable[[], None]:
    """Each gets the other's name; nothing in between is there for the walk to see, which makes one step."""

    def swap() -> None:
        between = TOP / "between"
        one.rename(between)
        other.rename(one)
        between.rename(other)

    return swap


def every_step(
    monkeypatch: pytest.MonkeyPatch, path: str, make: Callable[[], Callable[[], object]]
) -> Iterator[Answer]:
    """The walk along `path` with the swap before its first step, its second, …, until it has no more."""
    for step in itertools.count():
        tool("sh", "-c", f"rm -rf {TOP}/*")
        swap = make()
        with monkeypatch.context() as patched:
            swapper = Swapper(step, swap)
            patched.setattr(tree, "os", swapper)
            answer = walked(path)
        if not swapper.swapped:
            return
        yield answer


def allowed_and_secret() -> tuple[os.stat_result, os.stat_result]:
    for name in ("allowed", "secret"):
        (TOP / name / "a" / "b").mkdir(parents=True)
        (TOP / name / "a" / "b" / "disk").write_text(name)
    good, bad = (os.stat(TOP / name / "a" / "b" / "disk") for name in ("allowed", "secret"))  # noqa: PTH116
    return good, bad


@pytest.mark.parametrize("swapped", ["allowed", "allowed/a", "allowed/a/b", "allowed/a/b/disk"])
def test_a_component_that_becomes_a_link_is_followed_by_name_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    """Whenever it is swapped, the path that the walk tells is that of the file that it holds: never the one's name
    with the other's file.
    """
    files: dict[int, str] = {}

    def make() -> Callable[[], object]:
        good, bad = allowed_and_secret()
        files.clear()
        files.update({good.st_ino: f"{TOP}/allowed/a/b/disk", bad.st_ino: f"{TOP}/secret/a/b/disk"})
        (TOP / "link").symlink_to(TOP / swapped.replace("allowed", "secret"))
        return exchange(TOP / swapped, TOP / "link")

    ends = set()
    for error, path, _, inode in every_step(monkeypatch, f"{TOP}/allowed/a/b/disk", make):
        assert error is None
        assert files[inode] == path
        ends.add(path)
    assert ends == {f"{TOP}/allowed/a/b/disk", f"{TOP}/secret/a/b/disk"}  # the swap came before, and after


def test_a_link_that_changes_its_target_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[int, str] = {}

    def make() -> Callable[[], object]:
        good, bad = allowed_and_secret()
        files.clear()
        files.update({good.st_ino: f"{TOP}/allowed/a/b/disk", bad.st_ino: f"{TOP}/secret/a/b/disk"})
        (TOP / "way").symlink_to("allowed/a")
        (TOP / "other-way").symlink_to("secret/a")
        return exchange(TOP / "way", TOP / "other-way")

    ends = set()
    for error, path, _, inode in every_step(monkeypatch, f"{TOP}/way/b/disk", make):
        assert error is None
        assert files[inode] == path
        ends.add(path)
    assert len(ends) == 2


def test_a_directory_that_is_moved_away_does_not_move_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """'..' is where the walk came from. The kernel would go where the directory lies by then."""

    def make() -> Callable[[], object]:
        allowed_and_secret()
        return lambda: (TOP / "allowed" / "a").rename(TOP / "secret" / "moved")

    ends = {answer[:2] for answer in every_step(monkeypatch, f"{TOP}/allowed/a/b/../../a/b/disk", make)}
    assert ends <= {(None, f"{TOP}/allowed/a/b/disk"), (errno.ENOENT, "")}
    assert len(ends) == 2


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "nothing"])
def test_what_is_held_stays_what_it_was(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A FIFO in the disk's place would make whoever opens it wait for ever."""
    made: list[int] = []

    def make() -> Callable[[], object]:
        made[:] = [allowed_and_secret()[0].st_ino]
        disk = TOP / "allowed" / "a" / "b" / "disk"

        def swap() -> None:
            disk.rename(TOP / "kept")
            if kind == "fifo":
                os.mkfifo(disk)
            elif kind == "directory":
                disk.mkdir()
            elif kind == "socket":
                os.mknod(disk, stat.S_IFSOCK | 0o600)

        return swap

    reads = set()
    for step in itertools.count():
        tool("sh", "-c", f"rm -rf {TOP}/*")
        swap = make()
        with monkeypatch.context() as patched:
            swapper = Swapper(step, swap)
            patched.setattr(tree, "os", swapper)
            try:
                with Walk(f"{TOP}/allowed/a/b/disk") as walk:
                    status = walk.entries()[-1]
                    regular = stat.S_ISREG(status.st_mode)
                    assert regular == (status.st_ino == made[0])
                    reads.add(tree.read_ends(walk.descriptor, 10, 0)[0] if regular else None)
            except FileNotFoundError:
                assert kind == "nothing"
                reads.add(None)
        if not swapper.swapped:
            break
    assert reads == {b"allowed", None}
