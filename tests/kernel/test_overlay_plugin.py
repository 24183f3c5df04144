"""vm-nfs-plugin as the starter runs it: a process with the rights of the job's user, in the job's scratch directory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import classad2
import pytest

from tests.kernel import images
from tests.kernel.images import (
    ALICE,
    ALICE_UID,
    GIB,
    GOOD,
    HOSTILE,
    LIBEXEC,
    MIB,
    OTHER_ROOT,
    ROOT,
    SCRATCH,
    SITE,
    Good,
    Hostile,
    configure,
    give,
    info,
    overlay,
    qcow2,
    qemu_img,
    raw,
)
from tests.kernel.world import tool, until

PLUGIN = LIBEXEC / "vm-nfs-plugin"
JOB = SITE / "execute" / "transfer"  # where the starter keeps what it tells a plugin, and is told
ROOTS = f'[images]\nroots = ["{ROOT}", "{OTHER_ROOT}", "/mnt/unmounted"]\ntimeout_s = 20\n'
QEMU_IMG = Path("/usr/bin/qemu-img")
ROOM = " " * 20000  # HTCondor keeps it for the results: the transfer may fill the disk


@pytest.fixture(autouse=True)
def site() -> None:
    images.make_site()
    images.install()
    configure(ROOTS)
    JOB.mkdir()
    JOB.chmod(0o755)
    os.chown(JOB, ALICE_UID, ALICE_UID)


def start(*arguments: str, uid: int = ALICE_UID, wrapper: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    groups = {"user": uid, "group": uid, "extra_groups": ALICE.groups if uid else []}
    argv = [*wrapper, str(PLUGIN), "--config", str(SITE / "vmnode.toml"), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, text=True, cwd=SCRATCH, env={}, **{**groups, **streams, **options})


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    with start(*arguments, **options) as plugin:
        output, complaint = plugin.communicate(timeout=60)
        return plugin.returncode, output, complaint


def write_inputs(name: str, urls: Sequence[str], directory: Path = SCRATCH) -> tuple[Path, Path]:
    """As the starter does: one ad for each URL, and room for the answers."""
    infile, outfile = JOB / f"{name}.in", JOB / f"{name}.out"
    ads = (
        f'[ Url = "{url}"; LocalFileName = "{directory}/{url.rpartition("/")[2]}"; DesiredTotalTimeout = 60 ]\n'
        for url in urls
    )
    infile.write_text("".join(ads))
    give(raw(outfile, 0))
    outfile.write_text(ROOM)
    return infile, outfile


class Done(NamedTuple):
    status: int
    ads: list[Any]

    @property
    def sentence(self) -> str:
        return str(self.ads[0]["TransferError"])

    @property
    def data(self) -> dict[str, Any]:
        (data,) = self.ads[0]["TransferErrorData"]
        return dict(data)


def transfer(*urls: object, directory: Path = SCRATCH, upload: bool = False, **options: Any) -> Done:
    """Call the plugin for these URLs; its status, and its result ads as HTCondor's own parser reads them."""
    infile, outfile = write_inputs("one", [str(url) for url in urls], directory)
    words = ["-upload"] if upload else []
    status, output, complaint = run("-infile", str(infile), "-outfile", str(outfile), *words, **options)
    assert (output, complaint) == ("", "")
    ads = list(classad2.parseAds(outfile.read_text(), classad2.ParserType.New))
    assert [ad["TransferUrl"] for ad in ads] == [str(url) for url in urls]
    return Done(status, ads)


def in_scratch() -> list[str]:
    return sorted(path.name for path in SCRATCH.iterdir())


