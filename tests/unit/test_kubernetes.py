"""What a Kubernetes image and its control plane are made of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from bakehouse import control_plane, kubernetes, kubernetes_cluster, manifest, plan
from bakehouse.errors import BakehouseError
from bakehouse.settings import Settings, load
from bakehouse.verify_kubernetes import REACH


@pytest.fixture
def site(tmp_path: Path) -> Settings:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    return Settings(cache=tmp_path / "cache", manifests=[manifests])


def write(site: Settings, text: str, name: str = "mine") -> None:
    (site.manifests[0] / f"{name}.yaml").write_text(text)


def test_the_version_is_an_input_of_the_digest(site: Settings) -> None:
    write(site, "extends: kubernetes\nkubernetes: {version: '1.34.2'}\n")
    ours, theirs = plan.make("kubernetes", site), plan.make("mine", site)
    assert theirs.environment["DIB_KUBERNETES_VERSION"] == "1.34.2"
    assert ours.digest != theirs.digest
    assert {"kubelet", "kubeadm", "kubectl", "containerd"} <= {package.name for package in ours.packages}


def test_images_of_a_manifest_replace_those_by_default(site: Settings) -> None:
    write(site, "extends: kubernetes\nkubernetes: {images: [pause, docker.io/flannel/flannel:v0.27.4]}\n")
    assert plan.make("mine", site).environment["DIB_KUBERNETES_IMAGES"] == "pause docker.io/flannel/flannel:v0.27.4"
    write(site, "extends: kubernetes\nkubernetes: {images: []}\n", "none")
    assert plan.make("none", site).environment["DIB_KUBERNETES_IMAGES"] == ""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("extends: debian-13\nplatform: kubernetes\n", "needs 'kubernetes' with a version"),
        ("extends: kubernetes\nkubernetes: {version: 1.35}\n", "mine.yaml:2"),
        ("extends: kubernetes\nkubernetes: {version: '1.35'}\n", "must be a version such as '1.35.5', in quotes"),
        ("extends: kubernetes\nkubernetes: {images: ['a b']}\n", "is neither a name of kubeadm's"),
        ("extends: kubernetes\nkubernetes: {verison: '1.35.5'}\n", "verison"),
    ],
)
def test_a_manifest_that_is_wrong_is_named_with_its_place(site: Settings, text: str, error: str) -> None:
    write(site, text)
    with pytest.raises(BakehouseError) as caught:
        plan.make("mine", site)
    assert error in str(caught.value)


def test_folders_count_by_what_they_hold(site: Settings, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kubelet_1.deb").write_bytes(b"a package")
        (folder / "pause.tar").write_bytes(b"an image")
        changed = {"kubernetes_packages": str(folder), "kubernetes_images": folder}
        digests.append(plan.make("kubernetes", site.model_copy(update=changed)).digest)
    assert digests[0] == digests[1], "where they are makes no difference"
    (tmp_path / "two/pause.tar").write_bytes(b"another image")
    changed = {"kubernetes_packages": str(tmp_path / "two"), "kubernetes_images": tmp_path / "two"}
    assert plan.make("kubernetes", site.model_copy(update=changed)).digest != digests[0]


@pytest.mark.parametrize("setting", ["kubernetes_packages", "kubernetes_images"])
def test_a_folder_that_holds_nothing_is_named(site: Settings, tmp_path: Path, setting: str) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        value = str(folder) if setting == "kubernetes_packages" else folder
        with pytest.raises(BakehouseError) as caught:
            plan.make("kubernetes", site.model_copy(update={setting: value}))
        assert str(folder) in caught.value.message
        assert setting in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("KUBERNETES_PACKAGES", "https://mirror.example.org/k8s/", "https://mirror.example.org/k8s"),
        ("KUBERNETES_PACKAGES", "debs", "{here}/debs"),
        ("KUBERNETES_PACKAGES", "file:///srv/debs", "/srv/debs"),
        (
            "KUBERNETES_KEY",
            "DE15 B144 86CD 377B 9E87 6E1A 2346 54DA 9A29 6436",
            "DE15B14486CD377B9E876E1A234654DA9A296436",
        ),
    ],
)
def test_settings_are_addresses_or_folders(
    name: str, value: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load({f"BAKEHOUSE_{name}": value}, tmp_path)
    assert getattr(found, name.lower()) == kept.format(here=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("KUBERNETES_PACKAGES", "https://me:secret@mirror/k8s", "must not hold a password"),
        ("KUBERNETES_KEY", "9A296436", "40 digits"),
    ],
)
def test_settings_that_are_wrong_are_named(name: str, value: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match=error) as caught:
        load({f"BAKEHOUSE_{name}": value}, tmp_path)
    assert "secret@" not in str(caught.value) or name == "KUBERNETES_KEY"


def published(folder: Path, version: str = "1.35.5") -> Path:
    place = folder / f"v{version}/bin/linux/amd64"
    place.mkdir(parents=True)
    for name in kubernetes.CONTROL_PLANE:
        (place / name).write_bytes(name.encode())
        (place / f"{name}.sha256").write_text(hashlib.sha256(name.encode()).hexdigest())
    return place


def test_programs_of_the_control_plane_are_fetched_once(site: Settings, tmp_path: Path) -> None:
    place = published(tmp_path / "dl")
    settings = site.model_copy(update={"kubernetes_binaries": str(tmp_path / "dl")})
    found = kubernetes.binaries("1.35.5", settings)
    assert {name: path.read_text() for name, path in found.items()} == {name: name for name in kubernetes.CONTROL_PLANE}
    for path in place.iterdir():
        path.unlink()
    assert kubernetes.binaries("1.35.5", settings) == found
    assert kubernetes.kept_binaries("1.35.5", site.cache) == found


def test_a_program_that_is_not_what_its_digest_says_is_refused(site: Settings, tmp_path: Path) -> None:
    place = published(tmp_path / "dl")
    (place / "kube-apiserver").write_bytes(b"cut sho")
    settings = site.model_copy(update={"kubernetes_binaries": str(tmp_path / "dl")})
    with pytest.raises(BakehouseError, match="kube-apiserver is not what its digest beside it says"):
        kubernetes.binaries("1.35.5", settings)
    assert not list((site.cache / "kubernetes/v1.35.5").glob("kube-apiserver*"))[1:]


def test_programs_that_cannot_be_had_are_named(site: Settings) -> None:
    settings = site.model_copy(update={"kubernetes_binaries": "http://127.0.0.1:9"})
    with pytest.raises(BakehouseError, match=r"127\.0\.0\.1:9/v1\.35\.5/.*cannot be fetched") as caught:
        kubernetes.binaries("1.35.5", settings)
    assert "kubernetes_binaries" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "wanted"), [("1.20.2", "v1beta2"), ("1.22.0", "v1beta3"), ("1.30.9", "v1beta3"), ("1.35.5", "v1beta4")]
)
def test_kubeadm_is_given_the_form_that_its_version_takes(version: str, wanted: str) -> None:
    assert control_plane.api_version(version) == f"kubeadm.k8s.io/{wanted}"


def test_user_data_with_a_pod_network_holds_both_parts() -> None:
    parts = yaml.safe_load(kubernetes_cluster.with_pod_network("#cloud-config\nx: 1\n"))
    assert [part["type"] for part in parts] == ["text/cloud-config"] * 2
    assert parts[1]["content"] == "#cloud-config\nx: 1\n"
    assert "/etc/cni/net.d/10-bakehouse.conflist" in parts[0]["content"]


def test_what_is_run_on_the_node_is_python() -> None:
    compile(REACH, "reach", "exec")


def test_the_manifest_that_comes_with_bakehouse_has_a_version() -> None:
    found = manifest.resolve("kubernetes", manifest.folders([]))
    assert found.manifest.kubernetes is not None
    assert found.manifest.kubernetes.images == ["pause", "kube-proxy", "coredns"]
