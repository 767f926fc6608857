"""Progress of long work: a live view on a terminal, plain timed lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bakehouse.record import Step


@dataclass
class _Stage:
    name: str
    expected: float | None = None
    started: float | None = None
    seconds: float | None = None
    state: str = "waiting"  # waiting, running, done, cached, failed


class Progress:
    """Shows stages with the seconds they take and took last time, and keeps the seconds for the record.

    Args:
        title: what is being done.
        names: the stages in their order.
        console: where to show it.
        expected: seconds of each stage the last time that it had something to do.
        verbose: show every line of output instead of the live view.
    """

    def __init__(
        self,
        title: str,
        names: list[str],
        console: Console,
        *,
        expected: dict[str, float] | None = None,
        verbose: bool = False,
    ) -> None:
        self.title = title
        self.console = console
        self.verbose = verbose
        self._stages = {name: _Stage(name, (expected or {}).get(name)) for name in names}
        self._begun = time.monotonic()
        self._line = ""
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.verbose:
            self.console.print(Text(self.title, style="bold"))
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=False)
            self._live.__enter__()
        else:
            self._say(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._line = ""
            self._live.__exit__(None, None, None)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    @property
    def steps(self) -> list[Step]:
        """The stages that are over."""
        return [
            Step(name=stage.name, seconds=round(stage.seconds, 3), cached=stage.state == "cached")
            for stage in self._stages.values()
            if stage.seconds is not None
        ]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        stage = self._stages[name]
        stage.started, stage.state = time.monotonic(), "running"
        self._say(f"{name} ...")
        try:
            yield
        except BaseException:
            stage.state = "failed"
            raise
        else:
            if stage.state == "running":
                stage.state = "done"
        finally:
            stage.seconds = time.monotonic() - stage.started
            last = f" (last time {stage.expected:.1f} s)" if stage.expected else ""
            self._say(f"{name}: {stage.state}, {stage.seconds:.1f} s{last}")

    def cached(self, name: str) -> None:
        """Mark the running stage as one that needed no work."""
        self._stages[name].state = "cached"

    def line(self, text: str) -> None:
        """Take a line of a program's output."""
        if self.verbose:
            self.console.print(text, markup=False, highlight=False)
        elif text.strip():
            self._line = text

    def note(self, text: str) -> None:
        """Say something that shall stay on the screen."""
        if self._live:
            self._live.console.print(Text(text, style="yellow"))
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._live is None:
            self.console.print(f"[{self.elapsed:7.1f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=2)
        grid.add_column()
        grid.add_column(justify="right")
        grid.add_column(style="dim")
        for stage in self._stages.values():
            running = stage.state == "running" and stage.started is not None
            seconds = time.monotonic() - stage.started if running and stage.started is not None else stage.seconds
            marks: dict[str, RenderableType] = {
                "waiting": Text("·", style="dim"),
                "running": self._spinner,
                "done": Text("✓", style="green"),
                "cached": Text("✓", style="blue"),
                "failed": Text("✗", style="bold red"),
            }
            beside = "from the cache" if stage.state == "cached" else ""
            if not beside and stage.expected:
                beside = f"last time {stage.expected:.1f} s"
            grid.add_row(
                marks[stage.state],
                Text(stage.name, style="bold" if running else ""),
                "" if seconds is None else f"{seconds:.1f} s",
                beside,
            )
        line = Text(self._line.strip(), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(grid, line) if self._line else grid
