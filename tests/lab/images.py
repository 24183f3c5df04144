"""Root file systems of worker nodes: HTCondor, libvirt and QEMU as Debian ships them.

A root is built once and never changed: nodes boot from an overlay on top of it. On disk, below CACHE:

    <suite>-<hash of the recipe>            a finished root
    <suite>-<hash of the recipe>.building   being built, by whoever holds the lock; anybody else's is garbage
    <suite>-<hash of the recipe>.log        what apt said
    <suite>.lock                            flock: one build of a suite at a time

A change of the recipe changes the name, so a stale root is never booted.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from tests.lab.cache import CACHE, locked, remove_tree
from tests.lab.errors import LabError
from tests.lab.progress import progress
from tests.lab.requirements import require_machine

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
    "ipset",
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
    "e2fsprogs",
    "faketime",
    "fuse3",
    "iproute2",
    "kmod",
    "less",
    "openssh-client",
    "openssh-server",  # for condor_ssh_to_job
    "procps",
    "rpm",
)

NEIGHBOURS = ("docker.io", "firewalld", "network-manager")
"""Others that write firewall rules or set up links. They do not start by themselves."""

CUSTOMIZE = (
    # The pool must not start before vmnode is installed, or the first ad is one without it.
    'chroot "$1" systemctl disable condor.service libvirt-guests.service ssh.service',
    'chroot "$1" systemctl disable apt-daily.timer apt-daily-upgrade.timer',
    'ln -s /etc/libvirt/qemu/networks/default.xml "$1/etc/libvirt/qemu/networks/autostart/default.xml"',
    # Device nodes of the node's own: with --bind a chmod inside would change the device of the host.
    # /dev/kvm has the mode that systemd and EL give it.
    'echo "c! /dev/kvm 0666 root kvm - 10:232" >"$1/etc/tmpfiles.d/lab-kvm.conf"',
    'sed -i "s,^z /dev/kvm .*,z /dev/kvm 0666 - kvm -," "$1/usr/lib/tmpfiles.d/static-nodes-permissions.conf"',
    'echo "c! /dev/fuse 0666 root root - 10:229" >"$1/etc/tmpfiles.d/lab-fuse.conf"',
    'chroot "$1" useradd --create-home --shell /bin/bash alice',
    # Debian makes it at HTCondor's first start, an RPM when it is installed; on a worker node it is there.
    'chroot "$1" install -d -o condor -g condor /var/lib/condor/execute',
    # A node names itself when it boots; what mmdebstrap copied from the build host is wrong in every node.
    'rm -f "$1/etc/resolv.conf" "$1/etc/hostname" && : >"$1/etc/resolv.conf"',
)

CUSTOMIZE_NEIGHBOURS = (
    'chroot "$1" systemctl disable docker.service docker.socket containerd.service firewalld.service',
    'chroot "$1" systemctl disable NetworkManager.service NetworkManager-wait-online.service',
)


def image(suite: str, more: tuple[str, ...] = ()) -> Path:
    """The root of ``suite``, built first if need be (about a minute, 600 MB, Debian's mirror).

    ``more`` is () or NEIGHBOURS. Raises LabError when the build fails; then, as after a kill, no half-made root is ever
    taken for a whole one.
    """
    if suite not in APT_OPTIONS:
        raise LabError(f"no image is called {suite!r}; there are: {', '.join(SUITES)}")
    return root_made_by(_command(suite, more))


def root_made_by(command: list[str]) -> Path:
    """The root that ``command`` makes, built first if need be; its last word is the suite. Raises LabError."""
    suite = command[-1]
    root = CACHE / f"{suite}-{_recipe_hash(command)}"
    if root.is_dir():
        return root
    require_machine()
    with locked(suite, f"waiting for another build of {suite}") as lock:
        if not root.is_dir():
            _build(command, root, lock)
    return root


def _command(suite: str, more: tuple[str, ...]) -> list[str]:
    return [
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(PACKAGES + more)}",
        *(f"--aptopt={option}" for option in APT_OPTIONS[suite]),
        *(f"--customize-hook={script}" for script in CUSTOMIZE + (CUSTOMIZE_NEIGHBOURS if more else ())),
        suite,
    ]


def _recipe_hash(command: list[str]) -> str:
    return hashlib.sha256(json.dumps(command).encode()).hexdigest()[:12]


def _build(command: list[str], root: Path, lock: int) -> None:
    building = root.with_name(f"{root.name}.building")
    log = root.with_name(f"{root.name}.log")
    for abandoned in CACHE.glob(f"{command[-1]}-*.building"):
        remove_tree(abandoned)
    try:
        with progress(f"building the {command[-1]} image"), open(log, "w") as output:
            _run_build([*command, str(building)], output.fileno(), lock, log)
        building.rename(root)
    finally:
        remove_tree(building)


def _run_build(command: list[str], output: int, lock: int, log: Path) -> None:
    # In namespaces of its own: mmdebstrap mounts the host's /proc, /sys and devices in the tree, and with these
    # namespaces all mounts and processes end, also when this process is killed. It inherits the lock, so nobody
    # builds meanwhile.
    namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    build = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *namespaces, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(lock,),
        start_new_session=True,
    )
    try:
        status = build.wait()
    except BaseException:
        build.kill()
        build.wait()
        raise
    if status != 0:
        suite = command[-2]
        raise LabError(f"building the {suite} image failed: {_first_error(log)}; apt's whole output is in {log}")


def _first_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E:")] or lines[-1:] or ["no output"]
    return errors[0]
