"""What vmnode-starter adds to a job's start, on a node with HTCondor: from its own start to that of condor_starter."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.lab.node import Node
from tests.lab.progress import progress

JOBS = 20  # one after the other: each takes all processors
WRAPPER, REAL, MOVED = "/usr/libexec/condor/vmnode-starter", "/usr/sbin/condor_starter", "/usr/sbin/condor_starter.real"
BEFORE, AFTER = "/tmp/before", "/tmp/after"  # the times
FIRST = "/usr/local/sbin/first-starter"
CONDOR_FILE = "/etc/condor/config.d/99-zz-bench.conf"
SETTINGS_FILE = "/etc/vmnode/conf.d/81-bench.toml"
SUBMIT = f"""\
executable = /bin/true
transfer_executable = false
request_cpus = {os.cpu_count()}
request_memory = 16M
request_disk = 1M
queue {JOBS}
"""
TIMEOUT_S = 90.0


def seconds(node: Node) -> Sequence[float]:
    """Of each job."""
    stamp(node, FIRST, BEFORE, WRAPPER)
    node.run(["mv", REAL, MOVED])
    try:
        stamp(node, REAL, AFTER, MOVED)
        node.write(SETTINGS_FILE, "[accounting]\nenabled = true\n")
        node.run(["systemctl", "reload", "vmnode"])
        node.wait_until(
            lambda: node.run(["test", "-S", "/run/vmnode/starter.sock"], check=False).returncode == 0,
            "the starters' socket",
        )
        node.write(
            CONDOR_FILE, f"STARTER = {FIRST}\nSTARTD_JOB_ATTRS = $(STARTD_JOB_ATTRS) WantHostNetwork\nSTART = TRUE\n"
        )
        node.run(["condor_reconfig"])
        # What else the machine does should not count; the starter inherits this from the startd (sched(7)).
        node.run(["sh", "-c", "for p in $(pgrep -x vmnoded) $(pgrep -x condor_startd); do chrt -a -r -p 10 $p; done"])
        with progress(f"running {JOBS} jobs"):
            node.write("/home/alice/true.sub", SUBMIT)
            node.run(["runuser", "-u", "alice", "--", "env", "-C", "/home/alice", "condor_submit", "true.sub"])
            node.wait_until(lambda: len(times(node, AFTER)) >= JOBS, "the jobs", TIMEOUT_S)
        before, after = times(node, BEFORE), times(node, AFTER)
        return [after[pid] - before[pid] for pid in after]
    finally:
        node.run(["condor_rm", "-all"], check=False)
        node.run(["mv", MOVED, REAL])
        node.run(["rm", "-f", CONDOR_FILE, SETTINGS_FILE, BEFORE, AFTER, FIRST])
        node.run(["condor_reconfig"], check=False)
        node.run(["systemctl", "reload", "vmnode"])


def stamp(node: Node, path: str, log: str, following: str) -> None:
    """Put a program there that notes the time of its start, and becomes the following one."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "stamp"
        source = Path(__file__).with_name("stamp.c")
        macros = [f'-DLOG="{log}"', f'-DNEXT="{following}"']
        subprocess.run(["gcc", "-O2", "-static", *macros, "-o", str(program), str(source)], check=True)
        subprocess.run(["install", "-m", "0755", str(program), str(node.path(path))], check=True)


def times(node: Node, log: str) -> dict[str, float]:
    """Seconds by process."""
    lines = node.run(["cat", log], check=False).stdout.splitlines()
    return {pid: int(ns) / 1e9 for pid, ns in map(str.split, lines)}
