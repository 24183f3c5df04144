"""A line that shows that a long step is alive.

Building a root takes a minute and booting a pool half of one; a silent minute looks like a hang. Steps
that end within two seconds print nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_S = 2.0
"""A step shorter than this is not worth a line."""

PLAIN_EVERY_S = 15.0
"""Between two lines where the line cannot be rewritten (a log file, CI)."""


@contextmanager
def progress(step: str) -> Iterator[None]:
    """Show ``step`` and its elapsed seconds on stderr for as long as the block runs."""
    began = time.monotonic()
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(step, began, done), name="progress", daemon=True)
    ticker.start()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        done.set()
        ticker.join()
        elapsed = time.monotonic() - began
        if elapsed >= QUIET_S:
            rewind = "\r\033[K" if sys.stderr.isatty() else ""
            print(f"{rewind}  {step}: {outcome} after {elapsed:.1f} s", file=sys.stderr, flush=True)


def _tick(step: str, began: float, done: threading.Event) -> None:
    rewrite = sys.stderr.isatty()
    before, after = ("\r\033[K", "") if rewrite else ("", "\n")
    pause = QUIET_S
    while not done.wait(pause):
        elapsed = time.monotonic() - began
        print(f"{before}  {step} … {elapsed:.0f} s", end=after, file=sys.stderr, flush=True)
        pause = 1.0 if rewrite else PLAIN_EVERY_S
