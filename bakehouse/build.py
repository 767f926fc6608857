"""The bake: from a plan to an image with its record in the store."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bakehouse import REPOSITORY, host, lock, packer_bake, plan, run, sbom
from bakehouse.cache import BaseCache, BaseRoot, disk_usage, file_digest, free_bytes
from bakehouse.errors import BakehouseError
from bakehouse.manifest import RELEASES
from bakehouse.plan import Plan
from bakehouse.progress import Progress
from bakehouse.record import FILE_NAME, Base, ImageFile, Record, Usage
from bakehouse.run import Isolation, Log, Took
from bakehouse.store import LocalStore

STAGES = {
    "dib": ["base root", "elements"],
    "packer": packer_bake.STAGES,
    "both": ["check and seal", "disk", "image files", "SBOM and checksums"],
}
"""Of a bake, by who makes the root filesystem."""

CLUSTER_SIZE = "128k"
"""Of a compressed qcow2. Larger compresses better (64k: 1.13 times a tar.zst, 128k: 1.10, 256k: 1.08) and makes each
small read of a node that runs straight from the file dearer."""

MEMORY_TREE = 4 << 30
"""Bytes that a build tree is taken to need when there is no last one to go by."""

LEAST_FREE = 3 << 29
"""Bytes that must be free before a bake begins: root, raw disk and image file of a small image."""

KEPT_LOGS = 20

CHECK_ROOT = [sys.executable, "-I", str(Path(__file__).with_name("rootfs.py"))]
"""Says what a root must not hold but does, and lists its packages. See rootfs.main()."""

NAMED_PACKAGES = {
    "slurm": "slurmd",
    "munge": "munge",
    "kubernetes": "kubelet",
    "containerd": "containerd",
    "cloud-init": "cloud-init",
    "systemd": "systemd",
}
"""Whose versions stand in the record by themselves, and their packages."""


@dataclasses.dataclass
class Job:
    """What the stages of one bake share."""

    plan: Plan
    tag: str
    created: datetime.datetime
    commit: str
    store: LocalStore
    cache: BaseCache
    work: Path
    tree: Path
    """The folder for root and raw disk, on disk or in memory. Seen in the isolated place only."""
    log: Log
    progress: Progress
    place: Isolation
    took: list[Took]

    def isolated(self, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
        """Run a program in the isolated place, and note what it took.

        Raises:
            CommandError: it failed.
        """
        self.took.append(self.place.run(command, environment))


def bake(
    wanted: Plan,
    store: LocalStore,
    cache: BaseCache,
    console: Console,
    *,
    refresh: bool = False,
    force: bool = False,
    wait: bool = True,
    verbose: bool = False,
    in_memory: bool = True,
) -> tuple[Record, bool]:
    """Bake an image, unless the store has it.

    Args:
        wanted: what to bake.
        store: where the image goes.
        cache: where base roots and the build folder are.
        console: shows progress.
        refresh: renew the base root.
        force: build even where nothing changed.
        wait: wait for a bake of the same manifest that is going on.
        verbose: show the output of diskimage-builder and the other tools.
        in_memory: keep the build tree in memory where memory is plenty.

    Returns:
        The image's record, and whether it was built now.

    Raises:
        BakehouseError: a stage failed. Nothing is left behind but the log.
    """
    host.must_have_tools(host.TOOLS + (host.PACKER_TOOLS if wanted.origin else ()))

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    own_lock = store.root / ".locks" / f"{wanted.name}.lock"
    with run.ending_on_sigterm(), lock.held(own_lock, f"the bake of {wanted.name}", wait=wait, say=say):
        for leftover in [*store.leftovers(wanted.name), *cache.work.glob(f"{wanted.name}+*")]:
            run.remove_tree(leftover)
            say(f"removed {leftover}, which a killed run had left")
        decision = plan.decide(wanted, store, cache, refresh=refresh, force=force)
        if decision.image:
            return decision.image, False
        origin = wanted.origin
        if origin and origin.plan and not origin.server and (refresh or not origin.record):
            say(f"{origin.name}, which Packer boots, is {'renewed' if origin.record else 'baked'} first")
            options = {"refresh": refresh, "wait": wait, "verbose": verbose, "in_memory": in_memory}
            record, _ = bake(origin.plan, store, cache, console, **options)
            wanted = dataclasses.replace(wanted, origin=dataclasses.replace(origin, record=record))
        for place in {store.root, cache.root}:
            if free_bytes(place) < LEAST_FREE:
                raise BakehouseError(
                    f"only {free_bytes(place) >> 20} MiB are free for {place}, a bake takes at least "
                    f"{LEAST_FREE >> 20} MiB",
                    hint="`invoke cache.prune`, `invoke images.remove TAG`, or name a larger disk in bakehouse.yaml",
                )
        run.as_root()
        found = _build(wanted, store, cache, console, refresh=refresh, verbose=verbose, wait=wait, in_memory=in_memory)
        return found, True


def renew_base(
    wanted: Plan, store: LocalStore, cache: BaseCache, console: Console, *, wait: bool = True, verbose: bool = False
) -> BaseRoot:
    """Make the base root of a plan anew, for all plans that begin with it.

    Args:
        wanted: the plan.
        store: where its images would go.
        cache: where base roots are.
        console: shows progress.
        wait: wait where somebody else is making it.
        verbose: show the output of the tools.

    Raises:
        BakehouseError: it cannot be made. The one before stays.
    """
    host.must_have_tools()
    key = wanted.base_key
    name = f"base-{key}"

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with (
        run.ending_on_sigterm(),
        lock.held(cache.bases / f"{key}.renewal.lock", f"the renewal of {key}", wait=wait, say=say),
    ):
        for leftover in cache.work.glob(f"{name}+*"):
            run.remove_tree(leftover)
            say(f"removed {leftover}, which a killed run had left")
        run.as_root()
        created = datetime.datetime.now(datetime.UTC)
        with (
            log_file(cache.root / "logs", f"{name}.log") as log,
            work_folder(cache.work, name) as work,
            Progress(f"Renewing the base root {key}", ["base root"], console, verbose=verbose) as progress,
            _place(log, work / "tree", 0) as place,
            cache.using_debs(str(wanted.manifest.release)),
        ):
            log.listener = progress.line
            job = Job(wanted, "", created, commit(), store, cache, work, work / "tree", log, progress, place, [])
            try:
                made = _base_root(job, refresh=True, wait=wait)
                cache.note_debs(str(wanted.manifest.release))
                return made
            except BakehouseError as error:
                raise explained(error, log, causes=CAUSES) from error


def _build(
    wanted: Plan,
    store: LocalStore,
    cache: BaseCache,
    console: Console,
    *,
    refresh: bool,
    verbose: bool,
    wait: bool,
    in_memory: bool,
) -> Record:
    created = datetime.datetime.now(datetime.UTC)
    previous = [record for record in store.records() if record.name == wanted.name]
    # The last time that a stage had something to do.
    expected = {step.name: step.seconds for record in reversed(previous) for step in record.steps if not step.cached}
    stages = STAGES["packer" if wanted.origin else "dib"] + STAGES["both"]
    title = f"Baking {wanted.name} {{}}" + (f" (the last one took {previous[0].seconds:.0f} s)" if previous else "")
    with (
        store.claiming(lambda: plan.new_tag(wanted.digest, store, created)) as tag,
        log_file(cache.root / "logs", f"{wanted.name}-{tag}.log") as log,
        work_folder(cache.work, wanted.name) as work,
        Progress(title.format(tag), stages, console, expected=expected, verbose=verbose) as progress,
        _place(log, work / "tree", _memory_for(wanted, previous) if in_memory else 0) as place,
        cache.using_debs(str(wanted.manifest.release)) as spoilt,
    ):
        log.listener = progress.line
        log.write(f"bakehouse: baking {wanted.name} {tag}, digest {wanted.digest}")
        job = Job(wanted, tag, created, commit(), store, cache, work, work / "tree", log, progress, place, [])
        for name in spoilt:
            log.write(f"bakehouse: {name} in the cache is not as it was downloaded; it is fetched again")
        try:
            if wanted.origin:
                root, base = packer_bake.root_of(job)
            else:
                made = _base_root(job, refresh=refresh, wait=wait)
                root, base = _elements(job, made), Base(key=made.key, sha256=made.sha256, created=made.created)
                cache.note_debs(str(wanted.manifest.release))
            root_uuid = str(uuid.uuid4())
            contents = _seal(job, root, root_uuid)
            raw, sizes = _disk(job, root, root_uuid)
            with store.adding(wanted.name, tag) as folder:
                files = _image_files(job, raw, folder)
                return _record(job, folder, base, files, contents, sizes)
        except (BakehouseError, OSError) as error:
            found = error if isinstance(error, BakehouseError) else BakehouseError(f"the bake failed: {error}")
            log.write(f"bakehouse: {found.message}")
            causes = (*packer_bake.CAUSES, *CAUSES) if wanted.origin else CAUSES
            raise explained(found, log, causes=causes) from error


@contextlib.contextmanager
def log_file(folder: Path, name: str) -> Iterator[Log]:
    """Open a new log in a folder of logs, of which the oldest go."""
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in old[: -KEPT_LOGS + 1]:
        path.unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
    log = Log(folder / name)
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder for one build of something; it goes with the block."""
    folder = parent / f"{name}+{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        run.remove_tree(folder)


