"""Whether KVM works here.

That /dev/kvm opens proves little: in nested virtual machines and containers it may open while no kernel boots. So a
kernel is booted, with a deadline, and the answer remembered per host and kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError

DEADLINE_SECONDS = 20
"""Under KVM a kernel prints its first lines within two seconds; a busy host may need more."""

DOUBTFUL_SECONDS = 86400
"""How long a no is remembered: the host may only have been busy."""

DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class Answer:
    """What was found."""

    works: bool
    reason: str
    remedy: str = ""


def works(folder: Path) -> Answer:
    """Say whether KVM boots a kernel here.

    Args:
        folder: where answers are remembered and where bakes leave a kernel to try with.

    Raises:
        BakehouseError: there is KVM but no kernel to try it with.
    """
    if not DEVICE.exists():
        return Answer(False, "there is no /dev/kvm", "enable virtualisation in the firmware, or nested virtualisation")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Answer(
            False, "/dev/kvm may not be opened by this user", "add the user to the group kvm: adduser $USER kvm"
        )
    kernel = _find_kernel(folder)
    note = folder / f"answer-{_key(kernel)}.json"
    try:
        answer = Answer(**json.loads(note.read_text()))
        if answer.works or time.time() - note.stat().st_mtime < DOUBTFUL_SECONDS:
            return answer
    except (OSError, ValueError, TypeError):
        pass
    if not shutil.which("qemu-system-x86_64"):
        return Answer(False, "qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86")
    answer = _try(kernel)
    write_atomically(note, json.dumps(asdict(answer)))
    return answer


def _find_kernel(folder: Path) -> Path:
    kept = sorted(folder.glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    own = Path(f"/boot/vmlinuz-{platform.release()}")
    others = sorted(Path("/boot").glob("vmlinuz-*"))
    for kernel in [*reversed(kept), own, *reversed(others)]:
        if kernel.is_file() and os.access(kernel, os.R_OK):
            return kernel
    return _fetch_kernel(folder)


def _fetch_kernel(folder: Path) -> Path:
    """Take Debian's cloud kernel out of its package: machines in containers have no kernel of their own in /boot."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            listing = subprocess.run(
                ["apt-cache", "depends", "--important", "linux-image-cloud-amd64"],
                capture_output=True,
                text=True,
                check=True,
            )
            package = next(
                word for word in listing.stdout.split() if word.startswith("linux-image-") and word[12].isdigit()
            )
            subprocess.run(
                ["apt-get", "download", "-o", "APT::Sandbox::User=root", package],
                cwd=scratch, capture_output=True, check=True,
            )  # fmt: skip
            deb = next(Path(scratch).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb, f"{scratch}/x"], capture_output=True, check=True)
            kernel = next(Path(scratch, "x/boot").glob("vmlinuz-*"))
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise BakehouseError(
                "/dev/kvm opens, but there is no kernel to try it with",
                hint="bake an image first, or install linux-image-cloud-amd64's package list with apt-get update",
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / kernel.name
        partial = folder / f".{kernel.name}.{os.getpid()}"
        partial.write_bytes(kernel.read_bytes())
        partial.rename(target)
        return target


def _key(kernel: Path) -> str:
    host = [platform.node(), platform.release(), platform.version(), str(kernel), str(kernel.stat().st_size)]
    return hashlib.sha256("\n".join(host).encode()).hexdigest()[:16]


def _try(kernel: Path) -> Answer:
    """Boot the kernel without a root: that it panics for want of one, and so ends the machine, is the proof."""
    command = [
        "qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-nographic",
        "-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_SECONDS, check=False
        )
        output, ended = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as error:
        output, ended = (error.stdout or b"") + (error.stderr or b""), False
    text = output.decode(errors="replace")
    if ended and "Kernel panic" in text:
        return Answer(True, f"booted {kernel.name}")
    if not ended:
        how = "printed nothing" if "Linux version" not in text else "hung in its boot"
        return Answer(
            False,
            f"/dev/kvm opens, but {kernel.name} {how} within {DEADLINE_SECONDS} s",
            "this host may lack nested virtualisation; ask who runs it",
        )
    last = text.strip().splitlines()[-1:] or ["no output"]
    return Answer(False, f"KVM does not start: {last[0].strip()[:200]}", "see the host's virtualisation settings")
