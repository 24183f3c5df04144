"""Accepts TCP connections on a port of the world and closes them: what a node reaches when it reaches out.

A program of its own, started in the world's network namespace: ``listener.py ADDRESS PORT PID``. It says
"listening" once, and ends with the process PID, the node's systemd-nspawn, so that it never outlives the node.
"""

from __future__ import annotations

import os
import select
import socket
import sys


def main() -> None:
    address, port, supervisor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    node_ends = os.pidfd_open(supervisor)
    with socket.create_server((address, port)) as server:
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([server.fileno(), node_ends], [], [])
            if node_ends in ready:
                return
            server.accept()[0].close()


if __name__ == "__main__":
    main()
