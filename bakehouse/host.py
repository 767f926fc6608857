"""The host: which tools it needs, which it has, and whether it can do the work (``invoke doctor``).

Also runs before the virtual environment is complete (``./run``): what is imported at the top is standard library only.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bakehouse.settings import Settings

GIB = 1 << 30
DISK_NEEDED = 6 * GIB
"""Free bytes that a cold bake may take: base root, packages, build folder, image."""
MEMORY_NEEDED = 3 * GIB


@dataclass(frozen=True)
class Tool:
    """A program or file that a host must have."""

    name: str
    package: str
    purpose: str


TOOLS = (
    Tool("sudo", "sudo", "diskimage-builder calls it, also as root"),
    Tool("mmdebstrap", "mmdebstrap", "base roots"),
    Tool("unshare", "util-linux", "namespaces that keep a build from leaking"),
    Tool("mount", "mount", "diskimage-builder calls it"),
    Tool("ps", "procps", "diskimage-builder calls it"),
    Tool("sfdisk", "fdisk", "partition tables"),
    Tool("sgdisk", "gdisk", "config drives as Ironic writes them"),
    Tool("mke2fs", "e2fsprogs", "root filesystems"),
    Tool("mformat", "mtools", "EFI system partitions"),
    Tool("grub-mkimage", "grub-common", "boot loaders"),
    Tool("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin", "BIOS boot"),
    Tool("/usr/lib/grub/x86_64-efi/normal.mod", "grub-efi-amd64-bin", "UEFI boot"),
    Tool("qemu-img", "qemu-utils", "image formats"),
    Tool("qemu-system-x86_64", "qemu-system-x86", "booting images"),
    Tool("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf", "booting images under UEFI"),
    Tool("xorriso", "xorriso", "cloud-init seeds"),
    Tool("zstd", "zstd", "compressed base roots"),
    Tool("ssh", "openssh-client", "logging in to booted images"),
    Tool("setpriv", "util-linux", "ending machines together with us"),
    Tool("ip", "iproute2", "private networks of booted images"),
    Tool("ss", "iproute2", "waiting for what is served in them"),
    Tool("pkill", "procps", "stopping what runs in them"),
    Tool("nsenter", "util-linux", "working in them"),
    Tool("dnsmasq", "dnsmasq-base", "addresses and names in them"),
    Tool("dpkg-query", "dpkg", "reading package lists"),
    Tool("fstrim", "util-linux", "diskimage-builder asks for it"),
    Tool("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "checking packages"),
    Tool("/etc/ssl/certs/ca-certificates.crt", "ca-certificates", "mirrors by https"),
    Tool("gpg", "gpg", "checking the key of Kubernetes' packages"),
    Tool("git", "git", "the commit in an image's record"),
)

TEST_TOOLS = (
    Tool("systemd-nspawn", "systemd-container", "containers of a baked root"),
    Tool("/usr/lib/python3/dist-packages/yaml/__init__.py", "python3-yaml", "the join agent, run as on a node"),
    Tool("curl", "curl", "asking what is served in private networks"),
    Tool("openssl", "openssl", "the certificates of the join broker's documentation"),
    Tool("faketime", "faketime", "clocks that are wrong"),
)
"""What only our own tests need."""

PACKER_TOOLS = (Tool("packer", "packer", "images that are baked with Packer"),)
"""What only `invoke bake --builder packer` needs."""

CONTAINER_TOOLS = (
    Tool("buildah", "buildah", "container images of the hybrid path"),
    Tool("docker-registry", "docker-registry", "a registry for them on this host"),
)
"""What only the tasks container.* and registry.* need."""

VERSIONED = {
    "mmdebstrap": "mmdebstrap",
    "grub": "grub-common",
    "e2fsprogs": "e2fsprogs",
    "mtools": "mtools",
    "qemu-img": "qemu-utils",
}
"""Tools whose version is an input of an image's digest, and their packages."""


