"""The job ad that vm-gahp hands to root: what of it reaches HTCondor's script, and what never does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmnode.errors import MalformedRequest
from vmnode.transfer.url import plain
from vmnode.transfer.vmjob import Disk, Job, parse, parse_disks

SCRATCH = "/var/lib/condor/execute/dir_2762"

# A job of HTCondor 23.9, as vm-gahp prints it (xen_type.linux.cpp, VirshType::CreateVirshConfigFile), shortened.
FIELDS = {
    "Arguments": '""',
    "ClusterId": "9",
    "Cmd": '"my-analysis"',
    "CumulativeRemoteSysCpu": "0.0",
    "Environment": r'"A=\"b c\" D=\'e\'"',
    "GlobalJobId": '"node#9.0#1795267985"',
    "JobCurrentReconnectAttempt": "undefined",
    "JobUniverse": "13",
    "JobVMCheckpoint": "false",
    "JobVMMemory": "1024",
    "JobVMNetworking": "true",
    "JobVMType": '"kvm"',
    "JobVMVNCConsole": "false",
    "JobVM_MACADDR": '"52:54:00:12:34:56"',
    "JobVM_VCPUS": "2",
    "MyAddress": '"<198.18.86.2:9618?addrs=198.18.86.2-9618&alias=node&noUDP&sock=shadow_2718_d3a8_1>"',
    "Owner": '"alice"',
    "RequestCpus": "1",
    "RequestMemory": "ifThenElse(MemoryUsage =!= undefined,MemoryUsage,( ImageSize + 1023 ) / 1024)",
    "Requirements": "((TARGET.HasVirshDefaultNetwork =?= true)) && (TARGET.HasVM =?= true)",
    "TransferInput": '"nfs:///images/el9.qcow2:disk.qcow2?size=20G,io.raw"',
    "User": '"alice@node"',
    "VMPARAM_VM_NAME": '"alice_node_9.0"',
    "VMPARAM_vm_Disk": '"disk.qcow2:vda:w:qcow2,io.raw:vdb:w:raw"',
    "VM_WORKING_DIR": f'"{SCRATCH}"',
    "VMPARAM_Xen_Bootloader": '""',
    "VMPARAM_Xen_Initrd": '""',
    "VMPARAM_Bridge_Interface": '"virbr0"',
    "JobVMNetworkingType": '"nat"',
}
DISKS = (
    Disk("disk.qcow2", "vda", writable=True, format="qcow2", cdrom=False),
    Disk("io.raw", "vdb", writable=True, format="raw", cdrom=False),
)
JOB = Job(
    name="alice_node_9.0",
    scratch=SCRATCH,
    memory_kib=1024 * 1024,
    vcpus=2,
    vnc=False,
    network="nat",
    mac="52:54:00:12:34:56",
    bridge="",
    disks=DISKS,
    id="node#9.0#1795267985",
    owner="alice",
)


def ad(**changes: Optional[str]) -> str:
    """The job's ad with some expressions replaced; None takes an attribute away."""
    return "".join(f"{name} = {value}\n" for name, value in {**FIELDS, **changes}.items() if value is not None)


def refusal(text: str) -> str:
    with pytest.raises(MalformedRequest) as caught:
        parse(text)
    return caught.value.line


# --- what is taken over -------------------------------------------------------------------------------------------


def test_a_job_of_htcondor_s() -> None:
    assert parse(ad()) == JOB


def test_the_script_is_given_these_fields_and_no_others() -> None:
    assert parse(ad()).ad() == (
        'JobVMType = "kvm"\n'
        'VMPARAM_VM_NAME = "alice_node_9.0"\n'
        'VM_WORKING_DIR = "/var/lib/condor/execute/dir_2762"\n'
        "JobVMMemory = 1024\n"
        "JobVM_VCPUS = 2\n"
        "JobVMVNCConsole = false\n"
        "JobVMNetworking = true\n"
        'JobVMNetworkingType = "nat"\n'
        'JobVM_MACADDR = "52:54:00:12:34:56"\n'
        'VMPARAM_vm_Disk = "disk.qcow2:vda:w:qcow2,io.raw:vdb:w:raw"\n'
    )


