"""The benchmark of loaded images, with a cluster, a registry and machines that do as they are told."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from bakehouse import bench_preload, build, kubernetes, kubernetes_cluster, machine, userdata, verify
from bakehouse.bench import Row
from bakehouse.bench_preload import First
from bakehouse.errors import BakehouseError
from bakehouse.plan import Plan
from bakehouse.record import FILE_NAME, Record
from bakehouse.registry import Registry
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.unit.test_bench_boot import record

MIB = 1 << 20


class Plane:
    """A control plane that shows the first pod as ready at the second look."""

    def __init__(self) -> None:
        self.looks = 0
        self.deleted: list[str] = []
        self.add_ons: list[str] = []

    def start(self) -> None:
        pass

    def kubeadm(self, *phase: str) -> None:
        self.add_ons.append(" ".join(phase))

    def kubectl(self, *words: str, **_: Any) -> None:
        self.deleted.append(words[-1])

    def get(self, *_words: str) -> dict[str, Any]:
        self.looks += 1
        return {"items": [{"status": {"containerStatuses": [{"ready": self.looks % 2 == 0}]}}]}


class World:
    """A store with an image, and all that the benchmark starts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings(store=folder / "store", cache=folder / "cache", kubernetes_images=folder)
        self.boots: list[tuple[Path, dict[str, Any]]] = []
        self.baked: list[Plan] = []
        self.plane = Plane()
        self.loaded = ["registry.k8s.io/pause:3.10"]
        made = SimpleNamespace(
            controller=self.plane, join=self.join, network=SimpleNamespace(mount_image=lambda image: image)
        )
        monkeypatch.setattr(bench_preload, "POLL_SECONDS", 0)
        monkeypatch.setattr(build, "bake", self.bake)
        monkeypatch.setattr(kubernetes, "binaries", lambda *_: {})
        monkeypatch.setattr(kubernetes_cluster, "up", lambda *_: contextlib.nullcontext(made))
        monkeypatch.setattr(machine, "make_key", lambda folder: folder / "id")
        monkeypatch.setattr(machine, "boot", self.boot)
        monkeypatch.setattr(verify, "wait_for_join", lambda _: 0)
        monkeypatch.setattr(Registry, "__init__", self.registry)
        for name in ("prepare", "start"):
            monkeypatch.setattr(Registry, name, lambda *_: None)
        monkeypatch.setattr(Registry, "push_loaded", lambda _: self.loaded)

    @staticmethod
    def registry(registry: Registry, _network: Any) -> None:
        registry.address = "10.77.0.1:5000"

    @staticmethod
    def join(node: str) -> userdata.KubernetesJoin:
        return userdata.KubernetesJoin(
            "10.77.0.1:6443", ca_hashes=("sha256:" + "0" * 64,), node=node, bootstrap_token="abcdef.0123456789abcdef"
        )

    def add(self, store: LocalStore, made: Record, size: int) -> Record:
        folder = store.folder(made.tag)
        folder.mkdir(parents=True)
        made = made.model_copy(update={"files": [made.files[0].model_copy(update={"size": size})]})
        (folder / "image.qcow2").write_bytes(b"x" * size)
        (folder / FILE_NAME).write_text(made.model_dump_json())
        return made

    def bake(self, wanted: Plan, store: LocalStore, *_: Any, **__: Any) -> tuple[Record, bool]:
        self.baked.append(wanted)
        return self.add(store, of_kubernetes("bench-bare"), 100), True

    @contextlib.contextmanager
    def boot(self, image: Path, **options: Any) -> Iterator[Any]:
        self.boots.append((image, options))

        yield SimpleNamespace(
            started=0.0, console=SimpleNamespace(lines=[SimpleNamespace(at=90.0)]), check=lambda: None, output=str,
            wait_for_ssh=lambda _: None, ssh=lambda _: subprocess.CompletedProcess([], 0, "1000\n500\n", ""),
        )  # fmt: skip

    def bench(self, rounds: int = 1) -> list[Any]:
        return bench_preload.preload(self.settings, rounds, Console(file=io.StringIO())).rows


def of_kubernetes(name: str = "kubernetes") -> Record:
    return record(name, platform="kubernetes", versions={"kubernetes": "1.35.5-1.1"})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_the_same_node_is_booted_with_its_images_and_without(world: World) -> None:
    world.add(LocalStore(world.settings.store), of_kubernetes(), 300)
    found = {row.name: row for row in world.bench(rounds=2)}
    assert [options["hostname"] for _, options in world.boots] == ["loaded-1", "pulled-1", "loaded-2", "pulled-2"]
    assert world.plane.deleted == ["loaded-1", "pulled-1", "loaded-2", "pulled-2"]
    assert world.plane.add_ons == ["addon kube-proxy"]
    assert found["power-on to joined, images pulled"].value == "90.0 s"
    assert found["image file with them"].ratio == 3
    (bare,) = world.baked
    assert bare.environment["DIB_KUBERNETES_IMAGES"] == ""
    assert bare.environment["DIB_KUBERNETES_IMAGE_FOLDER"] == ""
    assert not list(world.settings.cache.glob("bench-*")), "the image without them is thrown away"


def test_both_pull_from_the_registry_of_the_network(world: World) -> None:
    world.add(LocalStore(world.settings.store), of_kubernetes(), 300)
    world.bench()
    for _, options in world.boots:
        first, second = yaml.safe_load(options["user_data"].partition("\n")[2])
        paths = {file["path"]: file["content"] for file in yaml.safe_load(first["content"])["write_files"]}
        hosts = tomllib.loads(paths["/etc/containerd/certs.d/_default/hosts.toml"])
        assert hosts["host"] == {"http://10.77.0.1:5000": {"capabilities": ["pull", "resolve"]}}
        assert "join.yaml" in second["content"]


def test_an_image_without_images_is_refused(world: World) -> None:
    world.add(LocalStore(world.settings.store), of_kubernetes(), 300)
    world.loaded = []
    with pytest.raises(BakehouseError, match="no images are loaded in"):
        world.bench()
    assert world.boots == []


def test_an_image_of_another_platform_is_refused(world: World) -> None:
    world.add(LocalStore(world.settings.store), of_kubernetes().model_copy(update={"platform": "slurm"}), 1)
    with pytest.raises(BakehouseError, match="is of the platform slurm"):
        world.bench()


def test_medians_and_what_is_saved() -> None:
    loaded = [First(100, 110, 1 * MIB), First(90, 100, 1 * MIB), First(200, 300, 1 * MIB)]
    pulled = [First(100, 165, 81 * MIB)]
    found = {row.name: row for row in bench_preload.rows(loaded, pulled, 300 * MIB, 200 * MIB)}
    assert found["power-on to the first pod (kube-proxy), images pulled"].ratio == 1.5
    assert found["saved at each boot"].value == "55.0 s and 80 MiB over the network"
    assert found["image file with them"] == Row("image file with them", "300 MiB", 1.5)
