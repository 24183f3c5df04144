"""vm-nfs: a job's way from condor_submit to the disk that comes back, and every way that it does not go."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from xml.etree import ElementTree

from tests.lab import guest
from tests.lab.manual import example
from tests.pool import guests, jobs
from tests.pool.guests import BLANK, GUEST, RECORDS, ROOT, SETTINGS, Guest, disk_on, fingerprint, own_disk, submit
from tests.pool.promise import on_every_version
from tests.pool.worker import EXECUTE, HOME, SETTINGS_FILE, VM_GAHP_LOG, Status, Worker

ALICE = 1000

# --- what goes well -------------------------------------------------------------------------------------------------

RUN_JOB = """\
#!/bin/sh
echo "$(cat /mnt/user/input/question) is $((6 * 7)), says $(ip -4 -o address show dev eth0)"
cp /mnt/user/input/question /mnt/user/output/copy
sleep 15
"""
DIRECTORY = f"{HOME}/manual"
RUN_S = 150.0  # 80 with nothing else to do, of which VM_STATUS_INTERVAL is 30


@on_every_version
def test_the_submit_file_of_the_manual_runs_and_brings_its_disk_back(worker: Worker) -> None:
    description = example("vm-nfs.md", "universe")
    base, disk = re.findall(r"nfs://(/\S+?):([^\s,]+)", description)[0]
    boot, io = re.findall(r"(\S+?):vd[ab]:w:\w+", description.replace(",", " "))
    assert boot == disk
    guests.share(worker, base)
    worker.shell(f"rm -rf {DIRECTORY}; install -d -o alice {DIRECTORY}")
    guests.bring_io_disk(worker, f"{DIRECTORY}/{io}", RUN_JOB, {"question": "six times seven"})
    worker.node.write(f"{DIRECTORY}/job.sub", description)
    before = fingerprint(worker, base)
    scratch = worker.shell(f"ls {EXECUTE}")

    job = worker.as_user(["env", "-C", DIRECTORY, "condor_submit", "-terse", "job.sub"]).split()[0]
    running = Guest(worker, job)
    running.await_running()
    _expect_it_runs(running, base, disk, io)
    worker.until(lambda: job not in worker.jobs(), f"the end of job {job}", RUN_S)

    _expect_nothing_left(worker)
    assert worker.shell(f"ls {EXECUTE}") == scratch
    assert fingerprint(worker, base) == before
    _expect_true_statistics(running, base, before)
    (returned,) = re.findall(rf"{io}\s*=\s*([^;\"]+)", running.history("TransferOutputRemaps")[0]) or [io]
    path = f"{DIRECTORY}/{returned.strip()}"
    assert worker.shell(f"stat -c %U {path}") == "alice\n"
    image = worker.node.path(path)
    said = guest.read_io(image, "run-job.log")
    assert said.startswith("six times seven is 42, says ")
    assert " inet 192.168.122." in said
    assert guest.read_io(image, "output/copy") == "six times seven"
    assert guest.read_io(image, "exit-status") == "0\n"


def _expect_it_runs(running: Guest, base: str, disk: str, io: str) -> None:
    """QEMU has the user's rights and the whole chain; vmnode knows which job runs on which image."""
    worker = running.worker
    assert running.qemu_users() == {ALICE}
    domain = ElementTree.fromstring(worker.node.run(["virsh", "dumpxml", running.domain]).stdout)
    first, second = domain.findall("devices/disk")
    assert _chain(first) == [("qcow2", disk), (_format(worker, base), base)]
    assert _chain(second) == [("raw", io)]
    scratch = _source(first).rpartition("/")[0]
    assert scratch.startswith(EXECUTE)
    assert running.open_disks() == {base, f"{scratch}/{disk}", f"{scratch}/{io}"}
    (known,) = [overlay for overlay in guests.known_overlays(worker) if overlay["domain"] == running.domain]
    assert (known["job"], known["owner"], known["domain"]) == (running.global_id(), "alice", running.domain)
    assert [image["path"] for image in known["bases"]] == [base]


