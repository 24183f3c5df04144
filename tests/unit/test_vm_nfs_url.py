"""The URL of a disk: every form of the contract, and for every slip a sentence that says what it is."""

from __future__ import annotations

import re
from typing import Optional
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmnode.errors import EXIT_USAGE, MalformedRequest
from vmnode.transfer.url import EXAMPLE, parse, plain

GIB = 1 << 30


def parsed(url: str) -> tuple[str, str, Optional[str], Optional[int]]:
    request = parse(url)
    return request.path, request.name, request.format, request.size


def sentence(url: str) -> str:
    with pytest.raises(MalformedRequest) as caught:
        parse(url)
    assert caught.value.exit_status == EXIT_USAGE == 64
    assert caught.value.hint == f"the form is {EXAMPLE}"
    assert caught.value.what.isprintable()
    return caught.value.what


# --- what is right ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path", "name"),
    [
        ("nfs:///images/el9.qcow2:vmimage.img", "/images/el9.qcow2", "vmimage.img"),
        ("nfs:/images/el9.qcow2:vmimage.img", "/images/el9.qcow2", "vmimage.img"),
        ("nfs:///images/el9.qcow2", "/images/el9.qcow2", "el9.qcow2"),
        ("nfs:/images/el9.qcow2", "/images/el9.qcow2", "el9.qcow2"),
        ("NFS:///images/el9.qcow2", "/images/el9.qcow2", "el9.qcow2"),  # RFC 3986: schemes have no case
        ("nfs:///el9", "/el9", "el9"),
        ("nfs:////images//el9/./el9.qcow2", "/images/el9/el9.qcow2", "el9.qcow2"),
        ("nfs:///images/..el9/el9..qcow2", "/images/..el9/el9..qcow2", "el9..qcow2"),
        ("nfs:///images/a:b:c", "/images/a:b", "c"),
        ("nfs:///images/bücher.qcow2:b.qcow2", "/images/bücher.qcow2", "b.qcow2"),
        ("nfs:///a:_a-b.c+d=e@F9", "/a", "_a-b.c+d=e@F9"),
        (f"nfs:///a:{'x' * 200}", "/a", "x" * 200),
    ],
)
def test_the_forms(url: str, path: str, name: str) -> None:
    assert parsed(url) == (path, name, None, None)


@pytest.mark.parametrize(
    ("query", "format", "size"),
    [
        ("format=raw", "raw", None),
        ("format=qcow2", "qcow2", None),
        ("size=20G", None, 20 * GIB),
        ("format=raw&size=20G", "raw", 20 * GIB),
        ("size=20G&format=qcow2", "qcow2", 20 * GIB),
        ("size=512", None, 512),
        ("size=1K", None, 1024),
        ("size=3M", None, 3 * 1024 * 1024),
        ("size=2T", None, 2 * 1024**4),
        ("size=1024T", None, 2**50),
        ("size=1125899906842624", None, 2**50),
        ("size=007G", None, 7 * GIB),
        ("size=%32G&format=%72aw", "raw", 2 * GIB),
    ],
)
def test_the_options(query: str, format: Optional[str], size: Optional[int]) -> None:
    assert parsed(f"nfs:///images/a.qcow2:disk?{query}") == ("/images/a.qcow2", "disk", format, size)
    assert parsed(f"nfs:/images/a.qcow2?{query}") == ("/images/a.qcow2", "a.qcow2", format, size)


@pytest.mark.parametrize(
    ("url", "path", "name"),
    [
        ("nfs:///my%20images/a%25b.qcow2", "/my images/a%b.qcow2", None),
        ("nfs:///images/a%3Ab%3Fc%23d:disk", "/images/a:b?c#d", "disk"),
        ("nfs:///images/a%3ab:disk", "/images/a:b", "disk"),  # hexadecimal digits of either case
        ("nfs:///b%C3%BCcher/%e2%82%ac.raw:disk", "/bücher/€.raw", "disk"),
        ("nfs:///images%2Fel9.qcow2", "/images/el9.qcow2", "el9.qcow2"),
        ("nfs:///images/%2525:disk", "/images/%25", "disk"),  # decoded once
        ("nfs:///images/el9:%64isk%2Eimg", "/images/el9", "disk.img"),
    ],
)
def test_percent_encoding(url: str, path: str, name: Optional[str]) -> None:
    if name is None:
        assert "cannot be the name of a disk" in sentence(url)  # for want of another name
        url, name = f"{url}:disk", "disk"
    assert parsed(url) == (path, name, None, None)


# --- what is wrong ------------------------------------------------------------------------------------------------

