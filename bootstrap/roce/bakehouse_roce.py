"""Sets up RoCE v2 on a node's RDMA devices, and says for each knob how that ended.

It reads ``/etc/bakehouse/roce.yaml`` (nothing in it is required), looks at what each device is set to, changes only
what differs, and reads it back. Each knob ends as *applied*, *already right*, *not supported* (with the kernel's or
the tool's own word) or *failed* (with the word and what to do); that stands in ``/run/bakehouse/roce/DEVICE.json``.

One file, the standard library, and PyYAML where there is a configuration. Modules that a plain run does not need are
imported where they are used: Python's start is most of what a run costs.

docs/roce.md has the configuration, the knobs and their sources, the switch's side, and what the report means.
"""

# pathlib, contextlib and dataclasses cost more to import than all that they would do here:
# ruff: noqa: PTH102, PTH103, PTH104, PTH108, PTH110, PTH112, PTH116, PTH119, PTH120, PTH123, PTH208, SIM105, T201

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# Tests move every path below another folder; programs then come from the caller's PATH.
ROOT = os.environ.get("BAKEHOUSE_ROOT", "")
CONFIG = ROOT + "/etc/bakehouse/roce.yaml"
RESULTS = ROOT + "/run/bakehouse/roce"
INFINIBAND = ROOT + "/sys/class/infiniband"
NET = ROOT + "/sys/class/net"
RDMA_CM = ROOT + "/sys/kernel/config/rdma_cm"
DEBUGFS = ROOT + "/sys/kernel/debug"
SYSCTL = ROOT + "/proc/sys"
CPUFREQ = ROOT + "/sys/devices/system/cpu/cpufreq"
LIMITS = ROOT + "/etc/security"

DONE, FAILED_KNOBS, CONFIG_WRONG = 0, 1, 2  # exit statuses
APPLIED, RIGHT, UNSUPPORTED, FAILED = "applied", "already right", "not supported", "failed"
STATES = (APPLIED, RIGHT, UNSUPPORTED, FAILED)

ECT_0 = 2  # ECN-capable transport: RFC 3168, section 5
PRIORITIES = 8  # and as many traffic classes: IEEE 802.1Q; linux/dcbnl.h, IEEE_8021QAZ_MAX_TCS
PATH_MTUS = (4096, 2048, 1024, 512, 256)  # bytes: InfiniBand's payload sizes (ibv_query_port(3), active_mtu)
HEADERS = 96  # bytes that the kernel takes off an interface's MTU first: iboe_get_mtu() in include/rdma/ib_addr.h
EMPTY_GIDS = 8  # in a row: the table has no more
CONFIG_LIMIT = 64 * 1024  # bytes
TIMEOUT = 30.0  # seconds that a program may take
NOT_THERE, TOO_LONG = 127, 124  # exit statuses of a program, as shells and timeout(1) have them
OF_A_MACHINE = "machine"


class NotSupported(Exception):  # noqa: N818 (not an error: what a device says)
    """The device, the kernel or the tool has no such knob; in its own word."""

    def __init__(self, word: str, actual: str = "") -> None:
        super().__init__(word)
        self.word, self.actual = plain(word), actual


class Trouble(Exception):  # noqa: N818
    """A knob could not be read or set: the word, and what to do."""

    def __init__(self, word: str, hint: str = "", actual: str = "") -> None:
        super().__init__(word)
        self.word, self.hint, self.actual = plain(word), hint, actual


class ConfigWrong(Exception):  # noqa: N818
    """Somebody has to change the configuration. Holds all that is wrong with it."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = [plain(fault) for fault in faults]


def plain(text: str, limit: int = 300) -> str:
    """Return text that is safe on a console and in a log: one line, printable ASCII, no longer than ``limit``."""
    return " ".join("".join(c if " " <= c <= "~" else " " for c in text).split())[:limit]


# --- Files and programs ----------------------------------------------------------------------------------------------


def peek(path: str) -> str:
    """Return what a file of the kernel holds. OSError where it is not there or the kernel does not say."""
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read(1 << 16).strip()


def peek_or(path: str, otherwise: str = "") -> str:
    """Return what a file holds, or something else where it cannot be read."""
    try:
        return peek(path)
    except OSError:
        return otherwise


def poke(path: str, text: str) -> None:
    """Write to a file of the kernel."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def names_in(path: str) -> list[str]:
    """Return the names in a folder, in order; none where it is not there."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def replace(path: str, text: str) -> None:
    """Replace a file as a whole: readers see the old or the new one."""
    with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o644)
    os.rename(path + ".new", path)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def run(*command: str, given: str = "") -> tuple[int, str, str]:
    """Run a program. Return its exit status and both its outputs; 127 if it is not there, 124 if it took too long.

    subprocess would do, but importing it takes longer than most of these programs.
    """
    import select
    import signal
    from time import monotonic

    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    stdin = os.memfd_create("stdin")
    os.write(stdin, given.encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate((stdin, out_end, err_end))]
    how: dict[str, Any] = {"file_actions": actions, "setpgroup": 0, "setsigdef": [signal.SIGPIPE]}
    try:
        process = os.posix_spawnp(command[0], command, {**os.environ, "LC_ALL": "C"}, **how)
    except OSError as error:
        close(out, err)
        return NOT_THERE, "", f"{command[0]}: {error.strerror}"
    finally:
        close(stdin, out_end, err_end)
    said, deadline = {out: b"", err: b""}, monotonic() + TIMEOUT
    waiting = [out, err]
    while waiting:
        ready = select.select(waiting, [], [], max(0.0, deadline - monotonic()))[0]
        if not ready:
            os.killpg(process, signal.SIGKILL)
            break
        for pipe in ready:
            part = os.read(pipe, 65536)
            said[pipe] += part
            if not part:
                waiting.remove(pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    close(out, err)
    if waiting:
        return TOO_LONG, "", f"{command[0]} did not answer within {TIMEOUT:.0f} s"
    return code, said[out].decode(errors="replace"), said[err].decode(errors="replace")


def close(*descriptors: int) -> None:
    """Close files."""
    for descriptor in descriptors:
        os.close(descriptor)


def objects_in(text: str) -> list[Any]:
    """Return the JSON values that stand one after the other in a text, with or without commas between.

    iproute2's tools print one object a command, and several in batch mode (json_writer.c there).
    """
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at] in " \t\r\n,":
            at += 1
            continue
        value, at = decoder.raw_decode(text, at)
        found.append(value)
    return found


MISSING_KNOB = (
    # What says that there is no such knob. "Attribute not found" is dcb's word where a driver has some of the interface
    # but not this of it (__dcb_get_attribute() in iproute2's dcb.c), "is unknown" that of a tool from before the knob.
    "Operation not supported", "Attribute not found", "Function not implemented", "is unknown",
)  # fmt: skip
HINTS = (
    ("Operation not permitted", "the NIC's firmware keeps this to itself (its LLDP or DCBX agent): see docs/roce.md"),
    ("Invalid argument", "the driver refuses the value, or its firmware is in charge of DCBX: see dcbx, dmesg"),
    ("Permission denied", "are you root?"),
    ("did not answer", "dmesg: does the driver or its firmware hang?"),
)


def refusal(word: str, hint: str = "") -> NotSupported | Trouble:
    """Return what the word of a program or of the kernel means."""
    if any(part in word for part in MISSING_KNOB):
        return NotSupported(word)
    return Trouble(word, hint or next((hint for part, hint in HINTS if part in word), "see dmesg"))


def refused(path: str, error: OSError) -> NotSupported | Trouble:
    """Return what it means that a file of the kernel could not be read or written."""
    import errno

    word = f"{error.strerror or error}: {path.removeprefix(ROOT)}"
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NotSupported(word)
    return refusal(word)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# --- Configuration ---------------------------------------------------------------------------------------------------

# net.ipv4.neigh.default.gc_thresh1..3: Documentation/networking/ip-sysctl.rst. The kernel's 128, 512 and 1024 are less
# than a large cluster has nodes, and a full table ends connections; these are lower bounds. IPv6 has its own table.
# vm.zone_reclaim_mode: Documentation/admin-guide/sysctl/vm.rst (memory of another node beats reclaiming; the default).
# net.ipv4.tcp_ecn: ip-sysctl.rst; 1 asks for ECN on outgoing connections too, so that TCP beside RoCE also slows down
# where the switch marks.
SYSCTLS = {
    **{f"net.{family}.neigh.default.gc_thresh1": 4096 for family in ("ipv4", "ipv6")},
    **{f"net.{family}.neigh.default.gc_thresh2": 8192 for family in ("ipv4", "ipv6")},
    **{f"net.{family}.neigh.default.gc_thresh3": 16384 for family in ("ipv4", "ipv6")},
    "vm.zone_reclaim_mode": 0,
    "net.ipv4.tcp_ecn": 1,
}
MODES = ("RoCE v2", "IB/RoCE v1")  # Documentation/ABI/testing/configfs-rdma_cm


class Settings:
    """What roce.yaml says, and for the rest the defaults. Each has its source beside it."""

    # AF31 (RFC 2597), one of 24 to 31, which NICs and switches map to priority 3 where nobody says otherwise.
    dscp = 26
    # Cumulus Linux, "Default RoCE Configuration"; NVIDIA Onyx, "RoCE Commands". IEEE 802.1Q has 0 to 7.
    priority = 3
    # RFC 3168; RoCE v2's congestion control (DCQCN) lives by it.
    ecn = True
    # Documentation/ABI/testing/configfs-rdma_cm; v1 has no IP header: no DSCP, no routers.
    mode = "RoCE v2"
    # Bytes: room for a path MTU of 4096 (include/rdma/ib_addr.h), and what is called a jumbo frame.
    mtu = 9000
    # Priority-based flow control: IEEE 802.1Qbb, now IEEE 802.1Q, clause 36.
    pfc = True
    # The same: PFC is in place of 802.3's PAUSE, which stops all priorities.
    pause_off = True
    # man dcb-apptrust; frames have a VLAN tag with a priority only where somebody has made a VLAN.
    trust = "dscp"
    # IEEE 802.1Q, ETS (802.1Qaz). 50/50 is the default of RoCE on Cumulus Linux ("Default RoCE Configuration").
    # Class 1: some drivers want classes without gaps (Intel's ice), and some NICs have no more than two.
    ets: dict[str, int] | None = {"share": 50, "traffic_class": 1}  # noqa: RUF012 (never changed)
    # man dcb-buffer; drivers size the room for what is on the way by cable and MTU, and a buffer of no size is refused.
    buffers: dict[str, dict[int, int]] | None = None
    # man dcb-dcbx: what is set here stays, and is not replaced by what a switch offers.
    dcbx = "host"
    # Documentation/admin-guide/pm/cpufreq.rst
    governor = "performance"
    # ibv_reg_mr(3): registered memory is locked memory; limits.conf(5), systemd-system.conf(5).
    memlock = True
    vendor_tools = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sysctl: dict[str, int] | None = dict(SYSCTLS)

    @property
    def tos(self) -> int:
        """The IP header's second byte: DSCP in the upper six bits (RFC 2474), ECN in the lower two (RFC 3168)."""
        return self.dscp << 2 | (ECT_0 if self.ecn else 0)

    @property
    def path_mtu(self) -> int:
        """Bytes of payload that an RDMA packet has on an interface with the wanted MTU."""
        return next((size for size in PATH_MTUS if self.mtu - HEADERS >= size), 0)

    def wants(self, device: str) -> bool:
        """True for a device that is to be set up."""
        if self.include == ("*",) and not self.exclude:
            return True
        from fnmatch import fnmatchcase

        named = any(fnmatchcase(device, pattern) for pattern in self.include)
        return named and not any(fnmatchcase(device, pattern) for pattern in self.exclude)


