"""What a node's HTCondor and vmnode are told: the node is a whole pool, and the world is all that it can reach."""

from __future__ import annotations

import os

VMNODE_FILE = "/etc/vmnode/conf.d/10-lab.toml"  # later files there override it
CONDOR_FILE = "/etc/condor/config.d/10-lab.conf"  # read after Debian's 00-minicondor, which it corrects

_CONDOR = """\
# On the loopback address, where minicondor listens, a starter in another network namespace
# could not reach its shadow.
NETWORK_INTERFACE = {address}
CONDOR_HOST = {address}
UID_DOMAIN = {name}
TRUST_UID_DOMAIN = True

# The stock script blocks the master for five minutes in a container.
LINUX_KERNEL_TUNING_SCRIPT =

# Two jobs at once, whatever the machine below has.
NUM_CPUS = 2
NUM_SLOTS = 1
NUM_SLOTS_TYPE_1 = 1
SLOT_TYPE_1 = 100%
SLOT_TYPE_1_PARTITIONABLE = True

VM_TYPE = kvm
VM_MEMORY = 4096
VM_MAX_NUMBER = 2
VM_NETWORKING = True
VM_NETWORKING_TYPE = nat
VM_NETWORKING_DEFAULT_TYPE = nat
VM_STATUS_INTERVAL = 30

# HTCondor's own default. minicondor says 5 s, and so would hide that a change was not pushed.
UPDATE_INTERVAL = 300

# Jobs match within seconds.
SCHEDD_INTERVAL = 2
SCHEDD_MIN_INTERVAL = 1
NEGOTIATOR_INTERVAL = 2
NEGOTIATOR_MIN_INTERVAL = 1
NEGOTIATOR_CYCLE_DELAY = 1
"""


def condor_configuration(name: str, address: str) -> str:
    """The text of CONDOR_FILE for the node ``name`` whose uplink has ``address``."""
    return _CONDOR.format(name=name, address=address)


def vmnode_configuration(target: str) -> str:
    """The text of VMNODE_FILE: what the outbound check connects to, and how guests run on this machine."""
    accel = "kvm" if _has_kvm() else "tcg"
    return f'[network]\ntargets = ["{target}"]\n\n[kvm]\naccel = "{accel}"\n'


def _has_kvm() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
