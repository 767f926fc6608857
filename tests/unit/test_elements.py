"""What of an element's files counts: contents, modes, and what links lead to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, elements, plan
from bakehouse.elements import Element
from bakehouse.settings import Settings


@pytest.fixture
def element(tmp_path: Path) -> Element:
    """An element beside a file that it links to."""
    folder = tmp_path / "elements" / "mine"
    (folder / "static").mkdir(parents=True)
    (tmp_path / "agent.py").write_text("print(1)\n")
    (folder / "static" / "own").write_text("own\n")
    return Element("mine", folder)


def test_a_link_that_leads_out_counts_as_the_file_that_it_leads_to(element: Element, tmp_path: Path) -> None:
    link = element.path / "static" / "agent.py"
    link.symlink_to("../../../agent.py")
    before = element.files()
    (tmp_path / "agent.py").write_text("print(2)\n")
    changed = element.files()
    assert changed["static/agent.py"] != before["static/agent.py"]
    assert changed["static/own"] == before["static/own"]
    (tmp_path / "agent.py").chmod(0o755)
    assert element.files()["static/agent.py"] != changed["static/agent.py"], "executable or not"
    link.unlink()
    shutil.copy2(tmp_path / "agent.py", link)
    (tmp_path / "agent.py").unlink()
    assert element.files()["static/agent.py"] not in before.values(), "it can be read without the link"


def test_a_file_and_a_link_to_its_copy_are_the_same(element: Element, tmp_path: Path) -> None:
    link = element.path / "agent.py"
    link.symlink_to("../../agent.py")
    linked = element.files()["agent.py"]
    link.unlink()
    shutil.copy2(tmp_path / "agent.py", link)
    assert element.files()["agent.py"] == linked


def test_a_link_that_stays_inside_is_a_link(element: Element) -> None:
    link = element.path / "static" / "alias"
    link.symlink_to("own")
    before = element.files()
    (element.path / "static" / "own").write_text("changed\n")
    assert element.files()["static/alias"] == before["static/alias"]
    link.unlink()
    link.symlink_to("other")
    assert element.files()["static/alias"] != before["static/alias"]


@pytest.mark.parametrize("target", ["/dev/null", "/lib/systemd/system/nothing.service", "../nowhere"])
def test_a_link_that_is_for_the_image_is_a_link(element: Element, target: str) -> None:
    link = element.path / "static" / "masked.service"
    link.symlink_to(target)
    first = element.files()["static/masked.service"]
    link.unlink()
    link.symlink_to(f"{target}-2")
    assert element.files()["static/masked.service"] != first


def test_a_path_of_the_image_is_not_looked_up_on_this_host(element: Element, tmp_path: Path) -> None:
    (tmp_path / "on-this-host").write_text("one\n")
    (element.path / "static" / "etc-link").symlink_to(tmp_path / "on-this-host")
    before = element.files()
    (tmp_path / "on-this-host").write_text("two\n")
    assert element.files() == before


def test_folders_and_what_editors_leave_do_not_count(element: Element) -> None:
    before = element.files()
    for name in ("README.rst", "own~", "module.pyc", "__pycache__/module.cpython-311.pyc"):
        (element.path / name).parent.mkdir(exist_ok=True)
        (element.path / name).write_text("x")
    (element.path / "empty").mkdir()
    assert element.files() == before


def test_a_change_of_the_agent_changes_what_an_image_is_made_of(tmp_path: Path) -> None:
    """Both keep the place that they have to each other in the checkout, since the links are relative."""
    for name in ("elements/join-agent", "bootstrap/agent"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, symlinks=True)
    settings = Settings(store=tmp_path / "store", cache=tmp_path / "cache", elements=[tmp_path / "elements"])
    before = plan.make("slurm", settings)
    agent = tmp_path / "bootstrap" / "agent" / "bakehouse_agent.py"
    agent.write_text(agent.read_text() + "# changed\n")
    after = plan.make("slurm", settings)
    assert after.digest != before.digest
    assert plan.difference(before.inputs, after.inputs) == [
        "element join-agent/agent/bakehouse_agent.py changed",
    ]
    assert after.base_key == before.base_key


def test_the_links_of_our_elements_lead_somewhere() -> None:
    for path in elements.OWN.rglob("*"):
        if path.is_symlink() and not path.readlink().is_absolute():
            assert path.exists(), path