def nfs(path: object, name: str = "", **options: object) -> str:
    query = "&".join(f"{key}={value}" for key, value in options.items())
    return f"nfs://{path}" + (f":{name}" if name else "") + (f"?{query}" if query else "")


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", GOOD, ids=str)
def test_a_disk_is_an_overlay_that_holds_what_its_base_holds(good: Good) -> None:
    good.make(ROOT / "base.img")
    done = transfer(nfs(ROOT / "base.img", "disk"))
    assert done.status == 0
    assert in_scratch() == ["disk"]
    disk = SCRATCH / "disk"
    said = info(disk, "qcow2")
    assert (said["full-backing-filename"], said["backing-filename-format"]) == (f"{ROOT}/base.img", good.format)
    assert (said["format"], said["virtual-size"]) == ("qcow2", good.virtual_size)
    if good.virtual_size <= 64 * GIB:
        assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", good.format, disk, ROOT / "base.img")
    status = disk.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (ALICE_UID, ALICE_UID, 0o600)


def test_what_htcondor_is_told_of_a_disk_is_true() -> None:
    base = qcow2(ROOT / "base.qcow2")
    before = int(time.time())
    (ad,) = transfer(nfs(base, "disk")).ads
    written = (SCRATCH / "disk").stat().st_size
    assert 100_000 < written < 1_000_000
    assert (ad["TransferSuccess"], ad["TransferProtocol"], ad["TransferType"]) == (True, "nfs", "download")
    assert ad["TransferFileBytes"] == ad["TransferTotalBytes"] == written
    assert ad["TransferFileName"] == f"{SCRATCH}/base.qcow2:disk"
    assert before <= ad["TransferStartTime"] <= ad["TransferEndTime"] <= time.time()
    assert 0 < ad["ConnectionTimeSeconds"] < 20
    assert dict(ad["DeveloperData"]) == {
        "Base": f"{ROOT}/base.qcow2",
        "BaseFormat": "qcow2",
        "BaseSize": base.stat().st_size,
        "DiskSize": 64 * MIB,
    }
    assert "TransferError" not in ad and "TransferErrorData" not in ad


def test_without_a_name_a_disk_has_its_base_s() -> None:
    raw(ROOT / "el9.img")
    assert transfer(nfs(ROOT / "el9.img")).status == 0
    assert in_scratch() == ["el9.img"]


def test_a_disk_names_the_real_path_of_its_base() -> None:
    """A link that an administrator changes tomorrow must not put another base below a disk that was made today."""
    raw(ROOT / "el9-20261101.img")
    (ROOT / "el9.img").symlink_to("el9-20261101.img")
    assert transfer(nfs(ROOT / "el9.img", "disk")).status == 0
    assert info(SCRATCH / "disk", "qcow2")["full-backing-filename"] == f"{ROOT}/el9-20261101.img"


@pytest.mark.parametrize(
    "name", ["a b.img", "ä.img", "50%.img", 'a"b.img', "a:b,c.img", "json:{}.img", "-F.img", "$x`y.img"]
)
def test_a_base_may_have_any_name_that_can_be_printed(name: str) -> None:
    raw(ROOT / name)
    url = "nfs://" + "".join(
        f"%{byte:02X}" if chr(byte) not in "/." else chr(byte) for byte in f"{ROOT}/{name}".encode()
    )
    assert transfer(f"{url}:disk").status == 0
    assert info(SCRATCH / "disk", "qcow2")["full-backing-filename"] == f"{ROOT}/{name}"
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", SCRATCH / "disk", ROOT / name)


@pytest.mark.parametrize(
    "asked, virtual_size", [("64M", 64 * MIB), ("65M", 65 * MIB), ("20G", 20 * GIB), ("1024T", 1 << 50)]
)
def test_a_disk_grows_as_asked(asked: str, virtual_size: int) -> None:
    done = transfer(nfs(qcow2(ROOT / "base"), "disk", size=asked))
    assert done.status == 0
    assert info(SCRATCH / "disk", "qcow2")["virtual-size"] == virtual_size
    assert done.ads[0]["DeveloperData"]["DiskSize"] == virtual_size


