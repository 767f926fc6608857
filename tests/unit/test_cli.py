"""The tasks: what they print, how they fail, and that each explains itself.

Most run in this process, through Invoke's own parser, since a process each would take too long; some run for real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml
from invoke import Program

import tasks
from bakehouse import REPOSITORY
from bakehouse.record import FILE_NAME, Record

NAMESPACE = deepcopy(tasks.namespace)
"""Invoke takes the help of flags out of tasks when it parses: each run needs a copy that still has it."""

TASKS = {name.replace(".list", "") for name in tasks.namespace.task_names}


@dataclass
class Done:
    """How a task ended."""

    status: int
    out: str
    err: str


class Tasks:
    """Runs tasks with a store and a cache of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.capsys = capsys
        monkeypatch.chdir(REPOSITORY)
        (folder / "bakehouse.yaml").write_text("{}\n")
        monkeypatch.setenv("BAKEHOUSE_CONFIG", str(folder / "bakehouse.yaml"))
        monkeypatch.setenv("BAKEHOUSE_STORE", str(self.store))
        monkeypatch.setenv("BAKEHOUSE_CACHE", str(folder / "cache"))

    def run(self, *words: str) -> Done:
        """Run a task in this process."""
        status: object = 0
        try:
            Program(namespace=deepcopy(NAMESPACE), name="Invoke", binary="invoke").run(["invoke", *words])
        except SystemExit as end:
            status = end.code or 0
        assert isinstance(status, int)
        shown = self.capsys.readouterr()
        return Done(status, shown.out, shown.err)

    def start(self, *words: str, **environment: str) -> Done:
        """Run a task as people do, in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "invoke", *words],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def add(self, tag: str, name: str = "slurm") -> None:
        """Put an image into the store."""
        record = Record.model_validate({
            "name": name, "platform": "slurm", "tag": tag, "digest": "0" * 64, "inputs": {"package munge": "x"},
            "created": "2026-01-01T12:00:00Z", "commit": "c0ffee", "distribution": "debian", "release": "trixie",
            "architecture": "amd64", "kernel": "6.12", "firmware": ["bios"], "root_size": 1 << 30,
            "root_used": 1 << 29, "sbom": "sbom.cdx.json", "sbom_sha256": "", "package_count": 7,
            "files": [{"format": "qcow2", "file": f"{name}.qcow2", "size": 1, "virtual_size": 1 << 30, "sha256": "",
                       "sha512": "5" * 128}],
            "versions": {"kernel": "6.12", "slurm": "24.11"},
            "base": {"key": "debian-trixie-0", "sha256": "", "created": "2026-01-01T11:00:00Z"},
            "steps": [{"name": "disk", "seconds": 4.5}],
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, "builder": {},
        })  # fmt: skip
        (self.store / tag).mkdir(parents=True)
        (self.store / tag / FILE_NAME).write_text(record.model_dump_json())


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tasks:
    return Tasks(tmp_path, monkeypatch, capsys)


# Processes of their own.


def test_a_mistake_is_one_sentence_and_a_hint(invoke: Tasks) -> None:
    done = invoke.start("plan", "--platform", "slrum")
    assert done.status == 1
    error, hint = done.err.splitlines()
    assert error == "error: there is no manifest 'slrum' (did you mean 'slurm'?)"
    assert hint.startswith("hint: known manifests: ")
    assert done.out == ""


def test_a_mistake_has_a_traceback_when_asked_for(invoke: Tasks) -> None:
    done = invoke.start("plan", "--platform", "slrum", BAKEHOUSE_DEBUG="1")
    assert done.status != 0
    assert "Traceback (most recent call last)" in done.err
    assert "bakehouse.errors.BakehouseError: there is no manifest 'slrum'" in done.err


def test_images_of_an_empty_store_are_an_empty_list(invoke: Tasks) -> None:
    done = invoke.start("images", "--json")
    assert (done.status, json.loads(done.out), done.err) == (0, [], "")


# Explanations.


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_explains_itself_and_its_flags(invoke: Tasks, name: str) -> None:
    done = invoke.run("--help", name)
    assert done.status == 0
    docstring = done.out.partition("Docstring:")[2].partition("Options:")[0].strip()
    assert len(docstring) > 20, "it says what it does"
    for flag in deepcopy(NAMESPACE)[name].get_arguments():
        assert len(flag.help or "") > 5, f"--{flag.name} says what it does"
        assert flag.help.split()[0] in done.out


def test_the_list_of_tasks_names_them_all(invoke: Tasks) -> None:
    done = invoke.run("--list")
    assert done.status == 0
    assert {"bake", "plan", "doctor", "images.remove", "cache.prune", "manifests.schema", "boot"} <= TASKS
    for name in TASKS:
        assert name in done.out


# What tasks print.


def test_manifests_are_listed(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa")
    rows = {row["name"]: row for row in json.loads(invoke.run("manifests", "--json").out)}
    assert rows["slurm"]["extends"] == ["debian-13"]
    assert rows["slurm"]["newest"] == "20260101-aaaaaaa"
    assert (rows["debian-13"]["platform"], rows["slurm-debian-12"]["release"]) == (None, "bookworm")
    shown = invoke.run("manifests").out
    assert "20260101-aaaaaaa" in shown
    assert "(base)" in shown


def test_a_faulty_manifest_does_not_hide_the_others(invoke: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    (invoke.folder / "mine").mkdir()
    (invoke.folder / "mine" / "broken.yaml").write_text("platfrom: slurm\n")
    monkeypatch.setenv("BAKEHOUSE_MANIFESTS", str(invoke.folder / "mine"))
    done = invoke.run("manifests", "--json")
    rows = {row["name"]: row for row in json.loads(done.out)}
    assert "broken.yaml:1: unknown key 'platfrom' (did you mean 'platform'?)" in rows["broken"]["error"]
    assert "error" not in rows["slurm"]
    assert "faulty" in invoke.run("manifests").out


def test_the_schema_is_printed(invoke: Tasks) -> None:
    schema = json.loads(invoke.run("manifests.schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "platform" in schema["properties"]


def test_a_plan_says_what_would_be_built_and_why(invoke: Tasks) -> None:
    data = json.loads(
        invoke.run("plan", "--platform", "slurm", "--release", "12", "--format", "raw,qcow2", "--json").out
    )
    assert data["manifest"]["release"] == "bookworm"
    assert data["manifest"]["disk"]["formats"] == ["raw", "qcow2"]
    assert data["decision"] == {"image": None, "base_cached": False, "reasons": ["there is no image of it yet"]}
    shown = invoke.run("plan", "--platform", "slurm").out
    assert "slurm <- debian-13" in shown
    assert "there is no image of it yet" in shown
    assert not invoke.store.exists(), "a plan changes nothing"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--platform", "debian-13"], "error: debian-13 is a base for other manifests"),
        (["--platform", "slurm", "--release", "sid"], "release: 'sid' is not one of trixie, bookworm"),
        (["--platform", "slurm", "--format", "qcow"], "'qcow' is not one of qcow2, raw (did you mean 'qcow2'?)"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(invoke: Tasks, words: list[str], error: str) -> None:
    done = invoke.run("plan", *words)
    assert done.status == 1
    assert error in done.err
    assert "Traceback" not in done.err


def test_images_are_listed(invoke: Tasks) -> None:
    assert "No images in" in invoke.run("images").out
    invoke.add("20260101-aaaaaaa")
    invoke.add("20260102-bbbbbbb", "roce")
    (row, _) = sorted(json.loads(invoke.run("images", "--json").out), key=lambda row: str(row["tag"]))
    assert (row["tag"], row["name"], row["versions"]["slurm"]) == ("20260101-aaaaaaa", "slurm", "24.11")
    assert "inputs" not in row
    shown = invoke.run("images").out
    assert "20260102-bbbbbbb" in shown
    assert "2 images" in shown


def test_a_damaged_image_is_warned_of(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa")
    (invoke.store / "20260101-aaaaaaa" / FILE_NAME).write_text("{")
    done = invoke.run("images", "--json")
    assert (done.status, json.loads(done.out)) == (0, [])
    assert done.err.startswith("warning: ")
    assert "is not a record of an image" in done.err


def test_an_image_is_shown_by_its_manifests_name(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa")
    assert json.loads(invoke.run("images.show", "slurm", "--json").out)["inputs"] == {"package munge": "x"}
    shown = invoke.run("images.show", "20260101").out
    assert "5" * 128 in shown
    assert "4.5" in shown
    done = invoke.run("images.show", "2027")
    assert (done.status, "there is no image '2027'" in done.err) == (1, True)


def test_an_image_is_not_removed_by_a_manifests_name(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa")
    done = invoke.run("images.remove", "slurm")
    assert done.status == 1
    assert "error: 'slurm' is a manifest's name; to remove an image, name its tag" in done.err
    assert "hint: its newest image is 20260101-aaaaaaa" in done.err
    assert (invoke.store / "20260101-aaaaaaa").is_dir()


def test_an_image_is_removed_by_its_tag(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa")
    done = invoke.run("images.remove", "20260101")
    assert (done.status, done.out.startswith("removed slurm 20260101-aaaaaaa, ")) == (0, True)
    assert list(invoke.store.iterdir()) == []


def test_the_cache_is_shown_and_pruned(invoke: Tasks) -> None:
    debs = invoke.folder / "cache" / "debs-trixie-amd64"
    debs.mkdir(parents=True)
    (debs / "munge.deb").write_bytes(b"x" * 100_000)
    (row,) = json.loads(invoke.run("cache", "--json").out)
    assert (row["kind"], row["name"]) == ("packages", "debs-trixie-amd64")
    assert row["size"] >= 100_000
    assert "limit 20 GiB" in invoke.run("cache").out
    assert "removed 0 base roots and 0 packages" in invoke.run("cache.prune", "--limit", "1GiB").out
    assert (debs / "munge.deb").exists()
    assert "removed 0 base roots and 1 packages" in invoke.run("cache.prune", "--everything").out
    assert not (debs / "munge.deb").exists()


@pytest.mark.parametrize("limit", ["5", "5GB", "much"])
def test_a_limit_without_a_unit_is_refused(invoke: Tasks, limit: str) -> None:
    done = invoke.run("cache.prune", "--limit", limit)
    assert done.status == 1
    assert f"error: --limit {limit}: it is a size such as 512MiB or 4GiB" in done.err


def test_an_automatic_limit_does_not_empty_the_cache(invoke: Tasks) -> None:
    debs = invoke.folder / "cache" / "debs-trixie-amd64"
    debs.mkdir(parents=True)
    (debs / "munge.deb").write_bytes(b"x")
    invoke.run("cache.prune", "--limit", "auto")
    assert (debs / "munge.deb").exists()


def test_settings_are_printed_as_they_hold(invoke: Tasks) -> None:
    data = yaml.safe_load(invoke.run("settings").out)
    assert data["store"] == str(invoke.store)
    assert data["cache"] == str(invoke.folder / "cache")


def test_a_faulty_setting_stops_every_task(invoke: Tasks) -> None:
    (invoke.folder / "bakehouse.yaml").write_text("stoer: /x\n")
    for name in ("settings", "images", "cache"):
        done = invoke.run(name)
        assert done.status == 1
        assert f"error: {invoke.folder}/bakehouse.yaml:1: unknown key 'stoer' (did you mean 'store'?)" in done.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["slurm"], "there is no image 'slurm'"),
        (["20260101", "--firmware", "efi"], "--firmware efi: it is one of bios, uefi (did you mean 'uefi'?)"),
        (["20260101", "--firmware", "uefi"], "20260101-aaaaaaa does not boot under UEFI, only BIOS"),
        (["20260101", "--key", "/nothing"], "--key /nothing is not a file"),
        (["20260101"], "slurm.qcow2 is gone"),
    ],
)
def test_an_image_that_cannot_be_booted_is_told(invoke: Tasks, words: list[str], error: str) -> None:
    if words != ["slurm"]:
        invoke.add("20260101-aaaaaaa")
    done = invoke.run("boot", *words)
    assert done.status == 1
    assert error in done.err
