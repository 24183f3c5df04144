"""What lies beyond a node's uplink: the peer of its default route, and nothing more.

The world is the network namespace of the node's systemd-nspawn process. Nothing in it is routed on, so a
node reaches what is listened for here, and never the host or its network.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lab.errors import LabError

LISTENER = Path(__file__).with_name("listener.py")
RESPONDER = Path(__file__).with_name("responder.py")


class World:
    """The other end of a node's uplink; a port that nobody listens on refuses."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.supervisor = 0  # the pid of systemd-nspawn; known once the node has been launched
        self._listeners: dict[int, subprocess.Popen[str]] = {}
        self._responders: list[subprocess.Popen[str]] = []

    def listen(self, port: int) -> None:
        """Accept (and close) TCP connections to ``port`` from now on."""
        if port in self._listeners:
            return
        self._listeners[port] = self._serve(LISTENER, self.address, port)

    def respond(self, address: str, port: int) -> None:
        """Answer datagrams to ``port`` of ``address``, which is the world's from now on (responder.py)."""
        if address != self.address:
            subprocess.run([*self._entering(), "ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        self._responders.append(self._serve(RESPONDER, address, port))

    def _serve(self, program: Path, address: str, port: int) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [*self._entering(), *(sys.executable, "-I", "-S", str(program), address, str(port), str(self.supervisor))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert server.stdout is not None and server.stderr is not None
        if server.stdout.readline() != "listening\n":
            raise LabError(f"nothing can listen on {address}:{port}: {server.communicate()[1].strip()}")
        return server

    def _entering(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.supervisor}/ns/net"]

    def refuse(self, port: int) -> None:
        """Answer connections to ``port`` with a reset from now on."""
        listener = self._listeners.pop(port, None)
        if listener is not None:
            listener.terminate()
            listener.communicate()

    def close(self) -> None:
        """Stop listening everywhere."""
        for port in list(self._listeners):
            self.refuse(port)
        while self._responders:
            responder = self._responders.pop()
            responder.terminate()
            responder.communicate()
