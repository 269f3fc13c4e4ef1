"""Who a peer is: one RSA key file that p2pd understands, and the Ed25519 run key that it certifies.

The RSA key proves a connection's PeerID (libp2p does that). Everything stored or relayed is signed by a small, fast
Ed25519 *run key*, derived from the RSA key with HKDF, so one file is the whole identity and there is nothing to lose or
mismatch beside it. The RSA key certifies the run key (`RunKeyCertificate`, deterministic PKCS#1 v1.5 as libp2p signs);
whoever holds a certificate can check, offline, that a signature belongs to a PeerID. `Sealed` is such a statement.

PeerIDs: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md (RSA keys: SHA-256 multihash, base58).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import os
import secrets
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.transport import Message, Refused

RSA_BITS = 2048
MAX_RSA_BITS = 4096
MAX_KEY_FILE_BYTES = 16 * 1024
MAX_CERTIFICATE_BYTES = 1200
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64

_CERTIFICATE_DOMAIN = b"shoal/run-key-certificate/v1\0"
_SIGNATURE_DOMAIN = b"shoal/signature/v1\0"
_RUN_KEY_INFO = b"shoal/run-key/v1"
_CERTIFICATE_VERSION = 1
_LIBP2P_KEY_TYPES = {0: "RSA", 1: "Ed25519", 2: "Secp256k1", 3: "ECDSA"}

_ADJECTIVES = (
    "amber", "azure", "bold", "brave", "brisk", "bright", "broad", "calm", "clear", "clever", "coral", "cosy",
    "crisp", "deep", "eager", "early", "fair", "fast", "fleet", "free", "fresh", "frank", "gentle", "glad",
    "golden", "good", "grand", "green", "happy", "hardy", "honest", "humble", "jolly", "keen", "kind", "light",
    "lively", "loyal", "lucky", "mellow", "mild", "merry", "neat", "noble", "open", "patient", "plain", "proud",
    "quick", "quiet", "ready", "rosy", "silver", "smart", "smooth", "snug", "solid", "steady", "still", "sunny",
    "swift", "true", "warm", "wise",
)  # fmt: skip
_ANIMALS = (
    "anchovy", "angler", "barb", "bass", "bleak", "bonito", "bream", "carp", "char", "chub", "cod", "coley", "crab",
    "cuttle", "dab", "dace", "dolphin", "dory", "eel", "flounder", "garfish", "goby", "grayling", "grouper",
    "gurnard", "haddock", "hake", "halibut", "herring", "krill", "lamprey", "ling", "loach", "mackerel", "manta",
    "marlin", "minnow", "moray", "mullet", "octopus", "orca", "otter", "perch", "pike", "pilchard", "plaice",
    "pollock", "porpoise", "prawn", "ray", "roach", "salmon", "sardine", "seal", "shrimp", "skate", "smelt", "sole",
    "sprat", "squid", "sturgeon", "tench", "trout", "tuna",
)  # fmt: skip


class IdentityError(Exception):
    """The key file cannot be used. `what` says what happened, `fix` what to do; nothing was overwritten."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}")
        self.what = what
        self.fix = fix


# --- PeerIDs and names -----------------------------------------------------------------------------------------------
def peer_id_bytes(peer: str) -> bytes:
    """Multihash of a base58 PeerID: SHA-256 (RSA keys, 34 bytes) or identity (small keys). Raises ValueError."""
    if not 30 <= len(peer) <= 64:
        raise ValueError("a PeerID has 30 to 64 characters")
    try:
        raw = bytes(base58.b58decode(peer))
    except ValueError:
        raise ValueError("a PeerID is base58") from None
    sha256 = len(raw) == 34 and raw[:2] == b"\x12\x20"
    identity = 2 < len(raw) <= 44 and raw[0] == 0 and raw[1] == len(raw) - 2
    if not (sha256 or identity) or peer_id_text(raw) != peer:
        raise ValueError("not a PeerID")
    return raw


def peer_id_text(multihash: bytes) -> str:
    """Inverse of `peer_id_bytes`."""
    return str(base58.b58encode(multihash), "ascii")


