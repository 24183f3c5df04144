"""The one hierarchy of errors: what failed, on which object, why, and what to do.

Library code raises these; only `vmnode.commands` turns them into an exit status.
"""

from __future__ import annotations

# sysexits(3) statuses, as documented in the manual pages.
EXIT_USAGE = 64
EXIT_BAD_IMAGE = 65
EXIT_NO_IMAGE = 66
EXIT_UNAVAILABLE = 69
EXIT_IO = 74
EXIT_TRY_AGAIN = 75
EXIT_NO_PERMISSION = 77
EXIT_CONFIGURATION = 78


class VmnodeError(Exception):
    """Something that a person can act upon.

    `what` is one sentence that names the object and the cause; `hint` says what to do about it.
    """

    exit_status = EXIT_UNAVAILABLE

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    @property
    def line(self) -> str:
        """For a log: what and hint in one line."""
        return f"{self.what} (hint: {self.hint})" if self.hint else self.what

    def __str__(self) -> str:
        return f"{self.what}\n  hint: {self.hint}" if self.hint else self.what


class UsageError(VmnodeError):
    """The command line asks for something that does not exist."""

    exit_status = EXIT_USAGE


class ConfigurationError(VmnodeError):
    """The configuration cannot be used; names file, section and key."""

    exit_status = EXIT_CONFIGURATION


class NotPermitted(VmnodeError):
    """The caller lacks a right."""

    exit_status = EXIT_NO_PERMISSION


class StateError(VmnodeError):
    """The state file is missing or cannot be understood."""


class DeadlineExceeded(VmnodeError):
    """A child or a peer did not answer in time."""


class CommandFailed(VmnodeError):
    """A child could not be started, or ended with a status other than zero."""


class MalformedRequest(VmnodeError):
    """A job asks for something that cannot be understood: a URL, a field of vm_disk."""

    exit_status = EXIT_USAGE


class BadImage(VmnodeError):
    """A disk image is not what it has to be."""

    exit_status = EXIT_BAD_IMAGE


class NoSuchImage(VmnodeError):
    """There is no such image."""

    exit_status = EXIT_NO_IMAGE


class TryAgain(VmnodeError):
    """What was asked for is right, and may work later or on another node."""

    exit_status = EXIT_TRY_AGAIN
