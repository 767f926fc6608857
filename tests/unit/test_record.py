"""Records: read, refused when they are newer than we are, passed over when they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bakehouse import record
from bakehouse.errors import BakehouseError
from bakehouse.record import FORMAT, Record
from bakehouse.store import LocalStore


def data(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "format": FORMAT,
        "name": "slurm",
        "platform": "slurm",
        "tag": "20260101-abcdef0",
        "digest": "abcdef0" + "0" * 57,
        "inputs": {"package munge": "slurm-node"},
        "created": "2026-01-01T12:00:00Z",
        "commit": "c0ffee",
        "distribution": "debian",
        "release": "trixie",
        "architecture": "amd64",
        "kernel": "6.12",
        "firmware": ["bios"],
        "root_size": 1 << 30,
        "root_used": 1 << 29,
        "files": [],
        "sbom": "sbom.cdx.json",
        "sbom_sha256": "0" * 64,
        "package_count": 1,
        "versions": {"kernel": "6.12"},
        "base": {"key": "debian-trixie-0", "sha256": "0" * 64, "created": "2026-01-01T11:00:00Z"},
        "steps": [{"name": "base root", "seconds": 1.5}, {"name": "disk", "seconds": 2.25, "cached": True}],
        "usage": {"peak_memory": 1, "disk": 2, "cpu_seconds": 0.5},
        "builder": {"mtools": "4"},
    }
    return whole | changes


def write(folder: Path, content: dict[str, Any] | str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.FILE_NAME
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(path: Path) -> BakehouseError:
    with pytest.raises(BakehouseError) as caught:
        record.read(path)
    return caught.value


def timeline(*moments: tuple[str, float]) -> dict[str, Any]:
    return {
        "moments": [{"name": name, "seconds": seconds, "source": "agent"} for name, seconds in moments],
        "power_on": 1000.5,
        "accelerator": "kvm",
        "clock_error": 0.02,
    }


VERIFIED = {
    "result": "failed",
    "at": "2026-01-01T13:00:00Z",
    "seconds": 61.5,
    "accelerator": "kvm",
    "firmware": "uefi",
    "checks": [
        {"name": "it boots and joins the cluster", "passed": True, "seconds": 9.5},
        {"name": "a job runs on it", "passed": False, "seconds": 0.1, "detail": "srun said ''\nsrun: error: \x1b[1mno"},
    ],
    "suite": [{"name": "node: no unit failed", "passed": False, "seconds": 1.5, "detail": "assert 1 == 0"}],
    "timeline": timeline(("power-on", 0.0), ("agent joined", 9.25)),
    "rejoin": None,
}


def test_a_record_survives_being_written_and_read(tmp_path: Path) -> None:
    made = Record.model_validate(data(verification=VERIFIED))
    assert record.read(write(tmp_path, made.model_dump_json())) == made
    assert made.seconds == 3.75


def test_a_verification_survives_being_written_and_read(tmp_path: Path) -> None:
    made = Record.model_validate(data(verification=VERIFIED)).verification
    found = record.read(write(tmp_path, data(verification=VERIFIED))).verification
    assert found == made
    assert found is not None
    assert [check.passed for check in found.checks] == [True, False]
    assert found.checks[0].detail == ""
    assert found.checks[1].detail.endswith("\x1b[1mno")
    assert found.timeline is not None
    assert found.timeline.seconds("agent joined") == 9.25
    assert found.rejoin is None


@pytest.mark.parametrize("old", [data(), data(verification=None)], ids=["no field", "null"])
def test_an_image_that_was_never_verified_is_neither_good_nor_bad(tmp_path: Path, old: dict[str, Any]) -> None:
    assert record.read(write(tmp_path, old)).verification is None


@pytest.mark.parametrize("change", [{"result": "perhaps"}, {"checks": None}, {"timeline": {"moments": "none"}}])
def test_a_verification_that_is_none_damages_the_record(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "is not a record of an image" in refused(write(tmp_path, data(verification=VERIFIED | change))).message


def test_fields_that_a_later_bakehouse_added_are_passed_over(tmp_path: Path) -> None:
    found = record.read(write(tmp_path, data(signature="x", base=data()["base"] | {"colour": "blue"})))
    assert found.tag == "20260101-abcdef0"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, data(format=FORMAT + 1))
    error = refused(path)
    assert error.message == f"{path} has format {FORMAT + 1}, written by a newer Bakehouse"
    assert error.hint == "update this checkout"


def test_a_newer_format_that_lacks_our_fields_is_not_called_damaged(tmp_path: Path) -> None:
    newer = data(format=FORMAT + 1)
    del newer["inputs"]
    error = refused(write(tmp_path, newer))
    assert "newer Bakehouse" in error.message
    assert "remove" not in error.hint


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", b"\xff\xfe", '{"name": "slurm"}', json.dumps(data(created="yesterday"))],
    ids=["empty", "cut", "a list", "null", "not UTF-8", "fields missing", "a wrong type"],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = write(tmp_path, content)
    error = refused(path)
    assert error.message.startswith(f"{path} is not a record of an image: ")
    assert error.hint == "remove its folder and bake again"


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    assert (
        refused(tmp_path / "record.json").message == f"{tmp_path}/record.json cannot be read: No such file or directory"
    )


def test_the_store_passes_over_what_it_cannot_read_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "good", data(tag="good"))
    cut = write(tmp_path / "cut", '{"name":')
    newer = write(tmp_path / "newer", data(tag="newer", format=FORMAT + 1))
    store = LocalStore(tmp_path)
    assert [found.tag for found in store.records()] == ["good"]
    messages = sorted(error.message for error in store.damaged())
    assert len(messages) == 2
    assert messages[0].startswith(f"{cut} is not a record")
    assert messages[1].startswith(f"{newer} has format")
