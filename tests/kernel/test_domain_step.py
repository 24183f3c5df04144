"""vmnode-domain-xml as vm-gahp runs it: as root, for a real user's job, with the scripts of both HTCondor versions."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional
from xml.etree.ElementTree import Element

import psutil
import pytest

from tests.kernel import images
from tests.kernel.images import (
    ALICE,
    ALICE_UID,
    BOB,
    CREW_GID,
    GOOD,
    HOME,
    HOSTILE,
    LIB,
    LIBEXEC,
    MIB,
    OTHER_ROOT,
    QEMU_GID,
    ROOT,
    SCRATCH,
    SITE,
    STATE,
    Good,
    Hostile,
    configure,
    give,
    overlay,
    qcow2,
    qemu_img,
    raw,
)
from tests.kernel.world import tool, until
from tests.lab.images import image
from vmnode.host.accounts import QEMU_DIRECTORY

STEP = LIBEXEC / "vmnode-domain-xml"
SCRIPT = LIBEXEC / "libvirt_simple_script.awk"
CONFIGURATION = f"""
[kvm]
accel = "tcg"
[images]
roots = ["{ROOT}", "{OTHER_ROOT}"]
timeout_s = 20
[paths]
state_dir = "{STATE}"
"""
HOLDS = "(image is not in qcow2 format)"  # what vm-gahp looks for in libvirt's message
NAME = "alice_ap.example.org_12.0"


@pytest.fixture(scope="session")
def scripts() -> dict[str, str]:
    """HTCondor's own: of 23.9, and of 25.14."""
    there = "usr/libexec/condor/libvirt_simple_script.awk"
    return {suite: (image(suite) / there).read_text() for suite in ("trixie", "forky")}


def install_script(text: str, awk: str = "mawk") -> None:
    assert text.startswith("#!/usr/bin/awk -f\n")
    SCRIPT.write_text(text.replace("/usr/bin/awk", f"/usr/bin/{awk}", 1))
    SCRIPT.chmod(0o755)


@pytest.fixture(autouse=True)
def site(scripts: dict[str, str]) -> None:
    images.make_site()
    images.install()
    configure(CONFIGURATION)
    install_script(scripts["trixie"])


# --- how it is run, and what comes out --------------------------------------------------------------------------------


def job_ad(**changes: Optional[str]) -> str:
    """The ad as vm-gahp gives it, with these attributes otherwise, or (None) left out."""
    attributes: dict[str, Optional[str]] = {
        "Cmd": '"vm"',
        "GlobalJobId": '"ap.example.org#12.0#1795000000"',
        "JobUniverse": "13",
        "JobVMMemory": "512",
        "JobVMNetworking": "true",
        "JobVMNetworkingType": '"nat"',
        "JobVMType": '"kvm"',
        "JobVM_VCPUS": "2",
        "Owner": '"alice"',
        "Requirements": '(TARGET.HasVM) && (TARGET.VM_Type == "kvm")',
        "VMPARAM_VM_NAME": f'"{NAME}"',
        "VMPARAM_vm_Disk": '"disk:vda:w:qcow2"',
        "VM_WORKING_DIR": f'"{SCRATCH}"',
    }
    attributes.update(changes)
    return "".join(f"{name} = {value}\n" for name, value in attributes.items() if value is not None)


ENVIRONMENT = {"VMGAHP_USER_UID": str(ALICE_UID), "VMGAHP_USER_GID": str(ALICE_UID), "PATH": "/usr/bin:/bin"}


class Outcome(NamedTuple):
    text: str
    complaint: str

    @property
    def domain(self) -> Element:
        return ElementTree.fromstring(self.text)

    @property
    def sentence(self) -> str:
        """The type of the domain: what libvirt puts into its error message, if there is no such type."""
        return self.domain.attrib["type"]


def finish(step: subprocess.Popen[bytes], data: bytes) -> Outcome:
    output, complaint = step.communicate(data, timeout=60)
    assert step.returncode == 0  # or vm-gahp would describe the domain by itself
    return Outcome(output.decode(), complaint.decode())


def start(*arguments: object, environment: Mapping[str, str] = ENVIRONMENT, **options: Any) -> subprocess.Popen[bytes]:
    argv = [str(word) for word in (STEP, *(arguments or ("--config", SITE / "vmnode.toml", SCRIPT)))]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, env=dict(environment), **{**streams, **options})


def describe(disks: Optional[str] = None, **changes: Optional[str]) -> Outcome:
    if disks is not None:
        changes["VMPARAM_vm_Disk"] = f'"{disks}"'
    return finish(start(), job_ad(**changes).encode())


def held(outcome: Outcome, sentence: str, name: str = NAME) -> None:
    """The job is held, for this reason (a regular expression); nothing was recorded, and nothing can be started."""
    assert re.search(f"^vmnode refuses this job: {sentence}", outcome.sentence), outcome.sentence
    assert outcome.sentence.endswith(HOLDS)
    assert [(part.tag, part.text) for part in outcome.domain] == [("name", name)]
    assert outcome.complaint.startswith("vmnode-domain-xml: ") and outcome.complaint.count("\n") == 1
    assert "Traceback" not in outcome.complaint
    assert list(STATE.glob("**/*.json")) == []


