"""The join agent from start to end, against stand-ins of systemctl, scontrol and ip below a root of its own."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bakehouse import REPOSITORY

AGENT = REPOSITORY / "bootstrap" / "agent" / "bakehouse_agent.py"
FAKES = REPOSITORY / "tests" / "fakes" / "agent"
KEY = bytes(range(256)) * 4
SECRET = base64.b64encode(KEY).decode()


def load(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the agent as a module whose paths are below a root."""
    monkeypatch.setenv("BAKEHOUSE_ROOT", str(root))
    spec = importlib.util.spec_from_file_location("bakehouse_agent", AGENT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Node:
    """A machine: its root, and the agent's process on it."""

    root: Path
    port: int
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "BAKEHOUSE_ROOT": str(self.root), "PATH": f"{FAKES}:{os.environ['PATH']}"}

    def path(self, name: str) -> Path:
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def configure(self, text: str | None = None) -> None:
        text = text or (
            f"# a comment\nplatform: slurm\nnode:\n  name: node-1\nslurm:\n  controllers: ['127.0.0.1:{self.port}']\n"
            f"  features: [bake, rack-7]\nsecret:\n  inline: {SECRET}\n"
        )
        self.path("etc/bakehouse/join.yaml").write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-IS", str(AGENT), *(arguments or ("join", "--boot"))]
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)
        self.running.append(process)
        return process

    def run(self, *arguments: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-IS", str(AGENT), *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.root / "run/bakehouse/status.json").read_text())
        except FileNotFoundError:
            return {"state": "", "waiting_for": "", "timeline": []}
        return found

    def until(self, fact: Callable[[dict[str, Any]], bool], seconds: float = 15) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.status()
            if fact(status):
                return status
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {self.status()}\n{self.log()}")

    def until_joined(self) -> dict[str, Any]:
        return self.until(lambda s: s["state"] == "joined")

    def until_waiting_for(self, words: str) -> dict[str, Any]:
        return self.until(lambda s: s["state"] == "waiting" and words in s["waiting_for"])

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "fake/log").read_text()
        return ""

    def known_as(self, **values: str) -> None:
        """Make the controller know a node of this name from before."""
        known = {
            "NodeName": "node-1", "AvailableFeatures": "bakehouse,bake,rack-7", "CPUAlloc": "0", "CPUTot": "2",
            "NodeAddr": "127.0.0.1", "State": "IDLE+DYNAMIC_NORM", "SlurmdStartTime": "1000",
        } | values  # fmt: skip
        lines = [f"   {key}={value}" for key, value in known.items()]
        self.path("fake/node").write_text("\n".join(lines).lstrip() + "\n")


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", port)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with listening() as port:
        machine = Node(tmp_path, port)
        machine.path("fake/log").touch()
        machine.path("fake/key").write_bytes(KEY)
        machine.configure()
        yield machine
        for process in machine.running:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> list[str]:
    """End an agent and return the moments of its lines."""
    process.terminate()
    out, _ = process.communicate(timeout=10)
    lines = [re.search(r"bakehouse-agent: (\d+\.\d{3}) (\w+)(?: (.*))?", line) for line in out.splitlines()]
    assert all(lines)
    return [line[2] for line in lines if line]


def test_a_node_joins(node: Node) -> None:
    agent = node.start()
    status = node.until_joined()
    assert (status["platform"], status["node"], status["address"]) == ("slurm", "node-1", "127.0.0.1")
    assert status["controller"] == f"127.0.0.1:{node.port}"
    order = "started configured secret network controller services registered joined".split()
    assert [name for name, _ in status["timeline"]] == order
    times = [when for _, when in status["timeline"]]
    assert times == sorted(times)
    assert abs(times[-1] - time.clock_gettime(time.CLOCK_MONOTONIC)) < 5
    assert [moment for moment in said(agent) if moment != "waiting"] == order


