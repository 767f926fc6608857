"""Connecting to clouds, and what their answers mean: with a server that answers as it is told."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from bakehouse import cloud
from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance


class Service:
    """Keystone and Glance in one: enough to log in; the rest is said by the test."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.asked: list[str] = []
        self.logins = 0
        self.catalogue = ["image"]
        self.regions = ["R1"]
        self.issued = datetime.datetime.now(datetime.UTC)
        self.refuses = False
        self.pause = 0.0
        self.away: list[int] = []
        """What Keystone answers before it comes to itself; 0: it hangs up."""
        self.retry_after = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def date_time_string(self, timestamp: float | None = None) -> str:
                return outer.issued.strftime("%a, %d %b %Y %H:%M:%S GMT")

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                status, body, more = outer.reply(self.command, self.path)
                if not status:
                    self.close_connection = True
                    return
                data = body.encode()
                self.send_response(status)
                for key, value in {**more, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def reply(self, method: str, path: str) -> tuple[int, str, dict[str, str]]:
        if path == "/v3/auth/tokens":
            self.logins += 1
            if self.away:
                return self.away.pop(0), "", {"Retry-After": self.retry_after} if self.retry_after else {}
            if self.refuses:
                return (
                    401,
                    '{"error": {"message": "The request you have made requires authentication.", "code": 401}}',
                    {},
                )
            token = {
                "methods": ["password"], "issued_at": f"{self.issued:%Y-%m-%dT%H:%M:%S.000000Z}",
                "expires_at": f"{self.issued + datetime.timedelta(hours=1):%Y-%m-%dT%H:%M:%S.000000Z}",
                "user": {"id": "u", "name": "u", "domain": {"id": "default", "name": "Default"}},
                "project": {"id": "p", "name": "p", "domain": {"id": "default", "name": "Default"}}, "roles": [],
                "catalog": [
                    {"type": kind, "name": kind, "id": kind, "endpoints": [
                        {"interface": "public", "region": region, "region_id": region, "id": "e",
                         "url": f"{self.url}/{kind}{'' if region == 'R1' else f'-{region}'}"}
                        for region in self.regions
                    ]}
                    for kind in self.catalogue
                ],
            }  # fmt: skip
            return 201, json.dumps({"token": token}), {"X-Subject-Token": "t0ken"}
        if path.rstrip("/") in {"/v3", "/image", "/image/v2"}:
            links = [{"rel": "self", "href": f"{self.url}{'/v3' if path.startswith('/v3') else '/image/v2/'}"}]
            if path.startswith("/v3"):
                return 200, json.dumps({"version": {"id": "v3.14", "status": "stable", "links": links}}), {}
            return 300, json.dumps({"versions": [{"id": "v2.9", "status": "CURRENT", "links": links}]}), {}
        self.asked.append(f"{method} {path}")
        time.sleep(self.pause)
        status, body = self.answers.pop(0) if self.answers else (200, "{}")
        return status, body, {}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service()
    entry = {
        "auth": {"auth_url": f"{made.url}/v3", "username": "u", "password": "s3cret", "project_name": "p",
                 "user_domain_id": "default", "project_domain_id": "default"},
        "region_name": "R1",
    }  # fmt: skip
    (tmp_path / "clouds.yaml").write_text(yaml.safe_dump({"clouds": {"here": entry, "there": entry}}))
    for name in ("OS_CLOUD", "OS_AUTH_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    monkeypatch.setattr(cloud, "LONGEST_PAUSE_SECONDS", 0.01)
    yield made
    made.close()


@pytest.fixture
def here(service: Service) -> Iterator[Cloud]:
    with cloud.connect("here") as made:
        made.patience = 5
        yield made


def test_a_cloud_is_named_by_flag_variable_or_site(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BakehouseError, match="no cloud is named") as caught:
        cloud.connect()
    assert "here, there" in caught.value.hint
    with cloud.connect(default="here") as made:
        assert (made.name, made.region, made.project, made.place) == ("here", "R1", "p", "here (R1)")
    monkeypatch.setenv("OS_CLOUD", "there")
    with cloud.connect(default="here") as made:
        assert made.name == "there"
    with pytest.raises(BakehouseError, match=r"no cloud 'hree' in clouds\.yaml \(did you mean 'here'\?\)"):
        cloud.connect("hree")


def test_without_named_clouds_there_is_a_way_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text("clouds: {}\n")
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
    monkeypatch.delenv("OS_CLOUD", raising=False)
    with pytest.raises(BakehouseError) as caught:
        cloud.connect()
    assert "openstack.up" in caught.value.hint


def test_a_clouds_yaml_that_is_none_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text("clouds: [\n")
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
    with pytest.raises(BakehouseError, match=r"clouds\.yaml"):
        cloud.connect("here")


def test_a_wrong_credential_is_said_so_and_never_shown(service: Service) -> None:
    service.refuses = True
    with pytest.raises(CloudError, match="here refuses the credential") as caught:
        cloud.connect("here")
    assert "s3cret" not in str(caught.value)
    assert service.logins == 1, "not tried again: accounts are locked that way"


def test_a_cloud_without_images_is_said_so(service: Service) -> None:
    service.catalogue = ["compute"]
    with pytest.raises(BakehouseError, match="has no image service"):
        cloud.connect("here")


def test_another_regions_service_is_asked_with_the_same_credential(service: Service) -> None:
    service.catalogue = ["image", "compute"]
    service.regions = ["R1", "R2"]
    with cloud.connect("here") as made:
        assert made.endpoints("compute") == {"R1": f"{service.url}/compute", "R2": f"{service.url}/compute-R2"}
        assert made.endpoints("orchestration") == {}
        made.request("GET", "/servers/detail", service="compute", region="R2")
    assert service.asked[-1] == "GET /compute-R2/servers/detail"
    assert service.logins == 1


def test_a_region_that_is_not_there_is_said_so(service: Service) -> None:
    with pytest.raises(BakehouseError):
        cloud.connect("here", region="Atlantis")


def test_nobody_there_is_said_so(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "RETRY_SECONDS", 0.2)
    text = (tmp_path / "clouds.yaml").read_text()
    (tmp_path / "clouds.yaml").write_text(text.replace(service.url, "http://127.0.0.1:1"))
    with pytest.raises(CloudError, match="here cannot be reached: connecting"):
        cloud.connect("here")


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504])
def test_a_keystone_that_is_away_for_a_moment_is_waited_for(service: Service, status: int) -> None:
    service.away = [status] * 3
    said = list[str]()
    with cloud.connect("here", say=said.append) as made:
        assert made.project == "p"
    (line,) = said
    assert line.startswith("here")
    assert "trying again" in line


