"""Timelines: the guest's clock tied to the host's by the console, the moments, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import subprocess
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bakehouse import timeline
from bakehouse.timeline import GuestFacts, Timeline, from_boot, show, spans, with_moment

POWER_ON = 5000.0
"""The host's clock when the machine was switched on."""
KERNEL = 5003.25
"""The host's clock when the guest's showed 0."""


@dataclass(frozen=True)
class ConsoleLine:
    at: float
    text: str


FIRMWARE = [
    (0.9, "\x1b[2J\x1b[01;01HBdsDxe: failed to load Boot0001 \"UEFI Misc Device\" from PciRoot(0x0): Not Found"),
    (1.5, "BdsDxe: starting Boot0002 \"UEFI Misc Device 2\" from PciRoot(0x0)/Pci(0x1,0x0)"),
    (2.1, "\x1b[0m\x1b[37m\x1b[40m  Booting `Linux'"),
]  # fmt: skip

CONSOLE = """\
[    0.000000] Linux version 6.12.57+deb13-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP PREEMPT_DYNAMIC
[    0.000000] Command line: BOOT_IMAGE=/vmlinuz root=UUID=2c6b ro console=tty0 console=ttyS0,115200n8
[    1.104321] printk: legacy console [ttyS0] enabled
[    4.871402] Run /init as init process
[    6.410007] EXT4-fs (vda3): mounted filesystem 2c6b ro with ordered data mode. Quota mode: none.
[    7.602113] systemd[1]: systemd 257.13-1~deb13u1 running in system mode (+PAM +AUDIT +SELINUX)
[   24.018833] cloud-init[301]: Cloud-init v. 25.1.4 running 'init-local' at Tue, 24 Nov 2026 06:40:11 +0000. Up 23.95 seconds.
[   33.442871] cloud-init[301]: Cloud-init v. 25.1.4 running 'init' at Tue, 24 Nov 2026 06:40:20 +0000. Up 33.39 seconds.
bakehouse-agent: 40.120 started
bakehouse-agent: 40.311 configured
bakehouse-agent: 40.502 network 10.0.0.5
bakehouse-agent: 40.610 secret inline
bakehouse-agent: 41.700 waiting the controller at 10.0.0.1:6817
bakehouse-agent: 43.005 controller 10.0.0.1:6817
bakehouse-agent: 46.117 services munge slurmd
bakehouse-agent: 48.930 registered node-1
bakehouse-agent: 49.204 joined node-1
[   52.118022] cloud-init[301]: Cloud-init v. 25.1.4 running 'modules:config' at Tue, 24 Nov 2026 06:40:39 +0000. Up 52.03 seconds.
[   55.700121] cloud-init[301]: Cloud-init v. 25.1.4 running 'modules:final' at Tue, 24 Nov 2026 06:40:42 +0000. Up 55.61 seconds.
[   57.310045] cloud-init[301]: Cloud-init v. 25.1.4 finished at Tue, 24 Nov 2026 06:40:44 +0000. Datasource DataSourceNoCloud [seed=/dev/vdb].  Up 57.22 seconds"""  # noqa: E501