def test_what_does_not_apply_is_left_out_of_the_script_s_ad() -> None:
    """The script takes an empty MAC address for one that was given, if its quotes are there."""
    job = parse(ad(JobVMNetworking="false"))
    assert (job.network, job.mac, job.bridge) == (None, "", "")
    assert "MACADDR" not in job.ad() and "NetworkingType" not in job.ad() and "Bridge" not in job.ad()
    assert "JobVMNetworking = false\n" in job.ad()
    assert parse(ad(JobVMNetworking="false", JobVMNetworkingType='"bridge"')).bridge == ""
    job = parse(ad(JobVMNetworkingType='"bridge"', JobVM_MACADDR=None))
    assert (job.network, job.mac, job.bridge) == ("bridge", "", "virbr0")
    assert "MACADDR" not in job.ad() and 'VMPARAM_Bridge_Interface = "virbr0"\n' in job.ad()
    assert "Bridge" not in parse(ad()).ad()


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"JobVMMemory": "undefined", "RequestMemory": "512"}, "memory_kib", 512 * 1024),
        ({"JobVMMemory": None, "RequestMemory": "512"}, "memory_kib", 512 * 1024),
        ({"JobVMMemory": "1073741824"}, "memory_kib", 2**40),
        ({"JobVM_VCPUS": None}, "vcpus", 1),
        ({"JobVM_VCPUS": "undefined", "RequestCpus": "4"}, "vcpus", 4),
        ({"JobVM_VCPUS": "255"}, "vcpus", 255),
        ({"JobVMVNCConsole": "true"}, "vnc", True),
        ({"JobVMVNCConsole": "TRUE"}, "vnc", True),
        ({"JobVMVNCConsole": None}, "vnc", False),
        ({"JobVMVNCConsole": "undefined"}, "vnc", False),
        ({"JobVMNetworking": None}, "network", None),
        ({"JobVMNetworkingType": None}, "network", "nat"),
        ({"JobVMNetworkingType": '""'}, "network", "nat"),
        ({"JobVMNetworkingType": '"NAT"'}, "network", "nat"),
        ({"JobVMNetworkingType": '" nat "'}, "network", "nat"),
        ({"JobVMNetworkingType": '"user"'}, "network", "user"),
        ({"JobVM_MACADDR": '"52:54:00:AB:CD:EF"'}, "mac", "52:54:00:ab:cd:ef"),
        ({"JobVM_MACADDR": '""'}, "mac", ""),
        ({"JobVM_MACADDR": "undefined"}, "mac", ""),
        ({"JobVM_MACADDR": None}, "mac", ""),
        ({"JobVMType": '"KVM"'}, "name", "alice_node_9.0"),
        ({"VMPARAM_VM_NAME": '"a.smith_pool.example.org_123.45"'}, "name", "a.smith_pool.example.org_123.45"),
        ({"VM_WORKING_DIR": '"/scratch/condor/dir_7/scratch"'}, "scratch", "/scratch/condor/dir_7/scratch"),
        ({"GlobalJobId": None}, "id", ""),
        ({"Owner": None}, "owner", ""),
    ],
)  # fmt: skip
def test_what_may_be_written_otherwise(changes: dict[str, Optional[str]], field: str, value: Any) -> None:
    assert getattr(parse(ad(**changes)), field) == value


def test_names_of_attributes_have_no_case() -> None:
    assert parse("".join(f"{name.upper()} = {value}\n" for name, value in FIELDS.items())) == JOB


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('"node#9.0#1795267985"', "node#9.0#1795267985"),
        (r'"a\"b"', "a??b"),
        ('"<a>&\x1b[31m\u202e"', "?a???[31m?"),
        ('"' + "x" * 1000 + '"', "x" * 256),
    ],
)
def test_what_is_only_shown_cannot_harm_a_terminal(value: str, shown: str) -> None:
    assert parse(ad(GlobalJobId=value)).id == shown
    assert parse(ad(Owner=value)).owner == shown


