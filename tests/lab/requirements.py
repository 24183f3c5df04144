"""What the lab needs of the machine it runs on, named as the packages that bring it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.lab.errors import LabError

TOOLS = {
    "ip": "iproute2",
    "make": "make",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
}

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""The nodes are Debian on every host: Ubuntu's apt does not trust Debian's archive by itself."""


def missing_packages() -> list[str]:
    """The packages of Debian and Ubuntu that are still to be installed, sorted."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if not KEYRING.exists():
        missing.add("debian-archive-keyring")
    return sorted(missing)


def require_machine() -> None:
    """Raise LabError unless this process can build and boot nodes."""
    if os.geteuid() != 0:
        raise LabError("the lab boots whole nodes and so needs root: run it with sudo")
    missing = missing_packages()
    if missing:
        raise LabError(f"the lab needs packages that are not installed: apt-get install {' '.join(missing)}")