def test_a_disk_does_not_shrink() -> None:
    done = transfer(nfs(qcow2(ROOT / "base"), "disk", size="63M"))
    assert done.status == 65
    assert "size=66060288 is less than /mnt/images/base has, 67108864 bytes: a disk can only grow" in done.sentence
    assert in_scratch() == []


def test_as_many_disks_as_are_asked_for_are_made_of_one_base() -> None:
    base = qcow2(ROOT / "base")
    assert transfer(*(nfs(base, f"disk{number}") for number in range(5))).status == 0
    assert in_scratch() == [f"disk{number}" for number in range(5)]


def test_sixty_four_at_once_are_all_correct() -> None:
    bases = [qcow2(ROOT / "one"), raw(OTHER_ROOT / "two", 3 * MIB)]
    plugins = []
    for number in range(64):
        url = nfs(bases[number % 2], f"disk{number}", size=f"{number + 70}M")
        infile, outfile = write_inputs(str(number), [url])
        plugins.append((number, outfile, start("-infile", str(infile), "-outfile", str(outfile))))
    for number, outfile, plugin in plugins:
        assert plugin.communicate(timeout=100) == ("", "") and plugin.returncode == 0
        (ad,) = classad2.parseAds(outfile.read_text(), classad2.ParserType.New)
        disk = SCRATCH / f"disk{number}"
        said = info(disk, "qcow2")
        assert said["virtual-size"] == (number + 70) * MIB == ad["DeveloperData"]["DiskSize"]
        assert said["full-backing-filename"] == str(bases[number % 2]) == ad["DeveloperData"]["Base"]
        assert disk.stat().st_size == ad["TransferFileBytes"]


def test_of_many_that_want_the_same_name_one_gets_it() -> None:
    base = qcow2(ROOT / "base")
    plugins = [start(nfs(base, "disk", size=f"{number + 70}M"), f"{SCRATCH}/x") for number in range(8)]
    statuses = [(plugin.communicate(timeout=60), plugin.returncode)[1] for plugin in plugins]
    assert sorted(statuses) == [0] + [64] * 7
    assert info(SCRATCH / "disk", "qcow2")["virtual-size"] == (statuses.index(0) + 70) * MIB


# --- the destination ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link", "fifo"])
def test_what_has_the_name_already_stays_and_is_not_followed(kind: str) -> None:
    outside = give(raw(SITE / "home" / "alice" / "precious"))
    taken = SCRATCH / "disk"
    if kind == "file":
        taken.write_text("mine")
    elif kind == "directory":
        taken.mkdir()
    elif kind == "fifo":
        os.mkfifo(taken)
    else:
        taken.symlink_to(outside if kind == "link" else "/mnt/home/alice/new")

    def seen() -> list[object]:
        there = [(path.lstat().st_ino, path.lstat().st_size, path.lstat().st_mtime_ns) for path in (taken, outside)]
        return [*there, outside.read_bytes()]

    before = seen()
    done = transfer(nfs(raw(ROOT / "base"), "disk"))
    assert done.status == 64
    assert "the scratch directory has a file disk already" in done.sentence
    assert seen() == before
    assert [path.name for path in (SITE / "home" / "alice").iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["../disk", "%2e%2e", "..%2Fdisk", "%2Fetc%2Fx", ".", "..", ".hidden", "a%20b", "-o"])
def test_a_name_that_is_no_plain_one_is_refused(name: str) -> None:
    raw(ROOT / "base")
    done = transfer(nfs(ROOT / "base", name))
    assert (done.status, done.data["ErrorType"]) == (64, "Specification")
    assert in_scratch() == [] and not (SCRATCH.parent / "disk").exists()


def test_a_scratch_directory_that_cannot_be_written_to_is_worth_another_try() -> None:
    raw(ROOT / "base")
    SCRATCH.chmod(0o500)
    done = transfer(nfs(ROOT / "base", "disk"))
    assert done.status == 75 and "/mnt/execute/dir_7/disk cannot be made: Permission denied" in done.sentence