def _chain(disk: ElementTree.Element) -> list[tuple[str, str]]:
    """Format and file of each image of a disk, the uppermost (without its directory) first; it has to have an end."""
    driver = disk.find("driver")
    assert driver is not None
    images = [(str(driver.get("type")), _source(disk).rpartition("/")[2])]
    below = disk.find("backingStore")
    while below is not None and len(below):
        format = below.find("format")
        assert format is not None
        images.append((str(format.get("type")), _source(below)))
        below = below.find("backingStore")
    assert below is not None, f"the chain {images} has no end: libvirt would look for one"
    return images


def _source(element: ElementTree.Element) -> str:
    source = element.find("source")
    assert source is not None
    return str(source.get("file"))


def _format(worker: Worker, image: str) -> str:
    return str(_info(worker, image)["format"])


def _info(worker: Worker, image: str) -> dict[str, object]:
    """What qemu-img says of an image whose name tells its format."""
    format = "qcow2" if image.endswith(".qcow2") else "raw"
    told: dict[str, object] = json.loads(worker.shell(f"qemu-img info -f {format} --output json {image}"))
    return told


def _expect_nothing_left(worker: Worker) -> None:
    worker.until(
        lambda: not guests.known_overlays(worker), "vmnode to forget the guest", 150
    )  # 120 s for one that never ran
    assert worker.shell(f"ls {RECORDS}") == ""
    assert worker.node.run(["virsh", "list", "--all", "--name"]).stdout.split() == []
    assert worker.shell("pgrep qemu-system || true") == ""


def _expect_true_statistics(ended: Guest, base: str, before: str) -> None:
    """What HTCondor recorded of the transfer is the size of such an overlay, not of the image."""
    worker = ended.worker
    size = _info(worker, base)["virtual-size"]
    format = _format(worker, base)
    worker.shell(f"qemu-img create -q -f qcow2 -F {format} -b {base} /tmp/overlay.qcow2")
    written = int(worker.shell("stat -c %s /tmp/overlay.qcow2"))
    (ad,) = ended.transfers("nfs")
    assert (ad["TransferTotalBytes"], ad["TransferFileBytes"]) == (written, written)
    assert (ad["TransferSuccess"], ad["TransferType"]) == (True, "download")
    assert 0 <= ad["TransferEndTime"] - ad["TransferStartTime"] <= 2
    told = ad["DeveloperData"]
    assert (told["Base"], told["BaseFormat"]) == (base, format)
    assert told["DiskSize"] == size
    assert str(told["BaseSize"]) in before
    statistics = [f"TransferInputStats.NFS{name}LastRun" for name in ("FilesCount", "SizeBytes")]
    assert ended.history(*statistics) == ["1", str(written)]


# --- what is refused ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """A job that is held: its hold codes, and what the user, or vm-gahp's log, is told."""

    description: str
    status: int  # of the plugin; 0: refused when its domain was to be described
    told: tuple[str, ...]


HOSTILE = f"""
mkdir -p /srv/elsewhere
cp {GUEST} /srv/elsewhere/guest.img
cp {GUEST} {ROOT}/writable.img
chmod 0666 {ROOT}/writable.img
qemu-img create -q -f qcow2 -F raw -b {GUEST} {ROOT}/chained.qcow2
cd {HOME}
qemu-img create -q -u -f qcow2 -F raw -b /etc/shadow shadow.qcow2 32M
qemu-img create -q -u -f qcow2 -F raw -b /srv/elsewhere/guest.img outside.qcow2 32M
rm -f data.raw
qemu-img create -q -f qcow2 -o data_file={HOME}/data.raw,data_file_raw=on data.qcow2 32M
chown alice: *.qcow2 data.raw
"""

