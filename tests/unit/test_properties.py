"""What images say of themselves in Glance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakehouse import properties
from bakehouse.errors import BakehouseError
from bakehouse.properties import KNOWN, Metadata, Values
from bakehouse.record import Record
from bakehouse.signature import Signature
from bakehouse.store import LocalStore
from tests.samples import VERIFIED, add_image


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return add_image(LocalStore(tmp_path_factory.mktemp("store")), "20260101-aaaaaaa", size=1 << 20)


def make(record: Record, *given: Values, **options: Any) -> Metadata:
    changes = options.pop("changes", {})
    changed = Record.model_validate(record.model_dump() | changes)
    overrides = tuple((f"place {number}", values) for number, values in enumerate(given, 1))
    return properties.make(changed, changed.files[0], overrides=overrides, **options)


def test_our_own_values_are_ones_that_we_would_take(record: Record) -> None:
    for platform in ("slurm", "kubernetes", "roce", "base"):
        made = make(record, changes={"platform": platform}, guest_agent=True)
        for key, value in made.properties.items():
            if not key.startswith("bakehouse_"):
                properties.check(key, value, "here")


def test_a_kubernetes_image_says_what_clusters_look_for(record: Record) -> None:
    versions = {**record.versions, "kubernetes": "1.35.5-1.1"}
    made = make(record, changes={"platform": "kubernetes", "versions": versions})
    said = {name: made.properties[name] for name in ("os_purpose", "kube_version", "bakehouse_kubernetes_version")}
    assert said == {
        "os_purpose": "k8snode", "kube_version": "v1.35.5", "bakehouse_kubernetes_version": "1.35.5-1.1",
    }  # fmt: skip
    assert "kube_version" not in make(record).properties


def test_no_image_has_what_makes_ironic_take_it_for_a_partition(record: Record) -> None:
    for platform in ("slurm", "kubernetes", "roce", "base"):
        made = make(record, changes={"platform": platform}).properties
        assert not {"kernel_id", "ramdisk_id"} & made.keys()
        assert made.get("img_type", "whole-disk") == "whole-disk"
    for key in ("kernel_id", "ramdisk_id"):
        with pytest.raises(BakehouseError, match=f"place 1: {key}: belongs to images of one partition"):
            make(record, {key: "8f4a8d34-7c15-51db-bd63-1b5519d6f857"})
        assert key not in make(record, {key: None}).properties
    with pytest.raises(BakehouseError, match="'partition' is not one of its values"):
        make(record, {"img_type": "partition"})


def test_ironic_and_nova_find_what_they_look_at(record: Record) -> None:
    changes = {"platform": "roce", "firmware": ["uefi", "bios"], "verification": None, "secure_boot": True}
    made = make(record, changes=changes).properties
    said = {key: made[key] for key in made if not key.startswith(("bakehouse_", "image_", "os_v", "os_d", "os_p"))}
    assert said == {
        "architecture": "x86_64",
        "hw_firmware_type": "uefi",
        "hypervisor_type": "baremetal",
        "img_config_drive": "optional",
        "img_type": "whole-disk",
        "os_admin_user": "debian",
        "os_secure_boot": "optional",
        "os_type": "linux",
        "provided_until": "none",
        "replace_frequency": "never",
        "trait:HW_NIC_OFFLOAD_RDMA": "required",
        "uuid_validity": "none",
    }


def test_bare_metal_is_told_apart(record: Record) -> None:
    metal, virtual = make(record, changes={"platform": "roce"}), make(record)
    assert metal.properties["hypervisor_type"] == "baremetal"
    assert not [key for key in metal.properties if key.startswith("hw_") and key != "hw_firmware_type"]
    assert "hypervisor_type" not in virtual.properties, "a KVM image may run on any hypervisor that takes a qcow2"
    assert virtual.properties["hw_disk_bus"] == "virtio"


def test_what_has_roce_in_it_goes_where_it_is_whatever_its_platform(record: Record) -> None:
    inputs = {**record.inputs, "element roce/element-deps": "x", "element bare-metal/element-deps": "x"}
    made = make(record, changes={"inputs": inputs, "secure_boot": True}).properties
    assert made["trait:HW_NIC_OFFLOAD_RDMA"] == "required"
    assert (made["hypervisor_type"], made["os_secure_boot"]) == ("baremetal", "optional")
    without = make(record, {"trait:HW_NIC_OFFLOAD_RDMA": None}, changes={"inputs": inputs}).properties
    assert "trait:HW_NIC_OFFLOAD_RDMA" not in without
    assert "os_secure_boot" not in without
    plain = make(record).properties
    assert not [key for key in plain if key.startswith("trait:") or key == "os_secure_boot"]


@pytest.mark.parametrize(
    ("firmware", "verified", "wanted"),
    [
        (["bios", "uefi"], "uefi", "uefi"),
        (["bios", "uefi"], None, "bios"),
        (["uefi"], None, "uefi"),
        (["uefi"], "bios", "uefi"),
    ],
)
def test_the_firmware_is_the_one_that_was_proven(
    record: Record, firmware: list[str], verified: str | None, wanted: str
) -> None:
    verification = {**VERIFIED, "firmware": verified} if verified else None
    made = make(record, changes={"firmware": firmware, "verification": verification})
    assert made.properties["hw_firmware_type"] == wanted


def test_the_build_date_is_that_of_the_packages(record: Record) -> None:
    """SCS-0102: all patches published before it are in the image; a cached base root is older than the bake."""
    assert make(record).properties["image_build_date"] == "2026-01-01 11:00:00"


def test_the_guest_agent_is_told_where_it_is(record: Record) -> None:
    assert make(record, guest_agent=True).properties["hw_qemu_guest_agent"] == "yes"
    assert "hw_qemu_guest_agent" not in make(record).properties


def test_the_disk_is_rounded_up_to_gib(record: Record) -> None:
    assert (make(record).min_disk, make(record).min_ram) == (1, 1024)


def test_a_manifest_wins_over_the_site_and_both_over_the_defaults(record: Record) -> None:
    made = make(record, {"hw_disk_bus": "scsi", "site": "a", "min_ram": "2048"}, {"site": "b", "hw_rng_model": None})
    assert (made.properties["hw_disk_bus"], made.properties["site"], made.min_ram) == ("scsi", "b", 2048)
    assert "hw_rng_model" not in made.properties
    assert made.left_out == ("hw_rng_model",)
    assert make(record, {"hw_rng_model": None}, {"hw_rng_model": "virtio"}).left_out == ()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bakehouse_tag", "x", "are Bakehouse's own"),
        ("status", "active", "is a field of the Image API"),
        ("hw_disk_bus", "virtoi", "'virtoi' is not one of its values"),
        ("hw_dsik_bus", "virtio", "did you mean 'hw_disk_bus'"),
        ("replace_frequency", "hourly", "is not one of its values"),
        ("provided_until", "tomorrow", "is not one of its values"),
        ("image_build_date", "2026-01-01T10:00", "is not one of its values"),
        ("min_ram", "1 GiB", "is not a whole number"),
        ("hw_architecture", "amd64", "is not one of its values"),
        ("a b", "x", "names of properties hold"),
        ("note", "x" * 256, "has 256 characters"),
        ("note", "a\nb", "control character"),
    ],
)
def test_a_bad_property_is_named_with_its_place(record: Record, key: str, value: str, said: str) -> None:
    with pytest.raises(BakehouseError, match=f"place 1: {re.escape(key)}: .*{re.escape(said)}"):
        make(record, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("provided_until", "2027-01-31"), ("uuid_validity", "last-3"), ("hotfix_hours", "48"), ("patchlevel", "12.9"),
        ("trait:CUSTOM_ROCE", "required"), ("hw_cpu_cores", "4"), ("os_secure_boot", "optional"),
        ("image_source", "https://example.org/images"), ("hw_architecture", "aarch64"), ("my.own-note", ""),
    ],
)  # fmt: skip
def test_what_others_define_is_taken(record: Record, key: str, value: str) -> None:
    assert make(record, {key: value}).properties[key] == value


def test_a_disk_that_is_too_small_for_the_image_is_refused(record: Record) -> None:
    with pytest.raises(BakehouseError, match="min_disk: 0 GiB is less than"):
        make(record, {"min_disk": "0"})
    assert make(record, {"min_disk": "100"}).min_disk == 100


def test_the_quota_of_glance_is_kept(record: Record) -> None:
    with pytest.raises(BakehouseError, match="Glance takes 128, of which 24 are kept for channels"):
        make(record, {f"note_{number}": "x" for number in range(100)})


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), st.text(max_size=20), max_size=5))
def test_nothing_comes_through_that_was_not_checked(values: dict[str, str]) -> None:
    for key, value in values.items():
        try:
            properties.check(key, value, "here")
        except BakehouseError:
            continue
        assert re.fullmatch(KNOWN[key], value)


def test_a_signature_travels_with_the_image(record: Record, tmp_path: Path) -> None:
    made = make(record, signature=Signature("k" * 64, "c2ln"))
    assert (made.properties["bakehouse_signature"], made.properties["bakehouse_signature_key"]) == ("c2ln", "k" * 64)
    assert "bakehouse_signature" not in make(record).properties
