"""vm-nfs-plugin as HTCondor calls it: what it prints, the results it leaves, and how it ends, whatever it is asked.

The disks that it makes, with qemu-img, are looked at in tests/kernel.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Union

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmnode import __version__, config, images
from vmnode.commands import nfs_plugin
from vmnode.config import Config
from vmnode.errors import CommandFailed, DeadlineExceeded, MalformedRequest
from vmnode.transfer import ads, overlay

# HTCondor's library reads a configuration when it is first used, and asks DNS for this host's own name.
os.environ.update(CONDOR_CONFIG="ONLY_ENV", _CONDOR_NETWORK_INTERFACE="127.0.0.1", _CONDOR_NO_DNS="True")
os.environ.update(_CONDOR_DEFAULT_DOMAIN_NAME="example.org")
import classad2

ROOT = Path(__file__).parents[2]
NOBODY = 65534
OLD, NEW = classad2.ParserType.Old, classad2.ParserType.New

# As HTCondor starts it for a job: never as root. What it may have to import later is read first.
AS_AN_ORDINARY_USER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import vmnode.config
from vmnode.commands import nfs_plugin
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
sys.exit(nfs_plugin.main())
"""


def plugin(*arguments: Union[str, bytes, Path], **environment: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-c", AS_AN_ORDINARY_USER, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        env={**{key: value for key, value in os.environ.items() if key != "VMNODE_CONFIG"}, **environment},
    )
    assert "Traceback" not in ran.stderr
    return ran


def values(ad: Any) -> dict[str, Any]:
    """What HTCondor makes of an ad."""

    def plain(value: Any) -> Any:
        if isinstance(value, classad2.ClassAd):
            return values(value)
        if isinstance(value, list):
            return [plain(item.eval() if isinstance(item, classad2.ExprTree) else item) for item in value]
        return value

    return {name: plain(ad.eval(name)) for name in ad}


def results(outfile: Path) -> list[dict[str, Any]]:
    return [values(ad) for ad in classad2.parseAds(outfile.read_text().rstrip(" "), NEW)]


# --- what it says of itself, and wrong calls ----------------------------------------------------------------------


def test_what_it_can_do() -> None:
    ran = plugin("-classad")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert values(classad2.parseOne(ran.stdout, OLD)) == {
        "MultipleFileSupport": True,
        "PluginType": "FileTransfer",
        "PluginVersion": __version__,
        "ProtocolVersion": 4,
        "SupportedMethods": "nfs",
    }
    assert ran.stdout.count("\n") == 5


def test_it_can_be_asked_without_any_configuration(tmp_path: Path) -> None:
    """HTCondor asks each plugin when it starts; one that fails takes the method from the worker."""
    assert plugin("-classad", VMNODE_CONFIG=str(tmp_path / "absent")).returncode == 0
    assert plugin("--config", str(tmp_path / "absent"), "-classad").returncode == 0


