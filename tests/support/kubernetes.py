"""Kubernetes for our own tests, built from Debian's source package where upstream's packages cannot be had.

Debian has no package of the kubelet. The source package ``kubernetes`` of Debian 12 holds all of Kubernetes 1.20: old,
but the real thing. It is built once, in a root of Debian 12, so that the host's own release does not matter. Then it is
put into the forms in which upstream publishes: a signed apt repository, release binaries with their digests, images.
What is under test so runs the very code that a user's bake runs. Users take current versions from upstream.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from bakehouse import lock, run
from bakehouse.run import Isolation, Log

VERSION = "1.20.2"
MINOR = "1.20"
SCRIPT = Path(__file__).with_name("kubernetes_build.sh")

BUILD_PACKAGES = [
    "golang-go", "golang-github-modern-go-reflect2-dev", "rsync", "jq", "make", "gcc", "libc6-dev", "ca-certificates",
    "dpkg-dev", "iptables", "conntrack", "dnsmasq-base", "busybox-static",
]  # fmt: skip

REGISTRY = "k8s.gcr.io"
"""Where Kubernetes 1.20 looks for its images."""

KUBELET_UNIT = """\
[Unit]
Description=kubelet: The Kubernetes Node Agent
Documentation=https://kubernetes.io/docs/
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=/usr/bin/kubelet
Restart=always
StartLimitInterval=0
RestartSec=10

[Install]
WantedBy=multi-user.target
"""
"""As in upstream's package (kubernetes/release, cmd/krel/templates/latest/kubelet/kubelet.service)."""

KUBEADM_DROP_IN = """\
[Service]
Environment="KUBELET_KUBECONFIG_ARGS=--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf"
Environment="KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml"
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
EnvironmentFile=-/etc/default/kubelet
ExecStart=
ExecStart=/usr/bin/kubelet $KUBELET_KUBECONFIG_ARGS $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
"""  # noqa: E501
"""As in upstream's package (kubernetes/release, cmd/krel/templates/latest/kubeadm/10-kubeadm.conf)."""

DNS_SCRIPT = """\
#!/bin/busybox sh
# Stands where CoreDNS stands in a cluster, for tests of a node: answers one name, and says that it is well.
/bin/busybox httpd -p 8080 -h /www
/bin/busybox httpd -p 8181 -h /www
exec /usr/sbin/dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root --log-facility=- --no-resolv --no-hosts \\
    --pid-file= --address=/kubernetes.default.svc.cluster.local/10.96.0.1
"""

DEPENDENCIES = {"kubelet": "iptables, mount, util-linux, ethtool, conntrack, socat", "kubeadm": "kubelet, kubectl"}


@dataclass(frozen=True)
class Built:
    """What was built."""

    folder: Path

    @property
    def packages(self) -> Path:
        """The root of an apt repository in upstream's layout: ``v1.20/deb/`` below it."""
        return self.folder / "packages"

    @property
    def debs(self) -> Path:
        """A folder of .deb files and nothing else."""
        return self.folder / "packages" / f"v{MINOR}" / "deb" / "amd64"

    @property
    def fingerprint(self) -> str:
        """Of the key that the repository is signed with."""
        return (self.folder / "fingerprint").read_text().strip()

    @property
    def binaries(self) -> Path:
        """A folder in the layout of dl.k8s.io: ``v1.20.2/bin/linux/amd64/``."""
        return self.folder / "release"

    @property
    def images(self) -> Path:
        """A folder of image archives."""
        return self.folder / "images"


def build(cache: Path, mirrors: tuple[str, str], target: Path, say: Callable[[str], None] = print) -> Built:
    """Build Kubernetes, unless the cache has it, and publish it in a folder. The first time takes minutes. Needs root.

    Args:
        cache: the folder that the programs are kept in.
        mirrors: archive and security archive of Debian.
        target: the folder to publish in; it must not be there.
        say: told what is done.
    """
    code = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    compiled = cache / f"kubernetes-{VERSION}-{code}"
    cache.mkdir(parents=True, exist_ok=True)
    with lock.held(cache / f"{compiled.name}.lock", "the build of Kubernetes", wait=True, say=say):
        if not compiled.is_dir():
            say(f"building Kubernetes {VERSION} from Debian's source; this takes some minutes")
            with tempfile.TemporaryDirectory(prefix="kubernetes-build-", dir=cache) as name:
                _compile(Path(name), mirrors)
                (Path(name) / "root" / "out").rename(compiled)
                run.remove_tree(Path(name) / "root")
    _packages(compiled, target)
    _binaries(compiled, target / "release" / f"v{VERSION}" / "bin" / "linux" / "amd64")
    _images(compiled, target / "images")
    return Built(target)


def _compile(work: Path, mirrors: tuple[str, str]) -> None:
    root = work / "root"
    sources = [
        f"{kind} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirrors[0]} bookworm main"
        for kind in ("deb", "deb-src")
    ]
    with Log(work / "build.log") as log, Isolation(log) as place:
        place.run([
            "mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(BUILD_PACKAGES)}",
            '--aptopt=APT::Install-Recommends "0"', "--dpkgopt=force-unsafe-io", "--skip=cleanup/apt/lists",
            "bookworm", root, *sources,
        ])  # fmt: skip
        shutil.copy(SCRIPT, root / "build.sh")
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        for kind, target in (("proc", "proc"), ("tmpfs", "tmp")):
            place.run(["mount", "-t", kind, kind, root / target])
        place.run(["mount", "--bind", "/dev", root / "dev"])
        place.run(["chroot", root, "bash", "/build.sh", VERSION, "/out"])


