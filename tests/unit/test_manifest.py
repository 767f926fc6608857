"""Manifests: what they may hold, how one builds on another, and how their faults are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bakehouse import REPOSITORY, manifest, yamlfile
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Manifest, Resolved
from bakehouse.yamlfile import Document

SHIPPED = sorted((REPOSITORY / "manifests").glob("*.yaml"))


class Manifests:
    """A folder of manifests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(text)
        return path

    def resolve(self, name: str, **overrides: Any) -> Resolved:
        return manifest.resolve(name, [self.folder], overrides or None)

    def refused(self, name: str, **overrides: Any) -> BakehouseError:
        with pytest.raises(BakehouseError) as caught:
            self.resolve(name, **overrides)
        return caught.value


@pytest.fixture
def written(tmp_path: Path) -> Manifests:
    return Manifests(tmp_path)


# What one manifest may hold.


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("pakages: [munge]", "2: unknown key 'pakages' (did you mean 'packages'?)"),
        ("disk:\n  root_sise: 4GiB", "3: unknown key 'disk.root_sise' (did you mean 'root_size'?)"),
        ("disk: 4GiB", "2: disk: Input should be a valid dictionary"),
        (
            "disk:\n  root_size: 4 GB",
            "3: disk.root_size: must be 'auto' or a size such as 512MiB or 4GiB (it is '4 GB')",
        ),
        ("disk:\n  root_size: 1.5GiB", "3: disk.root_size: must be 'auto' or a size"),
        ("disk:\n  root_size: -4GiB", "3: disk.root_size: must be 'auto' or a size"),
        ("disk:\n  root_size: 0GiB", "3: disk.root_size: "),
        ("disk:\n  root_size: 4294967296", "3: disk.root_size: must be 'auto' or a size"),
        (
            "disk:\n  firmware:\n  - bios\n  - efi",
            "5: disk.firmware.1: 'efi' is not one of bios, uefi (did you mean 'uefi'?)",
        ),
        ("disk: {formats: []}", "2: disk.formats: List should have at least 1 item"),
        (
            "disk: {compression: zst}",
            "2: disk.compression: 'zst' is not one of zstd, zlib, none (did you mean 'zstd'?)",
        ),
        ("platform: slrum", "2: platform: 'slrum' is not one of slurm, kubernetes, roce, base (did you mean 'slurm'?)"),
        ("kernel: generics", "2: kernel: 'generics' is not one of cloud, generic (did you mean 'generic'?)"),
        ("distribution: ubuntu", "2: distribution: 'ubuntu' is not one of debian"),
        ("packages: munge", "2: packages: Input should be a valid list (it is 'munge')"),
        ("packages:\n- munge\n- Slurmd", "4: packages.1: is not the name of a Debian package (it is 'Slurmd')"),
        ("packages: ['munge; reboot']", "2: packages.0: is not the name of a Debian package"),
        ("elements: [../evil]", "2: elements.0: is not the name of an element"),
        ("environment: {PATH: /x}", "2: environment.PATH"),
        ("environment:\n  DIB_X: 1", "3: environment.DIB_X: Input should be a valid string (it is 1)"),
        ("kernel_arguments: ['a b']", "2: kernel_arguments.0: may hold letters, digits"),
        ("kernel_arguments: ['$(x)']", "2: kernel_arguments.0: may hold letters, digits"),
        ("snapshot: yesterday", "2: snapshot: must be a time such as 20261101T000000Z (it is 'yesterday')"),
        ("snapshot: 2026", "2: snapshot: Input should be a valid string (it is 2026)"),
    ],
)
def test_a_fault_is_named_by_file_line_and_field(written: Manifests, text: str, fault: str) -> None:
    path = written.write("m", f"release: trixie\n{text}\n")
    assert written.refused("m").message.startswith(f"{path}:{fault}")


@pytest.mark.parametrize(
    ("release", "fault"),
    [
        ("trixy", "'trixy' is not one of trixie, bookworm (did you mean 'trixie'?)"),
        ("11", "'11' is not one of trixie, bookworm"),
        ("[trixie]", "is not one of trixie, bookworm"),
    ],
)
def test_a_release_that_is_not_known_is_refused(written: Manifests, release: str, fault: str) -> None:
    path = written.write("m", f"kernel: cloud\nrelease: {release}\n")
    message = written.refused("m").message
    assert message.startswith(f"{path}:2: release: ")
    assert fault in message


@pytest.mark.parametrize(
    ("written_as", "release"),
    [("trixie", "trixie"), ("13", "trixie"), ("'13'", "trixie"), ("bookworm", "bookworm"), ("12", "bookworm")],
)
def test_a_release_goes_by_name_or_number(written: Manifests, written_as: str, release: str) -> None:
    written.write("m", f"release: {written_as}\n")
    assert written.resolve("m").manifest.release == release


