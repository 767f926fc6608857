"""The join agent: makes a booted machine a member of its cluster, and keeps it one.

It reads ``/etc/bakehouse/join.yaml`` and works level by level: name, key, network, controller, services, registration.
Each pass looks at what is there and does only what is missing, so a second run, a reboot, a kill at any point or a
changed address are all the same case. What a pass waits for stands in ``/run/bakehouse/status.json``.

One file, the standard library and PyYAML. Imports are what a small agent spends its time on (under emulation 25 times
as much), so modules that a plain join does not need are imported where they are used.

docs/join-agent.md has the configuration, the states and what to do in each trouble.
"""

# pathlib and contextlib cost more to import than all that they would do here:
# ruff: noqa: PTH101, PTH102, PTH103, PTH108, PTH110, PTH112, PTH114, PTH113, PTH116, PTH118, PTH120, PTH123
# ruff: noqa: PTH104, PTH208, SIM105, T201

from __future__ import annotations

import binascii
import errno
import fcntl
import itertools
import json
import os
import re
import select
import signal
import socket
import sys
import time
from time import monotonic  # seconds since the kernel started, the base of systemd's monotonic timestamps too

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# Tests move every path below another folder; programs then come from the caller's PATH.
ROOT = os.environ.get("BAKEHOUSE_ROOT", "")
CONFIG = ROOT + "/etc/bakehouse/join.yaml"
RUN = ROOT + "/run/bakehouse"
STATUS = RUN + "/status.json"
STATE = ROOT + "/var/lib/bakehouse"
LEFT = STATE + "/left"
SECRET_SOURCE = STATE + "/secret.json"
KEY_FILES = {"munge": ROOT + "/etc/munge/munge.key", "slurm": ROOT + "/etc/slurm/slurm.key"}
INSTANCE_DATA = ROOT + "/run/cloud-init/instance-data.json"
CLOUD_INIT_RUNS = ROOT + "/run/cloud-init/enabled"  # made by its generator, before all units
CLOUD_COPIES = (ROOT + "/var/lib/cloud", ROOT + "/run/cloud-init")
CLOUD_LOGS = (ROOT + "/var/log/cloud-init.log", ROOT + "/var/log/cloud-init-output.log")
SLURM_CONF = ROOT + "/run/slurm/conf/slurm.conf"  # what slurmd got from the controller
MUNGE_LOG = ROOT + "/var/log/munge/munged.log"
CONTAINERS = ROOT + "/etc/bakehouse/containers.env"  # where the platform's programs come as containers
SYNCHRONISED = ROOT + "/run/systemd/timesync/synchronized"  # made by systemd-timesyncd

DONE, NOT_YET, INVALID, REFUSED, NEVER_RAN = 0, 1, 2, 3, 4  # exit statuses
FOREVER = float("inf")

# Seconds.
CLOUD_INIT_LIMIT = 120.0  # since the kernel started; after that the host name has to do
SETTLING = 3.0  # for which a host name must stay the same
MUNGE_LIMIT = 20.0  # for munge's start: a container takes some seconds under emulation
QUIET = 3.0  # after slurmd's start within which nothing is wrong yet
FRESH = 60.0  # seconds after its start in which slurmd may still be about to register
BEING_WRITTEN = 2.0  # within which a configuration that is wrong may become right
WATCH = 120.0  # between two looks at a joined node
LONGEST_WAIT = 15.0  # between two looks at one that has not joined
QUICK = 8  # looks at a quick pace before backing off: most of what a booting node waits for is there within seconds

OUR_REASON = "bakehouse-agent: "
JOIN_AGAIN = "bakehouse-agent join makes it join again"


class Wait(Exception):  # noqa: N818 (not an error: what a pass waits for)
    """Something is not there yet, or does not work yet: say what, and look again later.

    Every function that looks at a level raises it where the level is not reached.
    """

    pace = 0.0  # seconds to the next look, where backing off would only lose time

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what, self.hint = plain(what), plain(hint)


class Soon(Wait):
    """It is on its way, and looking costs nothing."""

    pace = 0.1


class NoAnswer(Wait):
    """The controller answered before and does not now: it may be the network."""


class Hopeless(Exception):  # noqa: N818
    """Waiting does not help: somebody has to change the configuration."""

    def __init__(self, faults: list[str], hint: str, status: int) -> None:
        super().__init__("; ".join(faults))
        self.faults, self.hint, self.status = [plain(fault) for fault in faults], plain(hint), status


def plain(text: str, limit: int = 300) -> str:
    """Return text that is safe on a console and in a log: one line, printable ASCII, no longer than ``limit``."""
    return " ".join("".join(c if " " <= c <= "~" else " " for c in text).split())[:limit]


# --- Files and programs ----------------------------------------------------------------------------------------------


def write(path: str, data: bytes, mode: int = 0o600, owner: str = "") -> None:
    """Replace a file as a whole: readers see the old or the new one, also after a crash."""
    temporary = path + ".new"  # one name: the next agent writes over what a killed one left there
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # the folder may belong to another user
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            if owner:
                own(file.fileno(), owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = path
        remove(temporary)
        raise
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def own(place: int | str, name: str) -> None:
    """Give a file to a system user."""
    if ROOT:
        return
    import pwd

    try:
        user = pwd.getpwnam(name)
    except KeyError:
        if os.path.exists(CONTAINERS):
            return  # users come with the containers: see must_have_containers()
        raise Wait(f"there is no user {name} on this node", f"is {name} installed?") from None
    os.chown(place, user.pw_uid, user.pw_gid)


def read(path: str, limit: int = 1 << 20) -> bytes:
    """Return what a file holds, at most ``limit`` bytes; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def remove(path: str) -> None:
    """Remove a file if it is there."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass


def signature(path: str) -> str:
    """Return what changes whenever a file is replaced or written; nothing where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def folder(path: str) -> None:
    """Make a folder that everybody may look into; the umask would keep them out."""
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o755)  # noqa: S103 (the status is for everybody)


def note(name: str, text: str) -> None:
    """Note something until the next boot, for an agent that is started again."""
    folder(RUN)
    write(f"{RUN}/{name}", text.encode())


def noted(name: str) -> str:
    """Return what was noted in this boot."""
    return read(f"{RUN}/{name}").decode()


def run(*command: str, timeout: float = 15.0, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a program and return its exit status and all it said; 127 if it is not there, 124 if it took too long.

    subprocess would do, but importing it takes longer than a whole systemctl.
    """
    variables = {**os.environ, "LC_ALL": "C", **(environment or {})}
    deadline = monotonic() + timeout
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe:
        outputs = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)]
        how: dict[str, Any] = {"file_actions": outputs, "setpgroup": 0, "setsigdef": [signal.SIGPIPE]}
        try:
            process = os.posix_spawnp(command[0], command, variables, **how)
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}"
        finally:
            os.close(writer)
        said = b""
        while select.select([pipe], [], [], max(0.0, deadline - monotonic()))[0]:
            part = pipe.read(65536)
            if not part:
                return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.decode(errors="replace")
            said += part
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 124, said.decode(errors="replace") + f"\n{command[0]} did not answer within {timeout:.0f} s"


# --- Configuration ---------------------------------------------------------------------------------------------------

LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1123
GRES = r"[A-Za-z0-9_]+(?::[A-Za-z0-9_.-]+){0,3}"
PEM = r"(?:[ -~]*\n)?(?:-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/=]{1,80}\n)+-----END CERTIFICATE-----\s*)+"
TOKEN = r"bhj_[A-Za-z0-9_-]{20,128}"  # noqa: S105 (the form of a token, not a token)
BOOTSTRAP_TOKEN = r"[a-z0-9]{6}\.[a-z0-9]{16}"  # noqa: S105 (the form of a token, not a token)
API_PORT = 6443
KEY_SIZES = range(32, 1024 + 1)  # bytes: munge's MUNGE_MINIMUM_KEY_LEN and MUNGE_MAXIMUM_KEY_LEN
CONFIG_LIMIT = 64 * 1024  # bytes
DEEPEST = 8  # levels; the schema has four


def endpoint(text: str, port: int = 6817) -> tuple[str, int] | None:
    """Return host and port of host, host:port, IPv6 in brackets, or [IPv6]:port; None if it is none of them."""
    found = re.fullmatch(rf"(?:\[([0-9A-Fa-f:.]+)\]|((?:{LABEL}\.)*{LABEL}))(?::([0-9]{{1,5}}))?", text)
    if not found:
        return None
    host, port = found[1] or found[2], int(found[3] or port)
    try:
        if found[1]:
            socket.inet_pton(socket.AF_INET6, host)
        elif host.rpartition(".")[2].isdigit():  # a name cannot end in a number: RFC 1123, 2.1
            socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return None
    return (host, port) if 0 < port < 1 << 16 else None


def broker_address(url: str) -> tuple[str, int] | None:
    """Return host and port of https://HOST:PORT."""
    host_and_port = url.removeprefix("https://").removesuffix("/")
    return endpoint(host_and_port, 8444) if url.startswith("https://") else None


def encoded(key: bytes) -> str:
    """Return a key as user-data holds it."""
    return binascii.b2a_base64(key, newline=False).decode()


def decoded(text: str) -> bytes:
    """Return the key that canonical base64 on one line holds; nothing if it is not that."""
    try:
        key = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return b""
    return key if encoded(key) == text and len(key) in KEY_SIZES else b""


# What join.yaml may hold. A text: its form or a function that knows it, and its name. A list: its entries and how many.
COUNT, COUNT_OR_0 = ("[1-9][0-9]{0,9}", "a whole number from 1"), ("0|[1-9][0-9]{0,9}", "a whole number from 0")
COUNTS = "CPUs Boards Sockets SocketsPerBoard CoresPerSocket ThreadsPerCore RealMemory".split()
PREFIXED = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"  # Kubernetes: Labels and Selectors, Syntax
BROKER = {
    "url": (broker_address, "https://HOST:PORT, without user, password or path"),
    "token": (TOKEN, "a token of invoke join.token (bhj_...)"),
    "ca": (PEM, "the certificate of the CA, in PEM form"),
}
SLURM_SCHEMA: dict[str, Any] = {
    "slurm": {
        "controllers": [(endpoint, "host or host:port (an IPv6 address stands in brackets)"), 8],
        "authentication": ("munge|slurm", "munge or slurm"),
        "features": [("[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,63}", "a feature: letters, digits and _.:/+-"), 64],
        "hardware": {
            **dict.fromkeys(COUNTS, COUNT),
            **dict.fromkeys(["TmpDisk", "Weight"], COUNT_OR_0),
            "Gres": (f"{GRES}(?:,{GRES})*", "a list such as gpu:a100:4,shard:8"),
        },
    },
    "secret": {
        "inline": (decoded, "the key, 32 to 1024 bytes, in base64 on one line (base64 --wrap=0 /etc/munge/munge.key)"),
        "broker": BROKER,
    },
}
KUBERNETES_SCHEMA: dict[str, Any] = {
    "kubernetes": {
        "api_server": (lambda text: endpoint(text, API_PORT), "host or host:port (an IPv6 address stands in brackets)"),
        "ca_hashes": [("sha256:[0-9a-f]{64}", "a hash of a CA's public key: sha256: and 64 digits"), 8],
        "discovery_file": ("/[ -~]{1,255}", "the path of a kubeconfig with the cluster's CA"),
        "labels": [(f"{PREFIXED}={LABEL_VALUE}", "a label: key=value"), 64],
        "taints": [
            (
                f"{PREFIXED}(?:={LABEL_VALUE})?:(?:NoSchedule|PreferNoSchedule|NoExecute)",
                "a taint: key=value:NoSchedule",
            ),
            32,
        ],
        "provider_id": ("[a-z][a-z0-9]*://[!-~]{1,200}|none", "an id such as openstack:///UUID, or none"),
        "cloud_provider": ("external", "external, or nothing"),
    },
    "secret": {"inline": (BOOTSTRAP_TOKEN, "a bootstrap token of kubeadm token create"), "broker": BROKER},
}
ROCE_SCHEMA: dict[str, Any] = {"roce": {"devices": COUNT}}
SCHEMAS = {"slurm": SLURM_SCHEMA, "kubernetes": KUBERNETES_SCHEMA, "roce": ROCE_SCHEMA}
FOR_ALL: dict[str, Any] = {
    "platform": ("|".join(SCHEMAS), f"a platform that this agent knows: {', '.join(SCHEMAS)}"),
    "node": {"name": (rf"{LABEL}(?:\..*)?", "a host name: letters, digits and -, at most 63")},
}
REQUIRED = {
    "platform", "slurm", "slurm.controllers", "kubernetes", "kubernetes.api_server", "secret.broker.url",
    "secret.broker.ca",
}  # fmt: skip


