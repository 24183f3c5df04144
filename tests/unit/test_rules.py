"""The rules that a reader of one file cannot see broken: who spawns, who touches the machine, what is hot."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vmnode"
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]

SPAWNER = PACKAGE / "host" / "process.py"
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
def test_only_one_module_starts_processes_and_none_a_shell(module: Path) -> None:
    found = spawns(module.read_text())
    if module == SPAWNER:
        assert set(found) == {"asyncio.create_subprocess_exec"}
    else:
        assert found == []


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
    assert {name.partition(".")[0] for name in imported(ast.parse(module.read_text()))} & MACHINE == set()


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
