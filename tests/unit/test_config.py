"""The settings: the contract's keys, and every way to get one wrong."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmnode.commands import startd_cron
from vmnode.config import Config, Entry, Loaded, load
from vmnode.errors import ConfigurationError
from vmnode.values import Target

ENTRIES = list(Loaded(Config(), {}).entries())
PLACES = [(entry.section, entry.key) for entry in ENTRIES]
IDS = [f"{section}.{key}" for section, key in PLACES]
NOBODY = 65534

# As the contract writes them: section, key, TOML value, what it means.
CONTRACT: list[tuple[str, str, str, Any]] = [
    ("libvirt", "uri", '"qemu:///system"', "qemu:///system"),
    ("libvirt", "timeout_s", "5", 5.0),
    ("kvm", "accel", '"kvm"', "kvm"),
    ("kvm", "accel", '"tcg"', "tcg"),
    ("network", "name", '"default"', "default"),
    ("network", "targets", '["tcp://cm.example.org:9618"]', (Target("cm.example.org", 9618),)),
    ("health", "enabled", "true", True),
    ("health", "conditions", '"auto"', None),
    ("health", "conditions", '["kvm", "network.dhcp"]', ("kvm", "network.dhcp")),
    ("health", "interval_s", "60", 60.0),
    ("health", "fail_after", "1", 1),
    ("health", "recover_after", "2", 2),
    ("health", "max_age_s", "900", 900.0),
    ("execute", "dir", '"/var/lib/condor/execute"', Path("/var/lib/condor/execute")),
    ("execute", "min_free", '"10G"', 10 * 1024**3),
    ("images", "roots", '["/nfs/images"]', (Path("/nfs/images"),)),
    ("images", "timeout_s", "5", 5.0),
    ("canary", "enabled", "true", True),
    ("canary", "interval_s", "14400", 14400.0),
    ("canary", "timeout_s", "60", 60.0),
    ("heal", "mode", '"off"', "off"),
    ("heal", "mode", '"safe"', "safe"),
    ("heal", "mode", '"full"', "full"),
    ("accounting", "enabled", "false", False),
    ("accounting", "backend", '"auto"', "auto"),
    ("accounting", "backend", '"nftables"', "nftables"),
    ("accounting", "backend", '"iptables"', "iptables"),
    ("accounting", "pool4", '"100.64.0.0/16"', "100.64.0.0/16"),
    ("accounting", "pool6", '"fd00:1:2:3::/64"', "fd00:1:2:3::/64"),
    (
        "accounting",
        "lan",
        '["10.0.0.0/8", "129.93.0.0/16", "2600:900::/40"]',
        ("10.0.0.0/8", "129.93.0.0/16", "2600:900::/40"),
    ),
    (
        "accounting",
        "exempt",
        '"JobUniverse == 11 || WantHostNetwork =?= true"',
        "JobUniverse == 11 || WantHostNetwork =?= true",
    ),
    ("accounting", "on_error", '"open"', "open"),
    ("accounting", "on_error", '"closed"', "closed"),
    ("mail", "to", "[]", ()),
    ("mail", "to", '["root@example.org"]', ("root@example.org",)),
    ("paths", "run_dir", '"/run/vmnode"', Path("/run/vmnode")),
    ("paths", "state_dir", '"/var/lib/vmnode"', Path("/var/lib/vmnode")),
]

# The contract's defaults, where it gives a value without a word of explanation.
DEFAULTS: dict[tuple[str, str], Any] = {
    ("libvirt", "uri"): "qemu:///system",
    ("libvirt", "timeout_s"): 5.0,
    ("kvm", "accel"): "kvm",
    ("network", "name"): "default",
    ("network", "targets"): None,
    ("health", "enabled"): True,
    ("health", "conditions"): None,
    ("health", "interval_s"): 60.0,
    ("health", "fail_after"): 1,
    ("health", "recover_after"): 2,
    ("health", "max_age_s"): 900.0,
    ("health", "outbound_fail_after"): 3,
    ("health", "outbound_interval_s"): 600.0,
    ("execute", "min_free"): 10 * 1024**3,
    ("images", "roots"): (),
    ("images", "user_roots"): (),
    ("images", "raw"): (),
    ("images", "timeout_s"): 5.0,
    ("canary", "enabled"): True,
    ("canary", "interval_s"): 14400.0,
    ("canary", "timeout_s"): 60.0,
    ("heal", "mode"): "off",
    ("accounting", "enabled"): False,
    ("accounting", "backend"): "auto",
    ("accounting", "pool4"): "100.64.0.0/16",
    ("accounting", "on_error"): "open",
    ("mail", "to"): (),
    ("paths", "run_dir"): Path("/run/vmnode"),
    ("paths", "state_dir"): Path("/var/lib/vmnode"),
}


def written(directory: Path, text: Union[str, bytes], name: str = "vmnode.toml") -> Path:
    file = directory / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(file: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert caught.value.exit_status == 78
    assert "\n" not in caught.value.what
    return str(caught.value)


def value_of(loaded: Loaded, section: str, key: str) -> Any:
    return getattr(getattr(loaded.config, section), key)


@pytest.mark.parametrize(("section", "key", "toml", "value"), CONTRACT)
def test_the_contract_s_examples_are_accepted(section: str, key: str, toml: str, value: Any, tmp_path: Path) -> None:
    loaded = load(written(tmp_path, f"[{section}]\n{key} = {toml}\n"))
    assert value_of(loaded, section, key) == value
    assert loaded.sources == {(section, key): tmp_path / "vmnode.toml"}


@pytest.mark.parametrize(("place", "value"), DEFAULTS.items(), ids=map(".".join, DEFAULTS))
def test_the_contract_s_defaults(place: tuple[str, str], value: Any) -> None:
    assert getattr(getattr(Config(), place[0]), place[1]) == value


def test_an_empty_file_and_a_missing_one_are_all_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(written(tmp_path, "")).config == Config()
    monkeypatch.setattr("vmnode.config.DEFAULT_FILE", tmp_path / "absent" / "vmnode.toml")
    monkeypatch.delenv("VMNODE_CONFIG", raising=False)
    assert load().config == Config()


def test_every_setting_says_what_it_is_for() -> None:
    assert all(entry.setting.help for entry in ENTRIES)


def test_the_hook_knows_the_same_default_directory() -> None:
    assert str(Config().paths.run_dir) == startd_cron.DEFAULT_RUN_DIR


# --- wrong values, for every key of the table ---------------------------------------------------------------------

# No key takes any of these, whatever its type.
NEVER = ["nan", "inf", "-1", "1e400", "9" * 400, "{}", "[[]]", "[1.5]", '"a\\nb"', '""', "1979-05-27", '["a\\u0000"]']
OF_TYPE = {"true": bool, "0.001": float, '"perhaps not"': str, "[]": tuple, "1000000000000": int}


@pytest.mark.parametrize(("section", "key"), PLACES, ids=IDS)
@pytest.mark.parametrize("toml", NEVER, ids=[toml[:12] for toml in NEVER])
def test_no_key_takes_what_has_no_sense(section: str, key: str, toml: str, tmp_path: Path) -> None:
    said = refusal(written(tmp_path, f"[{section}]\n{key} = {toml}\n"))
    assert said.startswith(f"{tmp_path}/vmnode.toml: ")
    assert f"[{section}] {key} = " in said
    assert "must be" in said or "must hold" in said or "names no condition" in said


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
@pytest.mark.parametrize("toml", OF_TYPE)
def test_no_key_takes_a_value_of_another_type(entry: Entry, toml: str, tmp_path: Path) -> None:
    kinds = {
        ("network", "targets"): tuple,
        ("health", "conditions"): tuple,
        ("execute", "dir"): Path,
        ("execute", "min_free"): int,
    }
    kind = kinds.get((entry.section, entry.key), type(entry.value))
    if OF_TYPE[toml] is kind and kind in (bool, tuple):
        load(written(tmp_path, f"[{entry.section}]\n{entry.key} = {toml}\n"))
        return
    if (
        kind is str
        and toml == '"perhaps not"'
        and (entry.section, entry.key)
        in (
            ("libvirt", "uri"),
            ("network", "name"),
            ("accounting", "exempt"),
        )
    ):
        return  # any text
    if (entry.section, entry.key) == ("execute", "min_free") and toml == "1000000000000":
        return  # bytes
    assert f"[{entry.section}] {entry.key} = " in refusal(
        written(tmp_path, f"[{entry.section}]\n{entry.key} = {toml}\n")
    )


@pytest.mark.parametrize(
    ("section", "key", "least", "most"),
    [
        ("libvirt", "timeout_s", 0.5, 60),
        ("health", "fail_after", 1, 100),
        ("health", "recover_after", 1, 100),
        ("health", "outbound_fail_after", 1, 100),
        ("health", "outbound_interval_s", 1, 86400),
        ("health", "fresh_dhcp_interval_s", 60, 86400),
        ("images", "timeout_s", 0.5, 60),
        ("canary", "interval_s", 60, 604800),
        ("canary", "timeout_s", 1, 600),
    ],
)
def test_ranges_include_their_ends_and_nothing_is_clamped(
    section: str, key: str, least: float, most: float, tmp_path: Path
) -> None:
    for value in (least, most):
        assert value_of(load(written(tmp_path, f"[{section}]\n{key} = {value}\n")), section, key) == value
    for value in (least - 0.001 if least < 1 else least - 1, most + 1):
        said = refusal(written(tmp_path, f"[{section}]\n{key} = {value}\n"))
        assert f"between {least:g} and {most:g}" in said


@pytest.mark.parametrize(
    ("text", "size"), [('"0"', 0), ("0", 0), ("4096", 4096), ('"1K"', 1024), ('"3M"', 3 << 20), ('"2T"', 2 << 40)]
)
def test_sizes(text: str, size: int, tmp_path: Path) -> None:
    assert load(written(tmp_path, f"[execute]\nmin_free = {text}\n")).config.execute.min_free == size


@pytest.mark.parametrize("text", ['"10 G"', '"10g"', '"10GB"', '"-1"', '"1.5G"', "1.5", '"G"', '"\uff11G"', "true"])
def test_what_is_no_size(text: str, tmp_path: Path) -> None:
    assert 'must be a size such as "10G"' in refusal(written(tmp_path, f"[execute]\nmin_free = {text}\n"))


@pytest.mark.parametrize(
    ("text", "target", "shown"),
    [
        ("tcp://cm.example.org:9618", Target("cm.example.org", 9618), "tcp://cm.example.org:9618"),
        ("tcp://10.0.0.1:65535", Target("10.0.0.1", 65535), "tcp://10.0.0.1:65535"),
        ("tcp://[fd00::1]:1", Target("fd00::1", 1), "tcp://[fd00::1]:1"),
    ],
)
def test_targets(text: str, target: Target, shown: str, tmp_path: Path) -> None:
    assert load(written(tmp_path, f"[network]\ntargets = ['{text}']\n")).config.network.targets == (target,)
    assert str(target) == shown


@pytest.mark.parametrize(
    "text",
    [
        "cm.example.org:9618",
        "udp://cm.example.org:53",
        "tcp://cm.example.org",
        "tcp://:9618",
        "tcp://cm:0",
        "tcp://cm:65536",
        "tcp://cm:9618/x",
        "tcp://cm:9618?x",
        "tcp://cm:9618#x",
        "tcp://user@cm:9618",
        "tcp://c m:9618",
        "tcp://[fd00::1:9618",
        "",
    ],
)
def test_what_is_no_target(text: str, tmp_path: Path) -> None:
    assert "must hold targets such as" in refusal(written(tmp_path, f"[network]\ntargets = ['{text}']\n"))


def test_paths_are_absolute_and_written_in_one_way(tmp_path: Path) -> None:
    file = written(tmp_path, '[images]\nroots = ["/nfs//images/../images/"]\n')
    assert load(file).config.images.roots == (Path("/nfs/images"),)
    assert "must be an absolute path" in refusal(written(tmp_path, '[images]\nroots = ["nfs"]\n'))


@pytest.mark.parametrize("key", ["roots", "user_roots"])
@pytest.mark.parametrize("root", ["/nfs/my images", "/nfs/a,b"])
def test_an_image_root_that_a_string_list_would_tear_apart_is_refused(root: str, key: str, tmp_path: Path) -> None:
    assert "no comma and no blank" in refusal(written(tmp_path, f'[images]\n{key} = ["{root}"]\n'))


def test_the_roots_that_users_keep_are_among_the_roots(tmp_path: Path) -> None:
    main = written(tmp_path, '[images]\nroots = ["/images", "/home/images/"]\nuser_roots = ["/home//images"]\n')
    assert load(main).config.images.user_roots == (Path("/home/images"),)
    drop_in = written(tmp_path, '[images]\nroots = ["/images"]\n', "conf.d/1.toml")
    assert refusal(main).startswith(f"{main}: [images] user_roots: /home/images: not among roots")
    drop_in.write_text('[images]\nuser_roots = ["/home", "/images", "/home/images/alice"]\n')
    said = refusal(main)
    assert said.startswith(f"{drop_in}: [images] user_roots: /home, /home/images/alice: not among roots")
    assert "name it in both" in said


def test_images_that_are_raw_whatever_they_look_like_are_named_by_path(tmp_path: Path) -> None:
    main = written(tmp_path, '[images]\nraw = ["/images/a, b.raw", "/images//odd/../x.raw"]\n')
    assert load(main).config.images.raw == (Path("/images/a, b.raw"), Path("/images/x.raw"))
    for value in ('["x.raw"]', '"/images/x.raw"', "[true]"):
        assert "[images] raw = " in refusal(written(tmp_path, f"[images]\nraw = {value}\n"))


def test_ages_and_intervals_have_to_fit(tmp_path: Path) -> None:
    main = written(tmp_path, "[health]\nmax_age_s = 100\n")
    said = refusal(main)
    assert said.startswith(f"{main}: [health] max_age_s (100) is less than twice interval_s (60)")
    drop_in = written(tmp_path, "[health]\ninterval_s = 51\n", "conf.d/1.toml")
    assert refusal(main).startswith(f"{main}, {drop_in}: [health] max_age_s")
    written(tmp_path, "[health]\ninterval_s = 50\n", "conf.d/1.toml")
    assert load(main).config.health.max_age_s == 100


# --- wrong names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "key"), PLACES, ids=IDS)
def test_a_key_with_a_slip_is_refused_with_the_right_one_named(section: str, key: str, tmp_path: Path) -> None:
    said = refusal(written(tmp_path, f"[{section}]\n{key}x = 1\n"))
    assert f"vmnode.toml: [{section}] {key}x: no such key (did you mean {key!r}?)" in said
    assert f"the keys of [{section}] are " in said


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_a_section_with_a_slip_is_refused_with_the_right_one_named(section: str, tmp_path: Path) -> None:
    said = refusal(written(tmp_path, f"[{section}x]\n"))
    assert f"vmnode.toml: [{section}x]: no such section (did you mean {section!r}?)" in said


def test_what_resembles_nothing_gets_no_hint(tmp_path: Path) -> None:
    assert "did you mean" not in refusal(written(tmp_path, "[zzzzzzz]\n"))
    assert "did you mean" not in refusal(written(tmp_path, "[health]\nzzzzzzz = 1\n"))


def test_a_key_outside_of_a_section_is_refused(tmp_path: Path) -> None:
    assert "run_dir" in refusal(written(tmp_path, 'run_dir = "/run"\n'))
    assert "health = 3: must be a section" in refusal(written(tmp_path, "health = 3\n"))
    assert "must be a section" in refusal(written(tmp_path, "[[health]]\n"))


def test_a_condition_with_a_slip_is_refused_with_the_right_one_named(tmp_path: Path) -> None:
    said = refusal(written(tmp_path, '[health]\nconditions = ["network.dhpc"]\n'))
    assert "must hold names of conditions, not 'network.dhpc' (did you mean 'network.dhcp'?)" in said


# --- files --------------------------------------------------------------------------------------------------------


def test_drop_ins_are_read_in_name_order_and_override_key_by_key(tmp_path: Path) -> None:
    main = written(tmp_path, '[health]\ninterval_s = 10\nfail_after = 2\n[kvm]\naccel = "tcg"\n')
    late = written(tmp_path, "[health]\ninterval_s = 30\n", "conf.d/20-late.toml")
    early = written(tmp_path, "[health]\ninterval_s = 20\nrecover_after = 9\n", "conf.d/10-early.toml")
    written(tmp_path, "[health]\ninterval_s = 99\n", "conf.d/99-old.toml.rpmsave")
    loaded = load(main)
    health = loaded.config.health
    assert (health.interval_s, health.fail_after, health.recover_after, loaded.config.kvm.accel) == (30, 2, 9, "tcg")
    assert loaded.sources == {
        ("health", "interval_s"): late,
        ("health", "fail_after"): main,
        ("health", "recover_after"): early,
        ("kvm", "accel"): main,
    }


def test_an_error_in_a_drop_in_names_the_drop_in(tmp_path: Path) -> None:
    main = written(tmp_path, "")
    drop_in = written(tmp_path, "[health]\nenabled = 1\n", "conf.d/1.toml")
    assert refusal(main).startswith(f"{drop_in}: [health] enabled = 1: must be true or false")


def test_the_environment_names_the_file_and_the_option_outranks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMNODE_CONFIG", str(written(tmp_path, "[health]\nfail_after = 7\n", "environment.toml")))
    assert load().config.health.fail_after == 7
    assert load(written(tmp_path, "[health]\nfail_after = 8\n", "option.toml")).config.health.fail_after == 8


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refusal(tmp_path / "absent.toml")
    assert "no such file" in refusal(written(tmp_path, "") / "below.toml")
    monkeypatch.setenv("VMNODE_CONFIG", str(tmp_path / "absent.toml"))
    with pytest.raises(ConfigurationError, match="no such file"):
        load()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[health]\n\xff", "utf-8"),
        ("[health]\n".encode("utf-16"), "utf-8"),
        (b"[health\n", "line 1"),
        (b"[health]\nfail_after = 1\nfail_after = 2\n", "line 3"),
        (b"[health]\nfail_after = " + b"9" * 5000, ""),
        (b"[health]\nfail_after = " + b"[" * 5000, ""),
        (b"\0", ""),
    ],
)
def test_what_is_not_toml_in_utf_8_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    said = refusal(written(tmp_path, content))
    assert said.startswith(f"{tmp_path}/vmnode.toml: ")
    assert why in said


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    main = written(tmp_path, "")
    (tmp_path / "conf.d" / "1.toml").mkdir(parents=True)
    assert refusal(main).startswith(f"{tmp_path}/conf.d/1.toml: cannot be read: Is a directory")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


@pytest.fixture
def as_an_ordinary_user() -> Iterator[Path]:
    """A directory, with the rights of nobody: root would be let through every door."""
    directory = Path(tempfile.mkdtemp(prefix="vmnode-test-"))
    directory.chmod(0o755)
    was = os.geteuid()
    try:
        if was == 0:
            os.chown(directory, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield directory
    finally:
        os.seteuid(was)
        (directory / "conf.d").chmod(0o755)
        shutil.rmtree(directory)


def test_what_may_not_be_read_is_refused_and_not_passed_over(as_an_ordinary_user: Path) -> None:
    directory = as_an_ordinary_user
    main = written(directory, "")
    drop_in = written(directory, "", "conf.d/1.toml")
    drop_in.chmod(0)
    assert refusal(main).startswith(f"{drop_in}: cannot be read: Permission denied")
    drop_in.parent.chmod(0)
    assert refusal(main).startswith(f"{drop_in.parent}: cannot be read: Permission denied")
    assert refusal(drop_in).startswith(f"{drop_in}: cannot be read: Permission denied")
    main.chmod(0)
    drop_in.parent.chmod(0o755)
    drop_in.unlink()
    assert refusal(main).startswith(f"{main}: cannot be read: Permission denied")


# --- anything at all ----------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.booleans().map(lambda flag: str(flag).lower()),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=20).map(
        '"{}"'.format
    ),
    st.sampled_from(["1979-05-27T07:32:00Z", "07:32:00", "0xff", '"""x"""', "'''\n'''", "{ a = 1 }"]),
)
values = scalars | st.lists(scalars, max_size=3).map(lambda items: "[" + ", ".join(items) + "]")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.sampled_from(PLACES), values)
def test_any_value_is_taken_as_it_stands_or_refused_by_name(tmp_path: Path, place: tuple[str, str], value: str) -> None:
    section, key = place
    try:
        load(written(tmp_path, f"[{section}]\n{key} = {value}\n"))
    except ConfigurationError as error:
        assert f"[{section}] {key}" in error.what or f"[{section}] max_age_s" in error.what


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.one_of(st.binary(max_size=60), st.text(st.sampled_from("[]{}=\"'\n\\.#-_: ahelt01"), max_size=60)))
def test_any_file_is_understood_or_refused(tmp_path: Path, content: Union[str, bytes]) -> None:
    try:
        load(written(tmp_path, content))
    except ConfigurationError as error:
        assert error.what.startswith(str(tmp_path))
