"""Real bakes: diskimage-builder, mmdebstrap, apt, GRUB."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oslo_utils.imageutils import format_inspector

from bakehouse import REPOSITORY, plan, sbom
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import bake, kill_while_its_script_waits, leftovers, write_script

pytestmark = pytest.mark.slow


def test_a_bake_leaves_an_image_and_nothing_else(baked: Record, real_settings: Settings) -> None:
    assert leftovers(real_settings) == []
    assert baked.package_count > 150
    assert {"slurm", "munge", "cloud-init", "systemd", "kernel"} <= baked.versions.keys()
    # Its base root may be one that the image of another file of tests has begun with.
    assert [step.name for step in baked.steps if step.cached] in ([], ["base root"])


def test_memory_stays_within_a_small_builder(baked: Record) -> None:
    assert 20 << 20 < baked.usage.peak_memory < 2 << 30


def test_the_qcow2_passes_the_checks_of_glance_and_nova(baked: Record, real_settings: Settings) -> None:
    """Both use oslo.utils' format inspector and refuse what its safety check refuses."""
    image = LocalStore(real_settings.store).image(baked)
    found = format_inspector.detect_file_format(str(image))
    assert found is not None
    assert str(found) == "qcow2"
    found.safety_check()
    assert found.virtual_size == baked.files[0].virtual_size
    described = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(image)]))
    assert described["format-specific"]["data"]["compression-type"] == "zstd"
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)


def test_the_bill_of_materials_holds_every_package(baked: Record, real_settings: Settings) -> None:
    bill = json.loads((real_settings.store / baked.tag / baked.sbom).read_text())
    assert bill["specVersion"] == "1.6"
    assert len(bill["components"]) == baked.package_count
    slurmd = next(part for part in bill["components"] if part["name"] == "slurmd")
    assert slurmd["version"] == baked.versions["slurm"]
    assert {"name": "bakehouse:source", "value": "slurm-wlm"} in slurmd["properties"]


def test_no_password_or_builder_path_is_in_the_log(baked: Record, real_settings: Settings) -> None:
    log = (real_settings.store / baked.tag / "build.log").read_text()
    assert "Build completed successfully" in log
    assert "BEGIN OPENSSH PRIVATE KEY" not in log


def test_nothing_changed_means_no_build(baked: Record, real_settings: Settings) -> None:
    again, built = bake(real_settings)
    assert (again.tag, built) == (baked.tag, False)