def _packages(compiled: Path, target: Path) -> None:
    """Make the packages, and a repository of them in the layout of pkgs.k8s.io: flat, signed, its key beside it."""
    repository = target / "packages" / f"v{MINOR}" / "deb"
    debs = repository / "amd64"
    debs.mkdir(parents=True)
    index = ""
    for program in ("kubelet", "kubeadm", "kubectl"):
        deb = debs / f"{program}_{VERSION}-1.1_amd64.deb"
        with tempfile.TemporaryDirectory(prefix="deb-") as name:
            _package(Path(name), program, compiled, deb)
        fields = subprocess.check_output(["dpkg-deb", "--field", deb], text=True)
        index += f"{fields}Filename: amd64/{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {_sha256(deb)}\n\n"
    (repository / "Packages").write_text(index)
    (repository / "Release").write_text(
        "Origin: obs://build.opensuse.org/isv:kubernetes:core:stable\nLabel: Kubernetes of the tests\n"
        f"Date: {formatdate(usegmt=True)}\nArchitectures: amd64\nSHA256:\n"
        f" {_sha256(repository / 'Packages')} {len(index.encode())} Packages\n"
    )
    with tempfile.TemporaryDirectory(prefix="gpg-") as home:
        _sign(repository, ["gpg", "--homedir", home, "--batch", "--quiet"], target / "fingerprint")


def _package(tree: Path, program: str, compiled: Path, deb: Path) -> None:
    depends = f"Depends: {DEPENDENCIES[program]}\n" if program in DEPENDENCIES else ""
    control = (
        f"Package: {program}\nVersion: {VERSION}-1.1\nArchitecture: amd64\nSection: net\nPriority: optional\n"
        f"Maintainer: Bakehouse tests <bakehouse@example.org>\n{depends}"
        f"Description: {program} {VERSION}, built of Debian's source for tests\n"
    )
    _write(tree / "DEBIAN/control", control.encode())
    _write(tree / "usr/bin" / program, (compiled / program).read_bytes(), 0o755)
    if program == "kubelet":
        _write(tree / "usr/lib/systemd/system/kubelet.service", KUBELET_UNIT.encode())
    if program == "kubeadm":
        _write(tree / "usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf", KUBEADM_DROP_IN.encode())
    tree.chmod(0o755)
    command: list[str | Path] = ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1", tree, deb]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _sign(repository: Path, gpg: list[str], fingerprint: Path) -> None:
    key = ["--passphrase", "", "--quick-generate-key", "Bakehouse tests", "ed25519", "sign", "never"]
    subprocess.run([*gpg, *key], check=True)
    for words in (["--clearsign", "-o", "InRelease"], ["--detach-sign", "--armor", "-o", "Release.gpg"]):
        subprocess.run([*gpg, *words, "Release"], cwd=repository, check=True)
    exported = subprocess.check_output([*gpg, "--armor", "--export"])
    (repository / "Release.key").write_bytes(exported)
    listed = subprocess.check_output([*gpg, "--with-colons", "--list-keys"], text=True)
    (found,) = [line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:")]
    fingerprint.write_text(found)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _binaries(compiled: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for program in ("kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        shutil.copy(compiled / program, target / program)
        (target / f"{program}.sha256").write_text(_sha256(target / program))


def _images(compiled: Path, target: Path) -> None:
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="images-") as name:
        pause, proxy, dns = (Path(name) / part for part in ("pause", "proxy", "dns"))
        _write(pause / "pause", (compiled / "pause").read_bytes(), 0o755)
        archive(pause, f"{REGISTRY}/pause:3.2", ["/pause"], target / "pause.tar")
        shutil.copytree(compiled / "proxy-root", proxy)
        _write(proxy / "usr/local/bin/kube-proxy", (compiled / "kube-proxy").read_bytes(), 0o755)
        archive(proxy, f"{REGISTRY}/kube-proxy:v{VERSION}", ["/usr/local/bin/kube-proxy"], target / "kube-proxy.tar")
        shutil.copytree(compiled / "dns-root", dns)
        _write(dns / "coredns", DNS_SCRIPT.encode(), 0o755)
        _write(dns / "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        for answer in ("health", "ready"):
            _write(dns / "www" / answer, b"OK\n")
        archive(dns, f"{REGISTRY}/coredns:1.7.0", ["/coredns"], target / "coredns.tar")


def archive(root: Path, name: str, entrypoint: list[str], target: Path) -> None:
    """Make an image archive of one layer, in the form of ``docker save`` (Docker image specification 1.2).

    Args:
        root: what the layer holds.
        name: of the image, with its tag.
        entrypoint: what it runs.
        target: the file to write.
    """
    for folder in ("tmp", "run", "etc", "var"):
        (root / folder).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(root, arcname=".", filter=_of_root)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint, "Env": [path]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }).encode()  # fmt: skip
    number = hashlib.sha256(config).hexdigest()
    manifest = [{"Config": f"{number}.json", "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]
    files = {
        f"{number}.json": config,
        f"{digest}/layer.tar": layer.getvalue(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(target, "w") as tar:
        for inside, content in files.items():
            entry = tarfile.TarInfo(inside)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
