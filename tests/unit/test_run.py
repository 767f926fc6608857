"""Programs: their output is logged without passwords, their failures told, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import string
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bakehouse import run
from bakehouse.errors import BakehouseError
from bakehouse.run import CommandError, Log, redact


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "log")
    yield made
    made.close()


def lines(log: Log) -> list[str]:
    """Return the lines of the log's file without their times."""
    return [line[9:] for line in log.path.read_text().splitlines()]


# Passwords.


USER_INFO = st.text(string.ascii_letters + string.digits + "-._~%!$&'()*+,;=:", min_size=1, max_size=12)
"""What RFC 3986 (3.2.1) lets stand before the @."""


@hypothesis_settings(max_examples=150, deadline=None, database=None)
@given(USER_INFO, USER_INFO)
def test_a_password_in_an_address_never_survives(user: str, password: str) -> None:
    line = f"Get:1 http://{user}:{password}@mirror.example/debian trixie [10 kB]"
    assert redact(line) == "Get:1 http://***@mirror.example/debian trixie [10 kB]"


@pytest.mark.parametrize("password", ["p@ss", "p'ss", "@", "it's"])
def test_a_password_that_looks_like_an_end_does_not_survive(password: str) -> None:
    assert redact(f"see http://user:{password}@mirror.example/") == "see http://***@mirror.example/"


def test_all_addresses_of_a_line_are_blotted(log: Log) -> None:
    assert redact("http://a:b@c/ 'https://d:e@f/' \"ftp://g@h\"") == "http://***@c/ 'https://***@f/' \"ftp://***@h\""


@pytest.mark.parametrize(
    "line",
    [
        "http://deb.debian.org/debian/pool/main/m/munge",
        "mail to somebody@example.org",
        "http://a.example/x @b",
        "http://a.example/@x",
    ],
)
def test_a_line_without_a_password_stays_as_it_is(line: str) -> None:
    assert redact(line) == line


def test_a_password_gets_nowhere(tmp_path: Path) -> None:
    heard: list[str] = []
    log = Log(tmp_path / "log", heard.append)
    run.run(["echo", "http://user:s3cret@host/"], log)
    log.close()
    assert heard == ["$ echo http://***@host/", "http://***@host/"]
    assert "s3cret" not in log.path.read_text() + log.recent()


# The log.


def test_a_log_has_times_in_its_file_only(log: Log) -> None:
    log.write("one\n")
    log.write("two")
    assert log.tail() == log.recent() == "one\ntwo"
    first, second = log.path.read_text().splitlines()
    assert (first[8:], second[8:]) == (" one", " two")
    assert 0 <= float(first[:8]) <= float(second[:8]) < 60


def test_a_tail_is_the_last_lines(log: Log) -> None:
    for number in range(1000):
        log.write(str(number))
    assert log.tail(3) == "997\n998\n999"
    assert log.tail().count("\n") == run.TAIL_LINES - 1
    assert log.tail(0) == ""
    assert log.recent().splitlines()[-1] == "999"
    assert log.recent().count("\n") < 500, "not all of a long log is kept in memory"
    assert len(lines(log)) == 1000


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    for word in ("one", "two"):
        log = Log(tmp_path / "log")
        log.write(word)
        log.close()
    assert lines(log) == ["one", "two"]


# Programs.


def test_a_programs_output_is_logged(log: Log) -> None:
    run.run(["sh", "-c", "echo out; echo err >&2; printf 'caf\\351'"], log)
    assert log.recent().splitlines()[1:] == ["out", "err", "caf�"]
    assert lines(log)[0].startswith("$ sh -c ")


def test_a_program_sees_the_environment_that_it_is_given(log: Log) -> None:
    run.run(["/bin/sh", "-c", "echo a=$ONE b=$HOME"], log, environment={"ONE": "1"})
    assert log.tail(1) == "a=1 b="


def test_a_program_reads_nothing(log: Log) -> None:
    run.run(["sh", "-c", "read line || echo end"], log)
    assert log.tail(1) == "end"


