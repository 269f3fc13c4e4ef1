"""An identity is one file that p2pd understands; its run key signs, and certificates hold offline."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import identity as identity_module
from shoal.protocol.events import Reason
from shoal.protocol.identity import (
    Identity,
    IdentityError,
    RunKeyCertificate,
    Sealed,
    peer_id_bytes,
    peer_id_of,
    peer_id_text,
    readable_name,
    verify,
    verify_certificate,
)
from shoal.protocol.transport import Refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identities")


@pytest.fixture(scope="module")
def alice(folder: Path) -> Identity:
    return Identity.create(folder / "alice.key")


@pytest.fixture(scope="module")
def bob(folder: Path) -> Identity:
    return Identity.create(folder / "bob.key")


def test_peer_id_equals_hivemind_s_for_our_file(alice: Identity) -> None:
    from hivemind.p2p import PeerID

    data = alice.path.read_bytes()
    assert PeerID.from_identity(data).to_base58() == alice.peer
    assert PeerID.from_base58(alice.peer).to_bytes() == peer_id_bytes(alice.peer)


def test_p2pd_starts_from_our_file_and_answers_with_our_peer_id(alice: Identity) -> None:
    from hivemind.p2p import P2P

    async def ask() -> str:
        async with asyncio.timeout(30):
            p2p = await P2P.create(identity_path=str(alice.path), no_listen=True, dht_mode="client")
            try:
                return str(p2p.peer_id.to_base58())
            finally:
                await p2p.shutdown()

    assert asyncio.run(ask()) == alice.peer


def test_a_file_that_hivemind_wrote_loads_with_the_same_peer_id(tmp_path: Path) -> None:
    from hivemind.p2p import P2P, PeerID

    path = tmp_path / "theirs.key"
    P2P.generate_identity(str(path))
    assert Identity.load(path).peer == PeerID.from_identity(path.read_bytes()).to_base58()


def test_key_file_is_private_and_alone_in_its_folder(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "new" / "peer.key")
    assert stat.S_IMODE(identity.path.stat().st_mode) == 0o600
    assert os.listdir(identity.path.parent) == ["peer.key"]


def test_a_second_load_gives_the_same_identity_bit_for_bit(alice: Identity) -> None:
    again = Identity.load_or_create(alice.path)
    assert (again.peer, again.name, again.certificate) == (alice.peer, alice.name, alice.certificate)
    assert again.sign("d", b"x") == alice.sign("d", b"x")


def test_create_never_replaces_a_file(alice: Identity) -> None:
    before = alice.path.read_bytes()
    with pytest.raises(IdentityError, match="exists already"):
        Identity.create(alice.path)
    assert alice.path.read_bytes() == before


def test_two_starts_at_once_end_with_one_identity(tmp_path: Path) -> None:
    path, found = tmp_path / "k", list[str]()
    threads = [threading.Thread(target=lambda: found.append(Identity.load_or_create(path).peer)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 3 and len(set(found)) == 1
    assert os.listdir(tmp_path) == ["k"]


def test_creation_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert Identity.create(tmp_path / "k").peer == Identity.load(tmp_path / "k").peer
    assert os.listdir(tmp_path) == ["k"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match=r"No space left on device; .*free space"):
        Identity.load_or_create(tmp_path / "k")
    assert os.listdir(tmp_path) == []


def _rsa_file(bits: int) -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return b"\x08\x00\x12" + identity_module._varint(len(der)) + der


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "PEM or OpenSSH"),
        (b"\x08\x01\x12\x40" + bytes(64), "type Ed25519"),
        (b"\x08\x03\x12\x40" + bytes(64), "type ECDSA"),
        (b"\x08\x00\x12\x05hello", "corrupt"),
        (b"\x08\x00\x12\xff\xff\xff\xff\xff\xff", "corrupt"),
        (b"hello world", "not a libp2p key file"),
        (b"\x08\x00\x12" + bytes(20_000), "too large"),
        (_rsa_file(1024), "no RSA key of 2048"),
    ],
    ids=["empty", "pem", "ed25519", "ecdsa", "no-der", "endless-varint", "text", "large", "weak"],
)
def test_a_file_that_is_no_identity_is_refused_and_kept(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "k"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=what) as caught:
        Identity.load_or_create(path)
    assert caught.value.fix and "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_every_cut_and_many_flips_of_a_key_file_are_refused_typed(tmp_path: Path, alice: Identity) -> None:
    data, path = alice.path.read_bytes(), tmp_path / "k"
    changed = [data[:n] for n in range(0, len(data), 97)]
    changed += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in (*range(12), *range(12, len(data), 131))]
    for content in [*changed, data + b"\0"]:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(IdentityError):
            Identity.load(path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_key_file_open_to_others_is_refused_with_the_command_that_closes_it(
    tmp_path: Path, alice: Identity, mode: int
) -> None:
    path = tmp_path / "k"
    path.write_bytes(alice.path.read_bytes())
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"run: chmod 600 {path}"):
        Identity.load(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "absent", "dangling"])
def test_something_else_in_the_place_of_the_file_is_a_typed_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "k"
    if kind == "folder":
        path.mkdir(mode=0o700)
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(IdentityError):
        Identity.load(path)
    assert kind == "absent" or os.path.lexists(path)


def test_the_secret_is_not_in_the_repr(alice: Identity) -> None:
    assert "run_key=<" not in repr(alice) and "Ed25519PrivateKey" not in repr(alice)


def test_readable_names_are_stable_short_and_safe_to_print() -> None:
    names = {readable_name(f"peer{n}") for n in range(2000)}
    assert len(names) == 2000
    assert all(len(name) <= 24 and name.replace("-", "").isalnum() and name.islower() for name in names)
    assert readable_name("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N") == "fair-mackerel-3ncg"


def test_the_certificate_names_its_owner(alice: Identity, bob: Identity) -> None:
    assert verify_certificate(alice.certificate) == (alice.peer, alice.public_key)
    assert RunKeyCertificate.from_bytes(alice.certificate.to_bytes()) == alice.certificate
    for forged in (
        replace(alice.certificate, run_key=bob.public_key),
        replace(alice.certificate, rsa_public_key=bob.certificate.rsa_public_key),
        replace(alice.certificate, signature=bob.certificate.signature),
    ):
        with pytest.raises(Refused) as caught:
            verify_certificate(forged)
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_one_key_has_one_encoding_and_so_one_peer_id(alice: Identity) -> None:
    """Without the NULL parameter the same key still parses; hashed, it would be a second PeerID."""
    der, null = alice.certificate.rsa_public_key, b"\x05\x00"
    at = der.index(null)
    other = bytearray(der[:at] + der[at + 2 :])
    other[2:4] = (len(other) - 4).to_bytes(2, "big")
    other[5] -= 2
    with pytest.raises(Refused) as caught:
        verify_certificate(replace(alice.certificate, rsa_public_key=bytes(other)))
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(("bits", "exponent"), [(1024, 65537), (2048, 3)])
def test_a_certificate_with_a_weak_or_unusual_key_is_malformed(bits: int, exponent: int, alice: Identity) -> None:
    key = rsa.generate_private_key(public_exponent=exponent, key_size=bits)
    signature = key.sign(b"shoal/run-key-certificate/v1\0" + alice.public_key, padding.PKCS1v15(), hashes.SHA256())
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(Refused) as caught:
        verify_certificate(RunKeyCertificate(public, alice.public_key, signature))
    assert caught.value.reason is Reason.MALFORMED


def test_a_signature_holds_for_one_key_one_domain_and_one_payload(alice: Identity, bob: Identity) -> None:
    signature = alice.sign("records", b"payload")
    assert verify(alice.public_key, "records", b"payload", signature)
    assert not verify(bob.public_key, "records", b"payload", signature)
    assert not verify(alice.public_key, "record", b"spayload", signature)
    assert not verify(alice.public_key, "records", b"payload!", signature)
    assert not verify(alice.public_key, "records", b"payload", signature[:-1])
    assert not verify(b"short", "records", b"payload", signature)


def test_a_sealed_text_survives_the_wire_and_no_change_of_a_byte_does(alice: Identity) -> None:
    data = alice.seal("d", 'text "quoted" ü').to_bytes()
    sealed = Sealed.from_bytes(data, max_bytes=2000)
    assert sealed.verify("d") == (alice.peer, alice.public_key)
    with pytest.raises(Refused):
        sealed.verify("other domain")
    for at in range(len(data)):
        with pytest.raises(Refused):
            Sealed.from_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], max_bytes=2000).verify("d")
    with pytest.raises(Refused, match="canonical"):
        Sealed.from_bytes(b" " + data, max_bytes=2000)
    with pytest.raises(Refused) as caught:
        Sealed.from_bytes(data, max_bytes=len(data) - 1)
    assert caught.value.reason is Reason.TOO_LARGE


@settings(max_examples=200, deadline=None, database=None)
@given(st.binary(max_size=700))
def test_random_bytes_are_refused_typed(data: bytes) -> None:
    with pytest.raises(Refused):
        verify_certificate(RunKeyCertificate.from_bytes(b"\x01" + data))
    with pytest.raises(Refused):
        Sealed.from_bytes(data, max_bytes=600).verify("d")


@given(st.text(max_size=70))
@settings(max_examples=200, deadline=None, database=None)
def test_a_peer_id_is_what_reads_back_to_itself(text: str) -> None:
    try:
        raw = peer_id_bytes(text)
    except ValueError:
        return
    assert peer_id_text(raw) == text


def test_both_kinds_of_peer_id_are_read() -> None:
    assert peer_id_bytes("12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA")[:2] == b"\x00\x24"
    assert peer_id_bytes(peer_id_of(b"key"))[:2] == b"\x12\x20"