# --- what goes wrong on the worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["size=64k", "size=4k", "nr_inodes=1"])
def test_on_a_full_disk_nothing_is_left_behind(limit: str) -> None:
    raw(ROOT / "base")
    tool("mount", "-t", "tmpfs", "-o", f"{limit},mode=0700,uid={ALICE_UID}", "tmpfs", str(SCRATCH))
    done = transfer(nfs(ROOT / "base", "disk"))
    assert done.status == 75
    assert "No space left on device" in done.sentence
    assert (done.data["ErrorType"], done.data["Retryable"]) == ("Contact", 60)
    assert in_scratch() == []


def replace_qemu_img(script: str) -> None:
    """Another qemu-img, in the test's own mounts."""
    fake = SITE / "fake"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    tool("mount", "--bind", str(fake), str(QEMU_IMG))


def test_without_qemu_img_another_worker_may_do_it() -> None:
    tool("mount", "--bind", "/dev/null", str(QEMU_IMG))
    done = transfer(nfs(raw(ROOT / "base"), "disk"))
    assert done.status == 75
    assert "qemu-img: cannot be started: Permission denied" in done.sentence
    assert in_scratch() == []


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo half >$9; echo 'qemu-img: first\nqemu-img: last' >&2; exit 1", "status 1: qemu-img: last"),
        ("kill -SEGV $$", "status -11: it says nothing"),
        ("exec yes >&2", "qemu-img printed more than 1 MiB"),
    ],
)
def test_a_qemu_img_that_fails_leaves_nothing_behind(script: str, said: str) -> None:
    replace_qemu_img(script)
    done = transfer(nfs(raw(ROOT / "base"), "disk"))
    assert done.status == 75 and said in done.sentence
    assert in_scratch() == []


def test_qemu_img_runs_under_limits_and_opens_no_base() -> None:
    replace_qemu_img(f'{{ echo "$@"; cat /proc/self/limits; }} >{SCRATCH}/said; exit 1')
    transfer(nfs(raw(ROOT / "base"), "disk"))
    arguments, *limits = (SCRATCH / "said").read_text().splitlines()
    assert arguments == f"create -q -u -f qcow2 -F raw -b {ROOT}/base ./disk {MIB}"
    found = {line[:25].strip(): line[25:].split()[:2] for line in limits}
    assert found["Max address space"] == [str(4 * GIB)] * 2
    assert found["Max file size"] == [str(GIB)] * 2
    assert found["Max cpu time"] == ["20"] * 2


def test_limits_of_the_site_s_own_are_no_obstacle() -> None:
    """A hard limit may not be raised by an ordinary user: one that is lower than ours stays."""
    qcow2(ROOT / "base")
    site = ("prlimit", f"--as={3 * GIB}", f"--fsize={64 * MIB}", "--cpu=10", "--core=0")
    assert transfer(nfs(ROOT / "base", "disk"), wrapper=site).status == 0
    assert info(SCRATCH / "disk", "qcow2")["virtual-size"] == 64 * MIB


@pytest.mark.parametrize(
    "limit, said", [("--nproc=1", "Resource temporarily unavailable"), ("--nofile=6", "Too many open files")]
)
def test_a_worker_that_has_no_room_for_another_process_answers_all_the_same(limit: str, said: str) -> None:
    raw(ROOT / "base")
    done = transfer(nfs(ROOT / "base", "a"), nfs(ROOT / "base", "b"), wrapper=("prlimit", limit))
    assert done.status == 75
    assert [said in ad["TransferError"] for ad in done.ads] == [True, True]
    assert in_scratch() == []


