"""python -m tests.bench.attaching: what the daemon does for jobs, beside CNI's ptp plugin where that is; JSON.

To be started in network and mount namespaces of its own (root), and gone with them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from tests.bench.crossings import links
from tests.kernel.accounting import Vmnoded, peers
from tests.kernel.crossroads import RULES
from tests.kernel.world import tool
from vmnode.accounting.admission import COMMAND
from vmnode.host.counting import Counters
from vmnode.host.iptables import IptablesCounters
from vmnode.host.netns import Namespace
from vmnode.host.nftables import NftablesCounters
from vmnode.host.starter_socket import Client

ROUNDS = 30
READINGS = 15
MANY, CROWD = 1024, 256
SAMPLE_S = 5
CNI = Path(os.environ.get("CNI_PATH", "/usr/lib/cni"))
Figures = dict[str, list[float]]


def main() -> None:
    # What else the machine does should not count (sched(7)).
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    tool("mount", "--make-rprivate", "/")
    tool("mount", "-t", "tmpfs", "tmpfs", "/run")
    tool("ip", "link", "set", "lo", "up")
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps({**readings(), **with_daemon(Path(directory))}))


def readings() -> Figures:
    """Seconds of each reading of all counters."""
    backends: dict[str, Counters] = {
        "nftables": NftablesCounters(RULES.tag),
        "iptables": IptablesCounters(RULES.tag),
    }
    return {f"read {name}": asyncio.run(_read(counters)) for name, counters in backends.items()}


async def _read(counters: Counters) -> list[float]:
    await counters.set_up(RULES)
    await counters.add(links(MANY))
    spent = []
    for _ in range(READINGS):
        began = time.monotonic()
        found = await counters.read()
        spent.append(time.monotonic() - began)
        assert found is not None and len(found) == MANY
    await counters.tear_down()
    return spent


def with_daemon(directory: Path) -> Figures:
    figures: Figures = {}
    with peers(), Vmnoded(directory, sample_s=SAMPLE_S) as daemon:
        for _ in range(ROUNDS):
            for name, seconds in {**ours(daemon), **cni()}.items():
                figures.setdefault(name, []).append(seconds)
        figures["pss"] = crowd(daemon)
    return figures


def ours(daemon: Vmnoded) -> dict[str, float]:
    """A network for someone who asks for one, and its end: the link is gone, and its counts are kept."""
    began = time.monotonic()
    client = Client(daemon.socket, COMMAND, 20)
    attached = time.monotonic()
    assert daemon.prefix in Path("/proc/net/dev").read_text()
    leave(client)
    while daemon.prefix in Path("/proc/net/dev").read_text():
        time.sleep(0.0005)
    return {"attach": attached - began, "detach": time.monotonic() - attached}


def cni() -> dict[str, float]:
    """The same by CNI's ptp and host-local, with ipMasq (https://www.cni.dev/plugins/current/main/ptp/)."""
    if not (CNI / "ptp").exists():
        return {}
    network = {
        "cniVersion": "1.0.0",
        "name": "bench",
        "type": "ptp",
        "ipMasq": True,
        "ipam": {"type": "host-local", "subnet": "10.99.0.0/16", "dataDir": "/run/cni"},
    }
    began = time.monotonic()
    namespace = Namespace()
    environment = {
        **os.environ,
        "CNI_CONTAINERID": uuid.uuid4().hex,
        "CNI_NETNS": f"/proc/{os.getpid()}/fd/{namespace.descriptor}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(CNI),
    }

    def call(command: str) -> None:
        environment["CNI_COMMAND"] = command
        argv = [str(CNI / "ptp")]
        subprocess.run(
            argv, input=json.dumps(network), env=environment, check=True, text=True, stdout=subprocess.DEVNULL
        )

    call("ADD")
    attached = time.monotonic()
    call("DEL")
    namespace.close()
    return {"cni attach": attached - began, "cni detach": time.monotonic() - attached}


def crowd(daemon: Vmnoded) -> list[float]:
    """MB of the daemon without jobs, and with many."""
    before = pss(daemon)
    clients = [Client(daemon.socket, COMMAND, 20) for _ in range(CROWD)]
    time.sleep(2 * SAMPLE_S + 1)
    assert len(daemon.jobs_links()) == CROWD
    after = pss(daemon)
    for client in clients:
        leave(client)
    return [before, after]


def leave(client: Client) -> None:
    """As one who dies: nobody is in the network any more."""
    os.close(client.namespace)
    client._socket.close()


def pss(daemon: Vmnoded) -> float:
    lines = Path(f"/proc/{daemon.process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