def number(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    """Return the rule of a whole number."""
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def one_of(*words: str) -> tuple[Callable[[Any], bool], str]:
    """Return the rule of a word."""
    return lambda value: value in words, " or ".join(words)


def numbers(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    """Return the rule of a mapping from 0..7 to numbers."""
    return (
        lambda value: isinstance(value, dict) and value != {} and all(
            type(key) is int and 0 <= key < PRIORITIES and type(entry) is int and low <= entry <= high
            for key, entry in value.items()
        ),
        f"a mapping from numbers 0 to 7 to numbers from {low} to {high}, such as {{3: {min(high, 1)}}}",
    )  # fmt: skip


def is_patterns(value: Any) -> bool:
    """True for a list of device names with * and ?."""
    return isinstance(value, list) and all(isinstance(each, str) and each.isprintable() and each for each in value)


SWITCH = (lambda value: type(value) is bool, "true or false")
PATTERNS = (is_patterns, "a list of device names; * and ? stand for others, such as [mlx5_*]")
SCHEMA: dict[str, Any] = {
    "dscp": number(0, 63),
    "priority": number(0, PRIORITIES - 1),
    "ecn": SWITCH,
    "mode": one_of(*MODES),
    "mtu": number(1280, 65535),
    "pfc": SWITCH,
    "pause_off": SWITCH,
    "trust": one_of("dscp", "pcp"),
    "ets": {"share": number(1, 99), "traffic_class": number(1, PRIORITIES - 1)},
    "buffers": {"prio_buffer": numbers(0, 7), "buffer_size": numbers(0, (1 << 32) - 1)},
    "dcbx": one_of("host", "leave"),
    "governor": (
        lambda value: isinstance(value, str) and value.isalpha() and value.islower(),
        "a governor such as performance",
    ),
    "memlock": SWITCH,
    "sysctl": {name: number(0, 1 << 24) for name in SYSCTLS},
    "vendor_tools": SWITCH,
    "devices": {"include": PATTERNS, "exclude": PATTERNS},
}
MAY_BE_FALSE = {"ets", "buffers", "governor", "sysctl"}  # to be left alone


def check(document: Any, rules: dict[str, Any], where: str, faults: list[str]) -> None:
    """Compare a mapping with its rules; what is not known is named, with what may have been meant."""
    if not isinstance(document, dict):
        may = "false, or " if where in MAY_BE_FALSE else ""
        faults.append(f"{where or 'the file'}: must be {may}a mapping with {', '.join(rules)}")
        return
    for key, value in document.items():
        place = f"{where}.{key}".strip(".")
        if key not in rules:
            import difflib

            meant = difflib.get_close_matches(str(key).lower(), rules, 1)
            faults.append(
                f"{place}: not known; {f'did you mean {meant[0]}?' if meant else 'one of ' + ', '.join(rules)}"
            )
            continue
        if value is None or (value is False and place in MAY_BE_FALSE):
            continue
        if isinstance(rules[key], dict):
            check(value, rules[key], place, faults)
            continue
        holds, what = rules[key]
        if not holds(value):
            may = "false, or " if place in MAY_BE_FALSE else ""
            faults.append(f"{place}: {plain(repr(value), 60)} is not {may}{what}")


def read_yaml(text: str, faults: list[str]) -> Any:
    """Return what a YAML text says; what is wrong with it goes to ``faults``."""
    if "/usr/lib/python3/dist-packages" not in sys.path:
        sys.path.append("/usr/lib/python3/dist-packages")  # the launcher starts Python without it: that is quicker
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        faults += twice(node)
        return loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not YAML: {getattr(error, 'problem', None) or error}"
        faults.append(f"line {mark.line + 1}: {what}" if mark else what)
    except (ValueError, TypeError, RecursionError) as error:
        faults.append(f"not YAML: {error}")  # a date that is none, a list as a key, a thousand levels
    finally:
        loader.dispose()
    return None


def twice(node: Any) -> Iterator[str]:
    """Yield the keys that stand twice in a mapping: YAML would take the last of them."""
    if type(node).__name__ != "MappingNode":
        return
    seen = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            yield f"line {key.start_mark.line + 1}: {plain(name, 60)} stands here a second time"
        seen.add(name)
        yield from twice(value)


def parse(text: str) -> tuple[Settings, list[str]]:
    """Read a configuration. The list says all that is wrong with it."""
    faults: list[str] = []
    if len(text) > CONFIG_LIMIT:
        return Settings(), [f"the file has more than {CONFIG_LIMIT // 1024} KiB"]
    document = read_yaml(text, faults)
    if not faults:
        document = {} if document is None else document
        check(document, SCHEMA, "", faults)
    if faults:
        return Settings(), [plain(fault) for fault in faults]
    given = {key: value for key, value in document.items() if value is not None}
    settings = Settings()
    devices = given.pop("devices", {})
    settings.include = tuple(devices.get("include") or ["*"])
    settings.exclude = tuple(devices.get("exclude") or [])
    if isinstance(given.get("ets"), dict):
        given["ets"] = {**(Settings.ets or {}), **without_none(given["ets"])}
    if isinstance(given.get("buffers"), dict):
        given["buffers"] = without_none(given["buffers"]) or None
    if isinstance(given.get("sysctl"), dict):
        given["sysctl"] = {**SYSCTLS, **without_none(given["sysctl"])}
    for key, value in given.items():
        setattr(settings, key, None if value is False and key in MAY_BE_FALSE else value)
    return settings, []


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping without what is not given."""
    return {key: value for key, value in values.items() if value is not None}


def load() -> Settings:
    """Return the configuration; the defaults where there is no file. ConfigWrong if something is wrong with it."""
    try:
        with open(CONFIG, encoding="utf-8") as file:
            text = file.read(CONFIG_LIMIT + 1)
    except FileNotFoundError:
        return Settings()
    except UnicodeDecodeError as error:
        raise ConfigWrong([f"byte {error.start}: the file is not UTF-8 text"]) from None
    except OSError as error:
        raise ConfigWrong([f"cannot be read: {error.strerror}"]) from None
    settings, faults = parse(text)
    if faults:
        raise ConfigWrong(faults)
    return settings


# --- Knobs -----------------------------------------------------------------------------------------------------------


class Knob:
    """One thing that is to have one value: how to read it, how to set it, and when it is right.

    Values are texts for people, in one form for what is wanted and what is.
    """

    def __init__(
        self,
        name: str,
        where: str,
        wanted: str,
        read: Callable[[], str],
        write: Callable[[], None] | None = None,
        enough: Callable[[str], bool] | None = None,
        hint: str = "",
    ) -> None:
        self.name, self.where, self.wanted = name, where, wanted
        self.read, self.write, self.hint = read, write, hint
        self.enough = enough or (lambda actual: actual == wanted)

    def settle(self, change: bool) -> dict[str, str]:
        """Bring the knob to its value, or with ``change`` false only look. Return its state and all about it."""
        actual = ""
        try:
            actual = self.read()
            if self.enough(actual):
                return self.result(RIGHT, actual)
            if change and self.write:
                return self.turn(self.write)
        except NotSupported as error:
            return self.result(UNSUPPORTED, error.actual or actual, error.word)
        except Trouble as error:
            return self.result(FAILED, error.actual or actual, error.word, error.hint or self.hint)
        default = "bakehouse-roce apply" if self.write else ""
        return self.result(FAILED, actual, "is not as wanted", self.hint or default)

    def turn(self, write: Callable[[], None]) -> dict[str, str]:
        """Set the knob and read it back."""
        write()
        after = self.read()
        if self.enough(after):
            return self.result(APPLIED, after)
        hint = self.hint or "see dmesg, and the settings of the NIC's firmware"
        return self.result(FAILED, after, "the value was taken without a word, but another one reads back", hint)

    def result(self, state: str, actual: str, word: str = "", hint: str = "") -> dict[str, str]:
        """Return all about the knob."""
        return {
            "knob": self.name, "where": self.where, "wanted": self.wanted, "actual": actual, "state": state,
            "word": word, "hint": hint,
        }  # fmt: skip


def file_knob(name: str, where: str, path: str, wanted: str, **more: Any) -> Knob:
    """Return the knob of a file of the kernel that reads back what is written to it."""
    return Knob(name, where, wanted, lambda: peek_at(path), lambda: poke_at(path, wanted), **more)


def peek_at(path: str) -> str:
    """Read a knob's file, and say in its terms why that does not work."""
    try:
        return " ".join(peek(path).split())
    except OSError as error:
        raise refused(path, error) from None


def poke_at(path: str, text: str) -> None:
    """Write to a knob's file, and say in its terms why that does not work."""
    try:
        poke(path, text)
    except OSError as error:
        raise refused(path, error) from None


# --- What a device is ------------------------------------------------------------------------------------------------


class Port:
    """A port of an RDMA device."""

    def __init__(self, device: str, name: str) -> None:
        self.device, self.name = device, name
        self.path = f"{INFINIBAND}/{device}/ports/{name}"
        self.link_layer = peek_or(f"{self.path}/link_layer")

    @property
    def netdev(self) -> str:
        """The network interface that the port's packets go through; empty if there is none."""
        for index in range(EMPTY_GIDS):
            if name := peek_or(f"{self.path}/gid_attrs/ndevs/{index}"):
                return name
        parent = peek_or(f"{INFINIBAND}/{self.device}/parent")  # soft RoCE
        if parent and os.path.isdir(f"{NET}/{parent}"):
            return parent
        beside = names_in(f"{INFINIBAND}/{self.device}/device/net")
        of_port = [each for each in beside if peek_or(f"{NET}/{each}/dev_port", "0") == str(int(self.name) - 1)]
        return (of_port or beside or [""])[0]

    def gid(self) -> tuple[int, str]:
        """Return index and value of the GID to use for RoCE v2; -1 where there is none.

        An IPv4 address comes first, then IPv6 (neither fe80), then what there is: only the first two are routed.
        """
        found: list[tuple[int, int, str]] = []
        empty = 0
        for index in range(1024):
            kind = peek_or(f"{self.path}/gid_attrs/types/{index}")
            value = peek_or(f"{self.path}/gids/{index}")
            empty = 0 if kind else empty + 1
            if empty > EMPTY_GIDS:
                break
            if kind == "RoCE v2":
                is_v4, is_local = value.startswith("0000:0000:0000:0000:0000:ffff:"), value.startswith("fe80:")
                found.append((0 if is_v4 else 2 if is_local else 1, index, value))
        _, index, value = min(found, default=(0, -1, ""))
        return index, value

    def about(self) -> dict[str, Any]:
        """Return what the port is, for people and for programs."""
        index, value = self.gid() if self.link_layer == "Ethernet" else (-1, "")
        return {
            "port": int(self.name), "link_layer": self.link_layer, "netdev": self.netdev,
            "state": peek_or(f"{self.path}/state").partition(":")[2].strip(),
            "physical": peek_or(f"{self.path}/phys_state").partition(":")[2].strip(),
            "rate": peek_or(f"{self.path}/rate"), "gid_index": index, "gid": value,
        }  # fmt: skip


class Device:
    """An RDMA device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"{INFINIBAND}/{name}"
        self.ports = [Port(name, port) for port in sorted(names_in(f"{self.path}/ports"), key=int)]

    @property
    def driver(self) -> str:
        """The kernel's driver."""
        link = f"{self.path}/device/driver"
        soft = "rxe" if os.path.exists(f"{self.path}/parent") else "unknown"
        return os.path.basename(os.path.realpath(link)) if os.path.exists(link) else soft

    def left_alone(self, settings: Settings) -> str:
        """Return why nothing of the device is touched; an empty text if something is."""
        if not settings.wants(self.name):
            return "devices in roce.yaml leave it out"
        if not self.ports:
            return "it has no ports"
        kind = peek_or(f"{self.path}/node_type").partition(":")[2].strip()
        if kind == "RNIC":  # Documentation/ABI/stable/sysfs-class-infiniband, node_type
            return "it speaks iWARP, not RoCE"
        if all(port.link_layer != "Ethernet" for port in self.ports):
            return f"its ports are {self.ports[0].link_layer or 'unknown'}, not Ethernet"
        return ""

    def active_mtu(self, port: str) -> str:
        """Return a port's active MTU as ibv_devinfo(1) says it: sysfs does not have it."""
        code, out, err = run("ibv_devinfo", "-d", self.name, "-i", port)
        if code == NOT_THERE:
            raise Trouble(err, "apt install ibverbs-utils")
        for line in out.splitlines():
            key, _, value = line.strip().partition(":")
            if key == "active_mtu":
                return value.split()[0]
        raise refusal(last_line(err) or last_line(out) or f"ibv_devinfo ends with {code}", "ibv_devinfo -v")

    def about(self) -> dict[str, Any]:
        """Return what the device is."""
        return {
            "device": self.name, "driver": self.driver,
            "numa_node": int(peek_or(f"{self.path}/device/numa_node", "-1")),
            "cpus": peek_or(f"{self.path}/device/local_cpulist"), "ports": [port.about() for port in self.ports],
        }  # fmt: skip


def devices() -> list[Device]:
    """Return the RDMA devices that are there."""
    return [Device(name) for name in names_in(INFINIBAND)]


# --- Knobs of RDMA-CM and of the MTU ---------------------------------------------------------------------------------


def make_rdma_cm_folder(device: str) -> None:
    """Have the kernel show RDMA-CM's defaults of a device: Documentation/ABI/testing/configfs-rdma_cm."""
    if not os.path.isdir(RDMA_CM):
        run("modprobe", "rdma_cm")
    if not os.path.isdir(RDMA_CM):
        run("mount", "-t", "configfs", "none", os.path.dirname(RDMA_CM))
    if not os.path.isdir(RDMA_CM):
        hint = "modprobe rdma_cm; mount -t configfs none /sys/kernel/config"
        raise Trouble(f"No such file or directory: {RDMA_CM.removeprefix(ROOT)}", hint)
    path = f"{RDMA_CM}/{device}"
    try:
        make_folder(path)
    except FileExistsError:
        pass
    except OSError as error:
        hint = "does RDMA-CM know the device? rdma link"
        raise Trouble(f"{error.strerror}: {path.removeprefix(ROOT)}", hint) from None


def make_folder(path: str) -> None:
    """Make a folder of the kernel's configfs: the kernel fills it."""
    os.mkdir(path)


def rdma_cm_knob(port: Port, name: str, wanted: str) -> Knob:
    """Return what connections through RDMA-CM begin with: roce_mode or roce_tos."""
    folder = f"{RDMA_CM}/{port.device}"
    path = f"{folder}/ports/{port.name}/default_{name}"

    def read() -> str:
        return peek_at(path) if os.path.isdir(folder) else "not set"

    def write() -> None:
        if not os.path.isdir(folder):
            make_rdma_cm_folder(port.device)
        poke_at(path, wanted)

    return Knob(name, f"port {port.name}", wanted, read, write)


def bond_of(interface: str) -> str:
    """Return the bond that an interface is a member of."""
    master = os.path.basename(os.path.realpath(f"{NET}/{interface}/master"))
    return master if os.path.isdir(f"{NET}/{master}/bonding") else ""


def vlans_on(interface: str) -> list[str]:
    """Return the VLANs on top of an interface."""
    above = [name.removeprefix("upper_") for name in names_in(f"{NET}/{interface}") if name.startswith("upper_")]
    return [name for name in above if "DEVTYPE=vlan" in peek_or(f"{NET}/{name}/uevent")]


def members_of(interface: str) -> list[str]:
    """Return the members of a bond, or the interface itself where it is none: PFC and the like are of real ports."""
    return peek_or(f"{NET}/{interface}/bonding/slaves").split() or [interface]


def mtu_knobs(settings: Settings, device: Device, port: Port, interface: str) -> Iterator[Knob]:
    """Yield the MTU of the interface and of what is on top, and the path MTU that RDMA gets from it.

    A bond hands its MTU down to its members, and a VLAN's cannot be larger than that of what it is on.
    """
    bond = bond_of(interface)
    for name in [*([bond] if bond else []), interface, *vlans_on(bond or interface)]:
        yield mtu_knob(name, settings.mtu)
    hint = "it follows from the MTU of the interface: see mtu; the NIC may have a lower maximum (ibv_devinfo, max_mtu)"
    wanted = str(settings.path_mtu)
    yield Knob("path_mtu", f"port {port.name}", wanted, lambda: device.active_mtu(port.name), hint=hint)


def mtu_knob(interface: str, mtu: int) -> Knob:
    """Return the MTU of an interface."""
    path = f"{NET}/{interface}/mtu"
    hint = (
        "bakehouse-roce apply; if it comes back, the network's configuration sets it (networkctl cat): change it there"
    )
    return Knob("mtu", interface, str(mtu), lambda: peek_at(path), lambda: set_mtu(path, mtu), hint=hint)


def set_mtu(path: str, mtu: int) -> None:
    """Set an MTU. A device that cannot do that much says so with EINVAL (dev_validate_mtu() in net/core/dev.c)."""
    import errno

    try:
        poke(path, str(mtu))
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ERANGE}:
            raise NotSupported(f"{error.strerror}: the interface does not take an MTU of {mtu}") from None
        raise refused(path, error) from None


# --- Knobs of the Ethernet port: DCB, pause frames, ECN --------------------------------------------------------------


class Dcb:
    """The DCB settings of an interface, by iproute2's dcb(8)."""

    OBJECTS = ("dcbx", "app", "apptrust", "ets", "buffer", "pfc")

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.known: dict[str, dict[str, Any] | Exception] = {}
        self.first = True

    def show(self, name: str) -> dict[str, Any]:
        """Return one object. All are asked for at once, the first time: one start of a program in place of six."""
        if self.first:
            self.ask(self.OBJECTS)
            self.first = False
        elif name not in self.known:
            self.ask((name,))
        found = self.known[name]
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, names: tuple[str, ...]) -> None:
        """Ask for objects, in batch mode: an object for each that there is, in order, and lines for the others."""
        given = "".join(f"{name} show dev {self.interface}\n" for name in names)
        code, out, err = run("dcb", "-j", "-N", "-f", "-b", "-", given=given)
        if code in {NOT_THERE, TOO_LONG}:
            self.known.update((name, Trouble(err, "apt install iproute2")) for name in names)
            return
        words = refusals(err)
        try:
            answers = objects_in(out)
        except ValueError:
            answers = []
        if len(answers) + len(words) == len(names):
            left = iter(answers)
            for line, name in enumerate(names, 1):
                self.known[name] = refusal(words[line]) if line in words else next(left)
        elif len(names) > 1:
            for name in names:
                self.ask((name,))
        else:
            self.known[names[0]] = Trouble(f"dcb says what is not understood: {out or err or code}", "dcb -V")

    def set(self, name: str, *words: str, verb: str = "set") -> None:
        """Set something of an object."""
        code, out, err = run("dcb", name, verb, "dev", self.interface, *words)
        self.known.pop(name, None)
        if code or DRIVER_SAYS in err:
            raise refusal(word_of_driver(err) or last_line(err) or last_line(out) or f"dcb ends with {code}")


