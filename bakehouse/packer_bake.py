"""The other way to bake: Packer boots a base image in QEMU and applies the platform's definition to it.

What comes of that is a root filesystem, like the one that diskimage-builder leaves: the stages after it are those of
any bake (build.py), and so are formats, firmware, checks, record, and all that follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from bakehouse import (
    REPOSITORY,
    definition,
    elements,
    host,
    kvm,
    machine,
    manifest,
    packer_client,
    packer_cloud,
    plan,
    seed,
)
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance
from bakehouse.manifest import Resolved
from bakehouse.plan import Origin, Plan, Server
from bakehouse.record import Base, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.userdata import BASES, PLAY

if TYPE_CHECKING:
    from bakehouse.build import Job

FOLDER = REPOSITORY / "packer"
TEMPLATE = FOLDER / "platform.json"
SCRIPTS = FOLDER / "scripts"

STAGES = ["base image", "boot", "definition", "shutdown", "finish"]
"""In place of those of diskimage-builder."""

DISK = 16 << 30
"""Bytes of the machine's disk, to which its root grows. The image gets a new one, of its own size."""

MEMORY = 2048
"""MiB of the machine."""

MOST_CPUS = 4

SSH_SECONDS = {"kvm": 300, "tcg": 1800}
"""How long a machine may take until it lets Packer log in."""

HOST_FROM_INSIDE = "10.0.2.2"
"""How the machine reaches this host (QEMU's documentation, network emulation, user mode)."""

FINISHING = (
    (plan.OPERATING_SYSTEM, "finalise.d/10-package-origins"),
    plan.SOURCES,
    (plan.OPERATING_SYSTEM, "finalise.d/80-initramfs"),
)
"""Scripts, and their elements: what diskimage-builder does last in every image."""

CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")

CLIENT = [sys.executable, "-I", packer_client.__file__]

MARKS = {
    "Connected to SSH!": "definition",
    "Gracefully halting virtual machine": "shutdown",
    "Stopping server": "shutdown",
}
"""What Packer says when a stage begins."""

CAUSES = (
    (r"Timeout waiting for SSH", "the machine could not be logged in to in time",
     "the log has its console; the base image needs cloud-init, and this host a core to spare"),
    (r"error downloading ISO: .*?[Cc]hecksums? did not match", "the base image is not what its checksum says",
     "check --base-checksum, or what is at --base"),
    (r"error downloading ISO: \[?([^\n\]]*)", "the base image could not be fetched: {0}", "check --base"),
    (r"(?i)(?:unknown|failed to load|couldn't find|initialize).*builder.*qemu", "Packer has no builder for QEMU",
     "Packer 1.10 and newer need its plugin: packer init packer/plugins.pkr.hcl"),
    (r'fatal: \[packer\]: \w+! => .*"msg": "((?:[^"\\]|\\.)*)"', "a step of the definition said: {0}",
     "the last lines are above"),
)  # fmt: skip
"""What a log says, what that means, and what to do."""


