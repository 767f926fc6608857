"""The join agent's configuration: every fault is named, and nothing hostile gets through."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_agent import load

KEY = base64.b64encode(bytes(64)).decode()
CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
GOOD: dict[str, Any] = {
    "platform": "slurm",
    "node": {"name": "node-1"},
    "slurm": {"controllers": ["ctl.example.org:6817"]},
    "secret": {"inline": KEY},
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load(tmp_path_factory.mktemp("root"), patch)


def changed(path: str, value: Any) -> bytes:
    """Return the good configuration with one value replaced."""
    data: Any = yaml.safe_load(yaml.safe_dump(GOOD))
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return yaml.safe_dump(data).encode()


def faults(agent: ModuleType, data: bytes) -> str:
    found = agent.parse(data)[1]
    assert found, "was accepted"
    assert all(re.fullmatch(r"[ -~]{1,300}", fault) for fault in found)
    return "\n".join(found)


def test_a_whole_configuration(agent: ModuleType) -> None:
    config, found = agent.parse(
        b"""
platform: slurm
node: {name: gpu-7.cloud.example.org}
slurm:
  controllers: [ctl.example.org, "10.0.0.5:7000", "[fd00::5]", "[fd00::6]:7001"]
  authentication: slurm
  features: [bake, rack-7]
  hardware: {CPUs: 4, RealMemory: 3800, Gres: "gpu:a100:4,shard:8", Weight: 0}
secret:
  broker:
    url: https://ctl.example.org
    token: bhj_0123456789abcdefghijklmnopqrstuvwxyz-_ABCDE
    ca: |
      -----BEGIN CERTIFICATE-----
      MIIB
      -----END CERTIFICATE-----
