"""Verification, with a cluster and a machine that do as they are told: what each failing step leaves behind."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import cluster, host, machine, userdata, verify, waiting
from bakehouse.console import Console as SerialConsole
from bakehouse.errors import BakehouseError
from bakehouse.host import Tool
from bakehouse.machine import Login, Machine
from bakehouse.progress import Progress
from bakehouse.record import FILE_NAME, Check, Record, Verification
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.timeline import FIRST_JOB, GUEST_COMMAND, JOINED
from bakehouse.verify import Suites

TAG = "20260101-aaaaaaa"
CHECKS = [
    "a controller runs from the image's own root",
    "it boots and joins the cluster",
    "a job runs on it",
    "a batch job leaves its result",
    "two tasks run within their limits",
    "it rejoins after a reboot",
    "it is what its suites expect",
    "it goes down when the power button is pressed",
]
CLUSTER, JOIN, JOB, BATCH, LIMITS, REJOIN, SUITE, OFF = CHECKS
FIRST_BOOT = "[    0.000000] Linux version 6.12\nbakehouse-agent: 34.500 joined as node-1\n"


def record(**changes: Any) -> Record:
    return Record.model_validate(
        {
            "name": "slurm", "platform": "slurm", "tag": TAG, "digest": "0" * 64, "inputs": {},
            "created": "2026-01-01T12:00:00Z", "commit": "", "distribution": "debian", "release": "trixie",
            "architecture": "amd64", "kernel": "6.12", "firmware": ["bios", "uefi"], "root_size": 1, "root_used": 1,
            "sbom": "sbom.cdx.json", "sbom_sha256": "", "package_count": 1, "versions": {}, "steps": [], "builder": {},
            "files": [{"format": "qcow2", "file": "slurm.qcow2", "size": 1, "virtual_size": 9, "sha256": "",
                       "sha512": ""}],
            "base": {"key": "", "sha256": "", "created": "2026-01-01T11:00:00Z"},
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, **changes,
        }
    )  # fmt: skip


def done(status: int = 0, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], status, out, err)


class Controller:
    """Answers as a controller of a good node does, but for the answers that a test puts in place of these."""

    def __init__(self) -> None:
        self.answers = {
            "srun hostname": done(0, "node-1\n"),
            "sbatch": done(0, "7\n"),
            "srun --ntasks=2": done(0, "task 1 cpus 1 memory 67108864\ntask 0 cpus 1 memory 67108864\n"),
            "srun --mem": done(1, "", "slurmstepd: error: Detected 1 oom_kill event in StepId=9.0."),
        }
        self.no_end_of = ""
        self.fault = ""

    def start(self) -> None:
        if self.fault:
            raise BakehouseError(self.fault, log="slurmctld: fatal: no")

    def write(self, path: str, text: str) -> None:
        pass

    def run(self, *command: str, timeout: float) -> subprocess.CompletedProcess[str]:
        words = " ".join(command)
        if self.no_end_of and words.startswith(self.no_end_of):
            raise subprocess.TimeoutExpired(["nsenter", *command], timeout)
        return next(answer for start, answer in self.answers.items() if words.startswith(start))

    def log(self) -> str:
        return "slurmctld: said this"


class Guest(Machine):
    """A machine whose console and answers are what a test says."""

    on = True
    goes_down = True
    second_boot = "reboot: Restarting system\n" + FIRST_BOOT
    result = "7 node-1\n"
    facts = "--- uptime\n40.00 1.00\n"
    mute = False

    def say(self, text: str) -> None:
        os.write(self.wire, text.encode())

    wire = -1

    @property
    def running(self) -> bool:
        return self.on

    def check(self) -> None:
        if not self.on:
            raise BakehouseError("the machine went off")

    def cpu_seconds(self) -> float:
        return 1

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        if command == GUEST_COMMAND:
            if self.mute:
                raise subprocess.TimeoutExpired(["ssh", command], timeout)
            return done(0, self.facts)
        if "reboot" in command:
            self.say(self.second_boot)
        return done(0, self.result if "bakehouse-verify" in command else "")

    def collect(self, folder: Path) -> None:
        (folder / "journal.txt").write_text("journal of the guest")

    def stop(self, seconds: float = 90) -> bool:
        self.on = False
        return self.goes_down


class World:
    """A store with one image, and all that a verification of it meets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.output = io.StringIO()
        self.store = LocalStore(folder / "store")
        self.monkeypatch = monkeypatch
        self.controller = Controller()
        self.suite = [Check(name="node: it is awake", passed=True, seconds=0.1)]
        self.first_boot = FIRST_BOOT
        self.boots: list[dict[str, Any]] = []
        self.guest: dict[str, Any] = {}
        self.no_qemu = False
        self.add(record())
        monkeypatch.setattr(host, "missing", lambda _tools: [])
        monkeypatch.setattr(machine, "make_key", lambda folder: folder / "id")
        monkeypatch.setattr(machine, "boot", self.boot)
        monkeypatch.setattr(cluster, "up", self.up)
        monkeypatch.setattr(verify, "ask", lambda *_: self.suite)
        until = waiting.until
        patient = {"poll": 0.002}
        monkeypatch.setattr(
            waiting, "until", lambda what, fact, seconds, **more: until(what, fact, seconds / 3000, **more | patient)
        )

    def add(self, made: Record) -> None:
        folder = self.store.folder(made.tag)
        folder.mkdir(parents=True)
        (folder / "slurm.qcow2").write_bytes(b"x")
        (folder / FILE_NAME).write_text(made.model_dump_json())

    @contextlib.contextmanager
    def up(self, image: Path, _log: object, **_: object) -> Iterator[cluster.Cluster]:
        made = cluster.Cluster(None, self.controller, None)  # type: ignore[arg-type]
        join = userdata.Join(("10.77.0.1:6817",), node="node-1", key=b"k" * 1024)
        with self.monkeypatch.context() as patch:
            patch.setattr(cluster.Cluster, "join", lambda *_: join)
            yield made

    @contextlib.contextmanager
    def boot(self, image: Path, **options: Any) -> Iterator[Machine]:
        if self.no_qemu:
            raise BakehouseError("no disk could be made")
        self.boots.append(options)
        reading, writing = os.pipe()
        console = SerialConsole(os.fdopen(reading, "rb"), options["keep_console"])
        login = Login("10.77.0.10", 22, "debian", options["key"])
        guest = Guest(login, console, "tcg", 0.0, None, None, Path(), Path())  # type: ignore[arg-type]
        guest.wire = writing
        for name, value in self.guest.items():
            setattr(guest, name, value)
        guest.say(self.first_boot)
        try:
            yield guest
        finally:
            os.close(writing)
            console.end(5)

    def verify(self, **options: Any) -> Verification:
        shown = Console(file=self.output, width=160)
        found = verify.verify(self.store.get(TAG), self.store, Settings(cache=self.folder), shown, **options)
        assert self.store.get(TAG) == found, "the record says so too"
        assert found.verification is not None
        return found.verification

    def fails_at(self, name: str) -> Check:
        """Verify; return the check that failed, which is the last one."""
        result = self.verify()
        assert result.result == "failed"
        assert [check.name for check in result.checks] == CHECKS[: CHECKS.index(name) + 1]
        *passed, last = result.checks
        assert all(check.passed for check in passed)
        assert not last.passed
        return last

    def evidence(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.store.folder(TAG) / verify.EVIDENCE).iterdir()}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# The whole.


