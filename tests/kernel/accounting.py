"""A host in miniature that accounts: vmnoded in the test's namespace, a LAN peer and a WAN peer in others.

eth0 (10.0.0.2) ----- far0 (10.0.0.1)      LAN, as the configuration says
eth1 (203.0.113.2) -- far1 (203.0.113.1)   WAN
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.kernel.world import beyond, links, tool, until
from vmnode.accounting import addresses
from vmnode.accounting.ledger import FILE
from vmnode.accounting.query import find
from vmnode.accounting.record import Record
from vmnode.host.starter_socket import FILE as SOCKET

LAN, WAN = "10.0.0.1", "203.0.113.1"
SINK = 9  # discard: the peers take what comes, and say nothing
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Both peers, who know no way to the jobs but through NAT, and drop what comes to SINK without an answer."""
    with beyond("eth0") as lan, beyond("eth1") as wan:
        for number, (pid, far) in enumerate(((lan, LAN), (wan, WAN))):
            near = far[:-1] + "2"
            tool("ip", "address", "add", f"{near}/24", "dev", f"eth{number}")
            inside = ("nsenter", "-t", str(pid), "-n")
            tool(*inside, "ip", "address", "add", f"{far}/24", "dev", f"far{number}")
            tool(
                *inside,
                "nft",
                "add table ip t; add chain ip t c { type filter hook input priority 0; };"
                f" add rule ip t c udp dport {SINK} drop",
            )
        tool("ip", "route", "add", "default", "via", WAN)
        yield


class Vmnoded:
    """The daemon, and the commands that it serves."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.run_dir, self.state_dir = directory / "run", directory / "state"
        self.state_dir.mkdir()
        self.config = directory / "vmnode.toml"
        self.settings = {"enabled": True, "lan": ["10.0.0.0/8"], "sample_s": 1, **settings}
        self.log = directory / "log"
        self.prefix = addresses.prefix(addresses.tag(str(self.run_dir)))
        self.table = f"vmnode{addresses.tag(str(self.run_dir))}"

    def __enter__(self) -> Vmnoded:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is not None:  # what a dead one left is for the next one to remove
            self.start()
        self.stop()

    def configure(self) -> None:
        # json.dumps writes strings, numbers, lists and booleans as TOML has them.
        keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in self.settings.items())
        paths = f'[paths]\nrun_dir = "{self.run_dir}"\nstate_dir = "{self.state_dir}"\n'
        self.config.write_text(f"[health]\nenabled = false\n[accounting]\n{keys}{paths}")

    def start(self, *, serving: bool = True) -> None:
        self.configure()
        argv = [sys.executable, "-m", "vmnode.commands.daemon", "--config", str(self.config)]
        self._before = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
        if serving:
            until(lambda: "accounting: jobs get addresses" in self.said(), 30)

    def reload(self) -> None:
        self.configure()
        self.process.send_signal(signal.SIGHUP)

    def said(self) -> str:
        """What this instance has logged."""
        return self.log.read_text()[self._before :]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """A command in a network of its own, as `vmnode accounting run` has it."""
        argv = [sys.executable, "-m", "vmnode.commands.admin", "--config", str(self.config), "accounting", "run"]
        return subprocess.Popen(
            [*argv, "--json", "--", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str) -> tuple[str, dict[str, Any]]:
        """What it printed, and what it used."""
        ran = self.popen(*command)
        output, account = ran.communicate(timeout=60)
        assert ran.returncode == 0, account
        return output, json.loads(account.splitlines()[-1])

    def records(self) -> list[Record]:
        return list(find(self.state_dir / FILE))

    def jobs_links(self) -> list[str]:
        return [name for name in links() if name.startswith(self.prefix)]

    def elements(self) -> list[str]:
        """The links that our counters know; none while there is no table."""
        asked = subprocess.run(["nft", "-j", "list", "set", "inet", self.table, "wan_out"], capture_output=True)
        listed = json.loads(asked.stdout)["nftables"] if asked.returncode == 0 else []
        return [item["elem"]["val"] for entry in listed for item in entry.get("set", {}).get("elem", [])]

    @property
    def socket(self) -> Path:
        return self.run_dir / SOCKET


def send(address: str, count: int, size: int = 72) -> list[str]:
    """A command that sends UDP datagrams: each has 28 bytes of headers."""
    script = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range({count}): s.sendto(bytes({size}), ({address!r}, {SINK}))
"""
    return [sys.executable, "-c", script]


def after_a_while(directory: Path, *command: str) -> Sequence[str]:
    """A command that makes the file `inside` in a directory, and waits for the file `go` before it does its work."""
    return ["sh", "-c", f"touch {directory}/inside; until [ -e {directory}/go ]; do sleep 0.05; done; {shell(command)}"]


def shell(command: Sequence[str]) -> str:
    return shlex.join(command)
