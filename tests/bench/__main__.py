"""python -m tests.bench: the figures of docs/benchmarks.md, on real nodes with HTCondor 23.9 and 25.14 (root)."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tests.lab
from tests.bench import Row, accounting, images
from tests.lab.demo import boot_pool
from tests.lab.errors import LabError
from tests.lab.images import SUITES
from tests.lab.node import Node
from tests.lab.progress import progress

CHECK_ROUNDS = Path(tests.lab.__file__).with_name("check_rounds.py")
FAULT_ROUNDS = 5
HOOK_ROUNDS = 40
REST_S = 6.0  # the hook pushes at most once in five seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to watch the idle daemon (default 10)")
    parser.add_argument("--image", choices=SUITES, action="append", help="only this image")
    only = "only the overlays on base images (two minutes), or only accounting (as long)"
    parser.add_argument("--only", choices=("images", "accounting"), help=only)
    arguments = parser.parse_args()
    try:
        if arguments.only != "images":
            print_table("this machine", accounting.rows())
        for suite in arguments.image or SUITES:
            with boot_pool(suite, f"bench-{suite}") as node:
                rows = [] if arguments.only else measure(node, arguments.minutes)
                if arguments.only != "accounting":
                    rows += images.rows(node)
                if arguments.only != "images":
                    rows += accounting.rows_of_node(node)
                version = node.run(["condor_version"]).stdout.split()[1]
                print_table(f"{suite}, HTCondor {version}", rows)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def print_table(where: str, rows: Sequence[Row]) -> None:
    print(f"\n{where}")
    for what, figure, goal in rows:
        print(f"  {what:<60} {figure:<34} {goal}")
    sys.stdout.flush()


def measure(node: Node, minutes: float) -> list[Row]:
    rows = []
    with progress("waiting until the node is healthy"):
        wait_for(node, "true", 60)
    with progress("breaking and repairing the network"):
        rows.append(fault_to_collector(node, "virsh net-destroy default", ["virsh", "net-destroy", "default"]))
        kill = ["sh", "-c", "kill -9 $(cat /run/libvirt/network/default.pid)"]
        rows.append(fault_to_collector(node, "kill -9 of dnsmasq", kill))
    with progress("running the hook"):
        rows.append(hook_against_interpreter(node))
    with progress("running checks"):
        rows += checks(node)
    with progress(f"watching the idle daemon for {minutes:g} minutes"):
        rows += idle(node, minutes)
    with progress("stopping libvirtd"):
        rows.append(hung_libvirt(node))
    return rows


def wait_for(node: Node, value: str, timeout: float) -> float:
    """Seconds until the collector's HasVirshDefaultNetwork has this value."""
    started = time.monotonic()
    ask = ["condor_status", "-af", "HasVirshDefaultNetwork"]
    node.wait_until(lambda: node.run(ask, check=False).stdout.split()[:1] == [value], f"{value} in the pool", timeout)
    return time.monotonic() - started


def fault_to_collector(node: Node, name: str, inject: Sequence[str]) -> Row:
    broken, repaired = [], []
    for _ in range(FAULT_ROUNDS):
        time.sleep(REST_S)
        node.run(inject)
        broken.append(wait_for(node, "false", 30))
        time.sleep(REST_S)
        node.run(["virsh", "net-destroy", "default"], check=False)
        node.run(["virsh", "net-start", "default"])
        repaired.append(wait_for(node, "true", 60))
    seen = f"{statistics.median(broken):.1f} s (true again {statistics.median(repaired):.1f} s)"
    return f"{name} -> false in the collector, median of {FAULT_ROUNDS}", seen, "<= 2 s"


def timed(node: Node, argv: Sequence[str]) -> float:
    """Milliseconds of one command's wall time, measured inside the node, so that entering it does not count."""
    script = "import subprocess, sys, time\nt = time.perf_counter()\n"
    script += "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\nprint((time.perf_counter() - t) * 1000)"
    return float(node.run(["python3", "-c", script, *argv]).stdout)


def hook_against_interpreter(node: Node) -> Row:
    hook, floor = [], []
    for _ in range(HOOK_ROUNDS):
        hook.append(timed(node, ["/usr/libexec/condor/vmnode-startd-cron"]))
        floor.append(timed(node, ["/usr/bin/python3", "-I", "-S", "-c", "pass"]))
    ours, least = statistics.median(hook), statistics.median(floor)
    return (
        "hook, one-shot, against python3 -I -S -c pass",
        f"{ours:.1f} / {least:.1f} ms = {ours / least:.2f} x",
        "<= 3 x",
    )


def checks(node: Node) -> list[Row]:
    script = CHECK_ROUNDS.read_text()
    seen = json.loads(node.run(["python3", "-c", script, "10"], timeout=120).stdout)
    wall, cpu = statistics.median(seen["wall_s"]), statistics.median(seen["cpu_s"])
    one_shot = timed(node, ["vmnode", "check"]) / 1000
    return [
        (
            "periodic healthy check with the traffic proof, median of 10",
            f"{wall:.2f} s wall, {cpu:.3f} s CPU",
            "<= 1.5, 0.3 s",
        ),
        ("vmnode check, from nothing", f"{one_shot:.1f} s", "<= 10 s"),
    ]


def idle(node: Node, minutes: float) -> list[Row]:
    def cpu_ns() -> int:
        return int(node.run(["systemctl", "show", "--value", "-p", "CPUUsageNSec", "vmnode"]).stdout)

    before, started = cpu_ns(), time.monotonic()
    time.sleep(minutes * 60)
    share = (cpu_ns() - before) / 1e9 / (time.monotonic() - started)
    pids = node.run(["cat", "/sys/fs/cgroup/system.slice/vmnode.service/cgroup.procs"]).stdout.split()
    pids += node.run(["pgrep", "-f", "vmnode-startd-cron --continuous"]).stdout.split()
    pss = 0
    for pid in pids:
        smaps = node.run(["cat", f"/proc/{pid}/smaps_rollup"], check=False).stdout
        pss += sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Pss:"))
    return [
        (f"daemon over {minutes:g} minutes, checks and children included", f"{share:.3%} of one core", "<= 0.7 %"),
        ("daemon, libvirt worker and hook", f"{pss / 1024:.0f} MB PSS", "<= 90 MB"),
    ]


def hung_libvirt(node: Node) -> Row:
    daemons = node.run(["sh", "-c", "pidof libvirtd virtqemud virtnetworkd"], check=False).stdout.split()
    node.run(["kill", "-STOP", *daemons])
    try:
        seconds = timed(node, ["vmnode", "check"]) / 1000
    finally:
        node.run(["kill", "-CONT", *daemons])
    return "libvirt hung: vmnode check ends after", f"{seconds:.1f} s", "<= timeout_s (5) + 1 s"


if __name__ == "__main__":
    sys.exit(main())
