"""A guest that VM-universe jobs boot: a Linux of a few megabytes that keeps the contract of real worker images.

It mounts /dev/vdb at /mnt/user, runs /mnt/user/run-job as root in a stripped environment, and powers off. Two things
more, so that a test can prove what happened: /mnt/user/exit-status, and a mark in the last sector of the boot disk.
It wants a BIOS, virtio devices and MEMORY_MIB, and boots within seconds even where QEMU has to emulate the processor.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Union

from tests.lab.errors import LabError
from tests.lab.images import root_made_by

MEMORY_MIB = 96
"""What to give it. In less than 72 its kernel cannot unpack itself: it resets at once, or hangs."""

IMAGE_SIZE = "32M"
IO_SIZE = "4M"
SECTOR = 512
MARK = b"booted"  # as INIT writes it

PACKAGES = (
    # what the guest is made of
    "busybox-static",
    "linux-image-cloud-amd64",
    "syslinux-common",
    # what makes it
    "base-files",  # /proc and /tmp, which syslinux needs
    "bash",
    "coreutils",
    "cpio",
    "dash",  # /bin/sh, by which syslinux calls mtools
    "fdisk",
    "findutils",
    "gzip",
    "kmod",
    "mtools",
    "syslinux",
)

MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4")
"""What the guest loads, and what these need; those that are built into the kernel are not missed."""

# Process 1 of the guest. What it says goes to the serial console, if there is one.
INIT = r"""#!/bin/sh
export PATH=/sbin:/usr/sbin:/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "$module"
done </modules
ip link set lo up

# Where no partition lies: what is written here tells an overlay from its base.
echo booted | dd of=/dev/vda bs=512 seek=$(($(cat /sys/block/vda/size) - 1)) conv=sync,fsync 2>/dev/null
echo "guest: booted in $(cut -d ' ' -f 1 /proc/uptime) s"

if [ -e /sys/class/net/eth0 ]; then
    # A new port of libvirt's bridge forwards after 4 s, and dnsmasq takes 3 s for a MAC address that it does not know.
    udhcpc -i eth0 -n -q -t 20 -T 1 -s /lease
fi

if [ ! -b /dev/vdb ]; then
    echo "guest: no /dev/vdb, so no job"
    sleep 2
elif mount /dev/vdb /mnt/user; then
    cd /
    env -i PATH=/sbin:/usr/sbin:/bin:/usr/bin USER=root PWD=/ LANG=en_US.UTF-8 /mnt/user/run-job \
        </dev/null >>/mnt/user/run-job.log 2>&1
    status=$?
    echo "$status" >/mnt/user/exit-status
    case $status in
    126 | 127) echo "run-job: $(tail -n 1 /mnt/user/run-job.log)" >/mnt/user/run-job-failure.log ;;
    esac
    echo "guest: run-job ended with $status"
    kill -9 -1  # what it left running
    sync
    umount -r /mnt/user
else
    echo "guest: cannot mount /dev/vdb"
fi
poweroff -f
"""

# What udhcpc runs at every change of its lease.
LEASE = r"""#!/bin/sh
case $1 in
deconfig) ip link set "$interface" up ;;
bound)
    ip address add "$ip/$mask" dev "$interface"
    [ -z "$router" ] || ip route add default via "${router%% *}"
    for server in $dns; do
        echo "nameserver $server"
    done >/etc/resolv.conf
    echo "guest: has $ip"
    ;;
esac
"""

SYSLINUX = """\
DEFAULT guest
LABEL guest
    LINUX vmlinuz
    INITRD initrd
    APPEND quiet console=tty0 console=ttyS0
