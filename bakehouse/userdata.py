"""User-data: what cloud-init is given so that a node joins its cluster."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import jinja2
import yaml

from bakehouse import REPOSITORY, roce
from bakehouse.errors import BakehouseError

TEMPLATES = REPOSITORY / "bootstrap" / "cloud-init"
PLAY = REPOSITORY / "bootstrap" / "ansible"

BASES = {"bootstrap": "base", "hybrid": "hybrid"}
"""Paths that set nodes up at boot, and the manifests whose images they boot. A bake boots the platform's own."""

PATHS = ("bake", *BASES)

LIMIT = 16 * 1024
"""Bytes. OpenStack takes 64 KiB of base64, other clouds 16 KiB."""

KEY_NAMES = {"munge": "munge key", "slurm": "slurm.key"}
KEY_SIZES = range(32, 1025)
"""Bytes of a key: munge's own limits (mungekey(8)); Slurm asks for 1024 at most."""

COUNTS = frozenset("CPUs Boards Sockets SocketsPerBoard CoresPerSocket ThreadsPerCore RealMemory".split())
COUNTS_FROM_ZERO = frozenset(["TmpDisk", "Weight"])
HARDWARE = COUNTS | COUNTS_FROM_ZERO | {"Gres"}
"""What may be said of a node's hardware: names of slurm.conf's NodeName line."""

# The forms below are those that the join agent takes, so that what it would refuse on a node is refused here.
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
"""One part of a host name (RFC 1123)."""
HOST = rf"{LABEL}(?:\.{LABEL})*"
LONGEST_HOST = 253
HIGHEST_PORT = 65535
FEATURE = r"[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,63}"
GRES = r"[A-Za-z0-9_]+(?::[A-Za-z0-9_.-]+){0,3}(?:,[A-Za-z0-9_]+(?::[A-Za-z0-9_.-]+){0,3})*"
PREFIXED = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
"""Keys and values of labels (kubernetes.io, Labels and Selectors, "Syntax and character set")."""
EFFECTS = "NoSchedule|PreferNoSchedule|NoExecute"
MOST_CONTROLLERS = 8
MOST_FEATURES = 64
MOST_DEVICES = 64
HIGHEST_NUMBER = 2**31
IMAGE_REFERENCE = rf"{HOST}(?::[0-9]{{1,5}})?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)+@sha256:[0-9a-f]{{64}}"
"""Of a container image, with its registry and its digest (OCI distribution specification, "Pulling manifests")."""
TOKEN = r"bhj_[A-Za-z0-9_-]{43}"  # noqa: S105 -- its form
"""The broker's tokens: 256 bits after a prefix that secret scanners can look for."""
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[\sA-Za-z0-9+/=]+-----END CERTIFICATE-----")


@dataclass(frozen=True)
class Broker:
    """Where a node fetches its key from, once.

    Raises:
        BakehouseError: a value is not of its form.
    """

    url: str
    token: str = field(repr=False)
    ca: str = field(repr=False)
    """Certificates in PEM; the broker's own must chain to one of them."""

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not re.fullmatch(TOKEN, self.token):
            raise BakehouseError(
                "the token is not one of the broker's: those begin with bhj_ and have 47 characters",
                hint="make one with: invoke join.token --platform slurm --node NAME",
            )
        object.__setattr__(self, "ca", certificates(self.ca))


@dataclass(frozen=True)
class Bundle:
    """What a plain node is made of at boot: a definition that definition.write_bundle() wrote.

    Raises:
        BakehouseError: a value is not of its form.
    """

    url: str
    """Where nodes fetch it."""
    sha256: str
    """Of the file, in hexadecimal digits: nothing else is applied."""

    def __post_init__(self) -> None:
        # It stands in a file of variables for systemd, without quotes.
        if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]@_~/?&=+%-]+", self.url) or not urlsplit(self.url).hostname:
            raise BakehouseError(
                f"{self.url!r} is not where a bundle can be", hint="https://HOST/PATH, such as https://web/slurm.tar.gz"
            )
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise BakehouseError(
                f"{self.sha256!r} is not a SHA-256", hint="64 hexadecimal digits, as sha256sum says it"
            )