def test_the_key_is_in_its_place_and_nowhere_else(node: Node) -> None:
    cloud = node.path("var/lib/cloud/instances/i-1/user-data.txt")
    cloud.write_text(f"#cloud-config\nwrite_files: [{{content: '{SECRET}'}}]\n")
    node.start()
    node.until_joined()
    key = node.root / "etc/munge/munge.key"
    assert key.read_bytes() == KEY
    assert key.stat().st_mode & 0o777 == 0o400
    assert key.parent.stat().st_mode & 0o777 == 0o700
    config = node.root / "etc/bakehouse/join.yaml"
    assert "# a comment" in config.read_text()
    assert config.stat().st_mode & 0o777 == 0o600
    node.until(lambda _: SECRET not in cloud.read_text())
    holders = [p for p in node.root.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert holders == []
    assert (node.root / "run/bakehouse/status.json").stat().st_mode & 0o777 == 0o644
    assert (node.root / "run/bakehouse").stat().st_mode & 0o777 == 0o755


def test_slurmd_is_told_what_the_node_is(node: Node) -> None:
    node.start()
    node.until_joined()
    assert (node.root / "run/bakehouse/slurmd.env").read_text() == (
        f'BAKEHOUSE_NODE="node-1"\nBAKEHOUSE_CONTROLLERS="127.0.0.1:{node.port}"\n'
        'BAKEHOUSE_CONF="Feature=bakehouse,bake,rack-7"\n'
    )


def test_users_are_kept_from_the_metadata_before_slurmd_starts(node: Node) -> None:
    node.start()
    node.until_joined()
    log = node.log()
    rule = "ip -4 rule add priority 100 to 169.254.169.254 uidrange 1-4294967294 prohibit"
    assert log.index(rule) < log.index("systemctl start --no-block slurmd")
    node.run("join")
    assert node.log().count(rule) == 1


def test_a_rule_that_fails_is_a_warning(node: Node) -> None:
    node.path("fake/no-rules").touch()
    node.start()
    assert "metadata" in node.until_joined()["warnings"][0]
    assert "metadata" in node.run("status").stdout


def test_a_second_join_changes_nothing(node: Node) -> None:
    assert node.run("join").returncode == 0
    starts = node.log().count("start --no-block")
    again = node.run("join")
    assert again.returncode == 0
    assert node.log().count("start --no-block") == starts


def test_a_join_beside_the_agent_says_so(node: Node) -> None:
    node.start()
    node.until_joined()
    done = node.run("join")
    assert done.returncode == 0
    assert done.stdout == f"joined: node-1 127.0.0.1:{node.port}\n"


@pytest.mark.parametrize("after", ["started", "configured", "secret", "controller", "services", "registered"])
def test_a_killed_agent_goes_on_where_it_was(node: Node, after: str) -> None:
    node.path("fake/silent").touch()  # so that it does not get to the end
    agent = node.start()
    if after == "registered":
        node.path("fake/state").write_text("DOWN+DYNAMIC_NORM")
        node.path("fake/silent").unlink()
    node.until(lambda s: after in [name for name, _ in s["timeline"]])
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    node.path("fake/silent").unlink(missing_ok=True)
    node.path("fake/state").unlink(missing_ok=True)
    node.path("fake/slurmd").unlink(missing_ok=True)
    node.path("fake/node").unlink(missing_ok=True)
    node.start()
    node.until_joined()
    assert (node.root / "etc/munge/munge.key").read_bytes() == KEY
    assert not list(node.root.rglob("*.new"))


def test_a_controller_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    with listening() as port:
        pass
    machine = Node(tmp_path, port)
    machine.path("fake/log").touch()
    machine.configure()
    agent = machine.start()
    try:
        status = machine.until_waiting_for("refuses the connection")
        assert status["waiting_for"] == f"the controller at 127.0.0.1:{port} refuses the connection"
        assert (tmp_path / "etc/munge/munge.key").exists()
        with listening(port):
            machine.until_joined()
        assert said(agent).count("waiting") <= 2
    finally:
        agent.kill()


def test_a_wrong_key_is_named_and_a_right_one_is_taken_up(node: Node) -> None:
    node.path("fake/key").write_bytes(b"another key" * 20)
    node.start()
    status = node.until_waiting_for("refuses this node's key")
    assert status["hint"].startswith("compare sha256sum")
    assert status["attempt"] >= 1
    assert "start --no-block slurmd" not in node.log(), "slurmd is not started with a key that does not hold"
    node.configure(
        (node.root / "etc/bakehouse/join.yaml").read_text() + f"  inline: {base64.b64encode(b'k' * 64).decode()}\n"
    )
    node.path("fake/key").write_bytes(b"k" * 64)
    node.until_joined()


def test_a_key_that_is_exchanged_on_disk_is_taken_up(node: Node) -> None:
    node.path("fake/key").write_bytes(b"k" * 64)
    node.start()
    node.until_waiting_for("refuses this node's key")
    (node.root / "etc/munge/munge.key").unlink()
    node.path("etc/munge/munge.key").write_bytes(b"k" * 64)
    node.until_joined()
    assert node.log().count("munge.service") == 2


def test_containers_are_waited_for_by_their_own_words(node: Node) -> None:
    node.path("etc/bakehouse/containers.env").write_text("IMAGE=registry/slurm@sha256:0\n")
    node.start()
    node.until_waiting_for("bakehouse-containers to start")
    node.path("run/bakehouse/containers").write_text("the container image: connection refused\n")
    status = node.until_waiting_for("the container image: connection refused")
    assert status["hint"] == "journalctl -u bakehouse-containers"
    assert "start" not in node.log(), "there is nothing to start yet"
    node.path("run/bakehouse/containers").write_text("ready\n")
    node.until_joined()


def test_a_munge_that_starts_slowly_is_not_started_again(node: Node) -> None:
    node.path("fake/slow-munge").touch()
    node.start()
    node.until_waiting_for("munge to start")
    node.until(lambda status: status["attempt"] >= 2)
    node.path("fake/slow-munge").unlink()
    subprocess.run([FAKES / "systemctl", "restart", "munge"], env=node.environment, check=True)
    node.until_joined()
    assert node.log().count("munge.service") == 1


def test_clocks_that_differ_are_told_from_wrong_keys(node: Node) -> None:
    node.path("fake/key").write_bytes(b"another key" * 20)
    log = "Created socket\n2026-11-24 06:02:42 +0000 Info:      Unauthorized credential for client UID=0 GID=0\n"
    node.path("var/log/munge/munged.log").write_text(log)
    node.start()
    status = node.until_waiting_for("clocks of this node and of the controller differ")
    assert "this node's clock says 20" in status["hint"]


def test_without_ntp_it_says_that_it_may_be_the_clock(node: Node) -> None:
    """Slurm says the same of a wrong key and a wrong clock."""
    node.path("fake/key").write_bytes(b"another key" * 20)
    node.start()
    status = node.until_waiting_for("either the key is another one, or this node's clock is off")
    assert "timedatectl" in status["hint"]


def test_with_ntp_it_says_that_it_is_the_key(node: Node) -> None:
    node.path("fake/key").write_bytes(b"another key" * 20)
    node.path("run/systemd/timesync/synchronized").write_bytes(b"")
    node.start()
    status = node.until_waiting_for("refuses this node's key")
    assert "clock" not in status["waiting_for"] + status["hint"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Unable to contact slurm controller (connect failure)", "Slurm's controller does not answer"),
        ("Incompatible versions of client and server code", "the Slurm versions of this node and the controller"),
        ("Zero Bytes were transmitted or received", "it may refuse this node's key"),
        ("slurm_load_node error: something new", "scontrol says: slurm_load_node error: something new"),
    ],
)
def test_what_slurm_says_is_put_plainly(node: Node, text: str, sentence: str) -> None:
    node.path("fake/scontrol-says").write_text(text)
    node.start()
    node.until_waiting_for(sentence)
    (node.root / "fake/scontrol-says").unlink()
    node.until_joined()


