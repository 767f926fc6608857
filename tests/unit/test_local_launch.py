"""Launches on this host: what is started, what is noted of it, and how all of it ends, whoever was killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tasks
from bakehouse import (
    cli_up_qemu,
    cluster,
    definition,
    local_keeper,
    local_launch,
    machine,
    plan,
    process,
    userdata,
    verify,
    waiting,
)
from bakehouse.cli_up import Wish
from bakehouse.errors import BakehouseError
from bakehouse.local_launch import LocalLaunch
from bakehouse.run import Log, Terminated
from bakehouse.store import LocalStore
from bakehouse.timeline import Moment, Timeline
from tests.samples import add_image

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
"""What a launch's keeper is meant to be."""

KEEPER = """\
#!/usr/bin/python3 -IS
# Does what local_keeper does, but for the cluster and the machines.
import json, os, pathlib, signal, sys
note = pathlib.Path(os.environ["XDG_STATE_HOME"], "bakehouse/machines", sys.argv[3], "launch.json")
def say(**changes):
    beside = note.with_suffix(".new")
    beside.write_text(json.dumps({**json.loads(note.read_text()), **changes}))
    beside.rename(note)
node = {"name": "blue-1", "address": "10.77.0.10", "accelerator": "kvm", "ssh": ["ssh", "debian@10.77.0.10"]}
done = {"keeper": os.getpid(), "controller": ["on-controller"], "running": [node],
        "done": ["cluster", "machines", "joined"]}
exec(os.environ["KEEPER_DOES"])
while True:
    signal.pause()
"""

SAMPLE = Timeline(
    accelerator="kvm",
    power_on=0.0,
    moments=(Moment(name="power on", seconds=0, source="host"), Moment(name="joined", seconds=9, source="console")),
)


