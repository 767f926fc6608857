"""What the tasks about nodes print: boot, verify, clusters, user-data, tokens. The doing is in the other modules."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import re
import shlex
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakehouse import demo, machine, network, sudo, timeline, userdata
from bakehouse import token as tokens
from bakehouse import verify as verification
from bakehouse.cluster import Cluster
from bakehouse.errors import BakehouseError
from bakehouse.kubernetes_cluster import KubernetesCluster
from bakehouse.machine import DataSource, Firmware
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.slurm import Authentication
from bakehouse.store import LocalStore
from bakehouse.terminal import console, errors, existing_file, open_site, parse_size, print_json
from bakehouse.yamlfile import did_you_mean

PLATFORMS = ("slurm", "kubernetes")
"""What nodes can become members of."""

CONTROLLERS = {"slurm": "A Slurm controller", "kubernetes": "A Kubernetes control plane"}
NEXT = {
    "slurm": (
        "invoke boot {tag} --join --name node-1       a node that joins it",
        "invoke cluster.run 'sinfo'                              the cluster's own commands",
        "invoke cluster.run 'srun hostname'",
        "invoke cluster.down slurm                               ends all of it",
    ),
    "kubernetes": (
        "invoke boot {tag} --join --name node-1 --memory 2GiB --cpus 2       a node that joins it",
        "invoke cluster.run 'kubectl get nodes' --platform kubernetes                   the cluster's own commands",
        "invoke cluster.down kubernetes                                                 ends all of it",
    ),
}
"""What to do with a cluster."""

SUBJECTS = ("slurm", "kubernetes", "roce", "bare-metal")
"""What nodes can be asked about."""

STDERR = 2
"""The file descriptor."""


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return a flag's value, which is one of a few."""
    if value not in allowed:
        raise BakehouseError(f"{flag} {value}: it is one of {', '.join(allowed)}{did_you_mean(value, [*allowed])}")
    return value


