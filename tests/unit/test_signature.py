"""Signatures: what they cover, whose count, and that others can check them."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from bakehouse import REPOSITORY, signature
from bakehouse.errors import BakehouseError
from bakehouse.record import FILE_NAME, Record
from bakehouse.signature import Signature, Statement
from bakehouse.store import LocalStore
from tests.samples import add_image

TAG = "20260101-aaaaaaa"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "site.key"
    signature.generate(path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(tmp_path / "store")
    add_image(made, TAG, size=1 << 20)
    return made


def signed(store: LocalStore, key: Path) -> tuple[Record, Statement, Signature]:
    record = store.get(TAG)
    statement = signature.statement_of(record, "qcow2", store.folder(TAG))
    made = signature.sign(statement, signature.load_private_key(key))
    signature.write_envelope(store.folder(TAG), statement, made)
    return record, statement, made


def trusted(*keys: Path) -> dict[str, SSlibKey]:
    return signature.load_trusted([signature.public_path(key) for key in keys])


def test_a_signature_is_good_and_the_same_each_time(store: LocalStore, key: Path) -> None:
    _, statement, made = signed(store, key)
    signature.verify(statement, made, trusted(key))
    assert signed(store, key)[2] == made


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Statement)])
def test_all_that_is_said_is_covered(store: LocalStore, key: Path, field: str) -> None:
    _, statement, made = signed(store, key)
    altered = dataclasses.replace(statement, **{field: "altered"})
    with pytest.raises(BakehouseError, match="does not fit"):
        signature.verify(altered, made, trusted(key))


def test_the_docs_name_all_that_is_covered() -> None:
    text = (REPOSITORY / "docs" / "signatures.md").read_text()
    named = {field.name for field in dataclasses.fields(Statement)} - {"format"}
    assert {name for name in named if f"`bakehouse_{name}`" not in text} == set()


def test_only_trusted_keys_count_and_several_may(store: LocalStore, key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    signature.generate(other)
    _, statement, made = signed(store, key)
    with pytest.raises(BakehouseError, match="which is not trusted here"):
        signature.verify(statement, made, trusted(other))
    signature.verify(statement, made, trusted(other, key))


@pytest.mark.parametrize("value", ["", "nonsense!", base64.b64encode(b"x" * 64).decode(), "QUFB"])
def test_what_is_no_signature_is_not_good(store: LocalStore, key: Path, value: str) -> None:
    _, statement, made = signed(store, key)
    with pytest.raises(BakehouseError, match="does not fit"):
        signature.verify(statement, Signature(made.keyid, value), trusted(key))


def test_where_it_is_published_is_not_covered(store: LocalStore, key: Path) -> None:
    def digest() -> str:
        return signature.statement_of(store.get(TAG), "qcow2", store.folder(TAG)).record_sha256

    before = digest()
    store.amend(TAG, {"published": []})
    assert digest() == before
    store.amend(TAG, {"kernel": "6.13"})
    assert digest() != before


def test_a_record_of_another_version_keeps_its_signature(store: LocalStore, key: Path) -> None:
    """What we do not know of it is covered too, and stays when the record is amended."""
    path = store.folder(TAG) / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": [1, "\u00e4"]}))
    _, statement, made = signed(store, key)
    store.amend(TAG, {"published": []})
    assert signature.check_local(store.get(TAG), store.folder(TAG), trusted(key)) == made
    path.write_text(path.read_text().replace("of_the_future", "of_the_past"))
    with pytest.raises(BakehouseError, match="the record"):
        signature.check_local(store.get(TAG), store.folder(TAG), trusted(key))
    assert statement.tag == TAG


def test_securesystemslib_and_openssl_can_check_it(store: LocalStore, key: Path, tmp_path: Path) -> None:
    signed(store, key)
    data = json.loads((store.folder(TAG) / signature.FILE_NAME).read_text())
    # It takes apart what it is given.
    envelope = Envelope.from_dict(json.loads(json.dumps(data)))
    assert envelope.verify([*signature.load_trusted([signature.public_path(key)]).values()], 1)
    (tmp_path / "pae").write_bytes(envelope.pae())
    (tmp_path / "sig").write_bytes(base64.b64decode(data["signatures"][0]["sig"]))
    command: list[str | Path] = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        signature.public_path(key),
        "-rawin",
    ]
    subprocess.run([*command, "-in", "pae", "-sigfile", "sig"], cwd=tmp_path, check=True, capture_output=True)


def test_an_image_of_the_store_is_checked_whole(store: LocalStore, key: Path) -> None:
    record, _, made = signed(store, key)
    folder = store.folder(TAG)

    def check() -> Signature:
        return signature.check_local(store.get(TAG), folder, trusted(key))

    assert check() == made
    bill = (folder / record.sbom).read_text()
    (folder / record.sbom).write_text(bill + " ")
    with pytest.raises(BakehouseError, match=r"the SBOM .* changed after it was signed"):
        check()
    (folder / record.sbom).write_text(bill)
    text = (folder / FILE_NAME).read_text()
    (folder / FILE_NAME).write_text(text.replace("c0ffee", "c0ffe1"))
    with pytest.raises(BakehouseError, match=r"the record of .* changed"):
        check()
    (folder / FILE_NAME).write_text(text)
    with store.image(record).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(BakehouseError, match=r"the image file .* changed"):
        check()


@pytest.mark.parametrize("text", ["", "{}", '{"payload": "e30=", "payloadType": "x", "signatures": []}', "[]"])
def test_a_damaged_signature_file_is_told(store: LocalStore, text: str) -> None:
    (store.folder(TAG) / signature.FILE_NAME).write_text(text)
    with pytest.raises(BakehouseError, match="is not a signature"):
        signature.read_envelope(store.folder(TAG))


# Keys.


def test_a_key_is_never_overwritten_and_its_owners_alone(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BakehouseError, match="is there already"):
        signature.generate(key)
    key.chmod(0o640)
    with pytest.raises(BakehouseError, match="can be read by others") as caught:
        signature.load_private_key(key)
    assert caught.value.hint == f"chmod 600 {key}"


def test_what_is_no_key_is_told_without_showing_it(key: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.touch(mode=0o600)
    odd.write_text("s3cret")
    rsa = tmp_path / "rsa"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    rsa.chmod(0o600)
    locked = tmp_path / "locked"
    make: list[str | Path] = ["openssl", "pkcs8", "-topk8", "-in", key, "-out", locked, "-passout", "pass:s3cret"]
    subprocess.run(make, check=True, capture_output=True)
    locked.chmod(0o600)
    for path, said in ((odd, "not a private key"), (rsa, "not an Ed25519 key"), (locked, "is encrypted"),
                       (tmp_path / "gone", "cannot be read")):  # fmt: skip
        with pytest.raises(BakehouseError, match=said) as caught:
            signature.load_private_key(path)
        assert "s3cret" not in str(caught.value)


def test_trusted_keys_are_public_ones(key: Path) -> None:
    with pytest.raises(BakehouseError, match="is a private key"):
        signature.load_trusted([key])
    with pytest.raises(BakehouseError, match="no key is trusted"):
        signature.load_trusted([])