WRONG = {
    "": "it does not begin with nfs:",
    "nfs": "it does not begin with nfs:",
    "/images/a.qcow2": "it does not begin with nfs:",
    "http://images/a.qcow2": "it does not begin with nfs:",
    " nfs:///images/a.qcow2": "it does not begin with nfs:",
    "nfs:///my images/a.qcow2": "write %20 for a blank",
    "nfs:///images/a.qcow2 ": "write %20 for a blank",
    "nfs:///images/a\tb": "characters that cannot be printed",
    "nfs:///images/a\n": "characters that cannot be printed",
    "nfs:///images/a\0b": "characters that cannot be printed",
    "nfs:///images/a\u202eb": "characters that cannot be printed",
    "nfs:///images/a\xa0b": "characters that cannot be printed",
    "nfs:///images/a\udcff": "characters that cannot be printed",
    "nfs:///images/a#b": "it holds a #; write %23",
    "nfs:///images/a:disk?size=1G#b": "it holds a #; write %23",
    "nfs://server/images/a.qcow2": "it names a host, 'server'",
    "nfs://images": "it names a host, 'images'",
    "nfs://server:2049/images/a.qcow2:disk": "it names a host, 'server:2049'",
    "nfs:images/a.qcow2": "its path is not absolute",
    "nfs:a": "its path is not absolute",
    "nfs:": "its path is not absolute",
    "nfs::disk": "its path is not absolute",
    "nfs:?size=1G": "its path is not absolute",
    "nfs:///../etc/shadow": "its path holds '..'",
    "nfs:///images/..": "its path holds '..'",
    "nfs:///images/../a:disk": "its path holds '..'",
    "nfs:///images/%2e%2E/a:disk": "its path holds '..'",
    "nfs:///images%2F..%2Fa:disk": "its path holds '..'",
    "nfs:///": "it names a directory",
    "nfs:/": "it names a directory",
    "nfs:///.": "it names a directory",
    "nfs:///images/": "it names a directory",
    "nfs:///images/:disk": "it names a directory",
    "nfs:///images/a.qcow2:": "the name after the colon is empty",
    "nfs:///images/a.qcow2:?size=1G": "the name after the colon is empty",
    "nfs:///images:a/b.qcow2": "a colon in the path is written %3A",
    "nfs:///images/a.qcow2:sub/disk": "the name of the disk, without /",
    "nfs:///images/a.qcow2:../disk": "the name of the disk, without /",
    "nfs:///images/a.qcow2:sub%2Fdisk": "'sub/disk' cannot be the name of a disk",
    "nfs:///images/a.qcow2:..": "'..' cannot be the name of a disk",
    "nfs:///images/a.qcow2:%2e": "'.' cannot be the name of a disk",
    "nfs:///images/a.qcow2:.disk": "'.disk' cannot be the name of a disk",
    "nfs:///images/a.qcow2:-disk": "'-disk' cannot be the name of a disk",
    "nfs:///images/a.qcow2:a,b": "'a,b' cannot be the name of a disk",
    "nfs:///images/a.qcow2:a%3Ab": "'a:b' cannot be the name of a disk",
    "nfs:///images/a.qcow2:a%20b": "'a b' cannot be the name of a disk",
    "nfs:///images/a.qcow2:a%22b": "cannot be the name of a disk",
    "nfs:///images/a.qcow2:a'b": "cannot be the name of a disk",
    "nfs:///images/a.qcow2:a<b": "'a<b' cannot be the name of a disk",
    "nfs:///images/a.qcow2:a%26b": "'a&b' cannot be the name of a disk",
    "nfs:///images/a.qcow2:ü": "'ü' cannot be the name of a disk",
    f"nfs:///images/a.qcow2:{'x' * 201}": "cannot be the name of a disk",
    "nfs:///images/my%20image.qcow2": "give it another one, as in nfs:///images/el9.qcow2:disk.qcow2",
    "nfs:///images/100%": "a % itself is written %25",
    "nfs:///images/100%2": "a % itself is written %25",
    "nfs:///images/100%zz": "a % itself is written %25",
    "nfs:///images/%-1": "a % itself is written %25",
    "nfs:///images/%\uff11\uff11": "a % itself is written %25",  # digits, but not of ASCII
    "nfs:///images/a:%": "a % itself is written %25",
    "nfs:///images/%FF": "is not UTF-8",
    "nfs:///images/%C3:disk": "is not UTF-8",
    "nfs:///images/%C0%AF:disk": "is not UTF-8",  # an overlong /
    "nfs:///images/%ED%B3%BF:disk": "is not UTF-8",  # a surrogate
    "nfs:///images/a%00b": "it holds a character that cannot be printed",
    "nfs:///images/a%0Ab": "it holds a character that cannot be printed",
    "nfs:///images/a%E2%80%AEb": "it holds a character that cannot be printed",
    "nfs:///images/a:b%7F": "it holds a character that cannot be printed",
    "nfs:///images/a?": "'' is no option",
    "nfs:///images/a?&": "'' is no option",
    "nfs:///images/a?size=1G&": "'' is no option",
    "nfs:///images/a?size": "'size' is no option",
    "nfs:///images/a?Size=1G": "'Size=1G' is no option",
    "nfs:///images/a?backing=/etc/shadow": "'backing=/etc/shadow' is no option",
    "nfs:///images/a?f%6Frmat=raw": "'f%6Frmat=raw' is no option",
    "nfs:///images/a?size=1G;format=raw": "size=1G;format=raw is no size",
    "nfs:///images/a?size=1G&size=2G": "size is given twice",
    "nfs:///images/a?format=raw&format=raw": "format is given twice",
    "nfs:///images/a?format=vmdk": "format=vmdk is none of raw, qcow2",
    "nfs:///images/a?format=": "format= is none of raw, qcow2",
    "nfs:///images/a?format=RAW": "format=RAW is none of raw, qcow2",
    "nfs:///images/a?format=raw?size=1G": "format=raw?size=1G is none of raw, qcow2",
    "nfs:///images/a?size=": "size= is no size",
    "nfs:///images/a?size=0": "size=0 is no size",
    "nfs:///images/a?size=-1": "size=-1 is no size",
    "nfs:///images/a?size=1.5G": "size=1.5G is no size",
    "nfs:///images/a?size=20GB": "size=20GB is no size",
    "nfs:///images/a?size=20g": "size=20g is no size",
    "nfs:///images/a?size=G": "size=G is no size",
    "nfs:///images/a?size=\uff11G": "is no size",
    "nfs:///images/a?size=1%0A": "it holds a character that cannot be printed",
    "nfs:///images/a?size=1025T": "at most 1024T",
    "nfs:///images/a?size=1125899906843136": "at most 1024T",
    f"nfs:///images/a?size={'9' * 400}": "at most 1024T",
    "nfs:///images/a?size=1000": "multiples of 512",
    "nfs:///images/a?size=513": "multiples of 512",
}


