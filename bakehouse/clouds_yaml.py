"""The user's ``clouds.yaml``: entries are added and taken out as text, so that all else in it stays as it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from platformdirs import user_config_path

from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError

BEGIN = "# begin: made by `invoke openstack.up`: {name}"
END = "# end: {name}"

SECRET = 0o600
"""Mode of a file that only its owner reads."""


def user_file() -> Path:
    """Return the file that entries go to: the one that openstacksdk reads here, which is the first that is there.

    It is the one that ``OS_CLIENT_CONFIG_FILE`` names, in this folder, or the user's own. The host's own, in ``/etc``,
    is for others as well and gets no secrets of ours.
    """
    named = os.environ.get("OS_CLIENT_CONFIG_FILE")
    if named:
        return Path(named).absolute()
    own = Path("~/.config/openstack").expanduser()
    folders = [Path.cwd(), user_config_path("openstack"), own]
    there = [folder / f"clouds.{kind}" for folder in folders for kind in ("yaml", "yml", "json")]
    return next((path for path in there if path.exists()), own / "clouds.yaml")


def names(path: Path) -> list[str]:
    """Return the clouds in a file; none where it is not there.

    Raises:
        BakehouseError: it cannot be read.
    """
    clouds = _parse(path, _text(path)).get("clouds")
    return [*clouds] if isinstance(clouds, dict) else []


def add(path: Path, name: str, entry: Mapping[str, object], say: Callable[[str], None] = lambda _text: None) -> None:
    """Add an entry, or replace the one of this name that was added before.

    Args:
        path: the file; it is made where it is missing. It holds secrets: only its owner may read it from now on.
        name: of the cloud.
        entry: what stands below it.
        say: takes a line where others could read it before.

    Raises:
        BakehouseError: somebody else's entry has that name, or the file is not of a shape that text can be added to.
    """
    text = _without(_text(path), name)
    before = _parse(path, text)
    clouds = before.get("clouds")
    if isinstance(clouds, dict) and name in clouds:
        raise BakehouseError(
            f"{path} has a cloud '{name}' already that is not ours", hint="rename it, or give --name OTHER"
        )
    indent = _indent(text)
    body = yaml.safe_dump({name: dict(entry)}, sort_keys=False)
    lines = [BEGIN.format(name=name), *body.splitlines(), END.format(name=name)]
    block = "".join(f"{indent}{line}\n" for line in lines)
    if not re.search(r"^clouds:", text, flags=re.MULTILINE):
        text += ("" if not text or text.endswith("\n") else "\n") + "clouds:\n"
    changed = re.sub(r"^(clouds:[ \t]*(?:#.*)?\n)", lambda match: match[1] + block, text, count=1, flags=re.MULTILINE)
    wanted = {**before, "clouds": {**(clouds or {}), name: dict(entry)}}
    if changed == text or _parse(path, changed) != wanted:
        raise BakehouseError(
            f"{path} is not written so that an entry can be added to it",
            hint="write 'clouds:' on a line of its own with its entries indented below, or name another file in "
            "OS_CLIENT_CONFIG_FILE",
        )
    if path.exists() and _mode(path) & 0o077:
        say(f"{path} gets a secret: only its owner can read it from now on (mode 600, it was {_mode(path):o})")
    _write(path, changed, SECRET)


def remove(path: Path, name: str) -> bool:
    """Take an entry out that was added before. Return whether it was there.

    Raises:
        BakehouseError: the file cannot be read or written.
    """
    text = _text(path)
    rest = _without(text, name)
    if rest == text:
        return False
    if rest.strip() == "clouds:" and not path.is_symlink():
        path.unlink()
    else:
        _write(path, rest, _mode(path))
    return True


def _without(text: str, name: str) -> str:
    begin, end = re.escape(BEGIN.format(name=name)), re.escape(END.format(name=name))
    return re.sub(rf"^[ \t]*{begin}\n(?:.*\n)*?[ \t]*{end}\n", "", text, flags=re.MULTILINE)


def _indent(text: str) -> str:
    """Return the blanks before the entries that are there."""
    match = re.search(r"^clouds:[ \t]*(?:#.*)?\n(?:[ \t]*(?:#.*)?\n)*([ ]+)\S", text, flags=re.MULTILINE)
    return match[1] if match else "  "


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise BakehouseError(f"{path} cannot be read: {error}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BakehouseError(f"{path} is not YAML: {' '.join(str(error).split())}", hint="mend it first") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BakehouseError(f"{path} holds a {type(data).__name__}, not a mapping", hint="it begins with 'clouds:'")
    return data


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _write(path: Path, text: str, mode: int) -> None:
    # Where it is a link, the link stays.
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(target, text, mode=mode)
    except OSError as error:
        raise BakehouseError(f"{path} cannot be written: {error.strerror}") from error
