"""Container images of the hybrid path: a small Debian root as one layer, a platform's definition in another.

buildah builds them with chroot isolation, so that no container engine is needed, in the isolated place that bakes run
in. Its storage is in the cache. What is applied is what other paths apply (definition), without the elements that the
nodes' base image has already.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from bakehouse import REPOSITORY, build, definition, host, lock, manifest, plan, run
from bakehouse.cache import BaseCache, BaseRoot, free_bytes, write_atomically
from bakehouse.definition import Definition
from bakehouse.elements import Element
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Resolved
from bakehouse.plan import Plan
from bakehouse.progress import Progress
from bakehouse.run import Isolation, Log
from bakehouse.settings import Settings
from bakehouse.userdata import BASES, PLAY

FILES = REPOSITORY / "bootstrap" / "containers"

COPY_STATIC = PLAY / "files" / "copy-static"
"""Brings static files into the image as the Ansible play brings them to a node."""

NODES = BASES["hybrid"]
"""The manifest of the nodes that run these images."""

OF_MACHINES = frozenset({"bare-metal", "roce"})
"""Elements that set a machine up: its firmware, devices and how it starts. A container cannot."""

STAGES = ["base root", "base layer", "platform", "check"]

DIGEST_LABEL = "bakehouse_digest"
"""As the property of a disk image in Glance."""

BASE_FILES = ("base-root", "without-docs", "Containerfile.base")
"""What makes the first layer."""

ARCHIVES = "/var/cache/apt/archives"
LISTS = "/var/lib/apt/lists"

SYSTEM_FOLDER = "/var/lib/containers"

CAUSES = (
    *build.CAUSES,
    (r"apply: failed: ([^\n]*)", "its step '{0}' did", "its last lines are above"),
)
"""What a log says, what that means, and what to do."""

KEPT = 3
"""Images of a platform that stay in the storage."""

LEAST_FREE = 1 << 30
"""Bytes that must be free before a build begins: base root, two layers, downloaded packages."""


@dataclass(frozen=True)
class ContainerImage:
    """An image that was built: what is noted beside the storage that holds it."""

    key: str
    """Digest of all that can change it."""
    name: str
    """The manifest's."""
    tag: str
    digest: str
    """The plan's input digest."""
    id: str
    """In buildah's storage: the digest of its configuration."""
    base: str
    """SHA-256 of the base root that its first layer was made of."""
    created: str
    """ISO 8601."""
    packages: dict[str, str]
    """Versions of all packages, by name."""
    pushed: dict[str, str]
    """Digests of its manifest, by the repositories that it was pushed to."""

    @property
    def local_name(self) -> str:
        """Its name in the storage."""
        return f"localhost/bakehouse/{self.name}:{self.tag}"


