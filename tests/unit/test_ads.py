"""ClassAds as HTCondor writes and reads them: its own parser and printer, classad2, is the oracle."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmnode.errors import MalformedRequest
from vmnode.transfer.ads import read_new, read_old, write_new, write_old

# HTCondor's library reads a configuration when it is first used, and asks DNS for this host's own name.
os.environ.update(CONDOR_CONFIG="ONLY_ENV", _CONDOR_NETWORK_INTERFACE="127.0.0.1", _CONDOR_NO_DNS="True")
os.environ.update(_CONDOR_DEFAULT_DOMAIN_NAME="example.org")
import classad2

OLD, NEW = classad2.ParserType.Old, classad2.ParserType.New

# What no ClassAd string holds: NUL. What no Python string that is UTF-8 holds: surrogates.
strings = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
    st.text(st.sampled_from("\"\\'[](){};=,/*\n\r\t\a\v\f\x01\x7f\x85\u2028ä€01278nx "), max_size=20),
)
identifiers = st.from_regex(r"[A-Z][a-z0-9]{0,6}_", fullmatch=True)
integers = st.integers(-(2**63) + 1, 2**63 - 1)
numbers = st.one_of(st.booleans(), integers, st.floats(allow_nan=False, allow_infinity=False))


def nested(names: st.SearchStrategy[str], leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Ads in ads and lists, with names that differ not only in case."""

    def ads_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
        pairs = st.lists(st.tuples(names, values), max_size=4, unique_by=lambda pair: pair[0].lower())
        return pairs.map(dict)

    return ads_of(st.recursive(leaves, lambda values: st.lists(values, max_size=3) | ads_of(values), max_leaves=8))


# --- the new syntax, read -----------------------------------------------------------------------------------------

EXPRESSIONS = [
    "undefined",
    "error",
    'strcat("a;]", b)',
    'ifThenElse(a =?= "}", {1, "]"}, [c = ";"])',
    'a.b["Url = 1"] =!= "x" && !c || d <= 2.5e-10',
    '"a" == "b"',
    '{"a]", 1}[0]',
    "real(\"INF\") >>> 'a b'",
]


def as_htcondor_s(value: Any) -> Any:
    if isinstance(value, dict):
        ad = classad2.ClassAd()
        for name, part in value.items():
            ad[name] = as_htcondor_s(part)
        return ad
    return [as_htcondor_s(part) for part in value] if isinstance(value, list) else value


@settings(max_examples=400)
@given(
    st.lists(
        nested(
            identifiers | st.text(st.sampled_from("aUrl '\\\"[];=.é\n"), min_size=1, max_size=6),
            st.one_of(strings, numbers, st.sampled_from(EXPRESSIONS).map(classad2.ExprTree)),
        ),
        max_size=3,
    )
)
@example([{"Url": "nfs:///b\u00fccher/\u20ac.qcow2"}])  # is printed as octal bytes
@example([{"'": "x", "a'": "y", "'a": "z"}])
@example([{"Url": "a\a\v\b\f\x01\x7f7"}])
def test_what_htcondor_prints_is_read(ads: list[dict[str, Any]]) -> None:
    expected = [{name.lower(): value for name, value in ad.items() if isinstance(value, str)} for ad in ads]
    printed = [as_htcondor_s(ad) for ad in ads]
    assert read_new("\n".join(map(str, printed))) == expected  # over several lines
    assert read_new("".join(map(repr, printed))) == expected  # each in one


@pytest.mark.parametrize(
    ("text", "ads"),
    [
        ("", []),
        (" \n\t", []),
        ("[]", [{}]),
        ("[ ; ;]", [{}]),
        ('[Url="x"]', [{"url": "x"}]),
        ('[ URL = "x"; ]', [{"url": "x"}]),
        ("['Url' = \"x\"]", [{"url": "x"}]),
        ("['local file' = \"x\"]", [{"local file": "x"}]),
        ('[ Url = "x"; url = "y" ]', [{"url": "y"}]),  # the last one holds, as in HTCondor
        ('// "\n[ a = /* ]; " */ "x" ] // ]', [{"a": "x"}]),
        ('[ a = "// no /* comment" ]', [{"a": "// no /* comment"}]),
        (r'[ a = "\"\\\n\t\r\b\f\a\v\'\?" ]', [{"a": "\"\\\n\t\r\b\f\a\v'?"}]),
        (r'[ a = "\12\012\101\1018" ]', [{"a": "\n\nAA8"}]),
        (r'[ a = "b\303\274cher" ]', [{"a": "bücher"}]),
        ('[ a = "bücher" ]', [{"a": "bücher"}]),
        ("[ a = 1; b = x; c = {}; d = []; e = (1) ]", [{}]),
        ('[ a = [ Url = "inner" ]; b = "outer" ]', [{"b": "outer"}]),
        ('[a="x"][b="y"]\n[c="z"]', [{"a": "x"}, {"b": "y"}, {"c": "z"}]),
    ],
)
def test_the_new_syntax(text: str, ads: list[dict[str, str]]) -> None:
    assert read_new(text) == ads