def test_a_plugin_that_is_killed_leaves_one_file_at_most_and_the_next_directory_is_as_good() -> None:
    raw(ROOT / "base")
    replace_qemu_img(f"echo $$ >{SCRATCH}/pid; exec sleep 600")
    plugin = start(nfs(ROOT / "base", "disk"), f"{SCRATCH}/x")
    until(lambda: (SCRATCH / "pid").exists() and (SCRATCH / "pid").read_text().strip())
    plugin.kill()
    os.kill(int((SCRATCH / "pid").read_text()), signal.SIGKILL)  # as the starter does with all that is left
    plugin.communicate()
    assert in_scratch() == ["disk", "pid"]
    tool("umount", str(QEMU_IMG))
    again = SITE / "execute" / "dir_8"
    again.mkdir()
    give(again, 0o700)
    assert transfer(nfs(ROOT / "base", "disk"), directory=again).status == 0
    assert info(again / "disk", "qcow2")["virtual-size"] == MIB


def test_a_root_that_hangs_is_worth_another_try_and_others_work() -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    hung = SITE / "hung"
    configure(f'[images]\nroots = ["{hung}", "{ROOT}"]\ntimeout_s = 1\n')
    raw(OTHER_ROOT / "base")
    raw(ROOT / "base")
    with images.served(OTHER_ROOT, hung) as server:
        assert transfer(nfs(hung / "base", "before")).status == 0
        tool("kill", "-STOP", str(server.pid))
        began = time.monotonic()
        done = transfer(nfs(hung / "base", "disk1"), nfs(ROOT / "base", "disk2"), nfs(hung / "base", "disk3"))
        assert time.monotonic() - began < 6
        assert done.status == 75
        assert [ad["TransferSuccess"] for ad in done.ads] == [False, True, False]
        assert "the file server hangs: /mnt/hung/base: no answer within 1 s" in done.sentence
        assert (done.data["ErrorType"], done.data["Retryable"]) == ("Contact", 60)
        tool("kill", "-CONT", str(server.pid))
        assert transfer(nfs(hung / "base", "disk1")).status == 0
    assert in_scratch() == ["before", "disk1", "disk2"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_a_hostile_base_is_refused_with_a_sentence_of_its_own(hostile: Hostile) -> None:
    hostile.make(ROOT / "base")
    done = transfer(nfs(ROOT / "base", "disk"))
    assert (done.status, done.ads[0]["TransferSuccess"]) == (65, False)
    assert re.search(f"/mnt/images/base cannot be a base image: {hostile.sentence}", done.sentence)
    assert (done.data["ErrorType"], done.data["ErrorCode"], done.data["Retryable"]) == ("Specification", 65, -1)
    assert in_scratch() == []


def refusals() -> dict[str, tuple[str, int, str, str]]:
    """URL, status, kind of error, sentence."""
    for name, mode in (("secret", 0o600), ("open", 0o666), ("disk", 0o644)):
        raw(ROOT / name).chmod(mode)
    raw(SITE / "outside")
    overlay(ROOT / "overlay", "/etc/shadow", "raw")
    (ROOT / "out").symlink_to("/etc/passwd")
    os.mkfifo(ROOT / "fifo", 0o644)
    specification, authorization, contact = "Specification", "Authorization", "Contact"
    return {
        "another scheme": (f"http://{ROOT}/disk", 64, specification, "it does not begin with nfs:"),
        "a host": ("nfs://server/images/disk", 64, specification, "it names a host, 'server'"),
        "outside": (nfs(SITE / "outside", "x"), 77, authorization, "is not inside an image root"),
        "a link out": (nfs(ROOT / "out", "x"), 77, authorization, "which is /etc/passwd, is not inside an image root"),
        "dots": (nfs(f"{ROOT}/../outside", "x"), 64, specification, "its path holds '..'"),
        "unreadable": (nfs(ROOT / "secret", "x"), 77, authorization, "you may not read /mnt/images/secret"),
        "writable": (nfs(ROOT / "open", "x"), 77, authorization, "you may write to /mnt/images/open"),
        "missing": (nfs(ROOT / "nothing", "x"), 66, specification, "there is no /mnt/images/nothing on this worker"),
        "a FIFO": (nfs(ROOT / "fifo", "x"), 65, specification, "is a pipe or a socket, not a regular file"),
        "an overlay": (nfs(ROOT / "overlay", "x"), 65, specification, "it has a backing file of its own"),
        "another format": (nfs(ROOT / "disk", "x", format="qcow2"), 65, specification, "disk is raw, not qcow2"),
        "a missing root": (nfs("/mnt/unmounted/disk", "x"), 75, contact, "the image root /mnt/unmounted is not there"),
    }


def test_each_refusal_has_its_status_and_its_sentence() -> None:
    cases = refusals()
    done = transfer(*(url for url, _, _, _ in cases.values()))
    for (name, (_, status, kind, sentence)), ad in zip(cases.items(), done.ads):
        (data,) = ad["TransferErrorData"]
        assert (ad["TransferSuccess"], data["ErrorCode"], data["ErrorType"]) == (False, status, kind), name
        assert sentence in ad["TransferError"] and sentence in data["ErrorString"], name
        assert ad["TransferFileBytes"] == 0
    assert in_scratch() == []
    assert done.status == 64


@pytest.mark.parametrize(
    "chosen, status",
    [
        (["missing", "good"], 66),
        (["a missing root", "good", "missing"], 66),
        (["missing", "outside"], 66),
        (["outside", "missing"], 77),
        (["a missing root", "outside"], 77),  # for good: trying again would help nobody
        (["a missing root", "good"], 75),
        (["good"], 0),
    ],
)
def test_one_failure_neither_stops_nor_hides_the_others(chosen: list[str], status: int) -> None:
    cases = refusals()
    cases["good"] = (nfs(ROOT / "disk", "good"), 0, "", "")
    done = transfer(*(cases[name][0] for name in chosen))
    assert done.status == status
    assert [ad["TransferSuccess"] for ad in done.ads] == [name == "good" for name in chosen]
    assert in_scratch() == [name for name in chosen if name == "good"]


def test_nothing_is_stored() -> None:
    (SCRATCH / "result").write_text("x")
    done = transfer(nfs(ROOT / "result"), nfs(ROOT / "other"), upload=True)
    assert done.status == 69
    assert [ad["TransferSuccess"] for ad in done.ads] == [False, False]
    assert "it stores nothing there" in done.sentence and "transfer_output_remaps" in done.sentence
    assert list(ROOT.iterdir()) == []
    status, _, complaint = run(f"{SCRATCH}/result", nfs(ROOT / "result"))  # the old form of it
    assert status == 69 and "it stores nothing there" in complaint


def test_root_gets_no_disk() -> None:
    raw(ROOT / "base")
    done = transfer(nfs(ROOT / "base", "disk"), uid=0)
    assert done.status == 77
    assert "the plugin runs as root" in done.sentence and "RUN_FILETRANSFER_PLUGINS_WITH_ROOT" in done.sentence
    assert in_scratch() == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("[images\n", "/mnt/vmnode.toml: cannot be read: "),
        ('[images]\nroots = "/mnt/images"\n', "/mnt/vmnode.toml: [images] roots = '/mnt/images': must be a list"),
        ("[images]\nroot = []\n", "/mnt/vmnode.toml: [images] root: no such key"),
        (None, "/mnt/vmnode.toml: cannot be read: Permission denied"),
    ],
)
def test_with_a_broken_configuration_nothing_is_allowed(text: Optional[str], said: str) -> None:
    raw(ROOT / "base")
    configure(text or ROOTS).chmod(0o644 if text else 0o600)
    done = transfer(nfs(ROOT / "base", "a"), nfs(ROOT / "base", "b"))
    assert done.status == 78
    assert [ad["TransferSuccess"] for ad in done.ads] == [False, False]
    assert f"vmnode's configuration on this worker is wrong: {said}" in done.sentence
    assert (done.data["ErrorType"], done.data["PluginLaunched"]) == ("Parameter", True)
    assert in_scratch() == []


