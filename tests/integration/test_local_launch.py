"""up and down on this host, as people type them: a machine that joins a real controller, and nothing of it after."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bakehouse import process
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.timeline import JOINED
from bakehouse.userdata import BASES
from tests.integration.conftest import Invoke, bake, invoking

pytestmark = pytest.mark.slow

SECONDS = 900
"""How long a launch may take on a busy host."""


@pytest.fixture
def invoke(real_settings: Settings, tmp_path: Path) -> Invoke:
    environment = {
        "BAKEHOUSE_STORE": str(real_settings.store), "BAKEHOUSE_CACHE": str(real_settings.cache),
        "XDG_STATE_HOME": str(tmp_path),
    }  # fmt: skip
    return invoking(environment, seconds=SECONDS)


def test_a_node_comes_up_joined_stays_and_goes(
    baked: Record, real_settings: Settings, invoke: Invoke, tmp_path: Path
) -> None:
    up = ("up", "--platform", "slurm", "--on", "qemu", "--name", "blue", "--json")
    try:
        done = invoke(*up)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        (node,) = made["running"]
        newest = LocalStore(real_settings.store).get("slurm")
        assert (made["tag"], newest.digest) == (newest.tag, baked.digest), "other tests may have baked the plan again"
        assert any(moment["name"] == JOINED for moment in node["timeline"]["moments"])

        controller = subprocess.run(
            [*made["controller"], "srun", "--nodelist=blue-1", "hostname"], capture_output=True, text=True, check=True,
            timeout=120,
        )  # fmt: skip
        assert controller.stdout.strip() == "blue-1"
        inside = subprocess.run([*node["ssh"], "hostname"], capture_output=True, text=True, check=True, timeout=120)
        assert inside.stdout.strip() == "blue-1", "the command that was printed logs in"

        again = invoke(*up)
        assert again.returncode == 1
        assert "there is a launch 'blue' on this host already" in again.stderr
    finally:
        down = invoke("down", "--on", "qemu", "--name", "blue")
    assert down.returncode == 0, down.stderr
    assert "gone: 'blue', its nodes and their cluster" in down.stdout
    assert process.started(made["keeper"]) == -1
    assert not [*(tmp_path / "bakehouse/machines").iterdir()]
    assert "Nothing of it is on this host" in invoke("down", "--on", "qemu", "--all").stdout


@pytest.mark.long
@pytest.mark.parametrize("path", ["hybrid", "bootstrap"])
def test_a_plain_node_becomes_one_of_the_platform(
    baked: Record, real_settings: Settings, invoke: Invoke, path: str
) -> None:
    """What it is made of is built or found for it, and served to it alone."""
    bake(real_settings, BASES[path])
    try:
        done = invoke("up", "--platform", "slurm", "--on", "qemu", "--path", path, "--name", "green", "--json")
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        (node,) = made["running"]
        assert any(moment["name"] == JOINED for moment in node["timeline"]["moments"])
        job = [*made["controller"], "srun", "--nodelist=green-1", "hostname"]
        assert subprocess.run(job, capture_output=True, text=True, check=True, timeout=120).stdout.strip() == "green-1"
    finally:
        down = invoke("down", "--on", "qemu", "--name", "green")
    assert down.returncode == 0, down.stderr
    assert process.started(made["keeper"]) == -1
