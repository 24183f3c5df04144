"""Jobs have network beside others that write firewall rules and set up links: the real firewalld, Docker, libvirt,
NetworkManager and systemd-networkd, on a node of their own. An imaginary job, attached as every job is, tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.images import NEIGHBOURS
from tests.lab.node import TARGET_PORT, Node

pytestmark = pytest.mark.xdist_group("neighbours")

CHECKOUT = Path(__file__).parents[2]
ZONE, NM_FILE = "/usr/lib/firewalld/zones/vmnode.xml", "/usr/lib/NetworkManager/conf.d/90-vmnode.conf"
NETWORKD_FILE = "/usr/lib/systemd/network/10-vmnode.network"
SHIPPED = {
    ZONE: "firewalld-vmnode.xml",
    NM_FILE: "90-vmnode-networkmanager.conf",
    NETWORKD_FILE: "10-vmnode.network",
}
WORLD6, NODE6 = "2001:db8:1::1", "2001:db8:1::2"
FIREWALLD_RULES = "nft list chain inet firewalld filter_INPUT"
HOST_PORT = 9620  # somebody on the node listens there
LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_INET6)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen()
print("listening", flush=True)
while True: listener.accept()[0].close()
"""

# In the node, with the node's own Python and pyroute2: what the daemon does at its start, and what it then sees.
JOB = """
import asyncio, dataclasses, json, sys
from ipaddress import ip_network
sys.path.insert(0, "/usr/lib/vmnode")
from vmnode.accounting import way_out
from vmnode.host import uplink
from vmnode.host.counting import Rules
from vmnode.host.jobnet import Ends
from vmnode.host.nftables import NftablesCounters
from vmnode.values import target

async def main(do, *targets):
    links, pools = "vmnj0123", [ip_network("100.64.0.0/16"), ip_network("fd76:6d6e:6f64:6500::/64")]
    said = None
    if do == "dismiss":
        await way_out.dismiss(links)
        await NftablesCounters("0123").tear_down()
    else:
        await NftablesCounters("0123").set_up(Rules("0123", links, *pools, (), ()))
        for pool in pools:
            uplink.forward(pool.version)
    if do == "admit":
        said = dataclasses.asdict(await way_out.admit(links, (4, 6)))
    probe = way_out.Probe("0123", links + "-probe", [Ends(pool[2], pool[1]) for pool in pools], 1500)
    seen = [await probe.check([target(each)]) for each in targets]
    print(json.dumps([said, [[each.status, each.reason, each.message] for each in seen]]))

asyncio.run(main(*sys.argv[1:]))
"""


class Host:
    """The node, with targets for its jobs: of both families, beyond the uplink and on the node itself."""

    def __init__(self, node: Node) -> None:
        self.node = node
        outside = f"tcp://{node.world.address}:{TARGET_PORT}"
        outside6 = f"tcp://[{WORLD6}]:{TARGET_PORT}"
        self.targets = (outside, outside6, f"tcp://{node.address}:{HOST_PORT}", f"tcp://[{NODE6}]:{HOST_PORT}")

    def job(self, do: str, *targets: str) -> tuple[Any, list[list[str]]]:
        """What the passage is, and how an imaginary job fares with each of the targets."""
        said = self.node.run(["python3", "-c", JOB, do, *targets]).stdout
        passage, seen = json.loads(said)
        return passage, seen

    def assert_network(self, do: str = "look") -> Any:
        """A job reaches all of the targets; returns the passage."""
        passage, seen = self.job(do, *self.targets)
        assert [status for status, _, _ in seen] == ["ok"] * 4, seen
        return passage

    def sh(self, line: str, check: bool = True) -> str:
        return self.node.run(["sh", "-c", line], check=check).stdout.strip()

    def restart(self, unit: str) -> None:
        self.node.run(["systemctl", "restart", unit])
        if unit == "firewalld":  # from 2.4 on it is not yet ready when systemd thinks so
            self.node.wait_until(lambda: "reject" in self.sh(FIREWALLD_RULES, check=False), "firewalld's rules")

    @contextlib.contextmanager
    def running(self, *units: str) -> Iterator[None]:
        for unit in units:
            self.restart(unit)
        try:
            yield
        finally:
            self.node.run(["systemctl", "stop", *units])


@pytest.fixture(scope="session")
def shared_host() -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(Node.boot("trixie", f"neighbours-{os.getpid()}", NEIGHBOURS))
        node.run(["mkdir", "-p", "/usr/lib/vmnode"])
        subprocess.run(["cp", "-r", str(CHECKOUT / "vmnode"), str(node.path("/usr/lib/vmnode"))], check=True)
        world = ["nsenter", f"--net=/proc/{node.world.supervisor}/ns/net"]
        subprocess.run([*world, *f"ip address add {WORLD6}/64 dev world0 nodad".split()], check=True)
        node.run(f"ip address add {NODE6}/64 dev uplink0 nodad".split())
        node.run(f"ip -6 route add default via {WORLD6} dev uplink0".split())
        node.world.listen(TARGET_PORT)
        for words in ([*world, sys.executable], [*node.entering(), "python3"]):
            address, port = ("::", HOST_PORT) if words[-1] == "python3" else (WORLD6, TARGET_PORT)
            listener = subprocess.Popen([*words, "-c", LISTEN, address, str(port)], stdout=subprocess.PIPE, text=True)
            stack.callback(listener.wait)
            stack.callback(listener.kill)
            assert listener.stdout is not None and listener.stdout.readline() == "listening\n"
        yield Host(node)


