"""Plans that Packer bakes, and what its template is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bakehouse import cli, definition, packer_bake, plan
from bakehouse.errors import BakehouseError
from bakehouse.packer_bake import planned
from bakehouse.plan import Plan
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

SHA512 = f"sha512:{'ab' * 64}"
ADDRESS = "https://user:secret@images.example.org/debian-13.qcow2"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", cache=tmp_path / "cache")


@pytest.fixture
def store(settings: Settings) -> LocalStore:
    return LocalStore(settings.store)


def slurm(settings: Settings) -> Plan:
    return plan.make("slurm", settings)


def test_the_builder_and_its_base_are_inputs(settings: Settings, store: LocalStore) -> None:
    usual = slurm(settings)
    made = planned(usual, settings, store)
    assert made.digest != usual.digest
    assert made.origin is not None
    assert made.origin.name == "base"
    assert made.inputs["packer base"] == plan.make("base", settings).digest
    assert made.inputs.keys() >= usual.inputs.keys()
    assert {"builder packer/platform.json", "builder bootstrap/ansible/site.yml"} <= made.inputs.keys()
    assert planned(usual, settings, store).digest == made.digest
    assert made.as_dict()["builder"] == "packer"
    other = planned(usual, settings, store, base="debian-cloud")
    assert other.digest != made.digest


def test_all_but_the_root_itself_is_applied_to_somebody_elses_image(settings: Settings, store: LocalStore) -> None:
    made = planned(slurm(settings), settings, store, base=ADDRESS, checksum=SHA512)
    whole = definition.of(made, packer_bake._base_manifest(made))
    assert {"linux-image-cloud-amd64", "cloud-init", "slurmd", "openssh-server"} <= set(whole.packages)
    assert not [step.path for step in whole.steps if "20-apt-sources" in step.path]
    less = definition.of(slurm(settings))
    assert {step.path for step in less.steps} <= {step.path for step in whole.steps}


def test_an_image_of_an_address_is_known_by_its_checksum(settings: Settings, store: LocalStore) -> None:
    made = planned(slurm(settings), settings, store, base=ADDRESS, checksum=SHA512)
    assert made.inputs["packer base"] == SHA512
    assert "secret" not in json.dumps(made.as_dict())
    # Of what others made nothing is ours.
    assert packer_bake._base_manifest(made).manifest.elements == []
    moved = planned(slurm(settings), settings, store, base="https://elsewhere.example.org/x.qcow2", checksum=SHA512)
    assert moved.digest == made.digest


@pytest.mark.parametrize(
    ("base", "checksum", "message"),
    [
        (ADDRESS, "", "images.example.org/debian-13.qcow2 needs a checksum"),
        (ADDRESS, "md5:abc", "--base-checksum 'md5:abc' is no checksum"),
        ("base", SHA512, "--base-checksum is for a base at an address"),
        ("no-such", "", "there is no image 'no-such'"),
        ("slurm", "", "slurm cannot be its own base"),
    ],
)
def test_a_base_that_cannot_be_is_refused(
    settings: Settings, store: LocalStore, base: str, checksum: str, message: str
) -> None:
    with pytest.raises(BakehouseError) as caught:
        planned(slurm(settings), settings, store, base=base, checksum=checksum)
    assert message in caught.value.message
    assert "secret" not in str(caught.value)


def test_a_platform_with_the_generic_kernel_needs_a_base_with_it(settings: Settings, store: LocalStore) -> None:
    wanted = plan.make("roce", settings)
    with pytest.raises(BakehouseError, match="roce needs the generic kernel") as caught:
        planned(wanted, settings, store)
    assert caught.value.hint == "--base debian-generic"
    planned(wanted, settings, store, base="debian-generic")


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [("vagrant", "", "--builder vagrant is none"), ("dib", "base", "--base, --base-checksum and --in-cloud are for")],
)
def test_flags_that_do_not_fit_are_refused(settings: Settings, name: str, base: str, message: str) -> None:
    with pytest.raises(BakehouseError, match=message):
        cli._make_plan("slurm", settings, LocalStore(settings.store), "", "", cli.Builder(name, base))


@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        ("deb http://127.0.0.1:3142/debian trixie main", "deb http://10.0.2.2:3142/debian trixie main"),
        ("http://me:pw@localhost:8000/", "http://me:pw@10.0.2.2:8000/"),
        ("deb https://deb.debian.org/debian trixie main", "deb https://deb.debian.org/debian trixie main"),
        ("", ""),
    ],
)
def test_the_machine_has_another_name_for_the_hosts_loopback(outside: str, inside: str) -> None:
    assert packer_bake._from_inside(outside) == inside


def test_a_definition_may_be_packages_only(settings: Settings, tmp_path: Path) -> None:
    from bakehouse import definition

    (tmp_path / "small.yaml").write_text("extends: base\npackages: [tree]\n")
    made = plan.make("small", settings.model_copy(update={"manifests": [tmp_path]}))
    assert definition.of(made).packages == ("tree",)