# --- vm_disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "disks"),
    [
        ("disk.img:vda:w", [Disk("disk.img", "vda", True, None, False)]),
        ("disk.img:vda:rw:raw", [Disk("disk.img", "vda", True, "raw", False)]),
        ("disk.img:vda:r:qcow2", [Disk("disk.img", "vda", False, "qcow2", False)]),
        ("disk.img:VDA:W:QCOW2", [Disk("disk.img", "vda", True, "qcow2", False)]),
        ("  disk.img : sdb : w : raw  ", [Disk("disk.img", "sdb", True, "raw", False)]),
        ("a:sdab:w", [Disk("a", "sdab", True, None, False)]),
        ("/images/el9.qcow2:vda:r", [Disk("/images/el9.qcow2", "vda", False, None, False)]),
        ("/images/a+b=c@d-e.f/g:vda:r:raw", [Disk("/images/a+b=c@d-e.f/g", "vda", False, "raw", False)]),
        ("boot.iso:hda:r", [Disk("boot.iso", "hda", False, None, True)]),
        ("/images/isolated/x:sda:r:raw", [Disk("/images/isolated/x", "sda", False, "raw", True)]),
        ("a:vda:w , b:vdb:r", [Disk("a", "vda", True, None, False), Disk("b", "vdb", False, None, False)]),
    ],
)
def test_vm_disk(text: str, disks: list[Disk]) -> None:
    assert parse_disks(text) == tuple(disks)
    assert parse(ad(VMPARAM_vm_Disk=f'"{text}"')).disks == tuple(disks)


def test_sixty_four_disks_and_no_more() -> None:
    entries = [f"d{n}:vd{chr(97 + n // 26)}{chr(97 + n % 26)}:w" for n in range(65)]
    assert len(parse_disks(",".join(entries[:64]))) == 64
    with pytest.raises(MalformedRequest, match="vm_disk names 65 disks, more than 64"):
        parse_disks(",".join(entries))


def test_a_vm_disk_that_would_flood_the_script_is_refused() -> None:
    """The directory . may be written as often as one likes, and leads to where it was."""
    fits = "/." * 8188 + "/x"  # 16,378 characters
    assert parse_disks(f"{fits}:vda:r")[0].file == fits
    with pytest.raises(MalformedRequest, match="vm_disk has 16385 characters, more than 16384"):
        parse_disks(f"{fits}y:vda:r")


