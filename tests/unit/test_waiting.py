"""Waiting for facts: no longer than needed, no longer than allowed, and not for what cannot come."""

from __future__ import annotations

import time

import pytest

from bakehouse import waiting
from bakehouse.errors import BakehouseError


def refuse() -> None:
    raise BakehouseError("the machine went off")


def test_what_holds_already_is_not_waited_for() -> None:
    begun = time.monotonic()
    waiting.until("start", lambda: True, 0, poll=60, check=refuse)
    assert time.monotonic() - begun < 1


def test_what_comes_to_hold_ends_the_wait() -> None:
    answers = iter([False, False, True])
    waiting.until("start", lambda: next(answers), 60, poll=0.001)
    assert next(answers, None) is None


def test_what_does_not_come_is_named_with_the_last_words() -> None:
    with pytest.raises(BakehouseError, match="no login over SSH within 0 s") as caught:
        waiting.until("login over SSH", lambda: False, 0.01, poll=0.001, last_words=lambda: "Kernel panic")
    assert caught.value.log == "Kernel panic"
    assert "more time" in caught.value.hint


def test_what_cannot_come_any_more_is_not_waited_for() -> None:
    begun = time.monotonic()
    with pytest.raises(BakehouseError, match="the machine went off"):
        waiting.until("login", lambda: False, 60, poll=60, check=refuse, last_words=lambda: "unused")
    assert time.monotonic() - begun < 1