def missing(wanted: tuple[Tool, ...] = TOOLS) -> list[Tool]:
    """Return the tools that this host lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [
        tool
        for tool in wanted
        if not (Path(tool.name).exists() if tool.name.startswith("/") else shutil.which(tool.name, path=path))
    ]


def must_have_tools(wanted: tuple[Tool, ...] = TOOLS) -> None:
    """Check that this host has all tools.

    Args:
        wanted: which.

    Raises:
        BakehouseError: it lacks some.
    """
    from bakehouse.errors import BakehouseError

    if lacking := missing(wanted):
        raise BakehouseError(
            f"this host lacks {', '.join(tool.name for tool in lacking)}",
            hint=f"apt-get install {' '.join(packages_of(lacking))}",
        )


def packages_of(tools: list[Tool]) -> list[str]:
    """Return the packages that hold tools, sorted, each once."""
    return sorted({tool.package for tool in tools})


@cache
def versions() -> dict[str, str]:
    """Return the versions of what builds images; ``missing`` for what is not installed."""
    import diskimage_builder.version

    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version}\\n", *VERSIONED.values()],
        capture_output=True,
        text=True,
        check=False,
    )
    installed = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    found = {name: installed.get(package) or "missing" for name, package in VERSIONED.items()}
    return {"diskimage-builder": str(diskimage_builder.version.version_info.version_string()), **found}


def install_missing(tools: tuple[Tool, ...] = TOOLS) -> int:
    """Install the missing tools through apt, as root or with sudo, saying what is done. Return an exit status."""
    wanted = packages_of(missing(tools))
    if not wanted:
        return 0
    if not shutil.which("apt-get"):
        print(f"run: this host lacks {', '.join(wanted)}, and has no apt to install them with", file=sys.stderr)
        return 1
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    if prefix and not shutil.which("sudo"):
        print(f"run: as root, install: apt-get install {' '.join(wanted)}", file=sys.stderr)
        return 1
    print(f"run: installing system packages: {' '.join(wanted)}", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *wanted]
    for command in (["apt-get", "update", "--quiet=2"], install):
        done = subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
            print(f"run: {' '.join([*prefix, *command])} failed", file=sys.stderr)
            return done.returncode
    return 0


@dataclass(frozen=True)
class Check:
    """One row of the doctor's table."""

    subject: str
    state: Literal["ok", "warning", "failed"]
    finding: str
    remedy: str = ""


def examine(settings: Settings) -> Iterator[Check]:
    """Check the host; yields a row at a time."""
    yield _check_python()
    yield _check_tools()
    yield _check_container_tools()
    yield _check_root()
    yield _check_host_name()
    yield _check_space("cache", settings.cache)
    yield _check_space("store", settings.store)
    yield _check_memory()
    yield from _check_mirrors(settings)
    yield _check_kvm(settings)
    yield _check_networks()
    yield _check_clouds()


def _check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", "ok", version)


def _check_tools() -> Check:
    lacking = missing()
    if lacking:
        names = ", ".join(f"{tool.name} ({tool.purpose})" for tool in lacking)
        return Check("Tools", "failed", f"missing: {names}", f"apt-get install {' '.join(packages_of(lacking))}")
    return Check("Tools", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))


def _check_container_tools() -> Check:
    if lacking := missing(CONTAINER_TOOLS):
        names = ", ".join(f"{tool.name} ({tool.purpose})" for tool in lacking)
        remedy = f"for the hybrid path: apt-get install {' '.join(packages_of(lacking))}"
        return Check("Container tools", "ok", f"not installed: {names}", remedy)
    return Check("Container tools", "ok", ", ".join(tool.name for tool in CONTAINER_TOOLS))


def _check_root() -> Check:
    if os.geteuid() == 0:
        return Check("Root", "ok", "running as root")
    done = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False) if shutil.which("sudo") else None
    if done and done.returncode == 0:
        return Check("Root", "ok", "sudo works without a password")
    user = Path("~").expanduser().name
    line = f"{user} ALL=(ALL) NOPASSWD: ALL"
    return Check(
        "Root",
        "failed",
        "not root, and sudo asks for a password or is missing",
        f"on a machine that only builds: echo '{line}' > /etc/sudoers.d/bakehouse",
    )


def _check_host_name() -> Check:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        remedy = f"echo '127.0.1.1 {name}' >> /etc/hosts"
        return Check("Host name", "warning", f"{name} has no address ({error}); each sudo complains and waits", remedy)
    return Check("Host name", "ok", name)


def _check_space(name: str, folder: Path) -> Check:
    from bakehouse.cache import free_bytes, nearest_existing

    subject = f"Disk ({name})"
    free = free_bytes(folder)
    finding = f"{free / GIB:.1f} GiB free for {folder}"
    if not os.access(nearest_existing(folder), os.W_OK):
        return Check(subject, "failed", f"{folder} cannot be written", f"set '{name}' in bakehouse.yaml")
    if free < DISK_NEEDED:
        remedy = f"`invoke cache.prune`, or set '{name}' in bakehouse.yaml to a larger disk"
        return Check(subject, "warning", f"{finding}; a cold bake may take {DISK_NEEDED / GIB:.0f} GiB", remedy)
    return Check(subject, "ok", finding)


