"""``python -m tests.lab``: the lab from the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType
from typing import Optional

from tests.lab import homes
from tests.lab.demo import boot_pool, demo
from tests.lab.errors import LabError
from tests.lab.images import SUITES, image
from tests.lab.node import ENVIRONMENT, Node
from tests.lab.old_python import run_tests
from tests.lab.requirements import require_machine

INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _end)
    try:
        require_machine()
        return int(arguments.act(arguments))
    except LabError as error:
        print(f"tests.lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tests.lab: interrupted; what was made has been removed", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab", description="Real HTCondor worker nodes in containers on this machine (root)."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, act: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(act=act)
        return added

    build = verb("build", _build, "build the images that are missing")
    build.add_argument("suites", nargs="*", metavar="SUITE", default=SUITES, help=f"of {', '.join(SUITES)} (all)")

    shown = verb("demo", _demo, "break and repair a node's network, and see the pool know of it")
    _add_image(shown)

    shell = verb("shell", _shell, "a shell in a running node; boots a pool of one node if there is none")
    shell.add_argument("name", nargs="?", default="pool", help="the node (default: pool)")
    _add_image(shell)

    verb("old-python", _old_python, "the unit and kernel tests on the oldest Python and pyroute2 that we support")

    clean = verb("clean", _clean, "remove what dead runs left behind")
    clean.add_argument("names", nargs="*", metavar="NAME", help="also stop and remove these nodes")
    return parser


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", choices=SUITES, default=SUITES[0], help="what to boot (default: %(default)s)")


def _build(arguments: argparse.Namespace) -> int:
    for suite in arguments.suites:
        print(f"{suite}: {image(suite)}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    demo(arguments.image)
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    try:
        node = Node.attach(arguments.name)
    except LabError:
        node = boot_pool(arguments.image, arguments.name)
        node.detach()
    print(f"The node {node.name} keeps running after this shell: poweroff, or `python -m tests.lab clean {node.name}`.")
    sys.stdout.flush()
    command = [*node.entering(), "bash", "--login"]
    # In place of this process, which would otherwise answer to the Ctrl-C that is meant for the shell.
    os.execvpe(command[0], command, {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")})


def _old_python(arguments: argparse.Namespace) -> int:
    return run_tests()


def _clean(arguments: argparse.Namespace) -> int:
    removed = homes.remove_dead()
    for name in arguments.names:
        Node(name).stop()
        removed.append(name)
    print(f"removed: {', '.join(removed)}" if removed else "nothing to remove")
    return 0


def _end(number: int, frame: Optional[FrameType]) -> None:
    """Make SIGTERM unwind as Ctrl-C does, so that nodes are removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
