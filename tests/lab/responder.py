"""Answers datagrams: traffic of a known size in both directions.

A program of its own, started in the world's network namespace: ``responder.py ADDRESS PORT PID``. The answer to a
datagram that begins with four digits has that many bytes. It says "listening" once, and ends with the process PID, the
node's systemd-nspawn, so that it never outlives the node.
"""

from __future__ import annotations

import os
import select
import socket
import sys


def main() -> None:
    address, port, supervisor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    node_ends = os.pidfd_open(supervisor)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        print("listening", flush=True)
        while node_ends not in select.select([server.fileno(), node_ends], [], [])[0]:
            datagram, caller = server.recvfrom(65535)
            server.sendto(bytes(int(datagram[:4])), caller)


if __name__ == "__main__":
    main()