def peer_id_of(rsa_public_key: bytes) -> str:
    """PeerID (base58) of an RSA public key (DER SubjectPublicKeyInfo), as libp2p and p2pd compute it."""
    message = b"\x08\x00\x12" + _varint(len(rsa_public_key)) + rsa_public_key
    return peer_id_text(b"\x12\x20" + hashlib.sha256(message).digest())


def readable_name(peer: str) -> str:
    """Short name for people, e.g. `calm-otter-x3k7`: two words and four characters, a pure function of the PeerID.

    About 2^32 names: good for telling peers apart on a screen, never an identifier."""
    digest = hashlib.sha256(b"shoal/name/v1\0" + peer.encode("utf-8", "surrogatepass")).digest()
    adjective = _ADJECTIVES[digest[0] % len(_ADJECTIVES)]
    animal = _ANIMALS[digest[1] % len(_ANIMALS)]
    return f"{adjective}-{animal}-{base64.b32encode(digest[2:7]).decode().lower()[:4]}"


# --- signatures and certificates -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RunKeyCertificate:
    """`rsa_public_key` (DER SubjectPublicKeyInfo) says that `run_key` (Ed25519, 32 bytes) signs for its PeerID."""

    rsa_public_key: bytes
    run_key: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """version (1 byte), length of the RSA key (2 bytes, big endian), RSA key, run key (32 bytes), signature."""
        head = struct.pack(">BH", _CERTIFICATE_VERSION, len(self.rsa_public_key))
        return head + self.rsa_public_key + self.run_key + self.signature

    @staticmethod
    def from_bytes(data: bytes) -> RunKeyCertificate:
        """Inverse of `to_bytes`; checks form only. Raises Refused(TOO_LARGE or MALFORMED)."""
        if len(data) > MAX_CERTIFICATE_BYTES:
            raise Refused(Reason.TOO_LARGE, "certificate")
        if len(data) < 3 or data[0] != _CERTIFICATE_VERSION:
            raise Refused(Reason.MALFORMED, "certificate of an unknown version")
        (length,) = struct.unpack_from(">H", data, 1)
        rest = data[3 + length :]
        if len(rest) < PUBLIC_KEY_BYTES + RSA_BITS // 8:
            raise Refused(Reason.MALFORMED, "certificate is cut short")
        return RunKeyCertificate(data[3 : 3 + length], rest[:PUBLIC_KEY_BYTES], rest[PUBLIC_KEY_BYTES:])


