"""The root-only Unix socket at which starters ask for a network, and what is said there (unix(7)).

One packet each way, then one more: a question ("starter slot1_1"), an answer with the namespace's descriptor, and
"entered". The kernel says who asks: its pid and user cannot be forged.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from vmnode.errors import DeadlineExceeded, VmnodeError
from vmnode.host import netns

FILE = "starter.sock"  # below [paths] run_dir
_QUESTION_LIMIT = 4096  # bytes
_BACKLOG = 512
_AGAIN_S = 1.0
_ACCOUNT_S = 60.0  # more than vmnoded waits for a namespace's end
_LEAVE_S = 3.0  # whoever was let in is served within this time


class Caller(NamedTuple):
    pid: int
    uid: int


class Visit:
    """One caller's connection."""

    def __init__(self, connection: socket.socket, caller: Caller) -> None:
        self.caller = caller
        self.idle = False  # nobody waits for us but who may wait for ever
        self._connection = connection

    async def hear(self, deadline_s: Optional[float]) -> str:
        """The next packet; "" if the caller has gone. Raises DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        self.idle = deadline_s is None
        try:
            data = await asyncio.wait_for(loop.sock_recv(self._connection, _QUESTION_LIMIT), deadline_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"process {self.caller.pid}: it said nothing for {deadline_s:g} s") from None
        except OSError:
            return ""
        finally:
            self.idle = False
        return data.decode("utf-8", "replace")

    @property
    def waits(self) -> bool:
        """Whether the caller is still there; for one who has said nothing that was not heard."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def tell(self, text: str, descriptor: Optional[int] = None) -> None:
        """Send a packet, with a descriptor where one is given. Raises VmnodeError if the caller has gone."""
        rights = (
            []
            if descriptor is None
            else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]).tobytes())]
        )
        try:
            self._connection.sendmsg([text.encode()], rights)
        except OSError as error:
            raise VmnodeError(f"process {self.caller.pid} did not wait for its network: {error.strerror}") from None


class Guest:
    """One who asks at the door for a network, and tells when he is done with it; without an event loop."""

    def __init__(self, path: Path, question: str, deadline_s: float) -> None:
        """Raises VmnodeError if he is sent away, or nobody is there."""
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connection.settimeout(deadline_s)
            self._connection.connect(str(path))
            self._connection.send(question.encode())
            answer, descriptors, _, _ = socket.recv_fds(self._connection, _QUESTION_LIMIT, 1)
            for descriptor in descriptors:  # recv_fds takes flags, and forgets them
                os.set_inheritable(descriptor, False)
        except OSError as error:
            self._connection.close()
            hint = "is [accounting] enabled, and does vmnoded run? systemctl status vmnode"
            raise VmnodeError(f"{path}: vmnoded does not answer: {error.strerror or error}", hint) from None
        if not descriptors:
            self._connection.close()
            why = answer.decode("utf-8", "replace").partition(" ")[2] or "it ended before it answered"
            raise VmnodeError(f"vmnoded gives no network: {why}", "journalctl -u vmnode")
        self.namespace = descriptors[0]

    def enter(self) -> None:
        """Move this thread into the network, and say so. Raises VmnodeError."""
        netns.enter(self.namespace)
        with contextlib.suppress(OSError):  # vmnoded is gone: the next one finds us
            self._connection.send(b"entered")

    def ended(self) -> str:
        """Tell that all have left who were inside; the answer. Raises VmnodeError if vmnoded is gone."""
        os.close(self.namespace)
        self._connection.settimeout(_ACCOUNT_S)
        try:
            self._connection.send(b"ended")
            answer = self._connection.recv(_QUESTION_LIMIT).decode()
        except OSError:
            answer = ""
        finally:
            self._connection.close()
        if not answer:
            what = "vmnoded ended before it could tell what was used"
            raise VmnodeError(what, "once it runs again, vmnode accounting jobs shows that")
        return answer


async def knock(path: Path, deadline_s: float) -> str:
    """What is said at the door to one who asks nothing: "ok", or "no" and why. Raises OSError, DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
        connection.connect(str(path))  # to a Unix socket it does not wait
        connection.send(b"how are you")
        try:
            return (await asyncio.wait_for(loop.sock_recv(connection, _QUESTION_LIMIT), deadline_s)).decode()
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"{path}: no answer within {deadline_s:g} s") from None


class Door:
    """Calls `on_visit` for each caller who is root, in a task of its own, until closed."""

    def __init__(self, path: Path, on_visit: Callable[[Visit], Awaitable[None]]) -> None:
        """Raises OSError."""
        self._on_visit = on_visit
        self._visits: dict[asyncio.Future[None], Visit] = {}
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            temporary = path.with_name(f".{path.name}")
            temporary.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                self._listener.bind(str(temporary))
            finally:
                os.umask(before)
            self._listener.listen(_BACKLOG)
            temporary.rename(path)
        except OSError:
            self._listener.close()
            raise
        self._path = path
        self._loop.add_reader(self._listener, self._somebody_comes)

    def _somebody_comes(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone already, or no descriptors left: who waits finds the time-out
            return
        connection.setblocking(False)
        pid, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != 0:
            connection.close()
            return
        visit = Visit(connection, Caller(pid, uid))
        task = asyncio.ensure_future(self._serve(visit, connection))
        self._visits[task] = visit
        task.add_done_callback(self._visits.pop)

    async def _serve(self, visit: Visit, connection: socket.socket) -> None:
        with connection:
            await self._on_visit(visit)

    async def __aenter__(self) -> Door:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let nobody in, and wait for those who are inside."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if self._visits:
            busy = [task for task, visit in self._visits.items() if not visit.idle]
            if busy:
                await asyncio.wait(busy, timeout=_LEAVE_S)
            while self._visits:  # wait_for may forget a cancellation (see events.happened)
                for task in self._visits:
                    task.cancel()
                await asyncio.wait(self._visits, timeout=_AGAIN_S)
