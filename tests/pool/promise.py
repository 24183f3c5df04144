"""What makes a promise about one worker a test on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from tests.pool.worker import Worker

if TYPE_CHECKING:
    from tests.pool.conftest import Pools


def on_every_version(promise: Callable[[Worker], None]) -> Callable[[Pools], None]:
    """The test that keeps `promise` on every version of HTCondor, on a repaired node."""

    def test(pools: Pools) -> None:
        pools.each(promise)

    test.__name__, test.__doc__, test.__module__ = promise.__name__, promise.__doc__, promise.__module__
    return test
