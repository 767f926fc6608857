"""Verify an image: boot it, join it to a real cluster, run jobs, reboot it, and ask it all that its suites ask."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from bakehouse import (
    REPOSITORY,
    cluster,
    host,
    kubernetes,
    kubernetes_cluster,
    lock,
    machine,
    network,
    run,
    timeline,
    verify_kubernetes,
    verify_roce,
)  # fmt: skip
from bakehouse.cluster import Cluster
from bakehouse.console import ConsoleLine
from bakehouse.errors import BakehouseError
from bakehouse.machine import Login, Machine
from bakehouse.network import Network
from bakehouse.progress import Progress
from bakehouse.record import FILE_NAME, Check, Record, Verification
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.timeline import GUEST_COMMAND, GuestFacts, Timeline

NODE = "node-1"


WORK = {
    "slurm": ("srun", "sbatch", "limits"),
    "kubernetes": ("pod", "services", "names"),
    "roce": ("report", "rping", "ib_write_bw", "ib_send_bw"),
}
"""The stages of what is tried on a node, by platform."""


def stages(platform: str) -> list[str]:
    """Return the stages of a verification, for its progress."""
    first = "second node" if platform == "roce" else "cluster"
    return [first, "boot and join", *WORK[platform], "reboot and rejoin", "suite", "power off"]


EVIDENCE = "verify"
"""The folder beside an image's record that holds what its verification saw."""

CPUS, DISK = 2, 4 << 30
"""CPUs and bytes of disk of the machine that is verified with."""

MEMORY = {"slurm": 1024, "kubernetes": 2048, "roce": 1024}
"""MiB of its memory; kubeadm wants 1700 (its preflight, Mem)."""

JOIN_SECONDS = 900
"""Emulated on a busy host; with KVM it is ten."""

ASK_SECONDS = 240.0
"""A node that has not said on its console that it joined is asked so often."""

SUITES_OF_ELEMENTS = ("bare-metal", "roce")
"""Elements with a suite of their own, whatever the platform."""

AGENTS_END = r"bakehouse-agent: \d+\.\d+ (joined|failed)"

COMMAND_SECONDS = 300
SUITE_SECONDS = 3600
TASK_MEMORY = 64
"""MiB that each job of the test of limits may use."""

LIMITS = """
group=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)
while [ "$group" != /sys/fs/cgroup ]; do
    limit=$(cat $group/memory.max)
    [ "$limit" = max ] || break
    group=$(dirname $group)
done
echo "task $SLURM_PROCID cpus $(nproc) memory $limit"
"""
"""What a task says of its limits: CPUs that it may use, and the nearest limit of memory above it (cgroups(7))."""


class _FailedError(Exception):
    """The image failed a check. Other errors are the host's, and say nothing of the image."""


@dataclass
class _Run:
    """What the steps of one verification share."""

    record: Record
    progress: Progress
    checks: list[Check] = field(default_factory=list)

    @contextmanager
    def check(self, name: str, stage: str) -> Iterator[None]:
        """Time one check and note how it ended. One that fails ends the verification (_FailedError)."""
        start = time.monotonic()
        passed, detail = False, ""
        try:
            with self.progress.stage(stage):
                yield
            passed = True
        except BakehouseError as error:
            detail = "\n".join(part for part in (error.message, error.log) if part)
            raise _FailedError(error.message) from error
        except subprocess.TimeoutExpired as error:
            detail = f"no end within {error.timeout:.0f} s: {' '.join(map(str, error.cmd))}"
            raise _FailedError(detail) from error
        finally:
            seconds = round(time.monotonic() - start, 3)
            self.checks.append(Check(name=name, passed=passed, seconds=seconds, detail=detail))