def _memory_for(wanted: Plan, previous: list[Record]) -> int:
    """Return the bytes of memory that the build tree may take; 0 where it shall be on disk.

    In memory only where twice of what the last one took is available: a build that runs out of memory takes others
    with it.
    """
    available = host.available_memory()
    needed = max([MEMORY_TREE, wanted.manifest.disk.root_size or 0, *(record.usage.disk for record in previous[:1])])
    return available // 2 if available > 2 * needed else 0


def _place(log: Log, tree: Path, memory: int) -> Isolation:
    """Return the isolated place of a bake, with the build tree in so many bytes of memory, or on disk for 0."""
    tree.mkdir()
    log.write(f"bakehouse: the build tree is {f'in memory, up to {memory >> 20} MiB' if memory else 'on disk'}")
    return Isolation(log, memory_folder=tree, memory_size=memory) if memory else Isolation(log)


def _dib_environment(job: Job, base: Path) -> dict[str, str]:
    archive, security = job.plan.mirrors
    return {
        **job.plan.environment,
        "ARCH": job.plan.manifest.architecture,
        "ELEMENTS_PATH": job.plan.elements_path,
        "TMP_DIR": str(job.tree),
        "DIB_IMAGE_CACHE": str(job.tree / "dib-cache"),
        "DIB_LOCKFILES": str(job.tree / "dib-locks"),
        "DIB_NO_TIMESTAMP": "1",
        "DIB_DISTRIBUTION_MIRROR": archive,
        "DIB_DEBIAN_SECURITY_MIRROR": security,
        "DIB_MMDEBSTRAP_TARBALL": str(base),
        "DIB_MMDEBSTRAP_PACKAGES": ",".join(job.plan.base_packages),
        "DIB_MMDEBSTRAP_TMPDIR": str(job.tree),
        "DIB_MMDEBSTRAP_DEBS": str(job.cache.debs(str(job.plan.manifest.release))),
        # A snapshot's index has run out long ago; its signature still counts.
        "DIB_MMDEBSTRAP_SOURCE_OPTIONS": "check-valid-until=no" if job.plan.manifest.snapshot else "",
        "DIB_ROOT_FOLDER": str(job.tree / "root"),
    }


