"""A cloud over HTTP in this process: Keystone, and as much of Nova, Neutron, Cinder and Glance as a launch asks.

Answers have the form of the API references (Compute 2.64, Networking 2.0, Block Storage 3). A request that Nova's
schema would refuse is refused. The same code meets the real Nova in tests/integration/test_servers.py.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

SERVER_FIELDS = set(
    "name imageRef flavorRef metadata networks OS-DCF:diskConfig accessIPv4 accessIPv6 availability_zone "
    "block_device_mapping_v2 config_drive key_name min_count max_count return_reservation_id security_groups user_data "
    "description tags trusted_image_certificates adminPass".split()
)
"""Nova's schema of servers, create_v263."""

CONSOLE_BYTES = 100 * 1024
"""What libvirt's driver keeps."""

Body = dict[str, Any]


@dataclass
class Fault:
    """What happens to the next requests of a kind."""

    method: str
    path: str
    """A regular expression, found in the path."""
    status: int = 0
    """What is answered; 0: nothing, the connection breaks."""
    message: str = "no"
    times: int = 1
    after: bool = False
    """Do what was asked, and lose the answer."""
    act: Callable[[], None] = lambda: None
    """What happens just before."""


@dataclass
class Machine:
    """How the next servers behave."""

    looks: int = 1
    """After so many looks at it a server is active."""
    fault: Body | None = None
    """Why it ends in ERROR."""
    console: list[str] = field(default_factory=list)
    """What it says between two looks at its console."""
    no_console: int = 0
    """The status that a cloud without console logs answers."""
    stays: int = 0
    """So many DELETEs do nothing."""


