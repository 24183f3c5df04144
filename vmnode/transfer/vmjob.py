"""The virtual machine that a job asks for, out of its job ad. Pure.

HTCondor's own script (libvirt_simple_script.awk) copies these fields into XML as they stand. Here each is parsed, and
has to be one of the few things that it may be; the script then gets an ad with nothing else in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Optional, Union

from vmnode.errors import MalformedRequest
from vmnode.transfer import ads
from vmnode.transfer.url import FORMATS, plain

_STRING = re.compile(r'"([^"\\]*)"')
_DOMAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@#-]{0,199}")
_PATH = re.compile(r"(/[A-Za-z0-9_.+=@-]+)+")
_TARGET = re.compile(r"(vd|sd)[a-z]{1,2}|hd[a-d]")  # libvirt has one IDE controller
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")  # unicast: libvirt refuses others
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_PERMISSIONS = {"r": False, "w": True, "rw": True}
_NETWORKS = ("nat", "bridge", "user")
MOST_CPUS = 255  # of QEMU's machine type pc
MOST_DISKS = 64
MOST_CHARACTERS = 16384  # of vm_disk: what is read from and written to HTCondor's script has a limit, too


@dataclasses.dataclass(frozen=True)
class Disk:
    """One entry of vm_disk, `file:device:permission[:format]`. `file` is a name in the scratch directory, or a path."""

    file: str
    target: str
    writable: bool
    format: Optional[str]
    cdrom: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """What the domain is made of. `memory_kib` as libvirt counts it; `network` None: no interface."""

    name: str
    scratch: str
    memory_kib: int
    vcpus: int
    vnc: bool
    network: Optional[str]
    mac: str
    bridge: str
    disks: tuple[Disk, ...]
    id: str
    owner: str

    def ad(self) -> str:
        """The job ad for HTCondor's script: these fields, in the script's own spelling, and no others."""
        fields: dict[str, Union[bool, int, str]] = {
            "JobVMType": "kvm",
            "VMPARAM_VM_NAME": self.name,
            "VM_WORKING_DIR": self.scratch,
            "JobVMMemory": self.memory_kib // 1024,
            "JobVM_VCPUS": self.vcpus,
            "JobVMVNCConsole": self.vnc,
            "JobVMNetworking": self.network is not None,
            "JobVMNetworkingType": self.network or "",
            "JobVM_MACADDR": self.mac,
            "VMPARAM_Bridge_Interface": self.bridge,
            "VMPARAM_vm_Disk": ",".join(map(_entry, self.disks)),
        }
        return ads.write_old({name: value for name, value in fields.items() if value != ""})


def _entry(disk: Disk) -> str:
    fields = [disk.file, disk.target, "w" if disk.writable else "r", *([disk.format] if disk.format else [])]
    return ":".join(fields)


def name_in(data: bytes) -> str:
    """The domain's name in a job ad that may be unusable otherwise, so that a refusal can be found by it."""
    match = re.search(rb'^VMPARAM_VM_NAME = "([A-Za-z0-9_.+=@#-]{1,200})"$', data, re.MULTILINE)
    return match[1].decode() if match else "refused"


def parse(text: str) -> Job:
    """The job ad as vm-gahp gives it to LIBVIRT_XML_SCRIPT; raises MalformedRequest, naming attribute and value."""
    ad = ads.read_old(text)
    if _string(ad, "JobVMType").lower() != "kvm":
        raise MalformedRequest(f"vm_type = {ad.get('jobvmtype')} is not run here", "write vm_type = kvm")
    networking = _boolean(ad, "JobVMNetworking")
    network = _string(ad, "JobVMNetworkingType").lower() or "nat"
    if networking and network not in _NETWORKS:
        raise MalformedRequest(f"vm_networking_type = {network!r} is none of {', '.join(_NETWORKS)}")
    return Job(
        name=_matching(ad, "VMPARAM_VM_NAME", _DOMAIN),
        scratch=_matching(ad, "VM_WORKING_DIR", _PATH),
        memory_kib=_number(ad, "vm_memory", "JobVMMemory", "RequestMemory", 1 << 30) * 1024,
        vcpus=_number(ad, "vm_vcpus", "JobVM_VCPUS", "RequestCpus", MOST_CPUS),
        vnc=_boolean(ad, "JobVMVNCConsole"),
        network=network if networking else None,
        mac=_mac(ad) if networking else "",
        bridge=_matching(ad, "VMPARAM_Bridge_Interface", _INTERFACE) if networking and network == "bridge" else "",
        disks=parse_disks(_string(ad, "VMPARAM_vm_Disk")),
        id=_shown(ad, "GlobalJobId"),
        owner=_shown(ad, "Owner"),
    )