def blamed(outcome: Outcome, sentence: str) -> None:
    """The worker takes no more VM jobs, and this one runs elsewhere."""
    assert re.search(f"^vmnode cannot work here: {sentence}", outcome.sentence), outcome.sentence
    assert HOLDS not in outcome.text
    assert [part.tag for part in outcome.domain] == ["name"]
    assert outcome.complaint.count("\n") == 1 and "Traceback" not in outcome.complaint
    assert list(STATE.glob("**/*.json")) == []


def disks_of(outcome: Outcome) -> list[str]:
    """The disks of a domain that can be started, as canonical XML."""
    assert outcome.sentence == "qemu" and outcome.complaint == ""
    return [canonical(disk) for disk in outcome.domain.iter("disk")]


def canonical(element: Element) -> str:
    return ElementTree.canonicalize(ElementTree.tostring(element, encoding="unicode"), strip_text=True)


def disk_xml(source: object, kind: str, *chain: tuple[object, str], target: str = "vda", end: str = "") -> str:
    backing = "<backingStore></backingStore>"
    for path, its_kind in reversed(chain):
        image = f'<format type="{its_kind}"></format><source file="{path}"></source>'
        backing = f'<backingStore type="file">{image}{backing}</backingStore>'
    driver = f'<driver name="qemu" type="{kind}"></driver>'
    middle = f'{driver}<source file="{source}"></source>{backing}<target dev="{target}"></target>'
    return f'<disk device="disk" type="file">{middle}{end}</disk>'


READ_ONLY = "<readonly></readonly>"
DEFAULT, VIRTIO = '<source network="default"></source>', '<model type="virtio"></model>'


def plugin(url: str) -> None:
    """vm-nfs-plugin, before the job starts."""
    subprocess.run(
        [str(LIBEXEC / "vm-nfs-plugin"), "--config", str(SITE / "vmnode.toml"), url, f"{SCRATCH}/x"],
        user=ALICE_UID,
        group=ALICE_UID,
        extra_groups=ALICE.groups,
        env={},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )


# --- good jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("awk", ["mawk", "gawk"])
@pytest.mark.parametrize("suite", ["trixie", "forky"])
def test_a_job_gets_the_domain_that_it_asked_for(scripts: dict[str, str], suite: str, awk: str) -> None:
    install_script(scripts[suite], awk)
    base = qcow2(ROOT / "base.qcow2")
    plugin(f"nfs://{base}:disk.qcow2")
    give(raw(SCRATCH / "data"))
    outcome = describe("disk.qcow2:vda:w:qcow2,data:vdb:r,/mnt/images/base.qcow2:vdc:r:qcow2", JobVMVNCConsole="true")
    *_, devices, label = outcome.domain
    assert outcome.sentence == "qemu" and outcome.complaint == ""
    values = {part.tag: part.text for part in outcome.domain}
    assert (values["name"], values["memory"], values["vcpu"]) == (NAME, "524288", "2")
    assert outcome.domain.find("cpu") is None  # that of the host is not to be had where it is emulated
    assert canonical(label) == (
        f'<seclabel model="dac" relabel="no" type="static"><label>+{ALICE_UID}:+{QEMU_GID}</label></seclabel>'
    )
    console, graphics, interface, *disks = devices
    assert canonical(console) == '<console type="pty"><source path="/dev/ptmx"></source></console>'
    assert canonical(graphics).startswith('<graphics autoport="yes"')
    assert canonical(interface) == f'<interface type="network">{DEFAULT}{VIRTIO}</interface>'
    assert [canonical(disk) for disk in disks] == [
        disk_xml(f"{SCRATCH}/disk.qcow2", "qcow2", (base, "qcow2")),
        disk_xml(f"{SCRATCH}/data", "raw", target="vdb", end=READ_ONLY),
        disk_xml(base, "qcow2", target="vdc", end=READ_ONLY),
    ]


@pytest.mark.parametrize("suite", ["trixie", "forky"])
@pytest.mark.parametrize("awk", ["mawk", "gawk"])
def test_with_kvm_the_guest_gets_the_host_s_processor(scripts: dict[str, str], suite: str, awk: str) -> None:
    own_devices(0o666)
    install_script(scripts[suite], awk)
    configure(CONFIGURATION.replace('"tcg"', '"kvm"'))
    give(raw(SCRATCH / "disk"))
    outcome = describe("disk:vda:w:raw")
    assert (outcome.sentence, outcome.complaint) == ("kvm", "")
    (cpu,) = outcome.domain.iter("cpu")
    assert canonical(cpu) == '<cpu mode="host-passthrough"></cpu>'