def text_of(flag: str, name: str) -> str:
    """Read a file that a flag names, or standard input for ``-``."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise BakehouseError(f"{flag} {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BakehouseError(f"{flag} {name} is not UTF-8 text: {error}") from error


def verify(tag: str, *, firmware: str, verbose: bool, as_json: bool) -> None:
    """Verify an image and print the result."""
    settings, store, _ = open_site()
    found = store.get(tag)
    chosen = _firmware(found, firmware) if firmware else None
    verification.needed(found)
    sudo.must_be_root(settings)
    found = verified(found, settings, store, errors if as_json else console, firmware=chosen, verbose=verbose)
    if as_json:
        print_json(found.model_dump(mode="json")["verification"])
    else:
        _print_verification(found, store)
    if found.verification and found.verification.result == "failed":
        raise failure(found, store)


def verify_host(host: str, *, platform: str, tag: str, report: str, ssh_config: str, as_json: bool) -> None:
    """Ask a node that runs what its suites ask, and print what does not hold."""
    settings, store, _ = open_site()
    subjects = [one_of("--platform", name.strip(), SUBJECTS) for name in platform.split(",")]
    suites = verification.Suites((verification.OWN_SUITES, *settings.image_tests)).of_names(["node", *subjects])
    record = store.get(tag) if tag else None
    config = existing_file("--ssh-config", ssh_config) if ssh_config else None
    with tempfile.TemporaryDirectory(prefix="bakehouse-suite-") as folder:
        file = Path(report).absolute() if report else Path(folder, "suite.xml")
        with errors.status(f"asking {host}"):
            facts = verification.ask_host(host, suites, record, file, ssh_config=config)
    failed = [fact for fact in facts if not fact.passed]
    if as_json:
        print_json([fact.model_dump(mode="json") for fact in facts])
    else:
        for fact in failed:
            console.print(f"[bold red]✗[/] {escape(fact.name)}", highlight=False)
            console.print(f"  [dim]{escape(fact.detail)}[/]", highlight=False)
        colour = "bold red" if failed else "green"
        held = len(facts) - len(failed)
        console.print(f"[{colour}]{host}: {held} of {len(facts)} facts hold[/]", highlight=False)
    if failed:
        raise BakehouseError(f"{len(failed)} of {len(facts)} facts do not hold on {host}")


def can_verify(record: Record) -> bool:
    """Say whether images of its platform can be verified."""
    try:
        verification.needed(record)
    except BakehouseError as error:
        errors.print(f"not verified: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return False
    return True


def verified(
    record: Record,
    settings: Settings,
    store: LocalStore,
    progress: Console,
    *,
    firmware: Firmware | None = None,
    verbose: bool = False,
) -> Record:
    """Verify an image, as root. Return its record with the result."""
    words = ["verify", record.tag, *(["--verbose"] if verbose else [])]
    status = sudo.again_as_root(settings, words, stdout=STDERR if progress.stderr else None)
    if status is not None:
        found = store.get(record.tag)
        if found.verification is None:
            raise BakehouseError(f"{record.tag} could not be verified", hint="what was said is above")
        return found
    suites = verification.Suites((verification.OWN_SUITES, *settings.image_tests))
    return verification.verify(record, store, settings, progress, firmware=firmware, suites=suites, verbose=verbose)


def failure(record: Record, store: LocalStore) -> BakehouseError:
    """Return the error for an image that failed."""
    result = record.verification
    assert result is not None
    failed = [check for check in [*result.checks, *result.suite] if not check.passed]
    log = "\n".join(f"{check.name}: {check.detail}" for check in failed)
    folder = store.folder(record.tag) / verification.EVIDENCE
    return BakehouseError(
        f"{record.name} {record.tag} failed its verification and is marked so",
        hint=f"console, journal and logs are in {folder}; `invoke verify {record.tag}` tries again",
        log=log,
    )


def verdict(record: Record) -> str:
    """Say in a few words how an image's verification ended."""
    result = record.verification
    if result is None:
        return "-"
    joined = result.timeline.seconds(timeline.JOINED) if result.timeline else None
    return result.result + (f", joined after {joined:.0f} s ({result.accelerator})" if joined else "")


