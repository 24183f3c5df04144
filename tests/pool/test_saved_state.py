"""A saved state of a virtual machine that comes with a job is not restored: nobody could check the domain in it."""

from __future__ import annotations

from tests.pool.promise import on_every_version
from tests.pool.worker import Worker

SECRET = "/root/secret.img"  # of root's alone
SAVED = "xen.mem.ckpt"  # what vm-gahp calls a saved guest
VM_GAHP_LOG = "/var/log/condor/VMGahpLog"

# A domain on root's file, saved by root as vm-gahp would have done it, and handed to an ordinary user.
SAVE = f"""
head -c 1M /dev/zero >{SECRET}
chmod 0600 {SECRET}
cat >/tmp/taken.xml <<EOF
<domain type='qemu'><name>taken</name><memory>65536</memory><os><type>hvm</type></os>
<devices><disk type='file'><source file='{SECRET}'/><target dev='vda' bus='virtio'/></disk></devices></domain>
EOF
chmod 0711 /root
virsh --quiet create /tmp/taken.xml
rm -f /home/alice/xen.mem.ckpt
virsh --quiet save taken /home/alice/xen.mem.ckpt
chown root:root {SECRET}
echo 1234567890 >/home/alice/xen.mem.ckpt.timestamp
echo anything >/home/alice/xen_vm.config
chown alice: /home/alice/xen*
"""

JOB = """\
universe = vm
executable = label
vm_type = kvm
vm_memory = 64
vm_disk = disk.img:vda:r:raw
vm_no_output_vm = true
transfer_input_files = disk.img, xen.mem.ckpt, xen.mem.ckpt.timestamp, xen_vm.config
+TransferIntermediate = "xen_vm.config,xen.mem.ckpt"
request_cpus = 1
request_disk = 200M
"""

OWN_DISK = """\
universe = vm
executable = label
vm_type = kvm
vm_memory = 64
vm_disk = disk.img:vda:w:raw
vm_no_output_vm = true
transfer_input_files = disk.img
request_cpus = 1
request_disk = 100M
"""

# All of its disks are shared: HTCondor takes no checkpoints of others.
CHECKPOINTED = """\
universe = vm
executable = label
vm_type = kvm
vm_memory = 64
vm_checkpoint = true
vm_disk = /images/zero.img:vda:r:raw
request_cpus = 1
request_disk = 100M
"""


@on_every_version
def test_a_job_that_names_a_saved_state_gets_its_own_domain_and_not_the_saved_one(worker: Worker) -> None:
    worker.settings('[kvm]\naccel = "tcg"\n')
    worker.shell(SAVE)
    owner = worker.shell(f"stat -c %U:%a {SECRET}")
    job = worker.submit(JOB)
    names = worker.until(lambda: worker.shell("virsh list --name").split(), "a domain", 90)
    assert names == [f"alice_{worker.node.name}_{job}"]
    assert "checkpointed files" not in worker.node.read(VM_GAHP_LOG)
    assert worker.shell(f"stat -c %U:%a {SECRET}") == owner == "root:600\n"
    worker.remove(job)


@on_every_version
def test_without_vmnode_s_filter_the_saved_domain_would_run(worker: Worker) -> None:
    """What the filter is for; and so that the other test here cannot pass by chance."""
    worker.settings('[kvm]\naccel = "tcg"\n')
    worker.site("VM_GAHP_SERVER = /usr/sbin/condor_vm-gahp\n")
    worker.shell(SAVE)
    worker.submit(JOB)
    names = worker.until(lambda: worker.shell("virsh list --name").split(), "a domain", 90)
    worker.shell("virsh --quiet destroy taken", check=False)
    worker.shell(f"chown root:root {SECRET}; : >{VM_GAHP_LOG}")
    assert names == ["taken"]


@on_every_version
def test_a_guest_is_not_suspended_since_root_would_save_it_where_the_user_puts_links(worker: Worker) -> None:
    worker.settings('[kvm]\naccel = "tcg"\n')
    job = worker.submit(OWN_DISK)
    state = f"virsh domstate alice_{worker.node.name}_{job}"
    worker.until(lambda: worker.shell(state, check=False).strip() == "running", "a running guest", 90)
    worker.until(lambda: worker.shell(f"condor_q {job} -af JobStatus").strip() == "2", "a running job")
    worker.node.run(["condor_suspend", job])
    refusal = "grep -h 'Failed to suspend the VM' /var/log/condor/StarterLog.*"
    worker.until(lambda: worker.shell(refusal, check=False), "the starter's failure to suspend", 60)
    assert worker.shell(state).strip() == "running"
    assert worker.shell(f"find /var/lib/condor/execute -name '{SAVED}*'") == ""
    worker.remove(job)


@on_every_version
def test_a_job_that_asks_for_checkpoints_is_never_saved(worker: Worker) -> None:
    worker.settings('[kvm]\naccel = "tcg"\n[images]\nroots = ["/images"]\n')
    worker.shell("install -d /images; head -c 1M /dev/zero >/images/zero.img; chmod 0444 /images/zero.img")
    job = worker.submit(CHECKPOINTED)
    worker.until(lambda: worker.shell("virsh list --name").split(), "a domain", 90)
    worker.until(lambda: worker.shell(f"condor_q {job} -af JobStatus").strip() == "2", "a running job")
    worker.node.run(["condor_vacate_job", job])
    refusal = "grep -h 'Failed to checkpoint the VM' /var/log/condor/StarterLog.*"
    worker.until(lambda: worker.shell(refusal, check=False), "the starter's failure to checkpoint", 60)
    assert worker.shell(f"find /var/lib/condor -name '{SAVED}*'") == ""
    worker.remove(job)