class FakeNova:
    """A cloud. A context manager.

    Args:
        project: the credential's.
        user: the credential's.
    """

    def __init__(self, project: str = "p", user: str = "u") -> None:
        self.project = project
        self.user = user
        self.services = ["image", "compute", "network", "volumev3"]
        self.asked: list[str] = []
        self.bodies: list[tuple[str, Body]] = []
        """Bodies of POST requests, by path."""
        self.faults: list[Fault] = []
        self.next = Machine()
        self.machines: dict[str, Machine] = {}
        self.said: dict[str, str] = {}
        self.lock = threading.RLock()
        self.images: dict[str, Body] = {}
        self.flavors = [
            {"id": "1", "name": "small", "ram": 1024, "vcpus": 1, "disk": 10},
            {"id": "2", "name": "tiny", "ram": 128, "vcpus": 1, "disk": 1},
        ]
        self.networks = [
            {"id": new(), "name": "cluster", "router:external": False, "project_id": project, "subnets": [new()]},
            {"id": new(), "name": "public", "router:external": True, "project_id": "admin"},
        ]
        self.security_groups = [
            {"id": new(), "name": "default", "project_id": project},
            {"id": new(), "name": "default", "project_id": "other"},
        ]
        self.keypairs: dict[str, Body] = {}
        self.groups: dict[str, Body] = {}
        self.servers: dict[str, Body] = {}
        self.ports: dict[str, Body] = {}
        self.floating: dict[str, Body] = {}
        self.volumes: dict[str, Body] = {}
        self.attachments: dict[str, Body] = {}
        self.messages: list[Body] = []
        self.volume_fails = False
        self.quota = {"maxTotalInstances": 10, "maxTotalCores": 20, "maxTotalRAMSize": 51200, "maxServerGroups": 10,
                      "maxServerGroupMembers": 10, "totalServerGroupsUsed": 0}  # fmt: skip
        self.volume_quota = {"maxTotalVolumes": 10, "maxTotalVolumeGigabytes": 1000}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                text = self.rfile.read(length)
                status, body = outer.reply(self.command, self.path, json.loads(text) if text else {})
                if not status:
                    self.close_connection = True
                    return
                data = b"" if body is None else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if self.path == "/v3/auth/tokens":
                    self.send_header("X-Subject-Token", "t0ken")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    # For tests.

    def clouds_yaml(self, path: Path, name: str = "here") -> None:
        entry = {
            "auth": {"auth_url": f"{self.url}/v3", "username": "u", "password": "s3cret", "project_name": "p",
                     "user_domain_id": "default", "project_domain_id": "default"},
            "region_name": "R1",
        }  # fmt: skip
        path.write_text(yaml.safe_dump({"clouds": {name: entry}}))

    def add_image(self, name: str = "base", **more: Any) -> str:
        identity = new()
        now = "2026-11-24T12:00:00Z"
        self.images[identity] = {
            "id": identity, "name": name, "status": "active", "visibility": "private", "os_hidden": False,
            "protected": False, "owner": self.project, "tags": [], "created_at": now, "updated_at": now, "size": 1,
            "min_disk": 2, "min_ram": 512, "disk_format": "qcow2", **more,
        }  # fmt: skip
        return identity

    def fail(self, method: str, path: str, status: int = 0, message: str = "no", **more: Any) -> None:
        self.faults.append(Fault(method, path, status, message, **more))

    def left(self) -> list[str]:
        """Return what is there of all that a launch makes."""
        kinds: list[tuple[str, dict[str, Body]]] = [
            ("server", self.servers), ("port", self.ports), ("floating ip", self.floating), ("volume", self.volumes),
            ("server group", self.groups), ("keypair", self.keypairs),
        ]  # fmt: skip
        with self.lock:
            return [f"{kind} {one.get('name') or identity}" for kind, there in kinds for identity, one in there.items()]

    def sent(self, path: str) -> list[Body]:
        """Return the bodies that were posted to a path."""
        return [body for where, body in self.bodies if where == path]

    # The services.

    def reply(self, method: str, path: str, body: Body) -> tuple[int, Body | None]:
        where = urlsplit(path).path
        if where.startswith("/v3"):
            return self._keystone(method, where)
        with self.lock:
            if where.strip("/").count("/") < 1 or re.fullmatch(r"/[a-z0-9]+/v[0-9.]+/?", where):
                return self._versions(where)
            self.asked.append(f"{method} {where}")
            fault = next((one for one in self.faults if one.method == method and re.search(one.path, where)), None)
            if fault:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                fault.act()
                if fault.after:
                    self._service(method, where, parse_qs(urlsplit(path).query), body)
                    return 0, None
                return fault.status, {"fault": {"message": fault.message}} if fault.status else None
            return self._service(method, where, parse_qs(urlsplit(path).query), body)

    def _keystone(self, method: str, where: str) -> tuple[int, Body | None]:
        if where != "/v3/auth/tokens":
            links = [{"rel": "self", "href": f"{self.url}/v3"}]
            return 200, {"version": {"id": "v3.14", "status": "stable", "links": links}}
        now = datetime.datetime.now(datetime.UTC)
        places = {"image": "image", "compute": "compute/v2.1", "network": "network", "volumev3": "volume/v3"}
        token = {
            "methods": ["password"], "issued_at": f"{now:%Y-%m-%dT%H:%M:%S.000000Z}",
            "expires_at": f"{now + datetime.timedelta(hours=1):%Y-%m-%dT%H:%M:%S.000000Z}",
            "user": {"id": self.user, "name": "u", "domain": {"id": "default", "name": "Default"}},
            "project": {"id": self.project, "name": "p", "domain": {"id": "default", "name": "Default"}}, "roles": [],
            "catalog": [
                {"type": kind, "name": kind, "id": kind, "endpoints": [
                    {"interface": "public", "region": "R1", "region_id": "R1", "id": "e",
                     "url": f"{self.url}/{places[kind]}"},
                ]}
                for kind in self.services
            ],
        }  # fmt: skip
        return 201, {"token": token}

    def _versions(self, where: str) -> tuple[int, Body | None]:
        service = where.strip("/").split("/")[0]
        version, path = {
            "image": ("v2.9", "image/v2"), "compute": ("v2.1", "compute/v2.1"), "network": ("v2.0", "network/v2.0"),
            "volume": ("v3.0", "volume/v3"),
        }[service]  # fmt: skip
        one: Body = {"id": version, "status": "CURRENT", "links": [{"rel": "self", "href": f"{self.url}/{path}/"}]}
        if service in {"compute", "volume"}:
            one |= {
                "version": "2.95" if service == "compute" else "3.70",
                "min_version": "2.1" if service == "compute" else "3.0",
            }
        if where.strip("/").count("/"):
            return 200, {"version": one} if service != "volume" else {"versions": [one]}
        return 200, {"versions": [one]}

    def _service(self, method: str, where: str, query: dict[str, list[str]], body: Body) -> tuple[int, Body | None]:
        service, _, *words = where.strip("/").split("/")
        if method == "POST":
            self.bodies.append((f"/{'/'.join(words)}", body))
        handler: Callable[..., tuple[int, Body | None]] = {
            "image": self._image, "compute": self._compute, "network": self._network, "volume": self._volume,
        }[service]  # fmt: skip
        return handler(method, words, query, body)

    def _image(self, method: str, words: list[str], query: dict[str, list[str]], body: Body) -> tuple[int, Body | None]:
        if len(words) > 1:
            found = self.images.get(words[1])
            return (200, found) if found else (404, {"message": "no such image"})
        wanted = {key: values[0] for key, values in query.items()}
        hidden = wanted.get("os_hidden") == "true"
        return 200, {"images": [
            image for image in self.images.values()
            if image["os_hidden"] == hidden and wanted.get("name", image["name"]) == image["name"]
            and (wanted.get("tag") is None or wanted["tag"] in image["tags"])
        ]}  # fmt: skip

    def _compute(  # noqa: PLR0911
        self, method: str, words: list[str], query: dict[str, list[str]], body: Body
    ) -> tuple[int, Body | None]:
        match (method, *words):
            case ("GET", "flavors", "detail"):
                return 200, {"flavors": self.flavors}
            case ("GET", "limits"):
                return 200, {"limits": {"rate": [], "absolute": self._absolute()}}
            case ("GET", "os-availability-zone"):
                zones = [{"zoneName": "nova", "zoneState": {"available": True}, "hosts": None},
                         {"zoneName": "broken", "zoneState": {"available": False}, "hosts": None}]  # fmt: skip
                return 200, {"availabilityZoneInfo": zones}
            case (_, "os-keypairs", *rest):
                return self._keypair(method, rest, body)
            case (_, "os-server-groups", *rest):
                return self._group(method, rest, body)
            case ("GET", "servers", "detail"):
                return self._page([self._shown(one) for one in self.servers.values()], query)
            case ("POST", "servers"):
                return self._create(body)
            case (_, "servers", identity, *rest):
                if identity not in self.servers:
                    return 404, {"itemNotFound": {"message": f"Instance {identity} could not be found."}}
                return self._server(method, self.servers[identity], rest, body)
        return 404, {"itemNotFound": {"message": f"{method} {words}"}}

    def _page(self, servers: list[Body], query: dict[str, list[str]]) -> tuple[int, Body]:
        """Two a page, whatever is asked for."""
        ids = [one["id"] for one in servers]
        marker = query.get("marker", [""])[0]
        start = ids.index(marker) + 1 if marker in ids else 0
        page, rest = servers[start : start + 2], servers[start + 2 :]
        links = (
            [{"rel": "next", "href": f"{self.url}/compute/v2.1/servers/detail?marker={page[-1]['id']}"}] if rest else []
        )
        return 200, {"servers": page, "servers_links": links}

    def _absolute(self) -> Body:
        mine = [one for one in self.servers.values() if one["tenant_id"] == self.project]
        return {**self.quota, "totalInstancesUsed": len(mine), "totalCoresUsed": len(mine),
                "totalRAMUsed": 1024 * len(mine)}  # fmt: skip

    def _keypair(self, method: str, rest: list[str], body: Body) -> tuple[int, Body | None]:
        if method == "GET" and not rest:
            mine = [pair for pair in self.keypairs.values() if pair.get("user_id", self.user) == self.user]
            return 200, {"keypairs": [{"keypair": pair} for pair in mine]}
        if method == "POST":
            pair = body["keypair"]
            if pair["name"] in self.keypairs:
                return 409, {"conflictingRequest": {"message": f"Key pair '{pair['name']}' already exists."}}
            self.keypairs[pair["name"]] = {**pair, "user_id": self.user}
            return 201, {"keypair": self.keypairs[pair["name"]]}
        return self._gone(method, self.keypairs, rest[0], "keypair", 204)

    def _gone(
        self, method: str, there: dict[str, Body], identity: str, key: str, status: int
    ) -> tuple[int, Body | None]:
        """Answer a GET or DELETE of one thing."""
        if identity not in there:
            return 404, {"itemNotFound": {"message": f"{key} {identity} could not be found."}}
        if method == "DELETE":
            del there[identity]
            return status, None
        return 200, {key: there[identity]}

    def _group(self, method: str, rest: list[str], body: Body) -> tuple[int, Body | None]:
        if method == "GET" and not rest:
            return 200, {"server_groups": [*self.groups.values()]}
        if method == "POST":
            wanted = body["server_group"]
            if set(wanted) != {"name", "policy"}:
                return 400, {"badRequest": {"message": "Invalid input for field/attribute server_group."}}
            made = {"id": new(), **wanted, "rules": {}, "members": [], "project_id": self.project, "user_id": self.user}
            self.groups[made["id"]] = made
            return 200, {"server_group": made}
        return self._gone(method, self.groups, rest[0], "server_group", 204)

    def _create(self, body: Body) -> tuple[int, Body | None]:
        server = body.get("server", {})
        if error := self._amiss(body):
            return error, {"badRequest" if error == 400 else "conflictingRequest": {"message": self.why}}
        identity = new()
        machine, self.machines[identity] = self.next, self.next
        self.said[identity] = ""
        for entry in server["networks"]:
            self.ports[entry["port"]] |= {"device_id": identity, "status": "ACTIVE"}
        for disk in server.get("block_device_mapping_v2", []):
            volume = self.volumes[disk["uuid"]]
            volume |= {"status": "in-use", "goes": disk["delete_on_termination"], "server": identity}
        self.servers[identity] = {
            "id": identity, "name": server["name"], "status": "BUILD", "OS-EXT-STS:task_state": "scheduling",
            "metadata": server["metadata"], "tenant_id": self.project, "user_id": self.user, "tags": server["tags"],
            "addresses": {}, "OS-SRV-USG:launched_at": None, "key_name": server["key_name"], "looks": machine.looks,
            "ports": [entry["port"] for entry in server["networks"]], "stays": machine.stays,
        }  # fmt: skip
        return 202, {"server": {"id": identity, "links": [], "OS-DCF:diskConfig": "MANUAL"}}

    why = ""

    def _amiss(self, body: Body) -> int:
        """Say how Nova would refuse a server, as far as it can before it schedules."""
        server = body.get("server", {})
        hints = body.get("os:scheduler_hints", {})
        ports = [entry.get("port") for entry in server.get("networks", [])]
        try:
            user_data = base64.b64decode(server.get("user_data", ""), validate=True)
        except binascii.Error:
            user_data = None
        checks = [
            (set(body) <= {"server", "os:scheduler_hints"} and set(server) <= SERVER_FIELDS, "additional properties"),
            ({"name", "flavorRef", "networks"} <= set(server), "a required property is missing"),
            (isinstance(server.get("config_drive", False), bool), "config_drive"),
            (server.get("flavorRef") in {one["id"] for one in self.flavors}, "Flavor could not be found"),
            (server.get("imageRef", "") in {"", *self.images}, "Image could not be found"),
            (bool(server.get("imageRef")) != bool(server.get("block_device_mapping_v2")), "no or two boot disks"),
            (server.get("key_name") in {None, *self.keypairs}, "Invalid key_name provided."),
            (user_data is not None and len(server.get("user_data", "x")) <= 65535, "user_data"),
            (all(isinstance(value, str) for value in server.get("metadata", {}).values()), "metadata"),
            (all(re.fullmatch(r"[^/,]{1,60}", tag) for tag in server.get("tags", [])), "tags"),
            (all(port in self.ports for port in ports), "Port could not be found"),
            (hints.get("group") in {None, *self.groups}, "The server group could not be found"),
            (all(self.volumes.get(disk.get("uuid"), {}).get("status") == "available"
                 for disk in server.get("block_device_mapping_v2", [])), "volume is not available"),
        ]  # fmt: skip
        wrong = [text for holds, text in checks if not holds]
        if wrong:
            self.why = wrong[0]
            return 400
        if any(self.ports[port].get("device_id") for port in ports):
            self.why = "Port is still in use."
            return 409
        return 0

    def _shown(self, server: Body) -> Body:
        return {key: value for key, value in server.items() if key not in {"looks", "ports", "stays"}}

    def _server(self, method: str, server: Body, rest: list[str], body: Body) -> tuple[int, Body | None]:
        if rest == ["action"]:
            return self._action(server, body)
        if method == "DELETE":
            if server["stays"]:
                server["stays"] -= 1
                server["OS-EXT-STS:task_state"] = "deleting"
            elif server["status"] != "SOFT_DELETED":
                self._remove(server)
            return 204, None
        self._grow(server)
        return 200, {"server": self._shown(server)}

    def _remove(self, server: Body) -> None:
        del self.servers[server["id"]]
        for port in server["ports"]:
            if port in self.ports:
                self.ports[port] |= {"device_id": "", "status": "DOWN"}
        for volume in [*self.volumes.values()]:
            if volume.get("server") == server["id"]:
                volume |= {"status": "available", "server": ""}
                if volume["goes"]:
                    del self.volumes[volume["id"]]

    def _grow(self, server: Body) -> None:
        if server["status"] != "BUILD":
            return
        machine = self.machines[server["id"]]
        server["looks"] -= 1
        server["OS-EXT-STS:task_state"] = "spawning"
        if server["looks"] > 0:
            return
        if machine.fault:
            server |= {"status": "ERROR", "fault": machine.fault, "OS-EXT-STS:task_state": None}
            return
        now = datetime.datetime.now(datetime.UTC)
        addresses = [{"addr": ip["ip_address"], "version": 4, "OS-EXT-IPS:type": "fixed"}
                     for port in server["ports"] for ip in self.ports[port]["fixed_ips"]]  # fmt: skip
        server |= {
            "status": "ACTIVE", "OS-EXT-STS:task_state": None, "addresses": {"cluster": addresses},
            "OS-SRV-USG:launched_at": f"{now:%Y-%m-%dT%H:%M:%S}.000000", "born": time.monotonic(),
        }  # fmt: skip

    def _action(self, server: Body, body: Body) -> tuple[int, Body | None]:
        if "forceDelete" in body:
            self._remove(server)
            return 202, None
        machine = self.machines[server["id"]]
        if machine.no_console:
            return machine.no_console, {
                "error": {"message": "Unable to get console log, functionality not implemented"}
            }
        if server["status"] != "ACTIVE":
            return 409, {"conflictingRequest": {"message": "Instance is not ready"}}
        if machine.console:
            self.said[server["id"]] += machine.console.pop(0)
        return 200, {"output": self.said[server["id"]][-CONSOLE_BYTES:]}

    def _network(  # noqa: C901, PLR0911
        self, method: str, words: list[str], query: dict[str, list[str]], body: Body
    ) -> tuple[int, Body | None]:
        match (method, *words):
            case ("GET", "networks"):
                wanted = query.get("id", [one["id"] for one in self.networks])
                return 200, {"networks": [one for one in self.networks if one["id"] in wanted]}
            case ("GET", "networks", identity):
                found = next((one for one in self.networks if one["id"] == identity), None)
                return (200, {"network": found}) if found else (404, {"NeutronError": {"message": "no such network"}})
            case ("GET", "extensions"):
                return 200, {"extensions": []}
            case ("GET", "quotas", _):
                return 200, {"quota": {"port": -1}}
            case ("GET", "security-groups"):
                return 200, {"security_groups": self.security_groups}
            case ("GET", "ports"):
                return 200, {"ports": [*self.ports.values()]}
            case ("POST", "ports"):
                return self._port(body["port"])
            case ("GET", "floatingips"):
                return 200, {"floatingips": [*self.floating.values()]}
            case ("POST", "floatingips"):
                made = {"id": new(), "floating_ip_address": f"203.0.113.{len(self.floating) + 1}", "status": "ACTIVE",
                        "project_id": self.project, "fixed_ip_address": None, **body["floatingip"]}  # fmt: skip
                self.floating[made["id"]] = made
                return 201, {"floatingip": made}
            case (_, "ports", identity):
                return self._gone(method, self.ports, identity, "port", 204)
            case (_, "floatingips", identity):
                return self._gone(method, self.floating, identity, "floatingip", 204)
        return 404, {"NeutronError": {"message": f"{method} {words}"}}

    def _port(self, wanted: Body) -> tuple[int, Body | None]:
        if wanted["network_id"] not in {one["id"] for one in self.networks}:
            return 404, {"NeutronError": {"message": "Network could not be found."}}
        made = {
            "id": new(), "status": "DOWN", "device_id": "", "project_id": self.project, "tenant_id": self.project,
            "mac_address": "fa:16:3e:0:0:1",
            "fixed_ips": [{"subnet_id": new(), "ip_address": f"10.0.0.{len(self.ports) + 10}"}], **wanted,
        }  # fmt: skip
        self.ports[made["id"]] = made
        return 201, {"port": made}

    def _volume(  # noqa: PLR0911
        self, method: str, words: list[str], query: dict[str, list[str]], body: Body
    ) -> tuple[int, Body | None]:
        match (method, *words):
            case ("GET", "limits"):
                used = {"totalVolumesUsed": len(self.volumes),
                        "totalGigabytesUsed": sum(one["size"] for one in self.volumes.values())}  # fmt: skip
                return 200, {"limits": {"rate": [], "absolute": {**self.volume_quota, **used}}}
            case ("GET", "types"):
                return 200, {"volume_types": [{"id": new(), "name": "ssd"}]}
            case ("GET", "messages"):
                return 200, {"messages": self.messages}
            case ("GET", "volumes", "detail"):
                return 200, {"volumes": [*self.volumes.values()]}
            case ("POST", "volumes"):
                made = {
                    "id": new(), "status": "creating", "os-vol-tenant-attr:tenant_id": self.project,
                    "user_id": self.user, "attachments": [], "availability_zone": "nova", "bootable": "true",
                    "created_at": "2026-11-24T12:00:00.000000", "description": None, "snapshot_id": None,
                    "volume_type": None, "multiattach": False, "volume_image_metadata": {}, **body["volume"],
                }  # fmt: skip
                self.volumes[made["id"]] = made
                return 202, {"volume": made}
            case ("POST", "attachments"):
                # By which Nova takes a volume for a server.
                self.volumes[body["attachment"]["volume_uuid"]]["status"] = "reserved"
                made = {"id": new(), **body["attachment"], "connection_info": {}}
                self.attachments[made["id"]] = made
                return 200, {"attachment": made}
            case ("DELETE", "attachments", identity):
                self.volumes[self.attachments.pop(identity)["volume_uuid"]]["status"] = "available"
                return 200, {"attachments": []}
            case (_, "volumes", identity):
                return self._one_volume(method, identity)
        return 404, {"itemNotFound": {"message": f"{method} {words}"}}

    def _one_volume(self, method: str, identity: str) -> tuple[int, Body | None]:
        volume = self.volumes.get(identity)
        if volume and method == "DELETE" and volume["status"] in {"in-use", "reserved"}:
            return 400, {"badRequest": {"message": "Invalid volume: Volume status must be available or error"}}
        status, shown = self._gone(method, self.volumes, identity, "volume", 202)
        if volume and method == "GET":
            shown = {"volume": dict(volume)}
            if volume["status"] == "creating":
                volume["status"] = "error" if self.volume_fails else "available"
        return status, shown


def new() -> str:
    return str(uuid.uuid4())


@contextmanager
def running(project: str = "p", user: str = "u") -> Iterator[FakeNova]:
    """Give a cloud."""
    made = FakeNova(project, user)
    try:
        yield made
    finally:
        made.close()
