"""Who drops a guest's packets, on a real firewall; and what libvirt's NAT rules look like in it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path
from typing import Optional

import pytest

from tests.kernel.world import FAR, PORT, Dnsmasq, make_bridge, outside, running, script, tables, tool, until
from vmnode.health.traffic import GuestTraffic
from vmnode.host.firewall import DropTrace, nat_rule_exists
from vmnode.values import Target

ROOT = Path(__file__).parents[2]
DEFAULT = IPv4Network("192.168.122.0/24")

FOREIGN = """
table inet site {
  chain forward {
    type filter hook forward priority 0
    iifname "virbr0" ip daddr 10.0.0.0/8 drop
  }
}
"""
POLICY = "table inet site {\n chain forward {\n type filter hook forward priority 0; policy drop\n }\n}\n"


def trace(directory: Path) -> tuple[str, Optional[str]]:
    """How a guest's connection ended, and who is named for it."""
    index = make_bridge()

    async def run() -> tuple[str, Optional[str]]:
        probe = GuestTraffic("one", lambda _: None)
        try:
            await probe.ask_for_address(server.network(), index, fresh=False)
            assert probe.port.address is not None
            async with DropTrace("0123abcd", "virbr0", str(probe.port.address.ip), PORT) as tracing:
                assert [table for table in tables() if "vmn" in table] == ["table inet vmn_trace_0123abcd"]
                (attempt,) = await probe.connect([Target(FAR, PORT)], from_host=False)
            return attempt.result.reason, tracing.culprit
        finally:
            await probe.close()

    with outside(), Dnsmasq(directory, "192.168.122.2", "192.168.122.254") as server:
        before = tool("nft", "list", "ruleset")
        result = asyncio.run(run())
        after = tool("nft", "list", "ruleset")
    assert [line for line in before.splitlines() if "counter" not in line] == [
        line for line in after.splitlines() if "counter" not in line
    ]
    return result


@pytest.mark.nft_owner
def test_a_foreign_rule_that_drops_is_named(tmp_path: Path) -> None:
    script(FOREIGN)
    assert trace(tmp_path) == (
        "TimedOut",
        'table inet site, chain forward, rule: iifname "virbr0" ip daddr 10.0.0.0/8 drop',
    )


@pytest.mark.nft_owner
def test_a_policy_that_drops_is_named(tmp_path: Path) -> None:
    script(POLICY)
    assert trace(tmp_path) == ("TimedOut", "table inet site, chain forward, its policy")


@pytest.mark.nft_owner
def test_docker_s_policy_in_iptables_is_named(tmp_path: Path) -> None:
    tool("iptables", "-P", "FORWARD", "DROP")
    assert trace(tmp_path) == ("TimedOut", "table ip filter, chain FORWARD, its policy")


@pytest.mark.nft_owner
def test_a_rule_that_rejects_is_named(tmp_path: Path) -> None:
    tool("iptables", "-A", "FORWARD", "-i", "virbr0", "-j", "REJECT", "--reject-with", "icmp-port-unreachable")
    reason, culprit = trace(tmp_path)
    assert reason == "Refused"
    assert culprit is not None and culprit.startswith("table ip filter, chain FORWARD, rule: ") and "reject" in culprit


@pytest.mark.nft_owner
def test_packets_that_get_through_name_nobody(tmp_path: Path) -> None:
    assert trace(tmp_path) == ("", None)


TRACER = """
import asyncio
from vmnode.host.firewall import DropTrace
async def main():
    async with DropTrace("0123abcd", "virbr0", "192.168.122.17", 9618):
        print("ready", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.nft_owner
def test_no_table_stays_when_the_owner_is_killed() -> None:
    with running([sys.executable, "-c", TRACER], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        assert tables() == ["table inet vmn_trace_0123abcd"]
    until(lambda: tables() == [])


# --- NAT ----------------------------------------------------------------------------------------------------------


def nat() -> Optional[bool]:
    return asyncio.run(nat_rule_exists(DEFAULT))


def test_without_any_rule_there_is_no_nat() -> None:
    assert nat() is False


@pytest.mark.parametrize("verdict", ["masquerade", "masquerade to :1024-65535", "snat to 10.0.0.2"])
def test_nat_as_libvirt_s_nftables_backend_makes_it(verdict: str) -> None:
    rule = f"ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 meta l4proto tcp counter {verdict}"
    script(
        f"table ip libvirt_network {{\n chain guest_nat {{\n type nat hook postrouting priority 100\n {rule}\n }}\n}}\n"
    )
    assert nat() is True
    tool("nft", "flush", "chain", "ip", "libvirt_network", "guest_nat")
    assert nat() is False


@pytest.mark.parametrize("chain", ["LIBVIRT_PRT", "POSTROUTING"])
def test_nat_as_libvirt_s_iptables_backend_makes_it(chain: str) -> None:
    if chain != "POSTROUTING":
        tool("iptables", "-t", "nat", "-N", chain)
    rule = [chain, "-s", "192.168.122.0/24", "!", "-d", "192.168.122.0/24", "-j", "MASQUERADE"]
    tool("iptables", "-t", "nat", "-A", *rule)
    assert nat() is True
    tool("iptables", "-t", "nat", "-D", *rule)
    tool("iptables", "-t", "nat", "-A", chain, "-s", "192.168.123.0/24", "-j", "MASQUERADE")
    assert nat() is False