def _base_root(job: Job, *, refresh: bool, wait: bool) -> BaseRoot:
    key = job.plan.base_key
    system = next((e for e in job.plan.elements if e.name == plan.OPERATING_SYSTEM), None)
    if system is None:
        raise BakehouseError(
            f"{job.plan.name} has no element {plan.OPERATING_SYSTEM}, the only operating system that Bakehouse caches",
            hint=f"put {plan.OPERATING_SYSTEM} in place of the other one",
        )
    path = job.cache.bases / f"{key}.lock"
    with (
        job.progress.stage("base root"),
        lock.held(path, f"the base root {key}", wait=wait, say=job.progress.note),
    ):
        found, wrong = job.cache.check(key)
        if found and not refresh:
            job.progress.cached("base root")
            return _hold(job, found)
        if wrong:
            job.progress.note(f"the cached base root {key} is not used: {wrong}; it is made anew")
        made = job.work / "base.tar.zst"
        environment = _dib_environment(job, made) | {"TARGET_ROOT": ""}
        job.isolated([system.path / "root.d" / "10-debian-mmdebstrap"], environment)
        run.give_back(made)
        return _hold(job, job.cache.enter(key, made, job.plan.base_inputs, job.created))


def _hold(job: Job, base: BaseRoot) -> BaseRoot:
    """Link a base root into the build folder, so that it stays there when the cache is pruned meanwhile."""
    held = job.work / "held-base.tar.zst"
    held.hardlink_to(base.path)
    return dataclasses.replace(base, path=held)


