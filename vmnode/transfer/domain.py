"""The domain XML: checked against what the job asked for, completed with what QEMU must not find out by itself. Pure.

HTCondor's script writes it, and a newer one may write it otherwise. Nothing in it gets to libvirt that is not known
here, and the devices are exactly those that the job asked for. (libvirt, formatdomain.html.)
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any, Optional
from xml.etree.ElementTree import Element, SubElement

from vmnode.errors import CommandFailed
from vmnode.images import Image
from vmnode.transfer.disks import Found
from vmnode.transfer.vmjob import Disk, Job

HOLDS_THE_JOB = "image is not in qcow2 format"  # vm-gahp looks for these words in libvirt's error message


def complete(text: str, job: Job, found: Sequence[Found], accel: str, label: str) -> str:
    """The XML for libvirt. `found` are the disks as they were seen, in the job's order; `label` is QEMU's identity.

    Raises CommandFailed where the script wrote what the job did not ask for.
    """
    domain = check(text, job)
    devices = domain.find("devices")
    assert devices is not None  # check() counts the disks in it
    for old in devices.findall("disk"):
        devices.remove(old)
    devices.extend(_disk(job, disk, image) for disk, image in zip(job.disks, found))
    for interface in devices.findall("interface"):
        if interface.find("model") is None:  # before 25, the script left the choice to libvirt: an rtl8139
            SubElement(interface, "model", type="virtio")
    if accel == "tcg":
        domain.set("type", "qemu")
        for cpu in domain.findall("cpu"):
            domain.remove(cpu)
    # QEMU gets the rights of the job's user, and no file changes its owner: whatever the user swaps or rewrites from
    # now on, QEMU can open only what the user could open anyway.
    security = SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
    SubElement(security, "label").text = label
    return ElementTree.tostring(domain).decode() + "\n"  # in ASCII, which every locale can write


def refused_job(name: str, why: str) -> str:
    """XML that makes HTCondor hold the job: libvirt refuses it, with our sentence in its error message.

    vm-gahp takes any other error for the worker's: the starter sets HasVM to false, and the job goes on to the next
    worker (vm_proc.cpp, handleFTL). One job could switch off VM jobs in a whole pool. A job with a bad image is held.
    """
    return _impossible(name, f"vmnode refuses this job: {_shown(why)} ({HOLDS_THE_JOB})")


def failed_worker(why: str) -> str:
    """XML that libvirt refuses, so that the starter sets HasVM to false and the job runs on another worker."""
    return _impossible("none", f"vmnode cannot work here: {_shown(why)}")


def _impossible(name: str, sentence: str) -> str:
    """There is no domain of such a type, and so nothing that could be started by mistake."""
    domain = Element("domain", type=sentence)
    SubElement(domain, "name").text = name
    return ElementTree.tostring(domain).decode() + "\n"  # in ASCII, which every locale can write


def _shown(why: str) -> str:
    """XML has no way to write control characters; older libvirts cut a message off after 1,024 bytes."""
    clean = "".join(c if c.isprintable() else " " for c in why)
    return clean.encode()[:800].decode("utf-8", "ignore")


def _disk(job: Job, disk: Disk, found: Found) -> Element:
    element = Element("disk", type="file", device="cdrom" if disk.cdrom else "disk")
    SubElement(element, "driver", name="qemu", type=found.format)
    SubElement(element, "source", file=found.path or f"{job.scratch}/{disk.file}")
    _backing(element, None if found.path else found.base)
    SubElement(element, "target", dev=disk.target)
    if not disk.writable:
        SubElement(element, "readonly")
    return element


def _backing(element: Element, base: Optional[Image]) -> None:
    """The chain, with its end: libvirt and QEMU look for no backing file but these."""
    backing = SubElement(element, "backingStore")
    if base is not None:
        backing.set("type", "file")
        SubElement(backing, "format", type=base.format)
        SubElement(backing, "source", file=base.path)
        SubElement(backing, "backingStore")


# --- what the script may have written -----------------------------------------------------------------------------

_Shape = tuple[str, tuple[tuple[str, str], ...], tuple[Any, ...]]  # tag, attributes, the shapes within


def check(text: str, job: Job) -> Element:
    """The script's XML, parsed; raises CommandFailed unless all that is in it is what this job asked for."""
    if "<!DOCTYPE" in text:  # entities may be defined there, and grow
        raise CommandFailed("HTCondor's script wrote a document type, which no domain has")
    try:
        domain = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise CommandFailed(f"HTCondor's script wrote no XML: {error}") from None
    if domain.tag != "domain" or domain.attrib != {"type": "kvm"}:
        raise _unexpected(domain)
    sections = [section.tag for section in domain]
    for section in domain:
        if sections.count(section.tag) > 1 or not _is_expected(section, job):
            raise _unexpected(section)
    missing = {"name", "memory", "vcpu", "os", "devices"} - set(sections)
    if missing:
        raise CommandFailed(f"HTCondor's script wrote no <{min(missing)}>")
    return domain


