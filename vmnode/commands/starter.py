"""vmnode-starter: in place of condor_starter (the knob STARTER). Enters a network that is counted, and becomes it.

    vmnode-starter [--config FILE] ARGUMENTS…   as the startd calls condor_starter

The startd's own starter lies beside the startd. Whatever fails before that takes over, it takes over all the same, on
the host's network, and a note tells the daemon that this job is not counted; with [accounting] on_error = "closed" the
job does not start: exit status 75.
"""

# Hot: started for each job. No TOML, unless the daemon does not answer or another configuration is named.

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

RUN_DIR = "/run/vmnode"
DEADLINE_S = 2.0  # the daemon's time; after that the job starts without
AGAIN_S = 0.05
STARTER = "/usr/sbin/condor_starter"  # of a startd that cannot be found
EXIT_TRY_AGAIN = 75  # sysexits(3)
_CLONE_NEWNET = 0x40000000
COOKIE = "CONDOR_PRIVATE_SHARED_PORT_COOKIE"


def main() -> int:
    arguments, config = sys.argv[1:], ""
    if arguments[:1] == ["--config"] and len(arguments) > 1:
        config, arguments = arguments[1], arguments[2:]
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if "-classad" not in arguments and os.geteuid() == 0:
        why = enter_network(slot_of(arguments), config)
        if why and not may_go_without(why, slot_of(arguments), config):
            print(f"vmnode-starter: the job does not start, since it could not be counted: {why}", file=sys.stderr)
            return EXIT_TRY_AGAIN
    return become_starter(arguments)


def become_starter(arguments: Sequence[str]) -> int:
    real = starter()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and so would the job
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(real, ["condor_starter", *arguments])
    except OSError as error:
        print(f"vmnode-starter: {real}: {error.strerror}", file=sys.stderr)
        return EXIT_TRY_AGAIN


def starter() -> str:
    """condor_starter as the startd that started us would have it."""
    try:
        startd = os.readlink(f"/proc/{os.getppid()}/exe")
    except OSError:
        return STARTER
    beside = f"{os.path.dirname(startd)}/condor_starter"
    return beside if os.path.basename(startd).startswith("condor_startd") else STARTER


def slot_of(arguments: Sequence[str]) -> str:
    """The slot, from the arguments that the startd gives: -a slot1_1, or -slot-name slot1_1."""
    words = dict(zip(arguments, arguments[1:]))
    return words.get("-slot-name") or words.get("-a") or ""


def enter_network(slot: str, config: str) -> str:
    """Move this process into a network of its own. Why it could not be done; "" if it was, or is not to be."""
    try:
        until = time.monotonic() + DEADLINE_S
        path = socket_path(config)
        while path:
            try:
                return ask_and_enter(path, slot, until)
            except (FileNotFoundError, ConnectionError) as error:  # vmnoded may be in the middle of a restart
                if time.monotonic() + AGAIN_S > until:
                    return f"vmnoded does not answer at {path}: {error.strerror or error}"
            time.sleep(AGAIN_S)
        return ""
    except Exception as error:  # noqa: BLE001 - whatever it is, the job goes first
        return f"vmnoded: {error or type(error).__name__}"


def ask_and_enter(path: str, slot: str, until: float) -> str:
    """As `enter_network`, but asks once. Raises OSError."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.settimeout(max(0.001, until - time.monotonic()))
        daemon.connect(path)
        daemon.send(f"starter {slot}".encode())
        daemon.settimeout(max(0.001, until - time.monotonic()))
        answer, descriptors, _, _ = socket.recv_fds(daemon, 4096, 1)
        for descriptor in descriptors:  # recv_fds takes flags, and forgets them
            os.set_inheritable(descriptor, False)
        word, _, why = answer.decode("utf-8", "replace").partition(" ")
        if not word:
            raise ConnectionAbortedError("it ended before it answered")
        if word == "host":
            return ""
        if word != "network" or not descriptors:
            return why or "vmnoded gave no network"
        enter(descriptors[0])
        change_environment(os.environ)
        try:
            daemon.send(b"entered")
        except OSError:  # it died meanwhile: the next one finds us here
            pass
        return ""


def enter(descriptor: int) -> None:
    """setns(2) for this process, which has one thread. Raises OSError."""
    if hasattr(os, "setns"):  # Python 3.12
        os.setns(descriptor, _CLONE_NEWNET)
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def change_environment(environment: MutableMapping[str, str]) -> None:
    """What condor_starter has to know in a namespace of its own, where the host's addresses are not.

    The socket for commands to it was made by the startd, on the host's side: that address stays the right one to tell.
    Without the cookie it makes others as files, and not as abstract sockets, which end at the namespace (unix(7);
    SharedPortEndpoint::GetAltDaemonSocketDir).
    """
    environment["_CONDOR_BIND_ALL_INTERFACES"] = "true"
    environment["_CONDOR_NETWORK_INTERFACE"] = "*"
    words = environment.get("CONDOR_INHERIT", "").split()  # the startd's pid and address, "<198.51.100.7:9618?…>", …
    address = words[1].strip("<>").partition("?")[0] if len(words) > 1 else ""
    if ":" in address:
        environment["_CONDOR_TCP_FORWARDING_HOST"] = address.rpartition(":")[0].strip("[]")
    environment.pop(COOKIE, None)


def socket_path(config: str) -> str:
    """Where vmnoded listens; "" where nobody accounts."""
    if not config and not os.environ.get("VMNODE_CONFIG") and os.path.exists(f"{RUN_DIR}/starter.sock"):
        return f"{RUN_DIR}/starter.sock"
    from pathlib import Path

    from vmnode.config import load

    settings = load(Path(config) if config else None).config
    return f"{settings.paths.run_dir}/starter.sock" if settings.accounting.enabled else ""


def may_go_without(why: str, slot: str, config: str) -> bool:
    """Whether the job may start on the host's network; the daemon is told by a note that it did, if it accounts."""
    try:
        from pathlib import Path

        from vmnode.config import load

        settings = load(Path(config) if config else None).config
        if not settings.accounting.enabled:
            return True
        if settings.accounting.on_error == "closed":
            return False
        leave_note(f"{settings.paths.run_dir}/unaccounted", why, slot)
    except Exception as error:  # noqa: BLE001 - whatever it is, the job goes first
        print(f"vmnode-starter: nobody could be told that this job is not counted: {error}", file=sys.stderr)
    return True


def leave_note(directory: str, why: str, slot: str) -> None:
    """See vmnode.accounting.notes."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        started = file.read().rpartition(")")[2].split()[19]
    name = f"{os.getpid()}-{started}"
    with open(f"{directory}/.{name}", "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(" ".join(text.split()) for text in (slot, why)) + "\n")
    os.rename(f"{directory}/.{name}", f"{directory}/{name}")


if __name__ == "__main__":
    sys.exit(main())