@pytest.mark.parametrize(
    "suite, changes, interface",
    [
        ("trixie", {"JobVMNetworking": "false"}, ""),
        ("forky", {"JobVMNetworking": None}, ""),
        (
            "trixie",
            {"JobVM_MACADDR": '"52:54:00:12:34:56"'},
            f'<interface type="network">{DEFAULT}<mac address="52:54:00:12:34:56"></mac>{VIRTIO}</interface>',
        ),
        (
            "forky",
            {"JobVMNetworkingType": '"Bridge"', "VMPARAM_Bridge_Interface": '"br0"'},
            f'<interface type="bridge"><source bridge="br0"></source>{VIRTIO}</interface>',
        ),
        (
            "forky",
            {"JobVMNetworkingType": '"user"'},
            f'<interface type="user">{VIRTIO}<backend type="passt"></backend></interface>',
        ),
    ],
)
@pytest.mark.parametrize("awk", ["mawk", "gawk"])
def test_a_network_interface_is_as_asked_for(
    scripts: dict[str, str], suite: str, changes: dict[str, Optional[str]], interface: str, awk: str
) -> None:
    install_script(scripts[suite], awk)
    give(raw(SCRATCH / "disk"))
    outcome = describe("disk:vda:w:raw", **changes)
    assert outcome.sentence == "qemu"
    assert "".join(canonical(found) for found in outcome.domain.iter("interface")) == interface


def test_a_file_with_iso_in_its_name_is_a_cdrom() -> None:
    give(raw(SCRATCH / "install.iso"))
    (disk,) = disks_of(describe("install.iso:hda:r"))
    assert disk == disk_xml(f"{SCRATCH}/install.iso", "raw", target="hda", end=READ_ONLY).replace(
        'device="disk"', 'device="cdrom"'
    )


@pytest.mark.parametrize("good", GOOD, ids=str)
def test_good_images_are_good_as_a_disk_and_as_a_base(good: Good) -> None:
    good.make(ROOT / "base")
    good.make(SCRATCH / "own")
    give(SCRATCH / "own")
    plugin(f"nfs://{ROOT}/base:disk")
    outcome = describe(f"disk:vda:w:qcow2,own:vdb:w:{good.format},{ROOT}/base:vdc:r")
    assert disks_of(outcome) == [
        disk_xml(SCRATCH / "disk", "qcow2", (ROOT / "base", good.format)),
        disk_xml(SCRATCH / "own", good.format, target="vdb"),
        disk_xml(ROOT / "base", good.format, target="vdc", end=READ_ONLY),
    ]


def test_a_chain_is_written_by_real_paths() -> None:
    raw(ROOT / "el9-20261101")
    (ROOT / "el9").symlink_to("el9-20261101")
    give(overlay(SCRATCH / "disk", f"{ROOT}/../images/el9", "raw"))
    assert disks_of(describe(f"disk:vda:w,{ROOT}/el9:vdb:r")) == [
        disk_xml(SCRATCH / "disk", "qcow2", (ROOT / "el9-20261101", "raw")),
        disk_xml(ROOT / "el9-20261101", "raw", target="vdb", end=READ_ONLY),
    ]


def test_a_name_that_means_something_in_xml_is_written_so_that_it_does_not() -> None:
    base = raw(ROOT / "a'b\"<c>&ä.img")
    give(overlay(SCRATCH / "disk", str(base), "raw"))
    outcome = describe("disk:vda:w")
    assert [source.get("file") for source in outcome.domain.iter("source")][-2:] == [f"{SCRATCH}/disk", str(base)]
    assert outcome.text.isascii()


def test_as_many_disks_as_there_may_be() -> None:
    raw(ROOT / "base")
    targets = [f"vd{first}{last}" for first in "abc" for last in "abcdefghijklmnopqrstuvwxyz"][:64]
    for target in targets:
        give(overlay(SCRATCH / target, str(ROOT / "base"), "raw"))
    outcome = describe(",".join(f"{target}:{target}:w:qcow2" for target in targets))
    assert len(disks_of(outcome)) == 64
    more = ",".join(f"{target}:{target}:w:qcow2" for target in [*targets, "vdzz"])
    STATE.joinpath("overlays", f"{NAME}.json").unlink()
    held(describe(more), "vm_disk names 65 disks, more than 64")


# --- whose rights count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [ALICE_UID, CREW_GID])
def test_all_groups_of_the_user_count(group: int) -> None:
    os.chown(raw(ROOT / "base"), 0, group)
    (ROOT / "base").chmod(0o640)
    give(overlay(SCRATCH / "disk", str(ROOT / "base"), "raw"))
    assert disks_of(describe("disk:vda:w")) == [disk_xml(SCRATCH / "disk", "qcow2", (ROOT / "base", "raw"))]


def test_the_group_that_qemu_gets_beside_them_does_not_count() -> None:
    os.chown(raw(ROOT / "base"), 0, QEMU_GID)
    (ROOT / "base").chmod(0o640)
    held(describe("disk:vda:w,/mnt/images/base:vdb:r"), "vm_disk names disk, which is not in")
    give(raw(SCRATCH / "disk"))
    held(describe("disk:vda:w,/mnt/images/base:vdb:r"), "you may not read /mnt/images/base")


def test_no_right_of_root_s_counts() -> None:
    raw(ROOT / "base").chmod(0o600)
    give(overlay(SCRATCH / "disk", str(ROOT / "base"), "raw"))
    held(describe("disk:vda:w"), "you may not read /mnt/images/base")
    (ROOT / "base").chmod(0o644)
    SCRATCH.chmod(0o000)
    held(describe("disk:vda:w"), "the disk disk cannot be looked at: Permission denied")


