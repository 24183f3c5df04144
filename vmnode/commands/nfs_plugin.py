"""vm-nfs-plugin: HTCondor's file transfer plugin for nfs:/// URLs. A disk on a shared base image, not a copy of it.

    vm-nfs-plugin -classad                          say what it can do
    vm-nfs-plugin -infile FILE -outfile FILE        make the disks that FILE asks for (protocol versions 2 and 4)
    vm-nfs-plugin URL FILE                          make one disk beside FILE (protocol version 1)

Started by the starter with the rights of the job's user. Exit status: 0 if all were made; else of the first input that
failed for good, or of the first that failed: 64 the URL is wrong, 65 the image is, 66 there is none, 69 not supported,
75 try again, 77 not permitted, 78 this worker's configuration is wrong. The hold subcode is 256 times that.
"""

# Hot: started for each job. It loads no more than the configuration and what the policy needs.

from __future__ import annotations

import os
import sys

from vmnode import __version__, images
from vmnode.errors import EXIT_IO, EXIT_TRY_AGAIN, ConfigurationError, NotPermitted, UsageError, VmnodeError
from vmnode.transfer import ads, overlay, url

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Callable

    from vmnode.images import Settings

    Make = Callable[[str, str], tuple[int, dict[str, ads.Value]]]  # of a URL and a local file

USAGE = "usage: vm-nfs-plugin [--config FILE] -classad | -infile FILE -outfile FILE | URL FILE"
UPLOAD = VmnodeError(
    "vm-nfs only makes disks on base images; it stores nothing there",
    "take the nfs URL out of transfer_output_remaps, or of output_destination",
)


def main() -> int:
    try:
        return perform(sys.argv[1:])
    except VmnodeError as error:
        print(f"vm-nfs-plugin: {error.line}", file=sys.stderr)
        return overlay.status_of(error)
    except OSError as error:
        print(f"vm-nfs-plugin: {error}", file=sys.stderr)
        return EXIT_IO


def perform(arguments: Sequence[str]) -> int:
    words, config = list(arguments), ""
    if words[:1] == ["--config"] and len(words) > 1:
        config, words = words[1], words[2:]
    if words in (["-h"], ["--help"], ["-help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if words == ["-classad"]:
        print(ads.write_old(capabilities()), end="")
        return 0
    upload = "-upload" in words
    options = [word for word in words if word != "-upload"]
    if len(options) == 4 and {options[0], options[2]} == {"-infile", "-outfile"}:
        files = dict(zip(options[::2], options[1::2]))
        return transfer_all(files["-infile"], files["-outfile"], upload, config)
    if len(options) == 2 and not any(word.startswith("-") for word in options):
        if not options[0].lower().startswith(f"{url.METHOD}:"):
            raise UPLOAD
        status, ad = maker(config)(options[0], options[1])
        plain = {key: value for key, value in ad.items() if isinstance(value, (bool, int, float, str))}
        print(ads.write_old(plain).encode("utf-8", "replace").decode())  # the arguments may be no UTF-8
        return status
    raise UsageError(f"{' '.join(words) or 'no arguments'}: not understood", USAGE)


def capabilities() -> dict[str, bool | int | str]:
    return {
        "MultipleFileSupport": True,
        "PluginType": "FileTransfer",
        "PluginVersion": __version__,
        "ProtocolVersion": 4,
        "SupportedMethods": url.METHOD,
    }


def transfer_all(infile: str, outfile: str, upload: bool, config: str) -> int:
    """One result ad for each input ad, whatever becomes of the others; returns the exit status."""
    with open(infile, encoding="utf-8", errors="surrogateescape") as file:
        inputs = [ad for ad in ads.read_new(file.read()) if "url" in ad or "localfilename" in ad]
    make = refusal(UPLOAD) if upload else maker(config)
    # The file is there already, full of blanks, so that the results have room on a full disk: it is not cut.
    results = os.open(outfile, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    statuses = []
    with os.fdopen(results, "w", encoding="utf-8", errors="surrogateescape") as file:
        for ad in inputs:
            status, result = make(ad.get("url", ""), ad.get("localfilename", ""))
            statuses.append(status)
            file.write(ads.write_new(result) + "\n")
            file.flush()
    failures = [status for status in statuses if status]
    return next((status for status in failures if status != EXIT_TRY_AGAIN), (failures or [0])[0])


def maker(config: str) -> Make:
    """What makes a disk, or where nothing can be made here, what says so for each."""
    try:
        if os.geteuid() == 0:
            raise NotPermitted(
                "the plugin runs as root, so nobody's rights protect the images",
                "the administrator sets RUN_FILETRANSFER_PLUGINS_WITH_ROOT = False",
            )
        settings = configured(config)
    except VmnodeError as error:
        return refusal(error)
    return lambda address, local_file: overlay.transfer(address, local_file, settings)


def refusal(error: VmnodeError) -> Make:
    return lambda address, local_file: overlay.failure(address, local_file, error)


def configured(config: str) -> Settings:
    """The section [images]; parsed only if the daemon has not done so since the files last changed."""
    parsed = None if config or os.environ.get("VMNODE_CONFIG") else images.read()
    if parsed is not None:
        return parsed
    if sys.version_info < (3, 11):  # Python's own parser of TOML came then; another is hidden by the launcher's -S
        import site

        site.main()
    from pathlib import Path

    from vmnode.config import load

    try:
        return images.settings(load(Path(config) if config else None).config.images)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"vmnode's configuration on this worker is wrong: {error.what}",
            "the administrator: vmnode config check",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
