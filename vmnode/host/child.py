"""One forked child, asked one question, without an event loop.

For executables that live for milliseconds, and for what has to be seen with another user's rights. The child may hang
for ever on a dead file server; the parent does not: it kills the child, and leaves behind one that cannot be killed.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from typing import NamedTuple

from vmnode import errors
from vmnode.errors import CommandFailed, DeadlineExceeded, VmnodeError

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from collections.abc import Mapping, Sequence
    from typing import Any, Callable, NoReturn, Optional

# A fixed PATH: what root runs does not depend on who started it. EL keeps some of these in sbin.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
OUTPUT_LIMIT = 1 << 20  # bytes
_GRACE_S = 0.5  # how long a child that was killed, or closed its output, may take to be gone


class Identity(NamedTuple):
    """Whom a process runs as."""

    uid: int
    gid: int
    groups: list[int]

    @property
    def label(self) -> str:
        """As libvirt's DAC driver writes it: numbers, not names (formatdomain.html, "Security label")."""
        return f"+{self.uid}:+{self.gid}"


def ask(question: Callable[[], Any], deadline_s: float, what: str, identity: Optional[Identity] = None) -> Any:
    """The value of `question()`, which must be JSON, computed in a child with the rights of `identity`.

    Raises what the question raises (VmnodeError, OSError), and DeadlineExceeded, naming `what`.
    """

    def answer() -> None:
        if identity is not None:
            os.setgroups(identity.groups)
            os.setgid(identity.gid)
            os.setuid(identity.uid)
        try:
            document = {"answer": question()}
        except VmnodeError as error:
            document = {"error": [type(error).__name__, error.what, error.hint]}
        except OSError as error:
            document = {"errno": error.errno}
        with os.fdopen(1, "wb") as pipe:
            pipe.write(json.dumps(document).encode())

    status, output, complaint = _converse(answer, b"", deadline_s, what)
    try:
        document = json.loads(output)
    except ValueError:
        why = complaint or "no answer"
        raise CommandFailed(f"{what}: a child of vmnode ended with status {status}: {why}") from None
    if "error" in document:
        name, sentence, hint = document["error"]
        raise getattr(errors, name)(sentence, hint)
    if "errno" in document:
        raise OSError(document["errno"], os.strerror(document["errno"] or 0))
    return document["answer"]


def run(
    argv: Sequence[str],
    deadline_s: float,
    *,
    text: str = "",
    directory: str = "/",
    limits: Optional[Mapping[int, int]] = None,
) -> tuple[int, str, str]:
    """Run a command: no shell, `text` (at most 64 KiB) on its input. Returns its exit status, stdout and stderr.

    `limits` are resource limits (setrlimit(2)) by their RLIMIT_ number; a stricter one that holds already stays. Raises
    CommandFailed if it cannot be started or prints more than OUTPUT_LIMIT, DeadlineExceeded if it does not end in time.
    """

    def execute() -> None:
        os.chdir(directory)
        for number, value in (limits or {}).items():
            hard = resource.getrlimit(number)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (most, most))
        os.execvpe(argv[0], list(argv), ENVIRONMENT)  # raises if it cannot be done

    status, output, complaint = _converse(execute, text.encode(), deadline_s, argv[0])
    if status == _NOT_STARTED:
        raise CommandFailed(f"{argv[0]}: cannot be started: {complaint.strip()}")
    return status, output.decode("utf-8", "replace"), complaint


def accompany(argv: Sequence[str], before: Callable[[], None], environment: Mapping[str, str]) -> int:
    """Run a command with our own streams until it ends, as a shell would in the foreground; its exit status.

    `before` runs in the child; what it raises, OSError or VmnodeError, the child says, and ends with status 126. A
    command that cannot be started ends with 127, one that a signal ended with 128 and its number (POSIX, sh).
    """
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGQUIT)}
    pid = os.fork()
    if pid == 0:
        status = 126
        try:
            for number, handler in ignored.items():
                signal.signal(number, handler)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
                signal.signal(number, signal.SIG_DFL)
            before()
            status = _NOT_STARTED
            os.execvpe(argv[0], list(argv), dict(environment))
        except (OSError, VmnodeError) as error:
            os.write(2, f"{argv[0]}: {getattr(error, 'strerror', None) or error}\n".encode("utf-8", "replace"))
        finally:
            os._exit(status)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


_NOT_STARTED = 127


def _converse(body: Callable[[], None], data: bytes, deadline_s: float, what: str) -> tuple[int, bytes, str]:
    """Fork, let the child run `body` with pipes for all three of its streams; its status, stdout and stderr."""
    input_read, input_write = os.pipe2(os.O_CLOEXEC)
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _be_child(body, input_read, output_write, error_write)
    for descriptor in (input_read, output_write, error_write):
        os.close(descriptor)
    try:
        _tell(input_write, data)
        output, complaint = _listen((output_read, error_read), deadline_s, what)
    except BaseException:
        _kill(pid)
        raise
    finally:
        os.close(output_read)
        os.close(error_read)
    status = _reap(pid, _GRACE_S)
    if status is None:
        _kill(pid)
        raise DeadlineExceeded(f"{what}: it does not end")
    return status, output, complaint.decode("utf-8", "replace")


def _kill(pid: int) -> None:
    """Kill a child with all that it started. One that waits for a dead file server for ever is left behind."""
    for kill in (os.kill, os.killpg):  # it may not have its own process group yet
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _reap(pid, _GRACE_S)


def _be_child(body: Callable[[], None], stdin: int, stdout: int, stderr: int) -> NoReturn:
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        body()
        os._exit(0)
    except Exception as error:  # noqa: BLE001 - whatever it is, this process ends here
        os.write(2, (getattr(error, "strerror", None) or ascii(error)).encode())
    finally:
        os._exit(_NOT_STARTED)


def _tell(descriptor: int, data: bytes) -> None:
    try:
        os.write(descriptor, data)
    except BrokenPipeError:  # it does not want to know
        pass
    finally:
        os.close(descriptor)


def _listen(descriptors: Sequence[int], deadline_s: float, what: str) -> list[bytes]:
    """All that the child says on each of them until it has closed all; raises DeadlineExceeded, CommandFailed."""
    until = time.monotonic() + deadline_s
    heard = {descriptor: bytearray() for descriptor in descriptors}
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    still_open = len(heard)
    while still_open:
        ready = poller.poll(max(0.0, until - time.monotonic()) * 1000)
        if not ready:
            raise DeadlineExceeded(f"{what}: no answer within {deadline_s:g} s")
        for descriptor, _ in ready:
            chunk = os.read(descriptor, 65536)
            heard[descriptor] += chunk
            if not chunk:
                poller.unregister(descriptor)
                still_open -= 1
        if max(map(len, heard.values())) > OUTPUT_LIMIT:
            raise CommandFailed(f"{what} printed more than {OUTPUT_LIMIT >> 20} MiB")
    return [bytes(said) for said in heard.values()]


def _reap(pid: int, patience_s: float) -> Optional[int]:
    """The exit status of a child that is about to end, negative for a signal; None if it is not gone in time."""
    descriptor = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(patience_s * 1000):
            return None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(descriptor)
