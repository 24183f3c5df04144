"""The child in which every libvirt call runs, so that a libvirt that hangs can be left behind with it.

One JSON document a line. On stdin a verb of VERBS and its arguments: {"verb": "look", "network": "default"}. On stdout
the answer, or at any time an event:

    {"answer": what the verb returns}
    {"error": {"code": 38, "message": "Failed to connect socket …"}}
    {"event": "network", "name": "default", "detail": 3}
    {"event": "connection", "detail": 2}
    {"event": "domain", "name": "alice_pool_12.0", "detail": 2}

Ends when stdin closes. It keeps one connection for events; each question opens a connection of its own, as vm-gahp does
for each job: a connection that is already open would still work when no new one can be made.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import libvirt

ACTIVE = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
STATS_OF = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
KEEPALIVE_S = 5  # a libvirtd that stops answering closes the event connection after three of these


# Our parent reads documents only: whatever else in this process writes to descriptor 1, a C library say, is a log.
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def tell(document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


class Worker:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.events: Optional[libvirt.virConnect] = None
        self.input = b""
        self.running = True

    def listen(self) -> None:
        """Subscribe to what happens to networks and to the connection."""
        if self.events is not None:
            return
        connection = libvirt.open(self.uri)
        connection.setKeepAlive(KEEPALIVE_S, 2)
        connection.registerCloseCallback(self.closed, None)
        connection.networkEventRegisterAny(None, libvirt.VIR_NETWORK_EVENT_ID_LIFECYCLE, self.network_changed, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self.domain_changed, None)
        self.events = connection

    def closed(self, _connection: Any, reason: int, _opaque: Any) -> None:
        self.events = None
        tell({"event": "connection", "detail": reason})

    def network_changed(self, _connection: Any, network: Any, event: int, _detail: int, _opaque: Any) -> None:
        tell({"event": "network", "name": network.name(), "detail": event})

    def domain_changed(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event in (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STOPPED):
            tell({"event": "domain", "name": domain.name(), "detail": event})

    def readable(self, _watch: int, descriptor: int, _events: int, _opaque: Any) -> None:
        data = os.read(descriptor, 65536)
        if not data:
            self.running = False
            return
        self.input += data
        while b"\n" in self.input:
            line, _, self.input = self.input.partition(b"\n")
            try:
                tell({"answer": self.answer(**json.loads(line))})
            except libvirt.libvirtError as error:
                tell({"error": {"code": error.get_error_code(), "message": error.get_error_message() or str(error)}})

    def answer(self, verb: str, **arguments: Any) -> Any:
        connection = libvirt.open(self.uri)
        try:
            answer = VERBS[verb](connection, **arguments)
        finally:
            connection.close()
        self.listen()
        return answer


# --- the verbs ----------------------------------------------------------------------------------------------------


def look(connection: Any, network: str) -> dict[str, Any]:
    """What a check wants to know:

    {"network": null | {"active": …, "autostart": …, "xml": …, "leases": […]}, "domains": ["alice_pool_12.0"],
     "nics": null | {"alice_pool_12.0": {"count": 1, "links": [{"name": "vnet0", "index": 7, "bridged": true}]}}}
    """
    return {
        "network": look_at_network(connection, network),
        "domains": [domain.name() for domain in connection.listAllDomains(ACTIVE)],
        "nics": look_at_nics(connection),
    }


def look_at_nics(connection: Any) -> Optional[dict[str, Any]]:
    """The running domains' network interfaces: how many, and the host's links of those that have one.

    Not from the domains' XML: where QEMU is busy, XMLDesc() waits until it is not, and with NOWAIT this does not. None
    if libvirt cannot tell; that is no reason to answer nothing else.
    """
    before = socket.if_nameindex()
    try:
        every = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_INTERFACE, STATS_OF)
    except libvirt.libvirtError:
        return None
    # An index never comes again: what had a name before and after had it when libvirt answered.
    certain = {name: index for index, name in set(before) & set(socket.if_nameindex())}
    found = {}
    for domain, stats in every:
        names = [value for key, value in stats.items() if key.startswith("net.") and key.endswith(".name")]
        links = [{"name": name, "index": certain[name], "bridged": bridged(name)} for name in names if name in certain]
        untapped = stats.get("net.count", 0) - len(names)
        found[domain.name()] = {"count": untapped + len(links), "links": links}
    return found


def bridged(link: str) -> bool:
    """Whether it is a port of a bridge of the kernel's (br_sysfs_if.c)."""
    return Path(f"/sys/class/net/{link}/brport").exists()


def look_at_network(connection: Any, name: str) -> Optional[dict[str, Any]]:
    try:
        network = connection.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise
    active = bool(network.isActive())
    return {
        "active": active,
        "autostart": bool(network.isPersistent() and network.autostart()),
        "xml": network.XMLDesc(0),
        "leases": [
            {"mac": lease["mac"], "address": lease["ipaddr"], "expires": lease["expirytime"]}
            for lease in (network.DHCPLeases() if active else [])
        ],
    }


VERBS: dict[str, Callable[..., Any]] = {"look": look}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's business
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()
    worker = Worker(sys.argv[1])
    libvirt.virEventAddHandle(
        sys.stdin.fileno(),
        libvirt.VIR_EVENT_HANDLE_READABLE | libvirt.VIR_EVENT_HANDLE_HANGUP,
        worker.readable,
        None,
    )
    while worker.running:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    main()