def test_a_failure_has_the_status_and_the_last_lines(log: Log) -> None:
    log.write("before")
    with pytest.raises(CommandError) as caught:
        run.run(["/bin/sh", "-c", "seq 100; exit 3"], log)
    assert caught.value.status == 3
    assert caught.value.message == "sh failed with exit status 3"
    assert caught.value.log.splitlines() == [str(number) for number in range(89, 101)]


def test_a_failure_does_not_show_what_others_said(log: Log) -> None:
    run.run(["echo", "of another program"], log)
    with pytest.raises(CommandError) as caught:
        run.run(["sh", "-c", "echo mine; exit 1"], log)
    assert caught.value.log == "mine"
    with pytest.raises(CommandError) as caught:
        run.run(["false"], log)
    assert caught.value.log == ""


def test_a_program_that_was_killed_is_told_by_the_signals_name(log: Log) -> None:
    with pytest.raises(CommandError, match="sh was ended by SIGKILL") as caught:
        run.run(["sh", "-c", "kill -KILL $$"], log)
    assert caught.value.status == -signal.SIGKILL


def test_a_program_that_is_not_installed_is_named(log: Log) -> None:
    with pytest.raises(BakehouseError, match="frobnicate is not installed") as caught:
        run.run(["frobnicate", "--now"], log)
    assert "invoke doctor" in caught.value.hint


def test_a_program_ends_with_us(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STOP_SECONDS", 0.5)

    def stop(line: str) -> None:
        if line == "started":
            raise KeyboardInterrupt

    log.listener = stop
    mark = str(tmp_path / "mark")
    with pytest.raises(KeyboardInterrupt):
        run.run(["sh", "-c", f"trap '' TERM; sleep 1000 & echo started; wait; : {mark}"], log)
    # The kernel takes a moment to be done with the children.
    deadline = time.monotonic() + 10
    while processes_with(mark):
        assert time.monotonic() < deadline, processes_with(mark)
        time.sleep(0.01)


def test_sigterm_becomes_an_exit() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, run.ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


# Isolated programs.


def isolated(script: str, log: Log, **environment: str) -> run.Took:
    return run.isolated(["sh", "-ec", script], log, environment=environment)


def mounts_with(text: str) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if text in line]


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def test_mounts_made_inside_are_not_seen_outside(log: Log, tmp_path: Path) -> None:
    inside = tmp_path / "shared" / "inside"
    inside.mkdir(parents=True)
    # Where a host shares its mounts, as systemd makes it do, what is mounted below would come through.
    with mounted(inside.parent, "--bind", "--make-shared", str(inside.parent)):
        isolated(f"mount -t tmpfs tmpfs {inside}; touch {inside}/file; grep -c {inside} /proc/self/mountinfo", log)
        assert log.tail(1) == "1", "it was mounted"
        assert mounts_with(str(inside)) == []
        assert list(inside.iterdir()) == []


def test_a_process_left_in_the_background_does_not_survive(log: Log, tmp_path: Path) -> None:
    mark = tmp_path / "left-behind"
    mark.symlink_to("/bin/sleep")
    isolated(f"setsid {mark} 1000 </dev/null >/dev/null 2>&1 & while [ $(ls /proc | grep -c '^[0-9]') -lt 4 ]; do :; "
             "done; cat /proc/[0-9]*/cmdline | tr '\\0' ' '", log)  # fmt: skip
    assert f"{mark} 1000" in log.recent().partition("\n")[2], "it was running"
    assert processes_with(str(mark)) == []


def test_processes_outside_are_not_seen_inside(log: Log) -> None:
    isolated("echo $$; ls -d /proc/[0-9]*", log)
    numbers = [int(line.rpartition("/")[2]) for line in log.recent().splitlines()[1:]]
    assert 1 in numbers
    assert max(numbers) < 20