WRONG_DISKS = {
    "": "'', which is not file:device:permission:format",
    "disk.img": "'disk.img', which is not file:device:permission:format",
    "disk.img:vda": "'disk.img:vda', which is not",
    "a:vda:w:raw:x": "'a:vda:w:raw:x', which is not",
    "a:vda:w,": "'', which is not",
    "a:vda:w,,b:vdb:w": "'', which is not",
    "nfs:///images/a:vda:w": "'///images/a' is no device",
    "a;b:vda:w": "the file 'a;b', which is neither a plain name",
    ":vda:w": "the file '', which is neither",
    ".:vda:w": "the file '.', which is neither",
    "..:vda:w": "the file '..', which is neither",
    ".hidden:vda:w": "the file '.hidden', which is neither",
    "-x:vda:w": "the file '-x', which is neither",
    "sub/a:vda:w": "the file 'sub/a', which is neither",
    "../a:vda:w": "the file '../a', which is neither",
    "/:vda:r": "the file '/', which is neither",
    "//a:vda:r": "the file '//a', which is neither",
    "/a/:vda:r": "the file '/a/', which is neither",
    "/images/../etc/shadow:vda:r": "the file '/images/../etc/shadow', which is neither",
    "/images/..:vda:r": "the file '/images/..', which is neither",
    "/my images/a:vda:r": "the file '/my images/a', which is neither",
    "a b:vda:w": "the file 'a b', which is neither",
    "ä:vda:w": "the file 'ä', which is neither",
    f"{'x' * 201}:vda:w": "which is neither a plain name",
    "a'b:vda:w": "which is neither",
    "a<b:vda:w": "the file 'a<b', which is neither",
    "a&amp;b:vda:w": "the file 'a&amp;b', which is neither",
    "a::w": "'' is no device; write vda",
    "a:vd:w": "'vd' is no device",
    "a:vda1:w": "'vda1' is no device",
    "a:vdabc:w": "'vdabc' is no device",
    "a:xvda:w": "'xvda' is no device",
    "a:fda:w": "'fda' is no device",
    "a:/dev/vda:w": "'/dev/vda' is no device",
    "a:vda'/><x y='z:w": "is no device",
    "a:vda:": "'' is no permission; write r or w",
    "a:vda:x": "'x' is no permission",
    "a:vda:wr": "'wr' is no permission",
    "a:vda:w:": "the format '' is not used here; write raw or qcow2",
    "a:vda:w:vmdk": "the format 'vmdk' is not used here",
    "a:vda:w:host_device": "the format 'host_device' is not used here",
    "a:vda:w:raw'/><x y='": "is not used here",
    "boot.iso:hda:w": "takes a file with 'iso' in its name for a CD-ROM, which hda:w cannot be",
    "boot.iso:vda:r": "which vda:r cannot be",
    "isolated.img:vda:w:raw": "give it another name; or for a CD-ROM write hda:r, or sda:r",
    "a:vda:w,a:vdb:w": "vm_disk names the file a twice",
    "/i/a:vda:r,/i/a:vdb:r": "vm_disk names the file /i/a twice",
    "a:vda:w,b:VDA:w": "vm_disk names the device vda twice",
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WRONG_DISKS.items(), ids=[ascii(text)[1:50] for text in WRONG_DISKS])
def test_a_wrong_vm_disk_is_refused(text: str, words: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_disks(text)
    assert words in caught.value.line and "vm_disk" in caught.value.line


# --- what is refused ----------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Optional[str]], str]] = [
    ({"JobVMType": None}, "write vm_type = kvm"),
    ({"JobVMType": '"xen"'}, 'vm_type = "xen" is not run here'),
    ({"JobVMType": '"kvm xen"'}, 'vm_type = "kvm xen" is not run here'),
    ({"JobVMType": '"vmware"'}, 'vm_type = "vmware" is not run here'),
    ({"JobVMType": "kvm"}, "JobVMType = kvm is no plain string"),
    ({"JobVMMemory": "0"}, "JobVMMemory = 0 is no number between 1 and 1073741824"),
    ({"JobVMMemory": "-1"}, "JobVMMemory = -1 is no number"),
    ({"JobVMMemory": "1024.0"}, "JobVMMemory = 1024.0 is no number"),
    ({"JobVMMemory": '"1024"'}, 'JobVMMemory = "1024" is no number'),
    ({"JobVMMemory": "1073741825"}, "JobVMMemory = 1073741825 is no number"),
    ({"JobVMMemory": "9" * 5000}, "is no number"),
    ({"JobVMMemory": "512 * 2"}, "JobVMMemory = 512 * 2 is no number"),
    ({"JobVMMemory": "1024</memory><devices/>"}, "is no number"),
    ({"JobVMMemory": "١٠٢٤"}, "is no number"),
    ({"JobVMMemory": "true"}, "(hint: write vm_memory = …)"),
    ({"JobVMMemory": None, "RequestMemory": None}, "RequestMemory = undefined is no number"),
    ({"JobVMMemory": "undefined"}, "RequestMemory = ifThenElse("),
    ({"JobVM_VCPUS": "0"}, "JobVM_VCPUS = 0 is no number between 1 and 255 (hint: write vm_vcpus = …)"),
    ({"JobVM_VCPUS": "256"}, "JobVM_VCPUS = 256 is no number between 1 and 255 (hint: write vm_vcpus = …)"),
    ({"JobVM_VCPUS": "4097"}, "JobVM_VCPUS = 4097 is no number"),
    ({"JobVM_VCPUS": None, "RequestCpus": None}, "RequestCpus = undefined is no number"),
    ({"JobVMVNCConsole": "1"}, "JobVMVNCConsole = 1 is neither true nor false"),
    ({"JobVMVNCConsole": '"true"'}, 'JobVMVNCConsole = "true" is neither true nor false'),
    ({"JobVMNetworking": "TARGET.x"}, "JobVMNetworking = target.x is neither true nor false"),
    ({"JobVMNetworkingType": '"none"'}, "vm_networking_type = 'none' is none of nat, bridge, user"),
    ({"JobVMNetworkingType": '"nat,bridge"'}, "vm_networking_type = 'nat,bridge' is none of"),
    ({"JobVMNetworkingType": "nat"}, "JobVMNetworkingType = nat is no plain string"),
    ({"JobVM_MACADDR": '"52:54:00:12:34"'}, "vm_macaddr = '52:54:00:12:34' is no unicast MAC address"),
    ({"JobVM_MACADDR": '"52-54-00-12-34-56"'}, "is no unicast MAC address"),
    ({"JobVM_MACADDR": '"52:54:00:12:34:56:78"'}, "is no unicast MAC address"),
    ({"JobVM_MACADDR": '"53:54:00:12:34:56"'}, "is no unicast MAC address"),
    ({"JobVM_MACADDR": '"01:00:5e:00:00:01"'}, "is no unicast MAC address"),
    ({"JobVM_MACADDR": '"ff:ff:ff:ff:ff:ff"'}, "write 52:54:00:12:34:56"),
    ({"JobVM_MACADDR": '"52:54:00:12:34:5g"'}, "is no unicast MAC address"),
    ({"JobVMNetworkingType": '"bridge"', "VMPARAM_Bridge_Interface": None}, "VMPARAM_Bridge_Interface = ''"),
    ({"JobVMNetworkingType": '"bridge"', "VMPARAM_Bridge_Interface": '"br0 br1"'}, "Bridge_Interface = 'br0 br1'"),
    ({"JobVMNetworkingType": '"bridge"', "VMPARAM_Bridge_Interface": '"a234567890123456"'}, "VMPARAM_Bridge_Interface"),
    ({"VMPARAM_VM_NAME": None}, "VMPARAM_VM_NAME = '' is not what it has to be"),
    ({"VMPARAM_VM_NAME": '"a/../b"'}, "VMPARAM_VM_NAME = 'a/../b' is not what it has to be"),
    ({"VMPARAM_VM_NAME": '"../b"'}, "VMPARAM_VM_NAME = '../b'"),
    ({"VMPARAM_VM_NAME": '".json"'}, "VMPARAM_VM_NAME = '.json'"),
    ({"VMPARAM_VM_NAME": '"a b"'}, "VMPARAM_VM_NAME = 'a b'"),
    ({"VMPARAM_VM_NAME": '"' + "x" * 201 + '"'}, "VMPARAM_VM_NAME = 'x"),
    ({"VM_WORKING_DIR": None}, "VM_WORKING_DIR = '' is not what it has to be"),
    ({"VM_WORKING_DIR": '"scratch"'}, "VM_WORKING_DIR = 'scratch'"),
    ({"VM_WORKING_DIR": '"/"'}, "VM_WORKING_DIR = '/'"),
    ({"VM_WORKING_DIR": '"/var/lib/../../etc"'}, "VM_WORKING_DIR = '/var/lib/../../etc'"),
    ({"VM_WORKING_DIR": '"/var/.."'}, "VM_WORKING_DIR = '/var/..'"),
    ({"VM_WORKING_DIR": '"/var//lib"'}, "VM_WORKING_DIR = '/var//lib'"),
    ({"VM_WORKING_DIR": '"/var/my lib"'}, "VM_WORKING_DIR = '/var/my lib'"),
    ({"VM_WORKING_DIR": '"' + "/x" * 2048 + '"'}, "VM_WORKING_DIR = '/x/x"),
    ({"VMPARAM_vm_Disk": None}, "vm_disk holds ''"),
    ({"VMPARAM_vm_Disk": "undefined"}, "vm_disk holds ''"),
    ({"VMPARAM_vm_Disk": 'strcat("a",":vda:w")'}, "VMPARAM_vm_Disk = strcat(\"a\",\":vda:w\") is no plain string"),
    ({"VMPARAM_vm_Disk": '"a:vda:w'}, "is no plain string"),
    ({"VMPARAM_vm_Disk": "a:vda:w"}, "leave out quotes, backslashes, expressions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"), WRONG, ids=[f"{next(iter(changes))} {n}" for n, (changes, _) in enumerate(WRONG)]
)
def test_every_field_is_refused_by_its_name(changes: dict[str, Optional[str]], words: str) -> None:
    assert words in refusal(ad(**changes))