def test_an_old_registration_is_not_a_join(node: Node) -> None:
    node.known_as()
    node.path("fake/silent").touch()
    node.start()
    node.until_waiting_for("slurmd to register")
    time.sleep(1)
    assert node.status()["state"] == "waiting"
    node.path("fake/journal").write_text("slurmd: error: Munge decode failed: Invalid credential")
    node.until_waiting_for("key")


def test_a_node_of_the_same_name_that_was_different_is_forgotten(node: Node) -> None:
    node.known_as(AvailableFeatures="bakehouse,old")
    node.start()
    node.until_joined()
    log = node.log()
    assert log.index("scontrol delete nodename=node-1") < log.index("systemctl start --no-block slurmd")


def test_the_same_node_is_not_forgotten(node: Node) -> None:
    node.known_as()
    node.start()
    node.until_joined()
    assert "delete" not in node.log()


def test_a_dead_node_of_the_same_name_elsewhere_is_forgotten(node: Node) -> None:
    with listening() as port:
        pass
    node.known_as(NodeAddr="127.0.0.2", Port=str(port))
    node.start()
    node.until_joined()
    assert "scontrol delete nodename=node-1" in node.log()


def test_a_living_node_of_the_same_name_keeps_it(node: Node) -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        node.known_as(NodeAddr="127.0.0.2", Port=str(other.getsockname()[1]))
        node.start()
        status = node.until_waiting_for("a node named node-1 is alive at 127.0.0.2")
        assert "another name" in status["hint"]
        assert "start --no-block slurmd" not in node.log()
        assert "delete" not in node.log()
    node.until_joined()