def _check_memory() -> Check:
    available = available_memory()
    finding = f"{available / GIB:.1f} GiB available"
    if available < MEMORY_NEEDED:
        return Check("Memory", "warning", f"{finding}; a bake and a boot take up to {MEMORY_NEEDED / GIB:.0f} GiB")
    return Check("Memory", "ok", finding)


def available_memory() -> int:
    """Return the bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _check_mirrors(settings: Settings) -> Iterator[Check]:
    from bakehouse.manifest import RELEASES

    release = next(iter(RELEASES))
    archive, security = settings.mirrors()
    wanted = [("Mirror", archive, release), ("Mirror (security)", security, f"{release}-security")]
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda each: _check_mirror(*each), wanted)


def _check_mirror(subject: str, mirror: str, suite: str) -> Check:
    from bakehouse.run import redact

    try:
        # The settings allow http, https and file addresses only.
        with urllib.request.urlopen(f"{mirror}/dists/{suite}/InRelease", timeout=10) as answer:  # noqa: S310
            answer.read(1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "set 'mirror' and 'security_mirror' in bakehouse.yaml, or http_proxy"
        return Check(subject, "failed", f"{redact(mirror)} has no {suite}: {reason}", remedy)
    return Check(subject, "ok", f"{redact(mirror)} has {suite}")


def _check_kvm(settings: Settings) -> Check:
    from bakehouse import kvm
    from bakehouse.errors import BakehouseError

    try:
        answer = kvm.works(settings.cache / "kvm")
    except BakehouseError as error:
        return Check("KVM", "warning", error.message, error.hint)
    if answer.works:
        return Check("KVM", "ok", answer.reason)
    return Check("KVM", "warning", f"{answer.reason}; machines are emulated, 10 times slower", answer.remedy)


def _check_networks() -> Check:
    """Whether images can be verified here: private networks with taps, and images mounted in them."""
    subject = "Private networks"
    devices = {"/dev/net/tun": "modprobe tun", "/dev/loop-control": "modprobe loop"}
    for device, remedy in devices.items():
        if not Path(device).exists():
            return Check(subject, "warning", f"there is no {device}: images cannot be verified here", remedy)
    try:
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n", "--"]
        command = [*prefix, "unshare", "--mount", "--pid", "--net", "--fork", "--mount-proc", "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return Check(subject, "warning", f"unshare cannot be run: {error.strerror}", "apt-get install util-linux")
    if done.returncode != 0:
        finding = f"namespaces cannot be made: {done.stderr.strip()}; images cannot be verified here"
        return Check(subject, "warning", finding, "in a container: --privileged")
    return Check(subject, "ok", "namespaces, taps and loop devices can be made")


def _check_clouds() -> Check:
    places = [Path("clouds.yaml"), Path("~/.config/openstack/clouds.yaml").expanduser()]
    places.append(Path("/etc/openstack/clouds.yaml"))
    found = [path for path in places if path.is_file()]
    if os.environ.get("OS_CLOUD") or os.environ.get("OS_AUTH_URL"):
        return Check("Cloud", "ok", f"{os.environ.get('OS_CLOUD') or 'OS_AUTH_URL'} from the environment")
    if found:
        return Check("Cloud", "ok", f"{found[0]}")
    return Check("Cloud", "ok", "no credentials; none are needed to bake, look and boot")


def needed_by(words: Sequence[str]) -> tuple[Tool, ...]:
    """Return the tools that a task needs; of no task, those of all that bake.

    Args:
        words: the task and its flags.
    """
    task = words[0] if words else ""
    # --path=hybrid and --path hybrid alike.
    words = [part for word in words for part in word.split("=")]
    if task == "test":
        return TOOLS + TEST_TOOLS + CONTAINER_TOOLS + PACKER_TOOLS
    if task.partition(".")[0] in {"container", "registry", "compare"} or {"up", "hybrid"} <= {*words}:
        return TOOLS + CONTAINER_TOOLS
    return TOOLS + PACKER_TOOLS if "packer" in words else TOOLS


if __name__ == "__main__":
    # The arguments are those of ./run: the task that it is about to start.
    sys.exit(install_missing(needed_by(sys.argv[1:])))