@pytest.fixture
def host(shared_host: Host) -> Host:
    """As after a boot, with libvirt's network and without firewalld or Docker; what our package ships is there."""
    for path, name in SHIPPED.items():
        shared_host.node.write(path, (CHECKOUT / "network-config" / name).read_text())
    shared_host.job("dismiss")
    for tool in ("iptables", "ip6tables"):
        shared_host.sh(f"{tool} -P FORWARD ACCEPT; {tool} -F; {tool} -X; {tool} -t nat -F; {tool} -t nat -X")
    shared_host.sh("virsh net-destroy default; systemctl restart libvirtd; virsh net-start default", check=False)
    assert "LIBVIRT_FWX" in shared_host.sh("iptables -S FORWARD")
    return shared_host


# --- libvirt ------------------------------------------------------------------------------------------------------


def test_beside_libvirt_nothing_has_to_be_done(host: Host) -> None:
    assert host.assert_network("admit") == {"zone": None, "past_policy": []}


# --- firewalld ----------------------------------------------------------------------------------------------------


def test_beside_firewalld_the_zone_of_our_package_is_enough_for_ever(host: Host) -> None:
    with host.running("firewalld"):
        host.assert_network()
        host.sh("firewall-cmd --reload")
        host.assert_network()
        host.restart("firewalld")
        assert host.assert_network("admit") == {"zone": "vmnode", "past_policy": []}
        assert host.sh("firewall-cmd --zone=vmnode --list-interfaces") == "vmnj+"


def test_firewalld_that_does_not_know_our_zone_is_named_and_told_at_run_time(host: Host) -> None:
    host.sh(f"rm {ZONE}")
    permanent = host.sh("find /etc/firewalld -type f | xargs cat; ls -R /etc/firewalld")
    with host.running("firewalld"):
        _, seen = host.job("look", *host.targets[:2])
        for status, reason, message in seen:
            assert (status, reason) == ("failed", "ForeignDrop")
            assert "dropped by table inet firewalld, chain filter_F" in message and "rule: reject with icmp" in message
        before = host.sh("firewall-cmd --list-all-zones")
        assert host.assert_network("admit") == {"zone": "trusted", "past_policy": []}
        assert host.assert_network("admit")["zone"] == "trusted"
        host.job("dismiss")
        host.job("dismiss")
        assert host.sh("firewall-cmd --list-all-zones") == before
    assert host.sh("find /etc/firewalld -type f | xargs cat; ls -R /etc/firewalld") == permanent


def test_what_was_told_at_run_time_is_told_again_after_a_reload_and_a_restart(host: Host) -> None:
    host.sh(f"rm {ZONE}")
    with host.running("firewalld"):
        host.assert_network("admit")
        for forget in (lambda: host.sh("firewall-cmd --reload"), lambda: host.restart("firewalld")):
            forget()
            assert host.job("look", host.targets[0])[1][0][0] == "failed"
            assert host.assert_network("admit")["zone"] == "trusted"


def test_an_administrator_s_binding_stands(host: Host) -> None:
    with host.running("firewalld"):
        host.sh("firewall-cmd --zone=drop --change-interface=vmnj+")
        passage, ((status, _, message),) = host.job("admit", host.targets[0])
        assert passage["zone"] == "drop"
        assert status == "failed" and "dropped by table inet firewalld, " in message


def test_an_administrator_restricts_jobs_by_a_policy_as_the_manual_says(host: Host) -> None:
    with host.running("firewalld"):
        for words in (
            "--new-policy=no-mail-from-jobs",
            "--policy=no-mail-from-jobs --add-ingress-zone=vmnode",
            "--policy=no-mail-from-jobs --add-egress-zone=ANY",
            "--policy=no-mail-from-jobs --set-target=CONTINUE",
            f"--policy=no-mail-from-jobs --add-rich-rule='rule port port={TARGET_PORT} protocol=tcp reject'",
        ):
            host.sh(f"firewall-cmd --permanent {words}")
        try:
            host.sh("firewall-cmd --reload")
            _, seen = host.job("look", *host.targets)
            assert [status for status, _, _ in seen] == ["failed", "failed", "ok", "ok"]
            assert "chain filter_FWD_policy_no-mail-from-jobs_deny, rule: tcp dport 9618" in seen[0][2]
        finally:
            host.sh("firewall-cmd --permanent --delete-policy=no-mail-from-jobs")


