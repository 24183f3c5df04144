"""One check of the whole node: probe after probe, in the order in which a guest would need them.

A probe whose prerequisite is broken does not run; its observation is `unknown` and names the first broken link.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Optional

from vmnode import overlays
from vmnode.conditions import Observation, Status, disabled, failed, ok, unknown
from vmnode.config import Config
from vmnode.errors import DeadlineExceeded, VmnodeError
from vmnode.health import applies, bases, machine, network
from vmnode.health.decide import blocked, blocked_by
from vmnode.health.traffic import TRACE_DEADLINE_S, GuestTraffic
from vmnode.host import condor, dnsmasq, firewall, links, uplink
from vmnode.host.libvirt import SOCKETS, Libvirt, LibvirtError, VirtualNetwork
from vmnode.host.starter_socket import FILE as SOCKET

log = logging.getLogger("vmnoded")

DEFAULT_EXECUTE = Path("/var/lib/condor/execute")


@dataclass(frozen=True)
class Plan:
    """What this check does beyond the cheap part."""

    fresh_dhcp: bool  # ask for an address as a guest that dnsmasq has never seen
    outbound: bool  # connect to the targets


EVERYTHING = Plan(fresh_dhcp=True, outbound=True)


@dataclass(frozen=True)
class Result:
    """What a check saw. Conditions that it did not judge are missing from `observations`."""

    observations: dict[str, Observation]
    image_roots: tuple[Path, ...]  # those that answer
    links: frozenset[int]  # whose changes call for the next check
    dnsmasq_pid: Optional[int]  # whose death calls for the next check
    asked_afresh: Optional[float]  # when a new guest's DHCP question was last sent (CLOCK_BOOTTIME)


class Checker:
    """Keeps what lasts between checks: the libvirt worker and the probe on the bridge.

    `identity` keeps the probes of several instances apart; `on_event` hears of libvirt's events; `progress` is told
    what a person has to wait for.
    """

    def __init__(
        self,
        config: Config,
        identity: str,
        on_event: Callable[[str], None] = lambda _event: None,
        progress: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.config = config
        self.progress = progress
        self.libvirt = Libvirt(config.libvirt.uri, config.libvirt.timeout_s, on_event)
        self.traffic = GuestTraffic(identity, progress)
        self.knobs: Mapping[str, str] = {}  # HTCondor's, as they could last be read
        self.complaint = ""
        self.domains: frozenset[str] = frozenset()  # that ran at the last check
        self.tag = hashlib.sha256(identity.encode()).hexdigest()[:8]

    async def check(self, plan: Plan) -> Result:
        if self.config.health.enabled:
            await self.ask_condor()
        return await _Round(self, plan, self.knobs).run()

    async def ask_condor(self) -> None:
        """Read HTCondor's settings. While that is impossible the last ones stay in force, as in the startd itself."""
        complaint = ""
        try:
            self.knobs = await condor.settings(applies.CONDOR_KNOBS)
        except VmnodeError as error:
            complaint = str(error)
        if complaint and complaint != self.complaint:
            log.warning("going on with HTCondor's settings as they were: %s", complaint)
        self.complaint = complaint

    async def close(self) -> None:
        """Give back the lease, let the port go, end the worker."""
        await self.traffic.close()
        await self.libvirt.close()


