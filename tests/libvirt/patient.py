"""A booted node with vmnode on it, to be broken, watched and repaired: what the fault matrix asks of a node."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

from tests.lab.errors import LabError
from tests.lab.node import Node
from tests.lab.world import World

T = TypeVar("T")

CHECKOUT = Path(__file__).parents[2]
FAR_ADDRESS = "203.0.113.1"  # in the world, behind the node's gateway: without a default route nothing gets there
FAR_PORT = 9618
RUN_DIR = "/run/vmnode"
HEALTHY_S = 60.0  # from any repair, with a new port's spanning tree, three seconds of DHCP, and confirmation

BASE = f"""\
[network]
targets = ["tcp://{FAR_ADDRESS}:{FAR_PORT}"]

[execute]
dir = "/var/lib/condor/execute"
min_free = "100M"
"""

NAT_RULES = {
    "iptables": "iptables -t nat -S LIBVIRT_PRT | grep MASQUERADE || true",
    "nftables": "nft list chain ip libvirt_network guest_nat 2>/dev/null | grep masquerade || true",
}

# With nftables libvirt has tc mend the checksums of DHCP answers, and starts no network where the kernel has no such
# action (CONFIG_NET_ACT_CSUM). On such a machine the node does without that mending; all else is as it would be.
TC = """\
#!/bin/sh
/usr/sbin/tc "$@" && exit
case "$*" in *"action csum"*) exit 0 ;; esac
exit 1
"""

POOL_OF_TWO = """\
virsh net-dumpxml --inactive default >/tmp/default.xml
sed 's/end=.192.168.122.254./end="192.168.122.3"/' /tmp/default.xml >/tmp/small.xml
virsh net-destroy default
virsh net-define /tmp/small.xml
rm -f /var/lib/libvirt/dnsmasq/virbr0.status
virsh net-start default
"""

WHOLE_POOL = """\
virsh net-destroy default
virsh net-define /tmp/default.xml
virsh net-start default
"""

PLUG_A_GUEST = """\
ip netns add guest
ip link add guest0 type veth peer name eth0 netns guest
ip link set guest0 master virbr0 up
ip netns exec guest ip link set eth0 up
"""

# A guest as far as dnsmasq can tell: a port on the bridge behind which a MAC address asks for a lease.
GUEST = """\
import asyncio, sys
sys.path.insert(0, "/usr/lib/vmnode")
from vmnode.host import dhcp

async def main():
    client = dhcp.Client(dhcp.open_socket("eth0"), "guest")
    offer = await client.discover("52:54:00:aa:bb:cc", 20.0)
    assert offer is not None, "no offer"
    lease = await client.request(offer, 10.0)
    assert lease is not None and lease.kind == dhcp.ACK, "no lease"
    if sys.argv[1] == "give back":
        client.release(lease)

