"""A night on two builders: a real Slurm controller, and two nodes made from our own image, as the docs describe it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bakehouse import REPOSITORY, cluster, container, run, waiting
from bakehouse.cluster import Cluster
from bakehouse.container import Container
from bakehouse.network import FOLDER, GATEWAY
from bakehouse.night import ImageNight, schedule
from bakehouse.package_mirror import PackageMirror
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.userdata import files as files_of
from tests.integration.conftest import bake, host_cache, status

pytestmark = pytest.mark.long

BUILDERS = ("builder-1", "builder-2")
COMMANDS = ("sbatch", "squeue", "scancel", "sinfo")
IMAGES = ("one", "two", "three", "four")
SECONDS = 120


def release_of_host() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


@dataclass
class Farm:
    """A cluster of two builders, a site with four images, and Slurm's commands on this host."""

    slurm: Cluster
    nodes: dict[str, Container]
    folder: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OS_", "BAKEHOUSE_"))}
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), *words], cwd=self.folder, text=True,
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def start_night(self, *names: str, json: bool = False) -> subprocess.Popen[str]:
        words = [word for name in names for word in ("--platform", name)]
        return self.start("nightly", "--executor", "slurm", "--no-verify", *words, *(["--json"] if json else []))

    def begin(self, *names: str) -> subprocess.Popen[str]:
        """Start a night and wait until its bakes have begun."""
        started = self.start_night(*names)
        assert started.stdout is not None
        assert any(line.startswith("Slurm job") for line in started.stdout)
        time.sleep(4)
        return started

    def night(self, *names: str) -> Any:
        process = self.start_night(*names, json=True)
        out, err = process.communicate(timeout=1800)
        assert process.returncode == 0, out + err
        return json.loads(out)

    def change(self, name: str, packages: str = "[tree, pv]") -> None:
        """Change a manifest."""
        path = self.folder / "manifests" / f"{name}.yaml"
        path.write_text(re.sub(r"packages: .*", f"packages: {packages}", path.read_text()))

    def tasks(self) -> str:
        return self.slurm.controller.run("squeue", "--noheader").stdout


