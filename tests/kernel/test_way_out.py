"""Whether jobs have network is found out by an imaginary job, and who takes it from them is named."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Callable

import pytest

from tests.kernel.world import FAR, PORT, links, outside, running, script, tables, tool, until
from vmnode.accounting.gatekeeper import Gatekeeper
from vmnode.accounting.way_out import Passage, Probe, admit, dismiss
from vmnode.conditions import Observation, Status
from vmnode.host.counting import Rules
from vmnode.host.jobnet import Ends
from vmnode.host.nftables import NftablesCounters
from vmnode.values import Target

pytestmark = pytest.mark.nft_owner

POOL4, POOL6 = IPv4Network("100.64.0.0/16"), IPv6Network("fd76:6d6e:6f64:6500::/64")
OURS, LINK = "vmnj0123", "vmnj0123-probe"
REMOTE, SILENT, LOCAL = Target(FAR, PORT), Target(FAR, 9), Target("10.0.0.2", PORT)
FAR6 = "2001:db8::1"
FORBIDDEN = "table inet site {\n chain f {\n type filter hook forward priority 0; policy drop\n }\n}\n"
LISTEN = """
import socket
s = socket.socket(socket.{})
s.bind(({!r}, 9618))
s.listen()
print("ready", flush=True)
while 1: s.accept()
"""


def check(*targets: Target, ipv6: bool = False, passage: bool = False) -> Observation:
    """The imaginary job's verdict. What it makes is gone afterwards, and rules of others are as they were."""
    families = [Ends(POOL4[2], POOL4[1])] + ([Ends(POOL6[2], POOL6[1])] if ipv6 else [])

    async def run() -> Observation:
        counters = NftablesCounters("0123")
        await counters.set_up(Rules("0123", OURS, POOL4, POOL6, (), ()))
        if passage:
            await admit(OURS, (4, 6))
        before = ruleset()
        try:
            return await Probe("0123", LINK, families, 1500).check(targets or (REMOTE,))
        finally:
            assert ruleset() == before
            assert [name for name in links() if name.startswith("vmn")] == []
            await dismiss(OURS)
            await counters.tear_down()

    return asyncio.run(run())


def ruleset() -> list[str]:
    return [line for line in tool("nft", "list", "ruleset").splitlines() if "counter" not in line]


def forward_chain(tool_name: str = "iptables") -> list[str]:
    return tool(tool_name, "-S", "FORWARD").splitlines()


@contextlib.contextmanager
def outside_with_ipv6() -> Iterator[None]:
    with outside() as pid:
        inside = ("nsenter", "-t", str(pid), "-n")
        tool(*inside, "ip", "address", "add", f"{FAR6}/64", "dev", "far0", "nodad")
        tool("ip", "address", "add", "2001:db8::2/64", "dev", "eth0", "nodad")
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
        listen = LISTEN.format("AF_INET6", FAR6)
        with running([*inside, sys.executable, "-c", listen], stdout=subprocess.PIPE) as listener:
            assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
            yield


# --- the proof ----------------------------------------------------------------------------------------------------


def test_a_job_that_reaches_a_target_has_network() -> None:
    with outside():
        assert check(SILENT, REMOTE) == Observation(
            "accounting", Status.OK, "Ok", f"jobs have network: tcp://{FAR}:{PORT} answers"
        )


def test_a_job_has_network_by_ipv6_too() -> None:
    with outside_with_ipv6():
        assert check(Target(FAR6, PORT), ipv6=True).message == f"jobs have network: tcp://[{FAR6}]:{PORT} answers"
        assert check(Target(FAR6, PORT)).reason == "NoTarget"  # jobs without IPv6 cannot prove anything by it