def _print_verification(record: Record, store: LocalStore) -> None:
    result = record.verification
    assert result is not None
    table = Table("", "What was tried", "Seconds", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    marks = {True: "[green]✓[/]", False: "[bold red]✗[/]"}
    for check in result.checks:
        table.add_row(marks[check.passed], escape(check.name), f"{check.seconds:.1f}")
    held = sum(check.passed for check in result.suite)
    table.add_row("", f"[dim]{held} of {len(result.suite)} facts of the suites hold[/]", "")
    console.print(table)
    if result.timeline:
        console.print()
        timeline.show(console, result.timeline)
    folder = store.folder(record.tag) / verification.EVIDENCE
    colour = "green" if result.result == "passed" else "bold red"
    console.print(f"\n[{colour}]{record.name} {record.tag} {result.result}[/], evidence in {folder}", soft_wrap=True)


def show_timeline(tag: str, *, as_json: bool) -> None:
    """Show the timeline of an image's verification."""
    _, store, _ = open_site()
    found = store.get(tag)
    shown = found.verification.timeline if found.verification else None
    if shown is None:
        raise BakehouseError(f"{found.tag} has no timeline", hint=f"`invoke verify {found.tag}` makes one")
    if as_json:
        print_json(shown.model_dump(mode="json"))
    else:
        timeline.show(console, shown)


@dataclass(frozen=True)
class Shared:
    """What user-data of all platforms is made of, as it was given."""

    path: str
    node: str
    key_file: str
    broker: str
    ca: str
    token_file: str
    ssh_keys: list[str]
    bundle: str = ""
    """The file of a bundle, for the path bootstrap."""
    bundle_url: str = ""
    container: str = ""
    """A container image by its digest, for the path hybrid."""
    insecure_registry: bool = False

    def container_image(self) -> userdata.ContainerImage | None:
        """Return the container image, where one is given."""
        if self.insecure_registry and not self.container:
            raise BakehouseError("--insecure-registry without --container", hint="it says how the image is fetched")
        return userdata.ContainerImage(self.container, self.insecure_registry) if self.container else None

    def bundled(self) -> userdata.Bundle | None:
        """Return the bundle, where one is given."""
        if bool(self.bundle) != bool(self.bundle_url):
            raise BakehouseError(
                "--bundle and --bundle-url go together",
                hint="the file that `invoke bootstrap.bundle` wrote, and where nodes will fetch it",
            )
        if not self.bundle:
            return None
        sha256 = hashlib.sha256(_bytes_of("--bundle", self.bundle)).hexdigest()
        return userdata.Bundle(self.bundle_url, sha256)

    def must_not_be_hybrid(self) -> None:
        """Refuse a container image, for a platform that has none."""
        if self.container or self.path == "hybrid":
            raise BakehouseError(
                "only nodes of slurm come from container images", hint="docs/hybrid.md says why; --path bake"
            )

    def from_broker(self) -> userdata.Broker | None:
        """Return the broker, where one is given."""
        given = {"--broker": self.broker, "--ca": self.ca, "--token-file": self.token_file}
        lacking = [flag for flag, value in given.items() if not value]
        if 0 < len(lacking) < len(given):
            raise BakehouseError(
                f"{' and '.join(flag for flag, value in given.items() if value)} without {' and '.join(lacking)}",
                hint="a node needs the broker's address, its authority's certificate, and a token",
            )
        if lacking:
            return None
        token = text_of("--token-file", self.token_file).strip()
        return userdata.Broker(self.broker, token, text_of("--ca", self.ca))

    def public_keys(self) -> tuple[str, ...]:
        """Return the SSH keys that may log in."""
        lines = [line for name in self.ssh_keys for line in text_of("--ssh-key", name).splitlines()]
        return tuple(line for line in lines if line.strip())


def slurm_join(
    shared: Shared,
    *,
    platform: str,
    controllers: list[str],
    authentication: str,
    features: list[str],
    hardware: str,
    roce: str,
) -> userdata.Join:
    """Return how a Slurm node joins, as it was given."""
    one_of("--platform", platform, (*PLATFORMS, "roce"))
    return userdata.Join(
        tuple(controllers),
        path=shared.path,
        authentication=authentication,
        node=shared.node,
        features=tuple(features),
        hardware=userdata.read_hardware(hardware),
        key=_bytes_of("--key-file", shared.key_file) if shared.key_file else None,
        broker=shared.from_broker(),
        ssh_keys=shared.public_keys(),
        bundle=shared.bundled(),
        image=shared.container_image(),
        roce=text_of("--roce", roce) if roce else "",
    )


def roce_join(shared: Shared, *, devices: int, roce: str) -> userdata.RoceJoin:
    """Return what a node with RDMA devices is to be, as it was given."""
    shared.must_not_be_hybrid()
    if shared.key_file or shared.broker or shared.token_file:
        raise BakehouseError(
            "a node of the platform roce joins nothing that has a secret",
            hint="leave out --key-file, --broker and --token-file; or --platform slurm with --roce FILE",
        )
    return userdata.RoceJoin(
        devices=devices,
        path=shared.path,
        node=shared.node,
        roce=text_of("--roce", roce) if roce else "",
        ssh_keys=shared.public_keys(),
        bundle=shared.bundled(),
    )


def kubernetes_join(
    shared: Shared,
    *,
    api_server: str,
    ca_hashes: list[str],
    discovery_file: str,
    labels: list[str],
    taints: list[str],
    provider_id: str,
    cloud_provider: str,
) -> userdata.KubernetesJoin:
    """Return how a Kubernetes node joins, as it was given."""
    shared.must_not_be_hybrid()
    if not api_server:
        raise BakehouseError("no API server is given", hint="say where it listens: --api-server HOST[:PORT]")
    return userdata.KubernetesJoin(
        api_server,
        ca_hashes=tuple(ca_hashes),
        discovery_file=discovery_file,
        path=shared.path,
        node=shared.node,
        labels=tuple(labels),
        taints=tuple(taints),
        provider_id=provider_id,
        cloud_provider=cloud_provider,
        bootstrap_token=text_of("--key-file", shared.key_file).strip() if shared.key_file else "",
        broker=shared.from_broker(),
        ssh_keys=shared.public_keys(),
        bundle=shared.bundled(),
    )


def render_userdata(join: userdata.Join | userdata.KubernetesJoin | userdata.RoceJoin, output: str) -> None:
    """Print user-data, or write it to a file that only its owner can read."""
    text = userdata.render(join)
    if not output:
        print(text, end="")
        return
    target = Path(output)
    try:
        target.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        target.chmod(stat.S_IRUSR | stat.S_IWUSR)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BakehouseError(f"--output {output} cannot be written: {error.strerror}") from error
    errors.print(f"wrote {output}, {len(text)} bytes, readable by you only", highlight=False, soft_wrap=True)


def _bytes_of(flag: str, name: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise BakehouseError(f"{flag} {name} cannot be read: {error.strerror}") from error


def join_token(*, platform: str, node: str, lifetime: str) -> None:
    """Make a token and print it, alone: of the demo cluster's broker where one runs, else of this host's."""
    settings, _, _ = open_site()
    one_of("--platform", platform, PLATFORMS)
    if _is_demo(platform, settings):
        with _demo(platform, settings) as cluster:
            print(cluster.broker.offer(node, platform=platform, lifetime=lifetime).token)
        return
    seconds = tokens.lifetime_seconds(lifetime)
    print(tokens.create(_state(settings), platform=platform, node=node, lifetime_seconds=seconds))


def _is_demo(platform: str, settings: Settings) -> bool:
    return not _has_broker(settings) and demo.find(platform) is not None


def _demos(settings: Settings) -> list[str]:
    """Return the platforms whose demo cluster's broker is meant, since this host has none of its own."""
    return [platform for platform in PLATFORMS if _is_demo(platform, settings)]


def _has_broker(settings: Settings) -> bool:
    try:
        return settings.broker.exists()
    except PermissionError as error:
        raise BakehouseError(
            f"{settings.broker} cannot be looked at: {error.strerror}", hint="run this as root, as the broker is"
        ) from error


def _state(settings: Settings) -> Path:
    if not _has_broker(settings):
        raise BakehouseError(
            f"there is no join broker here: {settings.broker} is not there",
            hint="run this beside the broker (docs/join-broker.md), or `invoke cluster.up slurm` for one to try",
        )
    return tokens.state_of(settings.broker)


def join_tokens(*, as_json: bool) -> None:
    """List the tokens of this host's broker, or of the demo cluster's where one runs."""
    settings, _, _ = open_site()
    running = _demos(settings)
    if running and not as_json:
        for platform in running:
            with _demo(platform, settings) as cluster:
                print(cluster.broker.command("tokens"), end="")
        return
    found = tokens.listing(_state(settings))
    if as_json:
        print_json([dataclasses.asdict(token) for token in found])
        return
    table = Table("Id", "Platform", "Node", "State", "Expires (UTC)", "Used from", box=None, pad_edge=False)
    for token in found:
        expires = datetime.datetime.fromtimestamp(token.expires, datetime.UTC)
        table.add_row(
            token.identity, token.platform, escape(token.node), token.status, f"{expires:%Y-%m-%d %H:%M}",
            token.used_by or "-",
        )  # fmt: skip
    console.print(table)


def join_revoke(which: str) -> None:
    """Make tokens void, of this host's broker or of the demo cluster's where one runs."""
    settings, _, _ = open_site()
    running = _demos(settings)
    refused: list[BakehouseError] = []
    for platform in running:
        with _demo(platform, settings) as cluster:
            try:
                print(cluster.broker.command("revoke", which), end="")
            except BakehouseError as error:
                refused.append(error)
    if running:
        if len(refused) == len(running):
            raise refused[0]
        return
    for token in tokens.revoke(_state(settings), which):
        console.print(f"revoked {token.identity} of {token.node}", highlight=False)


def cluster_up(platform: str, *, image: str, authentication: str, accounting: bool) -> None:
    """Make a cluster that runs on."""
    settings, store, _ = open_site()
    one_of("cluster.up", platform, PLATFORMS)
    chosen = cast(Authentication, one_of("--authentication", authentication, get_args(Authentication)))
    found = store.get(image or platform)
    if found.platform != platform:
        raise BakehouseError(f"{found.tag} is a {found.platform} image", hint=f"`invoke cluster.up {found.platform}`")
    verification.needed(found)
    sudo.must_be_root(settings)
    with console.status("starting the controller"):
        if platform == "kubernetes":
            made = demo.up_kubernetes(found, store.image(found), settings)
        else:
            made = demo.up(found, store.image(found), chosen, settings.mirrors() if accounting else None)
    console.print(f"[green]{CONTROLLERS[platform]} of {made.tag} runs[/] (process {made.keeper}).", highlight=False)
    for line in NEXT[platform]:
        console.print(f"  {line.format(tag=made.tag)}", highlight=False, soft_wrap=True)


def cluster_down(platform: str) -> None:
    """End a cluster."""
    settings, _, _ = open_site()
    demo.get(platform)
    sudo.must_be_root(settings)
    ended = demo.down(platform)
    console.print(f"The {ended.platform} cluster of {ended.tag} is gone.", highlight=False)


def cluster_status(*, as_json: bool) -> None:
    """Show the clusters that run."""
    settings, _, _ = open_site()
    found = [made for platform in PLATFORMS if (made := demo.find(platform))]
    if as_json:
        print_json([dataclasses.asdict(made) for made in found])
        return
    if not found:
        console.print("No cluster runs here. Make one: [bold]invoke cluster.up slurm[/]")
        return
    sudo.must_be_root(settings)
    with _log() as log:
        for made in found:
            cluster = made.attach(log)
            console.print(
                f"[bold]{made.platform}[/] of {made.tag} since {made.since}, {made.authentication}, controller "
                f"{cluster.controller.address}, join broker {cluster.broker.url}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            for name, state in cluster.controller.states().items():
                console.print(f"  {name:20} {state}", highlight=False)


def cluster_run(command: str, *, platform: str) -> None:
    """Run a command on a cluster's controller and pass on its output."""
    settings, _, _ = open_site()
    running = [name for name in PLATFORMS if demo.find(name)]
    with _demo(platform or (running[0] if len(running) == 1 else PLATFORMS[0]), settings) as cluster:
        done = cluster.controller.run("sh", "-c", command, timeout=3600)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise BakehouseError(f"the command ended with status {done.returncode}")


@contextlib.contextmanager
def _demo(platform: str, settings: Settings) -> Iterator[Cluster | KubernetesCluster]:
    """Give the demo cluster that runs here, as root."""
    running = demo.get(platform)
    sudo.must_be_root(settings)
    with _log() as log:
        yield running.attach(log)


@contextlib.contextmanager
def _log() -> Iterator[Log]:
    """Give a log that nobody reads: these tasks are over at once."""
    with tempfile.NamedTemporaryFile(prefix="bakehouse-", suffix=".log") as file:
        log = Log(Path(file.name))
        try:
            yield log
        finally:
            log.close()


def _firmware(found: Record, firmware: str) -> Firmware:
    chosen = cast(Firmware, one_of("--firmware", firmware, get_args(Firmware)))
    if chosen == "secure-boot":
        if not found.secure_boot:
            raise BakehouseError(
                f"{found.tag} has no signed boot loader", hint="the element bare-metal brings one (docs/bare-metal.md)"
            )
    elif chosen not in found.firmware:
        raise BakehouseError(
            f"{found.tag} does not boot under {firmware.upper()}, only {' and '.join(found.firmware).upper()}",
            hint="its manifest's disk.firmware says so",
        )
    return chosen


def boot(
    tag: str,
    *,
    firmware: str,
    memory: str,
    cpus: int,
    disk: str,
    key: str,
    user_data: str,
    timeout: int,
    execute: str,
    data_source: str,
    name: str,
    join: bool,
) -> None:
    """Boot an image, show its console, and stop it cleanly."""
    settings, store, cache = open_site()
    found = store.get(tag)
    chosen = _firmware(found, firmware)
    source = cast(DataSource, one_of("--data-source", data_source, get_args(DataSource)))
    private = Path(key).expanduser() if key else None
    if private and not private.is_file():
        raise BakehouseError(f"--key {key} is not a file", hint="name the private key; the public one is beside it")
    if user_data == "-" and (join or source == "metadata"):
        raise BakehouseError("--user-data - with a private network", hint="name a file")
    if join and user_data:
        raise BakehouseError("--join and --user-data", hint="--join makes the user-data itself")
    data = text_of("--user-data", user_data) if user_data else ""
    with contextlib.ExitStack() as stack:
        place = None
        if join:
            cluster = stack.enter_context(_demo(found.platform, settings))
            place, data = cluster.network, cluster.user_data(name or found.name)
        elif source == "metadata":
            sudo.must_be_root(settings)
            place = stack.enter_context(network.up(stack.enter_context(_log())))
        running = stack.enter_context(machine.boot(
            store.image(found), probe=cache.kvm, firmware=chosen, cpus=cpus, key=private, user_data=data,
            hostname=name or found.name, data_source=source, network=place,
            memory=parse_size(memory, "--memory") >> 20, disk_size=parse_size(disk, "--disk") if disk else 0,
        ))  # fmt: skip
        how = "KVM" if running.accelerator == "kvm" else "emulation (KVM does not work here), so a boot takes a minute"
        errors.print(f"Booting {found.tag} under {firmware.upper()} with {how}. Ctrl-C stops it.", highlight=False)
        try:
            if execute:
                _execute(running, execute, timeout)
            else:
                _attend(running, timeout)
        except KeyboardInterrupt:
            errors.print("\nStopping the machine (Ctrl-C again: switch it off) ...")
        finally:
            clean = running.stop()
            errors.print("Stopped cleanly." if clean else "Switched off.")


def _execute(running: machine.Machine, command: str, timeout: float) -> None:
    """Run one command in a machine and pass on its output."""
    running.wait_for_ssh(timeout)
    done = running.ssh(command, timeout=timeout)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise BakehouseError(f"the command ended with status {done.returncode}")


def _attend(running: machine.Machine, timeout: float) -> None:
    """Show a machine's console until it ends."""
    threading.Thread(target=_follow, args=(running,), daemon=True).start()
    running.wait_for_ssh(timeout)
    errors.print(f"\n[bold green]Up after {time.monotonic() - running.started:.0f} s.[/]")
    command = escape(shlex.join(running.login.command))
    errors.print(f"Log in from another terminal:\n  {command}\n", highlight=False, soft_wrap=True)
    while running.running:
        time.sleep(0.5)
    errors.print("The machine switched itself off.")


def _follow(running: machine.Machine) -> None:
    """Copy a machine's console to ours, to its end."""
    with running.console.path.open("rb") as file:
        while (piece := file.read(4096)) or running.running:
            if piece:
                # Questions to the terminal (where is the cursor?) would have it answer into the user's shell.
                sys.stdout.buffer.write(re.sub(rb"\x1b\[\d*n", b"", piece))
                sys.stdout.flush()
            else:
                time.sleep(0.1)
