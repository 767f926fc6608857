"""The bake's states and faults, with a fake diskimage-builder; tests/integration does it for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, kvm
from bakehouse.cache import file_digest
from bakehouse.errors import BakehouseError
from tests.conftest import Site


def test_a_bake_makes_an_image_with_its_record(site: Site) -> None:
    record, built = site.bake()
    assert built
    folder = site.store.folder(record.tag)
    assert record.digest == site.plan().digest
    assert record.tag.endswith(record.digest[:7])
    assert {path.name for path in folder.iterdir()} == {
        f"slurm-{record.tag}.qcow2", "record.json", "sbom.cdx.json", "build.log", "SHA256SUMS", "SHA512SUMS",
    }  # fmt: skip
    image = folder / record.files[0].file
    assert file_digest(image, "sha512")["sha512"] == record.files[0].sha512
    subprocess.run(["sha512sum", "-c", "SHA512SUMS"], cwd=folder, capture_output=True, check=True)
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=True)
    described = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(image)]))
    assert described["format-specific"]["data"]["compression-type"] == "zstd"
    assert described["virtual-size"] == record.files[0].virtual_size
    assert record.kernel == "6.1-fake"
    assert record.versions["slurm"] == "24.11.5-4"
    bill = json.loads((folder / "sbom.cdx.json").read_text())
    assert [part["name"] for part in bill["components"]] == ["slurmd"]
    assert bill["components"][0]["purl"] == "pkg:deb/debian/slurmd@24.11.5-4?arch=amd64&distro=debian-13"
    assert record.steps[0].name == "base root"
    assert "base root: done" in site.output.getvalue()


def test_the_same_inputs_are_not_built_twice(site: Site) -> None:
    first, _ = site.bake()
    again, built = site.bake()
    assert (again.tag, built) == (first.tag, False)


def test_a_rebuild_on_the_same_day_gets_a_number(site: Site) -> None:
    first, _ = site.bake()
    second, built = site.bake(force=True)
    assert built
    assert second.tag == f"{first.tag}.2"
    assert second.steps[0].cached


def test_refresh_renews_the_base(site: Site) -> None:
    first, _ = site.bake()
    second, built = site.bake(refresh=True)
    assert built
    assert second.base.key == first.base.key
    assert second.base.sha256 != first.base.sha256


def test_an_image_is_rebuilt_when_its_base_was_renewed_by_another(site: Site) -> None:
    site.bake()
    tarball = site.cache.tarball(site.plan().base_key)
    other = tarball.with_suffix(".other")
    other.write_bytes(tarball.read_bytes() + b"more")
    plan = site.plan()
    site.cache.enter(plan.base_key, other, plan.base_inputs, site.store.records()[0].created)
    _, built = site.bake()
    assert built


@pytest.mark.parametrize("poison", ["flip", "cut", "no note", "bad note"])
def test_a_spoilt_base_is_made_anew(site: Site, poison: str) -> None:
    first, _ = site.bake()
    tarball = site.cache.tarball(first.base.key)
    note = tarball.with_name(f"{first.base.key}.json")
    content = bytearray(tarball.read_bytes())
    if poison == "flip":
        content[len(content) // 2] ^= 1
        tarball.write_bytes(content)
    elif poison == "cut":
        tarball.write_bytes(content[:-3])
    elif poison == "no note":
        note.unlink()
    else:
        note.write_text("{")
    second, _ = site.bake(force=True)
    assert not second.steps[0].cached
    assert "is not used" in site.output.getvalue()
    assert (site.fakes / "calls").read_text().count("one") == 2


@pytest.mark.parametrize(
    ("behaviour", "message", "hint"),
    [
        ("fail", r"element script install\.d/50-something", "last lines are above"),
        ("full", "the disk is full", "cache.prune"),
        ("package", "no package 'frobnicate'", "check the name"),
        ("mirror", "mirror 192.0.2.1:80 cannot be reached", "doctor"),
        ("nothing", "left no root filesystem", "the whole log is"),
        ("dirty", "ssh_host_ed25519_key is an SSH host key", "cleanup.d"),
        ("mmdebstrap-fail", "10-debian-mmdebstrap failed", "the whole log is"),
    ],
)
def test_a_failure_says_what_and_why_and_leaves_nothing(site: Site, behaviour: str, message: str, hint: str) -> None:
    site.behave(behaviour)
    with pytest.raises(BakehouseError, match=message) as caught:
        site.bake()
    assert hint in caught.value.hint
    assert caught.value.log
    assert site.leftovers() == []
    assert site.store.records() == []
    log = Path(caught.value.hint.rpartition("the whole log is ")[2])
    assert log.is_file()
    site.behave("")
    assert site.bake()[1]


def test_formats_and_firmware_come_from_the_manifest(site: Site, tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "slurm.yaml").write_text(
        "extends: debian-13\nplatform: slurm\nelements: [slurm-node]\nkernel_arguments: [nosmt]\n"
        "disk:\n  formats: [raw, qcow2]\n  firmware: [uefi]\n  root_size: 1GiB\n  compression: zlib\n"
    )
    site.settings = site.settings.model_copy(update={"manifests": [manifests]})
    record, _ = site.bake()
    assert record.firmware == ["uefi"]
    assert {file.format for file in record.files} == {"raw", "qcow2"}
    assert record.root_size == 1 << 30
    raw = site.store.image(record, "raw")
    assert raw.stat().st_blocks * 512 < raw.stat().st_size / 4, "sparse"
    table = subprocess.check_output(["sfdisk", "--json", str(raw)], text=True)
    names = [part["name"] for part in json.loads(table)["partitiontable"]["partitions"]]
    assert names == ["efi", "root"]
    start = json.loads(table)["partitiontable"]["partitions"][1]["start"] * 512
    menu = subprocess.check_output(
        ["debugfs", "-R", "cat /boot/grub/grub.cfg", f"{raw}?offset={start}"], text=True, stderr=subprocess.DEVNULL
    )
    assert "nosmt" in menu
    identity = subprocess.check_output(
        ["debugfs", "-R", "cat /etc/bakehouse/image.json", f"{raw}?offset={start}"],
        text=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert json.loads(identity)["digest"] == record.digest


def test_a_root_size_that_is_too_small_is_refused(site: Site, tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "slurm.yaml").write_text(
        "extends: debian-13\nplatform: slurm\nelements: [slurm-node]\ndisk: {root_size: 8MiB}\n"
    )
    site.settings = site.settings.model_copy(update={"manifests": [manifests]})
    with pytest.raises(BakehouseError) as caught:
        site.bake()
    assert "disk.root_size is 8 MiB, but the files take" in caught.value.log


def bake_elsewhere(site: Site) -> subprocess.Popen[str]:
    """Start a bake in another process."""
    environment = {
        **os.environ,
        "BAKEHOUSE_STORE": str(site.settings.store),
        "BAKEHOUSE_CACHE": str(site.settings.cache),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", "bake", "--platform", "slurm"],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def wait_until_no_process_has(text: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while processes_with(text):
        assert time.monotonic() < deadline, processes_with(text)
        time.sleep(0.05)


@pytest.mark.parametrize("stage", ["pause", "mmdebstrap-pause"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_killed_bake_leaves_nothing(site: Site, stage: str, number: signal.Signals) -> None:
    site.behave(stage)
    bake = bake_elsewhere(site)
    wait_for(site.fakes / "paused")
    bake.send_signal(number)
    output, _ = bake.communicate(timeout=30)
    wait_until_no_process_has(str(site.settings.cache))
    assert bake.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], output
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(site.settings.cache) in line]
    assert site.store.records() == []
    if number != signal.SIGKILL:
        assert site.leftovers() == []
    site.behave("")
    assert site.bake()[1]
    if number == signal.SIGKILL:
        assert "which a killed run had left" in site.output.getvalue()


def test_a_bake_killed_while_it_fills_the_store_leaves_no_half_image(site: Site) -> None:
    incoming = site.settings.store / ".incoming-slurm+20200101-abcdef0"
    incoming.mkdir(parents=True)
    (incoming / "slurm-20200101-abcdef0.qcow2").write_bytes(b"half")
    assert site.store.records() == []
    site.bake()
    assert not incoming.exists()
    assert f"removed {incoming}" in site.output.getvalue()


def test_a_second_bake_says_who_holds_the_lock(site: Site) -> None:
    site.behave("pause")
    first = bake_elsewhere(site)
    wait_for(site.fakes / "paused")
    with pytest.raises(BakehouseError, match=f"the bake of slurm is held by process {first.pid} since"):
        site.bake(wait=False)
    waited = threading.Thread(target=first.communicate)
    threading.Timer(1, first.terminate).start()
    waited.start()
    site.behave("")
    assert site.bake(wait=True)[1]
    assert f"waiting for the bake of slurm, held by process {first.pid}" in site.output.getvalue()
    waited.join()


def test_a_missing_tool_is_named_before_anything_is_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if name == "mke2fs" else found(name, **more))
    with pytest.raises(BakehouseError, match="lacks mke2fs") as caught:
        site.bake()
    assert caught.value.hint == "apt-get install e2fsprogs"


def test_too_little_space_is_said_before_anything_is_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bakehouse.build.free_bytes", lambda folder: 1 << 20)
    with pytest.raises(BakehouseError, match="only 1 MiB are free"):
        site.bake()


def test_the_kernel_is_kept_for_trying_kvm(site: Site) -> None:
    site.bake()
    assert kvm._find_kernel(site.cache.kvm).name == "vmlinuz-6.1-fake"