GUEST = """\
--- manager
InitRDTimestampMonotonic=0
UserspaceTimestampMonotonic=7588310
FinishTimestampMonotonic=58020114
--- units
Id=cloud-init-main.service
InactiveExitTimestampMonotonic=14201100
ActiveEnterTimestampMonotonic=23710440

InactiveExitTimestampMonotonic=23801992
ActiveEnterTimestampMonotonic=27405008
Id=cloud-init-local.service

Id=cloud-init-network.service
InactiveExitTimestampMonotonic=33120075
ActiveEnterTimestampMonotonic=38904410

Id=cloud-init.service
InactiveExitTimestampMonotonic=0
ActiveEnterTimestampMonotonic=0

Id=cloud-config.service
InactiveExitTimestampMonotonic=51900340
ActiveEnterTimestampMonotonic=55010200

Id=cloud-final.service
InactiveExitTimestampMonotonic=55490010
ActiveEnterTimestampMonotonic=57400991

Id=systemd-networkd.service
InactiveExitTimestampMonotonic=28010000
ActiveEnterTimestampMonotonic=29204410

Id=systemd-networkd-wait-online.service
InactiveExitTimestampMonotonic=29204900
ActiveEnterTimestampMonotonic=32990210

Id=network-online.target
InactiveExitTimestampMonotonic=38905000
ActiveEnterTimestampMonotonic=38905000

Id=ssh.service
InactiveExitTimestampMonotonic=41020000
ActiveEnterTimestampMonotonic=42107700

Id=munge.service
InactiveExitTimestampMonotonic=43101000
ActiveEnterTimestampMonotonic=43990000

Id=slurmd.service
InactiveExitTimestampMonotonic=44002000
ActiveEnterTimestampMonotonic=46100000

Id=bakehouse-agent.service
InactiveExitTimestampMonotonic=38950000
ActiveEnterTimestampMonotonic=18446744073709551615

Id=serial-getty@ttyS0.service
InactiveExitTimestampMonotonic=50120000
ActiveEnterTimestampMonotonic=50120100
--- kernel
[    4.871402] Run /init as init process
--- status
{"state": "joined", "phase": "joined", "platform": "slurm", "node": "node-1", "attempt": 1, "since": 49.2,
 "timeline": [["started", 40.12], ["configured", 40.311], ["joined", 49.204]]}

--- uptime
61.37 38.20
"""

FACTS = GuestFacts.parse(GUEST)


def console_of(text: str, delays: list[float] | None = None, kernel: float = KERNEL) -> list[ConsoleLine]:
    """Let lines arrive as late after their stamps as said; the early kernel all at once, when the port is there."""
    lines = [ConsoleLine(POWER_ON + at, said) for at, said in FIRMWARE]
    for number, said in enumerate(text.splitlines()):
        guest = float(said.partition("] ")[0].strip("[ ")) if said.startswith("[") else float(said.split()[1])
        delay = delays[number % len(delays)] if delays else 0.0
        lines.append(ConsoleLine(kernel + max(guest, 1.104321) + delay, said))
    return lines


def booted(guest: GuestFacts = FACTS) -> Timeline:
    lines = [*console_of(CONSOLE), ConsoleLine(KERNEL + 50.9, "node-1 login: ")]
    return from_boot(lines, POWER_ON, guest, accelerator="tcg")


def at(found: Timeline) -> dict[str, float]:
    return {moment.name: moment.seconds for moment in found.moments}


@pytest.mark.parametrize("name", ["bootstrap", "containers"])
def test_what_prepares_a_plain_node_has_moments_and_spans(name: str) -> None:
    said = f"--- {name}\n9.50 started\n11.25 first\nnonsense\n60.00 last\n"
    found = booted(dataclasses.replace(FACTS, preparation=GuestFacts.parse(said).preparation))
    assert {moment: at(found)[f"{name} {moment}"] for moment in ("started", "first", "last")} == {
        "started": 12.75, "first": 14.5, "last": 63.25,
    }  # fmt: skip
    assert [span for span in spans(found) if span.name.startswith(name)] == [
        (f"{name}: first", 12.75, 14.5),
        (f"{name}: last", 14.5, 63.25),
    ]