@dataclass(frozen=True)
class Suites:
    """The testinfra suites that an image is asked."""

    folders: tuple[Path, ...]

    def of_names(self, subjects: Sequence[str]) -> list[Path]:
        """Return the files for some subjects, such as node, slurm, bare-metal."""
        names = [name for each in dict.fromkeys(subjects) for name in _suite_names(each)]
        return [path for folder in self.folders for name in names for path in sorted(folder.glob(name))]

    def of(self, record: Record) -> list[Path]:
        """Return the files for an image: those of all nodes, of its platform, and of elements with a suite.

        A folder's ``test_node.py`` and ``test_node_*.py`` are asked of every node, ``test_PLATFORM.py`` and
        ``test_PLATFORM_*.py`` of the platform's, ``test_roce.py`` of nodes of other platforms with RoCE as well.
        """
        more = [name for name in SUITES_OF_ELEMENTS if record.has_element(name)]
        return self.of_names(["node", record.platform, *more])


def _suite_names(subject: str) -> list[str]:
    form = subject.replace("-", "_")
    return [f"test_{form}.py", f"test_{form}_*.py"]


OWN_SUITES = REPOSITORY / "tests" / "image"


class Trial(Protocol):
    """A cluster that an image is tried in, and what is tried in it."""

    network: Network

    FIRST: tuple[str, str]
    """What start() does: its name, its stage."""

    def start(self) -> None:
        """Start the controller, or what else a node meets."""

    def user_data(self, node: str) -> str:
        """Return what makes a node join."""

    def work(self, node: Machine) -> list[tuple[str, str, Callable[[], None]]]:
        """Return what is tried on a node that has joined: its name, its stage, and what does it."""

    def work_again(self, node: Machine) -> None:
        """Try whether the node works after a reboot."""

    def logs(self) -> dict[str, str]:
        """Return what the controller said, by the names of files."""


class SlurmTrial:
    """A Slurm cluster that an image is tried in.

    Args:
        made: the cluster.
        soft_roce: give its nodes an RDMA device.
    """

    FIRST = verify_kubernetes.CONTROLLER_STEP

    def __init__(self, made: Cluster, *, soft_roce: bool = False) -> None:
        self.made = made
        self.network = made.network
        self.soft_roce = soft_roce

    def start(self) -> None:
        """Start the controller."""
        self.made.controller.start()

    def user_data(self, node: str) -> str:
        """Return what makes a node join."""
        joining = self.made.user_data(node)
        return verify_roce.with_soft_roce(joining) if self.soft_roce else joining

    def work(self, node: Machine) -> list[tuple[str, str, Callable[[], None]]]:
        """Return what is tried."""
        return [
            ("a job runs on it", "srun", lambda: self.work_again(node)),
            ("a batch job leaves its result", "sbatch", lambda: _batch(self.made, node)),
            ("two tasks run within their limits", "limits", lambda: _limits(self.made)),
        ]

    def work_again(self, node: Machine) -> None:  # noqa: ARG002 - of the protocol
        """Run a job on it."""
        _expect(self.made, ["srun", "hostname"], NODE)

    def logs(self) -> dict[str, str]:
        """Return what the controller said."""
        return {"slurmctld.log": self.made.controller.log()}


@contextmanager
def trial(record: Record, image: Path, settings: Settings, log: Log) -> Iterator[Trial]:
    """Give the cluster for an image's platform; its controller is not started yet.

    Args:
        record: of the image.
        image: its file.
        settings: of the site.
        log: takes what the programs that set it up say.

    Raises:
        BakehouseError: this host cannot have one.
    """
    if record.platform == "kubernetes":
        programs = kubernetes.binaries(kubernetes.version_of(record), settings)
        with kubernetes_cluster.up(record, image, programs, settings.mirrors(), settings.cache, log) as made:
            yield verify_kubernetes.KubernetesTrial(made)
    elif record.platform == "roce":
        with (
            tempfile.TemporaryDirectory(prefix="bakehouse-verify-") as folder,
            network.up(log, mtu=verify_roce.MTU) as place,
        ):
            boot = partial(_boot_peer, record, image, settings, place, machine.make_key(Path(folder)))
            with verify_roce.RoceTrial(place, boot) as pair:
                yield pair
    else:
        has_roce = record.has_element("roce")
        mtu = verify_roce.MTU if has_roce else network.DEFAULT_MTU
        with cluster.up(image, log, mtu=mtu) as plain:
            yield SlurmTrial(plain, soft_roce=has_roce)


