"""An invite is short, survives copy and paste, and says in one line what is wrong with it."""

from __future__ import annotations

import contextlib
import hashlib

import base58
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.identity import peer_id_of
from shoal.protocol.invite import MAX_INVITE_CHARS, Invite, InviteError, Maddr, _checksum

RUN = hashlib.sha256(b"run").hexdigest()
COORDINATOR, OTHER = peer_id_of(b"coordinator"), peer_id_of(b"other")
ED25519 = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
PLAIN = Invite(RUN, COORDINATOR, (f"/ip4/203.0.113.5/tcp/4001/p2p/{COORDINATOR}",))

peers = st.sampled_from([COORDINATOR, OTHER, ED25519])
hosts = st.one_of(
    st.ip_addresses(v=4).filter(lambda ip: not ip.is_unspecified and not ip.is_multicast).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).filter(lambda ip: not ip.is_unspecified and not ip.is_multicast).map(lambda ip: f"/ip6/{ip}"),
    st.sampled_from(["/dns/shoal.example", "/dns4/a-b.c", "/dns6/x"]),
)
relays = st.sampled_from(["", f"/p2p/{OTHER}/p2p-circuit"])
maddrs = st.builds(lambda h, p, r, i: f"{h}/tcp/{p}{r}/p2p/{i}", hosts, st.integers(1, 65535), relays, peers)
invites = st.builds(
    Invite,
    run=st.binary(min_size=32, max_size=32).map(bytes.hex),
    coordinator=st.sampled_from([COORDINATOR, OTHER]),
    maddrs=st.lists(maddrs, min_size=1, max_size=8).map(tuple),
    token=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=64),
)


@settings(max_examples=50, deadline=None, database=None)
@given(invites)
def test_decode_inverts_encode(invite: Invite) -> None:
    text = invite.encode()
    assert Invite.decode(text) == invite and len(text) <= MAX_INVITE_CHARS


def test_a_usual_invite_fits_in_two_terminal_lines() -> None:
    assert len(PLAIN.encode()) <= 116
    assert PLAIN.encode().startswith("shoal1-")


def test_line_breaks_and_spaces_from_pasting_do_no_harm() -> None:
    text = PLAIN.encode()
    assert Invite.decode(f"  {text[:40]}\n {text[40:80]}\r\n{text[80:]}\t") == PLAIN


def test_every_truncation_says_cut_short() -> None:
    text = PLAIN.encode()
    for length in range(len("shoal1-"), len(text)):
        with pytest.raises(InviteError, match="cut short"):
            Invite.decode(text[:length])


