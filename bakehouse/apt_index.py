"""What the mirrors offer now: their package indexes, fetched and checked by apt in a folder of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bakehouse import lock, run
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.sbom import Package, is_older

HOST_KEYS = (Path("/etc/apt/trusted.gpg.d"), Path("/usr/share/keyrings/debian-archive-keyring.gpg"))
"""Whose signatures count: those that this host's apt trusts, and Debian's where the host is another system."""

SECURITY = "-security"
"""How the suites of Debian's security archive end."""

COLUMNS = 3
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Offer:
    """A version of a package that a mirror has."""

    version: str
    suite: str

    @property
    def security(self) -> bool:
        """Whether it comes from the security archive."""
        return self.suite.endswith(SECURITY)


@dataclass(frozen=True)
class Newer:
    """A package of an image of which a mirror has a newer version."""

    name: str
    source: str
    """The source package."""
    has: str
    offered: str
    suite: str
    security: bool


@dataclass(frozen=True)
class Index:
    """What the mirrors of one release offer."""

    offers: Mapping[str, tuple[Offer, ...]]
    """By package name; one offer for each suite that has the package."""

    def newer(self, bill: Mapping[str, Package]) -> list[Newer]:
        """Return what is newer here than in an image, security first, then by name.

        Args:
            bill: the image's packages, see sbom.read(). Those that did not come from Debian are not compared: another
                archive may have a package of the same name.
        """
        found = []
        for package in bill.values():
            if package.origin and not package.origin.startswith("Debian"):
                continue
            best: Offer | None = None
            for offer in self.offers.get(package.name, ()):
                than = best.version if best else package.version
                if offer.version != than and is_older(than, offer.version):
                    best = offer
            if best:
                # The highest version may come by a point release that took an older security update in.
                security = any(
                    offer.security and is_older(package.version, offer.version) for offer in self.offers[package.name]
                )
                found.append(Newer(package.name, package.source, package.version, best.version, best.suite, security))
        return sorted(found, key=lambda one: (not one.security, one.name))


def fetch(sources: Sequence[str], folder: Path, architecture: str = "amd64") -> Index:
    """Fetch what mirrors offer. What has not changed since the last time is not fetched again.

    Args:
        sources: lines of sources.list(5), such as Plan.sources() gives.
        folder: apt's own files are kept below it.
        architecture: Debian's name of it.

    Raises:
        BakehouseError: a mirror cannot be reached, or what it has is not whole: half updated, badly signed, expired.
    """
    text = "".join(f"{line}\n" for line in sources)
    own = folder / hashlib.sha256(f"{architecture}\n{text}".encode()).hexdigest()[:16]
    with lock.held(folder / f"{own.name}.lock", "the package index", wait=True, say=lambda _text: None):
        options = _options(own, text, architecture)
        done = _apt([*options, "update"])
        lines = [line for line in f"{done.stdout}{done.stderr}".splitlines() if line.startswith(("E:", "W:", "Err:"))]
        if done.returncode:
            raise BakehouseError(
                f"what the mirror offers cannot be told: {_why(lines)}",
                hint="a mirror that is half updated is whole again in some minutes; `invoke doctor` names the mirrors",
                log=run.redact("\n".join(lines)),
            )
        offers: dict[str, dict[str, Offer]] = {}
        for path, suite in _lists(options):
            for name, version in _packages(path):
                before = offers.setdefault(name, {}).get(suite)
                if before is None or (before.version != version and is_older(before.version, version)):
                    offers[name][suite] = Offer(version, suite)
    return Index({name: tuple(found.values()) for name, found in offers.items()})


def _options(own: Path, sources: str, architecture: str) -> list[str]:
    """Return the options with which apt works in a folder, which is made ready for it."""
    for name in ("lists/partial", "archives/partial", "keys"):
        (own / name).mkdir(parents=True, exist_ok=True)
    write_atomically(own / "sources.list", sources, mode=0o600)
    (own / "status").touch()
    for place in HOST_KEYS:
        for key in sorted(place.iterdir()) if place.is_dir() else [place]:
            link = own / "keys" / key.name
            if key.exists() and not link.is_symlink():
                link.symlink_to(key)
    values = {
        "APT::Architecture": architecture,
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        # They are read as text.
        "Acquire::GzipIndexes": "false",
        "Dir::Cache": str(own),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::SourceList": str(own / "sources.list"),
        "Dir::Etc::SourceParts": "-",
        "Dir::Etc::Trusted": "-",
        "Dir::Etc::TrustedParts": str(own / "keys"),
        "Dir::State": str(own),
        "Dir::State::lists": str(own / "lists"),
        "Dir::State::status": str(own / "status"),
    }
    return [word for name, value in values.items() for word in ("-o", f"{name}={value}")] + [
        "-o", f"APT::Architectures::={architecture}",
    ]  # fmt: skip


def _apt(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = run.build_environment({"LC_ALL": "C.UTF-8"})
    try:
        return subprocess.run(
            ["apt-get", *words], env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError as error:
        raise BakehouseError("this host has no apt-get", hint="apt install apt, or bake on a Debian host") from error
    except subprocess.TimeoutExpired as error:
        raise BakehouseError(
            f"the mirror has not answered for {TIMEOUT_SECONDS} s", hint="`invoke doctor` names the mirrors"
        ) from error


def _why(lines: Sequence[str]) -> str:
    errors = [line.removeprefix("E:").strip() for line in lines if line.startswith("E:")]
    general = "Some index files failed to download"
    told = [line for line in errors if not line.startswith(general)] or errors or ["apt-get says nothing"]
    return run.redact(told[0])


def _lists(options: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files of packages that apt has, each with its suite as sources.list names it."""
    form = "$(FILENAME)|$(RELEASE)|$(COMPONENT)"
    done = _apt([*options, "indextargets", "--format", form, "Created-By: Packages"])
    for line in done.stdout.splitlines():
        columns = line.split("|")
        if len(columns) == COLUMNS and Path(columns[0]).exists():
            yield Path(columns[0]), columns[1]


def _packages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and version of each package of a file of an archive (deb-control(5); a paragraph a package)."""
    name = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Package: "):
                name = line[9:].strip()
            elif line.startswith("Version: ") and name:
                yield name, line[9:].strip()
                name = ""


def as_rows(newer: Sequence[Newer]) -> list[dict[str, object]]:
    """Return plain data, for JSON."""
    return [dataclasses.asdict(one) for one in newer]
