"""What HTCondor's configuration says about this node."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence

from vmnode.errors import CommandFailed
from vmnode.host import child, process

_DEADLINE_S = 10.0


async def settings(names: Sequence[str]) -> Mapping[str, str]:
    """Those of `names` that HTCondor knows, expanded, as the startd sees them; one that is not set has the value "".

    Empty where HTCondor is not installed. Raises DeadlineExceeded, and CommandFailed where its configuration is broken.
    """
    patterns = [f"^{name}$" for name in names]
    if shutil.which("condor_config_val", path=child.ENVIRONMENT["PATH"]) is None:
        return {}
    finished = await process.run(
        ["condor_config_val", "-subsystem", "STARTD", "-dump", "-expand", *patterns],
        _DEADLINE_S,
        environment=_environment(),
    )
    if finished.status != 0:
        raise CommandFailed(
            f"condor_config_val ended with status {finished.status}: {finished.stderr.strip()}",
            "HTCondor's own configuration is broken: run condor_config_val -dump",
        )
    return parse_dump(finished.stdout)


async def push_slot_ads() -> None:
    """Have the local startd send its slot ads to the collector now, and not at its next UPDATE_INTERVAL.

    Any attribute would do: the startd sends its ads whenever one is set (condor_update_machine_ad(1)). Raises
    DeadlineExceeded and CommandFailed; it takes authorization at the level WRITE, which root and condor have.
    """
    finished = await process.run(
        ["condor_update_machine_ad"],
        _DEADLINE_S,
        environment=_environment(),
        text=f"VMNodePushed = {time.time():.0f}\n",
    )
    if finished.status != 0:
        raise CommandFailed(
            f"condor_update_machine_ad ended with status {finished.status}: {finished.stderr.strip()}",
            "may this user WRITE to the startd? see ALLOW_WRITE and STARTD.ALLOW_WRITE",
        )


def _environment() -> dict[str, str]:
    """HTCondor's tools find their configuration as the caller would."""
    return {name: os.environ[name] for name in ("CONDOR_CONFIG",) if name in os.environ}


def parse_dump(text: str) -> Mapping[str, str]:
    """The `NAME = value` lines of `condor_config_val -dump`; its comments start with #."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name.strip().upper()] = value.strip()
    return found