def planned(
    wanted: Plan,
    settings: Settings,
    store: LocalStore,
    *,
    base: str = "",
    checksum: str = "",
    server: Server | None = None,
) -> Plan:
    """Return a plan as Packer bakes it.

    Args:
        wanted: the plan of the image.
        settings: of the site.
        store: where base images are.
        base: what the machine boots: a manifest, of which the store's image counts and one is baked where it has none;
            the tag of an image; or the address of a cloud image. By default what nodes of the bootstrap path boot.
        checksum: of what is at an address: ``sha256:`` or ``sha512:`` and its digits.
        server: in a cloud, to work on that. Its base is one of the cloud's images, see packer_cloud.base_in().

    Raises:
        BakehouseError: there is no such base, it does not fit the plan, or the checksum is none.
    """
    base = base or BASES["bootstrap"]
    if server:
        origin = _from_cloud(base, wanted, settings, server)
    elif "://" in base:
        origin = _from_address(base, checksum)
    else:
        origin = _from_store(base, checksum, wanted, settings, store)
    files = [
        *FOLDER.glob("*.json"), *SCRIPTS.iterdir(), *(path for path in PLAY.rglob("*") if path.is_file()),
        Path(__file__), Path(packer_client.__file__),
    ]  # fmt: skip
    inputs = wanted.inputs | {"builder": "packer", "packer base": origin.digest}
    for file in files:
        inputs[f"builder {file.relative_to(REPOSITORY)}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return dataclasses.replace(wanted, origin=origin, inputs=dict(sorted(inputs.items())))


def _from_address(address: str, checksum: str) -> Origin:
    name = plan.without_credentials(address)
    if not CHECKSUM.fullmatch(checksum):
        raise BakehouseError(
            f"--base-checksum {checksum!r} is no checksum" if checksum else f"{name} needs a checksum",
            hint="--base-checksum sha256:..., or sha512:... as Debian's SHA512SUMS have it",
        )
    return Origin(name, checksum, address=address, checksum=checksum)


def _from_store(name: str, checksum: str, wanted: Plan, settings: Settings, store: LocalStore) -> Origin:
    if checksum:
        raise BakehouseError("--base-checksum is for a base at an address", hint="the store has those of its images")
    release, kernel = str(wanted.manifest.release), wanted.manifest.kernel
    if name == wanted.name:
        raise BakehouseError(f"{name} cannot be its own base", hint="leave --base out")
    if name in manifest.find_all(manifest.folders(settings.manifests)):
        made = plan.make(name, settings, release=release)
        record = next((one for one in store.records() if one.name == name and one.digest == made.digest), None)
        origin = Origin(name, made.digest, plan=made, record=record)
        has_kernel = str(made.manifest.kernel)
    else:
        record = store.get(name)
        if (record.release, record.architecture) != (release, wanted.manifest.architecture):
            raise BakehouseError(
                f"the base {record.tag} is {record.release} on {record.architecture}, "
                f"{wanted.name} is {release} on {wanted.manifest.architecture}"
            )
        origin = Origin(record.tag, record.digest, record=record)
        has_kernel = record.inputs.get("manifest kernel", kernel)
    if kernel == "generic" != has_kernel:
        raise BakehouseError(
            f"{wanted.name} needs the generic kernel, the base {name} has the one of clouds",
            hint="--base debian-generic",
        )
    return origin


def _from_cloud(name: str, wanted: Plan, settings: Settings, server: Server) -> Origin:
    if "://" in name:
        raise BakehouseError("a server in a cloud boots an image of that cloud", hint="--base with its id")
    image, tag, manifest_name, digest = packer_cloud.base_in(server, name, settings.image_owner)
    release = str(wanted.manifest.release)
    known = manifest_name in manifest.find_all(manifest.folders(settings.manifests))
    return Origin(
        tag or image.name or image.id,
        digest or f"{image.hash_algorithm}:{image.hash_value}",
        # For the elements that it has.
        plan=plan.make(manifest_name, settings, release=release) if known else None,
        server=server,
        image=image.id,
    )


@cache
def version() -> str:
    """Return the version of this host's Packer.

    Raises:
        BakehouseError: it has none.
    """
    host.must_have_tools(host.PACKER_TOOLS)
    return packer_client.Client(TEMPLATE).version()


def root_of(job: Job) -> tuple[Path, Base]:
    """Make the root filesystem of a plan with Packer.

    Args:
        job: the bake.

    Returns:
        The root, mounted in the bake's isolated place, and what was booted.

    Raises:
        BakehouseError: a stage failed.
    """
    job.log.write(f"bakehouse: Packer {version()}")
    with job.progress.stage("base image"):
        booted, base = _booted(job)
        folder = job.work / "packer"
        (folder / "tmp").mkdir(parents=True)
        variables = booted | _files(job, folder)

    def write(more: Mapping[str, str]) -> list[str | Path]:
        builder = packer_cloud.BUILDER if job.plan.origin and job.plan.origin.server else "qemu"
        # An address may hold a password.
        file = _secret(folder / "variables.json", json.dumps({**variables, **more}, indent=1))
        return [*CLIENT, TEMPLATE, file, builder]

    work = packer_cloud.disk_of if job.plan.origin and job.plan.origin.server else _disk_of_machine
    with _stages(job):
        disk = work(job, folder, write)
    with job.progress.stage("finish"):
        return _finished(job, disk), base


def _disk_of_machine(job: Job, folder: Path, write: Callable[[Mapping[str, str]], list[str | Path]]) -> Path:
    """Have Packer set a machine on this host up. Return its disk. See packer_cloud.disk_of()."""
    assert job.plan.origin is not None
    output = job.tree / "packer"
    downloads = job.cache.packer if job.plan.origin.address else folder / "cache"
    downloads.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(folder / "tmp"), "PACKER_CACHE_DIR": str(downloads)}
    try:
        job.isolated(write({"output": str(output), **_machine(job)}), environment)
    except BakehouseError:
        # It says why a machine does not come up.
        _log_console(job, folder / "console.log")
        raise
    return output / "image.qcow2"


def _booted(job: Job) -> tuple[dict[str, str], Base]:
    """Return the variables that say what the machine boots, and what the record says of it."""
    origin = job.plan.origin
    assert origin is not None
    if origin.server:
        return {}, Base(key=origin.name, sha256="", created=job.created)
    if origin.record is None:
        form = "raw" if origin.address.endswith(".raw") else "qcow2"
        variables = {"base": origin.address, "base_checksum": origin.checksum, "base_format": form}
        return variables, Base(key=origin.name, sha256=origin.checksum.partition(":")[2], created=job.created)
    record = origin.record
    file = next((file for file in record.files if file.format == "qcow2"), record.files[0])
    path = job.store.image(record, file.format)
    variables = {"base": str(path), "base_checksum": f"sha256:{file.sha256}", "base_format": file.format}
    job.progress.cached("base image")
    return variables, Base(key=record.tag, sha256=file.sha256, created=record.created)


