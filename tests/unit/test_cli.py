"""The tasks: what they print, how they fail, and that each explains itself.

Most run in this process, through Invoke's own parser, since a process each would take too long; some run for real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from invoke import Program

import tasks
from bakehouse import REPOSITORY, build, machine, userdata, verify
from bakehouse.cluster import Authority
from bakehouse.errors import BakehouseError
from bakehouse.record import FILE_NAME, Record, Verification
from bakehouse.store import LocalStore

NAMESPACE = deepcopy(tasks.namespace)
"""Invoke takes the help of flags out of tasks when it parses: each run needs a copy that still has it."""

TASKS = {min([name, *aliases], key=len) for name, aliases in tasks.namespace.task_names.items()}
"""By the name that people type: ``images``, not ``images.list``."""


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
        monkeypatch.setenv("BAKEHOUSE_BROKER", str(folder / "broker.yaml"))
        # Clusters that run on this host are noted there.
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
        # Tasks add to it.
        monkeypatch.setenv("PATH", os.environ["PATH"])

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

    def add(self, tag: str, name: str = "slurm", **changes: Any) -> None:
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
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, "builder": {}, **changes,
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


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_that_must_be_told_something_has_an_example(invoke: Tasks, name: str) -> None:
    if any(not flag.optional and flag.default is None for flag in deepcopy(NAMESPACE)[name].get_arguments()):
        assert f"invoke {name} " in invoke.run("--help", name).out.partition("Docstring:")[2]


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
    version = rows["kubernetes"]["kubernetes"]
    assert rows["slurm"]["kubernetes"] is None
    assert f"kubernetes {version}" in shown
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
    invoke.add("20260103-ccccccc", "kubernetes", platform="kubernetes", versions={"kubernetes": "1.35.5-1.1"})
    shown = invoke.run("images").out
    assert "20260102-bbbbbbb" in shown
    assert "kubernetes 1.35.5" in shown
    assert "3 images" in shown


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
    assert "would remove slurm 20260101-aaaaaaa" in invoke.run("images.remove", "20260101", "--dry-run").out
    assert (invoke.store / "20260101-aaaaaaa").is_dir()
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
    assert "would remove 0 base roots and 1 packages" in invoke.run("cache.prune", "--everything", "--dry-run").out
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
        (
            ["20260101", "--firmware", "efi"],
            "--firmware efi: it is one of bios, uefi, secure-boot (did you mean 'uefi'?)",
        ),
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


# Verification.

FAILED = {
    "result": "failed", "at": "2026-01-01T13:00:00Z", "seconds": 60, "accelerator": "tcg", "firmware": "bios",
    "checks": [
        {"name": "it boots and joins the cluster", "passed": True, "seconds": 36.0},
        {"name": "a job runs on it", "passed": False, "seconds": 0.1, "detail": "srun said '' [oops], not 'node-1'"},
    ],
    "suite": [{"name": "node: no unit failed", "passed": False, "seconds": 1, "detail": "assert 1 == 0"}],
    "timeline": {"moments": [{"name": "power-on", "seconds": 0, "source": "host"},
                             {"name": "agent joined", "seconds": 36.2, "source": "agent"}],
                 "power_on": 5, "accelerator": "tcg", "clock_error": 0.1},
    "rejoin": None,
}  # fmt: skip
PASSED = FAILED | {"result": "passed", "checks": FAILED["checks"][:1], "suite": []}  # type: ignore[index]
TAG = "20260101-aaaaaaa"


class Verifier:
    """In place of a verification: writes a result into the record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.result = PASSED
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(verify, "needed", lambda _record: None)
        monkeypatch.setattr(verify, "verify", self.verify)
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def verify(self, record: Record, store: LocalStore, *_: object, **options: Any) -> Record:
        self.asked.append(options)
        return store.amend(record.tag, {"verification": Verification.model_validate(self.result)})


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> Verifier:
    return Verifier(monkeypatch)