def test_a_good_image_passes(world: World) -> None:
    result = world.verify()
    assert (result.result, result.accelerator, result.firmware) == ("passed", "tcg", "bios")
    assert [(check.name, check.passed, check.detail) for check in result.checks] == [
        (name, True, "") for name in CHECKS
    ]
    assert result.suite == world.suite
    assert result.timeline is not None
    assert result.rejoin is not None
    assert result.timeline.seconds(JOINED) is not None
    assert result.timeline.seconds(FIRST_JOB) is not None
    assert result.rejoin.seconds(FIRST_JOB) is None
    assert world.evidence()["journal.txt"] == "journal of the guest"
    assert world.evidence()["slurmctld.log"] == "slurmctld: said this"
    assert "joined as node-1" in world.evidence()["console.log"]


def test_the_key_is_not_in_the_evidence(world: World) -> None:
    world.verify()
    assert "a2tra2tr" in world.boots[0]["user_data"], "the node has it"
    assert "a2tra2tr" not in str(world.evidence())
    assert "a2tra2tr" not in (world.store.folder(TAG) / FILE_NAME).read_text()


def test_each_step_is_shown_with_its_seconds(world: World) -> None:
    world.verify()
    for stage in verify.stages("slurm"):
        assert f"{stage}: done, " in world.output.getvalue()


