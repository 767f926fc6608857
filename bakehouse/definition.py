"""What makes a plain node one of a platform: the part of a plan that other paths than baking apply to a base image.

A plan's elements are split in two: those that every node has (of the manifest that the platform's extends, which has no
platform: the base), and the rest. The rest is the definition: an ordered list of steps, each of which diskimage-builder
would do in a chroot, and the files that they need, merged into one folder of hooks as diskimage-builder merges them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bakehouse import elements
from bakehouse.elements import Element
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Resolved
from bakehouse.plan import OPERATING_SYSTEM, Plan
from bakehouse.userdata import PLAY

VERSION = 2

PHASES = ("pre-install.d", "install.d", "post-install.d", "finalise.d")
"""Of diskimage-builder, in its order: those that run in the root that is built."""

PACKAGES_AT = {"pre-install.d": "10-package-installs", "install.d": "01-package-installs",
               "post-install.d": "00-package-installs"}  # fmt: skip
"""Where among a phase's scripts diskimage-builder's element package-installs installs packages."""

STATIC_AT = ("install.d", "10-install-static-files")
"""Where its element install-static copies the elements' static/ folders."""

EXTRA_AT = ("install.d", "00")
"""Where the manifest's own packages are installed: after the phase pre-install.d."""

PRESETS_AT = ("post-install.d", "60-presets")
"""Where the element common-node applies the presets."""

EXTRA_DATA_SECONDS = 600

PRESET = re.compile(r"(enable|disable)\s+([A-Za-z0-9@:._\\-]+)\s*")

SHELL_ONLY = frozenset({"_", "HOME", "IMAGE_NAME", "PATH", "PWD", "SHLVL", "OLDPWD"})
"""Variables of the shell that reads the elements' defaults, which say nothing of the image."""


@dataclass(frozen=True)
class Step:
    """One thing to do, in its place."""

    phase: str
    name: str
    """Its place within the phase: diskimage-builder sorts by these names."""
    kind: str
    """packages, static, script or presets."""
    packages: tuple[str, ...] = ()
    digest: str = ""
    """Of a script: SHA-256 of all that can change what it does, but for the system that it finds."""

    @property
    def path(self) -> str:
        """Of a script: its path in the folder of hooks."""
        return f"{self.phase}/{self.name}"

    def _place(self) -> tuple[int, int, str]:
        # As dib-run-parts does: sort -n in the C locale.
        number = re.match(r"[0-9]+", self.name)
        return PHASES.index(self.phase), int(number[0]) if number else 0, self.name


@dataclass(frozen=True)
class Definition:
    """What to do to a base image, in order."""

    name: str
    platform: str
    release: str
    base: str
    """The manifest that its base image extends."""
    kernel: str
    """That its base image must have: generic, or cloud, for which any kernel will do."""
    digest: str
    """The plan's input digest: an image that was baked of the same definition has it, too."""
    environment: dict[str, str]
    """Variables of the scripts."""
    steps: tuple[Step, ...]
    presets: dict[str, bool]
    """Units, and whether they are enabled."""

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages that are asked for."""
        return tuple(sorted({name for step in self.steps for name in step.packages}))

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data: definition.json of a bundle."""
        return {
            "version": VERSION,
            "name": self.name,
            "platform": self.platform,
            "release": self.release,
            "base": self.base,
            "kernel": self.kernel,
            "digest": self.digest,
            "environment": self.environment,
            "steps": [
                {
                    "kind": step.kind,
                    "name": step.path,
                    **({"packages": list(step.packages)} if step.kind == "packages" else {}),
                    **({"digest": step.digest} if step.kind == "script" else {}),
                }
                for step in self.steps
            ],
            "presets": [{"unit": unit, "enabled": enabled} for unit, enabled in self.presets.items()],
        }


def bundle_name(plan: Plan) -> str:
    """Return what the file of a plan's bundle is called by default."""
    return f"{plan.name}-{plan.digest[:7]}.tar.gz"


def of(plan: Plan, base: Resolved | None = None) -> Definition:
    """Return what the plan does beyond its base.

    Args:
        plan: the plan of a platform's image.
        base: the manifest of another base image than the plan's own, which may have more.

    Raises:
        BakehouseError: it has nothing beyond its base, or an element of it needs what only a build can do.
    """
    chosen = own_elements(plan, base)
    if not chosen and not plan.manifest.packages:
        raise BakehouseError(
            f"{plan.name} has nothing beyond its base",
            hint="choose a manifest of a platform, such as slurm",
        )
    environment = elements.with_defaults(plan.elements, plan.environment)
    environment = {name: value for name, value in sorted(environment.items()) if name not in SHELL_ONLY}
    names = {element.name for element in chosen}
    if base and not base.manifest.elements:
        # A cloud image of somebody else: the packages that make a system of it may be missing.
        names.add(OPERATING_SYSTEM)
    steps = [*_scripts(chosen, environment)]
    by_phase: dict[str, set[str]] = {}
    for package in plan.packages:
        if package.element in names:
            by_phase.setdefault(package.phase, set()).add(package.name)
    steps += [Step(phase, PACKAGES_AT[phase], "packages", tuple(sorted(found))) for phase, found in by_phase.items()]
    if extra := sorted(set(plan.manifest.packages)):
        steps.append(Step(*EXTRA_AT, "packages", tuple(extra)))
    presets = dict(_presets(chosen))
    if any(name.startswith("static/") for element in chosen for name in element.files()):
        steps.append(Step(*STATIC_AT, "static"))
    if presets:
        steps.append(Step(*PRESETS_AT, "presets"))
    return Definition(
        name=plan.name,
        platform=str(plan.manifest.platform),
        release=str(plan.manifest.release),
        base=base.name if base else plan.resolved.chain[0],
        kernel=str(plan.manifest.kernel),
        digest=plan.digest,
        environment=environment,
        steps=tuple(sorted(steps, key=Step._place)),
        presets=presets,
    )