@functools.lru_cache(maxsize=4096)
def verify_certificate(certificate: RunKeyCertificate) -> tuple[str, bytes]:
    """Who certified which run key: (PeerID, Ed25519 public key, 32 bytes).

    Raises Refused(MALFORMED) for a key that libp2p's RSA would not have made, Refused(BAD_SIGNATURE) otherwise."""
    if len(certificate.rsa_public_key) > MAX_CERTIFICATE_BYTES or len(certificate.run_key) != PUBLIC_KEY_BYTES:
        raise Refused(Reason.MALFORMED, "certificate")
    try:
        key = serialization.load_der_public_key(certificate.rsa_public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise Refused(Reason.MALFORMED, "certificate holds no public key") from None
    if not isinstance(key, rsa.RSAPublicKey) or not RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise Refused(Reason.MALFORMED, f"certificate needs an RSA key of {RSA_BITS} to {MAX_RSA_BITS} bits")
    # A huge exponent makes verification slow; a second encoding of one key would be a second PeerID.
    if key.public_numbers().e != 65537 or _public_der(key) != certificate.rsa_public_key:
        raise Refused(Reason.MALFORMED, "certificate holds an unusual RSA key")
    try:
        key.verify(
            certificate.signature, _CERTIFICATE_DOMAIN + certificate.run_key, padding.PKCS1v15(), hashes.SHA256()
        )
    except InvalidSignature:
        raise Refused(Reason.BAD_SIGNATURE, "certificate") from None
    return peer_id_of(certificate.rsa_public_key), certificate.run_key


def verify(public_key: bytes, domain: str, payload: bytes, signature: bytes) -> bool:
    """Did the owner of `public_key` (Ed25519, 32 bytes) sign `payload` for `domain`? Never raises."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed_message(domain, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


class _Envelope(Message):
    certificate: str = Field(max_length=2 * MAX_CERTIFICATE_BYTES)
    payload: str
    signature: str = Field(max_length=2 * SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A text that some peer signed, with all that is needed to check it. Frame: one canonical JSON object (ASCII)."""

    payload: str
    certificate: RunKeyCertificate
    signature: bytes

    def to_bytes(self) -> bytes:
        fields = {
            "certificate": base64.b64encode(self.certificate.to_bytes()).decode(),
            "payload": self.payload,
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes, *, max_bytes: int) -> Sealed:
        """Reads a frame; checks form and size only. Only the one canonical encoding is accepted, so that relays cannot
        make different bytes of the same statement. Raises Refused(TOO_LARGE or MALFORMED)."""
        if len(data) > max_bytes:
            raise Refused(Reason.TOO_LARGE, f"{len(data)} bytes where {max_bytes} are allowed")
        try:
            envelope = _Envelope.model_validate_json(data)
            certificate = base64.b64decode(envelope.certificate, validate=True)
            signature = base64.b64decode(envelope.signature, validate=True)
        except ValidationError as error:
            raise malformed(error) from None
        except (binascii.Error, ValueError):
            raise Refused(Reason.MALFORMED, "not base64") from None
        sealed = Sealed(envelope.payload, RunKeyCertificate.from_bytes(certificate), signature)
        if sealed.to_bytes() != data:
            raise Refused(Reason.MALFORMED, "not in canonical form")
        return sealed

    def verify(self, domain: str) -> tuple[str, bytes]:
        """(PeerID, run key) of the signer. Raises Refused(MALFORMED or BAD_SIGNATURE)."""
        peer, run_key = verify_certificate(self.certificate)
        if not verify(run_key, domain, self.payload.encode(), self.signature):
            raise Refused(Reason.BAD_SIGNATURE, "the signature does not verify")
        return peer, run_key


def malformed(error: ValidationError) -> Refused:
    """A pydantic error about bytes from the network as a short typed refusal; no hostile text travels in it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return Refused(Reason.MALFORMED, ascii(f"{where}: {first['msg']}" if where else first["msg"])[1:161].rstrip("'\""))


# --- the identity itself ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Identity:
    """A loaded key file. Make one with `load`, `create` or `load_or_create`."""

    path: Path
    peer: str
    name: str
    certificate: RunKeyCertificate
    run_key: Ed25519PrivateKey = field(repr=False)

    @property
    def public_key(self) -> bytes:
        """The Ed25519 public key, 32 bytes."""
        return self.certificate.run_key

    def sign(self, domain: str, payload: bytes) -> bytes:
        """Ed25519 signature (64 bytes) of the payload for one purpose; a signature for one domain is void in others."""
        return self.run_key.sign(_signed_message(domain, payload))

    def seal(self, domain: str, payload: str) -> Sealed:
        return Sealed(payload, self.certificate, self.sign(domain, payload.encode()))

    @staticmethod
    def load(path: Path | str) -> Identity:
        """Raises IdentityError when the file is absent, unreadable, open to others, corrupt or of a foreign format."""
        path = Path(path)
        key = _parse_key_file(path, _read_private(path))
        public = _public_der(key.public_key())
        run_key = _derive_run_key(key)
        run_public = run_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        signature = key.sign(_CERTIFICATE_DOMAIN + run_public, padding.PKCS1v15(), hashes.SHA256())
        peer = peer_id_of(public)
        return Identity(path, peer, readable_name(peer), RunKeyCertificate(public, run_public, signature), run_key)

    @staticmethod
    def create(path: Path | str) -> Identity:
        """Make a new key file (mode 0600; whole and on disk, or absent). Raises IdentityError if one is there."""
        path = Path(path)
        key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
        data = _private_der(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_new(path, b"\x08\x00\x12" + _varint(len(data)) + data)
        except FileExistsError:
            raise IdentityError(f"{path} exists already", "load it, or choose another path") from None
        except OSError as error:
            raise IdentityError(
                f"cannot write the identity file {path}: {error.strerror}",
                "make its folder writable and check the free space, or choose another folder",
            ) from None
        return Identity.load(path)

    @staticmethod
    def load_or_create(path: Path | str) -> Identity:
        """The identity at `path`, made on first use. Never overwrites; two that start at once end with the same one."""
        path = Path(path)
        if not os.path.lexists(path):
            try:
                return Identity.create(path)
            except IdentityError:
                if not os.path.lexists(path):
                    raise  # nobody else made it either: the folder is the problem
        return Identity.load(path)


def _signed_message(domain: str, payload: bytes) -> bytes:
    name = domain.encode()
    return _SIGNATURE_DOMAIN + struct.pack(">H", len(name)) + name + payload


def _derive_run_key(key: rsa.RSAPrivateKey) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_RUN_KEY_INFO).derive(_private_der(key))
    return Ed25519PrivateKey.from_private_bytes(seed)


def _public_der(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _private_der(key: rsa.RSAPrivateKey) -> bytes:
    """PKCS#1 DER: what libp2p keeps in its key protobuf."""
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_private(path: Path) -> bytes:
    try:
        # O_NONBLOCK: a named pipe in the file's place must not hang the start.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise IdentityError(f"there is no identity file at {path}", "start a node once to make it") from None
    except OSError as error:
        raise IdentityError(
            f"cannot read the identity file {path}: {error.strerror}", "make it readable for the user that runs shoal"
        ) from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise IdentityError(f"{path} is not a regular file", "name a file for the identity")
    with open(fd, "rb") as file:
        if info.st_mode & 0o077:
            raise IdentityError(
                f"the identity file {path} is open to other users (mode {stat.S_IMODE(info.st_mode):04o})",
                f"run: chmod 600 {path}",
            )
        if info.st_size > MAX_KEY_FILE_BYTES:
            raise IdentityError(f"{path} is too large for an identity file", _KEEP_AND_MOVE)
        return file.read(MAX_KEY_FILE_BYTES)


_KEEP_AND_MOVE = "restore it from a backup, or move it away and start again with a new identity"


def _parse_key_file(path: Path, data: bytes) -> rsa.RSAPrivateKey:
    """libp2p's protobuf PrivateKey{1: key_type (varint), 2: data (bytes)}, RSA only."""
    foreign = f"{path} is not a libp2p key file"
    if not data:
        raise IdentityError(f"the identity file {path} is empty", _KEEP_AND_MOVE)
    if data.lstrip().startswith(b"-----BEGIN"):
        raise IdentityError(f"{foreign} but a PEM or OpenSSH key", "name another path for shoal's identity")
    if len(data) < 4 or data[0] != 0x08:
        raise IdentityError(foreign, _KEEP_AND_MOVE)
    if data[1] != 0:
        kind = _LIBP2P_KEY_TYPES.get(data[1])
        if kind is None:
            raise IdentityError(foreign, _KEEP_AND_MOVE)
        raise IdentityError(f"{path} holds a key of type {kind}", "shoal needs an RSA key: name another path")
    if data[2] != 0x12:
        raise IdentityError(foreign, _KEEP_AND_MOVE)
    length, at, shift = 0, 3, 0
    while True:
        if at >= len(data) or shift > 21:
            raise IdentityError(f"the identity file {path} is corrupt", _KEEP_AND_MOVE)
        length |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            break
    if len(data) != at + length:
        raise IdentityError(f"the identity file {path} is cut short or has bytes too many", _KEEP_AND_MOVE)
    try:
        key = serialization.load_der_private_key(data[at:], password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise IdentityError(f"the identity file {path} is corrupt", _KEEP_AND_MOVE) from None
    if not isinstance(key, rsa.RSAPrivateKey) or not RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise IdentityError(
            f"{path} holds no RSA key of {RSA_BITS} to {MAX_RSA_BITS} bits", "name another path for shoal's identity"
        )
    if key.public_key().public_numbers().e != 65537:
        raise IdentityError(f"{path} holds an unusual RSA key", "name another path for shoal's identity")
    return key


def _write_new(path: Path, data: bytes) -> None:
    """Write aside, fsync, link into place: `path` is whole or absent, and an existing file is never replaced."""
    aside = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        _write_exclusive(aside, data)
        try:
            os.link(aside, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: exclusive creation, removed again if it fails
            _write_exclusive(path, data)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_exclusive(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
