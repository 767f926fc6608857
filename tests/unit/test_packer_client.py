"""Packer through python-packer: what it answers, how it fails, how it is stopped. The real one but for the last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bakehouse import machine
from bakehouse.packer_bake import CLIENT, FOLDER
from bakehouse.packer_client import Client, PackerError

TEMPLATE = {
    "variables": {"greeting": "hello"},
    "builders": [{"type": "null", "name": "nothing", "communicator": "none"}],
    "provisioners": [{"type": "shell-local", "inline": ["echo said {{user `greeting`}}"]}],
}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.json"
    path.write_text(json.dumps(TEMPLATE))
    return path


def test_a_template_is_inspected_validated_and_fixed(template: Path) -> None:
    client = Client(template)
    found = client.inspect()
    assert found.variables == {"greeting": "hello"}
    assert found.builders == {"nothing": "null"}
    assert found.provisioners == ("shell-local",)
    client.validate()
    assert client.fix()["builders"][0]["name"] == "nothing"
    assert client.version().startswith("1.")


def test_what_is_wrong_with_a_template_is_said(template: Path) -> None:
    template.write_text(json.dumps(TEMPLATE | {"provisioners": [{"type": "shell-local", "nonsense": 1}]}))
    with pytest.raises(PackerError, match="nonsense"):
        Client(template).validate()
    template.write_text("{")
    for call in (Client(template).inspect, Client(template).fix):
        with pytest.raises(PackerError, match="ended with status 1"):
            call()


def test_what_is_missing_is_said(template: Path) -> None:
    with pytest.raises(PackerError, match="no-such-packer is not installed"):
        Client(template, executable="no-such-packer")
    with pytest.raises(PackerError, match=r"none\.json is not there"):
        Client(template.with_name("none.json"))


def test_a_build_says_what_packer_says_and_whether_it_failed(template: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    with said.open("wb") as out:
        Client(template, variables={"greeting": "good morning"}).build(out)
    assert "said good morning" in said.read_text()
    template.write_text(json.dumps(TEMPLATE | {"provisioners": [{"type": "shell-local", "inline": ["exit 3"]}]}))
    with said.open("wb") as out, pytest.raises(PackerError, match="ended with status 1"):
        Client(template).build(out)


def test_sigterm_reaches_packer_alone_and_is_waited_for(template: Path, tmp_path: Path) -> None:
    """A Packer that removes what it made when it is told to stop."""
    fake = tmp_path / "packer"
    made = tmp_path / "made"
    fake.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; rm {made}; echo cleaned; exit 1' TERM\ntouch {made}\necho ready\n"
        "while :; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    variables = tmp_path / "variables.json"
    variables.write_text("{}")
    process = subprocess.Popen(
        [*CLIENT, template, variables, "nothing"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "it is passed on at once"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert "cleaned" in rest
    assert process.returncode == 1
    assert not made.exists()


@pytest.mark.parametrize("name", [path.name for path in FOLDER.glob("*.json")])
def test_the_templates_are_valid(name: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/read-lists").write_text("")
    (tmp_path / "file").write_text("")
    inspected = Client(FOLDER / name).inspect()
    values = {variable: str(tmp_path / "file") for variable, value in inspected.variables.items() if not value}
    values |= {"play": str(tmp_path), "base_checksum": f"sha256:{'0' * 64}", "output": str(tmp_path / "output")}
    values |= {"key": str(machine.make_key(tmp_path))}
    variables = tmp_path / "variables.json"
    variables.write_text(json.dumps({name: value for name, value in values.items() if name in inspected.variables}))
    Client(FOLDER / name, variable_file=variables, only=("qemu",)).validate()