def _boot_peer(
    record: Record, image: Path, settings: Settings, place: Network, key: Path, name: str, user_data: str
) -> AbstractContextManager[Machine]:
    return machine.boot(
        image, probe=settings.cache / "kvm", firmware=cast(machine.Firmware, record.firmware[0]),
        memory=MEMORY[record.platform], disk_size=DISK, key=key, user_data=user_data, hostname=name, network=place,
    )  # fmt: skip


def verify(
    record: Record,
    store: LocalStore,
    settings: Settings,
    console: Console,
    *,
    firmware: machine.Firmware | None = None,
    suites: Suites | None = None,
    verbose: bool = False,
) -> Record:
    """Verify an image and write the result into its record.

    Args:
        record: the image.
        store: where it is.
        settings: of the site: where the answer about KVM is kept, and what a control plane is made of.
        console: shows progress.
        firmware: what to boot it under; the first that the image has by default.
        suites: what to ask it; by default tests/image.
        verbose: show what the tools say.

    Returns:
        The record with the result: an image that failed is marked.

    Raises:
        BakehouseError: this host cannot verify; nothing is said of the image then.
    """
    image = store.image(record)
    needed(record)
    firmware = firmware or cast(machine.Firmware, record.firmware[0])
    wanted = (suites or Suites((OWN_SUITES,))).of(record)
    evidence = store.folder(record.tag) / EVIDENCE
    own_lock = store.root / ".locks" / f"verify-{record.tag}.lock"
    title = f"Verifying {record.name} {record.tag}"
    started = datetime.datetime.now(datetime.UTC)
    seen = _Seen()
    with (
        run.ending_on_sigterm(),
        lock.held(own_lock, f"the verification of {record.tag}", wait=True, say=console.print),
        _fresh(evidence),
        Progress(title, stages(record.platform), console, verbose=verbose) as progress,
        Log(evidence / "verify.log", progress.line) as log,
    ):
        job = _Run(record, progress)
        try:
            _joined(job, image, settings, firmware, wanted, evidence, log, seen)
        except _FailedError as error:
            log.write(f"bakehouse: failed: {error}")
        result = Verification(
            result="passed" if all(check.passed for check in [*job.checks, *seen.suite]) else "failed",
            at=started,
            seconds=round(progress.elapsed, 1),
            accelerator=seen.accelerator,
            firmware=firmware,
            checks=job.checks,
            suite=seen.suite,
            timeline=seen.timeline,
            rejoin=seen.rejoin,
        )
        return store.amend(record.tag, {"verification": result})


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Give an empty folder for what is seen."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield


def needed(record: Record) -> None:
    """Check that this host can verify an image.

    Raises:
        BakehouseError: it lacks a tool, or the platform cannot be verified yet.
    """
    host.must_have_tools()
    if record.platform not in MEMORY:
        known = " and ".join(MEMORY)
        raise BakehouseError(f"images of the platform {record.platform} cannot be verified", hint=f"{known} can")


@dataclass
class _Seen:
    """What is found on the way, kept also where a later step fails."""

    accelerator: str = ""
    timeline: Timeline | None = None
    rejoin: Timeline | None = None
    suite: list[Check] = field(default_factory=list)


