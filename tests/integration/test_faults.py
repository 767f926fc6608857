"""What goes wrong when nodes join, with a real controller and broker, on containers of the baked root.

Containers boot within a second. What takes a machine of its own (its clock, its data sources) is in test_join.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from bakehouse import cluster, container, userdata
from bakehouse.cluster import Authority, Cluster
from bakehouse.container import Container
from bakehouse.errors import BakehouseError
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.slurm import Authentication
from bakehouse.store import LocalStore
from tests.integration.conftest import status

pytestmark = pytest.mark.slow

CONFIG = "/etc/bakehouse/join.yaml"
SECONDS = 60
"""How long a join may take on a busy host; it takes two or three."""

UP, FAILED, INVALID = "joined", "failed", 2


@contextlib.contextmanager
def made(
    baked: Record, settings: Settings, folder: Path, authentication: Authentication = "munge"
) -> Iterator[Cluster]:
    image = LocalStore(settings.store).image(baked)
    with (
        Log(folder / f"cluster-{authentication}.log") as log,
        cluster.up(image, log, authentication=authentication, cgroups=False) as up,
    ):
        yield up


@pytest.fixture(scope="module")
def slurm(baked: Record, real_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose controller does not run yet."""
    with made(baked, real_settings, tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.fixture
def controller(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with a controller that knows of no node."""
    slurm.controller.start()
    yield slurm
    forget_nodes(slurm)
    slurm.controller.stop()


def forget_nodes(slurm: Cluster) -> None:
    for name in slurm.controller.states():
        slurm.controller.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")
        slurm.controller.run("scontrol", "delete", f"nodename={name}")


def config(join: userdata.Join, **changes: object) -> str:
    """Return the join configuration that cloud-init would write."""
    content = yaml.safe_load(userdata.render(join))["write_files"][0]["content"]
    return str(content) if not changes else yaml.safe_dump({**yaml.safe_load(content), **changes})


def files(text: str) -> dict[str, tuple[str, int]]:
    return {CONFIG: (text, 0o600)}


def node(slurm: Cluster, name: str, text: str | None = None, **options: Any) -> AbstractContextManager[Container]:
    """Boot a node that is to join."""
    root = slurm.network.mount_image(IMAGE[0])
    return container.boot(
        slurm.network, root, name, files=files(text if text is not None else config(slurm.join(name))), **options
    )


IMAGE: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def image(baked: Record, real_settings: Settings) -> None:
    IMAGE[:] = [LocalStore(real_settings.store).image(baked)]


def wait_for(one: Container, what: str, fact: Callable[[dict[str, Any]], bool], seconds: float = SECONDS) -> None:
    try:
        one.wait(what, lambda: fact(status(one)), seconds)
    except BakehouseError as error:
        pytest.fail(f"{error.message}; status: {json.dumps(status(one), indent=1)}\n{error.log}")


def wait_until_joined(one: Container, seconds: float = SECONDS) -> None:
    wait_for(one, "join", lambda said: said.get("state") == "joined", seconds)


def wait_for_words(one: Container, words: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Wait until the status says that it waits for something."""
    wait_for(
        one, words, lambda said: re.search(words, said.get("waiting_for") or "", re.IGNORECASE) is not None, seconds
    )
    return status(one)


def runs_jobs(slurm: Cluster, name: str) -> None:
    """Prove that a node is a member: by a job that ran there, since states may be old."""
    done = slurm.controller.run("srun", f"--nodelist={name}", "hostname", timeout=60)
    assert done.stdout.strip() == name, done.stderr


def test_a_node_joins_and_runs_a_job(controller: Cluster) -> None:
    with node(controller, "plain") as one:
        wait_until_joined(one)
        runs_jobs(controller, "plain")
        said = status(one)
        names = [name for name, _ in said["timeline"]]
        assert names == sorted(names, key=lambda name: dict(said["timeline"])[name])
        assert names[0] == "started"
        assert names[-1] == "joined"
        assert said["node"] == "plain"
        assert one.run("bakehouse-agent", "status").returncode == 0


def test_joining_again_changes_nothing(controller: Cluster) -> None:
    with node(controller, "twice") as one:
        wait_until_joined(one)
        before = one.shell("systemctl show slurmd munge --property=MainPID; sha256sum /etc/bakehouse/join.yaml")
        assert one.run("bakehouse-agent", "join").returncode == 0
        assert one.shell("systemctl show slurmd munge --property=MainPID; sha256sum /etc/bakehouse/join.yaml") == before


@pytest.mark.parametrize("clean", [True, False], ids=["reboot", "power cut"])
def test_a_node_rejoins_after(controller: Cluster, clean: bool) -> None:
    with node(controller, "again") as one:
        wait_until_joined(one)
        first = controller.controller.node("again")["SlurmdStartTime"]
        time.sleep(1)  # Slurm counts whole seconds.
        one.reboot(clean=clean)
        wait_until_joined(one)
        runs_jobs(controller, "again")
        assert controller.controller.node("again")["SlurmdStartTime"] > first


def test_slurms_own_authentication(baked: Record, real_settings: Settings, tmp_path: Path) -> None:
    with made(baked, real_settings, tmp_path, "slurm") as up:
        up.controller.start()
        with node(up, "keyed") as one:
            wait_until_joined(one)
            runs_jobs(up, "keyed")
            assert not one.run("systemctl", "is-active", "munge").stdout.startswith("active")
            assert one.shell("stat -c '%U %a' /etc/slurm/slurm.key") == "slurm 600\n"


def test_a_controller_that_comes_up_later(slurm: Cluster) -> None:
    with node(slurm, "early") as one:
        said = wait_for_words(one, "controller|6817")
        assert said["state"] == "waiting"
        assert "10.77.0.1:6817" in said["waiting_for"]
        assert said["hint"]
        slurm.controller.start()
        try:
            wait_until_joined(one)
            runs_jobs(slurm, "early")
        finally:
            forget_nodes(slurm)
            slurm.controller.stop()


def test_a_wrong_key_is_named_on_both_sides_and_the_right_one_helps(controller: Cluster) -> None:
    wrong = userdata.Join((controller.controller.address,), node="wrong", key=secrets.token_bytes(128))
    with node(controller, "wrong", config(wrong)) as one:
        said = wait_for_words(one, "key")
        assert said["state"] == "waiting"
        assert "munge.key" in said["hint"]
        assert "Invalid credential" in controller.controller.log() + controller.controller.log("munged")
        assert controller.controller.node("wrong") == {}
        one.write(CONFIG, config(controller.join("wrong", inline=True)), 0o600)
        wait_until_joined(one)
        runs_jobs(controller, "wrong")


def test_the_network_goes_during_the_join(controller: Cluster) -> None:
    name = "unplugged"
    port = controller.network.port(name)
    with node(controller, name) as one:
        controller.network.pull(port)
        said = wait_for_words(one, ".")
        assert said["state"] == "waiting"
        time.sleep(2)
        controller.network.put_back(port)
        wait_until_joined(one)
        runs_jobs(controller, name)


@pytest.mark.parametrize("moment", ["configured", "secret", "controller", "services", "registered"])
def test_an_agent_that_is_killed_in_the_middle_is_started_again(controller: Cluster, moment: str) -> None:
    name = f"killed-{moment}"
    text = config(controller.join(name))
    with node(controller, name, text) as one:
        one.wait("agent", lambda: one.run("pkill", "-KILL", "-f", "bakehouse-agent join").returncode == 0)
        reached = f" {moment} "
        one.wait(moment, lambda: reached in one.journal("--unit=bakehouse-agent"))
        one.run("pkill", "-KILL", "-f", "bakehouse-agent join")
        wait_until_joined(one)
        runs_jobs(controller, name)


def test_a_broker_that_comes_up_later(controller: Cluster) -> None:
    text = config(controller.join("brokered"))
    controller.broker.stop()
    try:
        with node(controller, "brokered", text) as one:
            said = wait_for_words(one, "broker")
            assert said["state"] == "waiting"
            controller.broker.start()
            wait_until_joined(one)
            runs_jobs(controller, "brokered")
    finally:
        with contextlib.suppress(BakehouseError):
            controller.broker.start()


def test_a_broker_of_another_authority_gets_no_token(controller: Cluster) -> None:
    join = controller.join("trusting")
    assert join.broker is not None
    other = userdata.Broker(join.broker.url, join.broker.token, Authority().pem)
    wrong = userdata.Join(join.controllers, node=join.node, broker=other)
    with node(controller, "trusting", config(wrong)) as one:
        said = wait_for_words(one, "certificate")
        assert said["state"] == "waiting"
        assert "ca" in said["hint"]
        assert controller.controller.node("trusting") == {}
        # The token was not given away: it still works.
        one.write(CONFIG, config(join), 0o600)
        wait_until_joined(one)


def test_a_token_that_has_been_used_is_refused_and_a_new_one_helps(controller: Cluster) -> None:
    join = controller.join("replay")
    with node(controller, "replay", config(join)) as one:
        wait_until_joined(one)
    forget_nodes(controller)
    with node(controller, "replay", config(join)) as one:
        wait_for(one, "refusal", lambda said: said.get("state") == "failed")
        said = status(one)
        assert "it has been used" in said["waiting_for"]
        assert "invoke join.token" in said["hint"]
        assert "refused" in controller.network.log_of("broker")
        one.write(CONFIG, config(controller.join("replay")), 0o600)
        wait_until_joined(one)
    assert join.broker is not None
    assert join.broker.token not in controller.network.log_of("broker")


def test_a_token_of_another_node_is_refused(controller: Cluster) -> None:
    foreign = controller.join("rightful")
    stolen = userdata.Join(foreign.controllers, node="thief", broker=foreign.broker)
    with node(controller, "thief", config(stolen)) as one:
        wait_for(one, "refusal", lambda said: said.get("state") == "failed")
        assert "it is not for thief" in status(one)["waiting_for"]
    assert controller.controller.node("thief") == {}


def test_a_configuration_that_is_wrong_is_named_and_taken_when_it_is_right(controller: Cluster) -> None:
    text = config(controller.join("typo"), platfrom="slurm")
    with node(controller, "typo", text) as one:
        wait_for(one, "refusal", lambda said: said.get("state") == "failed")
        assert "platfrom" in status(one)["waiting_for"]
        assert "platform" in status(one)["waiting_for"] + status(one)["hint"]
        assert one.run("bakehouse-agent", "check").returncode == INVALID
        one.write(CONFIG, config(controller.join("typo")), 0o600)
        wait_until_joined(one)


def test_a_full_disk_is_named_and_room_helps(controller: Cluster) -> None:
    with node(controller, "full", "", layer="24m") as one:
        # Before it has a machine id it cannot ask for an address.
        one.wait("address", lambda: "inet 10." in one.run("ip", "-4", "address", "show", "dev", "host0").stdout)
        one.run("sh", "-c", "dd if=/dev/zero of=/fill bs=64k; sync")
        # Written where there is room, since the disk has none.
        one.shell("mkdir -p /run/room")
        text = config(controller.join("full"))
        one.run("sh", "-c", f"rm -f {CONFIG}; cat > /run/room/join.yaml <<'EOF'\n{text}\nEOF")
        one.shell(f"chmod 600 /run/room/join.yaml; ln -sf /run/room/join.yaml {CONFIG} || true")
        if one.run("test", "-e", CONFIG).returncode != 0:
            pytest.skip("the disk is too full for a name")
        one.run("systemctl", "restart", "--no-block", "bakehouse-agent")
        said = wait_for_words(one, "disk is full|no space")
        assert said["state"] == "waiting"
        one.shell("rm /fill")
        wait_until_joined(one)


def test_a_host_name_that_settles_late(controller: Cluster) -> None:
    """Nothing says the node's name but the host name, which comes after the agent has started."""
    nameless = userdata.Join((controller.controller.address,), key=controller.controller.key)
    root = controller.network.mount_image(IMAGE[0])
    given = {**files(config(nameless)), "/etc/hostname": ("localhost\n", 0o644)}
    with container.boot(controller.network, root, "settled", files=given, hostname="localhost") as one:
        said = wait_for_words(one, "name")
        assert said["state"] == "waiting"
        one.shell("hostname settled")
        wait_until_joined(one)
        assert status(one)["node"] == "settled"
        # Another name after that changes nothing.
        one.shell("hostname flipped")
        assert controller.controller.node("settled")["State"].startswith("IDLE")


def test_a_node_of_the_same_name_that_is_gone_makes_room(controller: Cluster) -> None:
    with node(controller, "heir") as one:
        wait_until_joined(one)
    slurm_knows = controller.controller.node("heir")
    assert "bake" in slurm_knows["AvailableFeatures"].split(",")
    join = controller.join("heir")
    other = userdata.Join(join.controllers, node="heir", broker=join.broker, features=("new",))
    with node(controller, "heir", config(other)) as one:
        wait_until_joined(one)
        runs_jobs(controller, "heir")
        assert controller.controller.node("heir")["AvailableFeatures"] == "bakehouse,new"


def test_a_node_of_the_same_name_that_lives_is_not_robbed(controller: Cluster) -> None:
    with node(controller, "first") as first:
        wait_until_joined(first)
        address = controller.controller.node("first")["NodeAddr"]
        join = controller.join("first")
        twin = userdata.Join(join.controllers, node="first", broker=join.broker)
        with node(controller, "second", config(twin)) as second:
            said = wait_for_words(second, "first")
            assert address in said["waiting_for"]
            assert controller.controller.node("first")["NodeAddr"] == address
            runs_jobs(controller, "first")


def test_a_changed_address(controller: Cluster) -> None:
    with node(controller, "mover") as one:
        wait_until_joined(one)
        one.shell("systemctl stop systemd-networkd.socket systemd-networkd; ip address flush dev host0")
        one.shell("ip address add 10.77.0.251/24 dev host0")
        one.wait("new address", lambda: controller.controller.node("mover").get("NodeAddr") == "10.77.0.251", SECONDS)
        runs_jobs(controller, "mover")


def test_a_controller_that_forgot_the_node(controller: Cluster) -> None:
    """It crashed before it had saved its state: nobody but the node can bring it back."""
    with node(controller, "forgotten") as one:
        wait_until_joined(one)
        controller.controller.stop()
        controller.controller.run("sh", "-c", "rm -rf /var/spool/slurmctld/*", check=True)
        controller.controller.start()
        assert controller.controller.node("forgotten") == {}
        one.wait("registration", lambda: bool(controller.controller.node("forgotten")), 180)
        wait_until_joined(one)
        runs_jobs(controller, "forgotten")


def test_a_node_leaves_and_stays_away_until_it_is_called(controller: Cluster) -> None:
    with node(controller, "leaver") as one:
        wait_until_joined(one)
        done = one.run("bakehouse-agent", "leave")
        assert done.returncode == 0, done.stdout + done.stderr
        assert controller.controller.node("leaver") == {}
        assert status(one)["state"] == "left"
        one.reboot()
        wait_for(one, "left", lambda said: said.get("state") == "left")
        assert controller.controller.node("leaver") == {}
        assert one.run("bakehouse-agent", "join", timeout=SECONDS).returncode == 0
        runs_jobs(controller, "leaver")


def test_leaving_waits_for_jobs(controller: Cluster) -> None:
    with node(controller, "busy") as one:
        wait_until_joined(one)
        job = controller.controller.run(
            "sbatch", "--parsable", "--nodelist=busy", "--chdir=/tmp", "--output=/dev/null", "--wrap=sleep 4"
        ).stdout.strip()
        one.wait("job", lambda: "ALLOCATED" in controller.controller.node("busy").get("State", "")
                 or "MIXED" in controller.controller.node("busy").get("State", ""))  # fmt: skip
        assert one.run("bakehouse-agent", "leave", timeout=SECONDS).returncode == 0
        shown = controller.controller.run("scontrol", "show", "job", job).stdout
        assert "JobState=COMPLETED" in shown
        assert controller.controller.node("busy") == {}


def test_no_key_is_seen_by_others(controller: Cluster) -> None:
    """Not in a process list, a log, or a file that others can read."""
    key = base64.b64encode(controller.controller.key).decode()[:60]
    with node(controller, "quiet", config(controller.join("quiet", inline=True))) as one:
        wait_until_joined(one)
        assert key not in one.shell("ps -eo args") + one.journal()
        assert key not in one.shell(f"cat {CONFIG}")
        assert one.shell("stat -c '%U %a' /etc/munge/munge.key") == "munge 400\n"
        searched = one.run("sh", "-c", f"grep -rlF '{key}' /etc /var /run 2>/dev/null; true").stdout
        assert searched == ""


@pytest.fixture
def many_watches() -> Iterator[None]:
    setting = Path("/proc/sys/fs/inotify/max_user_instances")
    before = setting.read_text()
    setting.write_text(str(max(int(before), container.MANY_WATCHES)))
    yield
    setting.write_text(before)


@pytest.mark.long
@pytest.mark.parametrize("count", [30])
def test_many_nodes_join_at_once(controller: Cluster, many_watches: None, count: int) -> None:
    """A storm: each boots while the others join."""
    names = [f"storm-{number:02}" for number in range(1, count + 1)]
    texts = {name: config(controller.join(name)) for name in names}
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        nodes = [stack.enter_context(node(controller, name, texts[name], layer="256m")) for name in names]
        powered = time.monotonic()
        for one in nodes:
            wait_until_joined(one, 300)
        joined = time.monotonic()
        states = controller.controller.states()
        assert {name: states.get(name) for name in names} == dict.fromkeys(names, "idle")
        done = controller.controller.run("srun", f"--nodes={count}", "hostname", timeout=120)
        assert sorted(done.stdout.split()) == names
        print(f"{count} nodes: the last powered on after {powered - begun:.1f} s, joined after {joined - begun:.1f} s")