def _elements(job: Job, base: BaseRoot) -> Path:
    root = job.tree / "root"
    packages = job.plan.manifest.packages
    command: list[str | Path] = [
        "disk-image-create", "-n", "--no-tmpfs", "-a", job.plan.manifest.architecture, "-o", job.tree / "image",
        *(["-p", ",".join(packages)] if packages else []),
        *(element.name for element in job.plan.elements), plan.HAND_OVER,
    ]  # fmt: skip
    with job.progress.stage("elements"):
        job.isolated(command, _dib_environment(job, base.path))
        try:
            job.isolated(["test", "-d", root / "usr"])
        except run.CommandError as error:
            raise BakehouseError(
                "diskimage-builder ended well but left no root filesystem", log=job.log.tail()
            ) from error
    return root


def _seal(job: Job, root: Path, root_uuid: str) -> dict[str, Any]:
    image = job.plan.manifest
    identity = {
        "name": job.plan.name,
        "platform": image.platform,
        "tag": job.tag,
        "digest": job.plan.digest,
        "created": job.created.isoformat(timespec="seconds"),
        "commit": job.commit,
    }
    specification = {"identity": identity, "root_uuid": root_uuid, "kernel_arguments": image.kernel_arguments}
    wanted, report = job.work / "seal.json", job.work / "contents.json"
    wanted.write_text(json.dumps(specification))
    with job.progress.stage("check and seal"):
        try:
            job.isolated([*CHECK_ROOT, root, report, "--seal", wanted])
        except run.CommandError as error:
            raise unclean(error) from error
    contents: dict[str, Any] = json.loads(report.read_text())
    return contents


def unclean(error: run.CommandError) -> BakehouseError:
    """Return what it means that CHECK_ROOT failed."""
    found = re.findall(r"^hygiene: (.*)", error.log, flags=re.MULTILINE)
    if not found:
        return error
    return BakehouseError(
        "the root filesystem holds what must not be in an image:\n  " + "\n  ".join(found),
        hint="remove it in a cleanup.d script of the element that brings it (docs/image-authors.md)",
    )


