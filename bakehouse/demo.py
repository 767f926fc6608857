"""A cluster that outlives the command that made it: ``invoke cluster.up``, to play with on a laptop."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from platformdirs import user_state_path

from bakehouse import REPOSITORY, accounting, cluster, kubernetes, kubernetes_cluster, process, waiting
from bakehouse import record as records
from bakehouse.cache import write_atomically
from bakehouse.cluster import Cluster
from bakehouse.errors import BakehouseError
from bakehouse.kubernetes_cluster import KubernetesCluster
from bakehouse.record import FILE_NAME, Record
from bakehouse.run import Log, ending_on_sigterm
from bakehouse.settings import Settings
from bakehouse.slurm import Authentication

UP_SECONDS = 300
"""With accounting, which is installed first."""
DOWN_SECONDS = 30


@dataclass(frozen=True)
class Demo:
    """A cluster that runs."""

    platform: str
    tag: str
    """The image whose root the controller runs from."""
    authentication: str
    keeper: int
    """The process that keeps it."""
    keeper_started: int
    """When that started, in ticks since the host's boot (proc(5)): process numbers are used again."""
    network: int
    """The process that keeps its network (Network.pid)."""
    since: str

    @property
    def running(self) -> bool:
        """Whether it is still there."""
        return process.started(self.keeper) == self.keeper_started

    def attach(self, log: Log) -> Cluster | KubernetesCluster:
        """Return it, to work with."""
        if self.platform == kubernetes_cluster.PLATFORM:
            return kubernetes_cluster.attach(self.network, log)
        return cluster.attach(self.network, log)


def folder() -> Path:
    """Return where clusters note that they are there."""
    return user_state_path("bakehouse") / "clusters"


def find(platform: str) -> Demo | None:
    """Return the cluster that runs, and forget one that was killed."""
    note = folder() / f"{platform}.json"
    try:
        found = Demo(**json.loads(note.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if not found.running:
        # Root's, where it was made through sudo.
        with contextlib.suppress(OSError):
            note.unlink()
        return None
    return found


def get(platform: str) -> Demo:
    """Return the cluster that runs.

    Raises:
        BakehouseError: there is none.
    """
    found = find(platform)
    if found is None:
        raise BakehouseError(f"no {platform} cluster runs here", hint=f"`invoke cluster.up {platform}` makes one")
    return found


def up(record: Record, image: Path, authentication: Authentication, mirrors: tuple[str, str] | None = None) -> Demo:
    """Make a cluster and leave it running.

    Args:
        record: the image.
        image: its file.
        authentication: munge, or slurm for Slurm's own auth/slurm.
        mirrors: archive and security archive to install accounting from; without accounting if there are none.

    Raises:
        BakehouseError: there is one already, or it does not come up.
    """
    return _up(record, image, authentication, ["--accounting", record.release, *mirrors] if mirrors else [])


def up_kubernetes(record: Record, image: Path, settings: Settings) -> Demo:
    """Make a Kubernetes cluster and leave it running.

    Args:
        record: the image.
        image: its file.
        settings: say where the control plane's programs come from.

    Raises:
        BakehouseError: there is one already, it cannot be had, or it does not come up.
    """
    kubernetes.binaries(kubernetes.version_of(record), settings)
    return _up(record, image, "certificates", ["--kubernetes", str(settings.cache), *settings.mirrors()])


def _up(record: Record, image: Path, authentication: str, more: list[str]) -> Demo:
    there = find(record.platform)
    if there:
        raise BakehouseError(
            f"a {record.platform} cluster of {there.tag} runs already", hint=f"`invoke cluster.down {record.platform}`"
        )
    folder().mkdir(parents=True, exist_ok=True)
    log = folder() / f"{record.platform}.log"
    log.unlink(missing_ok=True)
    command: list[str | Path] = [
        sys.executable, "-m", "bakehouse.demo", record.platform, record.tag, image, authentication, log, *more,
    ]  # fmt: skip
    said = folder() / f"{record.platform}.err"
    with said.open("wb") as errors:
        keeper = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
        )

    def ended() -> None:
        if keeper.poll() is not None:
            raise BakehouseError("the cluster does not come up", log=said.read_text()[-3000:], hint=f"see {log}")

    try:
        waiting.until("cluster", lambda: find(record.platform) is not None, UP_SECONDS, poll=0.1, check=ended)
    except BaseException:
        keeper.terminate()
        raise
    return get(record.platform)


def down(platform: str) -> Demo:
    """End a cluster and all that is in it. Return what it was.

    Raises:
        BakehouseError: there is none.
    """
    found = get(platform)
    os.kill(found.keeper, signal.SIGTERM)
    try:
        waiting.until("end of the cluster", lambda: not found.running, DOWN_SECONDS, poll=0.1)
    except BakehouseError:
        # The kernel takes back what it kept.
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.keeper, signal.SIGKILL)
    for name in ("json", "err", "log"):
        (folder() / f"{platform}.{name}").unlink(missing_ok=True)
    return found


def keep(
    platform: str, tag: str, image: Path, authentication: Authentication, log: Log, release: str, *mirrors: str
) -> None:
    """Keep a cluster until SIGTERM comes. The rest is as for up()."""
    with cluster.up(image, log, authentication=authentication) as made:
        if mirrors:
            accounting.install(made.controller, release, (mirrors[0], mirrors[1]))
            made.controller.start_munge()
            accounting.start(made.controller)
        made.controller.start()
        _stay(platform, tag, authentication, made.network.pid)


def keep_kubernetes(image: Path, log: Log, cache: Path, *mirrors: str) -> None:
    """Keep a Kubernetes cluster until SIGTERM comes. The rest is as for up_kubernetes()."""
    record = records.read(image.parent / FILE_NAME)
    programs = kubernetes.kept_binaries(kubernetes.version_of(record), cache)
    with kubernetes_cluster.up(record, image, programs, (mirrors[0], mirrors[1]), cache, log) as made:
        made.controller.start()
        made.controller.add_ons()
        _stay(record.platform, record.tag, "certificates", made.network.pid)


def _stay(platform: str, tag: str, authentication: str, network: int) -> None:
    """Note that the cluster is there, and wait."""
    note = folder() / f"{platform}.json"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    found = Demo(platform, tag, authentication, pid, process.started(pid), network, now)
    write_atomically(note, json.dumps(asdict(found)))
    try:
        while True:
            time.sleep(3600)
    finally:
        note.unlink(missing_ok=True)


def main() -> int:
    """Keep a cluster; started by up()."""
    parser = argparse.ArgumentParser()
    parser.add_argument("platform")
    parser.add_argument("tag")
    parser.add_argument("image", type=Path)
    parser.add_argument("authentication")
    parser.add_argument("log", type=Path)
    parser.add_argument("--accounting", nargs=3, metavar=("RELEASE", "MIRROR", "SECURITY_MIRROR"), default=[""])
    parser.add_argument("--kubernetes", nargs=3, metavar=("CACHE", "MIRROR", "SECURITY_MIRROR"))
    given = parser.parse_args()
    try:
        with ending_on_sigterm(), Log(given.log) as log:
            if given.kubernetes:
                cache, *mirrors = given.kubernetes
                keep_kubernetes(given.image, log, Path(cache), *mirrors)
            else:
                keep(given.platform, given.tag, given.image, given.authentication, log, *given.accounting)
    except BakehouseError as error:
        print(error.log, error, sep="\n", file=sys.stderr)  # noqa: T201 - up() shows it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