@dataclass(frozen=True)
class ContainerImage:
    """What a platform's containers are started from at boot.

    Raises:
        BakehouseError: a value is not of its form.
    """

    reference: str
    """REGISTRY/NAME@sha256:DIGEST: nothing else is started."""
    insecure: bool = False
    """Whether its registry may be asked over plain HTTP, or with a certificate that nobody knows."""

    def __post_init__(self) -> None:
        if not re.fullmatch(IMAGE_REFERENCE, self.reference):
            raise BakehouseError(
                f"{self.reference!r} is not a container image by its digest",
                hint="REGISTRY/NAME@sha256:DIGEST, as `invoke container.push` prints it; a tag may move",
            )

    @property
    def registry(self) -> str:
        """HOST or HOST:PORT."""
        return self.reference.partition("/")[0]


@dataclass(frozen=True)
class Join:
    """How a node joins a cluster.

    Raises:
        BakehouseError: a value is not of its form.
    """

    controllers: tuple[str, ...]
    """Where slurmctld listens: HOST, HOST:PORT, [IPv6] or [IPv6]:PORT."""
    path: str = "bake"
    authentication: str = "munge"
    """munge, or slurm for Slurm's own auth/slurm."""
    node: str = ""
    """The node's name in the cluster. Without one it takes the instance's."""
    features: tuple[str, ...] = ()
    hardware: Mapping[str, int | str] = field(default_factory=dict)
    """In place of what slurmd detects, as on slurm.conf's NodeName line."""
    key: bytes | None = field(default=None, repr=False)
    """The content of munge.key or slurm.key. The weaker way; the other is a broker."""
    broker: Broker | None = None
    ssh_keys: tuple[str, ...] = ()
    """Public keys that may log in as the image's default user."""
    bundle: Bundle | None = None
    """For the path bootstrap: what makes a plain node one of the platform."""
    image: ContainerImage | None = None
    """For the path hybrid: what a plain node with a container runtime starts."""
    roce: str = ""
    """The text of roce.yaml, for a node with RDMA devices."""

    @property
    def platform(self) -> str:
        """What the node becomes."""
        return "slurm"

    def __post_init__(self) -> None:
        _check_path(self.path, self.bundle, self.image)
        roce.check(self.roce)
        if self.authentication not in KEY_NAMES:
            raise BakehouseError(f"{self.authentication!r} is no way to authenticate", hint="munge or slurm")
        _check_node(self.node)
        self._check_slurm()
        self._check_secret()
        for key in self.ssh_keys:
            _check_ssh_key(key)

    def _check_slurm(self) -> None:
        if not self.controllers:
            raise BakehouseError("no controller is given", hint="say where slurmctld listens: --controller HOST[:PORT]")
        if len(self.controllers) > MOST_CONTROLLERS or len(self.features) > MOST_FEATURES:
            raise BakehouseError(f"a node takes at most {MOST_CONTROLLERS} controllers and {MOST_FEATURES} features")
        for controller in self.controllers:
            _check_controller(controller)
        for feature in self.features:
            if not re.fullmatch(FEATURE, feature):
                raise BakehouseError(
                    f"{feature!r} cannot be a feature of a node",
                    hint="letters, digits and _.:/+- and 64 at most, beginning with a letter or digit",
                )
        _check_hardware(self.hardware)

    def _check_secret(self) -> None:
        if self.key is not None and self.broker:
            raise BakehouseError("a key and a broker are given", hint="one of them is enough; the broker is stronger")
        if self.key is not None and len(self.key) not in KEY_SIZES:
            raise BakehouseError(
                f"the {KEY_NAMES[self.authentication]} has {len(self.key)} bytes, not 32 to 1024",
                hint="give the key file as it is on the controller",
            )

    @property
    def key_base64(self) -> str:
        """The key as it stands in the join config."""
        return base64.b64encode(self.key or b"").decode()

    @property
    def audience(self) -> str:
        """Who this is for."""
        if self.broker and not self.node:
            return "the one node that the token was made for; it takes its name from the cloud"
        return _audience(self.node)


