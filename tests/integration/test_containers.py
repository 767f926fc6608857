"""Container images of the hybrid path: built by buildah, sent to Debian's docker-registry, asked for over its API."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import REPOSITORY, container_image, container_push, local_registry, registry, run
from bakehouse.cache import BaseCache
from bakehouse.container_image import ContainerImage, Shelf
from bakehouse.container_push import Pushed, Target
from bakehouse.daemon import free_ports
from bakehouse.errors import BakehouseError
from bakehouse.local_registry import LocalRegistry
from bakehouse.record import Record
from bakehouse.settings import Settings
from tests.integration.conftest import kill_while_its_script_waits, leftovers, push, write_script

pytestmark = pytest.mark.slow

HTPASSWD = "baker:$2b$04$eFhJIfminRXOpoLnwERykOseJilk3ZgqZNgoH2Uy7vvhOGtu2TQU.\n"
"""A user of a registry whose password is 'secret' (bcrypt)."""


def make(settings: Settings, name: str = "slurm", *, refresh: bool = False) -> tuple[ContainerImage, bool]:
    shelf, console = Shelf(BaseCache(settings.cache)), Console(width=160)
    with container_image.opened(shelf, console):
        return container_image.make(container_image.order(name, settings), shelf, console, refresh=refresh)


def ask(here: LocalRegistry, path: str) -> bytes:
    request = urllib.request.Request(
        f"http://{here.address}/v2/bakehouse/slurm/{path}", headers={"Accept": container_push.MANIFEST}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: bytes = answer.read()
    return found


@dataclass
class Layer:
    """A layer as the registry has it: files with what tar says of them."""

    about: dict[str, Any]
    archive: tarfile.TarFile

    def __post_init__(self) -> None:
        self.members = {member.name.removeprefix("./"): member for member in self.archive.getmembers()}

    def read(self, name: str) -> bytes:
        file = self.archive.extractfile(self.members[name])
        assert file
        return file.read()


@pytest.fixture(scope="module")
def manifest(pushed: Pushed, here: LocalRegistry) -> dict[str, Any]:
    """What the reference names."""
    digest = pushed.reference.partition("@")[2]
    text = ask(here, f"manifests/{digest}")
    assert f"sha256:{hashlib.sha256(text).hexdigest()}" == digest
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def layers(manifest: dict[str, Any], here: LocalRegistry) -> list[Layer]:
    found = []
    for about in manifest["layers"]:
        packed = ask(here, f"blobs/{about['digest']}")
        assert len(packed) == about["size"]
        plain = subprocess.run(["zstd", "-dcq"], input=packed, capture_output=True, check=True).stdout
        found.append(Layer(about, tarfile.TarFile(fileobj=io.BytesIO(plain))))
    return found


def test_two_layers_in_zstd(manifest: dict[str, Any], pushed: Pushed, real_settings: Settings) -> None:
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    kinds = [layer["mediaType"] for layer in manifest["layers"]]
    assert kinds == ["application/vnd.oci.image.layer.v1.tar+zstd"] * 2
    assert [(layer["digest"], layer["size"]) for layer in manifest["layers"]] == [*pushed.layers]
    assert all(size < 40 << 20 for _, size in pushed.layers)
    assert leftovers(real_settings) == []


def test_it_says_what_it_is(manifest: dict[str, Any], pushed: Pushed, here: LocalRegistry) -> None:
    config = json.loads(ask(here, f"blobs/{manifest['config']['digest']}"))
    labels = config["config"]["Labels"]
    image = pushed.image
    assert labels[container_image.DIGEST_LABEL] == image.digest
    assert labels["org.opencontainers.image.title"] == "slurm"
    assert labels["org.opencontainers.image.version"] == image.tag
    assert labels["org.opencontainers.image.created"] == image.created.replace("+00:00", "Z")
    assert labels["org.opencontainers.image.revision"]
    assert pushed.reference.startswith(f"{here.address}/bakehouse/slurm@sha256:")
    assert image.tag.partition(".")[0].endswith(image.digest[:7])
    tagged = json.loads(ask(here, f"manifests/{image.tag}"))
    assert tagged == manifest


def test_it_holds_the_elements_files_as_they_are(layers: list[Layer]) -> None:
    element = REPOSITORY / "elements/slurm-node/static"
    for path in (path for path in element.rglob("*") if path.is_file()):
        name = str(path.relative_to(element))
        assert layers[1].read(name) == path.read_bytes()
        member = layers[1].members[name]
        assert (stat.S_IMODE(member.mode), member.uid, member.gid) == (0o644, 0, 0)
    node = REPOSITORY / "bootstrap/containers/slurm"
    for path in (path for path in node.rglob("*") if path.is_file()):
        assert layers[1].read(f"usr/share/bakehouse/node/{path.relative_to(node)}") == path.read_bytes()


def test_its_packages_are_those_of_a_baked_node(pushed: Pushed, baked: Record, real_settings: Settings) -> None:
    bill = json.loads((real_settings.store / baked.tag / baked.sbom).read_text())
    versions = {part["name"]: part["version"] for part in bill["components"]}
    found = pushed.image.packages
    assert {"munge", "slurmd", "slurm-client", "slurmctld"} <= found.keys()
    assert {name: found[name] for name in found.keys() & versions.keys()} == {
        name: versions[name] for name in found.keys() & versions.keys()
    }
    assert not {"openssh-server", "cloud-init", "linux-image-cloud-amd64"} & found.keys()


def test_nothing_of_the_builder_and_nothing_secret_is_in_it(layers: list[Layer], real_settings: Settings) -> None:
    files = {name: member for layer in layers for name, member in layer.members.items() if not member.isdir()}
    for name in ("etc/machine-id", "etc/hostname", "etc/hosts", "etc/resolv.conf"):
        assert files[name].size == 0, name
        assert stat.S_IMODE(files[name].mode) == 0o644, name
    gone = ("etc/munge/munge.key", "etc/apt/sources.list", "usr/sbin/policy-rc.d", "etc/apt/apt.conf.d/99mmdebstrap")
    assert not {*gone} & files.keys()
    folders = ("var/lib/apt/lists/", "var/cache/apt/", "var/log/", "tmp/", "run/", "mnt/", "dev/", "root/.ssh/")
    left = [name for name, member in files.items() if name.startswith(folders) and member.isfile() and member.size]
    assert left == []
    assert b"deb.debian.org" in layers[1].read("etc/apt/sources.list.d/debian.sources")
    assert str(real_settings.cache).encode() not in b"".join(
        layer.read(name) for layer in layers for name, member in layer.members.items()
        if name.startswith("etc/") and member.isfile()
    )  # fmt: skip


def test_documentation_is_left_out_but_not_licenses(layers: list[Layer]) -> None:
    names = [name for layer in layers for name, member in layer.members.items() if member.isfile()]
    documents = [name for name in names if name.startswith(("usr/share/doc/", "usr/share/man/"))]
    assert "usr/share/doc/slurmd/copyright" in documents
    assert all(name.endswith("/copyright") for name in documents)


def test_the_second_push_only_asks(pushed: Pushed, real_settings: Settings, here: LocalRegistry) -> None:
    begun = time.monotonic()
    again = push(real_settings, here)
    assert (again.reference, again.new, again.layers) == (pushed.reference, False, pushed.layers)
    assert time.monotonic() - begun < 5
    assert make(real_settings) == (again.image, False)


def test_what_the_registry_lost_is_sent_again(pushed: Pushed, real_settings: Settings, here: LocalRegistry) -> None:
    digest = pushed.reference.partition("@")[2]
    url = f"http://{here.address}/v2/bakehouse/slurm/manifests/{digest}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=20).close()
    again = push(real_settings, here)
    assert (again.reference, again.new) == (pushed.reference, True)
    assert ask(here, f"manifests/{digest}")


def test_another_registry_gets_the_same_image(pushed: Pushed, real_settings: Settings, tmp_path: Path) -> None:
    other = local_registry.up(folder=tmp_path / "other", port=free_ports(1)[0])
    try:
        sent = push(real_settings, other)
        assert sent.new
        assert sent.reference.partition("/")[2] == pushed.reference.partition("/")[2]
        assert other.repositories() == ["bakehouse/slurm"]
    finally:
        local_registry.down(tmp_path / "other", purge=True)
    assert not (tmp_path / "other").exists()


def test_the_same_packages_make_the_same_layers(
    pushed: Pushed, real_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two builders that agree on the time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764000000")
    found = []
    for builder in ("one", "two"):
        cache = tmp_path / builder
        cache.mkdir()
        subprocess.run(["cp", "-al", real_settings.cache / "debs-trixie-amd64", cache], check=True)
        settings = real_settings.model_copy(update={"cache": cache})
        image, _ = make(settings)
        found.append(image.id)
        run.remove_tree(cache)
    assert found[0] == found[1]


# What goes wrong.


@pytest.fixture
def broken(site_elements: Settings) -> Settings:
    """A site with a platform 'broken', whose element each test writes. Base root and layer are there already."""
    return site_elements


def images(settings: Settings) -> list[str]:
    return [image.name for image in Shelf(BaseCache(settings.cache)).images()]


def test_a_failing_script_is_shown(pushed: Pushed, broken: Settings) -> None:
    write_script(broken, "echo this is why\nexit 3")
    with pytest.raises(BakehouseError, match=r"failed: its step 'script install\.d/50-site' did") as caught:
        make(broken, "broken")
    assert "this is why" in caught.value.log
    assert "broken" not in images(broken)
    assert leftovers(broken) == []


def test_what_a_script_leaves_is_refused(pushed: Pushed, broken: Settings) -> None:
    write_script(broken, "echo 'Acquire::http::Proxy \"http://proxy:3128\";' > /etc/apt/apt.conf.d/10proxy")
    with pytest.raises(BakehouseError, match=r"10proxy sets a proxy, the builder's"):
        make(broken, "broken")
    assert "broken" not in images(broken)
    assert leftovers(broken) == []


def test_an_unknown_package_is_named(pushed: Pushed, broken: Settings) -> None:
    manifest = broken.manifests[0] / "broken.yaml"
    manifest.write_text(manifest.read_text() + "packages: [frobnicate]\n")
    with pytest.raises(BakehouseError, match="the mirror has no package 'frobnicate'"):
        make(broken, "broken")


def test_an_unreachable_mirror_is_named(real_settings: Settings) -> None:
    closed = {"mirror": "http://127.0.0.1:9/debian", "security_mirror": "http://127.0.0.1:9/debian-security"}
    with pytest.raises(BakehouseError, match=r"mirror 127\.0\.0\.1:9 cannot be reached") as caught:
        make(real_settings.model_copy(update=closed))
    assert "invoke doctor" in caught.value.hint
    assert leftovers(real_settings) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_killed_build_leaves_nothing_that_the_next_does_not_clean(
    pushed: Pushed, broken: Settings, number: signal.Signals
) -> None:
    kill_while_its_script_waits(broken, "container.build", number)
    assert str(broken.cache) not in Path("/proc/self/mountinfo").read_text()
    write_script(broken, f": {number.name}")
    image, built = make(broken, "broken")
    assert built
    containers = [*Shelf(BaseCache(broken.cache)).storage.glob("*-containers/*/")]
    assert containers == [], "none of the killed build's is left"
    assert image.packages.keys() < pushed.image.packages.keys()
    assert leftovers(broken) == []


def test_a_push_that_is_killed_can_be_done_again(pushed: Pushed, real_settings: Settings, tmp_path: Path) -> None:
    """While the registry, which is stopped, does not answer."""
    slow = local_registry.up(folder=tmp_path / "slow", port=free_ports(1)[0])
    process = slow.process()
    assert process
    environment = {
        **os.environ,
        "BAKEHOUSE_STORE": str(real_settings.store),
        "BAKEHOUSE_CACHE": str(real_settings.cache),
    }
    words = ["container.push", "--platform", "slurm", "--registry", slow.address, "--insecure"]
    try:
        pushing = subprocess.Popen(
            [sys.executable, "-m", "invoke", *words], cwd=REPOSITORY, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert pushing.stdout is not None
        assert any("push ..." in line for line in pushing.stdout)
        os.kill(process.pid, signal.SIGSTOP)
        pushing.kill()
        pushing.communicate(timeout=60)
        os.kill(process.pid, signal.SIGCONT)
        assert push(real_settings, slow).reference.partition("/")[2] == pushed.reference.partition("/")[2]
    finally:
        os.kill(process.pid, signal.SIGCONT)
        local_registry.down(tmp_path / "slow", purge=True)
    assert leftovers(real_settings) == []


def test_a_registry_that_is_down(pushed: Pushed, real_settings: Settings) -> None:
    with pytest.raises(BakehouseError, match=r"registry 127\.0\.0\.1:9 cannot be reached: .*refused") as caught:
        push(real_settings, Target("127.0.0.1:9", insecure=False))
    assert "registry.status" in caught.value.hint


def test_what_is_no_registry(pushed: Pushed, real_settings: Settings) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(BakehouseError, match="is no container registry: it answers /v2/ with status 404"):
            push(real_settings, Target(f"127.0.0.1:{server.server_address[1]}", insecure=True))
    finally:
        server.shutdown()
        server.server_close()


def test_a_registry_without_https(pushed: Pushed, here: LocalRegistry, real_settings: Settings) -> None:
    with pytest.raises(BakehouseError, match="does not speak HTTPS") as caught:
        push(real_settings, Target(here.address, insecure=False))
    assert "--insecure" in caught.value.hint


@contextlib.contextmanager
def serving(folder: Path, more: str = "", *, size: str = "") -> Iterator[LocalRegistry]:
    """A registry with more settings, or on a filesystem of a size."""
    made = LocalRegistry(folder, "127.0.0.1", free_ports(1)[0])
    made.storage.mkdir(parents=True)
    made.configuration.write_text(registry.configuration(str(made.storage), made.address) + more)
    if size:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", made.storage], check=True)
    try:
        made.start()
        yield made
    finally:
        made.daemon.stop()
        if size:
            subprocess.run(["umount", made.storage], check=True)


def test_a_registry_whose_disk_is_full(pushed: Pushed, real_settings: Settings, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "full", size="8m") as full,
        pytest.raises(
            BakehouseError, match=f"push to {full.address} failed: the registry could not store it"
        ) as caught,
    ):
        push(real_settings, full)
    assert "its disk may be full" in caught.value.hint
    assert leftovers(real_settings) == []


def test_a_registry_that_asks_for_a_password(
    pushed: Pushed, real_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    more = f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}\n"
    with serving(tmp_path / "asking", more) as asking:
        with pytest.raises(BakehouseError, match="it does not let us push") as caught:
            push(real_settings, asking)
        assert "containers-auth.json" in caught.value.hint
        secret = base64.b64encode(b"baker:secret").decode()
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {asking.address: {"auth": secret}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
        sent = push(real_settings, asking)
        assert sent.new
        assert push(real_settings, asking).reference == sent.reference
        assert secret not in "".join(path.read_text() for path in (real_settings.cache / "logs").glob("push-*"))


def test_the_registry_of_this_host(tmp_path: Path) -> None:
    """Up twice, killed, and up again with what it held; elsewhere only after it was stopped."""
    folder, port = tmp_path / "registry", free_ports(1)[0]

    def up(number: int = 0) -> LocalRegistry:
        return local_registry.up(folder=folder, port=number)

    made = up(port)
    try:
        process = made.process()
        assert up() == made == local_registry.find(folder)
        assert made.process() == process, "nothing was started again"
        with pytest.raises(BakehouseError, match=f"the registry runs at 127.0.0.1, port {port}"):
            up(port + 1)
        made.daemon.stop(signal.SIGKILL)
        assert up() == made
        with pytest.raises(BakehouseError, match=f"no registry can listen at 127.0.0.1, port {port}"):
            local_registry.up(folder=tmp_path / "another", port=port)
    finally:
        local_registry.down(folder)
    assert made.process() is None
    assert made.storage.is_dir()