DRIVER_SAYS = "Error when attempting to set attribute: "


def word_of_driver(said: str) -> str:
    """Return the driver's word in what dcb says when it could not set something; nothing where there is none.

    The kernel answers with its negative error number in one byte (dcbnl_ieee_set() in net/dcb/dcbnl.c), which dcb
    writes as "Unknown error 234" for EINVAL.
    """
    line = next((line for line in said.splitlines() if line.startswith(DRIVER_SAYS)), "")
    count = line.rpartition("Unknown error ")[2]
    if "Unknown error" in line and count.isdigit() and 128 < int(count) < 256:  # noqa: PLR2004
        return f"{DRIVER_SAYS}{os.strerror(256 - int(count))}"
    return line


def refusals(said: str) -> dict[int, str]:
    """Return what a tool of iproute2 says in batch mode of lines that it could not do: number of the line, word."""
    found: dict[int, str] = {}
    words: list[str] = []
    for line in said.splitlines():
        head, _, count = line.rpartition(":")
        if head.startswith("Command failed") and count.strip().isdigit():
            found[int(count)] = "; ".join(words) or "Command failed"
            words = []
        elif line.strip():
            words.append(line.strip())
    return found


def dcb_knobs(settings: Settings, device: Device, interface: str) -> Iterator[Knob]:
    """Yield what makes a port lossless for the RoCE priority and fair to the rest.

    In this order: who is in charge, what must not be on with PFC, how packets find their priority, what that gets.
    """
    dcb = Dcb(interface)
    yield dcbx_knob(settings, dcb)
    yield pause_knob(settings, interface)
    yield dscp_knob(settings, dcb)
    yield trust_knob(settings, dcb, device.driver)
    yield ets_knob(settings, dcb)
    yield from buffer_knobs(settings, dcb)
    yield pfc_knob(settings, dcb)


