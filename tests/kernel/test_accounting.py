"""What jobs use is counted to the byte, whatever becomes of vmnoded; and nothing of it stays."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest

from tests.kernel.accounting import LAN, SINK, WAN, Vmnoded, after_a_while, peers, send
from tests.kernel.world import script, tables, tool
from tests.kernel.world import until as until_
from vmnode.accounting.record import Outcome
from vmnode.host.starter_socket import Client
from vmnode.usage import NONE, Traffic, Usage

pytestmark = pytest.mark.nft_owner


@pytest.fixture(autouse=True)
def two_peers() -> Iterator[None]:
    with peers():
        yield


def until(true: Callable[[], object], deadline_s: float = 20.0) -> None:
    """An interpreter takes its time to start on a machine with other work to do."""
    until_(true, deadline_s)


def usage(lan_in: int = 0, lan_out: int = 0, wan_in: int = 0, wan_out: int = 0) -> Usage:
    """In datagrams of 100 bytes."""
    return Usage(*(Traffic(100 * count, count) for count in (lan_in, lan_out, wan_in, wan_out)))


# --- exact --------------------------------------------------------------------------------------------------------


def test_what_a_command_sent_is_in_its_account_and_in_the_ledger(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        _, account = vmnoded.run(*send(WAN, 7))
        assert account["usage"]["wan_out"] == {"bytes": 700, "packets": 7}
        vmnoded.run(*send(LAN, 3))
        assert [record.usage for record in vmnoded.records()] == [usage(wan_out=7), usage(lan_out=3)]
        assert [record.outcome for record in vmnoded.records()] == [Outcome.COMPLETE] * 2


def test_what_the_jobs_own_interface_counts_is_what_the_ledger_says(tmp_path: Path) -> None:
    """TCP both ways, with the handshake and the end of the connection, against the statistics of the job's eth0."""
    serve = f"""
import socket
s = socket.create_server(({WAN!r}, 80))
print("ready", flush=True)
while True:
    c, _ = s.accept()
    c.sendall(c.recv(1) * 1000000)
    c.close()
"""
    fetch = f"""
import json, socket, subprocess, time
s = socket.create_connection(({WAN!r}, 80))
s.sendall(b"x")
got = 0
while data := s.recv(65536):
    got += len(data)
s.close()
assert got == 1000000
before = None
while True:  # until the last packet has come
    shown = subprocess.run(["ip", "-s", "-j", "link", "show", "eth0"], capture_output=True).stdout
    now = json.loads(shown)[0]["stats64"]
    if now == before: break
    before = now
    time.sleep(0.3)
print(json.dumps(now))
"""
    holder = next(pid for pid in namespaces_with(WAN))
    with Vmnoded(tmp_path) as vmnoded:
        argv = ["nsenter", "-t", str(holder), "-n", sys.executable, "-c", serve]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            output, account = vmnoded.run(sys.executable, "-c", fetch)
        finally:
            server.kill()
            server.communicate()
        eth0 = json.loads(output)
        for ours, theirs in (("wan_in", eth0["rx"]), ("wan_out", eth0["tx"])):
            packets = theirs["packets"]
            # An Ethernet header is no part of layer 3; neighbours are permanent, so there was no ARP.
            assert account["usage"][ours] == {"bytes": theirs["bytes"] - 14 * packets, "packets": packets}
        assert account["usage"]["lan_in"] == account["usage"]["lan_out"] == {"bytes": 0, "packets": 0}


def namespaces_with(address: str) -> Iterator[int]:
    """The processes of ours in whose namespace the address is."""
    import psutil

    for child in psutil.Process().children():
        listed = subprocess.run(["nsenter", "-t", str(child.pid), "-n", "ip", "-o", "address"], capture_output=True)
        if address.encode() in listed.stdout:
            yield child.pid