def own_elements(plan: Plan, base: Resolved | None = None) -> tuple[Element, ...]:
    """Return the elements of a plan that its base does not have. See of()."""
    names = base.manifest.elements if base else plan.resolved.base_elements
    # Of a cloud image of somebody else nothing is known but that it is a Debian.
    there = {element.name for element in elements.expand((OPERATING_SYSTEM, *names), plan.elements_path)}
    return tuple(element for element in plan.elements if element.name not in there and not element.built_in)


def _scripts(chosen: tuple[Element, ...], environment: dict[str, str]) -> Iterator[Step]:
    for element in chosen:
        files = element.files()
        # What scripts read beside themselves: all that is neither a hook nor a declaration.
        data = {name: digest for name, digest in files.items() if not re.match(r"[a-z-]+\.d/|static/|[^/]+$", name)}
        for name, digest in files.items():
            phase, _, script = name.partition("/")
            if phase in PHASES and os.access(element.path / name, os.X_OK):
                about = json.dumps([digest, data, environment], sort_keys=True)
                yield Step(phase, script, "script", digest=hashlib.sha256(about.encode()).hexdigest())


def _presets(chosen: tuple[Element, ...]) -> Iterator[tuple[str, bool]]:
    for element in chosen:
        for path in sorted((element.path / "static/usr/lib/systemd/system-preset").glob("*.preset")):
            for line in path.read_text().splitlines():
                if found := PRESET.fullmatch(line):
                    yield found[2], found[1] == "enable"


def write_bundle(plan: Plan, target: Path) -> Definition:
    """Write what write_play() does into one archive (.tar.gz). The same definition gives the same bytes.

    Args:
        plan: the plan of a platform's image.
        target: the file. It appears at once, whole; its folder is made.

    Raises:
        BakehouseError: an element's extra-data.d failed.
    """
    with tempfile.TemporaryDirectory(prefix="bakehouse-bundle-") as name:
        folder = Path(name) / "bundle"
        made = write_play(plan, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            _pack(folder, beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    return made


def write_play(plan: Plan, folder: Path, base: Resolved | None = None) -> Definition:
    """Write a definition and its files into a folder, and the play that applies them. See write_folder()."""
    made = write_folder(plan, folder, base)
    shutil.copytree(PLAY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "bakehouse-bootstrap*"))
    return made


def write_folder(plan: Plan, folder: Path, base: Resolved | None = None) -> Definition:
    """Write a definition and its files into a folder.

    Elements that fetch something on the builder (extra-data.d) do it now.

    Args:
        plan: the plan of a platform's image.
        folder: it must not be there.
        base: see of().

    Raises:
        BakehouseError: an element's extra-data.d failed.
    """
    made = of(plan, base)
    hooks = folder / "hooks"
    hooks.mkdir(parents=True)
    chosen = own_elements(plan, base)
    for element in chosen:
        _merge(element, hooks)
    _fetch_extra_data(chosen, hooks, made.environment)
    static = hooks / "static"
    if static.is_dir():
        with static.with_suffix(".tar").open("wb") as file:
            _archive((path for path in static.rglob("*") if path.is_symlink() or not path.is_dir()), static, file)
        shutil.rmtree(static)
    (folder / "definition.json").write_text(json.dumps(made.as_dict(), indent=1) + "\n")
    return made


def _merge(element: Element, hooks: Path) -> None:
    """Copy an element's files as diskimage-builder's generate_hooks does: all elements into the same folders."""
    for name in element.files():
        if "/" not in name:
            continue
        source, target = element.path / name, hooks / name
        target.parent.mkdir(parents=True, exist_ok=True)
        leads_out = source.is_symlink() and not source.resolve().is_relative_to(element.path.resolve())
        if source.is_symlink() and not (leads_out and source.is_file()):
            target.symlink_to(source.readlink())
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _fetch_extra_data(chosen: tuple[Element, ...], hooks: Path, environment: dict[str, str]) -> None:
    """Run what elements do on the builder before the root is entered."""
    scripts = sorted(path for path in hooks.glob("extra-data.d/*") if os.access(path, os.X_OK))
    # diskimage-builder gives them this function (lib/common-functions).
    array = " ".join(f'[{element.name}]="{element.path}"' for element in chosen)
    variables = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        **environment,
        "TMP_HOOKS_PATH": str(hooks),
        "DIB_PYTHON_EXEC": sys.executable,
        "BASH_FUNC_get_image_element_array%%": f"() {{ echo '{array}'\n}}",
    }
    for script in scripts:
        done = subprocess.run(
            [script], env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, timeout=EXTRA_DATA_SECONDS,
        )  # fmt: skip
        if done.returncode != 0:
            raise BakehouseError(
                f"extra-data.d/{script.name} ended with status {done.returncode}",
                hint="it fetches on this host what the node needs", log=(done.stdout + done.stderr)[-3000:],
            )  # fmt: skip
    shutil.rmtree(hooks / "extra-data.d", ignore_errors=True)


def _pack(folder: Path, target: Path) -> None:
    with target.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        _archive(folder.rglob("*"), folder, packed)


def _archive(paths: Iterable[Path], top: Path, file: IO[bytes] | gzip.GzipFile) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(paths):
            archive.add(path, str(path.relative_to(top)), recursive=False, filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = "root"
    return info