def test_a_user_that_has_no_name_has_only_his_own_group() -> None:
    os.chown(SCRATCH, 31337, 31338)
    os.chown(raw(SCRATCH / "disk"), 31337, 31338)
    step = start(environment={**ENVIRONMENT, "VMGAHP_USER_UID": "31337", "VMGAHP_USER_GID": "31338"})
    outcome = finish(step, job_ad(VMPARAM_vm_Disk='"disk:vda:w"').encode())
    assert [label.text for label in outcome.domain.iter("label")] == [f"+31337:+{QEMU_GID}"]


# --- what the user does after the plugin ------------------------------------------------------------------------------


@pytest.fixture
def base() -> Path:
    """A base image with an overlay on it, made by the plugin."""
    path = qcow2(ROOT / "base")
    plugin(f"nfs://{path}:disk")
    return path


def test_an_overlay_that_the_plugin_made_is_fine(base: Path) -> None:
    assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2", (base, "qcow2"))]


@pytest.mark.parametrize(
    "backing, kind, sentence",
    [
        ("/etc/shadow", "raw", "you may not read /etc/shadow|/etc/shadow is not inside an image root"),
        ("/mnt/home/alice/outside", "raw", "/mnt/home/alice/outside is not inside an image root"),
        ("/mnt/execute/dir_7/other", "qcow2", "/mnt/execute/dir_7/other is not inside an image root"),
        ("/mnt/images/../home/alice/outside", "raw", "/mnt/images/../home/alice/outside, which is /mnt/home/alice/out"),
        ("/mnt/images/nothing", "raw", "there is no /mnt/images/nothing on this worker"),
        ("/dev/null", "raw", "/dev/null is not inside an image root"),
        ("/proc/self/root/etc/passwd", "raw", "/proc/self/root/etc/passwd, which is /etc/passwd, is not inside"),
        ("base", "qcow2", "the disk disk has the backing file 'base', which is no path in an image root"),
        ("../../images/base", "qcow2", "the disk disk has the backing file '../../images/base', which is no path"),
        ('json:{"driver":"file","filename":"/etc/shadow"}', "raw", "the disk disk has the backing file 'json:"),
        ("nbd://127.0.0.1:10809/x", "raw", "the disk disk has the backing file 'nbd://127.0.0.1:10809/x', which is no"),
        ("nbd:unix:/run/x.sock", "raw", "the disk disk has the backing file 'nbd:unix:/run/x.sock', which is no path"),
        ("https://example.org/x", "raw", "the disk disk has the backing file 'https://example.org/x', which is no"),
        ("file:/mnt/images/base", "qcow2", "the disk disk has the backing file 'file:/mnt/images/base', which is no"),
        ("host_device:/dev/sda", "raw", "the disk disk has the backing file 'host_device:/dev/sda', which is no path"),
        ("/mnt/images/base", "raw", "/mnt/images/base is qcow2, not raw"),
        ("/mnt/images/base", "vmdk", "the disk disk has a backing file of the format 'vmdk'"),
        ("/mnt/images/a\nb", "raw", "there is no /mnt/images/a b on this worker"),
        ("/mnt/images/\x01\x1b[31m", "raw", "there is no /mnt/images/  .31m on this worker"),
        ("/mnt/home/alice/odd", "raw", "the real path of /mnt/home/alice/odd holds what cannot be printed"),
        ("/" + "x/" * 400 + "x", "raw", "there is no /x/x"),
    ],
)
def test_an_overlay_that_was_rewritten_afterwards_is_refused(
    base: Path,
    backing: str,
    kind: str,
    sentence: str,
) -> None:
    give(raw(HOME / "outside"), 0o444)
    give(qcow2(SCRATCH / "other"))
    (HOME / "b\udcff").mkdir()
    give(raw(HOME / "b\udcff" / "x"))
    (HOME / "odd").symlink_to("b\udcff/x")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", kind, "-b", backing, SCRATCH / "disk")
    held(describe(), sentence)


def test_an_overlay_on_a_link_of_the_user_s_is_judged_by_where_that_leads(base: Path) -> None:
    (HOME / "link").symlink_to(base)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", HOME / "link", SCRATCH / "disk")
    assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2", (base, "qcow2"))]
    STATE.joinpath("overlays", f"{NAME}.json").unlink()
    (HOME / "link").unlink()
    (HOME / "link").symlink_to("/etc/passwd")
    held(describe(), "/mnt/home/alice/link, which is /etc/passwd, is not inside an image root")


def test_an_overlay_whose_backing_file_was_taken_away_is_a_disk_of_the_user_s_own(base: Path) -> None:
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", SCRATCH / "disk")
    assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2")]


def test_a_backing_file_whose_format_is_not_said_gets_the_one_that_it_has(base: Path) -> None:
    """The extension that says it becomes one that nobody knows: by itself, QEMU would guess."""
    data = (SCRATCH / "disk").read_bytes()
    assert data.count(b"\xe2\x79\x2a\xca") == 1
    (SCRATCH / "disk").write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))
    assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2", (base, "qcow2"))]


