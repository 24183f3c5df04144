"""vmnode-startd-cron: prints the machine ad that the daemon published, for the startd. It never probes.

    vmnode-startd-cron               print once and exit (Periodic)
    vmnode-startd-cron --continuous  print at every change, and every minute, until the startd is gone (WaitForExit)
      --push-slots                   at a change, also set an attribute by condor_update_machine_ad
    vmnode-startd-cron --usage       print what the running jobs have used, at intervals, until the startd is gone
      --push-slots                   as above; the startd writes what a job's starter will report when it sends its ads

A block ends with "- update:true" if the startd is to tell the collector at once, and with "- update:false" if not, so
that a node whose state is steady causes no updates beyond the startd's own. Exit status 0, also without a daemon: the
ad then says undefined. Output of a failing hook would be published all the same (HTCondor manual, "Startd Cron").
"""

# Hot: imports little, since the startd may start it often. No dataclasses, no argparse, no TOML unless it is needed.

from __future__ import annotations

import json
import os
import select
import sys
import time

from vmnode.host.files import DirectoryWatch, is_locked, read_whole

USAGE = "usage: vmnode-startd-cron [--config FILE] [--continuous [--push-slots] | --usage [--push-slots]]"
DEFAULT_RUN_DIR = "/run/vmnode"
REFRESH_S = 60.0  # a steady state is printed at least this often, and so that it stays fresh
LEAST_GAP_S = 5.0  # a flapping node is pushed to the collector at most this often
TICK_S = 5.0  # how soon a stepped clock or a dead daemon is noticed
RESTART_S = 15.0  # a daemon that is being restarted is not gone
CLOCK_STEP_S = 5.0
PUSH_TRIES = 3  # a startd that has just started may not answer yet; one that forbids it never will
LAST_CHECK = "VMNodeLastCheck ="
REASON = "VMNodeReason ="


def unknown_ad(reason: str) -> list[str]:
    """What the startd gets when there is nothing to tell; each other attribute becomes undefined by not being there."""
    return ["HasVirshDefaultNetwork = undefined", 'VMNodeState = "Unknown"', f'VMNodeReason = "vmnode: {reason}"']


