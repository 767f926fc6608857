"""Where packages came from, as the build notes it: the element's own script, with stand-ins for apt and dpkg."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bakehouse import REPOSITORY

SCRIPT = REPOSITORY / "elements/debian-mmdebstrap/finalise.d/10-package-origins"

TARGETS = """\
http://deb.debian.org/debian trixie/main amd64 Packages	Debian	Debian	trixie	stable	main
http://deb.debian.org/debian-security trixie-security/main amd64 Packages	Debian-Security	Debian	trixie-security	stable-security	main
https://tools.example.org ./ Packages	Site Tools	obs://build.example.org/tools	$(CODENAME)	$(SUITE)	$(COMPONENT)
https://lab.example.org ./ Packages	https://lab.example.org	Lab	$(CODENAME)	lab	$(COMPONENT)
https://nameless.example.org ./ Packages	$(LABEL)	$(ORIGIN)	$(CODENAME)	$(SUITE)	$(COMPONENT)
"""  # noqa: E501 - as apt writes it

PACKAGES = """\
installed	adduser	adduser	all	3.152
installed	libc6:amd64	libc6	amd64	2.41-12
installed	libc6:i386	libc6	i386	2.41-11
config-files	gone	gone	amd64	1
installed	lab	lab	amd64	1
installed	local	local	amd64	1
installed	nameless	nameless	amd64	1
installed	tool	tool	amd64	7
installed	munge	munge	amd64	0.5
"""

POLICY = """\
adduser:
  Installed: 3.152
  Candidate: 3.153
  Version table:
     3.153 500
        500 http://deb.debian.org/debian-security trixie-security/main amd64 Packages
 *** 3.152 500
        500 http://deb.debian.org/debian trixie/main amd64 Packages
        100 /var/lib/dpkg/status
     3.100 500
        500 https://tools.example.org ./ Packages
libc6:
  Installed: 2.41-12
  Version table:
 *** 2.41-12 500
        500 http://deb.debian.org/debian-security trixie-security/main amd64 Packages
        500 http://deb.debian.org/debian trixie/main amd64 Packages
        100 /var/lib/dpkg/status
libc6:i386:
  Installed: 2.41-11
  Version table:
 *** 2.41-11 500
        500 http://deb.debian.org/debian trixie/main amd64 Packages
        100 /var/lib/dpkg/status
lab:
  Installed: 1
  Version table:
 *** 1 -10
        500 https://lab.example.org ./ Packages
        100 /var/lib/dpkg/status
local:
  Installed: 1
  Version table:
 *** 1 100
        100 /var/lib/dpkg/status
nameless:
  Installed: 1
  Version table:
 *** 1 500
        500 https://nameless.example.org ./ Packages
        100 /var/lib/dpkg/status
tool:
  Installed: 7
  Version table:
 *** 7 500
        500 https://tools.example.org ./ Packages
        100 /var/lib/dpkg/status
munge:
  Installed: 0.5
  Version table:
     0.6 500
        500 http://deb.debian.org/debian trixie/main amd64 Packages
 *** 0.5 100
        100 /var/lib/dpkg/status
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    fakes = {"apt-get": TARGETS, "dpkg-query": PACKAGES, "apt-cache": POLICY, "dpkg": "amd64\n"}
    for name, text in fakes.items():
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / name).write_text(f"#!/bin/sh\ncat '{tmp_path}/{name}.txt'\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "share" / "package-origins"


def note(notes: Path) -> dict[str, str]:
    """Run the script; return what it noted, by package, architecture and version."""
    path = f"{notes.parent.parent}:{os.environ['PATH']}"
    # By standard input, as it is run where the base root is made.
    with SCRIPT.open() as script:
        subprocess.run(
            ["bash", "-s"], stdin=script, env={**os.environ, "PATH": path, "PACKAGE_ORIGINS": str(notes)}, check=True
        )
    lines = [line.split("\t") for line in notes.read_text().splitlines()]
    assert lines == sorted(lines)
    return {" ".join(package): origin for *package, origin in lines}


def test_each_package_is_noted_with_its_archive(notes: Path) -> None:
    assert note(notes) == {
        "adduser all 3.152": "Debian trixie/main",
        "libc6 amd64 2.41-12": "Debian-Security trixie-security/main",
        "libc6 i386 2.41-11": "Debian trixie/main",
        "lab amd64 1": "Lab lab",
        "tool amd64 7": "Site Tools",
    }


def test_no_address_is_noted(notes: Path) -> None:
    note(notes)
    assert "example" not in notes.read_text()
    assert "debian.org" not in notes.read_text()


def test_what_was_noted_for_the_base_root_stays(notes: Path) -> None:
    notes.parent.mkdir()
    notes.write_text(
        "munge\tamd64\t0.5\tDebian trixie/main\n"
        "adduser\tall\t3.1\tDebian old/main\n"
        "tool\tamd64\t7\tDebian trixie/main\n"
    )
    found = note(notes)
    assert found["munge amd64 0.5"] == "Debian trixie/main", "which the lists no longer hold"
    assert found["tool amd64 7"] == "Debian trixie/main"
    assert found["adduser all 3.152"] == "Debian trixie/main"
    assert "adduser all 3.1" not in found, "which is no longer installed"


def test_a_failure_of_apt_ends_the_build(notes: Path) -> None:
    (notes.parent.parent / "apt-cache").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(subprocess.CalledProcessError):
        note(notes)