def test_a_drained_node_stays_drained_and_says_by_whom(node: Node) -> None:
    node.known_as(State="IDLE+DRAIN+DYNAMIC_NORM", Reason="bad disk [root@1700000000]")
    node.path("fake/state").write_text("IDLE+DRAIN+DYNAMIC_NORM")
    node.start()
    node.until_waiting_for("registered, but drained by root: bad disk")
    assert "resume" not in node.log()
    assert "delete" not in node.log()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("IDLE+DRAIN+DYNAMIC_NORM", "bakehouse-agent: leaving [root@1700000000]"),
        ("DOWN+DYNAMIC_NORM", "Node unexpectedly rebooted [slurm@1700000000]"),
        ("DOWN*+DYNAMIC_NORM", "Not responding [slurm@1700000000]"),
    ],
)
def test_what_has_passed_is_resumed(node: Node, state: str, reason: str) -> None:
    node.known_as(State=state, Reason=reason)
    node.path("fake/state").write_text(state)
    node.start()
    node.until_joined()
    assert "scontrol update nodename=node-1 state=resume" in node.log()


def test_wrong_hardware_is_named(node: Node) -> None:
    node.known_as(State="IDLE+DRAIN+INVALID_REG", Reason="Low RealMemory (reported:900 < 100.00% of configured:3800)")
    node.path("fake/state").write_text("IDLE+DRAIN+INVALID_REG+DYNAMIC_NORM")
    node.start()
    assert "slurm.hardware" in node.until_waiting_for("Low RealMemory")["hint"]


def test_the_name_comes_from_the_cloud(node: Node) -> None:
    node.path("run/cloud-init/instance-data.json").write_text('{"v1": {"local_hostname": "gpu-7.example.org"}}')
    node.configure(
        f"platform: slurm\nslurm: {{controllers: ['127.0.0.1:{node.port}']}}\nsecret: {{inline: {SECRET}}}\n"
    )
    node.start()
    assert node.until_joined()["node"] == "gpu-7"
    assert SECRET not in (node.root / "etc/bakehouse/join.yaml").read_text()


def test_a_host_name_that_settles_late_is_waited_for(node: Node) -> None:
    name = node.path("proc/sys/kernel/hostname")
    name.write_text("localhost\n")
    node.configure(
        f"platform: slurm\nslurm: {{controllers: ['127.0.0.1:{node.port}']}}\nsecret: {{inline: {SECRET}}}\n"
    )
    node.start()
    node.until_waiting_for("the host name is still localhost")
    name.write_text("early\n")
    node.until_waiting_for("the host name early to settle")
    name.write_text("late.example.org\n")
    assert node.until_joined()["node"] == "late"


def test_a_missing_key_is_asked_for(node: Node) -> None:
    node.configure(f"platform: slurm\nnode: {{name: node-1}}\nslurm: {{controllers: ['127.0.0.1:{node.port}']}}\n")
    node.start()
    node.until_waiting_for("there is no key in")
    node.path("etc/munge/munge.key").write_bytes(KEY)
    node.until_joined()
    assert "ip " not in node.log(), "what was not in user-data need not be kept from users"


def test_faults_of_the_configuration_are_all_named(node: Node) -> None:
    node.configure("platform: slrm\nslurm:\n  controlers: [a]\n  features: ['a b']\n")
    done = node.run("join", "--boot")
    assert done.returncode == 2
    status = node.status()
    assert status["state"] == "failed"
    assert len(status["faults"]) == 4
    assert "slurm.controlers: not known; did you mean controllers?" in "\n".join(status["faults"])
    assert node.run("status").returncode == 1
    assert "slurm.features[0]" in node.run("status").stdout


def test_a_configuration_that_is_still_being_written_is_read_again(node: Node) -> None:
    whole = (node.root / "etc/bakehouse/join.yaml").read_text()
    node.configure("platform: sl")
    agent = node.start()
    time.sleep(0.7)
    node.configure(whole)
    node.until_joined()
    assert "failed" not in said(agent)


