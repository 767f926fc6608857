"""How a plain node fetches its bundle: the program in its script, and a web server that asks for a password."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakehouse.userdata import PLAY

CONTENT = b"a bundle"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LOGIN = "Basic " + base64.b64encode(b"ops:s3/cret").decode()


class Guarded(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.path == "/open" or self.headers.get("Authorization") == LOGIN
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(CONTENT if allowed else b"")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


@pytest.fixture
def place() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch(url: str, target: Path, sha256: str = SHA256) -> str:
    """Fetch as the script does. Return what it says; nothing where all is well."""
    (program,) = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", (PLAY / "bakehouse-bootstrap").read_text(), flags=re.M | re.S)
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-", target], input=program, env={**os.environ, "URL": url, "SHA256": sha256, "no_proxy": "*"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr


@pytest.mark.parametrize("url", ["http://{place}/open", "http://ops:s3%2Fcret@{place}/guarded"])
def test_a_bundle_is_fetched_with_a_password_or_without(place: str, tmp_path: Path, url: str) -> None:
    assert fetch(url.format(place=place), tmp_path / "bundle") == ""
    assert (tmp_path / "bundle").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://ops:wrong@{place}/guarded", "error: http://{place}/guarded: HTTP Error 401"),
        ("http://ops:wrong@nowhere.invalid/b", "error: http://nowhere.invalid/b: "),
        ("http://ops:wrong@host:port/b", "error: http://host:port/b: nonnumeric port"),
    ],
)
def test_a_password_is_never_told(place: str, tmp_path: Path, url: str, said: str) -> None:
    found = fetch(url.format(place=place), tmp_path / "bundle")
    assert found.startswith(said.format(place=place))
    assert "wrong" not in found
    assert not (tmp_path / "bundle").exists()


def test_another_bundle_is_refused(place: str, tmp_path: Path) -> None:
    found = fetch(f"http://ops:s3%2Fcret@{place}/guarded", tmp_path / "bundle", "0" * 64)
    assert found == f"error: what is at http://{place}/guarded has the sha256 {SHA256}, not {'0' * 64}\n"
    assert not [*tmp_path.iterdir()]
