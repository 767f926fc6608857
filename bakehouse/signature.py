"""Signatures: what an image is, signed with a site's key. Ed25519 over DSSE, by securesystemslib.

What is signed is a statement: names and digests of the image file, the record and the SBOM. All of it also stands in
the image's properties in Glance, so that a signature can be checked where the store is not at hand.
"""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey
from securesystemslib.signer import Signature as RawSignature

from bakehouse import record as records
from bakehouse.cache import file_digest, write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.record import Record

FILE_NAME = "signature.json"
"""The detached signature beside an image's record."""

PAYLOAD_TYPE = "application/vnd.bakehouse.image+json"
"""Of the DSSE envelope: https://github.com/secure-systems-lab/dsse"""

VERSION = 1

SECRET_MODE = 0o600


@dataclass(frozen=True)
class Statement:
    """What is signed."""

    name: str
    """The manifest's name."""
    platform: str
    tag: str
    digest: str
    """Input digest."""
    format: str
    """Of the image file: qcow2 or raw."""
    sha512: str
    """Of the image file."""
    record_sha256: str
    sbom_sha256: str
    verified: str
    """``passed``, ``failed`` or ``none``."""

    def payload(self) -> bytes:
        """Return the bytes that are signed: JSON with sorted keys and no blanks."""
        return records.canonical({"type": "bakehouse image", "version": VERSION, **asdict(self)})


@dataclass(frozen=True)
class Signature:
    """A signature of a statement."""

    keyid: str
    """SHA-256 of the public key, as securesystemslib counts it; 64 hex digits."""
    value: str
    """Base64."""


def statement_of(record: Record, kind: str, folder: Path) -> Statement:
    """Return what a signature of an image covers.

    Args:
        record: the image.
        kind: qcow2 or raw.
        folder: the image's, in the store.

    Raises:
        BakehouseError: the record's file cannot be read.
    """
    file = next(file for file in record.files if file.format == kind)
    return Statement(
        name=record.name,
        platform=record.platform,
        tag=record.tag,
        digest=record.digest,
        format=file.format,
        sha512=file.sha512,
        record_sha256=records.digest(folder / records.FILE_NAME),
        sbom_sha256=record.sbom_sha256,
        verified=record.verification.result if record.verification else "none",
    )


# Keys.


def generate(path: Path) -> str:
    """Make a key: the private one in a file that only its owner reads, the public one beside it (``.pub``).

    Returns:
        The key's id.

    Raises:
        BakehouseError: one of the files is there already, or cannot be written.
    """
    public = public_path(path)
    for taken in (path, public):
        if taken.exists():
            raise BakehouseError(f"{taken} is there already", hint="a key is never overwritten: name another file")
    key = Ed25519PrivateKey.generate()
    private_text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_text = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        write_atomically(path, private_text.decode(), mode=SECRET_MODE)
        write_atomically(public, public_text.decode(), mode=0o644)
    except OSError as error:
        raise BakehouseError(f"{error.filename or path} cannot be written: {error.strerror}") from error
    return SSlibKey.from_crypto(key.public_key()).keyid


def public_path(path: Path) -> Path:
    """Return where the public key of a private one is written to."""
    return path.with_name(path.name + ".pub")


