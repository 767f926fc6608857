"""A cluster for tests and demos in a private network of this host: a real controller and a join broker beside it."""

from __future__ import annotations

import datetime
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bakehouse import network, token, userdata, waiting
from bakehouse.errors import BakehouseError
from bakehouse.network import DEFAULT_MTU, FOLDER, GATEWAY, Network
from bakehouse.run import Log
from bakehouse.slurm import Authentication, Controller

BROKER_PORT = 8444
BROKER_FOLDER = FOLDER / "broker"
START_SECONDS = 30
NOTE = FOLDER / "cluster.json"
"""What attach() needs to know, in the place itself."""

CERTIFICATE_DAYS = 30


@dataclass(frozen=True)
class Cluster:
    """A private network with a Slurm controller and a join broker. Made by up(), or found again by attach()."""

    network: Network
    controller: Controller
    broker: Broker

    def join(
        self,
        node: str,
        *,
        inline: bool = False,
        bundle: userdata.Bundle | None = None,
        image: userdata.ContainerImage | None = None,
    ) -> userdata.Join:
        """Return what a node needs to know to join.

        Args:
            node: its name.
            inline: with the key itself inline; else with a token made for it.
            bundle: what it is made of first, where it is a plain one.
            image: what it starts, where it is a plain one with a container runtime.
        """
        path = "bootstrap" if bundle else "hybrid" if image else "bake"
        return userdata.Join(
            (self.controller.address,),
            path=path,
            bundle=bundle,
            image=image,
            authentication=self.controller.authentication,
            node=node,
            features=(path,),
            key=self.controller.key if inline else None,
            broker=None if inline else self.broker.offer(node),
        )

    def user_data(self, node: str) -> str:
        """Return user-data with which a node joins."""
        return userdata.render(self.join(node))


@contextmanager
def up(
    image: Path, log: Log, *, authentication: Authentication = "munge", cgroups: bool = True, mtu: int = DEFAULT_MTU
) -> Iterator[Cluster]:
    """Make a cluster of an image. It ends with the block, and with this process, however it ends.

    Args:
        image: an image file with a Slurm node; the controller is run from its root.
        log: takes what the programs that set it up say.
        authentication: munge, or slurm for Slurm's own auth/slurm.
        cgroups: nodes limit jobs by cgroups; False for nodes that are containers.
        mtu: of the network, bytes.

    Raises:
        BakehouseError: this host cannot have one, or the image has no slurmctld.
    """
    with network.up(log, mtu=mtu) as place:
        controller = Controller(place, authentication)
        controller.prepare(place.mount_image(image), cgroups=cgroups)
        broker = Broker(place)
        broker.prepare({"slurm": {"authentication": authentication, "key_file": str(controller.key_file)}})
        place.path(NOTE).write_text(json.dumps({"authentication": authentication}))
        broker.start()
        yield Cluster(place, controller, broker)


def attach(pid: int, log: Log) -> Cluster:
    """Find a cluster of another process.

    Args:
        pid: the process that keeps its network (Network.pid).
        log: takes what is done in it.

    Raises:
        BakehouseError: it is gone.
    """
    place = Network(pid, log)
    authentication = noted(place, "slurm")["authentication"]
    return Cluster(place, Controller(place, authentication), Broker(place))


def noted(place: Network, platform: str) -> dict[str, Any]:
    """Return what a cluster of another process noted of itself.

    Args:
        place: its network.
        platform: what its nodes are.

    Raises:
        BakehouseError: it is gone.
    """
    try:
        found: dict[str, Any] = json.loads(place.path(NOTE).read_text())
    except OSError as error:
        raise BakehouseError("the cluster is gone", hint=f"`invoke cluster.up {platform}` makes a new one") from error
    return found


class Broker:
    """The join broker in the network, with a certificate authority of its own."""

    def __init__(self, place: Network) -> None:
        self.network = place
        self.url = f"https://{GATEWAY}:{BROKER_PORT}"
        self.config = BROKER_FOLDER / "broker.yaml"
        self.state = BROKER_FOLDER / "tokens.sqlite"

    @property
    def ca(self) -> str:
        """The certificate of its authority, PEM."""
        return self.network.path(BROKER_FOLDER / "ca.crt").read_text()

    def prepare(self, platforms: Mapping[str, object]) -> None:
        """Make its configuration and certificates.

        Args:
            platforms: what it hands out, as ``platforms`` in its configuration.
        """
        folder = self.network.path(BROKER_FOLDER)
        folder.mkdir(mode=0o700)
        authority = Authority()
        certificate, key = authority.certificate_for(ipaddress.ip_address(GATEWAY))
        (folder / "ca.crt").write_text(authority.pem)
        (folder / "broker.crt").write_text(certificate)
        (folder / "broker.key").touch(mode=0o600)
        (folder / "broker.key").write_text(key)
        config = {
            "listen": f"{GATEWAY}:{BROKER_PORT}",
            "certificate": str(BROKER_FOLDER / "broker.crt"),
            "private_key": str(BROKER_FOLDER / "broker.key"),
            "state": str(self.state),
            "platforms": dict(platforms),
        }
        self.network.path(self.config).write_text(yaml.safe_dump(config))

    def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            BakehouseError: it ended.
        """
        command: list[str | Path] = [sys.executable, token.BROKER, "serve", "--config", self.config]
        self._process = self.network.start(command, FOLDER / "broker.log")

        def check() -> None:
            if self._process.poll() is not None:
                raise BakehouseError("the join broker ended", log=self.network.log_of("broker"))

        listening = f":{BROKER_PORT} "
        waiting.until(
            "join broker", lambda: listening in self._sockets(), START_SECONDS, poll=0.1, check=check,
            last_words=lambda: self.network.log_of("broker"),
        )  # fmt: skip

    def _sockets(self) -> str:
        command = [*self.network.only_network, "ss", "-Hlnt"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def stop(self) -> None:
        """Stop it."""
        self.network.run(["pkill", "-TERM", "-f", "bakehouse_broker.py serve"])
        self._process.wait(10)

    def offer(self, node: str, *, platform: str = "slurm", lifetime: str = "1h") -> userdata.Broker:
        """Make a token for a node. Return what the node needs to know.

        Args:
            node: its name.
            platform: what it becomes.
            lifetime: of the token, such as 30m.

        Raises:
            BakehouseError: the broker does not make one.
        """
        made = self.command("token", "--platform", platform, "--node", node, "--lifetime", lifetime)
        return userdata.Broker(self.url, made.strip(), self.ca)

    def command(self, *words: str) -> str:
        """Run one of the broker's commands. Return what it printed.

        Raises:
            BakehouseError: it failed.
        """
        # In the place, as on a real controller: SQLite would not find its file from outside.
        done = subprocess.run(
            [*self.network.everything, sys.executable, str(token.BROKER), words[0], "--config", str(self.config),
             *words[1:]],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BakehouseError(f"the join broker refuses: {words[0]}", hint="its reason is above", log=done.stderr)
        return done.stdout


class Authority:
    """A certificate authority for as long as a cluster lives."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bakehouse test authority")])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        self._certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            # RFC 5280, section 4.2.1.2; Python's ssl insists on it since 3.13.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # Clocks of nodes may be a little behind.
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        )

    @property
    def pem(self) -> str:
        """Its certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def certificate_for(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[str, str]:
        """Return a server's certificate and private key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "join broker")])
        certificate = (
            self._builder(name, key)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(address)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
