"""The settings: one table gives key, type, default and help; frozen dataclasses come out.

Each section is a dataclass, each key one of its fields, declared by `setting()`. The defaults, the parser, `vmnode
config show` and the documentation all read the same declaration.

    main file    $VMNODE_CONFIG or --config, else /etc/vmnode/vmnode.toml (may be absent)
    drop-ins     conf.d/*.toml beside the main file, in name order; a later file overrides key by key

Wrong values, unknown sections and unknown keys are errors that name file, section and key.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from vmnode import values
from vmnode.errors import ConfigurationError
from vmnode.values import Parser, Target, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_FILE = Path("/etc/vmnode/vmnode.toml")
ENVIRONMENT = "VMNODE_CONFIG"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The declaration of one key. `parse` turns a TOML value into ours or raises ValueError("must be …")."""

    parse: Parser
    help: str
    built: bool  # False: accepted and checked, but nothing acts on it yet


def setting(default: Any, parse: Parser, help: str, built: bool = True) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(parse, help, built)})


# --- the table --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Libvirt:
    uri: str = setting("qemu:///system", values.text, "the libvirt that HTCondor's vm-gahp uses")
    timeout_s: float = setting(5.0, values.seconds(0.5, 60), "libvirt must answer within this time")


@dataclasses.dataclass(frozen=True)
class Kvm:
    accel: str = setting(
        "kvm", values.choice("kvm", "tcg"), 'how guests run; with "tcg" the condition kvm does not apply'
    )


@dataclasses.dataclass(frozen=True)
class Network:
    name: str = setting("default", values.text, "the virtual network that VM jobs are attached to")
    targets: Optional[tuple[Target, ...]] = setting(
        None,
        values.or_auto(values.list_of(values.target)),
        "TCP services, any of which a guest must reach; auto: the pool's collector",
    )


@dataclasses.dataclass(frozen=True)
class Health:
    enabled: bool = setting(True, values.flag, "check the node's health; if false every condition is disabled")
    conditions: Optional[tuple[str, ...]] = setting(
        None,
        values.or_auto(values.list_of(values.condition_name)),
        "those that apply; auto: as the node and HTCondor are set up",
    )
    interval_s: float = setting(60.0, values.seconds(1, 3600), "a check runs at least this often")
    fail_after: int = setting(1, values.count(1, 100), "bad checks in a row before a condition fails")
    recover_after: int = setting(2, values.count(1, 100), "good checks in a row before a failed condition is ok")
    max_age_s: float = setting(900.0, values.seconds(10, 86400), "what was published stops holding after this time")
    outbound_fail_after: int = setting(3, values.count(1, 100), "fail_after of network.outbound")
    outbound_interval_s: float = setting(600.0, values.seconds(1, 86400), "a target is connected to this often")
    fresh_dhcp_interval_s: float = setting(
        3600.0, values.seconds(60, 86400), "an unknown MAC address asks for a lease this often"
    )


@dataclasses.dataclass(frozen=True)
class Execute:
    dir: Optional[Path] = setting(
        None, values.or_auto(values.path), "where jobs' sandboxes lie; auto: HTCondor's EXECUTE"
    )
    min_free: int = setting(10 << 30, values.size, "room that must be free there")


@dataclasses.dataclass(frozen=True)
class Images:
    roots: tuple[Path, ...] = setting((), values.list_of(values.root), "directories with base images")
    user_roots: tuple[Path, ...] = setting(
        (), values.list_of(values.root), "those of the roots in which users may own and replace images"
    )
    raw: tuple[Path, ...] = setting(
        (), values.list_of(values.path), "images that are raw, though they begin as one of another format would"
    )
    timeout_s: float = setting(5.0, values.seconds(0.5, 60), "an image root must answer within this time")


@dataclasses.dataclass(frozen=True)
class Canary:
    enabled: bool = setting(True, values.flag, "prove the node by starting a guest", built=False)
    interval_s: float = setting(
        14400.0, values.seconds(60, 604800), "a canary guest is started this often", built=False
    )
    timeout_s: float = setting(60.0, values.seconds(1, 600), "it must have an address within this time", built=False)


@dataclasses.dataclass(frozen=True)
class Heal:
    mode: str = setting("off", values.choice("off", "safe", "full"), "what vmnode may repair by itself", built=False)


@dataclasses.dataclass(frozen=True)
class Accounting:
    enabled: bool = setting(False, values.flag, "account every job's network use; starters come by the knob STARTER")
    backend: str = setting("auto", values.choice("auto", "nftables", "iptables"), "what counts")
    pool4: str = setting("100.64.0.0/16", values.pool4, "IPv4 addresses for jobs")
    pool6: str = setting("fd76:6d6e:6f64:6500::/64", values.pool6, "IPv6 addresses for jobs")
    lan: tuple[str, ...] = setting(
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"),
        values.list_of(values.prefix),
        "what counts as LAN, beside the host's own addresses",
    )
    exempt: str = setting(
        "JobUniverse == 11 || WantHostNetwork =?= true",
        values.text,
        "jobs that stay on the host's network: an expression over the slot's ad",
    )
    on_error: str = setting("open", values.choice("open", "closed"), "run unaccounted jobs, or none")
    sample_s: float = setting(10.0, values.seconds(1, 600), "the counters are read at least this often")
    leftovers: str = setting(
        "report", values.choice("off", "report", "end"), "what is done with processes that outlive their starter"
    )
    leftovers_grace_s: float = setting(60.0, values.seconds(10, 86400), "they may take this long to end by themselves")
    keep_days: int = setting(400, values.count(1, 36500), "records of jobs older than this are deleted")


