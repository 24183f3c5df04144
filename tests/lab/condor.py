"""HTCondor's configuration on a node that is a whole pool: the central manager, access and execution point."""

from __future__ import annotations

CONFIG_FILE = "/etc/condor/config.d/10-lab.conf"  # read after Debian's 00-minicondor, which it corrects

_CONFIG = """\
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
VM_MEMORY = 1024
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


def configuration(name: str, address: str) -> str:
    """The text of CONFIG_FILE for the node ``name`` whose uplink has ``address``."""
    return _CONFIG.format(name=name, address=address)