def test_without_networking_nothing_about_it_matters() -> None:
    job = parse(ad(JobVMNetworking="false", JobVM_MACADDR='"x"', JobVMNetworkingType='"none"'))
    assert (job.network, job.mac) == (None, "")


def test_an_empty_ad_is_refused() -> None:
    assert "vm_type" in refusal("")


# --- injection ----------------------------------------------------------------------------------------------------

# What HTCondor's script would take up as it stands, and the attributes that are strings.
ELEMENT = "<disk type='block' device='lun'><source dev='/dev/sda'/><target dev='vdz'/></disk>"
PAYLOADS = [
    f"'/>{ELEMENT}<x y='",
    f"</name>{ELEMENT}<name>",
    f'"/>{ELEMENT}',
    "a\\",
    "a\\\\",
    '\\" , b',
    "&lt;",
    "&#39;",
    "a\tb",
    "a\rb",
    "a\x0bb",
    "a\x00b",
    "a\x1b[0m",
    "a\x85b",
    "a\u2028b",
    "$(reboot)",
    "`reboot`",
    "a;b",
    "a|b",
    "a*b",
    "a%s",
    "{a}",
    "a,b",
]
STRINGS = ["JobVMType", "JobVMNetworkingType", "VMPARAM_VM_NAME", "VM_WORKING_DIR", "JobVM_MACADDR"]
STRINGS += ["VMPARAM_Bridge_Interface", "VMPARAM_vm_Disk"]


