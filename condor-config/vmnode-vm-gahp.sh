#!/bin/sh -p
# VM_GAHP_SERVER: HTCondor's vm-gahp, which is not told of TransferIntermediate. A job that names a saved state there has it
# restored by root, with the domain description inside of it: LIBVIRT_XML_SCRIPT is not asked, and any user could open any file
# (xen_type.linux.cpp, findCkptConfigAndSuspendFile). So a virtual machine always starts from its disks, also one that was
# evicted with a checkpoint.
/bin/sed -u '/^[[:space:]]*TransferIntermediate[[:space:]]*=/Id' | /usr/sbin/condor_vm-gahp "$@"
