"""The metadata service: asked as cloud-init asks it, by its own process where that matters."""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, instance, metadata
from bakehouse.instance import Instance, Network

NODE = Instance(
    "node-1",
    "11111111-2222-4333-8444-555555555555",
    "#cloud-config\n{}\n",
    public_keys=("ssh-ed25519 AAAA me", "ssh-ed25519 BBBB you"),
    networks=(
        Network("52:54:00:ab:00:01", ("10.0.0.5/24",), ("10.0.0.1",), (("10.9.0.0/16", "10.0.0.2"),), ("10.0.0.3",)),
    ),
    meta={"role": "compute"},
    vendor_data={"cloud-init": "#cloud-config\n{}\n"},
)


class Service:
    """The service, in this process."""

    def __init__(self, server: metadata.Server, file: Path) -> None:
        self.file = file
        self.port = server.server_address[1]

    def serve(self, *instances: tuple[str, Instance]) -> None:
        instance.save(self.file, dict(instances))

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=10)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def lines(self, path: str) -> list[str]:
        status, text = self.get(path)
        assert status == 200
        return text.splitlines()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    file = tmp_path / "instances.json"
    with metadata.Server(("127.0.0.1", 0), file) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            there = Service(server, file)
            there.serve(("127.0.0.1", NODE))
            yield there
        finally:
            server.shutdown()
            thread.join()


