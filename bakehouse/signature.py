"""stub, replaced on merge"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "signature.json"


@dataclass(frozen=True)
class Signature:
    keyid: str
    value: str


@dataclass(frozen=True)
class Statement:
    name: str
    platform: str
    tag: str
    digest: str
    format: str
    sha512: str
    record_sha256: str
    sbom_sha256: str
    verified: str


def record_digest(record: Any) -> str:
    import hashlib

    return hashlib.sha256(record.model_dump_json(exclude={"published"}).encode()).hexdigest()


def load_private_key(path: Path) -> Any: ...
def load_trusted(paths: Any) -> Any: ...
def sign(s: Statement, k: Any) -> Signature: ...
def verify(s: Statement, g: Signature, t: Any) -> None: ...
def write_envelope(p: Path, s: Statement, g: Signature) -> None: ...
