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

import os
import re
import subprocess
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Callable, Optional, TypeVar

from tests.lab import condor, homes
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
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class Node:
    """A running node. ``boot`` makes one, ``attach`` finds one that another process booted."""

    def __init__(self, name: str) -> None:
        self.name = name
        # Nodes are isolated from each other, so equal addresses would do; different ones read better in logs.
        network = f"198.18.{1 + zlib.crc32(name.encode()) % 254}"
        self.address = f"{network}.2"
        self._world_address = f"{network}.1"
        self._supervisor = 0  # systemd-nspawn, in whose network namespace the world lies
        self._init = 0  # the node's PID 1, as the host numbers it
        self.world = World(self._world_address, 0)
        self._nspawn: Optional[subprocess.Popen[bytes]] = None

    @classmethod
    def boot(cls, suite: str, name: str) -> Node:
        """Boot a fresh node: libvirt's default network is active, HTCondor is configured but not started.

        Raises LabError when the machine cannot boot nodes, when the name is taken, and when the node is not
        up within a minute; nothing of the node is left then.
        """
        if not _NAME.fullmatch(name):
            raise LabError(f"{name!r} is no name for a node: use small letters, digits and hyphens, at most 31")
        require_machine()
        root = image(suite)
        home = homes.claim(name)
        node = cls(name)
        try:
            node._launch(root, home)
            node._find_processes()
            node._wait_until_up()
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
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 60.0, input: Optional[str] = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` as root in the node; raises LabError after ``timeout`` seconds or, with check, if it fails."""
        # Killing nsenter would leave the command running in the node, so the deadline is kept inside.
        deadline = ["timeout", "--kill-after=1", f"{timeout:.3f}"]
        done = subprocess.run(
            [*self.entering(), *deadline, *argv],
            input="" if input is None else input,
            capture_output=True,
            text=True,
            errors="replace",
            env=_ENVIRONMENT,
            check=False,
        )
        command = " ".join(argv)
        if done.returncode in (124, 137):  # what timeout(1) says when it had to end the command, or to kill it
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
            env=_ENVIRONMENT,
        )

    def entering(self) -> list[str]:
        """The words to put before a command so that it runs in the node."""
        return ["nsenter", "--target", str(self._init), *"-m -u -i -n -p -C".split(), "--"]

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
                raise LabError(f"the node {self.name} died while waited for {what}; {self._console()}")
            if time.monotonic() > deadline:
                raise LabError(f"on {self.name}, waited {timeout:g} s in vain for {what}; {self._console()}")
            time.sleep(0.1)

    # The pool

    def install_vmnode(self, checkout: Path) -> None:
        """Install vmnode as its ``make install`` lays it out, and start it as its package would.

        Its outbound target is the world's listener; conf.d/10-lab.toml says so, later files there override it.
        """
        self.world.listen(TARGET_PORT)
        subprocess_make = subprocess.run(
            ["make", "--no-print-directory", "-C", str(checkout), "install", f"DESTDIR={self.path('/')}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if subprocess_make.returncode != 0:
            raise LabError(f"make install in {checkout} failed: {subprocess_make.stdout.strip()[-2000:]}")
        self.write("/etc/vmnode/conf.d/10-lab.toml", self._vmnode_settings())
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

    def _vmnode_settings(self) -> str:
        accel = "kvm" if _has_kvm() else "tcg"
        return (
            f'[network]\ntargets = ["tcp://{self._world_address}:{TARGET_PORT}"]\n\n[kvm]\naccel = "{accel}"\n'
        )

    # Booting

    def _launch(self, root: Path, home: Path) -> None:
        files = {
            "etc/hostname": f"{self.name}\n",
            # Without its own name here every HTCondor daemon waits minutes for DNS.
            "etc/hosts": f"127.0.0.1 localhost\n{self.address} {self.name}\n",
            condor.CONFIG_FILE.lstrip("/"): condor.configuration(self.name, self.address),
        }
        for path, text in files.items():
            target = home / "upper" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        environment: Mapping[str, str] = {
            **_ENVIRONMENT,
            "HOME_DIR": str(home),
            "IMAGE": str(root),
            "CGROUP": str(homes.make_cgroup(self.name)),
            "NAME": self.name,
            "WORLD_ADDRESS": self._world_address,
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

    def _find_processes(self) -> None:
        self.wait_until(self._identify, "systemd as PID 1", BOOT_TIMEOUT_S)

    def _identify(self) -> bool:
        """Look the node's two leading processes up where systemd-nspawn and systemd put themselves."""
        for group in homes.cgroups(self.name):
            supervisors = _processes(group / "supervisor")
            inits = _processes(group / "payload" / "init.scope")
            if supervisors and inits:
                self._supervisor, self._init = supervisors[0], inits[0]
                self.world = World(self._world_address, self._supervisor)
                return True
        return False

    def _wait_until_up(self) -> None:
        self.wait_until(self._has_booted, "the end of its boot", BOOT_TIMEOUT_S)
        self.wait_until(self._network_active, "libvirt's default network", BOOT_TIMEOUT_S)

    def _has_booted(self) -> bool:
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        return state in ("running", "degraded")  # degraded: some unit of the distribution does not like containers

    def _network_active(self) -> bool:
        return "\ndefault\n" in "\n" + self.run(["virsh", "net-list", "--name"], check=False).stdout

    def _console(self) -> str:
        console = homes.NODES / self.name / "console"
        lines = console.read_text(errors="replace").strip().splitlines() if console.exists() else []
        return f"its console ends with: {' | '.join(lines[-3:])}" if lines else "its console is empty"


def _processes(group: Path) -> list[int]:
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, OSError):
        return []


def _has_kvm() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _said(done: subprocess.CompletedProcess[str]) -> str:
    text = (done.stderr.strip() or done.stdout.strip())[-2000:]
    return f"it said: {text}" if text else "it said nothing"