def load_private_key(path: Path) -> CryptoSigner:
    """Read a site's signing key.

    Raises:
        BakehouseError: it is missing, readable by others, encrypted, or of another kind.
    """
    text = _read(path, "signing key", "`invoke sign.key PATH` makes one; 'signing_key' in bakehouse.yaml names it")
    if stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise BakehouseError(f"the signing key {path} can be read by others", hint=f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except TypeError as error:
        raise BakehouseError(
            f"the signing key {path} is encrypted", hint="keep it in a file that only the publisher reads, or in memory"
        ) from error
    except ValueError as error:
        raise BakehouseError(
            f"{path} is not a private key in PEM form", hint="`invoke sign.key PATH` makes one"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BakehouseError(f"{path} is not an Ed25519 key", hint="`invoke sign.key PATH` makes one")
    return CryptoSigner(key)


def load_trusted(paths: Sequence[Path]) -> dict[str, SSlibKey]:
    """Read the public keys whose signatures are trusted, by their id.

    Raises:
        BakehouseError: there is none, or one is missing or of another kind.
    """
    if not paths:
        raise BakehouseError(
            "no key is trusted: signatures cannot be checked",
            hint="name public keys as 'trusted_keys' in bakehouse.yaml",
        )
    trusted: dict[str, SSlibKey] = {}
    for path in paths:
        text = _read(path, "trusted key", "'trusted_keys' in bakehouse.yaml names it")
        if b"PRIVATE" in text:
            raise BakehouseError(
                f"{path} is a private key", hint=f"'trusted_keys' names public ones: {public_path(path)}"
            )
        try:
            key = serialization.load_pem_public_key(text)
        except ValueError as error:
            raise BakehouseError(f"{path} is not a public key in PEM form") from error
        if not isinstance(key, Ed25519PublicKey):
            raise BakehouseError(f"{path} is not an Ed25519 key")
        known = SSlibKey.from_crypto(key)
        trusted[known.keyid] = known
    return trusted


def _read(path: Path, what: str, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BakehouseError(f"the {what} {path} cannot be read: {error.strerror}", hint=hint) from error


# Signing and checking.


def sign(statement: Statement, key: CryptoSigner) -> Signature:
    """Sign a statement. The same key signs the same statement the same way each time (RFC 8032)."""
    envelope = _envelope(statement)
    made = envelope.sign(key)
    return Signature(keyid=made.keyid, value=base64.b64encode(bytes.fromhex(made.signature)).decode())


def verify(statement: Statement, signature: Signature, trusted: Mapping[str, SSlibKey]) -> None:
    """Check a signature.

    Raises:
        BakehouseError: no trusted key made it, or what it covers has been altered.
    """
    key = trusted.get(signature.keyid)
    if key is None:
        known = ", ".join(keyid[:16] for keyid in trusted)
        raise BakehouseError(
            f"{statement.tag} is signed by the key {signature.keyid[:16]}, which is not trusted here: {known} is",
            hint="if you know that key, add its public half to 'trusted_keys' in bakehouse.yaml",
        )
    altered = BakehouseError(
        f"the signature of {statement.tag} does not fit: the image, its record, its SBOM or its properties were "
        "altered after it was signed",
        hint="do not use it; publish it again from the store that it was baked in, or bake anew",
    )
    try:
        raw = base64.b64decode(signature.value, validate=True).hex()
    except ValueError as error:
        raise altered from error
    envelope = _envelope(statement)
    envelope.signatures[key.keyid] = RawSignature(key.keyid, raw)
    try:
        envelope.verify([key], 1)
    except (VerificationError, UnverifiedSignatureError) as error:
        raise altered from error


def _envelope(statement: Statement) -> Envelope:
    return Envelope(statement.payload(), PAYLOAD_TYPE, {})


# The detached signature in the store.


def write_envelope(folder: Path, statement: Statement, signature: Signature) -> Path:
    """Write the detached signature of an image: a DSSE envelope in JSON.

    Args:
        folder: the image's, in the store.
        statement: what was signed.
        signature: the signature.

    Returns:
        The file.
    """
    raw = RawSignature(signature.keyid, base64.b64decode(signature.value).hex())
    envelope = Envelope(statement.payload(), PAYLOAD_TYPE, {signature.keyid: raw})
    path = folder / FILE_NAME
    write_atomically(path, json.dumps(envelope.to_dict(), indent=1) + "\n")
    return path


def read_envelope(folder: Path) -> tuple[Statement, Signature]:
    """Read the detached signature of an image.

    Raises:
        BakehouseError: there is none, or it is damaged.
    """
    path = folder / FILE_NAME
    text = _read(path, "signature", "`invoke sign TAG` makes it")
    try:
        envelope = Envelope.from_dict(json.loads(text))
        data = json.loads(envelope.payload)
        statement = Statement(**{key: str(data[key]) for key in Statement.__dataclass_fields__})
        made = next(iter(envelope.signatures.values()))
        signature = Signature(made.keyid, base64.b64encode(bytes.fromhex(made.signature)).decode())
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise BakehouseError(f"{path} is not a signature: {error}", hint="`invoke sign TAG` makes it anew") from error
    if envelope.payload_type != PAYLOAD_TYPE or envelope.payload != statement.payload():
        raise BakehouseError(f"{path} is the signature of something else", hint="`invoke sign TAG` makes it anew")
    return statement, signature


def check_local(record: Record, folder: Path, trusted: Mapping[str, SSlibKey]) -> Signature:
    """Check an image of the store: signature, image file, record and SBOM.

    Raises:
        BakehouseError: one of them is not what was signed.
    """
    statement, signature = read_envelope(folder)
    verify(statement, signature, trusted)
    kinds = [file for file in record.files if file.format == statement.format]
    if not kinds:
        raise BakehouseError(f"{record.tag} has no {statement.format} file, which was signed")
    image, bill = folder / kinds[0].file, folder / record.sbom
    try:
        found = {
            f"the image file {image}": file_digest(image, "sha512")["sha512"] == statement.sha512,
            f"the SBOM {bill}": file_digest(bill, "sha256")["sha256"] == statement.sbom_sha256,
            "the record": statement == statement_of(record, statement.format, folder),
        }
    except OSError as error:
        raise BakehouseError(
            f"{error.filename} cannot be read: {error.strerror}", hint="bake the image again"
        ) from error
    altered = [what for what, good in found.items() if not good]
    if altered:
        raise BakehouseError(
            f"{' and '.join(altered)} of {record.tag} changed after it was signed",
            hint=f"where it was verified since, `invoke sign {record.tag}` signs it anew; else bake again",
        )
    return signature
