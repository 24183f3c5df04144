"""What HTCondor's configuration says about this node."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vmnode.errors import CommandFailed
from vmnode.host import child, process

_DEADLINE_S = 10.0
_CLAIM_DEADLINE_S = 1.5  # a starter waits for the answer


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


async def startd_address_file() -> Optional[Path]:
    """Where the local startd writes its address; None where HTCondor is not installed. Raises as `settings` does."""
    text = (await settings(["STARTD_ADDRESS_FILE"])).get("STARTD_ADDRESS_FILE", "")
    return Path(text) if text else None


class Claim(NamedTuple):
    """Whom a slot works for, as the startd knows it."""

    job: str  # GlobalJobId
    owner: str
    universe: Optional[int]
    exempt: bool
    docker: bool  # dockerd runs it, and gives it a network


async def slots(address_file: Path, exempt: str) -> str:
    """What the local startd's ads say, for `claim_of`. HTCondor evaluates `exempt`, a ClassAd expression.

    Asked of the startd itself, which answers as a collector does: the collector's copy is old. `address_file` is its
    STARTD_ADDRESS_FILE. Raises DeadlineExceeded, and CommandFailed if it does not answer.
    """
    try:
        address = direct(address_file.read_text(encoding="utf-8").partition("\n")[0])
    except OSError as error:
        raise CommandFailed(f"the startd's address is not known: {address_file}: {error.strerror}") from None
    words = ["Name", "GlobalJobId", "RemoteOwner", "JobUniverse", f"({exempt}) =?= true", "WantDocker =?= true"]
    finished = await process.run(
        ["condor_status", "-pool", address, "-af:tV", *words], _CLAIM_DEADLINE_S, environment=_environment()
    )
    if finished.status != 0:
        said = finished.stderr.strip().partition("\n")[0]
        raise CommandFailed(f"the startd does not tell about its slots: condor_status: {said}")
    return finished.stdout


def claim_of(said: str, slot: str) -> Claim:
    """Whom `slot` ("slot1_1") works for. Raises CommandFailed if it is not claimed."""
    for line in said.splitlines():
        found = parse_claim(line, slot)
        if found is not None:
            return found
    raise CommandFailed(f"the startd knows no claimed slot {slot}")


def direct(address: str) -> str:
    """A daemon's address without the ways that go round by others, which only those take who are elsewhere."""
    host, question, parameters = address.strip("<>").partition("?")
    kept = [word for word in parameters.split("&") if word.partition("=")[0] not in ("CCBID", "PrivNet", "PrivAddr")]
    return f"<{host}{question}{'&'.join(kept)}>"


def parse_claim(line: str, slot: str) -> Optional[Claim]:
    """One line of the table; None if it is of another slot or of one that no job has."""
    name, job, owner, universe, exempt, docker = [*line.split("\t"), "", "", "", "", ""][:6]
    if name.strip('"').partition("@")[0] != slot or not job.startswith('"'):
        return None
    number = int(universe) if universe.isdecimal() else None
    return Claim(job.strip('"'), owner.strip('"'), number, exempt == "true", docker == "true")


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