def test_all_moments_of_a_boot_are_on_one_clock() -> None:
    assert at(booted()) == {
        "power-on": 0.0,
        "boot loader": 1.5,
        "kernel": 3.25,
        "initramfs": 8.121,
        "userspace": 10.838,
        "cloud-init started": 17.451,
        "cloud-init loaded": 26.96,
        "cloud-init local begins": 27.052,
        "cloud-init local ends": 30.655,
        "networkd": 32.454,
        "network online": 36.24,
        "cloud-init network begins": 36.37,
        "cloud-init network ends": 42.154,
        "agent launched": 42.2,
        "agent started": 43.37,
        "agent configured": 43.561,
        "agent network": 43.752,
        "agent secret": 43.86,
        "sshd": 45.358,
        "agent controller": 46.255,
        "munge": 47.24,
        "slurmd": 49.35,
        "agent services": 49.367,
        "agent registered": 52.18,
        "agent joined": 52.454,
        "getty": 53.37,
        "login prompt": 54.15,
        "cloud-init config begins": 55.15,
        "cloud-init config ends": 58.26,
        "cloud-init final begins": 58.74,
        "cloud-init final ends": 60.651,
        "boot finished": 61.27,
    }


def test_without_ssh_the_console_still_tells_the_boot() -> None:
    found = booted(GuestFacts())
    seconds = at(found)
    assert seconds["initramfs"] == 8.121
    assert seconds["userspace"] == 10.852
    assert seconds["cloud-init config begins"] == 55.28
    assert seconds["cloud-init final ends"] == 60.47
    assert seconds["agent joined"] == 52.454
    assert "sshd" not in seconds
    assert {moment.source for moment in found.moments} == {"host", "console"}


def test_the_status_file_fills_what_the_console_does_not_say() -> None:
    lines = console_of(CONSOLE.replace("bakehouse-agent: 49.204 joined", "bakehouse-agent: 49.204 jo"))
    found = from_boot(lines, POWER_ON, FACTS)
    assert [m.source for m in found.moments if m.name == "agent joined"] == ["agent"]


def test_of_an_agent_that_was_started_twice_the_first_phases_count() -> None:
    again = "bakehouse-agent: 70.000 started\nbakehouse-agent: 71.000 joined node-1"
    found = from_boot(console_of(f"{CONSOLE}\n{again}"), POWER_ON, FACTS)
    assert found.seconds("agent joined") == 52.454


def test_waiting_and_failed_are_no_moments() -> None:
    found = from_boot(console_of(f"{CONSOLE}\nbakehouse-agent: 70.000 failed"), POWER_ON, GuestFacts())
    assert not {"agent waiting", "agent failed"} & at(found).keys()


def test_debian_12_runs_each_stage_as_an_own_process() -> None:
    text = "--- units\n" + "\n".join(
        f"Id={name}.service\nInactiveExitTimestampMonotonic={began}000000\nActiveEnterTimestampMonotonic={up}000000\n"
        for name, began, up in [("cloud-init-local", 10, 14), ("cloud-init", 15, 20), ("cloud-init-main", 0, 0)]
    )
    seconds = at(from_boot(console_of("[    1.200000] x"), POWER_ON, GuestFacts.parse(text)))
    assert seconds["cloud-init started"] == seconds["cloud-init local begins"] == 13.25
    assert "cloud-init loaded" not in seconds
    assert (seconds["cloud-init network begins"], seconds["cloud-init network ends"]) == (18.25, 23.25)


def test_a_quiet_kernel_leaves_the_agents_lines_to_tie_the_clocks() -> None:
    lines = [line for line in console_of(CONSOLE) if "bakehouse-agent" in line.text]
    found = from_boot(lines, POWER_ON, FACTS)
    assert found.seconds("kernel") == 3.25
    assert found.seconds("initramfs") == 8.121


def test_a_silent_console_leaves_the_reply_over_ssh() -> None:
    found = from_boot([], POWER_ON, FACTS, asked=(KERNEL + 59.0, KERNEL + 61.5))
    assert found.seconds("kernel") == pytest.approx(3.38)
    assert found.clock_error == 2.5
    assert found.moments[1].source == "ssh"


def test_a_reply_that_came_late_does_not_loosen_the_tie() -> None:
    found = from_boot(console_of(CONSOLE), POWER_ON, FACTS, asked=(KERNEL + 59.0, KERNEL + 70.0))
    assert found.seconds("kernel") == 3.25


