"""Starts processes for an event loop (child.py: without one): an argument list, a deadline, LC_ALL=C, no shell.

A child that survives SIGKILL sits in uninterruptible sleep (a dead NFS server, say). It is abandoned and remembered
under its `task`; while it lives, no second one is started for the same task, so that a hanging mount costs one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from vmnode.errors import CommandFailed, DeadlineExceeded
from vmnode.host.child import ENVIRONMENT, Identity

OUTPUT_LIMIT = 16 << 20  # bytes that a child may print on each stream; of a worker, on one line
_GRACE_S = 0.5  # how long a killed child may take to be gone

_abandoned: dict[str, asyncio.subprocess.Process] = {}


@dataclass(frozen=True)
class Finished:
    """A child that ended by itself. `status` is its exit status, negative for a signal."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


async def run(
    argv: Sequence[str],
    deadline_s: float,
    *,
    task: str = "",
    identity: Optional[Identity] = None,
    environment: Optional[dict[str, str]] = None,
    text: Optional[str] = None,
) -> Finished:
    """Run a command to its end, with `text` on its standard input, and return what it printed.

    Runs with `identity`, where one is given. Raises CommandFailed if it cannot be started or prints more than
    OUTPUT_LIMIT, and DeadlineExceeded if it did not end within `deadline_s` seconds; it is killed then.
    """
    task = task or argv[0]
    stuck = _abandoned.get(task)
    if stuck is not None and stuck.returncode is None:
        raise DeadlineExceeded(f"{task}: the last try still hangs (process {stuck.pid} cannot be killed)")
    stdin = asyncio.subprocess.DEVNULL if text is None else asyncio.subprocess.PIPE
    child = await start(argv, identity=identity, environment=environment, stdin=stdin)
    try:
        stdout, stderr = await asyncio.wait_for(_talk(child, text), deadline_s)
    except asyncio.TimeoutError:
        _kill_group(child)  # it may have ended, and left somebody behind who holds our pipes
        raise DeadlineExceeded(f"{' '.join(argv)}: no answer within {deadline_s:g} s") from None
    finally:
        await end(child, task)
    assert child.returncode is not None
    if len(stdout) > OUTPUT_LIMIT or len(stderr) > OUTPUT_LIMIT:
        raise CommandFailed(f"{' '.join(argv)}: printed more than {OUTPUT_LIMIT >> 20} MiB")
    return Finished(tuple(argv), child.returncode, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


async def _talk(child: asyncio.subprocess.Process, text: Optional[str]) -> tuple[bytes, bytes]:
    """As communicate() does, which would read without end."""
    assert child.stdout is not None and child.stderr is not None
    output = asyncio.gather(_read(child, child.stdout), _read(child, child.stderr))
    if child.stdin is not None and text is not None:
        with contextlib.suppress(ConnectionError):  # it does not want all of it
            child.stdin.write(text.encode())
            await child.stdin.drain()
        child.stdin.close()
    stdout, stderr = await output
    await child.wait()
    return stdout, stderr


async def _read(child: asyncio.subprocess.Process, stream: asyncio.StreamReader) -> bytes:
    """All that comes, or a little more than OUTPUT_LIMIT of it: then the child is killed, and the rest thrown away."""
    kept = bytearray()
    while True:
        chunk = await stream.read(1 << 16)
        if not chunk:
            return bytes(kept)
        if len(kept) <= OUTPUT_LIMIT:
            kept += chunk
            if len(kept) > OUTPUT_LIMIT:
                _kill_group(child)


async def start(
    argv: Sequence[str],
    *,
    identity: Optional[Identity] = None,
    environment: Optional[dict[str, str]] = None,
    stdin: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a child whose output is read by the caller, in a process group of its own; `end` it yourself."""
    if identity is None:
        become: dict[str, Any] = {}
    elif os.geteuid() == 0:
        become = {"user": identity.uid, "group": identity.gid, "extra_groups": identity.groups}
    elif identity.uid == os.geteuid():
        become = {}
    else:
        raise CommandFailed(f"{argv[0]}: only root can run it as another user", "run this as root")
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**ENVIRONMENT, **(environment or {})},
            cwd="/",
            start_new_session=True,
            limit=OUTPUT_LIMIT,
            **become,
        )
    except OSError as error:
        raise CommandFailed(f"{argv[0]}: cannot be started: {error.strerror}") from None


async def end(child: asyncio.subprocess.Process, task: str) -> None:
    """Kill a child and all of its process group, if it still runs; remember one that cannot be killed."""
    if child.returncode is not None:
        return
    _kill_group(child)
    try:
        await asyncio.wait_for(asyncio.shield(child.wait()), _GRACE_S)
    except asyncio.TimeoutError:
        _abandoned[task] = child


def _kill_group(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
