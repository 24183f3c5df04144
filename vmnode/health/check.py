"""One check of the whole node: probe after probe, in the order in which a guest would need them.

A probe whose prerequisite is broken does not run; its observation is `unknown` and names the first broken link.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Callable, Optional

from vmnode.conditions import NAMES, Observation, Status, disabled, failed, ok, unknown
from vmnode.config import Config
from vmnode.errors import DeadlineExceeded, VmnodeError
from vmnode.health import applies, machine, network
from vmnode.health.decide import blocked, blocked_by
from vmnode.health.traffic import GuestTraffic
from vmnode.host import condor, dnsmasq, firewall, links
from vmnode.host.libvirt import SOCKETS, Libvirt, LibvirtError, VirtualNetwork

DEFAULT_EXECUTE = FilePath("/var/lib/condor/execute")


@dataclass(frozen=True)
class Plan:
    """What this check does beyond the cheap part."""

    fresh_dhcp: bool  # ask for an address as a guest that dnsmasq has never seen
    outbound: bool  # connect to the targets


EVERYTHING = Plan(fresh_dhcp=True, outbound=True)


@dataclass
class Result:
    """What a check saw. Conditions that it did not judge are missing from `observations`."""

    observations: dict[str, Observation] = field(default_factory=dict)
    image_roots: tuple[FilePath, ...] = ()
    links: frozenset[int] = frozenset()  # whose changes call for the next check
    dnsmasq_pid: Optional[int] = None

    def add(self, observation: Observation) -> None:
        self.observations.setdefault(observation.name, observation)


class Checker:
    """Keeps what lasts between checks: the libvirt worker and the probe on the bridge.

    `identity` keeps the probes of several instances apart; `on_event` hears of libvirt's events.
    """

    def __init__(
        self,
        config: Config,
        identity: str,
        on_event: Callable[[str], None] = lambda _event: None,
        progress: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._config = config
        self._progress = progress
        self._libvirt = Libvirt(config.libvirt.uri, config.libvirt.timeout_s, on_event)
        self._traffic = GuestTraffic(identity, progress)
        self._tag = hashlib.sha256(identity.encode()).hexdigest()[:8]

    async def check(self, plan: Plan) -> Result:
        result = Result()
        knobs: Mapping[str, str] = {}
        if self._config.health.enabled:
            knobs = await condor.settings(applies.CONDOR_KNOBS)
        for name, why in applies.not_applicable(self._config, knobs).items():
            result.add(disabled(name, why))
        execute = self._config.execute.dir or FilePath(knobs.get("EXECUTE") or DEFAULT_EXECUTE)
        await asyncio.gather(
            self._judge(result, "kvm", machine.observe_kvm),
            self._judge(
                result, "execute-dir", lambda: machine.observe_execute_dir(execute, self._config.execute.min_free)
            ),
            self._judge(result, "qemu-img", machine.observe_qemu_img),
            self._judge(result, "images", lambda: self._images(result)),
            self._network(result, plan, knobs),
        )
        return result

    async def _judge(self, result: Result, name: str, probe: Callable[[], Awaitable[Observation]]) -> None:
        """Run one probe, unless the condition does not apply or cannot be judged."""
        if name in result.observations:
            return
        broken = blocked_by(name, result.observations)
        if broken is not None:
            result.add(blocked(name, result.observations[broken]))
            return
        try:
            result.add(await probe())
        except (VmnodeError, OSError) as error:
            result.add(unknown(name, "ProbeFailed", str(error).partition("\n")[0], getattr(error, "hint", "")))

    async def _images(self, result: Result) -> Observation:
        images = self._config.images
        observation, result.image_roots = await machine.observe_images(images.roots, images.timeout_s)
        return observation

    # --- the chain of the virtual network ------------------------------------------------------------------------

    async def _network(self, result: Result, plan: Plan, knobs: Mapping[str, str]) -> None:
        name = self._config.network.name
        found: Optional[VirtualNetwork] = None
        bridge: Optional[links.Bridge] = None

        async def observe_libvirt() -> Observation:
            nonlocal found
            try:
                found = await self._libvirt.network(name)
            except DeadlineExceeded as error:
                return failed("libvirt", "Hung", error.what, f"systemctl restart {_daemon()} once no VM job runs")
            except LibvirtError as error:
                return failed("libvirt", "NoConnection", error.what, f"systemctl status {_daemon()}.socket")
            return ok("libvirt", f"{self._config.libvirt.uri} answers")

        await self._judge(result, "libvirt", observe_libvirt)
        await self._judge(result, "network.active", _soon(lambda: network.judge_active(name, found)))
        if found is not None:
            for condition, why in applies.not_on_this_network(found).items():
                result.add(disabled(condition, why))
        # From here on a probe runs only if network.active is ok, so that `found` is there.
        if found is None or result.observations["network.active"].status is not Status.OK:
            for condition in NAMES:
                if condition.startswith("network."):
                    await self._judge(result, condition, _soon(lambda: unknown("", "", "")))
            return
        here = found

        async def observe_bridge() -> Observation:
            nonlocal bridge
            bridge = await asyncio.to_thread(links.bridge, here.bridge)
            uplink = await asyncio.to_thread(links.default_route_link)
            result.links = frozenset(
                index for index in (bridge.index if bridge else None, uplink) if index is not None and bridge
            )
            return network.judge_bridge(here, bridge)

        async def observe_dnsmasq() -> Observation:
            process = dnsmasq.find(here.pid_file)
            result.dnsmasq_pid = process.pid if process else None
            return network.judge_dnsmasq(here, process)

        async def observe_dhcp() -> Observation:
            assert bridge is not None
            return await self._traffic.ask_for_address(here, bridge.index, plan.fresh_dhcp)

        async def observe_dns() -> Observation:
            assert here.gateway is not None
            return await self._traffic.ask_name_server(here.gateway.ip)

        await self._judge(result, "network.bridge", observe_bridge)
        await self._judge(result, "network.dnsmasq", observe_dnsmasq)
        await self._judge(result, "network.dhcp", observe_dhcp)
        await self._judge(result, "network.dns", observe_dns)
        await self._way_out(result, plan, here, knobs)

    async def _way_out(self, result: Result, plan: Plan, here: VirtualNetwork, knobs: Mapping[str, str]) -> None:
        targets = applies.targets_of(self._config, knobs)
        if not targets:
            result.add(
                disabled("network.outbound", "no target is known ([network] targets, HTCondor's COLLECTOR_HOST)")
            )
        path: Optional[network.Path] = None

        async def observe_forwarding() -> Observation:
            nonlocal path
            assert here.gateway is not None
            translates = await firewall.nat_rule_exists(here.gateway.network) if here.forward_mode == "nat" else None
            path = network.Path(here.bridge, links.forwards(here.bridge), translates)
            can_try = "network.outbound" not in result.observations and (
                result.observations["network.dhcp"].status is Status.OK
            )
            if can_try and (plan.outbound or network.suspicion(path) is not None):
                path = await self._try_targets(path, targets)
            return network.judge_path(path)[0]

        await self._judge(result, "network.forwarding", observe_forwarding)
        outbound = network.judge_path(path)[1] if path is not None else None

        async def observe_outbound() -> Observation:
            assert outbound is not None
            return outbound

        if outbound is not None or blocked_by("network.outbound", result.observations) is not None:
            await self._judge(result, "network.outbound", observe_outbound)

    async def _try_targets(self, path: network.Path, targets: applies.Targets) -> network.Path:
        """Connect as a guest; where that fails also as the host, and find out who drops the packets."""
        path = replace(path, guest=await self._traffic.connect(targets, from_host=False))
        if any(not attempt.result.reason for attempt in path.guest):
            return path
        path = replace(path, host=await self._traffic.connect(targets, from_host=True))
        if network.suspicion(path) is not None or not network.forwarding_is_the_fault(path):
            return path
        assert self._traffic.port.address is not None
        self._progress("looking for the rule that drops the packets")
        source = str(self._traffic.port.address.ip)
        reached = next(attempt.target for attempt in path.host if not attempt.result.reason)
        async with firewall.DropTrace(self._tag, path.bridge, source, reached.port) as trace:
            await self._traffic.connect([reached], from_host=False)
        return replace(path, culprit=trace.culprit)

    async def close(self) -> None:
        """Give back the lease, let the port go, end the worker."""
        await self._traffic.close()
        await self._libvirt.close()


def _soon(judge: Callable[[], Observation]) -> Callable[[], Awaitable[Observation]]:
    async def probe() -> Observation:
        return judge()

    return probe


def _daemon() -> str:
    """Which of libvirt's daemons this node runs: the modular ones have a socket of their own."""
    return next((daemon for daemon, socket in SOCKETS.items() if socket.exists()), "libvirtd")