def test_every_single_changed_character_is_noticed() -> None:
    text = PLAIN.encode()
    for at in range(len(text)):
        for char in "2zé0":
            if text[at] != char:
                with pytest.raises(InviteError):
                    Invite.decode(text[:at] + char + text[at + 1 :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        ("hello", "not an invite"),
        ("shoal-abc", "not an invite"),
        ("shoal0-abc", "not an invite"),
        ("shoal2-abc", r"newer shoal \(format 2\); update"),
        ("shoal1-", "cut short"),
        (PLAIN.encode() + "2", "characters too many"),
        (PLAIN.encode()[:-1] + "0", "character [0-9]+ is '0', which invites never use"),
        (PLAIN.encode()[:30] + PLAIN.encode()[31] + PLAIN.encode()[30] + PLAIN.encode()[32:], "checksum"),
        ("shoal1-" + "z" * 3000, "too long"),
        ("x" * 1_000_000, "too long"),
    ],
)
def test_a_bad_invite_gets_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(InviteError, match=message) as caught:
        Invite.decode(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def _frame(body: bytes, version: int = 1) -> str:
    encoded = base58.b58encode(body + _checksum(body)).decode()
    alphabet = base58.BITCOIN_ALPHABET.decode()
    return f"shoal{version}-{alphabet[len(encoded) // 58]}{alphabet[len(encoded) % 58]}{encoded}"


HEAD = bytes.fromhex(RUN) + hashlib.sha256(b"c").digest()
IP4 = b"\x00\xcb\x00\x71\x05\x0f\xa1"


def test_the_forged_frames_below_are_right_up_to_their_fault() -> None:
    assert Invite.decode(_frame(HEAD + b"\0" + b"\1" + IP4)).maddrs[0].startswith("/ip4/203.0.113.5/tcp/4001/p2p/")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        HEAD,
        HEAD + b"\0\0",  # no address
        HEAD + b"\0\x09" + IP4 * 9,  # too many
        HEAD + b"\xff" + b"a" * 255 + b"\1" + IP4,  # token too long
        HEAD + b"\2a b"[:3] + b"\1" + IP4,  # token with a blank
        HEAD + b"\2\xff\xfe\1" + IP4,  # token is no text
        HEAD + b"\0\1" + IP4 + b"x",  # bytes too many
        HEAD + b"\0\1" + b"\x00\x00\x00\x00\x00\x0f\xa1",  # 0.0.0.0
        HEAD + b"\0\1" + b"\x00\xcb\x00\x71\x05\x00\x00",  # port 0
        HEAD + b"\0\1" + b"\x09" + IP4[1:],  # unknown kind
        HEAD + b"\0\1" + b"\x0f\x05hello",  # text that is no address
        HEAD
        + b"\0\1"
        + b"\x0f"
        + bytes([len(PLAIN.maddrs[0])])
        + PLAIN.maddrs[0].encode(),  # text that has a packed form
        HEAD + b"\0\1" + b"\x0f\xff",  # text that is not there
    ],
)
def test_a_forged_invite_with_a_good_checksum_is_still_checked(body: bytes) -> None:
    with pytest.raises(InviteError):
        Invite.decode(_frame(body))


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(max_size=300))
def test_random_content_raises_nothing_but_invite_error(body: bytes) -> None:
    for text in (_frame(body), _frame(HEAD + body), "shoal1-" + body.decode("latin-1")):
        with contextlib.suppress(InviteError):
            assert Invite.decode(text).encode() == text


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "/ip4/1.2.3.4", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3/tcp/1", "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/-1", "/ip4/1.2.3.4/tcp/01", "/ip4/0.0.0.0/tcp/1", "/ip4/224.0.0.1/tcp/1", "/ip6/::/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1", "/dns/-a/tcp/1", "/dns/a..b/tcp/1", "/dns/a b/tcp/1", "/dns//tcp/1",
        "/dns/" + "a" * 64 + "/tcp/1", "/unix/x/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/x", "/ip4/1.2.3.4/tcp/1/",
        f"/ip4/1.2.3.4/tcp/1/p2p/{OTHER}/p2p/{OTHER}", "/ip4/1.2.3.4/tcp/1/quic", "/ip4/\u0661.2.3.4/tcp/1",
        "/ip4/1.2.3.4/tcp/\u0661", "/dns/" + "a." * 200 + "b/tcp/1", "/dns/a\n/tcp/1",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_dialled_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Maddr.parse(text)
    with pytest.raises(InviteError):
        Invite(RUN, COORDINATOR, (text,))


def test_addresses_are_kept_in_normal_form_and_split_for_dialling() -> None:
    address = Maddr.parse(f"/ip6/2001:DB8:0::1/tcp/4001/p2p/{OTHER}")
    assert (address.dialable, address.peer) == ("/ip6/2001:db8::1/tcp/4001", OTHER)
    relayed = Maddr.parse(f"/dns/Relay.Example/tcp/1/p2p/{OTHER}/p2p-circuit/p2p/{COORDINATOR}")
    assert relayed.dialable == f"/dns/relay.example/tcp/1/p2p/{OTHER}/p2p-circuit"
    assert (relayed.peer, relayed.relay) == (COORDINATOR, OTHER)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "ab"}, {"run": RUN.upper()}, {"coordinator": "x"}, {"coordinator": ED25519}, {"maddrs": ()},
        {"maddrs": PLAIN.maddrs * 9}, {"maddrs": ("/ip4/1.2.3.4/tcp/1",)}, {"token": "a b"}, {"token": "é"},
        {"token": "x" * 65},
    ],
)  # fmt: skip
def test_an_invite_out_of_bounds_cannot_be_made(change: dict[str, object]) -> None:
    fields = {"run": RUN, "coordinator": COORDINATOR, "maddrs": PLAIN.maddrs, "token": "", **change}
    with pytest.raises(InviteError):
        Invite(**fields)  # type: ignore[arg-type]
