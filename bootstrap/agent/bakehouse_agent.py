"""The join agent: makes a booted machine a member of its cluster, and keeps it one.

It reads ``/etc/bakehouse/join.yaml`` and then works level by level: name, key, network, controller, services,
registration. Each pass looks at what is there and does only what is missing, so a second run, a reboot, a kill at any
point or a changed address are all the same case. What a pass waits for stands in ``/run/bakehouse/status.json``.

One file, the standard library and PyYAML. Python's imports are what a small agent spends its time on (under emulation
they are 25 times slower), so modules that a plain join does not need are imported where they are used.

docs/join-agent.md has the configuration, the states and what to do in each trouble.
"""

# pathlib and contextlib cost more to import than all that they would do here:
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH108, PTH110, PTH112, PTH116, PTH118, PTH119, PTH120, PTH123, SIM105

from __future__ import annotations

import errno
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

# Tests move every path below another folder; programs then come from the caller's PATH.
ROOT = os.environ.get("BAKEHOUSE_ROOT", "")
CONFIG = ROOT + "/etc/bakehouse/join.yaml"
RUN = ROOT + "/run/bakehouse"
STATUS = RUN + "/status.json"
LOCK = RUN + "/agent.lock"
ASIDE = RUN + "/fetched.key"
STATE = ROOT + "/var/lib/bakehouse"
LEFT = STATE + "/left"
SECRET_SOURCE = STATE + "/secret.json"
INSTANCE_DATA = ROOT + "/run/cloud-init/instance-data.json"
CLOUD_INIT_RUNS = ROOT + "/run/cloud-init/enabled"  # made by its generator, before all units
CLOUD_INIT_LIMIT = 120.0  # seconds since the kernel started, after which the host name has to do
CLOUD_COPIES = (ROOT + "/var/lib/cloud", ROOT + "/run/cloud-init")
CLOUD_LOGS = (ROOT + "/var/log/cloud-init.log", ROOT + "/var/log/cloud-init-output.log")

DONE, NOT_YET, INVALID, REFUSED, NEVER_RAN = 0, 1, 2, 3, 4

UNSETTLED_NAMES = {"", "(none)", "localhost", "debian"}
SETTLING = 3.0  # seconds for which a host name must stay the same
QUIET = 3.0  # seconds after slurmd's start within which nothing is wrong yet
BEING_WRITTEN = 2.0  # seconds within which a configuration that is wrong may become right
WATCH = 120.0  # seconds between two looks at a joined node
QUICK = 8  # looks at a quick pace before backing off: most of what a booting node waits for is there within seconds
LONGEST_WAIT = 15.0  # seconds
OUR_REASON = "bakehouse-agent: "


class Wait(Exception):  # noqa: N818 (not an error: what a pass waits for)
    """Something is not there yet, or does not work yet: say what, and look again later."""

    pace = 0.0  # seconds to the next look, where backing off would only lose time

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = plain(what)
        self.hint = plain(hint)


class Soon(Wait):
    """It is on its way, and looking costs nothing."""

    pace = 0.1


class NoAnswer(Wait):
    """The controller answered before and does not now: it may be the network."""


class Hopeless(Exception):  # noqa: N818
    """Waiting does not help: somebody has to change the configuration."""

    def __init__(self, faults: list[str], hint: str, status: int) -> None:
        super().__init__("; ".join(faults))
        self.faults = [plain(fault) for fault in faults]
        self.hint = plain(hint)
        self.status = status


class TimedOut(Exception):  # noqa: N818
    """The time that the caller gave is over."""


def plain(text: str, limit: int = 300) -> str:
    """Return text that is safe on a console and in a log: one line, printable ASCII, no longer than ``limit``."""
    return " ".join("".join(c if " " <= c <= "~" else " " for c in text).split())[:limit]


def monotonic() -> float:
    """Return the seconds since the kernel started, the base of systemd's monotonic timestamps too."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


# --- Files -----------------------------------------------------------------------------------------------------------


def write(path: str, data: bytes, mode: int = 0o600, owner: str | None = None) -> None:
    """Replace a file as a whole: readers see the old or the new one, also after a crash.

    Raises:
        OSError: it cannot be written; nothing is left beside it then.
    """
    temporary = path + ".new"  # one name: what a killed agent left there is written over and renamed by the next one
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if owner:
                own(descriptor, owner)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = path
        os.unlink(temporary)
        raise
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def own(place: int | str, name: str) -> None:
    """Give a file to a system user."""
    if not ROOT:
        os.chown(place, *ids(name))


def ids(name: str) -> tuple[int, int]:
    """Return the user and group number of a system user."""
    import pwd

    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise Wait(f"there is no user {name} on this node", f"is {name} installed?") from None
    return entry.pw_uid, entry.pw_gid


def read(path: str, limit: int = 1 << 20) -> bytes | None:
    """Return what a file holds, at most ``limit`` bytes, or None where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        return None


def signature(path: str) -> str:
    """Return what changes whenever a file is replaced or written."""
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


def remove(path: str) -> None:
    """Remove a file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


# --- Other programs --------------------------------------------------------------------------------------------------


def run(*command: str, timeout: float = 15.0, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a program and return its exit status and all it said; 127 if it is not there, 124 if it took too long.

    subprocess would do, but importing it takes longer than a whole systemctl.
    """
    import select
    import signal

    variables = {**os.environ, "LC_ALL": "C", **(environment or {})}
    reader, writer = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)]
        process = os.posix_spawnp(
            command[0], command, variables, file_actions=actions, setpgroup=0, setsigdef=[signal.SIGPIPE]
        )
    except OSError as error:
        os.close(reader)
        return 127, f"{command[0]}: {error.strerror}"
    finally:
        os.close(writer)
    said, deadline = bytearray(), monotonic() + timeout
    try:
        while select.select([reader], [], [], max(0.0, deadline - monotonic()))[0]:
            part = os.read(reader, 65536)
            if not part:
                return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.decode(errors="replace")
            said += part[: (1 << 20) - len(said)]
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return 124, said.decode(errors="replace") + f"\n{command[0]} did not answer within {timeout:.0f} s"
    finally:
        os.close(reader)


# --- Configuration ---------------------------------------------------------------------------------------------------

LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1123
HOST = rf"{LABEL}(?:\.{LABEL})*"
FEATURE = r"[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,63}"
GRES = r"[A-Za-z0-9_]+(?::[A-Za-z0-9_.-]+){0,3}(?:,[A-Za-z0-9_]+(?::[A-Za-z0-9_.-]+){0,3})*"
TOKEN = r"bhj_[A-Za-z0-9_-]{20,128}"  # noqa: S105 (the form of a token, not a token)
HARDWARE = "CPUs Boards Sockets SocketsPerBoard CoresPerSocket ThreadsPerCore RealMemory TmpDisk Weight Gres".split()
CONFIG_LIMIT = 64 * 1024  # bytes
DEEPEST = 8  # levels; the schema has four
SLURM_PORT = 6817
FETCHED = ROOT + "/run/slurm/conf/slurm.conf"  # what slurmd got from the controller


class Broker:
    """Where the key is fetched, and with what."""

    def __init__(self, host: str, port: int, token: str, ca: str) -> None:
        self.host, self.port, self.token, self.ca = host, port, token, ca


class Config:
    """What join.yaml says, checked: nothing in here can break out of a command line or an environment file."""

    platform = "slurm"
    name = ""
    authentication = "munge"
    inline = b""
    broker: Broker | None = None

    def __init__(self) -> None:
        self.controllers: list[tuple[str, int]] = []
        self.features: list[str] = []
        self.hardware: dict[str, str] = {}

    @property
    def holds_secret(self) -> bool:
        """True while the file holds what nobody else may read."""
        return bool(self.inline or (self.broker and self.broker.token))


class Faults(list):  # type: ignore[type-arg]
    """All that is wrong with a configuration."""

    def say(self, where: str, what: str) -> None:
        """Add a fault, with the place where it is."""
        self.append(plain(f"{where}: {what}" if where else what))


def parse(data: bytes) -> tuple[Config, list[str]]:
    """Read a configuration. The list says all that is wrong with it; the configuration holds only if that is empty."""
    faults = Faults()
    document = read_yaml(data, faults)
    config = Config()
    if not faults:
        check_top(document, config, faults)
    return config, faults