def test_a_base_that_changed_since_the_plugin_ran_is_looked_at_again(base: Path) -> None:
    overlay(base, "/etc/shadow", "raw")
    held(describe(), "/mnt/images/base cannot be a base image: it has a backing file of its own, '/etc/shadow'")
    base.chmod(0o666)
    held(describe(), "you may write to /mnt/images/base")
    base.chmod(0o600)
    held(describe(), "you may not read /mnt/images/base")
    base.unlink()
    held(describe(), "there is no /mnt/images/base on this worker")
    base.symlink_to("/etc/passwd")
    held(describe(), "/mnt/images/base, which is /etc/passwd, is not inside an image root")


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("link", "the disk disk is a symbolic link, not a regular file"),
        ("dangling link", "the disk disk is a symbolic link, not a regular file"),
        ("link to the base", "the disk disk is a symbolic link, not a regular file"),
        ("fifo", "the disk disk is a pipe or a socket, not a regular file"),
        ("socket", "the disk disk is a pipe or a socket, not a regular file"),
        ("device", "the disk disk is a device, not a regular file"),
        ("directory", "the disk disk is a directory, not a regular file"),
        ("nothing", "vm_disk names disk, which is not in the job's scratch directory"),
    ],
)
def test_a_disk_that_is_something_else_by_now_is_refused(base: Path, kind: str, sentence: str) -> None:
    disk = SCRATCH / "disk"
    disk.unlink()
    if kind == "fifo":
        os.mkfifo(disk, 0o666)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(disk))
    elif kind == "device":
        os.mknod(disk, stat.S_IFBLK | 0o666, os.makedev(7, 0))
    elif kind == "directory":
        disk.mkdir()
    elif kind != "nothing":
        disk.symlink_to({"link": "/etc/passwd", "dangling link": "/nonexistent"}.get(kind, base))
    held(describe(), sentence)


# --- disks that the user brought --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_a_hostile_image_is_refused_as_a_disk_and_as_a_base(hostile: Hostile) -> None:
    hostile.make(SCRATCH / "own")
    give(SCRATCH / "own")
    held(describe("own:vda:w:raw"), f"the disk own cannot be used: {hostile.sentence}")  # whatever vm_disk says
    hostile.make(ROOT / "base")
    give(overlay(SCRATCH / "disk", str(ROOT / "base"), "qcow2"))
    held(describe(), f"/mnt/images/base cannot be a base image: {hostile.sentence}")


@pytest.mark.parametrize(
    "disks, sentence",
    [
        ("qcow2:vda:w:raw", "vm_disk says that qcow2 is raw, and it is qcow2"),
        ("raw:vda:w:qcow2", "vm_disk says that raw is qcow2, and it is raw"),
        ("/mnt/images/base:vda:r:qcow2", "/mnt/images/base is raw, not qcow2"),
        ("/mnt/images/base:vda:w:raw", "vm_disk names /mnt/images/base as writable, which only a disk in the scratch"),
        ("/etc/passwd:vda:r:raw", "/etc/passwd is not inside an image root"),
        ("/etc/shadow:vda:r:raw", "/etc/shadow is not inside an image root|you may not read /etc/shadow"),
        ("/mnt/execute/dir_7/raw:vda:r:raw", "/mnt/execute/dir_7/raw is not inside an image root"),
        ("/mnt/execute/dir_7/raw:vda:w:raw", "vm_disk names /mnt/execute/dir_7/raw as writable"),
        ("/mnt/images/nothing:vda:r:raw", "there is no /mnt/images/nothing on this worker"),
        ("mode000:vda:r", "QEMU, which runs with your rights, may not read the disk mode000"),
        ("mode400:vda:w", "QEMU, which runs with your rights, may not read and write the disk mode400"),
        ("roots:vda:r", "QEMU, which runs with your rights, may not read the disk roots"),
        ("bobs:vda:w", "QEMU, which runs with your rights, may not read and write the disk bobs"),
        ("nothing:vda:w", "vm_disk names nothing, which is not in the job's scratch directory"),
        ("raw:vda:w,qcow2:vda:w", "vm_disk names the device vda twice"),
        ("raw:vda:w,raw:vdb:w", "vm_disk names the file raw twice"),
        ("raw:vda:w,nothing:vdb:w", "vm_disk names nothing"),  # whichever it is of many
    ],
)
def test_what_may_not_be_a_disk_is_refused_with_a_sentence_of_its_own(disks: str, sentence: str) -> None:
    raw(ROOT / "base")
    for name, mode in (("raw", 0o600), ("mode000", 0), ("mode400", 0o400)):
        give(raw(SCRATCH / name), mode)
    give(qcow2(SCRATCH / "qcow2"))
    raw(SCRATCH / "roots").chmod(0o600)
    give(raw(SCRATCH / "bobs"), 0o644, BOB)
    held(describe(disks), sentence)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"VMPARAM_vm_Disk": "\"raw'/><hostdev/><x y=':vda:w\""}, "vm_disk names the file"),
        ({"VMPARAM_vm_Disk": '"raw:vda\'/>:w"'}, "vm_disk: raw: .* is no device"),
        ({"VMPARAM_vm_Disk": '"raw:vda:rwx"'}, "vm_disk: raw: 'rwx' is no permission"),
        ({"VMPARAM_vm_Disk": '"raw:vda:w:vmdk"'}, "vm_disk: raw: the format 'vmdk' is not used here"),
        ({"VMPARAM_vm_Disk": '"../dir_7/raw:vda:w"'}, "vm_disk names the file '../dir_7/raw'"),
        ({"VMPARAM_vm_Disk": '""'}, "vm_disk holds ''"),
        ({"VMPARAM_vm_Disk": None}, "vm_disk holds ''"),
        ({"JobVM_MACADDR": '"52:54:00:12:34:56\'/><x"'}, "vm_macaddr = "),
        ({"JobVMType": '"xen"'}, "vm_type = "),
        ({"JobVMMemory": '"512</memory>"'}, "JobVMMemory = "),
        ({"VMPARAM_VM_NAME": '"a/../../b"'}, "VMPARAM_VM_NAME = "),
        ({"VM_WORKING_DIR": '"/mnt/execute/../images"'}, "VM_WORKING_DIR = "),
        ({"VM_WORKING_DIR": '"execute/dir_7"'}, "VM_WORKING_DIR = "),
    ],
)
def test_an_ad_that_holds_what_it_must_not_is_refused(changes: dict[str, Optional[str]], sentence: str) -> None:
    give(raw(SCRATCH / "raw"))
    held(describe(None, **changes), sentence, "refused" if "VMPARAM_VM_NAME" in changes else NAME)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "vm_type = "),
        (b"x" * (9 << 20), "the job ad has more than 8 MiB"),
        (bytes(range(256)) * 40, "the job ad holds a line that assigns nothing"),
        (b"\xff\xfe\0\0" * 1000, "the job ad holds a line that assigns nothing"),
        (b"\0" * 100, "the job ad holds a line that assigns nothing"),
        (b'JobVMType = "kvm"\nJobVMType = "xen"\n', "the job ad holds JobVMType twice"),
        (b"[ a = 1 ]", "the job ad holds a line that assigns nothing"),
    ],
    ids=["nothing", "9 MiB", "bytes", "not UTF-8", "zeros", "twice", "new syntax"],
)
def test_an_input_that_is_no_job_ad_is_the_job_s_fault(data: bytes, sentence: str) -> None:
    held(finish(start(), data), sentence, "refused")