def dcbx_knob(settings: Settings, dcb: Dcb) -> Knob:
    """Return who is in charge of the port's settings: dcb-dcbx(8)."""

    def read() -> str:
        flags = dcb.show("dcbx")
        return " ".join(name.replace("_", "-") for name, on in flags.items() if on) or "none"

    def enough(actual: str) -> bool:
        return {"host", "ieee"} <= set(actual.split()) and "lld-managed" not in actual

    if settings.dcbx == "leave":
        return Knob("dcbx", dcb.interface, "left alone", read, enough=lambda _: True)
    hint = "the NIC's firmware is in charge of DCBX: turn its agent off (docs/roce.md has the ways), or dcbx: leave"
    return Knob("dcbx", dcb.interface, "host ieee", read, lambda: dcb.set("dcbx", "host", "ieee"), enough, hint)


def pause_knob(settings: Settings, interface: str) -> Knob:
    """Return the pause frames of the whole link (IEEE 802.3, 31B; ethtool(8)), which do not go with PFC."""

    def state() -> dict[str, Any]:
        code, out, err = run("ethtool", "--json", "-a", interface)
        if code == NOT_THERE:
            raise Trouble(err, "apt install ethtool")
        try:
            (found,) = objects_in(out)[0]
            return dict(found)
        except (ValueError, IndexError, TypeError):
            raise refusal(last_line(err) or last_line(out) or f"ethtool ends with {code}") from None

    def read() -> str:
        found = state()
        return " ".join(f"{way} {'on' if found.get(way) else 'off'}" for way in ("rx", "tx"))

    def write() -> None:
        found = state()
        words = [word for key, word in (("autonegotiate", "autoneg"), ("rx", "rx"), ("tx", "tx")) if found.get(key)]
        code, out, err = run("ethtool", "-A", interface, *(part for word in words for part in (word, "off")))
        if code:
            raise refusal(last_line(err) or last_line(out) or f"ethtool ends with {code}")

    if not (settings.pfc and settings.pause_off):
        return Knob("pause", interface, "left alone", read, enough=lambda _: True)
    return Knob("pause", interface, "rx off tx off", read, write)


