"""vmnoded: the service. Checks the node when something happens and when time has passed, and publishes the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from vmnode import __version__, images, overlays
from vmnode.accounting import watch
from vmnode.accounting.accountant import Accountant, Sources
from vmnode.commands.arguments import Parser
from vmnode.conditions import NAMES, Condition, Status
from vmnode.config import Config, load
from vmnode.errors import NotPermitted, StateError, VmnodeError
from vmnode.health import applies, bases, schedule
from vmnode.health.check import Checker
from vmnode.health.decide import decide_all, first_broken, state_of
from vmnode.host import clock, files, service
from vmnode.host.events import KernelEvents
from vmnode.report.classad import sentence
from vmnode.report.state import Snapshot, read, write

log = logging.getLogger("vmnoded")

LONGEST_CHECK_S = 120.0  # all deadlines of a check together are shorter: one that takes longer is a fault of ours


class Daemon:
    """Composition and event loop."""

    def __init__(self, config: Config, config_file: Optional[Path], previous: Iterable[Condition]) -> None:
        self._config = config
        self._config_file = config_file
        self._conditions = {condition.name: condition for condition in previous}
        self._events: set[str] = set()
        self._woken = asyncio.Event()
        self._stopping = False
        self._reload = False
        self._history = schedule.History(jitter=random.uniform(0.9, 1.1))
        self._checking: Optional[asyncio.Future[None]] = None
        self._check_started: Optional[float] = None  # time.monotonic()
        self._ready = False
        self._write_error = ""
        self._checker: Optional[Checker] = None
        self._accountant: Optional[Accountant] = None
        self._leftovers: Optional[asyncio.Future[None]] = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the configuration again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._ask_for_reload)
        self._happened(schedule.START)
        watchdog = loop.create_task(self._feed_watchdog())
        try:
            while not self._stopping:
                await self._serve()
        finally:
            await self._stop_accounting()
            watchdog.cancel()
            service.notify("STOPPING=1")

    async def _serve(self) -> None:
        """Serve with one configuration, until it is replaced or the daemon has to stop."""
        checker = Checker(self._config, str(self._config.paths.run_dir), self._happened)
        kernel = KernelEvents(self._happened)
        self._checker = checker
        try:
            await self._account()
            while await self._wait_until_due():
                self._checking = asyncio.ensure_future(self._check(checker, kernel))
                with contextlib.suppress(asyncio.CancelledError):
                    await self._checking
        finally:
            kernel.close()
            await checker.close()
        if self._reload:
            self._reread()

    # --- accounting -----------------------------------------------------------------------------------------------

    async def _account(self) -> None:
        """Have accounting as it is configured; what has not changed goes on, so that no job comes in between."""
        if self._accountant is not None and self._accountant.config.accounting == self._config.accounting:
            return
        await self._stop_accounting()
        directory = self._config.paths.state_dir / overlays.DIRECTORY
        sources = Sources(
            nics=lambda: self._checker.libvirt.nics if self._checker else {},
            overlays=lambda: [overlay for _, overlay in bases.recorded(directory)],
            targets=lambda: applies.targets_of(self._config, self._checker.knobs if self._checker else {}),
        )
        accountant = self._accountant = Accountant(self._config, sources)
        await accountant.start()
        self._leftovers = asyncio.ensure_future(watch.leftovers(self._config, lambda: accountant.running))

    async def _stop_accounting(self) -> None:
        if self._leftovers is not None:
            self._leftovers.cancel()
        if self._accountant is not None:
            await self._accountant.close()

    # --- one round ------------------------------------------------------------------------------------------------

    async def _check(self, checker: Checker, kernel: KernelEvents) -> None:
        self._check_started = time.monotonic()
        health = self._config.health
        events, self._events = self._events, set()
        plan = schedule.plan(events, self._conditions, self._history, health, clock.now().boot)
        result = await checker.check(plan)
        kernel.watch(result.links, result.dnsmasq_pid)
        now = clock.now()
        self._history = self._history.after(events, plan, result.asked_afresh, now.boot)
        limits = {name: schedule.thresholds(name, health) for name in NAMES}
        verdicts = decide_all(self._conditions, result.observations.values(), now.boot, limits)
        log_transitions(self._conditions, verdicts)
        self._conditions = {condition.name: condition for condition in verdicts}
        self._publish(Snapshot(verdicts, result.image_roots, now))
        self._check_started = None
        if not self._ready:
            self._ready = True
            service.notify("READY=1")

    def _publish(self, snapshot: Snapshot) -> None:
        broken = first_broken(snapshot.conditions)
        status = state_of(snapshot.conditions) + (f": {sentence(broken)}" if broken else "")
        service.notify("STATUS=" + " ".join(status.split()))
        path = self._config.paths.run_dir / "state.json"
        data = write(snapshot, self._config.health.max_age_s)
        try:
            try:
                files.write_atomically(path, data)
            except OSError:
                # On a full disk the old state has to go: it may be a lie by now, and its room may do for the truth.
                path.unlink(missing_ok=True)
                files.write_atomically(path, data)
            self._write_error = ""
        except OSError as error:
            if str(error) != self._write_error:
                log.error("%s: cannot be written: %s: the node is published as unknown", path, error.strerror)
            self._write_error = str(error)

    # --- what wakes us --------------------------------------------------------------------------------------------

    def _happened(self, event: str) -> None:
        self._events.add(event)
        self._history = self._history.heard(event, clock.now().boot)
        self._woken.set()

    def _stop(self) -> None:
        self._stopping = True
        self._woken.set()
        if self._checking is not None:
            self._checking.cancel()

    def _ask_for_reload(self) -> None:
        self._reload = True
        self._woken.set()

    async def _wait_until_due(self) -> bool:
        """Wait for the time of the next check; False when there is to be none with this configuration."""
        while not (self._stopping or self._reload):
            self._woken.clear()
            conditions = self._conditions.values()
            due = schedule.due(self._events, conditions, self._history, self._config.health)
            left = due - clock.now().boot
            if left <= 0:
                if self._events and self._ready:
                    await asyncio.sleep(schedule.COALESCE_S)
                return True
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), left)
        return False

    async def _feed_watchdog(self) -> None:
        """Only a loop that turns, and a check that gets on, keep the service manager from restarting us."""
        period = service.watchdog_s()
        while period:
            started = self._check_started
            if started is None or time.monotonic() - started < LONGEST_CHECK_S:
                service.notify("WATCHDOG=1")
            await asyncio.sleep(period / 3)

    def _reread(self) -> None:
        """Take a new configuration, or say what is wrong with it and keep the old one."""
        self._reload = False
        try:
            as_they_are = images.files_now()
            config = load(self._config_file).config
            if config.paths != self._config.paths:
                raise VmnodeError("[paths] cannot change while vmnoded runs", "systemctl restart vmnode")
        except VmnodeError as error:
            log.error("the new configuration is refused, the old one stays in force: %s", error.line)
        else:
            self._config = config
            leave_for_plugin(config, as_they_are)
            log.info("the configuration was read again")
        self._happened(schedule.START)


def log_transitions(previous: dict[str, Condition], verdicts: Iterable[Condition]) -> None:
    """One line for each condition whose status or reason changed: what, why, what to do."""
    for new in verdicts:
        old = previous.get(new.name)
        if old is not None and (old.status, old.reason) == (new.status, new.reason):
            continue
        if old is None and new.status in (Status.OK, Status.DISABLED):
            continue
        level = logging.WARNING if new.status in (Status.FAILED, Status.UNKNOWN) else logging.INFO
        before = old.status.value if old is not None else "new"
        hint = f" (hint: {new.hint})" if new.hint else ""
        log.log(level, "%s: %s -> %s: %s: %s%s", new.name, before, new.status.value, new.reason, new.message, hint)


def leave_for_plugin(config: Config, as_they_are: images.Files) -> None:
    """Spare vm-nfs-plugin the parsing of these files (see vmnode.images); without that, it parses them itself."""
    path = config.paths.run_dir / "images.json"
    try:
        files.write_atomically(path, images.write(images.settings(config.images), as_they_are))
    except OSError as error:
        log.warning("%s: cannot be written: %s: vm-nfs-plugin takes longer", path, error.strerror)


def recall(path: Path) -> tuple[Condition, ...]:
    """The verdicts of the daemon before us, if they are of this boot; what cannot be read is forgotten and logged."""
    try:
        snapshot, _ = read(files.read_whole(str(path)))
    except FileNotFoundError:
        return ()
    except (OSError, StateError) as error:
        log.warning("%s: starting without a history: %s", path, error)
        return ()
    if snapshot.age_s(clock.now()) == float("inf"):
        log.warning("%s: starting without a history: it is of another boot, or from the future", path)
        return ()
    return snapshot.conditions


def main() -> int:
    parser = Parser(
        prog="vmnoded",
        description="Check this worker node, publish what was found, and account for its jobs' traffic.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="instead of $VMNODE_CONFIG or /etc/vmnode/vmnode.toml; conf.d/*.toml beside it is read after it",
    )
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"vmnode {__version__}")
    arguments = parser.parse_args()
    service.set_up_log(logging.DEBUG if arguments.debug else logging.INFO)
    try:
        as_they_are = images.files_now()
        config = load(arguments.config).config
        return serve(config, arguments.config, as_they_are)
    except VmnodeError as error:
        log.error("%s", error.line)
        return error.exit_status


def serve(config: Config, config_file: Optional[Path], as_they_are: images.Files) -> int:
    run_dir = config.paths.run_dir
    if os.geteuid() != 0:
        raise NotPermitted("vmnoded needs root: it uses network namespaces and raw sockets", "systemctl start vmnode")
    try:
        files.make_directory(run_dir)
        lock = files.take_lock(run_dir / "lock")
    except OSError as error:
        raise VmnodeError(f"{run_dir}: cannot be used: {error.strerror}", "see [paths] run_dir") from None
    if lock is None:
        raise VmnodeError(f"{run_dir}: another vmnoded runs here", "a second instance needs its own [paths] run_dir")
    log.info("vmnoded %s starts", __version__)
    leave_for_plugin(config, as_they_are)

    async def run() -> None:
        await Daemon(config, config_file, recall(run_dir / "state.json")).run()

    asyncio.run(run())
    log.info("vmnoded stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
