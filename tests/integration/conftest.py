"""One real bake that all integration tests share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import REPOSITORY, build, container_image, container_push, local_cloud, local_registry, plan, run
from bakehouse import settings as site_settings
from bakehouse.cache import BaseCache
from bakehouse.container import Container
from bakehouse.container_image import Shelf
from bakehouse.container_push import Pushed, Target
from bakehouse.daemon import free_ports
from bakehouse.local_cloud import LocalCloud
from bakehouse.local_registry import LocalRegistry
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

DEBS = "debs-*"

LIST = r"""
import hashlib, json, os, stat
found = {}
for top, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(top, name) not in ("/proc", "/sys", "/dev", "/run", "/tmp")]
    for name in folders + files:
        path = os.path.join(top, name)
        about = os.lstat(path)
        data = ""
        if stat.S_ISLNK(about.st_mode):
            data = os.readlink(path)
        elif stat.S_ISREG(about.st_mode):
            with open(path, "rb") as file:
                data = hashlib.sha256(file.read()).hexdigest()
        found[path] = [stat.filemode(about.st_mode), about.st_uid, about.st_gid, data]
print(json.dumps(found))
"""
"""All of a root: by path, kind and mode, owner, group, and content or target."""


def host_cache() -> Path:
    """Return the host's own cache: what takes long to have and does not change the results is shared with it."""
    return site_settings.load(environment={}).cache


@pytest.fixture(scope="session")
def real_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A store and a cache of their own. Downloaded packages are shared with the host's cache, nothing else is."""
    folder = tmp_path_factory.mktemp("real")
    host = host_cache()
    cache = folder / "cache"
    cache.mkdir()
    for debs in host.glob(DEBS):
        shutil.copytree(debs, cache / debs.name, copy_function=_link_or_copy)
    yield Settings(store=folder / "store", cache=cache)
    host.mkdir(parents=True, exist_ok=True)
    for debs in cache.glob(DEBS):
        shutil.copytree(debs, host / debs.name, copy_function=_link_or_copy, dirs_exist_ok=True)
    run.remove_tree(folder)


def _link_or_copy(source: str, target: str) -> None:
    if Path(target).exists():
        return
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def bake(settings: Settings, name: str = "slurm", **options: bool) -> tuple[Record, bool]:
    """Bake for real, showing what is done."""
    wanted = plan.make(name, settings)
    return build.bake(wanted, LocalStore(settings.store), BaseCache(settings.cache), Console(width=160), **options)


def leftovers(settings: Settings) -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    loops = subprocess.check_output(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], text=True)
    found = [line for line in [*mounts, *loops.splitlines()] if str(settings.cache.parent) in line]
    found += [str(path) for path in settings.cache.glob("work/*")]
    return found + [str(path) for path in settings.store.glob(".incoming*")]


@pytest.fixture
def site_elements(real_settings: Settings, tmp_path: Path) -> Settings:
    """A site with a manifest 'broken' and an element of its own."""
    (tmp_path / "manifests").mkdir()
    (tmp_path / "elements/site-element/install.d").mkdir(parents=True)
    (tmp_path / "manifests/broken.yaml").write_text("extends: debian-13\nplatform: slurm\nelements: [site-element]\n")
    return real_settings.model_copy(update={"manifests": [tmp_path / "manifests"], "elements": [tmp_path / "elements"]})


def status(node: Container) -> dict[str, Any]:
    """Return what the join agent of a container says; nothing before it has said anything."""
    done = node.run("cat", "/run/bakehouse/status.json")
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
    return found


def write_script(settings: Settings, text: str) -> None:
    script = settings.elements[0] / "site-element/install.d/50-site"
    script.write_text(f"#!/bin/bash\nset -eu\n{text}\n")
    script.chmod(0o755)


def start(settings: Settings, *words: str) -> subprocess.Popen[str]:
    """Start a task as people do, at a site with a manifest and an element of its own. Its output is one stream."""
    environment = {
        **os.environ,
        "BAKEHOUSE_STORE": str(settings.store),
        "BAKEHOUSE_CACHE": str(settings.cache),
        "BAKEHOUSE_MANIFESTS": str(settings.manifests[0]),
        "BAKEHOUSE_ELEMENTS": str(settings.elements[0]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", *words],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_while_its_script_waits(settings: Settings, task: str, number: signal.Signals) -> None:
    """Start a task that builds 'broken', send it a signal while the element's script runs, and see that all of it ends.

    Args:
        settings: site_elements.
        task: such as bake.
        number: the signal.
    """
    # A number of its own: tests run side by side.
    wait = f"sleep {os.getpid() + 100000}"
    write_script(settings, f"echo now it waits\n{wait}")
    process = start(settings, task, "--platform", "broken", "--verbose")
    assert process.stdout is not None
    assert any("now it waits" in line for line in process.stdout)
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", wait], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "the element's script went on running"
        time.sleep(0.1)


def push(settings: Settings, to: LocalRegistry | Target, name: str = "slurm") -> Pushed:
    target = Target(to.address, insecure=True) if isinstance(to, LocalRegistry) else to
    shelf = Shelf(BaseCache(settings.cache))
    return container_push.push(container_image.order(name, settings), shelf, target, Console(width=160))


Invoke = Callable[..., subprocess.CompletedProcess[str]]


def invoking(environment: dict[str, str], prefix: Sequence[str] = (), seconds: float = 300) -> Invoke:
    """Return what runs a task as people do, with variables beside those that there are, and after a prefix."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-m", "invoke", *words],
            cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
            timeout=seconds,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def baked(real_settings: Settings) -> Record:
    """A Slurm image, baked from nothing."""
    record, built = bake(real_settings)
    assert built
    return record


@pytest.fixture(scope="session")
def roce_image(real_settings: Settings) -> Record:
    """An image for machines of metal, baked from nothing."""
    record, built = bake(real_settings, "roce")
    assert built
    return record


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """A container registry on the loopback."""
    folder = tmp_path_factory.mktemp("registry") / "registry"
    yield local_registry.up(folder=folder, port=free_ports(1)[0], say=print)
    local_registry.down(folder, purge=True)


@pytest.fixture(scope="session")
def pushed(real_settings: Settings, here: LocalRegistry) -> Pushed:
    """The container image of Slurm, built from nothing and pushed."""
    return push(real_settings, here)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A real Keystone and Glance. Their virtual environment is shared with the host's cache."""
    folder = tmp_path_factory.mktemp("openstack")
    cache = host_cache()
    with host_environment():
        made = local_cloud.up(
            cache, folder=folder / "cloud", name="test", clouds_file=folder / "clouds.yaml", tied=True, say=print
        )
    yield made
    local_cloud.down(made.folder, delete=True)


@contextmanager
def host_environment() -> Iterator[None]:
    """Leave out what names a cloud of whoever runs the tests."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OS_")}
    try:
        yield
    finally:
        os.environ.update(kept)
