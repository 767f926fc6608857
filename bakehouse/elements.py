"""diskimage-builder elements: which ones an image needs, which packages they install, what their files hold."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diskimage_builder.paths
from diskimage_builder import element_dependencies

from bakehouse import REPOSITORY
from bakehouse.errors import BakehouseError
from bakehouse.yamlfile import did_you_mean

OWN = REPOSITORY / "elements"
BUILT_IN = Path(diskimage_builder.paths.get_path("elements"))


@dataclass(frozen=True)
class Element:
    """One element, found on the search path."""

    name: str
    path: Path

    @property
    def built_in(self) -> bool:
        """Whether it is one of diskimage-builder's own, whose version stands for its files."""
        return self.path.parent == BUILT_IN

    def files(self) -> dict[str, str]:
        """Return a digest of each file, by its path in the element: the content and whether it is executable.

        A link that leads out of the element stands for the file that it leads to; any other is a file of the image, as
        is one with an absolute path, whatever this host has there.
        """
        found = {}
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if path.is_dir() and not path.is_symlink():
                continue
            if path.suffix in {".pyc", ".rst"} or path.name.endswith("~") or "__pycache__" in relative.parts:
                continue
            leads_out = not path.resolve().is_relative_to(self.path.resolve())
            if path.is_symlink() and (path.readlink().is_absolute() or not (leads_out and path.is_file())):
                content, kind = str(path.readlink()).encode(), "link"
            else:
                content, kind = path.read_bytes(), "run" if os.access(path, os.X_OK) else "file"
            found[str(relative)] = hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()
        return found


@dataclass(frozen=True)
class Package:
    """A package that an element asks for."""

    name: str
    element: str
    phase: str


def search_path(site: list[Path]) -> str:
    """Return ``ELEMENTS_PATH``: the site's folders, then Bakehouse's, then diskimage-builder's."""
    for place in site:
        if not place.is_dir():
            raise BakehouseError(f"the element folder {place} is not there", hint="see 'elements' in bakehouse.yaml")
    return ":".join(str(place) for place in [*site, OWN, BUILT_IN])


def expand(names: tuple[str, ...], path: str) -> tuple[Element, ...]:
    """Return the elements and all that they depend on, sorted by name.

    Raises:
        BakehouseError: an element is missing, none is an operating system, or two provide the same thing.
    """
    for name in names:
        must_be_known(name, path)
    try:
        # The public get_elements() would read every element folder anew.
        found = element_dependencies._expand_element_dependencies(list(dict.fromkeys(names)), _known(path))
    except element_dependencies.MissingElementException as error:
        raise BakehouseError(f"{error}, and an element of this image depends on it") from error
    except element_dependencies.MissingOSException as error:
        raise BakehouseError(
            f"none of the elements {', '.join(names) or '(there are none)'} is an operating system",
            hint="add 'debian-mmdebstrap', or extend a manifest that has it",
        ) from error
    except element_dependencies.AlreadyProvidedException as error:
        raise BakehouseError(f"two elements provide the same thing: {error}") from error
    return tuple(sorted((Element(e.name, Path(e.path)) for e in found), key=lambda e: e.name))


def must_be_known(name: str, path: str, where: str = "") -> None:
    """Raise where there is no element of this name.

    Args:
        name: the element.
        path: ``ELEMENTS_PATH``.
        where: the file and line that ask for it.

    Raises:
        BakehouseError: there is none.
    """
    known = _known(path)
    if name not in known:
        at = f"{where}: " if where else ""
        raise BakehouseError(
            f"{at}there is no element '{name}'{did_you_mean(name, sorted(known))}",
            hint=f"elements are looked for in {path}",
        )


@cache
def _known(path: str) -> dict[str, element_dependencies.Element]:
    # That a site's element comes before ours of the same name is what a search path is for: no warning.
    logging.getLogger(element_dependencies.__name__).setLevel(logging.ERROR)
    found: dict[str, element_dependencies.Element] = element_dependencies._find_all_elements(path)
    return found


def packages(elements: tuple[Element, ...], path: str, environment: dict[str, str]) -> tuple[Package, ...]:
    """Return what the elements' ``package-installs.yaml`` come to, by diskimage-builder's own reading.

    Packages that are taken out again by the end of the build are left out.

    Args:
        elements: the expanded elements.
        path: ``ELEMENTS_PATH``.
        environment: the variables that ``when:`` conditions look at.
    """
    script = BUILT_IN / "package-installs" / "bin" / "package-installs-squash"
    with tempfile.NamedTemporaryFile(prefix="bakehouse-packages-") as result:
        done = subprocess.run(
            [sys.executable, script, f"--elements={' '.join(e.name for e in elements)}", f"--path={path}", result.name],
            env={**os.environ, "ARCH": "amd64", **with_defaults(elements, environment)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise BakehouseError(
                f"an element's package-installs.yaml cannot be read: {''.join(reason)}",
                hint=f"check those of {', '.join(e.name for e in elements if not e.built_in)}",
            )
        phases = json.load(result)
    removed = {name for verbs in phases.values() for name, _ in verbs.get("uninstall", [])}
    found = {
        (_mapped(name, element, elements), element, phase)
        for phase, verbs in phases.items()
        for name, element in verbs.get("install", [])
        if name not in removed
    }
    return tuple(Package(name, element, phase) for names, element, phase in sorted(found) for name in names.split())


def with_defaults(elements: tuple[Element, ...], environment: dict[str, str]) -> dict[str, str]:
    """Return an environment after the elements' ``environment.d`` files, which hold their defaults."""
    files = sorted((f for e in elements for f in (e.path / "environment.d").glob("*")), key=lambda f: f.name)
    script = 'for file; do source "$file"; done >/dev/null 2>&1; env -0'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *map(str, files)],
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/root", "IMAGE_NAME": "image", **environment},
        capture_output=True,
        check=False,
    )
    pairs = (item.partition(b"=") for item in done.stdout.split(b"\0") if item)
    return {key.decode(): value.decode(errors="replace") for key, _, value in pairs} | environment


def _mapped(name: str, element: str, elements: tuple[Element, ...]) -> str:
    """Apply an element's ``pkg-map`` for Debian: distribution, then family, then default."""
    path = next((e.path for e in elements if e.name == element), Path()) / "pkg-map"
    if not path.is_file():
        return name
    table = json.loads(path.read_text())
    for part in (table.get("distro", {}).get("debian", {}), table.get("family", {}).get("debian", {})):
        if name in part:
            return str(part[name])
    return str(table.get("default", {}).get(name, name))