def dscp_knob(settings: Settings, dcb: Dcb) -> Knob:
    """Return the priority that packets with the DSCP get: dcb-app(8), dscp-prio."""

    def read() -> str:
        pairs = dcb.show("app").get("dscp_prio", [])
        return ",".join(str(prio) for dscp, prio in pairs if dscp == settings.dscp) or "none"

    def write() -> None:
        dcb.set("app", "dscp-prio", f"{settings.dscp}:{settings.priority}", verb="replace")

    return Knob("dscp_priority", dcb.interface, str(settings.priority), read, write)


def trust_knob(settings: Settings, dcb: Dcb, driver: str) -> Knob:
    """Return which header says a packet's priority: dcb-apptrust(8), or mlnx_qos where the driver has no apptrust."""
    vendor = settings.vendor_tools and driver.startswith("mlx")

    def read() -> str:
        try:
            return " ".join(str(each) for each in dcb.show("apptrust").get("order", [])) or "none"
        except NotSupported as error:
            if vendor and (found := mlnx_trust(dcb.interface)):
                return found
            word = error.word
            if driver == "mlx5_core" and settings.trust == "dscp":
                word += "; this driver trusts DSCP as soon as a DSCP has a priority: see dscp_priority"
            raise NotSupported(word) from None

    def write() -> None:
        if isinstance(dcb.known.get("apptrust"), NotSupported):
            code, out, err = run("mlnx_qos", "-i", dcb.interface, "--trust", settings.trust)
            if code:
                raise refusal(last_line(err) or last_line(out))
        else:
            dcb.set("apptrust", "order", settings.trust)

    return Knob("trust", dcb.interface, settings.trust, read, write, lambda actual: actual.split()[0] == settings.trust)


def mlnx_trust(interface: str) -> str:
    """Return what NVIDIA's mlnx_qos says of the trust state; nothing where it is not installed."""
    code, out, _ = run("mlnx_qos", "-i", interface)
    said = [line.partition(":")[2].strip() for line in out.splitlines() if line.startswith("Priority trust state")]
    return said[0] if said and not code else ""


def ets_text(prio_tc: list[int], tsa: list[str], bandwidth: list[int]) -> str:
    """Write bandwidth shares in one form: only of classes that have priorities, only shares of classes that share.

    Drivers report 0 or 100 for the others (mlx5 did so until 2025), and both mean nothing.
    """
    parts = []
    for tc in sorted(set(prio_tc)):
        priorities = ",".join(str(prio) for prio, of in enumerate(prio_tc) if of == tc)
        share = f" {bandwidth[tc]}%" if tsa[tc] == "ets" else ""
        parts.append(f"TC{tc} (prio {priorities}) {tsa[tc]}{share}")
    return "; ".join(parts)


def ets_knob(settings: Settings, dcb: Dcb) -> Knob:
    """Return the bandwidth shares: dcb-ets(8), IEEE 802.1Q's Enhanced Transmission Selection."""

    def read() -> str:
        found = dcb.show("ets")
        text = ets_text(found["prio_tc"], found["tc_tsa"], found["tc_bw"])
        if settings.ets and found.get("ets_cap") == 1:
            raise NotSupported("ets-cap 1: the port has one traffic class only", text)
        return text

    if settings.ets is None:
        return Knob("ets", dcb.interface, "left alone", read, enough=lambda _: True)
    share, tc = settings.ets["share"], settings.ets["traffic_class"]
    prio_tc = [tc if prio == settings.priority else 0 for prio in range(PRIORITIES)]
    tsa = ["ets" if each in {0, tc} else "strict" for each in range(PRIORITIES)]
    bandwidth = [{0: 100 - share, tc: share}.get(each, 0) for each in range(PRIORITIES)]

    def write() -> None:
        words = ["tc-tsa", "all:strict", "0:ets", f"{tc}:ets", "tc-bw", "all:0", f"0:{100 - share}", f"{tc}:{share}"]
        dcb.set("ets", "prio-tc", "all:0", f"{settings.priority}:{tc}", *words)

    return Knob("ets", dcb.interface, ets_text(prio_tc, tsa, bandwidth), read, write)


