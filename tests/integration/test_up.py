"""Bringing nodes up and down with a real Keystone, Glance and Nova API.

No hypervisor runs, and nothing schedules: Nova takes the requests (its schema, its quota, its rules of who sees what),
and the servers stay in BUILD. What Nova asks Neutron and Cinder is answered by the fake ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bakehouse import teardown, waiting
from bakehouse.local_cloud import LocalCloud
from tests import fake_nova
from tests.fake_nova import FakeNova
from tests.integration.shop import Done, Shop, end
from tests.integration.test_servers import Nova, in_catalogue
from tests.samples import MIB, add_image

pytestmark = pytest.mark.slow

TAG = "20260101-aaaaaaa"


@dataclass
class Place:
    """A project in which nodes can be asked for."""

    shop: Shop
    nova: Nova
    fake: FakeNova
    admin: Any

    def up(self, *more: str) -> Done:
        return self.shop.run(
            "up", "--platform", "slurm", "--name", "blue", "--tag", TAG, "--flavor", "node", "--user-data", "data.yaml",
            "--until", "active", "--timeout", "4", *more, XDG_STATE_HOME=self.state,
        )  # fmt: skip

    @property
    def state(self) -> str:
        return str(self.shop.folder / "state")

    def left(self) -> list[str]:
        with self.shop.connect() as cloud:
            return [thing.kind for thing in teardown.find(cloud)]

    def states(self) -> dict[str, str]:
        with self.shop.connect() as cloud:
            return {one["name"]: one["status"] for one in teardown.servers(cloud)}


@pytest.fixture(scope="module")
def place(local: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    tmp_path = tmp_path_factory.mktemp("up")
    shop = Shop(tmp_path, local, local.add_member("u-up", "p-up"))
    shop.configure()
    shop.add_cloud("here", local.entry(shop.member))
    (tmp_path / "data.yaml").write_text("#cloud-config\n")
    add_image(shop.store, TAG, size=MIB)
    shop.good("publish", TAG)
    with shop.connect() as cloud, fake_nova.running(cloud.project, cloud.user) as fake:
        folder = tmp_path / "nova"
        folder.mkdir()
        nova = Nova(folder, local, f"{fake.url}/network", f"{fake.url}/volume/v3")
        services = {
            "compute": f"http://127.0.0.1:{nova.port}/v2.1", "network": f"{fake.url}/network",
            "block-storage": f"{fake.url}/volume/v3",
        }  # fmt: skip
        with in_catalogue(local, services):
            admin = local.admin()
            compute: Any = admin.compute
            compute.create_flavor(name="node", ram=8192, vcpus=2, disk=100, flavor_id="42")
            yield Place(shop, nova, fake, admin)
            admin.close()
        nova.end()
        shop.empty()


def test_nova_takes_what_is_asked_of_it_and_nothing_is_left(place: Place) -> None:
    before = len(place.fake.asked)
    done = place.up(
        "--count", "2", "--network", "cluster", "--security-group", "default", "--server-group", "soft-anti-affinity",
        "--config-drive", "--vnic-type", "direct",
    )  # fmt: skip
    assert "blue-1, blue-2: not active within 4 s" in done.err, done.out + done.err
    assert "nothing of it is left" in done.out
    assert done.status == 1
    assert place.left() == []
    assert place.states() == {}
    asked = [line for line in place.fake.asked[before:] if line.startswith("GET /network/v2.0/ports/")]
    assert asked, "Nova itself looked at the ports"


def test_nova_takes_a_server_that_boots_from_a_volume(place: Place) -> None:
    before = len(place.fake.asked)
    done = place.up("--volume-size", "20", "--volume-type", "ssd")
    assert "blue-1: not active within 4 s" in done.err, done.out + done.err
    assert "POST /volume/v3/attachments" in place.fake.asked[before:], "Nova itself took the volume"
    assert place.left() == []


def test_down_cleans_what_a_killed_process_left(place: Place) -> None:
    started = place.shop.start(
        "up", "--platform", "slurm", "--name", "blue", "--tag", TAG, "--flavor", "node", "--user-data", "data.yaml",
        "--server-group", "affinity", XDG_STATE_HOME=place.state,
    )  # fmt: skip
    waiting.until("server", lambda: place.states() == {"blue-1": "BUILD"}, 60, poll=0.3)
    started.kill()
    end(started)
    assert place.left() == ["server", "port", "server group", "keypair"]
    # Another host has no note of it.
    done = place.shop.run("down", "--name", "blue", XDG_STATE_HOME=str(place.shop.folder / "elsewhere"))
    assert done.status == 0, done.out + done.err
    assert place.left() == []
    done = place.shop.run("down", "--name", "blue", XDG_STATE_HOME=place.state)
    assert "Nothing of it is in here" in done.out
    assert done.status == 0


def test_novas_own_quota_is_read(place: Place) -> None:
    done = place.up("--count", "11")
    assert "the quota of servers in here (RegionOne) is 10, " in done.err, done.err
    done = place.up("--count", "9")
    assert "the quota of memory in here (RegionOne) is 50.00 GiB, " in done.err, done.err
    assert place.left() == []


def test_what_nova_does_not_have_is_said(place: Place) -> None:
    done = place.up("--zone", "nowhere")
    assert "no availability zone 'nowhere'" in done.err, done.err
    done = place.up("--key-pair", "mine")
    assert "no key pair 'mine'" in done.err, done.err
    assert place.left() == []


def test_servers_of_others_are_not_touched(place: Place) -> None:
    place.nova.add(place.fake.project, fake_nova.new())
    place.nova.add("of-another", fake_nova.new())
    done = place.shop.run("down", "--all", XDG_STATE_HOME=place.state)
    assert "Nothing of it is in here" in done.out, done.out + done.err
    assert list(place.states()) == ["node"]