def test_the_callers_environment_is_not_seen(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DIB_RELEASE", "sid"), ("FROBNICATE", "1"), ("http_proxy", "http://p/"), ("TZ", "UTC")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LANG", raising=False)
    isolated("env", log, OWN="yes")
    seen = dict(line.split("=", 1) for line in log.recent().splitlines() if not line.startswith("$ "))
    shells_own = {"PWD", "SHLVL", "OLDPWD", "_"}
    assert set(seen) - shells_own <= {*run.PASSED_ON, "PATH", "LANG", "OWN"}
    assert (seen["OWN"], seen["http_proxy"], seen["TZ"]) == ("yes", "http://p/", "UTC")
    assert seen["LANG"] == "C.UTF-8"
    assert "/usr/sbin" in seen["PATH"].split(":")


def test_what_a_program_took_is_reported(log: Log) -> None:
    took = isolated("i=0; end=$(($(date +%s%N) + 450000000)); while [ $(date +%s%N) -lt $end ]; do :; done", log)
    assert 100_000 < took.peak_memory < 1 << 30
    assert 0.01 < took.cpu_seconds < 10


def test_an_isolated_failure_has_the_status_and_the_last_lines(log: Log) -> None:
    with pytest.raises(CommandError, match="sh failed with exit status 7") as caught:
        isolated("echo went wrong; exit 7", log)
    assert (caught.value.status, caught.value.log) == (7, "went wrong")


def test_an_isolated_program_that_is_killed_fails(log: Log) -> None:
    with pytest.raises(CommandError, match="sh failed with exit status 137"):
        isolated("kill -KILL $$", log)


def test_an_isolated_program_that_is_missing_is_named(log: Log, tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        run.isolated(["frobnicate"], log, environment={})
    assert "frobnicate: No such file or directory" in caught.value.log


def test_an_isolated_program_ends_with_us(log: Log, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line == "started":
            raise KeyboardInterrupt

    log.listener = stop
    mark = tmp_path / "mark"
    mark.symlink_to("/bin/sleep")
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(KeyboardInterrupt):
        isolated(f"mount -t tmpfs tmpfs {inside}; setsid {mark} 1000 & echo started; wait", log)
    assert processes_with(str(mark)) == []
    assert mounts_with(str(inside)) == []


# Root.


def test_root_needs_no_sudo() -> None:
    assert run.as_root() == []


def fake_sudo(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    sudo = folder / "sudo"
    sudo.write_text(f"#!/bin/sh\nexit {status}\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_another_user_goes_through_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sudo(tmp_path, monkeypatch, 0)
    assert run.as_root() == ["sudo", "-n", "--"]


def test_a_sudo_that_asks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sudo(tmp_path, monkeypatch, 1)
    with pytest.raises(BakehouseError, match="sudo without a password is not to be had") as caught:
        run.as_root()
    assert "NOPASSWD" in caught.value.hint
    (tmp_path / "sudo").unlink()
    with pytest.raises(BakehouseError, match="needs root"):
        run.as_root()


# Removal.


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", str(place)], check=True)


def test_a_folder_is_removed_with_all_in_it(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "z").write_text("")
    (tmp_path / "outside").write_text("")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "outside")
    run.remove_tree(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    run.remove_tree(tmp_path / "x")


def test_a_folder_in_which_something_is_mounted_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "x" / "mounted"
    place.mkdir(parents=True)
    (tmp_path / "x" / "file").write_text("")
    with mounted(place, "-t", "tmpfs", "tmpfs"):
        with pytest.raises(BakehouseError, match=f"{place} is mounted in it") as caught:
            run.remove_tree(tmp_path / "x")
        assert caught.value.hint == f"umount {place}"
        assert (tmp_path / "x" / "file").exists()
    run.remove_tree(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_mount_beside_a_folder_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "xy").mkdir()
    with mounted(tmp_path / "xy", "-t", "tmpfs", "tmpfs"):
        run.remove_tree(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_mounted_in_a_folder_with_a_space_is_left_alone(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "with space" / "mounted", tmp_path / "elsewhere"
    place.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    with mounted(place, "--bind", str(elsewhere)):
        with pytest.raises(BakehouseError, match="cannot be removed"):
            run.remove_tree(tmp_path / "with space")
        assert (elsewhere / "precious").exists()