def _is_expected(section: Element, job: Job) -> bool:
    tag, value = section.tag, (section.text or "").strip()
    if section.attrib and tag not in ("cpu", "os"):
        return False
    if tag == "devices":
        wanted = _devices(job)
        for device in section:
            if _shape(device) not in wanted:
                raise _unexpected(device)
            wanted.remove(_shape(device))
        if wanted:
            raise CommandFailed(f"HTCondor's script left out a <{wanted[0][0]}>")
        return True
    if tag in ("name", "memory", "vcpu"):
        asked = {"name": job.name, "memory": str(job.memory_kib), "vcpu": str(job.vcpus)}[tag]
        return value == asked and not len(section)
    if tag == "cpu":
        return _shape(section) == _leaf("cpu", mode="host-passthrough")
    if tag == "os":
        return all(_is_firmware(part, job) for part in section) and section.attrib in ({}, {"firmware": "efi"})
    if tag == "features":
        return all(_shape(part) in (_leaf("acpi"), _leaf("apic"), _leaf("pae")) for part in section)
    actions = ("destroy", "restart", "preserve")
    return tag in ("on_poweroff", "on_reboot", "on_crash") and value in actions and not len(section)


def _is_firmware(part: Element, job: Job) -> bool:
    """What may stand in <os>: a kernel of the user's own may not. aarch64 boots by UEFI, x86 by its BIOS."""
    value = (part.text or "").strip()
    if part.tag == "type":
        return value == "hvm" and not part.attrib and not len(part)
    if part.tag == "firmware":
        return all(feature.tag == "feature" and not len(feature) for feature in part)
    if part.tag == "loader":
        return _FIRMWARE.fullmatch(value) is not None and not len(part)
    return (
        part.tag == "nvram"
        and _FIRMWARE.fullmatch(part.get("template", "")) is not None
        and value == f"{job.scratch}/{job.name}.iso_VARS.qcow2"
        and not len(part)
    )


_FIRMWARE = re.compile(r"/usr/share/edk2(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")


def _devices(job: Job) -> list[_Shape]:
    """The devices that this job asks for."""
    devices = [_leaf("console", _leaf("source", path="/dev/ptmx"), type="pty")]
    if job.vnc:
        devices.append(_leaf("graphics", type="vnc", port="-1", autoport="yes", keymap="en-us"))
    if job.network is not None:
        kind, parts = {
            "nat": ("network", [_leaf("source", network="default")]),
            "bridge": ("bridge", [_leaf("source", bridge=job.bridge)]),
            "user": ("user", [_leaf("backend", type="passt")]),
        }[job.network]
        if job.mac:
            parts.append(_leaf("mac", address=job.mac))
        devices.append(_leaf("interface", *parts, type=kind))
    for disk in job.disks:
        parts = [_leaf("driver", name="qemu", type=disk.format)] if disk.format else []
        parts.append(_leaf("source", file=disk.file if disk.file.startswith("/") else f"{job.scratch}/{disk.file}"))
        parts.append(_leaf("target", dev=disk.target))
        if not disk.writable:
            parts.append(_leaf("readonly"))
        devices.append(_leaf("disk", *parts, type="file", **({"device": "cdrom"} if disk.cdrom else {})))
    return devices


def _shape(element: Element) -> _Shape:
    """An element as a value: its text, and the order of its parts, have no meaning in devices. Nor has <model>, where
    it is the one that is added where it is missing.
    """
    parts = [_shape(part) for part in element]
    if element.tag == "interface":
        parts = [part for part in parts if part != _leaf("model", type="virtio")]
    return element.tag, tuple(sorted(element.attrib.items())), tuple(sorted(parts))


def _leaf(tag: str, *parts: _Shape, **attributes: str) -> _Shape:
    return tag, tuple(sorted(attributes.items())), tuple(sorted(parts))


def _unexpected(element: Element) -> CommandFailed:
    written = " ".join(ElementTree.tostring(element, encoding="unicode").split())
    return CommandFailed(
        f"HTCondor's script wrote what the job did not ask for: {written[:300]}",
        "is LIBVIRT_XML_SCRIPT_ARGS the script of this HTCondor? Newer ones may need a newer vmnode",
    )
