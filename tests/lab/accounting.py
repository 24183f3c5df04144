"""The part of the demonstration about accounting: a job that sends and receives what is known, and what is said of it.

The job exchanges datagrams with a responder beyond the node's uplink, so that its numbers can be worked out by hand.
"""

from __future__ import annotations

import json
from typing import Any

from tests.lab.errors import LabError
from tests.lab.node import Node
from tests.lab.progress import progress
from tests.lab.screen import HOME, show, wait_for_output

SETTINGS = "/etc/vmnode/conf.d/25-accounting.toml"
SHIPPED = "/usr/share/doc/vmnode/99-vmnode-accounting.conf"
CONDOR_FILES = "/etc/condor/config.d/"
ATTRIBUTES = ("NetLanInBytesUsage", "NetLanOutBytesUsage", "NetWanInBytesUsage", "NetWanOutBytesUsage")
PEER = "203.0.113.1"  # TEST-NET-3 (RFC 5737), beyond the uplink, and no LAN
PORT = 7777
TIMES, OUT, BACK = 1000, 500, 1000  # datagrams; bytes of each, and of its answer
HEADERS = 28  # of IPv4 and UDP
# What a job does in its last third is not in its ad.
TALK = f"""\
#!/usr/bin/python3
import socket, time

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.connect(("{PEER}", {PORT}))
    for _ in range({TIMES}):
        peer.send(b"{BACK:04}".ljust({OUT}))
        peer.recv({BACK})
time.sleep(20)
"""
SUBMIT = """\
executable   = talk.py
request_cpus = 1
request_disk = 1MB
queue
"""
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 90.0


def switch_on(node: Node) -> None:
    """As the administrator does it."""
    node.world.respond(PEER, PORT)
    node.write(SETTINGS, "[accounting]\nenabled = true\n")
    print("What jobs send and receive is counted, once the administrator says so to vmnode and to HTCondor:\n")
    show(node, ["cat", SETTINGS])
    show(node, ["systemctl", "reload", "vmnode"])
    show(node, ["cp", SHIPPED, CONDOR_FILES])
    show(node, ["condor_reconfig"])
    with progress("waiting for accounting to work"):
        node.wait_until(lambda: _condition(node) == "ok", "condition accounting to be ok", START_TIMEOUT_S)


def submit(node: Node) -> None:
    """A job of known traffic, beside what else runs."""
    node.write(f"{HOME}/talk.py", TALK, 0o755)
    node.write(f"{HOME}/talk.sub", SUBMIT)
    node.run(["chown", "alice:", f"{HOME}/talk.py", f"{HOME}/talk.sub"])
    print(
        f"An ordinary job, meanwhile, sends {TIMES} datagrams of {OUT} bytes to a host beyond the LAN, and receives as"
        f" many of {BACK}:\n"
    )
    show(node, ["condor_submit", "talk.sub"], "alice")


def show_accounts(node: Node, job: int) -> None:
    """What the ledger and HTCondor say; `job` is the ordinary job's cluster. Raises LabError if it is not so."""
    with progress("waiting for the last records"):
        wait_for_output(node, ["condor_history", str(job), "-af", "ClusterId"], END_TIMEOUT_S)
        node.wait_until(lambda: "running" not in _outcomes(node), "the ledger's last word", END_TIMEOUT_S)
    print("What the jobs used stands in the ledger:\n")
    show(node, ["vmnode", "accounting", "jobs"])
    show(node, ["vmnode", "accounting", "report"])
    received, sent = (TIMES * (size + HEADERS) for size in (BACK, OUT))
    print(f"Exactly: job {job} received {received} bytes from beyond the LAN and sent {sent}, IP headers included.\n")
    (line,) = _jobs(node, "--job", str(job))
    counted = tuple(line["total"][name]["bytes"] for name in ("wan_in", "wan_out"))
    if counted != (received, sent):
        raise LabError(f"the ledger says {counted} of job {job}, and not {(received, sent)}")
    print("And, as samples, in the jobs' ads:\n")
    show(node, ["condor_history", "-constraint", "JobStatus == 4", "-af:h", "ClusterId", "JobUniverse", *ATTRIBUTES])


def _condition(node: Node) -> str:
    said = json.loads(node.run(["vmnode", "status", "--json"], check=False).stdout or "{}")
    return next((one["status"] for one in said.get("conditions", []) if one["name"] == "accounting"), "")


def _outcomes(node: Node) -> list[str]:
    return [line["outcome"] for line in _jobs(node)]


def _jobs(node: Node, *which: str) -> list[dict[str, Any]]:
    return list(json.loads(node.run(["vmnode", "accounting", "jobs", "--json", *which]).stdout)["jobs"])