class Config:
    """What join.yaml says, checked: nothing in here can break out of a command line or an environment file."""

    clock_off = 0.0  # seconds that this node's clock is ahead of the broker's, once that has answered

    def __init__(self, document: Any, text: bytes) -> None:
        secret = document.get("secret") or {}
        broker = secret.get("broker") or {}
        self.text, self.platform = text, document["platform"]
        self.name = ((document.get("node") or {}).get("name") or "").partition(".")[0]
        self.broker = broker_address(broker.get("url") or "")
        self.token, self.ca = broker.get("token") or "", broker.get("ca")
        self.inline, self.bootstrap_token = b"", ""
        self.controllers: list[Any] = []
        if self.platform == "roce":
            self.devices = int((document.get("roce") or {}).get("devices") or 1)
            return
        if self.platform == "kubernetes":
            self.kubernetes: dict[str, Any] = document["kubernetes"]
            self.controllers = [endpoint(self.kubernetes["api_server"], API_PORT)]
            self.bootstrap_token = secret.get("inline") or ""
            return
        slurm = document["slurm"]
        self.controllers = [endpoint(entry) for entry in slurm["controllers"]]
        self.authentication = slurm.get("authentication") or "munge"
        self.features: list[str] = slurm.get("features") or []
        self.hardware = {key: value for key, value in (slurm.get("hardware") or {}).items() if value}
        self.inline = decoded(secret.get("inline") or "")
        self.key_file = KEY_FILES[self.authentication]

    @property
    def holds_secret(self) -> bool:
        """True while the file holds what nobody else may read."""
        return bool(self.inline or self.token or self.bootstrap_token)


def parse(data: bytes) -> tuple[Config | None, list[str]]:
    """Read a configuration. The list says all that is wrong with it."""
    faults: list[str] = []
    document = read_yaml(data, faults)
    if not faults:
        check_mapping(document or {}, schema_of(document), "", faults)
    if not faults and document["platform"] == "kubernetes":
        about = document["kubernetes"]
        if not about.get("ca_hashes") and not about.get("discovery_file"):
            faults.append("kubernetes: needs ca_hashes or discovery_file: else anybody could be the API server")
    return None if faults else Config(document, data), [plain(fault) for fault in faults]


def schema_of(document: Any) -> dict[str, Any]:
    """Return what a configuration for its platform may hold; that of Slurm where the platform is not known."""
    platform = document.get("platform") if isinstance(document, dict) else None
    return {**FOR_ALL, **SCHEMAS.get(platform if isinstance(platform, str) else "", SLURM_SCHEMA)}


def read_yaml(data: bytes, faults: list[str]) -> Any:
    """Return the document as mappings, lists and texts, or None; what is wrong or not taken goes to ``faults``.

    It is read from the parser's events: nothing is built of what is refused, however deep or often repeated.
    """
    if "/usr/lib/python3/dist-packages" not in sys.path:
        sys.path.append("/usr/lib/python3/dist-packages")  # the launcher starts Python without it: that is quicker
    import yaml

    documents = []
    try:
        if len(data) > CONFIG_LIMIT:
            raise ValueError(f"the file has more than {CONFIG_LIMIT // 1024} KiB")
        text = data.decode("utf-8")
        if bad := re.search(r"[^\t\r\n -~\xa0-\U0010ffff]", text):
            line = text.count("\n", 0, bad.start()) + 1
            raise ValueError(f"line {line}: holds a control character")
        events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents.append(value_of(next(events), events, faults))
        if len(documents) != 1:
            raise ValueError("more than one document" if documents else "the file is empty")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not YAML: {getattr(error, 'problem', None) or error}"
        faults.append(f"line {mark.line + 1}: {what}" if mark else what)
    except UnicodeDecodeError as error:
        faults.append(f"byte {error.start}: the file is not UTF-8 text")
    except ValueError as error:
        faults.append(str(error))
    return None if faults else documents[0]


def value_of(first: Any, events: Iterator[Any], faults: list[str], depth: int = 1) -> Any:
    """Return what begins with an event: a text, None, a list or a mapping. ValueError if it is not taken.

    Types are the schema's business, so that ``name: 010`` stays as it is written.
    """
    kind, where = type(first).__name__, f"line {first.start_mark.line + 1}"
    if kind == "AliasEvent" or first.anchor:
        raise ValueError(f"{where}: anchors and aliases are not taken here")
    if first.tag:
        raise ValueError(f"{where}: tags (!...) are not taken here")
    if kind == "ScalarEvent":
        nothing = not first.style and first.value in {"", "~", "null", "Null", "NULL"}
        return None if nothing else first.value
    if depth > DEEPEST:
        raise ValueError(f"{where}: nested deeper than {DEEPEST} levels")
    inner = itertools.takewhile(lambda event: not type(event).__name__.endswith("EndEvent"), events)
    if kind == "SequenceStartEvent":
        return [value_of(event, events, faults, depth + 1) for event in inner]
    mapping: dict[str, Any] = {}
    for event in inner:
        where = f"line {event.start_mark.line + 1}"
        key = value_of(event, events, faults, depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"{where}: a key must be a word")
        if key in mapping:
            faults.append(f"{where}: {key} stands here a second time")
        mapping[key] = value_of(next(events), events, faults, depth + 1)
    return mapping


def check_mapping(value: Any, rules: dict[str, Any], where: str, faults: list[str]) -> None:
    """Compare a mapping with the schema; what is not known is named, with what may have been meant."""
    if not isinstance(value, dict):
        faults.append(f"{where or 'the file'}: must be a mapping with {', '.join(rules)}")
        return
    for key in value:
        if key not in rules:
            import difflib

            near = {name.lower(): name for name in rules}
            meant = difflib.get_close_matches(key.lower(), near, 1)
            what = f"not known; did you mean {near[meant[0]]}?" if meant else "not known"
            faults.append(f"{plain(f'{where}.{key}'.strip('.'), 80)}: {what}")
    for key, rule in rules.items():
        place = f"{where}.{key}".strip(".")
        if value.get(key) not in (None, []):
            check_value(value[key], rule, place, faults)
        elif place in REQUIRED and isinstance(rule, dict):
            check_mapping({}, rule, place, faults)
        elif place in REQUIRED:
            faults.append(f"{place}: is missing")
    if where == "secret" and rules is SLURM_SCHEMA["secret"] and value.get("inline") and value.get("broker"):
        faults.append("secret: takes inline or broker, not both")


def check_value(value: Any, rule: Any, where: str, faults: list[str]) -> None:
    """Compare a value with its rule in the schema. What stands below ``secret`` is never repeated."""
    if isinstance(rule, dict):
        check_mapping(value, rule, where, faults)
    elif isinstance(rule, list):
        if not isinstance(value, list):
            faults.append(f"{where}: must be a list")
        elif len(value) > rule[1]:
            faults.append(f"{where}: holds more than {rule[1]} entries")
        else:
            for index, entry in enumerate(value):
                check_value(entry, rule[0], f"{where}[{index}]", faults)
    else:
        form, what = rule
        if not isinstance(value, str) or not (re.fullmatch(form, value) if isinstance(form, str) else form(value)):
            shown = isinstance(value, str) and not where.startswith("secret")
            faults.append(f"{where}: {f'{plain(repr(value), 60)} is not' if shown else 'must be'} {what}")


def load() -> Config:
    """Return the configuration. Hopeless if something is wrong with it; all of it is named."""
    if not os.path.exists(CONFIG):
        raise Wait(f"there is no {CONFIG}", "cloud-init writes it from user-data; see docs/join-agent.md")
    if os.stat(CONFIG).st_mode & 0o077 and os.geteuid() == 0:
        os.chmod(CONFIG, 0o600)
    config, faults = parse(read(CONFIG, CONFIG_LIMIT + 1))
    if not config:
        again = f"correct {CONFIG}; the agent starts again when the file changes"
        raise Hopeless([f"join.yaml: {fault}" for fault in faults], again, INVALID)
    return config


# --- Status ----------------------------------------------------------------------------------------------------------