def test_a_target_elsewhere_proves_more_than_one_on_this_host() -> None:
    listen = LISTEN.format("AF_INET", LOCAL.host)
    with outside(), running([sys.executable, "-c", listen], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
        assert str(REMOTE) in check(LOCAL, REMOTE).message
        assert str(LOCAL) in check(LOCAL, SILENT).message


def test_nothing_is_said_against_the_jobs_where_the_host_reaches_no_target() -> None:
    with outside():
        observed = check(SILENT)
    assert (observed.status, observed.reason) == (Status.UNKNOWN, "NoTarget")
    assert observed.message.endswith(f"this host itself reaches no target: tcp://{FAR}:9: connection refused")


@pytest.mark.parametrize(("name", "ipv6"), [("net.ipv4.ip_forward", False), ("net.ipv6.conf.all.forwarding", True)])
def test_forwarding_that_somebody_switched_off_is_named(name: str, ipv6: bool) -> None:
    with outside_with_ipv6():
        tool("sysctl", "-q", f"{name}=0")
        observed = check(ipv6=ipv6)
    assert (observed.status, observed.reason) == (Status.FAILED, "IpForwardOff")
    assert observed.message == f"jobs have no network: somebody has switched {name} off"


@pytest.mark.nft_owner
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("ip daddr 10.0.0.0/8 drop", "no answer within 3 s"),
        (f"tcp dport {PORT} reject", "connection refused"),
        (f"tcp sport {PORT} drop", "no answer within 3 s"),  # the answers
    ],
    ids=["drops", "rejects", "drops the answers"],
)
def test_a_foreign_rule_is_named(rule: str, reason: str) -> None:
    script(f"table inet site {{\n chain forward {{\n type filter hook forward priority 0\n {rule}\n }}\n}}\n")
    with outside():
        observed = check(SILENT, REMOTE)
    assert (observed.status, observed.reason) == (Status.FAILED, "ForeignDrop")
    start = f"jobs do not reach tcp://{FAR}:{PORT} ({reason}), though this host does: dropped by "
    assert observed.message.startswith(f"{start}table inet site, chain forward, rule: {rule}")


@pytest.mark.nft_owner
def test_a_foreign_rule_against_ipv6_is_named() -> None:
    script(f"table ip6 site {{\n chain f {{\n type filter hook forward priority 0\n tcp dport {PORT} drop\n }}\n}}\n")
    with outside_with_ipv6():
        observed = check(Target(FAR6, PORT), ipv6=True)
    assert observed.message.endswith(f"dropped by table ip6 site, chain f, rule: tcp dport {PORT} drop")


# --- iptables' policy ---------------------------------------------------------------------------------------------


@pytest.mark.nft_owner
def test_a_policy_that_drops_is_named_and_with_our_two_rules_lets_jobs_through() -> None:
    tool("iptables", "-P", "FORWARD", "DROP")
    with outside():
        observed = check()
        assert observed.reason == "ForwardPolicyDrop"
        assert observed.message.endswith("dropped by table ip filter, chain FORWARD, its policy")
        assert check(passage=True).status is Status.OK


def test_rules_are_appended_only_where_the_policy_drops_and_only_once() -> None:
    tool("iptables", "-P", "FORWARD", "DROP")
    tool("iptables", "-A", "FORWARD", "-i", "eth7", "-j", "ACCEPT")
    before = forward_chain()
    for _ in range(2):
        assert asyncio.run(admit(OURS, (4, 6))) == Passage(None, (4,))
        assert forward_chain() == [
            *before,
            "-A FORWARD -i vmnj0123+ -m comment --comment vmnode -j ACCEPT",
            "-A FORWARD -o vmnj0123+ -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment vmnode -j ACCEPT",
        ]
    assert forward_chain("ip6tables") == ["-P FORWARD ACCEPT"]
    asyncio.run(dismiss(OURS))
    assert forward_chain() == before
    asyncio.run(dismiss(OURS))


def test_rules_that_somebody_flushed_are_put_back() -> None:
    tool("ip6tables", "-P", "FORWARD", "DROP")
    asyncio.run(admit(OURS, (4, 6)))
    whole = forward_chain("ip6tables")
    assert len(whole) == 3
    for removed in (["-F", "FORWARD"], ["-D", "FORWARD", "1"], ["-D", "FORWARD", "2"]):
        tool("ip6tables", *removed)
        assert asyncio.run(admit(OURS, (4, 6))) == Passage(None, (6,))
        assert sorted(forward_chain("ip6tables")) == sorted(whole)