def buffer_knobs(settings: Settings, dcb: Dcb) -> Iterator[Knob]:
    """Yield which receive buffer a priority goes to, and buffer sizes (bytes): dcb-buffer(8)."""
    given = settings.buffers or {}
    if "prio_buffer" not in given:
        everything = dict.fromkeys(range(PRIORITIES), 0)
        left = Knob(
            "prio_buffer", dcb.interface, "left to the driver", lambda: buffers_text(dcb, "prio_buffer", everything)
        )
        left.enough = lambda _: True
        yield left
    for name, entries in given.items():
        yield buffer_knob(dcb, name, entries)


def buffer_knob(dcb: Dcb, name: str, entries: dict[int, int]) -> Knob:
    """Return prio_buffer or buffer_size, of the priorities or buffers that are given."""
    words = [f"{key}:{entries[key]}" for key in sorted(entries)]
    return Knob(
        name, dcb.interface, " ".join(words), lambda: buffers_text(dcb, name, entries),
        lambda: dcb.set("buffer", name.replace("_", "-"), *words),
        hint="dcb-buffer(8): the driver may round or cap sizes; give what it reads back",
    )  # fmt: skip


def buffers_text(dcb: Dcb, name: str, entries: dict[int, int]) -> str:
    """Return entries of one of dcb's maps as dcb itself writes them."""
    return " ".join(f"{key}:{dcb.show('buffer')[name][key]}" for key in sorted(entries))


def pfc_knob(settings: Settings, dcb: Dcb) -> Knob:
    """Return the priorities that are lossless: dcb-pfc(8). Exactly the RoCE priority, or none."""
    wanted = str(settings.priority) if settings.pfc else "none"

    def read() -> str:
        return ",".join(str(prio) for prio, on in enumerate(dcb.show("pfc")["prio_pfc"]) if on) or "none"

    def write() -> None:
        dcb.set("pfc", "prio-pfc", "all:off", *([f"{settings.priority}:on"] if settings.pfc else []))

    return Knob("pfc", dcb.interface, wanted, read, write)


def ecn_knob(settings: Settings, device: Device, interface: str) -> Knob:
    """Return whether the NIC answers marked packets (np) and slows down when told to (rp), for the priority.

    The files are those of NVIDIA's own driver; the kernel's mlx5 has no such switch: its firmware does it for all
    priorities, and debugfs shows how (drivers/infiniband/hw/mlx5/cong.c).
    """
    paths = {end: f"{NET}/{interface}/ecn/roce_{end}/enable/{settings.priority}" for end in ("np", "rp")}
    value = "1" if settings.ecn else "0"

    def read() -> str:
        try:
            return " ".join(f"{end} {peek_at(path)}" for end, path in paths.items())
        except NotSupported as error:
            raise NotSupported(error.word, firmware_ecn(device)) from None

    def write() -> None:
        for path in paths.values():
            poke_at(path, value)

    return Knob("ecn", interface, f"np {value} rp {value}", read, write)


def firmware_ecn(device: Device) -> str:
    """Return what the firmware of an mlx5 NIC does with ECN, as debugfs shows it; nothing elsewhere."""
    address = os.path.basename(os.path.realpath(f"{device.path}/device"))
    folder = f"{DEBUGFS}/mlx5/{address}/cc_params"
    found = [(name, peek_or(f"{folder}/{name}")) for name in ("np_cnp_dscp", "np_cnp_prio")]
    return " ".join(f"{name} {value}" for name, value in found if value)


# --- Knobs of the machine --------------------------------------------------------------------------------------------


def machine_knobs(settings: Settings) -> Iterator[Knob]:
    """Yield what is to be right once for all devices."""
    if settings.memlock:
        about = (
            "lines '* - memlock unlimited' and 'root - memlock unlimited' in /etc/security/limits.d/ (limits.conf(5))"
        )
        yield Knob("memlock_pam", OF_A_MACHINE, "* unlimited root unlimited", pam_memlock, hint=about)
        about = "[Manager] DefaultLimitMEMLOCK=infinity in /etc/systemd/system.conf.d/ (systemd-system.conf(5)), reboot"
        yield Knob("memlock_systemd", OF_A_MACHINE, "infinity", systemd_memlock, hint=about)
    for name, wanted in (settings.sysctl or {}).items():
        path = f"{SYSCTL}/{name.replace('.', '/')}"
        more = {}
        if "gc_thresh" in name:  # a larger table does no harm

            def enough(actual: str, least: int = wanted) -> bool:
                return actual.isdigit() and int(actual) >= least

            more["enough"] = enough
        yield file_knob(name, OF_A_MACHINE, path, str(wanted), **more)
    if settings.governor:
        yield governor_knob(settings.governor)


def pam_memlock() -> str:
    """Return the memlock limits of everybody and of root: ``*`` does not cover root (limits.conf(5))."""
    limits = {"*": {"soft": "default", "hard": "default"}, "root": {"soft": "default", "hard": "default"}}
    parts = [f"{LIMITS}/limits.d/{name}" for name in names_in(f"{LIMITS}/limits.d") if name.endswith(".conf")]
    for path in [f"{LIMITS}/limits.conf", *parts]:
        for line in peek_or(path).splitlines():
            words = line.partition("#")[0].split()
            if len(words) == 4 and words[2] == "memlock" and words[0] in limits:  # noqa: PLR2004
                endless = "unlimited" if words[3] in {"unlimited", "infinity", "-1"} else words[3]
                limits[words[0]].update(dict.fromkeys(("soft", "hard") if words[1] == "-" else (words[1],), endless))
    return " ".join(f"{who} {'/'.join(sorted({of['soft'], of['hard']}))}" for who, of in limits.items())


def systemd_memlock() -> str:
    """Return the memlock limit of services that say nothing themselves: systemd-system.conf(5)."""
    found = "8M"  # its default
    parts: dict[str, str] = {}
    for place in ("usr/lib", "usr/local/lib", "run", "etc"):  # later places hide files of the same name
        folder = f"{ROOT}/{place}/systemd/system.conf.d"
        parts.update((name, f"{folder}/{name}") for name in names_in(folder) if name.endswith(".conf"))
    for path in [f"{ROOT}/etc/systemd/system.conf", *(parts[name] for name in sorted(parts))]:
        for line in peek_or(path).splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() == "DefaultLimitMEMLOCK":
                found = value.strip() or "8M"
    return "infinity" if set(found.split(":")) == {"infinity"} else found


def governor_knob(wanted: str) -> Knob:
    """Return the governor of all CPUs: Documentation/admin-guide/pm/cpufreq.rst. A policy is one or more CPUs."""
    paths = [f"{CPUFREQ}/{name}/scaling_governor" for name in names_in(CPUFREQ) if name.startswith("policy")]

    def read() -> str:
        if not paths:
            raise NotSupported(f"No such file or directory: {CPUFREQ.removeprefix(ROOT)}/policy*")
        return ",".join(sorted({peek_at(path) for path in paths}))

    def write() -> None:
        for path in paths:
            if peek_at(path) != wanted:
                poke_at(path, wanted)

    return Knob("governor", OF_A_MACHINE, wanted, read, write, hint="see scaling_available_governors beside it")


# --- Results ---------------------------------------------------------------------------------------------------------


def knobs_of(settings: Settings, device: Device, notes: list[str]) -> Iterator[Knob]:
    """Yield all knobs of a device, and of the machine that it is in."""
    for port in device.ports:
        if port.link_layer != "Ethernet":
            notes.append(f"port {port.name} is {port.link_layer or 'unknown'}: left alone")
            continue
        yield rdma_cm_knob(port, "roce_mode", settings.mode)
        yield rdma_cm_knob(port, "roce_tos", str(settings.tos))
        interface = port.netdev
        if not interface:
            yield Knob("netdev", f"port {port.name}", "an interface", no_interface)
            continue
        yield from mtu_knobs(settings, device, port, interface)
        for member in members_of(interface):
            yield from dcb_knobs(settings, device, member)
            yield ecn_knob(settings, device, member)
    yield from machine_knobs(settings)


