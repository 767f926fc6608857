"""The local OpenStack, and clouds as sites have them: behind TLS with an authority of their own, in several regions."""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bakehouse import REPOSITORY, local_cloud
from bakehouse import settings as site_settings
from bakehouse.cloud import connect
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.local_cloud import SERVICES, LocalCloud
from tests.integration.conftest import host_environment
from tests.integration.shop import Shop
from tests.samples import MIB, add_image

pytestmark = pytest.mark.slow

TAG = "20260101-aaaaaaa"


def test_its_life(tmp_path: Path) -> None:
    """Up twice, a service killed, down and up again with its images, and gone without a trace."""
    cache = site_settings.load(environment={}).cache
    clouds = tmp_path / "clouds.yaml"
    clouds.write_text("# mine\nclouds:\n  mine: {}\n")

    def up() -> LocalCloud:
        with host_environment():
            return local_cloud.up(cache, folder=tmp_path / "cloud", name="demo", clouds_file=clouds, tied=True)

    made = up()
    pids = {service: made.process(service) for service in SERVICES}
    entries = clouds.read_text()
    assert up() == made
    assert {service: made.process(service) for service in SERVICES} == pids, "nothing was started again"
    assert clouds.read_text() == entries
    shop = Shop(tmp_path, made, made.add_member("somebody", "research"))
    with shop.connect("demo") as cloud:
        Glance(cloud).create({"name": "kept", "disk_format": "raw", "container_format": "bare"})
    made.stop("glance", signal.SIGKILL)
    assert not made.running
    up()
    assert made.running
    local_cloud.down(tmp_path / "cloud")
    assert not made.running
    again = up()
    assert again.ports == made.ports
    with shop.connect("demo") as cloud:
        assert [image.name for image in Glance(cloud).list()] == ["kept"]
    local_cloud.down(tmp_path / "cloud", delete=True)
    assert not (tmp_path / "cloud").exists()
    assert clouds.read_text() == "# mine\nclouds:\n  mine: {}\n"


def test_a_user_that_is_there_gets_another_credential(local: LocalCloud) -> None:
    """Keystone refuses what is asked with a new password within the second in which it was set."""
    made = [local.add_member("u-again", "p-again") for _ in range(4)]
    assert len({member.credential["application_credential_id"] for member in made}) == 4


def test_secrets_stay_with_their_owner(local: LocalCloud) -> None:
    text = local.clouds_file.read_text()
    secret = yaml.safe_load(text)["clouds"]["test"]["auth"]["application_credential_secret"]
    assert local.clouds_file.stat().st_mode & 0o077 == 0
    assert local.folder.stat().st_mode & 0o077 == 0
    for service in SERVICES:
        process = local.process(service)
        assert process is not None
        command = Path(f"/proc/{process.pid}/cmdline").read_text()
        environment = Path(f"/proc/{process.pid}/environ").read_text()
        for hidden in (secret, local.admin_password):
            assert hidden not in command + environment
            assert hidden not in local.log(service).read_text()


def test_an_ordinary_user_has_one_too(local: LocalCloud, tmp_path: Path) -> None:
    """In a user namespace where we are nobody special: the installation may be in a folder that only we enter."""
    script = (
        "import os, sys; from pathlib import Path; from bakehouse import local_cloud\n"
        "f, cache = map(Path, sys.argv[1:])\n"
        "made = local_cloud.up(cache, folder=f / 'cloud', clouds_file=f / 'clouds.yaml', tied=True)\n"
        "print(os.getuid(), made.running); local_cloud.down(f / 'cloud', delete=True)\n"
    )
    if subprocess.run(["unshare", "--user", "true"], check=False).returncode:
        pytest.skip("this host makes no user namespaces")
    with host_environment():
        done = subprocess.run(
            ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", script, tmp_path,
             local.environment.parent],
            capture_output=True, text=True, check=False, cwd=REPOSITORY,
        )  # fmt: skip
    assert done.stdout.strip() == "1000 True", done.stderr


