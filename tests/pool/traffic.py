"""Jobs whose traffic is known to the byte, and what the ledger says of jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from tests.pool.worker import ACCOUNTING_FILE, CHECKOUT, Worker

WAN = "203.0.113.1"  # TEST-NET-3, beyond the uplink, and in none of the LAN's prefixes
PORT = 7777
SETTINGS = '[accounting]\nenabled = true\nsample_s = 1\nlan = ["198.18.0.0/15"]\n'  # where the lab's uplinks are
CLOSED = f'{SETTINGS}on_error = "closed"\n'
SHIPPED = CHECKOUT / "condor-config" / "99-vmnode-accounting.conf"
SCRIPT = "/tmp/talk.py"
CHEATING = "/tmp/cheat.py"
OUT, BACK = 1000, 500  # bytes of each datagram and of its answer
HEADERS = 28  # of IPv4 and UDP
SANDBOX = 65536  # more than the transfer of such a job's sandbox takes, in either direction
ATTRIBUTES = ("NetLanInBytesUsage", "NetLanOutBytesUsage", "NetWanInBytesUsage", "NetWanOutBytesUsage")

TALK = f"""\
#!/usr/bin/python3
import socket, sys, time

def talk(address, times):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(5)
        peer.connect((address, {PORT}))
        for _ in range(times):
            peer.send(b"{BACK:04}" + bytes({OUT} - 4))
            assert len(peer.recv(65535)) == {BACK}

lan, wan, lan_times, wan_times, seconds = sys.argv[1:6]
talk(lan, int(lan_times))
talk(wan, int(wan_times))
print(open("/proc/net/dev").read(), flush=True)
time.sleep(float(seconds))
"""

# As far as a job could get to its own account, or to another's: it prints what it could do. Then it does as TALK does.
CHEAT = (
    """\
#!/usr/bin/python3
import json, os, socket, subprocess, sys

done = {}

def tries(name, attempt):
    try:
        done[name] = attempt()
    except OSError as error:
        done[name] = False

def command(*argv):
    ran = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ran.returncode == 0

def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return True

def opened(*arguments):
    socket.socket(*arguments).close()
    return True

def connected(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.connect(path)
    return True

forged = 'GlobalJobId = "victim#1.0#1"\\nNetLanInBytesUsage = 1\\nNetWanOutBytesUsage = 1\\nWantHostNetwork = true\\n'
tries("link", lambda: command("ip", "link", "set", "eth0", "down"))
tries("address", lambda: command("ip", "address", "add", "100.64.9.9/32", "dev", "eth0"))
tries("route", lambda: command("ip", "route", "replace", "default", "dev", "lo"))
tries("rules", lambda: command("nft", "flush", "ruleset"))
tries("the host's network", lambda: command("nsenter", "--net=/proc/1/ns/net", "true"))
tries("the parent's network", lambda: command("nsenter", f"--net=/proc/{os.getppid()}/ns/net", "true"))
tries("raw socket", lambda: opened(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
tries("packet socket", lambda: opened(socket.AF_PACKET, socket.SOCK_RAW, 0x0300))
tries("daemon", lambda: connected("/run/vmnode/starter.sock"))
tries("usage.json", lambda: write("/run/vmnode/usage.json", "{}"))
tries("note", lambda: write("/run/vmnode/unaccounted/1-1", "slot1_1\\nforged\\n"))
tries("ledger", lambda: write("/var/lib/vmnode/ledger.db", ""))
way_out = f"import socket; socket.create_connection(({sys.argv[1]!r}, 9618), 2)"
tries("out of a namespace of its own", lambda: command("unshare", "-Urn", "python3", "-c", way_out))
print(json.dumps(done))
for ad in (".job.ad", ".update.ad", "../htcondor/.job.ad", "../htcondor/.update.ad"):
    tries(ad, lambda: write(ad, forged))  # its own copies
"""
    + TALK
)


class Line(NamedTuple):
    """What the ledger says of a job. Bytes are in ATTRIBUTES' order; None: it was not counted."""

    owner: str
    outcome: str
    why: str
    universe: int
    bytes: Optional[tuple[int, ...]]
    guest: Optional[tuple[int, ...]]  # of a VM job, as is the next
    sandbox: Optional[tuple[int, ...]]


def switch_on(worker: Worker, settings: str = SETTINGS) -> None:
    """As the administrator."""
    _switch_on(worker, settings, SHIPPED.read_text())


def switch_on_closed(worker: Worker) -> None:
    """As the administrator who wants no job uncounted: with the file's last lines, too."""
    _switch_on(worker, CLOSED, re.sub(r"^#   ", "", SHIPPED.read_text(), flags=re.MULTILINE))


def _switch_on(worker: Worker, settings: str, site: str) -> None:
    worker.node.write(SCRIPT, TALK, 0o755)
    worker.node.write(CHEATING, CHEAT, 0o755)
    worker.settings(settings)
    worker.site(site, ACCOUNTING_FILE)


def talking(worker: Worker, lan: int, wan: int, seconds: float, more: str = "", script: str = SCRIPT) -> str:
    """A job that exchanges datagrams with the LAN and the WAN, and then waits."""
    name = f"talk-$(Cluster).{script.rpartition('/')[2]}"
    return f"""\
executable = {script}
arguments = {worker.node.world.address} {WAN} {lan} {wan} {seconds}
output = {name}.out
error = {name}.err
log = {name}.log
should_transfer_files = yes
when_to_transfer_output = on_exit
request_cpus = 1
request_memory = 16M
request_disk = 1M
{more}"""


def out(datagrams: int) -> int:
    return datagrams * (OUT + HEADERS)


def back(datagrams: int) -> int:
    return datagrams * (BACK + HEADERS)


def ledger(worker: Worker) -> dict[str, Line]:
    """By cluster and process; of a job's stays the last."""
    said = json.loads(worker.node.run(["vmnode", "accounting", "jobs", "--json"]).stdout)
    return {entry["job"].split("#")[1]: _line(entry) for entry in said["jobs"] if entry["job"].count("#") == 2}


def _line(entry: Mapping[str, Any]) -> Line:
    parts = entry["vm"] or {"guest": None, "sandbox": None}
    counts = (_bytes(usage) for usage in (entry["total"], parts["guest"], parts["sandbox"]))
    return Line(entry["owner"], entry["outcome"], entry["why"], entry["universe"], *counts)


def _bytes(usage: Optional[Mapping[str, Any]]) -> Optional[tuple[int, ...]]:
    return None if usage is None else tuple(usage[name]["bytes"] for name in ("lan_in", "lan_out", "wan_in", "wan_out"))


def await_line(worker: Worker, job: str, outcome: str, timeout: float = 30.0) -> Line:
    """Wait until the ledger has a job with this outcome."""

    def line() -> Optional[Line]:
        found = ledger(worker).get(job)
        return found if found and found.outcome == outcome else None

    return worker.until(line, f"job {job} to be {outcome} in the ledger", timeout)


def in_slot(worker: Worker, job: str) -> tuple[int, ...]:
    """What the ad of the slot says that the job is on: what its starter will report; () if nothing."""
    constraint = f'JobId =?= "{job}"'
    said = worker.node.run(["condor_status", "-constraint", constraint, "-af:t", *ATTRIBUTES]).stdout.split()
    return tuple(int(number) for number in said if number != "undefined")


def in_history(worker: Worker, job: str) -> tuple[int, ...]:
    """What the ad of a job says that has ended; () if nothing."""
    said = worker.node.run(["condor_history", job, "-limit", "1", "-af:t", *ATTRIBUTES]).stdout.split()
    return tuple(int(number) for number in said if number != "undefined")
