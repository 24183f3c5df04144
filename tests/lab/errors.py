"""The one error of the lab: a sentence that says what failed, on what, and where to look."""

from __future__ import annotations


class LabError(Exception):
    """A step of the lab failed; the message is complete and meant for a person."""
