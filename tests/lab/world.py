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


class World:
    """The other end of a node's uplink; a port that nobody listens on refuses."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.supervisor = 0  # the pid of systemd-nspawn; known once the node has been launched
        self._listeners: dict[int, subprocess.Popen[str]] = {}

    def listen(self, port: int) -> None:
        """Accept (and close) TCP connections to ``port`` from now on."""
        if port in self._listeners:
            return
        listener = subprocess.Popen(
            [
                "nsenter",
                f"--net=/proc/{self.supervisor}/ns/net",
                *(sys.executable, "-I", "-S", str(LISTENER), self.address, str(port), str(self.supervisor)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert listener.stdout is not None and listener.stderr is not None
        if listener.stdout.readline() != "listening\n":
            raise LabError(f"nothing can listen on {self.address}:{port}: {listener.communicate()[1].strip()}")
        self._listeners[port] = listener

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
