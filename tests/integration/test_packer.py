"""Images that Packer bakes, for real: packages and files as diskimage-builder's, and nothing left of the making."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from bakehouse import build, cli_nodes, network, packer_bake, plan, sbom, waiting
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.harness import BootMachine
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import LIST, leftovers, start
from tests.integration.shop import Done
from tests.integration.test_up import Place, place
from tests.samples import MIB, add_image

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.slow

JUSTIFIED = (
    # Each image says what it is, and its root filesystem and boot loader name it.
    r"/etc/bakehouse/image\.json|/etc/fstab|/boot/grub/grub\.cfg"
    # Notes of dpkg and apt on what was installed by itself and when. What is installed is compared by name and version.
    r"|/var/lib/dpkg/.*|/var/lib/apt/.*"
    # systemd makes it a link to /etc/locale.conf at the first boot of any node (tmpfiles.d of Debian).
    r"|/etc/default/locale"
    # What the files of users were before the last change.
    r"|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-"
    # Caches that are made in another order.
    r"|/var/cache/.*|/etc/ld\.so\.cache"
    # Made of files that are compared, with times in it.
    r"|/boot/initrd\.img-.*"
    # Logs: diskimage-builder's has empty folders of its own.
    r"|/var/log/.*"
)
"""Where the images of the two builders may differ; docs/packer.md says why."""


def bake(settings: Settings, name: str, *, packer: bool) -> Record:
    store = LocalStore(settings.store)
    wanted = plan.make(name, settings)
    if packer:
        wanted = packer_bake.planned(wanted, settings, store)
    record, built = build.bake(wanted, store, BaseCache(settings.cache), Console(width=160))
    assert built
    return record


def same(settings: Settings, tmp_path: Path, *records: Record) -> tuple[list[str], list[str]]:
    """Return packages and paths in which the images of two records differ."""
    store = LocalStore(settings.store)
    with Log(tmp_path / "network.log") as log, network.up(log) as place:
        files = []
        for record in records:
            root = place.mount_image(store.image(record))
            command = [*place.everything, "chroot", str(root), "python3", "-c", LIST]
            files.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    bills = [json.loads((store.folder(record.tag) / record.sbom).read_text()) for record in records]
    packages = [{(part["name"], part["version"]) for part in bill["components"]} for bill in bills]
    one, other = files
    wrong = [
        f"{path}: {one.get(path)} and {other.get(path)}"
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path) and not re.fullmatch(JUSTIFIED, path)
    ]
    return sorted(map(str, packages[0] ^ packages[1])), wrong


@pytest.fixture
def small(real_settings: Settings, tmp_path: Path) -> Settings:
    """A site with the manifest 'small': one package, one element with a file, a script and a unit."""
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/small.yaml").write_text(
        "extends: debian-13\nplatform: base\nelements: [site-element]\npackages: [tree]\n"
    )
    element = tmp_path / "elements/site-element"
    texts = {
        "element-deps": "package-installs\ninstall-static\n",
        "package-installs.yaml": "pv:\n",
        "static/etc/site/greeting": "hello\n",
        "static/usr/lib/systemd/system/site.service": (
            "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
        ),
        "static/usr/lib/systemd/system-preset/10-site.preset": "enable site.service\n",
        "post-install.d/55-site": '#!/bin/bash\nset -eu\necho "${DIB_RELEASE}" > /etc/site/release\n',
    }
    for name, text in texts.items():
        path = element / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (element / "post-install.d/55-site").chmod(0o755)
    return real_settings.model_copy(update={"manifests": [tmp_path / "manifests"], "elements": [tmp_path / "elements"]})


def test_both_builders_make_the_same_image_of_a_plan(small: Settings, tmp_path: Path) -> None:
    dib, packer = (bake(small, "small", packer=which) for which in (False, True))
    assert same(small, tmp_path, dib, packer) == ([], [])
    assert {step.name for step in packer.steps} >= {"boot", "definition", "shutdown", "finish"}
    assert packer.builder["packer"]
    # Room for folders is taken from the filesystem that they were made on.
    assert abs(packer.root_size - dib.root_size) <= 16 * MIB
    assert packer.firmware == ["bios", "uefi"]
    store = LocalStore(small.store)
    about = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", store.image(packer)], text=True))
    assert "backing-filename" not in about
    assert about["virtual-size"] == packer.files[0].virtual_size
    assert leftovers(small) == []
    # Nothing has changed since.
    wanted = packer_bake.planned(plan.make("small", small), small, store)
    assert build.bake(wanted, store, BaseCache(small.cache), Console(width=160)) == (packer, False)


def booting(settings: Settings) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a bake. Return it when Packer waits for its machine, and what it said."""
    process = start(settings, "bake", "--platform", "small", "--builder", "packer", "--force", "--verbose")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Waiting for SSH to become available" in line:
            return process, said
    raise AssertionError("".join(said))


