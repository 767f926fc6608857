"""Pipelines that run nights, for the CI systems that sites have: one definition, a template for each system."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from bakehouse import REPOSITORY
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError

TEMPLATES = REPOSITORY / "ci" / "templates"

FILES = {
    "gitlab": ("gitlab/.gitlab-ci.yml",),
    "gitlab-images": ("gitlab/images.yml",),
    "github": ("github/bakehouse-nightly.yml",),
    "zuul": ("zuul/zuul.yaml", "zuul/playbooks/nightly.yaml", "zuul/playbooks/results.yaml"),
    "systemd": ("systemd/bakehouse-nightly.service", "systemd/bakehouse-nightly.timer"),
}
"""By system: the files, below ci/. Each is made from the template of its name with ``.j2``."""

COPIES = ("gitlab", "github", "zuul", "systemd")
"""Systems of which ci/ holds the files, of EXAMPLE. The child pipeline of GitLab is made anew by each pipeline."""


@dataclass(frozen=True)
class Pipeline:
    """What all systems are told."""

    images: tuple[str, ...]
    """Manifests: each is a job where the system runs several at once."""
    hour: int = 2
    minute: int = 17
    """When it begins; what is full in a UTC day of most sites is the top of the hour."""
    timeout_minutes: int = 180
    keep_days: int = 30
    """How long summaries and SBOMs are kept by the CI system."""
    cloud: str = "mycloud"
    """As in clouds.yaml."""
    runner: str = "bakehouse"
    """Label or tag of the machines that can bake; of Zuul, the node label."""
    folder: str = "/opt/bakehouse"
    """Where the checkout is, for systemd."""


EXAMPLE = Pipeline(images=("slurm", "kubernetes", "roce"))


def parse_time(text: str) -> tuple[int, int]:
    """Read a time of day.

    Args:
        text: such as 02:17.

    Raises:
        BakehouseError: it is none.
    """
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text)
    if not match:
        raise BakehouseError(f"--at {text}: it is a time of day such as 02:17")
    return int(match[1]), int(match[2])


def render(pipeline: Pipeline, system: str) -> dict[str, str]:
    """Return the files of a system, by their path below ci/.

    Args:
        pipeline: the definition.
        system: see FILES.

    Raises:
        BakehouseError: there is no such system, or a name does not fit into such files.
    """
    if system not in FILES:
        raise BakehouseError(f"--system {system}: it is one of {', '.join(FILES)}")
    for name in (*pipeline.images, pipeline.cloud, pipeline.runner):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise BakehouseError(f"'{name}' cannot stand in a pipeline", hint="letters, digits, dots, dashes")
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - no HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        # The systems' own braces stand in these files.
        variable_start_string="<<",
        variable_end_string=">>",
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    facts = dataclasses.asdict(pipeline)
    return {name: environment.get_template(f"{name}.j2").render(facts) for name in FILES[system]}


def write(files: dict[str, str], folder: Path) -> list[Path]:
    """Write files below a folder. Return their paths.

    Raises:
        BakehouseError: one cannot be written.
    """
    written = []
    for name, text in files.items():
        path = folder / name
        try:
            write_atomically(path, text)
        except OSError as error:
            raise BakehouseError(f"{path} cannot be written: {error.strerror}") from error
        written.append(path)
    return written
