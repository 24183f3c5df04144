"""What counts and leads the jobs' packets, planned from the configuration and the host as it is."""

from __future__ import annotations

import contextlib
import logging
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Optional

from vmnode.accounting import addresses, lan
from vmnode.config import Accounting
from vmnode.errors import CommandFailed, DeadlineExceeded, VmnodeError
from vmnode.host import iptables, links, uplink
from vmnode.host.counting import Counters, Rules
from vmnode.host.iptables import IptablesCounters
from vmnode.host.nftables import NftablesCounters

log = logging.getLogger("vmnoded")


def plan(settings: Accounting, run_dir: Path) -> Rules:
    """The rules, with forwarding switched on for them. Raises VmnodeError if jobs could have no network."""
    tag = addresses.tag(str(run_dir))
    prefix = addresses.prefix(tag)
    pool4 = IPv4Network(settings.pool4)
    pool6 = _pool6(settings)
    pools: list[uplink.Prefix] = [pool4] if pool6 is None else [pool4, pool6]
    for pool in pools:
        route = uplink.overlapping(pool, prefix)
        if route is not None:
            key = f"pool{pool.version}"
            what = f"[accounting] {key} {pool} overlaps the host's route {route}"
            raise VmnodeError(what, f"choose another {key}")
        uplink.forward(pool.version)
    return with_host(Rules(tag, prefix, pool4, pool6, (), ()), settings)


def with_host(rules: Rules, settings: Accounting) -> Rules:
    """The same with the host's addresses as they are now."""
    pools = [pool for pool in (rules.pool4, rules.pool6) if pool is not None]
    # The gateway's address comes and goes with the jobs.
    own = [text for text in links.local_addresses() if not any(ip_address(text) in pool for pool in pools)]
    lan4, lan6 = lan.prefixes(settings.lan, map(str, pools), own)
    return rules._replace(lan4=lan4, lan6=lan6)


def _pool6(settings: Accounting) -> Optional[IPv6Network]:
    """Jobs have IPv6 where the host has a way out by it, and does not lose that by forwarding."""
    if not uplink.default_routes(6):
        return None
    lost = uplink.lost_by_forwarding()
    if lost is None:
        return IPv6Network(settings.pool6)
    log.warning(
        "accounting: jobs have no IPv6: if this host forwarded it, it would lose its default route %s"
        " (hint: sysctl net.ipv6.conf.%s.accept_ra=2)",
        lost,
        lost.links[0],
    )
    return None


async def set_up(backend: str, rules: Rules) -> tuple[Counters, str, bool]:
    """What counts by these rules, its name, and whether the rules were there already. Raises VmnodeError."""
    why = ""
    nftables, with_ipset = NftablesCounters(rules.tag), IptablesCounters(rules.tag)
    if backend != "iptables":
        try:
            undisturbed = await nftables.set_up(rules)
        except CommandFailed as error:
            if backend == "nftables":
                raise
            why = f"{error.what}; "
        else:
            await _leave(with_ipset)
            return nftables, "nftables", undisturbed
    obstacle = await iptables.obstacle(rules)
    if obstacle is not None:
        raise VmnodeError(f"nothing here can count the jobs' packets: {why}{obstacle}", "install nftables, or ipset")
    undisturbed = await with_ipset.set_up(rules)
    await _leave(nftables)
    return with_ipset, "iptables", undisturbed


async def _leave(counters: Counters) -> None:
    """What another configuration made would count beside us, and translate."""
    with contextlib.suppress(CommandFailed, DeadlineExceeded):  # it may not even be installed
        await counters.tear_down()