def read_yaml(data: bytes, faults: Faults) -> Any:
    """Return the document as mappings, lists and scalars.

    Built from the parser's events: no aliases (a bomb needs them), no tags, no duplicate keys, no deep nesting.
    """
    if len(data) > CONFIG_LIMIT:
        return faults.say("", f"the file has more than {CONFIG_LIMIT // 1024} KiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return faults.say(f"byte {error.start}", "the file is not UTF-8 text")
    for number, line in enumerate(text.split("\n"), 1):
        if any((c < " " and c not in "\t\r") or "\x7f" <= c <= "\x9f" for c in line):
            return faults.say(f"line {number}", "holds a control character")
    if "/usr/lib/python3/dist-packages" not in sys.path:
        sys.path.append("/usr/lib/python3/dist-packages")  # the launcher starts Python without it: that is quicker
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return build(yaml.parse(text, Loader=loader), faults)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        return faults.say(f"line {mark.line + 1}" if mark else "", f"not YAML: {what}")


def build(events: Iterator[Any], faults: Faults) -> Any:
    """Make values of the parser's events; see read_yaml()."""
    top: list[Any] = []
    stack: list[Any] = [top]
    keys: list[Any] = [None]
    for event in events:
        kind, line = type(event).__name__, event.start_mark.line + 1
        if kind in {"MappingEndEvent", "SequenceEndEvent"}:
            stack.pop()
            keys.pop()
        elif kind in {"ScalarEvent", "MappingStartEvent", "SequenceStartEvent", "AliasEvent"}:
            refused = not_taken(event, kind, len(stack))
            if refused:
                return faults.say(f"line {line}", refused)
            value = value_of(event, kind)
            if not place(value, stack[-1], keys, line, faults):
                return None
            if kind != "ScalarEvent":
                stack.append(value)
                keys.append(None)
    if len(top) != 1:
        return faults.say("", "more than one document" if top else "the file is empty")
    return top[0]


def not_taken(event: Any, kind: str, depth: int) -> str:
    """Say what of YAML is not taken here, or nothing."""
    if kind == "AliasEvent" or event.anchor:
        return "anchors and aliases are not taken here"
    if event.tag:
        return "tags (!...) are not taken here"
    if kind != "ScalarEvent" and depth > DEEPEST:
        return f"nested deeper than {DEEPEST} levels"
    return ""


def value_of(event: Any, kind: str) -> Any:
    """Return a scalar's text, None for nothing, or an empty list or mapping to fill.

    Types are the schema's business, so that ``name: 010`` stays as it is written.
    """
    if kind == "MappingStartEvent":
        return {}
    if kind == "SequenceStartEvent":
        return []
    empty = event.style in {None, ""} and event.value in {"", "~", "null", "Null", "NULL"}
    return None if empty else str(event.value)


def place(value: Any, parent: Any, keys: list[Any], line: int, faults: Faults) -> bool:
    """Put a value where it belongs: into its list, or as key or value of its mapping."""
    if isinstance(parent, list):
        parent.append(value)
    elif keys[-1] is None:
        if not isinstance(value, str):
            faults.say(f"line {line}", "a key must be a word")
            return False
        if value in parent:
            faults.say(f"line {line}", f"{value} stands here a second time")
        parent.setdefault(value, None)
        keys[-1] = value
    else:
        parent[keys[-1]] = value
        keys[-1] = None
    return True


def fields(value: Any, where: str, known: list[str], faults: Faults) -> dict[str, Any]:
    """Return a mapping's fields; what is not known is named, with what may have been meant."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        faults.say(where or "the file", f"must be a mapping with {', '.join(known)}")
        return {}
    for key in value:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key.lower(), [k.lower() for k in known], 1)
            meant = next((k for k in known if near and k.lower() == near[0]), "")
            place_of = f"{where}.{key}" if where else str(key)
            faults.say(plain(place_of, 80), f"not known; did you mean {meant}?" if meant else "not known")
    return value


def string(value: Any, where: str, pattern: str, what: str, faults: Faults) -> str:
    """Return a text that has the form it must have, or an empty one."""
    import re

    if not isinstance(value, str):
        faults.say(where, f"must be {what}")
    elif not re.fullmatch(pattern, value):
        faults.say(where, f"{plain(repr(str(value)), 60)} is not {what}")
    else:
        return str(value)
    return ""


def strings(value: Any, where: str, most: int, faults: Faults) -> list[Any]:
    """Return a list of at most ``most`` entries."""
    if value is None:
        return []
    if not isinstance(value, list):
        faults.say(where, "must be a list")
        return []
    if len(value) > most:
        faults.say(where, f"holds more than {most} entries")
    return value[:most]


def number(value: Any, where: str, least: int, most: int, faults: Faults) -> int:
    """Return a whole number between two limits, or the least one."""
    text = value if isinstance(value, str) else ""
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):  # noqa: PLR2004
        faults.say(where, f"must be a whole number from {least} to {most}")
        return least
    return int(text)


def check_top(document: Any, config: Config, faults: Faults) -> None:
    """Check the whole document."""
    top = fields(document, "", ["platform", "node", "slurm", "secret"], faults)
    if top.get("platform") is None:
        faults.say("platform", "is missing; it takes: slurm")
    else:
        config.platform = string(
            top["platform"], "platform", "slurm", "a platform that this agent knows: slurm", faults
        )
    node = fields(top.get("node"), "node", ["name"], faults)
    if node.get("name") is not None:
        name = node["name"].partition(".")[0] if isinstance(node["name"], str) else node["name"]
        config.name = string(name, "node.name", LABEL, "a host name: letters, digits and -, at most 63", faults)
    check_slurm(top.get("slurm"), config, faults)
    check_secret(top.get("secret"), config, faults)


def check_slurm(value: Any, config: Config, faults: Faults) -> None:
    """Check the section slurm."""
    slurm = fields(value, "slurm", ["controllers", "authentication", "features", "hardware"], faults)
    if slurm.get("authentication") is not None:
        config.authentication = string(
            slurm["authentication"], "slurm.authentication", "munge|slurm", "munge or slurm", faults
        )
    found = strings(slurm.get("controllers"), "slurm.controllers", 8, faults)
    if not found:
        faults.say("slurm.controllers", "is missing; it takes a list of host or host:port")
    for index, text in enumerate(found):
        address = endpoint(text, f"slurm.controllers[{index}]", SLURM_PORT, faults)
        if address:
            config.controllers.append(address)
    for index, text in enumerate(strings(slurm.get("features"), "slurm.features", 64, faults)):
        feature = string(text, f"slurm.features[{index}]", FEATURE, "a feature: letters, digits and _.:/+-", faults)
        config.features.append(feature)
    hardware = fields(slurm.get("hardware"), "slurm.hardware", HARDWARE, faults)
    for key in HARDWARE:
        if hardware.get(key) is None:
            continue
        where = f"slurm.hardware.{key}"
        if key == "Gres":
            config.hardware[key] = string(hardware[key], where, GRES, "a list such as gpu:a100:4,shard:8", faults)
        else:
            least = 0 if key in {"Weight", "TmpDisk"} else 1
            config.hardware[key] = str(number(hardware[key], where, least, 2**31, faults))


def endpoint(value: Any, where: str, default_port: int, faults: Faults) -> tuple[str, int] | None:
    """Return host and port of host, host:port, IPv6 in brackets, or [IPv6]:port."""
    import re
    import socket

    found = (
        re.fullmatch(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([^\[\]:\s]{1,253}))(?::([0-9]{1,5}))?", value or "", re.ASCII)
        if isinstance(value, str)
        else None
    )
    if not found:
        faults.say(where, f"{plain(repr(value), 80)} is not host or host:port (an IPv6 address stands in brackets)")
        return None
    v6, host, port = found.groups()
    try:
        if v6:
            socket.inet_pton(socket.AF_INET6, v6)
        elif re.fullmatch(r"(?:.*\.)?[0-9]+", host):
            socket.inet_pton(socket.AF_INET, host)  # a name cannot end in a number: RFC 1123, 2.1
        elif not re.fullmatch(HOST, host):
            raise ValueError
    except (OSError, ValueError):
        faults.say(where, f"{plain(repr(v6 or host), 80)} is neither a host name nor an address")
        return None
    return v6 or host, number(port, where + " (port)", 1, 65535, faults) if port else default_port


def check_secret(value: Any, config: Config, faults: Faults) -> None:
    """Check the section secret. What it holds is never repeated in a fault."""
    import binascii

    secret = fields(value, "secret", ["inline", "broker"], faults)
    if secret.get("inline") is not None and secret.get("broker") is not None:
        faults.say("secret", "takes inline or broker, not both")
    if secret.get("inline") is not None:
        text = secret["inline"] if isinstance(secret["inline"], str) else ""
        try:
            key = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
            canonical = binascii.b2a_base64(key, newline=False) == text.encode("ascii")
        except (ValueError, UnicodeEncodeError):
            key, canonical = b"", False
        if not canonical:
            faults.say("secret.inline", "must be the key in base64 on one line (base64 --wrap=0 /etc/munge/munge.key)")
        elif not 32 <= len(key) <= 1024:  # noqa: PLR2004 (munge's MUNGE_MINIMUM_KEY_LEN and _MAXIMUM_)
            faults.say("secret.inline", f"must be a key of 32 to 1024 bytes; this one has {len(key)}")
        config.inline = key
    if secret.get("broker") is not None:
        check_broker(secret["broker"], config, faults)


def check_broker(value: Any, config: Config, faults: Faults) -> None:
    """Check the section secret.broker."""
    import re

    broker = fields(value, "secret.broker", ["url", "token", "ca"], faults)
    url = broker.get("url")
    found = re.fullmatch(r"https://([^/@\s]+)/?", url) if isinstance(url, str) else None
    if not found:
        faults.say("secret.broker.url", "must be https://HOST:PORT, without user, password or path")
    address = endpoint(found[1], "secret.broker.url", 8444, faults) if found else None
    token = broker.get("token") or ""
    if token and not (isinstance(token, str) and re.fullmatch(TOKEN, token)):
        faults.say("secret.broker.token", "is not a token of invoke join.token (bhj_...)")
        token = ""
    ca = broker.get("ca")
    line = r"[A-Za-z0-9+/=]{1,80}\n"
    pem = rf"(?:[ -~]*\n)?(?:-----BEGIN CERTIFICATE-----\n(?:{line})+-----END CERTIFICATE-----\s*)+"
    if not (isinstance(ca, str) and re.fullmatch(pem, ca)):
        faults.say("secret.broker.ca", "must be the certificate of the CA, in PEM form")
        ca = ""
    if address:
        config.broker = Broker(*address, str(token), str(ca))


def load(path: str) -> tuple[Config, bytes]:
    """Return the configuration and the file's bytes.

    Raises:
        Wait: there is no file.
        Hopeless: something is wrong with it; all of it is named.
    """
    try:
        if os.stat(path).st_mode & 0o077 and os.geteuid() == 0:
            os.chmod(path, 0o600)
    except FileNotFoundError:
        raise Wait(f"there is no {path}", "cloud-init writes it from user-data; see docs/join-agent.md") from None
    data = read(path, CONFIG_LIMIT + 1) or b""
    config, faults = parse(data)
    if faults:
        raise Hopeless(
            [f"{os.path.basename(path)}: {fault}" for fault in faults],
            f"correct {path}; the agent starts again when the file changes",
            INVALID,
        )
    return config, data


# --- Status ----------------------------------------------------------------------------------------------------------


class Status:
    """What the agent is at: in the status file, on the console, in the journal, and for systemd."""

    def __init__(self, console: bool = False, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.data: dict[str, Any] = {
            "state": "starting", "phase": "started", "waiting_for": "", "hint": "", "attempt": 0, "next_try": 0,
            "platform": "", "node": "", "controller": "", "address": "", "faults": [], "warnings": [],
            "since": round(monotonic(), 3), "updated": 0, "timeline": [],
        }  # fmt: skip
        self.said = ""

    def moment(self, name: str, detail: str = "", again: bool = False) -> None:
        """A level is reached: note when, the first time, and say so; with ``again`` the next times too."""
        if any(name == known for known, _ in self.data["timeline"]):
            if again:
                self.say(name, detail)
            return
        now = monotonic()
        self.data["timeline"].append([name, round(now, 3)])
        self.data["phase"] = name
        self.say(name, detail, now)
        self.save()

    def waiting(self, wait: Wait, attempt: int, delay: float) -> None:
        """Say what is waited for; aloud only when it changes."""
        if self.data["state"] != "waiting" or self.data["waiting_for"] != wait.what:
            self.say("waiting", f"{wait.what} ({wait.hint})" if wait.hint else wait.what)
            self.data["since"] = round(monotonic(), 3)
        self.data.update(
            state="waiting", waiting_for=wait.what, hint=wait.hint, attempt=attempt, next_try=round(delay, 1)
        )
        self.save()

    def settled(self, state: str, what: str = "", hint: str = "") -> None:
        """Note a state that lasts: joined, left or failed."""
        if self.data["state"] != state:
            self.data["since"] = round(monotonic(), 3)
        self.data.update(state=state, waiting_for=what, hint=hint, attempt=0, next_try=0)
        self.save()

    def warn(self, text: str) -> None:
        """Note what is not as it should be but does not stop the join."""
        text = plain(text)
        if text not in self.data["warnings"]:
            self.data["warnings"].append(text)
            self.say(self.data["phase"], f"warning: {text}")

    def say(self, name: str, detail: str, now: float | None = None) -> None:
        """Write one line to the journal and the console."""
        line = plain(f"bakehouse-agent: {monotonic() if now is None else now:.3f} {name} {detail}", 600) + "\n"
        if not self.quiet:
            try:
                os.write(1, line.encode())
            except OSError:
                pass
        if self.console:
            try:
                descriptor = os.open(ROOT + "/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            except OSError:
                return
            try:
                os.write(descriptor, line.replace("\n", "\r\n").encode())
            except OSError:
                pass  # nobody reads it
            finally:
                os.close(descriptor)
        notify("STATUS=" + plain(f"{name} {detail}"))

    def save(self) -> None:
        """Write the status file. It lives in memory, so a full disk does not stop it."""
        import json

        self.data["updated"] = round(monotonic(), 3)
        try:
            folder(RUN)
            temporary = STATUS + ".new"
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "w") as file:
                os.fchmod(file.fileno(), 0o644)
                json.dump(self.data, file)
            os.rename(temporary, STATUS)
        except OSError as error:
            os.write(2, f"bakehouse-agent: cannot write {STATUS}: {error.strerror}\n".encode())


def notify(text: str) -> None:
    """Tell systemd: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        try:
            connection.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass


# --- Name and secret -------------------------------------------------------------------------------------------------


class NodeName:
    """The name under which the node joins. Told to slurmd once: host names flip while a machine boots."""

    def __init__(self) -> None:
        self.seen, self.seen_at = "", 0.0

    def find(self, config: Config) -> str:
        """Return the name from the configuration, cloud-init, or the host name once it has settled.

        Raises:
            Wait: it has not settled.
        """
        import re

        name = config.name or from_cloud_init()
        name = name or (read(RUN + "/node") or b"").decode()
        if name:
            return name
        if os.path.exists(CLOUD_INIT_RUNS) and not os.path.exists(INSTANCE_DATA) and monotonic() < CLOUD_INIT_LIMIT:
            raise Soon("cloud-init to say what this node is called", "or set node.name in join.yaml")
        host = (read(ROOT + "/proc/sys/kernel/hostname") or os.uname().nodename.encode()).decode("ascii", "replace")
        name = host.strip().partition(".")[0]
        if name != self.seen:
            self.seen, self.seen_at = name, monotonic()
        if name in UNSETTLED_NAMES or not re.fullmatch(LABEL, name):
            raise Wait(f"the host name is still {name or 'empty'}", "set node.name in join.yaml, or the host name")
        if monotonic() - self.seen_at < SETTLING:
            raise Soon(f"the host name {name} to settle")
        write_run("node", name)  # whatever it becomes later, this is the name until the next boot
        return name


def from_cloud_init() -> str:
    """Return the instance's name as the cloud has it, or an empty text."""
    import json
    import re

    try:
        data = json.loads(read(INSTANCE_DATA) or b"{}")
        name = str(data["v1"]["local_hostname"]).partition(".")[0]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return name if re.fullmatch(LABEL, name) and name not in UNSETTLED_NAMES else ""


class Key:
    """The cluster's key on this node."""

    def __init__(self, authentication: str) -> None:
        self.munge = authentication == "munge"
        self.folder = ROOT + ("/etc/munge" if self.munge else "/etc/slurm")
        self.path = self.folder + ("/munge.key" if self.munge else "/slurm.key")
        self.owner = "munge" if self.munge else "slurm"

    def store(self, key: bytes) -> bool:
        """Put the key into its place; False if it is there already."""
        folder_owner, folder_mode = ("munge", 0o700) if self.munge else ("root", 0o755)
        if not os.path.isdir(self.folder):
            os.mkdir(self.folder, folder_mode)
        own(self.folder, folder_owner)
        os.chmod(self.folder, folder_mode)
        mode = 0o400 if self.munge else 0o600
        if read(self.path) == key:
            own(self.path, self.owner)
            os.chmod(self.path, mode)
            return False
        write(self.path, key, mode, self.owner)
        return True


def place_secret(config: Config, path: str, node: str) -> str:
    """Bring the key into its place and take it, or the token, out of join.yaml.

    Returns:
        What was done, as the detail of the console's line.

    Raises:
        Wait: there is no key yet.
        Hopeless: the broker refuses the token.
    """
    key = Key(config.authentication)
    done = "the key is in its place"
    if config.inline:
        note_source("inline")
        done = "stored the key of join.yaml" if key.store(config.inline) else done
    elif config.broker and config.broker.token and not is_spent(config.broker.token, key.path):
        found = kept_aside(config.broker.token) or fetch(config, config.broker, node)
        # The token is spent: whatever happens on the way to the disk, the key must not be lost.
        keep_aside(config.broker.token, found)
        note_source("broker", config.broker.token, found)
        key.store(found)
        remove(ASIDE)
        done = "fetched the key from the broker"
    elif not os.path.exists(key.path):
        raise Wait(
            f"there is no key in {key.path}, and join.yaml has none",
            f"add secret.inline or secret.broker with a token to {path}, or put the key there",
        )
    if config.holds_secret:
        data = read(path, CONFIG_LIMIT) or b""
        if parse(data)[0].holds_secret:
            write(path, without_secret(data))
        config.inline = b""
        if config.broker:
            config.broker.token = ""
    return done


def note_source(source: str, token: str = "", key: bytes = b"") -> None:
    """Remember where the secret came from. Before the key is stored: then a kill cannot lose what is known of it."""
    import json

    known: dict[str, str] = {"source": source}
    if token:
        import hashlib

        known["token"] = hashlib.sha256(token.encode()).hexdigest()
        known["key"] = hashlib.sha256(key).hexdigest()
    folder(STATE)
    data = json.dumps(known).encode()
    if read(SECRET_SOURCE) != data:
        write(SECRET_SOURCE, data)


def keep_aside(token: str, key: bytes) -> None:
    """Keep a fetched key in memory, for root only, until it is in its place: the disk may be full."""
    import hashlib

    write(ASIDE, hashlib.sha256(token.encode()).digest() + key)


def kept_aside(token: str) -> bytes:
    """Return the key that this token brought and that could not be stored; nothing where there is none."""
    import hashlib

    mark = hashlib.sha256(token.encode()).digest()
    data = read(ASIDE) or b""
    return data.removeprefix(mark) if data.startswith(mark) else b""


def source() -> dict[str, str]:
    """Return where the secret came from, as noted."""
    import json

    try:
        return dict(json.loads(read(SECRET_SOURCE) or b"{}"))
    except (ValueError, TypeError):
        return {}


def is_spent(token: str, key_path: str) -> bool:
    """True if this token has brought the key that is in its place: the agent was killed before it could say so."""
    import hashlib

    known = source()
    key = read(key_path)
    return bool(
        key
        and known.get("token") == hashlib.sha256(token.encode()).hexdigest()
        and known.get("key") == hashlib.sha256(key).hexdigest()
    )


HEADER = b"# The agent has taken the secret out of this file: the key is in its place, a token works only once.\n"


def without_secret(data: bytes) -> bytes:
    """Return the configuration without its key or token, all other lines as they were.

    By line, to keep comments. Where that does not do (flow style, quotes), it is written anew without them.
    """
    import json
    import re

    kept = re.sub(rb"(?m)^[ \t]+(?:inline|token)[ \t]*:[ \t]*\S[^\n]*(?:\n|\Z)", b"", data)
    kept = kept if kept.startswith(HEADER) else HEADER + kept
    config, faults = parse(kept)
    before, _ = parse(data)
    needles = [before.inline and encoded(before.inline), before.broker and before.broker.token.encode()]
    clean = not any(needle and needle in kept for needle in needles)
    if clean and not faults and not config.holds_secret and same(before, config):
        return kept
    document = read_yaml(data, Faults())
    secret = document.get("secret") or {}
    secret.pop("inline", None)
    (secret.get("broker") or {}).pop("token", None)
    return HEADER + json.dumps(document, indent=2).encode() + b"\n"  # JSON is YAML


def same(one: Config, other: Config) -> bool:
    """True if two configurations differ in their secret at most."""
    return all(
        getattr(one, key) == getattr(other, key)
        for key in ("platform", "name", "authentication", "controllers", "features", "hardware")
    ) and (one.broker is None) == (other.broker is None)


def encoded(key: bytes) -> bytes:
    """Return a key as user-data holds it."""
    import binascii

    return binascii.b2a_base64(key, newline=False)


# --- The broker ------------------------------------------------------------------------------------------------------


def fetch(config: Config, broker: Broker, node: str) -> bytes:
    """Fetch the key with the one-time token over HTTPS. Only the CA of the configuration is trusted, no proxy is used.

    Raises:
        Wait: the broker does not answer, or its certificate does not hold here and now.
        Hopeless: it refuses the token.
    """
    import http.client
    import json
    import ssl

    where = f"the broker at {broker.host}:{broker.port}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=broker.ca)
    except ssl.SSLError:
        raise Hopeless(["join.yaml: secret.broker.ca: holds no certificate that can be read"], "", INVALID) from None
    body = json.dumps({"platform": config.platform, "node": node})
    headers = {"Authorization": f"Bearer {broker.token}", "Content-Type": "application/json", "Connection": "close"}
    connection = http.client.HTTPSConnection(broker.host, broker.port, timeout=10, context=context)
    try:
        connection.request("POST", "/v1/secret", body, headers)
        response = connection.getresponse()
        data = response.read(16 * 1024 + 1)
    except ssl.SSLCertVerificationError as error:
        raise Wait(*certificate_trouble(where, error.verify_message)) from None
    except ssl.SSLError as error:
        raise Wait(f"{where} does not speak TLS as it should: {error.reason}", "is this the broker's port?") from None
    except OSError as error:
        raise Wait(*no_connection(where, error)) from None
    except http.client.HTTPException as error:
        raise Wait(f"{where} does not answer in HTTP ({type(error).__name__})", "is this the broker's port?") from None
    finally:
        connection.close()
    compare_clocks(response.getheader("Date", ""))
    return key_of_answer(config, node, where, response.status, data)


clock_off = 0.0  # seconds that this node's clock is ahead of the broker's, once that has answered


def compare_clocks(date: str) -> None:
    """Note how far this node's clock is from the one that an HTTP answer tells."""
    import email.utils

    global clock_off  # noqa: PLW0603
    try:
        clock_off = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        pass


def key_of_answer(config: Config, node: str, where: str, status: int, data: bytes) -> bytes:
    """Return the key in the broker's answer, checked."""
    import binascii
    import json

    answer: Any = None
    if len(data) <= 16 * 1024:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            pass
    answer = answer if isinstance(answer, dict) else {}
    said = plain(str(answer.get("error", "")), 200)
    if status == 401:  # noqa: PLR2004
        again = f"make a new token: invoke join.token --platform slurm --node {node}, and put it into {CONFIG}"
        raise Hopeless([f"{where} says: {said or 'token refused'}"], again, REFUSED)
    if status != 200:  # noqa: PLR2004
        raise Wait(f"{where} answers {status}: {said or 'no reason'}", "see the broker's journal")
    if answer.get("authentication") != config.authentication:
        kind = plain(str(answer.get("authentication")), 20)
        raise Wait(f"{where} has a key for {kind}, not for {config.authentication}", "compare slurm.authentication")
    try:
        key = binascii.a2b_base64(str(answer.get("key", "")).encode(), strict_mode=True)
    except ValueError:
        key = b""
    if not 32 <= len(key) <= 1024:  # noqa: PLR2004
        raise Wait(f"{where} sends no key that can be one", "see the key_file in broker.yaml")
    return key


def certificate_trouble(where: str, message: str) -> tuple[str, str]:
    """Say in plain words why a certificate does not hold."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if "not yet valid" in message or "expired" in message:
        when = "is not yet valid" if "not yet" in message else "has expired"
        return (
            f"the certificate of {where} {when}, by this node's clock",
            f"this node's clock says {clock}: is it right? timedatectl shows whether it is kept",
        )
    if "mismatch" in message or "doesn't match" in message or "not valid for" in message:
        return f"the certificate of {where} is for another name", "use the name in the certificate in secret.broker.url"
    return (
        f"the certificate of {where} is not from the CA in join.yaml ({message})",
        "compare secret.broker.ca with the CA of the broker; the wrong host may be answering",
    )


def no_connection(where: str, error: OSError) -> tuple[str, str]:
    """Say in plain words why there is no connection."""
    import socket

    if isinstance(error, socket.gaierror):
        name = where.rpartition(" ")[2].rpartition(":")[0]
        return f"the name {name} of {where.partition(' at ')[0]} is not found", "is the name server right? resolvectl"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return f"{where} does not answer", "is a security group or firewall between? is the address right?"
    known = {
        errno.ECONNREFUSED: ("refuses the connection", "does it run, and on this port?"),
        errno.EHOSTUNREACH: ("cannot be reached: no route to it", "ip route; is the host up?"),
        errno.ENETUNREACH: ("cannot be reached: this node has no network to it", "networkctl; ip route"),
        errno.EADDRNOTAVAIL: ("cannot be reached: this node has no address", "networkctl; ip route"),
        errno.ECONNRESET: ("ends the connection", "see its log"),
    }
    what, hint = known.get(error.errno or 0, (f"cannot be reached: {error.strerror or error}", ""))
    return f"{where} {what}", hint


# --- Scrubbing -------------------------------------------------------------------------------------------------------

SCRUB_LIMIT = 16 << 20  # bytes


def scrub(keys: list[bytes]) -> int:
    """Overwrite the copies of keys and tokens that cloud-init keeps, and return how many files had one.

    In place and with as many bytes: cloud-init's pickle and its JSON stay readable.
    """
    needles = [encoded(key) for key in keys if key]
    found = 0
    for path in copies():
        try:
            found += scrub_file(path, needles)
        except OSError as error:
            os.write(2, plain(f"bakehouse-agent: cannot scrub {path}: {error.strerror}").encode() + b"\n")
    return found


def copies() -> Iterator[str]:
    """Yield the files in which cloud-init may keep user-data."""
    yield from CLOUD_LOGS
    for top in CLOUD_COPIES:
        for folder, _, names in os.walk(top):
            for name in names:
                yield os.path.join(folder, name)


def scrub_file(path: str, needles: list[bytes]) -> bool:
    """Overwrite what must not be in one file; True if there was something."""
    import stat

    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= SCRUB_LIMIT:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with open(descriptor, "r+b", buffering=0) as file:
        data = file.read(SCRUB_LIMIT) or b""
        clean = blotted(data, needles)
        if clean == data:
            return False
        file.seek(0)
        file.write(clean)
        os.fsync(descriptor)
    return True


def blotted(data: bytes, needles: list[bytes]) -> bytes:
    """Return data of the same length in which keys, tokens, and what hides them in base64 or gzip are blotted out."""
    import re

    result = bytearray(data)
    for needle in needles:
        start = data.find(needle)
        while start >= 0:
            result[start : start + len(needle)] = b"x" * len(needle)
            start = data.find(needle, start + len(needle))
    for match in re.finditer(TOKEN.encode(), data):
        result[match.start() + 4 : match.end()] = b"x" * (match.end() - match.start() - 4)
    for start, end, kind in hidden(data, needles, 3):
        if kind == "gzip":
            result[start:end] = bytes(end - start)
        else:
            result[start:end] = re.sub(rb"[A-Za-z0-9+/]", b"x", data[start:end].replace(b"\\n", b"\0\0")).replace(
                b"\0\0", b"\\n"
            )
    return bytes(result)


def holds(data: bytes, needles: list[bytes], depth: int) -> bool:
    """True if data holds a key or a token, in plain or hidden."""
    import re

    if any(needle in data for needle in needles) or any(
        match[0][4:].strip(b"x") for match in re.finditer(TOKEN.encode(), data)
    ):
        return True
    return depth > 0 and next(hidden(data, needles, depth), None) is not None


def hidden(data: bytes, needles: list[bytes], depth: int) -> Iterator[tuple[int, int, str]]:
    r"""Yield where data holds gzip or base64 in which there is a key or a token.

    User-data may come compressed, cloud-init wraps what is not text in base64, MIME parts are base64 in lines (with
    ``\n`` written out where that is inside JSON), and write_files takes base64 too: each in the other.
    """
    import binascii
    import re
    import zlib

    start = data.find(b"\x1f\x8b\x08")
    while start >= 0:
        stream = zlib.decompressobj(31)
        try:
            inner = stream.decompress(data[start:], SCRUB_LIMIT)
        except zlib.error:
            inner = b""
        if inner and holds(inner, needles, depth - 1):
            yield start, len(data) - len(stream.unused_data), "gzip"
        start = data.find(b"\x1f\x8b\x08", start + 3)
    for match in re.finditer(rb"[A-Za-z0-9+/](?:[A-Za-z0-9+/]|\r?\n[ \t]*|\\n){47,}={0,2}", data):
        text = re.sub(rb"[^A-Za-z0-9+/]|\\n", b"", match[0].replace(b"\\n", b""))
        for skip in range(4):  # a word before it may have been taken for its begin
            part = text[skip:]
            inner = binascii.a2b_base64(part[: len(part) // 4 * 4]) + tail(part)
            if holds(inner, needles, depth - 1):
                yield match.start(), match.end(), "base64"
                break


def tail(part: bytes) -> bytes:
    """Return the bytes in the last, incomplete group of base64."""
    import binascii

    rest = part[len(part) // 4 * 4 :]
    return binascii.a2b_base64(rest + b"=" * (4 - len(rest))) if len(rest) > 1 else b""


def block_metadata(status: Status) -> None:
    """Keep everybody but root from the metadata service: with an inline secret it still hands the key out.

    4294967295 is no user id (it means "none" in chown(2)), so the range ends before it. systemd-networkd would remove
    the rules; the element tells it not to.
    """
    for family, address in (("-4", "169.254.169.254"), ("-6", "fe80::a9fe:a9fe")):
        _, known = run("ip", family, "rule", "show", "priority", "100")
        if address in known and "prohibit" in known and "1-4294967294" in known:
            continue
        code, said = run(
            "ip", family, "rule", "add", "priority", "100", "to", address, "uidrange", "1-4294967294", "prohibit"
        )
        if code and family == "-4":
            status.warn(f"users of this node can read the key from the metadata service: ip rule says {said}")


# --- Slurm -----------------------------------------------------------------------------------------------------------

MUNGE_LOG = ROOT + "/var/log/munge/munged.log"
MUNGE_LIFETIME = 300  # seconds that a credential is good for (munged's default), so that clocks may differ by
SYNCHRONISED = ROOT + "/run/systemd/timesync/synchronized"  # made by systemd-timesyncd
CLOCKS = "the clocks of this node and of the controller differ by more than five minutes"
AUTHENTICATION = (
    # What scontrol, slurmd or munge says; what it means; what to do.
    ("Rewound credential", CLOCKS, "clock"),
    ("Expired credential", CLOCKS, "clock"),
    ("Invalid credential", "the controller's key is not this node's key", "key"),
    ("Protocol authentication error", "the controller refuses this node's key", "key"),
    ("authentication error", "the controller refuses this node's key", "key"),
    ("Unauthorized credential", "the controller refuses this node's key", "key"),
    ("Zero Bytes were transmitted", "the controller ends the connection: it may refuse this node's key", "key"),
    ("Failed to access \"/run/munge", "munge does not run on this node", "munge"),
    ("Incompatible versions", "the Slurm versions of this node and the controller do not fit", "version"),
    ("Unable to contact slurm controller", "Slurm's controller does not answer", "controller"),
    ("Connection refused", "Slurm's controller does not answer", "controller"),
    ("timed out", "Slurm's controller does not answer", "controller"),
    ("did not answer", "Slurm's controller does not answer", "controller"),
)  # fmt: skip


def answer_was_readable() -> bool:
    """Return if munge could read the controller's refusal: then the keys are the same, and the clocks differ.

    Slurm itself says the same in both cases. munge's log has a line only where the refusal, which is written for nobody
    in particular, could be decoded ("Unauthorized credential for client"); the time is checked after that.
    """
    log = (read(MUNGE_LOG, 1 << 24) or b"")[-4096:].rpartition(b"Created socket")[2]
    return any(text in log for text in (b"Unauthorized credential", b"Expired credential", b"Rewound credential"))


def trouble(said: str, key: str) -> Wait | None:
    """Return what is wrong, by what Slurm and munge say, and what to do."""
    what, kind = next(((what, kind) for text, what, kind in AUTHENTICATION if text.lower() in said.lower()), ("", ""))
    if not kind:
        return None
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if kind == "key" and (answer_was_readable() or abs(clock_off) > MUNGE_LIFETIME):
        what, kind = CLOCKS, "clock"
    elif kind == "key" and not os.path.exists(SYNCHRONISED):
        # Slurm says the same of both.
        what += ": either the key is another one, or this node's clock is off"
        kind = "key or clock"
    hints = {
        "clock": f"this node's clock says {clock}; compare date -u on both sides, and see timedatectl for NTP",
        "key or clock": (
            f"compare sha256sum {key} on both sides; this node's clock says {clock}, not set by NTP (timedatectl)"
        ),
        "key": f"compare sha256sum {key} on both sides",
        "munge": "journalctl -u munge",
        "version": "slurmd -V here, slurmctld -V there: the controller must not be the older one",
        "controller": "does slurmctld run, and does its port let this node in?",
    }
    return (NoAnswer if kind == "controller" else Wait)(what, hints[kind])


class Shown:
    """A node as the controller shows it (scontrol show node)."""

    def __init__(self, text: str) -> None:
        import re

        self.values = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", text))
        reason = re.search(r"(?m)^\s*Reason=(.*?)(?: \[(\S+?)@[^\]]*\])?\s*$", text)
        self.reason, self.by = (reason[1], reason[2] or "somebody") if reason else ("", "")
        base, *flags = self.values.get("State", "UNKNOWN").split("+")
        self.base = base.rstrip("*~#!%$@^-")
        self.flags = {flag.rstrip("*~#!%$@^-") for flag in flags}
        self.responds = "*" not in self.values.get("State", "*") and "NOT_RESPONDING" not in self.flags

    @property
    def started(self) -> str:
        """When its slurmd started, in seconds since 1970 by the node's clock; empty if it never registered."""
        found = str(self.values.get("SlurmdStartTime", ""))
        return found if found.isdigit() else ""

    @property
    def address(self) -> str:
        """Where the controller reaches it."""
        return str(self.values.get("NodeAddr", ""))

    @property
    def drained(self) -> bool:
        """True if it takes no jobs because somebody said so."""
        return bool(self.flags & {"DRAIN", "FAIL"}) or self.base in {"DRAINED", "DRAINING", "FAIL", "FAILING"}

    @property
    def busy(self) -> bool:
        """True if jobs are on it."""
        busy = {"ALLOCATED", "MIXED", "COMPLETING"}
        return self.values.get("CPUAlloc", "0") != "0" or bool(busy & {self.base, *self.flags})


class Slurm:
    """A node of a Slurm cluster: dynamic (slurmd -Z) and without configuration files of its own."""

    def __init__(self, config: Config, node: str) -> None:
        self.config, self.node = config, node
        self.key = Key(config.authentication)
        self.controllers = ",".join(written(*address) for address in config.controllers)
        self.restarted = float("-inf")

    def environment_file(self) -> bytes:
        """Return what slurmd's unit reads. Each value reaches slurmd as one word (systemd.service(5), ${...})."""
        wanted = ["Feature=" + ",".join(["bakehouse", *self.config.features])]
        wanted += [f"{key}={value}" for key, value in self.config.hardware.items()]
        lines = {
            "BAKEHOUSE_NODE": self.node,
            "BAKEHOUSE_CONTROLLERS": self.controllers,
            "BAKEHOUSE_CONF": " ".join(wanted),
        }
        return "".join(f'{key}="{value}"\n' for key, value in lines.items()).encode()

    def scontrol(self, *words: str) -> tuple[int, str]:
        """Ask the controller."""
        how = {"SLURM_CONF": FETCHED} if os.path.exists(FETCHED) else {"SLURM_CONF_SERVER": self.controllers}
        return run("scontrol", *words, environment={"SLURM_TIME_FORMAT": "%s", **how})

    def show(self) -> Shown | None:
        """Return the node as the controller knows it, or None if it does not know it.

        Raises:
            Wait: the controller does not answer or does not take our word.
        """
        code, said = self.scontrol("show", "node", self.node)
        if f"NodeName={self.node}" in said:
            return Shown(said)
        if "not found" in said or "Invalid node name" in said:
            return None
        raise trouble(said, self.key.path) or Wait(f"scontrol says: {last_line(said) or code}")

    def munge(self) -> None:
        """Start munge, once its key is there; again if the key has changed since.

        Raises:
            Wait: it does not start.
        """
        if not self.key.munge:
            return
        if munge_runs() and (read(RUN + "/munge-key") or b"").decode() == signature(self.key.path):
            return
        write_run("munge-key", signature(self.key.path))
        run("systemctl", "restart", "--no-block", "munge.service")
        for _ in range(100):
            time.sleep(0.02)
            if munge_runs():
                return
        raise Wait("munge to start", "journalctl -u munge")

    def pid(self) -> int:
        """Return the process number of slurmd, 0 if it does not run."""
        _, said = run("systemctl", "show", "--property=MainPID", "--value", "slurmd.service")
        return int(said) if said.strip().isdigit() else 0

    def start(self, address: str) -> None:
        """Start slurmd unless it runs with what is wanted.

        Raises:
            Wait: another node with this name is alive.
        """
        wanted, state = self.environment_file(), f"{address} {signature(self.key.path)}"
        unchanged = read(RUN + "/slurmd.env") == wanted and (read(RUN + "/slurmd-state") or b"").decode() == state
        if unchanged and monotonic() - self.restarted < QUIET:
            return  # asking systemd each time would take the time that slurmd needs
        running = bool(self.pid())
        if unchanged and running:
            return
        before = ""
        if self.key.munge or running:  # Slurm's own authentication answers only beside a running slurmd
            before = self.make_room(address, running)
        write_run("slurmd.env", wanted.decode())
        self.restart(before, "restart" if running else "start")
        write_run("slurmd-state", state)

    def restart(self, before: str, verb: str = "restart") -> None:
        """Start slurmd anew. Jobs survive that: their steps are processes of their own (KillMode=process)."""
        write_run("before", f"{before} {time.time():.0f}")
        # slurmd's start ends only when it has registered: do not wait for that.
        code, said = run("systemctl", verb, "--no-block", "slurmd.service")
        if code:
            raise Wait(f"slurmd cannot be started: {last_line(said)}", "systemctl status slurmd")
        self.restarted = monotonic()

    def make_room(self, address: str, running: bool) -> str:
        """Remove a node of this name that was here before and is not what we are. Returns its slurmd's start time.

        Raises:
            Wait: it is alive elsewhere.
        """
        shown = self.show()
        if shown is None:
            return ""
        elsewhere = shown.address not in {address, self.node, ""} and resolves_to(shown.address) != address
        if running and self.is_ours(shown):
            elsewhere = False  # it is this node, which had another address or other features until now
        if elsewhere and shown.responds and shown.base not in {"DOWN", "FUTURE", "UNKNOWN"}:
            port = shown.values.get("Port", "6818")
            if shown.busy or answers(shown.address, int(port) if port.isdigit() else 6818):
                raise Wait(
                    f"a node named {self.node} is alive at {shown.address}",
                    f"give one of them another name, or run bakehouse-agent leave at {shown.address}",
                )
        replaceable = "DYNAMIC_NORM" in shown.flags and not shown.drained and (elsewhere or not shown.busy)
        if replaceable and (elsewhere or self.differs(shown)):
            self.forget()
        return shown.started

    def differs(self, shown: Shown) -> bool:
        """True if the controller remembers other features or hardware than ours: it would go on doing so."""
        known = shown.values.get("AvailableFeatures", "")
        if set(known.split(",")) != {"bakehouse", *self.config.features}:
            return True
        names = {"CPUs": "CPUTot", "SocketsPerBoard": "Sockets"}
        return any(
            shown.values.get(names.get(key, key), value) != value
            for key, value in self.config.hardware.items()
            if key != "Gres"
        )

    def forget(self) -> None:
        """Make the controller forget the node."""
        self.scontrol("update", f"nodename={self.node}", "state=down", f"reason={OUR_REASON}replaced")
        self.scontrol("delete", f"nodename={self.node}")

    def registered(self, joined: bool) -> Shown:
        """Return the node as the controller shows it, once that is this boot's slurmd.

        An old registration looks like a good one for minutes, so the time of slurmd's start is compared.

        Raises:
            Wait: it has not registered.
        """
        if monotonic() - self.restarted < 5 and not os.path.exists(FETCHED):  # noqa: PLR2004
            raise Soon("slurmd to register")  # it begins by writing that file: no need to ask yet
        try:
            shown = self.show()
        except Wait as wait:
            # Slurm's own authentication needs a socket that slurmd has just begun to make.
            raise Soon("slurmd to register") if monotonic() - self.restarted < QUIET else wait from None
        if shown is None or not self.is_ours(shown):
            if monotonic() - self.restarted > 60 and shown is None and joined:  # noqa: PLR2004
                self.restart("")  # a controller that lost its state does not ask for us
            raise self.why_not()
        return shown

    def is_ours(self, shown: Shown) -> bool:
        """True if this is the registration of the slurmd that runs now, not one from before."""
        before, _, since = (read(RUN + "/before") or b"").decode().partition(" ")
        if not shown.started:
            return False
        if before:
            return shown.started != before or abs(int(shown.started) - int(since or 0)) <= 1
        return int(shown.started) >= int(since or 0) - 2

    def why_not(self) -> Wait:
        """Say why slurmd has not registered, by its last words."""
        if monotonic() - self.restarted < QUIET:
            return Soon("slurmd to register")
        _, said = run("journalctl", "--unit=slurmd", "--unit=munge", "--lines=20", "--output=cat", "--since=-2min")
        return trouble(said, self.key.path) or Wait("slurmd to register", "journalctl -u slurmd")

    def idle(self, shown: Shown) -> None:
        """Return when the controller would give the node jobs.

        Raises:
            Wait: it would not.
        """
        resumable = shown.reason.startswith(OUR_REASON) or any(
            text in shown.reason.lower() for text in ("not responding", "unexpectedly rebooted")
        )
        if "INVALID_REG" in shown.flags or shown.base == "INVAL":
            raise Wait(
                f"the controller finds this node's hardware wrong: {shown.reason}",
                "correct slurm.hardware in join.yaml, or leave it out to have it detected",
            )
        if (shown.drained or shown.base == "DOWN") and resumable:
            self.scontrol("update", f"nodename={self.node}", "state=resume")
            raise Wait("the controller to resume this node")
        if shown.drained:
            raise Wait(
                f"registered, but drained by {shown.by}: {shown.reason or 'no reason given'}",
                f"scontrol update nodename={self.node} state=resume",
            )
        if shown.base == "DOWN":
            raise Wait(f"registered, but down: {shown.reason}", f"scontrol update nodename={self.node} state=resume")
        if not shown.responds:
            raise Wait(
                "the controller to reach this node", "does this node's slurmd port (6818) let the controller in?"
            )
        if shown.base not in {"IDLE", "MIXED", "ALLOCATED", "COMPLETING"}:
            raise Wait(f"registered, but {shown.values.get('State')}")


def written(host: str, port: int) -> str:
    """Return host and port as people write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_run(name: str, text: str) -> None:
    """Write a file that is good until the next boot."""
    folder(RUN)
    write(f"{RUN}/{name}", text.encode())


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return plain(lines[-1], 200) if lines else ""


def munge_runs() -> bool:
    """Return if munged runs and has its socket. Connecting to it would leave a line in its log each time."""
    pid = (read(ROOT + "/run/munge/munged.pid") or b"").strip()
    return (
        pid.isdigit()
        and (read(f"{ROOT}/proc/{pid.decode()}/comm") or b"").strip() == b"munged"
        and os.path.exists(ROOT + "/run/munge/munge.socket.2")
    )


def answers(host: str, port: int) -> bool:
    """True if something listens there."""
    import socket

    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def resolves_to(host: str) -> str:
    """Return the first address of a name, or an empty text."""
    import socket

    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def reach(controllers: list[tuple[str, int]]) -> tuple[str, str]:
    """Connect to the first controller that answers; return its address and ours.

    Raises:
        Wait: none does. The sentence is about the first one.
    """
    import socket

    trouble: Wait | None = None
    for host, port in controllers:
        try:
            connection: socket.socket = socket.create_connection((host, port), 3)
        except OSError as error:
            trouble = trouble or Wait(*no_connection(f"the controller at {written(host, port)}", error))
            continue
        with connection:
            return written(*connection.getpeername()[:2]), str(connection.getsockname()[0])
    raise trouble or Wait("a controller")


def own_address(controller: str) -> str:
    """Return the address from which this node would talk to the controller, without sending anything."""
    import socket

    host, _, port = controller.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


# --- Join ------------------------------------------------------------------------------------------------------------


class Join:
    """The passes of one agent."""

    def __init__(self, path: str, status: Status) -> None:
        self.path, self.status = path, status
        self.name = NodeName()
        self.config: Config | None = None
        self.loaded = ""
        self.slurm: Slurm | None = None
        self.joined = False
        self.blocked = False  # users from the metadata service, in this run

    def changed(self) -> bool:
        """True if join.yaml is not the file that was read."""
        return bool(self.loaded) and signature(self.path) not in {self.loaded, ""}

    def settles(self, deadline: float) -> bool:
        """True if the configuration changes within a moment: it was read while somebody wrote it."""
        try:
            pause(BEING_WRITTEN, self.changed, deadline)
        except TimedOut:
            return False
        return self.changed()

    def once(self) -> None:
        """Look at each level and do what is missing. Returns when the node is a member.

        Raises:
            Wait: a level is not reached.
            Hopeless: it cannot be.
        """
        status = self.status.data
        if self.config is None or self.changed():
            self.loaded, self.config, self.slurm = signature(self.path), None, None
            self.config, _ = load(self.path)
            status.update(platform=self.config.platform, controller="", faults=[])
            self.status.moment("configured", f"{self.config.platform} {self.path}", again=True)
        config = self.config
        if self.slurm is None:
            status["node"] = self.name.find(config)
            if config.broker and config.broker.token:
                self.reach(config)
            self.status.moment("secret", place_secret(config, self.path, status["node"]))
            self.loaded = signature(self.path)
            self.slurm = Slurm(config, status["node"])
        if not os.path.exists(self.slurm.key.path):
            self.slurm = None
            raise Wait("the key has gone", "")
        if not status["controller"]:
            self.reach(config)
        self.services(self.slurm)

    def reach(self, config: Config) -> None:
        """Find a controller that answers."""
        status = self.status.data
        status["controller"], status["address"] = reach(config.controllers)
        self.status.moment("network", status["address"])

    def services(self, slurm: Slurm) -> None:
        """Start what Slurm needs and wait for the controller's word."""
        status = self.status.data
        self.status.moment("controller", status["controller"])
        if not self.blocked or self.joined:
            self.blocked = True
            if source().get("source") == "inline":
                block_metadata(self.status)
        try:
            slurm.munge()
            slurm.start(status["address"])
            self.status.moment("services", "munge slurmd" if slurm.key.munge else "slurmd")
            shown = slurm.registered(self.joined)
        except NoAnswer:
            status["controller"] = ""  # begin there again
            raise
        self.status.moment("registered", shown.values.get("State", ""))
        if not self.joined:
            slurm.idle(shown)

    def arrive(self) -> None:
        """The node is a member: say so, once, and clean up behind us."""
        if not self.joined:
            self.joined = True
            data = self.status.data
            self.status.moment("joined", f"{data['node']} at {data['controller']}", again=True)
        self.status.settled("joined")
        notify("READY=1")

    def clean(self) -> None:
        """Remove the copies of the secret that cloud-init keeps."""
        if self.slurm and source():
            scrub([read(self.slurm.key.path) or b""])


def jitter() -> float:
    """Return a random number from 0 to 1. The module random takes 10 ms to import."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def back_off(attempt: int) -> float:
    """Return the seconds to wait after so many attempts: quick at first, then full jitter up to a cap."""
    if attempt <= QUICK:
        return 0.15 + 0.2 * jitter()
    return max(0.25, jitter() * min(LONGEST_WAIT, 2.0 ** min(attempt - QUICK, 10)))


def pause(seconds: float, changed: Callable[[], bool], deadline: float) -> None:
    """Sleep, but not past a change of the configuration."""
    end = monotonic() + seconds
    while (left := end - monotonic()) > 0:
        if monotonic() > deadline:
            raise TimedOut
        if changed():
            return
        time.sleep(min(0.5, left))


class Alarm:
    """Sleeps until an address or the configuration changes.

    The agent stays, asleep: it hears of new addresses from the kernel (rtnetlink(7)) and of a new configuration by
    dnotify (fcntl(2), F_NOTIFY), without waking up a compute node every few seconds. Leaving this to timers and path
    units would cost a start of Python each time, and a path unit cannot restart a service that waits. What happens
    while the agent works is kept for its next sleep.
    """

    def __init__(self) -> None:
        import fcntl
        import signal
        import socket

        self.reader, self.writer = socket.socketpair()
        self.kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self.longest = WATCH
        for end in (self.reader, self.writer, self.kernel):
            end.setblocking(False)
        signal.signal(signal.SIGIO, lambda *_: None)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.folder = os.open(os.path.dirname(CONFIG), os.O_RDONLY | os.O_DIRECTORY)
        events = fcntl.DN_MODIFY | fcntl.DN_CREATE | fcntl.DN_RENAME | fcntl.DN_MULTISHOT
        try:
            fcntl.fcntl(self.folder, fcntl.F_NOTIFY, events)
            self.kernel.bind((0, 0x10 | 0x100))  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
        except OSError:
            self.longest = 10.0  # no such help here: look more often

    def sleep(self) -> None:
        """Sleep, at most for about ``longest`` seconds. Returns a moment after a change, when it is complete."""
        import select

        if select.select([self.reader, self.kernel], [], [], self.longest * (0.75 + jitter() / 2))[0]:
            time.sleep(0.2)
        for end in (self.reader, self.kernel):
            try:
                while end.recv(65536):
                    pass
            except OSError:
                pass  # all is read, or the kernel had more to say than fitted


def locked(wait: bool = False) -> int | None:
    """Take the lock that one agent holds; None if another has it."""
    import fcntl

    folder(RUN)
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def join(path: str = CONFIG, boot: bool = False, timeout: float = float("inf")) -> int:
    """Join, and with ``boot`` stay to keep the node joined. Returns the exit status."""
    deadline = monotonic() + timeout
    if locked() is None:
        return follow(deadline)
    status = Status(console=boot)
    if boot and os.path.exists(LEFT):
        status.say("left", "bakehouse-agent join makes it join again")
        status.settled("left", hint="bakehouse-agent join makes it join again")
        notify("READY=1")
        return DONE
    if not boot:
        remove(LEFT)
    status.moment("started", f"pid {os.getpid()}")
    code = keep_joining(Join(path, status), boot, deadline)
    if code == DONE and not boot and not ROOT:
        run("systemctl", "start", "--no-block", "bakehouse-agent.service")  # which keeps it joined
    return code


def keep_joining(work: Join, boot: bool, deadline: float) -> int:
    """Make passes until the node is a member; with ``boot`` for ever."""
    attempt, waited_for = 0, ""
    alarm: Alarm | None = None
    while True:
        try:
            work.once()
            first = not work.joined
            work.arrive()
            if first:
                work.clean()
            if not boot:
                return DONE
            attempt, waited_for = 0, ""
            alarm = alarm or Alarm()
            if not work.changed():
                alarm.sleep()
            look_around(work)
            continue
        except Wait as error:
            wait = error
        except Hopeless as error:
            if work.settles(deadline):
                continue
            work.status.data["faults"] = error.faults
            work.status.say("failed", "; ".join(error.faults))
            work.status.settled("failed", error.faults[0], error.hint)
            return error.status
        except OSError as error:
            wait = Wait(*disk_trouble(error))
        attempt = attempt + 1 if wait.what == waited_for else 1
        waited_for = wait.what
        delay = wait.pace or back_off(attempt)
        work.status.waiting(wait, attempt, delay)
        try:
            pause(delay, work.changed, deadline)
        except TimedOut:
            return NOT_YET


def look_around(work: Join) -> None:
    """After a wake-up: has the address towards the controller changed?"""
    data = work.status.data
    address = own_address(data["controller"]) if data["controller"] else ""
    if address and data["address"] and address != data["address"]:
        work.status.say("network", f"the address changed from {data['address']} to {address}")
        data["address"] = address
        work.joined = False


def disk_trouble(error: OSError) -> tuple[str, str]:
    """Say in plain words why a file cannot be written."""
    name = str(error.filename or "a file").removesuffix(".new")
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk is full: {name} cannot be written", "df -h; df -i"
    if error.errno == errno.EROFS:
        return f"the disk is read-only: {name} cannot be written", "journalctl -k; findmnt /"
    return f"{name}: {error.strerror or error}", ""


def follow(deadline: float) -> int:
    """Another agent is at work: say what it is at until it is done."""
    said = ""
    while True:
        status = read_status() or {}
        line = sentence(status)
        if line != said:
            print(line, flush=True)  # noqa: T201
            said = line
        if status.get("state") == "joined":
            return DONE
        if status.get("state") == "failed":
            return INVALID
        if monotonic() > deadline:
            return NOT_YET
        time.sleep(0.2)


# --- Leave -----------------------------------------------------------------------------------------------------------


def leave(path: str = CONFIG, now: bool = False, timeout: float = float("inf"), keep: bool = False) -> int:
    """Drain the node, wait for its jobs, stop its services and make the controller forget it."""
    status = Status()
    config, _ = load(path)
    node = str((read_status() or {}).get("node") or config.name or NodeName().find(config))
    status.data.update(platform=config.platform, node=node)
    slurm = Slurm(config, node)
    folder(STATE)
    write(LEFT, b"bakehouse-agent leave was called; bakehouse-agent join undoes it\n", 0o644)
    run("systemctl", "stop", "bakehouse-agent.service", timeout=60)
    lock = locked(wait=True)
    assert lock is not None
    try:
        gone = drain(slurm, status, now, monotonic() + timeout)
        if gone is None:
            return NOT_YET
    except Wait as wait:
        gone = False
        status.warn(wait.what)
    if gone and not keep:
        slurm.forget()
    run("systemctl", "stop", "slurmd.service", timeout=60)
    run("systemctl", "stop", "munge.service", timeout=60)
    remove(RUN + "/munge-key")
    hint = "bakehouse-agent join makes it join again"
    if not gone:
        hint = f"the controller was not told: run scontrol delete nodename={node} there"
    status.moment("left", node)
    status.settled("left", hint=hint)
    print(f"{node} has left" + ("" if gone else f"; but {hint}"))  # noqa: T201
    return DONE if gone else NOT_YET


def drain(slurm: Slurm, status: Status, now: bool, deadline: float) -> bool | None:
    """Drain the node until no job is on it. True when it is done, None if that took too long.

    Raises:
        Wait: the controller does not answer.
    """
    reach(slurm.config.controllers)
    if slurm.show() is None:
        return True
    slurm.scontrol("update", f"nodename={slurm.node}", "state=drain", f"reason={OUR_REASON}leaving")
    attempt = 0
    while not now and (shown := slurm.show()) is not None and shown.busy:
        attempt += 1
        left = Wait("jobs on this node to end", "bakehouse-agent leave --now does not wait for them")
        status.waiting(left, attempt, 2)
        if monotonic() > deadline:
            print(f"{slurm.node} is drained, but jobs still run on it: leave again later, or leave --now")  # noqa: T201
            return None
        time.sleep(2)
    return True


# --- Command line ----------------------------------------------------------------------------------------------------


def read_status() -> dict[str, Any] | None:
    """Return what the status file says."""
    import json

    try:
        found = json.loads(read(STATUS) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def sentence(status: dict[str, Any]) -> str:
    """Say in one line what the agent is at."""
    state = status.get("state", "starting")
    if state == "waiting":
        return f"waiting for: {status['waiting_for']}" + (f" ({status['hint']})" if status.get("hint") else "")
    if state == "failed":
        return f"failed: {'; '.join(status.get('faults') or [status.get('waiting_for', '')])}"
    return f"{state}: {status.get('node', '')} {status.get('controller', '')}".rstrip(": ")


def show_status(as_json: bool, wait: float) -> int:
    """Print the status; wait for a join so many seconds."""
    import json

    deadline = monotonic() + wait
    status = read_status()
    while (status is None or status.get("state") != "joined") and monotonic() < deadline:
        time.sleep(0.2)
        status = read_status()
    if as_json:
        print(json.dumps(status or {"state": "never ran"}, indent=2))  # noqa: T201
    elif status is None:
        print("the agent has not run since this machine started")  # noqa: T201
    else:
        print("\n".join(status_lines(status)))  # noqa: T201
    if status is None:
        return NEVER_RAN
    return DONE if status.get("state") == "joined" else NOT_YET


def status_lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield the status as people read it."""
    now = monotonic()
    yield f"{status['state']} for {now - status['since']:.0f} s"
    for name, key in (("node", "node"), ("address", "address"), ("controller", "controller"), ("hint", "hint")):
        if status["state"] == "waiting" and name == "hint":
            yield f"  waiting for  {status['waiting_for']}"
        if status.get(key):
            yield f"  {name:11}  {status[key]}"
    if status["state"] == "waiting":
        left = max(0.0, status["updated"] + status["next_try"] - now)
        yield f"  next try     in {left:.0f} s, tried so far: {status['attempt']}"
    for fault in status.get("faults") or []:
        yield f"  fault        {fault}"
    for warning in status.get("warnings") or []:
        yield f"  warning      {warning}"
    yield "  since the kernel started:"
    for name, when in status["timeline"]:
        yield f"    {when:9.3f} s  {name}"


HELP = """\
NAME
    bakehouse-agent - makes this machine a member of its cluster

SYNOPSIS
    bakehouse-agent join [--config FILE] [--timeout SECONDS] [--boot]
    bakehouse-agent status [--json] [--wait SECONDS]
    bakehouse-agent leave [--now] [--timeout SECONDS] [--keep] [--config FILE]
    bakehouse-agent scrub
    bakehouse-agent check [FILE]

DESCRIPTION
    join    Joins, and returns when the cluster says that the node is ready. It waits as long as it takes, or as
            --timeout says. On a node that is joined it changes nothing. --boot is for the systemd unit: it stays to
            keep the node joined, and respects an earlier leave.
    status  Says what the agent is at, what it waits for and what to do. --json prints the status file. --wait waits
            for the join first. Needs no root.
    leave   Drains the node, waits for its jobs, stops its services, and makes the controller forget it. It stays
            away, also after a reboot, until join is called. --now does not wait for jobs (they are lost), --keep
            leaves the node known to the controller.
    scrub   Overwrites the copies of the secret that cloud-init keeps. Run by a unit after each boot.
    check   Names everything that is wrong with a configuration.

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
    bakehouse-agent check join.yaml
    bakehouse-agent leave --timeout 3600
"""


def check(path: str) -> int:
    """Name all that is wrong with a configuration."""
    data = read(path, CONFIG_LIMIT + 1)
    faults = [f"there is no {path}"] if data is None else parse(data)[1]
    for fault in faults:
        print(f"{path}: {fault}", file=sys.stderr)  # noqa: T201
    if not faults:
        print(f"{path} is right")  # noqa: T201
    return INVALID if faults else DONE


def scrub_known() -> int:
    """Scrub with the key that is in its place."""
    keys = [read(Key(kind).path) or b"" for kind in ("munge", "slurm")]
    print(f"bakehouse-agent: removed copies of the secret from {scrub(keys)} files")  # noqa: T201
    return DONE


def parsed(arguments: list[str]) -> Any:
    """Return the command line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def format_help(self) -> str:
            return HELP

        def error(self, message: str) -> NoReturn:
            print(f"bakehouse-agent: {message} (see bakehouse-agent --help)", file=sys.stderr)  # noqa: T201
            sys.exit(INVALID)

    parser = Parser(prog="bakehouse-agent", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("join", "leave"):
        verb = commands.add_parser(name)
        verb.add_argument("--config", default=CONFIG)
        verb.add_argument("--timeout", type=float, default=float("inf"))
        for flag in ("--boot",) if name == "join" else ("--now", "--keep"):
            verb.add_argument(flag, action="store_true")
    status = commands.add_parser("status")
    status.add_argument("--json", action="store_true")
    status.add_argument("--wait", type=float, default=0)
    commands.add_parser("scrub")
    commands.add_parser("check").add_argument("file", nargs="?", default=CONFIG)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    os.umask(0o077)
    if not ROOT:
        os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        if arguments == ["join", "--boot"]:  # how the unit starts it: argparse would take longer than the rest
            return join(boot=True)
        return command(parsed(arguments))
    except Hopeless as error:
        said, status = "\n".join([*error.faults, error.hint]), error.status
    except Wait as error:
        said, status = f"bakehouse-agent: {error.what}", NOT_YET
    except PermissionError as error:
        said, status = f"bakehouse-agent: {error.filename}: {error.strerror}: are you root?", NOT_YET
    except KeyboardInterrupt:
        return 130  # as a shell reports it
    print(said, file=sys.stderr)  # noqa: T201
    return status


def command(options: Any) -> int:
    """Run the command that a parsed command line asks for."""
    if options.command == "status":
        return show_status(options.json, options.wait)
    if options.command == "check":
        return check(options.file)
    if options.command == "scrub":
        return scrub_known()
    if options.command == "leave":
        return leave(options.config, options.now, options.timeout, options.keep)
    return join(options.config, options.boot, options.timeout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
