"""The machine's own conditions, where an administrator's files are not as they should be."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from vmnode.errors import CommandFailed
from vmnode.health import machine
from vmnode.host import accounts, libvirt


def test_qemu_s_user_is_the_one_to_whom_libvirt_gave_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "QEMU_DIRECTORY", tmp_path)
    found = accounts.qemu()
    assert found is not None
    assert (found.uid, found.gid) == (tmp_path.stat().st_uid, tmp_path.stat().st_gid)
    assert found.gid in found.groups


def test_without_qemu_s_user_nobody_knows_whether_it_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "QEMU_DIRECTORY", tmp_path / "missing")
    seen = asyncio.run(machine.observe_execute_dir(tmp_path, 0))
    assert (seen.name, seen.status.value, seen.reason) == ("execute-dir", "unknown", "NoQemuUser")


def test_a_worker_that_is_killed_says_nothing_about_libvirt() -> None:
    async def ask_and_kill() -> None:
        asked = libvirt.Libvirt("test:///default", 20, lambda _: None)
        question = asyncio.ensure_future(asked.network("default"))
        while asked._worker is None:
            await asyncio.sleep(0.001)
        os.kill(asked._worker.pid, signal.SIGKILL)
        try:
            with pytest.raises(CommandFailed, match="the libvirt worker ended"):
                await question
        finally:
            await asked.close()

    asyncio.run(ask_and_kill())
