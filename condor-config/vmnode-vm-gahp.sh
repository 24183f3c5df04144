#!/bin/sh -p
# VM_GAHP_SERVER: HTCondor's vm-gahp, which is kept from saved states of virtual machines. LIBVIRT_XML_SCRIPT is not asked about
# them, and they lie in a directory of the user's (xen_type.linux.cpp):
# - A job that names one in TransferIntermediate has it restored by root, with the domain description inside of it.
# - Root writes one there, through any link, and makes it the user's, when a guest is suspended or checkpointed.
# So a virtual machine starts from its disks, and cannot be suspended: no virtual machine has the number 0.
/bin/sed -E -u '
    /^[[:space:]]*(TransferIntermediate|JobVMCheckpoint)[[:space:]]*=/Id
    s/^(CONDOR_VM_(SUSPEND|SOFT_SUSPEND|CHECKPOINT) [0-9]+) .*/\1 0/
' | /usr/sbin/condor_vm-gahp "$@"