def _joined(
    job: _Run,
    image: Path,
    settings: Settings,
    firmware: machine.Firmware,
    suites: list[Path],
    evidence: Path,
    log: Log,
    seen: _Seen,
) -> None:
    with tempfile.TemporaryDirectory(prefix="bakehouse-verify-") as folder, ExitStack() as stack:
        tried = stack.enter_context(trial(job.record, image, settings, log))
        stack.callback(lambda: _keep(tried.logs(), evidence))
        with job.check(*tried.FIRST):
            tried.start()
        node = stack.enter_context(machine.boot(
            image, probe=settings.cache / "kvm", firmware=firmware, memory=MEMORY[job.record.platform], cpus=CPUS,
            disk_size=DISK, key=machine.make_key(Path(folder)), user_data=tried.user_data(NODE), hostname=NODE,
            network=tried.network, keep_console=evidence / "console.log",
        ))  # fmt: skip
        seen.accelerator = node.accelerator
        try:
            _boot_to_off(job, tried, node, suites, evidence, seen)
        finally:
            if node.running:
                node.collect(evidence)


def _keep(logs: dict[str, str], evidence: Path) -> None:
    for name, text in logs.items():
        (evidence / name).write_text(text)


def _boot_to_off(job: _Run, trial: Trial, node: Machine, suites: list[Path], evidence: Path, seen: _Seen) -> None:
    with job.check("it boots and joins the cluster", "boot and join"):
        wait_for_join(node)
    first_work = 0.0
    for name, stage, do in trial.work(node):
        with job.check(name, stage):
            do()
        first_work = first_work or time.monotonic()
    seen.timeline = read_timeline(node, node.started)
    seen.timeline = timeline.with_moment(seen.timeline, timeline.FIRST_JOB, first_work - node.started)
    with job.check("it rejoins after a reboot", "reboot and rejoin"):
        reset = _reboot(node)
        trial.work_again(node)
    seen.rejoin = read_timeline(node, reset)
    with job.check("it is what its suites expect", "suite"):
        seen.suite = ask(node.login, suites, job.record, evidence)
        failed = [case.name for case in seen.suite if not case.passed]
        if failed:
            raise BakehouseError(f"{len(failed)} of {len(seen.suite)} facts do not hold: {', '.join(failed)}")
    with job.check("it goes down when the power button is pressed", "power off"):
        node.collect(evidence)
        if not node.stop():
            raise BakehouseError("it had to be switched off")