def test_the_input_of_protocol_4_with_an_ad_that_has_no_url() -> None:
    """As HTCondor 25 writes it: settings first, then a line for each file."""
    text = (
        '[ PluginData = [ Capabilities = { "a", "b" } ]; TransferProtocolVersion = 4 ]\n'
        '[ LocalFileName = "/var/lib/condor/execute/dir_12/scratch/a.qcow2:d0";'
        ' DesiredTotalBytes = 0; Url = "nfs:///images/a.qcow2:d0" ]\n'
        '[ Url = "nfs:///images/b.qcow2:d1"; LocalFileName = "/var/lib/condor/execute/dir_12/scratch/b.qcow2:d1" ]\n'
    )
    scratch = "/var/lib/condor/execute/dir_12/scratch"
    assert read_new(text) == [
        {},
        {"localfilename": f"{scratch}/a.qcow2:d0", "url": "nfs:///images/a.qcow2:d0"},
        {"url": "nfs:///images/b.qcow2:d1", "localfilename": f"{scratch}/b.qcow2:d1"},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "'x' where an ad should begin"),
        ('Url = "x"', "'Url' where an ad should begin"),
        ("]", "']' where an ad should begin"),
        ("[] x", "'x' where an ad should begin"),
        ("{}", "'{' where an ad should begin"),
        ("[", "it ends within an ad"),
        ('[ Url = "x"', "it ends within an ad"),
        ("[ a = { 1 ", "it ends within an ad"),
        ("[" * 100_000, "it ends within an ad"),
        ('[ Url = "x', "does not end"),
        ('[ Url = "x\\" ]', "does not end"),
        ("[ 'Url = 1 ]", "does not end"),
        ("[ a = { 1 ] }", "']' closes what is not open"),
        ("[ a = ( 1 } ]", "'}' closes what is not open"),
        ("[ a ]", "'a' assigns nothing"),
        ("[ a = ]", "'a =' assigns nothing"),
        ("[ a = 1; b ]", "'b' assigns nothing"),
        ("[ = 1 ]", "'= 1' assigns nothing"),
        ("[ 1 = 1 ]", "'1 = 1' assigns nothing"),
        ('[ "Url" = "x" ]', "assigns nothing"),
        ("[ a == 1 ]", "'a == 1' assigns nothing"),
        ("[ a =?= 1 ]", "'a =?= 1' assigns nothing"),
    ],
)
def test_what_is_no_new_ad_is_refused(text: str, words: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        read_new(text)
    assert words in caught.value.what


as_read_from_a_file = st.one_of(
    st.binary(max_size=80),
    st.text(st.sampled_from("[]{}();=\"'\\/* \nUrl01\udc80"), max_size=60).map(
        lambda text: text.encode("utf-8", "surrogateescape")
    ),
).map(lambda data: data.decode("utf-8", "surrogateescape"))


@settings(max_examples=1000)
@given(as_read_from_a_file)
@example('[a="\\')
@example("[a='\\'")
@example('["')
@example("['\\377'=\"\\377\"]")
def test_any_text_is_a_list_of_ads_or_refused(text: str) -> None:
    try:
        ads = read_new(text)
    except MalformedRequest:
        return
    for ad in ads:
        for name, value in ad.items():
            assert type(value) is str and name == name.lower()


@settings(max_examples=200)
@given(nested(identifiers, strings | numbers), st.data())
def test_an_ad_that_is_cut_off_is_refused(ad: dict[str, Any], data: st.DataObject) -> None:
    text = repr(as_htcondor_s(ad))
    with pytest.raises(MalformedRequest):
        read_new(text[: data.draw(st.integers(1, len(text) - 1))])


# --- the new syntax, written --------------------------------------------------------------------------------------


def as_python_s(value: Any) -> Any:
    """What HTCondor evaluated, as plain values."""
    if isinstance(value, classad2.ClassAd):
        return {name: as_python_s(value.eval(name)) for name in value}
    if isinstance(value, list):
        return [as_python_s(item.eval() if isinstance(item, classad2.ExprTree) else item) for item in value]
    return value


@settings(max_examples=400)
@given(nested(identifiers, strings | numbers))
@example({"TransferError": '"; TransferSuccess = true; X = "'})
@example({"TransferError": "\\"})
@example({"TransferError": "\x017"})  # an octal escape must not swallow a digit
@example({"TransferUrl": "\n]\n[ TransferSuccess = true ]"})
@example({"A": {"B": [{"C": -0.0}, 1e300, 5e-324, True, -1]}})
def test_what_is_written_htcondor_reads_as_the_same_values(ad: dict[str, Any]) -> None:
    text = write_new(ad)
    assert "\n" not in text
    assert as_python_s(classad2.parseOne(text, NEW)) == ad
    assert read_new(text) == [{name.lower(): value for name, value in ad.items() if isinstance(value, str)}]


def test_true_is_not_1() -> None:
    assert write_new({"A": True, "B": 1, "C": False, "D": 1.0}) == "[ A = true; B = 1; C = false; D = 1.0 ]"
    assert write_new({}) == "[  ]"


def test_a_nul_which_no_classad_string_holds_damages_nothing_else() -> None:
    ad = classad2.parseOne(write_new({"TransferSuccess": False, "TransferUrl": "a\0b", "Z": "z"}), NEW)
    assert as_python_s(ad) == {"TransferSuccess": False, "TransferUrl": "a?b", "Z": "z"}


# --- the old syntax -----------------------------------------------------------------------------------------------

PLAIN = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters='"\\'), max_size=20)


