"""Servers on a cloud: what is checked, made, waited for and cleared up, against a cloud that does as it is told."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bakehouse import REPOSITORY, cli_up, cloud, launch, server, server_checks, server_console, teardown, waiting
from bakehouse.cli_cloud import Target
from bakehouse.cli_nodes import Shared
from bakehouse.cli_up import Choice, OpenStack, Wish
from bakehouse.cloud import Cloud
from bakehouse.errors import BakehouseError
from bakehouse.launch import Mark
from bakehouse.properties import MARK
from bakehouse.server_checks import Volume, Wanted
from tests import fake_nova
from tests.fake_nova import FakeNova

JOINING = [
    "[    0.000000] Linux version 6.12\n[    1.500000] Run /init as init process\n",
    "[    9.000000] bakehouse-agent: 9.000 started\nbakehouse-agent: 11.5",
    "00 joined\nslurm-1 login: ",
]


def fake_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in a program's place."""
    fakes = folder / "bin"
    fakes.mkdir(exist_ok=True)
    (fakes / name).write_text(f"#!/bin/sh\n{script}\n")
    (fakes / name).chmod(0o755)
    if not os.environ["PATH"].startswith(str(fakes)):
        monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNova]:
    """A cloud, an image in it, and a host that knows it."""
    monkeypatch.setattr(cloud, "LONGEST_PAUSE_SECONDS", 0.02)
    for module in (server, teardown, server_console):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(server, "CONSOLE_SECONDS", 0.02)
    # No node can be reached, unless a test says so.
    fake_program(tmp_path, "ssh", "exit 255", monkeypatch)
    monkeypatch.setattr(teardown, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(cli_up, "STRAGGLERS_SECONDS", 0.05)
    for name in [name for name in os.environ if name.startswith(("OS_", "BAKEHOUSE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    monkeypatch.setenv("OS_CLOUD", "here")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bakehouse.yaml").write_text("store: store\ncache: cache\n")
    monkeypatch.setenv("BAKEHOUSE_CONFIG", str(tmp_path / "bakehouse.yaml"))
    with fake_nova.running() as made:
        made.clouds_yaml(tmp_path / "clouds.yaml")
        made.add_image("base", os_admin_user="debian")
        made.next.console = [*JOINING]
        yield made


@pytest.fixture
def here(fake: FakeNova) -> Iterator[Cloud]:
    with cloud.connect("here") as made:
        made.patience = 5
        yield made


def wish(**more: Any) -> Wish:
    return Wish(**{"platform": "slurm", "path": "bake", "name": "blue", "join_seconds": 20, **more})


def options(**more: Any) -> OpenStack:
    target, choice = Target("", ""), more.pop("choice", None) or Choice(image=more.pop("image", "base"))
    own = {name: more.pop(name) for name in ("identity", "login", "timeout") if name in more}
    return OpenStack(target, choice, Wanted(**{"flavor": "small", **more}), **{"timeout": 20, **own})


def up(user_data: str = "#cloud-config\n", *, wanted: Wish | None = None, **more: Any) -> None:
    cli_up.up_on_openstack(wanted or wish(), lambda node: user_data and f"{user_data}# {node}\n", options(**more))


def down(name: str = "", **more: Any) -> None:
    cli_up.down_on_openstack(name, target=Target("", ""), **more)


def no_note() -> bool:
    return launch.notes() == []


# Up.


def test_a_node_comes_up_with_what_was_asked_for(fake: FakeNova, capsys: pytest.CaptureFixture[str]) -> None:
    up(
        networks=("cluster",), security_groups=("default",), group="anti-affinity", zone="nova",
        floating_network="public", config_drive=True, vnic_type="direct",
    )  # fmt: skip
    (body,) = fake.sent("/servers")
    made = body["server"]
    (note,) = launch.notes()
    assert (note.name, note.platform, note.nodes, note.cloud) == ("blue", "slurm", ("blue-1",), "here")
    assert base64.b64decode(made["user_data"]).decode() == "#cloud-config\n# blue-1\n"
    assert made["config_drive"] is True
    assert made["availability_zone"] == "nova"
    assert made["key_name"] == f"bakehouse-blue-{note.identity}-p"
    assert made["tags"] == ["bakehouse", f"bakehouse-{note.identity}"]
    assert made["metadata"] == {
        "bakehouse_platform": "slurm", "bakehouse_path": "bake", "bakehouse_launch": note.identity,
        "bakehouse_launch_name": "blue", "bakehouse_user": "u", "bakehouse_node": "blue-1",
    }  # fmt: skip
    assert list(fake.keypairs) == [made["key_name"]]
    (group,) = fake.groups.values()
    assert group["policy"] == "anti-affinity"
    assert body["os:scheduler_hints"] == {"group": group["id"]}
    (port,) = fake.ports.values()
    assert port["binding:vnic_type"] == "direct"
    assert port["security_groups"] == [fake.security_groups[0]["id"]], "the project's own, not another's of that name"
    (address,) = fake.floating.values()
    assert address["port_id"] == port["id"]
    shown = capsys.readouterr().out
    assert "agent joined" in shown
    assert "203.0.113.1" in shown
    saved = json.loads((note.folder / "timeline-blue-1.json").read_text())
    assert saved["moments"][0]["name"] == "power-on"
    assert saved["moments"][0]["source"] in {"nova", "console"}
    assert {"agent joined", "initramfs"} <= {moment["name"] for moment in saved["moments"]}
    down("blue")
    assert fake.left() == []
    assert no_note()


def test_several_nodes_come_up_each_with_its_own_user_data(fake: FakeNova) -> None:
    fake.next.console = []
    up(wanted=wish(count=3, until="active"))
    names = [body["server"]["name"] for body in fake.sent("/servers")]
    assert names == ["blue-1", "blue-2", "blue-3"]
    texts = [base64.b64decode(body["server"]["user_data"]).decode() for body in fake.sent("/servers")]
    assert [text[-7:-1] for text in texts] == names
    assert len(fake.ports) == 3
    # Nova gives two a page.
    down()
    assert fake.left() == []


def test_a_node_boots_from_a_volume(fake: FakeNova) -> None:
    up(volume=Volume(20, "ssd"))
    (volume,) = fake.sent("/volumes")
    assert (volume["volume"]["size"], volume["volume"]["volume_type"]) == (20, "ssd")
    (body,) = fake.sent("/servers")
    (disk,) = body["server"]["block_device_mapping_v2"]
    assert "imageRef" not in body["server"]
    assert (disk["source_type"], disk["destination_type"], disk["delete_on_termination"]) == ("volume", "volume", True)
    down("blue")
    assert fake.left() == []


def test_a_volume_that_is_to_be_kept_outlives_its_node(fake: FakeNova, capsys: pytest.CaptureFixture[str]) -> None:
    up(volume=Volume(20, keep=True))
    down("blue")
    assert fake.left() == ["volume blue-1"]
    assert "openstack volume delete" in capsys.readouterr().out
    assert no_note()
    # A new launch of that name is not in its way.
    fake.next.console = [*JOINING]
    up()
    down("blue", with_volumes=True)
    assert fake.left() == []


def test_an_image_comes_from_its_channel_or_tag(fake: FakeNova) -> None:
    identity = fake.add_image(
        "slurm-20261123-5853cc9", tags=[MARK], bakehouse_name="slurm", bakehouse_tag="20261123-5853cc9",
        bakehouse_state="published", bakehouse_platform="slurm",
    )  # fmt: skip
    up(choice=Choice(tag="20261123"))
    assert fake.sent("/servers")[0]["server"]["imageRef"] == identity
    down()


@pytest.mark.parametrize(("path", "name"), [("bootstrap", "base"), ("hybrid", "hybrid")])
def test_a_path_that_sets_nodes_up_boots_a_plain_image(fake: FakeNova, path: str, name: str) -> None:
    """Of that name there is one of ours and one of others."""
    identity = fake.add_image(
        f"{name}-20261123-1407eec", tags=[MARK], bakehouse_name=name, bakehouse_tag="20261123-1407eec",
        bakehouse_state="published", bakehouse_platform="base",
    )  # fmt: skip
    up(wanted=wish(path=path), choice=Choice(tag="20261123"))
    assert fake.sent("/servers")[0]["server"]["imageRef"] == identity
    down()


def test_the_name_of_a_launch_is_taken_once(fake: FakeNova) -> None:
    up(wanted=wish(until="active"))
    before = fake.left()
    with pytest.raises(BakehouseError, match="there is a launch 'blue' in here") as caught:
        up(wanted=wish(until="active"))
    assert "invoke down --name blue" in caught.value.hint
    assert fake.left() == before
    down()


# What is looked at before anything is made.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"flavor": "smal"}, r"no flavor 'smal' \(did you mean 'small'\?\)"),
        ({"flavor": "tiny"}, "the flavor tiny has 128 MiB of memory; base needs 512"),
        ({"networks": ("clster",)}, r"no network 'clster' \(did you mean 'cluster'\?\)"),
        ({"security_groups": ("web",)}, "no security group 'web'"),
        ({"key_pair": "mine"}, "no key pair 'mine'"),
        ({"zone": "nowa"}, r"no availability zone 'nowa' \(did you mean 'nova'\?\)"),
        ({"zone": "broken"}, "zone broken is not available"),
        ({"volume": Volume(1)}, "a volume of 1 GiB is too small: the image base needs 2 GiB"),
        ({"volume": Volume(20, "sdd")}, r"no volume type 'sdd' \(did you mean 'ssd'\?\)"),
        ({"volume": Volume(2000)}, "quota of volume space"),
        ({"group": "anti-afinity"}, "did you mean 'anti-affinity'"),
        ({"group": "0b51c1d8-0c1e-4a0c-8b8e-000000000000"}, "no server group 0b51c1d8"),
        ({"floating_network": "cluster"}, "no external network 'cluster'"),
        ({"vnic_type": "dirct"}, r"it is one of normal, direct.*did you mean 'direct'"),
        ({"image": "bse"}, "no image 'bse'"),
        ({"flavor": ""}, "no flavor is given"),
        ({"identity": "/nowhere"}, "is not a file"),
    ],
)
def test_what_the_cloud_does_not_have_is_said_before_anything_is_made(
    fake: FakeNova, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(BakehouseError, match=message):
        up(**asked)
    assert fake.bodies == []
    assert no_note()


def test_a_disk_of_the_flavor_must_hold_the_image(fake: FakeNova) -> None:
    fake.add_image("large", min_disk=40)
    with pytest.raises(BakehouseError, match="a disk of 10 GiB; large needs 40") as caught:
        up(image="large")
    assert "--volume-size 40" in caught.value.hint
    up(image="large", volume=Volume(40), wanted=wish(until="active"))
    down()


def test_two_images_of_one_name_are_not_guessed_between(fake: FakeNova) -> None:
    fake.add_image("base")
    with pytest.raises(BakehouseError, match="2 images are called 'base'"):
        up()


@pytest.mark.parametrize(
    ("limit", "most", "word"),
    [("maxTotalInstances", 1, "servers"), ("maxTotalCores", 1, "cores"), ("maxTotalRAMSize", 1500, "memory"),
     ("maxServerGroups", 0, "server groups"), ("maxServerGroupMembers", 1, "servers in a group")],
)  # fmt: skip
def test_a_quota_that_is_too_small_is_said_before_anything_is_made(
    fake: FakeNova, limit: str, most: int, word: str
) -> None:
    fake.quota[limit] = most
    with pytest.raises(BakehouseError, match=f"the quota of {word} in here"):
        up(wanted=wish(count=2), group="affinity")
    assert fake.bodies == []
    fake.quota[limit] = -1
    up(wanted=wish(count=2, until="active"), group="affinity")
    down()


def test_user_data_that_is_too_long_is_said_before_any_request(fake: FakeNova) -> None:
    assert len(server_checks.encoded("x" * 49149, "n")) <= server_checks.LONGEST_USER_DATA
    with pytest.raises(BakehouseError, match=r"the user-data of blue-1 is too long: 66\d{3} characters of base64"):
        up("x" * 49700)
    assert fake.asked == []


def test_several_networks_are_not_guessed_between(fake: FakeNova) -> None:
    fake.networks.append({"id": fake_nova.new(), "name": "storage", "router:external": False})
    with pytest.raises(BakehouseError, match="which network") as caught:
        up()
    assert "cluster, storage" in caught.value.hint
    up(networks=("cluster", "storage"), wanted=wish(until="active"))
    assert len(fake.sent("/servers")[0]["server"]["networks"]) == 2
    down()


# Failures: all or none.


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("No valid host was found. There are not enough hosts available.", "no host fits or has room"),
        ("Exceeded maximum number of retries. Exhausted all hosts available", "every host that was tried failed"),
        ("Binding failed for port 5f2, please check neutron logs", "Neutron could not connect the port"),
        ("Image 1 is unacceptable: Image disk is too large", "--volume-size"),
        ("Quota exceeded for cores", "invoke down"),
        ("Build of instance aborted: Failure prepping block device.", "volume could not be attached"),
    ],
)
def test_a_server_that_fails_says_novas_own_words(fake: FakeNova, said: str, hint: str) -> None:
    fake.next.fault = {"code": 500, "message": said, "created": "2026-11-24T12:00:00Z", "details": "Traceback: xyz"}
    with pytest.raises(BakehouseError, match=r"Nova could not start blue-1 \(.*\): ") as caught:
        up(group="affinity", floating_network="public", volume=Volume(5))
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert "xyz" in caught.value.log
    assert fake.left() == []
    assert no_note()


