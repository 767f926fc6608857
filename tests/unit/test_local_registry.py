"""The registry of this host without its program: its configuration is what is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bakehouse import host, local_registry, registry
from bakehouse.errors import BakehouseError
from bakehouse.local_registry import LocalRegistry


@pytest.mark.parametrize(
    ("listens", "address"),
    [("127.0.0.1", "127.0.0.1:5000"), ("0.0.0.0", "127.0.0.1:5000"), ("::1", "[::1]:5000"), ("r.lan", "r.lan:5000")],
)
def test_it_is_found_by_its_configuration(tmp_path: Path, listens: str, address: str) -> None:
    made = LocalRegistry(tmp_path, listens, 5000)
    made.configure()
    assert local_registry.find(tmp_path) == made
    assert made.address == address
    assert made.process() is None


@pytest.mark.parametrize("text", ["", "http: {}", "http: {addr: here}", "{", "[]"])
def test_what_is_no_configuration_is_no_registry(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yml").write_text(text)
    assert local_registry.find(tmp_path) is None


def test_it_lists_what_it_holds(tmp_path: Path) -> None:
    made = LocalRegistry(tmp_path, "127.0.0.1", registry.PORT)
    assert made.repositories() == []
    (made.storage / "docker/registry/v2/repositories/bakehouse/slurm/_manifests/tags").mkdir(parents=True)
    assert made.repositories() == ["bakehouse/slurm"]


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "missing", lambda wanted: [tool for tool in wanted if tool.name == "docker-registry"])
    with pytest.raises(BakehouseError, match="this host lacks docker-registry"):
        local_registry.up(folder=tmp_path / "registry")


@pytest.mark.parametrize(("address", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 5000), ("no.such.invalid", 5000)])
def test_where_it_cannot_listen(tmp_path: Path, address: str, port: int) -> None:
    with pytest.raises(BakehouseError, match=f"no registry can listen at {address}, port {port}: "):
        local_registry.up(folder=tmp_path / "registry", address=address, port=port)
    assert local_registry.find(tmp_path / "registry") is None, "the next time it is tried at the usual place"


def test_what_is_not_there_is_not_stopped(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="there is no registry here"):
        local_registry.down(tmp_path / "registry")