def test_a_bake_that_is_killed_leaves_no_machine(small: Settings) -> None:
    process, _ = booting(small)
    mark = f"{small.cache}/work/small+{process.pid}/tree/packer"
    machines = ["pgrep", "-f", f"qemu-system.*{re.escape(mark)}"]
    (machine,) = subprocess.check_output(machines, text=True).split()
    words = Path(f"/proc/{machine}/cmdline").read_text().split("\0")
    (forward,) = (word for word in words if "hostfwd" in word)
    assert "hostfwd=tcp:127.0.0.1:" in forward, "nobody else may log in"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    gone = lambda: subprocess.run(machines, capture_output=True, check=False).returncode != 0  # noqa: E731
    waiting.until("end of the machine", gone, 20, poll=0.1)
    # What it left on disk goes with the next run; so it does when that is ended, too.
    process, said = booting(small)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert any("which a killed run had left" in line for line in said)
    assert leftovers(small) == []


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def from_address(settings: Settings, address: str, checksum: str) -> Record:
    store = LocalStore(settings.store)
    wanted = packer_bake.planned(plan.make("small", settings), settings, store, base=address, checksum=checksum)
    record, _ = build.bake(wanted, store, BaseCache(settings.cache), Console(width=160))
    return record


def test_a_base_that_is_gone_or_something_else_is_named(small: Settings, tmp_path: Path) -> None:
    (tmp_path / "image.qcow2").write_bytes(b"not what was published")
    other = "sha256:" + "0" * 64
    with served(tmp_path) as url:
        with pytest.raises(BakehouseError, match="is not what its checksum says") as caught:
            from_address(small, f"{url}/image.qcow2", other)
        assert "--base-checksum" in (caught.value.hint or "")
        with pytest.raises(BakehouseError, match=r"the base image could not be fetched: .*404"):
            from_address(small, f"{url}/none.qcow2", other)
    assert leftovers(small) == []


