"""Clusters that outlive the command that made them: their note, their end, and what a killed one leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bakehouse import accounting, cluster, demo, process, waiting
from bakehouse.demo import Demo
from bakehouse.errors import BakehouseError
from bakehouse.record import Record
from bakehouse.run import Log, Terminated

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
"""What a cluster's keeper is meant to be."""

RECORD = Record.model_validate({
    "name": "slurm", "platform": "slurm", "tag": "20260101-aaaaaaa", "digest": "", "inputs": {},
    "created": "2026-01-01T12:00:00Z", "commit": "", "distribution": "debian", "release": "trixie",
    "architecture": "amd64", "kernel": "6.12", "firmware": ["bios"], "root_size": 1, "root_used": 1, "files": [],
    "sbom": "", "sbom_sha256": "", "package_count": 1, "versions": {}, "steps": [], "builder": {},
    "base": {"key": "", "sha256": "", "created": "2026-01-01T11:00:00Z"},
    "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1},
})  # fmt: skip

KEEPER = """\
#!/bin/bash
# Does what demo.keep() does, but for the cluster.
shift 2
note="$XDG_STATE_HOME/bakehouse/clusters/$1.json"
printf '%s\\n' "$@" > "$XDG_STATE_HOME/arguments"
{before}
read -r stat < /proc/$$/stat
started=$(printf '%s\\n' ${{stat##*) }} | sed -n 20p)
cat > "$note.new" <<NOTE
{{"platform": "$1", "tag": "$2", "authentication": "$4", "keeper": $$, "keeper_started": $started, "network": 1,
 "since": "2026-01-01T12:00:00+00:00"}}
NOTE
mv "$note.new" "$note"
trap '{on_term}' TERM
while :; do sleep 0.01; done
"""


class Laptop:
    """A user's host, with a fake of what keeps a cluster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))
        monkeypatch.setattr(sys, "executable", str(folder / "keeper"))
        until = waiting.until
        monkeypatch.setattr(waiting, "until", lambda *given, **more: until(*given, **more | {"poll": 0.005}))
        self.notes = folder / "bakehouse" / "clusters"
        self.keeper()

    def keeper(self, *, before: str = "", on_term: str = 'rm -f "$note"; exit 0') -> None:
        (self.folder / "keeper").write_text(KEEPER.format(before=before, on_term=on_term))
        (self.folder / "keeper").chmod(0o755)

    def up(self, mirrors: tuple[str, str] | None = None) -> Demo:
        return demo.up(RECORD, Path("/images/slurm.qcow2"), "munge", mirrors)

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()

    def files(self) -> list[str]:
        return sorted(path.name for path in self.notes.iterdir())

    def note(self, **changes: Any) -> Demo:
        """Write a note of a cluster whose keeper is this process."""
        pid = os.getpid()
        made = Demo("slurm", "20260101-aaaaaaa", "munge", pid, process.started(pid), 1, "2026-01-01T12:00:00+00:00")
        self.notes.mkdir(parents=True, exist_ok=True)
        (self.notes / "slurm.json").write_text(json.dumps(asdict(made) | changes))
        return made


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laptop]:
    made = Laptop(tmp_path, monkeypatch)
    yield made
    found = demo.find("slurm")
    if found and found.keeper != os.getpid():
        os.kill(found.keeper, signal.SIGKILL)


# Its note.


def test_where_nothing_runs_it_says_how_to_begin(laptop: Laptop) -> None:
    assert demo.find("slurm") is None
    with pytest.raises(BakehouseError, match="no slurm cluster runs here") as caught:
        demo.get("slurm")
    assert "invoke cluster.up slurm" in caught.value.hint


def test_a_cluster_is_found_by_its_note(laptop: Laptop) -> None:
    made = laptop.note()
    assert demo.get("slurm") == made
    assert made.running
    assert demo.find("kubernetes") is None


def test_a_process_of_the_same_number_is_not_the_cluster(laptop: Laptop) -> None:
    laptop.note(keeper_started=process.started(os.getpid()) - 1)
    assert demo.find("slurm") is None
    assert laptop.files() == [], "and it is forgotten"


def test_a_note_that_cannot_be_forgotten_does_no_harm(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root wrote it into a folder of its own, and it is a user who looks."""
    laptop.note(keeper_started=1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert demo.find("slurm") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"platform": "slurm"}', '{"colour": "blue"}'])
def test_a_note_that_is_none_is_no_cluster(laptop: Laptop, text: str) -> None:
    laptop.note()
    (laptop.notes / "slurm.json").write_text(text)
    assert demo.find("slurm") is None


def test_a_process_that_has_ended_but_was_not_waited_for_does_not_run() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert process.started(child.pid) > 0
        child.kill()
        waiting.until("end", lambda: process.started(child.pid) == -1, 5, poll=0.005)
    assert process.started(child.pid) == -1