@dataclasses.dataclass(frozen=True)
class Mail:
    to: tuple[str, ...] = setting(
        (), values.list_of(values.text), "who is told when a problem begins and ends", built=False
    )


@dataclasses.dataclass(frozen=True)
class Paths:
    run_dir: Path = setting(Path("/run/vmnode"), values.path, "run-time state; instances on one machine differ here")
    state_dir: Path = setting(Path("/var/lib/vmnode"), values.path, "lasting state: the ledger, the overlays in use")


@dataclasses.dataclass(frozen=True)
class Config:
    libvirt: Libvirt = Libvirt()
    kvm: Kvm = Kvm()
    network: Network = Network()
    health: Health = Health()
    execute: Execute = Execute()
    images: Images = Images()
    canary: Canary = Canary()
    heal: Heal = Heal()
    accounting: Accounting = Accounting()
    mail: Mail = Mail()
    paths: Paths = Paths()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One effective value: where it stands, what it is, and which file said so (None: the default)."""

    section: str
    key: str
    value: Any
    source: Optional[Path]
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Loaded:
    config: Config
    sources: Mapping[tuple[str, str], Path]

    def entries(self) -> Iterator[Entry]:
        """Every setting in the table's order."""
        for section in dataclasses.fields(self.config):
            keys = getattr(self.config, section.name)
            for key in dataclasses.fields(keys):
                source = self.sources.get((section.name, key.name))
                yield Entry(section.name, key.name, getattr(keys, key.name), source, key.metadata["setting"])


# --- the files --------------------------------------------------------------------------------------------------


def files(main: Optional[Path] = None) -> list[Path]:
    """The configuration files that exist, in the order in which they are read.

    `main` is what --config names. A main file that was named but is absent is an error.
    """
    named = main or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    first = named or DEFAULT_FILE
    if named is not None and not _exists(named):
        raise ConfigurationError(f"{named}: no such file", f"give --config or {ENVIRONMENT} a file that exists")
    drop_ins = first.parent / "conf.d"
    try:
        found = sorted(path for path in drop_ins.iterdir() if path.suffix == ".toml")
    except (FileNotFoundError, NotADirectoryError):
        found = []
    except OSError as error:
        raise ConfigurationError(f"{drop_ins}: cannot be read: {error.strerror}") from None
    return [*([first] if _exists(first) else []), *found]


def _exists(file: Path) -> bool:
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror}") from None
    return True


_MAX_AGE, _INTERVAL = ("health", "max_age_s"), ("health", "interval_s")


def load(main: Optional[Path] = None) -> Loaded:
    """Read and check the whole configuration; raises ConfigurationError."""
    given: dict[str, dict[str, Any]] = {}
    sources: dict[tuple[str, str], Path] = {}
    for file in files(main):
        for section, key, value in _read(file):
            given.setdefault(section, {})[key] = value
            sources[section, key] = file
    sections = {name: dataclasses.replace(default, **given.get(name, {})) for name, default in _sections().items()}
    config = Config(**sections)
    health = config.health
    if health.max_age_s < 2 * health.interval_s:
        said_by = dict.fromkeys(sources[place] for place in (_MAX_AGE, _INTERVAL) if place in sources)
        raise ConfigurationError(
            f"{', '.join(map(str, said_by))}: [health] max_age_s ({health.max_age_s:g}) is less than twice interval_s"
            f" ({health.interval_s:g}): a healthy node would not stay published",
            "raise max_age_s or lower interval_s",
        )
    strangers = [str(root) for root in config.images.user_roots if root not in config.images.roots]
    if strangers:
        raise ConfigurationError(
            f"{sources['images', 'user_roots']}: [images] user_roots: {', '.join(strangers)}: not among roots",
            "user_roots says which of the roots are in users' hands: name it in both",
        )
    return Loaded(config, sources)


def _sections() -> dict[str, Any]:
    """The sections with their defaults, by name."""
    return {section.name: getattr(Config(), section.name) for section in dataclasses.fields(Config)}


def _read(file: Path) -> Iterator[tuple[str, str, Any]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, numbers and nesting beyond all limits
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "whoever runs vmnode has to be able to read it" if isinstance(error, OSError) else "it is TOML in UTF-8"
        raise ConfigurationError(f"{file}: cannot be read: {reason}", hint) from None
    sections = _sections()
    for name, table in document.items():
        if name in sections and not isinstance(table, dict):
            raise ConfigurationError(f"{file}: {name} = {table!r}: must be a section", f"begin it with [{name}]")
        if name not in sections:
            raise ConfigurationError(
                f"{file}: [{name}]: no such section{did_you_mean(name, tuple(sections))}",
                "the sections are " + ", ".join(sections),
            )
        keys = {key.name: key.metadata["setting"] for key in dataclasses.fields(sections[name])}
        for key, raw in table.items():
            if key not in keys:
                raise ConfigurationError(
                    f"{file}: [{name}] {key}: no such key{did_you_mean(key, tuple(keys))}",
                    f"the keys of [{name}] are " + ", ".join(keys),
                )
            try:
                value = keys[key].parse(raw)
            except ValueError as error:
                raise ConfigurationError(f"{file}: [{name}] {key} = {raw!r}: {error}", keys[key].help) from None
            yield name, key, value
