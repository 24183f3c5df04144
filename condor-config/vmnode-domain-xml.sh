#!/bin/sh
# LIBVIRT_XML_SCRIPT. Where it fails, HTCondor describes the domain by itself, unchecked: so it does not fail, not even if
# Python does. libvirt refuses this XML, or two pieces of it. Nothing of the environment but the job's user gets through.
/usr/bin/env -i "VMGAHP_USER_UID=$VMGAHP_USER_UID" "VMGAHP_USER_GID=$VMGAHP_USER_GID" /usr/bin/python3 -I -c '
import sys

sys.path.insert(0, "/usr/lib/vmnode")
from vmnode.commands.domain_xml import main

sys.exit(main())
' "$@" || echo '<domain type="vmnode-domain-xml failed"/>'