@pytest.mark.parametrize("argument", ["-h", "--help", "-help"])
def test_help(argument: str) -> None:
    ran = plugin(argument)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: vm-nfs-plugin")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-bogus"],
        ["-classad", "x"],
        ["--config"],
        ["--config", "x"],
        ["-infile", "x"],
        ["-infile", "x", "-outfile"],
        ["-infile", "x", "-infile", "y"],
        ["-infile", "x", "-outfile", "y", "z"],
        ["-infile", "-outfile", "x", "y"],
        ["nfs:///a"],
        ["nfs:///a", "b", "c"],
        ["nfs:///a", "-b"],
        ["-upload"],
        ["-upload", "-infile", "x"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    ran = plugin(*arguments)
    assert (ran.returncode, ran.stdout) == (64, "")
    named = " ".join(arguments[2:] if arguments[:2] == ["--config", "x"] else arguments) or "no arguments"
    assert ran.stderr.startswith(f"vm-nfs-plugin: {named}: not understood (hint: usage: vm-nfs-plugin ")
    assert ran.stderr.count("\n") == 1


# --- a worker -----------------------------------------------------------------------------------------------------


class Worker:
    """Image roots, one of them missing, and a scratch directory of an ordinary user's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "images"
        self.scratch = directory / "scratch"
        self.config = directory / "vmnode.toml"
        for made in (directory, self.root, self.scratch, self.root / "directory"):
            made.mkdir(exist_ok=True)
            made.chmod(0o755)
        (self.root / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\4".ljust(512, b"\0"))
        for file in (self.root / "good.raw", directory / "outside.raw"):
            file.write_bytes(bytes(512))
        for file in (*self.root.glob("*.*"), directory / "outside.raw"):
            file.chmod(0o444)
        roots = f'["{self.root}", "{directory}/missing"]'
        self.config.write_text(f"[images]\nroots = {roots}\nuser_roots = {roots}\n")
        if os.geteuid() == 0:
            os.chown(self.scratch, NOBODY, NOBODY)
        # What each URL ends with: malformed, no image, not there, a root that is not there, not in a root.
        self.urls = {
            64: "nfs:relative",
            65: f"nfs://{self.root}/bad.qcow2:disk",
            66: f"nfs://{self.root}/none.qcow2:disk",
            75: f"nfs://{directory}/missing/a.qcow2:disk",
            77: f"nfs://{directory}/outside.raw:disk",
        }

    def input(self, ads_or_text: Union[str, Sequence[str]]) -> Path:
        """An in-file, given as text or as URLs, as HTCondor writes them."""
        file = self.directory / "in"
        if isinstance(ads_or_text, str):
            file.write_text(ads_or_text)
        else:
            file.write_text("".join(f'[ Url = "{u}"; LocalFileName = "{self.local(u)}" ]\n' for u in ads_or_text))
        file.chmod(0o644)
        return file

    def local(self, url: str) -> str:
        """HTCondor's own choice of a name: what follows the last slash, up to a question mark."""
        return f"{self.scratch}/{url.partition('?')[0].rpartition('/')[2]}"

    def output(self, size: int = 0) -> Path:
        """An out-file as HTCondor leaves it: full of blanks."""
        file = self.scratch / "out"
        file.write_bytes(b" " * size)
        file.chmod(0o666)
        return file

    def transfer(self, ads_or_text: Union[str, Sequence[str]], *more: str) -> tuple[int, list[dict[str, Any]]]:
        out = self.output()
        ran = plugin("--config", self.config, "-infile", self.input(ads_or_text), "-outfile", out, *more)
        assert (ran.stdout, ran.stderr) == ("", "")
        return ran.returncode, results(out)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Where everyone may go: pytest's own directories are closed to other users."""
    directory = Path(tempfile.mkdtemp(prefix="vmnode-test-"))
    try:
        yield Worker(directory)
    finally:
        shutil.rmtree(directory)


# --- how it ends --------------------------------------------------------------------------------------------------

SPECIFICATION = {"ErrorType": "Specification", "FailedServer": "nfs", "Retryable": -1}
ERRORS: dict[int, dict[str, Any]] = {
    64: SPECIFICATION,
    65: SPECIFICATION,
    66: SPECIFICATION,
    75: {"ErrorType": "Contact", "FailedServer": "nfs", "Retryable": 60},
    77: {
        "ErrorType": "Authorization",
        "FailedServer": "nfs",
        "FailureType": "Authorization",
        "ShouldRefresh": False,
        "Retryable": -1,
    },
}


def check_failure(ad: dict[str, Any], status: int, data: dict[str, Any]) -> None:
    assert ad["TransferSuccess"] is False
    assert ad["TransferError"] and ad["TransferError"].isprintable()
    assert ad["TransferErrorData"] == [{"ErrorCode": status, "ErrorString": ad["TransferError"], **data}]
    assert (ad["TransferFileBytes"], ad["TransferTotalBytes"]) == (0, 0)
    assert time.time() - 60 < ad["TransferStartTime"] <= ad["TransferEndTime"] <= time.time()


@pytest.mark.parametrize("status", ERRORS)
def test_each_failure_is_told_with_its_kind(status: int, worker: Worker) -> None:
    ended, (ad,) = worker.transfer([worker.urls[status]])
    assert ended == status
    check_failure(ad, status, ERRORS[status])
    assert ad["TransferUrl"] == worker.urls[status] and ad["TransferFileName"] == worker.local(worker.urls[status])
    assert (ad["TransferProtocol"], ad["TransferType"]) == ("nfs", "download")
    assert isinstance(ad["ConnectionTimeSeconds"], float) and 0 <= ad["ConnectionTimeSeconds"] < 60
    assert [file.name for file in worker.scratch.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("statuses", "ended"),
    [
        ([], 0),
        ([75], 75),
        ([75, 75], 75),
        ([75, 64], 64),
        ([64, 75], 64),
        ([75, 66, 65], 66),
        ([77, 75, 64], 77),
        ([65, 77, 66, 64, 75], 65),
    ],
)
def test_of_several_failures_the_first_that_is_for_good_decides(
    statuses: list[int], ended: int, worker: Worker
) -> None:
    """HTCondor would try all of them again, for nothing."""
    urls = [worker.urls[status] for status in statuses]
    status, found = worker.transfer(urls)
    assert status == ended
    assert [ad["TransferUrl"] for ad in found] == urls  # one result for each, in their order
    assert [ad["TransferErrorData"][0]["ErrorCode"] for ad in found] == statuses


def test_what_the_user_reads_says_what_to_do(worker: Worker) -> None:
    _, found = worker.transfer([worker.urls[status] for status in (64, 65, 66, 75, 77)])
    malformed, bad, none, missing, outside = (ad["TransferError"] for ad in found)
    assert "its path is not absolute (hint: the form is nfs:///images/el9.qcow2:disk.qcow2)" in malformed
    assert f"{worker.root}/bad.qcow2 cannot be a base image: it is qcow2 of version 4" in bad
    assert f"there is no {worker.root}/none.qcow2 on this worker (hint: the image roots are: {worker.root}, " in none
    assert f"the image root {worker.directory}/missing is not there on this worker" in missing
    assert f"{worker.directory}/outside.raw is not inside an image root of this worker: {worker.root}, " in outside


def test_a_disk_only_grows(worker: Worker) -> None:
    """Its base has 512 bytes, and a disk is asked for that has none."""
    status, (ad,) = worker.transfer([f"nfs://{worker.root}/good.raw:disk?format=qcow2"])
    assert status == 65 and "good.raw is raw, not qcow2" in ad["TransferError"]
    (worker.root / "good.raw").chmod(0o644)
    (worker.root / "good.raw").write_bytes(bytes(1024))
    (worker.root / "good.raw").chmod(0o444)
    status, (ad,) = worker.transfer([f"nfs://{worker.root}/good.raw:disk?size=512"])
    assert status == 65 and "size=512 is less than" in ad["TransferError"] and "1024 bytes" in ad["TransferError"]


def test_a_file_that_is_there_already_is_not_touched(worker: Worker) -> None:
    (worker.scratch / "disk").write_text("mine")
    status, (ad,) = worker.transfer([f"nfs://{worker.root}/good.raw:disk"])
    assert status == 64 and "the scratch directory has a file disk already" in ad["TransferError"]
    (worker.scratch / "link").symlink_to("target")
    status, (ad,) = worker.transfer([f"nfs://{worker.root}/good.raw:link"])
    assert status == 64 and "has a file link already" in ad["TransferError"]
    assert (worker.scratch / "disk").read_text() == "mine" and not (worker.scratch / "target").exists()


def test_a_wrong_configuration_is_the_worker_s_fault(worker: Worker) -> None:
    worker.config.write_text("[images]\nroots = 3\n")
    status, found = worker.transfer([worker.urls[64], worker.urls[66]])
    assert (status, len(found)) == (78, 2)
    for ad in found:
        data = {"ErrorType": "Parameter", "PluginVersion": __version__, "PluginLaunched": True, "Retryable": 0}
        check_failure(ad, 78, data)
        assert "[images] roots = 3: must be a list" in ad["TransferError"]
        assert "vmnode config check" in ad["TransferError"]


def test_a_worker_without_image_roots_says_so(worker: Worker) -> None:
    worker.config.write_text("")
    status, (ad,) = worker.transfer([f"nfs://{worker.root}/good.raw"])
    assert status == 77
    assert "image root of this worker: there is none" in ad["TransferError"]
    assert "[images] roots in /etc/vmnode/vmnode.toml" in ad["TransferError"]


def test_the_environment_names_the_configuration_and_the_option_outranks_it(worker: Worker) -> None:
    out = worker.output()
    arguments = ("-infile", worker.input([worker.urls[66]]), "-outfile", out)
    assert plugin(*arguments, VMNODE_CONFIG=str(worker.config)).returncode == 66
    assert plugin("--config", worker.config, *arguments, VMNODE_CONFIG="/nowhere").returncode == 66
    assert plugin(*arguments, VMNODE_CONFIG="/nowhere").returncode == 78


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be root")
def test_as_root_it_makes_nothing(worker: Worker) -> None:
    """Root may read every image: the rights of the job's user would protect nothing."""
    out = worker.output()
    infile = worker.input([f"nfs://{worker.root}/good.raw:disk"])
    arguments = ["--config", str(worker.config), "-infile", str(infile), "-outfile", str(out)]
    ran = subprocess.run([sys.executable, "-m", "vmnode.commands.nfs_plugin", *arguments], cwd=ROOT, timeout=60)
    (ad,) = results(out)
    assert ran.returncode == 77 and ad["TransferSuccess"] is False
    assert "RUN_FILETRANSFER_PLUGINS_WITH_ROOT = False" in ad["TransferError"]
    assert not (worker.scratch / "disk").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CommandFailed("x"), 75),  # qemu-img is missing, say: on another worker it may be there
        (DeadlineExceeded("x"), 75),
        (MalformedRequest("x"), 64),
    ],
)
def test_what_fails_for_want_of_a_program_or_of_time_may_be_tried_again(error: Any, status: int) -> None:
    ended, ad = overlay.failure("nfs:///a", "a", error)
    assert ended == status == ad["TransferErrorData"][0]["ErrorCode"]
    assert ad["TransferErrorData"][0]["Retryable"] == (60 if status == 75 else -1)