def test_an_image_is_booted_under_the_firmware_that_is_asked_for(world: World) -> None:
    assert world.verify(firmware="uefi").firmware == "uefi"
    assert world.boots[0]["firmware"] == "uefi"
    world.store.amend(TAG, {"firmware": ["uefi"]})
    assert world.verify().firmware == "uefi", "the first that it has"


def test_a_second_verification_replaces_the_first_and_its_evidence(world: World) -> None:
    world.controller.fault = "no answer from slurmctld within 60 s"
    assert world.verify().result == "failed"
    (world.store.folder(TAG) / verify.EVIDENCE / "stale").touch()
    world.controller.fault = ""
    assert world.verify().result == "passed"
    assert "stale" not in world.evidence()


# Steps that fail.


def test_a_controller_that_does_not_start_fails_the_image(world: World) -> None:
    world.controller.fault = "no answer from slurmctld within 60 s"
    assert world.fails_at(CLUSTER).detail == "no answer from slurmctld within 60 s\nslurmctld: fatal: no"
    assert world.boots == []
    assert set(world.evidence()) == {"slurmctld.log", "verify.log"}
    assert "bakehouse: failed: no answer from slurmctld" in world.evidence()["verify.log"]
    (seen,) = world.store.records()
    assert seen.verification is not None
    assert (seen.verification.accelerator, seen.verification.timeline) == ("", None)


def test_a_node_that_cannot_join_says_why(world: World) -> None:
    world.first_boot = "bakehouse-agent: 31.200 failed the key was refused by the controller\n"
    assert "the node cannot join: 31.200 failed the key was refused" in world.fails_at(JOIN).detail
    assert world.evidence()["journal.txt"] == "journal of the guest"


def test_a_node_that_says_nothing_fails_with_its_last_lines(world: World) -> None:
    world.first_boot = "[    0.000000] Linux version 6.12\nbakehouse-agent: 30.000 waiting for the network\n"
    detail = world.fails_at(JOIN).detail
    assert detail.startswith("no join within ")
    assert "waiting for the network" in detail


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (done(1, "", "srun: error: Unable to allocate resources"), "srun: error: Unable to allocate resources"),
        (done(0, "node-2\n"), "srun hostname said 'node-2', not 'node-1'"),
    ],
)
def test_a_job_that_does_not_run_fails_the_image(
    world: World, answer: subprocess.CompletedProcess[str], detail: str
) -> None:
    world.controller.answers["srun hostname"] = answer
    assert detail in world.fails_at(JOB).detail


def test_a_job_that_does_not_end_fails_the_image(world: World) -> None:
    world.controller.no_end_of = "srun hostname"
    assert world.fails_at(JOB).detail == "no end within 300 s: nsenter srun hostname"


@pytest.mark.parametrize("answer", [done(1, "7\n"), done(0, "sbatch: error\n"), done(0, "")])
def test_a_batch_job_that_fails_fails_the_image(world: World, answer: subprocess.CompletedProcess[str]) -> None:
    world.controller.answers["sbatch"] = answer
    assert world.fails_at(BATCH).detail.startswith("the batch job failed")


@pytest.mark.parametrize("result", ["", "6 node-1\n", "7 node-2\n"])
def test_a_batch_job_without_its_result_fails_the_image(world: World, result: str) -> None:
    world.guest["result"] = result
    assert f"the batch job's result is '{result.strip()}', not '7 node-1'" in world.fails_at(BATCH).detail


