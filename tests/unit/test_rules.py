"""The rules that a reader of one file cannot see broken: who spawns, who touches the machine, what is hot."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmnode import images

PACKAGE = Path(__file__).parents[2] / "vmnode"
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]

# Who starts processes: with an event loop, and without one, for what lives for milliseconds.
SPAWNERS = {
    "host/process.py": {"asyncio.create_subprocess_exec"},
    "host/child.py": {"os.fork", "os.execvpe"},
    "commands/starter.py": {"os.execv"},  # it becomes condor_starter
}
# What starts a process; asyncio's Process class may be named, since process.py hands it out.
SPAWNING = {
    "os.system",
    "os.popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.posix_spawnp",
    "asyncio.create_subprocess_exec",
    "asyncio.create_subprocess_shell",
    "loop.subprocess_exec",
    "loop.subprocess_shell",
}
SPAWNING_PREFIXES = ("os.spawn", "os.exec", "subprocess.", "multiprocessing.", "pty.")
# What touches the machine. A socket does too, but the probe's own are opened in its namespace by health/traffic.
MACHINE = {"ctypes", "fcntl", "libvirt", "psutil", "pwd", "grp", "pyroute2", "subprocess", "systemd", "shutil", "mmap"}
MACHINE |= {"resource", "syslog"}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is used, called or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def spawns(source: str) -> list[str]:
    tree = ast.parse(source)
    names = [*imported(tree), *called(tree)]
    found = [
        name
        for name in names
        if (name in SPAWNING or name.split(".")[-1].startswith("create_subprocess") or name == "subprocess")
        or name.startswith(SPAWNING_PREFIXES)
    ]
    shells = [
        "shell=True"
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg == "shell"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    return found + shells


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_few_modules_start_processes_and_none_a_shell(module: Path) -> None:
    assert set(spawns(module.read_text())) == SPAWNERS.get(str(module.relative_to(PACKAGE)), set())


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from subprocess import run",
        "import os; os.system('x')",
        "from os import popen",
        "os.spawnlp(0, 'x')",
        "os.execv('x', [])",
        "asyncio.create_subprocess_shell('x')",
        "from asyncio import create_subprocess_exec",
        "start('x', shell=True)",
        "import multiprocessing.pool",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert spawns(source)


@pytest.mark.parametrize(
    "module", [path for path in MODULES if "host" not in path.parts], ids=[name for name in IDS if "host/" not in name]
)
def test_only_the_package_host_touches_the_machine(module: Path) -> None:
    touched = {name.partition(".")[0] for name in imported(ast.parse(module.read_text()))} & MACHINE
    # The starter enters a namespace itself, and loads nothing of ours for that.
    assert touched == ({"ctypes"} if module.name == "starter.py" else set())


NOBODY = 65534
FOREIGN = {"libvirt", "pyroute2", "htcondor", "htcondor2", "classad2", "rich", "systemd", "psutil", "tomli"}
HEAVY = {
    "asyncio",
    "subprocess",
    "dataclasses",
    "argparse",
    "pathlib",
    "typing",
    "tomllib",
    "ctypes",
    "socket",
    "logging",
}


def test_the_hook_imports_little(tmp_path: Path) -> None:
    """A one-shot run to its end, as the startd would start it."""
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
sys.argv = ["vmnode-startd-cron", "--config", {str(tmp_path / "vmnode.toml")!r}]
from vmnode.commands import startd_cron
startd_cron.run_dir_of = lambda config: {str(tmp_path)!r}
startd_cron.main()
print(*sys.modules, sep="\\n", file=sys.stderr)
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert "HasVirshDefaultNetwork = undefined" in ran.stdout
    loaded = set(ran.stderr.split())
    assert "vmnode.commands.startd_cron" in loaded
    assert loaded & (FOREIGN | HEAVY) == set()


def test_the_plugin_imports_little() -> None:
    """One disk, as the job's user, with what the daemon left for it, up to qemu-img, which need not be here."""
    base = Path(tempfile.mkdtemp(prefix="vmnode-test-"))  # tmp_path is closed to others
    try:
        base.chmod(0o755)
        (base / "el9.raw").write_bytes(bytes(512))
        (base / "el9.raw").chmod(0o444)
        (base / "scratch").mkdir()
        (base / "scratch").chmod(0o777)
        parsed = images.Settings((str(base),), (str(base),), (), 5.0)
        (base / "images.json").write_bytes(images.write(parsed, []))
        code = f"""
import os, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
sys.argv = ["vm-nfs-plugin", "nfs://{base}/el9.raw:disk", {str(base / "scratch" / "x")!r}]
from vmnode import images
from vmnode.commands import nfs_plugin
fresh = images.read({str(base / "images.json")!r}, {str(base / "absent" / "vmnode.toml")!r})
assert fresh is not None
images.read = lambda: fresh
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
nfs_plugin.main()
print(*sys.modules, sep="\\n", file=sys.stderr)
"""
        ran = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
    finally:
        shutil.rmtree(base)
    assert "TransferSuccess = true" in ran.stdout or "qemu-img: cannot be started" in ran.stdout
    loaded = set(ran.stderr.split())
    assert "vmnode.host.qemu_img" in loaded
    # typing is there for the sake of NamedTuple.
    assert loaded & (FOREIGN | (HEAVY - {"typing"})) == set()


def test_the_starter_imports_little(tmp_path: Path) -> None:
    """As far as a daemon that does not answer; a job waits for it."""
    code = f"""
import os, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from vmnode.commands import starter
starter.socket_path = lambda config: {f"{tmp_path}/starter.sock"!r}
assert starter.enter_network("slot1_1", "").startswith("vmnoded does not answer at")
print(*sys.modules, sep="\\n")
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    loaded = set(ran.stdout.split())
    assert "vmnode.commands.starter" in loaded
    assert loaded & (FOREIGN | (HEAVY - {"socket"})) == set()


def test_libvirt_is_called_in_the_worker_alone() -> None:
    users = [
        name
        for name, path in zip(IDS, MODULES)
        if {"libvirt"} & {module.partition(".")[0] for module in imported(ast.parse(path.read_text()))}
    ]
    assert users == ["host/libvirt_worker.py"]


def test_the_code_is_python_3_9() -> None:
    for module in MODULES:
        ast.parse(module.read_text(), feature_version=(3, 9))
