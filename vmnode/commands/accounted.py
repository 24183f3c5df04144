"""vmnode accounting run: a command of the administrator's in a network of its own, and what it used."""

from __future__ import annotations

import argparse
import json
import os
import sys

from vmnode.accounting.ledger import FILE
from vmnode.accounting.query import Selection, find
from vmnode.accounting.record import Record
from vmnode.config import Config
from vmnode.errors import NotPermitted, UsageError, VmnodeError
from vmnode.host import accounts, child
from vmnode.host.starter_socket import FILE as SOCKET
from vmnode.host.starter_socket import Client
from vmnode.usage import Usage

DEADLINE_S = 10.0  # more than vmnoded takes to end what it does for others


def run(arguments: argparse.Namespace, config: Config) -> int:
    """The command's exit status; what it used goes to standard error, as time(1) has it."""
    if os.geteuid() != 0:
        raise NotPermitted("vmnode accounting run needs root: it enters a network namespace", "sudo vmnode …")
    words = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not words:
        raise UsageError("there is no command to run", "vmnode accounting run -- COMMAND …")
    environment = dict(os.environ)
    identity = None
    if arguments.user:
        identity, home = accounts.named(arguments.user)
        environment.update(USER=arguments.user, LOGNAME=arguments.user, HOME=home)
    client = Client(config.paths.run_dir / SOCKET, f"run {arguments.user or 'root'}", DEADLINE_S)

    def before() -> None:
        client.enter()
        if identity is not None:
            os.setgroups(identity.groups)
            os.setgid(identity.gid)
            os.setuid(identity.uid)

    status = child.accompany(words, before, environment)
    try:
        answer = client.ended()
        (record,) = find(config.paths.state_dir / FILE, Selection(record=int(answer.split()[1])))
        report(record, arguments.json)
    except VmnodeError as error:  # the command's status is what the caller wants to know
        print(f"vmnode: {error}", file=sys.stderr)
    return status


def report(record: Record, as_json: bool) -> None:
    usage = record.total or Usage()
    if as_json:
        counts = {name: traffic._asdict() for name, traffic in usage._asdict().items()}
        document = {"version": 1, "outcome": record.outcome.value, "usage": counts}
        print(json.dumps(document), file=sys.stderr)
        return
    print("", file=sys.stderr)
    for name, traffic in usage._asdict().items():
        where, direction = name.split("_")
        print(
            f"{where.upper()} {direction:<4}{traffic.bytes:>16,} bytes {traffic.packets:>12,} packets", file=sys.stderr
        )
    if record.ended_at is None:
        print("something that the command started still runs, and is counted on", file=sys.stderr)
    if record.partial_since is not None:
        print("some packets may be missing: the rules that count were gone for a while", file=sys.stderr)