@dataclass(frozen=True)
class KubernetesJoin:
    """How a node joins a Kubernetes cluster.

    Raises:
        BakehouseError: a value is not of its form.
    """

    api_server: str
    """HOST, HOST:PORT, [IPv6] or [IPv6]:PORT; its port is 6443 by default."""
    ca_hashes: tuple[str, ...] = ()
    """Of the public key of the cluster's CA: ``sha256:`` and 64 digits, as in kubeadm's join commands."""
    discovery_file: str = ""
    """In place of the hashes: the path of a kubeconfig on the node that holds the cluster's CA."""
    path: str = "bake"
    node: str = ""
    """The node's name in the cluster. Without one it takes the instance's."""
    labels: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()
    provider_id: str = ""
    """In place of what the node finds out from OpenStack's metadata; ``none`` for none."""
    cloud_provider: str = ""
    """``external`` where the cluster runs a cloud controller manager."""
    bootstrap_token: str = field(default="", repr=False)
    broker: Broker | None = None
    """Where a fresh bootstrap token is to be had; with both it is taken where the first has expired."""
    ssh_keys: tuple[str, ...] = ()
    """Public keys that may log in as the image's default user."""
    bundle: Bundle | None = None
    """For the path bootstrap: what makes a plain node one of the platform."""

    @property
    def platform(self) -> str:
        """What the node becomes."""
        return "kubernetes"

    def __post_init__(self) -> None:
        _check_path(self.path, self.bundle)
        _check_node(self.node)
        _check_controller(self.api_server, "API server", 6443)
        if not self.ca_hashes and not self.discovery_file:
            raise BakehouseError(
                "neither a hash of the cluster's CA nor a discovery file is given: anybody could be the API server",
                hint="`kubeadm token create --print-join-command` on the control plane shows --ca-hash",
            )
        for text, form, what in (
            *((one, r"sha256:[0-9a-f]{64}", "hash of a CA") for one in self.ca_hashes),
            *((one, rf"{PREFIXED}={LABEL_VALUE}", "label") for one in self.labels),
            *((one, rf"{PREFIXED}(?:={LABEL_VALUE})?:(?:{EFFECTS})", "taint") for one in self.taints),
            (self.discovery_file, r"(/[ -~]{1,255})?", "discovery file"),
            (self.provider_id, r"([a-z][a-z0-9]*://[!-~]{1,200}|none)?", "provider id"),
            (self.cloud_provider, r"(external)?", "cloud provider"),
        ):
            if not re.fullmatch(form, text):
                raise BakehouseError(f"{text!r} is no {what}", hint="`invoke --help userdata` shows one of each")
        if self.bootstrap_token and not re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", self.bootstrap_token):
            raise BakehouseError(
                "the bootstrap token is not of its form: 6 and 16 letters and digits with a dot between",
                hint="make one with: kubeadm token create",
            )
        for key in self.ssh_keys:
            _check_ssh_key(key)

    @property
    def audience(self) -> str:
        """Who this is for."""
        return _audience(self.node)


@dataclass(frozen=True)
class RoceJoin:
    """A node with RDMA devices that is a member of no scheduler.

    Raises:
        BakehouseError: a value is not of its form.
    """

    devices: int = 1
    """RDMA devices that must be there, set up and connected."""
    path: str = "bake"
    node: str = ""
    """The node's name. Without one it takes the instance's."""
    roce: str = ""
    """The text of roce.yaml; without one the defaults hold."""
    ssh_keys: tuple[str, ...] = ()
    """Public keys that may log in as the image's default user."""
    bundle: Bundle | None = None
    """For the path bootstrap: what makes a plain node one of the platform."""

    @property
    def platform(self) -> str:
        """What the node becomes."""
        return "roce"

    def __post_init__(self) -> None:
        _check_path(self.path, self.bundle)
        _check_node(self.node)
        if not 1 <= self.devices <= MOST_DEVICES:
            raise BakehouseError(f"a node cannot have {self.devices} RDMA devices", hint=f"1 to {MOST_DEVICES}")
        roce.check(self.roce)
        for key in self.ssh_keys:
            _check_ssh_key(key)

    @property
    def audience(self) -> str:
        """Who this is for."""
        return _audience(self.node)


def _audience(node: str) -> str:
    return f"the node {node} only" if node else "any node; each takes its name from the cloud"


