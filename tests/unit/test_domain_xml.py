"""The domain XML: what HTCondor's script may have written for a job, what libvirt gets, and what makes it refuse.

The XML is written out by hand here, as libvirt_simple_script.awk of HTCondor 23.9 and of 25.14 prints it; the scripts
themselves are run in tests/libvirt and tests/pool.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional
from xml.etree import ElementTree

import libvirt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vmnode.commands import domain_xml
from vmnode.config import Config
from vmnode.errors import CommandFailed, MalformedRequest, UsageError
from vmnode.host import accounts
from vmnode.host.child import Identity
from vmnode.images import Image
from vmnode.transfer.disks import Found
from vmnode.transfer.domain import HOLDS_THE_JOB, check, complete, failed_worker, refused_job
from vmnode.transfer.vmjob import Disk, Job

ROOT = Path(__file__).parents[2]
LABEL = "+1000:+64055"
BASE = Image("/images/el9.qcow2", "qcow2", 10 << 30, 6 << 30, 1_790_000_000_000_000_000, 12)
CD = Image("/images/cd.iso", "raw", 1 << 20, 1 << 20, 1_790_000_000_000_000_000, 13)

JOB = Job(
    name="alice_node_9.0",
    scratch="/var/lib/condor/execute/dir_27",
    memory_kib=1024 * 1024,
    vcpus=2,
    vnc=False,
    network="nat",
    mac="52:54:00:12:34:56",
    bridge="",
    disks=(
        Disk("disk.qcow2", "vda", writable=True, format="qcow2", cdrom=False),
        Disk("io.raw", "vdb", writable=True, format="raw", cdrom=False),
        Disk("/images/cd.iso", "hda", writable=False, format=None, cdrom=True),
    ),
    id="node#9.0#1795267985",
    owner="alice",
)
FOUND = (Found("qcow2", BASE), Found("raw", None), Found("raw", CD, "/images/cd.iso"))

BEGIN = """\
<domain type='kvm'>
<name>alice_node_9.0</name>
<memory>1048576</memory>
<vcpu>2</vcpu>
<cpu mode='host-passthrough'/>
"""
BIOS = """\
<os><type>hvm</type>
</os>
"""
UEFI = """\
<os firmware='efi'><type>hvm</type>
<firmware>
  <feature enabled='no' name='enrolled-keys'/>
  <feature enabled='no' name='secure-boot'/>
</firmware>
<loader readonly='yes' type='pflash' format='qcow2'>/usr/share/edk2/aarch64/QEMU_EFI-silent-pflash.qcow2</loader>
<nvram template='/usr/share/edk2/aarch64/vars-template-pflash.qcow2' format='qcow2'>\
/var/lib/condor/execute/dir_27/alice_node_9.0.iso_VARS.qcow2</nvram>
</os>
"""
MIDDLE = """\
<features><acpi/><apic/><pae/></features>
<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>restart</on_crash>
<devices>
<console type='pty'><source path='/dev/ptmx'/></console>
"""
DISKS = """\
<disk type='file'>
<driver name='qemu' type='qcow2'/>
<source file='/var/lib/condor/execute/dir_27/disk.qcow2'/>
<target dev='vda'/>
</disk>
<disk type='file'>
<driver name='qemu' type='raw'/>
<source file='/var/lib/condor/execute/dir_27/io.raw'/>
<target dev='vdb'/>
</disk>
<disk type='file' device='cdrom'>
<source file='/images/cd.iso'/>
<target dev='hda'/>
<readonly/>
</disk>
"""
END = "</devices></domain>\n"
OLD_NAT = """\
<interface type='network'><source network='default'/>
<mac address='52:54:00:12:34:56'/>
</interface>
"""
NEW_NAT = """\
<interface type='network'><source network='default'/>
<mac address='52:54:00:12:34:56'/>
<model type='virtio'/>
</interface>
"""
OLD = BEGIN + BIOS + MIDDLE + OLD_NAT + DISKS + END  # 23.9
NEW = BEGIN + BIOS + MIDDLE + NEW_NAT + DISKS + END  # 25.14
ARM = BEGIN + UEFI + MIDDLE + NEW_NAT + DISKS + END
SCRIPTS = {"23.9": OLD, "25.14": NEW, "25.14 on aarch64": ARM}


def of_one_form(xml: str) -> str:
    return ElementTree.canonicalize(xml, strip_text=True)


def refusal(text: str, job: Job = JOB) -> str:
    with pytest.raises(CommandFailed) as caught:
        check(text, job)
    return caught.value.line


# --- what libvirt gets --------------------------------------------------------------------------------------------

COMPLETED_DISKS = """\
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/var/lib/condor/execute/dir_27/disk.qcow2'/>
  <backingStore type='file'>
    <format type='qcow2'/>
    <source file='/images/el9.qcow2'/>
    <backingStore/>
  </backingStore>
  <target dev='vda'/>