# --- in- and out-files --------------------------------------------------------------------------------------------


def test_the_out_file_is_filled_and_not_cut(worker: Worker) -> None:
    """HTCondor has reserved its room on the disk with blanks."""
    out = worker.output(size=65536)
    infile = worker.input([worker.urls[66], worker.urls[64]])
    before = out.stat().st_ino
    assert plugin("--config", worker.config, "-infile", infile, "-outfile", out).returncode == 66
    assert (out.stat().st_size, out.stat().st_ino) == (65536, before)
    lines = out.read_text().split("\n")
    assert len(lines) == 3 and lines[2].strip(" ") == ""
    assert [ad["TransferUrl"] for ad in results(out)] == [worker.urls[66], worker.urls[64]]


def test_an_out_file_that_is_too_short_or_absent_takes_the_results(worker: Worker) -> None:
    infile = worker.input([worker.urls[66]])
    for out in (worker.output(size=1), worker.scratch / "new"):
        assert plugin("--config", worker.config, "-infile", infile, "-outfile", out).returncode == 66
        assert len(results(out)) == 1
    assert (worker.scratch / "new").stat().st_mode & 0o777 == 0o600


def test_the_order_of_the_arguments_does_not_matter(worker: Worker) -> None:
    out = worker.output()
    infile = worker.input([worker.urls[66]])
    assert plugin("--config", worker.config, "-outfile", out, "-infile", infile).returncode == 66
    assert len(results(out)) == 1