def test_a_quota_that_is_hit_meanwhile_deletes_what_was_made(fake: FakeNova) -> None:
    fake.fail(
        "POST", "/servers$", 403, "Quota exceeded for instances: Requested 1, but already used 10 of 10 instances"
    )
    with pytest.raises(BakehouseError, match="Quota exceeded for instances") as caught:
        up(group="affinity")
    assert "invoke down" in caught.value.hint
    assert "prune" not in caught.value.hint
    assert fake.left() == []


def test_the_second_of_three_nodes_fails_and_all_go(fake: FakeNova) -> None:
    fake.fail("POST", "/ports$", 409, "Quota exceeded for resources: ['port'].")
    with pytest.raises(BakehouseError, match="Quota exceeded for resources"):
        up(wanted=wish(count=3))
    assert fake.left() == []


def test_a_volume_that_cannot_be_made_says_cinders_words(fake: FakeNova) -> None:
    fake.volume_fails = True

    def explain() -> None:
        (identity,) = fake.volumes
        fake.messages.append({"resource_uuid": identity, "user_message": "create volume:No storage could be allocated"})

    fake.fail("GET", "/volumes/[0-9a-f]{8}", 503, act=explain)
    with pytest.raises(BakehouseError, match="Cinder could not make the volume of blue-1") as caught:
        up(volume=Volume(5))
    assert "No storage could be allocated" in caught.value.hint
    assert fake.left() == []