"""

# Runs in the root that has PACKAGES unpacked, not configured, so that no tool of the host's is used.
BUILD = r"""
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
kernel=$(basename /lib/modules/*)
depmod "$kernel"

cd /guest
mkdir -p bin dev etc lib mnt/user proc root sbin sys tmp usr/bin usr/sbin
chmod 0755 init lease
cp /bin/busybox bin/busybox
for link in $(/bin/busybox --list-full); do
    [ -e "$link" ] || ln -s /bin/busybox "$link"
done
modprobe --set-version "$kernel" --show-depends --all $MODULES | while read -r verb module; do
    name=lib/$(basename "$module")
    if [ "$verb" = insmod ] && [ ! -e "$name" ]; then  # not builtin, not had before
        cp "$module" "$name"
        echo "/$name" >>modules
    fi
done
find . | cpio --quiet -o -H newc | gzip -9 >/initrd

# The partition ends a megabyte before the disk does.
cd /
truncate -s "$IMAGE_SIZE" guest.raw
sectors=$(($(stat -c %s guest.raw) / 512 - 4096))
echo "start=2048, size=$sectors, type=e, bootable" | sfdisk --quiet --label dos guest.raw
dd if=/usr/lib/syslinux/mbr/mbr.bin of=guest.raw conv=notrunc status=none
mformat -i guest.raw@@1M -T "$sectors" -h 64 -s 32 -H 2048 ::
mcopy -i guest.raw@@1M "/boot/vmlinuz-$kernel" ::vmlinuz
mcopy -i guest.raw@@1M initrd syslinux.cfg ::
syslinux --install --offset $((2048 * 512)) guest.raw
"""


def guest_image() -> Path:
    """The guest's boot disk, raw; built first if need be (about ten seconds, 220 MB, Debian's mirror).

    It is shared, so boot an overlay on it or a copy. Raises LabError when the build fails.
    """
    return root_made_by(_command()) / "guest.raw"


def has_booted(disk: Path) -> bool:
    """Whether a guest has booted from ``disk``, which is raw (qemu-img convert), and has written to it."""
    with open(disk, "rb") as file:
        file.seek(-SECTOR, os.SEEK_END)
        return file.read(len(MARK)) == MARK


def io_disk(where: Path, run_job: str, inputs: Mapping[str, Union[str, bytes]] = {}) -> None:
    """Make the guest's second disk, raw ext2: ``run_job`` as its executable, ``inputs`` in input/, and output/."""
    with tempfile.TemporaryDirectory(prefix="vmnode-lab-") as temporary:
        tree = Path(temporary)
        (tree / "input").mkdir()
        (tree / "output").mkdir()
        (tree / "run-job").write_text(run_job)
        (tree / "run-job").chmod(0o755)
        for name, content in inputs.items():
            (tree / "input" / name).write_bytes(content.encode() if isinstance(content, str) else content)
        command = ["mke2fs", "-q", "-F", "-t", "ext2", "-d", str(tree), str(where), IO_SIZE]
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if made.returncode != 0:
        raise LabError(f"no I/O disk of {IO_SIZE} can be made at {where}: {made.stderr.strip()}")


def read_io(where: Path, name: str) -> str:
    """The text of the file ``name`` on the disk that io_disk made, once the guest has ended. Raises LabError."""
    command = ["debugfs", "-R", f'cat "{name}"', str(where)]
    read = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    said = read.stderr.splitlines()[1:]  # after its version; its exit status is always 0
    if said:
        raise LabError(f"{name} cannot be read from the I/O disk {where}: {' '.join(said)}")
    return read.stdout


def _command() -> list[str]:
    variables = f"MODULES={shlex.quote(' '.join(MODULES))} IMAGE_SIZE={IMAGE_SIZE}"
    files = {"guest/init": INIT, "guest/lease": LEASE, "syslinux.cfg": SYSLINUX}
    # Unpacked and not configured, which takes five seconds; a root of this variant has no later hooks.
    return [
        "mmdebstrap",
        "--variant=extract",
        f"--include={','.join(PACKAGES)}",
        '--extract-hook=mkdir "$1/guest"',
        *(f'--extract-hook=printf %s {shlex.quote(text)} >"$1/{path}"' for path, text in files.items()),
        f'--extract-hook={variables} chroot "$1" bash -euo pipefail -c {shlex.quote(BUILD)}',
        "bookworm",
    ]