REFUSED = {
    "malformed": Refused(
        disk_on("nfs://server/images/guest.img:disk.qcow2"), 64, ("nfs://server/images/guest.img", "names a host")
    ),
    "missing": Refused(disk_on(f"nfs://{ROOT}/none.img:disk.qcow2"), 66, (f"there is no {ROOT}/none.img",)),
    "outside of the roots": Refused(
        disk_on("nfs:///srv/elsewhere/guest.img:disk.qcow2"),
        77,
        ("/srv/elsewhere/guest.img is not inside an image root", ROOT),
    ),
    "writable by the user": Refused(
        disk_on(f"nfs://{ROOT}/writable.img:disk.qcow2"),
        77,
        (f"you may write to {ROOT}/writable.img", "tell whoever keeps the image"),
    ),
    "with a backing file": Refused(
        disk_on(f"nfs://{ROOT}/chained.qcow2:disk.qcow2"),
        65,
        (f"{ROOT}/chained.qcow2 cannot be a base image", "backing file", "qemu-img convert"),
    ),
    "to be made smaller": Refused(
        disk_on(f"nfs://{GUEST}:disk.qcow2?size=1M"), 65, ("size=1048576", "33554432", "can only grow")
    ),
    "of another format": Refused(
        disk_on(f"nfs://{GUEST}:disk.qcow2?format=qcow2"), 65, (f"{GUEST} is raw, not qcow2", "format=raw")
    ),
    "own overlay on a file of root's": Refused(
        own_disk("shadow.qcow2:vda:w:qcow2"), 0, ("/etc/shadow", "not inside an image root")
    ),
    "own overlay outside of the roots": Refused(
        own_disk("outside.qcow2:vda:w:qcow2"), 0, ("/srv/elsewhere/guest.img", "not inside an image root")
    ),
    "own disk with a data file": Refused(
        own_disk("data.qcow2:vda:w:qcow2"), 0, ("data.qcow2", "external data file")
    ),
    "wrong fourth field": Refused(
        disk_on(f"nfs://{GUEST}:disk.qcow2", "disk.qcow2:vda:w:raw"), 0, ("disk.qcow2 is raw, and it is qcow2",)
    ),
    "writable path": Refused(
        disk_on(f"nfs://{GUEST}:disk.qcow2", f"{GUEST}:vda:w:raw"), 0, (f"{GUEST} as writable", "scratch directory")
    ),
}  # fmt: skip


@on_every_version
def test_a_job_at_fault_is_held_with_the_reason_starts_nothing_and_the_worker_goes_on(worker: Worker) -> None:
    guests.share(worker, GUEST)
    worker.shell(HOSTILE)
    submitted = {name: submit(worker, refused.description) for name, refused in REFUSED.items()}
    held = worker.await_status(Status.HELD, *(guest.job for guest in submitted.values()), timeout=90)
    for name, refused in REFUSED.items():
        guest, job = submitted[name], held[submitted[name].job]
        if refused.status:
            assert job.hold == (13, 256 * refused.status), name
            sentence = job.hold_reason
        else:
            assert job.hold == (6, 12), name
            assert "VMGAHP_ERR_BAD_IMAGE" in job.hold_reason, name
            sentence = guest.refusal()
        assert [word for word in refused.told if word not in sentence] == [], f"{name}: {sentence}"
        assert guest.qemu_log() == "", name
    assert worker.everywhere("true", "HasVM")

    # The daemon keeps its settings, and the worker stays as it is: only who reads the files notices.
    worker.node.write(SETTINGS_FILE, SETTINGS.replace("roots =", "rots ="))
    next_one = worker.submit(disk_on(f"nfs://{GUEST}:disk.qcow2"))
    broken = worker.await_status(Status.HELD, next_one)[next_one]
    assert broken.hold == (13, 256 * 78)
    assert "configuration on this worker is wrong" in broken.hold_reason
    assert SETTINGS_FILE in broken.hold_reason
    assert worker.everywhere("true", "HasVM")


HANGING = "/srv/hanging"
OFTEN_EVALUATED = "PERIODIC_EXPR_INTERVAL = 2\n"  # 60 s otherwise


@on_every_version
def test_a_job_that_found_its_image_hanging_is_held_and_by_the_manuals_policy_released_and_run(worker: Worker) -> None:
    settings = f'[images]\nroots = ["{HANGING}"]\ntimeout_s = 2\n[kvm]\naccel = "tcg"\n'
    guests.share_blank(worker, BLANK, settings=settings)
    worker.shell(f"mkdir -p {HANGING}; bindfs {ROOT} {HANGING}; pkill -STOP -x bindfs")
    try:
        job = submit(worker, disk_on(f"nfs://{HANGING}/blank.img:disk.qcow2"))
        held = worker.await_status(Status.HELD, job.job)[job.job]
        assert held.hold == (13, 256 * 75)
        assert f"{HANGING}/blank.img: no answer within 2 s" in held.hold_reason
        (ad,) = job.transfers("nfs")
        assert ad["TransferErrorData"][0]["Retryable"] > 0
        worker.shell("pkill -CONT -x bindfs")
        worker.site(example("images.md", "SYSTEM_PERIODIC_RELEASE") + OFTEN_EVALUATED)
        job.await_running()
        assert f"{HANGING}/blank.img" in job.open_disks()
    finally:
        worker.shell(f"pkill -CONT -x bindfs; umount -l {HANGING}", check=False)


