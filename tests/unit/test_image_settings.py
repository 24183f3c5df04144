"""What the daemon leaves for the plugin: used only as long as the configuration is the one that it was made of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vmnode import config
from vmnode.images import Settings, files_now, read, settings, write

SETTINGS = Settings(("/images", "/nfs/images"), ("/nfs/images",), ("/images/odd.raw",), 5.0)


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """A configuration with two drop-ins, and beside it what was left of it: images.json."""
    file = tmp_path / "vmnode.toml"
    file.write_text('[images]\nroots = ["/images"]\n')
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-a.toml").write_text("[images]\ntimeout_s = 4\n")
    (tmp_path / "conf.d" / "20-b.toml").write_text("[images]\ntimeout_s = 5\n")
    leave(file)
    return file


def leave(main: Path) -> None:
    (main.parent / "images.json").write_bytes(write(SETTINGS, files_now(str(main))))


def found(main: Path) -> object:
    return read(str(main.parent / "images.json"), str(main))


def test_what_was_left_is_found(main: Path) -> None:
    assert found(main) == SETTINGS


def test_the_section_is_the_configuration_s(main: Path) -> None:
    main.write_text('[images]\nroots = ["/a", "/b"]\nuser_roots = ["/b"]\nraw = ["/a/x.raw"]\n')
    section = config.load(main).config.images
    assert settings(section) == Settings(("/a", "/b"), ("/b",), ("/a/x.raw",), 5.0)
    assert settings(config.Images()) == Settings((), (), (), 5.0)


def test_without_any_file_the_defaults_are_found(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "vmnode.toml"
    assert files_now(str(absent)) == []
    (tmp_path / "images.json").write_bytes(write(SETTINGS, []))
    assert read(str(tmp_path / "images.json"), str(absent)) == SETTINGS


@given(
    st.builds(
        Settings,
        *[st.lists(st.text(max_size=10).map("/{}".format), max_size=3).map(tuple)] * 3,
        timeout_s=st.floats(0.5, 60),
    )
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_are_read_back(tmp_path: Path, parsed: Settings) -> None:
    (tmp_path / "images.json").write_bytes(write(parsed, []))
    assert read(str(tmp_path / "images.json"), str(tmp_path / "absent" / "vmnode.toml")) == parsed


def touch(file: Path) -> None:
    """Write the same bytes again. A file system's clock has a coarse tick: until it is seen."""
    before = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == before:
        file.write_bytes(file.read_bytes())


def rewrite_unseen(file: Path) -> None:
    """Change a byte, and set back the time: the inode's own time betrays it, and nobody can set that."""
    status = file.stat()
    while file.stat().st_ctime_ns == status.st_ctime_ns:
        file.write_bytes(file.read_bytes().replace(b"images", b"imager", 1))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def replace(file: Path) -> None:
    shutil.copy2(file, f"{file}.new")
    Path(f"{file}.new").rename(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a longer main file": lambda main: main.write_text(main.read_text() + "\n"),
    "the main file written again": touch,
    "the main file written again, its time set back": rewrite_unseen,
    "another main file": replace,
    "no main file": lambda main: main.unlink(),
    "a drop-in written again": lambda main: touch(main.parent / "conf.d" / "10-a.toml"),
    "another drop-in in its place": lambda main: replace(main.parent / "conf.d" / "20-b.toml"),
    "a drop-in more": lambda main: (main.parent / "conf.d" / "30-c.toml").touch(),
    "a drop-in less": lambda main: (main.parent / "conf.d" / "10-a.toml").unlink(),
    "a drop-in under another name": lambda main: (main.parent / "conf.d" / "10-a.toml").rename(
        main.parent / "conf.d" / "30-a.toml"
    ),
    "drop-ins in another order": lambda main: (main.parent / "conf.d" / "20-b.toml").rename(
        main.parent / "conf.d" / "05-b.toml"
    ),
    "a drop-in that is a link to nowhere": lambda main: (main.parent / "conf.d" / "x.toml").symlink_to("nowhere"),
    "no drop-ins": lambda main: shutil.rmtree(main.parent / "conf.d"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_of_a_configuration_that_has_changed_nothing_is_used(change: Callable[[Path], object], main: Path) -> None:
    change(main)
    assert found(main) is None
    if not (main.parent / "conf.d" / "x.toml").is_symlink():
        leave(main)
        assert found(main) == SETTINGS


def test_what_is_no_drop_in_changes_nothing(main: Path) -> None:
    (main.parent / "conf.d" / "10-a.toml.rpmsave").touch()
    (main.parent / "other.toml").touch()
    assert found(main) == SETTINGS


@pytest.mark.parametrize("name", ["vmnode.toml", "site.toml"])
def test_the_files_are_those_that_the_configuration_reads_in_its_order(name: str, tmp_path: Path) -> None:
    main = tmp_path / name
    for there in (False, True):
        if there:
            main.touch()
            (tmp_path / "conf.d").mkdir()
            for drop_in in ("9.toml", "10.toml", "Z.toml", "a.toml", "ä.toml", "b.toml~", "c.TOML", "toml"):
                (tmp_path / "conf.d" / drop_in).touch()
        expected = [str(file) for file in config.files(main)] if there else []
        assert [entry[0] for entry in files_now(str(main))] == expected


def test_one_configuration_s_settings_are_not_another_s(main: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "vmnode.toml"
    shutil.copy2(main, other)
    assert read(str(tmp_path / "images.json"), str(other)) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1', '"version": 2'),
        ('"version": 1, ', ""),
        ('"roots"', '"root"'),
        ('"roots"', '"x": [], "roots"'),
        ('"raw": ["/images/odd.raw"], ', ""),
        ('"timeout_s": 5.0', '"timeout": 5.0'),
        ('"roots": [', '"roots": 1, "old": ['),
        ('"files": [', '"files": null, "old": ['),
        ("{", "[" * 100_000 + "{"),
        ("{", "[{"),
        ("}", "}x"),
        ("images", "\udcff"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_is_not_as_it_was_left_is_not_used(old: str, new: str, main: Path) -> None:
    file = main.parent / "images.json"
    assert old in file.read_text()
    file.write_bytes(file.read_text().replace(old, new, 1).encode("utf-8", "surrogateescape"))
    assert found(main) is None


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff", b"1", b"[" * 100_000, bytes(1000)])
def test_what_is_no_such_file_at_all_is_not_used(data: bytes, main: Path) -> None:
    (main.parent / "images.json").write_bytes(data)
    assert found(main) is None


def test_where_nothing_was_left_nothing_is_found(main: Path) -> None:
    (main.parent / "images.json").unlink()
    assert found(main) is None
    (main.parent / "images.json").mkdir()
    assert found(main) is None
    assert read(f"{main}/below/images.json", str(main)) is None


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.integers(0, 2000), st.integers(0, 20), st.binary(max_size=5) | st.sampled_from([b"[", b"{", b'"', b"null"]))
@example(0, 0, b"[" * 100_000)
def test_any_damage_is_found_or_harmless(main: Path, start: int, length: int, instead: bytes) -> None:
    leave(main)
    file = main.parent / "images.json"
    damaged = bytearray(file.read_bytes())
    start %= len(damaged)
    damaged[start : start + length] = instead
    file.write_bytes(damaged)
    assert isinstance(found(main), (Settings, type(None)))


def test_it_is_one_document_that_names_its_version(main: Path) -> None:
    document = json.loads((main.parent / "images.json").read_bytes())
    assert document["version"] == 1
    assert [entry[0] for entry in document["files"]] == [str(file) for file in config.files(main)]