@pytest.mark.parametrize(
    "path", ["/os-keypairs$", "/os-server-groups$", "/volumes$", "/ports$", "/servers$", "/floatingips$"]
)
@pytest.mark.parametrize(("status", "after"), [(0, False), (0, True), (500, False), (503, False)])
def test_an_answer_that_is_lost_leaves_nothing_double(fake: FakeNova, path: str, status: int, after: bool) -> None:
    fake.fail("POST", path, status, after=after)
    up(group="affinity", volume=Volume(5), floating_network="public", wanted=wish(count=2, until="active"))
    kinds = [line.rpartition(" ")[0] for line in fake.left()]
    assert sorted(kinds) == sorted(["server", "port", "floating ip", "volume"] * 2 + ["server group", "keypair"])
    assert not fake.faults
    down()
    assert fake.left() == []


def test_a_server_that_appears_after_its_answer_was_lost_is_deleted(fake: FakeNova) -> None:
    """The request is lost in a proxy, arrives late, and so there are two."""

    def appear_late() -> None:
        (body,) = [body for path, body in fake.bodies if path == "/servers"]
        late = {**body, "server": {**body["server"], "networks": []}}
        fake._create(late)

    fake.fail("GET", "/servers/detail", 503, act=lambda: None)
    fake.fail("GET", "/servers/detail", 503, act=lambda: appear_late() if fake.sent("/servers") else None, times=2)
    up(wanted=wish(until="active"))
    assert len(fake.servers) == 1
    down()
    assert fake.left() == []


