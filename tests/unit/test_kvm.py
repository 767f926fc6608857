"""Whether KVM works: found out by booting a kernel, with fakes of QEMU here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bakehouse import kvm

DEADLINE = 0.5
PANIC = "echo 'Linux version 6.12'; echo 'Kernel panic - not syncing: VFS: Unable to mount root fs'"


class Host:
    """A host with a KVM device, a kernel, and a QEMU that does as it is told."""

    def __init__(self, folder: Path) -> None:
        self.probe = folder / "kvm"
        self.programs = folder / "bin"
        self.calls = folder / "calls"
        self.programs.mkdir()
        self.probe.mkdir()
        self.device = folder / "dev-kvm"
        self.device.write_text("")
        (self.probe / "vmlinuz-6.12-x").write_text("kernel")

    def qemu(self, script: str) -> None:
        program = self.programs / "qemu-system-x86_64"
        program.write_text(f'#!/bin/bash\necho "$@" >> {self.calls}\n{script}\n')
        program.chmod(0o755)

    def works(self) -> kvm.Answer:
        return kvm.works(self.probe)

    def boots(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(kvm, "DEVICE", made.device)
    monkeypatch.setattr(kvm, "DEADLINE_SECONDS", DEADLINE)
    monkeypatch.setenv("PATH", f"{made.programs}:{os.environ['PATH']}")
    return made


def test_without_a_device_nothing_is_tried(host: Host) -> None:
    host.qemu(PANIC)
    host.device.unlink()
    answer = host.works()
    assert (answer.works, answer.reason) == (False, "there is no /dev/kvm")
    assert "virtualisation" in answer.remedy
    assert host.boots() == []


def test_a_device_that_may_not_be_opened_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.qemu(PANIC)
    monkeypatch.setattr(os, "access", lambda *_: False)
    answer = host.works()
    assert not answer.works
    assert "adduser" in answer.remedy
    assert host.boots() == []


def test_a_kernel_that_boots_and_panics_is_the_proof(host: Host) -> None:
    host.qemu(PANIC)
    assert host.works() == kvm.Answer(True, "booted vmlinuz-6.12-x")
    (command,) = host.boots()
    assert "accel=kvm" in command
    assert f"-kernel {host.probe}/vmlinuz-6.12-x" in command
    assert "panic=-1" in command


def test_the_newest_kernel_is_tried(host: Host) -> None:
    (host.probe / "vmlinuz-6.1-y").write_text("another")
    os.utime(host.probe / "vmlinuz-6.12-x", (1, 1))
    host.qemu(PANIC)
    assert host.works().reason == "booted vmlinuz-6.1-y"


def test_the_answer_is_remembered(host: Host) -> None:
    host.qemu(PANIC)
    first = host.works()
    host.qemu("echo broken")
    assert host.works() == first
    assert len(host.boots()) == 1


def test_another_kernel_is_tried_anew(host: Host) -> None:
    host.qemu(PANIC)
    host.works()
    (host.probe / "vmlinuz-6.12-x").write_text("a longer kernel")
    host.works()
    assert len(host.boots()) == 2


def test_a_spoilt_answer_is_not_believed(host: Host) -> None:
    host.qemu(PANIC)
    host.works()
    (note,) = host.probe.glob("answer-*.json")
    for content in ("{", "[]", '{"works": true, "colour": 1}'):
        note.write_text(content)
        assert host.works().works
    assert len(host.boots()) == 4


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec sleep 60", f"/dev/kvm opens, but vmlinuz-6.12-x printed nothing within {DEADLINE} s"),
        ("echo 'Linux version 6.12'; exec sleep 60", f"vmlinuz-6.12-x hung in its boot within {DEADLINE} s"),
        ("echo 'Kernel panic'; exec sleep 60", f"within {DEADLINE} s"),
    ],
    ids=["silent", "half-way", "panics but does not end"],
)
def test_a_kernel_that_hangs_is_not_waited_for(host: Host, script: str, reason: str) -> None:
    host.qemu(script)
    answer = host.works()
    assert not answer.works
    assert reason in answer.reason
    assert "nested virtualisation" in answer.remedy


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo starting; echo 'failed to initialize kvm: Permission denied' >&2; exit 1",
         "KVM does not start: failed to initialize kvm: Permission denied"),
        ("exit 1", "KVM does not start: no output"),
        ("echo 'KVM: entry failed, hardware error 0x0'", "KVM does not start: KVM: entry failed, hardware error 0x0"),
    ],
)  # fmt: skip
def test_what_qemu_complains_of_is_told(host: Host, script: str, reason: str) -> None:
    host.qemu(script)
    answer = host.works()
    assert (answer.works, answer.reason) == (False, reason)


def test_a_missing_qemu_is_told_until_it_is_installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(host.programs))
        answer = host.works()
    assert (answer.works, answer.reason) == (False, "qemu-system-x86_64 is not installed")
    assert answer.remedy == "apt-get install qemu-system-x86"
    host.qemu(PANIC)
    assert host.works().works
