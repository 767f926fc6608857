"""The metadata service of OpenStack, for tests and demonstrations: what a machine finds at 169.254.169.254.

    python -m bakehouse.metadata --listen 169.254.169.254:80 --instances instances.json

It answers as Nova's does (nova/api/metadata), to each machine about itself, told by the address that it asks from. The
instances are read anew for each request, so machines may come and go. Each request is a line on standard output:
address, method, path and status.

Standard library only, since it runs by itself in a network namespace.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import socket
import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bakehouse import instance as instances
from bakehouse.instance import EC2_VERSIONS, LATEST, OPENSTACK_VERSIONS, Instance

LOG = logging.getLogger("bakehouse.metadata")

IDLE_SECONDS = 30.0
"""After which a connection that says nothing is closed."""

DESCRIPTION = "The metadata service of OpenStack, for tests and demonstrations."


class Server(ThreadingHTTPServer):
    """Serves the instances of a file that bakehouse.instance.save() wrote.

    Args:
        address: where to listen.
        file: the instances.

    Raises:
        OSError: the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], file: Path) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.file = file
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without asking DNS for our own name as HTTPServer does: in a network namespace that may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def find(self, peer: str) -> Instance | None:
        """Return the instance at an address, if there is one."""
        return {plain(address): instance for address, instance in instances.load(self.file).items()}.get(plain(peer))


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "bakehouse"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        peer = str(self.client_address[0])
        try:
            instance = self.server.find(peer)
            found = None if instance is None else answer(instance, unquote(urlsplit(self.path).path), plain(peer))
        except (OSError, ValueError, TypeError) as error:
            LOG.error("no answer from the instances in %s: %s", self.server.file, error)
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if found is None:
            self._say(HTTPStatus.NOT_FOUND)
        else:
            self._say(HTTPStatus.OK, *found)

    do_HEAD = do_GET  # noqa: N815

    def _say(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain; charset=UTF-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:  # noqa: ARG002 -- http.server's name
        # The path in quotes, so that a request cannot forge a line.
        status = code.value if isinstance(code, HTTPStatus) else code
        LOG.info("%s %s %r %s", plain(str(self.client_address[0])), self.command, getattr(self, "path", ""), status)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's name
        LOG.info("%s %r", plain(str(self.client_address[0])), format % args)


def plain(address: str) -> str:
    """Return an address in its one plain form: without an interface, and IPv4 as such even on an IPv6 socket."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def answer(instance: Instance, path: str, peer: str = "") -> tuple[bytes, str] | None:
    """Return body and content type for a path, or None where there is nothing.

    Args:
        instance: who asks.
        path: of the URL.
        peer: the address that it asks from.
    """
    match [part for part in path.split("/") if part]:
        case []:
            return _text([*EC2_VERSIONS, LATEST])
        case ["openstack"]:
            return _text([*OPENSTACK_VERSIONS, LATEST])
        case ["openstack", version, *name] if version in (*OPENSTACK_VERSIONS, LATEST):
            return _file(instances.openstack_files(instance, version), name)
        case ["openstack", *_]:
            return None
        case [version, *parts] if version in (*EC2_VERSIONS, LATEST):
            tree: dict[str, Any] = {"meta-data": instances.ec2_meta_data(instance, peer)}
            if instance.user_data:
                tree["user-data"] = instance.user_data
            return _branch(tree, parts)
    return None


def _file(files: dict[str, bytes], name: list[str]) -> tuple[bytes, str] | None:
    if not name:
        return _text(list(files))
    found = files.get("/".join(name))
    if found is None:
        return None
    return found, "application/json" if name[-1].endswith(".json") else "text/plain; charset=UTF-8"


def _branch(tree: Any, parts: list[str]) -> tuple[bytes, str] | None:
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    if not isinstance(tree, dict):
        return _text([str(tree)])
    if parts[-1:] == ["public-keys"]:
        # Listed so since the first EC2: number and name, and no slash although there is a folder.
        return _text([f"{number}=key-{number}" for number in tree])
    return _text([f"{name}/" if isinstance(below, dict) else name for name, below in tree.items()])


def _text(lines: list[str]) -> tuple[bytes, str]:
    return "\n".join(lines).encode(), "text/plain; charset=UTF-8"


def address_and_port(text: str) -> tuple[str, int]:
    """Read ``169.254.169.254:80`` or ``[fe80::1]:80``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"\[([^]]+)\]:(\d+)|([^:]+):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT")
    return match[1] or match[3], int(match[2] or match[4])


def main() -> int:
    """Serve from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bakehouse.metadata", description=DESCRIPTION)
    parser.add_argument("--listen", type=address_and_port, default=("169.254.169.254", 80), metavar="ADDRESS:PORT")
    parser.add_argument("--instances", type=Path, required=True, metavar="FILE", help="JSON: instances by address")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        server = Server(arguments.listen, arguments.instances)
    except OSError as error:
        LOG.error("cannot listen on %s port %d: %s", *arguments.listen, error.strerror)
        return 1
    LOG.info("listening on %s port %d", *server.server_address[:2])
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
