"""The plan: what counts as an input and what does not, what a bake would do and why, and what it is called."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bakehouse import elements, plan
from bakehouse.cache import BaseCache
from bakehouse.elements import OWN, Element, Package
from bakehouse.errors import BakehouseError
from bakehouse.plan import Plan
from bakehouse.record import FILE_NAME, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

NOW = datetime.datetime(2026, 11, 23, 12, 0, tzinfo=datetime.UTC)
SLURM = "extends: debian-13\nplatform: slurm\nelements: [slurm-node]\n"


class Planner:
    """Makes plans of a manifest of the site's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests = folder / "manifests"
        self.manifests.mkdir()
        self.plain = Settings(store=folder / "store", cache=folder / "cache", manifests=[self.manifests])
        self.store = LocalStore(self.plain.store)
        self.cache = BaseCache(self.plain.cache)

    def settings(self, **changes: Any) -> Settings:
        return Settings.model_validate(self.plain.model_dump() | changes)

    def make(self, more: str = "", *, text: str = SLURM, **changes: Any) -> Plan:
        (self.manifests / "mine.yaml").write_text(text + more)
        return plan.make("mine", self.settings(**changes))

    def refused(self, text: str, name: str = "mine") -> BakehouseError:
        (self.manifests / "mine.yaml").write_text(text)
        with pytest.raises(BakehouseError) as caught:
            plan.make(name, self.settings())
        return caught.value

    def own_elements(self, name: str) -> Path:
        """Return a folder of elements with a copy of slurm-node."""
        folder = self.folder / name
        shutil.copytree(OWN / "slurm-node", folder / "slurm-node", symlinks=True)
        return folder

    def remember(self, made: Plan, tag: str, **changes: Any) -> Record:
        """Put an image of a plan into the store."""
        image = {
            "name": made.name, "platform": "slurm", "tag": tag, "digest": made.digest, "inputs": made.inputs,
            "created": NOW.isoformat(), "commit": "", "distribution": "debian", "release": "trixie",
            "architecture": "amd64", "kernel": "6.12", "firmware": ["bios"], "root_size": 1, "root_used": 1,
            "files": [], "sbom": "", "sbom_sha256": "", "package_count": 1, "versions": {},
            "base": {"key": made.base_key, "sha256": "0" * 64, "created": NOW.isoformat()}, "steps": [],
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, "builder": {}, **changes,
        }  # fmt: skip
        record = Record.model_validate(image)
        self.store.folder(tag).mkdir(parents=True)
        (self.store.folder(tag) / FILE_NAME).write_text(record.model_dump_json())
        return record

    def cache_base(self, made: Plan) -> str:
        """Put a base root into the cache; return its digest."""
        self.cache.bases.mkdir(parents=True)
        content = self.cache.root / "made"
        content.write_bytes(b"a base root")
        return self.cache.enter(made.base_key, content, made.base_inputs, NOW).sha256