@pytest.mark.parametrize(
    ("text", "size"),
    [("auto", None), ("512MiB", 512 << 20), ("4GiB", 4 << 30), ("4 GiB", 4 << 30), ("1TiB", 1 << 40)],
)
def test_a_size_is_a_number_with_its_unit(text: str, size: int | None) -> None:
    assert manifest.parse_size(text) == size


@pytest.mark.parametrize("package", ["munge", "libc6:amd64", "slurmd=24.11.5-4+deb13u1~bpo1", "g++"])
def test_a_package_may_have_an_architecture_and_a_version(written: Manifests, package: str) -> None:
    written.write("m", f"release: trixie\npackages: ['{package}']\n")
    assert written.resolve("m").manifest.packages == [package]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"release: trixie\nrelease: bookworm\n", r"m.yaml:2: 'release' stands twice"),
        (b"release: [trixie\n", r"m.yaml:2: not valid YAML"),
        (b"- trixie\n", r"m.yaml:1: holds a list, not a mapping"),
        (b"description: caf\xe9\n", r"m.yaml is not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(written: Manifests, content: bytes, reason: str) -> None:
    (written.folder / "m.yaml").write_bytes(content)
    with pytest.raises(BakehouseError, match=reason):
        written.resolve("m")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "4GiB", "trixie", "12", "qcow2", "bios", "20261101T000000Z", "munge"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*manifest.Disk.model_fields, "DIB_X", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS: st.SearchStrategy[Any] = (
    st.sampled_from([*Manifest.model_fields]) | st.text(max_size=10) | st.integers() | st.booleans() | st.none()
)


@hypothesis_settings(max_examples=150, deadline=None, database=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_mapping_is_a_manifest_or_gives_a_bakehouse_error(data: dict[str, Any]) -> None:
    try:
        found = yamlfile.check(Manifest, Document(Path("any.yaml"), data))
    except BakehouseError as error:
        assert error.message.startswith("any.yaml:1: ")
    else:
        assert set(data) <= set(Manifest.model_fields)
        assert found.release in {None, "trixie", "bookworm"}


# Where manifests are.


def test_a_manifest_of_the_site_comes_before_the_shipped_one(written: Manifests) -> None:
    path = written.write("slurm", "release: bookworm\n")
    found = manifest.find_all(manifest.folders([written.folder]))
    assert found["slurm"] == path
    assert found["debian-13"] == REPOSITORY / "manifests" / "debian-13.yaml"


def test_a_manifest_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match=f"the manifest folder {tmp_path}/none is not there") as caught:
        manifest.find_all([tmp_path / "none"])
    assert "bakehouse.yaml" in caught.value.hint


def test_a_manifest_that_is_not_there_is_guessed(written: Manifests) -> None:
    written.write("slurm", "release: trixie\n")
    written.write("base", "release: trixie\n")
    error = written.refused("slrum")
    assert error.message == "there is no manifest 'slrum' (did you mean 'slurm'?)"
    assert error.hint == "known manifests: base, slurm"


def test_a_manifest_without_a_release_is_refused(written: Manifests) -> None:
    written.write("base", "kernel: cloud\n")
    path = written.write("m", "extends: base\n")
    error = written.refused("m")
    assert error.message == f"{path}:1: neither m nor what it extends sets 'release'"
    assert error.hint == "add 'release: trixie'"


# How one builds on another.


def test_a_manifest_that_extends_itself_is_refused(written: Manifests) -> None:
    path = written.write("m", "release: trixie\nextends: m\n")
    assert written.refused("m").message == f"{path}:2: extends: m -> m goes in a circle"


def test_a_circle_is_shown_in_its_order(written: Manifests) -> None:
    written.write("a", "extends: b\n")
    written.write("b", "extends: c\n")
    path = written.write("c", "release: trixie\nextends: a\n")
    assert written.refused("a").message == f"{path}:2: extends: a -> b -> c -> a goes in a circle"


def test_an_extended_manifest_that_is_not_there_is_named_by_who_asks(written: Manifests) -> None:
    written.write("debian", "release: trixie\n")
    path = written.write("m", "platform: slurm\nextends: debain\n")
    error = written.refused("m")
    assert error.message == f"{path}:2: there is no manifest 'debain' (did you mean 'debian'?)"


@pytest.mark.parametrize("fault", ["pakages: [x]", "kernel: cluod", "disk: {root_size: big}"])
def test_a_fault_of_an_extended_manifest_names_that_file_and_line(written: Manifests, fault: str) -> None:
    base = written.write("base", f"release: trixie\n\n{fault}\n")
    written.write("middle", "extends: base\n")
    written.write("m", "extends: middle\nkernel: generic\ndisk: {root_size: 4GiB}\n")
    assert written.refused("m").message.startswith(f"{base}:3: ")


def test_lists_are_appended_without_repeats(written: Manifests) -> None:
    written.write("base", "release: trixie\npackages: [a1, b1]\nelements: [one]\nkernel_arguments: [quiet]\n")
    written.write("middle", "extends: base\npackages: [c1, a1]\n")
    written.write("m", "extends: middle\npackages: [d1, b1, e1]\nelements: [two, one]\nkernel_arguments: [nosmt]\n")
    found = written.resolve("m")
    assert found.manifest.packages == ["a1", "b1", "c1", "d1", "e1"]
    assert found.manifest.elements == ["one", "two"]
    assert found.manifest.kernel_arguments == ["quiet", "nosmt"]
    assert found.chain == ("base", "middle", "m")
    assert found.base_elements == ("one",)


def test_mappings_are_merged(written: Manifests) -> None:
    written.write("base", "release: trixie\nenvironment: {DIB_A: '1', DIB_B: '1'}\ndisk: {root_size: 4GiB}\n")
    written.write("m", "extends: base\nenvironment: {DIB_B: '2', DIB_C: '2'}\ndisk: {compression: zlib}\n")
    found = written.resolve("m").manifest
    assert found.environment == {"DIB_A": "1", "DIB_B": "2", "DIB_C": "2"}
    assert (found.disk.root_size, found.disk.compression) == (4 << 30, "zlib")


def test_other_values_replace(written: Manifests) -> None:
    written.write("base", "release: trixie\nkernel: generic\nplatform: slurm\nsnapshot: 20260101T000000Z\n")
    written.write("m", "extends: base\nrelease: 12\nplatform: roce\nsnapshot: null\n")
    found = written.resolve("m").manifest
    assert (found.release, found.platform, found.kernel, found.snapshot) == ("bookworm", "roce", "generic", None)


def test_firmware_and_formats_are_choices_that_replace(written: Manifests) -> None:
    written.write("base", "release: trixie\ndisk: {firmware: [bios], formats: [qcow2, raw]}\n")
    written.write("m", "extends: base\ndisk: {firmware: [uefi], formats: [raw]}\n")
    found = written.resolve("m").manifest
    assert (found.disk.firmware, found.disk.formats) == (["uefi"], ["raw"])


def test_a_description_is_a_manifests_own(written: Manifests) -> None:
    written.write("base", "release: trixie\ndescription: the base\n")
    written.write("m", "extends: base\n")
    assert written.resolve("m").manifest.description == ""
    assert written.resolve("base").manifest.description == "the base"


def test_the_command_line_wins(written: Manifests) -> None:
    written.write("base", "release: trixie\ndisk: {root_size: 4GiB}\n")
    written.write("m", "extends: base\nrelease: trixie\ndisk: {formats: [qcow2]}\n")
    found = written.resolve("m", release="12", disk={"formats": ["raw", "qcow2"]}).manifest
    assert found.release == "bookworm"
    assert found.disk.formats == ["raw", "qcow2"]
    assert found.disk.root_size == 4 << 30


def test_a_fault_of_the_command_line_is_called_so(written: Manifests) -> None:
    written.write("m", "release: trixie\n")
    message = written.refused("m", release="trixy").message
    assert message.startswith("command line")
    assert message.endswith("release: 'trixy' is not one of trixie, bookworm (did you mean 'trixie'?)")


def test_merged_fields_remember_the_files_that_they_came_from(written: Manifests) -> None:
    base = written.write("base", "release: trixie\npackages:\n- a1\n- b1\ndisk:\n  root_size: 4GiB\n")
    own = written.write("m", "extends: base\npackages:\n- a1\n- c1\n")
    document = written.resolve("m").document
    assert document.where(("release",)) == f"{base}:1"
    assert document.where(("packages", 1)) == f"{base}:4"
    assert document.where(("packages", 2)) == f"{own}:4"
    assert document.where(("disk", "root_size")) == f"{base}:6"
    assert document.where(("platform",)) == f"{own}:1"


# The schema for editors.


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(manifest.schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_manifest_fits_the_schema_and_resolves(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), manifest.schema())
    assert manifest.resolve(path.stem, manifest.folders([])).manifest.release


@pytest.mark.parametrize(
    "data",
    [
        {"pakages": ["munge"]},
        {"disk": {"root_sise": "4GiB"}},
        {"packages": "munge"},
        {"platform": "slrum"},
        {"release": "sid"},
        {"disk": {"formats": []}},
    ],
)
def test_the_schema_refuses_what_a_manifest_may_not_hold(data: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, manifest.schema())
    with pytest.raises(BakehouseError):
        yamlfile.check(Manifest, Document(Path("m.yaml"), data))


@pytest.mark.parametrize(
    "data",
    [
        {"extends": "debian-13", "disk": {"root_size": "auto", "firmware": ["uefi"]}, "environment": {"DIB_X": "1"}},
        {"release": 13},
        {"release": "12"},
    ],
)
def test_the_schema_takes_what_a_manifest_may_hold(data: dict[str, Any]) -> None:
    yamlfile.check(Manifest, Document(Path("m.yaml"), data))
    jsonschema.validate(data, manifest.schema())
