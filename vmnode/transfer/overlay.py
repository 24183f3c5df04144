"""One input file of a job: a qcow2 overlay on a base image in the scratch directory, and what HTCondor is told of it.

Result ads: HTCondor manual, "File Transfer Plug-Ins", protocol versions 2 and 4, and "Transfer Error Data".
"""

from __future__ import annotations

import os
import time

from vmnode import __version__, errors
from vmnode.errors import BadImage, CommandFailed, DeadlineExceeded, MalformedRequest, TryAgain, VmnodeError
from vmnode.host import child, qemu_img
from vmnode.images import Image
from vmnode.transfer import policy, url
from vmnode.transfer.url import Request

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from typing import Any

    from vmnode.images import Settings

QEMU_IMG_DEADLINE_S = 30.0
RETRY_S = 60  # when it may be tried again


def transfer(address: str, local_file: str, images: Settings) -> tuple[int, dict[str, Any]]:
    """Make the disk that a URL asks for; the exit status (0, or as in docs/vm-nfs.md) and the result ad."""
    started = time.time()
    try:
        request = url.parse(address)
        base = find_base(request, images)
        written, size = create(request, base, os.path.dirname(local_file) or ".")
    except VmnodeError as error:
        return failure(address, local_file, error, started)
    except OSError as error:  # no more processes or descriptors, say
        return failure(address, local_file, TryAgain(f"no disk can be made on this worker now: {error}"), started)
    ad = result(address, local_file, started, written)
    ad["TransferSuccess"] = True
    ad["DeveloperData"] = {"Base": base.path, "BaseFormat": base.format, "BaseSize": base.size, "DiskSize": size}
    return 0, ad


def failure(address: str, local_file: str, error: VmnodeError, started: float = 0.0) -> tuple[int, dict[str, Any]]:
    """The exit status and the result ad of what was not made."""
    status = status_of(error)
    ad = result(address, local_file, started or time.time(), 0)
    ad["TransferSuccess"] = False
    ad["TransferError"] = error.line
    ad["TransferErrorData"] = [error_data(error, status)]
    return status, ad


def result(address: str, local_file: str, started: float, written: int) -> dict[str, Any]:
    """What every result ad holds. Times are Unix time; `written` is bytes."""
    ended = time.time()
    return {
        "TransferFileName": local_file,
        "TransferUrl": address,
        "TransferProtocol": url.METHOD,
        "TransferType": "download",
        "TransferStartTime": int(started),
        "TransferEndTime": int(ended),
        "ConnectionTimeSeconds": round(ended - started, 3),
        "TransferFileBytes": written,
        "TransferTotalBytes": written,
    }


def find_base(request: Request, images: Settings) -> Image:
    """The base image, as far as the policy allows it; raises VmnodeError."""
    try:
        answer = child.ask(
            lambda: policy.base(request.path, request.format, images),
            images.timeout_s,
            request.path,
        )
    except DeadlineExceeded as error:
        raise TryAgain(f"the file server hangs: {error.what}", "the job may be tried again") from None
    return Image(*answer)


def create(request: Request, base: Image, directory: str) -> tuple[int, int]:
    """Make the overlay, a new file; the bytes that were written, and the size that the guest sees.

    Leaves no file behind when it fails. Raises VmnodeError.
    """
    size = base.virtual_size if request.size is None else request.size
    if size < base.virtual_size:
        raise BadImage(
            f"size={size} is less than {base.path} has, {base.virtual_size} bytes: a disk can only grow",
            "ask for more, or leave size out",
        )
    path = f"{directory}/{request.name}"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise MalformedRequest(
            f"the scratch directory has a file {request.name} already", "give each disk a name of its own"
        ) from None
    except OSError as error:
        raise TryAgain(f"{path} cannot be made: {os.strerror(error.errno or 0)}") from None
    try:
        qemu_img.create_overlay(directory, request.name, base.path, base.format, size, QEMU_IMG_DEADLINE_S)
        return os.stat(path).st_size, size
    except BaseException:
        if os.path.lexists(path):  # qemu-img itself removes what it cannot finish, on a full disk say
            os.unlink(path)
        raise


def status_of(error: VmnodeError) -> int:
    """The exit status for an error: what fails here for want of a program or of time may work on another worker."""
    return errors.EXIT_TRY_AGAIN if isinstance(error, (CommandFailed, DeadlineExceeded)) else error.exit_status


def error_data(error: VmnodeError, status: int) -> dict[str, Any]:
    """One element of TransferErrorData."""
    data: dict[str, Any] = {"ErrorCode": status, "ErrorString": error.line, "Retryable": -1}
    if status == errors.EXIT_TRY_AGAIN:
        data.update(Retryable=RETRY_S, ErrorType="Contact", FailedServer=url.METHOD)
    elif status == errors.EXIT_NO_PERMISSION:
        data.update(
            ErrorType="Authorization", FailedServer=url.METHOD, FailureType="Authorization", ShouldRefresh=False
        )
    elif status in (errors.EXIT_USAGE, errors.EXIT_NO_IMAGE, errors.EXIT_BAD_IMAGE):
        data.update(ErrorType="Specification", FailedServer=url.METHOD)
    else:  # the plugin cannot work on this worker: its configuration, or what it was called for
        retryable = 0 if status == errors.EXIT_CONFIGURATION else -1  # on another worker, without delay
        data.update(Retryable=retryable, ErrorType="Parameter", PluginVersion=__version__, PluginLaunched=True)
    return data
