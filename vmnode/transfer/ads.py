"""ClassAds as HTCondor hands them to a file transfer plugin and to LIBVIRT_XML_SCRIPT. Pure.

The new syntax, `[ Url = "…"; LocalFileName = "…" ]`, is read whole; of the values only strings are understood, since
nothing else is needed. The old syntax is one `Name = value` a line. Names are compared without regard to case.
(HTCondor manual, "ClassAds: Old and New" and "File Transfer Plug-Ins".)
"""

from __future__ import annotations

import re

from vmnode.errors import MalformedRequest

TYPE_CHECKING = False
if TYPE_CHECKING:  # hot executables import this module
    from collections.abc import Iterator, Mapping
    from typing import Union

    Value = Union[bool, int, float, str, list["Value"], Mapping[str, "Value"]]

_TOKEN = re.compile(
    r"""(?: \s+ | //[^\n]* | /\*.*?\*/ )            # nothing
      | (?P<string> " (?: [^"\\] | \\. )* " )
      | (?P<name> ' (?: [^'\\] | \\. )* ' | [A-Za-z_][A-Za-z0-9_]* )
      | (?P<open> [\[({] ) | (?P<close> [\])}] )
      | (?P<end> ; )
      | (?P<equals> =(?![=?!]) )
      | (?P<other> =\?= | =!= | [=!<>]= | [^"'] )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2}|[0-7]{1,2}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"f": b"\f", b"a": b"\a", b"v": b"\v"}
_ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_PAIRS = {"[": "]", "(": ")", "{": "}"}


def read_new(text: str) -> list[dict[str, str]]:
    """The ads in a text: for each, the attributes that are plain strings, by name in small letters.

    Raises MalformedRequest where the text is no sequence of ads.
    """
    ads = []
    tokens = _tokens(text)
    for _, token in tokens:
        if token != "[":
            raise MalformedRequest(f"the input is no sequence of ClassAds: {token[:40]!r} where an ad should begin")
        ads.append(_read_ad(tokens))
    return ads


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise MalformedRequest(f"the input is no ClassAd: {text[position : position + 40]!r} does not end")
        position = match.end()
        if match.lastgroup:
            yield match.lastgroup, match.group()


def _read_ad(tokens: Iterator[tuple[str, str]]) -> dict[str, str]:
    """What follows the opening bracket, up to the bracket that closes the ad."""
    ad: dict[str, str] = {}
    statement: list[tuple[str, str]] = []
    closing = ["]"]
    for kind, token in tokens:
        if kind == "open":
            closing.append(_PAIRS[token])
        elif kind == "close" and token != closing.pop():
            raise MalformedRequest(f"the input is no ClassAd: {token!r} closes what is not open")
        if (kind == "end" and len(closing) == 1) or not closing:
            _keep(statement, ad)
            statement = []
            if not closing:
                return ad
        else:
            statement.append((kind, token))
    raise MalformedRequest("the input is no ClassAd: it ends within an ad")


def _keep(statement: list[tuple[str, str]], ad: dict[str, str]) -> None:
    if not statement:
        return
    if len(statement) < 3 or statement[0][0] != "name" or statement[1][0] != "equals":
        words = " ".join(token for _, token in statement[:5])
        raise MalformedRequest(f"the input is no ClassAd: {words[:60]!r} assigns nothing")
    name = statement[0][1]
    if len(statement) == 3 and statement[2][0] == "string":
        ad[_unescape(name[1:-1] if name[0] == "'" else name).lower()] = _unescape(statement[2][1][1:-1])


def _unescape(literal: str) -> str:
    """HTCondor writes a character outside of ASCII as the bytes of its UTF-8, each in octal."""

    def byte(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8)]) if code[0] in b"01234567" else _LETTERS.get(code, code)

    return _ESCAPE.sub(byte, literal.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def write_new(ad: Mapping[str, Value]) -> str:
    """An ad in the new syntax, in one line."""
    return "[ " + "; ".join(f"{name} = {_literal(value)}" for name, value in ad.items()) + " ]"


def write_old(ad: Mapping[str, Value]) -> str:
    """An ad in the old syntax. Its strings must hold nothing that has to be escaped."""
    return "".join(f"{name} = {_literal(value)}\n" for name, value in ad.items())


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_escaped(c) for c in value) + '"'
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        return "{ " + ", ".join(_literal(item) for item in value) + " }"
    return write_new(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "\0":
        return "?"  # no string of HTCondor's can hold it
    return character if character.isprintable() or ord(character) > 0x7F else f"\\{ord(character):03o}"


def read_old(text: str) -> dict[str, str]:
    """The expressions of an ad in the old syntax, by name in small letters.

    Raises MalformedRequest for a line that assigns nothing, and for an attribute that is there twice: whoever reads the
    ad after us might take the other.
    """
    ad: dict[str, str] = {}
    for line in text.split("\n"):  # and at nothing else: HTCondor leaves all other characters in strings as they are
        if not line.strip():
            continue
        name, _, value = (part.strip() for part in line.partition("="))
        if not (_ATTRIBUTE.fullmatch(name) and "=" in line):
            raise MalformedRequest(f"the job ad holds a line that assigns nothing: {line[:60]!r}")
        if ad.setdefault(name.lower(), value) != value:
            raise MalformedRequest(f"the job ad holds {name} twice")
    return ad