def test_a_new_configuration_reaches_a_joined_node(node: Node) -> None:
    node.start()
    node.until_joined()
    time.sleep(0.3)
    node.configure((node.root / "etc/bakehouse/join.yaml").read_text().replace("rack-7", "rack-8"))
    node.until(lambda _: "rack-8" in (node.root / "run/bakehouse/slurmd.env").read_text())
    node.until(lambda _: "delete nodename=node-1" in node.log())
    node.until(lambda _: (node.root / "fake/node").exists())
    assert "AvailableFeatures=bakehouse,bake,rack-8" in (node.root / "fake/node").read_text()


def test_a_full_disk_is_said_and_waited_out(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = load(tmp_path, monkeypatch)
    error = OSError(28, "No space left on device", "/etc/munge/munge.key.new")
    assert agent.disk_trouble(error).what.startswith("the disk is full")
    node.path("etc/munge").write_text("not a folder")
    node.start()
    node.until(lambda s: s["state"] == "waiting")
    node.path("etc/munge").unlink()
    node.until_joined()


def test_timeout_ends_a_join_by_hand(node: Node) -> None:
    node.path("fake/silent").touch()
    assert node.run("join", "--timeout", "1").returncode == 1


def test_leave_drains_and_is_remembered(node: Node) -> None:
    assert node.run("join").returncode == 0
    done = node.run("leave")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "node-1 has left")
    log = node.log()
    steps = ["state=drain reason=bakehouse-agent: leaving", "scontrol delete", "stop slurmd", "stop munge"]
    places = [log.index(step) for step in steps]
    assert places == sorted(places)
    boot = node.start()
    node.until(lambda s: s["state"] == "left")
    assert boot.wait(timeout=10) == 0
    assert node.run("join").returncode == 0
    assert node.status()["state"] == "joined"


def test_leave_waits_for_jobs_but_not_for_ever(node: Node) -> None:
    assert node.run("join").returncode == 0
    text = node.path("fake/node").read_text()
    node.path("fake/node").write_text(text.replace("CPUAlloc=0", "CPUAlloc=2"))
    done = node.run("leave", "--timeout", "0.1")
    assert done.returncode == 1
    assert "jobs still run" in done.stdout
    assert "stop slurmd" not in node.log()
    assert node.run("leave", "--now").returncode == 0


def test_leave_without_a_controller_still_stops(node: Node) -> None:
    assert node.run("join").returncode == 0
    node.path("fake/scontrol-says").write_text("Unable to contact slurm controller (connect failure)")
    done = node.run("leave")
    assert done.returncode == 1
    assert "the controller was not told" in done.stdout
    assert "stop slurmd" in node.log()


def test_status_before_any_run(node: Node) -> None:
    done = node.run("status")
    assert (done.returncode, done.stdout) == (4, "the agent has not run since this machine started\n")


def test_status_waits_for_the_join(node: Node) -> None:
    node.start()
    done = node.run("status", "--json", "--wait", "15")
    assert done.returncode == 0
    assert json.loads(done.stdout)["state"] == "joined"


def test_help_reads_like_a_manual_page(node: Node) -> None:
    done = node.run("--help")
    assert done.returncode == 0
    for part in ("NAME", "SYNOPSIS", "DESCRIPTION", "FILES", "EXIT STATUS", "EXAMPLES"):
        assert re.search(rf"^{part}$", done.stdout, re.MULTILINE)
    assert node.run("jion").returncode == 2


def test_back_off_is_quick_first_and_bounded_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load(tmp_path, monkeypatch)
    assert all(agent.back_off(attempt) < 0.5 for attempt in range(1, 9))
    waits = [agent.back_off(attempt) for attempt in range(9, 500)]
    assert max(waits) <= 15
    assert min(waits) >= 0.25
    assert len({round(w, 3) for w in waits[10:]}) > 100, "jittered"


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load(tmp_path, monkeypatch)
    code, text = agent.run("sh", "-c", "echo begun; sleep 60", timeout=0.3)
    assert (code, text.splitlines()[0]) == (124, "begun")
    assert agent.run("no-such-program-here")[0] == 127


def test_a_good_join_imports_little(node: Node) -> None:
    """Each import is felt under emulation: see the module's docstring."""
    assert node.run("join").returncode == 0
    command = [sys.executable, "-IS", "-X", "importtime", str(AGENT), "join"]
    done = subprocess.run(command, env=node.environment, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    for name in ("argparse", "ssl", "http.client", "subprocess", "hashlib", "random", "pathlib", "typing", "inspect"):
        assert name not in imported - {"argparse"}, name