def test_ads_of_protocol_4_that_name_no_file_get_no_result(worker: Worker) -> None:
    text = (
        "[ TransferProtocolVersion = 4; Settings = [ Url = \"nfs:///a\" ] ]\n"
        f'[ LocalFileName = "{worker.scratch}/x"; Url = "{worker.urls[66]}"; Size = 0 ]\n'
        f'[ localfilename = "{worker.scratch}/y" ]\n'
    )  # fmt: skip
    status, found = worker.transfer(text)
    assert status == 66
    assert [(ad["TransferUrl"], ad["TransferFileName"]) for ad in found] == [
        (worker.urls[66], f"{worker.scratch}/x"),
        ("", f"{worker.scratch}/y"),
    ]


def test_a_url_outside_of_ascii_is_looked_up_and_repeated(worker: Worker) -> None:
    """HTCondor writes each byte of its UTF-8 in octal."""
    status, (ad,) = worker.transfer(f'[ Url = "nfs://{worker.root}/b\\303\\274cher.qcow2:d"; LocalFileName = "d" ]')
    assert status == 66 and f"there is no {worker.root}/bücher.qcow2" in ad["TransferError"]
    assert ad["TransferUrl"] == f"nfs://{worker.root}/bücher.qcow2:d"


@pytest.mark.parametrize("text", ["x", "[", '[ Url = "x', "[ Url ]", "] [", "[" * 100_000])
def test_an_in_file_that_is_none_is_refused_whole(text: str, worker: Worker) -> None:
    out = worker.output()
    ran = plugin("--config", worker.config, "-infile", worker.input(text), "-outfile", out)
    assert (ran.returncode, ran.stdout, out.read_text()) == (64, "", "")
    assert ran.stderr.startswith("vm-nfs-plugin: the input is no ") and ran.stderr.count("\n") == 1


