"""A host's network in miniature, made with the system's own tools inside of the test's network namespace.

virbr0 (192.168.122.1) ---- dnsmasq, the probe        the test's namespace is the "host"
eth0 (10.0.0.2) ----------- far0 (10.0.0.1)           another namespace is the "world"
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

from tests.unit import samples
from vmnode.host.libvirt import Lease, VirtualNetwork

GATEWAY = "192.168.122.1"
FAR, PORT = "10.0.0.1", 9618


def tool(*argv: str) -> str:
    """What a system tool prints; raises if it fails."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout


def script(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, check=True, text=True, timeout=20)


def links() -> dict[str, Any]:
    """The links of the namespace by name, as iproute2 sees them."""
    return {link["ifname"]: link for link in json.loads(tool("ip", "-j", "-d", "link"))}


def tables() -> list[str]:
    return tool("nft", "list", "tables").splitlines()


def until(true: Callable[[], object], deadline_s: float = 5.0) -> None:
    """Wait for something that happens in the background."""
    give_up = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.02)


def make_bridge(name: str = "virbr0", address: str = f"{GATEWAY}/24", *options: str) -> int:
    """A bridge as libvirt makes it, but without spanning tree unless `options` say so; returns its index."""
    tool("ip", "link", "add", name, "type", "bridge", *(options or ("forward_delay", "0")))
    tool("ip", "address", "add", address, "dev", name)
    tool("ip", "link", "set", name, "up")
    return int(links()[name]["ifindex"])


@contextlib.contextmanager
def running(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program for as long as the block lasts."""
    child = subprocess.Popen(argv, text=True, **options)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def beyond(link: str) -> Iterator[int]:
    """Another namespace, at the other end of a new veth `link`; the pid of a process in it."""
    far = f"far{link[-1]}"
    with running(["unshare", "--net", "sh", "-c", "echo ready; exec sleep 600"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        tool("ip", "link", "add", link, "type", "veth", "peer", "name", far, "netns", str(holder.pid))
        tool("ip", "link", "set", link, "up")
        for words in (("link", "set", "lo", "up"), ("link", "set", far, "up")):
            tool("nsenter", "-t", str(holder.pid), "-n", "ip", *words)
        try:
            yield holder.pid
        finally:
            subprocess.run(["ip", "link", "delete", link], capture_output=True, timeout=20)


@contextlib.contextmanager
def outside() -> Iterator[int]:
    """The world beyond eth0, which accepts connections on FAR:PORT and knows no way back to guests but through NAT."""
    listen = (
        f"import socket; s = socket.create_server(({FAR!r}, {PORT})); print('ready', flush=True)\nwhile 1: s.accept()"
    )
    with beyond("eth0") as pid:
        tool("ip", "address", "add", "10.0.0.2/24", "dev", "eth0")
        inside = ("nsenter", "-t", str(pid), "-n")
        tool(*inside, "ip", "address", "add", f"{FAR}/24", "dev", "far0")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        script(
            "table ip libvirt_network { chain guest_nat { type nat hook postrouting priority 100;"
            " ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 counter masquerade\n}\n}"
        )
        with running([*inside, sys.executable, "-c", listen], stdout=subprocess.PIPE) as listener:
            assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
            yield pid


class Dnsmasq:
    """A real dnsmasq on the bridge, with the options that libvirt gives it."""

    def __init__(self, directory: Path, first: str, last: str, *options: str, namespace: Sequence[str] = ()) -> None:
        self.range = (first, last)
        self.lease_file = directory / f"leases-{first}"
        self.log = directory / f"log-{first}"
        self._argv = [
            *namespace,
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--log-facility=" + str(self.log),
            "--log-dhcp",
            "--pid-file=",
            "--user=root",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--except-interface=lo",
            "--dhcp-no-override",
            "--dhcp-authoritative",
            f"--dhcp-range={first},{last},255.255.255.0,3600",
            f"--dhcp-leasefile={self.lease_file}",
            *(options or ("--no-ping",)),
        ]

    def __enter__(self) -> Dnsmasq:
        self.process = subprocess.Popen(self._argv)
        until(lambda: self.log.exists() and "started" in self.log.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def leases(self) -> list[Lease]:
        """What dnsmasq says it leased: expiry, MAC address, address, name, client id."""
        lines = self.lease_file.read_text().splitlines() if self.lease_file.exists() else []
        fields = [line.split() for line in lines]
        return [Lease(mac=words[1], address=words[2], expires=int(words[0])) for words in fields]

    def network(self) -> VirtualNetwork:
        """The network as libvirt would describe it at this moment."""
        return samples.network(ranges=[self.range], leases=self.leases())