class _Round:
    """One check in progress: what was seen so far, and the probes, in the order in which `run` calls them."""

    def __init__(self, checker: Checker, plan: Plan, knobs: Mapping[str, str]) -> None:
        self.config = checker.config
        self.libvirt = checker.libvirt
        self.traffic = checker.traffic
        self.checker = checker
        self.plan = plan
        self.targets = applies.targets_of(self.config, knobs)
        self.execute = self.config.execute.dir or Path(knobs.get("EXECUTE") or DEFAULT_EXECUTE)
        self.seen: dict[str, Observation] = {}
        self.leave_out(applies.not_applicable(self.config, knobs))
        self.image_roots: tuple[Path, ...] = ()
        self.network: Optional[VirtualNetwork] = None
        self.bridge: Optional[links.Bridge] = None
        self.uplink: Optional[int] = None
        self.dnsmasq: Optional[dnsmasq.Dnsmasq] = None
        self.outbound: Optional[Observation] = None

    async def run(self) -> Result:
        await asyncio.gather(
            self.judge("kvm", machine.observe_kvm),
            self.judge("execute-dir", self.observe_execute_dir),
            self.judge("qemu-img", machine.observe_qemu_img),
            self.judge("images", self.observe_images),
            self.judge("conntrack", self.observe_conntrack),
            self.judge("accounting", self.observe_accounting),
            self.follow_the_chain(),
        )
        await self.judge_bases()
        watched = {self.bridge.index, self.uplink} if self.bridge is not None else set()
        return Result(
            observations=self.seen,
            image_roots=self.image_roots,
            links=frozenset(index for index in watched if index is not None),
            dnsmasq_pid=self.dnsmasq.pid if self.dnsmasq is not None else None,
            asked_afresh=self.traffic.asked_afresh,
        )

    async def follow_the_chain(self) -> None:
        """From libvirt to the world outside, as a guest would come to depend on each link."""
        await self.judge("libvirt", self.observe_libvirt)
        await self.judge("network.active", self.observe_active)
        if self.network is not None:
            self.leave_out(applies.not_on_this_network(self.network))
        if not self.targets:
            self.leave_out({"network.outbound": "no target is known ([network] targets, HTCondor's COLLECTOR_HOST)"})
        await self.judge("network.bridge", self.observe_bridge)
        await self.judge("network.dnsmasq", self.observe_dnsmasq)
        await self.judge("network.dhcp", self.observe_dhcp)
        await self.judge("network.dns", self.observe_dns)
        await self.judge("network.forwarding", self.observe_forwarding)
        await self.judge("network.outbound", self.observe_outbound)

    async def judge(self, name: str, probe: Callable[[], Awaitable[Optional[Observation]]]) -> None:
        """Run one probe, unless its condition does not apply or cannot be judged."""
        if name in self.seen:
            return
        broken = blocked_by(name, self.seen)
        if broken is not None:
            self.seen[name] = blocked(name, self.seen[broken])
            return
        try:
            observation = await probe()
        except (VmnodeError, OSError) as error:
            message, hint = (error.what, error.hint) if isinstance(error, VmnodeError) else (str(error), "")
            observation = unknown(name, "ProbeFailed", message, hint)
        if observation is not None:
            self.seen[name] = observation

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        for name, why in reasons.items():
            self.seen.setdefault(name, disabled(name, why))

    # --- the machine ----------------------------------------------------------------------------------------------

    async def observe_execute_dir(self) -> Observation:
        return await machine.observe_execute_dir(self.execute, self.config.execute.min_free)

    async def observe_images(self) -> Observation:
        images = self.config.images
        observation, self.image_roots = await machine.observe_images(images.roots, images.timeout_s)
        return observation

    async def observe_conntrack(self) -> Observation:
        return machine.judge_conntrack(uplink.conntrack())

    async def observe_accounting(self) -> Observation:
        return await machine.observe_accounting(self.config.paths.run_dir / SOCKET)

    async def judge_bases(self) -> None:
        """The image roots may answer, and an image in them have changed. Needs to know which guests run."""
        directory = self.config.paths.state_dir / overlays.DIRECTORY
        running = self.libvirt.domains
        if running is None:  # libvirt was not asked, or does not answer
            alive = [overlay for _, overlay in bases.recorded(directory)]
        else:
            alive = bases.forget_ended(directory, running, self.checker.domains)
            self.checker.domains = running
        if self.seen["images"].status is Status.OK:
            self.seen["images"] = await bases.observe(alive, self.config.images.timeout_s) or self.seen["images"]

    # --- the virtual network --------------------------------------------------------------------------------------

    async def observe_libvirt(self) -> Observation:
        try:
            self.network = await self.libvirt.network(self.config.network.name)
        except DeadlineExceeded as error:
            return failed("libvirt", "Hung", error.what, f"systemctl restart {_daemon()} once no VM job runs")
        except LibvirtError as error:
            return failed("libvirt", "NoConnection", error.what, f"systemctl status {_daemon()}.socket")
        return ok("libvirt", f"{self.config.libvirt.uri} answers")

    async def observe_active(self) -> Observation:
        return network.judge_active(self.config.network.name, self.network)

    @property
    def here(self) -> VirtualNetwork:
        """The network, in probes that run only if network.active is ok."""
        assert self.network is not None
        return self.network

    async def observe_bridge(self) -> Observation:
        self.bridge = await asyncio.to_thread(links.bridge, self.here.bridge)
        self.uplink = await asyncio.to_thread(links.default_route_link)
        return network.judge_bridge(self.here, self.bridge)

    async def observe_dnsmasq(self) -> Observation:
        self.dnsmasq = dnsmasq.find(self.here.pid_file)
        return network.judge_dnsmasq(self.here, self.dnsmasq)

    async def observe_dhcp(self) -> Observation:
        assert self.bridge is not None
        return await self.traffic.ask_for_address(self.here, self.bridge.index, self.plan.fresh_dhcp)

    async def observe_dns(self) -> Observation:
        assert self.here.gateway is not None
        return await self.traffic.ask_name_server(self.here.gateway.ip)

    async def observe_forwarding(self) -> Observation:
        """Judges the way out as a whole: only packets tell whether a rule is really missed."""
        translates, unread = None, False
        if self.here.forward_mode == "nat" and self.here.gateway is not None:
            translates = await firewall.nat_rule_exists(self.here.gateway.network)
            unread = translates is None
        path = network.Path(self.here.bridge, links.forwards(self.here.bridge), translates, unread=unread)
        has_address = "network.outbound" not in self.seen and self.seen["network.dhcp"].status is Status.OK
        if has_address and (self.plan.outbound or unread or network.suspicion(path) is not None):
            path = await self.try_targets(path)
        forwarding, self.outbound = network.judge_path(path)
        return forwarding

    async def observe_outbound(self) -> Optional[Observation]:
        return self.outbound

    async def try_targets(self, path: network.Path) -> network.Path:
        """Connect as a guest; where that fails also as the host, and find out who drops the packets."""
        path = replace(path, guest=await self.traffic.connect(self.targets, from_host=False))
        if any(not attempt.result.reason for attempt in path.guest):
            return path
        path = replace(path, host=await self.traffic.connect(self.targets, from_host=True))
        lost = network.lost_on_the_way(path)
        if network.suspicion(path) is not None or lost is None:
            return path
        assert self.traffic.port.address is not None
        self.checker.progress("looking for the rule that drops the packets")
        source = str(self.traffic.port.address.ip)
        async with firewall.DropTrace(self.checker.tag, path.bridge, source, lost.port) as trace:
            await self.traffic.connect([lost], from_host=False, deadline_s=TRACE_DEADLINE_S)
        return replace(path, culprit=trace.culprit)


def _daemon() -> str:
    """Which of libvirt's daemons this node runs: the modular ones have a socket of their own."""
    return next((daemon for daemon, socket in SOCKETS.items() if socket.exists()), "libvirtd")