# --- what is wrong with the worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"VMGAHP_USER_UID": None}, "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ({"VMGAHP_USER_GID": None}, "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ({"VMGAHP_USER_UID": "alice"}, "VMGAHP_USER_UID and VMGAHP_USER_GID are not set"),
        ({"VMGAHP_USER_UID": "0"}, "the job's user is root: QEMU would have all rights"),
        ({"VMGAHP_USER_UID": "-1"}, ""),
        ({"VMGAHP_USER_UID": "4294967296"}, ""),
    ],
)
def test_without_an_ordinary_user_nothing_is_started(environment: dict[str, Optional[str]], sentence: str) -> None:
    give(raw(SCRATCH / "disk"))
    merged = {name: value for name, value in {**ENVIRONMENT, **environment}.items() if value is not None}
    outcome = finish(start(environment=merged), job_ad(VMPARAM_vm_Disk='"disk:vda:w"').encode())
    if sentence:
        blamed(outcome, sentence)
    else:
        assert outcome.sentence.startswith(("vmnode refuses this job", "vmnode cannot work here"))


def test_without_libvirt_s_directory_nobody_knows_whom_qemu_runs_as() -> None:
    give(raw(SCRATCH / "disk"))
    QEMU_DIRECTORY.rmdir()
    blamed(describe("disk:vda:w"), "there is no /var/lib/libvirt/qemu")


EXTRA = "<hostdev mode='subsystem' type='pci'><source><address slot='3'/></source></hostdev>"


@pytest.mark.parametrize(
    "script, sentence",
    [
        (None, "/mnt/libexec/libvirt_simple_script.awk: cannot be started: No such file or directory"),
        ("exit 3", "/mnt/libexec/libvirt_simple_script.awk ended with status 3: "),
        ("echo 'it is broken' >&2; exit 1", "/mnt/libexec/libvirt_simple_script.awk ended with status 1: it is broken"),
        ("kill -SEGV $$", "/mnt/libexec/libvirt_simple_script.awk ended with status -11"),
        ("exec yes", "/mnt/libexec/libvirt_simple_script.awk printed more than 1 MiB"),
        ("cat >/dev/null", "HTCondor's script wrote no XML"),
        ("REAL; echo '<domain/>'", "HTCondor's script wrote no XML"),
        (
            f'REAL | sed "s|</devices>|{EXTRA}</devices>|"',
            "HTCondor's script wrote what the job did not ask for: <hostd",
        ),
        ("REAL | sed 's/disk:vda/&/; s/vda/vdb/'", "HTCondor's script wrote what the job did not ask for: <disk"),
        ("REAL | sed 's|dir_7/disk|dir_7/../disk|'", "HTCondor's script wrote what the job did not ask for: <disk"),
        ("REAL | grep -v interface", "HTCondor's script "),
        ("REAL | sed 's/524288/1048576/'", "HTCondor's script wrote what the job did not ask for: <memory"),
        ("REAL | sed \"s/type='kvm'/type='lxc'/\"", "HTCondor's script wrote what the job did not ask for: <domain"),
        (
            "REAL | sed 's|</os>|<kernel>/mnt/execute/dir_7/vmlinuz</kernel></os>|'",
            "HTCondor's script wrote what the job did not ask for: <os",
        ),
        ("echo '<!DOCTYPE a [<!ENTITY b \"c\">]>'; REAL", "HTCondor's script wrote a document type"),
    ],
)
def test_a_script_that_does_not_what_it_should_is_the_worker_s_fault(
    scripts: dict[str, str], script: Optional[str], sentence: str
) -> None:
    give(raw(SCRATCH / "disk"))
    real = LIBEXEC / "real.awk"
    SCRIPT.rename(real)
    if script is not None:
        SCRIPT.write_text(f"#!/bin/sh\n{script.replace('REAL', str(real))}\n")
        SCRIPT.chmod(0o755)
    blamed(describe("disk:vda:w:raw"), sentence)


