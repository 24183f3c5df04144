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


@pytest.mark.parametrize("name", ["nobody-here", "²", "99999999999999999999", "a/../b"])
def test_a_user_that_does_not_exist_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qemu.conf").write_text(f'user = "{name}"\n', encoding="utf-8")
    monkeypatch.setattr(accounts, "QEMU_CONFIGURATION", tmp_path / "qemu.conf")
    assert accounts.qemu_user() is None


def test_without_qemu_s_user_nobody_knows_whether_it_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "qemu_user", lambda: None)
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
