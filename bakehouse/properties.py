"""What an image says of itself in Glance: standard properties, those of the Sovereign Cloud Stack, and ours."""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bakehouse.errors import BakehouseError
from bakehouse.kubernetes import version_of
from bakehouse.manifest import RELEASES
from bakehouse.record import ImageFile, Record
from bakehouse.signature import Signature

OURS = "bakehouse_"
"""Prefix of properties that are ours; nobody may override them."""

MARK = "bakehouse"
"""The tag of every image that Bakehouse publishes: it finds them by it."""

QUOTA = 128
"""Properties and tags that an image may have (Glance's image_property_quota and image_tag_quota)."""

KEPT_FREE = 24
"""Properties left for what channels write later."""

LONGEST_VALUE = 255
"""Characters: Nova keeps an image's properties in columns of that width and cuts what is longer."""

ADMIN_USER = "debian"
"""Debian's cloud-init makes it (/etc/cloud/cloud.cfg, default_user)."""

GIB = 1 << 30

TRAIT_RDMA = "trait:HW_NIC_OFFLOAD_RDMA"

OF_PARTITION_IMAGES = ("kernel_id", "ramdisk_id")
"""Ironic takes an image with them for one of a single partition (ironic/common/images.py, is_whole_disk_image)."""

FIELDS = {"min_disk": 0, "min_ram": 0}
"""Fields of the Image API that may be overridden like properties."""

PURPOSES = {"kubernetes": "k8snode", "slurm": "custom", "roce": "custom", "base": "generic"}
"""os_purpose by platform (SCS-0102)."""

DATE = r"\d{4}-\d\d-\d\d"

KNOWN = {
    "architecture": r"x86_64|aarch64|ppc64le|s390x|riscv64",
    "hw_architecture": r"x86_64|aarch64|ppc64le|s390x|riscv64",
    "hw_cdrom_bus": r"scsi|virtio|ide|usb|sata|fdc|lxc|uml|xen",
    "hw_cpu_policy": r"shared|dedicated|mixed",
    "hw_disk_bus": r"scsi|virtio|ide|usb|sata|fdc|lxc|uml|xen",
    "hw_firmware_stateless": r"true|false",
    "hw_firmware_type": r"bios|uefi",
    "hw_machine_type": r"[\w.+-]+",
    "hw_mem_encryption": r"true|false",
    "hw_mem_page_size": r"small|large|any|\d+(KB|MB|GB)?",
    "hw_numa_nodes": r"\d+",
    "hw_pmu": r"true|false",
    "hw_qemu_guest_agent": r"yes|no",
    "hw_rng_model": r"virtio",
    "hw_scsi_model": r"virtio-scsi|lsilogic|buslogic|ibmvscsi|lsisas1068|lsisas1078|vmpvscsi",
    "hw_tpm_model": r"tpm-tis|tpm-crb",
    "hw_tpm_version": r"1\.2|2\.0",
    "hw_video_model": r"vga|cirrus|vmvga|xen|qxl|virtio|gop|none|bochs",
    "hw_video_ram": r"\d+",
    "hw_vif_model": r"e1000|e1000e|ne2k_pci|netfront|pcnet|rtl8139|spapr-vlan|virtio|vmxnet3|igb",
    "hw_vif_multiqueue_enabled": r"true|false",
    "hw_watchdog_action": r"disabled|reset|poweroff|pause|none",
    "hypervisor_type": r"baremetal|hyperv|kvm|lxc|powervm|qemu|uml|vmware|vz|xen",
    "img_config_drive": r"optional|mandatory",
    # Ours are whole disks; the other that Ironic knows is "partition".
    "img_type": r"whole-disk",
    "img_hide_hypervisor_id": r"true|false|yes|no",
    "os_admin_user": r"\S+",
    "os_distro": r"[a-z0-9.-]+",
    "os_purpose": r"generic|minimal|k8snode|gpu|network|custom",
    "os_require_quiesce": r"yes|no",
    "os_secure_boot": r"required|disabled|optional",
    "os_type": r"linux|windows",
    "os_version": r"\S+",
    # SCS-0102, "Image handling".
    "hotfix_hours": r"\d+",
    "image_build_date": DATE + r"( \d\d:\d\d(:\d\d)?)?",
    "image_description": r".+",
    "image_original_user": r"\S+",
    "image_source": r"private|https?://\S+",
    "maintained_until": DATE,
    "patchlevel": r".+",
    "provided_until": r"none|notice|" + DATE,
    "replace_frequency": r"yearly|quarterly|monthly|weekly|daily|critical_bug|never",
    "uuid_validity": r"none|notice|forever|last-\d+|" + DATE,
}
"""Properties whose values are laid down, and which: Glance's metadata definitions (etc/metadefs of its source),
Nova's image properties, and the standard SCS-0102."""

