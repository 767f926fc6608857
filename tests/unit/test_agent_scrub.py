"""The join agent removes the secret from what cloud-init keeps, however it is wrapped, and breaks nothing there."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_agent import load

KEY = os.urandom(1024)
SECRET = base64.b64encode(KEY)
TOKEN = b"bhj_" + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=")
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
JOIN = b"platform: slurm\nsecret:\n  inline: " + SECRET + b"\n"
USER_DATA = b"#cloud-config\nwrite_files:\n- path: /etc/bakehouse/join.yaml\n  content: |\n    " + JOIN.replace(
    b"\n", b"\n    "
)


def as_mime(data: bytes) -> bytes:
    return b"Content-Transfer-Encoding: base64\n\n" + base64.encodebytes(data) + b"\n--=====--\n"


WRAPPED = {
    "plain": USER_DATA,
    "in JSON": json.dumps({"user_data": USER_DATA.decode()}).encode(),
    "in base64": b"content: " + base64.b64encode(JOIN) + b"\n",
    "in base64 of cloud-init": json.dumps({"ud": "ci-b64:" + base64.b64encode(USER_DATA).decode()}).encode(),
    "in a MIME part": as_mime(USER_DATA),
    "in a MIME part in JSON": json.dumps({"x": as_mime(USER_DATA).decode()}).encode(),
    "compressed": gzip.compress(USER_DATA),
    "compressed, in base64": b"content: " + base64.b64encode(gzip.compress(JOIN)) + b"\nencoding: gz+b64\n",
    "base64 in base64": base64.b64encode(b"encoding: b64\ncontent: " + base64.b64encode(JOIN) + b"\n"),
    "after words": b"some words\nandmore\n" + base64.b64encode(b"ab" + JOIN),
    "in a pickle": pickle.dumps({"userdata_raw": USER_DATA, "text": USER_DATA.decode(), "gz": gzip.compress(JOIN)}),
    "twice": SECRET + b" " + SECRET,
    "a token": b"token: " + TOKEN + b"\n",
    "a token in base64": base64.b64encode(b"  token: " + TOKEN + b"\n" + bytes(30)),
    "a token compressed": gzip.compress(b"token: " + TOKEN),
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load(tmp_path_factory.mktemp("root"), patch)


def holds(data: bytes, depth: int = 3) -> bool:
    """Look for the secret in the slow and simple way: every alignment of everything."""
    if SECRET in data or TOKEN in data:
        return True
    if not depth:
        return False
    inner = []
    for start in range(len(data)):
        if data[start : start + 3] == b"\x1f\x8b\x08":
            try:
                inner.append(gzip.decompress(data[start:]))
            except Exception:  # noqa: BLE001
                continue
    text = bytes(c for c in data.replace(b"\\n", b"") if c in ALPHABET)
    inner += [base64.b64decode(text[s : s + (len(text) - s) // 4 * 4]) for s in range(4)] if text else []
    return any(holds(part, depth - 1) for part in inner)


def needles(agent: ModuleType, bootstrap: str = "") -> Any:
    return agent.Needles([SECRET], bootstrap)


def test_a_bootstrap_token_is_known_by_its_digest(agent: ModuleType) -> None:
    token, other = b"abcdef.0123456789abcdef", b"ghijkl.0123456789abcdef"
    data = (
        b"inline: "
        + token
        + b"\n"
        + base64.b64encode(b"# a comment that is long enough\ninline: " + token)
        + b" "
        + other
    )
    clean = agent.blotted(data, needles(agent, agent.digest(token)))
    assert len(clean) == len(data)
    assert token not in clean
    assert base64.b64encode(token)[:12] not in clean
    assert other in clean, "what is no secret of ours stays"


@pytest.mark.parametrize("name", WRAPPED)
def test_the_secret_is_blotted_out(agent: ModuleType, name: str) -> None:
    data = WRAPPED[name]
    clean = agent.blotted(data, needles(agent))
    assert len(clean) == len(data)
    assert not holds(clean)
    assert agent.blotted(clean, needles(agent)) == clean


def test_json_and_pickles_stay_readable(agent: ModuleType) -> None:
    for name in ("in JSON", "in base64 of cloud-init", "in a MIME part in JSON"):
        assert json.loads(agent.blotted(WRAPPED[name], needles(agent))).keys() == json.loads(WRAPPED[name]).keys()
    found = pickle.loads(agent.blotted(WRAPPED["in a pickle"], needles(agent)))
    assert found["userdata_raw"].startswith(b"#cloud-config")
    assert "platform: slurm" in found["text"]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400) | st.from_regex(r"[A-Za-z0-9+/=\n ]{0,400}", fullmatch=True).map(str.encode))
def test_what_holds_no_secret_stays_as_it_is(agent: ModuleType, data: bytes) -> None:
    assert agent.blotted(data, needles(agent)) == data


def test_files_are_overwritten_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load(tmp_path, monkeypatch)
    folder = tmp_path / "var/lib/cloud/instances/i-1"
    folder.mkdir(parents=True)
    files = {folder / f"{n}.txt": data for n, data in enumerate(WRAPPED.values())}
    for path, data in files.items():
        path.write_bytes(data)
    other = folder / "vendor-data.txt"
    other.write_bytes(b"nothing")
    (folder.parent.parent / "instance").symlink_to(folder)
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    (folder / "link").symlink_to(outside)
    before = {path: (path.stat().st_ino, path.stat().st_size) for path in files}
    old = other.stat().st_mtime_ns
    assert agent.scrub([KEY]) == len(files)
    assert {path: (path.stat().st_ino, path.stat().st_size) for path in files} == before
    assert other.stat().st_mtime_ns == old
    assert outside.read_bytes() == SECRET, "links are not followed"
    assert agent.scrub([KEY]) == 0


def test_scrub_command_uses_the_key_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = load(tmp_path, monkeypatch)
    (tmp_path / "run/cloud-init").mkdir(parents=True)
    copy = tmp_path / "run/cloud-init/instance-data-sensitive.json"
    copy.write_bytes(WRAPPED["in base64 of cloud-init"])
    (tmp_path / "etc/munge").mkdir(parents=True)
    (tmp_path / "etc/munge/munge.key").write_bytes(KEY)
    assert agent.main(["scrub"]) == 0
    assert "from 1 files" in capsys.readouterr().out
    assert not holds(copy.read_bytes())