"""
    )
    assert found == []
    assert config.name == "gpu-7"
    assert config.controllers == [
        ("ctl.example.org", 6817), ("10.0.0.5", 7000), ("fd00::5", 6817), ("fd00::6", 7001)
    ]  # fmt: skip
    assert config.authentication == "slurm"
    assert config.hardware == {"CPUs": "4", "RealMemory": "3800", "Gres": "gpu:a100:4,shard:8", "Weight": "0"}
    assert config.broker == ("ctl.example.org", 8444)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("platform", "nomad", "platform: 'nomad' is not a platform that this agent knows: slurm, kubernetes"),
        ("platform", ["slurm"], "platform: must be"),
        ("nod", {}, "nod: not known; did you mean node?"),
        ("slurm.controllrs", [], "slurm.controllrs: not known; did you mean controllers?"),
        ("slurm.hardware.cpus", 4, "slurm.hardware.cpus: not known; did you mean CPUs?"),
        ("slurm.controllers", [], "slurm.controllers: is missing"),
        ("slurm.controllers", "ctl", "slurm.controllers: must be a list"),
        ("slurm.controllers", ["ctl:99999"], "slurm.controllers[0]: 'ctl:99999' is not host or host:port"),
        ("slurm.controllers", ["ok", "a b"], "slurm.controllers[1]: 'a b' is not host or host:port"),
        ("slurm.controllers", ["-Z"], "slurm.controllers[0]: '-Z' is not host or host:port"),
        ("slurm.controllers", ["10.0.0.256"], "'10.0.0.256' is not host or host:port"),
        ("slurm.controllers", ["fd00::5"], "an IPv6 address stands in brackets"),
        ("slurm.controllers", ["[fd00::zz]"], "slurm.controllers[0]"),
        ("slurm.controllers", ["ctl"] * 9, "slurm.controllers: holds more than 8 entries"),
        ("slurm.authentication", "none", "slurm.authentication: 'none' is not munge or slurm"),
        ("slurm.features", ["a,b"], "slurm.features[0]: 'a,b' is not a feature"),
        ("slurm.hardware.CPUs", "many", "slurm.hardware.CPUs: 'many' is not a whole number from 1"),
        ("slurm.hardware.CPUs", 0, "slurm.hardware.CPUs: '0' is not a whole number from 1"),
        ("slurm.hardware.CPUs", 1.5, "slurm.hardware.CPUs: '1.5' is not a whole number from 1"),
        ("slurm.hardware.Gres", "gpu:1 Weight=2", "slurm.hardware.Gres"),
        ("node.name", "node 1", "node.name: 'node 1' is not a host name"),
        ("node.name", "-Z", "node.name: '-Z' is not a host name"),
        ("node", "node-1", "node: must be a mapping with name"),
        ("secret.inline", KEY + "\n", "secret.inline: must be the key, 32 to 1024 bytes, in base64 on one line"),
        ("secret.inline", KEY[:-1], "secret.inline: must be the key, 32 to 1024 bytes, in base64 on one line"),
        (
            "secret.inline",
            base64.b64encode(b"short").decode(),
            "secret.inline: must be the key, 32 to 1024 bytes, in base64 on one line",
        ),
        ("secret.broker", {"url": "http://ctl:8444", "ca": CA}, "secret.broker.url: must be https://"),
        ("secret.broker", {"url": "https://me:pw@ctl", "ca": CA}, "secret.broker.url: must be https://"),
        ("secret.broker", {"url": "https://ctl"}, "secret.broker.ca: is missing"),
        ("secret.broker", {"url": "https://ctl", "ca": CA, "token": "geheim"}, "secret.broker.token: must be a token"),
        ("secret.broker", {"url": "https://ctl", "ca": CA}, "secret: takes inline or broker, not both"),
    ],
)
def test_a_fault_is_named_with_its_place(agent: ModuleType, path: str, value: Any, fault: str) -> None:
    assert fault in faults(agent, changed(path, value))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "the file is empty"),
        (b"- a\n", "the file: must be a mapping"),
        (b"platform: slurm\nplatform: slurm\n", "line 2: platform stands here a second time"),
        (b"a: &x [1]\nb: *x\n", "line 1: anchors and aliases are not taken here"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1: tags (!...) are not taken here"),
        (b"a: {b: {c: {d: {e: {f: {g: {h: {i: 1}}}}}}}}\n", "nested deeper than 8 levels"),
        (b"[" * 60000, "nested deeper"),
        (b"a: b\n---\nc: d\n", "more than one document"),
        (b"a: [\n", "not YAML"),
        (b"a: \x00\n", "line 1: holds a control character"),
        (b"a: b\n#" + b"x" * 65536, "more than 64 KiB"),
        (b"a: \xff\n", "the file is not UTF-8 text"),
        (b"? [a]\n: b\n", "line 1: a key must be a word"),
    ],
)
def test_what_yaml_offers_beyond_need_is_refused(agent: ModuleType, text: bytes, fault: str) -> None:
    assert fault in faults(agent, text)


def test_all_faults_come_at_once(agent: ModuleType) -> None:
    found = agent.parse(b"platform: x\nnode: {name: '!'}\nslurm: {controllers: ['?'], features: [' ']}\nsecret: 1\n")[1]
    assert len(found) == 5


def test_a_fault_never_repeats_the_secret(agent: ModuleType) -> None:
    assert "geheim" not in faults(agent, changed("secret.inline", "geheimgeheimgeheim"))


def test_loader_in_python_does_as_well(agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert agent.parse(yaml.safe_dump(GOOD).encode())[1] == []
    assert "nested deeper" in faults(agent, b"[" * 2000)


# What a value must never hold where it reaches a command line, an environment file or slurmd's node line.
SAFE = re.compile(r"[A-Za-z0-9_.,:/+=\[\] -]*")

words = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["a b", 'x" Y="z', "x\ny", "$(id)", "${HOME}", "-Z", "x;y", "x'y", "a=b", "%n", "\\", "é", "x\u2028y"]
    ),
    st.from_regex(r"[A-Za-z0-9.:\[\]-]{1,30}", fullmatch=True),
    st.integers(-5, 70000),
    st.booleans(),
    st.none(),
)
anything = st.recursive(
    words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
hostile = st.fixed_dictionaries(
    {},
    optional={
        "platform": st.sampled_from(["slurm"]) | anything,
        "node": st.fixed_dictionaries({}, optional={"name": words}) | anything,
        "slurm": st.fixed_dictionaries(
            {},
            optional={
                "controllers": st.lists(words, max_size=3) | anything,
                "authentication": st.sampled_from(["munge", "slurm"]) | anything,
                "features": st.lists(words, max_size=3) | anything,
                "hardware": st.dictionaries(st.sampled_from(["CPUs", "RealMemory", "Gres"]), words) | anything,
            },
        )
        | anything,
        "secret": st.fixed_dictionaries({}, optional={"inline": st.just(KEY) | words, "broker": anything}) | anything,
    },
)
QUIET = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUIET
@given(data=st.binary(max_size=300))
def test_no_bytes_make_it_fall(agent: ModuleType, data: bytes) -> None:
    assert agent.parse(data)[1]


@QUIET
@given(data=hostile)
def test_nothing_hostile_is_accepted(agent: ModuleType, data: Any) -> None:
    config, found = agent.parse(yaml.safe_dump(data, allow_unicode=True).encode())
    assert all(re.fullmatch(r"[ -~]{1,300}", fault) for fault in found)
    if found:
        return
    environment = agent.Slurm(config, config.name or "node").environment_file().decode()
    lines = environment.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["BAKEHOUSE_NODE", "BAKEHOUSE_CONTROLLERS", "BAKEHOUSE_CONF"]
    for line in lines:
        value = line.partition("=")[2]
        assert value[0] == value[-1] == '"'
        assert SAFE.fullmatch(value[1:-1])
    assert " " not in config.name
    assert not config.name.startswith("-")
    assert lines[2].count(" ") == len(config.hardware), "a value brought no parameter of its own"


label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
valid = st.fixed_dictionaries(
    {
        "platform": st.just("slurm"),
        "node": st.fixed_dictionaries({"name": label}),
        "slurm": st.fixed_dictionaries(
            {
                "controllers": st.lists(
                    st.builds("{}.example.org:{}".format, label, st.integers(1, 65535)), min_size=1, max_size=8
                ),
                "features": st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.:/+-]{0,10}", fullmatch=True), max_size=5),
                "hardware": st.dictionaries(st.sampled_from(["CPUs", "RealMemory"]), st.integers(1, 10**6)),
            }
        ),
        "secret": st.fixed_dictionaries({"inline": st.binary(min_size=32, max_size=1024)}),
    }
)


@QUIET
@given(data=valid)
def test_what_is_right_is_taken_as_it_is(agent: ModuleType, data: Any) -> None:
    key = data["secret"]["inline"]
    data["secret"]["inline"] = base64.b64encode(key).decode()
    text = yaml.safe_dump(data).encode()
    config, found = agent.parse(text)
    assert found == []
    assert config.inline == key
    assert config.name == data["node"]["name"]
    assert [f"{h}:{p}" for h, p in config.controllers] == data["slurm"]["controllers"]
    assert config.features == data["slurm"]["features"]
    assert config.hardware == {k: str(v) for k, v in data["slurm"]["hardware"].items()}
    kept = agent.without_secret(text)
    again, found = agent.parse(kept)
    assert found == []
    same = ("platform", "name", "authentication", "controllers", "features", "hardware", "broker")
    assert all(getattr(config, key) == getattr(again, key) for key in same)
    assert not again.holds_secret
    assert data["secret"]["inline"].encode() not in kept
    assert agent.without_secret(kept) == kept


def test_flow_style_loses_its_secret_too(agent: ModuleType) -> None:
    text = b"{platform: slurm, slurm: {controllers: [ctl]}, secret: {inline: %s}}\n" % KEY.encode()
    kept = agent.without_secret(text)
    assert KEY.encode() not in kept
    assert agent.parse(kept)[1] == []


def test_check_names_faults_and_ends_with_2(
    agent: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "join.yaml"
    path.write_bytes(yaml.safe_dump(GOOD).encode())
    assert agent.check(str(path)) == 0
    path.write_text("platform: slurm\n")
    assert agent.check(str(path)) == 2
    assert "slurm.controllers: is missing" in capsys.readouterr().err