def parse_disks(text: str) -> tuple[Disk, ...]:
    """The value of vm_disk; raises MalformedRequest."""
    if len(text) > MOST_CHARACTERS:
        raise MalformedRequest(f"vm_disk has {len(text)} characters, more than {MOST_CHARACTERS}")
    disks = tuple(_disk(entry.strip()) for entry in text.split(","))
    if len(disks) > MOST_DISKS:
        raise MalformedRequest(f"vm_disk names {len(disks)} disks, more than {MOST_DISKS}")
    for what, values in (("file", [disk.file for disk in disks]), ("device", [disk.target for disk in disks])):
        for value in values:
            if values.count(value) > 1:
                raise MalformedRequest(f"vm_disk names the {what} {value} twice")
    return disks


def _disk(entry: str) -> Disk:
    fields = [field.strip() for field in entry.split(":")]
    if len(fields) not in (3, 4):
        raise MalformedRequest(
            f"vm_disk holds {entry[:200]!r}, which is not file:device:permission:format",
            "write, say, vm_disk = disk.qcow2:vda:w:qcow2",
        )
    file, target, permission = fields[0], fields[1].lower(), fields[2].lower()
    format = fields[3].lower() if len(fields) == 4 else None
    if not (plain(file) or (_PATH.fullmatch(file) and ".." not in file.split("/"))):
        raise MalformedRequest(
            f"vm_disk names the file {file[:200]!r}, which is neither a plain name in the scratch directory nor a path",
            "a name has letters, digits, and _ . + = @ - within",
        )
    if not _TARGET.fullmatch(target):
        raise MalformedRequest(f"vm_disk: {file}: {target!r} is no device; write vda, vdb, … (or sda, hda)")
    if permission not in _PERMISSIONS:
        raise MalformedRequest(f"vm_disk: {file}: {permission!r} is no permission; write r or w")
    if format is not None and format not in FORMATS:
        raise MalformedRequest(f"vm_disk: {file}: the format {format!r} is not used here; write raw or qcow2")
    cdrom = "iso" in file  # so HTCondor's script tells a CD-ROM from a disk
    if cdrom and (target.startswith("vd") or _PERMISSIONS[permission]):
        raise MalformedRequest(
            f"vm_disk: {file}: HTCondor takes a file with 'iso' in its name for a CD-ROM, which {target}:{permission}"
            " cannot be",
            "give it another name; or for a CD-ROM write hda:r, or sda:r",
        )
    if target.startswith("hd") and not cdrom and not _PERMISSIONS[permission]:
        raise MalformedRequest(f"vm_disk: {file}: an IDE disk cannot be read-only", "write vda, or sda, for hda")
    return Disk(file, target, _PERMISSIONS[permission], format, cdrom)


# --- single attributes --------------------------------------------------------------------------------------------


def _string(ad: Mapping[str, str], name: str) -> str:
    """A string; "" if it is absent or undefined."""
    value = ad.get(name.lower(), "undefined")
    if value.lower() == "undefined":
        return ""
    match = _STRING.fullmatch(value)
    if match is None or not match[1].isprintable():
        raise MalformedRequest(
            f"{name} = {value[:200]} is no plain string", "leave out quotes, backslashes, expressions"
        )
    return match[1].strip()


def _matching(ad: Mapping[str, str], name: str, pattern: re.Pattern[str]) -> str:
    value = _string(ad, name)
    if not pattern.fullmatch(value) or "/../" in f"{value}/" or len(value) >= 4096:
        raise MalformedRequest(f"{name} = {value[:200]!r} is not what it has to be")
    return value


def _boolean(ad: Mapping[str, str], name: str) -> bool:
    value = ad.get(name.lower(), "undefined").lower()
    if value not in ("true", "false", "undefined"):
        raise MalformedRequest(f"{name} = {value[:200]} is neither true nor false")
    return value == "true"


def _number(ad: Mapping[str, str], command: str, name: str, fallback: str, most: int) -> int:
    value = ad.get(name.lower(), "undefined")
    if value.lower() == "undefined":
        name, value = fallback, ad.get(fallback.lower(), "undefined")
    if not re.fullmatch("[0-9]{1,12}", value) or not 0 < int(value) <= most:
        raise MalformedRequest(f"{name} = {value[:200]} is no number between 1 and {most}", f"write {command} = …")
    return int(value)


def _mac(ad: Mapping[str, str]) -> str:
    value = _string(ad, "JobVM_MACADDR").lower()
    if value and not _MAC.fullmatch(value):
        raise MalformedRequest(f"vm_macaddr = {value[:200]!r} is no unicast MAC address", "write 52:54:00:12:34:56")
    return value


def _shown(ad: Mapping[str, str], name: str) -> str:
    """A string that is only shown: what could harm a terminal or a log is replaced."""
    value = ad.get(name.lower(), "").strip('"')[:256]
    return "".join(c if c.isprintable() and c not in '"\\<>&' else "?" for c in value)
