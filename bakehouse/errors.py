"""The one kind of error that a user can cause."""

from __future__ import annotations


class BakehouseError(Exception):
    """Something that the user can mend.

    Args:
        message: one sentence: what is wrong and where.
        hint: one sentence: what to do about it.
        log: the last lines of a program's output, where a program failed.
    """

    def __init__(self, message: str, *, hint: str = "", log: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        if log:
            # For tracebacks: a failed test or --debug shows it too.
            self.add_note(log)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