# --- how it is called ----------------------------------------------------------------------------------------------


def test_it_says_what_it_can_do_even_where_it_can_do_nothing() -> None:
    configure("[images\n")
    for uid in (ALICE_UID, 0):
        status, output, complaint = run("-classad", uid=uid)
        assert (status, complaint) == (0, "")
        ad = classad2.parseOne(output, classad2.ParserType.Old)
        assert (ad["MultipleFileSupport"], ad["PluginType"], ad["SupportedMethods"]) == (True, "FileTransfer", "nfs")
        assert ad["ProtocolVersion"] == 4


def test_the_old_protocol_makes_a_disk_beside_the_file() -> None:
    raw(ROOT / "base")
    status, output, complaint = run(nfs(ROOT / "base", "disk"), f"{SCRATCH}/base:disk")
    assert (status, complaint) == (0, "")
    assert classad2.parseOne(output, classad2.ParserType.Old)["TransferFileBytes"] == (SCRATCH / "disk").stat().st_size
    assert run(nfs(ROOT / "base", "beside"), "base")[0] == 0  # in the directory where it was started
    assert in_scratch() == ["beside", "disk"]
    status, output, _ = run(nfs(ROOT / "nothing"), f"{SCRATCH}/nothing")
    assert status == 66
    assert "there is no" in classad2.parseOne(output, classad2.ParserType.Old)["TransferError"]


