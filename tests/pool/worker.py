"""A worker node of a running pool, seen and handled with HTCondor's own tools.

What a test sets is in a few files, which `repair` removes: the site's configuration of HTCondor, early and late, the
policy, and vmnode's settings. What else it breaks, it mends by itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

from tests.lab.node import Node

T = TypeVar("T")

CHECKOUT = Path(__file__).parents[2]
EARLY_SITE_FILE = "/etc/condor/config.d/15-early-site.conf"
SITE_FILE = "/etc/condor/config.d/zz-site.conf"
LOCAL_FILE = "/etc/condor/condor_config.local"
POLICY_FILE = "/etc/condor/config.d/99-vmnode-policy.conf"
ACCOUNTING_FILE = "/etc/condor/config.d/99-vmnode-accounting.conf"
SETTINGS_FILE = "/etc/vmnode/conf.d/80-test.toml"
HOOK = "/usr/libexec/condor/vmnode-startd-cron"
STARTD_LOG = "/var/log/condor/StartLog"
VM_GAHP_LOG = "/var/log/condor/VMGahpLog"
EXECUTE = "/var/lib/condor/execute"
HOME = "/home/alice"  # of the user who submits
SLOTS = ("slot1", "slot2")  # of the pool's configuration: a partitionable and a static one
HEALTHY_S = 60.0
REST_S = 90.0  # a machine with other work to do lets starters and shadows wait for each other


class Status(Enum):
    """JobStatus (HTCondor manual, "Job ClassAd Attributes")."""

    IDLE = 1
    RUNNING = 2
    REMOVED = 3
    COMPLETED = 4
    HELD = 5
    TRANSFERRING_OUTPUT = 6


@dataclass(frozen=True)
class Job:
    """What condor_q says of a job."""

    id: str
    status: Status
    matched: bool
    rejected_at: int  # Unix time of the last negotiation that found no machine for it; 0 for none
    hold: tuple[int, int]  # HoldReasonCode and HoldReasonSubCode of a job that is held
    hold_reason: str


class Worker:
    """One node with one version of HTCondor."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.version = node.run(["condor_version"]).stdout.split()[1]
        self.measured: list[str] = []

    def report(self, text: str) -> None:
        """Keep a figure for the summary of the test run."""
        self.measured.append(f"HTCondor {self.version}: {text}")

    def until(self, predicate: Callable[[], Optional[T]], what: str, timeout: float = 90.0) -> T:
        return self.node.wait_until(predicate, what, timeout)

    def shell(self, script: str, *, check: bool = True) -> str:
        return self.node.run(["sh", "-ec", script], check=check).stdout

    # What the pool knows

    def collector(self, *expressions: str, constraint: str = "true") -> list[tuple[str, ...]]:
        """The values of expressions in the collector's slot ads, evaluated by condor_status, sorted by slot."""
        return self._status(["-constraint", f"({constraint}) && DynamicSlot =!= true"], "-af:t", expressions)

    def startd(self, *expressions: str) -> list[tuple[str, ...]]:
        """The same in the ads that the startd itself gives out when it is asked."""
        query = ["-direct", self._startd_address(), "-constraint", "DynamicSlot =!= true"]
        return self._status(query, "-af:t", expressions)

    def raw(self, *attributes: str) -> list[tuple[str, ...]]:
        """The unevaluated expressions in the collector."""
        return self._status(["-constraint", "DynamicSlot =!= true"], "-af:rt", attributes)

    def _status(self, query: Sequence[str], form: str, expressions: Sequence[str]) -> list[tuple[str, ...]]:
        done = self.node.run(["condor_status", *query, form, "Name", *expressions], check=False)
        rows = sorted(line.split("\t") for line in done.stdout.splitlines() if line)
        return [tuple(value.strip() for value in row[1:]) for row in rows]

    def everywhere(self, value: str, expression: str = "HasVirshDefaultNetwork") -> bool:
        """Whether an expression has this value in every slot ad of the collector."""
        return self.collector(expression) == [(value,)] * len(SLOTS)

    def seconds_until(self, value: str, since: float, timeout: float = HEALTHY_S) -> float:
        """Wait until HasVirshDefaultNetwork has this value in the collector; the seconds since `since`, monotonic."""
        self.until(lambda: self.everywhere(value), f"HasVirshDefaultNetwork {value} in the collector", timeout)
        return time.monotonic() - since

    def updates(self) -> list[int]:
        """How many updates of each slot the collector has got from this startd."""
        return [int(number) for (number,) in self.collector("UpdateSequenceNumber")]

    def last_checks(self) -> set[int]:
        """VMNodeLastCheck as the startd knows it; one element if all slots agree."""
        return {int(number) for (number,) in self.startd("VMNodeLastCheck") if number.isdigit()}

    def pushes(self) -> list[datetime]:
        """When the hook asked the startd to update the collector, in the node's local time, as the startd logged it."""
        line = r"^(\S+ \S+) .*updating collector \['VMNODE' requested"
        times = re.findall(line, self.node.read(STARTD_LOG), re.M)
        return [datetime.strptime(time, "%m/%d/%y %H:%M:%S.%f") for time in times]  # noqa: DTZ007 - UTC, as in the node

    # What is changed

    def site(self, text: str, file: str = SITE_FILE) -> None:
        """Let the site configure HTCondor, and have it read."""
        self.node.write(file, text)
        self.reconfigure()

    def reconfigure(self) -> None:
        """condor_reconfig, and wait until the startd has read its files and told the collector."""
        before, updates = self._reconfigurations(), self.updates()
        self.node.run(["condor_reconfig"])
        self.until(lambda: self._reconfigurations() > before, "the startd's reconfiguration")
        self.until(lambda: all(new > old for new, old in zip(self.updates(), updates)), "the reconfigured slots")

    def _reconfigurations(self) -> int:
        return self.node.read(STARTD_LOG).count("beginning reconfig_resources")

    def install_policy(self) -> None:
        """Put the optional policy where an administrator would."""
        self.site((CHECKOUT / "condor-config" / "99-vmnode-policy.conf").read_text(), POLICY_FILE)

    def settings(self, toml: str) -> None:
        """Give vmnode other settings."""
        self.node.write(SETTINGS_FILE, toml)
        self.node.run(["systemctl", "reload-or-restart", "vmnode"])

    def repair(self) -> None:
        """Undo whatever a test did, and wait until the pool sees a healthy node and no jobs."""
        run = self.node.run
        self.remove("-all")
        self.shell(
            "pkill -CONT -x vmnoded; pkill -CONT -x condor_startd; pkill -CONT -f vmnode-startd-cron", check=False
        )
        files = [EARLY_SITE_FILE, SITE_FILE, LOCAL_FILE, POLICY_FILE, ACCOUNTING_FILE]
        changed = [file for file in files if run(["test", "-e", file], check=False).returncode == 0]
        if changed:
            run(["rm", *changed])
            self.reconfigure()
        if run(["test", "-e", SETTINGS_FILE], check=False).returncode == 0:
            run(["rm", SETTINGS_FILE])
            run(["systemctl", "restart", "vmnode"])
        run(["systemctl", "start", "vmnode"])
        run(["virsh", "net-start", "default"], check=False)
        self.until(self._is_at_rest, "an empty queue and unclaimed slots", REST_S)
        for domain in self.domains():  # whose vm-gahp was killed
            run(["virsh", "destroy", domain], check=False)
        self.until(lambda: self.everywhere("true"), "a healthy node", HEALTHY_S)
        self.until(lambda: self.everywhere("undefined", "VMNodeImagesOK"), "a node without image roots")
        if not self.everywhere("true", "HasVM"):
            run(["condor_update_machine_ad"], input="HasVM = True\n")
            self.until(lambda: self.everywhere("true", "HasVM"), "HasVM")

    def _is_at_rest(self) -> bool:
        """Whether no slot has a job; one that was being matched when all were removed may have got one since.

        The startd is asked: the collector can keep the ad of a dynamic slot that is gone, until that expires.
        """
        self._kill_starters()
        direct = ["condor_status", "-direct", self._startd_address(), "-af", "State"]
        unclaimed = self.node.run(direct, check=False).stdout.split() == ["Unclaimed"] * len(SLOTS)
        return unclaimed and not self.jobs()

    def _startd_address(self) -> str:
        return self.node.read("/var/log/condor/.startd_address").splitlines()[0]

    def _kill_starters(self) -> None:
        """Asked nicely, a starter waits for its vm-gahp, which takes its time to start; and its shadow for the starter,
        for as long as the job's lease lasts.
        """
        self.shell("pkill -KILL -x 'condor_starter|condor_vm-gahp|condor_shadow'", check=False)

    # Processes

    def hooks(self) -> list[int]:
        """The pids of the hooks that run."""
        found = self.node.run(["pgrep", "-f", f"^/usr/bin/python3 .*{HOOK}"], check=False).stdout
        return [int(pid) for pid in found.split()]

    def kill_hooks(self) -> list[int]:
        """Kill the hooks with -9; returns the pids they had."""
        hooks = self.hooks()
        self.node.run(["kill", "-9", *map(str, hooks)])
        return hooks

    def one_hook(self, other_than: Sequence[int] = ()) -> Optional[int]:
        """The pid of the hook if there is exactly one, and a new one."""
        hooks = self.hooks()
        return hooks[0] if len(hooks) == 1 and hooks[0] not in other_than else None

    def pid(self, name: str) -> int:
        return int(self.node.run(["pgrep", "-o", "-x", name]).stdout)

    def cpu_seconds(self, pid: int) -> float:
        """CPU time of a process of the node and of its children that it has waited for (proc(5), stat)."""
        fields = self.node.read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        ticks = sum(int(fields[n]) for n in (11, 12, 13, 14))
        return ticks / int(self.node.run(["getconf", "CLK_TCK"]).stdout)

    # Jobs

    def submit(self, description: str) -> str:
        """Submit one job as an ordinary user; returns its id."""
        return self.as_user(["condor_submit", "-terse"], input=f"{description}\nqueue\n").split()[0]

    def as_user(self, argv: Sequence[str], *, input: str = "") -> str:
        """Run a command as the user who submits, at home; what it printed."""
        return self.node.run(["runuser", "-u", "alice", "--", "env", "-C", HOME, *argv], input=input).stdout

    def jobs(self) -> dict[str, Job]:
        """The jobs in the queue, by id."""
        said = self.node.run(["condor_q", "-all", "-json"]).stdout
        ads = json.loads(said or "[]")
        return {job.id: job for job in map(_job, ads)}

    def remove(self, *jobs: str) -> None:
        """Remove jobs at once."""
        self.node.run(["condor_rm", *jobs], check=False)
        self._kill_starters()

    def await_match(self, *ids: str) -> None:
        """Wait until each job was given to a slot, and take it away again: it need not run."""
        waiting = set(ids)

        def all_matched() -> bool:
            done = {job.id for job in self.jobs().values() if job.id in waiting and job.matched}
            if done:
                self.remove(*sorted(done))
                waiting.difference_update(done)
            return not waiting

        self.until(all_matched, f"matches for the jobs {', '.join(ids)}")

    def await_rejection(self, *ids: str) -> None:
        """Wait until each job was considered from now on, and found no slot.

        No two of them may be alike: HTCondor considers one of each kind only, and so rejects one.
        """
        now = int(self.node.run(["date", "+%s"]).stdout)

        def all_rejected() -> bool:
            jobs = self.jobs()
            matched = [job for job in ids if jobs[job].matched]
            assert not matched, f"these jobs were matched: {matched}"
            return all(jobs[job].rejected_at > now for job in ids)

        self.until(all_rejected, f"rejections of the jobs {', '.join(ids)}")

    def await_status(self, status: Status, *ids: str, timeout: float = 30.0) -> dict[str, Job]:
        """Wait until all of these jobs have a status at once; what condor_q says of them then."""

        def all_have_it() -> Optional[dict[str, Job]]:
            jobs = self.jobs()
            found = {job: jobs[job] for job in ids if jobs[job].status is status}
            return found if len(found) == len(ids) else None

        return self.until(all_have_it, f"{status.name.lower()} jobs {', '.join(ids)}", timeout)

    def domains(self, *states: str) -> list[str]:
        """The names of the virtual machines, those that are about to start too; or in `states` ("--state-running")."""
        return self.node.run(["virsh", "list", "--name", *states]).stdout.split()


def _job(ad: Mapping[str, Any]) -> Job:
    return Job(
        id=f"{ad['ClusterId']}.{ad['ProcId']}",
        status=Status(ad["JobStatus"]),
        matched=ad.get("NumJobMatches", 0) > 0,
        rejected_at=ad.get("LastRejMatchTime", 0),
        hold=(ad.get("HoldReasonCode", 0), ad.get("HoldReasonSubCode", 0)),
        hold_reason=ad.get("HoldReason", ""),
    )
