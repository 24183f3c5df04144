"""What systemd is told: whatever a condition says, it gets through as one line of UTF-8."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmnode.host import service


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("STATUS=failed: /srv/größe is missing", "STATUS=failed: /srv/größe is missing"),
        ("STATUS=failed: /srv/\udcff is missing", "STATUS=failed: /srv/? is missing"),  # a name that is no UTF-8
        ("STATUS=failed: /srv/\0 is missing", "STATUS=failed: /srv/? is missing"),
        ("STATUS=failed: x\nWATCHDOG=trigger", "STATUS=failed: x?WATCHDOG=trigger"),  # not a second message
    ],
)
def test_a_status_is_one_line_of_utf_8(said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        service.notify(said)
        assert manager.recv(4096).decode() == told
