"""Benchmark of publishing: beside a plain streaming PUT of the same file to the same Glance, in one run."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from bakehouse import REPOSITORY, channel, local_cloud, run, sbom
from bakehouse.bench import Result, Row, this_machine
from bakehouse.cache import file_digest
from bakehouse.cloud import Cloud, connect
from bakehouse.errors import BakehouseError
from bakehouse.glance import PAGE, Glance
from bakehouse.local_cloud import LocalCloud
from bakehouse.properties import MARK
from bakehouse.published import PUBLISHED, STATE, Catalogue
from bakehouse.record import FILE_NAME, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

MIB = 1 << 20

GOAL_RATE = 0.95
GOAL_MEMORY = 200 * MIB
GOAL_LISTING = 3.0
GOAL_READS = 1.05
"""Bytes that are read, by those of the file: once, and a little for everything else."""

LISTED = 1000
"""Images that are listed."""

NAME = "bench"

PUBLISH = """
import json, resource, sys
from bakehouse import cli_cloud

def read_bytes():
    return int(open("/proc/self/io").readline().split()[1])

before = read_bytes()
cli_cloud.publish(sys.argv[1], cloud="", region="", visibility="", file_format="", dry_run=False, as_json=True)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"read": read_bytes() - before, "memory": usage.ru_maxrss * 1024}), file=sys.stderr)
"""
"""What publishes in a process of its own, and says what it took: rchar of proc(5), ru_maxrss of getrusage(2)."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class Upload:
    """One publication."""

    upload: float
    """Seconds of the upload alone."""
    whole: float
    """Seconds of the whole command, Python's start and the connection included."""
    read: int
    """Bytes that the process read."""
    memory: int
    """Peak of its resident memory, bytes."""


def publish(settings: Settings, rounds: int, size: int, console: Console) -> Result:
    """Measure uploads against curl's, and listings against plain ones.

    Args:
        settings: the site's settings; its store and clouds are left alone.
        rounds: how many uploads of each kind.
        size: bytes of the image file.
        console: shows what is being measured.

    Raises:
        BakehouseError: curl is missing, or something does not work.
    """
    if not shutil.which("curl"):
        raise BakehouseError("curl is not installed", hint="apt-get install curl")
    settings.cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=settings.cache))
    try:
        with _cloud(settings, scratch, console) as local:
            return _Bench(scratch, local, console).run(rounds, size)
    finally:
        run.remove_tree(scratch)


@contextmanager
def _cloud(settings: Settings, scratch: Path, console: Console) -> Iterator[LocalCloud]:
    local = local_cloud.up(
        settings.cache,
        folder=scratch / "openstack",
        name=NAME,
        clouds_file=scratch / "clouds.yaml",
        say=console.print,
        tied=True,
    )
    kept = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("OS_")}
    os.environ["OS_CLIENT_CONFIG_FILE"] = str(local.clouds_file)
    try:
        yield local
    finally:
        del os.environ["OS_CLIENT_CONFIG_FILE"]
        os.environ.update(kept)
        local_cloud.down(local.folder, delete=True)


