"""clouds.yaml: what is added goes away again, and all else stays as it was, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bakehouse import clouds_yaml
from bakehouse.errors import BakehouseError

ENTRY: dict[str, object] = {"auth": {"auth_url": "http://127.0.0.1:1/v3", "secret": "a: #b"}, "region_name": "R"}

FILES = [
    "",
    "clouds:\n",
    "clouds:\n  mine:\n    auth: {auth_url: x}\n",
    "# mine\n\nclouds: # all\n\n    # the first\n    mine:\n        region_name: 'a'   # odd\n\nother: [1, 2]\n",
    "cache:\n  expiration: 5\nclouds:\n  mine: {}\n",
    "cache:\n  expiration: 5",
]


@pytest.mark.parametrize("text", FILES)
def test_an_entry_comes_and_goes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "openstack" / "clouds.yaml"
    if text:
        path.parent.mkdir()
        path.write_text(text)
    before = yaml.safe_load(text) or {}
    for name in ("one", "two", "one"):
        clouds_yaml.add(path, name, ENTRY)
    wanted = {**(before.get("clouds") or {}), "one": ENTRY, "two": ENTRY}
    assert yaml.safe_load(path.read_text()) == {**before, "clouds": wanted}
    for line in text.splitlines():
        assert line in path.read_text().splitlines()
    assert clouds_yaml.remove(path, "one")
    assert not clouds_yaml.remove(path, "one")
    assert clouds_yaml.remove(path, "two")
    after = path.read_text() if path.exists() else ""
    if "clouds:" in text and text != "clouds:\n":
        assert after == text
    else:
        assert not (yaml.safe_load(after) or {}).get("clouds")


def test_a_file_with_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    path, said = tmp_path / "clouds.yaml", list[str]()
    clouds_yaml.add(path, "one", ENTRY, said.append)
    assert path.stat().st_mode & 0o777 == 0o600
    assert said == []
    path.chmod(0o644)
    clouds_yaml.add(path, "two", ENTRY, said.append)
    assert path.stat().st_mode & 0o777 == 0o600
    (line,) = said
    assert str(path) in line
    assert "it was 644" in line


def test_a_link_stays_one(tmp_path: Path) -> None:
    """Some keep clouds.yaml in a folder of their own and link to it."""
    target, path = tmp_path / "dotfiles" / "clouds.yaml", tmp_path / "clouds.yaml"
    target.parent.mkdir()
    target.write_text("clouds:\n")
    path.symlink_to(target)
    clouds_yaml.add(path, "one", ENTRY)
    assert path.is_symlink()
    assert clouds_yaml.names(target) == ["one"]
    assert target.stat().st_mode & 0o777 == 0o600
    assert clouds_yaml.remove(path, "one")
    assert path.is_symlink()
    assert target.read_text() == "clouds:\n"


def test_somebody_elses_entry_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text("clouds:\n  one: {region_name: mine}\n")
    with pytest.raises(BakehouseError, match="has a cloud 'one' already"):
        clouds_yaml.add(path, "one", ENTRY)
    assert not clouds_yaml.remove(path, "one")
    assert "mine" in path.read_text()


@pytest.mark.parametrize(
    "text",
    ["clouds: {}\n", "clouds: {mine: {}}\n", "'clouds':\n  mine: {}\n", "- a\n", "a: [\n", "clouds: &x\n  m: {}\n"],
)
def test_a_file_of_another_shape_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text(text)
    with pytest.raises(BakehouseError):
        clouds_yaml.add(path, "one", ENTRY)
    assert path.read_text() == text


def test_the_file_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As openstacksdk finds it: it reads the first one only."""
    here, own, named = (tmp_path / name for name in ("here", "home/.config/openstack", "named"))
    for folder in (here, own, named):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("OS_CLIENT_CONFIG_FILE", raising=False)
    assert clouds_yaml.user_file() == own / "clouds.yaml", "there is none"
    (own / "clouds.yml").touch()
    assert clouds_yaml.user_file() == own / "clouds.yml"
    (here / "clouds.yaml").touch()
    assert clouds_yaml.user_file() == here / "clouds.yaml"
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", "../named/clouds.yaml")
    assert clouds_yaml.user_file().resolve() == named / "clouds.yaml"


def test_the_file_is_the_one_that_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", "/somewhere/clouds.yaml")
    assert clouds_yaml.user_file() == Path("/somewhere/clouds.yaml")
    monkeypatch.delenv("OS_CLIENT_CONFIG_FILE")
    monkeypatch.setenv("HOME", "/home/me")
    assert clouds_yaml.user_file() == Path("/home/me/.config/openstack/clouds.yaml")
