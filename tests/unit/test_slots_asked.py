"""The startd is asked once for all who come meanwhile, and never answered from before they came."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmnode.accounting.admission import Admission
from vmnode.errors import CommandFailed
from vmnode.host import condor


def test_those_who_come_while_the_startd_is_asked_share_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[asyncio.Future[str]] = []

    async def slots(address_file: Path, exempt: str) -> str:
        asked.append(asyncio.get_running_loop().create_future())
        return await asked[-1]

    monkeypatch.setattr(condor, "slots", slots)

    async def scene() -> list[object]:
        no_books: Any = None  # only the startd is asked here
        admission = Admission(no_books, "false", 1500, (), lambda: None)
        first = asyncio.ensure_future(admission._slots(Path("/x")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = [asyncio.ensure_future(admission._slots(Path("/x"))) for _ in range(100)]
        await asyncio.sleep(0)
        asked[0].set_result("old")
        assert await first == "old"
        while len(asked) < 2:
            await asyncio.sleep(0)
        asked[1].set_exception(CommandFailed("the startd does not answer"))
        return await asyncio.gather(*later, return_exceptions=True)

    answers = asyncio.run(scene())
    assert len(asked) == 2
    assert [str(answer) for answer in answers] == ["the startd does not answer"] * 100
