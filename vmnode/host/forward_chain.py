"""iptables' chain FORWARD, where its policy drops: dockerd sets that when it finds forwarding off, and so does ufw.

An accept in a table of our own does not help against a drop in another: a packet has to pass all of them (nft(8)). So
two rules of ours are appended to the chain. They come after everything that others decide there explicitly, and take
the jobs' packets from the policy only. No rule of others is touched; what drops by a rule is named, not circumvented.
"""

from __future__ import annotations

from vmnode.errors import CommandFailed
from vmnode.host import process

_DEADLINE_S = 5.0
TOOLS = {4: "iptables", 6: "ip6tables"}


async def admit(links: str, version: int) -> bool:
    """Have the chain let through what links with names that begin so send, and the answers; False if it does anyway.

    Costs one call (5 ms) if all is well. Raises CommandFailed or DeadlineExceeded.
    """
    listed = await _list(version)
    if "-P FORWARD DROP" not in listed:
        return False
    for rule in _rules(links):
        if not _holds(listed, rule):
            await _change(version, "-A", rule)
    return True


async def dismiss(links: str, version: int) -> None:
    """Take our rules out again; none is no error."""
    for rule in _rules(links):
        while _holds(await _list(version), rule):
            await _change(version, "-D", rule)


def _rules(links: str) -> tuple[list[str], list[str]]:
    ours = ["-m", "comment", "--comment", "vmnode", "-j", "ACCEPT"]
    answers = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
    return ["-i", f"{links}+", *ours], ["-o", f"{links}+", *answers, *ours]


def _holds(listed: list[str], rule: list[str]) -> bool:
    return any(line.replace('"', "").split()[2:] == rule for line in listed if line.startswith("-A FORWARD "))


async def _list(version: int) -> list[str]:
    """The chain as iptables-save(8) would write it; nothing where there is no iptables."""
    try:
        listed = await process.run([TOOLS[version], "-w", "2", "-S", "FORWARD"], _DEADLINE_S)
    except CommandFailed:
        return []
    return listed.stdout.splitlines() if listed.status == 0 else []


async def _change(version: int, verb: str, rule: list[str]) -> None:
    done = await process.run([TOOLS[version], "-w", "2", verb, "FORWARD", *rule], _DEADLINE_S)
    if done.status != 0:
        raise CommandFailed(f"{TOOLS[version]}: the chain FORWARD cannot be changed: {done.stderr.strip()}")