def test_a_script_that_warns_is_listened_to_all_the_same() -> None:
    give(raw(SCRATCH / "disk"))
    SCRIPT.rename(LIBEXEC / "real.awk")
    SCRIPT.write_text(f"#!/bin/sh\necho 'a warning' >&2\nexec {LIBEXEC}/real.awk\n")
    SCRIPT.chmod(0o755)
    assert disks_of(describe("disk:vda:w:raw")) == [disk_xml(SCRATCH / "disk", "raw")]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[images\n", "/mnt/vmnode.toml: cannot be read"),
        ('[kvm]\naccel = "yes"\n', "/mnt/vmnode.toml: .kvm. accel = 'yes': must be one of"),
        (None, "/mnt/vmnode.toml: no such file"),
    ],
)
def test_a_broken_configuration_is_the_worker_s_fault(text: Optional[str], sentence: str) -> None:
    give(raw(SCRATCH / "disk"))
    (SITE / "vmnode.toml").unlink()
    if text:
        configure(text)
    blamed(describe("disk:vda:w"), sentence)


def own_devices(mode: int, group: int = 0) -> None:
    """A /dev with a KVM device of these rights, and nothing else that is needed but /dev/null."""
    tool("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/dev")
    os.mknod("/dev/null", stat.S_IFCHR, os.makedev(1, 3))
    Path("/dev/null").chmod(0o666)
    Path("/dev/kvm").touch()
    os.chown("/dev/kvm", 0, group)
    Path("/dev/kvm").chmod(mode)


@pytest.mark.parametrize(
    "mode, group, works", [(0o666, 0, True), (0o660, QEMU_GID, True), (0o660, 0, False), (0o640, QEMU_GID, False)]
)
def test_without_the_right_to_use_kvm_the_job_runs_elsewhere(mode: int, group: int, works: bool) -> None:
    own_devices(mode, group)
    configure(CONFIGURATION.replace('"tcg"', '"kvm"'))
    give(raw(SCRATCH / "disk"))
    outcome = describe("disk:vda:w")
    if works:
        assert outcome.sentence == "kvm"
    else:
        blamed(outcome, f"QEMU, running as a job's user with the group {QEMU_GID}, may not use /dev/kvm")


def test_what_is_wrong_with_the_job_comes_before_what_is_wrong_with_the_worker() -> None:
    """Or a job that can never run would wander through the pool and take each such worker out of it."""
    own_devices(0o600)
    configure(CONFIGURATION.replace('"tcg"', '"kvm"'))
    SCRIPT.unlink()
    held(describe("nothing:vda:w"), "vm_disk names nothing")


@pytest.mark.parametrize(
    "arguments", [(), (SCRIPT, "another"), ("--nonsense", SCRIPT), ("--help",), ("--config",)], ids=repr
)
def test_called_wrongly_it_writes_what_libvirt_refuses(arguments: tuple[object, ...]) -> None:
    give(raw(SCRATCH / "disk"))
    step = start(*(arguments or ("--",)))
    output, _ = step.communicate(job_ad(VMPARAM_vm_Disk='"disk:vda:w"').encode(), timeout=60)
    assert step.returncode == 0
    assert "kvm" not in output.decode() and "<disk" not in output.decode()
    assert HOLDS not in output.decode()
    if arguments != ("--help",):
        assert output.decode() == '<domain type="vmnode-domain-xml failed"/>\n'


def test_if_python_itself_fails_there_is_xml_that_libvirt_refuses() -> None:
    give(raw(SCRATCH / "disk"))
    (SITE / "broken").write_text("import nothing_of_this_name\n")
    tool("mount", "--bind", str(SITE / "broken"), str(LIB / "vmnode" / "errors.py"))
    output, complaint = start().communicate(job_ad(VMPARAM_vm_Disk='"disk:vda:w"').encode(), timeout=60)
    assert output.decode() == '<domain type="vmnode-domain-xml failed"/>\n'
    assert b"nothing_of_this_name" in complaint