@given(st.dictionaries(identifiers, PLAIN | st.booleans() | integers))
def test_what_is_written_in_the_old_syntax_htcondor_reads(ad: dict[str, Any]) -> None:
    text = write_old(ad)
    assert text.count("\n") == len(ad)
    assert as_python_s(classad2.parseOne(text, OLD)) == ad


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            identifiers,
            st.one_of(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=20),
                st.text(st.sampled_from("\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\"\\ =;'a"), max_size=12),
                st.booleans() | integers,
            ),
        ),
        unique_by=lambda pair: pair[0].lower(),
        max_size=6,
    )
)
@example([("Description_", "a\u2028JobVMVNCConsole = true")])
@example([("Description_", "a\x0cVM_WORKING_DIR = b")])
@example([("Description_", "\\")])
def test_what_htcondor_prints_in_the_old_syntax_is_read_line_by_line(pairs: list[tuple[str, Any]]) -> None:
    ad = as_htcondor_s(dict(pairs))
    read = read_old(ad.printOld())
    assert read.keys() == {name.lower() for name, _ in pairs}
    for name, value in pairs:
        assert classad2.parseOne(f"X = {read[name.lower()]}", OLD).eval("X") == value


def test_the_old_syntax() -> None:
    text = 'JobVMMemory = 512\n  Owner="alice"  \n\nArgs = "a = b"\nRequirements = (TARGET.Arch == "X86_64") && true\n'
    assert read_old(text) == {
        "jobvmmemory": "512",
        "owner": '"alice"',
        "args": '"a = b"',
        "requirements": '(TARGET.Arch == "X86_64") && true',
    }


def test_an_attribute_that_is_there_twice_is_refused_whatever_its_case() -> None:
    for text in ("A = 1\nA = 2\n", "A = 1\nB = 1\na = 2\n", 'Disk = "a"\nDISK = "A"\n'):
        with pytest.raises(MalformedRequest, match="twice"):
            read_old(text)
    assert read_old("A = 1\na = 1\n") == {"a": "1"}  # says the same


@pytest.mark.parametrize(
    "line", ["x", "= 1", "a b = 1", "1a = 1", "'a' = 1", "[ a = 1 ]", '"', "ä = 1", "a: 1", "a-b = 1"]
)
def test_a_line_that_assigns_nothing_is_refused(line: str) -> None:
    with pytest.raises(MalformedRequest, match="a line that assigns nothing") as caught:
        read_old(f"A = 1\n{line}\nB = 2\n")
    assert repr(line) in caught.value.what


@pytest.mark.timeout(30)
@pytest.mark.parametrize("filler", [" ", "=", '"', "\\", "a", "\r"])
def test_a_megabyte_of_anything_in_a_line_is_read_at_once(filler: str) -> None:
    assert read_old(f'A = "{filler * 1_000_000}x"\n') == {"a": f'"{filler * 1_000_000}x"'}


@settings(max_examples=500)
@given(as_read_from_a_file | st.text(st.sampled_from('ABab_. =1"\\\n\r\x85\u2028'), max_size=60))
def test_any_text_is_an_old_ad_or_refused(text: str) -> None:
    try:
        ad = read_old(text)
    except MalformedRequest:
        return
    for name, value in ad.items():
        assert name.isascii() and name.replace(".", "_").isidentifier() and name == name.lower()
        assert "\n" not in value and value == value.strip()
