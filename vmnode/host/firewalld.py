"""firewalld: the zone that the jobs' links are in (firewalld.dbus(5)).

firewalld refuses what it forwards for a link in no zone. Our package brings a zone with target ACCEPT that all the
jobs' links are bound to by name (firewalld/vmnode.xml), so that with it nothing has to be done here: a reload or a
restart cannot lose it, and spoofed source addresses from elsewhere are in no zone of ours. Where firewalld does not
know it, because it has not been reloaded since the package came, or because we run from a checkout, our links are
bound to the zone "trusted" until the next reload. Zones cannot be made at run time.

Lasting configuration is never written, and a binding that an administrator chose stands, whatever the zone does.
"""

from __future__ import annotations

import re
from typing import Optional

from vmnode.errors import CommandFailed
from vmnode.host import process

EVERY_JOB = "vmnj+"  # a trailing "+" is firewalld's wildcard, in both of its backends
OUR_ZONE, BUILTIN_ZONE = "vmnode", "trusted"
_SERVICE = "org.fedoraproject.FirewallD1"
_ZONES = (_SERVICE, "/org/fedoraproject/FirewallD1", f"{_SERVICE}.zone")
_BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
_DEADLINE_S = 10.0  # during a reload it answers when it is done


async def admit(links: str) -> Optional[str]:
    """Have the links whose names begin with `links` in a zone, and return its name; None where no firewalld runs.

    Costs one call (20 ms) if all is well. Raises CommandFailed or DeadlineExceeded, as during firewalld's start.
    """
    if not await _runs():
        return None
    for name in (EVERY_JOB, f"{links}+"):
        for bound in await _ask("getZoneOfInterface", name):
            return bound
    zone = OUR_ZONE if OUR_ZONE in await _ask("getZones") else BUILTIN_ZONE
    return (await _ask("addInterface", zone, f"{links}+", unless="ZONE_ALREADY_SET"))[0]


async def dismiss(links: str) -> None:
    """Undo what `admit` bound at run time; nothing is no error."""
    if await _runs():
        for zone in await _ask("getZoneOfInterface", f"{links}+"):
            await _ask("removeInterface", zone, f"{links}+", unless="UNKNOWN_INTERFACE")


async def _runs() -> bool:
    """Without starting it: a message to a name that nobody has would, if the service can be activated."""
    try:
        asked = await _call(_BUS, "NameHasOwner", _SERVICE)
    except CommandFailed:  # no busctl: without systemd there is no firewalld
        return False
    return asked.status == 0 and asked.stdout.split() == ["b", "true"]  # otherwise there is no bus


async def _ask(method: str, *words: str, unless: str = "") -> list[str]:
    """The strings in the answer that are not empty. An error whose name is `unless` is no error."""
    asked = await _call(_ZONES, method, *words)
    if asked.status != 0 and not (unless and unless in asked.stderr):
        raise CommandFailed(f"firewalld: {method} {' '.join(words)}: {asked.stderr.strip()}".rstrip(": "))
    return [text for text in re.findall(r'"([^"]*)"', asked.stdout) if text] or list(words[:1] if unless else ())


async def _call(whom: tuple[str, str, str], method: str, *words: str) -> process.Finished:
    signature = ("s" * len(words),) if words else ()
    return await process.run(
        ["busctl", "--system", "--auto-start=no", "call", *whom, method, *signature, *words], _DEADLINE_S
    )