</disk>
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/>
  <source file='/var/lib/condor/execute/dir_27/io.raw'/>
  <backingStore/>
  <target dev='vdb'/>
</disk>
<disk type='file' device='cdrom'>
  <driver name='qemu' type='raw'/>
  <source file='/images/cd.iso'/>
  <backingStore/>
  <target dev='hda'/>
  <readonly/>
</disk>
"""
SECLABEL = "<seclabel type='static' model='dac' relabel='no'><label>+1000:+64055</label></seclabel>"


@pytest.mark.parametrize(("written", "firmware"), [(OLD, BIOS), (NEW, BIOS), (ARM, UEFI)], ids=SCRIPTS)
def test_the_domain_has_whole_chains_of_disks_and_the_job_s_identity(written: str, firmware: str) -> None:
    expected = BEGIN + firmware + MIDDLE + NEW_NAT + COMPLETED_DISKS + "</devices>" + SECLABEL + "</domain>"
    assert of_one_form(complete(written, JOB, FOUND, "kvm", LABEL)) == of_one_form(expected)


def test_where_qemu_emulates_the_processor_the_domain_says_so() -> None:
    begin = BEGIN.replace("type='kvm'", "type='qemu'").replace("<cpu mode='host-passthrough'/>\n", "")
    expected = begin + BIOS + MIDDLE + NEW_NAT + COMPLETED_DISKS + "</devices>" + SECLABEL + "</domain>"
    for written in (OLD, NEW):
        assert of_one_form(complete(written, JOB, FOUND, "tcg", LABEL)) == of_one_form(expected)


def test_the_model_of_the_interface_is_there_once() -> None:
    for written in (OLD, NEW):
        assert complete(written, JOB, FOUND, "kvm", LABEL).count("virtio") == 1


def test_what_a_disk_was_found_to_be_counts_and_not_what_the_job_said() -> None:
    """A job need not say a format; the script then writes none, and QEMU would guess."""
    job = replace(JOB, network=None, mac="", disks=(replace(JOB.disks[0], format=None),))
    written = NEW.replace(NEW_NAT, "").replace("<driver name='qemu' type='qcow2'/>\n", "")
    written = written.partition("<disk type='file'>\n<driver name='qemu' type='raw'/>")[0] + END
    for found in (Found("qcow2", replace_image(BASE, format="raw", path="/images/a&b'.raw")), Found("raw", None)):
        domain = ElementTree.fromstring(complete(written, job, [found], "kvm", LABEL))
        (disk,) = domain.findall("devices/disk")
        driver, backing = disk.find("driver"), disk.find("backingStore")
        assert driver is not None and driver.attrib == {"name": "qemu", "type": found.format}
        assert backing is not None
        if found.base is None:
            assert not backing.attrib and not len(backing)
        else:
            assert [(part.tag, part.attrib) for part in backing] == [
                ("format", {"type": "raw"}),
                ("source", {"file": "/images/a&b'.raw"}),
                ("backingStore", {}),
            ]


def replace_image(image: Image, **changes: Any) -> Image:
    return image._replace(**changes)


def test_every_disk_ends_its_chain() -> None:
    domain = ElementTree.fromstring(complete(OLD, JOB, FOUND, "kvm", LABEL))
    for disk in domain.findall("devices/disk"):
        innermost = [element for element in disk.iter("backingStore") if element.find("backingStore") is None]
        assert len(innermost) == 1 and not len(innermost[0]) and not innermost[0].attrib


def test_the_domain_can_be_written_in_every_locale() -> None:
    image = replace_image(BASE, path="/images/bücher €.qcow2")
    xml = complete(NEW, JOB, (Found("qcow2", image), *FOUND[1:]), "kvm", LABEL)
    assert xml.isascii()
    assert [source.get("file") for source in ElementTree.fromstring(xml).iter("source")].count(image.path) == 1


# --- what the script may write ------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", SCRIPTS.values(), ids=SCRIPTS)
def test_what_the_scripts_write_is_what_was_asked_for(written: str) -> None:
    check(written, JOB)
    check("".join(written.splitlines()), JOB)  # as vm-gahp joins the lines


@pytest.mark.parametrize(
    ("changes", "interface"),
    [
        ({"network": None, "mac": ""}, ""),
        ({"mac": ""}, "<interface type='network'><source network='default'/></interface>"),
        ({"mac": ""}, "<interface type='network'><source network='default'/><model type='virtio'/></interface>"),
        (
            {"network": "bridge", "bridge": "br0"},
            "<interface type='bridge'><mac address='52:54:00:12:34:56'/><source bridge='br0'/></interface>",
        ),
        (
            {"network": "bridge", "bridge": "br0", "mac": ""},
            "<interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>",
        ),
        (
            {"network": "user"},
            "<interface type='user'><model type='virtio'/><mac address='52:54:00:12:34:56'/>\n<backend type='passt'/>\n\
</interface>",
        ),
        ({"vnc": True}, "<graphics type='vnc' port='-1' autoport='yes' keymap='en-us'/>" + OLD_NAT),
    ],
)
def test_networks_and_consoles_as_the_scripts_write_them(changes: dict[str, Any], interface: str) -> None:
    written = OLD.replace(OLD_NAT, interface)
    job = replace(JOB, **changes)
    check(written, job)
    interfaces = ElementTree.fromstring(complete(written, job, FOUND, "kvm", LABEL)).findall("devices/interface")
    assert len(interfaces) == (job.network is not None)
    for element in interfaces:
        assert [model.attrib for model in element.findall("model")] == [{"type": "virtio"}]
    if interface != OLD_NAT:
        refusal(written, JOB if changes != {"mac": ""} else replace(JOB, network=None))


def test_a_later_script_may_order_things_otherwise_and_comment_on_them() -> None:
    written = NEW.replace(NEW_NAT, "").replace(END, "<!-- last -->" + NEW_NAT + END).replace("\n", "\n  ")
    written = written.replace("<target dev='vda'/>", "")
    driver = "<driver name='qemu' type='qcow2'/>"
    written = written.replace(driver, "<target dev='vda'/><driver type='qcow2' name='qemu'/>")
    check(written, JOB)


# For each: what is found in the script's XML, what stands there instead, and words of the complaint.
CHANGED: list[tuple[str, str, str]] = [
    # what is no domain
    (OLD, "", "HTCondor's script wrote no XML"),
    (OLD, "awk: cannot open file", "HTCondor's script wrote no XML"),
    (END, "", "HTCondor's script wrote no XML"),
    (END, END + "x", "HTCondor's script wrote no XML"),
    (OLD, "<domains/>", "<domains"),
    ("<domain type='kvm'>", "<domain type='qemu'>", "<domain type="),
    ("<domain type='kvm'>", "<domain type='xen'>", "<domain type="),
    ("<domain type='kvm'>", "<domain>", "<domain>"),
    ("<domain type='kvm'>", "<domain type='kvm' id='1'>", "<domain type="),
    ("<domain type='kvm'>", "<domain type='kvm' xmlns='http://libvirt.org/x'>", "domain"),
    # sections
    ("<name>alice_node_9.0</name>", "", "wrote no <name>"),
    ("<memory>1048576</memory>", "", "wrote no <memory>"),
    ("<vcpu>2</vcpu>", "", "wrote no <vcpu>"),
    (BIOS, "", "wrote no <os>"),
    (MIDDLE + OLD_NAT + DISKS + "</devices>", "", "wrote no <devices>"),
    ("alice_node_9.0", "alice_node_9.1", "<name>alice_node_9.1</name>"),
    ("<name>alice_node_9.0</name>", "<name>alice_node_9.0<x/></name>", "<name>"),
    ("<name>", "<name x='y'>", "<name"),
    ("<name>", "<name>alice_node_9.0</name><name>", "<name>"),
    ("<memory>1048576<", "<memory>1048577<", "<memory>1048577</memory>"),
    ("<memory>", "<memory unit='GiB'>", "<memory unit="),
    ("<vcpu>2<", "<vcpu>3<", "<vcpu>3</vcpu>"),
    ("<vcpu>", "<vcpu cpuset='0'>", "<vcpu cpuset="),
    ("host-passthrough", "host-model", "<cpu"),
    ("mode='host-passthrough'", "mode='host-passthrough' migratable='off'", "<cpu"),
    (
        "<cpu mode='host-passthrough'/>",
        "<cpu mode='host-passthrough'><feature policy='force' name='vmx'/></cpu>",
        "<cpu",
    ),
    ("<acpi/>", "<acpi/><vmport state='on'/>", "<features>"),
    ("<features>", "<features x='y'>", "<features"),
    ("<on_crash>restart", "<on_crash>coredump-restart", "<on_crash>"),
    ("<on_crash>restart", "<on_crash>restart<x/>", "<on_crash>"),
    ("<on_crash>", "<on_crash x='y'>", "<on_crash"),
    ("<on_crash>", "<on_lockfailure>restart</on_lockfailure><on_crash>", "<on_lockfailure>"),
    ("<devices>", "<devices/><devices>", "<devices"),
    (END, "</devices><devices/></domain>", "<devices"),
    ("<devices>", "<devices x='y'>", "<devices"),
    ("<devices>", "<metadata/><devices>", "<metadata"),
    ("<devices>", "<bootloader>/home/alice/x</bootloader><devices>", "<bootloader>"),
    ("<devices>", "<seclabel type='none'/><devices>", "<seclabel"),
    ("<devices>", "<memoryBacking><source type='file'/></memoryBacking><devices>", "<memoryBacking>"),
    ("<devices>", "<resource><partition>/x</partition></resource><devices>", "<resource>"),
    # what the guest boots
    ("</os>", "<kernel>/home/alice/vmlinuz</kernel></os>", "<os>"),
    ("</os>", "<initrd>/etc/shadow</initrd></os>", "<os>"),
    ("</os>", "<cmdline>x</cmdline></os>", "<os>"),
    ("</os>", "<root>/dev/sda</root></os>", "<os>"),
    ("</os>", "<acpi><table type='slic'>/etc/shadow</table></acpi></os>", "<os>"),
    ("</os>", "<loader>/home/alice/efi</loader></os>", "<os>"),
    ("</os>", "<loader>/usr/share/edk2/../../../home/alice/efi</loader></os>", "<os>"),
    ("</os>", "<loader>/usr/share/edk2</loader></os>", "<os>"),
    ("</os>", "<loader>/usr/share/edk2-of-alice/x</loader></os>", "<os>"),
    ("</os>", "<nvram>/etc/shadow</nvram></os>", "<os>"),
    ("<os>", "<os firmware='bios'>", "<os"),
    ("<type>hvm", "<type arch='x86_64'>hvm", "<os>"),
    ("<type>hvm", "<type>linux", "<os>"),
    ("<type>hvm", "<type>hvm<x/>", "<os>"),
    # devices
    ("<console type='pty'><source path='/dev/ptmx'/></console>\n", "", "left out a <console>"),
    (OLD_NAT, "", "left out a <interface>"),
    (DISKS, "", "left out a <disk>"),
    (DISKS, DISKS[: DISKS.index("<disk type='file' device='cdrom'>")], "left out a <disk>"),
    (DISKS, DISKS + DISKS, "<disk"),
    (OLD_NAT, OLD_NAT * 2, "<interface"),
    (END, "<disk type='file'><source file='/etc/shadow'/><target dev='vdc'/></disk>" + END, "/etc/shadow"),
    (END, "<disk type='block'><source dev='/dev/sda'/><target dev='vdc'/></disk>" + END, "/dev/sda"),
    (END, "<hostdev mode='subsystem' type='pci'/>" + END, "<hostdev"),
    (END, "<filesystem type='mount'><source dir='/'/><target dir='x'/></filesystem>" + END, "<filesystem"),
    (END, "<serial type='file'><source path='/etc/cron.d/x'/></serial>" + END, "<serial"),
    (END, "<channel type='unix'/>" + END, "<channel"),
    (END, "<emulator>/home/alice/qemu</emulator>" + END, "<emulator>"),
    (END, "<rng model='virtio'/>" + END, "<rng"),
    (END, "<graphics type='vnc' port='-1' autoport='yes' keymap='en-us'/>" + END, "<graphics"),
    ("path='/dev/ptmx'", "path='/dev/sda'", "/dev/sda"),
    ("<console type='pty'>", "<console type='file'>", "<console"),
    ("network='default'", "network='other'", "<interface"),
    ("<source network='default'/>", "", "<interface"),
    ("52:54:00:12:34:56", "52:54:00:12:34:57", "<interface"),
    ("<mac address='52:54:00:12:34:56'/>", "", "<interface"),
    ("<mac address=", "<model type='e1000'/><mac address=", "<interface"),
    ("<mac address=", "<script path='/home/alice/x'/><mac address=", "<interface"),
    ("<mac address=", "<target dev='virbr0'/><mac address=", "<interface"),
    ("<interface type='network'>", "<interface type='network' trustGuestRxFilters='yes'>", "<interface"),
    ("dir_27/disk.qcow2", "dir_28/disk.qcow2", "dir_28/disk.qcow2"),
    ("dir_27/disk.qcow2", "dir_27/../dir_28/disk.qcow2", "dir_28/disk.qcow2"),
    ("disk.qcow2'/>", "disk.qcow2' startupPolicy='optional'/>", "<disk"),
    ("disk.qcow2'/>", "disk.qcow2'><seclabel model='dac' relabel='yes'/></source>", "<disk"),
    ("dev='vda'", "dev='vdc'", "<disk"),
    ("dev='vda'/>", "dev='vda' bus='scsi'/>", "<disk"),
    ("<target dev='vda'/>", "<target dev='vda'/><readonly/>", "<disk"),
    ("<target dev='vda'/>", "<target dev='vda'/><shareable/>", "<disk"),
    ("<target dev='vda'/>", "<target dev='vda'/><model type='virtio'/>", "<disk"),
    ("path='/dev/ptmx'/>", "path='/dev/ptmx'/><model type='virtio'/>", "<console"),
    ("<target dev='vda'/>", "<target dev='vda'/><backingStore type='file'/>", "<disk"),
    ("<target dev='vda'/>", "<target dev='vda'/><target dev='vda'/>", "<disk"),
    ("<readonly/>\n", "", "<disk"),
    ("device='cdrom'", "device='lun'", "<disk"),
    (" device='cdrom'", "", "<disk"),
    ("type='qcow2'/>", "type='raw'/>", "<disk"),
    ("<driver name='qemu' type='qcow2'/>", "", "<disk"),
    ("name='qemu'", "name='qemu' io='native'", "<disk"),
    ("<disk type='file'>", "<disk type='file' snapshot='external'>", "<disk"),
]


@pytest.mark.parametrize(
    ("found", "instead", "words"), CHANGED, ids=[f"{n} {words[:40]}" for n, (_, _, words) in enumerate(CHANGED)]
)
def test_what_the_job_did_not_ask_for_is_refused(found: str, instead: str, words: str) -> None:
    assert found in OLD
    said = refusal(OLD.replace(found, instead, 1))
    assert words in said
    with pytest.raises(CommandFailed):
        complete(OLD.replace(found, instead, 1), JOB, FOUND, "kvm", LABEL)


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("aarch64/QEMU_EFI-silent-pflash.qcow2", "../../../home/alice/efi"),
        ("/usr/share/edk2/aarch64/vars-template-pflash.qcow2", "/etc/shadow"),
        ("/usr/share/edk2/aarch64/vars-template-pflash.qcow2", "/usr/share/edk2/../../../etc/shadow"),
        (" template='/usr/share/edk2/aarch64/vars-template-pflash.qcow2'", ""),
        ("dir_27/alice_node_9.0.iso_VARS", "dir_28/alice_node_9.0.iso_VARS"),
        ("<feature enabled='no' name='secure-boot'/>", "<feature><x/></feature>"),
        ("<firmware>", "<firmware><x/>"),
        ("</nvram>", "<x/></nvram>"),
        ("</loader>", "<x/></loader>"),
        (
            "</os>",
            "<x template='/usr/share/edk2/x'>/var/lib/condor/execute/dir_27/alice_node_9.0.iso_VARS.qcow2</x></os>",
        ),
    ],
)
def test_another_firmware_than_the_worker_s_is_refused(found: str, instead: str) -> None:
    assert found in ARM
    assert "<os" in refusal(ARM.replace(found, instead, 1))


def test_the_namespace_of_qemu_s_own_arguments_is_refused() -> None:
    arguments = "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='x'/></qemu:commandline>"
    namespace = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    for place in ("<devices>", END):
        written = OLD.replace(place, arguments + place if place == "<devices>" else f"</devices>{arguments}</domain>")
        assert "commandline" in refusal(written.replace("<domain ", f"<domain {namespace} "))
        assert "wrote no XML" in refusal(written)  # without the namespace


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "declaration",
    [
        "<!DOCTYPE domain>",
        "<!DOCTYPE domain [<!ENTITY a 'alice_node_9.0'>]>",
        "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/shadow'>]>",
        "<!DOCTYPE domain SYSTEM 'http://example.org/x.dtd'>",
        "<!DOCTYPE d [<!ENTITY a '"
        + "x" * 50
        + "'>"
        + "".join(f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 20}'>" for n in range(10))
        + "]>",
    ],
)
def test_no_entity_is_defined_let_alone_a_bomb_of_them(declaration: str) -> None:
    for reference in ("alice_node_9.0", "&a;", "&k;"):
        assert "document type" in refusal(declaration + OLD.replace("alice_node_9.0", reference))
        assert "document type" in refusal(f"<?xml version='1.0'?>\n{declaration}\n{OLD}")


# --- any two jobs -------------------------------------------------------------------------------------------------


def as_the_script_writes(job: Job, newer: bool) -> str:
    """The script's work, done again by hand."""
    lines = ["<domain type='kvm'>", f"<name>{job.name}</name>", f"<memory>{job.memory_kib}</memory>"]
    lines += [f"<vcpu>{job.vcpus}</vcpu>", "<cpu mode='host-passthrough'/>", BIOS, MIDDLE]
    if job.vnc:
        lines.append("<graphics type='vnc' port='-1' autoport='yes' keymap='en-us'/>")
    mac = f"<mac address='{job.mac}'/>" if job.mac else ""
    model = "<model type='virtio'/>" if newer else ""
    if job.network == "nat":
        lines.append(f"<interface type='network'><source network='default'/>{mac}{model}</interface>")
    elif job.network == "user":
        lines.append(f"<interface type='user'><model type='virtio'/>{mac}<backend type='passt'/></interface>")
    elif job.network == "bridge":
        lines.append(f"<interface type='bridge'>{mac}<source bridge='{job.bridge}'/>{model}</interface>")
    for disk in job.disks:
        lines.append("<disk type='file' device='cdrom'>" if "iso" in disk.file else "<disk type='file'>")
        lines.append(f"<driver name='qemu' type='{disk.format}'/>" if disk.format else "")
        lines.append(f"<source file='{disk.file if disk.file[0] == '/' else f'{job.scratch}/{disk.file}'}'/>")
        lines.append(f"<target dev='{disk.target}'/>")
        lines.append("" if disk.writable else "<readonly/>")
        lines.append("</disk>")
    return "\n".join([*lines, END])


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    names = draw(
        st.lists(st.sampled_from(["a", "b.img", "c.iso", "/i/a", "/i/iso"]), min_size=1, max_size=3, unique=True)
    )
    disks = tuple(
        Disk(
            name,
            "hd" + "abc"[number],
            writable="iso" not in name and draw(st.booleans()),
            format=draw(st.sampled_from([None, "raw", "qcow2"])),
            cdrom="iso" in name,
        )
        for number, name in enumerate(names)
    )
    network = draw(st.sampled_from([None, "nat", "bridge", "user"]))
    return Job(
        name=draw(st.sampled_from(["alice_1.0", "bob_1.0"])),
        scratch="/scratch" if any(not name.startswith("/") for name in names) else "",
        memory_kib=draw(st.sampled_from([1024, 2048])),
        vcpus=draw(st.sampled_from([1, 2])),
        vnc=draw(st.booleans()),
        network=network,
        mac=draw(st.sampled_from(["", "52:54:00:00:00:01", "52:54:00:00:00:02"])) if network else "",
        bridge=draw(st.sampled_from(["br0", "br1"])) if network == "bridge" else "",
        disks=disks,
        id="",
        owner="",
    )


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Job, Job]:
    """Two jobs that differ in few things, or in nothing."""
    one, other = draw(jobs()), draw(jobs())
    fields = ["name", "memory_kib", "vcpus", "vnc"]
    shared = draw(st.sets(st.sampled_from(fields)))
    alike = {"network": one.network, "mac": one.mac, "bridge": one.bridge} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        alike.update(disks=one.disks, scratch=one.scratch)
    return one, replace(other, **alike, **{field: getattr(one, field) for field in shared})