def test_a_job_s_source_address_opens_nothing_to_others(host: Host) -> None:
    """The zone is bound to links, not to the pool: who sends from one of its addresses is not in it."""
    ask = f"import socket; socket.create_connection(({host.node.address!r}, {HOST_PORT}), 2, ('100.64.0.9', 0))"
    world = ["nsenter", f"--net=/proc/{host.node.world.supervisor}/ns/net"]
    subprocess.run([*world, "ip", "address", "add", "100.64.0.9/32", "dev", "world0"], check=True)
    try:
        connect = [*world, sys.executable, "-c", ask]
        assert subprocess.run(connect, capture_output=True).returncode == 0
        with host.running("firewalld"):
            assert b"No route to host" in subprocess.run(connect, capture_output=True).stderr
    finally:
        subprocess.run([*world, "ip", "address", "delete", "100.64.0.9/32", "dev", "world0"], check=True)


# --- Docker -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def docker(host: Host) -> Iterator[None]:
    """dockerd as it comes up on a host that does not forward: it switches that on, and sets the policy DROP."""
    host.sh("sysctl -q net.ipv4.ip_forward=0")
    with host.running("docker.service"):
        assert host.sh("iptables -S FORWARD").splitlines()[0] == "-P FORWARD DROP"
        try:
            yield
        finally:
            host.sh("systemctl stop docker.socket docker.service", check=False)


def test_docker_s_policy_is_named_and_jobs_pass_it_by_two_rules_at_the_end(host: Host) -> None:
    with docker(host):
        _, ((status, reason, message),) = host.job("look", host.targets[0])
        assert (status, reason) == ("failed", "ForwardPolicyDrop")
        assert message.endswith("dropped by table ip filter, chain FORWARD, its policy")
        before = host.sh("iptables-save -t filter | grep -v '^[:#]'")
        assert host.assert_network("admit") == {"zone": None, "past_policy": [4]}
        added = [line for line in host.sh("iptables -S").splitlines() if line not in before.splitlines()]
        assert [line for line in added if line.startswith("-A")] == [
            "-A FORWARD -i vmnj0123+ -m comment --comment vmnode -j ACCEPT",
            "-A FORWARD -o vmnj0123+ -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment vmnode -j ACCEPT",
        ]
        host.sh("systemctl restart docker.service")
        host.assert_network()
        host.job("dismiss")
        assert sorted(host.sh("iptables-save -t filter | grep -v '^[:#]'").splitlines()) == sorted(before.splitlines())


def test_what_docker_s_own_chain_for_users_forbids_stays_forbidden(host: Host) -> None:
    with docker(host):
        host.sh(f"iptables -I DOCKER-USER -p tcp --dport {TARGET_PORT} -j DROP")
        _, ((status, reason, message),) = host.job("admit", host.targets[0])
    assert (status, reason) == ("failed", "ForeignDrop")
    assert f"dropped by table ip filter, chain DOCKER-USER, rule: tcp dport {TARGET_PORT}" in message


def test_jobs_have_network_beside_docker_and_firewalld_in_whatever_order_they_start(host: Host) -> None:
    with docker(host):
        host.assert_network("admit")
        with host.running("firewalld"):
            host.assert_network("admit")
            host.sh("firewall-cmd --reload")
            host.assert_network("admit")
            host.sh("systemctl restart docker.service")
            host.assert_network("admit")
        host.assert_network("admit")


# --- who sets up links --------------------------------------------------------------------------------------------

A_JOB_S_LINK = """
ip link add vmnj0123z type veth peer name other
ip link set vmnj0123z up; ip link set other up; sleep 1
ip address add 100.64.0.1/32 dev vmnj0123z; ip route add 100.64.0.7/32 dev vmnj0123z; sleep 2
"""
REMOVED = "ip link delete vmnj0123z"
THERE = "ip -4 -o address show dev vmnj0123z; ip -4 route show dev vmnj0123z"


def test_networkmanager_lets_our_links_alone(host: Host) -> None:
    with host.running("NetworkManager"):
        host.sh(A_JOB_S_LINK)
        try:
            states = dict(line.split(":") for line in host.sh("nmcli -t -f DEVICE,STATE device").splitlines())
            assert states["vmnj0123z"] == "unmanaged"
            assert states["other"] != "unmanaged"  # so it would be without our file
        finally:
            host.sh(REMOVED)


def test_systemd_networkd_lets_our_links_alone_and_would_clear_them_without_our_file(host: Host) -> None:
    host.node.write("/etc/systemd/network/50-all.network", "[Match]\nName=* !uplink0 !virbr0\n[Network]\nDHCP=yes\n")
    host.sh(A_JOB_S_LINK)
    try:
        before = host.sh(THERE)
        assert "100.64.0.7 scope link" in before and "100.64.0.1/32" in before
        with host.running("systemd-networkd"):
            host.sh("systemctl restart systemd-networkd; sleep 2")
            assert host.sh(THERE) == before
            host.sh(f"rm {NETWORKD_FILE}; systemctl restart systemd-networkd; sleep 2")
            assert host.sh(THERE) == ""
    finally:
        host.sh(f"{REMOVED}; rm /etc/systemd/network/50-all.network; systemctl stop systemd-networkd.socket")
