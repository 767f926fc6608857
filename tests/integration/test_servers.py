"""What servers use, as a real Nova tells: its API, its databases, its rules of who sees what.

No hypervisor runs the servers, and what Nova asks Neutron (security groups of ports) is answered with nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bakehouse import REPOSITORY, waiting
from bakehouse.daemon import answers, free_ports
from bakehouse.local_cloud import REGION, LocalCloud, _environment
from tests.integration.shop import Shop
from tests.samples import MIB, add_image

pytestmark = pytest.mark.slow

SERVICES = REPOSITORY / "tests" / "integration" / "nova_services.py"


class NoPorts(BaseHTTPRequestHandler):
    """Answers as a Neutron in which there is nothing."""

    def do_GET(self) -> None:
        kind = self.path.partition("?")[0].rpartition("/")[2].replace("-", "_")
        data = json.dumps({kind: []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Nova:
    """A Nova API.

    Args:
        folder: where its databases are.
        local: the Keystone and Glance that it uses.
        neutron: address of the Neutron that it asks.
        cinder: address of the Cinder that it asks.
    """

    def __init__(self, folder: Path, local: LocalCloud, neutron: str, cinder: str = "") -> None:
        self.folder = folder
        self.local = local
        (self.port,) = free_ports(1)
        auth = (
            f"auth_type = password\nauth_url = {local.auth_url}\nusername = admin\npassword = {local.admin_password}\n"
            "project_name = admin\nuser_domain_id = default\nproject_domain_id = default\n"
        )
        (folder / "nova.conf").write_text(
            f"[DEFAULT]\ntransport_url = fake:/\nlog_file = {folder}/nova.log\nstate_path = {folder}\n"
            f"[api_database]\nconnection = sqlite:///{folder}/api.db\n"
            f"[database]\nconnection = sqlite:///{folder}/cell.db\n"
            f"[oslo_concurrency]\nlock_path = {folder}\n"
            f"[keystone_authtoken]\nwww_authenticate_uri = {local.auth_url}\n{auth}"
            f"[neutron]\nendpoint_override = {neutron}\n{auth}"
            f"[cinder]\nendpoint_template = {cinder}\n"
        )
        shutil.copy(local.environment / "etc" / "nova" / "api-paste.ini", folder)
        self.python("setup", folder)
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", local.environment / "bin" / "uwsgi", "--http-socket",
             f"127.0.0.1:{self.port}", "--wsgi-file", SERVICES, "--threads", "4", "--lazy-apps", "--need-app",
             "--die-on-term", "--buffer-size", "65535", "--add-header", "Connection: close", "--virtualenv",
             local.environment, "--disable-logging"],
            env=_environment() | {"NOVA_FOLDER": str(folder)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        waiting.until("Nova", lambda: answers(f"http://127.0.0.1:{self.port}/"), 60, poll=0.1)

    def python(self, *words: str | Path) -> None:
        command = [self.local.environment / "bin" / "python", "-I", SERVICES, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        assert done.returncode == 0, done.stderr[-3000:]

    def move(self, region: str) -> None:
        """Move it to another region, which is made."""
        admin = self.local.admin()
        identity: Any = admin.identity
        identity.create_region(id=region)
        (service,) = identity.services(name="nova")
        for endpoint in identity.endpoints(service_id=service.id):
            identity.update_endpoint(endpoint, region_id=region)
        admin.close()

    def add(self, project: str, image: str) -> None:
        """Add a server."""
        self.python("add", self.folder, project, image)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextmanager
def in_catalogue(local: LocalCloud, services: dict[str, str]) -> Iterator[None]:
    """Have services in Keystone's catalogue for a while: addresses by type."""
    admin = local.admin()
    identity: Any = admin.identity
    made = []
    for kind, url in services.items():
        service = identity.create_service(name={"compute": "nova"}.get(kind, kind), type=kind)
        made.append(service)
        for interface in ("public", "internal"):
            identity.create_endpoint(service_id=service.id, interface=interface, url=url, region_id=REGION)
    yield
    for service in made:
        identity.delete_service(service)
    admin.close()


@pytest.fixture
def nova(local: LocalCloud, tmp_path: Path) -> Iterator[Nova]:
    neutron = ThreadingHTTPServer(("127.0.0.1", 0), NoPorts)
    thread = threading.Thread(target=neutron.serve_forever)
    thread.start()
    folder = tmp_path / "nova"
    folder.mkdir()
    made = Nova(folder, local, f"http://127.0.0.1:{neutron.server_address[1]}")
    with in_catalogue(local, {"compute": f"http://127.0.0.1:{made.port}/v2.1"}):
        yield made
    made.end()
    neutron.shutdown()
    neutron.server_close()
    thread.join()


def test_images_that_servers_use_stay(nova: Nova, local: LocalCloud, tmp_path: Path) -> None:
    shop = Shop(tmp_path, local, local.add_member("u-servers", "p-servers"))
    shop.configure()
    shop.add_cloud("here", local.entry(shop.member))
    tags = [f"2026010{number}-aaaaaaa" for number in (1, 2, 3, 4)]
    ids = {}
    for number, tag in enumerate(tags, 1):
        add_image(shop.store, tag, size=MIB, created=f"2026-01-0{number}T12:00:00Z")
        ids[tag] = shop.good("publish", tag, "--json").json["id"]
    with shop.connect() as cloud:
        project = cloud.project
    nova.add(project, ids[tags[0]])
    nova.add(project, ids[tags[0]])
    nova.add("of-another", ids[tags[1]])

    def servers(*flags: str) -> dict[str, int]:
        return {row["tag"]: row["servers"] for row in shop.good("images", *flags, "--json").json}

    assert servers("--cloud", "here") == {tags[0]: 2, tags[1]: 0, tags[2]: 0, tags[3]: 0}
    plan = shop.good("prune", "--keep", "1").out
    assert "used by 2 servers" in plan
    assert "servers of other projects cannot be seen" in plan

    # An administrator sees all of them.
    shop.configure(image_owner=project)
    shop.add_cloud("admin", local.admin_entry())
    everything = {tags[0]: 2, tags[1]: 1, tags[2]: 0, tags[3]: 0}
    assert servers("--cloud", "admin") == everything
    # And those of another region with the same Glance.
    nova.move("RegionOfNova")
    assert servers("--cloud", "admin") == everything
    shop.good("prune", "--keep", "1", "--cloud", "admin", "--yes")
    assert {row["tag"] for row in shop.good("images", "--cloud", "admin", "--json").json} == {tags[0], tags[1], tags[3]}
    shop.empty()