def published(run_dir: str) -> tuple[list[str], float]:
    """The daemon's ad, and the seconds after which it is to be printed again, so that a healthy node's does not expire.

    The time of the last check is put into terms of the wall clock as it stands now.
    """
    try:
        state = json.loads(read_whole(f"{run_dir}/state.json"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot_id = file.read().strip()
        if state["version"] != 1:
            return unknown_ad("the state file is of another version"), REFRESH_S
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - state["checked"]["boot"]
        if state["checked"]["boot_id"] != boot_id or not 0 <= age < float("inf"):  # json knows NaN and Infinity
            return unknown_ad("no check since the node was booted"), REFRESH_S
        if not isinstance(state["classad"], list):
            raise TypeError("the ad is no list of lines")
        checked = f"{LAST_CHECK} {time.time() - age:.0f}"
        ad = [checked if line.startswith(LAST_CHECK) else " ".join(line.split("\n")) for line in state["classad"]]
        return ad, min(REFRESH_S, max(1.0, state["max_age_s"] / 4))
    except FileNotFoundError:
        return unknown_ad("the daemon has published nothing: systemctl status vmnode"), REFRESH_S
    except OSError as error:
        return unknown_ad(f"the state file cannot be read: {os.strerror(error.errno or 0)}"), REFRESH_S
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return unknown_ad("the state file is damaged"), REFRESH_S


def emit(ad: list[str], push: bool) -> None:
    """Write one block."""
    write([*ad, f"- update:{str(push).lower()}"])


def write(lines: list[str]) -> None:
    """Write them whole, however long the startd lets us wait; raises BrokenPipeError when it is gone."""
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    while data:
        try:
            data = data[os.write(sys.stdout.fileno(), data) :]
        except BlockingIOError:  # whoever shares the pipe with us may have made it so
            select.select([], [sys.stdout], [])


def substance(ad: list[str]) -> list[str]:
    """What is worth a line to the startd: not the time, nor the figures in a reason, which change at every check."""
    return [
        "".join(c for c in line if not c.isdigit()) if line.startswith(REASON) else line
        for line in ad
        if not line.startswith(LAST_CHECK)
    ]


def news(ad: list[str]) -> list[str]:
    """What is worth a collector update: not how one condition after the other comes back while the verdict stands.

    But START may depend on accounting.
    """
    names = ((line.partition(" =")[0], line) for line in substance(ad))
    return [line for name, line in names if not name.endswith("OK") or name == "VMNodeAccountingOK"]


def print_once(run_dir: str) -> None:
    alive = is_locked(f"{run_dir}/lock")
    emit(published(run_dir)[0] if alive else unknown_ad("the daemon does not run"), push=False)


def follow(run_dir: str, pushes_slots: bool) -> None:
    """Print at every change, and often enough to stay fresh, until nobody reads any more."""
    watch = DirectoryWatch(run_dir)
    told: list[str] = []  # to the startd
    pushed: list[str] = []  # to the collector
    printed_at = pushed_at = alive_at = clock = float("-inf")
    tries = 0
    while True:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if is_locked(f"{run_dir}/lock"):
            alive_at = now
        gone = now - alive_at > RESTART_S
        ad, refresh_s = (unknown_ad("the daemon does not run"), REFRESH_S) if gone else published(run_dir)
        stepped = abs(time.time() - now - clock) > CLOCK_STEP_S
        wait_s = min(TICK_S, refresh_s)
        push = stepped or news(ad) != pushed
        if push and now - pushed_at < LEAST_GAP_S:
            wait_s, push = LEAST_GAP_S - (now - pushed_at), False
        if push or stepped or substance(ad) != told or now - printed_at >= refresh_s:
            emit(ad, push)
            told, printed_at = substance(ad), now
        if push or not stepped:
            clock = time.time() - now
        if push:
            pushed, pushed_at = news(ad), now
            tries = PUSH_TRIES if pushes_slots else 0
        if tries:
            tries = 0 if push_slots(last_try=tries == 1) else tries - 1
        if watch.wait(wait_s, unless_closed=sys.stdout.fileno()):
            return


def follow_usage(run_dir: str, pushes_slots: bool) -> None:
    """Print what has become known of the jobs' network use, until nobody reads any more."""
    from vmnode.report import samples as jobs

    watch = DirectoryWatch(run_dir)
    samples: dict[str, jobs.Sample] = {}
    told: dict[str, jobs.Told] = {}
    said, unpushed, pushed_at = "", False, float("-inf")
    while True:
        try:
            samples, problem = jobs.read(read_whole(f"{run_dir}/usage.json")), ""
        except FileNotFoundError:  # nothing was ever counted
            samples, problem = {}, ""
        except (OSError, ValueError) as error:  # the daemon will write another; until then, what was told stands
            problem = f"vmnode-startd-cron: usage.json: {error}"
        if problem and problem != said:
            print(problem, file=sys.stderr, flush=True)
        said = problem
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        lines: list[str] = []
        for slot in sorted({*told, *samples}):
            block, known = jobs.news(slot, samples.get(slot), told.pop(slot, None), now)
            lines += block
            if known:
                told[slot] = known
        write(lines)
        unpushed = pushes_slots and (unpushed or any(line.endswith("update:true") for line in lines))
        if unpushed and now - pushed_at >= LEAST_GAP_S:  # it is for all slots at once
            unpushed, pushed_at = not push_slots(last_try=True), now
        if watch.wait(TICK_S, unless_closed=sys.stdout.fileno()):
            return


def push_slots(last_try: bool) -> bool:
    """Make the startd send its slot ads to the collector; False, with the reason in its log, if that did not work.

    HTCondor up to 24.0.17 and 25.6 takes "update:true" for its daemon ad alone, and leaves the slots, which jobs are
    matched with, to the next periodic update (HTCONDOR-3526).
    """
    import asyncio  # only here: a hook that waits should be small

    from vmnode.errors import VmnodeError
    from vmnode.host.condor import push_slot_ads

    try:
        asyncio.run(push_slot_ads())
        return True
    except VmnodeError as error:
        if last_try:
            print(f"vmnode-startd-cron: the collector waits for the next update: {error}", file=sys.stderr, flush=True)
        return False


def run_dir_of(config: str) -> str:
    """[paths] run_dir. The files are parsed only if one of them names it: parsing takes longer than all the rest."""
    main = config or os.environ.get("VMNODE_CONFIG") or "/etc/vmnode/vmnode.toml"
    drop_ins = f"{os.path.dirname(main) or '.'}/conf.d"
    names = os.listdir(drop_ins) if os.path.isdir(drop_ins) else []
    for path in [main, *(f"{drop_ins}/{name}" for name in names if name.endswith(".toml"))]:
        try:
            with open(path, "rb") as file:
                found = b"run_dir" in file.read()
        except OSError:
            found = path == main and main != "/etc/vmnode/vmnode.toml"
        if found:
            from pathlib import Path

            from vmnode.config import load

            return str(load(Path(config) if config else None).config.paths.run_dir)
    return DEFAULT_RUN_DIR


def main() -> int:
    config, continuous, usage, pushes_slots, arguments = "", False, False, False, sys.argv[1:]
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(f"{USAGE}\n\n{__doc__}")
            return 0
        if argument == "--continuous":
            continuous = True
        elif argument == "--usage":
            usage = True
        elif argument == "--push-slots":
            pushes_slots = True
        elif argument.startswith("--config="):
            config = argument[len("--config=") :]
        elif argument == "--config" and arguments:
            config = arguments.pop(0)
        else:
            print(f"{USAGE}\nvmnode-startd-cron: {argument!r} is not understood", file=sys.stderr)
            return 64
    if sys.stdout is None:  # it was closed: there is nobody to tell
        return 74
    try:
        run_dir = run_dir_of(config)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the configuration, the startd is told so
        print(f"vmnode-startd-cron: {error}", file=sys.stderr)
        if not usage:
            emit(unknown_ad("the configuration cannot be read: vmnode config check"), push=False)
        return 78
    try:
        if usage:
            follow_usage(run_dir, pushes_slots)
        elif continuous:
            follow(run_dir, pushes_slots)
        else:
            print_once(run_dir)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
    except OSError as error:
        print(f"vmnode-startd-cron: {error}", file=sys.stderr)
        return 74
    return 0


if __name__ == "__main__":
    sys.exit(main())