class Node(Protocol):
    """A machine as far as a join is waited for and its boot is timed: in QEMU, or a server on a cloud."""

    @property
    def console(self) -> NodeConsole:
        """Its serial console."""

    @property
    def accelerator(self) -> str:
        """How it is run: kvm or tcg (emulation); empty where that is not known."""

    def wait(self, what: str, fact: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds; raises where the machine has ended."""

    def wait_for_ssh(self, seconds: float) -> None:
        """Wait until one can log in."""

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command in it."""


class NodeConsole(Protocol):
    """What a machine said on its serial console."""

    @property
    def lines(self) -> list[ConsoleLine]:
        """The lines so far."""

    def find(self, pattern: str, start: int = 0) -> tuple[int, ConsoleLine] | None:
        """Return the first line with a pattern, and its number."""


def wait_for_join(
    node: Node, start: int = 0, seconds: float = JOIN_SECONDS, *, ask_seconds: float | None = None
) -> int:
    """Wait until the agent of a machine says that it has joined. Return the number of the console's line.

    The kernel writes to the console when it likes, and so into the middle of the agent's line. Now and then a node that
    has said nothing is asked, therefore.

    Args:
        node: the machine.
        start: the number of the console's line to begin with.
        seconds: how long at most.
        ask_seconds: how often it is asked; ASK_SECONDS by default.

    Raises:
        BakehouseError: it says that it cannot, or it says nothing within the time.
    """
    asked = time.monotonic()

    def is_over() -> bool:
        nonlocal asked
        if node.console.find(AGENTS_END, start):
            return True
        if time.monotonic() - asked < (ASK_SECONDS if ask_seconds is None else ask_seconds):
            return False
        asked = time.monotonic()
        return agents_status(node).get("state") == "joined"

    node.wait("join", is_over, seconds)
    line, said = node.console.find(AGENTS_END, start) or (len(node.console.lines) - 1, None)
    if said and " failed" in said.text:
        raise BakehouseError(f"the node cannot join: {said.text.partition('bakehouse-agent: ')[2]}")
    return line


def agents_status(node: Node) -> dict[str, Any]:
    """Return what the agent of a machine says when it is asked; nothing where that does not work."""
    try:
        done = node.ssh("bakehouse-agent status --json")
        found: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return {}
    return found


def read_timeline(node: Node, power_on: float) -> Timeline:
    """Return the timeline of a machine's boot.

    Args:
        node: the machine.
        power_on: when it was switched on or reset, seconds of the host's monotonic clock.

    Raises:
        BakehouseError: it does not answer.
    """
    node.wait_for_ssh(COMMAND_SECONDS)
    asked = time.monotonic()
    try:
        said = node.ssh(GUEST_COMMAND, timeout=COMMAND_SECONDS).stdout
    except subprocess.TimeoutExpired as error:
        raise BakehouseError(f"the node does not say when it did what within {COMMAND_SECONDS} s") from error
    facts = GuestFacts.parse(said)
    answered = time.monotonic()
    return timeline.from_boot(
        node.console.lines, power_on, facts, accelerator=node.accelerator, asked=(asked, answered)
    )


def _expect(made: Cluster, command: list[str], answer: str) -> None:
    done = made.controller.run(*command, timeout=COMMAND_SECONDS)
    if done.returncode != 0 or done.stdout.strip() != answer:
        raise BakehouseError(f"{' '.join(command)} said '{done.stdout.strip()}', not '{answer}'", log=done.stderr)


def _batch(made: Cluster, node: Machine) -> None:
    result = "/var/tmp/bakehouse-verify"  # noqa: S108 - on the node, which is thrown away
    script = f"#!/bin/sh\necho $SLURM_JOB_ID $(hostname) > {result}\n"
    made.controller.write("tmp/job.sh", script)
    done = made.controller.run(
        "sbatch", "--wait", "--parsable", "--chdir=/tmp", "--output=/dev/null", "/tmp/job.sh",  # noqa: S108
        timeout=COMMAND_SECONDS,
    )  # fmt: skip
    number = done.stdout.strip()
    if done.returncode != 0 or not number.isdigit():
        raise BakehouseError("the batch job failed", log=done.stdout + done.stderr)
    node.wait_for_ssh(COMMAND_SECONDS)
    said = node.ssh(f"cat {result}; sudo rm {result}").stdout.strip()
    if said != f"{number} {NODE}":
        raise BakehouseError(f"the batch job's result is '{said}', not '{number} {NODE}'")


def _limits(made: Cluster) -> None:
    command = ["srun", "--ntasks=2", "--cpus-per-task=1", f"--mem={TASK_MEMORY}M", "--cpu-bind=cores"]
    done = made.controller.run(*command, "bash", "-c", LIMITS, timeout=COMMAND_SECONDS)
    expected = [f"task {number} cpus 1 memory {TASK_MEMORY << 20}" for number in range(2)]
    if sorted(done.stdout.splitlines()) != expected:
        raise BakehouseError(f"the tasks are not within their limits: {done.stdout.strip()}", log=done.stderr)
    # tail keeps all of its input in memory, since it holds no end of a line.
    greedy = f"head -c {2 * TASK_MEMORY}M /dev/zero | tail"
    done = made.controller.run("srun", f"--mem={TASK_MEMORY}M", "bash", "-c", greedy, timeout=COMMAND_SECONDS)
    if done.returncode == 0 or "oom" not in done.stderr.lower():
        raise BakehouseError("a task that takes more memory than it may is not stopped", log=done.stderr)


def _reboot(node: Machine) -> float:
    """Reboot a machine and wait until it has joined again. Return when it was reset."""
    start = len(node.console.lines)
    node.ssh("sudo systemctl --no-block reboot")
    # What the firmware or the kernel says first; the boot loader's menu says nothing.
    line = node.wait_for_console("reboot", r"Linux version|Booting |SeaBIOS|BdsDxe|\x1bc", JOIN_SECONDS, start)
    found = node.console.find(r"reboot: Restarting system|Reached target .*reboot.target|Rebooting", start)
    reset = found[1].at if found else node.console.lines[line].at
    wait_for_join(node, start)
    return reset


def ask_host(
    host_name: str, suites: list[Path], record: Record | None, report: Path, *, ssh_config: Path | None = None
) -> list[Check]:
    """Run testinfra suites against a real node, over SSH as the user's own configuration has it.

    Args:
        host_name: such as root@node; another user needs sudo without a password.
        suites: files.
        record: of its image, where it is known.
        report: the file to write, in JUnit's form.
        ssh_config: an ssh_config(5) in place of the user's own.

    Returns:
        A check for each fact; those that do not apply are left out.

    Raises:
        BakehouseError: the suites could not be run at all: the node does not answer, for one.
    """
    user = host_name.rpartition("@")[0]
    options = [f"--hosts=ssh://{host_name}", *([] if user == "root" else ["--sudo"])]
    if ssh_config:
        options.append(f"--ssh-config={ssh_config}")
    with tempfile.TemporaryDirectory(prefix="bakehouse-suite-") as name:
        if record:
            (Path(name) / FILE_NAME).write_text(record.model_dump_json())
            options.append(f"--record={Path(name) / FILE_NAME}")
        done = _pytest([], suites, options, report)
    return _facts(done, report)


def _pytest(
    prefix: Sequence[str], suites: list[Path], options: Sequence[str | Path], report: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *prefix, sys.executable, "-m", "pytest", "-q", "--rootdir", OWN_SUITES, "-p", "no:cacheprovider",
            "-W", "default", "-c", os.devnull, "-p", "bakehouse.suite", f"--confcutdir={OWN_SUITES}", *suites,
            *options, f"--junitxml={report}",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=SUITE_SECONDS,
    )  # fmt: skip


def _facts(done: subprocess.CompletedProcess[str], report: Path) -> list[Check]:
    # 0: all passed, 1: some failed (pytest's documentation, exit codes).
    if done.returncode not in {0, 1} or not report.is_file():
        raise BakehouseError("the suites could not be run", log=(done.stdout + done.stderr)[-3000:])
    return [*_cases(report)]


def ask(login: Login, suites: list[Path], record: Record, evidence: Path) -> list[Check]:
    """Run testinfra suites against a node.

    Args:
        login: how to reach it.
        suites: files.
        record: of its image.
        evidence: where the report goes (``suite.xml``, in JUnit's form, and ``suite.txt``).

    Returns:
        A check for each fact; those that do not apply are left out.

    Raises:
        BakehouseError: the suites could not be run at all.
    """
    report = evidence / "suite.xml"
    with tempfile.TemporaryDirectory(prefix="bakehouse-suite-") as name:
        folder = Path(name)
        (folder / FILE_NAME).write_text(record.model_dump_json())
        config = folder / "ssh-config"
        config.write_text(login.config(folder))
        options = [
            f"--hosts=ssh://{login.user}@{login.host}:{login.port}", f"--ssh-config={config}", "--sudo",
            f"--record={folder / FILE_NAME}",
        ]  # fmt: skip
        done = _pytest(login.prefix, suites, options, report)
    (evidence / "suite.txt").write_text(done.stdout + done.stderr)
    return _facts(done, report)


def _cases(report: Path) -> Iterator[Check]:
    # Written by pytest just now.
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        if case.find("skipped") is None:
            name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name', '').partition('[')[0]}"
            yield Check(
                name=name.replace("test_", "").replace("_", " "),
                passed=wrong is None,
                seconds=float(case.get("time", 0)),
                detail="" if wrong is None else (wrong.get("message") or "")[:2000],
            )
