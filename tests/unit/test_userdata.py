"""User-data: what is rendered reads back as what was given, and what cannot be right is refused."""

from __future__ import annotations

import base64
import importlib.util
import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from bakehouse import REPOSITORY, userdata
from bakehouse.errors import BakehouseError
from bakehouse.userdata import Broker, Join

TOKEN = "bhj_" + "aB3-_" * 8 + "xyz"
URL = "https://ctl.example.org:8444"
BLOB = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))
SSH_KEY = f"ssh-ed25519 {base64.b64encode(BLOB).decode()} me@höst"


def make_ca() -> tuple[str, str]:
    """Return a certificate and its private key in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test CA")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    dated = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = dated.sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


CA, CA_KEY = make_ca()


def read(text: str) -> tuple[Any, Any]:
    """Return the cloud-config and the join config within."""
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    (file,) = config["write_files"]
    assert (file["path"], file["owner"], file["permissions"]) == ("/etc/bakehouse/join.yaml", "root:root", "0600")
    assert set(file) == {"path", "owner", "permissions", "content"}, "not encoded: a person can read it"
    return config, yaml.safe_load(file["content"])


# What reads back ------------------------------------------------------------------------------------------------------

labels = st.from_regex(userdata.LABEL, fullmatch=True)
names = st.lists(labels, min_size=1, max_size=3).map(".".join)
hosts = names.filter(lambda host: not re.fullmatch(r"(?:.*\.)?[0-9]+", host))
addresses = st.one_of(hosts, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"))
ports = st.integers(1, 65535)
controllers = st.one_of(addresses, st.tuples(addresses, ports).map(lambda pair: f"{pair[0]}:{pair[1]}"))
hardware = st.fixed_dictionaries(
    {},
    optional={
        "CPUs": st.integers(1, 1024),
        "RealMemory": st.integers(1, 1 << 31),
        "Weight": st.integers(0, 1 << 20),
        "Gres": st.from_regex(userdata.GRES, fullmatch=True),
    },
)
comments = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)
ssh_keys = comments.map(lambda comment: f"{SSH_KEY.rpartition(' ')[0]} {comment}")
brokers = st.tuples(addresses, ports, st.from_regex(userdata.TOKEN, fullmatch=True)).map(
    lambda given: Broker(f"https://{given[0]}:{given[1]}", given[2], CA)
)
joins = st.builds(
    Join,
    controllers=st.lists(controllers, min_size=1, max_size=3).map(tuple),
    authentication=st.sampled_from(["munge", "slurm"]),
    node=st.one_of(st.just(""), labels),
    features=st.lists(st.from_regex(userdata.FEATURE, fullmatch=True), max_size=3).map(tuple),
    hardware=hardware,
    ssh_keys=st.lists(ssh_keys, max_size=2).map(tuple),
).flatmap(
    lambda join: st.one_of(
        st.just(join),
        st.binary(min_size=32, max_size=1024).map(lambda key: with_secret(join, key=key)),
        brokers.map(lambda broker: with_secret(join, broker=broker)),
    )
)


def with_secret(join: Join, **secret: Any) -> Join:
    return Join(**{**{name: getattr(join, name) for name in join.__dataclass_fields__}, **secret})


def expected(join: Join) -> dict[str, Any]:
    slurm: dict[str, Any] = {"controllers": list(join.controllers), "authentication": join.authentication}
    if join.features:
        slurm["features"] = list(join.features)
    if join.hardware:
        slurm["hardware"] = dict(join.hardware)
    config: dict[str, Any] = {"platform": "slurm", "slurm": slurm}
    if join.node:
        config["node"] = {"name": join.node}
    if join.key:
        config["secret"] = {"inline": base64.b64encode(join.key).decode()}
    if join.broker:
        config["secret"] = {"broker": {"url": join.broker.url, "token": join.broker.token, "ca": CA}}
    return config


@settings(deadline=None)
@given(joins)
def test_what_is_rendered_reads_back_as_what_was_given(join: Join) -> None:
    config, inner = read(userdata.render(join))
    assert inner == expected(join)
    assert config.get("ssh_authorized_keys", []) == list(join.ssh_keys)
    assert set(config) <= {"merge_how", "ssh_authorized_keys", "write_files"}


def load_agent() -> ModuleType:
    path = REPOSITORY / "bootstrap/agent/bakehouse_agent.py"
    spec = importlib.util.spec_from_file_location("bakehouse_agent_for_user_data", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AGENT = load_agent()


@settings(deadline=None, max_examples=50)
@given(joins)
def test_the_agent_takes_what_is_rendered_and_can_remove_the_secret_from_it(join: Join) -> None:
    (file,) = yaml.safe_load(userdata.render(join))["write_files"]
    data = file["content"].encode()
    config, faults = AGENT.parse(data)
    assert not faults
    assert (config.name, config.authentication, config.inline) == (join.node, join.authentication, join.key or b"")
    assert config.hardware == {name: str(value) for name, value in join.hardware.items()}
    cleaned = AGENT.without_secret(data)
    assert b"# What jobs can ask for" in cleaned or not join.features, "the comments stay"
    assert not (join.key and join.key_base64.encode() in cleaned)
    assert not (join.broker and join.broker.token.encode() in cleaned)


@given(st.text())
def test_no_text_breaks_out_of_its_quotes(text: str) -> None:
    line = userdata.quoted(text)
    assert yaml.safe_load(f"before: 1\nvalue: {line}\nafter: 2\n") == {"before": 1, "value": text, "after": 2}
    assert len(line.splitlines()) == 1


def test_it_says_in_comments_what_it_is_and_for_whom() -> None:
    text = userdata.render(Join(("ctl",), node="node-1"))
    assert "# Made by: invoke userdata --platform slurm --path bake\n# For: the node node-1 only\n" in text
    assert "SECRET" not in text
    assert "# For: any node" in userdata.render(Join(("ctl",)))
    assert "# For: the one node that the token was made for" in userdata.render(Join(("ctl",), broker=make_broker()))


def test_an_inline_key_is_called_the_weaker_way() -> None:
    munge = userdata.render(Join(("ctl",), key=b"k" * 32))
    assert "# SECRET: this holds the cluster's munge key itself. That is the weaker of the two ways." in munge
    assert "cluster's slurm.key itself" in userdata.render(Join(("ctl",), key=b"k" * 32, authentication="slurm"))


def test_lists_of_the_site_are_not_replaced() -> None:
    config, _ = read(userdata.render(Join(("ctl",))))
    assert config["merge_how"] == [
        {"name": "list", "settings": ["append"]},
        {"name": "dict", "settings": ["no_replace", "recurse_list"]},
    ]


def test_secrets_do_not_show_when_a_join_is_printed() -> None:
    printed = repr(Join(("ctl",), key=b"secret-key-secret-key-secret-key")) + repr(make_broker())
    assert "secret-key" not in printed
    assert TOKEN not in printed


def test_it_stays_below_the_limit_of_the_clouds() -> None:
    largest = Join(("ctl",), key=b"k" * 1024, features=("f" * 64,) * 20, ssh_keys=(SSH_KEY,) * 10)
    assert len(userdata.render(largest).encode()) < userdata.LIMIT
    with pytest.raises(BakehouseError, match=r"would have \d{5} bytes; clouds take less than 16384"):
        userdata.render(Join(("ctl",), ssh_keys=(SSH_KEY,) * 200))


# What is refused ------------------------------------------------------------------------------------------------------


def make_broker(url: str = URL, token: str = TOKEN, ca: str = CA) -> Broker:
    return Broker(url, token, ca)


@pytest.mark.parametrize(
    "controller",
    [
        "", ":6817", "ctl:", "ctl:0", "ctl:65536", "ctl:six", "ctl:6817:1", "fd00::1", "[fd00::1", "[ctl]:6817",
        "-ctl", "ctl.", "ctl.7", "ctl-", "c_tl", "ctl..org", "a b", "ctl\n", "ctl\n:6817",
        "256.1.1.1", "1.2.3", "ctl:\uff16817", "x" * 64, ".".join(["x" * 60] * 5), "{{ 7 * 7 }}", "[fe80::1%\n]",
    ],
)  # fmt: skip
def test_a_controller_that_cannot_be_one_is_refused(controller: str) -> None:
    with pytest.raises(BakehouseError, match=r"^the controller "):
        Join((controller,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"controllers": ()}, "no controller is given"),
        ({"path": "bootstrap"}, "the path bootstrap needs a bundle"),
        ({"path": "hybrid"}, "the path hybrid needs a container image"),
        ({"path": "nomad"}, "'nomad' is no path"),
        ({"authentication": "none"}, "'none' is no way to authenticate"),
        ({"node": "node-1.example.org"}, "'node-1.example.org' cannot be a node's name"),
        ({"node": "node\n1"}, "cannot be a node's name"),
        ({"node": "x" * 64}, "cannot be a node's name"),
        ({"controllers": ("ctl",) * 9}, "at most 8 controllers"),
        ({"features": ("a",) * 65}, "at most 8 controllers and 64 features"),
        ({"features": ("gpu,rack",)}, "'gpu,rack' cannot be a feature"),
        ({"features": ("",)}, "'' cannot be a feature"),
        ({"features": ("a\n",)}, "cannot be a feature"),
        ({"hardware": {"Cpus": 4}}, "'Cpus' says nothing of hardware"),
        ({"hardware": {"CPUs": 0}}, "CPUs cannot be 0"),
        ({"hardware": {"CPUs": True}}, "CPUs cannot be True"),
        ({"hardware": {"RealMemory": "4G"}}, "RealMemory cannot be '4G'"),
        ({"hardware": {"RealMemory": 2**31 + 1}}, "RealMemory cannot be 2147483649"),
        ({"hardware": {"Weight": -1}}, "Weight cannot be -1"),
        ({"hardware": {"Gres": 2}}, "Gres cannot be 2"),
        ({"hardware": {"Gres": "gpu:2 State=DOWN"}}, "Gres cannot be "),
        ({"key": b""}, "the munge key has 0 bytes"),
        ({"key": b"k" * 31}, "the munge key has 31 bytes"),
        ({"key": b"k" * 1025, "authentication": "slurm"}, "the slurm.key has 1025 bytes"),
        ({"key": b"k" * 32, "broker": make_broker()}, "a key and a broker are given"),
        ({"ssh_keys": (CA_KEY,)}, "an SSH private key is given"),
        ({"ssh_keys": ("ssh-ed25519 AAAA me",)}, "is not an SSH public key"),
        ({"ssh_keys": (SSH_KEY.replace("ssh-ed25519", "ssh-rsa"),)}, "is not an SSH public key"),
        ({"ssh_keys": (f"{SSH_KEY}\nssh-rsa AAAA",)}, "is not an SSH public key"),
        ({"ssh_keys": ("",)}, "is not an SSH public key"),
    ],
)
def test_what_cannot_be_right_is_refused(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(BakehouseError, match=re.escape(message)):
        Join(**{"controllers": ("ctl",), **given})


@pytest.mark.parametrize(
    "url",
    [
        "http://ctl:8444", "ctl:8444", "https://", "https://:8444", "https://ctl:0", "https://ctl:99999", "https://c_tl",
        "https://user@ctl", "https://ctl/v1", "https://ctl?x", "https://ctl#x", "https://ct\nl", "https://fd00::1:8444",
        "https://[ctl]:8444", "https://1.2.3.400", "https://ctl:8444\n",
    ],
)  # fmt: skip
def test_a_broker_that_is_not_reached_over_https_is_refused(url: str) -> None:
    with pytest.raises(BakehouseError, match="is not a broker's address"):
        make_broker(url=url)


@pytest.mark.parametrize("token", ["", "bhj_", TOKEN[4:], TOKEN + "x", TOKEN[:-1], TOKEN + "\n", TOKEN[:-1] + "="])
def test_a_token_of_another_form_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(BakehouseError, match="the token is not one of the broker's") as caught:
        make_broker(token=token)
    assert not token or token not in str(caught.value) or token == "bhj_"


@pytest.mark.parametrize(
    ("ca", "message"),
    [
        ("", "holds no certificate"),
        ("/etc/ssl/ca.pem", "holds no certificate"),
        (CA + CA_KEY, "holds a private key"),
        (CA.replace("M", "N", 1), "certificate 1 of the CA file is broken"),
        (
            CA + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "certificate 2 of the CA file is broken",
        ),
        ("-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n", "certificate 1 of the CA file is broken"),
    ],
)
def test_a_ca_that_is_no_certificate_is_refused(ca: str, message: str) -> None:
    with pytest.raises(BakehouseError, match=message):
        make_broker(ca=ca)


def test_of_a_ca_file_only_the_certificates_are_taken() -> None:
    untidy = f"Certificate:\n  Data: {{% raw %}}\n{CA.replace(chr(10), chr(13) + chr(10))}\ntrailing: text\n{CA}"
    assert make_broker(ca=untidy).ca == CA + CA


def test_hardware_is_read_as_in_slurm_conf() -> None:
    read_back = userdata.read_hardware(" CPUs=4  RealMemory=3800 Gres=gpu:a100:2,nic:1 ")
    assert read_back == {"CPUs": 4, "RealMemory": 3800, "Gres": "gpu:a100:2,nic:1"}
    for wrong in ("CPUs", "CPUs=", "CPUs = 4"):
        with pytest.raises(BakehouseError, match="says nothing of hardware"):
            userdata.read_hardware(wrong)


# cloud-init's own check -----------------------------------------------------------------------------------------------


def make_cloud_init(folder: Path, script: str) -> list[str]:
    """Return a prefix under which cloud-init is a script."""
    program = folder / "cloud-init"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return ["env", f"PATH={folder}:/usr/bin:/bin"]


def test_cloud_init_gets_the_text_and_says_yes(tmp_path: Path) -> None:
    prefix = make_cloud_init(tmp_path, f'cat "$3" > {tmp_path}/got; echo "$1 $2" > {tmp_path}/how; echo Valid schema')
    userdata.schema_check(prefix, "#cloud-config\n{}\n")
    assert (tmp_path / "got").read_text() == "#cloud-config\n{}\n"
    assert (tmp_path / "how").read_text() == "schema --config-file\n"


@pytest.mark.parametrize(
    "script", ["echo 'write_files: 3 is not an array' >&2; exit 1", "echo Skipped: is not an array"]
)
def test_cloud_inits_no_is_an_error_with_its_words(tmp_path: Path, script: str) -> None:
    with pytest.raises(BakehouseError, match="cloud-init does not take the user-data") as caught:
        userdata.schema_check(make_cloud_init(tmp_path, script), "#cloud-config\n")
    assert "is not an array" in caught.value.log


def test_a_missing_cloud_init_is_named() -> None:
    with pytest.raises(BakehouseError, match="no-such-program is not there"):
        userdata.schema_check(["no-such-program"], "#cloud-config\n")


BUNDLE = userdata.Bundle("https://web.example.org/bundles/slurm.tar.gz?a=1&b=%20", "a" * 64)


@pytest.mark.parametrize(
    "join",
    [
        userdata.Join(("ctl",), path="bootstrap", bundle=BUNDLE),
        userdata.KubernetesJoin("api", ca_hashes=(f"sha256:{'a' * 64}",), path="bootstrap", bundle=BUNDLE),
        userdata.RoceJoin(path="bootstrap", bundle=BUNDLE),
    ],
)
def test_a_plain_node_gets_what_makes_it_one_of_the_platform(
    join: userdata.Join | userdata.KubernetesJoin | userdata.RoceJoin,
) -> None:
    config = yaml.safe_load(userdata.render(join))
    files = {file["path"]: file for file in config["write_files"]}
    script = files["/usr/local/sbin/bakehouse-bootstrap"]
    assert script["content"] == (userdata.PLAY / "bakehouse-bootstrap").read_text(), "as it stands there"
    assert script["permissions"] == "0755"
    assert files["/etc/bakehouse/bootstrap.env"]["content"] == f"URL={BUNDLE.url}\nSHA256={BUNDLE.sha256}\n"
    assert files["/etc/bakehouse/bootstrap.env"]["permissions"] == "0600"
    assert files["/etc/systemd/system/bakehouse-bootstrap.service"]
    assert yaml.safe_load(files["/etc/bakehouse/join.yaml"]["content"])["platform"] == join.platform
    assert ["systemctl", "enable", "--now", "--no-block", "bakehouse-bootstrap.service"] in config["runcmd"]


@pytest.mark.parametrize(
    ("url", "sha256", "error"),
    [
        ("ftp://web/slurm.tar.gz", "a" * 64, "is not where a bundle can be"),
        ("https://web/slurm.tar.gz\nSHA256=b", "a" * 64, "is not where a bundle can be"),
        ("https://web/$(id)", "a" * 64, "is not where a bundle can be"),
        ("https:///slurm.tar.gz", "a" * 64, "is not where a bundle can be"),
        ("https://web/slurm.tar.gz", "a" * 63, "is not a SHA-256"),
    ],
)
def test_a_bundle_that_cannot_be_one_is_refused(url: str, sha256: str, error: str) -> None:
    with pytest.raises(BakehouseError, match=re.escape(error)):
        userdata.Bundle(url, sha256)


def test_a_baked_node_needs_no_bundle() -> None:
    with pytest.raises(BakehouseError, match="takes no bundle"):
        userdata.Join(("ctl",), bundle=BUNDLE)


IMAGE = f"registry.example.org:5000/bakehouse/slurm@sha256:{'a' * 64}"


@pytest.mark.parametrize("insecure", [False, True])
def test_a_hybrid_node_is_told_its_image(insecure: bool) -> None:
    join = userdata.Join(("ctl",), path="hybrid", image=userdata.ContainerImage(IMAGE, insecure))
    files = userdata.files(join)
    assert files["/etc/bakehouse/containers.env"] == (f"IMAGE={IMAGE}\n", 0o644)
    registries = files.get("/etc/containers/registries.conf.d/50-bakehouse.conf", ("", 0))[0]
    assert tomllib.loads(registries) == (
        {"registry": [{"location": "registry.example.org:5000", "insecure": True}]} if insecure else {}
    )


@pytest.mark.parametrize(
    "reference",
    [
        "registry.example.org/slurm:latest",
        f"slurm@sha256:{'a' * 64}",
        f"registry.example.org/slurm@sha256:{'a' * 63}",
        f"registry.example.org/slurm@sha256:{'a' * 64}\nX=1",
        f"https://registry.example.org/slurm@sha256:{'a' * 64}",
        "",
    ],
)
def test_a_container_image_is_named_by_its_digest(reference: str) -> None:
    with pytest.raises(BakehouseError, match="is not a container image by its digest"):
        userdata.ContainerImage(reference)


@pytest.mark.parametrize(
    ("path", "given", "error"),
    [
        ("bake", {"image": userdata.ContainerImage(IMAGE)}, "the path bake takes no container image"),
        ("hybrid", {"image": userdata.ContainerImage(IMAGE), "bundle": BUNDLE}, "the path hybrid takes no bundle"),
        ("bootstrap", {"bundle": BUNDLE, "image": userdata.ContainerImage(IMAGE)}, "takes no container image"),
    ],
)
def test_a_path_takes_what_is_its_own(path: str, given: dict[str, Any], error: str) -> None:
    with pytest.raises(BakehouseError, match=error):
        userdata.Join(("ctl",), path=path, **given)
