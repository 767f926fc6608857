"""What a Kubernetes image is made of, and what its control plane for tests is made of: packages, images, binaries."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

from bakehouse import lock
from bakehouse.cache import file_digest
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Manifest
from bakehouse.record import Record
from bakehouse.run import redact
from bakehouse.settings import Settings

CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
FETCH_SECONDS = 60


def environment(image: Manifest, settings: Settings) -> dict[str, str]:
    """Return the variables of the element kubernetes-node; none for other images.

    Args:
        image: the manifest.
        settings: say where packages and images come from.
    """
    if image.kubernetes is None:
        return {}
    folder = settings.kubernetes_images
    return {
        "DIB_KUBERNETES_VERSION": image.kubernetes.version or "",
        "DIB_KUBERNETES_PACKAGES": settings.kubernetes_packages,
        "DIB_KUBERNETES_KEY": settings.kubernetes_key,
        "DIB_KUBERNETES_IMAGES": " ".join(image.kubernetes.images),
        "DIB_KUBERNETES_IMAGE_FOLDER": str(folder) if folder else "",
    }


def inputs(image: Manifest, settings: Settings) -> dict[str, str]:
    """Return the inputs of the digest that stand for folders of the site: what they hold counts, not where they are.

    Raises:
        BakehouseError: a folder is not there, or holds no packages.
    """
    if image.kubernetes is None:
        return {}
    found: dict[str, str] = {}
    if settings.kubernetes_packages.startswith("/"):
        debs = _files(Path(settings.kubernetes_packages), "*.deb", "kubernetes_packages")
        found |= {f"kubernetes package {path.name}": _sha256(path) for path in debs}
        found["variable DIB_KUBERNETES_PACKAGES"] = "a folder"
    if settings.kubernetes_images:
        archives = _files(settings.kubernetes_images, "*.tar", "kubernetes_images")
        found |= {f"kubernetes image {path.name}": _sha256(path) for path in archives}
        found["variable DIB_KUBERNETES_IMAGE_FOLDER"] = "a folder"
    return found


def _sha256(path: Path) -> str:
    return file_digest(path, "sha256")["sha256"]


def _files(folder: Path, pattern: str, setting: str) -> list[Path]:
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not found:
        state = "holds no" if folder.is_dir() else "is not there, and so no"
        raise BakehouseError(f"{folder} {state} {pattern} files", hint=f"see '{setting}' in bakehouse.yaml")
    return found


def version_of(record: Record) -> str:
    """Return the version of Kubernetes in an image, such as 1.35.5."""
    return record.versions["kubernetes"].partition("-")[0]


def binaries(version: str, settings: Settings) -> dict[str, Path]:
    """Return the programs of a control plane, fetched where the cache lacks them, each compared with its digest.

    Args:
        version: such as 1.35.5.
        settings: say where they come from and where they are kept.

    Raises:
        BakehouseError: one cannot be had, or is not what its digest says.
    """
    kept = kept_binaries(version, settings.cache)
    folder = kept[CONTROL_PLANE[0]].parent
    folder.mkdir(parents=True, exist_ok=True)
    with lock.held(folder / ".lock", f"fetching Kubernetes {version}", wait=True, say=lambda _: None):
        for path in kept.values():
            if not path.exists():
                _fetch_checked(f"{settings.kubernetes_binaries}/v{version}/bin/linux/amd64/{path.name}", path)
    return kept


def kept_binaries(version: str, cache: Path) -> dict[str, Path]:
    """Return where the cache keeps the programs of a control plane, there or not."""
    return {name: cache / "kubernetes" / f"v{version}" / name for name in CONTROL_PLANE}


def _fetch_checked(address: str, path: Path) -> None:
    partial, digest = path.with_suffix(".partial"), path.with_suffix(".sha256")
    _fetch(address, partial)
    _fetch(f"{address}.sha256", digest)
    if digest.read_text(errors="replace").split()[:1] != [_sha256(partial)]:
        partial.unlink()
        raise BakehouseError(
            f"{redact(address)} is not what its digest beside it says",
            hint="try again; see 'kubernetes_binaries' in bakehouse.yaml",
        )
    partial.chmod(0o755)
    partial.rename(path)


def _fetch(address: str, target: Path) -> None:
    hint = "the control plane for tests comes from there: see 'kubernetes_binaries' in bakehouse.yaml"
    try:
        if address.startswith("/"):
            shutil.copyfile(address, target)
            return
        # The settings allow http, https and file addresses only.
        with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as answer, target.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error.strerror or error
        raise BakehouseError(f"{redact(address)} cannot be fetched: {reason}", hint=hint) from error