class _Bench:
    def __init__(self, scratch: Path, local: LocalCloud, console: Console) -> None:
        self.scratch = scratch
        self.local = local
        self.console = console
        self.store = LocalStore(scratch / "store")

    def run(self, rounds: int, size: int) -> Result:
        plain: list[float] = []
        ours: list[Upload] = []
        file = self._add("20260101-0000000", size)

        def curl(number: int) -> None:
            plain.append(self._measure(f"{number}/{rounds}: curl", lambda: self._curl(file)))

        def publish(number: int) -> None:
            ours.append(self._measure(f"{number}/{rounds}: publish", lambda: self._publish("20260101-0000000")))

        for number in range(1, rounds + 1):
            # In turns first and second: on some machines every other upload is slower, whoever sends it.
            for work in (curl, publish) if number % 2 else (publish, curl):
                work(number)
        self._add("20260102-0000000", size // 8)
        small = self._measure("publish, an eighth of the size", lambda: self._publish("20260102-0000000"))
        with connect(NAME) as cloud:
            self._measure(f"making {LISTED} images (not counted)", lambda: self._fill(cloud))
            raw, listed, whole = self._listings(cloud, rounds)
        return Result([*self._uploads(file, plain, ours, small), *self._lists(raw, listed, whole)], this_machine())

    def _uploads(self, file: Path, plain: list[float], ours: list[Upload], small: Upload) -> list[Row]:
        size = file.stat().st_size
        # Means, since the slower and the faster half of each may differ by a third: a median would take one of them.
        curl, upload = statistics.mean(plain), statistics.mean(one.upload for one in ours)
        whole = statistics.mean(one.whole for one in ours)
        memory = max(one.memory for one in ours)
        reads = max(one.read for one in ours) / size
        rate = f"{size / MIB:.0f} MiB, {size / MIB / curl:.0f} MiB/s"
        return [
            Row("curl, plain streaming PUT", f"{curl:.2f} s ({rate})", 1.0),
            Row(
                "publish, its upload", f"{upload:.2f} s ({size / MIB / upload:.0f} MiB/s)",
                curl / upload, f"at least {GOAL_RATE} of curl's rate", curl / upload >= GOAL_RATE,
            ),
            Row("publish, the whole command", f"{whole:.2f} s", curl / whole),
            Row("bytes read, by the file's", f"{reads:.3f}", reads, f"under {GOAL_READS}", reads < GOAL_READS),
            Row(
                "peak memory", f"{memory / MIB:.0f} MiB", memory / small.memory,
                f"under {GOAL_MEMORY / MIB:.0f} MiB", memory < GOAL_MEMORY,
            ),
            Row("peak memory, an eighth of the size", f"{small.memory / MIB:.0f} MiB", 1.0),
        ]  # fmt: skip

    def _lists(self, raw: list[float], listed: list[float], whole: list[float]) -> list[Row]:
        base, ours = statistics.median(raw), statistics.median(listed)
        command = statistics.median(whole)
        return [
            Row(f"{LISTED} images, one raw paged listing", f"{base:.2f} s", 1.0),
            Row(
                f"{LISTED} images with channels and history", f"{ours:.2f} s", ours / base,
                f"under {GOAL_LISTING:.0f}", ours / base < GOAL_LISTING,
            ),
            Row(
                f"invoke images, {LISTED} images, whole command", f"{command:.2f} s", command / base,
                f"under {GOAL_LISTING:.0f}", command / base < GOAL_LISTING,
            ),
        ]  # fmt: skip

    def _measure(self, what: str, work: Callable[[], _T]) -> _T:
        os.sync()
        start = time.monotonic()
        done = work()
        self.console.print(f"{what}: {time.monotonic() - start:.2f} s", highlight=False)
        return done

    # Uploads.

    def _add(self, tag: str, size: int) -> Path:
        """Put an image of noise into the store: a qcow2, as images are."""
        with self.store.adding(NAME, tag) as folder:
            raw, image, bill = folder / "noise", folder / "noise.qcow2", folder / "sbom.cdx.json"
            with raw.open("wb") as file:
                for _ in range(0, size, MIB):
                    file.write(os.urandom(MIB))
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
            raw.unlink()
            now = datetime.datetime.now(datetime.UTC)
            sbom.write(bill, [], name=NAME, tag=tag, distribution="debian", release="13", created=now)
            record = Record.model_validate({
                "name": NAME, "platform": "slurm", "tag": tag, "digest": "0" * 64, "inputs": {}, "created": now,
                "commit": "", "distribution": "debian", "release": "trixie", "architecture": "amd64", "kernel": "6",
                "firmware": ["bios"], "root_size": size, "root_used": size, "sbom": bill.name, "package_count": 0,
                "sbom_sha256": file_digest(bill, "sha256")["sha256"], "versions": {}, "steps": [], "builder": {},
                "files": [{"format": "qcow2", "file": image.name, "size": image.stat().st_size,
                           "virtual_size": size, **file_digest(image, "sha256", "sha512")}],
                "base": {"key": "", "sha256": "", "created": now},
                "usage": {"peak_memory": 0, "disk": 0, "cpu_seconds": 0},
            })  # fmt: skip
            (folder / FILE_NAME).write_text(record.model_dump_json())
        return self.store.folder(tag) / image.name

    def _curl(self, file: Path) -> float:
        """Upload with curl. Return the seconds."""
        with connect(NAME) as cloud:
            glance = Glance(cloud)
            fields = {"name": "plain", "disk_format": "qcow2", "container_format": "bare", "id": str(uuid.uuid4())}
            image = glance.create(fields)
            assert image is not None
            # The token comes on standard input, so that no other process sees it; no Expect: it costs curl a second.
            headers = f'header = "X-Auth-Token: {cloud.connection.auth_token}"\n'
            command: list[str | Path] = [
                "curl",
                "--silent",
                "--show-error",
                "--fail",
                "--config",
                "-",
                "--upload-file",
                file,
            ]
            command += ["--header", "Content-Type: application/octet-stream", "--header", "Expect:"]
            start = time.monotonic()
            url = f"{self.local.image_url}/v2/images/{image.id}/file"
            subprocess.run([*command, url], input=headers, text=True, check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - start
            glance.delete(image)
        return seconds

    def _publish(self, tag: str) -> Upload:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PUBLISH, tag], cwd=self.scratch, capture_output=True, text=True, check=False,
            env=self._environment(),
        )  # fmt: skip
        whole = time.monotonic() - start
        if done.returncode != 0:
            raise BakehouseError("an image could not be published", log=done.stderr[-2000:])
        took = json.loads(done.stderr.splitlines()[-1])
        with connect(NAME) as cloud:
            Glance(cloud).delete(Catalogue.read(cloud).get(tag).image)
        return Upload(json.loads(done.stdout)["seconds"], whole, took["read"], took["memory"])

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("BAKEHOUSE_")}
        return kept | {"PYTHONPATH": str(REPOSITORY), "OS_CLOUD": NAME, "BAKEHOUSE_STORE": str(self.store.root)}

    # Listings.

    def _fill(self, cloud: Cloud) -> None:
        glance = Glance(cloud)
        for number in range(LISTED):
            glance.create({
                "name": f"slurm-{number}", "disk_format": "qcow2", "container_format": "bare", "tags": [MARK],
                "os_hidden": number % 2 == 0, "bakehouse_name": "slurm", "bakehouse_tag": f"20260101-{number:07}",
                "bakehouse_created": f"2026-01-01T{number // 60 % 24:02}:{number % 60:02}:00Z", STATE: PUBLISHED,
                "bakehouse_channel_stable_1": '{"move":"promote"}',
                **{f"property_{index}": "x" * 20 for index in range(25)},
            })  # fmt: skip

    def _listings(self, cloud: Cloud, rounds: int) -> tuple[list[float], list[float], list[float]]:
        raw, ours, whole = [], [], []
        for number in range(1, rounds + 1):
            raw.append(self._seconds(lambda: _raw_listing(cloud)))
            ours.append(self._seconds(lambda: _listing(cloud)))
            whole.append(self._seconds(self._images))
            self.console.print(f"{number}/{rounds}: listings {raw[-1]:.2f}, {ours[-1]:.2f}, {whole[-1]:.2f} s")
        return raw, ours, whole

    def _images(self) -> None:
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "invoke",
            "--search-root",
            REPOSITORY,
            "images",
            "--cloud",
            NAME,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=self._environment(), cwd=self.scratch)

    def _seconds(self, work: Callable[[], object]) -> float:
        start = time.monotonic()
        work()
        return time.monotonic() - start


def _raw_listing(cloud: Cloud) -> int:
    """List all images as plainly as can be: page after page, as JSON, hidden ones too."""
    count = 0
    for hidden in ("false", "true"):
        path: str | None = f"/images?limit={PAGE}&os_hidden={hidden}"
        while path:
            page = cloud.request("GET", path).json()
            count += len(page["images"])
            path = page.get("next") and "/" + page["next"].partition("/v2/")[2]
    assert count >= LISTED
    return count


def _listing(cloud: Cloud) -> int:
    catalogue = Catalogue.read(cloud)
    channel.pointed_to(catalogue)
    assert len(catalogue.images) >= LISTED
    return len(catalogue.images)