def _files(job: Job, folder: Path) -> dict[str, str]:
    """Write what the template reads. Return the variables that name it."""
    made = definition.write_play(job.plan, folder / "play", _base_manifest(job.plan))
    key = machine.make_key(folder)
    # As root: another user would stay in the image.
    public = key.with_name(f"{key.name}.pub").read_text().strip()
    root = {"name": "root", "lock_passwd": False, "ssh_authorized_keys": [public]}
    # cloud-init would set a locale of its own, too.
    user_data = "#cloud-config\n" + json.dumps({"disable_root": False, "users": [root], "locale": False}) + "\n"
    (folder / "user-data").write_text(user_data)
    seed.nocloud_drive(folder / "seed.iso", Instance("packer", "packer", user_data))
    sources = _secret(folder / "sources.list", "".join(f"{_from_inside(line)}\n" for line in job.plan.sources()))
    return {
        "seed": str(folder / "seed.iso"),
        "user_data": str(folder / "user-data"),
        "key": str(key),
        "play": str(folder / "play"),
        "ansible_playbook": str(Path(sys.executable).with_name("ansible-playbook")),
        "sources": str(sources),
        "apt_proxy": _from_inside(os.environ.get("http_proxy", "")),
        "wanted": " ".join(made.packages),
        "console": str(folder / "console.log"),
    }


def _secret(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _base_manifest(wanted: Plan) -> Resolved:
    """Return the manifest of what the machine boots, for the elements that it has already."""
    origin = wanted.origin
    assert origin is not None
    if origin.plan:
        return origin.plan.resolved
    has = _elements_of(origin.record) if origin.record else []
    return dataclasses.replace(
        wanted.resolved, name=origin.name, manifest=wanted.manifest.model_copy(update={"elements": has})
    )


def _elements_of(record: Record) -> list[str]:
    found: list[str] = json.loads(record.inputs.get("manifest elements", "[]"))
    return found


def _machine(job: Job) -> dict[str, str]:
    """Return the variables of the machine."""
    try:
        accelerated = kvm.works(job.cache.kvm).works
    except BakehouseError:
        accelerated = False
    accelerator = "kvm" if accelerated else "tcg"
    job.log.write(f"bakehouse: the machine's accelerator is {accelerator}")
    return {
        "accelerator": accelerator,
        "cpu": "host" if accelerated else machine.EMULATED_CPU,
        # An emulated one takes a core of the host's for each of its own.
        "cpus": str(min(MOST_CPUS, os.cpu_count() or 1) if accelerated else 1),
        "memory": str(MEMORY),
        "disk_size": f"{DISK >> 20}M",
        "ssh_timeout": f"{SSH_SECONDS[accelerator]}s",
    }


def _from_inside(text: str) -> str:
    """Return words as the machine has them: in addresses, this host's loopback is the machine's gateway."""
    return " ".join(_address_from_inside(word) if "://" in word else word for word in text.split(" "))


def _address_from_inside(address: str) -> str:
    parts = urlsplit(address)
    if parts.hostname not in {"localhost", "127.0.0.1", "::1"}:
        return address
    user, mark, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit(parts._replace(netloc=f"{user}{mark}{HOST_FROM_INSIDE}{port}"))


@contextlib.contextmanager
def _stages(job: Job) -> Iterator[None]:
    """Take the time of what Packer does, by what it says."""
    before = job.log.listener
    left = dict(MARKS)
    # One at a time: a new one ends the one before.
    current = ExitStack()
    current.enter_context(job.progress.stage("boot"))

    def listen(line: str) -> None:
        before(line)
        mark = next((mark for mark in left if mark in line), None)
        if mark:
            current.close()
            current.enter_context(job.progress.stage(left.pop(mark)))

    job.log.listener = listen
    try:
        with current:
            yield
    finally:
        job.log.listener = before


def _log_console(job: Job, console: Path) -> None:
    if console.exists():
        for line in console.read_text(errors="replace").splitlines():
            job.log.write(f"console: {line}")


def _finished(job: Job, disk: Path) -> Path:
    """Mount the root filesystem of the machine's disk in the isolated place, and make it that of an image."""
    raw, root = job.tree / "machine.raw", job.tree / "root"
    job.isolated(["qemu-img", "convert", "-O", "raw", disk, raw])
    job.isolated(["rm", disk])
    scripts = [job.plan.script(*script) for script in (plan.CLEANING, *FINISHING)]
    command = [SCRIPTS / "finish-root", raw, root, *scripts]
    job.isolated(command, elements.with_defaults(job.plan.elements, job.plan.environment))
    return root
