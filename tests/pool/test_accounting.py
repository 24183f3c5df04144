"""Accounting in a pool: what jobs used is in the ledger to the byte, and as samples in their ads; all commands work."""

from __future__ import annotations

import functools
import json
import time

from tests.pool import guests, traffic
from tests.pool.promise import on_every_version
from tests.pool.traffic import (
    CHEATING,
    SANDBOX,
    SETTINGS,
    await_line,
    back,
    in_history,
    in_slot,
    ledger,
    out,
    switch_on,
    switch_on_closed,
    talking,
)
from tests.pool.worker import HOME, SITE_FILE, SLOTS, STARTD_LOG, Status, Worker

LAN, WAN = 300, 200  # datagrams
SECONDS = 18.0  # long enough for a sample to be told, and for the starter to report it

STATIC_SLOT = "requirements = TARGET.SlotTypeID == 2\n"
EXEMPT = "My.WantHostNetwork = true\n"
# What no job can do; the host's own loopback is another, so there is nothing to send to.
IMPOSSIBLE = (
    "link",
    "address",
    "route",
    "rules",
    "the host's network",
    "the parent's network",
    "raw socket",
    "packet socket",
    "daemon",
    "usage.json",
    "note",
    "ledger",
    "out of a namespace of its own",
)


@on_every_version
def test_what_jobs_send_and_receive_is_in_the_ledger_and_never_more_in_their_ads(worker: Worker) -> None:
    """All at the same time; two of them one after the other on the same slot."""
    switch_on(worker)
    first, second = (worker.submit(talking(worker, *used, SECONDS, STATIC_SLOT)) for used in ((LAN, WAN), (3, 2)))
    other = worker.submit(talking(worker, WAN, LAN, SECONDS))
    exempt = worker.submit(talking(worker, 1, 1, 1, EXEMPT))
    cheat = worker.submit(talking(worker, 1, 50, 1, script=CHEATING))
    for job, lan, wan in ((first, LAN, WAN), (other, WAN, LAN), (second, 3, 2)):
        counted = await_line(worker, job, "complete", 90).bytes
        assert counted is not None
        assert 0 <= counted[0] - back(lan) < SANDBOX and 0 <= counted[1] - out(lan) < SANDBOX
        assert counted[2:] == (back(wan), out(wan))
        worker.until(lambda job=job: job not in worker.jobs(), f"the end of job {job}")  # type: ignore[misc]
        sample = in_history(worker, job)
        assert len(sample) == 4, f"job {job} has {sample} in its ad"
        assert back(lan) <= sample[0] <= counted[0] and out(lan) <= sample[1] <= counted[1]
        assert sample[2:] == counted[2:]  # all that it sent beyond the LAN it had sent when it was told of
    lines = ledger(worker)
    assert lines[exempt].outcome == "exempt" and lines[exempt].bytes is None
    said = worker.node.read(f"{HOME}/talk-{exempt.partition('.')[0]}.talk.py.out")
    assert "uplink0:" in said and "eth0:" not in said
    _changed_nothing(worker, cheat)


def _changed_nothing(worker: Worker, cheat: str) -> None:
    cluster = cheat.partition(".")[0]
    done = json.loads(worker.node.read(f"{HOME}/talk-{cluster}.cheat.py.out").splitlines()[0])
    assert {name: done.get(name) for name in IMPOSSIBLE} == dict.fromkeys(IMPOSSIBLE, False)
    line = ledger(worker)[cheat]
    assert line.owner.startswith("alice@") and line.outcome == "complete"
    assert line.bytes is not None and line.bytes[2:] == (back(50), out(50))
    assert "victim" not in worker.node.run(["vmnode", "accounting", "jobs", "--json"]).stdout


