"""vmnode: the administrator's command line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from vmnode import __version__, images, overlays
from vmnode.commands import accounting
from vmnode.commands.arguments import Parser
from vmnode.conditions import KINDS, NAMES, Condition, Now
from vmnode.config import ENVIRONMENT, Config, Loaded, load
from vmnode.errors import EXIT_IO, ConfigurationError, NotPermitted, StateError, UsageError, VmnodeError
from vmnode.health.decide import state_of
from vmnode.host import clock, files
from vmnode.report import state
from vmnode.values import Target, did_you_mean

EXIT_STATUS = {"healthy": 0, "failed": 1, "unknown": 2}
EXIT_STALE = 2


def main(argv: Optional[Sequence[str]] = None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it, and wants only the exit status
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until we end)
    arguments = make_parser().parse_args(argv)
    try:
        verb: Callable[[argparse.Namespace], int] = arguments.verb
        status = verb(arguments)
        sys.stdout.flush()
        return status
    except VmnodeError as error:
        print(f"vmnode: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
        if not isinstance(error, BrokenPipeError):  # a reader, a pager say, may have seen enough
            print(f"vmnode: {error}", file=sys.stderr)
        return EXIT_IO
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="instead of $VMNODE_CONFIG or /etc/vmnode/vmnode.toml; conf.d/*.toml beside it is read after it",
    )
    parser = Parser(
        prog="vmnode",
        parents=[common],
        description="Health of this worker node, as virtual machine jobs would find it, and its jobs' network use.",
        epilog="Exit status of status and check: 0 healthy, 1 failed, 2 unknown, stale or no daemon."
        " Of images: 1 if a root does not answer."
        " Of all: 64 wrong usage, 69 cannot be done, 74 output cannot be written, 77 no permission,"
        " 78 wrong configuration.",
    )
    parser.add_argument("--version", action="version", version=f"vmnode {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)

    def add(name: str, verb: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, parents=[common], help=help, description=help)
        added.set_defaults(verb=verb)
        return added

    status = add("status", show_status, "What the daemon last published.")
    status.add_argument("--json", action="store_true", help="print JSON")
    check = add("check", run_check, "Probe the node now, without the daemon (root; up to ten seconds).")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "conditions", metavar="CONDITION", nargs="*", help="only these and what they depend on: " + ", ".join(NAMES)
    )
    add("classad", show_classad, "The machine ad, exactly as the startd gets it.")
    images = add("images", show_images, "The image roots, their images, and the guests that run on them.")
    images.add_argument("--json", action="store_true", help="print JSON")
    accounting.add_parsers(verbs, common, running_configuration)
    config = add("config", show_config, "The configuration in the files; a daemon that runs takes it up at its reload.")
    config.add_argument(
        "what", choices=("show", "check"), help="show every value with its source, or only say whether all is right"
    )
    return parser


def configuration(arguments: argparse.Namespace) -> Loaded:
    return load(getattr(arguments, "config", None))


# --- status -------------------------------------------------------------------------------------------------------


def show_status(arguments: argparse.Namespace) -> int:
    config = running_configuration(arguments)
    snapshot, max_age_s = read_state(config)
    now = clock.now()
    stale = ""
    if not files.is_locked(str(config.paths.run_dir / "lock")):
        stale = "vmnoded does not run: systemctl status vmnode"
    elif snapshot.age_s(now) >= max_age_s:
        stale = "vmnoded runs, but its last check is too old: journalctl -u vmnode"
    if stale:
        snapshot = snapshot.expired(stale)
    if arguments.json:
        print_json(state.document(snapshot, now))
    else:
        print_overview(snapshot, now)
    return EXIT_STALE if stale else EXIT_STATUS[state_of(snapshot.conditions)]


def running_configuration(arguments: argparse.Namespace) -> Config:
    """The configuration; in place of a wrong /etc/vmnode the defaults, since the daemon may run with the one before."""
    try:
        return configuration(arguments).config
    except ConfigurationError as error:
        if "config" in arguments or os.environ.get(ENVIRONMENT):
            raise
        print(f"vmnode: {error}", file=sys.stderr)
        return Config()


def read_state(config: Config) -> tuple[state.Snapshot, float]:
    path = config.paths.run_dir / "state.json"
    try:
        return state.read(files.read_whole(str(path)))
    except FileNotFoundError:
        error: VmnodeError = StateError(f"{path}: vmnoded has published nothing yet", "systemctl status vmnode")
    except OSError as problem:
        error = StateError(f"{path}: cannot be read: {problem.strerror}", "see [paths] run_dir")
    except StateError as problem:
        error = StateError(f"{path}: {problem.what}", "systemctl restart vmnode writes it anew")
    error.exit_status = EXIT_STALE
    raise error


def print_overview(snapshot: state.Snapshot, now: Now, subject: str = "") -> None:
    """`subject` is what the verdict is about: this host, if not a part of it."""
    from rich.console import Console

    from vmnode.report.table import overview

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(overview(subject or socket.gethostname(), snapshot, snapshot.age_s(now), now.boot))


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


# --- check --------------------------------------------------------------------------------------------------------


def run_check(arguments: argparse.Namespace) -> int:
    for name in arguments.conditions:
        if name not in NAMES:
            raise UsageError(
                f"there is no condition {name!r}{did_you_mean(name, NAMES)}", "the conditions are " + ", ".join(NAMES)
            )
    config = configuration(arguments).config
    if os.geteuid() != 0:
        raise NotPermitted(
            "vmnode check needs root: it uses network namespaces and raw sockets",
            "sudo vmnode check; or vmnode status, which shows what the daemon found",
        )
    if arguments.conditions:
        health = dataclasses.replace(config.health, conditions=tuple(arguments.conditions))
        config = dataclasses.replace(config, health=health)
    snapshot = asyncio.run(probe(config))
    if arguments.conditions:
        kept = tuple(c for c in snapshot.conditions if c.reason != "NotApplicable" or c.name in arguments.conditions)
        snapshot = dataclasses.replace(snapshot, conditions=kept)
    if arguments.json:
        print_json(state.document(snapshot, clock.now()))
    else:
        print_overview(snapshot, clock.now(), f"this part of {socket.gethostname()}" if arguments.conditions else "")
    return EXIT_STATUS[state_of(snapshot.conditions)]


async def probe(config: Config) -> state.Snapshot:
    """One whole check by this process alone; its probe shares no name with the daemon's."""
    from vmnode.health.check import EVERYTHING, Checker
    from vmnode.health.decide import decide_all
    from vmnode.health.schedule import thresholds

    def progress(text: str) -> None:
        print(f"… {text}", file=sys.stderr, flush=True)

    checker = Checker(config, f"{config.paths.run_dir} check {os.getpid()}", progress=progress)
    try:
        result = await checker.check(EVERYTHING)
    finally:
        await checker.close()
    now = clock.now()
    limits = {kind.name: thresholds(kind.name, config.health) for kind in KINDS}
    verdicts: tuple[Condition, ...] = decide_all({}, result.observations.values(), now.boot, limits)
    return state.Snapshot(verdicts, result.image_roots, now)


