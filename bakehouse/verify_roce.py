"""What a RoCE image is tried for: two nodes with the kernel's soft RoCE, and data between them by RDMA."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import tenacity

from bakehouse import userdata, waiting
from bakehouse.errors import BakehouseError
from bakehouse.machine import Machine
from bakehouse.network import Network

MTU = 9000
"""Bytes; carries RDMA's largest packet."""

PACKET = 4096
"""Bytes of data in it."""

DEVICE = "rxe0"
PEER = "node-2"
ROCE_PORT = 4791
"""UDP port of RoCE v2 (InfiniBand Architecture Specification, annex A17)."""

BOOT_SECONDS = 900
COMMAND_SECONDS = 300
CAPTURE_SECONDS = 30

ATTEMPTS = 4
"""Times that a program is tried between the nodes."""

SERVER = "$HOME/server"
"""In the second node: what a server says; with .pid, the number of its process."""

SOFT_ROCE = f"""\
modprobe rdma_rxe
[ -e /sys/class/infiniband/{DEVICE} ] ||
    rdma link add {DEVICE} type rxe netdev "$(basename "$(ls -d /sys/class/net/e* | head -n 1)")"
"""
"""Makes a device of the kernel's soft RoCE, as one that is plugged in (rdma-link(8))."""

CAPTURE = r"""
import collections, select, socket, struct, sys
device, port = sys.argv[1], int(sys.argv[2])
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind((device, 0))
print("ready", flush=True)
seen = collections.Counter()
while True:
    ready, _, _ = select.select([wire, sys.stdin], [], [])
    if wire not in ready:
        break
    packet = wire.recv(65536)
    # Ethernet, IPv4 without options, UDP (RFC 791, RFC 768), and the base transport header of InfiniBand.
    if packet[12:14] == b"\x08\x00" and packet[23] == 17 and struct.unpack(">H", packet[36:38])[0] == port:
        queue_pair = int.from_bytes(packet[47:50], "big")
        seen[socket.inet_ntoa(packet[26:30]), packet[15], queue_pair <= 1] += 1
print([[*kind, number] for kind, number in seen.items()])
"""
"""Counts packets to a UDP port by what Packets says, until its input ends."""


class Packets(NamedTuple):
    """RoCE v2 packets of one kind that passed a port.

    Args:
        source: address they came from.
        tos: their type of service.
        management: whether they went to a management queue pair (0 or 1), as the connection manager's do: the kernel
            answers some of those with type of service 0, whatever is set (ib_init_ah_attr_from_wc() takes it from a
            header that RoCE v2 over IPv4 leaves empty). Data goes to others.
        number: how many.
    """

    source: str
    tos: int
    management: bool
    number: int


def with_soft_roce(joining: str) -> str:
    """Return user-data that gives a virtual machine an RDMA device at each boot.

    Args:
        joining: the cloud-config that makes a node join.
    """
    return userdata.with_part({"bootcmd": [["sh", "-ec", SOFT_ROCE]]}, joining)