class Status:
    """What the agent is at: in the status file, on the console, in the journal, and for systemd."""

    def __init__(self, console: bool = False) -> None:
        self.console = console
        self.data: dict[str, Any] = {
            "state": "starting", "phase": "started", "waiting_for": "", "hint": "", "attempt": 0, "next_try": 0,
            "platform": "", "node": "", "controller": "", "address": "", "faults": [], "warnings": [],
            "since": round(monotonic(), 3), "updated": 0, "timeline": [],
        }  # fmt: skip

    def moment(self, name: str, detail: str = "", again: bool = False) -> None:
        """A level is reached: note when, the first time, and say so; with ``again`` the next times too."""
        first = all(name != known for known, _ in self.data["timeline"])
        now = monotonic()
        if first:
            self.data["timeline"].append([name, round(now, 3)])
            self.data["phase"] = name
        if first or again:
            self.say(name, detail, now)
            self.save()

    def waiting(self, wait: Wait, attempt: int, delay: float) -> None:
        """Say what is waited for; aloud only when it changes."""
        if self.data["waiting_for"] != wait.what:
            self.say("waiting", f"{wait.what} ({wait.hint})" if wait.hint else wait.what)
        self.enter("waiting", wait.what, wait.hint, attempt, round(delay, 1))

    def enter(self, state: str, what: str = "", hint: str = "", attempt: int = 0, next_try: float = 0) -> None:
        """Note the state that the agent is in from now on."""
        if (self.data["state"], self.data["waiting_for"]) != (state, what):
            self.data["since"] = round(monotonic(), 3)
        self.data.update(state=state, waiting_for=what, hint=hint, attempt=attempt, next_try=next_try)
        self.save()

    def warn(self, text: str) -> None:
        """Note what is not as it should be but does not stop the join."""
        text = plain(text)
        if text not in self.data["warnings"]:
            self.data["warnings"].append(text)
            self.say(self.data["phase"], f"warning: {text}")

    def say(self, name: str, detail: str, now: float | None = None) -> None:
        """Write one line to the journal and the console; either may be gone."""
        line = plain(f"bakehouse-agent: {now or monotonic():.3f} {name} {detail}", 600)
        try:
            os.write(1, f"{line}\n".encode())
        except OSError:
            pass
        if self.console:
            try:
                console = os.open(ROOT + "/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                with open(console, "wb", buffering=0) as file:
                    file.write(f"{line}\r\n".encode())
            except OSError:
                pass
        notify("STATUS=" + plain(f"{name} {detail}"))

    def save(self) -> None:
        """Write the status file. It lives in memory, so a full disk does not stop it."""
        self.data["updated"] = round(monotonic(), 3)
        try:
            folder(RUN)
            write(STATUS, json.dumps(self.data).encode(), 0o644)
        except OSError as error:
            print(f"bakehouse-agent: cannot write {STATUS}: {error.strerror}", file=sys.stderr, flush=True)


def notify(text: str) -> None:
    """Tell systemd: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        try:
            connection.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass


# --- Name and secret -------------------------------------------------------------------------------------------------

UNSETTLED_NAMES = {"", "(none)", "localhost", "debian"}
HEADER = b"# The agent has taken the secret out of this file: the key is in its place, a token works only once.\n"


def is_name(name: str) -> bool:
    """True for a host name that says something."""
    return name not in UNSETTLED_NAMES and re.fullmatch(LABEL, name) is not None


def name_of_cloud() -> str:
    """Return the instance's name as the cloud has it, or an empty text."""
    try:
        name = str(json.loads(read(INSTANCE_DATA))["v1"]["local_hostname"]).partition(".")[0]
    except (ValueError, KeyError, TypeError):
        return ""
    return name if is_name(name) else ""


def node_name(config: Config) -> str:
    """Return the name from the configuration, the cloud, or the host name once it has settled."""
    name = config.name or name_of_cloud() or noted("node")
    if name:
        return name
    if os.path.exists(CLOUD_INIT_RUNS) and not os.path.exists(INSTANCE_DATA) and monotonic() < CLOUD_INIT_LIMIT:
        raise Soon("cloud-init to say what this node is called", "or set node.name in join.yaml")
    name = read(ROOT + "/proc/sys/kernel/hostname").decode("ascii", "replace").strip().partition(".")[0]
    seen, _, since = noted("host-name").rpartition(" ")
    if seen != name:
        since = str(monotonic())
        note("host-name", f"{name} {since}")
    if not is_name(name):
        raise Wait(f"the host name is still {name or 'empty'}", "set node.name in join.yaml, or the host name")
    if monotonic() - float(since) < SETTLING:
        raise Soon(f"the host name {name} to settle")
    note("node", name)  # whatever the host name becomes later, this is the name until the next boot
    return name


def place_secret(config: Config, node: str) -> str:
    """Bring the key into its place and take it, or the token, out of join.yaml. Returns what was done.

    Where the secret came from is noted before the key is stored: then a kill cannot lose what is known of it.
    """
    done, aside = "the key is in its place", f"{RUN}/key-{digest(config.token.encode())}" if config.token else ""
    if config.inline:
        note_source({"source": "inline"})
        store_key(config, config.inline)
        done = "stored the key of join.yaml"
    elif config.token and source() != receipt(config.token, read(config.key_file)):
        key = read(aside) or key_of_answer(config, fetch(config, node))
        # The token is spent. The disk may be full, so the key is kept in memory, for root only, until it is stored.
        write(aside, key)
        note_source(receipt(config.token, key))
        store_key(config, key)
        done = "fetched the key from the broker"
    elif not os.path.exists(config.key_file):
        hint = f"add secret.inline or secret.broker with a token to {CONFIG}, or put the key there"
        raise Wait(f"there is no key in {config.key_file}, and join.yaml has none", hint)
    if config.holds_secret:
        forget_secret(config)
        remove(aside)
    return done


def forget_secret(config: Config) -> None:
    """Take key and tokens out of join.yaml: they have done their work."""
    if read(CONFIG) == config.text:  # else a new one has been written, which is read next
        config.text = without_secret(config.text)
        write(CONFIG, config.text)
    remove(claim_path(config.token))
    config.inline, config.token, config.bootstrap_token = b"", "", ""


def store_key(config: Config, key: bytes) -> None:
    """Put the key into its place, unless it is there."""
    path, owner = config.key_file, config.authentication  # the users are called munge and slurm as well
    mode, parent_mode, parent_owner = (0o400, 0o700, "munge") if owner == "munge" else (0o600, 0o755, "root")
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        os.mkdir(parent)
    own(parent, parent_owner)
    os.chmod(parent, parent_mode)
    if read(path) != key:
        write(path, key, mode, owner)
    own(path, owner)
    os.chmod(path, mode)


def claim_path(token: str) -> str:
    """Return where the claim on a token is kept."""
    return f"{RUN}/claim-{digest(token.encode())}"


def claim_on(token: str) -> str:
    """Return a secret that goes with a token: an agent that was killed before it had the answer asks again with it."""
    if not read(claim_path(token)):
        write(claim_path(token), os.urandom(32).hex().encode())
    return read(claim_path(token)).decode()


def digest(data: bytes) -> str:
    """Return a SHA-256 in hexadecimal digits."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def receipt(token: str, key: bytes) -> dict[str, str]:
    """Return what is noted of a token that has brought a key."""
    return {"source": "broker", "token": digest(token.encode()), "key": digest(key)}


def source() -> dict[str, str]:
    """Return where the secret came from, as noted."""
    return dict(json.loads(read(SECRET_SOURCE) or b"{}"))


def note_source(known: dict[str, str]) -> None:
    """Note where the secret came from."""
    folder(STATE)
    write(SECRET_SOURCE, json.dumps(known).encode())


def without_secret(data: bytes) -> bytes:
    """Return the configuration without its key or token.

    By line, to keep comments. Where that does not do (flow style, quotes), it is written anew without them.
    """
    document = read_yaml(data, [])
    secret = document.get("secret") or {}
    needles = [secret.pop("inline", None), (secret.get("broker") or {}).pop("token", None)]
    if "secret" in document:
        document["secret"] = secret or None
    kept = re.sub(rb"(?m)^[ \t]+(?:inline|token)[ \t]*:[ \t]*\S[^\n]*(?:\n|\Z)", b"", data)
    kept = HEADER + kept.removeprefix(HEADER)
    left_over = any(needle and needle.encode() in kept for needle in needles)
    if not left_over and read_yaml(kept, []) == document:
        return kept
    return HEADER + json.dumps(document, indent=2).encode() + b"\n"  # JSON is YAML


# --- The broker ------------------------------------------------------------------------------------------------------


def fetch(config: Config, node: str) -> dict[str, Any]:
    """Have the broker's answer to the one-time token, over HTTPS. Only the CA in join.yaml counts, no proxy is used."""
    import http.client
    import ssl

    assert config.broker
    where = "the broker at {}:{}".format(*config.broker)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=config.ca)
    except ssl.SSLError:
        raise Hopeless(["join.yaml: secret.broker.ca: holds no certificate that can be read"], "", INVALID) from None
    body = json.dumps({"platform": config.platform, "node": node, "claim": claim_on(config.token)})
    headers = {"Authorization": f"Bearer {config.token}", "Content-Type": "application/json", "Connection": "close"}
    connection = http.client.HTTPSConnection(*config.broker, timeout=10, context=context)
    try:
        connection.request("POST", "/v1/secret", body, headers)
        response = connection.getresponse()
        data = response.read(16 * 1024)
    except ssl.SSLCertVerificationError as error:
        raise certificate_trouble(where, error.verify_message) from None
    except ssl.SSLError as error:
        raise Wait(f"{where} does not speak TLS as it should: {error.reason}", "is this the broker's port?") from None
    except OSError as error:
        raise no_connection(where, error) from None
    except http.client.HTTPException as error:
        raise Wait(f"{where} does not answer in HTTP ({type(error).__name__})", "is this the broker's port?") from None
    finally:
        connection.close()
    config.clock_off = clock_off(response.getheader("Date", ""))
    answer = mapping(data)
    said = plain(str(answer.get("error", "")), 200)
    if response.status == 401:  # noqa: PLR2004
        command = f"invoke join.token --platform {config.platform} --node {node}"
        again = f"make a new token: {command}, and put it into {CONFIG}"
        raise Hopeless([f"{where} says: {said or 'token refused'}"], again, REFUSED)
    if response.status != 200:  # noqa: PLR2004
        raise Wait(f"{where} answers {response.status}: {said or 'no reason'}", "see the broker's journal")
    return {"where": where, **answer}


def clock_off(date: str) -> float:
    """Return the seconds that this node's clock is ahead of a server's, by the Date of its answer; 0 without one."""
    import email.utils

    parsed = email.utils.parsedate_tz(date)
    return time.time() - email.utils.mktime_tz(parsed) if parsed else 0.0