def no_interface() -> str:
    """Say that a port has no network interface."""
    raise Trouble("the port has no network interface", "rdma link; ip link: is the NIC's network driver loaded?")


def settle(settings: Settings, device: Device, change: bool) -> dict[str, Any]:
    """Bring a device to what is wanted, or only compare. Return all about it."""
    notes: list[str] = []
    reason = device.left_alone(settings)
    knobs = [] if reason else [knob.settle(change) for knob in knobs_of(settings, device, notes)]
    return {**device.about(), "left_alone": reason, "notes": notes, "faults": [], "knobs": knobs}


def counts(result: dict[str, Any]) -> str:
    """Say in a line how a device's knobs ended."""
    if result["faults"]:
        return f"roce.yaml: {'; '.join(result['faults'])}"
    if result["left_alone"]:
        return f"left alone: {result['left_alone']}"
    states = [knob["state"] for knob in result["knobs"]]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states) or "nothing to do"


def path_of(device: str, ending: str = "json") -> str:
    """Return where the result of a device, or its hints, stand."""
    return f"{RESULTS}/{device}.{ending}"


def saved(device: str) -> dict[str, Any]:
    """Return the result of the last apply; empty if there is none."""
    try:
        found = json.loads(peek(path_of(device)))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save(result: dict[str, Any]) -> None:
    """Write a device's result and its hints."""
    from time import monotonic, time

    result = {**result, "time": round(time(), 3), "uptime": round(monotonic(), 3)}
    replace(path_of(result["device"]), json.dumps(result) + "\n")
    save_hints(result)


def save_hints(about: dict[str, Any]) -> None:
    """Write what a job's start may source: which CPUs are near, and what libraries want to know of the device.

    UCX and NCCL document their variables: UCX_NET_DEVICES, UCX_IB_GID_INDEX and UCX_IB_TRAFFIC_CLASS (ucx_info -c),
    NCCL_IB_HCA, NCCL_IB_GID_INDEX and NCCL_IB_TC (NCCL's Environment Variables; ``=`` there means: exactly this one).
    """
    port = next((each for each in about["ports"] if each["link_layer"] == "Ethernet" and each["netdev"]), None)
    tos = next((knob["wanted"] for knob in about.get("knobs", []) if knob["knob"] == "roce_tos"), "")
    if about.get("left_alone") or about.get("faults") or not port:
        remove(path_of(about["device"], "env"))
        return
    name = f"{about['device']}:{port['port']}"
    values = {
        "BAKEHOUSE_ROCE_DEVICE": about["device"], "BAKEHOUSE_ROCE_PORT": port["port"],
        "BAKEHOUSE_ROCE_NETDEV": port["netdev"],
        **({"BAKEHOUSE_ROCE_NUMA_NODE": about["numa_node"]} if about["numa_node"] >= 0 else {}),
        **({"BAKEHOUSE_ROCE_CPUS": about["cpus"]} if about["cpus"] else {}),
        "UCX_NET_DEVICES": name, "NCCL_IB_HCA": f"={name}",
        **({"UCX_IB_TRAFFIC_CLASS": tos, "NCCL_IB_TC": tos} if tos else {}),
    }  # fmt: skip
    if port["gid_index"] >= 0:
        values.update({"UCX_IB_GID_INDEX": port["gid_index"], "NCCL_IB_GID_INDEX": port["gid_index"]})
    lines = [f"{key}={value}" for key, value in values.items() if not set(str(value)) & set(" \t\n'\"$`\\;&|<>()")]
    replace(path_of(about["device"], "env"), "\n".join(["# Hints for jobs, by bakehouse-roce.", *lines, ""]))