# --- images -------------------------------------------------------------------------------------------------------


def show_images(arguments: argparse.Namespace) -> int:
    from vmnode.health import bases
    from vmnode.transfer import catalogue

    config = configuration(arguments).config
    settings = images.settings(config.images)
    roots = [catalogue.root(path, settings) for path in settings.roots]
    running = [overlay for _, overlay in bases.recorded(config.paths.state_dir / overlays.DIRECTORY)]
    if not settings.roots:
        print("vmnode: no image roots are configured ([images] roots)", file=sys.stderr)
    if not files.is_locked(str(config.paths.run_dir / "lock")):
        print("vmnode: vmnoded does not run, so guests may be listed that have ended", file=sys.stderr)
    if arguments.json:
        document = {
            "version": 1,
            "roots": [{"path": root.path, "answers": not root.problem, "problem": root.problem} for root in roots],
            "images": [dataclasses.asdict(image) for root in roots for image in root.images],
            "overlays": [overlays.document(overlay) for overlay in running],
        }
        print_json(document)
    else:
        from rich.console import Console

        from vmnode.report import table

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        console.print(table.images(roots, running, time.time()))
    return 1 if any(root.problem for root in roots) else 0


# --- classad, config ----------------------------------------------------------------------------------------------


def show_classad(arguments: argparse.Namespace) -> int:
    from vmnode.commands import startd_cron

    startd_cron.print_once(str(configuration(arguments).config.paths.run_dir))
    return 0


def show_config(arguments: argparse.Namespace) -> int:
    loaded = configuration(arguments)
    if arguments.what == "check":
        values, files_with_values = len(loaded.sources), len(set(loaded.sources.values()))
        print(f"the configuration is right (values set: {values}, in files: {files_with_values})")
        return 0
    section = ""
    for entry in loaded.entries():
        if entry.section != section:
            print(f"[{entry.section}]" if not section else f"\n[{entry.section}]")
            section = entry.section
        source = str(entry.source) if entry.source else "default"
        later = "" if entry.setting.built else "; not built yet"
        print(f"{entry.key} = {toml(entry.value)}".ljust(44) + f"  # {source}{later}")
    return 0


def toml(value: Any) -> str:
    """A value as it would be written in the file; a default that is found out at run time as the word auto."""
    if value is None:
        return '"auto"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, (Path, Target)):
        return json.dumps(str(value))
    return json.dumps(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