class Host:
    """A user's host, with a fake of what keeps a launch."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.machines = folder / "state" / "bakehouse" / "machines"
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
        (folder / "bakehouse.yaml").write_text("store: store\ncache: cache\n")
        monkeypatch.setenv("BAKEHOUSE_CONFIG", str(folder / "bakehouse.yaml"))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(local_launch, "POLL_SECONDS", 0.005)
        monkeypatch.setattr(machine, "remove_left", lambda: None)
        keeper = folder / "keeper"
        keeper.write_text(KEEPER)
        keeper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(keeper))
        self.store = LocalStore(folder / "store")
        for name, platform in (("slurm", "slurm"), ("base", "base"), ("k8s", "kubernetes")):
            add_image(self.store, f"20260101-{name}", name=name, size=1024, platform=platform)
        self.does("say(**done)")

    def does(self, what: str) -> None:
        self.monkeypatch.setenv("KEEPER_DOES", what)

    def up(self, name: str = "blue", *, keep: bool = False, **more: Any) -> None:
        wish = Wish(**{"platform": "slurm", "path": "bake", "name": name, "join_seconds": 5, "keep": keep, **more})
        cli_up_qemu.up(wish, tag="", authentication="munge", as_json=False)

    def down(self, name: str = "", *, everything: bool = False, dry_run: bool = False, as_json: bool = False) -> None:
        cli_up_qemu.down(name, everything=everything, dry_run=dry_run, as_json=as_json)

    def keeper(self, name: str = "blue") -> int:
        found = local_launch.read(name)
        assert found
        return found.keeper

    def left(self) -> list[str]:
        return sorted(path.name for path in self.machines.glob("*"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(tmp_path, monkeypatch)
    yield made
    for name in local_launch.names():
        local_launch.down(name)


def gone(pid: int) -> bool:
    return process.started(pid) == -1


def launch(**more: Any) -> LocalLaunch:
    return LocalLaunch(**{
        "name": "blue", "platform": "slurm", "path": "bake", "tag": "20260101-slurm",
        "controller_tag": "20260101-slurm", "nodes": ("blue-1", "blue-2"), "authentication": "munge",
        "until": "joined", "join_seconds": 5, "since": "", **more,
    })  # fmt: skip


def noted(**more: Any) -> LocalLaunch:
    made = launch(**more)
    made.folder.mkdir(parents=True)
    made.write()
    return made


# Up.


def test_nodes_come_up_stay_and_go(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.does(f"(note.parent / 'timeline-blue-1.json').write_text({SAMPLE.model_dump_json()!r}); say(**done)")
    host.up()
    said = capsys.readouterr().out
    assert "joined: done" in said
    assert "power on" in said, "the timeline"
    assert "ssh debian@10.77.0.10" in said
    assert "on-controller sinfo" in said
    assert "invoke down --on qemu --name blue" in said
    pid = host.keeper()
    assert os.getsid(pid) == pid, "Ctrl-C in this terminal does not end it"
    assert local_launch.is_running("blue")
    host.down("blue")
    assert gone(pid)
    assert host.left() == []
    assert "gone: 'blue', its nodes and their cluster" in capsys.readouterr().out


def test_two_launches_stand_side_by_side(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.up("blue")
    host.up("green")
    pids = host.keeper("blue"), host.keeper("green")
    with pytest.raises(BakehouseError, match="There are 2 on this host: blue, green"):
        host.down()
    host.down(everything=True, dry_run=True)
    assert host.left() == ["blue", "green"]
    host.down("blue")
    assert (gone(pids[0]), gone(pids[1])) == (True, False)
    host.down()
    assert gone(pids[1])
    capsys.readouterr()
    host.down()
    assert capsys.readouterr().out == "Nothing of it is on this host.\n"


def test_the_name_of_a_launch_is_taken_once(host: Host) -> None:
    host.up()
    with pytest.raises(BakehouseError, match="there is a launch 'blue' on this host already") as caught:
        host.up()
    assert "invoke down --on qemu --name blue" in caught.value.hint
    assert local_launch.is_running("blue"), "the first is left alone"


def test_no_keeper_begins_without_its_lock(host: Host) -> None:
    refused = pytest.raises(BakehouseError, match="`invoke down` looks at 'blue' just now")
    with host.monkeypatch.context() as patch:
        patch.setattr(local_launch, "_take", lambda _: False)
        with refused, local_launch.up(launch(), print, keep=True):
            pass
    assert local_launch.read("blue") == launch()


def test_until_active_waits_for_no_join(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.does("say(**{**done, 'done': ['cluster', 'machines']})")
    host.up(until="active")
    assert "blue-1  10.77.0.10" in capsys.readouterr().out


PROBLEM = "say(problem={'message': 'blue-1: no join', 'hint': 'look', 'log': 'last words'}, keeper=os.getpid())"


def test_what_the_keeper_meets_is_said_and_nothing_stays(host: Host) -> None:
    host.does(PROBLEM)
    with pytest.raises(BakehouseError, match="blue-1: no join") as caught:
        host.up()
    assert (caught.value.hint, caught.value.log) == ("look", "last words")
    assert host.left() == []


def test_a_keeper_that_dies_is_told_of(host: Host) -> None:
    host.does("sys.exit('no such thing')")
    with pytest.raises(BakehouseError, match="what keeps 'blue' has ended") as caught:
        host.up()
    assert caught.value.log == "no such thing\n"
    assert host.left() == []


def test_what_fails_can_be_kept(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.does(PROBLEM)
    with pytest.raises(BakehouseError, match="no join"):
        host.up(keep=True)
    assert "--keep was given" in capsys.readouterr().out
    assert local_launch.is_running("blue")


@pytest.mark.parametrize("ending", [KeyboardInterrupt, Terminated])
def test_what_is_told_to_end_leaves_nothing_even_with_keep(host: Host, ending: type[BaseException]) -> None:
    pids = []

    def broken_off(*_: object) -> None:
        waiting.until("keeper", lambda: host.keeper() > 0, 5, poll=0.005)
        pids.append(host.keeper())
        raise ending

    host.monkeypatch.setattr(local_launch, "wait", broken_off)
    with pytest.raises(ending):
        host.up(keep=True)
    assert gone(pids[0])
    assert host.left() == []


def test_a_launch_that_is_ended_meanwhile_says_so(host: Host) -> None:
    host.does("import shutil; shutil.rmtree(note.parent); sys.exit()")
    with pytest.raises(BakehouseError, match="'blue' is gone"):
        host.up()


# Which image.


def test_a_bootstrap_boots_the_base_and_the_controller_is_the_platforms(host: Host) -> None:
    host.up(path="bootstrap")
    made = local_launch.read("blue")
    assert made
    assert (made.tag, made.controller_tag) == ("20260101-base", "20260101-slurm")


def test_nodes_of_other_platforms_are_refused(host: Host) -> None:
    with pytest.raises(BakehouseError, match="is a kubernetes image, and --on qemu brings up nodes of slurm"):
        host.up(platform="k8s")
    assert host.left() == []


def test_flags_of_a_cloud_are_refused_here() -> None:
    context: Any = None
    with pytest.raises(BakehouseError, match="--flavor, --volume-size with --on qemu"):
        tasks._up(context, "slurm", on="qemu", flavor="m1", volume_size=5)
    with pytest.raises(BakehouseError, match="--cloud with --on qemu"):
        tasks._down(context, on="qemu", cloud="here")


# Down.


def test_a_keeper_that_was_killed_leaves_files_only(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.up()
    os.kill(host.keeper(), signal.SIGKILL)
    waiting.until("end", lambda: not local_launch.is_running("blue"), 5, poll=0.005)
    with pytest.raises(BakehouseError, match="or what was left of one"):
        host.up()
    capsys.readouterr()
    host.down(as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "blue", "running": False}]
    assert host.left() == []


def test_another_process_of_the_keepers_number_is_never_ended(host: Host) -> None:
    """As after a power loss: the note is there, its process is somebody else's, even one that started at that tick."""
    with subprocess.Popen(["sleep", "1000"]) as other:
        noted(keeper=other.pid)
        assert not local_launch.is_running("blue")
        host.down("blue")
        assert other.poll() is None
        other.kill()
    assert host.left() == []