def in_cloud(place: Place) -> list[str]:
    """Return the words of a bake on a server; the base is published already."""
    flags = "--builder packer --in-cloud here --flavor node --network cluster --no-verify --verbose"
    return ["bake", "--platform", "slurm", *flags.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_is_left_of_a_bake_that_is_ended(place: Place, number: signal.Signals) -> None:
    """The real Packer asks a real Keystone, Glance and Nova for a server; no hypervisor runs it."""
    publish_base(place)
    process = place.shop.start(*in_cloud(place))
    assert process.stdout is not None
    said = process.stdout.fileno()
    os.set_blocking(said, False)
    waiting.until(
        "server", lambda: [*place.states().values()] == ["BUILD"], 120, poll=0.3, last_words=process.stdout.read
    )
    (name,) = place.states()
    assert name.startswith("bakehouse-packer-slurm-")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode in {143, -signal.SIGKILL}, out + err
    waiting.until("end of the server", lambda: place.states() == {}, 60, poll=0.3)


def publish_base(place: Place) -> None:
    tag = "20260102-bbbbbbb"
    if tag not in {record.tag for record in place.shop.store.records()}:
        add_image(place.shop.store, tag, name="base", size=MIB)
        place.shop.good("publish", tag)


FAKE_PACKER = """#!{python}
# A Packer whose server is ready at once: its image is the base.
import json, os, sys
import openstack
if sys.argv[1] == "version":
    sys.exit(print("Packer v1.6.6"))
(file,) = (word.partition("=")[2] for word in sys.argv if word.startswith("-var-file="))
with open(file) as values:
    told = json.load(values)
cloud = openstack.connect(told["cloud"])
base = cloud.image.get_image(told["base"])
cloud.image.create_image(told["image_name"], data=cloud.image.download_image(base).content, disk_format="qcow2",
                         container_format="bare")
"""


def test_the_image_of_a_server_becomes_one_like_any_other(
    place: Place, real_settings: Settings, tmp_path: Path
) -> None:
    """With a Packer that does what the real one cannot do without a hypervisor."""
    base, _ = build.bake(
        plan.make("base", real_settings), LocalStore(real_settings.store), BaseCache(real_settings.cache),
        Console(width=160),
    )  # fmt: skip
    fake = tmp_path / "packer"
    fake.write_text(FAKE_PACKER.format(python=sys.executable))
    fake.chmod(0o755)

    def run(*words: str, **more: str) -> Done:
        site = {"BAKEHOUSE_STORE": str(real_settings.store), "BAKEHOUSE_CACHE": str(real_settings.cache)}
        return place.shop.run(*words, prefix=(), **site, **more)

    done = run("publish", base.tag)
    assert done.status == 0, done.out + done.err
    words = [*in_cloud(place), "--base", base.tag, "--json"]
    done = run(*words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.status == 0, done.out + done.err
    made = done.json
    assert made["name"] == "slurm"
    assert made["base"]["key"] == base.tag
    assert made["package_count"] == base.package_count
    assert not [image for image in place.shop.images() if image.name.startswith("bakehouse-packer-")]
    assert leftovers(real_settings) == []


@pytest.mark.long
def test_a_cloud_image_from_an_address_becomes_an_image(
    small: Settings, tmp_path: Path, boot_machine: BootMachine
) -> None:
    """Debian's own cloud image, as we bake it: the elements of all our images are applied to it too."""
    store = LocalStore(small.store)
    cloud, _ = build.bake(plan.make("debian-cloud", small), store, BaseCache(small.cache), Console(width=160))
    with served(store.folder(cloud.tag)) as url:
        made = from_address(small, f"{url}/{cloud.files[0].file}", f"sha512:{cloud.files[0].sha512}")
        assert from_address(small, f"{url}/other.qcow2", f"sha512:{cloud.files[0].sha512}") == made, "not fetched again"
    dib = bake(small, "small", packer=False)
    bills = [sbom.read(store.folder(record.tag) / record.sbom) for record in (dib, made)]
    assert {name: package.version for name, package in bills[0].items()}.items() <= {
        name: package.version for name, package in bills[1].items()
    }.items()
    node = boot_machine(store.image(made))
    node.wait_for_ssh(900)
    assert node.ssh("cat /etc/site/greeting /etc/site/release").stdout.split() == ["hello", "trixie"]
    assert node.ssh("systemctl is-enabled site.service").stdout.strip() == "enabled"
    assert leftovers(small) == []


@pytest.mark.long
def test_slurm_comes_to_the_same_and_joins(real_settings: Settings, tmp_path: Path) -> None:
    dib, packer = (bake(real_settings, "slurm", packer=which) for which in (False, True))
    assert same(real_settings, tmp_path, dib, packer) == ([], [])
    store = LocalStore(real_settings.store)
    verified = cli_nodes.verified(packer, real_settings, store, Console(width=160), verbose=False)
    assert verified.verification is not None
    assert verified.verification.result == "passed"
