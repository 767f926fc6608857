"""What is read off the wire of two RoCE nodes, with packets that are made here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bakehouse import network
from bakehouse.run import Log
from bakehouse.verify_roce import ROCE_PORT, Packets, captured

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