RESERVED = frozenset(
    "id name status visibility protected os_hidden owner size virtual_size disk_format container_format checksum "
    "os_hash_algo os_hash_value tags created_at updated_at self file schema locations direct_url stores "
    "member_status".split()
)
"""Names that are fields of the Image API and no properties."""

Values = Mapping[str, str | None]
"""Properties by name; None leaves one out that would be there otherwise."""


@dataclass(frozen=True)
class Metadata:
    """All that is said of an image when it is published."""

    name: str
    disk_format: str
    min_disk: int
    """GiB."""
    min_ram: int
    """MiB."""
    tags: tuple[str, ...]
    properties: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    """Properties that shall not be there, though they would by default."""

    def fields(self) -> dict[str, object]:
        """Return what the Image API takes."""
        return {
            "name": self.name,
            "disk_format": self.disk_format,
            "container_format": "bare",
            "min_disk": self.min_disk,
            "min_ram": self.min_ram,
            "tags": list(self.tags),
            **self.properties,
        }


def make(
    record: Record,
    file: ImageFile,
    *,
    description: str = "",
    overrides: tuple[tuple[str, Values], ...] = (),
    guest_agent: bool = False,
    record_sha256: str = "",
    signature: Signature | None = None,
) -> Metadata:
    """Return what an image says of itself, checked.

    Args:
        record: the image.
        file: the file that is published.
        description: of the manifest.
        overrides: properties of the site, then of the manifest, each with where they come from; later ones win.
        guest_agent: whether the QEMU guest agent is in the image.
        record_sha256: digest of the record, which a signature covers.
        signature: the site's, where it signs.

    Raises:
        BakehouseError: a value is not what its property takes, or there are too many.
    """
    values: dict[str, str] = {**_standard(record, guest_agent=guest_agent), **_sovereign(record, description)}
    values |= {"min_disk": str(math.ceil(file.virtual_size / GIB)), "min_ram": str(_memory(record))}
    for where, given in overrides:
        for key, value in given.items():
            check(key, value, where)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
    fields = {key: int(values.pop(key, default)) for key, default in FIELDS.items()}
    if fields["min_disk"] * GIB < file.virtual_size:
        raise BakehouseError(
            f"min_disk: {fields['min_disk']} GiB is less than {record.tag} has, {file.virtual_size / GIB:.1f} GiB",
            hint="Nova makes no server of it then: take it out of 'image_properties' in bakehouse.yaml or the manifest",
        )
    values |= _own(record, file, record_sha256, signature)
    for key, value in values.items():
        if len(value) > LONGEST_VALUE:
            raise BakehouseError(
                f"the property {key} of {record.tag} has {len(value)} characters, {LONGEST_VALUE} are kept",
                hint="shorten it: Nova cuts what is longer",
            )
    if len(values) > QUOTA - KEPT_FREE:
        raise BakehouseError(
            f"{record.tag} would have {len(values)} properties; Glance takes {QUOTA}, of which {KEPT_FREE} are kept "
            "for channels",
            hint="take some out of 'image_properties' in bakehouse.yaml or the manifest",
        )
    return Metadata(
        name=f"{record.name}-{record.tag}",
        disk_format=file.format,
        min_disk=fields["min_disk"],
        min_ram=fields["min_ram"],
        tags=tuple(sorted({MARK, f"os:{record.distribution}", record.platform})),
        properties=dict(sorted(values.items())),
        left_out=tuple(sorted({key for _, given in overrides for key in given} - values.keys() - FIELDS.keys())),
    )


def _memory(record: Record) -> int:
    """Return MiB: what nodes are verified with; plain Debian boots in half of it."""
    return 512 if record.platform == "base" else 1024


def _standard(record: Record, *, guest_agent: bool) -> dict[str, str]:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}
    is_roce = record.platform == "roce" or record.has_element("roce")
    values = {
        "architecture": machine.get(record.architecture, record.architecture),
        "os_type": "linux",
        "os_distro": record.distribution,
        "os_version": RELEASES.get(record.release, record.release),
        "os_admin_user": ADMIN_USER,
        "os_purpose": PURPOSES.get(record.platform, "custom"),
        # Magnum's drivers for Cluster API look for it (magnum-capi-helm, driver.py, _get_kube_version).
        **({"kube_version": f"v{version_of(record)}"} if "kubernetes" in record.versions else {}),
        # Where cloud-init looks first; the metadata service does as well.
        "img_config_drive": "optional",
        "hw_firmware_type": firmware(record),
        **({"os_secure_boot": "optional"} if record.secure_boot else {}),
        # Nova takes only hosts with the trait (nova/scheduler/utils.py, _process_image_meta; its name: os-traits,
        # os_traits/hw/nic/offload.py). Nodes of Ironic have those that their operator added.
        **({TRAIT_RDMA: "required"} if is_roce else {}),
    }
    if record.platform == "roce" or record.has_element("bare-metal"):
        # What Ironic's nodes are to Nova (nova/virt/ironic/driver.py, _get_nodes_supported_instances), and what makes
        # Ironic write the whole disk (ironic/common/images.py, is_whole_disk_image). Nothing is said that asks for a
        # device of virtual machines: Nova may want a trait for it that no node has (nova/scheduler/request_filter.py,
        # transform_image_metadata).
        #
        # hw_firmware_type and os_secure_boot are for people: Ironic goes by the capabilities of node and flavor
        # (ironic/drivers/modules/boot_mode_utils.py). "required" would have Nova look for nodes with the trait
        # COMPUTE_SECURITY_UEFI_SECURE_BOOT (nova/scheduler/utils.py, _translate_secure_boot_request).
        return values | {"hypervisor_type": "baremetal", "img_type": "whole-disk"}
    return values | {
        "hw_machine_type": "q35",
        "hw_disk_bus": "virtio",
        # Of volumes that are attached as SCSI, and for who overrides the bus.
        "hw_scsi_model": "virtio-scsi",
        "hw_vif_model": "virtio",
        "hw_vif_multiqueue_enabled": "true",
        "hw_rng_model": "virtio",
        **({"hw_qemu_guest_agent": "yes"} if guest_agent else {}),
    }