# What the guest does, as root; it goes on when somebody connects to PORT.
PORT = 7777
PINGS = 50  # to the gateway, and twice as many beyond the LAN
PING = 972 + 28  # bytes: what ping sends, and the headers of IPv4 and ICMP; the answer is as long
GUEST_JOB = f"""\
#!/bin/sh
nc -l -p {PORT}
ping -q -s 972 -i 0.02 -c {PINGS} 192.168.122.1
ping -q -s 972 -i 0.02 -c {2 * PINGS} {traffic.WAN}
nc -l -p {PORT}
"""
IO_DISK = 4 * 2**20  # bytes, which its shadow sends to the starter
LEASE = 2 * (28 + 240)  # bytes at least, each way: two messages with the fixed fields of RFC 2131
OTHER = 4096  # more than the lease, the two connections and the guest's own neighbour discovery take


@on_every_version
def test_the_guest_of_a_vm_job_is_counted_apart_from_its_sandbox_and_never_more_in_the_ad(worker: Worker) -> None:
    guests.share(worker, guests.GUEST)
    switch_on(worker, SETTINGS + guests.SETTINGS)
    guests.bring_io_disk(worker, f"{HOME}/talk.raw", GUEST_JOB, {})
    guest = guests.submit(worker, guests.connected("talk.raw"))

    def used() -> tuple[int, ...]:
        """What the guest has used, as the ledger says while it runs."""
        line = ledger(worker).get(guest.job)
        return (line and line.guest) or (0, 0, 0, 0)

    worker.until(guest.address, "the guest to have a lease", 120)
    worker.until(lambda: min(used()[:2]) >= LEASE, "the lease in the ledger")
    before = used()
    assert max(before[:2]) < OTHER and before[2:] == (0, 0)
    _goes_on(guest)
    worker.until(lambda: used()[2:] == (2 * PINGS * PING,) * 2, "all pings in the ledger")
    worker.until(lambda: in_slot(worker, guest.job)[2:] == used()[2:], "all pings in the slot's ad", 60)
    _goes_on(guest)
    line = await_line(worker, guest.job, "complete", 90)
    assert (line.universe, line.why) == (13, "")
    assert line.bytes is not None and line.guest is not None and line.sandbox is not None
    assert line.bytes == tuple(map(sum, zip(line.guest, line.sandbox)))
    assert line.guest[2:] == (2 * PINGS * PING,) * 2
    assert all(0 <= now - then - PINGS * PING < OTHER for now, then in zip(line.guest[:2], before))
    assert line.sandbox[0] > IO_DISK and line.sandbox[1] < IO_DISK and line.sandbox[2:] == (0, 0)
    worker.until(lambda: guest.job not in worker.jobs(), "the end of the job")
    sample = in_history(worker, guest.job)
    assert guest.history("JobUniverse") == ["13"] and len(sample) == 4
    assert all(told <= counted for told, counted in zip(sample, line.bytes))
    assert sample[0] > IO_DISK + PINGS * PING and sample[1] > PINGS * PING and sample[2:] == line.bytes[2:]


def _goes_on(guest: guests.Guest) -> None:
    guest.worker.until(lambda: guest.connect(PORT), "the guest to listen")


OBEDIENT = """\
#!/bin/sh
cat /proc/net/dev
echo peeked >peek
for chirp in /usr/libexec/condor/condor_chirp /usr/lib/condor/libexec/condor_chirp; do
    [ ! -x $chirp ] || $chirp set_job_attr ChirpSeen 7
done
exec sleep 600
"""
COMMANDED = "stream_output = true\ntransfer_output_files = peek\nMy.WantIOProxy = true\nMy.JobLeaseDuration = 300\n"