@pytest.mark.parametrize(
    ("start", "answer", "detail"),
    [
        ("srun --ntasks=2", done(0, "task 0 cpus 2 memory max\ntask 1 cpus 2 memory max\n"), "not within their limits"),
        ("srun --ntasks=2", done(0, "task 0 cpus 1 memory 67108864\n"), "not within their limits"),
        ("srun --mem", done(0, ""), "more memory than it may is not stopped"),
        ("srun --mem", done(1, "", "srun: error: Invalid"), "more memory than it may is not stopped"),
    ],
)
def test_limits_that_do_not_hold_fail_the_image(
    world: World, start: str, answer: subprocess.CompletedProcess[str], detail: str
) -> None:
    world.controller.answers[start] = answer
    assert detail in world.fails_at(LIMITS).detail


@pytest.mark.parametrize(
    ("second_boot", "detail"),
    [
        ("", "no reboot within "),
        ("[    0.000000] Linux version 6.12\n", "no join within "),
        ("Booting `Debian'\nbakehouse-agent: 30.1 failed the token was used\n", "the token was used"),
    ],
)
def test_a_node_that_does_not_come_back_fails_the_image(world: World, second_boot: str, detail: str) -> None:
    world.guest["second_boot"] = second_boot
    assert detail in world.fails_at(REJOIN).detail
    (seen,) = world.store.records()
    assert seen.verification is not None
    assert seen.verification.timeline is not None, "what was found before is kept"
    assert seen.verification.rejoin is None


def test_facts_that_do_not_hold_fail_the_image_and_are_kept(world: World) -> None:
    world.suite.append(Check(name="slurm: the munge key is private", passed=False, seconds=0.1, detail="0o644"))
    detail = world.fails_at(SUITE).detail
    assert detail == "1 of 2 facts do not hold: slurm: the munge key is private"
    (seen,) = world.store.records()
    assert seen.verification is not None
    assert seen.verification.suite == world.suite
    assert seen.verification.rejoin is not None


def test_a_machine_that_does_not_go_down_fails_the_image(world: World) -> None:
    world.guest["goes_down"] = False
    assert world.fails_at(OFF).detail == "it had to be switched off"


# What is no fault of the image.


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_verification_that_is_stopped_says_nothing_of_the_image(world: World, end: type[BaseException]) -> None:
    def stop(self: Controller) -> None:
        raise end

    world.monkeypatch.setattr(Controller, "start", stop)
    with pytest.raises(end):
        world.verify()
    assert world.store.get(TAG).verification is None


def test_a_node_whose_word_got_lost_on_the_console_is_asked(world: World) -> None:
    world.monkeypatch.setattr(verify, "ASK_SECONDS", 0)
    world.monkeypatch.setattr(verify, "agents_status", lambda _: {"state": "joined"})
    world.first_boot = FIRST_BOOT.replace(" joined", " join[   52.1] systemd[1]: Started foo\ned")
    assert "joined" not in world.first_boot
    assert world.verify().result == "passed"


def test_an_image_of_another_platform_is_not_marked(world: World) -> None:
    world.store.amend(TAG, {"platform": "base"})
    with pytest.raises(BakehouseError, match="images of the platform base cannot be verified"):
        world.verify()
    assert world.store.get(TAG).verification is None


def test_a_host_that_lacks_a_tool_does_not_mark_the_image(world: World) -> None:
    tool = Tool("dnsmasq", "dnsmasq-base", "")
    world.monkeypatch.setattr(host, "missing", lambda _tools: [tool])
    with pytest.raises(BakehouseError, match="this host lacks dnsmasq") as caught:
        world.verify()
    assert caught.value.hint == "apt-get install dnsmasq-base"
    assert world.store.get(TAG).verification is None


def test_an_image_that_is_gone_is_not_verified(world: World) -> None:
    (world.store.folder(TAG) / "slurm.qcow2").unlink()
    with pytest.raises(BakehouseError, match="is gone"):
        world.verify()