def test_a_keystone_that_stays_away_is_given_up_in_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "RETRY_SECONDS", 0.2)
    service.away = [503] * 1000
    with pytest.raises(CloudError, match="here: connecting") as caught:
        cloud.connect("here")
    assert caught.value.status == 503


def test_a_service_says_how_long_to_stay_away(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    for said in ("7", "100000", "Wed, 25 Nov 2026 12:00:00 GMT"):
        service.away, service.retry_after = [503], said
        cloud.connect("here").connection.close()
    assert pauses[:2] == [7, cloud.LONGEST_RETRY_AFTER_SECONDS]
    assert pauses[2] < 1


def test_an_answer_that_takes_too_long_is_told_from_a_broken_connection(service: Service, here: Cloud) -> None:
    service.pause = 0.5
    with pytest.raises(CloudError, match="does not answer in time: uploading") as caught:
        here.request("PUT", "/images/x/file", what="uploading", retry=False, timeout=(5, 0.1))
    assert caught.value.status == 504


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_what_may_pass_is_asked_again(service: Service, here: Cloud, status: int) -> None:
    service.answers = [(status, "")] * 3 + [(200, '{"images": []}')] * 2
    assert Glance(here).list() == []
    assert len(service.asked) == 5


def test_what_does_not_pass_is_given_up_in_time(service: Service, here: Cloud) -> None:
    here.patience = 0.1
    service.answers = [(503, "busy")] * 1000
    with pytest.raises(CloudError, match=r"here \(R1\): listing images: busy \(HTTP 503\)"):
        Glance(here).list()


def test_an_expired_token_is_renewed(service: Service, here: Cloud) -> None:
    service.answers = [(401, "")]
    assert here.request("GET", "/images/x").status == 200
    assert service.logins == 2


@pytest.mark.parametrize(
    ("status", "body", "said", "hint"),
    [
        (403, '{"message": "You are not authorized.<br /><br />\\n\\n\\n", "code": "403 Forbidden"}',
         "You are not authorized. (HTTP 403)", "roles do not allow it"),
        (403, "<html><head><title>403</title></head><body><h1>403 Forbidden</h1>Access &amp; more<br/></body>",
         "Access & more (HTTP 403)", "roles"),
        (413, '{"message": "Request exceeds image_size_total quota"}', "quota (HTTP 413)", "invoke prune"),
        (413, '{"message": "Not enough disk space on the image storage media."}', "storage media", "make room"),
        (413, '{"message": "The limit has been exceeded on the number of allowed image properties."}',
         "properties. (HTTP 413)", "openstack image unset --property"),
        (409, '{"error": {"message": "It is in use"}}', "It is in use (HTTP 409)", "changed it meanwhile"),
        (418, "", "refused (HTTP 418)", ""),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_with_a_hint(
    service: Service, here: Cloud, status: int, body: str, said: str, hint: str
) -> None:
    service.answers = [(status, body)]
    with pytest.raises(CloudError) as caught:
        here.request("GET", "/images/x", what="looking")
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.status == status
    assert len(service.asked) == 1


def test_pages_are_followed(service: Service, here: Cloud) -> None:
    def image(identity: str) -> dict[str, Any]:
        return {"id": identity, "status": "active", "visibility": "private", "created_at": "2026-01-01T00:00:00Z",
                "updated_at": "2026-01-01T00:00:00Z", "own": "x"}  # fmt: skip

    service.answers = [
        (200, json.dumps({"images": [image("a")], "next": "/v2/images?marker=a&limit=1"})),
        (200, json.dumps({"images": [image("b")]})),
        (200, json.dumps({"images": []})),
    ]
    found = Glance(here).list(tag="t", name="a b&c")
    assert {one.id for one in found} == {"a", "b"}
    assert found[0].properties == {"own": "x"}
    assert "name=a%20b%26c" in service.asked[0]
    assert service.asked[1].endswith("/images?marker=a&limit=1")


@pytest.mark.parametrize("hours", [-24, 0, 24])
def test_ages_are_counted_by_the_clouds_clock(service: Service, hours: int) -> None:
    service.issued += datetime.timedelta(hours=hours)
    with cloud.connect("here") as made:
        assert abs(made.clock - service.issued) < datetime.timedelta(seconds=30)


def test_what_is_known_of_the_clouds_clock_is_as_good_as_its_answers_are_quick() -> None:
    now, second = datetime.datetime.now(datetime.UTC), datetime.timedelta(seconds=1)
    # Sent 60 s ago, and it says now what time it is, or what time it was when we asked: it may be right.
    for said in (now - second, now - 60 * second):
        assert cloud._skew(said, now - 60 * second) == 0 * second
    behind = cloud._skew(now - 20 * second, now)
    assert -20 * second <= behind <= -19 * second
    assert cloud._skew(now - 40 * second, now - 60 * second, behind) == behind, "a slow answer teaches nothing new"
    assert 59 * second < cloud._skew(now + 60 * second, now) <= 60 * second


def test_a_change_is_one_patch(service: Service, here: Cloud) -> None:
    data = {"id": "a", "status": "active", "visibility": "private", "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z", "old/key": "x"}  # fmt: skip
    service.answers = [(200, json.dumps(data)), (200, json.dumps(data))]
    image = Glance(here).get("a")
    assert image is not None
    assert Glance(here).change(image, {"missing": None}) is image, "nothing to do, nothing asked"
    Glance(here).change(image, {"old/key": None, "new": "y", "os_hidden": True})
    assert service.asked == ["GET /image/v2/images/a", "PATCH /image/v2/images/a"]