# --- the worker's own faults ----------------------------------------------------------------------------------------

LIBRARY = "/usr/lib/vmnode"
NO_IMAGES = '[kvm]\naccel = "tcg"\n'


def _expect_the_worker_to_give_up(worker: Worker) -> None:
    worker.shell(f": >{VM_GAHP_LOG}")
    job = submit(worker, jobs.OFFLINE)

    def given_up() -> bool:
        assert worker.jobs()[job.job].status is not Status.HELD
        return worker.everywhere("false", "HasVM")

    worker.until(given_up, "HasVM = false", 60)
    worker.await_status(Status.IDLE, job.job)
    assert job.qemu_log() == ""
    assert "generating defaults" not in worker.node.read(VM_GAHP_LOG)


@on_every_version
def test_a_worker_without_htcondors_script_starts_nothing_holds_no_job_and_takes_no_more_vm_jobs(
    worker: Worker,
) -> None:
    worker.settings(NO_IMAGES)
    worker.site("LIBVIRT_XML_SCRIPT_ARGS = /usr/libexec/condor/no_such_script.awk\n")
    _expect_the_worker_to_give_up(worker)
    assert "no virtual machine can be started on this worker" in worker.node.read(VM_GAHP_LOG)


@on_every_version
def test_a_worker_on_which_vmnodes_python_does_not_start_does_the_same(worker: Worker) -> None:
    worker.settings(NO_IMAGES)
    worker.node.run(["mv", LIBRARY, f"{LIBRARY}.away"])
    try:
        _expect_the_worker_to_give_up(worker)
    finally:
        worker.node.run(["mv", f"{LIBRARY}.away", LIBRARY])


@on_every_version
def test_where_the_script_fails_htcondor_describes_the_domain_by_itself(worker: Worker) -> None:
    """Why vmnode-domain-xml never fails; and so that the tests above cannot pass by chance."""
    worker.settings(NO_IMAGES)
    worker.site("LIBVIRT_XML_SCRIPT = /bin/false\n")
    worker.shell(f": >{VM_GAHP_LOG}")
    worker.submit(jobs.OFFLINE)
    worker.until(lambda: "generating defaults" in worker.node.read(VM_GAHP_LOG), "a domain of HTCondor's own", 60)


# --- after the check ------------------------------------------------------------------------------------------------

# What another process of the job's user may do between the check and the start; the job's `Race` says which of it.
SWAP = """\
#!/bin/sh
set -eu
ad=$(cat)
xml=$(printf '%s\\n' "$ad" | /usr/libexec/condor/vmnode-domain-xml "$@")
race=$(printf '%s\\n' "$ad" | sed -n 's/^Race = "\\(.*\\)"$/\\1/p')
user="setpriv --reuid=alice --regid=alice --init-groups"
case $race in
link) $user ln -sf /srv/secret/roots.qcow2 disk.qcow2 ;;
data) $user cp /srv/data.qcow2 disk.qcow2 ;;
backing) $user qemu-img create -q -u -f qcow2 -F raw -b /srv/secret/anothers.raw disk.qcow2 1M ;;
unlabelled)
    $user ln -sf /srv/secret/bait.qcow2 disk.qcow2
    xml=$(printf '%s\\n' "$xml" | sed 's|<seclabel.*</seclabel>||')
    ;;
esac
printf '%s\\n' "$xml"
"""
RACES = ("link", "data", "backing", "unlabelled")
ROOTS, ANOTHERS, BAIT = (f"/srv/secret/{name}" for name in ("roots.qcow2", "anothers.raw", "bait.qcow2"))
SECRETS = f"""
mkdir -p /srv/secret
qemu-img create -q -f qcow2 {ROOTS} 1M
cp {ROOTS} {BAIT}
rm -f {ANOTHERS}
qemu-img create -q -f qcow2 -o data_file={ANOTHERS},data_file_raw=on /srv/data.qcow2 1M
chmod 0644 /srv/data.qcow2
chown 4711:4711 {ANOTHERS}
chmod 0600 /srv/secret/*
"""