def literal(text: str) -> str:
    """A string as HTCondor prints it in the old syntax: with backslashes before quotes, and before nothing else."""
    return '"' + text.replace('"', '\\"') + '"'


@pytest.mark.parametrize("payload", PAYLOADS, ids=[ascii(payload)[1:20] for payload in PAYLOADS])
@pytest.mark.parametrize("name", STRINGS)
def test_nothing_but_names_and_numbers_gets_through_a_string(name: str, payload: str) -> None:
    own = FIELDS[name][1:-1]
    kind = {"JobVMNetworkingType": '"bridge"'} if name == "VMPARAM_Bridge_Interface" else {}
    for text in (payload, own + payload, payload + own, own.replace(":", f"{payload}:", 1), f"{own},{payload}"):
        if text != own:
            refusal(ad(**kind, **{name: literal(text)}))


@pytest.mark.parametrize("payload", PAYLOADS, ids=[ascii(payload)[1:20] for payload in PAYLOADS])
@pytest.mark.parametrize("name", ["JobVMMemory", "JobVM_VCPUS", "JobVMNetworking", "JobVMVNCConsole"])
def test_nothing_gets_through_a_number_or_a_truth(name: str, payload: str) -> None:
    for value in (payload, literal(payload), FIELDS[name] + payload, literal(FIELDS[name])):
        if value.strip() != FIELDS[name]:
            refusal(ad(**{name: value}))


@pytest.mark.parametrize("payload", PAYLOADS, ids=[ascii(payload)[1:20] for payload in PAYLOADS])
def test_what_the_script_does_not_need_it_does_not_get(payload: str) -> None:
    others = [name for name in FIELDS if f"{name} =" not in JOB.ad()]
    text = ad(**{name: literal(payload) for name in others}, VMPARAM_Xen_Kernel=literal(payload))
    assert parse(text).ad() == JOB.ad()


@pytest.mark.parametrize("name", [name for name in FIELDS if f"{name} =" in JOB.ad()])
def test_an_attribute_that_comes_twice_is_refused_whatever_its_case(name: str) -> None:
    for other in (name, name.lower(), name.upper(), name.swapcase()):
        for text in (f"{ad()}{other} = 1\n", f"{other} = 1\n{ad()}", f"{ad()}  {other}=1"):
            assert "twice" in refusal(text)
    assert parse(f"{ad()}{name.swapcase()} = {FIELDS[name]}\n") == JOB  # it says the same


def test_a_line_break_in_a_string_smuggles_nothing_in() -> None:
    for name in ("Environment", "Cmd", "VMPARAM_VM_NAME"):
        assert "assigns nothing" in refusal(ad(**{name: '"a\nJobVM_VCPUS"'}))
        assert "twice" in refusal(ad(**{name: '"a\nJobVM_VCPUS = 64\nB = "'}))


# --- anything at all ----------------------------------------------------------------------------------------------

