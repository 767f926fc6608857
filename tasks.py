"""Invoke tasks: parse, call the library, print."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from invoke import Collection, Context, Exit, task

from bakehouse import cli
from bakehouse.errors import BakehouseError


def command(function: Callable[..., None], **options: Any) -> Any:
    """Make a task whose errors are one sentence, one hint, exit status 1; a traceback with --debug."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> None:
        try:
            function(*arguments, **named)
        except BakehouseError as error:
            if os.environ.get("BAKEHOUSE_DEBUG") or {"--debug", "-d"} & set(sys.argv[1:]):
                raise
            cli.show_error(error)
            raise Exit(code=1) from error
        except KeyboardInterrupt:
            raise Exit("stopped", code=130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Exit(code=141) from None

    return task(run, **options)


def _doctor(_context: Context, json: bool = False) -> None:
    """Check this host: tools, root, disk, memory, mirrors, KVM, clouds; says how to mend what is amiss.

    Example: invoke doctor
    """
    cli.doctor(as_json=json)


def _bake(
    _context: Context,
    platform: str,
    release: str = "",
    format: str = "",
    refresh: bool = False,
    force: bool = False,
    verbose: bool = False,
    wait: bool = True,
    json: bool = False,
) -> None:
    """Bake an image: what a manifest declares becomes a disk image in the store. Does nothing where nothing changed.

    Examples:
      invoke bake --platform slurm
      invoke bake --platform slurm --release bookworm
      invoke bake --platform slurm --format qcow2,raw
      invoke bake --platform slurm --refresh
    """
    cli.bake(
        platform,
        release=release,
        formats=format,
        refresh=refresh,
        force=force,
        verbose=verbose,
        wait=wait,
        as_json=json,
    )


def _plan(_context: Context, platform: str, release: str = "", format: str = "", json: bool = False) -> None:
    """Show what a bake would do: elements, packages, input digest, what is cached, what would be built and why.

    Example: invoke plan --platform slurm
    """
    cli.plan(platform, release=release, formats=format, as_json=json)


def _manifests(_context: Context, json: bool = False) -> None:
    """List the manifests: what can be baked."""
    cli.manifests(as_json=json)


def _schema(_context: Context) -> None:
    """Print the JSON Schema of manifests, for editors.

    Example: invoke manifests.schema > manifest.schema.json
    """
    cli.schema()


def _images(_context: Context, json: bool = False) -> None:
    """List the images in the store."""
    cli.images(as_json=json)


def _show(_context: Context, tag: str, json: bool = False) -> None:
    """Show one image: files, digests, versions, seconds by stage.

    TAG may be the beginning of a tag, or a manifest's name for its newest image.
    Example: invoke images.show slurm
    """
    cli.show(tag, as_json=json)


def _remove(_context: Context, tag: str) -> None:
    """Remove an image from the store.

    Example: invoke images.remove 20261123-5853cc9
    """
    cli.remove(tag)


def _cache(_context: Context, json: bool = False) -> None:
    """Show what the cache holds, its size and age."""
    cli.cache(as_json=json)


def _prune(_context: Context, limit: str = "", everything: bool = False) -> None:
    """Shrink the cache to its limit, the longest unused first.

    Examples:
      invoke cache.prune
      invoke cache.prune --limit 5GiB
      invoke cache.prune --everything
    """
    cli.prune(limit=limit, everything=everything)


def _boot(
    _context: Context,
    tag: str,
    firmware: str = "bios",
    memory: str = "1GiB",
    cpus: int = 1,
    disk: str = "",
    key: str = "",
    user_data: str = "",
    timeout: int = 900,
    exec: str = "",
) -> None:
    """Boot an image in QEMU, show its console, give an SSH command, and stop it cleanly on Ctrl-C.

    The image itself is not changed: what the machine writes is thrown away.

    Examples:
      invoke boot slurm
      invoke boot 20261123-5853cc9 --firmware uefi --memory 2GiB --disk 10GiB
      invoke boot slurm --exec 'systemd-analyze'
    """
    cli.boot(
        tag,
        firmware=firmware,
        memory=memory,
        cpus=cpus,
        disk=disk,
        key=key,
        user_data=user_data,
        timeout=timeout,
        execute=exec,
    )


def _bench_bake(_context: Context, platform: str = "slurm", rounds: int = 1, json: bool = False) -> None:
    """Measure a bake side by side with plain mmdebstrap of the same packages, in one run. Prints ratios.

    Example: invoke bench.bake --rounds 3
    """
    cli.bench_bake(platform, rounds=rounds, as_json=json)


def _settings(_context: Context) -> None:
    """Print the settings that hold here."""
    cli.show_settings()


def _test(_context: Context, fast: bool = False, long: bool = False, only: str = "") -> None:
    """Run the tests: everything that can regress, real bakes and boots included.

    --fast: under a minute, for every edit. --long: what is run by hand before a release.
    Example: invoke test --fast --only manifest
    """
    cli.test(fast=fast, long=long, only=only)


PLATFORM = {"platform": "a manifest's name, such as slurm (see: invoke manifests)"}
WHAT = PLATFORM | {
    "release": "another Debian release than the manifest's: trixie, bookworm, 13 or 12",
    "format": "image files to make in place of the manifest's: qcow2, raw, or both with a comma",
}
JSON = {"json": "print JSON"}
TAG = {"tag": "a tag, its beginning, or a manifest's name for its newest image"}

bake = command(
    _bake,
    name="bake",
    help=WHAT
    | JSON
    | {
        "refresh": "renew the base root, and so its packages",
        "force": "build even where nothing changed",
        "verbose": "show the output of diskimage-builder",
        "wait": "wait for a bake of the same platform that is going on (--no-wait: fail)",
    },
)
plan = command(_plan, name="plan", help=WHAT | JSON)
doctor = command(_doctor, name="doctor", help=JSON)
settings = command(_settings, name="settings")
test = command(
    _test,
    name="test",
    help={"fast": "the fast tier only", "long": "the long tier only", "only": "tests whose names hold this"},
)
boot = command(
    _boot,
    name="boot",
    positional=["tag"],
    help=TAG
    | {
        "firmware": "bios or uefi",
        "memory": "such as 1GiB",
        "cpus": "how many",
        "disk": "the disk's size, such as 10GiB; the image's own by default",
        "key": "a private SSH key to log in with; one is made by default",
        "user-data": "a file with user-data for cloud-init, in place of just the key",
        "timeout": "seconds until SSH must answer",
        "exec": "run a command over SSH, print its output, and stop",
    },
)

manifests = Collection("manifests")
manifests.add_task(command(_manifests, name="list", help=JSON), default=True)
manifests.add_task(command(_schema, name="schema"))
images = Collection("images")
images.add_task(command(_images, name="list", help=JSON), default=True)
images.add_task(command(_show, name="show", positional=["tag"], help=TAG | JSON))
images.add_task(command(_remove, name="remove", positional=["tag"], help=TAG))
cache = Collection("cache")
cache.add_task(command(_cache, name="list", help=JSON), default=True)
cache.add_task(
    command(
        _prune,
        name="prune",
        help={"limit": "such as 5GiB; by default 'cache_limit_gib'", "everything": "empty the cache"},
    )
)
bench = Collection("bench")
bench.add_task(
    command(
        _bench_bake,
        name="bake",
        help=PLATFORM | JSON | {"rounds": "measure so many times; medians are shown"},
    )
)

namespace = Collection(bake, plan, doctor, settings, test, boot, manifests, images, cache, bench)