class Locked:
    """No other run changes something meanwhile."""

    def __enter__(self) -> None:
        """Wait for the lock."""
        import fcntl

        for path in (os.path.dirname(RESULTS), RESULTS):
            if not os.path.isdir(path):
                os.makedirs(path, exist_ok=True)
                os.chmod(path, 0o755)  # noqa: S103, PTH101 (results are for everybody)
        self.file = os.open(f"{RESULTS}/.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        os.close(self.file)


def chosen(names: list[str]) -> tuple[list[Device], int]:
    """Return the devices of these names, or all, and an exit status: 1 if one is not there."""
    there = devices()
    if not names:
        return there, DONE
    missing = sorted(set(names) - {device.name for device in there})
    for name in missing:
        print(f"bakehouse-roce: there is no RDMA device {name} (rdma link)", file=sys.stderr)
    return [device for device in there if device.name in names], FAILED_KNOBS if missing else DONE


# --- Commands --------------------------------------------------------------------------------------------------------


def apply(names: list[str]) -> int:
    """Bring devices to what is wanted and note how that ended. Returns the exit status."""
    with Locked():
        forget_the_gone()
        found, status = chosen(names)
        if not found and not names:
            print("bakehouse-roce: there is no RDMA device", flush=True)
        while True:
            before = signature()
            failed = apply_to(found, before)
            if signature() == before:
                return FAILED_KNOBS if failed else status


def signature() -> str:
    """Return what changes whenever the configuration does: its path unit does not look while a run is going on."""
    try:
        about = os.stat(CONFIG)
    except OSError:
        return ""
    return f"{about.st_ino}-{about.st_mtime_ns}-{about.st_size}"


def apply_to(found: list[Device], config: str) -> bool:
    """Bring devices to what the configuration says now; True if a knob failed.

    ``config`` is its signature, which goes into the results: the agent sees by it whether they are of today's file.
    """
    try:
        settings = load()
    except ConfigWrong as error:
        for device in found:
            wrong = {"left_alone": "", "notes": [], "faults": error.faults, "knobs": []}
            save({**device.about(), **wrong, "config": config})
        raise
    failures: list[str] = []
    for device in found:
        result = settle(settings, device, change=True)
        if os.path.isdir(device.path):  # it may have gone meanwhile
            save({**result, "config": config})
        lines = [failure(knob) for knob in result["knobs"] if knob["state"] == FAILED]
        for line in [counts(result), *lines]:
            print(f"bakehouse-roce: {device.name}: {line}", flush=True)
        failures += lines
    return bool(failures)


def forget_the_gone() -> None:
    """Remove the results of devices that have gone or have another name now."""
    for name in names_in(RESULTS):
        device, _, ending = name.rpartition(".")
        if ending in {"json", "env"} and not os.path.isdir(f"{INFINIBAND}/{device}"):
            remove(f"{RESULTS}/{name}")


def failure(knob: dict[str, str]) -> str:
    """Say in a line what failed and what to do."""
    actual = f", is {knob['actual']}" if knob["actual"] else ""
    hint = f" ({knob['hint']})" if knob["hint"] else ""
    return f"{knob['knob']} of {knob['where']}: wanted {knob['wanted']}{actual}: {knob['word']}{hint}"


def hints(names: list[str]) -> int:
    """Write the hints for jobs anew: addresses come after the device, and the GID index with them."""
    with Locked():
        found, status = chosen(names)
        for device in found:
            if old := saved(device.name):
                save_hints({**old, **device.about()})
    return status


def report(names: list[str], as_json: bool) -> int:
    """Compare devices with what is wanted, now, and print it. Returns the exit status."""
    settings = load()
    found, status = chosen(names)
    results = []
    for device in found:
        result = settle(settings, device, change=False)
        old = saved(device.name)
        before = {(knob["knob"], knob["where"]): knob["state"] for knob in old.get("knobs", [])}
        for knob in result["knobs"]:
            knob["at_apply"] = before.get((knob["knob"], knob["where"]), "")
            status = FAILED_KNOBS if knob["state"] == FAILED else status
        results.append({**result, "applied": old.get("time", 0)})
    if as_json:
        print(json.dumps({"devices": results}, indent=1))
        return status
    for result in results:
        print("\n".join(report_lines(result)))
    if not results:
        print("there is no RDMA device (rdma link)")
    return status


def report_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield a device's report as people read it."""
    yield f"{result['device']} ({result['driver']}): {counts(result)}"
    for port in result["ports"]:
        where = f"{port['netdev'] or 'no interface'}, {port['state'] or 'state unknown'}"
        gid = f", RoCE v2 GID index {port['gid_index']}" if port["gid_index"] >= 0 else ""
        yield f"  port {port['port']}: {port['link_layer']}, {where}, {port['rate']}{gid}"
    if result["numa_node"] >= 0:
        yield f"  NUMA node {result['numa_node']}, CPUs {result['cpus']}"
    yield from (f"  {note}" for note in result["notes"])
    for knob in result["knobs"]:
        then = f", at apply: {knob['at_apply']}" if knob["at_apply"] not in {"", knob["state"]} else ""
        values = f"wanted {knob['wanted']}, is {knob['actual'] or '-'}"
        yield f"  {knob['state']:14} {knob['knob']} ({knob['where']}): {values}{then}"
        yield from (f"  {'':14}   {text}" for text in (knob["word"], knob["hint"]) if text)


# --- Which NICs there are --------------------------------------------------------------------------------------------


def neighbours() -> dict[str, tuple[str, str]]:
    """Return switch and port at the other end of each interface, where lldpd runs: lldpcli(8), json0."""
    code, out, _ = run("lldpcli", "-f", "json0", "show", "neighbors")
    found: dict[str, tuple[str, str]] = {}
    if code:
        return found
    try:
        entries = [entry for each in json.loads(out)["lldp"] for entry in each.get("interface", [])]
        for entry in entries:
            chassis, port = entry["chassis"][0], entry["port"][0]
            name = (chassis.get("name") or chassis.get("id"))[0]["value"]
            found[entry["name"]] = (plain(name, 80), plain((port.get("id") or port.get("descr"))[0]["value"], 80))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    return found


def firmware_of(interface: str) -> str:
    """Return a NIC's firmware version, as ethtool -i says it."""
    code, out, _ = run("ethtool", "-i", interface)
    versions = [line.partition(":")[2].strip() for line in out.splitlines() if line.startswith("firmware-version")]
    return versions[0] if versions and not code else ""


def nics(as_json: bool) -> int:
    """Print all Ethernet NICs, what they are, and where they are plugged in."""
    rdma = {port.netdev: device.name for device in devices() for port in device.ports}
    at = neighbours()
    found = []
    for name in names_in(NET):
        path = f"{NET}/{name}"
        if peek_or(f"{path}/type") != "1" or not os.path.exists(f"{path}/device"):  # ARPHRD_ETHER, of hardware
            continue
        ids = [peek_or(f"{path}/device/{part}").removeprefix("0x") for part in ("vendor", "device")]
        switch, port = at.get(name, ("", ""))
        speed = peek_or(f"{path}/speed", "-1")
        found.append({
            "interface": name, "driver": os.path.basename(os.path.realpath(f"{path}/device/driver")),
            "pci_id": ":".join(ids) if all(ids) else "",
            "address": os.path.basename(os.path.realpath(f"{path}/device")),
            "mac": peek_or(f"{path}/address"), "speed_mbit": int(speed) if speed.isdigit() else 0,
            "carrier": peek_or(f"{path}/carrier") == "1", "mtu": int(peek_or(f"{path}/mtu", "0")),
            "firmware": firmware_of(name), "rdma": rdma.get(name, ""),
            "numa_node": int(peek_or(f"{path}/device/numa_node", "-1")), "switch": switch, "switch_port": port,
        })  # fmt: skip
    if as_json:
        print(json.dumps({"nics": found}, indent=1))
        return DONE
    print("\n".join(nic_lines(found)))
    return DONE


def nic_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of NICs."""
    rows = [("INTERFACE", "DRIVER", "PCI ID", "SPEED", "LINK", "RDMA", "FIRMWARE", "SWITCH AND PORT")]
    for nic in found:
        speed = f"{nic['speed_mbit'] / 1000:g} Gbit/s" if nic["speed_mbit"] else "-"
        rows.append((
            nic["interface"], nic["driver"], nic["pci_id"] or "-", speed, "up" if nic["carrier"] else "down",
            nic["rdma"] or "-", nic["firmware"] or "-", " ".join((nic["switch"], nic["switch_port"])).strip() or "-",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    if not found:
        yield "there is no Ethernet NIC"


# --- Command line ----------------------------------------------------------------------------------------------------

HELP = """\
NAME
    bakehouse-roce - sets up RDMA over Converged Ethernet on this node, and says how that ended

SYNOPSIS
    bakehouse-roce apply [DEVICE...]
    bakehouse-roce report [--json] [DEVICE...]
    bakehouse-roce hints [DEVICE...]
    bakehouse-roce nics [--json]
    bakehouse-roce check [FILE]

COMMANDS
    apply    Sets what differs from /etc/bakehouse/roce.yaml or the defaults, reads it back, and notes how each knob
             ended. Run by a unit for each RDMA device when it appears, and for all when the file changes.
    report   Compares each knob with what is wanted, now, and changes nothing.
    hints    Writes /run/bakehouse/roce/DEVICE.env anew, for jobs: near CPUs, GID index, traffic class.
    nics     Lists the Ethernet NICs: driver, PCI id, speed, link, firmware, RDMA device, switch and port (with lldpd).
    check    Names everything that is wrong with a configuration.

STATES
    applied         it was set, and reads back as wanted
    already right   it was as wanted
    not supported   the device, its driver or the tool does not have it; in their own word
    failed          it is not as wanted; with the word, and what to do

FILES
    /etc/bakehouse/roce.yaml          the configuration; may be missing
    /run/bakehouse/roce/DEVICE.json   how the last apply ended
    /run/bakehouse/roce/DEVICE.env    hints for jobs

EXIT STATUS
    0   all is right, or not supported
    1   something failed
    2   the command line or the configuration is wrong
"""


def check_file(path: str) -> int:
    """Name all that is wrong with a configuration."""
    try:
        with open(path, encoding="utf-8") as file:
            faults = parse(file.read(CONFIG_LIMIT + 1))[1]
    except (OSError, UnicodeDecodeError) as error:
        faults = [f"cannot be read: {getattr(error, 'strerror', '') or error}"]
    for fault in faults:
        print(f"{path}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{path} is right")
    return CONFIG_WRONG if faults else DONE


def command(arguments: list[str]) -> int:
    """Run the command that the command line asks for."""
    verb, *words = arguments or [""]
    flags = {word for word in words if word.startswith("-")}
    names = [word for word in words if not word.startswith("-")]
    may_json = verb in {"report", "nics"}
    too_many = (verb == "nics" and names) or (verb == "check" and len(names) > 1)
    if (
        verb not in {"apply", "report", "hints", "nics", "check"}
        or flags - ({"--json"} if may_json else set())
        or too_many
    ):
        print(f"bakehouse-roce: {' '.join(arguments) or 'no command'}: see bakehouse-roce --help", file=sys.stderr)
        return CONFIG_WRONG
    if verb == "apply":
        return apply(names)
    if verb == "report":
        return report(names, "--json" in flags)
    if verb == "hints":
        return hints(names)
    return nics("--json" in flags) if verb == "nics" else check_file((names or [CONFIG])[0])


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    if not ROOT:
        os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return DONE
    try:
        return command(arguments)
    except ConfigWrong as error:
        lines = [f"{CONFIG.removeprefix(ROOT)}: {fault}" for fault in error.faults]
        print("\n".join([*lines, "correct it: it is applied again when the file changes"]), file=sys.stderr)
        return CONFIG_WRONG
    except PermissionError as error:
        print(f"bakehouse-roce: {error.filename}: {error.strerror}: are you root?", file=sys.stderr)
        return FAILED_KNOBS
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports it
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