@settings(max_examples=500)
@given(neighbours(), st.booleans())
def test_a_domain_is_the_job_s_own_and_no_other_s(pair: tuple[Job, Job], newer: bool) -> None:
    one, other = pair
    written = as_the_script_writes(one, newer)
    check(written, one)
    if one == other:
        return
    if sorted(map(repr, one.disks)) == sorted(map(repr, other.disks)):
        assume(replace(one, disks=()) != replace(other, disks=()))  # the order of disks means nothing
    refusal(written, other)


@settings(max_examples=500)
@given(jobs(), st.booleans(), st.data())
def test_nothing_can_be_left_out_or_doubled(job: Job, newer: bool, data: st.DataObject) -> None:
    domain = ElementTree.fromstring(as_the_script_writes(job, newer))
    parents = [element for element in domain.iter() if len(element)]
    parent = data.draw(st.sampled_from(parents))
    child = data.draw(st.sampled_from(list(parent)))
    optional = {"model", "features", "acpi", "apic", "pae", "cpu", "on_poweroff", "on_reboot", "on_crash"}
    if data.draw(st.booleans()):
        parent.remove(child)
        assume(child.tag not in optional | {"type"})
    else:
        parent.append(child)
        assume(child.tag not in optional | {"type"})
    refusal(ElementTree.tostring(domain, encoding="unicode"), job)


