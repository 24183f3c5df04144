"""What a person at a node would type and see, for the demonstration."""

from __future__ import annotations

import shlex

from tests.lab.node import Node

HOME = "/home/alice"  # of the user who submits


def show(node: Node, command: list[str], user: str = "") -> None:
    """Run a command, as root or as a user at home, and show both."""
    entering = ["runuser", "-u", user, "--", "env", "-C", HOME] if user else []
    done = node.run([*entering, *command], check=False)
    print(f"  {user and f'{user}@'}{node.name}$ {shlex.join(command)}")
    for line in (done.stdout + done.stderr).rstrip().splitlines():
        print(f"  {line}".rstrip())
    print(flush=True)


def wait_for_output(node: Node, command: list[str], timeout: float) -> None:
    """Wait until a command says something."""
    node.wait_until(lambda: node.run(command, check=False).stdout.strip(), f"output of {' '.join(command)}", timeout)