def render(join: Join | KubernetesJoin | RoceJoin) -> str:
    """Return the cloud-config that makes a node join.

    Raises:
        BakehouseError: it would be larger than clouds take.
    """
    # Not HTML, so nothing is escaped by itself: the template quotes every value as YAML.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = quoted
    template = environment.get_template(f"{join.platform}.yaml.j2")
    key_name = KEY_NAMES[join.authentication] if isinstance(join, Join) else ""
    text = template.render(
        join=join,
        audience=join.audience,
        key_name=key_name,
        text_of=lambda name: (PLAY / name).read_text(encoding="utf-8"),
    )
    size = len(text.encode())
    if size >= LIMIT:
        raise BakehouseError(
            f"the user-data would have {size} bytes; clouds take less than {LIMIT}",
            hint="give fewer SSH keys or features, and of the CA only the certificate that signed the broker's",
        )
    return text


def files(join: Join | KubernetesJoin | RoceJoin) -> dict[str, tuple[str, int]]:
    """Return what cloud-init writes on a node, for one without cloud-init: texts and modes by path."""
    written = yaml.safe_load(render(join))["write_files"]
    return {str(file["path"]): (str(file["content"]), int(file["permissions"], 8)) for file in written}


def with_part(config: Mapping[str, Any], joining: str) -> str:
    """Return user-data of two parts: something more, and the cloud-config that makes a node join.

    Args:
        config: of the first part.
        joining: what render() returned. It comes last: it says how lists are merged.
    """
    parts = ["#cloud-config\n" + yaml.safe_dump(dict(config)), joining]
    archive = [{"type": "text/cloud-config", "content": part} for part in parts]
    return "#cloud-config-archive\n" + yaml.safe_dump(archive)


def quoted(value: str | int) -> str:
    """Return a value as YAML on one line that reads back as exactly this value, whatever is in it."""
    if isinstance(value, int):
        return str(value)
    # JSON's quoted strings are YAML's, but for characters beyond ASCII that YAML takes for line ends or refuses.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def read_hardware(text: str) -> dict[str, int | str]:
    """Read hardware as it stands on slurm.conf's NodeName line: ``CPUs=4 RealMemory=3800 Gres=gpu:2``.

    Raises:
        BakehouseError: a part is not NAME=VALUE.
    """
    hardware: dict[str, int | str] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise BakehouseError(f"{part!r} says nothing of hardware", hint="NAME=VALUE, such as CPUs=4")
        hardware[name] = int(value) if re.fullmatch(r"[0-9]{1,18}", value) else value
    return hardware


def certificates(pem: str) -> str:
    """Return the certificates of a PEM file, and nothing else of it.

    Raises:
        BakehouseError: there are none, one is broken, or a private key is there too.
    """
    if "PRIVATE KEY-----" in pem:
        raise BakehouseError(
            "the CA file holds a private key", hint="give the CA's certificate; its key must not leave the CA"
        )
    found = CERTIFICATE.findall(pem)
    if not found:
        raise BakehouseError("the CA file holds no certificate", hint="PEM: -----BEGIN CERTIFICATE-----")
    clean = []
    for number, one in enumerate(found, start=1):
        try:
            der = ssl.PEM_cert_to_DER_cert(one)
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=der)
        except (ValueError, ssl.SSLError) as error:
            raise BakehouseError(f"certificate {number} of the CA file is broken") from error
        clean.append(ssl.DER_cert_to_PEM_cert(der))
    return "".join(clean)


