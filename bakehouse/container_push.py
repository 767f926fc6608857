"""Sending a platform's container image to a registry, once. What names it from then on is its digest."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from rich.console import Console

from bakehouse import build, container_image, local_registry, settings
from bakehouse.container_image import ContainerImage, Order, Shelf
from bakehouse.errors import BakehouseError
from bakehouse.progress import Progress
from bakehouse.settings import Settings

STAGES = ["push"]

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
AUTH_VARIABLES = ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR")
"""Where credentials are: containers-auth.json(5)."""

ASK_SECONDS = 20

CAUSES = (
    (r"x509: ([^\n]*)", "its certificate is not trusted: {0}",
     "put its authority's certificate into /etc/containers/certs.d/HOST:PORT/ca.crt (containers-certs.d(5))"),
    (r"unauthorized|authentication required|denied: |no basic auth credentials|StatusCode: 40[13]",
     "it does not let us push",
     ("log in with `buildah login` or `podman login`: credentials come from containers-auth.json(5), or the file that "
      "REGISTRY_AUTH_FILE names")),
    (r"connection refused|no such host|i/o timeout|no route to host|connection reset|: EOF",
     "the registry cannot be reached", "`invoke registry.status`, or check 'registry' in bakehouse.yaml"),
    (r"no space left on device", "a disk is full: this host's, or the registry's",
     "make room, and push again: layers that are there are not sent again"),
    (r"received unexpected HTTP status: 5\d\d[^\n]*|internal server error|unknown error|StatusCode: 5\d\d",
     "the registry could not store it", "see its log; its disk may be full"),
    (r"manifest invalid|unsupported media type", "it takes no OCI images with zstd layers", "use a newer registry"),
)  # fmt: skip
"""What buildah says, what that means, and what to do. In part it is what registries say (OCI distribution
specification, "Error Codes")."""


@dataclass(frozen=True)
class Target:
    """A registry."""

    address: str
    """HOST[:PORT][/PATH], as names of images begin."""
    insecure: bool
    """It speaks plain HTTP, or has a certificate that is not to be checked."""

    def repository(self, name: str) -> str:
        """Return where a platform's images are."""
        return f"{self.address}/bakehouse/{name}"


@dataclass(frozen=True)
class Pushed:
    """An image in a registry."""

    image: ContainerImage
    reference: str
    """By digest: what nodes pull."""
    new: bool
    """Whether it was sent now."""
    layers: tuple[tuple[str, int], ...]
    """Digests and compressed bytes, the shared one first; empty where the registry shows them to buildah only."""


def target(site: Settings, address: str = "", *, insecure: bool = False) -> Target:
    """Return the registry to push to.

    Args:
        site: the settings.
        address: in place of the setting's.
        insecure: in addition to the setting's.

    Raises:
        BakehouseError: none is named and none runs here, or it is no address.
    """
    try:
        settings.registry_address(address)
    except ValueError as error:
        raise BakehouseError(f"--registry {address}: {error}") from error
    here = local_registry.find()
    running = here.address if here and here.process() else ""
    chosen = address or site.registry or running
    if not chosen:
        raise BakehouseError(
            "no container registry is named, and none runs here",
            hint="`invoke registry.up` brings one up; another one: --registry, or 'registry' in bakehouse.yaml",
        )
    by_setting = site.registry_insecure and chosen == site.registry
    return Target(chosen, insecure or by_setting or chosen == running)


def push(wanted: Order, shelf: Shelf, to: Target, console: Console, *, verbose: bool = False) -> Pushed:
    """Push a platform's image, built where it is not there yet. Once: later the registry is only asked for it.

    Args:
        wanted: the image.
        shelf: where images are.
        to: the registry.
        console: shows progress.
        verbose: show the output of the tools.

    Raises:
        BakehouseError: it cannot be built or sent.
    """
    repository = to.repository(wanted.plan.name)
    with container_image.opened(shelf, console):
        # Before it is built: that takes longer than to ask.
        _must_answer(to)
        found = container_image.find(wanted, shelf)
        digest = found.pushed.get(repository, "") if found else ""
        manifest = _manifest(repository, digest, to) if digest else None
        if found and manifest:
            return Pushed(found, f"{repository}@{digest}", new=False, layers=_layers(manifest))
        image, _ = container_image.make(wanted, shelf, console, verbose=verbose)
        digest = _send(image, shelf, to, console, verbose=verbose)
        image = dataclasses.replace(image, pushed=image.pushed | {repository: digest})
        shelf.write(image)
        layers = _layers(_manifest(repository, digest, to) or {})
        return Pushed(image, f"{repository}@{digest}", new=True, layers=layers)