def _disk(job: Job, root: Path, root_uuid: str) -> tuple[Path, dict[str, int]]:
    disk = job.plan.manifest.disk
    raw, report = job.tree / "disk.raw", job.work / "disk.json"
    job.cache.kvm.mkdir(parents=True, exist_ok=True)
    size = ["--root-size", str(disk.root_size)] if disk.root_size else []
    command: list[str | Path] = [
        sys.executable, "-I", Path(__file__).with_name("disk.py"), root, raw, "--root-uuid", root_uuid, *size,
        "--firmware", *disk.firmware, "--report", report, "--keep-kernel", job.work / "vmlinuz",
    ]  # fmt: skip
    with job.progress.stage("disk"):
        job.isolated(command)
        run.give_back(job.work / "vmlinuz")
    sizes: dict[str, Any] = json.loads(report.read_text())
    return raw, sizes


def _image_files(job: Job, raw: Path, folder: Path) -> list[tuple[str, Path]]:
    disk = job.plan.manifest.disk
    made: list[tuple[str, Path]] = []
    with job.progress.stage("image files"):
        # The raw file comes last: it is moved.
        for kind in sorted(disk.formats):
            target = folder / f"{job.plan.name}-{job.tag}.{kind}"
            if kind == "raw":
                job.isolated(["mv", raw, target])
            else:
                options, compress = f"cluster_size={CLUSTER_SIZE}", ["-c"]
                if disk.compression == "none":
                    options, compress = "cluster_size=64k", []
                else:
                    options += f",compression_type={disk.compression}"
                convert = ["qemu-img", "convert", "-W", "-m", "4", *compress, "-f", "raw", "-O", kind, "-o", options]
                job.isolated([*convert, raw, target])
            run.give_back(target)
            made.append((kind, target))
    return made


def _record(
    job: Job,
    folder: Path,
    base: Base,
    files: list[tuple[str, Path]],
    contents: dict[str, Any],
    sizes: dict[str, int],
) -> Record:
    image = job.plan.manifest
    kernel = str(contents["kernel"])
    bill = folder / "sbom.cdx.json"
    with job.progress.stage("SBOM and checksums"):
        sbom.write(
            bill,
            contents["packages"],
            name=job.plan.name,
            tag=job.tag,
            distribution=image.distribution,
            release=RELEASES[str(image.release)],
            created=job.created,
        )
        digests = {path: file_digest(path, "sha256", "sha512") for _, path in files}
        digests[bill] = file_digest(bill, "sha256", "sha512")
        for algorithm in ("sha256", "sha512"):
            lines = [f"{digest[algorithm]}  {path.name}\n" for path, digest in digests.items()]
            (folder / f"{algorithm.upper()}SUMS").write_text("".join(lines))
    versions = {row["binary:Package"].partition(":")[0]: row["Version"] for row in contents["packages"]}
    made = [
        ImageFile(
            format=kind,
            file=path.name,
            size=path.stat().st_size,
            virtual_size=sizes["virtual_size"],
            **digests[path],
        )
        for kind, path in files
    ]
    record = Record(
        name=job.plan.name,
        platform=str(image.platform),
        tag=job.tag,
        digest=job.plan.digest,
        inputs=job.plan.inputs,
        created=job.created,
        commit=job.commit,
        distribution=image.distribution,
        release=str(image.release),
        architecture=image.architecture,
        kernel=kernel,
        firmware=list(image.disk.firmware),
        secure_boot=sizes["secure_boot"],
        root_size=sizes["root_size"],
        root_used=sizes["root_used"],
        files=made,
        sbom=bill.name,
        sbom_sha256=digests[bill]["sha256"],
        package_count=len(contents["packages"]),
        versions={"kernel": kernel}
        | {name: versions[package] for name, package in NAMED_PACKAGES.items() if package in versions},
        base=base,
        steps=job.progress.steps,
        usage=Usage(
            peak_memory=max(took.peak_memory for took in job.took),
            disk=sizes["root_used"] + sizes["allocated"] + sum(disk_usage(path) for _, path in files),
            cpu_seconds=round(sum(took.cpu_seconds for took in job.took), 2),
        ),
        builder=host.versions() | ({"packer": packer_bake.version()} if job.plan.origin else {}),
    )
    shutil.move(job.work / "vmlinuz", job.cache.kvm / f"vmlinuz-{kernel}")
    job.log.write(f"bakehouse: done in {job.progress.elapsed:.1f} s")
    shutil.copyfile(job.log.path, folder / "build.log")
    (folder / FILE_NAME).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


