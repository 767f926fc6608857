"""RDMA devices of nodes: their settings are checked before a node boots, and their reports are read."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bakehouse import REPOSITORY
from bakehouse.errors import BakehouseError

TOOL = REPOSITORY / "bootstrap" / "roce" / "bakehouse_roce.py"
"""What runs on a node; what it would refuse there is refused here, by the same code."""

NOT_FOUND, CONFIG_WRONG, SSH_FAILED = 127, 2, 255
"""Exit statuses of a shell, of the tool, and of ssh."""


AS_ROOT = '[ "$(id -u)" = 0 ] && root= || root="sudo -n"; exec $root'
"""Put before a command for a shell of any user."""


@dataclass(frozen=True)
class Knob:
    """One setting of an RDMA device, or of the machine that it is in."""

    name: str
    where: str
    """An interface, a port, or the machine."""
    wanted: str
    actual: str
    state: str
    """Now: already right, not supported, or failed."""
    at_apply: str
    """When it was last set: applied too; empty where it never was."""
    word: str
    """What the kernel or a tool said."""
    hint: str


@dataclass(frozen=True)
class Device:
    """An RDMA device of a node."""

    name: str
    driver: str
    left_alone: str
    """Why nothing of it is set; empty where something is."""
    interfaces: tuple[str, ...]
    knobs: tuple[Knob, ...]

    @property
    def failed(self) -> tuple[Knob, ...]:
        """What is not as wanted."""
        return tuple(knob for knob in self.knobs if knob.state == "failed")


@dataclass(frozen=True)
class Report:
    """What a node says of its RDMA devices."""

    devices: tuple[Device, ...]
    text: str
    """The JSON text, as the node wrote it."""


@functools.cache
def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bakehouse_roce", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(text: str) -> None:
    """Check settings for RDMA devices by the rules that hold on a node; an empty text is none.

    Raises:
        BakehouseError: something is wrong with them; all of it is named.
    """
    if not text:
        return
    faults = list(_tool().parse(text)[1])
    odd = [f"line {number} holds a control character" for number, line in enumerate(text.split("\n"), 1)
           if not line.replace("\t", " ").isprintable()]  # fmt: skip
    if faults or odd:
        lines = "\n".join(f"roce.yaml: {fault}" for fault in (faults or odd))
        raise BakehouseError(lines, hint="docs/roce.md has all settings and what they may be")


def report(host: str = "", timeout: float = 120, *, ssh_config: str = "") -> Report:
    """Have a node compare its RDMA devices with what is wanted.

    Args:
        host: as ssh takes it, such as ``root@node``; empty: this host. Another user needs sudo without a password.
        timeout: seconds.
        ssh_config: an ssh_config(5) in place of the user's own.

    Raises:
        BakehouseError: the node cannot be reached, has no such tool, or its configuration is wrong.
    """
    if host and not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.@:%-]*", host):
        raise BakehouseError(f"--host {host!r} is no host", hint="such as root@node-1")
    command = ["bakehouse-roce", "report", "--json"]
    if host:
        config = ["-F", ssh_config] if ssh_config else []
        command = ["ssh", *config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host, AS_ROOT, *command]
    where = host or "this host"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BakehouseError(f"there is no {command[0]} on this host", hint=_missing(host)) from error
    except subprocess.TimeoutExpired as error:
        raise BakehouseError(f"{where} did not answer within {timeout:.0f} s") from error
    said = done.stderr.strip()[-2000:]
    if done.returncode == SSH_FAILED and host:
        raise BakehouseError(f"{host} cannot be reached by ssh", hint="log in once by hand", log=said)
    if done.returncode == NOT_FOUND:
        raise BakehouseError(f"there is no bakehouse-roce on {where}", hint=_missing(host), log=said)
    if done.returncode == CONFIG_WRONG:
        raise BakehouseError(
            f"the configuration of {where} is wrong", hint="correct /etc/bakehouse/roce.yaml", log=said
        )
    return read(done.stdout, said)


def _missing(host: str) -> str:
    return "the element roce installs it in an image" if host else "invoke roce.report --host root@NODE asks a node"


def read(text: str, said: str = "") -> Report:
    """Read what ``bakehouse-roce report --json`` prints.

    Raises:
        BakehouseError: it is not of that form; the error holds what was said beside it.
    """
    try:
        devices = tuple(_device(each) for each in json.loads(text)["devices"])
    except (ValueError, KeyError, TypeError) as error:
        raise BakehouseError("the node's report is not of the known form", log=said or text[-2000:]) from error
    return Report(devices, text)


def _device(data: dict[str, Any]) -> Device:
    return Device(
        name=data["device"],
        driver=data["driver"],
        left_alone=data["left_alone"],
        interfaces=tuple(port["netdev"] for port in data["ports"] if port["netdev"]),
        knobs=tuple(
            Knob(
                each["knob"], each["where"], each["wanted"], each["actual"], each["state"], each["at_apply"],
                each["word"], each["hint"],
            )
            for each in data["knobs"]
        ),
    )  # fmt: skip