def test_images_are_listed_with_their_verdicts(invoke: Tasks) -> None:
    invoke.add("20260101-aaaaaaa", verification=PASSED)
    invoke.add("20260102-bbbbbbb", verification=FAILED | {"timeline": None})
    invoke.add("20260103-ccccccc")
    shown = invoke.run("images").out.splitlines()
    (passed,) = [line for line in shown if line.startswith("20260101")]
    (failed,) = [line for line in shown if line.startswith("20260102")]
    (neither,) = [line for line in shown if line.startswith("20260103")]
    assert passed.rstrip().endswith("passed, joined after 36 s (tcg)")
    assert failed.rstrip().endswith("failed")
    assert neither.rstrip().endswith("-")
    assert "passed, joined after 36 s" in invoke.run("images.show", "20260101").out


def test_an_image_that_passes_is_told_with_its_timeline(invoke: Tasks, verifier: Verifier) -> None:
    invoke.add(TAG)
    done = invoke.run("verify", TAG)
    assert done.status == 0
    assert "it boots and joins the cluster" in done.out
    assert "agent joined" in done.out
    assert f"slurm {TAG} passed, evidence in {invoke.store / TAG}/verify" in done.out


def test_an_image_that_fails_ends_with_status_1_and_what_failed(invoke: Tasks, verifier: Verifier) -> None:
    invoke.add(TAG)
    verifier.result = FAILED
    done = invoke.run("verify", TAG)
    assert done.status == 1
    assert f"error: slurm {TAG} failed its verification and is marked so" in done.err
    assert "a job runs on it: srun said '' [oops], not 'node-1'" in done.err
    assert "node: no unit failed: assert 1 == 0" in done.err
    assert f"hint: console, journal and logs are in {invoke.store / TAG}/verify" in done.err


def test_a_result_as_json_is_all_that_is_printed(invoke: Tasks, verifier: Verifier) -> None:
    invoke.add(TAG)
    verifier.result = FAILED
    done = invoke.run("verify", TAG, "--json", "--firmware", "bios")
    assert (done.status, json.loads(done.out)["result"]) == (1, "failed")
    assert verifier.asked[0]["firmware"] == "bios"


def test_the_sites_suites_are_asked_too(invoke: Tasks, verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke.add(TAG)
    monkeypatch.setenv("BAKEHOUSE_IMAGE_TESTS", str(invoke.folder / "suites"))
    invoke.run("verify", TAG)
    assert verifier.asked[0]["suites"].folders == (verify.OWN_SUITES, invoke.folder / "suites")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["2027"], "there is no image '2027'"),
        ([TAG, "--firmware", "uefi"], f"{TAG} does not boot under UEFI, only BIOS"),
        ([TAG, "--firmware", "bois"], "--firmware bois: it is one of bios, uefi, secure-boot (did you mean 'bios'?)"),
        ([TAG], "slurm.qcow2 is gone"),
    ],
)
def test_an_image_that_cannot_be_verified_is_told(invoke: Tasks, words: list[str], error: str) -> None:
    invoke.add(TAG)
    done = invoke.run("verify", *words)
    assert (done.status, f"error: {error}" in done.err.replace(f"{invoke.store / TAG}/", "")) == (1, True)


def test_a_platform_that_cannot_be_verified_is_told_and_no_failure(invoke: Tasks) -> None:
    invoke.add(TAG, platform="base")
    done = invoke.run("verify", TAG)
    assert "images of the platform base cannot be verified" in done.err
    assert LocalStore(invoke.store).get(TAG).verification is None


def test_a_timeline_is_shown_or_said_to_be_missing(invoke: Tasks) -> None:
    invoke.add(TAG, verification=FAILED)
    assert "agent joined" in invoke.run("images.timeline", "slurm").out
    moments = json.loads(invoke.run("images.timeline", "slurm", "--json").out)["moments"]
    assert [moment["name"] for moment in moments] == ["power-on", "agent joined"]
    invoke.add("20260102-bbbbbbb", "roce")
    done = invoke.run("images.timeline", "roce")
    assert (done.status, "20260102-bbbbbbb has no timeline" in done.err) == (1, True)
    assert "`invoke verify 20260102-bbbbbbb` makes one" in done.err


