"""The local OpenStack without its services: notes, processes, what a killed run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from bakehouse import daemon, local_cloud, lock, process, waiting
from bakehouse.errors import BakehouseError
from bakehouse.local_cloud import LocalCloud


@pytest.fixture
def made(tmp_path: Path) -> LocalCloud:
    folder = tmp_path / "cloud"
    folder.mkdir()
    found = LocalCloud(
        folder,
        tmp_path / "venv",
        {"keystone": 1, "glance": 2},
        "s3cret",
        "here",
        tmp_path / "clouds.yaml",
        "2026-01-01",
    )
    local_cloud._save(found)
    return found


def test_it_is_found_again(made: LocalCloud) -> None:
    assert local_cloud.find(made.folder) == made
    assert (made.auth_url, made.image_url) == ("http://127.0.0.1:1/v3", "http://127.0.0.1:2")
    assert (made.folder / "cloud.json").stat().st_mode & 0o777 == 0o600, "it holds a password"


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"ports": {}}'])
def test_a_damaged_note_is_no_cloud(made: LocalCloud, text: str) -> None:
    (made.folder / "cloud.json").write_text(text)
    assert local_cloud.find(made.folder) is None


def test_what_cannot_be_read_is_not_made_anew_over_somebodys_images(
    made: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cloud, "install", lambda *_: tmp_path)
    (made.folder / "cloud.json").write_text("{")
    (made.folder / "image").touch()
    with pytest.raises(BakehouseError, match=r"cloud\.json cannot be read"):
        local_cloud.up(tmp_path, folder=made.folder)
    assert (made.folder / "image").exists()


def note(made: LocalCloud, pid: int, started: int) -> None:
    (made.folder / "glance.json").write_text(json.dumps({"pid": pid, "started": started}))


def test_a_process_of_the_same_number_is_not_the_service(made: LocalCloud) -> None:
    note(made, os.getpid(), process.started(os.getpid()) - 1)
    assert made.process("glance") is None
    assert not made.stop("glance"), "and is not killed for it"
    assert not made.running


def test_a_service_that_does_not_care_is_ended_all_the_same(made: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "DOWN_SECONDS", 0.2)
    stubborn = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo; while :; do sleep 0.05; done"], stdout=subprocess.PIPE
    )
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    note(made, stubborn.pid, process.started(stubborn.pid))
    assert made.stop("glance")
    assert not (made.folder / "glance.json").exists()
    stubborn.stdout.close()
    stubborn.returncode = 0


def test_a_service_that_does_not_start_says_why(made: LocalCloud) -> None:
    program = made.environment / "bin" / "uwsgi"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho no python application found >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(BakehouseError, match="glance does not start") as caught:
        made.start("glance")
    assert "no python application found" in caught.value.log
    assert made.process("glance") is None


def test_there_is_nothing_to_end_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="no local OpenStack here") as caught:
        local_cloud.down(tmp_path)
    assert "openstack.up" in caught.value.hint


def test_it_is_not_ended_while_somebody_brings_it_up(made: LocalCloud) -> None:
    said = list[str]()
    ending = threading.Thread(target=lambda: local_cloud.down(made.folder, delete=True, say=said.append))
    with lock.held(made.folder.with_suffix(".lock"), "it", wait=True, say=said.append):
        ending.start()
        waiting.until("the wait", lambda: bool(said), 10, poll=0.01)
        assert made.folder.exists()
    ending.join()
    assert not made.folder.exists()
    assert "waiting for the local OpenStack" in said[0]


def test_an_installation_that_fails_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.write_text("no-such-package-at-all==1 --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.setattr(local_cloud, "LOCK", lock)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BakehouseError, match="could not be installed") as caught:
        local_cloud.install(tmp_path / "cache", print)
    assert "no-such-package" in caught.value.log
    assert not [*tmp_path.glob("cache/openstack-*/complete")]


def test_services_see_no_other_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_AUTH_URL", "http://elsewhere")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert not {"OS_AUTH_URL", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"} & local_cloud._environment().keys()