def test_instances_read_back_as_they_were_written(tmp_path: Path) -> None:
    instances = {"10.0.0.5": NODE, "fd00::6": Instance("node-2", "2")}
    instance.save(tmp_path / "instances.json", instances)
    assert instance.load(tmp_path / "instances.json") == instances
    assert (tmp_path / "instances.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["instances.json"]


def test_user_data_does_not_show_when_an_instance_is_printed() -> None:
    assert "cloud-config" not in repr(Instance("node-1", "1", "#cloud-config\nsecret\n"))


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_versions_are_listed_as_nova_lists_them(service: Service, slash: str) -> None:
    assert service.lines(f"/openstack{slash}")[-2:] == ["2018-08-27", "latest"]
    assert service.lines("/") == ["2009-04-04", "latest"]
    names = ["meta_data.json", "user_data", "vendor_data.json", "network_data.json"]
    assert service.lines(f"/openstack/latest{slash}") == names


@pytest.mark.parametrize("version", ["2018-08-27", "latest"])
def test_a_machine_is_told_about_itself(service: Service, version: str) -> None:
    meta_data = json.loads(service.get(f"/openstack/{version}/meta_data.json")[1])
    assert (meta_data["uuid"], meta_data["hostname"]) == (NODE.uuid, "node-1")
    assert meta_data["meta"] == {"role": "compute"}
    assert service.get(f"/openstack/{version}/user_data") == (200, NODE.user_data)
    network_data = json.loads(service.get(f"/openstack/{version}/network_data.json")[1])
    assert network_data["networks"][0]["ip_address"] == "10.0.0.5"
    vendor_data = json.loads(service.get(f"/openstack/{version}/vendor_data.json")[1])
    assert vendor_data == {"cloud-init": "#cloud-config\n{}\n"}


def test_it_also_speaks_the_way_of_ec2(service: Service) -> None:
    assert service.get("/latest/user-data") == (200, NODE.user_data)
    assert service.lines("/latest") == ["meta-data/", "user-data"]
    names = service.lines("/latest/meta-data/")
    assert {"instance-id", "local-hostname", "public-keys/", "placement/", "block-device-mapping/"} <= set(names)
    assert service.lines("/2009-04-04/meta-data/hostname") == ["node-1"]
    assert service.lines("/latest/meta-data/local-ipv4") == ["10.0.0.5"]
    assert service.lines("/latest/meta-data/placement/availability-zone") == ["nova"]
    assert service.lines("/latest/meta-data/public-keys/") == ["0=key-0", "1=key-1"]
    assert service.lines("/latest/meta-data/public-keys/1/") == ["openssh-key"]
    assert service.lines("/latest/meta-data/public-keys/1/openssh-key") == ["ssh-ed25519 BBBB you"]


@pytest.mark.parametrize(
    "path",
    [
        "/openstack/2099-01-01", "/openstack/latest/vendor_data2.json", "/openstack/latest/user_data/more", "/ec2",
        "/latest/meta-data/nothing", "/latest/meta-data/hostname/more", "/openstack/latest/../../etc/passwd",
        "/openstack/2012-08-10/network_data.json", "/latest/api/token", "/favicon.ico",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(service: Service, path: str) -> None:
    assert service.get(path) == (404, "")


def test_an_instance_without_user_data_and_networks_has_none(service: Service) -> None:
    service.serve(("127.0.0.1", Instance("bare", "1")))
    assert service.lines("/openstack/latest") == ["meta_data.json", "vendor_data.json"]
    assert service.get("/openstack/latest/user_data") == (404, "")
    assert service.get("/latest/user-data") == (404, "")
    assert service.get("/latest/meta-data/local-ipv4") == (200, "127.0.0.1")


def test_a_machine_that_is_not_known_is_told_nothing(service: Service) -> None:
    service.serve(("10.0.0.5", NODE))
    for path in ("/", "/openstack", "/openstack/latest/user_data", "/latest/user-data"):
        assert service.get(path) == (404, "")


def test_each_machine_is_told_about_itself_by_its_address(service: Service) -> None:
    service.serve(("10.0.0.5", NODE), ("::ffff:127.0.0.1", Instance("node-2", "2")))
    assert service.lines("/latest/meta-data/hostname") == ["node-2"]


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("10.0.0.5", "10.0.0.5"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("FE80:0::1%eth0", "fe80::1"),
        ("fd00::0005", "fd00::5"),
    ],
)
def test_addresses_are_compared_in_one_form(address: str, plain: str) -> None:
    assert metadata.plain(address) == plain


def test_instances_that_cannot_be_read_are_an_error_of_the_service(service: Service) -> None:
    service.file.write_text('{"127.0.0.1": {"name": "node-1"}}')
    assert service.get("/openstack") == (500, "")
    service.file.write_text("{")
    assert service.get("/openstack") == (500, "")
    service.serve(("127.0.0.1", NODE))
    assert service.get("/openstack")[0] == 200


def test_only_reading_is_answered(service: Service) -> None:
    assert service.get("/openstack/latest/user_data", "HEAD") == (200, "")
    assert service.get("/openstack/latest/user_data", "PUT")[0] == 501


@pytest.mark.parametrize(
    ("text", "address"),
    [("169.254.169.254:80", ("169.254.169.254", 80)), ("[fe80::a9fe:a9fe]:80", ("fe80::a9fe:a9fe", 80))],
)
def test_where_to_listen_is_read(text: str, address: tuple[str, int]) -> None:
    assert metadata.address_and_port(text) == address


@pytest.mark.parametrize("text", ["", "80", "169.254.169.254", "fe80::1:80", "[fe80::1]", "a:b"])
def test_another_place_to_listen_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not ADDRESS:PORT"):
        metadata.address_and_port(text)


def start(file: Path, listen: str) -> subprocess.Popen[str]:
    # -I and -S: nothing but the standard library and this checkout.
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from bakehouse.metadata import main; sys.exit(main())"
    command = [sys.executable, "-I", "-S", "-c", code, "--listen", listen, "--instances", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_runs_by_itself_with_the_standard_library_alone_and_logs_each_request(tmp_path: Path) -> None:
    instance.save(tmp_path / "instances.json", {"127.0.0.1": NODE})
    with start(tmp_path / "instances.json", "127.0.0.1:0") as process:
        assert process.stdout
        first = process.stdout.readline()
        match = re.search(r"listening on 127\.0\.0\.1 port (\d+)$", first)
        assert match, first
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=10)
        for path in ("/openstack/latest/user_data", "/nothing%0Ahere"):
            connection.request("GET", path)
            connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=10)
    assert errors == ""
    lines = [line.split(" ", 2)[2] for line in said.splitlines()]
    assert lines == [
        "127.0.0.1 GET '/openstack/latest/user_data' 200",
        "127.0.0.1 GET '/nothing%0Ahere' 404",
    ]
    assert "cloud-config" not in said


def test_an_address_that_cannot_be_listened_on_is_said_in_one_line(tmp_path: Path) -> None:
    with start(tmp_path / "instances.json", "192.0.2.1:80") as process:
        said, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert errors == ""
    assert "cannot listen on 192.0.2.1 port 80: " in said
    assert len(said.splitlines()) == 1
