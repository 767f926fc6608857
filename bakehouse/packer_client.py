"""Packer, driven through python-packer, whose defects are worked around here and nowhere else.

Runs as a program, too (``packer_client.py TEMPLATE VARIABLES BUILDER [SECONDS]``), in the isolated place of a bake.
Imports nothing of this library, since it may run under sudo.

python-packer 0.1.2 dates from Python 2:

- `build()` adds ``-parallel=true``, which Packer has not known since 1.5, and says nothing until Packer has ended.
- `validate()` asks an exception for its ``message``, `inspect()` and `fix()` mix bytes and text: each fails where it
  should answer.

Packer removes what it made when it is stopped by SIGTERM; SIGINT reaches its plugins at the same time as itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import packer
import sh

ENVIRONMENT = {"CHECKPOINT_DISABLE": "1", "PACKER_NO_COLOR": "1"}
"""Variables of Packer: it asks nobody for news of itself, and what it says goes to a log."""

STOP_SECONDS = 60.0
"""What Packer has on this host to remove what it made."""


class PackerError(Exception):
    """Packer failed. Says with which status, and what it wrote where that is not in a log already."""


@dataclass(frozen=True)
class Inspection:
    """What a template holds."""

    variables: dict[str, str]
    """Defaults by name."""
    builders: dict[str, str]
    """Types by name."""
    provisioners: tuple[str, ...]
    """Types, in their order."""


class Client(packer.Packer):  # type: ignore[misc]  # it has no types
    """Packer with one template.

    Args:
        template: the template, in JSON.
        variable_file: values of its variables, in JSON.
        variables: more of them. Everybody on this host can read these while Packer runs.
        only: names of builders; all by default.
        executable: Packer's.

    Raises:
        PackerError: Packer or the template is not there.
    """

    def __init__(
        self,
        template: Path,
        *,
        variable_file: Path | None = None,
        variables: Mapping[str, str] | None = None,
        only: tuple[str, ...] = (),
        executable: str = "packer",
    ) -> None:
        try:
            super().__init__(
                str(template), only=list(only), vars=dict(variables or {}),
                var_file=str(variable_file) if variable_file else None, exec_path=executable,
            )  # fmt: skip
        except sh.CommandNotFound as error:
            raise PackerError(f"{executable} is not installed") from error
        except OSError as error:
            raise PackerError(f"the template {template} is not there") from error
        # The kernel tells Packer to stop where we are killed. sh gives a program a terminal unless it is told not to.
        options = {"_env": {**os.environ, **ENVIRONMENT}, "_tty_out": False}
        self.packer = sh.Command("setpriv").bake("--pdeathsig", "TERM", shutil.which(executable), **options)

    def build(self, out: IO[bytes], *, force: bool = False, stop_seconds: float = STOP_SECONDS) -> None:
        """Build, passing on what Packer says as it says it. SIGTERM stops Packer, which removes what it made.

        Args:
            out: takes what Packer says.
            force: replace what an earlier build has left in the output folder.
            stop_seconds: how long Packer has to remove what it made after SIGTERM before it gets SIGKILL.

        Raises:
            PackerError: Packer failed.
        """
        plain = self.packer
        self.packer = plain.bake(_bg=True, _out=out, _err_to_out=True)
        try:
            running = super().build(parallel=False, force=force)
        finally:
            self.packer = plain

        def end(_number: int, _frame: FrameType | None) -> None:
            # A second signal stops it at once: what it made is then left for others to remove.
            signal.signal(signal.SIGALRM, lambda *_: running.signal(signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, stop_seconds)
            running.signal(signal.SIGTERM)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            running.wait()
        except sh.ErrorReturnCode as error:
            raise PackerError(f"packer build ended with status {error.exit_code}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def validate(self, syntax_only: bool = False) -> None:
        """Check the template and its variables.

        Args:
            syntax_only: leave out what needs the builders.

        Raises:
            PackerError: something is wrong with them. Says what.
        """
        self._call("validate", *(["-syntax-only"] if syntax_only else []), arguments=True)

    def inspect(self) -> Inspection:
        """Return what the template holds.

        Raises:
            PackerError: it cannot be read.
        """
        found = self._parse_inspection_output(self._call("inspect", "-machine-readable"))
        return Inspection(
            variables={one["name"]: one["value"] for one in found["variables"]},
            builders={one["name"]: one["type"] for one in found["builders"]},
            provisioners=tuple(one["type"] for one in found["provisioners"]),
        )

    def fix(self) -> dict[str, Any]:
        """Return the template as this version of Packer wants it.

        Raises:
            PackerError: it cannot be read.
        """
        fixed: dict[str, Any] = json.loads(self._call("fix"))
        return fixed

    def version(self) -> str:
        """Return Packer's version, such as 1.6.6."""
        return self._decoded(self.packer("version")).splitlines()[0].split("v")[-1].strip()

    def _call(self, command: str, *options: str, arguments: bool = False) -> str:
        self.packer_cmd = self.packer.bake(command, *options)
        if arguments:
            self._append_base_arguments()
        try:
            return self._decoded(self.packer_cmd(self.packerfile))
        except sh.ErrorReturnCode as error:
            said = (error.stdout + error.stderr).decode(errors="replace").strip()
            raise PackerError(f"packer {command} ended with status {error.exit_code}:\n{said}") from error

    @staticmethod
    def _decoded(done: sh.RunningCommand) -> str:
        return bytes(done.stdout).decode(errors="replace")


def main() -> int:
    """Build a template; arguments are the template, its variables' file, a builder's name, and seconds to stop in."""
    _, template, variables, builder, *more = sys.argv
    seconds = float(more[0]) if more else STOP_SECONDS
    try:
        client = Client(Path(template), variable_file=Path(variables), only=(builder,))
        client.build(sys.stdout.buffer, stop_seconds=seconds)
    except PackerError as error:
        print(f"packer_client: {error}")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