def schema_check(prefix: Sequence[str], text: str, timeout: float = 300) -> None:
    """Let cloud-init itself check user-data.

    Args:
        prefix: the command that runs a command where cloud-init is, such as that of ssh; empty: here.
        text: the user-data.
        timeout: seconds.

    Raises:
        BakehouseError: cloud-init does not take it; the error holds what it said.
    """
    command = [*prefix, "cloud-init", "schema", "--config-file", "/dev/stdin"]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except FileNotFoundError as error:
        raise BakehouseError(
            f"{command[0]} is not there", hint="apt install cloud-init, or check in an image"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BakehouseError(f"cloud-init's check took more than {timeout:.0f} s") from error
    said = f"{done.stdout}\n{done.stderr}".strip()
    if done.returncode != 0 or "Valid schema" not in said:
        raise BakehouseError("cloud-init does not take the user-data", log=said[-2000:])


def _check_path(path: str, bundle: Bundle | None, image: ContainerImage | None = None) -> None:
    if path not in PATHS:
        raise BakehouseError(f"{path!r} is no path", hint=f"one of {', '.join(PATHS)}")
    for taker, what, given, maker in (
        ("bootstrap", "bundle", bundle, "bootstrap.bundle"),
        ("hybrid", "container image", image, "container.push"),
    ):
        if path == taker and given is None:
            raise BakehouseError(
                f"the path {path} needs a {what}", hint=f"make one with: invoke {maker} --platform slurm"
            )
        if path != taker and given is not None:
            raise BakehouseError(f"the path {path} takes no {what}", hint=f"--path {taker} does")


def _check_node(name: str) -> None:
    if name and not re.fullmatch(LABEL, name):
        raise BakehouseError(
            f"{name!r} cannot be a node's name", hint="letters, digits and hyphens, 63 at most, and no domain"
        )


def _check_controller(text: str, what: str = "controller", port: int = 6817) -> None:
    match = re.fullmatch(r"(?:\[(?P<six>[^]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[^:]*))?", text)
    if not match:
        raise BakehouseError(
            f"the {what} {text!r} is not HOST or HOST:PORT",
            hint=f"an IPv6 address stands in brackets: [fd00::1]:{port}",
        )
    if not _is_host(match["host"], match["six"]):
        raise BakehouseError(f"the {what} {text!r} has no host name or address", hint=f"such as ctl.example.org:{port}")
    if match["port"] is not None and not _is_port(match["port"]):
        raise BakehouseError(f"the {what} {text!r} has no port from 1 to {HIGHEST_PORT}", hint=f"the default is {port}")


def _is_host(host: str | None, six: str | None) -> bool:
    try:
        if six is not None:
            # An interface behind a per cent sign means something on one machine only.
            return ipaddress.IPv6Address(six).scope_id is None
        # No name ends in a number (RFC 1123, section 2.1).
        if re.fullmatch(r"(?:.*\.)?[0-9]+", host or ""):
            return str(ipaddress.IPv4Address(host or "")) == host
    except ValueError:
        return False
    return bool(re.fullmatch(HOST, host or "")) and len(host or "") <= LONGEST_HOST


def _is_port(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,5}", text)) and 1 <= int(text) <= HIGHEST_PORT


def _check_url(url: str) -> None:
    error = BakehouseError(f"{url!r} is not a broker's address", hint="https://HOST:PORT, such as https://ctl:8444")
    # urlsplit drops some characters silently, so what it did not see must not be there.
    if not re.fullmatch(r"https://[A-Za-z0-9.:\[\]-]+/?", url):
        raise error
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise error from None
    host = parts.hostname or ""
    six = host if "[" in parts.netloc else None
    if not _is_host(None if six else host, six) or port == 0:
        raise error


def _check_hardware(hardware: Mapping[str, int | str]) -> None:
    for name, value in hardware.items():
        if name not in HARDWARE:
            raise BakehouseError(f"{name!r} says nothing of hardware", hint=f"one of {', '.join(sorted(HARDWARE))}")
        if name == "Gres":
            if not isinstance(value, str) or not re.fullmatch(GRES, value):
                raise BakehouseError(f"Gres cannot be {value!r}", hint="such as gpu:2 or gpu:a100:2,nic:1")
        elif not isinstance(value, int) or isinstance(value, bool) or not (name in COUNTS) <= value <= HIGHEST_NUMBER:
            raise BakehouseError(f"{name} cannot be {value!r}", hint="a number, such as 4; memory and disk are in MiB")


def _check_ssh_key(key: str) -> None:
    if "PRIVATE KEY" in key:
        raise BakehouseError("an SSH private key is given", hint="give the public one: the file that ends in .pub")
    kind, _, rest = key.partition(" ")
    try:
        blob = base64.b64decode(rest.partition(" ")[0], validate=True)
    except binascii.Error:
        blob = b""
    # The key's type stands in it once more, with its length before it (RFC 4253, section 6.6).
    if not key.isprintable() or not kind.isascii() or not blob.startswith(len(kind).to_bytes(4, "big") + kind.encode()):
        raise BakehouseError(f"{key[:40]!r} is not an SSH public key", hint="one line: type, base64, comment")
