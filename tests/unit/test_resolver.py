"""Which of the host's name servers are on its loopback, and what is a question."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from vmnode.host.dns_relay import is_answer_to, is_question
from vmnode.host.resolver import iptables_rules, loopback_servers, nft_rule

STUB, LOCAL = IPv4Address("127.0.0.53"), IPv4Address("127.0.0.1")


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("# systemd-resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n", (STUB,)),
        ("nameserver 127.0.0.1\nnameserver 10.0.0.1\n", (LOCAL,)),
        ("nameserver\t127.0.0.1 # dnsmasq\nnameserver 127.0.0.53\n", (LOCAL, STUB)),
        ("nameserver 127.0.0.53\nnameserver 127.0.0.53\n", (STUB,)),
        ("nameserver 10.0.0.1\nnameserver fe80::1%eth0\n", ()),
        ("nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nnameserver 127.0.0.1\n", ()),
        ("#nameserver 127.0.0.53\n;nameserver 127.0.0.1\nnameserver 10.0.0.1\n", ()),
        ("search example.org\n", (LOCAL,)),
        ("", (LOCAL,)),
        ("nameserver\nnameserver resolver.example.org\nnameserver 127.1\n\x00\xff\n", ()),
    ],
)
def test_the_servers_on_the_loopback(text: str, servers: tuple[IPv4Address, ...]) -> None:
    assert loopback_servers(text) == (servers, ())


def test_one_on_the_ipv6_loopback_cannot_be_relayed() -> None:
    text = "nameserver ::1\nnameserver 127.0.0.1\n"
    assert loopback_servers(text) == ((LOCAL,), (IPv6Address("::1"),))


def test_an_answer_is_no_question_and_a_fragment_is_nothing() -> None:
    question = b"\x12\x34\x01\x00" + bytes(8)
    answer = b"\x12\x34\x81\x80" + bytes(8)
    assert (is_question(question), is_question(answer), is_question(question[:11]), is_question(b"")) == (
        True,
        False,
        False,
        False,
    )
    assert is_answer_to(question, answer)
    assert not is_answer_to(question, question)
    assert not is_answer_to(question, b"\x12\x35" + answer[2:])
    assert not is_answer_to(question, answer[:11])


def test_the_rules_for_both_backends() -> None:
    gateway = IPv4Address("100.64.0.1")
    assert nft_rule("vmnj0a1b", gateway, 53) == (
        'iifname "vmnj0a1b*" ip daddr 127.0.0.0/8 meta l4proto { tcp, udp } th dport 53 dnat ip to 100.64.0.1:53'
    )
    assert iptables_rules("vmnj0a1b", gateway, 53) == [
        "-d 127.0.0.0/8 -i vmnj0a1b+ -p udp -m udp --dport 53 -j DNAT --to-destination 100.64.0.1:53",
        "-d 127.0.0.0/8 -i vmnj0a1b+ -p tcp -m tcp --dport 53 -j DNAT --to-destination 100.64.0.1:53",
    ]