@dataclass(frozen=True)
class Shelf:
    """The part of the cache where container images are."""

    cache: BaseCache

    @property
    def folder(self) -> Path:
        """All of it."""
        return self.cache.containers

    @property
    def storage(self) -> Path:
        """What buildah keeps."""
        return self.folder / "storage"

    @property
    def known_blobs(self) -> Path:
        """What it notes of layers that registries have."""
        return self.folder / "known-blobs"

    def images(self) -> list[ContainerImage]:
        """Return the images, newest first."""
        found = (self._read(path) for path in self.folder.glob("*.image.json"))
        return sorted((image for image in found if image), key=lambda image: image.created, reverse=True)

    def note(self, key: str) -> Path:
        """Return the file about an image."""
        return self.folder / f"{key[:16]}.image.json"

    def write(self, image: ContainerImage) -> None:
        """Note an image."""
        write_atomically(self.note(image.key), json.dumps(asdict(image), indent=1))

    def find(self, key: str) -> ContainerImage | None:
        """Return the image with a key, where it was built."""
        return self._read(self.note(key))

    @staticmethod
    def _read(path: Path) -> ContainerImage | None:
        try:
            return ContainerImage(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def holds(self, image: ContainerImage) -> bool:
        """Say whether the storage still has an image; it is root's."""
        find = ["find", str(self.storage), "-maxdepth", "2", "-name", image.id.removeprefix("sha256:")]
        done = subprocess.run([*run.as_root(), *find], capture_output=True, text=True, check=False)
        return bool(done.stdout.strip())


@dataclass(frozen=True)
class Order:
    """What to build."""

    plan: Plan
    nodes: Resolved
    """The manifest of the nodes that run it."""

    @property
    def platform(self) -> str:
        """The platform, whose folder of bootstrap/containers/ goes into the image."""
        return str(self.plan.manifest.platform)

    @functools.cached_property
    def definition(self) -> Definition:
        """What makes a node of the base image one of the platform."""
        return definition.of(self.plan, self.nodes)

    @functools.cached_property
    def elements(self) -> frozenset[str]:
        """The names of the elements that are applied: those that the nodes have not."""
        return frozenset(element.name for element in definition.own_elements(self.plan, self.nodes))

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that can change the image."""
        version = subprocess.run(["buildah", "--version"], capture_output=True, text=True, check=True).stdout
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        inputs = {
            "plan": self.plan.digest,
            "elements": ",".join(sorted(self.elements)),
            "buildah": version.strip(),
            "code": code,
        }
        inputs["copy-static"] = hashlib.sha256(COPY_STATIC.read_bytes()).hexdigest()
        files = Element("containers", FILES).files().items()
        inputs |= {name: digest for name, digest in files if name.partition("/")[0] in {name, self.platform}}
        return plan.digest_of(inputs)

    @functools.cached_property
    def base_inputs(self) -> dict[str, str]:
        """All that can change the base root: nothing of it is a platform's."""
        of_others = ("package ", "element ", "manifest components")
        inputs = {name: value for name, value in self.plan.base_inputs.items() if not name.startswith(of_others)}
        files = [*(FILES / name for name in BASE_FILES), self.plan.script(*plan.CLEANING)]
        return inputs | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    @property
    def base_key(self) -> str:
        """The name of the base root in the cache."""
        image = self.plan.manifest
        return f"container-{image.distribution}-{image.release}-{plan.digest_of(self.base_inputs)[:16]}"


@dataclass
class _Build:
    """What the stages of a build share."""

    order: Order
    tag: str
    created: datetime.datetime
    shelf: Shelf
    work: Path
    log: Log
    progress: Progress
    place: Isolation

    @property
    def release(self) -> str:
        return self.order.definition.release

    @property
    def cache(self) -> BaseCache:
        return self.shelf.cache

    @property
    def archives(self) -> Path:
        """A folder of this build's own for downloaded packages: apt locks it."""
        return self.work / "archives"

    def buildah(self, *words: str | Path) -> None:
        """Run buildah in the isolated place."""
        self.place.run(buildah(self.shelf, self.work, *words), {"TMPDIR": str(self.work)})

    def epoch(self, otherwise: datetime.datetime) -> str:
        """Return the time that files and images get, in seconds: what is pinned, or else another one."""
        if given := os.environ.get("SOURCE_DATE_EPOCH"):
            return given
        if snapshot := self.order.plan.manifest.snapshot:
            otherwise = datetime.datetime.strptime(snapshot, "%Y%m%dT%H%M%S%z")
        return str(int(otherwise.timestamp()))


def buildah(shelf: Shelf, work: Path, *words: str | Path) -> list[str | Path]:
    """Return a command of buildah on the cache's storage. What it notes of mounts goes with the build's folder."""
    return ["buildah", "--root", shelf.storage, "--runroot", work / "run", *words]


@contextmanager
def isolated(shelf: Shelf, log: Log) -> Iterator[Isolation]:
    """Make the isolated place in which buildah runs."""
    shelf.known_blobs.mkdir(parents=True, exist_ok=True)
    with Isolation(log) as place:
        # buildah notes what it knows of layers in one place only, the system's: ours is shown to it there.
        place.run(["mkdir", "-p", SYSTEM_FOLDER])
        place.run(["mount", "--bind", shelf.known_blobs, SYSTEM_FOLDER])
        yield place


def order(name: str, settings: Settings) -> Order:
    """Return what the container image of a platform is made of.

    Args:
        name: the manifest's.
        settings: the site's.

    Raises:
        BakehouseError: a manifest or an element is missing or faulty, this host lacks what builds images, or the
            platform has elements for machines that the nodes' manifest lacks.
    """
    return order_of(plan.make(name, settings), settings)


def order_of(made: Plan, settings: Settings) -> Order:
    """Return what the container image of a plan is made of.

    Raises:
        BakehouseError: as order().
    """
    host.must_have_tools(host.TOOLS + host.CONTAINER_TOOLS)
    wanted = Order(made, manifest.resolve(NODES, manifest.folders(settings.manifests)))
    if not (FILES / wanted.platform).is_dir():
        known = sorted(path.name for path in FILES.iterdir() if path.is_dir())
        raise BakehouseError(
            f"there are no container images of the platform {wanted.platform} yet",
            hint=f"there are of {', '.join(known)}",
        )
    if misplaced := wanted.elements & OF_MACHINES:
        names = " and ".join(sorted(misplaced))
        raise BakehouseError(
            f"{made.name} has {names}, for the machine itself: not for a container",
            hint=f"bake it or bootstrap it; or give nodes {names} by a manifest {NODES} of your own (docs/hybrid.md)",
        )
    return wanted


@contextmanager
def opened(shelf: Shelf, console: Console) -> Iterator[None]:
    """Have the storage for ourselves, and clean up what a killed run left."""

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with run.ending_on_sigterm(), lock.held(shelf.folder / "lock", "the container images", wait=True, say=say):
        for leftover in shelf.cache.work.glob("container+*"):
            run.remove_tree(leftover)
            say(f"removed {leftover}, which a killed run had left")
        run.as_root()
        # When it was last used: the cache removes the longest unused first.
        (shelf.folder / "lock").touch()
        yield


def find(wanted: Order, shelf: Shelf) -> ContainerImage | None:
    """Return the image where it was built from the base root that the cache holds now, or the cache holds none."""
    image, base = shelf.find(wanted.key), shelf.cache.find(wanted.base_key)
    return image if image and (base is None or base.sha256 == image.base) else None


def make(
    wanted: Order, shelf: Shelf, console: Console, *, refresh: bool = False, verbose: bool = False
) -> tuple[ContainerImage, bool]:
    """Build an image, unless it is there. The storage is opened().

    Args:
        wanted: what.
        shelf: where it goes.
        console: shows progress.
        refresh: renew the base root, and so its packages.
        verbose: show the output of the tools.

    Returns:
        The image, and whether it was built now.

    Raises:
        BakehouseError: a stage failed. Nothing is left behind but the log.
    """
    found = None if refresh else find(wanted, shelf)
    if found and shelf.holds(found):
        return found, False
    if (free := free_bytes(shelf.cache.root)) < LEAST_FREE:
        raise BakehouseError(
            f"only {free >> 20} MiB are free for {shelf.cache.root}, a container image takes at least "
            f"{LEAST_FREE >> 20} MiB",
            hint="`invoke cache.prune`, or name a larger disk in bakehouse.yaml",
        )
    created = datetime.datetime.now(datetime.UTC)
    tag = _new_tag(wanted.plan, shelf, created)
    title = f"Building the container image {wanted.plan.name} {tag}"
    with (
        build.log_file(shelf.cache.root / "logs", f"container-{wanted.plan.name}-{tag}.log") as log,
        build.work_folder(shelf.cache.work, "container") as work,
        Progress(title, STAGES, console, verbose=verbose) as progress,
        isolated(shelf, log) as place,
    ):
        log.listener = progress.line
        job = _Build(wanted, tag, created, shelf, work, log, progress, place)
        try:
            return _stages(job, refresh=refresh), True
        except BakehouseError as error:
            raise build.explained(error, log, "the build of the container image", CAUSES) from error


def _new_tag(wanted: Plan, shelf: Shelf, now: datetime.datetime) -> str:
    taken = {image.tag for image in shelf.images() if image.name == wanted.name}
    return plan.first_free_tag(wanted.digest, now, lambda tag: tag in taken)


def _stages(job: _Build, *, refresh: bool) -> ContainerImage:
    with job.cache.using_debs(job.release) as spoilt:
        for name in spoilt:
            job.log.write(f"bakehouse: {name} in the cache is not as it was downloaded; it is fetched again")
        return _made(job, refresh=refresh)


def _made(job: _Build, *, refresh: bool) -> ContainerImage:
    job.archives.mkdir()
    debs = job.cache.debs(job.release)
    # Containers of a run that was killed.
    job.buildah("rm", "--all")
    _link_debs(job, debs, job.archives)
    base = _base_root(job, refresh=refresh)
    layer = _base_layer(job, base)
    image = _platform(job, layer)
    _link_debs(job, job.archives, debs)
    job.cache.note_debs(job.release)
    made = ContainerImage(
        key=job.order.key, name=job.order.plan.name, tag=job.tag, digest=job.order.plan.digest, id=image,
        base=base.sha256, created=job.created.isoformat(timespec="seconds"), packages=_check(job, image),
        pushed={},
    )  # fmt: skip
    job.shelf.write(made)
    _forget(job, made, layer)
    return made


def _link_debs(job: _Build, source: Path, target: Path) -> None:
    job.place.run(["find", source, "-maxdepth", "1", "-name", "*.deb", "-exec", "cp", "-lnt", target, "{}", "+"])


def _base_root(job: _Build, *, refresh: bool) -> BaseRoot:
    key = job.order.base_key
    with job.progress.stage("base root"):
        found, wrong = job.cache.check(key)
        if found and not refresh:
            job.progress.cached("base root")
            return found
        if wrong:
            job.progress.note(f"the cached base root {key} is not used: {wrong}; it is made anew")
        made = job.work / "made.tar.zst"
        architecture = job.order.plan.manifest.architecture
        job.place.run(
            [FILES / "base-root", "make", made, job.release, architecture, *job.order.plan.sources(["main"])],
            {
                "TMPDIR": str(job.work),
                "SOURCE_DATE_EPOCH": job.epoch(job.created),
                "DEBS": str(job.archives),
                "HYGIENE": str(job.order.plan.script(*plan.CLEANING)),
            },
        )
        run.give_back(made)
        job.cache.bases.mkdir(parents=True, exist_ok=True)
        return job.cache.enter(key, made, job.order.base_inputs, job.created)


def _base_layer(job: _Build, base: BaseRoot) -> str:
    name = f"localhost/bakehouse/base:{job.release}-{base.sha256[:12]}"
    with job.progress.stage("base layer"):
        try:
            job.buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", name)
        except run.CommandError:
            context = job.work / "base"
            context.mkdir()
            (context / "root.tar.zst").hardlink_to(base.path)
            # Of the base root's making: the layer is the same whenever it is made of it.
            job.buildah(*_bud("Containerfile.base", name, job.epoch(base.created)), context)
        else:
            job.progress.cached("base layer")
    return name


def _bud(file: str, name: str, epoch: str) -> list[str | Path]:
    return [
        "bud", "--isolation=chroot", "--layers=false", "--pull-never", f"--timestamp={epoch}", "--identity-label=false",
        f"--file={FILES / file}", f"--tag={name}",
    ]  # fmt: skip


def _platform(job: _Build, layer: str) -> str:
    bundle, lists, image = job.work / "bundle", job.work / "lists", job.work / "image"
    lists.mkdir()
    name = job.order.plan.name
    with job.progress.stage("platform"):
        _write_bundle(job, bundle)
        mounts = {bundle: "/mnt:ro", job.archives: ARCHIVES, lists: LISTS}
        job.buildah(
            *_bud("Containerfile", f"localhost/bakehouse/{name}:{job.tag}", job.epoch(job.created)),
            f"--build-arg=BASE={layer}", f"--build-arg=PLATFORM={job.order.platform}", f"--iidfile={image}",
            *(f"--volume={source}:{target}" for source, target in mounts.items()),
            *(f"--label={label}={value}" for label, value in _labels(job).items()),
            FILES,
        )  # fmt: skip
    return image.read_text().strip()


def _labels(job: _Build) -> dict[str, str]:
    """Return what the image says of itself: the OCI image specification's annotations, and our own digest."""
    created = datetime.datetime.fromtimestamp(int(job.epoch(job.created)), datetime.UTC)
    facts = {
        "title": job.order.plan.name,
        "description": job.order.plan.manifest.description,
        "version": job.tag,
        "created": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "revision": build.commit(),
    }
    labels = {f"org.opencontainers.image.{name}": value for name, value in facts.items()}
    return labels | {DIGEST_LABEL: job.order.plan.digest}


def _write_bundle(job: _Build, bundle: Path) -> None:
    """Write what bootstrap/containers/apply reads."""
    wanted = job.order.definition
    definition.write_folder(job.order.plan, bundle, job.order.nodes)
    variables = {**wanted.environment, "SOURCE_DATE_EPOCH": job.epoch(job.created)}
    texts = {
        # Presets are about systemd, which does not run in the container.
        "steps": [
            " ".join([step.kind, *(step.packages or [step.path])]) for step in wanted.steps if step.kind != "presets"
        ],
        "environment": [f"export {name}={shlex.quote(value)}" for name, value in variables.items()],
        "sources.list": job.order.plan.sources(),
    }
    for name, lines in texts.items():
        (bundle / name).write_text("".join(f"{line}\n" for line in lines))
    (bundle / "bin").mkdir()
    shutil.copy(FILES / "apply", bundle)
    shutil.copy(FILES / "sudo", bundle / "bin")
    shutil.copy(COPY_STATIC, bundle / "bin")
    for name, script in {"apt-sources": plan.SOURCES, "image-hygiene": plan.CLEANING}.items():
        shutil.copy(job.order.plan.script(*script), bundle / "bin" / name)


def _check(job: _Build, image: str) -> dict[str, str]:
    """Look for what must not be in an image. Return the versions of its packages."""
    report, mount = job.work / "contents.json", buildah(job.shelf, job.work, "mount", "check")
    with job.progress.stage("check"):
        job.buildah("from", "--pull-never", "--name=check", image)
        script = f'exec "$@" "$({shlex.join(map(str, mount))})" {shlex.quote(str(report))}'
        try:
            job.place.run(["sh", "-euc", script, "sh", *build.CHECK_ROOT])
        except run.CommandError as error:
            job.buildah("rm", "check")
            job.buildah("rmi", "--force", image)
            raise build.unclean(error) from error
        job.buildah("rm", "check")
    packages = json.loads(report.read_text())["packages"]
    return {row["binary:Package"].partition(":")[0]: row["Version"] for row in packages}


def _forget(job: _Build, made: ContainerImage, layer: str) -> None:
    """Remove images that have been superseded, and base layers but the newest."""
    for old in [image for image in job.shelf.images() if image.name == made.name][KEPT:]:
        job.shelf.note(old.key).unlink()
        _remove(job, old.local_name)
    listing = job.work / "images"
    names = buildah(job.shelf, job.work, "images", "--format={{.Name}}:{{.Tag}}")
    job.place.run(["sh", "-euc", f"{shlex.join(map(str, names))} > {shlex.quote(str(listing))}"])
    for name in listing.read_text().split():
        if name.startswith(layer.partition("-")[0] + "-") and name != layer:
            _remove(job, name)


def _remove(job: _Build, name: str) -> None:
    try:
        job.buildah("rmi", name)
    except run.CommandError as error:
        job.log.write(f"bakehouse: {name} stays: {error.message}")