def test_a_host_that_cannot_make_a_network_does_not_mark_the_image(world: World) -> None:
    @contextlib.contextmanager
    def fail(*_: object, **__: object) -> Iterator[cluster.Cluster]:
        raise BakehouseError("the root filesystem cannot be mounted", hint="this host needs loop devices")
        yield

    world.monkeypatch.setattr(cluster, "up", fail)
    with pytest.raises(BakehouseError, match="cannot be mounted"):
        world.verify()
    assert world.store.get(TAG).verification is None


def test_a_host_on_which_qemu_does_not_start_does_not_mark_the_image(world: World) -> None:
    world.no_qemu = True
    with pytest.raises(BakehouseError, match="no disk could be made"):
        world.verify()
    assert world.store.get(TAG).verification is None


def test_a_node_that_does_not_tell_its_timeline_is_told_in_one_sentence(world: World) -> None:
    world.guest["mute"] = True
    with pytest.raises(BakehouseError, match="the node does not say when it did what") as caught:
        world.verify()
    assert str(int(verify.COMMAND_SECONDS)) in caught.value.message
    assert world.store.get(TAG).verification is None
    assert world.evidence()["journal.txt"] == "journal of the guest"


# One check.


@pytest.fixture
def job() -> verify._Run:
    return verify._Run(record(), Progress("", verify.stages("slurm"), Console(file=io.StringIO())))


def test_a_check_that_passes_is_noted(job: verify._Run) -> None:
    with job.check("a job runs on it", "srun"):
        pass
    (check,) = job.checks
    assert (check.name, check.passed, check.detail) == ("a job runs on it", True, "")
    assert 0 <= check.seconds < 1


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (BakehouseError("no answer", log="last words"), "no answer\nlast words"),
        (BakehouseError("no answer", hint="wait"), "no answer"),
        (subprocess.TimeoutExpired(["srun", Path("x")], 300), "no end within 300 s: srun x"),
    ],
)
def test_a_check_that_fails_is_noted_and_ends_it(job: verify._Run, error: Exception, detail: str) -> None:
    with pytest.raises(verify._FailedError), job.check("a job runs on it", "srun"):
        raise error
    (check,) = job.checks
    assert (check.passed, check.detail) == (False, detail)


def test_a_fault_of_our_own_is_no_word_on_the_image(job: verify._Run) -> None:
    with pytest.raises(ZeroDivisionError), job.check("a job runs on it", "srun"):
        raise ZeroDivisionError
    assert not job.checks[0].passed


# Suites.


def of(platform: str, **changes: Any) -> Record:
    return record(platform=platform, **changes)


def test_a_platform_is_asked_its_own_suites_and_those_of_all_nodes(tmp_path: Path) -> None:
    own, site = tmp_path / "own", tmp_path / "site"
    for folder, names in (
        (own, "test_node test_slurm test_kubernetes test_roce conftest"),
        (site, "test_node_disks test_slurm_licences test_slurmd test_b"),
    ):
        folder.mkdir()
        for name in names.split():
            (folder / f"{name}.py").touch()
    suites = Suites((own, site, tmp_path / "missing"))
    assert [path.relative_to(tmp_path).as_posix() for path in suites.of(of("slurm"))] == [
        "own/test_node.py", "own/test_slurm.py", "site/test_node_disks.py", "site/test_slurm_licences.py",
    ]  # fmt: skip
    assert own / "test_kubernetes.py" in suites.of(of("kubernetes"))
    assert own / "test_slurm.py" not in suites.of(of("kubernetes"))
    assert own / "test_roce.py" not in suites.of(of("slurm"))
    with_roce = {path.name for path in suites.of(of("slurm", inputs={"element roce/element-deps": "x"}))}
    assert {"test_node.py", "test_slurm.py", "test_roce.py"} <= with_roce


def test_our_own_suites_are_found() -> None:
    assert {path.name for path in Suites((verify.OWN_SUITES,)).of(of("slurm"))} == {"test_node.py", "test_slurm.py"}