asyncio.run(main())
"""


class Patient:
    """`state` is what the daemon published, read from outside of the node, so that waiting costs the node nothing."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.far = World(FAR_ADDRESS)
        self.far.supervisor = node.world.supervisor
        self.settings: Optional[str] = None
        self.backend = ""

    def set_up(self) -> None:
        self.shell_in_world(f"ip address add {FAR_ADDRESS}/32 dev lo")
        self.far.listen(FAR_PORT)
        self.shell("install -d -o condor -g condor -m 0755 /var/lib/condor/execute")
        self.node.write("/usr/local/sbin/tc", TC, 0o755)
        self.node.write("/etc/vmnode/conf.d/20-matrix.toml", BASE)
        self.node.install_vmnode(CHECKOUT)

    # --- acting ---------------------------------------------------------------------------------------------------

    def shell(self, script: str) -> str:
        return self.node.run(["sh", "-euc", script]).stdout

    def shell_in_world(self, script: str) -> None:
        command = ["nsenter", f"--net=/proc/{self.node.world.supervisor}/ns/net", "sh", "-euc", script]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def configure(self, settings: str) -> None:
        """Have the daemon run with these settings on top of the base ones; "" for none."""
        if settings == self.settings:
            return
        self.node.write("/etc/vmnode/conf.d/30-fault.toml", settings)
        self.shell("systemctl restart vmnode")
        self.settings = settings

    def use_backend(self, backend: str) -> None:
        """Have libvirt make its firewall rules with iptables or nftables; "" leaves it as it is."""
        if backend in ("", self.backend):
            return
        self.node.write("/etc/libvirt/network.conf", f'firewall_backend = "{backend}"\n')
        self.shell("systemctl restart libvirtd")
        other = {"iptables": "nftables", "nftables": "iptables"}[backend]
        self.wait(
            lambda: self.shell(NAT_RULES[backend]) and not self.shell(NAT_RULES[other]),
            f"libvirt's rules made by {backend}, and no others",
            20,
        )
        self.backend = backend

    def add_default_route(self) -> None:
        self.shell(f"ip route add default via {self.node.world.address}")

    def reboot(self) -> None:
        """As a reboot goes, but for the kernel: all processes end, /run/vmnode is empty, PID 1 starts everything."""
        self.shell(f"systemctl stop vmnode; rm -f {RUN_DIR}/state.json; systemctl --no-block soft-reboot")

    # --- watching -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The published state; an empty one while there is none that can be read."""
        try:
            state: dict[str, Any] = json.loads(self.node.path(f"{RUN_DIR}/state.json").read_bytes())
        except (OSError, ValueError):
            return {"state": "none", "conditions": [], "attributes": {}, "checked": {"boot": 0.0}}
        return state

    def condition(self, name: str) -> dict[str, Any]:
        return next((entry for entry in self.state()["conditions"] if entry["name"] == name), {})

    def healthy(self) -> bool:
        state = self.state()
        return state["state"] == "healthy" and not any(entry["contrary"] for entry in state["conditions"])

    def wait(self, predicate: Callable[[], Optional[T]], what: str, timeout_s: float) -> T:
        """The first true value, if it is seen in time; raises LabError that says what the node thinks of itself."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = predicate()
            late = time.monotonic() > deadline
            if value and not late:
                return value
            if late:
                broken = [
                    f"{entry['name']} {entry['status']} {entry['reason']}: {entry['message']}"
                    for entry in self.state()["conditions"]
                    if entry["status"] not in ("ok", "disabled") or entry["contrary"]
                ]
                raise LabError(f"waited {timeout_s:g} s in vain for {what}; broken: {broken or 'nothing'}")
            time.sleep(0.05)

    def rest(self) -> None:
        """Have the network, also after a fault that could not be repaired: the next one is not to suffer from it."""
        self.node.run(["sh", "-c", "virsh net-autostart default; virsh net-start default"], check=False)

    def start_network(self) -> None:
        """As soon as libvirtd takes commands: it may still be starting, or stopping."""
        start = "virsh net-autostart default && virsh net-start default"
        self.shell(f"for _ in $(seq 30); do {start} && exit; sleep 1; done; exit 1")

    def wait_healthy(self, timeout_s: float = HEALTHY_S) -> None:
        self.wait(self.healthy, "a healthy node", timeout_s)

    def wait_quiet(self, seconds: float) -> None:
        """Until the last check is that long ago."""
        self.wait(
            lambda: time.clock_gettime(time.CLOCK_BOOTTIME) - self.state()["checked"]["boot"] > seconds,
            f"{seconds:g} s without a check",
            3 * seconds + HEALTHY_S,
        )

    def wait_for_checks(self, number: int, timeout_s: float) -> None:
        """Until that many more checks have been published."""
        for _ in range(number):
            last = self.state()["checked"]["boot"]
            self.wait(lambda: self.state()["checked"]["boot"] > last, "another check", timeout_s)  # noqa: B023

    def status(self) -> subprocess.CompletedProcess[str]:
        return self.node.run(["vmnode", "status"], check=False)

    def first_broken(self) -> str:
        """`network.dhcp: NoOffer`, as `vmnode status` shows it under its first line; "" for a healthy node."""
        lines = self.status().stdout.splitlines()
        return ": ".join(lines[2].split(": ")[:2]) if len(lines) > 2 and ": " in lines[2] else ""

    def classad(self, attribute: str, under: Sequence[str] = ()) -> str:
        """The value of an attribute of the published ad, evaluated by HTCondor itself; `under` goes before commands."""
        lines = self.node.run([*under, "vmnode", "classad"]).stdout.splitlines()
        ad = "[" + ";".join(line for line in lines if not line.startswith("- ")) + "]"
        return self.node.run([*under, "classad_eval", "-quiet", ad, attribute]).stdout.strip()

    def probe_ports(self) -> list[str]:
        """The ports of vmnode's probes, of whichever instance."""
        links = json.loads(self.node.run(["ip", "-json", "link", "show"]).stdout)
        return sorted(link["ifname"] for link in links if link["ifname"].startswith("vmnp"))

    def probe_leases(self) -> list[str]:
        """The MAC addresses of vmnode's probes that hold a lease."""
        table = self.node.run(["virsh", "net-dhcp-leases", "default"]).stdout
        return sorted(word for word in table.split() if word.startswith("06:76:6d:"))

    def seconds_of_a_check(self) -> float:
        """How long one whole check takes, the start of its process left out."""
        script = (
            "import sys; sys.path.insert(0, '/usr/lib/vmnode')\n"
            "import asyncio, time\n"
            "from vmnode.config import load\n"
            "from vmnode.health.check import EVERYTHING, Checker\n"
            "async def main():\n"
            "    checker = Checker(load().config, 'timing')\n"
            "    began = time.monotonic()\n"
            "    await checker.check(EVERYTHING)\n"
            "    print(time.monotonic() - began)\n"
            "    await checker.close()\n"
            "asyncio.run(main())\n"
        )
        return float(self.node.run(["python3", "-I", "-c", script]).stdout)

    # --- the DHCP pool --------------------------------------------------------------------------------------------

    def shrink_the_pool(self) -> None:
        self.shell(POOL_OF_TWO + PLUG_A_GUEST)

    def take_the_last_address(self) -> None:
        self._guest("take")

    def give_the_address_back(self) -> None:
        self._guest("give back")

    def restore_the_pool(self) -> None:
        self.shell("ip link del guest0; ip netns del guest; " + WHOLE_POOL)

    def _guest(self, what: str) -> None:
        self.node.run(["ip", "netns", "exec", "guest", "python3", "-I", "-c", GUEST, what])
