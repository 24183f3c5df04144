"""The root-only Unix socket at which starters ask for a network, and what is said there (unix(7)).

A packet each way, and one more: a question ("starter slot1_1"), an answer with the namespace's descriptor, and
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
_LEAVE_S = 3.0  # who was accepted is served within this time


class Peer(NamedTuple):
    pid: int
    uid: int


class Connection:
    """The daemon's end of one."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self.idle = False  # nobody waits for us but who may wait for ever
        self._socket = connection

    async def receive(self, deadline_s: Optional[float]) -> str:
        """The next packet; "" if the peer has gone. Raises DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        self.idle = deadline_s is None
        try:
            data = await asyncio.wait_for(loop.sock_recv(self._socket, _QUESTION_LIMIT), deadline_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"process {self.peer.pid}: it said nothing for {deadline_s:g} s") from None
        except OSError:
            return ""
        finally:
            self.idle = False
        return data.decode("utf-8", "replace")

    @property
    def waits(self) -> bool:
        """Whether the peer is still there; for one who has said nothing that was not received."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def send(self, text: str, descriptor: Optional[int] = None) -> None:
        """One packet, with a descriptor where one is given. Raises VmnodeError if the peer has gone."""
        rights = (
            []
            if descriptor is None
            else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]).tobytes())]
        )
        try:
            self._socket.sendmsg([text.encode()], rights)
        except OSError as error:
            raise VmnodeError(f"process {self.peer.pid} did not wait for its network: {error.strerror}") from None


class Client:
    """Asks for a network, and tells when it is no longer needed; without an event loop."""

    def __init__(self, path: Path, question: str, deadline_s: float) -> None:
        """Raises VmnodeError if there is none, or nobody answers."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(deadline_s)
            self._socket.connect(str(path))
            self._socket.send(question.encode())
            answer, descriptors, _, _ = socket.recv_fds(self._socket, _QUESTION_LIMIT, 1)
            for descriptor in descriptors:  # recv_fds takes flags, and forgets them
                os.set_inheritable(descriptor, False)
        except OSError as error:
            self._socket.close()
            hint = "is [accounting] enabled, and does vmnoded run? systemctl status vmnode"
            raise VmnodeError(f"{path}: vmnoded does not answer: {error.strerror or error}", hint) from None
        if not descriptors:
            self._socket.close()
            why = answer.decode("utf-8", "replace").partition(" ")[2] or "it ended before it answered"
            raise VmnodeError(f"vmnoded gives no network: {why}", "journalctl -u vmnode")
        self.namespace = descriptors[0]

    def enter(self) -> None:
        """Move this thread into the network, and say so. Raises VmnodeError."""
        netns.enter(self.namespace)
        with contextlib.suppress(OSError):  # vmnoded is gone: the next one finds us
            self._socket.send(b"entered")

    def ended(self) -> str:
        """Tell that all have left who were inside; the answer. Raises VmnodeError if vmnoded is gone."""
        os.close(self.namespace)
        self._socket.settimeout(_ACCOUNT_S)
        try:
            self._socket.send(b"ended")
            answer = self._socket.recv(_QUESTION_LIMIT).decode()
        except OSError:
            answer = ""
        finally:
            self._socket.close()
        if not answer:
            what = "vmnoded ended before it could tell what was used"
            raise VmnodeError(what, "once it runs again, vmnode accounting jobs shows that")
        return answer


async def ping(path: Path, deadline_s: float) -> str:
    """Whether starters would get a network: "ok", or "no" and why. Raises OSError, DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
        connection.connect(str(path))  # to a Unix socket it does not wait
        connection.send(b"how are you")
        try:
            return (await asyncio.wait_for(loop.sock_recv(connection, _QUESTION_LIMIT), deadline_s)).decode()
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"{path}: no answer within {deadline_s:g} s") from None


class Listener:
    """Calls `serve` for each connection of root's, in a task of its own, until closed."""

    def __init__(self, path: Path, serve: Callable[[Connection], Awaitable[None]]) -> None:
        """Raises OSError."""
        self._serve = serve
        self._connections: dict[asyncio.Future[None], Connection] = {}
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            temporary = path.with_name(f".{path.name}")
            temporary.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                self._socket.bind(str(temporary))
            finally:
                os.umask(before)
            self._socket.listen(_BACKLOG)
            temporary.rename(path)
        except OSError:
            self._socket.close()
            raise
        self._path = path
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError:  # gone already, or no descriptors left: who waits finds the time-out
            return
        accepted.setblocking(False)
        pid, uid, _ = struct.unpack("=iII", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != 0:
            accepted.close()
            return
        connection = Connection(accepted, Peer(pid, uid))
        task = asyncio.ensure_future(self._serve_and_close(connection, accepted))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    async def _serve_and_close(self, connection: Connection, accepted: socket.socket) -> None:
        with accepted:
            await self._serve(connection)

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Accept nobody more, and wait for those who are being served."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        if self._connections:
            busy = [task for task, connection in self._connections.items() if not connection.idle]
            if busy:
                await asyncio.wait(busy, timeout=_LEAVE_S)
            while self._connections:  # wait_for may forget a cancellation (see events.happened)
                for task in self._connections:
                    task.cancel()
                await asyncio.wait(self._connections, timeout=_AGAIN_S)