def test_a_cloud_that_is_busy_for_a_while_is_waited_for(fake: FakeNova) -> None:
    fake.next.looks = 4
    for method, path in (("GET", "/flavors"), ("GET", "/servers/."), ("POST", "/action"), ("GET", "/ports")):
        fake.fail(method, path, 503, times=2)
    up()
    down()
    assert fake.left() == []


def test_a_server_that_takes_too_long_is_deleted(fake: FakeNova) -> None:
    fake.next.looks = 10**9
    with pytest.raises(BakehouseError, match="blue-1: not active within") as caught:
        up(timeout=0.2)
    assert "--timeout" in caught.value.hint
    assert fake.left() == []


def test_a_server_that_somebody_deletes_meanwhile_is_told_of(fake: FakeNova) -> None:
    fake.next.console = []
    fake.fail("POST", "/action", 409, act=lambda: fake._remove(next(iter(fake.servers.values()))))
    with pytest.raises(BakehouseError, match="is gone: somebody deleted it"):
        up()
    assert fake.left() == []


def test_an_agent_that_cannot_join_fails_the_launch(fake: FakeNova) -> None:
    fake.next.console = ["bakehouse-agent: 12.000 failed wrong key\n"]
    with pytest.raises(BakehouseError, match=r"the node cannot join: 12.000 failed wrong key"):
        up()
    assert fake.left() == []


