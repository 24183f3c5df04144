#!/usr/bin/python3 -IS
"""vmnode-starter; see vmnode.commands.starter. If that cannot even be loaded, the job runs, and a note says so."""

import os
import sys

try:
    sys.path.insert(0, "/usr/lib/vmnode")
    from vmnode.commands.starter import main

    status = main()
except BaseException as error:  # noqa: BLE001 - whatever it is, the job goes first
    try:
        with open("/proc/self/stat") as file:
            name = f"{os.getpid()}-{file.read().rpartition(')')[2].split()[19]}"
        words = dict(zip(sys.argv, sys.argv[1:]))
        with open(f"/run/vmnode/unaccounted/.{name}", "w") as file:
            file.write(f"{words.get('-a', '')}\nvmnode-starter cannot be run: {error!a}\n")
        os.rename(f"/run/vmnode/unaccounted/.{name}", f"/run/vmnode/unaccounted/{name}")  # noqa: PTH104 - pathlib may be what is broken
    finally:
        os.execv("/usr/sbin/condor_starter", ["condor_starter", *sys.argv[1:]])
sys.exit(status)
