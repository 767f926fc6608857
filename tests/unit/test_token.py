"""Tokens made from the library: what `invoke join.token` stands on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bakehouse import token
from bakehouse.errors import BakehouseError


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "broker" / "tokens.sqlite"


def make(state: Path, node: str = "node-1", *, lifetime: int = 3600) -> str:
    return token.create(state, platform="slurm", node=node, lifetime_seconds=lifetime)


def test_a_token_has_256_random_bits(state: Path) -> None:
    made = {make(state) for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"bhj_[A-Za-z0-9_-]{43}", each) for each in made)


def test_the_state_holds_no_token_and_is_for_its_owner_alone(state: Path) -> None:
    made = make(state)
    assert made.encode() not in state.read_bytes()
    assert made[4:20].encode() not in state.read_bytes()
    assert state.stat().st_mode & 0o777 == 0o600
    assert state.parent.stat().st_mode & 0o777 == 0o700


def test_a_state_that_others_may_read_is_closed_to_them(state: Path) -> None:
    make(state)
    state.chmod(0o644)
    make(state)
    assert state.stat().st_mode & 0o777 == 0o600


def test_the_list_names_the_newest_first(state: Path) -> None:
    make(state, "node-1")
    make(state, "Node-2", lifetime=60)
    newest, oldest = token.listing(state)
    assert (newest.node, newest.platform, newest.status, newest.used) == ("node-2", "slurm", "good", None)
    assert newest.expires - newest.made == 60
    assert oldest.node == "node-1"
    assert re.fullmatch("[0-9a-f]{8}", oldest.identity)


def test_a_state_that_is_not_there_has_no_tokens_and_stays_away(state: Path) -> None:
    assert token.listing(state) == []
    assert not state.parent.exists()


def test_all_tokens_of_a_node_are_revoked(state: Path) -> None:
    for node in ("node-1", "node-1", "node-2"):
        make(state, node)
    assert [(each.node, each.status) for each in token.revoke(state, "NODE-1")] == [("node-1", "revoked")] * 2
    assert {each.node: each.status for each in token.listing(state)} == {"node-1": "revoked", "node-2": "good"}


def test_one_token_is_revoked_by_its_identity(state: Path) -> None:
    make(state)
    make(state)
    first = token.listing(state)[0]
    assert token.revoke(state, first.identity) == [
        dataclasses.replace(first, status="revoked", revoked=token.listing(state)[0].revoked)
    ]
    assert [each.status for each in token.listing(state)] == ["revoked", "good"]


@pytest.mark.parametrize("which", ["node-9", "", "%", "1234567", "00000000", "' OR ''='"])
def test_what_is_not_there_cannot_be_revoked(state: Path, which: str) -> None:
    with pytest.raises(BakehouseError, match="there is no good token of"):
        token.revoke(state, which)
    make(state)
    with pytest.raises(BakehouseError, match="there is no good token of"):
        token.revoke(state, which)


def test_a_token_cannot_be_revoked_twice(state: Path) -> None:
    make(state)
    token.revoke(state, "node-1")
    with pytest.raises(BakehouseError, match="no good token of 'node-1'"):
        token.revoke(state, "node-1")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("30d", 2592000), (" 1h ", 3600)]
)
def test_lifetimes_are_written_with_a_unit(text: str, seconds: int) -> None:
    assert token.lifetime_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "0m", "-1h", "1.5h", "1 h", "31d", "1w", "99999999999h", "\u0661h"])
def test_what_is_no_lifetime_is_refused(text: str) -> None:
    with pytest.raises(BakehouseError, match=r"is not one \(such as 30m, 2h or 1d"):
        token.lifetime_seconds(text)


@pytest.mark.parametrize("node", ["", "-a", "a-", "a_b", "a b", "x" * 64, "a\n", "ü"])
def test_what_is_no_host_name_gets_no_token(state: Path, node: str) -> None:
    with pytest.raises(BakehouseError, match="is not a host name"):
        make(state, node)
    assert not state.exists()


def test_a_whole_host_name_gets_a_hint(state: Path) -> None:
    with pytest.raises(BakehouseError, match="first label only"):
        make(state, "node-1.example.org")


def test_an_unknown_platform_and_an_endless_lifetime_get_no_token(state: Path) -> None:
    with pytest.raises(BakehouseError, match=r"'nomad' is not known \(known: slurm"):
        token.create(state, platform="nomad", node="node-1", lifetime_seconds=60)
    with pytest.raises(BakehouseError, match="a lifetime of 0 seconds is not possible"):
        make(state, lifetime=0)
    assert not state.exists()


def test_a_state_that_is_something_else_is_named(state: Path) -> None:
    state.parent.mkdir()
    state.write_bytes(b"not a database, but long enough to be taken for one" * 20)
    with pytest.raises(BakehouseError, match=r"tokens\.sqlite cannot be used: file is not a database"):
        make(state)
    with pytest.raises(BakehouseError, match="cannot be used: Not a directory"):
        make(state / "tokens.sqlite")


def test_the_state_stands_where_the_configuration_says(tmp_path: Path) -> None:
    config = tmp_path / "broker.yaml"
    config.write_text("{certificate: /c, private_key: /k, state: /s.sqlite, platforms: {slurm: {key_file: /m}}}")
    assert token.state_of(config) == Path("/s.sqlite")
    config.write_text("certificates: /c")
    with pytest.raises(BakehouseError, match=r"broker\.yaml: unknown key 'certificates' \(known: listen, certificate,"):
        token.state_of(config)


def test_the_broker_is_loaded_once() -> None:
    assert token.broker() is token.broker()
