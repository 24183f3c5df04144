"""Real guests on libvirt's network: their taps are found, whatever QEMU does, and counted to the byte."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.libvirt.patient import Patient

NAME = "guest-on-tap"
MAC = "52:54:00:00:aa:07"
TAP_MAC = "fe" + MAC[2:]  # as libvirt makes it (virnetdevtap.c)

# It has no disk: its firmware asks for an address by itself. User networking has no tap.
GUEST = f"""\
<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64'>hvm</type><boot dev='network'/></os>
<devices>
<interface type='network'><mac address='{MAC}'/><source network='default'/><model type='virtio'/></interface>
<interface type='user'/>
</devices></domain>
"""

COUNTS = """
import asyncio, json, sys
from ipaddress import IPv4Network, IPv6Network
sys.path.insert(0, "/usr/lib/vmnode")
from vmnode.host.taps import TapCounters

async def main():
    counters = TapCounters("lab")
    if sys.argv[1:] == ["end"]:
        return await counters.tear_down()
    await counters.set_up([IPv4Network("0.0.0.0/0")], [IPv6Network("::/0")])
    found = await counters.read()
    print(json.dumps({f"{tap.name} {tap.index}": [usage.lan_out, usage.lan_in] for tap, usage in found.items()}))

asyncio.run(main())
"""


@contextlib.contextmanager
def paused_guest(patient: Patient) -> Iterator[None]:
    patient.node.write("/tmp/guest.xml", GUEST)
    patient.shell("virsh create --paused /tmp/guest.xml")
    try:
        yield
    finally:
        patient.node.run(["virsh", "destroy", NAME], check=False)


def ask_worker(patient: Patient) -> dict[str, Any]:
    """What the worker says to one question, with the first of its deadlines."""
    worker = ["env", "PYTHONPATH=/usr/lib/vmnode", "python3", "-m", "vmnode.host.libvirt_worker", "qemu:///system"]
    said = patient.node.run(worker, input='{"verb": "look", "network": "default"}\n', timeout=5).stdout
    answer: dict[str, Any] = json.loads(said.splitlines()[0])["answer"]
    return answer


def counts(patient: Patient) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = json.loads(patient.node.run(["python3", "-c", COUNTS]).stdout)
    return found


def test_a_domain_s_taps_are_known_while_it_is_busy(patient: Patient) -> None:
    with paused_guest(patient):
        before = ask_worker(patient)["nics"][NAME]
        (link,) = before["links"]
        assert before["count"] == 2 and link["bridged"] is True
        assert patient.shell(f"cat /sys/class/net/{link['name']}/ifindex").strip() == str(link["index"])
        pid = patient.node.read(f"/run/libvirt/qemu/{NAME}.pid").strip()
        patient.shell(f"kill -STOP {pid}")
        busy = patient.node.popen(["virsh", "qemu-monitor-command", "--hmp", NAME, "info status"])
        try:
            patient.wait(lambda: not job_of(patient).startswith("ok"), "a domain that is busy", 10)
            answer = ask_worker(patient)
        finally:
            patient.shell(f"kill -CONT {pid}")
            busy.communicate(timeout=10)
        assert answer["nics"][NAME] == before and answer["domains"] == [NAME]
    assert ask_worker(patient)["nics"] == {}


def job_of(patient: Patient) -> str:
    """What libvirt is doing with the domain; the answer does not wait for QEMU (virDomainGetControlInfo)."""
    return patient.node.run(["virsh", "domcontrol", NAME], check=False).stdout


def test_a_guest_is_counted_to_the_byte(patient: Patient, tmp_path: Path) -> None:
    assert counts(patient) == {}
    try:
        with paused_guest(patient):
            (link,) = ask_worker(patient)["nics"][NAME]["links"]
            tap = link["name"]
            state = f"cat /sys/class/net/{tap}/brport/state"
            with dumped(patient, tap, tmp_path) as lengths:  # before the bridge forwards anything to it
                patient.wait(lambda: patient.shell(state) == "3\n", "the bridge to forward", 15)
                patient.shell(f"virsh resume {NAME}")
                patient.wait(lambda: MAC in patient.shell("virsh net-dhcp-leases default"), "a lease", 40)
                patient.shell(f"virsh destroy {NAME}")
        found = counts(patient)[f"{tap} {link['index']}"]
        assert lengths[0][1] >= 4  # at least two questions and two answers
        assert found == lengths
    finally:
        patient.node.run(["python3", "-c", COUNTS, "end"])


@contextlib.contextmanager
def dumped(patient: Patient, tap: str, directory: Path) -> Iterator[list[list[int]]]:
    """Bytes and packets that tcpdump saw from the guest, and to it but from the tap's own neighbour discovery."""
    found: list[list[int]] = []
    files = [directory / f"{way}.pcap" for way in ("in", "out")]
    children = []
    for way, file in zip(("in", "out"), files):
        argv = ["tcpdump", "-i", tap, "-Q", way, "-U", "-Z", "root", "--immediate-mode", "-w", str(file)]
        init = patient.node.path("/").parent.name
        enter = ["nsenter", f"--net=/proc/{init}/ns/net"]
        children.append(
            subprocess.Popen([*enter, *argv, f"not ether src {TAP_MAC}"], stderr=subprocess.PIPE, text=True)
        )
    try:
        for child in children:
            assert child.stderr is not None and "listening" in child.stderr.readline()
        yield found
    finally:
        for child in children:
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=10)
    for file in files:
        text = subprocess.run(
            ["tcpdump", "-nn", "-v", "-r", str(file), "ip or ip6"], check=True, capture_output=True, text=True
        ).stdout
        lengths = [int(length) for length in re.findall(r"^\d\d:.* IP \(tos .*, length (\d+)\)", text, re.MULTILINE)]
        lengths += [
            int(length) + 40 for length in re.findall(r"^\d\d:.* IP6 \(.*payload length: (\d+)\)", text, re.MULTILINE)
        ]
        found.append([sum(lengths), len(lengths)])
