"""The documentation's examples, so that what is shown to people is what is run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def example(page: str, word: str) -> str:
    """The fenced block of a page in docs/ that holds a word; there is one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if word in block]
    assert len(found) == 1, f"{page} has {len(found)} examples that hold {word!r}"
    return found[0]