def test_files_that_cannot_be_opened_or_written_are_74(worker: Worker) -> None:
    infile = str(worker.input([worker.urls[66]]))
    for source, target in (
        (f"{worker.scratch}/absent", str(worker.output())),
        (str(worker.scratch), str(worker.output())),
        (infile, str(worker.scratch)),
        (infile, f"{worker.scratch}/absent/out"),
        (infile, f"{worker.root}/out"),
        (infile, "/dev/full"),
    ):
        ran = plugin("--config", worker.config, "-infile", source, "-outfile", target)
        assert (ran.returncode, ran.stdout) == (74, ""), (source, target)
        assert ran.stderr.startswith("vm-nfs-plugin: [Errno ") and ran.stderr.count("\n") == 1


# --- uploads ------------------------------------------------------------------------------------------------------


def test_an_upload_is_refused_for_each_file(worker: Worker) -> None:
    status, found = worker.transfer(["nfs:///images/a", "nfs:///images/b"], "-upload")
    assert (status, len(found)) == (69, 2)
    for ad in found:
        # Nowhere else would it be another answer.
        data = {"ErrorType": "Parameter", "PluginVersion": __version__, "PluginLaunched": True, "Retryable": -1}
        check_failure(ad, 69, data)
        assert "it stores nothing" in ad["TransferError"] and "transfer_output_remaps" in ad["TransferError"]


def test_an_upload_is_refused_wherever_the_word_stands(worker: Worker) -> None:
    infile, out = worker.input([worker.urls[66]]), worker.output()
    for arguments in (("-upload", "-infile", infile, "-outfile", out), ("-infile", infile, "-outfile", out, "-upload")):
        assert plugin("--config", worker.config, *arguments).returncode == 69


def test_an_upload_by_the_oldest_protocol_is_refused_too(worker: Worker) -> None:
    ran = plugin("--config", worker.config, str(worker.scratch / "disk"), "nfs:///images/a")
    assert (ran.returncode, ran.stdout) == (69, "")
    assert "it stores nothing" in ran.stderr and ran.stderr.count("\n") == 1


# --- the oldest protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ERRORS)
def test_one_url_and_one_file(status: int, worker: Worker) -> None:
    url = worker.urls[status]
    ran = plugin("--config", worker.config, url, worker.local(url))
    assert ran.returncode == status
    ad = values(classad2.parseOne(ran.stdout, OLD))
    assert ad["TransferSuccess"] is False and ad["TransferUrl"] == url and ad["TransferFileName"] == worker.local(url)
    assert ad["TransferError"]
    assert ran.stderr == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:backslashreplace"])
@pytest.mark.parametrize(
    "url", [b"nfs:///a\xff:d", b"nfs:///\xed\xa0\x80", "nfs:///bücher", b'nfs:///a"b\\', "nfs:/\n"]
)
def test_arguments_of_any_bytes(url: Union[str, bytes], encoding: str, worker: Worker) -> None:
    ran = plugin("--config", worker.config, url, b"\xff", PYTHONIOENCODING=encoding)
    assert ran.returncode in (64, 77, 66)
    assert "TransferSuccess = false\n" in ran.stdout


# --- what the daemon left for it ----------------------------------------------------------------------------------


def test_what_the_daemon_left_is_used_only_for_the_default_configuration(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = images.Settings(("/left",), (), (), 1.0)
    monkeypatch.setattr(images, "read", lambda: left)
    monkeypatch.delenv("VMNODE_CONFIG", raising=False)
    assert nfs_plugin.configured("") == left
    assert nfs_plugin.configured(str(worker.config)).roots == (str(worker.root), f"{worker.directory}/missing")
    monkeypatch.setenv("VMNODE_CONFIG", str(worker.config))
    assert nfs_plugin.configured("").roots == (str(worker.root), f"{worker.directory}/missing")


def test_where_the_daemon_left_nothing_the_configuration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "read", lambda: None)
    monkeypatch.setattr("vmnode.config.DEFAULT_FILE", tmp_path / "vmnode.toml")
    monkeypatch.delenv("VMNODE_CONFIG", raising=False)
    assert nfs_plugin.configured("") == images.settings(Config().images)


