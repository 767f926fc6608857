"""One real bake that all integration tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from bakehouse import REPOSITORY, build, local_cloud, plan, run
from bakehouse import settings as site_settings
from bakehouse.cache import BaseCache
from bakehouse.local_cloud import LocalCloud
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

DEBS = "debs-*"


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


Invoke = Callable[..., subprocess.CompletedProcess[str]]


def invoking(environment: dict[str, str], prefix: Sequence[str] = ()) -> Invoke:
    """Return what runs a task as people do, with variables beside those that there are, and after a prefix."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-m", "invoke", *words],
            cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
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