@contextmanager
def captured(network: Network, device: str) -> Iterator[list[Packets]]:
    """Count the RoCE v2 packets that pass a port while the block runs.

    Args:
        network: where.
        device: the port's device (Port.device).

    Yields:
        A list that is filled at the block's end.
    """
    found: list[Packets] = []
    command = [*network.only_network, sys.executable, "-c", CAPTURE, device, str(ROCE_PORT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield found
        finally:
            said, _ = process.communicate(timeout=CAPTURE_SECONDS)
    found.extend(Packets(*kind) for kind in ast.literal_eval(said or "[]"))


class _ClientError(BakehouseError):
    """A client did not do what it was asked."""


class RoceTrial:
    """Two nodes of an image on one private network.

    Args:
        network: where they are.
        boot: boots a node of a name with user-data.
    """

    FIRST = ("a second node is switched on", "second node")

    def __init__(self, network: Network, boot: Callable[[str, str], AbstractContextManager[Machine]]) -> None:
        self.network = network
        self._boot = boot
        self._stack = ExitStack()
        self._peer: Machine | None = None
        self._failed: list[str] = []

    def __enter__(self) -> RoceTrial:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Switch the second node off."""
        self._stack.close()

    def start(self) -> None:
        """Switch the second node on."""
        self._peer = self._stack.enter_context(self._boot(PEER, self.user_data(PEER)))

    @property
    def peer(self) -> Machine:
        """The second node."""
        assert self._peer is not None
        return self._peer

    def user_data(self, node: str) -> str:
        """Return what makes a node set its RDMA device up."""
        return with_soft_roce(userdata.render(userdata.RoceJoin(node=node)))

    def work(self, node: Machine) -> list[tuple[str, str, Callable[[], None]]]:
        """Return what is tried."""
        return [
            ("both nodes say that RoCE v2 is set up", "report", lambda: self._reports(node)),
            ("they reach each other by RDMA", "rping", lambda: self.work_again(node)),
            ("RDMA writes arrive, marked as wanted on the wire", "ib_write_bw", lambda: self._write(node)),
            ("RDMA sends arrive", "ib_send_bw", lambda: self._bandwidth(node, "ib_send_bw")),
        ]

    def work_again(self, node: Machine) -> None:
        """Let the nodes ping each other by RDMA (rping(1))."""
        serve = "timeout 120 rping -s -a 0.0.0.0 -C 3"
        self._pair(node, serve, f"rping -c -a {self.peer.login.host} -C 3 -v", port=7174)

    def _reports(self, node: Machine) -> None:
        for each in (node, self.peer):
            _must_be_set_up(each)

    def _write(self, node: Machine) -> None:
        assert node.port is not None
        with captured(self.network, node.port.device) as seen:
            self._bandwidth(node, "ib_write_bw -R")
        (tos,) = {int(knob["actual"]) for knob in report(node) if knob["knob"] == "roce_tos"}
        for host in (node.login.host, self.peer.login.host):
            marks = {packets.tos for packets in seen if packets.source == host and not packets.management}
            if marks != {tos}:
                raise BakehouseError(
                    f"data packets of {host} carry the type of service {sorted(marks)}, not {tos}",
                    log="\n".join(str(packets) for packets in seen),
                )

    def _bandwidth(self, node: Machine, program: str) -> None:
        """Run a program of perftest between the nodes: few messages, since they may be emulated, of one packet each.

        Where a node was kept from running, it sends again. In the middle of a longer message soft RoCE sends the rest
        as if it were a message's first packet (req_retry() in drivers/infiniband/sw/rxe/rxe_req.c), which the other
        node refuses: status 9, remote invalid request.
        """
        options = f"{program} -d {DEVICE} -s {PACKET} -n 20 -m {PACKET}"
        said = self._pair(node, f"timeout 120 {options}", f"{options} {self.peer.login.host}", port=18515)
        if f"{PACKET} " not in said:
            raise BakehouseError(f"{program} says nothing of its messages", log=said)

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(_ClientError), stop=tenacity.stop_after_attempt(ATTEMPTS), reraise=True
    )
    def _pair(self, node: Machine, serve: str, ask: str, *, port: int) -> str:
        """Run a server on the second node and a client on the first. Return what the client said.

        Both begin again where the client fails: on a busy host an emulated node answers too late now and then, and the
        connection manager of the other has given the connection up.
        """
        self.peer.ssh(f"nohup {serve} > {SERVER} 2>&1 < /dev/null & echo $! > {SERVER}.pid")
        listening = f"{{ ss --listening --numeric --tcp; rdma resource show cm_id; }} | grep -q 'LISTEN.*:{port} '"
        waiting.until(
            "server on the second node", lambda: self.peer.ssh(listening).returncode == 0, COMMAND_SECONDS, poll=1.0,
            last_words=lambda: self.peer.ssh(f"cat {SERVER}").stdout,
        )  # fmt: skip
        try:
            done = node.ssh(ask, timeout=COMMAND_SECONDS)
            if done.returncode != 0:
                self.peer.ssh(f"kill $(cat {SERVER}.pid)")
                said = done.stdout + done.stderr + self.peer.ssh(f"cat {SERVER}").stdout
                self._failed.append(said)
                raise _ClientError(f"{ask.partition(' ')[0]} ended with status {done.returncode}", log=said)
        finally:
            # The next one shall not find this one's port.
            running = f"kill -0 $(cat {SERVER}.pid)"
            waiting.until(
                "end of the server on the second node", lambda: self.peer.ssh(running).returncode == 1,
                COMMAND_SECONDS, poll=1.0,
            )  # fmt: skip
        return done.stdout

    def logs(self) -> dict[str, str]:
        """Return what the second node said, and what was tried in vain."""
        found = {"node-2.log": self.peer.output()} if self._peer else {}
        return found | ({"rdma.log": "\n".join(self._failed)} if self._failed else {})


def _must_be_set_up(node: Machine) -> None:
    knobs: dict[str, dict[str, str]] = {}

    def says_it() -> bool:
        knobs.update({knob["knob"]: knob for knob in report(node)})
        return bool(knobs)

    node.wait_for_ssh(BOOT_SECONDS)
    waiting.until(
        f"RDMA device of {node.login.host}", says_it, COMMAND_SECONDS, poll=2.0,
        last_words=lambda: node.ssh("rdma link; bakehouse-agent status").stdout,
    )  # fmt: skip
    wrong = [f"{knob['knob']}: {knob['word']}" for knob in knobs.values() if knob["state"] == "failed"]
    wrong += [
        f"{name} is '{knobs[name]['actual']}', not '{wanted}'"
        for name, wanted in (("roce_mode", "RoCE v2"), ("mtu", str(MTU)), ("path_mtu", str(PACKET)))
        if knobs[name]["actual"] != wanted
    ]
    if wrong:
        raise BakehouseError(f"RoCE is not set up on {node.login.host}: {'; '.join(wrong)}")


def report(node: Machine) -> list[dict[str, str]]:
    """Return what is set of the soft RoCE device, knob by knob; nothing where it is not there yet."""
    said = node.ssh("sudo bakehouse-roce report --json", timeout=COMMAND_SECONDS).stdout
    try:
        devices = json.loads(said)["devices"]
    except (ValueError, KeyError, TypeError):
        return []
    return [knob for device in devices if device["device"] == DEVICE for knob in device["knobs"]]