@pytest.fixture(scope="module")
def farm(real_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    # Containers have a /tmp of their own.
    folder = Path(tempfile.mkdtemp(prefix="bakehouse-farm-", dir="/var/tmp"))
    (manifests := folder / "manifests").mkdir()
    described = re.findall(r"```yaml\n# manifests/builder\.yaml\n(.*?)```", _page("nightly.md"), flags=re.DOTALL)[0]
    builder = yaml.safe_load(described) | {"release": release_of_host()}
    (manifests / "builder.yaml").write_text(yaml.safe_dump(builder))
    for name in IMAGES:
        text = f"extends: debian-13\nplatform: base\npackages: [tree]\ndescription: image {name}\n"
        (manifests / f"{name}.yaml").write_text(text)
    settings = real_settings.model_copy(update={"manifests": [manifests]})
    record, _ = bake(settings, "builder")
    site = {"store": "store", "cache": "cache", "nights": "nights", "manifests": ["manifests"]}
    proxy = f"http://{GATEWAY}:3142"
    options = ["--exclusive", f"--export=ALL,http_proxy={proxy}"]
    (folder / "bakehouse.yaml").write_text(yaml.safe_dump(site | {"nightly": {"sbatch": options, "attempts": 1}}))
    shutil.copytree(real_settings.cache, folder / "cache", ignore=shutil.ignore_patterns("work", "apt"))
    store = LocalStore(real_settings.store)
    with (
        Log(tmp_path_factory.mktemp("farm") / "network.log") as log,
        cluster.up(store.image(record), log, cgroups=False) as slurm,
        ExitStack() as stack,
    ):
        if release_of_host() == "bookworm":
            # Slurm 22.05 knows no "disabled", which containers need from other releases.
            slurm.controller.write("etc/slurm/cgroup.conf", "CgroupPlugin=cgroup/v1\n")
        slurm.controller.start()
        root = slurm.network.mount_image(store.image(record))
        mirror = PackageMirror(slurm.network, host_cache() / "apt-cacher-ng")
        mirror.prepare(root, release_of_host(), real_settings.mirrors())
        mirror.start()
        _bring_commands(slurm, folder / "bin")
        python = {Path(sys.prefix), Path(sys.base_prefix)} - {Path("/usr")}
        shared = [folder, REPOSITORY, *(path for path in python if not path.is_relative_to(REPOSITORY))]
        nodes = {
            name: stack.enter_context(
                container.boot(
                    slurm.network, root, name, files=files_of(slurm.join(name)), layer="6g", shared=shared,
                    hostname=name,
                )
            )
            for name in BUILDERS
        }  # fmt: skip
        for node in nodes.values():
            node.wait("join", lambda node=node: status(node).get("state") == "joined", SECONDS)  # type: ignore[misc]
        yield Farm(slurm, nodes, folder)
    run.remove_tree(folder)


def _page(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text()


def _bring_commands(slurm: Cluster, folder: Path) -> None:
    """Write commands that run the controller's own: this host has no Slurm. A script is handed on by standard input."""
    folder.mkdir()
    inside = [*slurm.network.everything, "chroot", str(FOLDER / "copies" / "controller" / "root")]
    for name in COMMANDS:
        words = " ".join(map(str, inside))
        text = f'#!/bin/bash\nexec {words} {name} "$@"\n'
        if name == "sbatch":
            text = f'#!/bin/bash\nexec {words} sbatch "${{@:1:$#-1}}" < "${{@: -1}}"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def test_four_bakes_spread_over_two_builders(farm: Farm) -> None:
    begun = time.monotonic()
    night = farm.night(*IMAGES)
    took = time.monotonic() - begun
    assert {image["name"]: image["state"] for image in night["images"]} == dict.fromkeys(IMAGES, "built")
    by = {image["name"]: image["builder"] for image in night["images"]}
    assert set(by.values()) == set(BUILDERS)
    store = LocalStore(farm.folder / "store")
    assert len(store.records()) == len(IMAGES)
    for record in store.records():
        store.image(record)
    assert night["executor"] == "slurm"
    assert farm.tasks() == ""
    seconds = {
        image["name"]: next(s["seconds"] for s in image["stages"] if s["name"] == "bake") for image in night["images"]
    }
    print(f"two builders: {took:.0f} s for bakes of {seconds} on {by}")
    again = farm.night(*IMAGES)
    assert {image["state"] for image in again["images"]} == {"unchanged"}


def test_what_a_second_builder_brings(farm: Farm) -> None:
    """Measured, not judged: it takes a core for each builder. The schedule of the same bakes is simulated beside it."""
    took = {}
    for builders, packages in ((1, "[tree, file]"), (2, "[tree, less]")):
        for name in IMAGES:
            farm.change(name, packages)
        state = "drain" if builders == 1 else "resume"
        farm.slurm.controller.run("scontrol", "update", "nodename=builder-2", f"state={state}", "reason=measuring")
        begun = time.monotonic()
        night = farm.night(*IMAGES)
        took[builders] = time.monotonic() - begun
        assert {image["state"] for image in night["images"]} == {"built"}
        assert len({image["builder"] for image in night["images"]}) == builders
    images = [ImageNight.model_validate(image) for image in night["images"]]
    ends = [max(slot.end for slot in schedule(images, builders)) for builders in (1, 2)]
    print(f"four bakes: one builder {took[1]:.0f} s, two {took[2]:.0f} s, ratio {took[2] / took[1]:.2f}")
    print(f"schedule: {ends[0]:.0f} s and {ends[1]:.0f} s, ratio {ends[1] / ends[0]:.2f}; {os.cpu_count()} cores here")


def test_a_night_that_was_killed_finds_its_tasks_again(farm: Farm) -> None:
    before = len(LocalStore(farm.folder / "store").records())
    for name in IMAGES[:2]:
        farm.change(name)
    started = farm.begin("one", "two")
    started.kill()
    started.communicate()
    assert farm.tasks() != "", "the bakes go on"
    night = farm.night("one", "two")
    assert night["resumed"] == 1
    assert [image["state"] for image in night["images"]] == ["built", "built"]
    assert len(LocalStore(farm.folder / "store").records()) == before + 2, "none was baked twice"


def test_a_night_that_is_ended_ends_its_tasks(farm: Farm) -> None:
    farm.change("three")
    started = farm.begin("three")
    started.terminate()
    started.communicate()
    waiting.until("end of its tasks", lambda: farm.tasks() == "", 60, last_words=farm.tasks)
    night = farm.night("three")
    assert [image["state"] for image in night["images"]] == ["built"]
    assert not [*(farm.folder / "store").glob(".incoming*")]


def test_a_builder_that_dies_is_replaced_by_slurm(farm: Farm) -> None:
    farm.change("four")
    started = farm.start_night("four", json=True)
    waiting.until("its task", lambda: _running_on(farm) != "", 120, poll=0.5, last_words=farm.tasks)
    busy = _running_on(farm)
    time.sleep(3)
    farm.nodes[busy].power_off(clean=False)
    farm.slurm.controller.run("scontrol", "update", f"nodename={busy}", "state=down", "reason=gone")
    out, err = started.communicate(timeout=900)
    assert started.returncode == 0, out + err
    (image,) = json.loads(out)["images"]
    assert image["state"] == "built"
    assert image["builder"] != busy


def _running_on(farm: Farm) -> str:
    return farm.slurm.controller.run("squeue", "--noheader", "--states=running", "--format=%N").stdout.strip()