def test_two_instances_let_each_other_s_rules_alone() -> None:
    tool("iptables", "-P", "FORWARD", "DROP")
    asyncio.run(admit("vmnj4567", (4,)))
    theirs = forward_chain()
    asyncio.run(admit(OURS, (4,)))
    assert len(forward_chain()) == 5
    asyncio.run(dismiss(OURS))
    assert forward_chain() == theirs


@pytest.mark.nft_owner
def test_what_an_administrator_forbids_explicitly_stays_forbidden_and_is_named() -> None:
    tool("iptables", "-P", "FORWARD", "DROP")
    tool("iptables", "-A", "FORWARD", "-d", "10.0.0.0/8", "-j", "DROP")
    with outside():
        observed = check(passage=True)
    assert observed.reason == "ForeignDrop"
    assert "dropped by table ip filter, chain FORWARD, rule: ip daddr 10.0.0.0/8" in observed.message


def test_a_passage_says_what_was_done() -> None:
    assert str(Passage(None, ())) == "no firewall needs to be told of the jobs' links"
    assert str(Passage("vmnode", (4, 6))) == (
        "firewalld has the jobs' links in its zone 'vmnode'; "
        "two rules take jobs past the policy DROP of iptables' chain FORWARD; "
        "two rules take jobs past the policy DROP of ip6tables' chain FORWARD"
    )


# --- nothing stays ------------------------------------------------------------------------------------------------

PROBING = f"""
import asyncio
from ipaddress import ip_address
from vmnode.accounting.gatekeeper import Gatekeeper
from vmnode.accounting.way_out import Probe
from vmnode.host.jobnet import Ends
from vmnode.values import Target
ends = Ends(ip_address("100.64.0.2"), ip_address("100.64.0.1"))
asyncio.run(Probe("0123", {LINK!r}, [ends], 1500).check([Target({FAR!r}, {PORT})]))
"""


@pytest.mark.nft_owner
def test_a_probe_that_is_killed_leaves_nothing() -> None:
    script("table inet site {\n chain f {\n type filter hook forward priority 0; policy drop\n }\n}\n")
    checkout = Path(__file__).parents[2]
    with outside():
        with running([sys.executable, "-c", PROBING], cwd=checkout):
            until(lambda: any("vmn_trace" in table for table in tables()), 10)
            assert LINK in links()
        until(lambda: LINK not in links() and tables().count("table inet vmn_trace_0123") == 0)


# --- the gatekeeper -----------------------------------------------------------------------------------------------


@pytest.mark.nft_owner
def test_the_gatekeeper_opens_what_is_shut_and_says_what_it_cannot_open(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vmnoded")

    async def run() -> None:
        counters = NftablesCounters("0123")
        await counters.set_up(Rules("0123", OURS, POOL4, POOL6, (), ()))
        probe = Probe("0123", LINK, [Ends(POOL4[2], POOL4[1])], 1500)
        keeper = Gatekeeper(probe, OURS, (4,), lambda: [REMOTE])
        keeping = asyncio.ensure_future(keeper.keep())
        try:
            await keeper.look()
            assert (keeper.seen.status, keeper.complaint) == (Status.OK, "")
            tool("iptables", "-P", "FORWARD", "DROP")
            keeper.firewall_changed()
            await until_async(lambda: len(forward_chain()) == 3)
            script(FORBIDDEN)
            keeper.firewall_changed()
            await until_async(lambda: bool(keeper.complaint))
            assert keeper.complaint.endswith("dropped by table inet site, chain f, its policy")
            tool("nft", "delete", "table", "inet", "site")
            keeper.firewall_changed()
            await until_async(lambda: not keeper.complaint)
        finally:
            keeping.cancel()
            await asyncio.wait({keeping})
            await dismiss(OURS)
            await counters.tear_down()

    with outside():
        asyncio.run(run())
    assert [record.getMessage().split(" (hint")[0] for record in caplog.records] == [
        "accounting: no firewall needs to be told of the jobs' links",
        "accounting: two rules take jobs past the policy DROP of iptables' chain FORWARD",
        (
            f"accounting: jobs do not reach tcp://{FAR}:{PORT} (no answer within 3 s), though this host does: "
            "dropped by table inet site, chain f, its policy"
        ),
        "accounting: jobs have their network again",
    ]


async def until_async(true: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not true():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), 30)
