"""Progress: plain lines where nobody watches, a live view on a terminal, and the seconds for the record."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from bakehouse.progress import Progress

STAGES = ["base root", "elements", "disk"]


def plain(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=100, force_terminal=terminal), output


def said(output: io.StringIO) -> list[str]:
    """Return the lines without the time at their beginning, which each must have."""
    lines = output.getvalue().splitlines()
    matches = [re.fullmatch(r"\[ *\d+\.\d s\] (.*)", line) for line in lines]
    assert all(matches), lines
    return [match[1] for match in matches if match]


def screen(output: io.StringIO) -> str:
    """Return what was written to a terminal, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_lines_without_a_terminal_are_plain_and_timed() -> None:
    console, output = plain()
    with Progress("Baking slurm", STAGES, console) as progress:
        with progress.stage("base root"):
            progress.line("what a program says")
        with progress.stage("disk"):
            progress.note("watch [this]")
    assert [re.sub(r"\d+\.\d s$", "N s", line) for line in said(output)] == [
        "Baking slurm",
        "base root ...",
        "base root: done, N s",
        "disk ...",
        "watch [this]",
        "disk: done, N s",
    ]
    assert "\x1b" not in output.getvalue()


def test_the_seconds_of_the_last_time_stand_beside() -> None:
    console, output = plain()
    with Progress("Baking", STAGES, console, expected={"disk": 12.34}) as progress:
        for name in ("elements", "disk"):
            with progress.stage(name):
                pass
    lines = said(output)
    assert "last time" not in lines[2]
    assert lines[4].endswith("(last time 12.3 s)")


def test_a_long_line_is_not_broken() -> None:
    console, output = plain()
    with Progress("word " * 100, STAGES, console):
        pass
    assert len(said(output)) == 1


def test_a_stage_that_needed_no_work_is_called_cached() -> None:
    console, output = plain()
    with Progress("Baking", STAGES, console) as progress:
        with progress.stage("base root"):
            progress.cached("base root")
        with progress.stage("disk"):
            pass
    assert said(output)[2].startswith("base root: cached, ")
    assert [(step.name, step.cached) for step in progress.steps] == [("base root", True), ("disk", False)]


def test_a_stage_that_fails_is_called_so() -> None:
    console, output = plain()
    with (
        pytest.raises(RuntimeError, match="no space"),
        Progress("Baking", STAGES, console) as progress,
        progress.stage("disk"),
    ):
        raise RuntimeError("no space")
    assert said(output)[-1].startswith("disk: failed, ")
    assert [step.name for step in progress.steps] == ["disk"]


def test_steps_are_those_that_are_over_with_their_seconds() -> None:
    console, _ = plain()
    with Progress("Baking", STAGES, console) as progress:
        assert progress.steps == []
        with progress.stage("elements"):
            time.sleep(0.05)
            assert progress.steps == []
        with progress.stage("base root"):
            pass
        assert [step.name for step in progress.steps] == ["base root", "elements"], "in the order of the plan"
        assert 0.05 <= progress.steps[1].seconds < 1
        assert progress.elapsed >= 0.05


def test_a_stage_that_is_not_planned_is_a_mistake() -> None:
    console, _ = plain()
    with (
        pytest.raises(KeyError),
        Progress("Baking", STAGES, console) as progress,
        progress.stage("frobnicate"),
    ):
        pass


def test_every_line_is_shown_when_asked_for() -> None:
    console, output = plain()
    with Progress("Baking", STAGES, console, verbose=True) as progress, progress.stage("disk"):
        progress.line("mke2fs [1.47] says")
    assert "mke2fs [1.47] says" in output.getvalue().splitlines()


def test_a_terminal_shows_all_stages_and_what_is_to_be_expected() -> None:
    console, output = plain(terminal=True)
    expected = {"base root": 20.0, "elements": 55.5, "disk": 3.0}
    with Progress("Baking slurm", STAGES, console, expected=expected) as progress:
        with progress.stage("base root"):
            progress.cached("base root")
        with progress.stage("elements"):
            progress.line("dib-run-parts [1] says")
            console.print(progress)
            progress.note("watch [this]")
    shown = screen(output)
    assert "Baking slurm" in shown
    assert "dib-run-parts [1] says" in shown
    assert "watch [this]" in shown
    assert re.search(r"✓ +base root +0\.\d s +from the cache", shown)
    assert re.search(r"✓ +elements +\d\.\d s +last time 55\.5 s", shown)
    assert re.search(r"· +disk +last time 3\.0 s", shown)


def test_a_terminal_shows_what_failed_and_is_given_back() -> None:
    console, output = plain(terminal=True)
    with (
        pytest.raises(KeyboardInterrupt),
        Progress("Baking", STAGES, console) as progress,
        progress.stage("disk"),
    ):
        raise KeyboardInterrupt
    assert re.search(r"✗ +disk", screen(output))
    assert output.getvalue().rpartition("\x1b[?25")[2].startswith("h"), "the cursor is shown again"


def test_a_terminal_that_shows_every_line_has_no_live_view() -> None:
    console, output = plain(terminal=True)
    with Progress("Baking", STAGES, console, verbose=True) as progress, progress.stage("disk"):
        progress.line("mke2fs says")
    assert "mke2fs says" in screen(output)
    assert "\x1b[?25l" not in output.getvalue()