# Clouds as sites have them.


class Tls:
    """A TLS end before a service, with a certificate of an authority that nobody knows."""

    def __init__(self, folder: Path, port: int) -> None:
        self.authority = folder / "ca.crt"
        key, request, certificate = folder / "tls.key", folder / "tls.csr", folder / "tls.crt"
        extensions = folder / "san"
        extensions.write_text("subjectAltName=IP:127.0.0.1\n")
        new_key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        sign = f"-CA {self.authority} -CAkey {folder}/ca.key -CAcreateserial -days 2 -extfile {extensions}"
        for command in (
            f"openssl req -x509 {new_key} -days 2 -subj /CN=ca -keyout {folder}/ca.key -out {self.authority}",
            f"openssl req {new_key} -subj /CN=127.0.0.1 -keyout {key} -out {request}",
            f"openssl x509 -req -in {request} {sign} -out {certificate}",
        ):
            subprocess.run(command.split(), check=True, capture_output=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.behind = port
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.pump, "127.0.0.1", 0, ssl=self.context))
        self.port = int(self.server.sockets[0].getsockname()[1])
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", self.behind)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            except OSError:
                pass
            target.close()

        await asyncio.gather(copy(reader, here), copy(there, writer))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.server.close()
        self.loop.run_until_complete(self.server.wait_closed())
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@pytest.fixture
def shop(tmp_path: Path, local: LocalCloud) -> Iterator[Shop]:
    made = Shop(tmp_path, local, local.add_member(f"u-{tmp_path.name}", f"p-{tmp_path.name}"))
    made.configure()
    made.add_cloud("here", local.entry(made.member))
    yield made
    made.empty()


def test_an_authority_of_the_sites_own_is_trusted_where_it_is_named(shop: Shop, tmp_path: Path) -> None:
    tls = Tls(tmp_path, shop.local.ports["keystone"])
    try:
        entry = shop.local.entry(shop.member)
        auth = {**shop.member.credential, "auth_url": f"https://127.0.0.1:{tls.port}/v3"}
        shop.add_cloud("secure", {**entry, "auth": auth, "cacert": str(tls.authority)})
        shop.add_cloud("unknown", {**entry, "auth": auth})
        assert shop.good("images", "--cloud", "secure").status == 0
        done = shop.run("images", "--cloud", "unknown")
    finally:
        tls.close()
    assert done.status == 1
    assert "its certificate cannot be checked" in done.err
    assert "cacert" in done.err


def test_a_region_is_one_of_several(shop: Shop) -> None:
    admin = shop.local.admin()
    identity: Any = admin.identity
    try:
        (service,) = identity.services(name="glance")
        made = identity.create_region(id="RegionTwo")
        for interface in ("public", "internal"):
            identity.create_endpoint(
                service_id=service.id, interface=interface, url=shop.local.image_url, region_id=made.id
            )
    finally:
        admin.close()
    entry = {key: value for key, value in shop.local.entry(shop.member).items() if key != "region_name"}
    shop.add_cloud("here", {**entry, "regions": ["RegionOne", "RegionTwo"]})
    add_image(shop.store, TAG, size=MIB)
    done = shop.good("publish", TAG, "--region", "RegionTwo", "--json")
    assert done.json["region"] == "RegionTwo"
    assert shop.store.get(TAG).published[0].region == "RegionTwo"
    bad = shop.run("images", "--region", "Atlantis")
    assert bad.status == 1
    assert "Valid choices are RegionOne,RegionTwo" in bad.err


def test_the_entry_that_is_written_works(local: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(local.clouds_file))
    for name in (local.name, local.admin_name):
        with connect(name) as cloud:
            assert cloud.region == local_cloud.REGION
    with pytest.raises(BakehouseError, match="did you mean 'test'"):
        connect("tset")
