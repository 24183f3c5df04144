"""Anonymous network namespaces (network_namespaces(7), unshare(2), setns(2)).

A namespace without a name lives as long as a descriptor or a socket refers to it. When the process ends, in whatever
way, the kernel destroys the namespace, every veth in it, and with it the veth's peer on the host: nothing can leak.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Callable, TypeVar

from vmnode.errors import NotPermitted, VmnodeError

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace of our own."""

    def __init__(self) -> None:
        """Raises VmnodeError if the kernel refuses."""
        self.descriptor = _in_thread(_unshare)
        # Also of one that a cancelled task has made, and nobody got: as long as it is open, so are its links there.
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` inside and return what it returns.

        Sockets that it opens stay in the namespace. It runs in a thread of its own, which ends with it, so that no
        other code can find itself in the wrong namespace.
        """

        def enter_and_call() -> T:
            enter(self.descriptor)
            return function()

        return _in_thread(enter_and_call)

    def close(self) -> None:
        self._close()


def enter(descriptor: int) -> None:
    """Move this thread, and what it starts, into a namespace. Raises VmnodeError."""
    _call("setns", descriptor, _CLONE_NEWNET)


def _unshare() -> int:
    _call("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        message = f"{name}(CLONE_NEWNET): {os.strerror(code)}"
        if code == 1:
            raise NotPermitted(message, "network namespaces need root (CAP_SYS_ADMIN)")
        raise VmnodeError(message)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            errors.append(error)

    thread = threading.Thread(target=body, name="vmn-netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
