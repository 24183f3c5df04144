"""The optional policy file: VM jobs that need nat are kept off a node that is not ok; no other job is."""

from __future__ import annotations

import time

from tests.pool.jobs import BRIDGE, BY_DEFAULT, CAPITAL_NAT, NAT, OFFLINE, REFUSED, REQUIREMENT, VANILLA
from tests.pool.promise import on_every_version
from tests.pool.worker import EARLY_SITE_FILE, LOCAL_FILE, SITE_FILE, Worker

# A site's own policy: whatever comes first or last, both it and ours have to be in force.
SITE_POLICY = "START = TARGET.SiteRefuses =!= True\n"


def _broken_node_with_policy(worker: Worker) -> None:
    worker.install_policy()
    _break(worker)


def _break(worker: Worker) -> None:
    worker.node.run(["virsh", "net-destroy", "default"])
    worker.seconds_until("false", time.monotonic())


@on_every_version
def test_a_broken_node_takes_no_nat_job_and_every_other_job(worker: Worker) -> None:
    _broken_node_with_policy(worker)
    kept_off = [worker.submit(job) for job in (NAT, CAPITAL_NAT, BY_DEFAULT, NAT + REQUIREMENT)]
    worker.await_match(*(worker.submit(job) for job in (OFFLINE, BRIDGE, VANILLA)))
    worker.await_rejection(*kept_off)
    worker.node.run(["virsh", "net-start", "default"])
    worker.await_match(*kept_off)


@on_every_version
def test_without_the_policy_a_broken_node_takes_the_nat_jobs_that_do_not_ask(worker: Worker) -> None:
    """What the policy is for; and so that the other tests here cannot pass by chance."""
    _break(worker)
    asks = worker.submit(NAT + REQUIREMENT)
    worker.await_match(worker.submit(NAT), worker.submit(BY_DEFAULT))
    worker.await_rejection(asks)


SITE_FILES = {
    EARLY_SITE_FILE: SITE_POLICY,
    SITE_FILE: SITE_POLICY,
    LOCAL_FILE: SITE_POLICY,  # read after all of config.d
}


@on_every_version
def test_the_policy_holds_together_with_a_start_of_the_sites_that_is_set_earlier_or_later(worker: Worker) -> None:
    _broken_node_with_policy(worker)
    types = "".join(f"SLOT_TYPE_{n}_{SITE_POLICY}" for n in (1, 2))
    for file, text in [*SITE_FILES.items(), (EARLY_SITE_FILE, types)]:
        worker.site(text, file)
        kept_off = [worker.submit(job) for job in (NAT, BY_DEFAULT, VANILLA + REFUSED, OFFLINE + REFUSED)]
        worker.await_match(worker.submit(OFFLINE), worker.submit(VANILLA))
        worker.await_rejection(*kept_off)
        worker.remove("-all")
        worker.node.run(["rm", file])


# VM_NETWORKING_DEFAULT_TYPE where VM_NETWORKING_TYPE is "nat, bridge", and what a job gets that names no type.
DEFAULTS = {
    "bridge": "bridge",
    '"bridge"': "bridge",
    "": "nat",
    "NAT": "nat",
    "user": "nat",  # it is not on offer here
}


@on_every_version
def test_a_job_without_a_networking_type_is_treated_as_of_the_nodes_default_type(worker: Worker) -> None:
    _broken_node_with_policy(worker)
    for default, effective in DEFAULTS.items():
        worker.site(f"VM_NETWORKING_DEFAULT_TYPE = {default}\n")
        job = worker.submit(BY_DEFAULT)
        if effective == "bridge":
            worker.await_match(job)
        else:
            worker.await_match(worker.submit(BRIDGE))
            worker.await_rejection(job)
            worker.remove(job)


@on_every_version
def test_the_policy_is_in_dynamic_slots_too(worker: Worker) -> None:
    """A claimed slot takes its next job without asking the negotiator again."""
    worker.install_policy()
    worker.site(SITE_POLICY)
    worker.submit(VANILLA + "requirements = (PartitionableSlot =?= true)\n")
    query = ["condor_status", "-constraint", "DynamicSlot =?= true", "-af:r"]
    worker.until(lambda: worker.node.run([*query, "Name"], check=False).stdout, "a dynamic slot")
    policy = worker.node.run([*query, "START", "VMNODE_ALLOWS"]).stdout
    assert "HasVirshDefaultNetwork =?= true" in policy
    assert "SiteRefuses" in policy
