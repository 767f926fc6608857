"""Choosing an image, and lock files."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bakehouse import channel, pin
from bakehouse.errors import BakehouseError
from bakehouse.pin import Pin
from bakehouse.published import Catalogue
from tests.unit.test_channel import TAGS, cloud_with

ID = "8f4a8d34-7c15-51db-bd63-1b5519d6f857"
PIN = Pin(platform="slurm-gpu", channel="stable", tag=TAGS[0], id=ID, name=f"slurm-gpu-{TAGS[0]}", sha512="a" * 128,
          cloud="here", region="R1")  # fmt: skip


def test_machines_read_what_is_printed() -> None:
    assert pin.render(PIN, "id") == ID
    assert pin.render(PIN, "name") == PIN.name
    assert json.loads(pin.render(PIN, "json")) == yaml.safe_load(pin.render(PIN, "yaml")) == PIN.model_dump()
    wanted = {"slurm_gpu_image_id": ID, "slurm_gpu_image_name": PIN.name, "slurm_gpu_image_tag": TAGS[0],
              "slurm_gpu_image_sha512": PIN.sha512}  # fmt: skip
    assert yaml.safe_load(pin.render(PIN, "ansible")) == wanted
    lines = dict(line.split(" = ") for line in pin.render(PIN, "tfvars").splitlines())
    assert {key: json.loads(value) for key, value in lines.items()} == wanted


def test_a_shell_reads_the_variables() -> None:
    odd = PIN.model_copy(update={"name": "a 'b' $c"})
    script = pin.render(odd, "env") + '\nprintf %s "$SLURM_GPU_IMAGE_NAME"'
    assert subprocess.check_output(["bash", "-c", script], text=True) == odd.name
    assert shlex.split(pin.render(odd, "env"))


def test_terraform_takes_no_template_from_it() -> None:
    odd = PIN.model_copy(update={"name": '${file("x")} "y" %{if}'})
    (line,) = [line for line in pin.render(odd, "tfvars").splitlines() if "_name" in line]
    assert line == r'slurm_gpu_image_name = "$${file(\"x\")} \"y\" %%{if}"'


def test_a_format_that_is_none_is_told() -> None:
    with pytest.raises(BakehouseError, match="--format jsn: it is one of id, name, json"):
        pin.render(PIN, "jsn")


def test_one_image_is_chosen_by_channel_or_tag() -> None:
    cloud = cloud_with(*TAGS[:2])
    channel.promote(cloud, "", TAGS[0], "stable")
    catalogue = Catalogue.read(cloud)
    assert pin.choose(catalogue, "slurm", channel_name="stable").tag == TAGS[0]
    assert pin.choose(catalogue, "slurm", tag=TAGS[1][:8]).tag == TAGS[1]
    for name, options, said in (
        ("slrum", {"channel_name": "stable"}, "no image of 'slrum' .did you mean 'slurm'"),
        ("slurm", {"channel_name": "stabel"}, "no image of slurm is in the channel 'stabel'"),
        ("slurm", {"tag": "2026"}, "fits 2 images"),
        ("slurm", {"tag": ""}, "no image of slurm is in the channel ''"),
        ("other", {"tag": TAGS[0]}, "is an image of slurm, not of other"),
    ):
        with pytest.raises(BakehouseError, match=said):
            pin.choose(catalogue, name, **options)


def test_what_is_not_whole_is_not_chosen() -> None:
    cloud = cloud_with(TAGS[0])
    cloud.images[f"slurm-{TAGS[0]}"]["bakehouse_state"] = "incoming"
    with pytest.raises(BakehouseError, match="did not come to its end"):
        pin.choose(Catalogue.read(cloud), "slurm", tag=TAGS[0])


# Lock files.


def test_a_lock_file_holds_one_image_a_platform_and_cloud(tmp_path: Path) -> None:
    path = tmp_path / "deploy" / pin.FILE_NAME
    assert pin.write(path, PIN) == (None, True)
    assert pin.write(path, PIN) == (PIN, False)
    newer = PIN.model_copy(update={"tag": TAGS[1]})
    assert pin.write(path, newer) == (PIN, True)
    elsewhere = PIN.model_copy(update={"region": "R2"})
    assert pin.write(path, elsewhere) == (None, True)
    assert pin.read(path).images == [newer, elsewhere]
    assert path.read_text().startswith("# Images that this deployment uses.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("images:\n- platform: slurm\n  tgg: x\n", r"unknown key 'images\.0\.tgg'"),
        ("images: 3\n", "images: "),
        ("- a\n", "holds a list"),
        ("images: [{platform: s, tag: t, id: nonsense, name: n, sha512: '', cloud: c}]\n", r"images\.0\.id"),
    ],
)
def test_a_lock_file_that_is_none_is_told_and_left_alone(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / pin.FILE_NAME
    path.write_text(text)
    with pytest.raises(BakehouseError, match=said):
        pin.write(path, PIN)
    assert path.read_text() == text


def test_a_lock_file_that_is_missing_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="is not there") as caught:
        pin.read(tmp_path / pin.FILE_NAME)
    assert "invoke pin" in caught.value.hint


def test_every_state_of_a_pin_is_told() -> None:
    cloud = cloud_with(*TAGS[:2])
    identity = f"slurm-{TAGS[0]}"
    image = cloud.images[identity]
    image |= {"os_hash_algo": "sha512", "os_hash_value": "a" * 128, "bakehouse_sha512": "a" * 128}
    channel.promote(cloud, "", TAGS[0], "stable")
    entry = Pin.model_construct(**PIN.model_dump() | {"platform": "slurm", "id": identity})

    def state(of: Pin = entry) -> str:
        return pin.check(of, Catalogue.read(cloud)).state

    assert state() == "ok"
    image["os_hidden"] = True
    assert state() == "hidden"
    channel.promote(cloud, "", TAGS[1], "stable")
    assert state() == "behind"
    assert state(entry.model_copy(update={"channel": ""})) == "hidden"
    image["status"] = "deactivated"
    assert state() == "unusable"
    image["os_hash_value"] = "b" * 128
    assert state() == "altered"
    image |= {"os_hash_value": "a" * 128, "bakehouse_tag": "20200101-0000000"}
    assert state() == "altered"
    del cloud.images[identity]
    assert state() == "gone"
