"""Servers on an OpenStack cloud: something that boots an image, as QEMU is. Started together, and all or none.

All that is made is marked (see launch), each request that makes something is sent so that a lost answer leaves nothing
double, and teardown finds it all by the mark.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bakehouse import teardown, timeline, verify, waiting
from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.launch import KEPT, Launch
from bakehouse.machine import Login
from bakehouse.progress import Progress
from bakehouse.server_checks import Checked, encoded
from bakehouse.server_console import POLL_SECONDS as CONSOLE_SECONDS
from bakehouse.server_console import ServerConsole
from bakehouse.teardown import MICROVERSION
from bakehouse.timeline import GuestFacts, Timeline
from bakehouse.waiting import TooLateError

STAGES = ("key and group", "volumes", "ports", "servers", "active", "floating IPs")
"""Of start(), for its progress."""

POLL_SECONDS = 2.0

BUILD_SECONDS = 1800.0
"""How long the servers may take to be active: the first on a host waits for the image, and metal for its firmware."""

VOLUME_SECONDS = 1800.0
"""How long a volume may take to be filled from the image."""

LOGIN_SECONDS = 60

REACH_SECONDS = 25
"""How long it is tried whether a server can be reached over SSH at all."""

ASK_SECONDS = 15.0
"""A server without a console log is asked over SSH so often."""

TAG = "bakehouse"

LAST_WORDS = 20


@dataclass
class Server:
    """A server that runs."""

    cloud: Cloud
    id: str
    node: str
    console: ServerConsole
    requested: float
    """When Nova was asked for it: seconds of this host's monotonic clock."""
    address: str = ""
    """A floating IP where it has one, else its first address."""
    fixed: tuple[str, ...] = ()
    """The addresses of its ports."""
    login: Login | None = None
    launched: float = 0.0
    """When Nova says that it was launched: seconds of this host's monotonic clock."""
    accelerator: str = ""
    """Which the cloud does not tell."""
    others: Sequence[Server] = ()
    """The servers that came up with it, itself too: the consoles of all are read while one is waited for."""
    _looked: float = field(default=0.0, repr=False)

    def wait(self, what: str, fact: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds, reading the consoles meanwhile.

        Raises:
            BakehouseError: it did not come to hold, or the server has ended.
        """
        try:
            waiting.until(what, fact, seconds, poll=POLL_SECONDS, check=self.check, last_words=self._last_words)
        except TooLateError as error:
            raise BakehouseError(f"{self.node}: {error.message}", hint=self._why_unknown(), log=error.log) from None

    def _last_words(self) -> str:
        return "\n".join(self.console.text().splitlines()[-LAST_WORDS:])

    def _why_unknown(self) -> str:
        if not self.console.silent:
            return "the last lines of its console are above; --keep leaves it running to look at"
        reach = f"it was asked over SSH at {self.address}" if self.login else "there is no key to ask it over SSH"
        return (
            f"{self.cloud.place} gives no console log ({self.console.silent}), and {reach}: does a security group let "
            "SSH in, and does this host reach its network (--floating-network)? The cluster itself may know it already"
        )

    def check(self) -> None:
        """Read the consoles, and raise if the server has ended.

        Raises:
            BakehouseError: it has.
        """
        for server in self.others or (self,):
            server.console.poll()
        if "Kernel panic" in self.console.text():
            raise BakehouseError(f"the kernel of {self.node} panicked", log=self._last_words())
        if time.monotonic() - self._looked >= CONSOLE_SECONDS:
            self._looked = time.monotonic()
            state = self.state()
            if state["status"] != "ACTIVE":
                raise failure(self.node, state) or BakehouseError(f"{self.node} is {state['status']} now")

    def state(self) -> dict[str, Any]:
        """Return what Nova says of it.

        Raises:
            BakehouseError: it is gone.
        """
        found = show(self.cloud, self.id)
        if found is None:
            raise BakehouseError(f"{self.node} ({self.id}) is gone: somebody deleted it")
        return found

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command in it. Without a key to log in with, that fails as ssh does (status 255)."""
        if self.login is None:
            return subprocess.CompletedProcess(command, 255, "", "there is no key to log in with")
        return self.login.run(command, timeout)

    def answers(self, seconds: float = REACH_SECONDS) -> bool:
        """Say whether one can log in."""
        try:
            return self.ssh("true", timeout=seconds).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def wait_for_ssh(self, seconds: float) -> None:
        """Wait until one can log in.

        Raises:
            BakehouseError: not within the time, or the server has ended.
        """
        self.wait("login over SSH", self.answers, seconds)

    def wait_for_join(self, seconds: float) -> None:
        """Wait until its agent says that it has joined: on the console, or over SSH where there is no console log.

        Raises:
            BakehouseError: it cannot, or says nothing within the time.
        """
        self.console.poll()
        asking = ASK_SECONDS if self.console.silent else verify.ASK_SECONDS
        verify.wait_for_join(self, seconds=seconds, ask_seconds=asking)

    def read_timeline(self) -> Timeline:
        """Return the timeline of its boot, from what its console and, where it can be reached, itself say.

        The time of its launch is Nova's, in whole seconds in most clouds, and Nova notes it when the machine runs
        already. Where the kernel was there before, the boot began before it.
        """
        began = timeline.latest_start(self.console.lines)
        late = began is not None and began < self.launched
        power_on = began if began is not None and late else self.launched
        if self.answers():
            found = verify.read_timeline(self, power_on)
        else:
            found = timeline.from_boot(self.console.lines, power_on, GuestFacts())
        return self._honest(found, "console" if late else "nova")

    def _honest(self, found: Timeline, said: str) -> Timeline:
        """Return a timeline that says who told its beginning, and how exact it can be at best."""
        kernel = next((moment for moment in found.moments if moment.name == "kernel"), None)
        early = -kernel.seconds if kernel and kernel.seconds < 0 else 0.0
        if kernel and early:
            said = kernel.source
        moments = [
            moment.model_copy(update={"source": said})
            if moment.name == timeline.POWER_ON
            else moment.model_copy(update={"seconds": round(moment.seconds + early, 3)})
            for moment in found.moments
        ]
        moments.sort(key=lambda moment: (moment.seconds, moment.name != timeline.POWER_ON))
        # A console that is looked at now and then tells no time better than that, nor does Nova's clock.
        error = max(found.clock_error or 0.0, CONSOLE_SECONDS)
        more = {"moments": tuple(moments), "clock_error": error, "power_on": found.power_on - early}
        return found.model_copy(update=more)

    @property
    def cloud_seconds(self) -> float:
        """Seconds from our request to the launch: the scheduler, the image, the volume, the network."""
        return self.launched - self.requested


@dataclass(frozen=True)
class Access:
    """How to log in to servers, and the key pair for it."""

    key_pair: str
    """The name of one that is there; empty where one is to be made."""
    public_key: str
    """Of the one that is to be made."""
    user: str
    identity: str
    """The file with the private key; empty where one cannot log in."""


class _Starting:
    """One start: what was made so far."""

    def __init__(
        self,
        cloud: Cloud,
        launch: Launch,
        checked: Checked,
        access: Access,
        progress: Progress,
        opened: contextlib.ExitStack,
    ) -> None:
        self.cloud = cloud
        self.opened = opened
        self.launch = launch
        self.checked = checked
        self.wanted = checked.wanted
        self.access = access
        self.progress = progress
        self.volumes: dict[str, str] = {}
        """Ids by node."""
        self.ports: dict[str, list[dict[str, Any]]] = {}
        self.servers: list[Server] = []
        self.group = checked.group
        self.key_pair = access.key_pair or teardown.key_pair_name(cloud, launch.mark())

    def _find(self, kind: str, node: str = "", used: Sequence[str] = ()) -> dict[str, Any] | None:
        """Return what a lost answer told of: by its mark."""
        for thing in teardown.find(self.cloud, self.launch.identity):
            if thing.kind == kind and thing.mark.node in {node, ""} and thing.id not in used:
                return {"id": thing.id, "name": thing.name}
        return None

    def _create(self, path: str, key: str, body: Mapping[str, Any], kind: str, node: str, **options: Any) -> Any:
        used: Sequence[str] = options.pop("used", ())
        whole = {key: dict(body), **options.pop("beside", {})}
        what = f"creating {kind} {node or self.launch.name}"
        try:
            found: dict[str, Any] = self.cloud.create(
                path, whole, lambda: self._find(kind, node, used), what=what, **options
            )
        except CloudError as error:
            if "quota" not in error.reason.lower():
                raise
            raise CloudError(error.message, hint=QUOTA, status=error.status, reason=error.reason) from error
        return found.get(key, found)

    def key_and_group(self) -> None:
        label = self.launch.mark().label()
        if not self.access.key_pair:
            pair = {"name": self.key_pair, "public_key": self.access.public_key, "type": "ssh"}
            self._create("/os-keypairs", "keypair", pair, "keypair", "", service="compute", microversion=MICROVERSION)
        if self.checked.policy:
            group = {"name": label, "policy": self.checked.policy}
            made = self._create(
                "/os-server-groups", "server_group", group, "server group", "", service="compute",
                microversion=MICROVERSION,
            )  # fmt: skip
            self.group = made["id"]

    def make_volumes(self) -> None:
        """Fill volumes from the image before Nova is asked: Nova itself gives up after some minutes."""
        volume = self.wanted.volume
        if volume is None:
            return
        for node in self.launch.nodes:
            mark = self.launch.mark(node).metadata() | ({KEPT: "yes"} if volume.keep else {})
            body = {"size": volume.size, "imageRef": self.checked.image.id, "name": node, "metadata": mark}
            if volume.kind:
                body["volume_type"] = volume.kind
            made = self._create("/volumes", "volume", body, "volume", node, service="block-storage")
            self.volumes[node] = made["id"]
        for node, identity in self.volumes.items():
            self._wait_for_volume(node, identity)

    def _wait_for_volume(self, node: str, identity: str) -> None:
        def ready() -> bool:
            path = f"/volumes/{identity}"
            data = self.cloud.request("GET", path, service="block-storage", what=f"looking at the volume of {node}")
            state = data.json()["volume"]["status"]
            self.progress.line(f"the volume of {node} is {state}")
            if state.startswith("error"):
                raise BakehouseError(
                    f"Cinder could not make the volume of {node} from the image ({identity}: {state})",
                    hint=self._cinder_says(identity)
                    or "no room in the storage, or a size below the image's; "
                    "`openstack volume message list` may say more",
                )
            return bool(state == "available")

        waiting.until(f"volume of {node}", ready, VOLUME_SECONDS, poll=POLL_SECONDS)

    def _cinder_says(self, identity: str) -> str:
        """Return Cinder's own words on why a volume failed (messages, microversion 3.3)."""
        try:
            answer = self.cloud.request(
                "GET", f"/messages?resource_uuid={identity}", service="block-storage", microversion="3.5",
                what="reading messages", ok=(200,), retry=False,
            )  # fmt: skip
        except CloudError:
            return ""
        said = [one.get("user_message", "") for one in answer.json().get("messages", [])
                if one.get("resource_uuid") == identity]  # fmt: skip
        return f"Cinder says: {said[0]}" if said else ""

    def make_ports(self) -> None:
        """Make the ports before Nova is asked: so they carry our mark, and an address is known."""
        for node in self.launch.nodes:
            made: list[dict[str, Any]] = []
            for network in self.checked.networks:
                body: dict[str, Any] = {
                    "network_id": network,
                    "name": node,
                    "description": self.launch.mark(node).description(),
                }
                if self.wanted.vnic_type:
                    body["binding:vnic_type"] = self.wanted.vnic_type
                if self.checked.security_groups:
                    body["security_groups"] = list(self.checked.security_groups)
                used = [port["id"] for port in made]
                made.append(self._create("/ports", "port", body, "port", node, service="network", used=used))
            self.ports[node] = made

    def make_servers(self, user_data: Mapping[str, str]) -> None:
        for node in self.launch.nodes:
            body = self.body(node, user_data[node])
            asked = time.monotonic()
            made = self._create(
                "/servers", "server", body, "server", node, service="compute", microversion=MICROVERSION,
                beside={"os:scheduler_hints": {"group": self.group}} if self.group else {},
            )  # fmt: skip
            console = ServerConsole(self.cloud, made["id"], self.launch.folder / f"console-{node}.log")
            self.opened.callback(console.close)
            self.servers.append(Server(self.cloud, made["id"], node, console, asked))
        for server in self.servers:
            server.others = self.servers
        self._remove_doubles()

    def body(self, node: str, user_data: str) -> dict[str, Any]:
        """Return what Nova is asked for."""
        mark = self.launch.mark(node).metadata()
        facts = {"bakehouse_platform": self.launch.platform, "bakehouse_path": self.launch.path}
        body: dict[str, Any] = {
            "name": node,
            "flavorRef": self.checked.flavor,
            "networks": [{"port": port["id"]} for port in self.ports[node]],
            "metadata": {**facts, **mark},
            "tags": [TAG, f"{TAG}-{self.launch.identity}"],
            "key_name": self.key_pair,
            "config_drive": self.wanted.config_drive,
        }
        if user_data:
            body["user_data"] = user_data
        if self.wanted.zone:
            body["availability_zone"] = self.wanted.zone
        if self.wanted.volume:
            body["block_device_mapping_v2"] = [{
                "boot_index": 0, "uuid": self.volumes[node], "source_type": "volume", "destination_type": "volume",
                "delete_on_termination": not self.wanted.volume.keep,
            }]  # fmt: skip
        else:
            body["imageRef"] = self.checked.image.id
        return body

    def _remove_doubles(self) -> None:
        """Delete servers that a lost answer left beside those that we know of."""
        known = {server.id for server in self.servers}
        things = teardown.find(self.cloud, self.launch.identity)
        doubles = [thing for thing in things if thing.kind == "server" and thing.id not in known]
        if doubles:
            self.progress.note(f"{len(doubles)} servers came of answers that got lost")
            if failed := teardown.delete(self.cloud, doubles, self.progress.note):
                raise teardown.left_error(failed)

    def wait_until_active(self, seconds: float) -> None:
        waiting_for = {server.id: server for server in self.servers}

        def all_active() -> bool:
            for server in [*waiting_for.values()]:
                if self._is_active(server):
                    del waiting_for[server.id]
            return not waiting_for

        try:
            waiting.until("active servers", all_active, seconds, poll=POLL_SECONDS)
        except TooLateError:
            names = ", ".join(server.node for server in waiting_for.values())
            raise BakehouseError(
                f"{names}: not active within {seconds:.0f} s",
                hint="a cloud that loads an image for the first time, or metal, may need more: --timeout SECONDS",
            ) from None

    def _is_active(self, server: Server) -> bool:
        state = server.state()
        if error := failure(server.node, state):
            raise error
        task = state.get("OS-EXT-STS:task_state")
        self.progress.line(f"{server.node}: {state['status']}{f', {task}' if task else ''}")
        if state["status"] != "ACTIVE":
            return False
        server.launched = _monotonic(self.cloud, state.get("OS-SRV-USG:launched_at"), server.requested)
        # Bare metal and clouds that give addresses late: what Nova tells counts.
        server.fixed = tuple(one["addr"] for several in state.get("addresses", {}).values() for one in several
                             if one.get("OS-EXT-IPS:type", "fixed") == "fixed")  # fmt: skip
        server.address = server.fixed[0] if server.fixed else ""
        return True

    def make_floating_ips(self) -> None:
        if not self.checked.floating_network:
            return
        for server in self.servers:
            body = {
                "floating_network_id": self.checked.floating_network,
                "port_id": self.ports[server.node][0]["id"],
                "description": self.launch.mark(server.node).description(),
            }
            path, service = "/floatingips", "network"
            made = self._create(path, "floatingip", body, "floating ip", server.node, service=service)
            # One that was found again says its address as its name.
            server.address = made.get("floating_ip_address") or made["name"]

    def give_logins(self) -> None:
        for server in self.servers:
            if server.address and self.access.identity:
                server.login = Login(server.address, 22, self.access.user, Path(self.access.identity))


def start(
    cloud: Cloud,
    launch: Launch,
    checked: Checked,
    access: Access,
    user_data: Mapping[str, str],
    progress: Progress,
    opened: contextlib.ExitStack,
    *,
    seconds: float = BUILD_SECONDS,
) -> list[Server]:
    """Start servers and wait until they are active. Clears nothing up: who calls does, by teardown.

    Args:
        cloud: the cloud.
        launch: what they are for; its note is written.
        checked: what they shall be like.
        access: how one logs in.
        user_data: by node, as encoded() returns it; empty for none.
        progress: has STAGES.
        opened: closes the consoles.
        seconds: how long they may take to be active.

    Raises:
        BakehouseError: one of them cannot be made, or does not come up.
    """
    going = _Starting(cloud, launch, checked, access, progress, opened)
    steps: list[tuple[str, Callable[[], None]]] = [
        ("key and group", going.key_and_group),
        ("volumes", going.make_volumes),
        ("ports", going.make_ports),
        ("servers", lambda: going.make_servers(user_data)),
        ("active", lambda: going.wait_until_active(seconds)),
        ("floating IPs", going.make_floating_ips),
    ]
    for name, step in steps:
        with progress.stage(name):
            step()
    going.give_logins()
    return going.servers


def encode_all(nodes: Sequence[str], user_data: Callable[[str], str]) -> dict[str, str]:
    """Return the user-data of nodes as Nova takes it.

    Raises:
        BakehouseError: one is too long.
    """
    texts = {node: user_data(node) for node in nodes}
    return {node: encoded(text, node) if text else "" for node, text in texts.items()}


def show(cloud: Cloud, identity: str) -> dict[str, Any] | None:
    """Return what Nova says of a server; None where it is gone."""
    answer = cloud.request(
        "GET", f"/servers/{identity}", service="compute", ok=(200, 404), what=f"looking at server {identity}",
        microversion=MICROVERSION,
    )  # fmt: skip
    return dict(answer.json()["server"]) if answer.status == HTTPStatus.OK else None


def failure(node: str, state: Mapping[str, Any]) -> BakehouseError | None:
    """Return the error for a server that failed, in Nova's own words; None where it did not."""
    if state["status"] != "ERROR":
        return None
    fault = state.get("fault") or {}
    said = str(fault.get("message") or "it does not say why").strip()
    details = str(fault.get("details") or "").strip()
    return BakehouseError(
        f"Nova could not start {node} ({state['id']}): {said}",
        hint=_fault_hint(f"{said}\n{details}"),
        log=details[-2000:],
    )


QUOTA = "`invoke down` for what is not needed, or ask for a larger quota"

_FAULTS: tuple[tuple[str, str], ...] = (
    (
        "no valid host",
        "no host fits or has room for it: another --flavor or --zone, a softer --server-group, or ask the operator",
    ),
    ("quota", QUOTA),
    (
        "binding failed|failed to bind|virtual interface creation|portbinding|vif",
        "Neutron could not connect the port on that host: is --vnic-type right, and does its network reach the host?",
    ),
    (
        "too large|too small|smaller than|no space left|disk is too|larger than",
        "the image does not fit: a --flavor with a larger disk, or --volume-size GIB to boot from a volume",
    ),
    ("volume|block device", "the volume could not be attached: `openstack volume show` on it, or boot without one"),
    ("image", "the host could not fetch the image: `invoke images.verify TAG --cloud C` says whether it is whole"),
    ("exceeded maximum number of retries", "every host that was tried failed: the cloud's operator has logs"),
)
"""What Nova's faults mean, the more special first."""


def _fault_hint(said: str) -> str:
    for pattern, hint in _FAULTS:
        if re.search(pattern, said.lower()):
            return hint
    return "the cloud's operator has logs of that server's id"


def _monotonic(cloud: Cloud, launched: str | None, requested: float) -> float:
    """Return a time that Nova told as seconds of this host's monotonic clock; not before we asked for it."""
    now = time.monotonic()
    if not launched:
        return now
    said = datetime.datetime.fromisoformat(launched).replace(tzinfo=datetime.UTC)
    return min(max(now - (cloud.clock - said).total_seconds(), requested), now)