# Baking and verifying.


@pytest.fixture
def baking(invoke: Tasks, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Bake without building: the image is there, built just now or before."""

    def bake(*words: str, built: bool = True) -> Done:
        monkeypatch.setattr(build, "bake", lambda *_, **__: (LocalStore(invoke.store).get(TAG), built))
        return invoke.run("bake", "--platform", "slurm", *words)

    return bake


def test_a_bake_ends_with_a_verification(invoke: Tasks, baking: Callable[..., Done], verifier: Verifier) -> None:
    invoke.add(TAG)
    done = baking()
    assert (done.status, len(verifier.asked)) == (0, 1)
    assert "passed, joined after 36 s (tcg)" in done.out
    assert "Next: invoke boot" in done.out
    assert baking(built=False).status == 0
    assert len(verifier.asked) == 1, "once"


def test_a_bake_without_verification_says_that_it_was_not(
    invoke: Tasks, baking: Callable[..., Done], verifier: Verifier
) -> None:
    invoke.add(TAG)
    done = baking("--no-verify")
    assert (done.status, verifier.asked) == (0, [])
    assert "verified  -" in done.out


def test_a_bake_of_an_image_that_fails_fails_each_time(
    invoke: Tasks, baking: Callable[..., Done], verifier: Verifier
) -> None:
    invoke.add(TAG)
    verifier.result = FAILED
    assert baking().status == 1
    done = baking(built=False)
    assert (done.status, len(verifier.asked)) == (1, 1)
    assert "failed its verification and is marked so" in done.err


def test_a_bake_of_what_cannot_be_verified_says_so_and_is_good(invoke: Tasks, baking: Callable[..., Done]) -> None:
    invoke.add(TAG, platform="base")
    done = baking("--json")
    assert (done.status, json.loads(done.out)["verification"]) == (0, None)
    assert "not verified: images of the platform base cannot be verified" in done.err


def test_a_bake_on_a_host_that_cannot_verify_says_that_the_image_is_there(
    invoke: Tasks, baking: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verified(*_: object, **__: object) -> Record:
        raise BakehouseError("unshare failed with exit status 1")

    monkeypatch.setattr("bakehouse.cli_nodes.verified", verified)
    invoke.add(TAG)
    done = baking()
    assert done.status == 1
    assert f"{TAG} is baked, but it could not be verified here: unshare failed" in done.err
    assert "--no-verify" in done.err


# User-data.

SECRET = "bhj_" + "s" * 43
KEY = bytes(range(200, 232)) * 2
KEY_BASE64 = userdata.Join(("c",), key=KEY).key_base64


@pytest.fixture
def secrets(invoke: Tasks) -> Path:
    """Files with secrets, as userdata takes them."""
    (invoke.folder / "token").write_text(f"{SECRET}\n")
    (invoke.folder / "ca.crt").write_text(Authority().pem)
    (invoke.folder / "munge.key").write_bytes(KEY)
    (invoke.folder / "id.pub").write_text(f"ssh-ed25519 {'AAAAC3NzaC1lZDI1NTE5'}AAAA me@here\n\n")
    return invoke.folder


def broker_flags(secrets: Path) -> list[str]:
    return ["--broker", "https://ctl:8444", "--ca", str(secrets / "ca.crt"), "--token-file", str(secrets / "token")]


def test_user_data_with_a_token_is_printed(invoke: Tasks, secrets: Path) -> None:
    done = invoke.run(
        "userdata", "--controller", "ctl:6817", "--controller", "ctl2", "--node", "node-1", "--feature", "bake",
        "--hardware", "CPUs=4 RealMemory=3800", "--ssh-key", str(secrets / "id.pub"), *broker_flags(secrets),
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("#cloud-config\n")
    data = yaml.safe_load(done.out)
    (file,) = [file for file in data["write_files"] if file["path"] == "/etc/bakehouse/join.yaml"]
    join = yaml.safe_load(file["content"])
    assert join["slurm"]["controllers"] == ["ctl:6817", "ctl2"]
    assert join["slurm"]["hardware"] == {"CPUs": 4, "RealMemory": 3800}
    assert join["secret"]["broker"]["token"] == SECRET


def test_user_data_in_a_file_is_for_its_owner_only(invoke: Tasks, secrets: Path) -> None:
    target = secrets / "nodes.yaml"
    target.write_text("x" * 99999)
    target.chmod(0o644)
    done = invoke.run(
        "userdata", "--controller", "ctl", "--key-file", str(secrets / "munge.key"), "--output", str(target)
    )
    assert (done.status, done.out) == (0, "")
    assert f"wrote {target}, {len(target.read_text())} bytes, readable by you only" in done.err
    assert target.stat().st_mode & 0o777 == 0o600
    assert KEY_BASE64 in target.read_text()
    assert KEY_BASE64 not in done.err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--broker"], "--broker without --ca and --token-file"),
        (["--ca"], "--ca without --broker and --token-file"),
        (["--token-file"], "--token-file without --broker and --ca"),
        (["--broker", "--ca"], "--broker and --ca without --token-file"),
        (["--ca", "--token-file"], "--ca and --token-file without --broker"),
    ],
)
def test_a_broker_is_given_whole(invoke: Tasks, secrets: Path, flags: list[str], error: str) -> None:
    values = dict(zip(*[iter(broker_flags(secrets))] * 2, strict=True))
    words = [word for flag in flags for word in (flag, values[flag])]
    done = invoke.run("userdata", "--controller", "ctl", *words)
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        f"error: {error}", "hint: a node needs the broker's address, its authority's certificate, and a token",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no controller is given"),
        (["--controller", "ctl:0"], "the controller 'ctl:0' has no port from 1 to 65535"),
        (["--platform", "kubernetes"], "no API server is given"),
        (
            ["--platform", "kubernetes", "--api-server", "api"],
            "neither a hash of the cluster's CA nor a discovery file",
        ),
        (["--controller", "ctl", "--platform", "nomad"], "--platform nomad: it is one of slurm, kubernetes, roce"),
        (["--controller", "ctl", "--path", "hybrid"], "the path hybrid needs a container image"),
        (["--platform", "kubernetes", "--api-server", "api", "--path", "hybrid"], "only nodes of slurm come from"),
        (["--platform", "roce", "--container", "x"], "only nodes of slurm come from container images"),
        (["--controller", "ctl", "--insecure-registry"], "--insecure-registry without --container"),
        (["--controller", "ctl", "--hardware", "many"], "'many' says nothing of hardware"),
        (["--controller", "ctl", "--node", "a.b"], "'a.b' cannot be a node's name"),
        (["--controller", "ctl", "--key-file", "/nothing"], "--key-file /nothing cannot be read: No such file"),
        (["--controller", "ctl", "--ssh-key", "/nothing"], "--ssh-key /nothing cannot be read: No such file"),
        (["--controller", "ctl", "--ssh-key", "KEY"], "munge.key is not UTF-8 text"),
        (["--controller", "ctl", "--key-file", "KEY", "BROKER"], "a key and a broker are given"),
        (["--controller", "ctl", "--output", "/nothing/nodes.yaml"], "--output /nothing/nodes.yaml cannot be written"),
    ],
)
def test_user_data_that_cannot_be_made_is_told_without_a_secret(
    invoke: Tasks, secrets: Path, words: list[str], error: str
) -> None:
    given = [str(secrets / "munge.key") if word == "KEY" else word for word in words if word != "BROKER"]
    done = invoke.run("userdata", *given, *(broker_flags(secrets) if "BROKER" in words else []))
    assert (done.status, done.out) == (1, "")
    assert error in done.err
    assert "Traceback" not in done.err
    assert SECRET not in done.err
    assert KEY_BASE64 not in done.err


@pytest.mark.parametrize("text", ["ssss" + SECRET, SECRET[:-1], SECRET + " x", "password"])
def test_a_token_that_is_none_is_not_shown(invoke: Tasks, secrets: Path, text: str) -> None:
    (secrets / "token").write_text(text)
    done = invoke.run("userdata", "--controller", "ctl", *broker_flags(secrets))
    assert (done.status, done.out) == (1, "")
    assert "the token is not one of the broker's" in done.err
    assert text not in done.err


# Tokens.


@pytest.fixture
def broker(invoke: Tasks) -> Path:
    """The configuration of a join broker on this host. Return where it keeps its tokens."""
    (invoke.folder / "munge.key").write_bytes(KEY)
    (invoke.folder / "broker.yaml").write_text(yaml.safe_dump({
        "listen": "[::]:8444", "certificate": "/x/broker.crt", "private_key": "/x/broker.key",
        "state": str(invoke.folder / "tokens.sqlite"),
        "platforms": {"slurm": {"authentication": "munge", "key_file": str(invoke.folder / "munge.key")}},
    }))  # fmt: skip
    return invoke.folder / "tokens.sqlite"


def test_a_token_is_all_that_is_printed(invoke: Tasks, broker: Path) -> None:
    done = invoke.run("join.token", "--platform", "slurm", "--node", "node-1", "--lifetime", "30m")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("\n")
    userdata.Broker("https://ctl:8444", done.out.strip(), Authority().pem)
    assert broker.stat().st_mode & 0o077 == 0
    assert done.out.strip().encode() not in broker.read_bytes()


def test_a_token_goes_from_one_task_into_the_other(invoke: Tasks, broker: Path, secrets: Path) -> None:
    made = invoke.run("join.token", "--platform", "slurm", "--node", "node-1").out
    (secrets / "token").write_text(made)
    assert made.strip() in invoke.run("userdata", "--controller", "ctl", *broker_flags(secrets)).out


def test_tokens_are_listed_and_revoked(invoke: Tasks, broker: Path) -> None:
    made = [invoke.run("join.token", "--platform", "slurm", "--node", node).out.strip() for node in ("a", "b")]
    rows = json.loads(invoke.run("join.tokens", "--json").out)
    assert {(row["node"], row["status"]) for row in rows} == {("a", "good"), ("b", "good")}
    done = invoke.run("join.revoke", "a")
    (identity,) = [row["identity"] for row in rows if row["node"] == "a"]
    assert (done.status, done.out) == (0, f"revoked {identity} of a\n")
    shown = invoke.run("join.tokens").out
    (line,) = [line for line in shown.splitlines() if line.startswith(identity)]
    assert "revoked" in line
    assert not any(secret in shown for secret in made)
    done = invoke.run("join.revoke", "a")
    assert (done.status, "error: there is no good token of 'a'" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--platform", "slrum", "--node", "a"],
            "--platform slrum: it is one of slurm, kubernetes (did you mean 'slurm'?)",
        ),
        (["--platform", "slurm", "--node", "a", "--lifetime", "ever"], "ever"),
        (["--platform", "slurm", "--node", "a", "--lifetime", "99d"], "99d"),
        (["--platform", "slurm", "--node", "a b"], "a b"),
    ],
)
def test_a_token_that_cannot_be_made_is_told(invoke: Tasks, broker: Path, words: list[str], error: str) -> None:
    done = invoke.run("join.token", *words)
    assert (done.status, done.out) == (1, "")
    assert error in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [["token", "--platform", "slurm", "--node", "a"], ["tokens"], ["revoke", "a"]])
def test_without_a_broker_it_says_where_one_is_wanted(invoke: Tasks, words: list[str]) -> None:
    done = invoke.run(f"join.{words[0]}", *words[1:])
    assert (done.status, done.out) == (1, "")
    assert f"error: there is no join broker here: {invoke.folder}/broker.yaml is not there" in done.err
    assert "invoke cluster.up slurm" in done.err


def test_a_broker_whose_configuration_is_wrong_is_told(invoke: Tasks) -> None:
    (invoke.folder / "broker.yaml").write_text("listen: nowhere\n")
    done = invoke.run("join.tokens")
    assert (done.status, "broker.yaml" in done.err, "Traceback" in done.err) == (1, True, False)


# Clusters and nodes.


@pytest.mark.parametrize(
    "words",
    [["cluster.run", "sinfo"], ["cluster.down", "slurm"], ["boot", "slurm", "--join"]],
    ids=["run", "down", "boot"],
)
def test_without_a_cluster_it_says_how_to_make_one(invoke: Tasks, words: list[str]) -> None:
    invoke.add(TAG)
    done = invoke.run(*words)
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        "error: no slurm cluster runs here", "hint: `invoke cluster.up slurm` makes one",
    ]  # fmt: skip


def test_no_cluster_is_a_status_too(invoke: Tasks) -> None:
    assert "No cluster runs here" in invoke.run("cluster").out
    assert json.loads(invoke.run("cluster", "--json").out) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["roce"], "cluster.up roce: it is one of slurm, kubernetes"),
        (["slurm", "--authentication", "mung"], "--authentication mung: it is one of munge, slurm"),
        (["slurm"], "there is no image 'slurm'"),
        (["slurm", "--image", "2027"], "there is no image '2027'"),
    ],
)
def test_a_cluster_that_cannot_be_made_is_told(invoke: Tasks, words: list[str], error: str) -> None:
    done = invoke.run("cluster.up", *words)
    assert (done.status, f"error: {error}" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data-source", "nocluod"], "--data-source nocluod: it is one of nocloud, config-drive"),
        (["--join", "--user-data", "x.yaml"], "--join and --user-data"),
        (["--user-data", "/nothing"], "--user-data /nothing cannot be read: No such file or directory"),
        (["--memory", "much"], "--memory much: it is a size such as 512MiB or 4GiB"),
        (["--disk", "10"], "--disk 10: it is a size such as 512MiB or 4GiB"),
    ],
)
def test_a_boot_that_cannot_be_is_told(invoke: Tasks, words: list[str], error: str) -> None:
    invoke.add(TAG)
    (invoke.store / TAG / "slurm.qcow2").write_bytes(b"x")
    done = invoke.run("boot", TAG, *words)
    assert (done.status, f"error: {error}" in done.err) == (1, True)


def test_a_boot_gets_what_the_flags_say(invoke: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke.add(TAG)
    (invoke.store / TAG / "slurm.qcow2").write_bytes(b"x")
    (invoke.folder / "user-data").write_text("#cloud-config\n{}\n")
    asked: dict[str, Any] = {}

    def boot(image: Path, **options: Any) -> None:
        asked.update(options, image=image)
        raise BakehouseError("enough")

    monkeypatch.setattr(machine, "boot", boot)
    invoke.run(
        "boot", TAG, "--memory", "2GiB", "--cpus", "2", "--disk", "10GiB", "--name", "node-1", "--data-source",
        "config-drive", "--user-data", str(invoke.folder / "user-data"),
    )  # fmt: skip
    assert (asked["memory"], asked["cpus"], asked["disk_size"]) == (2048, 2, 10 << 30)
    assert (asked["hostname"], asked["data_source"], asked["network"]) == ("node-1", "config-drive", None)
    assert asked["user_data"] == "#cloud-config\n{}\n"
    assert asked["image"] == invoke.store / TAG / "slurm.qcow2"
