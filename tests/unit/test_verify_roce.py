"""What is read off the wire of two RoCE nodes, with packets that are made here, and programs that fail between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from bakehouse import network
from bakehouse.errors import BakehouseError
from bakehouse.machine import Machine
from bakehouse.network import Network
from bakehouse.run import Log
from bakehouse.verify_roce import ATTEMPTS, ROCE_PORT, Packets, RoceTrial, captured

SEND = """
import socket, sys
for tos, queue_pair, port, number in {sent}:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        for _ in range(number):
            out.sendto(bytes(5) + queue_pair.to_bytes(3, "big") + bytes(8), ("127.0.0.1", port))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_packets_are_told_apart_by_mark_and_queue_pair(tmp_path: Path) -> None:
    sent = [(106, 17, ROCE_PORT, 3), (0, 17, ROCE_PORT, 2), (0, 1, ROCE_PORT, 1), (106, 17, ROCE_PORT + 1, 5)]
    with Log(tmp_path / "network.log") as log, network.up(log) as place:
        subprocess.run([*place.only_network, "ip", "link", "set", "lo", "up"], check=True)
        with captured(place, "lo") as seen:
            subprocess.run([*place.only_network, sys.executable, "-c", SEND.format(sent=sent)], check=True)
    # What leaves through the loopback comes in by it too: each is seen twice.
    assert sorted(seen) == [
        Packets("127.0.0.1", 0, False, 4),
        Packets("127.0.0.1", 0, True, 2),
        Packets("127.0.0.1", 106, False, 6),
    ]


class Node:
    """A machine whose clients do as they are told, and whose servers listen and end when they are asked."""

    login = SimpleNamespace(host="10.0.0.2")

    def __init__(self, *clients: int) -> None:
        self.clients = list(clients)
        self.asked: list[str] = []

    def ssh(self, command: str, timeout: float = 0) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        status = self.clients.pop(0) if command.startswith("ib_") else 1 if command.startswith("kill -0") else 0
        said = " 4096       20  1.0" if status == 0 else "RDMA_CM_EVENT_REJECTED"
        return subprocess.CompletedProcess(command, status, said, "")


def trial_with(peer: Node) -> RoceTrial:
    made = RoceTrial(cast(Network, None), lambda *_: contextlib.nullcontext(cast(Machine, peer)))
    made.start()
    return made


def test_a_client_that_is_refused_is_tried_again_and_both_begin_anew() -> None:
    node, peer = Node(255, 9, 0), Node()
    trial = trial_with(peer)
    trial._bandwidth(cast(Machine, node), "ib_send_bw")
    assert len(node.asked) == 3
    assert sum(command.startswith("nohup") for command in peer.asked) == 3
    assert sum(command.startswith("kill $(") for command in peer.asked) == 2
    assert len(trial._failed) == 2


def test_a_client_that_fails_again_and_again_is_an_error_with_what_it_said() -> None:
    node = Node(*[9] * ATTEMPTS)
    with pytest.raises(BakehouseError, match="ib_send_bw ended with status 9") as caught:
        trial_with(Node())._bandwidth(cast(Machine, node), "ib_send_bw")
    assert "RDMA_CM_EVENT_REJECTED" in caught.value.log
    assert node.clients == []
