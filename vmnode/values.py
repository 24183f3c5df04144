"""What a value in the configuration has to be: each parser takes what TOML holds and returns ours, or raises
ValueError("must be …"), and nothing is bent into shape.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

from vmnode.conditions import NAMES

Parser = Callable[[Any], Any]


def flag(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise ValueError("must be true or false")
    return raw


def text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw or not raw.isprintable():
        raise ValueError("must be a non-empty string of printable characters")
    return raw


def seconds(least: float, most: float) -> Parser:
    def parse(raw: Any) -> float:
        if isinstance(raw, bool) or not isinstance(raw, (int, float)):
            raise ValueError("must be a number of seconds")
        if not least <= raw <= most:  # nor is NaN
            raise ValueError(f"must be between {least:g} and {most:g} seconds")
        return float(raw)

    return parse


def count(least: int, most: int) -> Parser:
    def parse(raw: Any) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int) or not least <= raw <= most:
            raise ValueError(f"must be a whole number between {least} and {most}")
        return int(raw)

    return parse


def choice(*choices: str) -> Parser:
    def parse(raw: Any) -> str:
        if raw not in choices:
            raise ValueError("must be one of " + ", ".join(f'"{choice}"' for choice in choices))
        return str(raw)

    return parse


_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size(raw: Any) -> int:
    match = re.fullmatch(r"([0-9]{1,19})([KMGT]?)", str(raw)) if type(raw) in (int, str) else None
    size = int(match[1]) << _SHIFTS[match[2]] if match else -1
    if not 0 <= size < 1 << 63:
        raise ValueError('must be a size such as "10G" (K, M, G or T, powers of 1024)')
    return size


def path(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw.startswith("/") or not raw.isprintable():
        raise ValueError("must be an absolute path of printable characters")
    return Path(os.path.normpath(raw))


def root(raw: Any) -> Path:
    if isinstance(raw, str) and re.search("[, ]", raw):
        raise ValueError("must hold no comma and no blank: the roots are published as a ClassAd string list")
    return path(raw)


def list_of(item: Parser) -> Parser:
    def parse(raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            raise ValueError("must be a list")
        return tuple(item(element) for element in raw)

    return parse


@dataclass(frozen=True)
class Target:
    """A TCP service that a guest must be able to reach."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def target(raw: Any) -> Target:
    try:
        url = urlsplit(text(raw))
        plain = re.fullmatch(r"[^@/?#\s]+", url.netloc) and url.geturl() == f"tcp://{url.netloc}"
        if plain and url.hostname and url.port:
            return Target(url.hostname, url.port)
    except ValueError:
        pass
    raise ValueError('must hold targets such as "tcp://cm.example.org:9618"')


def prefix(raw: Any) -> str:
    try:
        return str(ipaddress.ip_network(text(raw)))
    except ValueError as error:
        raise ValueError(f"must be an address prefix such as 10.0.0.0/8 ({error})") from None


def pool4(raw: Any) -> str:
    return _pool(raw, 4, 29, '"100.64.0.0/16"')


def pool6(raw: Any) -> str:
    return _pool(raw, 6, 125, '"fd76:6d6e:6f64:6500::/64"')


def _pool(raw: Any, version: int, longest: int, example: str) -> str:
    """A prefix with room for a gateway and five jobs or more."""
    network = ipaddress.ip_network(prefix(raw))
    if network.version != version or network.prefixlen > longest:
        raise ValueError(f"must be an IPv{version} prefix of at most {longest} bits, such as {example}")
    return str(network)


def condition_name(raw: Any) -> str:
    if raw not in NAMES:
        raise ValueError(f"must hold names of conditions, not {raw!r}{did_you_mean(str(raw), NAMES)}")
    return str(raw)


def or_auto(parse: Parser) -> Parser:
    """What `parse` takes, or "auto" (None): found out at run time."""

    def parse_or_auto(raw: Any) -> Any:
        if raw == "auto":
            return None
        try:
            return parse(raw)
        except ValueError as error:
            raise ValueError(f'{error}; or be "auto"') from None

    return parse_or_auto


def did_you_mean(word: str, words: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