def firmware(record: Record) -> str:
    """Return the firmware to boot with: what the image was verified under, else the first that it has."""
    verified = record.verification.firmware if record.verification else ""
    return verified if verified in record.firmware else record.firmware[0]


def _sovereign(record: Record, description: str) -> dict[str, str]:
    packages = record.base.created.astimezone(datetime.UTC)
    text = description or f"{record.platform} node on {record.distribution.capitalize()} {record.release}"
    return {
        # "All publicly released patches before this date must be included": those of the base root's making.
        "image_build_date": f"{min(packages, record.created.astimezone(datetime.UTC)):%Y-%m-%d %H:%M:%S}",
        "image_original_user": ADMIN_USER,
        "image_source": "private",
        "image_description": text,
        # What Bakehouse cannot promise for a site: it may, in 'image_properties'.
        "replace_frequency": "never",
        "provided_until": "none",
        "uuid_validity": "none",
    }


def _own(record: Record, file: ImageFile, record_sha256: str, signature: Signature | None) -> dict[str, str]:
    verified = record.verification.result if record.verification else "none"
    values = {
        "name": record.name,
        "platform": record.platform,
        "tag": record.tag,
        "digest": record.digest,
        "commit": record.commit,
        "created": f"{record.created.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "verified": verified,
        "sha512": file.sha512,
        "sbom_sha256": record.sbom_sha256,
        "record_sha256": record_sha256,
        "kernel_version": record.kernel,
        **{f"{name}_version": record.versions[name] for name in ("slurm", "kubernetes") if name in record.versions},
        **({"signature": signature.value, "signature_key": signature.keyid} if signature else {}),
    }
    return {OURS + key: value for key, value in values.items()}


def check(key: str, value: str | None, where: str) -> None:
    """Check a property that somebody gave.

    Raises:
        BakehouseError: it is ours, a field of the Image API, or has a value that it does not take.
    """
    if key.startswith(OURS):
        raise BakehouseError(f"{where}: {key}: properties that begin with {OURS} are Bakehouse's own")
    if key in RESERVED:
        raise BakehouseError(f"{where}: {key}: is a field of the Image API and not a property")
    if not re.fullmatch(r"[\w:.-]{1,255}", key):
        raise BakehouseError(f"{where}: {key}: names of properties hold letters, digits and _ : . - only")
    near = difflib.get_close_matches(key, [*KNOWN, *FIELDS], n=1, cutoff=0.88)
    if near and near[0] != key:
        raise BakehouseError(f"{where}: {key}: no such property is known (did you mean '{near[0]}'?)")
    if value is not None:
        _check_value(key, value, where)


def _check_value(key: str, value: str, where: str) -> None:
    if key in OF_PARTITION_IMAGES:
        raise BakehouseError(
            f"{where}: {key}: belongs to images of one partition, and this is one of a whole disk",
            hint="its kernel and its initramfs are in it",
        )
    if key in FIELDS and not value.isdigit():
        raise BakehouseError(f"{where}: {key}: '{value}' is not a whole number")
    if len(value) > LONGEST_VALUE:
        raise BakehouseError(f"{where}: {key}: has {len(value)} characters, {LONGEST_VALUE} are kept")
    if re.search(r"[\x00-\x1f\U00010000-\U0010ffff]", value):
        raise BakehouseError(f"{where}: {key}: holds a control character, or one that MySQL's utf8 does not take")
    if key in KNOWN and not re.fullmatch(KNOWN[key], value):
        allowed = KNOWN[key].replace(DATE, "YYYY-MM-DD").replace("|", ", ").replace("\\", "")
        raise BakehouseError(f"{where}: {key}: '{value}' is not one of its values", hint=f"it takes: {allowed}")
