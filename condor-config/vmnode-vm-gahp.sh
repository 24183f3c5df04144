#!/bin/sh -p
# VM_GAHP_SERVER: HTCondor's vm-gahp, which is not told of saved states. A job that names one in TransferIntermediate has it
# restored by root, with the domain description inside of it: LIBVIRT_XML_SCRIPT is not asked, and any user could open any file
# (xen_type.linux.cpp, findCkptConfigAndSuspendFile). For a job with JobVMCheckpoint, root writes such a state into the user's own
# directory. So a virtual machine always starts from its disks.
/bin/sed -E -u '/^[[:space:]]*(TransferIntermediate|JobVMCheckpoint)[[:space:]]*=/Id' | /usr/sbin/condor_vm-gahp "$@"
