"""The unit and kernel tests on the oldest Python and pyroute2 that we support.

Debian 11 has exactly what EL 9 and EPEL 9 have: Python 3.9 and pyroute2 0.5.14. The root is built once and
never changed; the tests run in namespaces of their own, on an overlay that is gone with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab.cache import CACHE
from tests.lab.images import SUITES, image, root_made_by

CHECKOUT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "acl",
    "bindfs",
    "dnsmasq-base",
    "fuse3",
    "gawk",
    "iproute2",
    "ipset",
    "iptables",
    "nftables",
    "procps",
    "python3",
    "python3-libvirt",
    "python3-psutil",
    "python3-pyroute2",
    "python3-systemd",
    "qemu-utils",
    "tcpdump",
)

FROM_PYPI = (
    "exceptiongroup",
    "htcondor",
    "hypothesis",
    "pytest<9",
    "pytest-timeout",
    "pytest-xdist",
    "rich",
    "tomli",
    "typing_extensions",
)
"""What Debian 11 lacks or has too old a version of. The host's pip fetches it: the root has none."""

LEFT_OUT = {
    "nft_owner": "Debian 11's nft 0.9.8 knows neither tables with an owner nor counters in sets, EL 9's 1.0.9 does"
}
"""Markers of tests that this root cannot run, and why."""

# pivot_root, since a test that returns to its mount namespace would find itself outside of a chroot.
ENTER = """
mount -t tmpfs tmpfs "$SCRATCH"
mkdir "$SCRATCH/upper" "$SCRATCH/work" "$SCRATCH/root"
mount -t overlay overlay -o "lowerdir=$IMAGE,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" "$SCRATCH/root"
cd "$SCRATCH/root"
mkdir -p srv/vmnode
mount --bind "$CHECKOUT" srv/vmnode
mkdir -p var/cache/vmnode-lab
mount --bind "$CACHE" var/cache/vmnode-lab
mount -o remount,bind,ro var/cache/vmnode-lab
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs tmpfs tmp
ip link set lo up
echo "127.0.0.1 localhost $(hostname)" >etc/hosts
: >etc/resolv.conf
pivot_root . mnt
umount -l /mnt
cd /srv/vmnode
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis python3 -m pytest -p no:cacheprovider "$@" ||
    exit $?  # no exec: this shell is PID 1, and collects the orphans that some tests make
"""


def run_tests() -> int:
    """Run tests/unit and tests/kernel there; returns pytest's exit status. Raises LabError."""
    root = root_made_by(_command())
    for suite in SUITES:  # some tests need HTCondor's own script, which is in the nodes' roots
        image(suite)
    for marker, why in LEFT_OUT.items():
        print(f"Left out: the tests marked {marker} ({why}).")
    said = (
        "import sys, pyroute2.config.version as p; print('Python', sys.version.split()[0], 'pyroute2', p.__version__)"
    )
    print(
        subprocess.run(["chroot", str(root), "python3", "-c", said], capture_output=True, text=True).stdout, flush=True
    )
    markers = " and ".join(f"not {marker}" for marker in LEFT_OUT)
    with tempfile.TemporaryDirectory(prefix="vmnode-lab-") as scratch:
        tests = subprocess.run(
            [
                *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
                *("sh", "-euc", ENTER, "old-python", "-n", "2", "-m", markers, "tests/unit", "tests/kernel"),
            ],
            env={**os.environ, "IMAGE": str(root), "CACHE": str(CACHE), "CHECKOUT": str(CHECKOUT), "SCRATCH": scratch},
        )
    return tests.returncode


def _command() -> list[str]:
    os.environ["PYTHON"] = sys.executable  # by name, so that another checkout's recipe is the same
    target = '--target "$1/usr/local/lib/python3.9/dist-packages" --python-version 3.9 --only-binary=:all:'
    wanted = " ".join(f"'{name}'" for name in FROM_PYPI)
    return [
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        f'--customize-hook="$PYTHON" -m pip install --quiet {target} {wanted}',
        "bullseye",
    ]