def test_a_changed_element_rebuilds_from_the_cached_base(
    baked: Record, real_settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(REPOSITORY / "elements/slurm-node", tmp_path / "slurm-node", symlinks=True)
    drop_in = tmp_path / "slurm-node/static/etc/systemd/system/slurmd.service.d/10-slurm-node.conf"
    drop_in.write_text(drop_in.read_text() + "Nice=1\n")
    changed = real_settings.model_copy(update={"elements": [tmp_path]})
    record, built = bake(changed)
    assert built
    assert record.steps[0].cached
    assert record.digest != baked.digest
    names = {step.name: step.seconds for step in record.steps}
    assert set(names) == {step.name for step in baked.steps}


def test_a_failing_element_script_is_named(baked: Record, site_elements: Settings) -> None:
    write_script(site_elements, "echo this is why\nexit 3")
    with pytest.raises(BakehouseError, match=r"element script install\.d/50-site") as caught:
        bake(site_elements, "broken")
    assert "this is why" in caught.value.log
    assert leftovers(site_elements) == []


def test_an_unknown_package_is_named(baked: Record, site_elements: Settings) -> None:
    manifest = site_elements.manifests[0] / "broken.yaml"
    manifest.write_text(manifest.read_text().replace("[site-element]", "[]") + "packages: [frobnicate]\n")
    with pytest.raises(BakehouseError, match="the mirror has no package 'frobnicate'"):
        bake(site_elements, "broken")
    assert leftovers(site_elements) == []


def test_a_full_disk_is_named(
    baked: Record, site_elements: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", small], check=True)
    try:
        write_script(site_elements, "dd if=/dev/zero of=/fill bs=1M")
        (small / "base").mkdir()
        # Not those of other releases and mirrors: with them there would not be room to begin.
        for file in (site_elements.cache / "base").glob(f"{plan.make('broken', site_elements).base_key}*"):
            shutil.copy2(file, small / "base")
        with pytest.raises(BakehouseError, match="the disk is full"):
            bake(site_elements.model_copy(update={"cache": small}), "broken")
        assert [*(small / "work").iterdir()] == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_spoilt_package_is_fetched_again(baked: Record, real_settings: Settings) -> None:
    cache = BaseCache(real_settings.cache)
    deb = next(cache.debs("trixie").glob("slurmd_*.deb"))
    whole = deb.read_bytes()
    deb.unlink()
    deb.write_bytes(whole[:-1000] + bytes(1000))
    record, built = bake(real_settings, force=True)
    assert built
    assert (
        f"{deb.name} in the cache is not as it was downloaded"
        in (real_settings.store / record.tag / "build.log").read_text()
    )
    assert deb.read_bytes() == whole


def test_an_unreachable_mirror_is_named(real_settings: Settings) -> None:
    closed = real_settings.model_copy(
        update={"mirror": "http://127.0.0.1:9/debian", "security_mirror": "http://127.0.0.1:9/debian-security"}
    )
    with pytest.raises(BakehouseError, match=r"mirror 127\.0\.0\.1:9 cannot be reached") as caught:
        bake(closed)
    assert "invoke doctor" in caught.value.hint
    assert leftovers(real_settings) == []


def test_what_an_element_leaves_in_the_image_is_refused(baked: Record, site_elements: Settings) -> None:
    write_script(site_elements, "echo 'Acquire::http::Proxy \"http://proxy:3128\";' > /etc/apt/apt.conf.d/10proxy")
    with pytest.raises(BakehouseError, match=r"10proxy sets a proxy, the builder's"):
        bake(site_elements, "broken")
    assert leftovers(site_elements) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_bake_killed_inside_diskimage_builder_leaves_nothing(
    baked: Record, site_elements: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    kill_while_its_script_waits(site_elements, "bake", number)
    if number == signal.SIGKILL:
        # The next run finds what is left, and says so.
        write_script(site_elements, "exit 1")
        with pytest.raises(BakehouseError):
            bake(site_elements, "broken")
    assert leftovers(site_elements) == []


@pytest.mark.parametrize("element", ["slurm-node"])
def test_elements_work_in_plain_diskimage_builder(real_settings: Settings, tmp_path: Path, element: str) -> None:
    """With our operating system, and with diskimage-builder's own output, outside Bakehouse."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DIB_", "BAKEHOUSE_"))} | {
        "ELEMENTS_PATH": str(REPOSITORY / "elements"),
        "TMP_DIR": str(tmp_path),
        "DIB_IMAGE_CACHE": str(tmp_path / "cache"),
        "DIB_MMDEBSTRAP_DEBS": str(real_settings.cache / "debs-trixie-amd64"),
    }
    archive, security = real_settings.mirrors()
    environment |= {"DIB_DISTRIBUTION_MIRROR": archive, "DIB_DEBIAN_SECURITY_MIRROR": security}
    tool = Path(sys.executable).with_name("disk-image-create")
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
         tool, "-n", "--no-tmpfs", "-t", "tar", "-o", tmp_path / "plain", "debian-mmdebstrap", element],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = subprocess.check_output(["tar", "-tf", tmp_path / "plain.tar"], text=True).splitlines()
    assert "./usr/sbin/slurmd" in names
    assert "./etc/systemd/system/slurmd.service.d/10-slurm-node.conf" in names
    assert "./etc/systemd/system/multi-user.target.wants/slurmd.service" not in names
    assert not [name for name in names if "ssh_host" in name or name.endswith("munge.key")]


def origins(record: Record, settings: Settings) -> dict[str, str]:
    packages = sbom.read(settings.store / record.tag / record.sbom)
    return {name: package.origin for name, package in packages.items()}


def test_the_bill_of_materials_says_where_every_package_came_from(baked: Record, real_settings: Settings) -> None:
    found = origins(baked, real_settings)
    assert found["base-files"] == "Debian trixie/main", "which is in the base root"
    known = {"Debian trixie/main", "Debian trixie-updates/main", "Debian-Security trixie-security/main"}
    assert found["slurmd"] in known, "which is installed over it"
    assert set(found.values()) <= known


A_SITES_REPOSITORY = """
mkdir -p /srv/site/tool/DEBIAN && cd /srv/site
for name in site-file site-tool; do
    cat > tool/DEBIAN/control <<END
Package: ${name}
Version: 1.0
Architecture: all
Maintainer: A <a@example.org>
Description: x
END
    dpkg-deb --build tool ${name}.deb
done
dpkg --install site-file.deb
{ dpkg-deb --field site-tool.deb
  echo "Filename: ./site-tool.deb"
  echo "Size: $(stat -c %s site-tool.deb)"
  echo "SHA256: $(sha256sum < site-tool.deb | cut -d ' ' -f 1)"
} > Packages
cat > Release <<END
Origin: obs://build.example.org/tools
Label: Tools of a Site
Codename: tools
Date: $(date -Ru)
SHA256:
 $(sha256sum < Packages | cut -d ' ' -f 1) $(stat -c %s Packages) Packages
END
echo 'deb [trusted=yes] file:/srv/site ./' > /etc/apt/sources.list.d/site.list
apt-get update
apt-get install -y site-tool
# As where the lists are newer than the base root, and no longer hold its versions.
rm /var/lib/apt/lists/*trixie_main*_Packages
"""


def test_packages_of_a_sites_repository_name_it(baked: Record, site_elements: Settings) -> None:
    write_script(site_elements, A_SITES_REPOSITORY)
    record, _ = bake(site_elements, "broken")
    assert record.steps[0].cached
    found = origins(record, site_elements)
    assert (found["site-tool"], found["site-file"]) == ("Tools of a Site tools", "")
    assert found["base-files"] == "Debian trixie/main", "as it was noted when the base root was made"