def commit() -> str:
    """Return the commit of this checkout."""
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


CAUSES = (
    (r"[Nn]o space left on device|write error: disk full", "the disk is full",
     ("`invoke cache.prune`, `invoke images.remove TAG`, or name a larger disk in bakehouse.yaml; where the log says "
      "that the build tree is in memory, set build_in_memory: never")),
    (r"E: Unable to locate package (\S+)", "the mirror has no package '{0}'",
     "check the name; it may be in another release or component"),
    (r"E: Package '(\S+)' has no installation candidate", "the mirror has no package '{0}'",
     "check the name; it may be in another release or component"),
    (r"E: Version '(\S+)' for '(\S+)' was not found", "the mirror has no version {0} of '{1}'",
     "take a version that it has, or pin a snapshot"),
    ((r"(?:Temporary failure resolving|Could not resolve|Could not connect to|Unable to connect to|"
      r"Connection failed|Connection timed out)[ :]*'?([\w.:-]*)"), "the mirror {0} cannot be reached",
     "`invoke doctor` checks it; set 'mirror' and 'security_mirror' in bakehouse.yaml, or http_proxy"),
    (r"The repository '(\S+ \S+)[^']*' (?:does not have a Release file|is not signed)",
     "the mirror does not serve {0}", "check 'mirror', 'security_mirror' and the manifest's release and snapshot"),
    (r"E: Failed to fetch (\S+)", "{0} could not be fetched", "the mirror may be changing just now: try again"),
    (r"No public key|NO_PUBKEY ?(\w*)", "the mirror's signature cannot be checked (key {0})",
     "update debian-archive-keyring on this host"),
)  # fmt: skip
"""What a log says, what that means, and what to do."""


def explained(
    error: BakehouseError, log: Log, what: str = "the bake", causes: tuple[tuple[str, str, str], ...] = CAUSES
) -> BakehouseError:
    """Say why something failed, as far as its output tells.

    Args:
        error: what it ended with.
        log: its output.
        what: was tried.
        causes: what a log says, what that means, and what to do.
    """
    text = log.recent()
    hint, shown = error.hint, error.log or log.tail()
    message = error.message
    for pattern, meaning, remedy in causes:
        match = re.search(pattern, f"{message}\n{text}")
        if match:
            message, hint = f"{what} failed: {meaning.format(*match.groups())}", remedy
            break
    else:
        script = re.findall(r"dib-run-parts Running (?:/\S+/)?(\w[\w-]*\.d/\S+)", text)
        ended = re.findall(r"dib-run-parts (\S+) completed", text)
        if isinstance(error, run.CommandError) and script and script[-1].rpartition("/")[2] not in ended[-1:]:
            message = f"{what} failed in the element script {script[-1]} ({error.message})"
            hint, shown = "its last lines are above", _said_by(script[-1], text)
    hint = f"{hint}; the whole log is {log.path}" if hint else f"the whole log is {log.path}"
    return BakehouseError(message, hint=hint, log=shown)


def _said_by(script: str, text: str) -> str:
    """Return the last lines that an element script wrote, without those of diskimage-builder's clean-up after it."""
    lines = text.rpartition(f"{script}\n")[2].splitlines()
    own = itertools.takewhile(lambda line: not line.startswith(("Unmount ", "INFO diskimage_builder")), lines)
    return "\n".join([*own][-run.TAIL_LINES :])
