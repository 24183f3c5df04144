"""Root file systems of worker nodes: HTCondor, libvirt and QEMU as Debian ships them.

A root is built once and never changed: nodes boot from an overlay on top of it. On disk, below CACHE:

    <suite>-<hash of the recipe>            a finished root
    <suite>-<hash of the recipe>.building   being built, by whoever holds the lock; anybody else's is garbage
    <suite>-<hash of the recipe>.log        what apt said
    <suite>.lock                            flock: one build of a suite at a time

A change of the recipe changes the name, so a stale root is never booted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.progress import progress
from tests.lab.requirements import require_machine

CACHE = Path(os.environ.get("VMNODE_LAB_CACHE", "/var/cache/vmnode-lab"))

APT_OPTIONS: dict[str, tuple[str, ...]] = {
    "trixie": (),  # Debian 13: HTCondor 23.9, libvirt 11.3, Python 3.13
    # Debian's next: HTCondor 25.14, Python 3.14. Its Release file may be past its date on a mirror.
    "forky": ('Acquire::Check-Valid-Until "false"',),
}
SUITES = tuple(APT_OPTIONS)

PACKAGES = (
    # what a worker node runs
    "condor-vm-gahp",
    "dbus",
    "dnsmasq-base",
    "ipxe-qemu",
    "iptables",
    "libvirt-clients",
    "libvirt-daemon-system",
    "minicondor",
    "nftables",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
    "systemd",
    # what vmnode needs
    "python3",
    "python3-libvirt",
    "python3-psutil",
    "python3-pyroute2",
    "python3-rich",
    "python3-systemd",
    # what people and tests need
    "bindfs",
    "faketime",
    "fuse3",
    "iproute2",
    "kmod",
    "less",
    "procps",
    "rpm",
)

CUSTOMIZE = (
    # The pool must not start before vmnode is installed, or the first ad is one without it.
    'chroot "$1" systemctl disable condor.service libvirt-guests.service',
    'chroot "$1" systemctl disable apt-daily.timer apt-daily-upgrade.timer',
    'ln -s /etc/libvirt/qemu/networks/default.xml "$1/etc/libvirt/qemu/networks/autostart/default.xml"',
    # Device nodes of the node's own: with --bind a chmod inside would change the device of the host.
    "printf '%s\\n' 'c! /dev/kvm 0660 root kvm - 10:232' 'c! /dev/fuse 0666 root root - 10:229'"
    ' >"$1/etc/tmpfiles.d/lab-devices.conf"',
    'chroot "$1" useradd --create-home --shell /bin/bash alice',
    # A node names itself when it boots; what mmdebstrap copied from the build host is wrong in every node.
    'rm -f "$1/etc/resolv.conf" "$1/etc/hostname" && : >"$1/etc/resolv.conf"',
)


def image(suite: str) -> Path:
    """The root of ``suite``, built first if need be (about a minute, 600 MB, Debian's mirror).

    Raises LabError when the build fails; then, as after a kill, no half-made root is ever taken for a whole one.
    """
    if suite not in APT_OPTIONS:
        raise LabError(f"no image is called {suite!r}; there are: {', '.join(SUITES)}")
    root = CACHE / f"{suite}-{_recipe_hash(suite)}"
    if root.is_dir():
        return root
    require_machine()
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(suite) as lock:
        if not root.is_dir():
            _build(suite, root, lock)
    return root


def _command(suite: str) -> list[str]:
    return [
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        *(f"--aptopt={option}" for option in APT_OPTIONS[suite]),
        *(f"--customize-hook={script}" for script in CUSTOMIZE),
        suite,
    ]


def _recipe_hash(suite: str) -> str:
    return hashlib.sha256(json.dumps(_command(suite)).encode()).hexdigest()[:12]


@contextmanager
def _locked(suite: str) -> Iterator[int]:
    """Hold the build lock of ``suite``; yields its file descriptor."""
    with open(CACHE / f"{suite}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress(f"waiting for another build of {suite}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _build(suite: str, root: Path, lock: int) -> None:
    building = root.with_name(f"{root.name}.building")
    log = root.with_name(f"{root.name}.log")
    remove_tree(building)
    try:
        with progress(f"building the {suite} image"), open(log, "w") as output:
            _run_build([*_command(suite), str(building)], output.fileno(), lock, log)
        building.rename(root)
    finally:
        remove_tree(building)


def _run_build(command: list[str], output: int, lock: int, log: Path) -> None:
    # The builder inherits the lock: should we be killed, nobody builds while it still winds down.
    build = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(lock,),
        start_new_session=True,
    )
    try:
        status = build.wait()
    except BaseException:
        os.killpg(build.pid, signal.SIGTERM)
        build.wait()
        raise
    if status != 0:
        raise LabError(f"building {command[-2]} failed: {_last_error(log)}; apt's whole output is in {log}")


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E:")] or lines or ["no output"]
    return errors[-1]


def remove_tree(tree: Path) -> None:
    """Remove ``tree`` if it is there, without ever crossing into something mounted below it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=True)