def _layers(manifest: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((layer["digest"], int(layer["size"])) for layer in manifest.get("layers", ()))


def _send(image: ContainerImage, shelf: Shelf, to: Target, console: Console, *, verbose: bool) -> str:
    name = f"{to.repository(image.name)}:{image.tag}"
    with (
        build.log_file(shelf.cache.root / "logs", f"push-{image.name}-{image.tag}.log") as log,
        build.work_folder(shelf.cache.work, "container") as work,
        Progress(f"Pushing {name}", STAGES, console, verbose=verbose) as progress,
        container_image.isolated(shelf, log) as place,
        progress.stage("push"),
    ):
        log.listener = progress.line
        digest = work / "digest"
        options = [
            "--compression-format=zstd",
            f"--tls-verify={str(not to.insecure).lower()}",
            f"--digestfile={digest}",
        ]
        command = container_image.buildah(shelf, work, "push", *options, image.id, f"docker://{name}")
        credentials = {key: os.environ[key] for key in AUTH_VARIABLES if key in os.environ}
        try:
            place.run(command, {"TMPDIR": str(work), **credentials})
        except BakehouseError as error:
            raise build.explained(error, log, f"the push to {to.address}", CAUSES) from error
        return digest.read_text().strip()


# Asking. Without a credential: where one is needed, the image is pushed again, which sends nothing that is there.


def _must_answer(to: Target) -> None:
    """Check that a registry is there.

    Raises:
        BakehouseError: nothing answers, or something else.
    """
    status, _ = _get(to, "")
    if status not in {None, HTTPStatus.OK, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise _no_registry(to, f"it answers /v2/ with status {status}")


def _manifest(repository: str, digest: str, to: Target) -> dict[str, Any] | None:
    """Return an image's manifest; None where the registry does not have it, or does not show it."""
    status, body = _get(to, f"{repository.partition('/')[2]}/manifests/{digest}")
    try:
        found = json.loads(body) if status == HTTPStatus.OK else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _get(to: Target, path: str) -> tuple[int | None, bytes]:
    """Ask for a path of the registry's API (OCI distribution specification). No status: who serves it is not known.

    Raises:
        BakehouseError: nothing answers, or no registry.
    """
    host = to.address.partition("/")[0]
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    # As buildah does where certificates are not checked: with encryption first.
    ways = [("https", unchecked), ("http", None)] if to.insecure else [("https", ssl.create_default_context())]
    proxies: dict[str, str] | None = {} if host.startswith(("127.", "localhost", "[::1]")) else None
    for scheme, context in ways:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )
        request = urllib.request.Request(f"{scheme}://{host}/v2/{path}", headers={"Accept": MANIFEST})  # noqa: S310
        try:
            with opener.open(request, timeout=ASK_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, b""
        except ssl.SSLError:
            continue
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                return None, b""  # buildah may know its authority: containers-certs.d(5).
            if isinstance(cause, ssl.SSLError):
                continue
            if isinstance(cause, http.client.HTTPException):
                raise _no_registry(to, "it does not speak HTTP") from error
            raise BakehouseError(
                f"the registry {host} cannot be reached: {cause}",
                hint="`invoke registry.status`, or check --registry and 'registry' in bakehouse.yaml",
            ) from error
    raise BakehouseError(
        f"the registry {host} does not speak HTTPS",
        hint="where it shall be plain HTTP: --insecure, or 'registry_insecure' in bakehouse.yaml",
    )


def _no_registry(to: Target, reason: str) -> BakehouseError:
    return BakehouseError(
        f"{to.address} is no container registry: {reason}",
        hint="name HOST:PORT of an OCI registry, such as `invoke registry.up` brings up",
    )