def test_the_file_for_the_results_is_not_cut() -> None:
    raw(ROOT / "base")
    done = transfer(nfs(ROOT / "base", "disk"), nfs(ROOT / "nothing"))
    assert [ad["TransferSuccess"] for ad in done.ads] == [True, False]
    written = (JOB / "one.out").read_text()
    assert len(written) == len(ROOM) and written.endswith(" " * 10000)


def test_results_are_there_as_soon_as_they_are_known() -> None:
    """A plugin that is killed in its second transfer has told of its first."""
    raw(ROOT / "base")
    replace_qemu_img(f"test -e {SCRATCH}/disk2 || exit 0; echo $$ >{SCRATCH}/pid; exec sleep 600")
    infile, outfile = write_inputs("two", [nfs(ROOT / "base", "disk1"), nfs(ROOT / "base", "disk2")])
    plugin = start("-infile", str(infile), "-outfile", str(outfile))
    until(lambda: (SCRATCH / "pid").exists() and (SCRATCH / "pid").read_text().strip())
    plugin.kill()
    os.kill(int((SCRATCH / "pid").read_text()), signal.SIGKILL)
    plugin.communicate()
    ads = list(classad2.parseAds(outfile.read_text(), classad2.ParserType.New))
    assert [ad["TransferUrl"] for ad in ads] == [nfs(ROOT / "base", "disk1")]


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        ([], 64, "no arguments: not understood"),
        (["-infile", "x"], 64, "not understood"),
        (["-infile", "/nonexistent", "-outfile", "/dev/null"], 74, "No such file or directory"),
        (["-infile", "/etc/passwd", "-outfile", "/dev/null"], 64, "no sequence of ClassAds"),
        (["-infile", "/dev/null", "-outfile", "/mnt/images/out"], 74, "Permission denied"),
        (["-infile", "/dev/null", "-outfile", "/dev/null"], 0, ""),
        (["-frobnicate", "x"], 64, "not understood"),
    ],
)
def test_a_call_that_makes_no_sense_is_told_so_in_one_line(arguments: list[str], status: int, said: str) -> None:
    found, output, complaint = run(*arguments)
    assert (found, output) == (status, "")
    assert said in complaint and complaint.count("\n") == (1 if said else 0)
    assert "Traceback" not in complaint