@on_every_version
def test_what_is_swapped_after_the_check_gives_qemu_nothing_that_the_user_does_not_have(worker: Worker) -> None:
    guests.share_blank(worker, BLANK)
    worker.shell(SECRETS)
    secrets = [fingerprint(worker, file) for file in (ROOTS, ANOTHERS)]
    worker.node.write("/usr/local/libexec/swap", SWAP, 0o755)
    worker.site("LIBVIRT_XML_SCRIPT = /usr/local/libexec/swap\n")
    description = disk_on(f"nfs://{BLANK}:disk.qcow2")
    link, data, backing, unlabelled = (submit(worker, f'{description}My.Race = "{race}"\n') for race in RACES)

    # QEMU runs with the user's rights, and does not get at what the link, or the header, leads to.
    denied = "Could not open .*Permission denied"
    worker.until(lambda: re.search(f"disk.qcow2.*{denied}", link.qemu_log()), "QEMU to be refused the link", 60)
    worker.until(lambda: re.search(f"{denied}", data.qemu_log()), "QEMU to be refused the data file", 60)
    assert f"'{ANOTHERS}': Permission denied" in data.qemu_log()

    # The backing file is the one that was checked, whatever the header says by now.
    backing.await_running()
    opened = backing.open_disks()
    assert BLANK in opened
    assert ANOTHERS not in opened
    assert [fingerprint(worker, file) for file in (ROOTS, ANOTHERS)] == secrets

    # What the label is for, and so that this cannot pass by chance: without it, libvirt gives QEMU the file.
    unlabelled.await_running()
    assert BAIT in unlabelled.open_disks()
    assert worker.shell(f"stat -c %U {BAIT}") == "libvirt-qemu\n"


# --- a base that changes --------------------------------------------------------------------------------------------

OFTEN = "[health]\ninterval_s = 1\nrecover_after = 1\n"


def _images_condition(worker: Worker) -> dict[str, str]:
    conditions = json.loads(worker.node.run(["vmnode", "status", "--json"], check=False).stdout)["conditions"]
    (images,) = [condition for condition in conditions if condition["name"] == "images"]
    return dict(images)


@on_every_version
def test_a_base_that_is_written_to_or_replaced_under_a_guest_is_told_with_the_job_until_that_is_gone(
    worker: Worker,
) -> None:
    written, replaced = f"{ROOT}/written.img", f"{ROOT}/replaced.img"
    guests.share_blank(worker, written, replaced, settings=OFTEN + SETTINGS)
    first, second = (
        submit(worker, disk_on(f"nfs://{written}:disk.qcow2")),
        submit(worker, disk_on(f"nfs://{replaced}:disk.qcow2")),
    )
    first.await_running()
    second.await_running()
    assert _images_condition(worker)["status"] == "ok"

    worker.shell(f"printf x | dd of={written} conv=notrunc status=none")
    told = _await_images(worker, "BaseChanged", f"{written}: it was written to")
    assert first.global_id() in told
    assert second.global_id() not in told

    worker.shell(f"cp {replaced} {replaced}.new; mv {replaced}.new {replaced}")
    told = _await_images(worker, "BaseChanged", f"{replaced}: it was replaced")
    assert first.global_id() in told
    assert second.global_id() in told
    worker.until(lambda: worker.everywhere("false", "VMNodeImagesOK"), "the collector to know")
    assert worker.everywhere("true")  # it takes VM jobs all the same

    worker.node.run(["virsh", "destroy", first.domain])
    told = _await_images(worker, "BaseChanged", f"image changed under a running guest: {replaced}:")
    assert second.global_id() in told
    worker.node.run(["virsh", "destroy", second.domain])
    worker.until(lambda: _images_condition(worker)["status"] == "ok", "the images to be ok")


def _await_images(worker: Worker, reason: str, words: str) -> str:
    """Wait until the condition fails for a reason; what it says."""

    def said() -> str:
        condition = _images_condition(worker)
        return condition["message"] if condition["reason"] == reason and words in condition["message"] else ""

    return worker.until(said, words)