@pytest.mark.parametrize(("url", "words"), WRONG.items(), ids=[ascii(url)[1:60] for url in WRONG])
def test_what_is_wrong_is_said(url: str, words: str) -> None:
    said = sentence(url)
    assert words in said
    shown = url if url.isprintable() and len(url) <= 200 else ""
    assert said.startswith(f"the URL {shown}") and " cannot be used: " in said
    # Only to whom gave none, another name is proposed.
    assert ("give it another one" in said) == ("give it another one" in words)


def test_a_long_url_is_not_repeated_whole() -> None:
    assert len(sentence("nfs:relative" + "x" * 10_000)) < 300


# --- anything at all ----------------------------------------------------------------------------------------------

# Written again, by hand: what vm_disk, awk and XML take as it stands.
SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+=@-")

urls = st.one_of(
    st.text(st.characters(), max_size=60),
    st.text(st.characters(), max_size=60).map("nfs:///{}".format),
    st.text(st.sampled_from("/.:?&=%#aA0 2eEfF\\'\"<,-\0\n\u2028€\udcff"), max_size=40).map("nfs:/{}".format),
    st.tuples(st.text(st.sampled_from("/.:%2eax"), max_size=20), st.text(st.sampled_from("sizeformat=&0123456789GKrw")))
    .map("?".join)
    .map("nfs:///{}".format),
)


@settings(max_examples=1000)
@given(urls)
@example("nfs:///%")
@example("nfs:///a?size=%F0")
@example("nfs:///a/%2e%2e/%2e%2e/b:c")
def test_any_text_is_a_plain_request_or_refused(url: str) -> None:
    try:
        request = parse(url)
    except MalformedRequest as error:
        assert error.what.isprintable()
        return
    assert request.path.startswith("/") and request.path.isprintable()
    components = request.path[1:].split("/")
    assert components and not {"", ".", ".."} & set(components)
    assert request.name and set(request.name) <= SAFE and request.name[0] not in ".+=@-"
    assert plain(request.name)
    assert request.format in (None, "raw", "qcow2")
    assert request.size is None or (0 < request.size <= 2**50 and request.size % 512 == 0)


component: st.SearchStrategy[str] = st.text(
    st.characters(exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"), exclude_characters="/"),
    min_size=1,
    max_size=12,
).filter(lambda text: text not in (".", "..") and text.isprintable())
names = st.from_regex(re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,40}"), fullmatch=True)


@settings(max_examples=400)
@given(st.lists(component, min_size=1, max_size=5), names, st.sampled_from(["nfs://", "nfs:"]))
def test_a_path_that_the_standard_library_quotes_is_found_again(parts: list[str], name: str, prefix: str) -> None:
    path = "/" + "/".join(parts)
    assert parsed(f"{prefix}{quote(path)}:{quote(name)}") == (path, name, None, None)


@given(st.integers(1, 2**41))
def test_a_size_in_bytes_is_taken_as_it_stands(sectors: int) -> None:
    assert parse(f"nfs:///a?size={sectors * 512}").size == sectors * 512