# Each with its proof. Where NETWORK_INTERFACE is a pattern, no address in the namespace matches it.
WITHOUT_SHARED_PORT = "USE_SHARED_PORT = False\nNETWORK_INTERFACE = 198.18.*\n", "! pgrep -x condor_shared_port"
# A second collector is the broker; shadow and starter are in networks that cannot reach each other without it.
BROKER = "/usr/sbin/condor_collector -f -p 9620 -local-name BROKER"
BROKERED = (
    """\
BROKER.COLLECTOR_LOG = $(LOG)/BrokerLog
BROKER.COLLECTOR_ADDRESS_FILE = $(LOG)/.broker_address
BROKER.USE_SHARED_PORT = False
BROKER.CCB_ADDRESS =
CCB_ADDRESS = $(CONDOR_HOST):9620
SCHEDD.PRIVATE_NETWORK_NAME = ap
SHADOW.PRIVATE_NETWORK_NAME = ap
STARTER.PRIVATE_NETWORK_NAME = ep
""",
    "grep CCBID= /var/lock/condor/shared_port_ad",
)


@on_every_version
def test_every_command_to_the_starter_works_across_the_namespace(worker: Worker) -> None:
    """With a shared port, without one, and by a broker (CCB)."""
    switch_on(worker)
    _obeys(worker)
    try:
        for site, proof in (WITHOUT_SHARED_PORT, BROKERED):
            _restart(worker, site)
            # Who starts before the broker listens tries again after a minute (CCB_HEARTBEAT_INTERVAL).
            worker.until(functools.partial(worker.shell, f"{proof} && echo so", check=False), proof, 150)
            _obeys(worker)
    finally:
        _restart(worker, "")


def _restart(worker: Worker, site: str) -> None:
    """Restart HTCondor with what the site says."""
    worker.remove("-all")
    worker.node.write(SITE_FILE, site)
    worker.node.run(["systemctl", "stop", "condor"])
    worker.shell("systemctl stop broker", check=False)
    if site == BROKERED[0]:
        worker.node.run(["systemd-run", "--unit=broker", *BROKER.split()])
    worker.node.start_condor()
    worker.until(lambda: worker.collector("State") == [("Unclaimed",)] * len(SLOTS), "the slots", 60)


def _obeys(worker: Worker) -> None:
    worker.node.write("/tmp/obey.sh", OBEDIENT, 0o755)
    job = worker.submit(talking(worker, 0, 0, 0, COMMANDED, "/tmp/obey.sh"))
    cluster = job.partition(".")[0]
    output, log = (f"{HOME}/talk-{cluster}.obey.sh.{kind}" for kind in ("out", "log"))

    def logged(event: str) -> bool:
        return f"\n{event} ({int(cluster):03}." in "\n" + worker.node.read(log)

    def activity() -> str:
        return worker.node.run(["condor_status", "-af", "Activity"]).stdout

    worker.await_status(Status.RUNNING, job, timeout=90)
    worker.until(lambda: "eth0:" in worker.shell(f"cat {output}", check=False), "streamed output of a job in a network")
    worker.until(lambda: worker.node.run(["condor_q", job, "-af", "ChirpSeen"]).stdout == "7\n", "what chirp said")
    said = worker.as_user(["condor_ssh_to_job", "-auto-retry", job, "cat /proc/net/dev"])
    assert "eth0:" in said and "uplink0:" not in said
    assert "peeked" in worker.as_user(["condor_tail", "-no-stdout", job, "peek"])
    worker.as_user(["condor_suspend", job])
    worker.until(lambda: "Suspended" in activity(), "a suspended slot")
    # HTCondor's queue is not told of this, with or without vmnode; condor_continue takes only a job that is SUSPENDED.
    worker.node.run(["condor_qedit", job, "JobStatus", "7"])
    worker.as_user(["condor_continue", job])
    worker.until(lambda: "Suspended" not in activity(), "a slot that goes on")
    worker.node.run(["condor_qedit", job, "JobStatus", "2"])
    starter = worker.pid("condor_starter")
    worker.shell("pkill -KILL -x condor_schedd; pkill -KILL -x condor_shadow", check=False)
    worker.until(lambda: logged("023"), "the shadow to reconnect", 60)
    assert worker.pid("condor_starter") == starter
    worker.as_user(["condor_vacate_job", job])
    worker.until(lambda: logged("004"), "the job to be vacated")
    worker.await_status(Status.RUNNING, job, timeout=90)
    worker.as_user(["condor_hold", job])
    worker.await_status(Status.HELD, job)
    worker.until(lambda: not worker.shell("pgrep -x condor_starter", check=False), "the starter's end")
    worker.as_user(["condor_release", job])
    worker.await_status(Status.RUNNING, job, timeout=90)
    worker.remove(job)


