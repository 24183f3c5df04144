"""A worker node with a real systemd, libvirt and HTCondor, booted in a container within seconds.

    with Node.boot("trixie", "faults") as node:
        node.install_vmnode(checkout)
        node.start_condor()
        node.run(["virsh", "net-destroy", "default"])

A node is as isolated as a container with all capabilities can be: own mounts, processes, devices and
network. It shares the kernel, and so the clock and the kernel's modules. What exists on the host for it,
and how that is removed, is in homes.py.
"""

from __future__ import annotations

import re
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Callable, Optional, TypeVar

from tests.lab import homes
from tests.lab.configuration import CONDOR_FILE, VMNODE_FILE, condor_configuration, vmnode_configuration
from tests.lab.errors import LabError
from tests.lab.images import image
from tests.lab.requirements import require_machine
from tests.lab.world import World

T = TypeVar("T")

LAUNCH = Path(__file__).with_name("launch.sh")
BOOT_TIMEOUT_S = 60.0
TARGET_PORT = 9618
"""Where the world listens for vmnode's outbound check: the collector's port, as on a real pool."""

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")  # a host name, and systemd-nspawn's notion of a machine name
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class Node:
    """A running node. ``boot`` makes one, ``attach`` finds one that another process booted."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise LabError(f"{name!r} is no name for a node: use small letters, digits and hyphens, at most 31")
        self.name = name
        # Nodes are isolated from each other, so equal addresses would do; different ones read better in logs.
        network = f"198.18.{1 + zlib.crc32(name.encode()) % 254}"
        self.address = f"{network}.2"
        self.world = World(f"{network}.1")
        self._supervisor = 0  # systemd-nspawn, in whose network namespace the world lies
        self._init = 0  # the node's PID 1, as the host numbers it
        self._nspawn: Optional[subprocess.Popen[bytes]] = None

    @classmethod
    def boot(cls, suite: str, name: str, more: tuple[str, ...] = ()) -> Node:
        """Boot a fresh node: libvirt's default network is active, HTCondor is configured but not started.

        ``more`` are the packages that image() takes.
        Raises LabError when the machine cannot boot nodes, when the name is taken, and when the node is not
        up within a minute; nothing of the node is left then.
        """
        require_machine()
        node = cls(name)
        root = image(suite, more)
        home = homes.claim(name)
        try:
            node._launch(root, home)
            node.wait_until(node._identify, "systemd as PID 1", BOOT_TIMEOUT_S)
            node.wait_until(node._has_booted, "the end of its boot", BOOT_TIMEOUT_S)
            node.wait_until(node._network_active, "libvirt's default network", BOOT_TIMEOUT_S)
        except BaseException:
            node.stop()
            raise
        return node

    @classmethod
    def attach(cls, name: str) -> Node:
        """The running node ``name``; raises LabError if there is none."""
        node = cls(name)
        if not node._identify():
            raise LabError(f"no node {name} is running")
        return node

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Pull the plug and remove every trace; also good for a node that is already down."""
        self.world.close()
        homes.remove(self.name)
        if self._nspawn is not None:
            self._nspawn.wait()

    def detach(self) -> None:
        """Let the node outlive this process: it belongs to itself until it is powered off or stopped."""
        homes.give(homes.NODES / self.name, self._supervisor)

    # Inside the node

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60.0,
        input: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` as root in the node and return what it said.

        Raises LabError when it does not end within ``timeout`` seconds and, with ``check``, when it fails.
        """
        # Killing nsenter would leave the command running in the node, so the deadline is kept inside.
        deadline = ["timeout", "--kill-after=1", f"{timeout:.3f}"]
        began = time.monotonic()
        done = subprocess.run(
            [*self.entering(), *deadline, *argv],
            input=input,
            capture_output=True,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
            check=False,
        )
        command = " ".join(argv)
        if done.returncode in (124, 137) and time.monotonic() - began >= timeout:  # timeout(1) ended or killed it
            raise LabError(f"on {self.name}, {command!r} did not end within {timeout:g} s; {_said(done)}")
        if check and done.returncode != 0:
            raise LabError(f"on {self.name}, {command!r} failed with status {done.returncode}; {_said(done)}")
        return done

    def popen(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start ``argv`` as root in the node, with pipes; killing the returned process kills the command."""
        return subprocess.Popen(
            [*self.entering(), "setpriv", "--pdeathsig", "KILL", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
        )

    def entering(self) -> list[str]:
        """The words to put before a command so that it runs in the node."""
        return ["nsenter", "--target", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", "--"]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of root's in the node, and the directories above it that are missing."""
        self.run(["install", "-D", "-m", f"{mode:o}", "/dev/stdin", path], input=text)

    def read(self, path: str) -> str:
        """The text of a file in the node."""
        return self.run(["cat", path]).stdout

    def path(self, path: str) -> Path:
        """Where the host sees ``path`` of the node, tmpfs included. Do not follow absolute links from there."""
        return Path(f"/proc/{self._init}/root") / path.lstrip("/")

    def wait_until(self, predicate: Callable[[], Optional[T]], what: str, timeout: float = 30.0) -> T:
        """The first true value of ``predicate``, asked ten times a second.

        Raises LabError when the time is up, or at once when the node itself has died.
        """
        deadline = time.monotonic() + timeout
        while True:
            value = predicate()
            if value:
                return value
            if self._nspawn is not None and self._nspawn.poll() is not None:
                raise LabError(f"the node {self.name} died during the wait for {what}{self._console()}")
            if time.monotonic() > deadline:
                raise LabError(f"on {self.name}, waited {timeout:g} s in vain for {what}{self._console()}")
            time.sleep(0.1)

    # The pool

    def install_vmnode(self, checkout: Path) -> None:
        """Install vmnode as its ``make install`` lays it out, and start it as its package would.

        Its outbound target is the world's listener (VMNODE_FILE says so).
        """
        self.world.listen(TARGET_PORT)
        made = subprocess.run(
            ["make", "--no-print-directory", "-C", str(checkout), "install", f"DESTDIR={self.path('/')}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise LabError(f"make install in {checkout} failed: {made.stdout.strip()[-2000:]}")
        self.write(VMNODE_FILE, vmnode_configuration(f"tcp://{self.world.address}:{TARGET_PORT}"))
        for command in (
            "python3 -m compileall -q /usr/lib/vmnode",
            "systemd-sysusers",
            "systemd-tmpfiles --create",
            "systemctl daemon-reload",
            "systemctl enable --now vmnode",
        ):
            self.run(command.split())

    def start_condor(self) -> None:
        """Start HTCondor and wait until the collector lists the node's slot."""
        self.run(["systemctl", "start", "condor"])
        self.wait_until(self._slots, "the slots in condor_status", timeout=90)

    def _slots(self) -> str:
        return self.run(["condor_status", "-af", "Name"], check=False).stdout.strip()

    # Booting

    def _launch(self, root: Path, home: Path) -> None:
        files = {
            "etc/hostname": f"{self.name}\n",
            # Without its own name here every HTCondor daemon waits minutes for DNS.
            "etc/hosts": f"127.0.0.1 localhost\n{self.address} {self.name}\n",
            CONDOR_FILE.lstrip("/"): condor_configuration(self.name, self.address),
        }
        for path, text in files.items():
            target = home / "upper" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        environment = {
            **ENVIRONMENT,
            "HOME_DIR": str(home),
            "IMAGE": str(root),
            "CGROUP": str(homes.make_cgroup(self.name)),
            "NAME": self.name,
            "WORLD_ADDRESS": self.world.address,
            "NODE_ADDRESS": self.address,
        }
        with open(home / "console", "wb") as console:
            self._nspawn = subprocess.Popen(
                ["unshare", "--mount", "--net", "--propagation=private", "sh", str(LAUNCH)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=environment,
                start_new_session=True,
            )

    def _identify(self) -> bool:
        """Look the node's two leading processes up where systemd-nspawn and systemd put themselves."""
        for group in homes.cgroups(self.name):
            supervisors = _processes(group / "supervisor")
            inits = _processes(group / "payload" / "init.scope")
            if supervisors and inits:
                self._supervisor, self._init = supervisors[0], inits[0]
                self.world.supervisor = self._supervisor
                return True
        return False

    def _has_booted(self) -> bool:
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        return state in ("running", "degraded")  # degraded: some unit of the distribution does not like containers

    def _network_active(self) -> bool:
        return "\ndefault\n" in "\n" + self.run(["virsh", "net-list", "--name"], check=False).stdout

    def _console(self) -> str:
        console = homes.NODES / self.name / "console"
        lines = console.read_text(errors="replace").strip().splitlines() if console.exists() else []
        return f"; its console ends with: {' | '.join(lines[-3:])}" if lines else ""


def _processes(group: Path) -> list[int]:
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:  # not there yet, or no longer
        return []


def _said(done: subprocess.CompletedProcess[str]) -> str:
    text = (done.stderr.strip() or done.stdout.strip())[-2000:]
    return f"it said: {text}" if text else "it said nothing"