def test_a_launch_that_is_gone_does_not_run(host: Host) -> None:
    assert not local_launch.is_running("blue")
    assert host.left() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "blue"}'])
def test_a_note_that_is_none_is_removed(host: Host, text: str) -> None:
    (host.machines / "blue").mkdir(parents=True)
    (host.machines / "blue" / "launch.json").write_text(text)
    host.down("blue")
    assert host.left() == []


def test_a_keeper_that_does_not_care_is_killed(host: Host) -> None:
    host.does("signal.signal(signal.SIGTERM, signal.SIG_IGN); say(**done)")
    host.up()
    host.monkeypatch.setattr(local_launch, "END_SECONDS", 0.05)
    pid = host.keeper()
    host.down("blue")
    waiting.until("end", lambda: gone(pid), 5, poll=0.005)
    assert host.left() == []


def test_a_keeper_that_has_just_begun_is_ended_as_soon_as_it_says_who_it_is(host: Host) -> None:
    host.does("import time; time.sleep(0.2); say(**done)")
    with local_launch.up(launch(), print, keep=False) as keeper:
        local_launch.down("blue")
        assert keeper.wait(5) == -signal.SIGTERM
    assert host.left() == []


# What keeps it.


class Site:
    """Fakes in place of the cluster and the machines; what is done with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.seen: list[LocalLaunch] = []
        place = SimpleNamespace(
            path=lambda inside: Path("/nowhere") / inside.name, mount_image=lambda image: image, start=self._start
        )
        self.slurm = SimpleNamespace(
            network=place,
            controller=SimpleNamespace(start=lambda: self.done.append("controller"), prefix=["on-controller"]),
            user_data=lambda node: f"#cloud-config\n# {node}\n",
        )
        monkeypatch.setattr(cluster, "up", self._up)
        monkeypatch.setattr(machine, "boot", self._boot)
        monkeypatch.setattr(signal, "pause", self._pause)
        monkeypatch.setattr(verify, "wait_for_join", lambda node, *, seconds: self.done.append(f"join {node.name}"))
        monkeypatch.setattr(verify, "read_timeline", lambda *_: SAMPLE)

    @contextlib.contextmanager
    def _up(self, image: Path, _log: Log, *, authentication: str) -> Iterator[object]:
        self.done.append(f"up {image.name} {authentication}")
        yield self.slurm
        self.done.append("unreachable")

    @contextlib.contextmanager
    def _boot(self, image: Path, *, hostname: str, user_data: str, **_: Any) -> Iterator[object]:
        self.done.append(f"boot {hostname} of {image.name}: {user_data.splitlines()[-1]}")
        login = SimpleNamespace(host="10.77.0.10", command=["ssh", hostname])
        try:
            yield SimpleNamespace(name=hostname, login=login, accelerator="kvm", started=0.0)
        finally:
            self.done.append(f"off {hostname}")

    def _start(self, command: list[str], _output: Path) -> None:
        self.done.append(" ".join(command[1:]))

    def _pause(self) -> None:
        found = local_launch.read("blue")
        assert found
        self.seen.append(found)
        raise Terminated


@pytest.fixture
def site(host: Host, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


def run_keeper() -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["local_keeper", "blue"])
        return local_keeper.main()


def test_the_keeper_brings_all_up_notes_it_and_takes_it_down(site: Site) -> None:
    made = noted()
    with pytest.raises(Terminated):
        run_keeper()
    image = "slurm-20260101-slurm.qcow2"
    assert site.done == [
        f"up {image} munge", "controller", f"boot blue-1 of {image}: # blue-1", f"boot blue-2 of {image}: # blue-2",
        "join blue-1", "join blue-2", "off blue-2", "off blue-1",
    ]  # fmt: skip
    (seen,) = site.seen
    assert seen.keeper == os.getpid()
    assert seen.done == ("cluster", "machines", "joined")
    assert [node.ssh for node in seen.running] == [("ssh", "blue-1"), ("ssh", "blue-2")]
    assert made.timelines() == {"blue-1": SAMPLE, "blue-2": SAMPLE}
    assert (made.folder / "id_ed25519.pub").exists()


def test_nodes_that_do_not_join_are_noted_and_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    noted()

    def late(*_: object, **__: object) -> None:
        raise BakehouseError("no join within 5 s", hint="wait", log="last words")

    monkeypatch.setattr(verify, "wait_for_join", late)
    with pytest.raises(Terminated):
        run_keeper()
    (seen,) = site.seen
    assert seen.problem == local_launch.Problem(message="blue-1: no join within 5 s", hint="wait", log="last words")
    assert seen.done == ("cluster", "machines")


def test_a_cluster_that_does_not_come_up_ends_the_keeper(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    noted()

    def broken() -> None:
        raise BakehouseError("no slurmctld")

    monkeypatch.setattr(site.slurm.controller, "start", broken)
    assert run_keeper() == 1
    found = local_launch.read("blue")
    assert found
    assert found.problem
    assert found.problem.message == "no slurmctld"


@pytest.mark.usefixtures("host")
def test_a_keeper_of_nothing_ends() -> None:
    assert run_keeper() == 1


def test_a_bootstrap_is_served_its_bundle_and_packages(
    site: Site, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def join(node: str, *, bundle: userdata.Bundle) -> userdata.Join:
        asked.append((bundle.url, bundle.sha256))
        return userdata.Join(("ctl",), path="bootstrap", bundle=bundle, node=node, key=b"k" * 128)

    mirror = SimpleNamespace(
        prepare=lambda *given: site.done.append(f"mirror of {given[1]}"), start=lambda: None, proxy="http://10.77.0.1:1"
    )
    site.slurm.join = join
    site.slurm.network.path = lambda inside: tmp_path / inside.name
    monkeypatch.setattr(local_keeper, "PackageMirror", lambda *_: mirror)
    made = SimpleNamespace(manifest=SimpleNamespace(release="trixie"))
    monkeypatch.setattr(plan, "make", lambda *_: made)
    monkeypatch.setattr(definition, "write_bundle", lambda _, target: target.write_bytes(b"bundle"))
    noted(path="bootstrap", tag="20260101-base", nodes=("blue-1",))
    with pytest.raises(Terminated):
        run_keeper()
    assert "mirror of trixie" in site.done
    assert "-m http.server --bind 10.77.0.1 --directory /run/bakehouse/web 8080" in site.done
    assert any(line.startswith("boot blue-1 of base-20260101-base.qcow2") for line in site.done)
    assert asked == [("http://10.77.0.1:8080/bundle.tar.gz", hashlib.sha256(b"bundle").hexdigest())]
    assert host.keeper() == os.getpid()