def test_the_sites_suites_are_asked_too(world: World) -> None:
    asked: list[list[Path]] = []

    def ask(_login: Login, suites: list[Path], *_: object) -> list[Check]:
        asked.append(suites)
        return world.suite

    world.monkeypatch.setattr(verify, "ask", ask)
    site = world.folder / "site"
    site.mkdir()
    (site / "test_node_site.py").touch()
    world.verify(suites=Suites((verify.OWN_SUITES, site)))
    world.verify()
    assert site / "test_node_site.py" in asked[0]
    assert [path.parent for path in asked[1]] == [verify.OWN_SUITES] * 2


REPORT = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest">
<testcase classname="tests.image.test_node" name="test_no_unit_failed[ssh://debian@10.77.0.10:22]" time="1.250" />
<testcase classname="test_slurm" name="test_the_key_is_private[ssh://x]" time="0.5">
  <failure message="AssertionError: assert 420 == 256">traceback</failure></testcase>
<testcase classname="test_slurm" name="test_munge" time="0.1"><error message="setup failed">x</error></testcase>
<testcase classname="test_slurm" name="test_gpus" time="0.0"><skipped message="no --gpus">x</skipped></testcase>
</testsuite></testsuites>
"""


def test_a_report_of_a_suite_becomes_checks(tmp_path: Path) -> None:
    (tmp_path / "suite.xml").write_text(REPORT)
    assert [*verify._cases(tmp_path / "suite.xml")] == [
        Check(name="node: no unit failed", passed=True, seconds=1.25),
        Check(name="slurm: the key is private", passed=False, seconds=0.5, detail="AssertionError: assert 420 == 256"),
        Check(name="slurm: munge", passed=False, seconds=0.1, detail="setup failed"),
    ]


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    (tmp_path / "suite.xml").write_text(REPORT.replace("setup failed", "x" * 9000))
    assert max(len(check.detail) for check in verify._cases(tmp_path / "suite.xml")) == 2000


FAKE_PYTEST = """\
#!/bin/bash
printf '%s\\n' "$@" > {folder}/arguments
for word; do case "$word" in
    --junitxml=*) [ -e {folder}/report ] && cp {folder}/report "${{word#*=}}" ;;
    --ssh-config=*) cp "${{word#*=}}" {folder}/ssh-config ;;
    --record=*) cp "${{word#*=}}" {folder}/record ;;
esac; done
echo 'what pytest said'
exit $(cat {folder}/status)
"""


class Asked:
    """Asks a node, with a fake of pytest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.evidence = folder / "evidence"
        self.evidence.mkdir()
        (folder / "pytest").write_text(FAKE_PYTEST.format(folder=folder))
        (folder / "pytest").chmod(0o755)
        self.login = Login("10.77.0.10", 22, "debian", folder / "id", (str(folder / "pytest"),))

    def ask(self, status: int, report: str = REPORT) -> list[Check]:
        (self.folder / "status").write_text(str(status))
        if report:
            (self.folder / "report").write_text(report)
        return verify.ask(self.login, [Path("/suites/test_node.py")], record(), self.evidence)


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_a_node_is_asked_over_ssh_as_root(asked: Asked) -> None:
    assert len(asked.ask(1)) == 3
    words = (asked.folder / "arguments").read_text().splitlines()
    assert {"--hosts=ssh://debian@10.77.0.10:22", "--sudo", "/suites/test_node.py", "bakehouse.suite"} <= {*words}
    assert f'IdentityFile "{asked.folder}/id"' in (asked.folder / "ssh-config").read_text()
    assert Record.model_validate_json((asked.folder / "record").read_text()) == record()
    assert sorted(path.name for path in asked.evidence.iterdir()) == ["suite.txt", "suite.xml"]
    assert (asked.evidence / "suite.txt").read_text() == "what pytest said\n"


@pytest.mark.parametrize(("status", "report"), [(2, REPORT), (4, ""), (0, "")])
def test_suites_that_could_not_be_run_are_no_result(asked: Asked, status: int, report: str) -> None:
    with pytest.raises(BakehouseError, match="the suites could not be run") as caught:
        asked.ask(status, report)
    assert caught.value.log == "what pytest said\n"