REMEMBERED: dict[str, tuple[Package, ...]] = {}


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Reading the elements' packages takes two programs, so what they said of Bakehouse's own is remembered."""
    read = elements.packages

    def packages(found: tuple[Element, ...], path: str, environment: dict[str, str]) -> tuple[Package, ...]:
        if str(tmp_path) in path:
            return read(found, path, environment)
        key = json.dumps([[element.name for element in found], path, environment], sort_keys=True)
        if key not in REMEMBERED:
            REMEMBERED[key] = read(found, path, environment)
        return REMEMBERED[key]

    monkeypatch.setattr(elements, "packages", packages)
    return Planner(tmp_path)


# What counts.


def test_the_same_inputs_give_the_same_digest(planner: Planner) -> None:
    one = planner.make("packages: [hwloc]\nenvironment: {DIB_A: '1', DIB_B: '2'}\n")
    other = planner.make(
        text="environment: {DIB_B: '2', DIB_A: '1'}\npackages: [hwloc]\nelements: [slurm-node]\nplatform: slurm\n"
        "extends: debian-13\n"
    )
    assert one.digest == other.digest == plan.make("mine", planner.settings()).digest
    assert len(one.digest) == 64
    assert one.base_key == other.base_key


def test_names_and_places_do_not_count(planner: Planner) -> None:
    plain = planner.make()
    other = planner.make(
        "description: something else\n",
        store=planner.folder / "other-store", cache=planner.folder / "other-cache", cache_limit_gib=3,
    )  # fmt: skip
    assert other.digest == plain.digest
    assert other.manifest.description == "something else"


def test_a_copy_of_an_element_counts_as_the_element(planner: Planner) -> None:
    assert planner.make(elements=[planner.own_elements("copy")]).digest == planner.make().digest


@pytest.mark.parametrize(
    "more",
    [
        "packages: [hwloc]", "kernel: generic", "release: bookworm", "snapshot: 20261101T000000Z",
        "kernel_arguments: [nosmt]", "environment: {DIB_X: '1'}", "disk: {formats: [raw]}", "disk: {root_size: 4GiB}",
        "components: [main, non-free-firmware]",
    ],
)  # fmt: skip
def test_what_a_manifest_says_counts(planner: Planner, more: str) -> None:
    assert planner.make(f"{more}\n").digest != planner.make().digest


@pytest.mark.parametrize("name", ["node_mirror", "node_security_mirror", "mirror", "security_mirror"])
def test_a_mirror_that_the_site_sets_counts(planner: Planner, name: str) -> None:
    one = planner.make(**{name: "http://one.example/debian"})
    other = planner.make(**{name: "http://other.example/debian"})
    assert len({one.digest, other.digest, planner.make().digest}) == 3


def test_the_hosts_own_mirror_does_not_count(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = planner.make()
    monkeypatch.setattr("bakehouse.settings.host_mirrors", lambda: {"debian": "http://near.example/debian"})
    near = planner.make()
    assert near.mirrors[0] == "http://near.example/debian"
    assert (near.digest, near.base_key) == (plain.digest, plain.base_key)


def test_the_tools_versions_count(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = planner.make()
    monkeypatch.setattr("bakehouse.host.versions", lambda: {"diskimage-builder": "9", "mmdebstrap": "9"})
    newer = planner.make()
    assert newer.digest != plain.digest
    assert newer.base_key != plain.base_key


SCRIPT = "post-install.d/50-munge-key"
UNIT = "static/etc/systemd/system/slurmd.service.d/10-slurm-node.conf"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("a byte", f"{SCRIPT} changed"),
        ("executable", f"{UNIT} changed"),
        ("a new file", f"{UNIT}.new was added"),
        ("a new link", f"{UNIT}.link was added"),
        ("a file less", f"{UNIT} was removed"),
    ],
)
def test_what_an_elements_files_hold_counts(planner: Planner, change: str, difference: str) -> None:
    folder = planner.own_elements("changed")
    script, unit = folder / "slurm-node" / SCRIPT, folder / "slurm-node" / UNIT
    if change == "a byte":
        script.write_bytes(script.read_bytes()[:-1] + b" ")
    elif change == "executable":
        unit.chmod(0o755)
    elif change == "a new file":
        unit.with_name(f"{unit.name}.new").write_text("")
    elif change == "a new link":
        unit.with_name(f"{unit.name}.link").symlink_to("/dev/null")
    else:
        unit.unlink()
    plain, changed = planner.make(), planner.make(elements=[folder])
    assert changed.digest != plain.digest
    assert changed.base_key == plain.base_key, "the base root has nothing of slurm-node"
    assert plan.difference(plain.inputs, changed.inputs) == [f"element slurm-node/{difference}"]


def test_what_is_written_for_people_does_not_count(planner: Planner) -> None:
    folder = planner.own_elements("changed")
    (folder / "slurm-node" / "README.rst").write_text("other words\n")
    (folder / "slurm-node" / "post-install.d" / "50-munge-key~").write_text("an editor's copy")
    assert planner.make(elements=[folder]).digest == planner.make().digest


def test_the_base_root_is_shared_by_what_only_differs_above_it(planner: Planner) -> None:
    key = planner.make().base_key
    assert key.startswith("debian-trixie-")
    assert planner.make("packages: [hwloc]\ndisk: {formats: [raw]}\nkernel_arguments: [nosmt]\n").base_key == key
    assert planner.make(text="extends: debian-13\nplatform: roce\n").base_key == key
    assert planner.make(node_mirror="http://node.example/debian").base_key == key


def test_the_base_root_changes_with_what_it_is_made_from(planner: Planner) -> None:
    keys = [
        planner.make().base_key,
        planner.make("release: bookworm\n").base_key,
        planner.make("snapshot: 20261101T000000Z\n").base_key,
        planner.make("snapshot: 20261102T000000Z\n").base_key,
        planner.make("kernel: generic\n").base_key,
        planner.make(mirror="http://site.example/debian").base_key,
        planner.make(security_mirror="http://site.example/debian-security").base_key,
    ]
    assert len(set(keys)) == len(keys)
    assert keys[1].startswith("debian-bookworm-")


def test_a_pinned_base_root_does_not_depend_on_the_mirror(planner: Planner) -> None:
    pinned = planner.make("snapshot: 20261101T000000Z\n")
    assert planner.make("snapshot: 20261101T000000Z\n", mirror="http://x.example/debian").base_key == pinned.base_key
    assert "/20261101T000000Z" in pinned.mirrors[0]


def test_the_base_root_holds_the_kernel_and_what_all_share(planner: Planner) -> None:
    found = planner.make("packages: [hwloc]\n")
    assert {"linux-image-cloud-amd64", "cloud-init", "openssh-server"} <= set(found.base_packages)
    assert not {"slurmd", "munge", "hwloc", "linux-image-amd64"} & set(found.base_packages)
    names = {package.name: package.element for package in found.packages}
    assert (names["slurmd"], names["hwloc"]) == ("slurm-node", "manifest")
    generic = set(planner.make("kernel: generic\n").base_packages)
    assert "linux-image-amd64" in generic
    assert "linux-image-cloud-amd64" not in generic


def test_flags_win_over_the_manifest(planner: Planner) -> None:
    planner.make("release: trixie\ndisk: {formats: [qcow2]}\n")
    found = plan.make("mine", planner.settings(), release="12", formats=("raw", "qcow2"))
    assert found.manifest.release == "bookworm"
    assert found.manifest.disk.formats == ["raw", "qcow2"]
    assert found.environment["DIB_RELEASE"] == "bookworm"


@pytest.mark.parametrize("name", ["roce", "slurm-roce"])
def test_one_build_gives_both_formats_of_an_image_for_metal(planner: Planner, name: str) -> None:
    """Ironic takes both; a bake from such a manifest is tried with a fake builder (test_build.py)."""
    found = planner.make(text=f"extends: {name}\ndisk: {{formats: [qcow2, raw]}}\n")
    assert found.manifest.disk.formats == ["qcow2", "raw"]
    assert found.manifest.disk.firmware[0] == "uefi"
    assert {"shim-signed", "grub-efi-amd64-signed"} <= {package.name for package in found.packages}
    assert "linux-image-amd64" in found.base_packages


# What is refused.


def test_an_unknown_element_is_named_with_its_place_and_a_guess(planner: Planner) -> None:
    error = planner.refused("extends: debian-13\nplatform: slurm\nelements: [slurm-nod]\n")
    place = f"{planner.manifests}/mine.yaml:3: "
    assert error.message == f"{place}there is no element 'slurm-nod' (did you mean 'slurm-node'?)"
    assert str(OWN) in error.hint


def test_an_unknown_element_of_an_extended_manifest_is_placed_there(planner: Planner) -> None:
    base = planner.manifests / "base.yaml"
    base.write_text("release: trixie\nelements:\n- debian-mmdebstrap\n- comon-node\n")
    error = planner.refused("extends: base\nplatform: slurm\nelements: [slurm-node]\n")
    assert error.message == f"{base}:4: there is no element 'comon-node' (did you mean 'common-node'?)"


def test_elements_without_an_operating_system_are_refused(planner: Planner) -> None:
    error = planner.refused("release: trixie\nplatform: slurm\nelements: [slurm-node]\n")
    assert "none of the elements slurm-node is an operating system" in error.message
    assert "debian-mmdebstrap" in error.hint


def test_the_operating_system_may_come_above_the_base(planner: Planner) -> None:
    (planner.manifests / "tools.yaml").write_text("release: trixie\nelements: [common-node]\n")
    found = planner.make(text="extends: tools\nplatform: slurm\nelements: [debian-mmdebstrap, slurm-node]\n")
    assert {"debian-mmdebstrap", "slurm-node", "common-node"} <= {element.name for element in found.elements}


def test_two_operating_systems_are_refused(planner: Planner) -> None:
    error = planner.refused("extends: debian-13\nplatform: slurm\nelements: [debian-minimal]\n")
    assert "two elements provide the same thing" in error.message


def test_a_base_manifest_is_not_an_image(planner: Planner) -> None:
    error = planner.refused(SLURM, "debian-13")
    assert error.message == "debian-13 is a base for other manifests: it has no 'platform'"
    assert error.hint.startswith("bake one of ")
    assert {"mine", "slurm"} <= set(error.hint.removeprefix("bake one of ").split(", "))
    assert "debian-13" not in error.hint


def test_packages_that_cannot_be_read_are_blamed_on_the_element(planner: Planner) -> None:
    folder = planner.own_elements("broken")
    (folder / "slurm-node" / "package-installs.yaml").write_text("munge: [\n")
    (planner.manifests / "mine.yaml").write_text(SLURM)
    with pytest.raises(BakehouseError, match=r"package-installs\.yaml cannot be read") as caught:
        plan.make("mine", planner.settings(elements=[folder]))
    assert "slurm-node" in caught.value.hint


def test_an_element_folder_that_is_not_there_is_named(planner: Planner) -> None:
    (planner.manifests / "mine.yaml").write_text(SLURM)
    with pytest.raises(BakehouseError, match=f"the element folder {planner.folder}/none is not there"):
        plan.make("mine", planner.settings(elements=[planner.folder / "none"]))


# What a plan tells.


SECRET = "s3cret"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mirror", ""),
        ("security_mirror", ""),
        ("snapshot_mirror", "snapshot: 20261101T000000Z\n"),
    ],
)
def test_a_plan_does_not_tell_passwords(planner: Planner, name: str, more: str) -> None:
    found = planner.make(more, **{name: f"http://user:{SECRET}@mirror.example/debian"})
    assert SECRET not in json.dumps(found.inputs)
    assert SECRET not in json.dumps(found.as_dict())
    assert "mirror.example" in json.dumps(found.as_dict())


def test_a_password_does_not_count(planner: Planner) -> None:
    one = planner.make(mirror="http://user:one@mirror.example/debian")
    other = planner.make(mirror="http://mirror.example/debian")
    assert (one.digest, one.base_key) == (other.digest, other.base_key)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://u:p@host:8080/debian", "http://host:8080/debian"),
        ("https://u@host/x?y=@z", "https://host/x?y=@z"),
        ("http://u:p@ss@host/debian", "http://host/debian"),
        ("file:///srv/debian", "file:///srv/debian"),
    ],
)
def test_user_and_password_are_cut_out_of_an_address(url: str, told: str) -> None:
    assert plan.without_credentials(url) == told


def test_a_plan_as_data_holds_what_another_builder_needs(planner: Planner) -> None:
    found = planner.make("description: x\n")
    data = json.loads(json.dumps(found.as_dict()))
    assert data["name"] == "mine"
    assert data["extends"] == ["debian-13"]
    assert (data["digest"], data["base"]) == (found.digest, found.base_key)
    assert data["manifest"]["release"] == "trixie"
    assert {"name": "slurm-node", "path": str(OWN / "slurm-node"), "built_in": False} in data["elements"]
    assert {"name": "slurmd", "element": "slurm-node", "phase": "install.d"} in data["packages"]


# What a bake would do.


def test_the_first_image_is_built(planner: Planner) -> None:
    decision = plan.decide(planner.make(), planner.store, planner.cache)
    assert (decision.image, decision.base) == (None, None)
    assert decision.reasons == ("there is no image of it yet",)


def test_an_image_of_another_manifest_does_not_serve(planner: Planner) -> None:
    made = planner.make()
    planner.remember(made, "a", name="other")
    assert plan.decide(made, planner.store, planner.cache).reasons == ("there is no image of it yet",)


def test_an_image_of_the_same_inputs_serves(planner: Planner) -> None:
    made = planner.make()
    image = planner.remember(made, "a")
    decision = plan.decide(made, planner.store, planner.cache)
    assert (decision.image, decision.reasons) == (image, ())


@pytest.mark.parametrize(
    ("flags", "reason"), [({"force": True}, "--force"), ({"refresh": True}, "--refresh: the base root is renewed")]
)
def test_flags_build_what_has_not_changed(planner: Planner, flags: dict[str, bool], reason: str) -> None:
    made = planner.make()
    sha256 = planner.cache_base(made)
    planner.remember(made, "a", base={"key": made.base_key, "sha256": sha256, "created": NOW.isoformat()})
    decision = plan.decide(made, planner.store, planner.cache, **flags)
    assert (decision.image, decision.reasons) == (None, (reason,))
    assert (decision.base is not None) == ("force" in flags)


def test_a_renewed_base_root_is_a_reason(planner: Planner) -> None:
    made = planner.make()
    planner.remember(made, "a")
    planner.cache_base(made)
    decision = plan.decide(made, planner.store, planner.cache)
    assert decision.image is None
    assert decision.reasons == ("the base root was renewed on 2026-11-23 12:00 UTC",)


def test_a_base_root_as_it_was_is_no_reason(planner: Planner) -> None:
    made = planner.make()
    sha256 = planner.cache_base(made)
    image = planner.remember(made, "a", base={"key": made.base_key, "sha256": sha256, "created": NOW.isoformat()})
    decision = plan.decide(made, planner.store, planner.cache)
    assert decision.image == image
    assert decision.base is not None
    assert decision.base.sha256 == sha256


def test_the_reasons_name_what_changed_since_the_newest_image(planner: Planner) -> None:
    folder = planner.own_elements("changed")
    script = folder / "slurm-node" / "post-install.d" / "50-munge-key"
    script.write_text(script.read_text() + "\n")
    planner.remember(planner.make("packages: [numactl]\n"), "newest")
    planner.remember(planner.make("kernel: generic\n"), "older", created="2026-01-01T00:00:00Z")
    changed = planner.make("packages: [hwloc]\nkernel_arguments: [nosmt]\n", elements=[folder])
    reasons = plan.decide(changed, planner.store, planner.cache).reasons
    assert reasons == (
        "since newest:",
        "element slurm-node/post-install.d/50-munge-key changed",
        'manifest kernel_arguments changed from [] to ["nosmt"]',
        'manifest packages changed from ["numactl"] to ["hwloc"]',
        "package hwloc was added",
        "package numactl was removed",
    )


def test_an_older_image_of_the_same_inputs_serves(planner: Planner) -> None:
    made = planner.make()
    image = planner.remember(made, "older", created="2026-01-01T00:00:00Z")
    planner.remember(replace(made, inputs=made.inputs | {"package x": "manifest"}), "newest")
    assert plan.decide(made, planner.store, planner.cache).image == image


# What it is called.


def test_a_tag_is_the_utc_day_and_the_digest(tmp_path: Path) -> None:
    east = datetime.datetime(2026, 11, 24, 1, 0, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    assert plan.new_tag("5853cc9" + "0" * 57, LocalStore(tmp_path), east) == "20261123-5853cc9"


def test_a_tag_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    tags = []
    for _ in range(3):
        tags.append(plan.new_tag("5853cc9" + "0" * 57, store, NOW))
        store.folder(tags[-1]).mkdir()
    assert tags == ["20261123-5853cc9", "20261123-5853cc9.2", "20261123-5853cc9.3"]
    assert plan.new_tag("aaaaaaa" + "0" * 57, store, NOW) == "20261123-aaaaaaa"
