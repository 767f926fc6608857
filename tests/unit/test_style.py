"""The code's own rules: format, lint, types, shell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bakehouse import REPOSITORY


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if (REPOSITORY / name).exists()]


def passes(*command: str) -> None:
    done = subprocess.run([*command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_python_is_formatted() -> None:
    passes(tool("ruff"), "format", "--check", ".")


def test_python_is_lint_free() -> None:
    passes(tool("ruff"), "check", ".")


def test_types_hold() -> None:
    passes(tool("mypy"))


def shell_scripts() -> list[str]:
    names = [name for name in tracked() if not (REPOSITORY / name).is_symlink()]
    return [
        name
        for name in names
        if name.endswith((".sh", ".bash")) or (REPOSITORY / name).read_bytes().startswith(b"#!/bin/bash\n")
    ]


def test_shell_scripts_are_lint_free() -> None:
    scripts = shell_scripts()
    assert len(scripts) > 10
    passes(tool("shellcheck"), "--shell=bash", "--severity=style", *scripts)
    on_nodes = tracked("bootstrap/ansible/files", "packer/scripts")
    passes(tool("shellcheck"), "--shell=sh", "--severity=style", "bootstrap/ansible/bakehouse-bootstrap", *on_nodes)


def test_the_play_is_lint_free(tmp_path: Path) -> None:
    # It starts programs of its environment by name, and keeps what it found out in the project.
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    copy = tmp_path / "play"
    shutil.copytree(REPOSITORY / "bootstrap" / "ansible", copy)
    done = subprocess.run(
        [tool("ansible-lint"), "--offline", "--nocolor", "--profile=production", "site.yml", *copy.glob("tasks/*.yml")],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 5 files" in done.stderr, "all files were read"


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "elements").iterdir()))
def test_element_follows_the_conventions(name: str) -> None:
    """diskimage-builder's own rules: see 'Developing elements' in its documentation, and its dib-lint."""
    element = REPOSITORY / "elements" / name
    assert (element / "README.rst").read_text().strip(), "says what it does"
    for folder in element.glob("*.d"):
        for script in folder.iterdir():
            if folder.name == "environment.d":
                assert script.suffix == ".bash"
                continue
            assert re.fullmatch(r"[1-9][0-9]-[a-z0-9-]+", script.name), "a number and words, no extension"
            assert script.stat().st_mode & 0o111, "executable"
            text = script.read_text()
            assert "set -eu\nset -o pipefail\n" in text
            assert 'if [ "${DIB_DEBUG_TRACE:-0}" -gt 0 ]' in text
            for variable in re.findall(r"\$\{(DIB_[A-Z_]+)", text):
                readme = (element / "README.rst").read_text()
                builtin = {"DIB_DEBUG_TRACE", "DIB_IMAGE_CACHE", "DIB_PYTHON_EXEC", "DIB_MANIFEST_IMAGE_DIR"}
                assert variable in readme or variable in builtin, f"{variable} is explained in README.rst"
