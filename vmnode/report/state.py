"""What is known, as JSON: for people's scripts, and as the one file through which the daemon speaks.

state.json    what `vmnode status --json` prints, and beside it
              "classad"    the lines that the startd gets
              "checked"    the moment of the last check on all three clocks
              "max_age_s"  how long all of this holds
              and in each condition "since_boot", "contrary": what the next daemon needs to go on
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmnode.conditions import BY_NAME, Condition, Now, Status
from vmnode.errors import StateError
from vmnode.health.decide import state_of
from vmnode.report import classad

VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """The verdicts of one check, and when it ended."""

    conditions: tuple[Condition, ...]
    image_roots: tuple[Path, ...]
    checked: Now

    def expired(self, why: str) -> Snapshot:
        """The same verdicts, which no longer hold."""
        return replace(
            self,
            conditions=tuple(
                condition
                if condition.status is Status.DISABLED
                else replace(
                    condition,
                    status=Status.UNKNOWN,
                    reason="Expired",
                    message=f"was {condition.status.value}: {condition.message}",
                    hint=why,
                    contrary=0,
                )
                for condition in self.conditions
            ),
        )

    def age_s(self, now: Now) -> float:
        """Seconds since the check, by a clock that nobody steps; infinite if of another boot or from the future."""
        age = now.boot - self.checked.boot
        return age if now.boot_id == self.checked.boot_id and age >= 0 else float("inf")


def wall_time(boot: float, now: Now) -> float:
    """The Unix time of a CLOCK_BOOTTIME of this boot, as the wall clock stands now."""
    return now.wall - (now.boot - boot)


def document(snapshot: Snapshot, now: Now) -> dict[str, Any]:
    """What `--json` prints."""
    conditions: Sequence[Condition] = snapshot.conditions
    return {
        "version": VERSION,
        "host": socket.gethostname(),
        "checked_at": round(wall_time(snapshot.checked.boot, now), 3),
        "state": state_of(conditions),
        "conditions": [
            {
                "name": condition.name,
                "status": condition.status.value,
                "reason": condition.reason,
                "message": condition.message,
                "hint": condition.hint,
                "since": round(wall_time(condition.since, now), 3),
            }
            for condition in conditions
        ],
        "attributes": classad.attributes(conditions, snapshot.image_roots),
    }


def write(snapshot: Snapshot, max_age_s: float) -> bytes:
    """The contents of the state file."""
    now = snapshot.checked
    state = document(snapshot, now)
    for entry, condition in zip(state["conditions"], snapshot.conditions):
        entry.update(since_boot=condition.since, contrary=condition.contrary)
    state.update(
        classad=classad.machine_ad(state["attributes"], now.wall, max_age_s),
        checked=now._asdict(),
        max_age_s=max_age_s,
    )
    return json.dumps(state, indent=1).encode() + b"\n"


def read(data: bytes) -> tuple[Snapshot, float]:
    """The snapshot in a state file, and for how many seconds it holds; raises StateError."""
    try:
        state = json.loads(data)
        if state["version"] != VERSION:
            raise StateError(f"the state file has version {state['version']!r}, this program reads version {VERSION}")
        snapshot = Snapshot(
            conditions=tuple(
                Condition(
                    name=_text(entry["name"]),
                    status=Status(entry["status"]),
                    reason=_text(entry["reason"]),
                    message=_text(entry["message"]),
                    hint=_text(entry["hint"]),
                    since=_number(entry["since_boot"]),
                    contrary=int(_number(entry["contrary"])),
                )
                for entry in state["conditions"]
                if entry["name"] in BY_NAME
            ),
            image_roots=tuple(Path(_text(root)) for root in state["attributes"]["VMNodeImageRoots"]),
            checked=Now(
                _number(state["checked"]["wall"]), _number(state["checked"]["boot"]), _text(state["checked"]["boot_id"])
            ),
        )
        return snapshot, _number(state["max_age_s"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StateError(f"the state file cannot be understood: {error!r}") from None


def _number(value: Any) -> float:
    """A number that can be compared: json takes NaN and Infinity too, and for those every age is a fresh one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"a number was expected, not {value!r}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string was expected, not {value!r}")
    return value