def test_a_command_that_does_nothing_used_nothing(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        vmnoded.run("sleep", "1")
        assert vmnoded.records()[0].usage == NONE


def test_what_the_host_itself_exchanges_with_a_job_is_lan(tmp_path: Path) -> None:
    """Whatever address of the host's: the default route leads by the gateway."""
    with Vmnoded(tmp_path) as vmnoded:
        script("table inet quiet { chain c { type filter hook input priority 0; udp dport 9 drop\n }\n }")
        for near in ("10.0.0.2", "203.0.113.2", "100.64.0.1"):
            vmnoded.run(*send(near, 2))
        assert [record.usage for record in vmnoded.records()] == [usage(lan_out=2)] * 3


def test_an_address_that_the_host_gets_later_is_lan_from_then_on(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        script("table inet quiet { chain c { type filter hook input priority 0; udp dport 9 drop\n }\n }")
        tool("ip", "address", "add", "203.0.113.77/32", "dev", "eth1")
        until(lambda: "203.0.113.77" in tool("nft", "list", "set", "inet", vmnoded.table, "lan4"))
        vmnoded.run(*send("203.0.113.77", 2))
        assert vmnoded.records()[0].usage == usage(lan_out=2)


# --- crashes ------------------------------------------------------------------------------------------------------


def test_no_byte_is_lost_by_a_crash_while_a_job_runs(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        job = vmnoded.popen(*after_a_while(tmp_path, *send(WAN, 50)))
        until((tmp_path / "inside").exists)
        vmnoded.kill()
        (tmp_path / "go").touch()  # it works while nobody looks
        job.communicate(timeout=20)
        assert job.returncode == 0
        until(lambda: not vmnoded.jobs_links())
        vmnoded.start()
        (record,) = vmnoded.records()
        assert (record.usage, record.outcome) == (usage(wan_out=50), Outcome.RECOVERED)


def test_a_job_that_outlives_a_crash_is_counted_on(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        job = vmnoded.popen(*after_a_while(tmp_path, *send(WAN, 50)))
        until((tmp_path / "inside").exists)
        vmnoded.kill()
        vmnoded.start()
        (tmp_path / "go").touch()
        job.communicate(timeout=20)
        until(lambda: vmnoded.records()[0].outcome is Outcome.COMPLETE)
        assert vmnoded.records()[0].usage == usage(wan_out=50)
        assert vmnoded.records()[0].partial_since is None


@pytest.mark.timeout(1800)
def test_crashes_at_random_moments_leak_nothing_and_lose_nothing(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    crashes = 200 if request.config.getoption("--soak") else 20
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Vmnoded(tmp_path) as vmnoded:
        sent = 0
        for _ in range(crashes):
            jobs = [vmnoded.popen(*send(WAN, 5)) for _ in range(2)]
            time.sleep(chance.uniform(0, 0.8))
            vmnoded.kill()
            for job in jobs:
                job.communicate(timeout=30)
            vmnoded.start()
            sent = sum(record.usage.wan_out.packets for record in vmnoded.records() if record.usage is not None)
            assert sent % 5 == 0, vmnoded.records()
        until(lambda: not vmnoded.jobs_links())
        until(lambda: vmnoded.elements() == [])
        assert all(record.outcome is not Outcome.RUNNING for record in vmnoded.records())
        assert all(record.partial_since is None for record in vmnoded.records())
        assert sent > 0


def test_a_reboot_closes_records_with_what_was_known(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        job = vmnoded.popen("sh", "-c", f"{shlex.join(send(WAN, 4))}; echo $$ >{tmp_path}/pid; exec sleep 60")
        until(lambda: vmnoded.records() and vmnoded.records()[0].usage == usage(wan_out=4))
        vmnoded.kill()
        with sqlite3.connect(vmnoded.state_dir / "ledger.db") as database:  # as if all of it were of another boot
            database.execute("UPDATE records SET boot_id = 'another'")
        database.close()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        job.communicate()
        vmnoded.start()
        (record,) = vmnoded.records()
        assert (record.outcome, record.usage) == (Outcome.RECOVERED, usage(wan_out=4))
        assert record.why == "the node was booted anew" and record.ended_at == record.seen_at


# --- others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["flush ruleset", "delete table inet {table}", "flush chain inet {table} out"])
def test_rules_that_somebody_removed_are_back_within_seconds_and_the_gap_is_recorded(tmp_path: Path, what: str) -> None:
    with Vmnoded(tmp_path, sample_s=60) as vmnoded:
        shell = [shlex.join(send(WAN, count)) for count in (4, 3)]
        job = vmnoded.popen("sh", "-c", f"{shell[0]}; until [ -e {tmp_path}/go ]; do sleep 0.05; done; {shell[1]}")
        until(lambda: "packets 4 bytes 400" in tool("nft", "list", "table", "inet", vmnoded.table))
        until(lambda: vmnoded.records()[0].link in vmnoded.elements())
        began = time.time()
        tool("nft", what.format(table=vmnoded.table))
        until(lambda: "somebody removed or changed the rules" in vmnoded.said())
        until(lambda: vmnoded.records()[0].link in vmnoded.elements())
        assert time.time() - began < 3
        (tmp_path / "go").touch()
        job.communicate(timeout=20)
        until(lambda: vmnoded.records()[0].outcome is Outcome.COMPLETE)
        (record,) = vmnoded.records()
        assert record.partial_since is not None and record.started_at <= record.partial_since <= began
        assert record.usage is not None and record.usage.wan_out.packets >= 3


def test_foreign_tables_and_links_stay_as_they_are(tmp_path: Path) -> None:
    script("table inet theirs { chain c { type filter hook forward priority 0; counter\n }\n }")
    tool("ip", "link", "add", "vmnjffff1", "type", "veth", "peer", "name", "vmx")
    before = tool("nft", "list", "table", "inet", "theirs"), sorted(tables())
    with Vmnoded(tmp_path) as vmnoded:
        vmnoded.run("true")
        vmnoded.kill()
        vmnoded.start()
        assert f"table inet {vmnoded.table}" in tables()
    assert (tool("nft", "list", "table", "inet", "theirs"), sorted(tables())) == before
    tool("ip", "link", "delete", "vmnjffff1")


# --- limits -------------------------------------------------------------------------------------------------------


def test_a_pool_that_is_used_up_is_said_and_recorded_and_works_again(tmp_path: Path) -> None:
    with Vmnoded(tmp_path, pool4="100.64.0.0/29") as vmnoded:  # .1 is the gateway, .2 the probe's, .7 nobody's
        jobs = [vmnoded.popen("sleep", "30") for _ in range(4)]
        until(lambda: len(vmnoded.jobs_links()) == 4)
        refused = vmnoded.popen("true")
        _, complaint = refused.communicate(timeout=20)
        assert refused.returncode == 69
        assert "all 4 addresses for jobs are in use" in complaint and "hint" in complaint
        for job in jobs:
            tool("pkill", "-P", str(job.pid))
            job.communicate(timeout=20)
        until(lambda: not vmnoded.jobs_links())
        vmnoded.run("true")


def test_a_pool_that_the_host_knows_already_is_refused_with_the_name_of_the_route(tmp_path: Path) -> None:
    vmnoded = Vmnoded(tmp_path, pool4="10.0.0.0/16")
    vmnoded.start(serving=False)
    try:
        until(lambda: "overlaps the host's route 10.0.0.0/24 by eth0" in vmnoded.said())
        refused = vmnoded.popen("true")
        assert "overlaps" in refused.communicate(timeout=20)[1] and refused.returncode == 69
    finally:
        vmnoded.stop()


def test_many_at_once_are_all_counted(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        with ThreadPoolExecutor(128) as threads:
            clients = list(threads.map(lambda _: Client(vmnoded.socket, "run root", 60), range(128)))
            assert len(vmnoded.jobs_links()) == 128
            assert len({record.number for record in vmnoded.records()}) == 128
            for client in clients:
                say_something(client)
            answers = list(threads.map(Client.ended, clients))
        assert sorted(answers) == sorted(f"record {number}" for number in range(1, 129))
        until(lambda: {record.outcome for record in vmnoded.records()} == {Outcome.COMPLETE})
        assert [record.usage for record in vmnoded.records()] == [usage(wan_out=1)] * 128


def say_something(client: Client) -> None:
    """A datagram of 100 bytes from inside."""

    def inside() -> None:
        client.enter()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(72), (WAN, SINK))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


def test_only_root_can_ask(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        assert vmnoded.socket.stat().st_mode & 0o777 == 0o600
        ask = f"import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect({str(vmnoded.socket)!r})"
        tmp_path.chmod(0o755)
        asked = subprocess.run(
            ["/usr/bin/python3", "-c", ask], capture_output=True, text=True, user=65534, group=65534, extra_groups=[]
        )
        assert "PermissionError" in asked.stderr


# --- switched off and on ------------------------------------------------------------------------------------------


def test_a_job_that_runs_when_accounting_is_switched_off_is_counted_to_its_end(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        job = vmnoded.popen(*after_a_while(tmp_path, *send(WAN, 5)))
        until((tmp_path / "inside").exists)
        vmnoded.settings["enabled"] = False
        vmnoded.reload()
        until(lambda: "counted to their end" in vmnoded.said())
        assert not vmnoded.socket.exists()
        (tmp_path / "go").touch()
        job.communicate(timeout=20)
        until(lambda: vmnoded.records()[0].outcome is not Outcome.RUNNING)
        assert vmnoded.records()[0].usage == usage(wan_out=5)
        until(lambda: f"table inet {vmnoded.table}" not in tables())


def test_a_reload_that_changes_nothing_here_keeps_the_socket_open(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        before = vmnoded.socket.stat().st_ino
        vmnoded.reload()
        until(lambda: "the configuration was read again" in vmnoded.said())
        vmnoded.run("true")
        assert vmnoded.socket.stat().st_ino == before


def test_another_backend_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        vmnoded.settings["backend"] = "iptables"
        vmnoded.reload()
        until(lambda: "and iptables counts" in vmnoded.said())
        assert f"table inet {vmnoded.table}" not in tables()
        _, account = vmnoded.run(*send(WAN, 3))
        assert account["usage"]["wan_out"] == {"bytes": 300, "packets": 3}
    assert vmnoded.table not in tool("iptables-save") and vmnoded.table not in tool("ipset", "list", "-n")


def reconfigured(vmnoded: Vmnoded, **settings: object) -> None:
    """The same daemon with another configuration, which it reads by itself when it is told to."""
    vmnoded.stop()
    vmnoded.settings.update(settings)
    vmnoded.start()


def test_a_job_whose_number_is_not_in_a_smaller_pool_is_counted_to_its_end(tmp_path: Path) -> None:
    with Vmnoded(tmp_path, pool4="100.64.0.0/24") as vmnoded:
        for _ in range(6):
            vmnoded.run("true")
        job = vmnoded.popen(*after_a_while(tmp_path, *send(WAN, 5)))
        until((tmp_path / "inside").exists)
        reconfigured(vmnoded, pool4="100.65.0.0/29")
        (tmp_path / "go").touch()
        job.communicate()
        until(lambda: vmnoded.records()[-1].ended_at is not None)
        assert vmnoded.records()[-1].usage == usage(wan_out=5)
        assert vmnoded.run(*send(WAN, 1))[1]["usage"]["wan_out"]["packets"] == 1


def test_a_new_ledger_leaves_the_jobs_of_the_old_one_their_links_and_addresses(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        job = vmnoded.popen(*after_a_while(tmp_path, *send(WAN, 5)))
        until((tmp_path / "inside").exists)
        vmnoded.kill()
        for path in vmnoded.state_dir.glob("ledger.db*"):
            path.unlink()
        vmnoded.start()
        (theirs,) = vmnoded.jobs_links()
        for _ in range(2):
            assert vmnoded.run(*send(WAN, 1))[1]["usage"]["wan_out"]["packets"] == 1
        assert vmnoded.jobs_links() == [theirs]
        assert {record.number for record in vmnoded.records()} == {4, 5}
        (tmp_path / "go").touch()
        assert job.wait(20) == 0
        until(lambda: not vmnoded.jobs_links())


def test_a_ledger_that_is_removed_while_it_is_kept_is_missed_and_begun_anew(tmp_path: Path) -> None:
    with Vmnoded(tmp_path) as vmnoded:
        vmnoded.run(*send(WAN, 1))
        for path in vmnoded.state_dir.glob("ledger.db*"):
            path.unlink()
        until(lambda: "the ledger was removed or replaced while vmnoded runs" in vmnoded.said())
        until(lambda: vmnoded.said().count("accounting: jobs get addresses") == 2, 30)
        assert vmnoded.run(*send(WAN, 2))[1]["usage"]["wan_out"]["packets"] == 2
        assert [record.usage for record in vmnoded.records()] == [usage(wan_out=2)]


def test_a_second_instance_does_not_write_into_the_ledger_of_the_first(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Vmnoded(tmp_path) as first:
        job = first.popen(*after_a_while(tmp_path, *send(WAN, 5)))
        until((tmp_path / "inside").exists)
        second = Vmnoded(other, pool4="100.66.0.0/16")
        second.state_dir = first.state_dir
        second.start(serving=False)
        until(lambda: "another vmnoded keeps this ledger" in second.said())
        second.stop()
        assert [record.outcome for record in first.records()] == [Outcome.RUNNING]
        (tmp_path / "go").touch()
        assert job.wait(20) == 0