def test_nodes_that_do_not_join_stay_where_that_is_asked_for(fake: FakeNova) -> None:
    fake.next.console = ["hello\n"]
    with pytest.raises(BakehouseError, match="no join within") as caught:
        up(wanted=wish(keep=True, join_seconds=0.5))
    assert "hello" in caught.value.log
    assert len(fake.servers) == 1
    down("blue")
    assert fake.left() == []


@pytest.mark.parametrize("status", [404, 501])
def test_a_cloud_without_console_logs_is_said(fake: FakeNova, status: int) -> None:
    fake.next.no_console = status
    with pytest.raises(BakehouseError, match="no join within") as caught:
        up(wanted=wish(join_seconds=0.5))
    assert "gives no console log (Unable to get console log, functionality not implemented)" in caught.value.hint
    assert "does a security group let" in caught.value.hint
    assert fake.left() == []


def test_a_cloud_without_console_logs_is_asked_over_ssh(
    fake: FakeNova, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.next.no_console = 501
    fake_program(
        tmp_path,
        "ssh",
        'case "$*" in\n'
        '*uptime*) printf -- \'--- status\\n{"timeline": [["joined", 12.5]]}\\n\\n--- uptime\\n20.00 1.0\\n\' ;;\n'
        '*bakehouse-agent*) echo \'{"state": "joined"}\' ;;\n'
        "esac",
        monkeypatch,
    )
    monkeypatch.setattr(server, "ASK_SECONDS", 0.05)
    up()
    (note,) = launch.notes()
    saved = json.loads((note.folder / "timeline-blue-1.json").read_text())
    assert [moment["name"] for moment in saved["moments"] if moment["source"] == "agent"] == ["agent joined"]
    assert min(moment["seconds"] for moment in saved["moments"]) == 0
    down()


def test_ctrl_c_deletes_what_was_made(fake: FakeNova, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server._Starting, "wait_until_active", stop)
    with pytest.raises(KeyboardInterrupt):
        up(group="affinity", volume=Volume(5))
    assert fake.left() == []
    assert no_note()


# Down.


def test_down_shows_deletes_in_order_and_is_harmless_again(fake: FakeNova, capsys: pytest.CaptureFixture[str]) -> None:
    up(group="affinity", volume=Volume(5), floating_network="public", wanted=wish(until="active"))
    before = fake.left()
    down("blue", dry_run=True)
    assert fake.left() == before
    assert "Nothing was deleted." in capsys.readouterr().out
    fake.asked.clear()
    down("blue")
    deleted = [line.split("/")[3] for line in fake.asked if line.startswith("DELETE")]
    assert list(dict.fromkeys(deleted)) == [
        "servers", "volumes", "ports", "floatingips", "os-server-groups", "os-keypairs",
    ]  # fmt: skip
    capsys.readouterr()
    down("blue")
    assert "Nothing of it is in here" in capsys.readouterr().out
    down()
    down(everything=True)


def test_down_finds_all_by_the_mark_where_the_note_is_lost(fake: FakeNova) -> None:
    up(group="affinity", volume=Volume(5), floating_network="public", wanted=wish(until="active"))
    (note,) = launch.notes()
    note.forget()
    down("blue")
    assert fake.left() == []


def test_what_is_not_marked_is_never_touched(fake: FakeNova) -> None:
    up(wanted=wish(until="active"))
    foreign: dict[str, dict[str, Any]] = {
        "servers": {"id": "s", "name": "blue-1", "status": "ACTIVE", "metadata": {}, "tenant_id": "p"},
        "ports": {"id": "p", "name": "blue-1", "description": "bakehouse", "fixed_ips": [], "project_id": "p"},
        "floating": {"id": "f", "name": "", "description": "", "floating_ip_address": "1.1.1.1", "project_id": "p"},
        "volumes": {"id": "v", "name": "blue-1", "metadata": {}, "size": 1, "status": "available"},
        "groups": {"id": "g", "name": "bakehouse-blue", "policy": "affinity", "project_id": "p", "user_id": "u"},
        "keypairs": {"id": "k", "name": "bakehouse-mine", "public_key": "x"},
    }
    for kind, one in foreign.items():
        getattr(fake, kind)[one["name"] if kind == "keypairs" else one["id"]] = one
    down(everything=True)
    assert len(fake.left()) == len(foreign)


def test_marked_things_of_another_project_are_not_seen(fake: FakeNova) -> None:
    """An administrator is shown ports and floating IPs of all projects."""
    mark = Mark("0123456789ab", "blue", "u", "blue-1")
    fake.ports["x"] = {
        "id": "x",
        "name": "blue-1",
        "description": mark.description(),
        "fixed_ips": [],
        "project_id": "q",
    }
    down(everything=True)
    assert fake.left() == ["port blue-1"]


def test_launches_of_another_user_are_left_alone_unless_asked(
    fake: FakeNova, capsys: pytest.CaptureFixture[str]
) -> None:
    up(wanted=wish(until="active"))
    (mine,) = launch.notes()
    mine.forget()
    fake.user = "somebody"
    with pytest.raises(BakehouseError, match=r"'blue' is a launch of another user of this project \(u\)") as caught:
        down("blue")
    assert "--any-user" in caught.value.hint
    down(everything=True)
    assert "blue is a launch of another user (u): left alone" in capsys.readouterr().out
    assert "server blue-1" in fake.left()
    down("blue", any_user=True)
    (note,) = fake.left()
    assert note.startswith("keypair "), "it is the other user's: only he sees it"
    fake.user = "u"
    down("blue")
    assert fake.left() == []


def test_a_launch_of_another_project_is_refused(fake: FakeNova) -> None:
    up(wanted=wish(until="active"))
    fake.project = "q"
    with pytest.raises(BakehouseError, match=r"'blue' was made in another project \(p\)"):
        down("blue")
    fake.project = "p"
    down("blue")
    assert fake.left() == []


def test_of_several_launches_one_is_named(fake: FakeNova) -> None:
    up(wanted=wish(until="active"))
    up(wanted=wish(name="red", until="active"))
    with pytest.raises(BakehouseError, match=r"which launch\? There are 2 in here \(R1\): blue, red"):
        down()
    down("blue")
    assert [one["name"] for one in fake.servers.values()] == ["red-1"]
    assert [one.name for one in launch.notes()] == ["red"]
    down(everything=True)
    assert fake.left() == []
    assert no_note()


def test_a_delete_that_hangs_is_told_again(fake: FakeNova) -> None:
    fake.next.stays = 2
    up(wanted=wish(until="active"))
    down("blue")
    assert sum(line.startswith("DELETE /compute/v2.1/servers/") for line in fake.asked) >= 3
    assert fake.left() == []


def test_what_cannot_be_deleted_is_named_with_its_command(fake: FakeNova, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.fail("DELETE", "/ports/", 403, "not allowed", times=1)
    up(wanted=wish(until="active"))
    (port,) = fake.ports
    with pytest.raises(BakehouseError, match=r"1 could not be deleted and may cost: port blue-1") as caught:
        down("blue")
    assert f"openstack port delete {port}" in caught.value.hint
    assert "not allowed" in caught.value.log
    assert fake.left() == ["port blue-1"], "the rest is gone"
    assert [one.name for one in launch.notes()] == ["blue"], "so that down knows where to look"
    down("blue")
    assert fake.left() == []
    assert no_note()


def test_a_server_that_never_goes_is_named(here: Cloud, fake: FakeNova) -> None:
    fake.next.stays = 10**9
    up(wanted=wish(until="active"))
    said: list[str] = []
    failed = teardown.delete(here, teardown.find(here), said.append, seconds=0.3)
    assert [one.thing.kind for one in failed if one.thing.kind == "server"] == ["server"]
    assert "still there after" in failed[0].reason
    assert failed[0].thing.by_hand.startswith("openstack server delete ")


def test_a_server_that_is_only_put_aside_is_deleted_for_good(here: Cloud, fake: FakeNova) -> None:
    up(wanted=wish(until="active"))
    (one,) = fake.servers.values()
    one["status"] = "SOFT_DELETED"
    down("blue")
    assert fake.left() == []


def test_a_volume_that_is_busy_for_a_while_goes_in_the_end(fake: FakeNova) -> None:
    up(volume=Volume(5, keep=True), wanted=wish(until="active"))
    fake.fail("DELETE", "/volumes/", 400, "Volume status must be available or error", times=2)
    down("blue", with_volumes=True)
    assert fake.left() == []


def test_down_with_json_says_what_it_was(fake: FakeNova, capsys: pytest.CaptureFixture[str]) -> None:
    up(wanted=wish(until="active"))
    capsys.readouterr()
    down("blue", as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["server", "port", "keypair"]
    assert {row["launch"] for row in rows} == {"blue"}
    assert {row["error"] for row in rows} == {None}


# A process that is killed.


def process(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip


WORDS = ["--platform", "slurm", "--name", "blue", "--image", "base", "--flavor", "small", "--server-group", "affinity",
         "--volume-size", "5", "--user-data", "data.yaml", "--count", "2"]  # fmt: skip


def begun(fake: FakeNova, tmp_path: Path, path: str) -> subprocess.Popen[str]:
    """Start the task, and wait until it has made something."""
    (tmp_path / "data.yaml").write_text("#cloud-config\n")
    fake.next.looks = 10**9
    started = process(tmp_path, "up", *WORDS)
    waiting.until(f"request to {path}", lambda: bool(fake.sent(path)), 60, poll=0.02)
    return started


@pytest.mark.parametrize("path", ["/os-keypairs", "/ports", "/servers"])
def test_sigterm_deletes_what_was_made(fake: FakeNova, tmp_path: Path, path: str) -> None:
    with begun(fake, tmp_path, path) as started:
        started.send_signal(signal.SIGTERM)
        said = started.communicate(timeout=60)[0]
    assert started.returncode == 143, said
    assert fake.left() == [], said
    assert "nothing of it is left" in said
    assert no_note()


@pytest.mark.parametrize("path", ["/os-keypairs", "/volumes", "/servers"])
def test_down_cleans_what_a_killed_process_left(fake: FakeNova, tmp_path: Path, path: str) -> None:
    with begun(fake, tmp_path, path) as started:
        started.kill()
    assert fake.left()
    assert [one.name for one in launch.notes()] == ["blue"]
    with process(tmp_path, "down", "--name", "blue") as ended:
        said = ended.communicate(timeout=60)[0]
    assert ended.returncode == 0, said
    assert fake.left() == [], said
    assert no_note()


# The console.


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "abc\n", "abc\n"),
        ("abc\n", "abc\ndef", "def"),
        ("abc\n", "abc\n", ""),
        ("abc\n", "", ""),
        ("x" * 900 + "\nabc\n", "x" * 500 + "\nabc\nnew\n", "new\n"),
        ("one\ntwo\n", "two\nthree\n", "three\n"),
        ("one\ntwo\n", "else\n", None),
    ],
)
def test_only_what_is_new_on_a_console_is_taken(before: str, now: str, new: str | None) -> None:
    assert server_console.news(before, now) == new


def test_a_console_that_is_cut_at_its_beginning_is_read_on(here: Cloud, fake: FakeNova, tmp_path: Path) -> None:
    fake.next.console = [f"{'-' * 70} {number}\n" * 100 for number in range(40)]
    up(wanted=wish(until="active"))
    (identity,) = fake.servers
    console = server_console.ServerConsole(here, identity, tmp_path / "console.log")
    try:
        for _ in range(42):
            console.poll()
            time.sleep(0.021)
        waiting.until("lines", lambda: len(console.lines) >= 4000, 5, poll=0.02)
        assert len(console.lines) == 4000
    finally:
        console.close()
    down()


def test_marks_read_back() -> None:
    mark = Mark("0123456789ab", "blue-green", "u1", "blue-green-1")
    assert Mark.of_metadata(mark.metadata()) == mark
    assert Mark.of_description(mark.description()) == mark
    assert Mark.of_label(mark.label(), "u1") == Mark("0123456789ab", "blue-green", "u1")
    for text in ("", "bakehouse", "bakehouse-blue", "bakehouse launch x name y"):
        assert Mark.of_description(text) is None
        assert Mark.of_label(text, "") is None
    assert Mark.of_metadata({"bakehouse_launch_name": "blue"}) is None


@pytest.mark.parametrize("name", ["", "Blue", "a.b", "-a", "a" * 41, "a b"])
def test_names_that_nodes_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(BakehouseError, match="nodes cannot be named after that"):
        wish(name=name)


def test_a_note_that_cannot_be_read_is_passed_over(fake: FakeNova) -> None:
    folder = launch.folder() / "broken"
    folder.mkdir(parents=True)
    (folder / launch.NOTE).write_text("{")
    assert no_note()


# The tasks' flags.


def joining(*, wanted: Wish | None = None, **more: Any) -> cli_up.UserData:
    own: dict[str, Any] = {"file": "", "controllers": [], "authentication": "munge", "features": []}
    own |= {name: more.pop(name) for name in own if name in more}
    shared = {"path": "bake", "node": "", "key_file": "", "broker": "", "ca": "", "token_file": "", "ssh_keys": []}
    return cli_up.user_data(wanted or wish(), Shared(**{**shared, **more}), **own)


def test_user_data_comes_from_a_file_or_from_what_a_join_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blue-1.yaml").write_text("#cloud-config\n")
    assert joining(file=f"{tmp_path}/{{node}}.yaml")("blue-1") == "#cloud-config\n"
    with pytest.raises(BakehouseError, match=r"blue-2.yaml cannot be read"):
        joining(file=f"{tmp_path}/{{node}}.yaml")("blue-2")
    (tmp_path / "munge.key").write_bytes(b"k" * 128)
    text = joining(controllers=["ctl"], key_file=str(tmp_path / "munge.key"))("blue-1")
    assert "blue-1" in text
    with pytest.raises(BakehouseError, match="nothing says how the nodes join"):
        joining()
    with pytest.raises(BakehouseError, match="--user-data and --controller"):
        joining(file="x", controllers=["ctl"])
    with pytest.raises(BakehouseError, match="--controller is for Slurm nodes"):
        joining(controllers=["ctl"], wanted=wish(platform="kubernetes"))
    (tmp_path / "k8s-gpu.yaml").write_text("extends: kubernetes\n")
    monkeypatch.setenv("BAKEHOUSE_MANIFESTS", str(tmp_path))
    with pytest.raises(BakehouseError, match=r"Slurm nodes, and --platform is k8s-gpu \(platform kubernetes\)"):
        joining(controllers=["ctl"], wanted=wish(platform="k8s-gpu"))
    with pytest.raises(BakehouseError, match="a token is for one node"):
        joining(controllers=["ctl"], token_file="token", wanted=wish(count=2))


def test_words_that_are_none_are_refused() -> None:
    with pytest.raises(BakehouseError, match="--until ready"):
        wish(until="ready")
    with pytest.raises(BakehouseError, match="--path nomad"):
        wish(path="nomad")
    with pytest.raises(BakehouseError, match="--count 0"):
        wish(count=0)
    with pytest.raises(BakehouseError, match="--tag and --image"):
        Choice(tag="a", image="b")
    with pytest.raises(BakehouseError, match="need --volume-size"):
        cli_up.volume(0, "ssd", keep=False)
    assert cli_up.volume(5, "", keep=True) == Volume(5, "", keep=True)
    assert cli_up.volume(0, "", keep=False) is None