WITHOUT_FIRST_THREAD = """
import ctypes, threading
threading.Thread(target=input).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_goes_on_while_one_of_its_threads_does() -> None:
    """A registry that was killed, for one, listens until the last of them has ended."""
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_FIRST_THREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        stat = Path(f"/proc/{child.pid}/stat")
        waiting.until("end of its first thread", lambda: ") Z " in stat.read_text(), 5, poll=0.005)
        assert process.started(child.pid) > 0
        child.kill()
        waiting.until("end", lambda: process.started(child.pid) == -1, 5, poll=0.005)


# Up and down.


def test_a_cluster_goes_up_stays_and_goes_down(laptop: Laptop) -> None:
    made = laptop.up()
    assert (made.platform, made.tag, made.authentication) == ("slurm", "20260101-aaaaaaa", "munge")
    assert laptop.arguments() == ["slurm", made.tag, "/images/slurm.qcow2", "munge", f"{laptop.notes}/slurm.log"]
    assert demo.get("slurm") == made
    assert os.getsid(made.keeper) == made.keeper, "Ctrl-C in this terminal does not end it"
    assert demo.down("slurm") == made
    assert not made.running
    assert laptop.files() == []


def test_accounting_is_installed_from_the_sites_mirrors(laptop: Laptop) -> None:
    laptop.up(("http://mirror/debian", "http://mirror/security"))
    assert laptop.arguments()[5:] == ["--accounting", "trixie", "http://mirror/debian", "http://mirror/security"]
    demo.down("slurm")


def test_there_is_one_cluster_of_a_platform(laptop: Laptop) -> None:
    laptop.note()
    with pytest.raises(BakehouseError, match="a slurm cluster of 20260101-aaaaaaa runs already") as caught:
        laptop.up()
    assert "cluster.down" in caught.value.hint


def test_a_cluster_that_does_not_come_up_says_why(laptop: Laptop) -> None:
    laptop.keeper(before="echo 'this image has no slurmctld' >&2; exit 1")
    with pytest.raises(BakehouseError, match="the cluster does not come up") as caught:
        laptop.up()
    assert caught.value.log == "this image has no slurmctld\n"
    assert "slurm.log" in caught.value.hint


def test_a_cluster_that_takes_too_long_is_ended(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop.keeper(before='echo $$ > "$XDG_STATE_HOME/pid"; exec sleep 1000')
    monkeypatch.setattr(demo, "UP_SECONDS", 0.1)
    with pytest.raises(BakehouseError, match="no cluster within 0 s"):
        laptop.up()
    pid = int((laptop.folder / "pid").read_text())
    waiting.until("end", lambda: process.started(pid) == -1, 5)


def test_a_cluster_that_was_killed_is_forgotten(laptop: Laptop) -> None:
    made = laptop.up()
    os.kill(made.keeper, signal.SIGKILL)
    waiting.until("end", lambda: not made.running, 5)
    assert (laptop.notes / "slurm.json").exists()
    assert demo.find("slurm") is None
    assert not (laptop.notes / "slurm.json").exists()
    again = laptop.up()
    assert again.keeper != made.keeper
    demo.down("slurm")


def test_a_cluster_that_does_not_care_is_killed(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop.keeper(on_term=":")
    monkeypatch.setattr(demo, "DOWN_SECONDS", 0.05)
    made = laptop.up()
    demo.down("slurm")
    waiting.until("end", lambda: not made.running, 5)
    assert laptop.files() == []


# What keeps it.


@pytest.fixture
def kept(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put fakes in place of the cluster; return what is done with it."""
    done: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *given, **_: done.append(" ".join([name, *(word for word in given if isinstance(word, str))]))

    controller = SimpleNamespace(start=note("start"), start_munge=note("start munge"))

    @contextlib.contextmanager
    def up(image: Path, _log: Log, *, authentication: str) -> Iterator[object]:
        done.append(f"up {image} {authentication}")
        try:
            yield SimpleNamespace(controller=controller, network=SimpleNamespace(pid=77))
        finally:
            done.append("down")

    def sleep(_seconds: float) -> None:
        found = demo.get("slurm")
        done.append(f"noted {found.network} {found.keeper == os.getpid()}")
        raise Terminated

    monkeypatch.setattr(cluster, "up", up)
    monkeypatch.setattr(accounting, "install", note("install"))
    monkeypatch.setattr(accounting, "start", note("start accounting"))
    monkeypatch.setattr(time, "sleep", sleep)
    laptop.notes.mkdir(parents=True)
    return done


@pytest.mark.parametrize(
    ("more", "done"),
    [
        ([], ["start"]),
        (["--accounting", "trixie", "a", "b"], ["install trixie", "start munge", "start accounting", "start"]),
    ],
)
def test_a_cluster_is_noted_once_it_answers_and_forgotten_when_it_ends(
    laptop: Laptop, kept: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], done: list[str]
) -> None:
    log = laptop.folder / "log"
    monkeypatch.setattr(sys, "argv", ["demo", "slurm", "20260101-aaaaaaa", "/image", "slurm", str(log), *more])
    with pytest.raises(Terminated):
        demo.main()
    assert kept[0] == "up /image slurm"
    assert kept[1:] == [*done, "noted 77 True", "down"]
    assert laptop.files() == []


def test_a_cluster_that_cannot_be_made_is_told_to_who_made_it(
    laptop: Laptop, kept: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def up(*_: object, **__: object) -> Iterator[None]:
        raise BakehouseError("this image has no slurmctld", hint="bake it anew", log="the last words")
        yield

    monkeypatch.setattr(cluster, "up", up)
    monkeypatch.setattr(sys, "argv", ["demo", "slurm", "tag", "/image", "munge", str(laptop.folder / "log")])
    assert demo.main() == 1
    assert capsys.readouterr().err == "the last words\nthis image has no slurmctld (bake it anew)\n"
    assert laptop.files() == []
