"""One-time tokens of the join broker, made where its state is: what is behind ``invoke join.token``.

The broker's own file defines what a token is. It is loaded by its path, since it is installed alone on controllers
and belongs to no package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bakehouse import REPOSITORY
from bakehouse.errors import BakehouseError

BROKER = REPOSITORY / "bootstrap" / "broker" / "bakehouse_broker.py"


@dataclass(frozen=True)
class Issued:
    """A token that was made. Times are in seconds since 1970."""

    identity: str
    """The first 8 hex digits of its hash: what logs and lists call it."""
    platform: str
    node: str
    made: int
    expires: int
    used: int | None
    used_by: str | None
    """The address that it was used from."""
    revoked: int | None
    status: str
    """``good``, ``used``, ``revoked`` or ``expired``."""


@functools.cache
def broker() -> ModuleType:
    """Return the broker's module."""
    spec = importlib.util.spec_from_file_location("bakehouse_broker", BROKER)
    if spec is None or spec.loader is None:
        raise BakehouseError(f"{BROKER} cannot be loaded", hint="the checkout is not whole")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look up their module there.
    spec.loader.exec_module(module)
    return module


def lifetime_seconds(text: str) -> int:
    """Return the seconds of a lifetime such as ``30m``, ``2h`` or ``1d``.

    Raises:
        BakehouseError: it is not a lifetime, or longer than 30 days.
    """
    with _told_plainly():
        return int(broker().parse_lifetime(text))


def state_of(config: Path) -> Path:
    """Return where a broker keeps its state, as its configuration says.

    Raises:
        BakehouseError: the configuration cannot be read or is wrong.
    """
    with _told_plainly():
        return Path(broker().load_config(config).state)


def create(state: Path, *, platform: str, node: str, lifetime_seconds: int) -> str:
    """Make a token that is good once, for one node; it is returned and stored nowhere in clear.

    Args:
        state: the broker's SQLite file; made, readable by its owner alone, where it is not there.
        platform: such as ``slurm``.
        node: the node's host name, first label.
        lifetime_seconds: how long it is good.

    Raises:
        BakehouseError: the platform, node or lifetime is none, or the state cannot be written.
    """
    with _told_plainly():
        return str(broker().create_token(state, platform, node, lifetime_seconds, time.time()))


def listing(state: Path) -> list[Issued]:
    """Return what is known of all tokens of the last days, the newest first.

    Raises:
        BakehouseError: the state cannot be read.
    """
    with _told_plainly():
        return [_issued(token) for token in broker().list_tokens(state)]


def revoke(state: Path, which: str) -> list[Issued]:
    """Make good tokens void: those of a node, or those whose identity begins so (at least 8 hex digits).

    Raises:
        BakehouseError: there is none, or the state cannot be written.
    """
    with _told_plainly():
        revoked = [_issued(token) for token in broker().revoke_tokens(state, which, time.time())]
    if not revoked:
        raise BakehouseError(f"there is no good token of '{which}'", hint="invoke join.tokens lists them")
    return revoked


def _issued(token: object) -> Issued:
    fields = {field.name: getattr(token, field.name) for field in dataclasses.fields(Issued) if field.name != "status"}
    return Issued(**fields, status=token.status(time.time()))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """Turn the broker's errors into the library's."""
    try:
        yield
    except broker().BrokerError as error:
        raise BakehouseError(error.message, hint=error.hint) from error