def test_without_a_tie_only_what_the_host_saw_is_there() -> None:
    found = from_boot([ConsoleLine(POWER_ON + 70, "node-1 login: ")], POWER_ON, FACTS)
    assert at(found) == {"power-on": 0.0, "login prompt": 70.0}
    assert found.clock_error is None


def test_a_reboot_counts_from_its_reset_and_forgets_the_boot_before() -> None:
    first = [*console_of(CONSOLE), ConsoleLine(KERNEL + 51, "node-1 login: ")]
    reset = KERNEL + 100.0
    late = [ConsoleLine(reset + 0.3, "[   99.900000] reboot: Restarting system")]
    second = [
        ConsoleLine(reset + 2.0, "  Booting `Linux'"),
        ConsoleLine(reset + 4.0, "[    1.000000] printk: legacy console [ttyS0] enabled"),
        ConsoleLine(reset + 43.0, "bakehouse-agent: 40.000 joined node-1"),
        ConsoleLine(reset + 45.0, "node-1 login: "),
    ]
    found = from_boot([*first, *late, *second], reset, GuestFacts())
    assert at(found) == {
        "power-on": 0.0, "boot loader": 2.0, "kernel": 3.0, "agent joined": 43.0, "login prompt": 45.0,
    }  # fmt: skip


def test_a_machine_that_rebooted_by_itself_is_tied_by_its_last_boot() -> None:
    second = KERNEL + 200
    lines = [*console_of(CONSOLE), ConsoleLine(second + 1.5, "[    1.500000] printk: legacy console [ttyS0] enabled")]
    found = from_boot(lines, POWER_ON, FACTS, asked=(second + 60.5, second + 62.0))
    assert found.seconds("kernel") == 203.25


def lateness(delays: list[float]) -> list[float]:
    """Return how late after its stamp each line comes, the smallest first: the first two wait for the serial port."""
    waits = [1.104321, 1.104321]
    return sorted(
        delays[number % len(delays)] + (waits[number] if number < len(waits) else 0)
        for number in range(len(CONSOLE.splitlines()))
    )


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=40))
def test_the_tie_is_late_by_the_smallest_delay_and_no_more(delays: list[float]) -> None:
    found = from_boot(console_of(CONSOLE, delays), POWER_ON, FACTS)
    assert found.seconds("kernel") == pytest.approx(3.25 + lateness(delays)[0], abs=0.001)


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=20, max_size=40))
def test_the_clock_error_is_the_lead_of_the_fastest_line(delays: list[float]) -> None:
    found = from_boot(console_of(CONSOLE, delays), POWER_ON, FACTS)
    fastest, second = lateness(delays)[:2]
    assert found.clock_error == pytest.approx(second - fastest, abs=0.001)


def test_lines_that_came_in_one_piece_do_not_make_the_clock_look_exact() -> None:
    together = [ConsoleLine(POWER_ON + 10, f"[    5.00{number}000] usb") for number in range(9)]
    found = from_boot([*together, ConsoleLine(POWER_ON + 20, "[   14.500000] x")], POWER_ON, FACTS)
    assert found.seconds("kernel") == 4.992
    assert found.clock_error == 0.508
    assert from_boot(together, POWER_ON, FACTS).clock_error is None


PIECES = st.sampled_from([
    "[", "]", "    1.234567", "9" * 400 + ".000000", "bakehouse-agent: ", "64.213 joined", " login:", "\x1b[2J", "\x00",
    "Cloud-init v. 1 running 'init' at x. Up 3.2 seconds", "Run /init as init process", "GRUB", "--- units\n", "Id=x\n",
    "ActiveEnterTimestampMonotonic=", "9" * 5000, "--- status\n", '{"timeline": [[1, 2], ["joined", 1e999]]}', "\n",
    "[" * 3000, '{"timeline": [["a", NaN]]}', "12.3 4.5\n", "\u2028", "--- kernel\n", "--- manager\n", "\ud800",
    "--- uptime\n",
])  # fmt: skip
GARBAGE = st.lists(PIECES | st.text(max_size=20), max_size=8).map("".join)


