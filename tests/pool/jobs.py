"""Submit descriptions: one job of each kind that a node may be asked to run. None of them has to run to its end."""

from __future__ import annotations

VM = """\
universe = vm
executable = guest
vm_type = kvm
vm_memory = 64
vm_disk = disk.img:vda:w:raw
vm_no_output_vm = true
should_transfer_files = yes
when_to_transfer_output = on_exit
transfer_input_files = disk.img
request_cpus = 1
request_disk = 1M
"""
NAT = f"{VM}vm_networking = true\nvm_networking_type = nat\n"
CAPITAL_NAT = f"{VM}vm_networking = true\nvm_networking_type = NAT\n"
BY_DEFAULT = f"{VM}vm_networking = true\n"
BRIDGE = f"{VM}vm_networking = true\nvm_networking_type = bridge\n"
OFFLINE = f"{VM}vm_networking = false\n"
VANILLA = """\
executable = /bin/sleep
arguments = 600
request_cpus = 1
request_memory = 16M
request_disk = 1M
"""
REQUIREMENT = "requirements = (TARGET.HasVirshDefaultNetwork == True)\n"
REFUSED = "My.SiteRefuses = true\n"
