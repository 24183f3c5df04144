"""argparse, with the exit status that sysexits(3) gives to wrong usage."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vmnode.errors import EXIT_USAGE


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")