def mapping(data: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one where the data is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def key_of_answer(config: Config, answer: dict[str, Any]) -> bytes:
    """Return the key in the broker's answer, checked."""
    where = answer["where"]
    if answer.get("authentication") != config.authentication:
        kind = plain(str(answer.get("authentication")), 20)
        raise Wait(f"{where} has a key for {kind}, not for {config.authentication}", "compare slurm.authentication")
    key = decoded(str(answer.get("key")))
    if not key:
        raise Wait(f"{where} sends no key that can be one", "see the key_file in broker.yaml")
    return key


def certificate_trouble(where: str, message: str) -> Wait:
    """Say in plain words why a certificate does not hold."""
    is_it_right = f"{clock()}: is it right? timedatectl shows whether it is kept"
    for words, what, hint in (
        ("not yet valid", "is not yet valid, by this node's clock", is_it_right),
        ("expired", "has expired, by this node's clock", is_it_right),
        ("mismatch", "is for another name", "use the name in the certificate in secret.broker.url"),
    ):
        if words in message:
            return Wait(f"the certificate of {where} {what}", hint)
    hint = "compare secret.broker.ca with the CA of the broker; the wrong host may be answering"
    return Wait(f"the certificate of {where} is not from the CA in join.yaml ({message})", hint)


def clock() -> str:
    """Return what this node's clock says, for a comparison."""
    return time.strftime("this node's clock says %Y-%m-%d %H:%M:%S UTC", time.gmtime())


def no_connection(where: str, error: OSError) -> Wait:
    """Say in plain words why there is no connection."""
    if isinstance(error, socket.gaierror):
        who, _, address = where.partition(" at ")
        name = address.rpartition(":")[0]
        return Wait(f"the name {name} of {who} is not found", "is the name server right? resolvectl")
    if isinstance(error, TimeoutError):
        return Wait(f"{where} does not answer", "is a security group or firewall between? is the address right?")
    what, hint = {
        errno.ECONNREFUSED: ("refuses the connection", "does it run, and on this port?"),
        errno.EHOSTUNREACH: ("cannot be reached: no route to it", "ip route; is the host up?"),
        errno.ENETUNREACH: ("cannot be reached: this node has no network to it", "networkctl; ip route"),
        errno.EADDRNOTAVAIL: ("cannot be reached: this node has no address", "networkctl; ip route"),
        errno.ECONNRESET: ("ends the connection", "see its log"),
    }.get(error.errno or 0, (f"cannot be reached: {error.strerror or error}", ""))
    return Wait(f"{where} {what}", hint)


# --- Scrubbing -------------------------------------------------------------------------------------------------------

SCRUB_LIMIT = 16 << 20  # bytes of a file, and of what is compressed in it
BASE64 = rb"[A-Za-z0-9+/](?:[A-Za-z0-9+/]|\r?\n[ \t]*|\\n){47,}={0,2}"  # JSON has \n for the end of a line


def scrub(keys: list[bytes]) -> int:
    """Overwrite the copies of keys and tokens that cloud-init keeps, and return how many files had one."""
    needles = Needles([encoded(key).encode() for key in keys if key], source().get("bootstrap", ""))
    trees = [os.path.join(top, name) for tree in CLOUD_COPIES for top, _, names in os.walk(tree) for name in names]
    found = 0
    for path in [*CLOUD_LOGS, *trees]:
        try:
            found += scrub_file(path, needles)
        except OSError as error:
            print(plain(f"bakehouse-agent: cannot scrub {path}: {error.strerror}"), file=sys.stderr, flush=True)
    return found


class Needles:
    """What to look for: texts, and a bootstrap token of which only the digest is known any more."""

    def __init__(self, texts: list[bytes], bootstrap: str) -> None:
        self.texts, self.bootstrap = texts, bootstrap

    def blot(self, data: bytes) -> bytes:
        """Return data without what is looked for and stands there in clear."""
        for text in self.texts:
            data = data.replace(text, b"x" * len(text))
        if self.bootstrap:
            data = re.sub(BOOTSTRAP_TOKEN.encode(), self.blot_token, data)
        return re.sub(TOKEN.encode(), lambda found: b"bhj_" + b"x" * (len(found[0]) - 4), data)

    def blot_token(self, found: re.Match[bytes]) -> bytes:
        """Return a match without the token, if it is that."""
        return b"xxxxxx." + b"x" * 16 if digest(found[0]) == self.bootstrap else found[0]


def scrub_file(path: str, needles: Needles) -> bool:
    """Overwrite what must not be in one file; True if there was something."""
    if os.path.islink(path) or not os.path.isfile(path):
        return False
    with open(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
        data = file.read(SCRUB_LIMIT)
        clean = blotted(data, needles)
        if clean != data:
            file.seek(0)
            file.write(clean)
            file.flush()
            os.fsync(file.fileno())
    return clean != data


def blotted(data: bytes, needles: Needles, depth: int = 3) -> bytes:
    """Return data without keys and tokens, and without gzip and base64 in which there are some.

    It has the same length, so that cloud-init can still read its pickle and its JSON. User-data may come compressed,
    cloud-init wraps what is not text in base64, MIME parts are base64 in lines, write_files takes base64 too: each in
    the other, up to ``depth`` levels.
    """
    if depth:
        data = blotted_gzip(data, needles, depth - 1)
        data = re.sub(BASE64, lambda found: blotted_base64(found[0], needles, depth - 1), data)
    return needles.blot(data)


def blotted_gzip(data: bytes, needles: Needles, depth: int) -> bytes:
    """Return data without the gzip streams that hold something."""
    import zlib

    for magic in re.finditer(rb"\x1f\x8b\x08", data):
        start, stream = magic.start(), zlib.decompressobj(31)
        try:
            inner = stream.decompress(data[start:], SCRUB_LIMIT)
        except zlib.error:
            continue
        if blotted(inner, needles, depth) != inner:
            end = len(data) - len(stream.unused_data)
            data = data[:start] + bytes(end - start) + data[end:]
    return data


def blotted_base64(data: bytes, needles: Needles, depth: int) -> bytes:
    """Return a run of base64, blotted out if it holds something. Ends of lines stay."""
    text = re.sub(rb"\\n|[^A-Za-z0-9+/]", b"", data)
    for skip in range(4):  # a word before it may have been taken for its begin
        inner = binascii.a2b_base64(text[skip:] + b"AAA"[: -len(text[skip:]) % 4])  # A is padding that always fits
        if blotted(inner, needles, depth) != inner:
            return re.sub(rb"\\n|[A-Za-z0-9+/]", lambda found: found[0] if found[0] == rb"\n" else b"x", data)
    return data


def block_metadata(status: Status) -> None:
    """Keep everybody but root from the metadata service: with an inline secret it still hands the key out.

    4294967295 is no user id (it means "none" in chown(2)), so the range ends before it. systemd-networkd would remove
    the rules; the element tells it not to.
    """
    users = "1-4294967294"
    for family, address in (("-4", "169.254.169.254"), ("-6", "fe80::a9fe:a9fe")):
        rule = ("ip", family, "rule")
        _, known = run(*rule, "show", "priority", "100")
        if all(word in known for word in (address, users, "prohibit")):
            continue
        code, said = run(*rule, "add", "priority", "100", "to", address, "uidrange", users, "prohibit")
        if code and family == "-4":
            status.warn(f"users of this node can read the key from the metadata service: ip rule says {said}")


# --- Slurm -----------------------------------------------------------------------------------------------------------

MUNGE_LIFETIME = 300  # seconds that a credential is good for (munged's default), so that clocks may differ by
CLOCKS = "the clocks of this node and of the controller differ by more than five minutes"
NO_ANSWER = "Slurm's controller does not answer"
TROUBLES = (
    # What scontrol, slurmd or munge says; what it means; the hint.
    ("(rewound|expired) credential", CLOCKS, "clock"),
    ("invalid credential", "the controller's key is not this node's key", "key"),
    ("authentication error|unauthorized credential", "the controller refuses this node's key", "key"),
    ("zero bytes were transmitted", "the controller ends the connection: it may refuse this node's key", "key"),
    ('failed to access "/run/munge', "munge does not run on this node", "munge"),
    ("incompatible versions", "the Slurm versions of this node and the controller do not fit", "version"),
    ("unable to contact slurm controller|connection refused", NO_ANSWER, "controller"),
    ("timed out|did not answer", NO_ANSWER, "controller"),
)


def answer_was_readable() -> bool:
    """Return if munge could read the controller's refusal: then the keys are the same, and the clocks differ.

    Slurm itself says the same in both cases. munge's log has a line only where the refusal, which is written for nobody
    in particular, could be decoded ("Unauthorized credential for client"); the time is checked after that.
    """
    log = read(MUNGE_LOG, 1 << 24)[-4096:].rpartition(b"Created socket")[2]
    return any(word + b" credential" in log for word in (b"Unauthorized", b"Expired", b"Rewound"))


def trouble(said: str, config: Config) -> Wait | None:
    """Return what is wrong, by what Slurm and munge say, and what to do."""
    what, kind = next(((what, kind) for text, what, kind in TROUBLES if re.search(text, said, re.IGNORECASE)), ("", ""))
    if not kind:
        return None
    if kind == "key" and (answer_was_readable() or abs(config.clock_off) > MUNGE_LIFETIME):
        what, kind = CLOCKS, "clock"
    compare = f"compare sha256sum {config.key_file} on both sides"
    if kind == "key" and not os.path.exists(SYNCHRONISED):  # Slurm says the same of both
        what += ": either the key is another one, or this node's clock is off"
        compare += f"; {clock()}, not set by NTP (timedatectl)"
    hints = {
        "clock": f"{clock()}; compare date -u on both sides, and see timedatectl for NTP",
        "key": compare,
        "munge": "journalctl -u munge",
        "version": "slurmd -V here, slurmctld -V there: the controller must not be the older one",
        "controller": "does slurmctld run, and does its port let this node in?",
    }
    return (NoAnswer if kind == "controller" else Wait)(what, hints[kind])


class Shown:
    """A node as the controller shows it (scontrol show node)."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, str] = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", text))
        reason = re.search(r"(?m)^\s*Reason=(.*?)(?: \[(\S+?)@[^\]]*\])?\s*$", text)
        self.reason, self.by = (reason[1], reason[2] or "somebody") if reason else ("", "")
        self.state = self.values.get("State", "UNKNOWN*")
        self.words = {word.rstrip("*~#!%$@^-") for word in self.state.split("+")}
        self.responds = "*" not in self.state and "NOT_RESPONDING" not in self.words
        self.drained = bool(self.words & {"DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING"})
        self.busy = self.values.get("CPUAlloc", "0") != "0" or bool(self.words & {"ALLOCATED", "MIXED", "COMPLETING"})
        self.address = self.values.get("NodeAddr", "")
        started = self.values.get("SlurmdStartTime", "")
        self.started = started if started.isdigit() else ""  # seconds since 1970 by its clock; empty: never registered


class Slurm:
    """A node of a Slurm cluster: dynamic (slurmd -Z) and without configuration files of its own."""

    WORK, BY_HAND = "jobs", "scontrol delete nodename={}"

    def __init__(self, config: Config, node: str) -> None:
        self.config, self.node = config, node
        self.munge = config.authentication == "munge"
        self.controllers = ",".join(written(*address) for address in config.controllers)
        self.restarted = self.munge_restarted = float("-inf")

    def environment_file(self) -> bytes:
        """Return what slurmd's unit reads. Each value reaches slurmd as one word (systemd.service(5), ${...})."""
        wanted = ["Feature=" + ",".join(["bakehouse", *self.config.features])]
        wanted += [f"{key}={value}" for key, value in self.config.hardware.items()]
        return (
            f'BAKEHOUSE_NODE="{self.node}"\nBAKEHOUSE_CONTROLLERS="{self.controllers}"\n'
            f'BAKEHOUSE_CONF="{" ".join(wanted)}"\n'
        ).encode()

    def scontrol(self, *words: str) -> tuple[int, str]:
        """Ask the controller."""
        how = {"SLURM_CONF": SLURM_CONF} if os.path.exists(SLURM_CONF) else {"SLURM_CONF_SERVER": self.controllers}
        return run("scontrol", *words, environment={"SLURM_TIME_FORMAT": "%s", **how})

    def update(self, *changes: str) -> None:
        """Have the controller change what it knows of the node."""
        self.scontrol("update", f"nodename={self.node}", *changes)

    def show(self) -> Shown | None:
        """Return the node as the controller knows it, or None if it does not know it."""
        code, said = self.scontrol("show", "node", self.node)
        if f"NodeName={self.node}" in said:
            return Shown(said)
        if "not found" in said or "Invalid node name" in said:
            return None
        last_line = said.strip().rpartition("\n")[2]
        raise trouble(said, self.config) or Wait(f"scontrol says: {last_line or code}")

    def start_munge(self) -> None:
        """Start munge, once its key is there; again if the key has changed since."""
        key = signature(self.config.key_file)
        unchanged = noted("munge-key") == key
        if not self.munge or (munge_runs() and unchanged):
            return
        if not unchanged or monotonic() - self.munge_restarted > MUNGE_LIMIT:
            self.munge_restarted = monotonic()
            note("munge-key", key)
            run("systemctl", "restart", "--no-block", "munge.service")
        for _ in range(100):
            time.sleep(0.02)
            if munge_runs():
                return
        raise Wait("munge to start", "journalctl -u munge")

    def start(self, address: str) -> None:
        """Start slurmd unless it runs with what is wanted."""
        wanted, state = self.environment_file().decode(), f"{address} {signature(self.config.key_file)}"
        unchanged = noted("slurmd.env") == wanted and noted("slurmd-state") == state
        if unchanged and monotonic() - self.restarted < QUIET:
            return  # asking systemd each time would take the time that slurmd needs
        _, pid = run("systemctl", "show", "--property=MainPID", "--value", "slurmd.service")
        running = pid.strip().isdigit() and int(pid) > 0
        if unchanged and running:
            return
        before = ""
        if self.munge or running:  # Slurm's own authentication answers only beside a running slurmd
            before = self.make_room(address, running)
        note("slurmd.env", wanted)
        self.restart(before, "restart" if running else "start")
        note("slurmd-state", state)

    def restart(self, before: str, verb: str = "restart") -> None:
        """Start slurmd anew. Jobs survive that: their steps are processes of their own (KillMode=process)."""
        note("before", f"{before} {time.time():.0f}")
        # slurmd's start ends only when it has registered: do not wait for that.
        code, said = run("systemctl", verb, "--no-block", "slurmd.service")
        if code:
            raise Wait(f"slurmd cannot be started: {said}", "systemctl status slurmd")
        self.restarted = monotonic()

    def make_room(self, address: str, running: bool) -> str:
        """Remove a node of this name that was here before and is not what we are. Returns its slurmd's start time."""
        shown = self.show()
        if shown is None:
            return ""
        elsewhere = shown.address not in {address, self.node, ""}
        if running and self.is_ours(shown):
            elsewhere = False  # it is this node, which had another address or other features until now
        alive = shown.responds and not shown.words & {"DOWN", "FUTURE", "UNKNOWN"}
        if elsewhere and alive and (shown.busy or answers(shown.address, int(shown.values.get("Port", "6818")))):
            hint = f"give one of them another name, or run bakehouse-agent leave at {shown.address}"
            raise Wait(f"a node named {self.node} is alive at {shown.address}", hint)
        replaceable = "DYNAMIC_NORM" in shown.words and not shown.drained and (elsewhere or not shown.busy)
        if replaceable and (elsewhere or self.differs(shown)):
            self.forget()
        return shown.started

    def differs(self, shown: Shown) -> bool:
        """True if the controller remembers other features or hardware than ours: it would go on doing so."""
        if set(shown.values.get("AvailableFeatures", "").split(",")) != {"bakehouse", *self.config.features}:
            return True
        names = {"CPUs": "CPUTot", "SocketsPerBoard": "Sockets"}
        wanted = {names.get(key, key): value for key, value in self.config.hardware.items() if key != "Gres"}
        return any(shown.values.get(key, value) != value for key, value in wanted.items())

    def forget(self) -> None:
        """Make the controller forget the node."""
        self.update("state=down", f"reason={OUR_REASON}replaced")
        self.scontrol("delete", f"nodename={self.node}")

    def registered(self, joined: bool) -> Shown:
        """Return the node as the controller shows it, once that is this boot's slurmd.

        An old registration looks like a good one for minutes, so the time of slurmd's start is compared.
        """
        running = monotonic() - self.restarted
        if running < 5 and not os.path.exists(SLURM_CONF):  # noqa: PLR2004
            raise Soon("slurmd to register")  # it begins by writing that file: no need to ask yet
        try:
            shown = self.show()
        except Wait as wait:
            # Slurm's own authentication needs a socket that slurmd has just begun to make.
            raise Soon("slurmd to register") if running < QUIET else wait from None
        if shown and self.is_ours(shown):
            return shown
        if running < QUIET:
            raise Soon("slurmd to register")
        if joined and shown is None and running > 60:  # noqa: PLR2004
            self.restart("")  # a controller that lost its state does not ask for us
        _, said = run("journalctl", "--unit=slurmd", "--unit=munge", "--lines=20", "--output=cat", "--since=-2min")
        found = trouble(said, self.config) or Wait("slurmd to register", "journalctl -u slurmd")
        if running < FRESH:
            found.pace = 0.5  # on a slow machine slurmd takes its time
        raise found

    def is_ours(self, shown: Shown) -> bool:
        """True if this is the registration of the slurmd that runs now, not one from before."""
        before, _, since = noted("before").partition(" ")
        if not shown.started:
            return False
        after = int(shown.started) - int(since or 0)  # seconds
        return (shown.started != before or abs(after) <= 1) if before else after >= -2  # noqa: PLR2004

    def drain(self, status: Status, now: bool, deadline: float) -> bool:
        """Drain the node until no job is on it; False if that took too long."""
        reach(self.config.controllers)
        self.update("state=drain", f"reason={OUR_REASON}leaving")
        wait = Wait("jobs on this node to end", "bakehouse-agent leave --now does not wait for them")
        for attempt in itertools.count(1):
            shown = self.show()
            if now or not shown or not shown.busy:
                break
            status.waiting(wait, attempt, 2)
            if monotonic() > deadline:
                return False
            time.sleep(2)
        return True

    def stop(self) -> None:
        """Stop what the node runs for its cluster."""
        for service in ("slurmd.service", "munge.service"):
            run("systemctl", "stop", service, timeout=60)
        remove(RUN + "/munge-key")

    def check_ready(self, shown: Shown) -> None:
        """Return when the controller would give the node jobs."""
        reason, resume = shown.reason, f"scontrol update nodename={self.node} state=resume"
        passed = reason.startswith(OUR_REASON) or "not responding" in reason.lower() or "rebooted" in reason
        if shown.words & {"INVALID_REG", "INVAL"}:
            hint = "correct slurm.hardware in join.yaml, or leave it out to have it detected"
            raise Wait(f"the controller finds this node's hardware wrong: {reason}", hint)
        if (shown.drained or "DOWN" in shown.words) and passed:
            self.update("state=resume")
            raise Wait("the controller to resume this node")
        if shown.drained:
            raise Wait(f"registered, but drained by {shown.by}: {reason or 'no reason given'}", resume)
        if "DOWN" in shown.words:
            raise Wait(f"registered, but down: {reason}", resume)
        if not shown.responds:
            raise Wait("the controller to reach this node", "does port 6818 of this node (slurmd) let it in?")
        if not shown.words & {"IDLE", "MIXED", "ALLOCATED", "COMPLETING"}:
            raise Wait(f"registered, but {shown.state}")


def must_have_containers(config: Config) -> None:
    """Return when the units of the platform's containers are there, on a node that has it in such."""
    if not os.path.exists(CONTAINERS):
        return
    said = noted("containers").strip()
    if said != "ready":
        wait = Wait(said or "bakehouse-containers to start", "journalctl -u bakehouse-containers")
        wait.pace = 1.0
        raise wait
    store_key(config, read(config.key_file))  # its owner may have come with the containers


def munge_runs() -> bool:
    """Return if munged runs and has its socket. Connecting to it would leave a line in its log each time."""
    pid = read(ROOT + "/run/munge/munged.pid").decode().strip()
    runs = read(f"{ROOT}/proc/{pid}/comm").strip() == b"munged"
    return runs and os.path.exists(ROOT + "/run/munge/munge.socket.2")


def written(host: str, port: int) -> str:
    """Return host and port as people write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def answers(host: str, port: int) -> bool:
    """True if something listens there."""
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def reach(controllers: list[tuple[str, int]]) -> tuple[str, str]:
    """Connect to the first controller that answers; return its address and ours."""
    waits = []
    for host, port in controllers:
        try:
            connection = socket.create_connection((host, port), 3)
        except OSError as error:
            waits.append(no_connection(f"the controller at {written(host, port)}", error))
            continue
        with connection:
            return written(*connection.getpeername()[:2]), str(connection.getsockname()[0])
    raise waits[0]


def own_address(controller: str) -> str:
    """Return the address from which this node would talk to the controller, without sending anything."""
    host, _, port = controller.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host.strip("[]"), int(port)))
        except (OSError, ValueError):
            return ""
        return str(probe.getsockname()[0])


# --- Kubernetes ------------------------------------------------------------------------------------------------------

KUBERNETES = ROOT + "/etc/kubernetes"
KUBELET = ROOT + "/var/lib/kubelet"
KUBELET_CONF = KUBERNETES + "/kubelet.conf"
CLUSTER_CA = KUBERNETES + "/pki/ca.crt"
KUBELET_CERTIFICATE = KUBELET + "/pki/kubelet-client-current.pem"  # and its key
CONTAINERD = ROOT + "/run/containerd/containerd.sock"
MEMBERSHIP = STATE + "/kubernetes.json"
KUBERNETES_VERSION = ROOT + "/usr/share/bakehouse/kubernetes-version"
JOIN_FILE = RUN + "/kubeadm-join.json"
FETCHED = RUN + "/bootstrap-token"  # of the broker, until the node has joined
OF_A_JOIN = (
    KUBELET_CONF, KUBERNETES + "/bootstrap-kubelet.conf", CLUSTER_CA, KUBELET + "/config.yaml",
    KUBELET + "/kubeadm-flags.env", KUBELET_CERTIFICATE, MEMBERSHIP,
)  # fmt: skip
KUBEADM_LIMIT = 420.0  # seconds; its own limit for the kubelet's certificate is 300
SKEW = 300  # seconds that clocks may differ by before it is worth a word
NO_API = "the API server does not answer"
PRESSURES = {
    "DiskPressure": (
        "the disk is full",
        "df -h / /var/lib/containerd; the kubelet goes on by itself when there is room",
    ),
    "MemoryPressure": ("memory is short", "free -m; kubectl describe node"),
    "PIDPressure": ("there are too many processes", "ps aux | wc -l; kubectl describe node"),
}


class Kubernetes:
    """A node of a Kubernetes cluster: kubeadm makes it one, the kubelet keeps it one."""

    WORK, BY_HAND = "pods", "kubectl delete node {}"

    def __init__(self, config: Config, node: str) -> None:
        self.config, self.node = config, node
        self.host, self.port = config.controllers[0]
        self.server = written(self.host, self.port)

    def must_have_containerd(self) -> None:
        """Return when containerd takes connections."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(CONTAINERD)
            except FileNotFoundError:
                raise Wait("containerd to start", "systemctl status containerd") from None
            except OSError as error:
                raise Wait(f"containerd does not answer: {error.strerror}", "journalctl -u containerd") from None

    def is_member(self) -> bool:
        """True if this node has joined this cluster, in this boot or an earlier one."""
        known = mapping(read(MEMBERSHIP))
        there = all(os.path.exists(path) for path in (KUBELET_CONF, CLUSTER_CA, KUBELET_CERTIFICATE))
        return there and known.get("api_server") == self.server and known.get("node") == self.node

    # The token.

    def take_token(self) -> str:
        """Have a bootstrap token that the cluster knows. Returns where it is from."""
        where = "the bootstrap token of join.yaml"
        if not self.token and self.config.token:
            self.fetch_token()
        if not self.token:
            hint = f"add secret.inline with a token of kubeadm token create, or secret.broker, to {CONFIG}"
            raise Wait("there is no bootstrap token", hint)
        if read(FETCHED):
            where = "a bootstrap token of the broker"
        if not self.config.kubernetes.get("discovery_file"):
            self.check_token()
        return where

    @property
    def token(self) -> str:
        """The bootstrap token: the broker's is newer than that of join.yaml."""
        return read(FETCHED).decode() or self.config.bootstrap_token

    def fetch_token(self) -> None:
        """Fetch a fresh bootstrap token from the broker."""
        answer = fetch(self.config, self.node)
        token = str(answer.get("token"))
        if not re.fullmatch(BOOTSTRAP_TOKEN, token):
            raise Wait(f"{answer['where']} sends no bootstrap token", "see platforms.kubernetes in broker.yaml")
        folder(RUN)
        write(FETCHED, token.encode())  # in memory, for root only

    def check_token(self) -> None:
        """Return if the cluster knows the token: kubeadm would say so only after a while, and in other words.

        The cluster signs what it tells of itself with each token that is good (Kubernetes: Authenticating with
        Bootstrap Tokens, ConfigMap Signing). Nothing of this answer is trusted: kubeadm checks it all again.
        """
        status, answer = self.ask("GET", "/api/v1/namespaces/kube-public/configmaps/cluster-info", known=False)
        name = self.token.partition(".")[0]
        if status != 200:  # noqa: PLR2004
            raise Wait(f"{self.server} does not show its cluster-info ({status})", "is it a cluster made by kubeadm?")
        if f"jws-kubeconfig-{name}" in (answer.get("data") or {}):
            return
        said = f"the bootstrap token {name} has expired, or the cluster does not know it"
        if self.config.token:
            remove(FETCHED)
            self.config.bootstrap_token = ""
            raise Soon(f"a fresh bootstrap token from the broker: {said}")
        raise Wait(said, f"put a new one of kubeadm token create into secret.inline of {CONFIG}")

    # The join.

    def join(self, address: str) -> None:
        """Have kubeadm make this node a member. What an earlier try left is removed before."""
        self.clean()
        note_source({"source": "inline", "bootstrap": digest(self.token.encode())})
        write(JOIN_FILE, json.dumps(self.join_configuration(address)).encode())
        try:
            code, said = run("kubeadm", "join", "--config", JOIN_FILE, timeout=KUBEADM_LIMIT)
        finally:
            remove(JOIN_FILE)
        if code:
            raise self.why(said)
        write(MEMBERSHIP, json.dumps({"api_server": self.server, "node": self.node}).encode())
        forget_secret(self.config)
        remove(FETCHED)

    def join_configuration(self, address: str) -> dict[str, Any]:
        """Return kubeadm's JoinConfiguration, in the form that its version takes."""
        minor, wanted = self.minor_version(), self.config.kubernetes
        arguments = {"node-ip": address}
        if wanted.get("labels"):
            arguments["node-labels"] = ",".join(wanted["labels"])
        if self.provider_id():
            arguments["provider-id"] = self.provider_id()
        if wanted.get("cloud_provider"):
            arguments["cloud-provider"] = wanted["cloud_provider"]
        with_list = minor >= 31  # noqa: PLR2004 (v1beta4)
        registration = {
            "name": self.node,
            "criSocket": f"unix://{CONTAINERD}" if minor >= 24 else CONTAINERD,  # noqa: PLR2004
            "taints": [taint_of(text) for text in wanted.get("taints") or []],
            "kubeletExtraArgs": (
                [{"name": name, "value": value} for name, value in arguments.items()] if with_list else arguments
            ),
            # Images come with the node; crictl is for people.
            "ignorePreflightErrors": ["FileExisting-crictl"],
        }
        discovery: dict[str, Any] = {"tlsBootstrapToken": self.token}
        if wanted.get("discovery_file"):
            discovery["file"] = {"kubeConfigPath": wanted["discovery_file"]}
        else:
            discovery["bootstrapToken"] = {
                "token": self.token, "apiServerEndpoint": self.server, "caCertHashes": wanted["ca_hashes"],
            }  # fmt: skip
        limits = {"timeouts": {"discovery": "30s"}} if with_list else {}
        if not with_list:
            discovery["timeout"] = "30s"
        versions = {20: "v1beta2", 21: "v1beta2"}
        version = "v1beta4" if with_list else versions.get(minor, "v1beta3")
        return {
            "apiVersion": f"kubeadm.k8s.io/{version}", "kind": "JoinConfiguration", "discovery": discovery,
            "nodeRegistration": registration, **limits,
        }  # fmt: skip

    def minor_version(self) -> int:
        """Return 35 for Kubernetes 1.35. A baked image has noted it: that is quicker than to ask kubeadm."""
        said = read(KUBERNETES_VERSION).decode() or run("kubeadm", "version", "--output", "short")[1]
        found = re.match(r"v1\.(\d+)\.", said)
        if not found:
            raise Wait(f"kubeadm does not say its version: {said}", "is kubeadm installed?")
        return int(found[1])

    def provider_id(self) -> str:
        """Return what ties the node to its server in the cloud, as OpenStack's cloud controller writes it."""
        given = str(self.config.kubernetes.get("provider_id") or "")
        if given:
            return given.removesuffix("none") if given == "none" else given
        about = mapping(read(INSTANCE_DATA, 1 << 22)).get("v1") or {}
        identity = str(about.get("instance_id"))
        is_server = about.get("cloud_name") == "openstack" and re.fullmatch(
            r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", identity
        )
        return f"openstack:///{identity}" if is_server else ""

    def clean(self) -> None:
        """Remove what makes this node a member of a cluster."""
        run("systemctl", "stop", "kubelet.service", timeout=60)
        for path in OF_A_JOIN:
            remove(path)

    def why(self, said: str) -> Exception:
        """Say in plain words why kubeadm could not."""
        errors = re.findall(r"\[ERROR ([^\]]+)\]: (.*)", said)
        if "none of the public keys" in said:
            hashes = f"compare kubernetes.ca_hashes in {CONFIG} with the CA of the cluster (docs/join-agent.md)"
            return Hopeless([f"the CA of {self.server} is not the one of ca_hashes"], hashes, INVALID)
        if "JWS" in said:
            return Wait("the cluster does not sign for this bootstrap token", "kubeadm token list")
        if abs(self.config.clock_off) > SKEW or "not yet valid" in said:
            return Wait(f"{CLOCKS.replace('the controller', 'the API server')}", f"{clock()}; timedatectl")
        if errors:
            return Wait(
                f"kubeadm finds fault with this node: {'; '.join(text for _, text in errors)}",
                "journalctl -u bakehouse-agent",
            )
        if "kubelet" in said and "timed out" in said:
            return Wait("the kubelet to come up", "journalctl -u kubelet")
        last = [line for line in said.splitlines() if line.strip() and not line.startswith("To see the stack trace")]
        print(said, flush=True)  # for the journal; there is no token in it
        return Wait(f"kubeadm join failed: {last[-1] if last else 'it said nothing'}", "journalctl -u bakehouse-agent")

    # The member.

    def start(self) -> None:
        """Start the kubelet where it does not run."""
        code, _ = run("systemctl", "is-active", "--quiet", "kubelet.service")
        if code:
            run("systemctl", "start", "--no-block", "kubelet.service")

    def show(self) -> dict[str, Any]:
        """Return the node as the API server knows it."""
        status, answer = self.ask("GET", f"/api/v1/nodes/{self.node}")
        if status == 404:  # noqa: PLR2004
            raise Soon("the kubelet to register", "journalctl -u kubelet")
        if status != 200:  # noqa: PLR2004
            raise self.refused(status, answer)
        return answer

    def refused(self, status: int, answer: dict[str, Any]) -> Wait:
        """Say that the API server does not do what it is asked."""
        said = answer.get("message") or status
        return Wait(f"the API server refuses this node: {said}", "kubectl get csr; journalctl -u kubelet")

    def check_ready(self, node: dict[str, Any]) -> None:
        """Return when the cluster would give the node pods."""
        conditions = {each["type"]: each for each in (node.get("status") or {}).get("conditions") or []}
        for name, (what, hint) in PRESSURES.items():
            if (conditions.get(name) or {}).get("status") == "True":
                raise Wait(f"registered, but {what} ({name})", hint)
        ready = conditions.get("Ready") or {}
        if ready.get("status") == "True":
            return
        message = ready.get("message") or "the kubelet has not said anything yet"
        if "network" in message and "plugin" in message:
            hint = "the cluster's network add-on has to come to this node: kubectl get pods --all-namespaces"
            raise Wait("registered, but there is no pod network here yet", hint)
        if ready.get("status") == "Unknown":
            raise Wait("registered, but the kubelet does not report", "journalctl -u kubelet")
        wait = Wait(f"registered, but not ready: {message}", "journalctl -u kubelet")
        wait.pace = 0.5 if monotonic() < CLOUD_INIT_LIMIT else 0.0  # it takes a moment, most of the time
        raise wait

    def drain(self, status: Status, now: bool, deadline: float) -> bool:
        """Evict the node's pods and wait until they are gone; False if that took too long."""
        reach(self.config.controllers)
        self.must(*self.ask("PATCH", f"/api/v1/nodes/{self.node}", {"spec": {"unschedulable": True}}))
        wait = Wait("pods on this node to end", "bakehouse-agent leave --now does not wait for them")
        for attempt in itertools.count(1):
            pods = self.pods()
            for pod in pods:
                self.evict(pod)
            if now or not pods:
                return True
            status.waiting(wait, attempt, 2)
            if monotonic() > deadline:
                return False
            time.sleep(2)
        return True

    def pods(self) -> list[dict[str, Any]]:
        """Return the pods here that somebody else would run in our place: none of daemon sets, no static ones."""
        status, answer = self.ask("GET", f"/api/v1/pods?fieldSelector=spec.nodeName%3D{self.node}")
        self.must(status, answer)
        found = [
            each["metadata"]
            for each in answer.get("items") or []
            if (each.get("status") or {}).get("phase") in {"Pending", "Running"}
        ]
        return [
            each for each in found
            if "kubernetes.io/config.mirror" not in (each.get("annotations") or {})
            and all(owner["kind"] != "DaemonSet" for owner in each.get("ownerReferences") or [])
        ]  # fmt: skip

    def evict(self, pod: dict[str, Any]) -> None:
        """Ask for the end of a pod; a disruption budget may say: not yet."""
        path = f"/api/v1/namespaces/{pod['namespace']}/pods/{pod['name']}/eviction"
        about = {"kind": "Eviction", "metadata": {"name": pod["name"], "namespace": pod["namespace"]}}
        for version in ("policy/v1", "policy/v1beta1"):
            status, answer = self.ask("POST", path, {"apiVersion": version, **about})
            if status not in {400, 415}:
                break
        if status not in {404, 409, 429}:
            self.must(status, answer)

    def must(self, status: int, answer: dict[str, Any]) -> None:
        """Raise where the API server did not do what it was asked."""
        if status >= 300:  # noqa: PLR2004
            raise self.refused(status, answer)

    def forget(self) -> None:
        """Make the cluster forget the node: the kubelet ends before, or it would register again."""
        run("systemctl", "stop", "kubelet.service", timeout=60)
        status, answer = self.ask("DELETE", f"/api/v1/nodes/{self.node}")
        if status != 404:  # noqa: PLR2004
            self.must(status, answer)

    def stop(self) -> None:
        """Stop what the node runs for its cluster, and forget the cluster."""
        self.clean()

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, known: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Ask the API server, as this node; with ``known`` false as nobody, and of whoever answers.

        Returns status and answer.
        """
        import http.client
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if known:
            context.load_verify_locations(cafile=CLUSTER_CA)
            context.load_cert_chain(KUBELET_CERTIFICATE)
        else:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=10, context=context)
        try:
            connection.request(
                method, path, json.dumps(body) if body else None, {"Content-Type": kind, "Connection": "close"}
            )
            response = connection.getresponse()
            data = response.read(1 << 24)
        except ssl.SSLCertVerificationError as error:
            raise certificate_trouble(f"the API server at {self.server}", error.verify_message) from None
        except (OSError, http.client.HTTPException) as error:
            wait = (
                no_connection(f"the API server at {self.server}", error) if isinstance(error, OSError) else Wait(NO_API)
            )
            raise NoAnswer(wait.what, wait.hint) from None
        finally:
            connection.close()
        self.config.clock_off = clock_off(response.getheader("Date", ""))
        return response.status, mapping(data)


def taint_of(text: str) -> dict[str, str]:
    """Return a taint as the API has it."""
    pair, _, effect = text.rpartition(":")
    key, _, value = pair.partition("=")
    return {"key": key, "effect": effect, **({"value": value} if value else {})}


# --- RoCE ------------------------------------------------------------------------------------------------------------

INFINIBAND = ROOT + "/sys/class/infiniband"
ROCE_CONFIG = ROOT + "/etc/bakehouse/roce.yaml"
ROCE_RESULTS = RUN + "/roce"  # of bakehouse-roce: a file for each device
ROCE_STATES = ("applied", "already right", "not supported", "failed")


class Roce:
    """A node with RDMA devices that are set up; it is a member of nothing else."""

    WORK, BY_HAND = "jobs", "nothing for {}"

    def __init__(self, config: Config, node: str) -> None:
        self.config, self.node = config, node

    def devices(self) -> list[str]:
        """Return the RDMA devices that are to be used, once there are as many as are wanted."""
        results = roce_results()
        found = [name for name in rdma_devices() if not (results.get(name) or {}).get("left_alone")]
        hint = "bakehouse-roce nics; dmesg; is the NIC's RDMA driver there? (lsmod, rdma link)"
        if not found:
            raise self.wait("no RDMA device has appeared yet", hint)
        if len(found) < self.config.devices:
            raise self.wait(f"{len(found)} of {self.config.devices} RDMA devices are there: {' '.join(found)}", hint)
        return found

    def must_be_set_up(self, devices: list[str]) -> None:
        """Return when all devices are set up, and none of their knobs failed."""
        results = roce_results()
        for name in devices:
            result = results.get(name)
            if not result:
                raise self.wait(f"{name} to be set up", f"systemctl status bakehouse-roce@{name}")
            if result.get("config", "") != signature(ROCE_CONFIG):
                raise self.wait(f"{name} to be set up as roce.yaml says now", "systemctl status bakehouse-roce.path")
            if result.get("faults"):
                raise Wait(f"roce.yaml: {'; '.join(result['faults'])}", "correct it; it is applied when it changes")
            for knob in result.get("knobs", []):
                if knob["state"] == "failed":
                    hint = knob["hint"] or "bakehouse-roce report"
                    raise Wait(f"{name} is not as wanted: {knob_text(knob)}", f"{hint}; then bakehouse-roce apply")
                if knob["knob"] == "mtu":
                    self.must_have_mtu(name, knob)

    def must_have_mtu(self, device: str, knob: dict[str, str]) -> None:
        """Return if an interface still has its MTU: what configures the network sets it too, and later."""
        now = read(f"{ROOT}/sys/class/net/{knob['where']}/mtu").decode().strip()
        if now not in {knob["actual"], ""}:
            hint = f"give it that MTU there too (networkctl cat {knob['where']}; the network's mtu in OpenStack)"
            raise Wait(f"{device}: the network's configuration set the MTU of {knob['where']} back to {now}", hint)

    def must_be_active(self, devices: list[str]) -> None:
        """Return when as many devices as are wanted have a port that is up."""
        states = {name: port_states(name) for name in devices}
        down = [f"{name} ({', '.join(states[name]) or 'no port'})" for name in devices if "ACTIVE" not in states[name]]
        if len(devices) - len(down) < self.config.devices:
            hint = "ip link: is the interface up, the cable in, the switch's port on?"
            raise self.wait(f"a port to become active: {' '.join(down)}", hint)

    def wait(self, what: str, hint: str) -> Wait:
        """Return a wait that looks often while the machine boots: it is there within seconds, most of the time."""
        found = Wait(what, hint)
        found.pace = 0.5 if monotonic() < CLOUD_INIT_LIMIT else 0.0
        return found

    def drain(self, *_: object) -> bool:
        """Nobody gives this node work."""
        return True

    def forget(self) -> None:
        """Nobody knows this node."""

    def stop(self) -> None:
        """Nothing runs for a cluster; the devices stay as they are."""


def rdma_devices() -> list[str]:
    """Return the names of the RDMA devices that are there."""
    return sorted(os.listdir(INFINIBAND)) if os.path.isdir(INFINIBAND) else []


def port_states(device: str) -> list[str]:
    """Return the states of a device's ports (Documentation/ABI/stable/sysfs-class-infiniband)."""
    ports = f"{INFINIBAND}/{device}/ports"
    names = sorted(os.listdir(ports)) if os.path.isdir(ports) else []
    return [read(f"{ports}/{name}/state").decode().partition(":")[2].strip() for name in names]


def roce_results() -> dict[str, dict[str, Any]]:
    """Return what bakehouse-roce has noted of the devices that are there."""
    if not os.path.isdir(ROCE_RESULTS):
        return {}
    found = {name: mapping(read(f"{ROCE_RESULTS}/{name}.json")) for name in rdma_devices()}
    return {name: result for name, result in found.items() if result}


def knob_text(knob: dict[str, str]) -> str:
    """Say what is wrong with a knob."""
    return (
        f"{knob['knob']} of {knob['where']}: wanted {knob['wanted']}, is {knob['actual'] or 'unknown'}: {knob['word']}"
    )


def roce_summary() -> dict[str, Any]:
    """Return in short how the set-up of each RDMA device ended."""
    summary = {}
    for name, result in roce_results().items():
        knobs = result.get("knobs", [])
        summary[name] = {
            "counts": {state: sum(knob["state"] == state for knob in knobs) for state in ROCE_STATES},
            "failed": [knob_text(knob) for knob in knobs if knob["state"] == "failed"],
            "not supported": sorted({knob["knob"] for knob in knobs if knob["state"] == "not supported"}),
            "faults": result.get("faults", []), "left alone": result.get("left_alone", ""),
        }  # fmt: skip
    return summary


def roce_line(about: dict[str, Any]) -> str:
    """Say in a line how the set-up of an RDMA device ended."""
    if about["left alone"]:
        return f"left alone: {about['left alone']}"
    parts = [f"{count} {state}" for state, count in about["counts"].items() if count]
    if about["not supported"]:
        parts.append(f"the device lacks {', '.join(about['not supported'])}")
    return ", ".join(parts) or "nothing is set up"


def with_roce(status: dict[str, Any]) -> dict[str, Any]:
    """Add to a status what the RDMA devices are at, where there are any: now, not when it was written."""
    summary = roce_summary()
    if not summary:
        return status
    wrong = [f"{name}: {text}" for name, about in summary.items() for text in about["failed"]]
    wrong += [f"{name}: roce.yaml: {text}" for name, about in summary.items() for text in about["faults"]]
    return {**status, "warnings": [*status.get("warnings", []), *wrong], "roce": summary}


def platform_of(config: Config, node: str) -> Slurm | Kubernetes | Roce:
    """Return what makes this node a member."""
    kinds: dict[str, type[Slurm | Kubernetes | Roce]] = {"kubernetes": Kubernetes, "roce": Roce}
    return kinds.get(config.platform, Slurm)(config, node)


# --- Join ------------------------------------------------------------------------------------------------------------


class Join:
    """The passes of one agent."""

    def __init__(self, status: Status) -> None:
        self.status, self.data = status, status.data
        self.config: Config | None = None
        self.member: Slurm | Kubernetes | Roce | None = None
        self.loaded = ""  # the signature of the join.yaml that was read
        self.joined = False
        self.blocked = False  # users from the metadata service, in this run

    def changed(self) -> bool:
        """True if join.yaml is not the file that was read."""
        return bool(self.loaded) and signature(CONFIG) not in {self.loaded, ""}

    def once(self) -> None:
        """Look at each level and do what is missing. Returns when the node is a member."""
        if self.config is None or self.changed():
            self.loaded, self.config, self.member = signature(CONFIG), None, None
            self.config = load()
            self.data.update(platform=self.config.platform, controller="", faults=[])
            self.status.moment("configured", f"{self.config.platform} {CONFIG}", again=True)
        if self.member is None:
            self.member = self.prepare(self.config)
        if isinstance(self.member, Roce):
            self.start_roce(self.member)
            return
        if isinstance(self.member, Slurm) and not os.path.exists(self.config.key_file):
            self.member = None
            raise Wait("the key has gone")
        if not self.data["controller"]:
            self.reach(self.config)
        self.status.moment("controller", self.data["controller"])
        if not self.blocked or self.joined:
            self.blocked = True
            if source().get("source") == "inline":
                block_metadata(self.status)
        try:
            self.start_kubernetes(self.member) if isinstance(self.member, Kubernetes) else self.start(self.member)
        except NoAnswer:
            self.data["controller"] = ""  # begin there again
            raise

    def prepare(self, config: Config) -> Slurm | Kubernetes | Roce:
        """Find the name and the key."""
        self.data["node"] = node_name(config)
        if config.platform != "slurm":
            return platform_of(config, self.data["node"])
        if config.token:
            self.reach(config)
        self.status.moment("secret", place_secret(config, self.data["node"]))
        self.know(config)
        return platform_of(config, self.data["node"])

    def know(self, config: Config) -> None:
        """Take join.yaml for read, where we ourselves have just taken the secret out of it."""
        if read(CONFIG) == config.text:
            self.loaded = signature(CONFIG)

    def reach(self, config: Config) -> None:
        """Find a controller that answers."""
        self.data["controller"], self.data["address"] = reach(config.controllers)
        self.status.moment("network", self.data["address"])

    def start(self, slurm: Slurm) -> None:
        """Start what Slurm needs and wait for the controller's word."""
        must_have_containers(slurm.config)
        slurm.start_munge()
        slurm.start(self.data["address"])
        self.status.moment("services", "munge slurmd" if slurm.munge else "slurmd")
        shown = slurm.registered(self.joined)
        self.status.moment("registered", shown.state)
        if not self.joined:
            slurm.check_ready(shown)

    def start_kubernetes(self, kubernetes: Kubernetes) -> None:
        """Start what Kubernetes needs and wait for the API server's word."""
        kubernetes.must_have_containerd()
        if not kubernetes.is_member():
            self.status.moment("secret", kubernetes.take_token())
            kubernetes.join(self.data["address"])
            self.know(kubernetes.config)
        kubernetes.start()
        self.status.moment("services", "containerd kubelet")
        shown = kubernetes.show()
        self.status.moment("registered", self.data["node"])
        kubernetes.check_ready(shown)

    def start_roce(self, roce: Roce) -> None:
        """Wait until the RDMA devices are there, set up, and connected."""
        found = roce.devices()
        self.status.moment("devices", " ".join(found))
        roce.must_be_set_up(found)
        self.status.moment("services", "bakehouse-roce")
        roce.must_be_active(found)

    def arrive(self) -> None:
        """The node is a member: say so, once, and remove the copies of the secret behind us."""
        first, self.joined = not self.joined, True
        if first:
            where = f" at {self.data['controller']}" if self.data["controller"] else ""
            self.status.moment("joined", f"{self.data['node']}{where}", again=True)
        self.status.enter("joined")
        notify("READY=1")
        if first and self.config and source():
            scrub([read(self.config.key_file)] if self.config.platform == "slurm" else [])

    def failed(self, error: Hopeless) -> bool:
        """Say what somebody has to change; False if it changes within a moment: somebody was writing it."""
        pause(BEING_WRITTEN, self.changed)
        if self.changed():
            return False
        self.data["faults"] = error.faults
        self.status.say("failed", "; ".join(error.faults))
        self.status.enter("failed", error.faults[0], error.hint)
        return True

    def look_around(self) -> None:
        """After a wake-up: has the address towards the controller changed?"""
        address, old = own_address(self.data["controller"]), self.data["address"]
        if address and old and address != old:
            self.status.say("network", f"the address changed from {old} to {address}")
            self.data["address"] = address
            self.joined = False


def jitter() -> float:
    """Return a random number from 0 to 1. The module random takes 10 ms to import."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def back_off(attempt: int) -> float:
    """Return the seconds to wait after so many attempts: quick at first, then full jitter up to a cap."""
    if attempt <= QUICK:
        return 0.15 + 0.2 * jitter()
    return max(0.25, jitter() * min(LONGEST_WAIT, 2.0 ** min(attempt - QUICK, 10)))


def pause(seconds: float, changed: Callable[[], bool]) -> None:
    """Sleep, but not past a change of the configuration."""
    end = monotonic() + seconds
    while (left := end - monotonic()) > 0 and not changed():
        time.sleep(min(0.5, left))


class Alarm:
    """Sleeps until an address or the configuration changes.

    The kernel tells of new addresses (rtnetlink(7)) and of a new configuration (dnotify: fcntl(2), F_NOTIFY) by SIGIO,
    so a compute node is not woken up every few seconds. Leaving this to timers and path units would cost a start of
    Python each time, and a path unit cannot restart a service that waits. The signal is blocked: what happens while
    the agent works is kept for its next sleep.
    """

    def __init__(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
        self.longest = WATCH
        self.folder = os.open(os.path.dirname(CONFIG), os.O_RDONLY | os.O_DIRECTORY)
        self.kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        events = fcntl.DN_MODIFY | fcntl.DN_CREATE | fcntl.DN_RENAME | fcntl.DN_MULTISHOT
        try:
            fcntl.fcntl(self.folder, fcntl.F_NOTIFY, events)
            fcntl.fcntl(self.kernel, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(self.kernel, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
            self.kernel.bind((0, 0x10 | 0x100))  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
        except OSError:
            self.longest = 10.0  # no such help here: look more often

    def sleep(self) -> None:
        """Sleep, at most for about ``longest`` seconds. Returns a moment after a change, when it is complete."""
        if signal.sigtimedwait([signal.SIGIO], self.longest * (0.75 + jitter() / 2)):
            time.sleep(0.2)
            signal.sigtimedwait([signal.SIGIO], 0)
        try:
            while self.kernel.recv(65536):
                pass
        except OSError:
            pass  # all is read, or the kernel had more to say than fitted


def locked(wait: bool = False) -> bool:
    """Take the lock that one agent holds, until this process ends; False if another has it."""
    folder(RUN)
    descriptor = os.open(RUN + "/agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def join(boot: bool = False, timeout: float = FOREVER) -> int:
    """Join, and with ``boot`` stay to keep the node joined. Returns the exit status."""
    deadline = monotonic() + timeout
    if not locked():
        return follow(deadline)
    status = Status(console=boot)
    if boot and os.path.exists(LEFT):
        status.say("left", JOIN_AGAIN)
        status.enter("left", hint=JOIN_AGAIN)
        notify("READY=1")
        return DONE
    if not boot:
        remove(LEFT)
    status.moment("started", f"pid {os.getpid()}")
    code = keep_joining(Join(status), boot, deadline)
    if code == DONE and not ROOT:  # by hand
        run("systemctl", "start", "--no-block", "bakehouse-agent.service")  # which keeps it joined
    return code


def keep_joining(work: Join, boot: bool, deadline: float) -> int:
    """Make passes until the node is a member; with ``boot`` for ever. Returns the exit status."""
    attempt, waited_for = 0, ""
    alarm: Alarm | None = None
    while True:
        try:
            work.once()
            work.arrive()
            if not boot:
                return DONE
            attempt, waited_for = 0, ""
            alarm = alarm or Alarm()
            if not work.changed():
                alarm.sleep()
            work.look_around()
            continue
        except Wait as error:
            wait = error
        except Hopeless as error:
            if work.failed(error):
                return error.status
            continue
        except OSError as error:
            wait = disk_trouble(error)
        attempt = attempt + 1 if wait.what == waited_for else 1
        waited_for = wait.what
        delay = wait.pace or back_off(attempt)
        work.status.waiting(wait, attempt, delay)
        pause(min(delay, deadline - monotonic()), work.changed)
        if monotonic() > deadline:
            return NOT_YET


def disk_trouble(error: OSError) -> Wait:
    """Say in plain words why a file cannot be written."""
    name = error.filename or "a file"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return Wait(f"the disk is full: {name} cannot be written", "df -h; df -i")
    if error.errno == errno.EROFS:
        return Wait(f"the disk is read-only: {name} cannot be written", "journalctl -k; findmnt /")
    return Wait(f"{name}: {error.strerror or error}")


def follow(deadline: float) -> int:
    """Another agent is at work: say what it is at until it is done."""
    said = ""
    while True:
        status = read_status()
        state, node, controller = status["state"], status.get("node", ""), status.get("controller", "")
        what = "; ".join(status.get("faults", [])) or status.get("waiting_for") or f"{node} {controller}"
        if said != what:
            print(f"{state}: {what}", flush=True)
            said = what
        if state in {"joined", "failed"}:
            return DONE if state == "joined" else INVALID
        if monotonic() > deadline:
            return NOT_YET
        time.sleep(0.2)


# --- Leave -----------------------------------------------------------------------------------------------------------


def leave(now: bool = False, timeout: float = FOREVER, keep: bool = False) -> int:
    """Drain the node, wait for its jobs, stop its services and make the controller forget it."""
    status, config = Status(), load()
    node = read_status().get("node") or node_name(config)
    status.data.update(platform=config.platform, node=node)
    member = platform_of(config, node)
    folder(STATE)
    write(LEFT, b"bakehouse-agent leave was called; bakehouse-agent join undoes it\n", 0o644)
    run("systemctl", "stop", "bakehouse-agent.service", timeout=60)
    locked(wait=True)
    hint = JOIN_AGAIN
    try:
        if not member.drain(status, now, monotonic() + timeout):
            print(f"{node} is drained, but {member.WORK} still run on it: leave again later, or leave --now")
            return NOT_YET
        if not keep:
            member.forget()
    except Wait as wait:
        status.warn(wait.what)
        hint = f"the controller was not told: run {member.BY_HAND.format(node)} there"
    member.stop()
    status.moment("left", node)
    status.enter("left", hint=hint)
    print(f"{node} has left" if hint == JOIN_AGAIN else f"{node} has left; but {hint}")
    return DONE if hint == JOIN_AGAIN else NOT_YET


# --- Command line ----------------------------------------------------------------------------------------------------

HELP = """\
NAME
    bakehouse-agent - makes this machine a member of its cluster

SYNOPSIS
    bakehouse-agent join|status|leave|check|scrub [OPTIONS]

DESCRIPTION
    Joins the cluster that /etc/bakehouse/join.yaml names, says what it waits for, and leaves again.

COMMANDS
    join [--timeout SECONDS] [--boot]
        Joins, and returns when the cluster says that the node is ready. Changes nothing on a node that is joined.
        --boot is for the systemd unit: it stays to keep the node joined, and respects an earlier leave.
    status [--json] [--wait SECONDS]
        Says what the agent is at, what it waits for and what to do. --wait waits for the join first. Needs no root.
    leave [--now] [--timeout SECONDS] [--keep]
        Drains the node, waits for its jobs, stops its services, and makes the controller forget it. It stays away
        until join is called. --now does not wait for jobs (they are lost), --keep leaves the node known (drained).
    check [FILE]    Names everything that is wrong with a configuration.
    scrub           Overwrites the copies of the secret that cloud-init keeps. Run by a unit after each boot.

FILES
    /etc/bakehouse/join.yaml     the configuration
    /run/bakehouse/status.json   the status
    /var/lib/bakehouse/left      there after leave

EXIT STATUS
    0   joined; done
    1   not joined (yet); leave: jobs still run, or the controller was not told
    2   the command line or the configuration is wrong
    3   the broker refuses the token
    4   status: the agent has not run since the machine started

EXAMPLES
    bakehouse-agent status --wait 300 && echo joined
    bakehouse-agent leave --timeout 3600
"""


def read_status() -> dict[str, Any]:
    """Return what the status file says."""
    found: dict[str, Any] = json.loads(read(STATUS) or b'{"state": "never ran"}')
    return found


def show_status(as_json: bool, wait: float) -> int:
    """Print the status; wait for a join so many seconds."""
    deadline = monotonic() + wait
    while (status := read_status())["state"] != "joined" and monotonic() < deadline:
        time.sleep(0.2)
    status = with_roce(status)
    if as_json:
        print(json.dumps(status, indent=2))
    elif status["state"] == "never ran":
        print("the agent has not run since this machine started")
    else:
        print("\n".join(status_lines(status)))
    return {"joined": DONE, "never ran": NEVER_RAN}.get(status["state"], NOT_YET)


def status_lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield the status as people read it."""
    now = monotonic()
    rows = [(name, status[name]) for name in ("node", "address", "controller")]
    if status["state"] == "waiting":
        soon = f"in {max(0.0, status['updated'] + status['next_try'] - now):.0f} s"
        rows += [("waiting for", status["waiting_for"]), ("next try", f"{soon}, tried so far: {status['attempt']}")]
    rows.append(("hint", status["hint"]))
    rows += [("fault", fault) for fault in status["faults"]] + [("warning", text) for text in status["warnings"]]
    rows += [(f"RoCE {name}", roce_line(about)) for name, about in status.get("roce", {}).items()]
    yield f"{status['state']} for {now - status['since']:.0f} s"
    yield from (f"  {name:11}  {text}" for name, text in rows if text)
    yield "  since the kernel started:"
    yield from (f"    {when:9.3f} s  {name}" for name, when in status["timeline"])


def check(path: str) -> int:
    """Name all that is wrong with a configuration."""
    faults = parse(read(path, CONFIG_LIMIT + 1))[1] if os.path.exists(path) else ["there is no such file"]
    for fault in faults:
        print(f"{path}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{path} is right")
    return INVALID if faults else DONE


def command(arguments: list[str]) -> int:
    """Run the command that the command line asks for."""
    import argparse

    parser = argparse.ArgumentParser(prog="bakehouse-agent", add_help=False, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    verbs = {name: commands.add_parser(name, add_help=False) for name in ("join", "status", "leave", "check", "scrub")}
    for name, flag in (("join", "--boot"), ("status", "--json"), ("leave", "--now"), ("leave", "--keep")):
        verbs[name].add_argument(flag, action="store_true")
    for name, option, default in (("join", "timeout", FOREVER), ("leave", "timeout", FOREVER), ("status", "wait", 0)):
        verbs[name].add_argument(f"--{option}", type=float, default=default)
    verbs["check"].add_argument("file", nargs="?", default=CONFIG)
    asked = parser.parse_args(arguments)
    if asked.command == "status":
        return show_status(asked.json, asked.wait)
    if asked.command == "check":
        return check(asked.file)
    if asked.command == "scrub":
        found = scrub([read(path) for path in KEY_FILES.values()])
        print(f"bakehouse-agent: removed copies of the secret from {found} files")
        return DONE
    if asked.command == "leave":
        return leave(asked.now, asked.timeout, asked.keep)
    return join(asked.boot, asked.timeout)


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    os.umask(0o077)
    if not ROOT:
        os.environ["PATH"] = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        if arguments == ["join", "--boot"]:  # how the unit starts it: argparse would take longer than the rest
            return join(boot=True)
        if {"-h", "--help"} & set(arguments):
            print(HELP, end="")
            return DONE
        return command(arguments)
    except Hopeless as error:
        said, status = "\n".join([*error.faults, error.hint]), error.status
    except Wait as error:
        said, status = f"bakehouse-agent: {error.what}", NOT_YET
    except PermissionError as error:
        said, status = f"bakehouse-agent: {error.filename}: {error.strerror}: are you root?", NOT_YET
    except KeyboardInterrupt:
        return 130  # as a shell reports it
    print(said, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