@on_every_version
def test_a_job_starts_while_vmnoded_is_dead_and_the_ledger_says_that_it_was_not_counted(worker: Worker) -> None:
    switch_on(worker)
    worker.node.run(["systemctl", "stop", "vmnode"])
    job = worker.submit(talking(worker, 1, 1, 12))
    output = f"{HOME}/talk-{job.partition('.')[0]}.talk.py.out"
    # The job is RUNNING for its shadow while vmnode-starter still waits for vmnoded, which is not to come in time.
    worker.until(lambda: worker.shell("pgrep -x condor_starter", check=False), "the real starter")
    worker.node.run(["systemctl", "start", "vmnode"])
    line = await_line(worker, job, "unaccounted")
    assert line.bytes is None and line.why.startswith("vmnoded does not answer at /run/vmnode/starter.sock: ")
    worker.until(lambda: job not in worker.jobs(), "the end of the job")
    assert "uplink0:" in worker.node.read(output)
    assert in_history(worker, job) == ()


COUNTS = ("NumJobMatches", "NumShadowStarts", "NumJobStarts")
QUIET_S = 10.0  # some negotiations, every two seconds


@on_every_version
def test_a_job_that_would_not_be_counted_waits_without_being_started_again_and_again(worker: Worker) -> None:
    """With on_error = "closed", and START as the shipped file has it. Not even an exempt job: none would start."""
    switch_on_closed(worker)
    worker.until(lambda: worker.everywhere("true", "VMNodeAccountingOK && Start"), "accounting, and an open START")
    refused = _refusals(worker)
    worker.node.run(["systemctl", "stop", "vmnode"])
    # Of jobs that are alike, the negotiator would reject only one.
    jobs = worker.submit(talking(worker, 1, 2, 1)), worker.submit(talking(worker, 1, 1, 1, EXEMPT + STATIC_SLOT))
    worker.until(lambda: _refusals(worker) > refused, "a starter that refuses", 30)
    worker.until(lambda: worker.everywhere("undefined", "VMNodeAccountingOK"), "the attribute to expire", 30)
    assert worker.everywhere("false", "Start")
    _await_rejection(worker, *jobs)
    worker.await_status(Status.IDLE, *jobs)
    before = _starts(worker, *jobs), _refusals(worker)
    time.sleep(QUIET_S)
    _await_rejection(worker, *jobs)
    assert (_starts(worker, *jobs), _refusals(worker)) == before
    worker.node.run(["systemctl", "start", "vmnode"])
    line = await_line(worker, jobs[0], "complete", 90)
    assert line.bytes is not None and line.bytes[2:] == (back(2), out(2))
    await_line(worker, jobs[1], "exempt", 90)
    worker.until(lambda: not worker.jobs(), "the end of the jobs")


def _refusals(worker: Worker) -> int:
    """How many starters have ended with EX_TEMPFAIL (sysexits(3)), as the startd logged it."""
    return worker.node.read(STARTD_LOG).count(" exited with status 75\n")


def _starts(worker: Worker, *jobs: str) -> list[str]:
    """How often each was matched, got a shadow, and was started."""
    return [worker.node.run(["condor_q", job, "-af", *COUNTS]).stdout for job in jobs]


def _await_rejection(worker: Worker, *jobs: str) -> None:
    """Wait until the negotiator has considered them, from now on, and found no slot."""
    now = int(worker.node.run(["date", "+%s"]).stdout)
    worker.until(lambda: all(worker.jobs()[job].rejected_at > now for job in jobs), "rejections")
