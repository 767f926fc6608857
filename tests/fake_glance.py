"""A Glance in memory, for speed, faults and races. The same code meets the real one in tests/integration."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import openstack.connection

from bakehouse.cloud import Answer, Cloud, CloudError

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)


class FakeCloud(Cloud):
    """Answers as Glance does, as far as Bakehouse asks it."""

    def __init__(self, project: str = "ours") -> None:
        super().__init__("here", "", project, cast("openstack.connection.Connection", None))
        self.images: dict[str, dict[str, Any]] = {}
        self.data: dict[str, bytes] = {}
        self.used: set[str] = set()
        self.asked: list[str] = []
        self.before: list[tuple[str, Callable[[], None]]] = []
        """What happens just before the next request of a method: once each."""
        self.lost: set[str] = set()
        self.servers: list[dict[str, Any]] | None = None
        self.elsewhere: dict[str, list[dict[str, Any]]] = {}
        """Servers of other regions."""
        self.glances: dict[str, str] = {}
        """Addresses of other regions' Glance, where it is not this one."""
        self.may_see_all_servers = True
        self.time = NOW

    def __exit__(self, *_: object) -> None:
        """It has no connection to close."""

    @property
    def clock(self) -> datetime.datetime:
        return self.time

    def has(self, service: str) -> bool:
        return service == "image"

    def endpoints(self, service: str) -> dict[str, str]:
        if service == "image":
            return {self.region: "http://here", **self.glances}
        own = [self.region] if self.servers is not None else []
        return {region: f"http://nova/{region}" for region in [*own, *self.elsewhere]}

    def on(self, method: str, act: Callable[[], None]) -> None:
        self.before.append((method, act))

    def fail(self, method: str, status: int, reason: str = "no", times: int = 1) -> None:
        def refuse() -> None:
            raise self.refusal(status, json.dumps({"message": reason}), method) if status else CloudError("it broke")

        for _ in range(times):
            self.on(method, refuse)

    def lose_answer(self, method: str) -> None:
        """Let the next request of a method arrive, and its answer be lost: the library below sends it again."""
        self.lost.add(method)

    def request(self, method: str, path: str, **options: Any) -> Answer:
        if method in self.lost:
            self.lost.remove(method)
            self._answer(method, path, options)
        self.asked.append(f"{method} {urlsplit(path).path}")
        for entry in self.before:
            if entry[0] == method:
                self.before.remove(entry)
                entry[1]()
                break
        if options.get("service") == "compute":
            return self._servers(path, options.get("region", ""))
        status, body = self._answer(method, path, options)
        if status not in options.get("ok", (200, 201, 204)):
            raise self.refusal(status, json.dumps({"message": str(body)}), options.get("what", method))
        return Answer(status, {}, json.dumps(body))

    def _servers(self, path: str, region: str) -> Answer:
        servers = self.elsewhere.get(region, self.servers)
        assert servers is not None
        if "all_tenants" in path and not self.may_see_all_servers:
            raise self.refusal(HTTPStatus.FORBIDDEN, '{"forbidden": {"message": "Policy"}}', "listing servers")
        start = int(dict(parse_qsl(urlsplit(path).query)).get("marker", 0))
        page, rest = servers[start : start + 2], servers[start + 2 :]
        links = [{"rel": "next", "href": f"http://nova/v2.1/servers/detail?marker={start + 2}"}] if rest else []
        return Answer(200, {}, json.dumps({"servers": page, "servers_links": links}))

    def _answer(self, method: str, path: str, options: dict[str, Any]) -> tuple[int, Any]:
        parts = urlsplit(path)
        words = parts.path.strip("/").split("/")
        if len(words) == 1:
            if method == "POST":
                return self._create(dict(options["json"]))
            return 200, {"images": self._list(dict(parse_qsl(parts.query)))}
        image = self.images.get(words[1])
        if image is None:
            return 404, "no such image"
        if len(words) > 2:
            return self._put(image, options["data"])
        acts: dict[str, Callable[[], tuple[int, Any]]] = {
            "PATCH": lambda: self._patch(image, json.loads(options["data"])),
            "DELETE": lambda: self._delete(image),
        }
        act = acts.get(method)
        return act() if act else (200, image)

    def _delete(self, image: dict[str, Any]) -> tuple[int, Any]:
        if image["protected"]:
            return 403, "image is protected"
        del self.images[image["id"]]
        return 204, None

    def _list(self, query: dict[str, str]) -> list[dict[str, Any]]:
        hidden = query.pop("os_hidden") == "true"
        for name in ("limit", "visibility", "member_status"):
            query.pop(name, None)
        tag = query.pop("tag", None)
        return [
            image
            for image in self.images.values()
            if image["os_hidden"] == hidden
            and (tag is None or tag in image["tags"])
            and all(str(image.get(key)) == value for key, value in query.items())
        ]

    def _create(self, fields: dict[str, Any]) -> tuple[int, Any]:
        identity = fields["id"]
        if identity in self.used:
            return 409, "the id is in use"
        self.used.add(identity)
        now = self._now()
        self.images[identity] = {
            "status": "queued", "visibility": "shared", "os_hidden": False, "protected": False, "owner": self.project,
            "tags": [], "created_at": now, "updated_at": now, "size": None, **fields,
        }  # fmt: skip
        return 201, self.images[identity]

    def _now(self) -> str:
        return self.time.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _put(self, image: dict[str, Any], data: Any) -> tuple[int, Any]:
        if image["status"] != "queued":
            return 409, "it is not queued"
        content = b"".join(data)
        image |= {
            "status": "active", "size": len(content), "os_hash_algo": "sha512", "updated_at": self._now(),
            "os_hash_value": hashlib.sha512(content).hexdigest(),
        }  # fmt: skip
        self.data[image["id"]] = content
        return 204, None

    def _patch(self, image: dict[str, Any], patch: list[dict[str, Any]]) -> tuple[int, Any]:
        changed = dict(image)
        for step in patch:
            key = step["path"][1:].replace("~1", "/").replace("~0", "~")
            if step["op"] == "remove":
                if key not in changed:
                    return 409, f"there is no {key}"
                del changed[key]
            else:
                changed[key] = step["value"]
        image.clear()
        image |= changed | {"updated_at": self._now()}
        return 200, image