# Written again, by hand: what the script copies into XML between quotes, or between tags, and splits at , and :
LINE = re.compile(r'[A-Za-z_]+ = (true|false|[1-9][0-9]*|"[A-Za-z0-9_.+=@#:,/-]+")\n')
NAMES = {
    "JobVMType",
    "VMPARAM_VM_NAME",
    "VM_WORKING_DIR",
    "JobVMMemory",
    "JobVM_VCPUS",
    "JobVMVNCConsole",
    "JobVMNetworking",
    "JobVMNetworkingType",
    "JobVM_MACADDR",
    "VMPARAM_Bridge_Interface",
    "VMPARAM_vm_Disk",
}

WORDS = (
    "vda vdb sda hda w r rw raw qcow2 disk.img a.iso /images/x nat bridge user true false undefined kvm xen 1 0 4096"
)
pieces = st.sampled_from([*WORDS.split(), "52:54:00:12:34:56", "..", *"::::, \"\\'/></<&\n\r\t\0\u2028é\u212a=#"])
texts = st.one_of(st.lists(pieces, max_size=8).map("".join), st.text(max_size=20))
values = st.one_of(texts, texts.map(literal), texts.map(literal), st.sampled_from(sorted(FIELDS.values())))
disk = st.tuples(
    st.sampled_from(["a", "disk.img", "b.iso", "/images/x", "/i/iso/x", "-a", "a b", ".."]),
    st.sampled_from(["vda", "vdb", "hda", "SDZ", "x"]),
    st.sampled_from(["r", "w", "RW", "x"]),
    st.sampled_from(["", ":raw", ":QCOW2", ":vmdk", ":"]),
).map(lambda fields: ":".join(fields[:3]) + fields[3])
disks = st.lists(disk, min_size=1, max_size=3).map(lambda entries: literal(" , ".join(entries)))


@settings(max_examples=1000)
@given(
    st.dictionaries(st.sampled_from(sorted(NAMES | {"Owner", "GlobalJobId", "RequestMemory"})), values, max_size=3),
    st.none() | disks,
)
@example({"VM_WORKING_DIR": '"/a\n"'}, None)
@example({"VMPARAM_VM_NAME": '"a\n"'}, None)
@example({"JobVMType": '"\u212avm"'}, None)  # a Kelvin sign, which is a k in small letters
def test_any_ad_is_a_job_of_plain_characters_or_refused(changes: dict[str, str], vm_disk: Optional[str]) -> None:
    text = ad(**changes, **({"VMPARAM_vm_Disk": vm_disk} if vm_disk and "VMPARAM_vm_Disk" not in changes else {}))
    try:
        job = parse(text)
    except MalformedRequest as error:
        assert error.line
        return
    lines = job.ad().splitlines(keepends=True)
    assert all(LINE.fullmatch(line) for line in lines)
    assert {line.split()[0] for line in lines} <= NAMES
    assert '"kvm"' in lines[0]
    for entry in job.ad().rpartition('VMPARAM_vm_Disk = "')[2].strip('"\n').split(","):
        assert len(entry.split(":")) in (3, 4)
        name = entry.split(":")[0]
        assert name and ".." not in name.split("/") and ("/" not in name or name.startswith("/"))
    assert (job.id + job.owner).isprintable() or not job.id + job.owner
    # What the script is given means the same to us.
    assert replace(parse(job.ad()), id=job.id, owner=job.owner) == job


@settings(max_examples=500)
@given(st.text(st.sampled_from("JobVMType=\"kvm\n VM_WORKING_DIR/a.:'\\"), max_size=80) | st.text(max_size=80))
def test_any_text_is_a_job_or_refused(text: str) -> None:
    for whole in (text, ad() + text, text + ad()):
        try:
            parse(whole)
        except MalformedRequest:
            continue


@settings(max_examples=500)
@given(st.text(st.sampled_from("aZ09_.+=@-/ :,;'\"\\<>&é\n"), max_size=6) | st.text(max_size=6))
@example("x" * 200)
@example("x" * 201)
def test_the_plugin_makes_those_names_that_root_lets_through(name: str) -> None:
    try:
        taken = [disk.file for disk in parse_disks(f"{name}:sda:r")] == [name]
    except MalformedRequest:
        taken = False
    if not name.startswith("/"):
        assert taken == plain(name)