@settings(max_examples=500)
@given(jobs(), st.booleans(), st.data())
def test_no_attribute_can_be_added_or_changed(job: Job, newer: bool, data: st.DataObject) -> None:
    domain = ElementTree.fromstring(as_the_script_writes(job, newer))
    element = data.draw(st.sampled_from(list(domain.iter())))
    name = data.draw(st.sampled_from([*element.attrib, "x"]))
    assume(not (element.tag == "model" and name == "type"))
    element.set(name, element.get(name, "") + data.draw(st.sampled_from(["x", " ", "/", "'"])))
    refusal(ElementTree.tostring(domain, encoding="unicode"), job)


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text(st.sampled_from("<>/='! domainxs\n&;"), max_size=40), st.integers(0, len(OLD)))
@example("\0", 5)
def test_any_text_is_refused_as_the_worker_s_fault(text: str, position: int) -> None:
    for written in (text, OLD[:position] + text + OLD[position:]):
        with contextlib.suppress(CommandFailed):
            check(written, JOB)


# --- what makes libvirt refuse ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connection() -> Any:
    """A libvirt of its own, in this process: its parser is the one that reads every domain."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would print each error
    opened = libvirt.open("test:///default")
    yield opened
    opened.close()


def libvirt_says(connection: Any, xml: str) -> str:
    with pytest.raises(libvirt.libvirtError) as caught:
        connection.createXML(xml)
    return str(caught.value.get_error_message())


def shown(sentence: str) -> str:
    """What is left of a sentence: what can be printed, and as many characters as 800 bytes of UTF-8 hold."""
    kept = ""
    for character in sentence:
        character = character if character.isprintable() else " "
        if len((kept + character).encode()) > 800:
            break
        kept += character
    return kept


sentences = st.one_of(
    st.text(st.characters(), max_size=80),
    st.text(
        st.sampled_from("<>&'\"]]>\0\x01\x1b\x7f\x85\n\r\t\u2028\ufffe\uffff\ud800\udcff\U0001f600 a"), max_size=40
    ),
    st.text(st.characters(), max_size=8).map(lambda text: text * 300),
)


@settings(max_examples=300)
@given(sentences)
@example("\0")
@example("'/><devices/><x y='")
@example("\ud800")
def test_a_refused_job_is_well_formed_xml_that_no_libvirt_takes(why: str) -> None:
    for xml, words in (
        (refused_job("alice_node_9.0", why), f"vmnode refuses this job: {shown(why)} ({HOLDS_THE_JOB})"),
        (failed_worker(why), f"vmnode cannot work here: {shown(why)}"),
    ):
        assert xml.isascii() and xml.count("\n") == 1
        domain = ElementTree.fromstring(xml)
        assert domain.tag == "domain" and domain.attrib == {"type": words}
        assert [element.tag for element in domain] == ["name"] and len(list(domain.iter())) == 2


@settings(max_examples=100)
@given(why=sentences)
@example(why="the disk a.qcow2 is a symbolic link, not a regular file")
@example(why="x" * 5000)
@example(why="\U0001f600" * 300)
def test_libvirt_repeats_why_a_job_is_refused_with_the_words_that_hold_it(connection: Any, why: str) -> None:
    said = libvirt_says(connection, refused_job("alice_node_9.0", why))
    assert HOLDS_THE_JOB == "image is not in qcow2 format"  # as vm-gahp looks for it
    assert HOLDS_THE_JOB in said
    assert f"vmnode refuses this job: {shown(why)} (" in said


@settings(max_examples=100)
@given(why=sentences)
def test_libvirt_repeats_what_the_worker_lacks_and_nobody_s_job_is_held(connection: Any, why: str) -> None:
    said = libvirt_says(connection, failed_worker(why))
    assert "vmnode cannot work here" in said
    assert HOLDS_THE_JOB not in said or HOLDS_THE_JOB in why


# --- the program --------------------------------------------------------------------------------------------------

AD = """\
JobVMType = "kvm"
VMPARAM_VM_NAME = "alice_node_9.0"
VM_WORKING_DIR = "/var/lib/condor/execute/dir_27"
JobVMMemory = 512
JobVM_VCPUS = 1
VMPARAM_vm_Disk = "disk.qcow2:vda:w:qcow2"
"""


def run(
    *arguments: str, data: bytes = AD.encode(), user: Optional[str] = "1000", **environment: str
) -> subprocess.CompletedProcess[str]:
    identity = {} if user is None else {"VMGAHP_USER_UID": user, "VMGAHP_USER_GID": user}
    ran = subprocess.run(
        [sys.executable, "-m", "vmnode.commands.domain_xml", *arguments],
        input=data.decode("utf-8", "surrogateescape"),
        errors="surrogateescape",
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("VMGAHP")}, **identity, **environment},
    )
    assert "Traceback" not in ran.stderr
    return ran


def kind_of(xml: str) -> str:
    domain = ElementTree.fromstring(xml)
    assert domain.tag == "domain"
    return domain.get("type", "")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "vmnode.toml"
    file.write_text(f'[images]\nroots = ["{tmp_path}"]\n[paths]\nstate_dir = "{tmp_path}"\n')
    return file


def test_a_wrong_configuration_is_the_worker_s_fault_and_still_xml(config: Path) -> None:
    """A script that fails is passed over by vm-gahp, which then describes the domain by itself."""
    config.write_text("[kvm]\naccel = 3\n")
    ran = run("--config", str(config), "/bin/true")
    assert ran.returncode == 0
    assert kind_of(ran.stdout).startswith("vmnode cannot work here: ") and "[kvm] accel = 3" in ran.stdout
    assert HOLDS_THE_JOB not in ran.stdout
    assert ran.stderr.startswith("vmnode-domain-xml: no virtual machine can be started on this worker: ")


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (None, "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ("", "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ("alice", "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ("0", "the job's user is root"),
    ],
)
def test_without_an_ordinary_user_no_domain_is_described(user: Optional[str], words: str, config: Path) -> None:
    ran = run("--config", str(config), "/bin/true", user=user)
    assert ran.returncode == 0
    assert kind_of(ran.stdout).startswith("vmnode cannot work here: ") and words in kind_of(ran.stdout)


def test_wrong_usage_is_told(config: Path) -> None:
    for arguments in ([], ["--bogus", "x"], ["a", "b"]):
        ran = run("--config", str(config), *arguments)
        assert (ran.returncode, ran.stdout) == (64, "")  # what starts it then writes the XML
        assert "usage: vmnode-domain-xml" in ran.stderr


def test_the_job_s_user_has_to_be_an_ordinary_one() -> None:
    user = domain_xml.job_user({"VMGAHP_USER_UID": "123456", "VMGAHP_USER_GID": "123457"})
    assert user == (123456, 123457, [123457])
    with pytest.raises(UsageError):
        domain_xml.job_user({"VMGAHP_USER_UID": "123456"})
    with pytest.raises(CommandFailed, match="root"):
        domain_xml.job_user({"VMGAHP_USER_UID": "0", "VMGAHP_USER_GID": "123457"})


@pytest.mark.parametrize(("mode", "own_group"), [(0o751, True), (0o750, False)], ids=["as on EL", "as on Debian"])
def test_qemu_gets_its_own_group_only_where_it_needs_it_to_get_in(
    mode: int, own_group: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accounts, "QEMU_DIRECTORY", tmp_path)
    tmp_path.chmod(mode)
    group = 123457 if own_group else tmp_path.stat().st_gid
    identity = domain_xml.identity_in_qemu(Identity(123456, 123457, [123457]))
    assert (identity.uid, identity.gid) == (123456, group) and identity.groups == sorted({123457, group})
    assert identity.label == f"+123456:+{group}"


def test_without_libvirt_s_directory_nobody_knows_qemu_s_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accounts, "QEMU_DIRECTORY", tmp_path / "absent")
    with pytest.raises(CommandFailed, match="absent"):
        domain_xml.identity_in_qemu(Identity(123456, 123457, [123457]))


def test_an_ad_of_bytes_without_end_is_refused() -> None:
    assert domain_xml.decode(b"a\xff\xc3\xbc") == "a\\xffü"
    assert len(domain_xml.decode(bytes(8 << 20))) == 8 << 20
    with pytest.raises(MalformedRequest, match="more than 8 MiB"):
        domain_xml.decode(bytes((8 << 20) + 1))


@pytest.fixture
def as_vm_gahp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accounts, "QEMU_DIRECTORY", tmp_path)
    monkeypatch.setenv("VMGAHP_USER_UID", "123456")
    monkeypatch.setenv("VMGAHP_USER_GID", "123457")


@pytest.mark.usefixtures("as_vm_gahp")
@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"", "refused", "vm_type"),
        (b"\0\xff", "refused", "a line that assigns nothing"),
        (AD.replace("512", "0").encode(), "alice_node_9.0", "JobVMMemory = 0"),
        (AD.replace("512", "5\0\x1b[31m").encode(), "alice_node_9.0", "JobVMMemory = 5"),
        (b"A = 1\nA = 2", "refused", "the job ad holds A twice"),
        (b"x" * ((8 << 20) + 1), "refused", "more than 8 MiB"),
    ],
)
def test_what_is_wrong_with_the_job_holds_it(
    data: bytes, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    xml = domain_xml.describe(data, "/bin/false", Config())
    domain = ElementTree.fromstring(xml)
    assert domain.findtext("name") == name
    kind = domain.get("type", "")
    assert kind.startswith("vmnode refuses this job: ") and words in kind and HOLDS_THE_JOB in kind
    said = capsys.readouterr().err
    assert said.startswith(f"vmnode-domain-xml: {name} is refused: ") and words in said
    assert said.count("\n") == 1 and said[:-1].isprintable()


@pytest.mark.usefixtures("as_vm_gahp")
@settings(max_examples=200)
@given(
    data=st.binary(max_size=100) | st.binary(max_size=30).map(lambda noise: AD.encode() + noise + b"\nJobVMType = 1")
)
def test_any_job_ad_is_answered_with_xml(data: bytes) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        xml = domain_xml.describe(data, "/bin/false", Config())
    assert HOLDS_THE_JOB in kind_of(xml)
    assert said.getvalue()[:-1].isprintable()
