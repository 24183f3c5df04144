"""The processes of this machine, as /proc shows them (proc(5)): where each one lives, who it is; and signals to them.

Any of them may vanish while it is looked at, and all that it says about itself may be a lie: its name, its arguments.
What is read here comes from the kernel's own memory. A command line does not: who reads it waits for the lock of the
process's memory map, for which a process that hangs on a dead file server may wait, too. So a child reads it.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Optional

from vmnode.errors import CommandFailed, DeadlineExceeded
from vmnode.host import process, rtnetlink

_LONGEST = 1024  # bytes of a command line that are read
_DEADLINE_S = 1.0
_GONE = b"ZX"  # states of processes that run no more (proc_pid_stat(5))
# linux/if_link.h, linux/net_namespace.h, linux/rtnetlink.h
_IFLA_IFNAME, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 3, 29, 37
_SKIP_STATS = 1 << 3
_NETNSA_NSID, _NETNSA_FD = 1, 3


class Whereabouts(NamedTuple):
    """The network namespace of a process, by its inode, and its control groups, as /proc/PID/cgroup lists them."""

    pid: int
    namespace: int
    cgroups: str


class Details(NamedTuple):
    """Who a process is. `started` is in clock ticks after the boot; with `pid` it names the process for ever."""

    pid: int
    started: int
    parent: int
    name: str  # what it calls itself: at most 15 bytes, any
    uid: int  # the real one
    program: str  # the path of what it executes, "" if it cannot be known


def everywhere() -> list[Whereabouts]:
    """All processes that live, those of the kernel left out. Needs root: others see only their own."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            there = whereabouts(int(entry))
            if there is not None:
                found.append(there)
    return found


def whereabouts(pid: int) -> Optional[Whereabouts]:
    """None if the process is gone, or not to be seen."""
    try:
        namespace = os.readlink(f"/proc/{pid}/ns/net")  # a zombie has none
        cgroups = _read(f"/proc/{pid}/cgroup")
    except OSError:
        return None
    return Whereabouts(pid, int(namespace[5:-1]), cgroups.decode("utf-8", "surrogateescape"))  # "net:[4026531840]"


def details(pid: int) -> Optional[Details]:
    """None if the process is gone, be it as a zombie."""
    try:
        stat = _read(f"/proc/{pid}/stat")
        status = _read(f"/proc/{pid}/status")
        again = _read(f"/proc/{pid}/stat")
    except OSError:
        return None
    name, fields = _fields(stat)
    if fields[0] in _GONE or _fields(again)[1][_STARTED] != fields[_STARTED]:
        return None
    uid = int(status[status.index(b"\nUid:\t") + 6 :].split(b"\t", 1)[0])  # a newline in its name is shown as \n
    try:
        program = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        program = ""
    return Details(pid, int(fields[_STARTED]), int(fields[1]), name, uid, program)


def started(pid: int) -> int:
    """When a process started, in clock ticks after the boot. Raises ProcessLookupError."""
    try:
        return int(_fields(_read(f"/proc/{pid}/stat"))[1][_STARTED])
    except OSError:
        raise ProcessLookupError(f"process {pid} is gone") from None


_STARTED = 22 - 3  # the fields after the name are counted from 3 on


def _fields(stat: bytes) -> tuple[str, list[bytes]]:
    """The name and what follows it. The name may hold blanks and parentheses."""
    end = stat.rindex(b")")
    return stat[stat.index(b"(") + 1 : end].decode("utf-8", "replace"), stat[end + 2 :].split()


def is_called(pid: int, name: str) -> bool:
    """Whether a process calls itself so, which any may."""
    try:
        return _read(f"/proc/{pid}/comm") == f"{name}\n".encode()
    except OSError:
        return False


def arguments(pid: int) -> list[str]:
    """The command line of a process that is trusted to have one; never of a job's. Empty if it is gone."""
    try:
        return _read(f"/proc/{pid}/cmdline").decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


async def command_line(pid: int) -> str:
    """The beginning of any process's command line, its arguments parted by NUL; "" if it cannot be had."""
    argv = ["head", "-c", str(_LONGEST), f"/proc/{pid}/cmdline"]
    try:
        return (await process.run(argv, _DEADLINE_S, task=f"the command line of process {pid}")).stdout
    except (CommandFailed, DeadlineExceeded):
        return ""


async def user_name(uid: int) -> str:
    """The name of a user, or the number. A child asks: the directory of users may be far away."""
    try:
        entry = (await process.run(["getent", "passwd", str(uid)], _DEADLINE_S, task=f"the name of user {uid}")).stdout
    except (CommandFailed, DeadlineExceeded):
        entry = ""
    return entry.partition(":")[0] or str(uid)


def send(number: int, there: Whereabouts, started: int) -> bool:
    """Send a signal to the process that was seen there, and to no other: it is the same, and it is still there.

    False if it is not; raises PermissionError. The descriptor is taken before the last look: a process id that is
    given anew meanwhile is then a descriptor's that leads nowhere (pidfd_open(2)).
    """
    try:
        descriptor = os.pidfd_open(there.pid)
    except ProcessLookupError:
        return False
    try:
        now = details(there.pid)
        if now is None or now.started != started or whereabouts(there.pid) != there:
            return False
        signal.pidfd_send_signal(descriptor, signal.Signals(number))
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def behind_links(prefix: str, residents: Iterable[Whereabouts]) -> Mapping[int, str]:
    """The namespaces, by inode, at the other end of our links whose names begin with `prefix`: which link leads there.

    Only namespaces that have a resident are found. The kernel is asked anew each time: it gives the number of a
    namespace that is gone to the next one. Raises OSError.
    """
    with rtnetlink.connect() as link:
        names = _links_by_namespace(link, prefix)
        own = os.stat("/proc/thread-self/ns/net").st_ino
        found: dict[int, str] = {}
        asked = {own}
        for resident in residents if names else ():
            if resident.namespace in asked:
                continue
            try:
                descriptor = os.open(f"/proc/{resident.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # the next process of that namespace may still be there
                continue
            try:
                inode = os.fstat(descriptor).st_ino
                asked.add(inode)
                request = bytes(4) + rtnetlink.attribute(_NETNSA_FD, struct.pack("=I", descriptor))
                answer = dict(rtnetlink.attributes(rtnetlink.ask(link, rtnetlink.GETNSID, request)[4:]))
            finally:
                os.close(descriptor)
            name = names.get(struct.unpack("=i", answer[_NETNSA_NSID])[0])
            if name is not None:
                found[inode] = name
        return found


def _links_by_namespace(link: socket.socket, prefix: str) -> dict[int, str]:
    """Names of our links by the number that our namespace has for the one at the other end."""
    request = bytes(16) + rtnetlink.attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATS))
    found = {}
    for payload in rtnetlink.dump(link, rtnetlink.GETLINK, request):
        values = dict(rtnetlink.attributes(payload[16:]))
        name = values[_IFLA_IFNAME].rstrip(b"\0").decode("ascii", "replace")
        if name.startswith(prefix) and _IFLA_LINK_NETNSID in values:
            found[struct.unpack("=i", values[_IFLA_LINK_NETNSID])[0]] = name
    return found


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)
