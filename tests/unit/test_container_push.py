"""Pushing without buildah: which registry, what it answers, what is asked before anything is built."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import build, container_image, container_push, local_registry
from bakehouse.cache import BaseCache
from bakehouse.container_image import Order, Shelf
from bakehouse.container_push import Pushed, Target
from bakehouse.errors import BakehouseError
from bakehouse.local_registry import LocalRegistry
from bakehouse.run import CommandError, Log
from bakehouse.settings import Settings
from tests.unit.test_container_image import image, order

DIGEST = "sha256:" + "d" * 64
MANIFEST = {"layers": [{"digest": "sha256:1", "size": 10}, {"digest": "sha256:2", "size": 20}]}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", cache=tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_registry_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_registry, "find", lambda *_: None)


@contextmanager
def answering(status: Callable[[str], int]) -> Iterator[str]:
    """Something that answers by HTTP, with a manifest."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(MANIFEST).encode()
            self.send_response(status(self.path))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_none_is_named_and_none_runs(settings: Settings) -> None:
    with pytest.raises(BakehouseError, match="no container registry is named, and none runs here") as caught:
        container_push.target(settings)
    assert "invoke registry.up" in caught.value.hint


def test_the_flag_wins_over_the_setting_and_that_over_the_one_here(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = LocalRegistry(tmp_path, "127.0.0.1", 5000)
    monkeypatch.setattr(local_registry, "find", lambda *_: here)
    monkeypatch.setattr(LocalRegistry, "process", lambda _: True)
    assert container_push.target(settings) == Target("127.0.0.1:5000", insecure=True)
    site = settings.model_copy(update={"registry": "r.example.org/hpc", "registry_insecure": True})
    assert container_push.target(site) == Target("r.example.org/hpc", insecure=True)
    assert container_push.target(site, "other:5000") == Target("other:5000", insecure=False)
    assert container_push.target(site, "other:5000", insecure=True) == Target("other:5000", insecure=True)


@pytest.mark.parametrize("address", ["http://r:5000", "r:port", "r/UPPER", "r/", "user@r"])
def test_what_is_no_address_is_refused(settings: Settings, address: str) -> None:
    with pytest.raises(BakehouseError, match=r"--registry .*must be HOST, HOST:PORT or HOST:PORT/PATH"):
        container_push.target(settings, address)


@pytest.mark.parametrize(
    "address", ["r", "r.example.org", "r:5000", "r:5000/hpc/images", "[::1]:5000", "10.0.0.5:5000"]
)
def test_addresses(settings: Settings, address: str) -> None:
    assert container_push.target(settings, address).repository("slurm") == f"{address}/bakehouse/slurm"


@pytest.mark.parametrize("status", [200, 401, 403])
def test_a_registry_may_want_to_know_who_asks(status: int) -> None:
    with answering(lambda _: status) as address:
        container_push._must_answer(Target(address, insecure=True))


def test_other_web_servers_are_no_registries() -> None:
    with answering(lambda _: 404) as address, pytest.raises(BakehouseError, match="answers /v2/ with status 404"):
        container_push._must_answer(Target(address, insecure=True))


def test_what_does_not_speak_http_is_no_registry() -> None:
    def greet(server: socket.socket) -> None:
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(BakehouseError, match="is no container registry: it does not speak HTTP"):
            container_push._must_answer(Target(f"127.0.0.1:{server.getsockname()[1]}", insecure=True))
        thread.join(10)


def test_plain_http_must_be_allowed() -> None:
    with answering(lambda _: 200) as address, pytest.raises(BakehouseError, match="does not speak HTTPS") as caught:
        container_push._must_answer(Target(address, insecure=False))
    assert "registry_insecure" in caught.value.hint


class Pushing:
    """A push in which nothing is built or sent for real."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shelf = Shelf(BaseCache(settings.cache))
        self.order: Order = order("slurm", settings)
        self.image = image(key=self.order.key)
        self.did: list[str] = []
        monkeypatch.setattr(container_image, "make", self._make)
        monkeypatch.setattr(container_push, "_send", self._send)

    def _make(self, *_: Any, **__: Any) -> tuple[Any, bool]:
        self.did.append("build")
        return container_image.find(self.order, self.shelf) or self.image, True

    def _send(self, *_: Any, **__: Any) -> str:
        self.did.append("send")
        return DIGEST

    def __call__(self, address: str) -> Pushed:
        self.did.clear()
        return container_push.push(self.order, self.shelf, Target(address, insecure=True), Console(file=io.StringIO()))


@pytest.fixture
def pushing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Pushing:
    return Pushing(settings, monkeypatch)


def test_it_is_sent_once(pushing: Pushing) -> None:
    with answering(lambda _: 200) as address:
        first = pushing(address)
        assert pushing.did == ["build", "send"]
        assert first.reference == f"{address}/bakehouse/slurm@{DIGEST}"
        assert first.new
        again = pushing(address)
        assert pushing.did == []
    assert again == dataclasses.replace(first, new=False)
    assert again.layers == (("sha256:1", 10), ("sha256:2", 20))


@pytest.mark.parametrize("status", [404, 401])
def test_it_is_sent_again_where_the_registry_does_not_show_it(pushing: Pushing, status: int) -> None:
    with answering(lambda path: 200 if path == "/v2/" else status) as address:
        pushing(address)
        again = pushing(address)
    assert pushing.did == ["build", "send"]
    assert (again.new, again.layers) == (True, ())


def test_another_registry_does_not_have_it(pushing: Pushing) -> None:
    with answering(lambda _: 200) as one, answering(lambda _: 200) as two:
        pushing(one)
        pushing(two)
        assert pushing.did == ["build", "send"]
        pushing(one)
        assert pushing.did == []
        pushing(two)
        assert pushing.did == []


def test_nothing_is_built_for_a_registry_that_is_down(pushing: Pushing) -> None:
    with pytest.raises(BakehouseError, match=r"registry 127\.0\.0\.1:9 cannot be reached"):
        pushing("127.0.0.1:9")
    assert pushing.did == []


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("Error: trying to reuse blob sha256:1: unauthorized: authentication required", "it does not let us push"),
        ("Error: writing blob: received unexpected HTTP status: 500 Internal", "the registry could not store it"),
        ("Error: writing blob: dial tcp 10.0.0.5:5000: connect: connection refused", "the registry cannot be reached"),
        ("Error: pinging container registry r: Get x: x509: certificate signed by unknown authority",
         "its certificate is not trusted: certificate signed by unknown authority"),
        ("Error: storing layer: write /x: no space left on device", "a disk is full"),
    ],
)  # fmt: skip
def test_why_a_push_failed(tmp_path: Path, said: str, meaning: str) -> None:
    with Log(tmp_path / "log") as log:
        log.write(said)
        error = build.explained(CommandError("buildah", 125, said), log, "the push to r", container_push.CAUSES)
    assert error.message.startswith(f"the push to r failed: {meaning}")
