"""Tasks run again as root, with a fake sudo: what the second run gets, what it gives back, and when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, sudo, waiting
from bakehouse.errors import BakehouseError
from bakehouse.run import Terminated
from bakehouse.settings import Settings

FAKE_SUDO = """\
#!/bin/bash
echo "$*" >> {calls}
[ "$*" = "-n true" ] && exit {allowed}
[ "$1 $2" = "-n --" ] || exit 99
shift 2
# What sudo does not keep, the second run does not have.
exec /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""

SECOND_RUN = """\
#!{python}
import json, os, pathlib, sys
seen = {{"words": sys.argv[1:], "environment": dict(os.environ)}}
pathlib.Path("{seen}").write_text(json.dumps(seen))
{then}
"""


class Somebody:
    """A user who is not root, with a sudo that notes its calls and a second run that notes what it gets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        self.settings = Settings(store=folder / "store", cache=folder / "cache")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(sudo, "STATE", folder / "state")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.sudo()
        self.second_run()

    def _program(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def sudo(self, *, allowed: int = 0) -> None:
        self._program("sudo", FAKE_SUDO.format(calls=self.calls, allowed=allowed))

    def second_run(self, then: str = "") -> Path:
        """Say what the second run does. Return the program."""
        text = SECOND_RUN.format(python=sys.executable, seen=self.folder / "seen", then=then)
        program = self._program("python-of-root", text)
        self._second = program
        return program

    def again(self, words: list[str] | None = None) -> int | None:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(self._second))
            return sudo.again_as_root(self.settings, words)

    def seen(self) -> tuple[list[str], dict[str, str]]:
        found = json.loads((self.folder / "seen").read_text())
        return found["words"], found["environment"]


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Somebody:
    return Somebody(tmp_path, monkeypatch)


def test_root_goes_on_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is started"))
    assert sudo.again_as_root(Settings(store=tmp_path, cache=tmp_path)) is None


def test_the_second_run_has_the_words_and_the_variables_of_the_first(somebody: Somebody) -> None:
    somebody.monkeypatch.setattr(sys, "argv", ["invoke", "cluster.run", "srun hostname; echo $HOME 'x y'"])
    somebody.monkeypatch.setenv("HOME", "/home/some body")
    somebody.monkeypatch.setenv("BAKEHOUSE_STORE", "/srv/images; true")
    somebody.monkeypatch.setenv("XDG_STATE_HOME", "/home/state")
    somebody.monkeypatch.setenv("LD_PRELOAD_X", "no")
    somebody.monkeypatch.setenv("OS_PASSWORD", "no")
    somebody.monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert somebody.again() == 0
    words, environment = somebody.seen()
    assert words == ["-m", "invoke", "cluster.run", "srun hostname; echo $HOME 'x y'"]
    kept = {
        "HOME": "/home/some body", "BAKEHOUSE_STORE": "/srv/images; true", "XDG_STATE_HOME": "/home/state",
        "PATH": os.environ["PATH"], sudo.LIFELINE: "1", "https_proxy": "http://proxy:3128",
    }  # fmt: skip
    assert {name: environment[name] for name in kept} == kept
    assert not {"LD_PRELOAD_X", "OS_PASSWORD"} & set(environment)


def test_what_belongs_into_images_keeps_its_owners(somebody: Somebody) -> None:
    """The layers of containers, and the root of a bake that runs beside."""
    cache = somebody.settings.cache
    ours, theirs = [cache / "kvm", cache / "work"], [cache / "work/slurm+x/tree/su", cache / "containers/storage/l/etc"]
    for path in [*ours, *theirs]:
        path.mkdir(parents=True, exist_ok=True)
    somebody.monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert somebody.again() == 0
    assert [path.stat().st_uid for path in ours] == [1000, 1000]
    assert [path.stat().st_uid for path in theirs] == [0, 0]


def test_another_task_can_be_run_as_root(somebody: Somebody) -> None:
    assert somebody.again(["verify", "20260101-aaaaaaa"]) == 0
    assert somebody.seen()[0] == ["-m", "invoke", "verify", "20260101-aaaaaaa"]


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_second_runs_status_is_passed_on(somebody: Somebody, status: int) -> None:
    somebody.second_run(f"sys.exit({status})")
    assert somebody.again() == status


def test_what_root_wrote_belongs_to_the_user_afterwards(somebody: Somebody) -> None:
    image = somebody.settings.store / "20260101-aaaaaaa" / "image.qcow2"
    image.parent.mkdir(parents=True)
    image.touch()
    somebody.monkeypatch.setattr(os, "getuid", lambda: 1000)
    somebody.second_run("sys.exit(1)")
    somebody.again()
    assert {path.stat().st_uid for path in (image, image.parent, somebody.settings.store)} == {1000}


def test_without_a_sudo_that_asks_no_password_it_says_so(somebody: Somebody) -> None:
    somebody.sudo(allowed=1)
    with pytest.raises(BakehouseError, match="sudo without a password") as caught:
        somebody.again()
    assert "NOPASSWD" in caught.value.hint
    assert not (somebody.folder / "seen").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, Terminated])
def test_a_first_run_that_is_stopped_waits_for_the_second(
    somebody: Somebody, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    # It ends well, but only once its standard input has ended.
    somebody.second_run("sys.stdin.read(); sys.exit(7)")
    waited = subprocess.Popen.wait
    # Ctrl-C is heard by the second run too, which may take its time; a second one ends it.
    interruptions = iter([end(), *([end()] if end is KeyboardInterrupt else [])])

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if "invoke" in str(process.args):
            for interruption in interruptions:
                raise interruption
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert somebody.again() == 7


FIRST = """
import os, sys
from pathlib import Path
from bakehouse import sudo
from bakehouse.settings import Settings
os.geteuid = lambda: 1000
sys.executable = sys.argv[1]
sudo.again_as_root(Settings(store=Path("/nothing"), cache=Path("/nothing")), ["task"])
"""
SECOND = """
sys.path.insert(0, "{repository}")
from bakehouse import sudo
from bakehouse.run import Terminated, ending_on_sigterm
from bakehouse.settings import Settings
os.geteuid = lambda: 0
note = pathlib.Path("{note}")
with ending_on_sigterm():
    assert sudo.again_as_root(Settings()) is None
    assert sudo.LIFELINE not in os.environ, "a third run is none of it"
    note.write_text("running")
    import time
    try:
        time.sleep(60)
    except Terminated:
        note.write_text("given back")
"""


def test_the_second_run_ends_when_the_first_is_killed(somebody: Somebody) -> None:
    note = somebody.folder / "note"
    second = somebody.second_run(SECOND.format(repository=REPOSITORY, note=note))
    with subprocess.Popen([sys.executable, "-c", FIRST, str(second)], cwd=REPOSITORY) as first:
        waiting.until("second run", lambda: note.exists() and note.read_text() == "running", 20, poll=0.01)
        time.sleep(0.05)
        assert note.read_text() == "running", "it goes on while the first one does"
        first.send_signal(signal.SIGKILL)
        first.wait(5)
    waiting.until("end of the second run", lambda: note.read_text() == "given back", 5, poll=0.01)
