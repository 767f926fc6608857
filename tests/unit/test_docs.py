"""What the documentation says is there, is there."""

from __future__ import annotations

import json
import re

from bakehouse import REPOSITORY, manifest
from bakehouse.manifest import Disk, Kubernetes, Manifest
from bakehouse.settings import Settings
from tasks import namespace


def test_every_setting_is_documented_with_its_variable() -> None:
    text = (REPOSITORY / "docs/settings.md").read_text()
    for name in Settings.model_fields:
        assert f"| `{name}` | `BAKEHOUSE_{name.upper()}` |" in text


def test_every_field_of_a_manifest_is_documented() -> None:
    text = (REPOSITORY / "docs/image-authors.md").read_text()
    names = [
        *Manifest.model_fields.keys() - {"disk", "kubernetes"},
        *(f"disk.{name}" for name in Disk.model_fields),
        *(f"kubernetes.{name}" for name in Kubernetes.model_fields),
    ]
    for name in names:
        assert f"| `{name}` |" in text


def test_every_task_that_the_read_me_names_exists() -> None:
    known = namespace.task_names
    everything = {*known, *(alias for aliases in known.values() for alias in aliases)}
    named = set(re.findall(r"`invoke ([a-z][a-z.]*)", (REPOSITORY / "README.md").read_text()))
    assert len(named) > 5
    assert named <= everything


def test_links_between_pages_lead_somewhere() -> None:
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_schema_for_editors_is_up_to_date() -> None:
    written = json.loads((REPOSITORY / "manifests/manifest.schema.json").read_text())
    assert written == json.loads(json.dumps(manifest.schema()))