def test_without_standard_input_there_is_xml_that_libvirt_refuses() -> None:
    argv = [str(STEP), "--config", str(SITE / "vmnode.toml"), str(SCRIPT)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "kvm" not in done.stdout and HOLDS not in done.stdout
    assert ElementTree.fromstring(done.stdout).get("type") != "qemu"


# --- a user who interferes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, timeout_s, sentence",
    [
        (0, 2, f"the disks of {NAME}: no answer within 2 s"),
        (signal.SIGSTOP, 2, f"the disks of {NAME}: no answer within 2 s"),
        (signal.SIGKILL, 20, f"the disks of {NAME}: a child of vmnode ended with status -9"),
        (signal.SIGTERM, 20, f"the disks of {NAME}: a child of vmnode ended with status -15"),
    ],
)
def test_whatever_the_user_does_to_the_process_with_his_rights_only_his_job_is_held(
    number: int, timeout_s: float, sentence: str
) -> None:
    """It waits for a file server that hangs; and the user may send it any signal."""
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    hung = SITE / "hung"
    configure(CONFIGURATION.replace(f'"{ROOT}"', f'"{hung}", "{ROOT}"').replace("= 20", f"= {timeout_s}"))
    raw(OTHER_ROOT / "base")
    with images.served(OTHER_ROOT, hung) as server:
        give(overlay(SCRATCH / "disk", f"{hung}/base", "raw"))
        tool("kill", "-STOP", str(server.pid))
        began = time.monotonic()
        step = start()
        assert step.stdin is not None
        step.stdin.write(job_ad().encode())
        step.stdin.close()
        step.stdin = None
        if number:
            until(lambda: looking(step.pid))
            as_alice = ["setpriv", f"--reuid={ALICE_UID}", f"--regid={ALICE_UID}", "--clear-groups"]
            tool(*as_alice, "kill", f"-{number}", *map(str, looking(step.pid)))
        output, complaint = step.communicate(timeout=20)
        took = time.monotonic() - began
        held(Outcome(output.decode(), complaint.decode()), sentence)
        assert step.returncode == 0 and took < 10
        tool("kill", "-CONT", str(server.pid))
        assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2", (hung / "base", "raw"))]


def looking(pid: int) -> list[int]:
    """The processes below `pid` that have alice's rights."""
    try:
        family = psutil.Process(pid).children(recursive=True)
        return [found.pid for found in family if found.uids().real == ALICE_UID]
    except psutil.NoSuchProcess:
        return []


def test_another_job_s_image_works_while_a_root_hangs() -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    configure(CONFIGURATION.replace(f'"{ROOT}"', f'"{SITE}/hung", "{ROOT}"').replace("= 20", "= 2"))
    with images.served(OTHER_ROOT, SITE / "hung") as server:
        tool("kill", "-STOP", str(server.pid))
        raw(ROOT / "base")
        give(overlay(SCRATCH / "disk", str(ROOT / "base"), "raw"))
        assert disks_of(describe()) == [disk_xml(SCRATCH / "disk", "qcow2", (ROOT / "base", "raw"))]


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_the_bases_are_recorded_as_they_are_when_the_guest_starts() -> None:
    one, two = qcow2(ROOT / "one"), raw(OTHER_ROOT / "two")
    give(overlay(SCRATCH / "a", str(one)))
    give(overlay(SCRATCH / "b", str(two), "raw"))
    give(raw(SCRATCH / "own"))
    before = time.time()
    assert len(disks_of(describe(f"a:vda:w,own:vdb:w,b:vdc:r,{two}:vdd:r"))) == 4
    record = STATE / "overlays" / f"{NAME}.json"
    document = json.loads(record.read_text())
    assert before <= document.pop("started_at") <= time.time()
    bases = [
        {
            "path": str(path),
            "format": kind,
            "virtual_size": size,
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "inode": path.stat().st_ino,
        }
        for path, kind, size in ((one, "qcow2", 64 * MIB), (two, "raw", MIB), (two, "raw", MIB))
    ]
    assert document == {
        "version": 1,
        "domain": NAME,
        "job": "ap.example.org#12.0#1795000000",
        "owner": "alice",
        "bases": bases,
    }
    assert [path.name for path in record.parent.iterdir()] == [record.name]
    for path, mode in ((record, 0o644), (record.parent, 0o755)):
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, mode)


def test_a_record_that_cannot_be_written_keeps_no_guest_from_starting() -> None:
    give(raw(SCRATCH / "disk"))
    (STATE / "overlays").mkdir()
    (STATE / "overlays").chmod(0o777)  # anybody could put a link there
    outcome = describe("disk:vda:w")
    assert outcome.sentence == "qemu"
    assert f"{STATE}/overlays/{NAME}.json: cannot be written, so nobody will know" in outcome.complaint
    assert list((STATE / "overlays").iterdir()) == []


def test_a_refusal_is_one_line_in_the_system_s_log_whatever_the_user_s_files_are_called() -> None:
    own_devices(0o666)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("/dev/log")
        log.settimeout(10)
        raw(ROOT / "base")
        give(overlay(SCRATCH / "disk", "/mnt/images/a\nvmnoded[1]: all is well\x1b[2J", "raw"))
        held(describe(), "there is no /mnt/images/a vmnoded.1.: all is well .2J on this worker")
        (line,) = log.recv(10000).decode().splitlines()
        assert re.match(
            r"<28>.*vmnode-domain-xml\[\d+\]: alice_\S+_12.0 is refused: there is no /mnt/images/a vm", line
        )
        assert line.rstrip("\0").isprintable()
        STATE.joinpath("none").touch()
        give(overlay(SCRATCH / "disk", str(ROOT / "base"), "raw"))
        assert len(disks_of(describe())) == 1  # which says nothing
        log.setblocking(False)
        with pytest.raises(BlockingIOError):
            log.recv(10000)