def test_both_look_in_the_same_places() -> None:
    assert str(config.DEFAULT_FILE) == images.DEFAULT_CONFIG
    assert f"{Config().paths.run_dir}/images.json" == images.PARSED


# --- anything at all ----------------------------------------------------------------------------------------------


def main_in_process(arguments: Sequence[str]) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["vm-nfs-plugin", *arguments])
        status = nfs_plugin.main()
    return status, stdout.getvalue(), stderr.getvalue()


words = st.sampled_from(
    ["[", "]", "Url", "LocalFileName", "=", ";", '"nfs:///a"', '"x"', '"', "\\", "'", "\n", "{", "}"]
)
harmless = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\\'), max_size=20)
one_file = st.builds('[ Url = "{}"; LocalFileName = "{}" ]'.format, harmless, harmless)
infiles = st.one_of(
    st.binary(max_size=60),
    st.lists(words, max_size=20).map(" ".join).map(str.encode),
    st.lists(one_file, max_size=4).map("".join).map(str.encode),
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=infiles, upload=st.booleans())
@example(data=b'[ Url = "a\xff\x00"; LocalFileName = "\xc3" ]', upload=True)
@example(data=b'[ Url = "\\377\\000\\303" ]', upload=True)
def test_any_in_file_is_answered_ad_by_ad_or_refused(tmp_path: Path, data: bytes, upload: bool) -> None:
    """A configuration that is wrong, or root's identity, keeps it from forking for each."""
    (tmp_path / "in").write_bytes(data)
    (tmp_path / "out").write_bytes(b" " * 4096)
    files = ["-infile", str(tmp_path / "in"), "-outfile", str(tmp_path / "out")]
    options = ["--config", str(tmp_path / "absent"), *(["-upload"] if upload else [])]
    status, printed, complaint = main_in_process([*options, *files])
    assert printed == ""
    written = (tmp_path / "out").read_bytes()
    assert len(written) >= 4096
    try:
        expected = [
            ad
            for ad in ads.read_new(data.decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n"))
            if "url" in ad or "localfilename" in ad
        ]
    except MalformedRequest:
        assert status == 64 and written == b" " * 4096
        assert complaint.startswith("vm-nfs-plugin: ") and complaint.endswith("\n")
        return
    assert complaint == ""
    found = ads.read_new(written.decode("utf-8", "surrogateescape"))
    assert [ad["transferurl"] for ad in found] == [ad.get("url", "").replace("\0", "?") for ad in expected]
    assert all(ad["transfererror"] for ad in found)
    refused = 69 if upload else 77 if os.geteuid() == 0 else 78
    assert status == (refused if expected else 0)


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(["-classad", "-infile", "-outfile", "-upload", "--config", "-h", "x", "", "-", "/"])
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
        max_size=6,
    )
)
def test_any_arguments_end_with_a_status_and_at_most_a_line(arguments: list[str]) -> None:
    """None of them leads to a disk: there is no file x, and / is none."""
    cwd = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            status, printed, complaint = main_in_process(arguments)
        finally:
            os.chdir(cwd)
    assert status in (0, 64, 69, 74, 77, 78)
    assert (status == 0) <= (complaint == "")
    assert printed or complaint or status == 0


def test_what_a_disk_was_made_of_is_told() -> None:
    """The ad of a success, without making one: HTCondor records these figures."""
    ad = overlay.result("nfs:///a:b", "/scratch/a:b", 1_790_000_000.7, 196_616)
    assert (ad["TransferFileBytes"], ad["TransferTotalBytes"], ad["TransferStartTime"]) == (196616, 196616, 1790000000)
    assert (ad["TransferUrl"], ad["TransferFileName"]) == ("nfs:///a:b", "/scratch/a:b")
    assert values(classad2.parseOne(ads.write_new(ad), NEW)) == ad