@settings(deadline=None)
@given(
    lines=st.lists(st.builds(ConsoleLine, st.floats(-1e9, 1e9), GARBAGE), max_size=8),
    guest=GARBAGE,
    asked=st.none() | st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)),
)
def test_whatever_the_console_and_the_guest_say_there_is_a_timeline(
    lines: list[ConsoleLine], guest: str, asked: tuple[float, float] | None
) -> None:
    found = from_boot(lines, 0.0, GuestFacts.parse(guest), asked=asked)
    seconds = [moment.seconds for moment in found.moments]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.0
    assert len(at(found)) == len(seconds)
    assert all(span.start <= span.end for span in spans(found))
    assert Timeline.model_validate_json(found.model_dump_json()) == found
    show(Console(file=io.StringIO(), width=80), found)


def test_a_moment_can_be_added_and_replaced() -> None:
    found = with_moment(booted(), timeline.FIRST_JOB, 70.1239)
    assert found.moments[-1].seconds == 70.124
    found = with_moment(found, timeline.FIRST_JOB, 50)
    assert found.seconds(timeline.FIRST_JOB) == 50
    assert [m.name for m in found.moments].count(timeline.FIRST_JOB) == 1
    assert [m.seconds for m in found.moments] == sorted(m.seconds for m in found.moments)


def test_a_timeline_is_kept_as_json() -> None:
    found = booted()
    assert Timeline.model_validate_json(found.model_dump_json(indent=2)) == found


def test_spans_name_what_lasted() -> None:
    found = {span.name: span for span in spans(with_moment(booted(), timeline.FIRST_JOB, 55.0))}
    assert found["firmware"][1:] == (0.0, 1.5)
    assert found["boot loader"][1:] == (1.5, 3.25)
    assert found["kernel"][1:] == (3.25, 8.121)
    assert found["cloud-init loads"][1:] == (17.451, 26.96)
    assert found["agent: started"][1:] == (42.2, 43.37)
    assert found["agent: joined"][1:] == (52.18, 52.454)
    assert found["first job"][1:] == (52.454, 55.0)


def test_spans_that_cannot_be_told_apart_are_one() -> None:
    lines = [ConsoleLine(POWER_ON + 9, "[    4.000000] systemd[1]: systemd 252.39 running in system mode (+PAM)")]
    assert [span.name for span in spans(from_boot(lines, POWER_ON, GuestFacts()))] == [
        "firmware and loader",
        "kernel and initramfs",
    ]


def shown(found: Timeline, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding=encoding)
    show(Console(file=output, width=width), found)
    output.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_the_table_and_the_bars_fit_a_pipe_of_80_columns() -> None:
    lines = shown(with_moment(booted(), timeline.FIRST_JOB, 70.0))
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line or "…" in line for line in lines)
    assert any(line.split() == ["agent", "joined", "52.45", "s", "+0.27", "console"] for line in lines)
    joined = next(line for line in lines if line.startswith("agent: joined"))
    assert joined.endswith("0.27 s")
    assert "█" in "".join(lines)


def test_a_terminal_without_unicode_gets_plain_signs() -> None:
    assert "###" in "".join(shown(booted(), encoding="ascii"))


def test_a_timeline_of_nothing_but_power_on_is_shown() -> None:
    lines = shown(from_boot([], POWER_ON, GuestFacts()))
    assert [line.split() for line in lines[1:]] == [["power-on", "0.00", "s", "host"]]


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 90))
def test_a_bar_is_always_seen_and_never_too_long(one: float, other: float, width: int) -> None:
    bar = timeline._bar(min(one, other), max(one, other), width)
    assert bar.strip()
    assert len(bar) <= width


def test_the_guests_command_is_shell_that_ends_well_without_systemd() -> None:
    done = subprocess.run(["sh", "-c", timeline.GUEST_COMMAND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert GuestFacts.parse(done.stdout).uptime
