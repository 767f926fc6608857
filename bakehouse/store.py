"""The local store: a folder an image, with its record, SBOM, checksums and build log."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bakehouse import lock, sbom
from bakehouse import record as records
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.record import Record
from bakehouse.sbom import Package

INCOMING = ".incoming-"
"""Prefix of folders that are being filled; they are not images yet."""


class LocalStore:
    """Images in a folder. An image without a record is not there.

    Args:
        root: the folder; it is made when the first image comes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def identity(self) -> str:
        """What tells this store from all others: drawn by chance, and kept where its locks are."""
        path = self.root / ".locks" / "identity"
        with lock.held(path.with_suffix(".lock"), "the store's identity", wait=True, say=lambda _text: None):
            if not path.exists():
                write_atomically(path, f"{uuid.uuid4()}\n")
            return path.read_text().strip()

    def folder(self, tag: str) -> Path:
        """Return the folder of an image, there or not."""
        return self.root / tag

    def records(self) -> list[Record]:
        """Return the records of all images, the newest first. Those that cannot be read are left out."""
        return sorted(self._read_all()[0], key=lambda record: (record.created, record.tag), reverse=True)

    def damaged(self) -> list[BakehouseError]:
        """Return what is wrong with each record that cannot be read."""
        return self._read_all()[1]

    def _read_all(self) -> tuple[list[Record], list[BakehouseError]]:
        good: list[Record] = []
        bad: list[BakehouseError] = []
        for path in self.root.glob(f"[!.]*/{records.FILE_NAME}"):
            try:
                good.append(records.read(path))
            except BakehouseError as error:
                bad.append(error)
        return good, bad

    def get(self, tag: str) -> Record:
        """Return the record of an image.

        Args:
            tag: the tag, or the beginning of one that only one image has, or a manifest's name for its newest.

        Raises:
            BakehouseError: no image or more than one fits.
        """
        everything = self.records()
        exact = [record for record in everything if record.tag == tag]
        named = [record for record in everything if record.name == tag][:1]
        begins = [record for record in everything if tag and record.tag.startswith(tag)]
        fitting = exact or named or begins
        if not fitting:
            bake = f"`invoke bake --platform {'slurm' if tag[:1].isdigit() or not tag else tag}` bakes one"
            raise BakehouseError(
                f"there is no image '{tag}' in {self.root}",
                hint=f"`invoke images` lists them; {bake}" if everything else bake,
            )
        if len(fitting) > 1:
            raise BakehouseError(
                f"'{tag}' fits {len(fitting)} images: {', '.join(record.tag for record in fitting)}",
                hint="write more of the tag",
            )
        return fitting[0]

    def image(self, record: Record, kind: str | None = None) -> Path:
        """Return an image file.

        Args:
            record: the image's record.
            kind: qcow2 or raw; whichever there is by default.

        Raises:
            BakehouseError: the image has no such file, or it is gone or cut short.
        """
        files = [file for file in record.files if kind in (None, file.format)]
        if not files:
            made = ", ".join(file.format for file in record.files)
            raise BakehouseError(f"{record.tag} has no {kind} file, only {made}", hint=f"bake with --format {kind}")
        path = self.folder(record.tag) / files[0].file
        size = path.stat().st_size if path.is_file() else None
        if size != files[0].size:
            state = "is gone" if size is None else f"has {size} bytes in place of {files[0].size}"
            raise BakehouseError(f"{path} {state}", hint=f"`invoke images.remove {record.tag}` and bake again")
        return path

    def bill(self, record: Record) -> dict[str, Package]:
        """Return the packages of an image, see sbom.read().

        Raises:
            BakehouseError: its SBOM is gone or damaged.
        """
        return sbom.read(self.folder(record.tag) / record.sbom)

    def taken(self, tag: str) -> bool:
        """Say whether a tag has been used: by an image, though it may be gone, or by a bake that is going on."""
        return self.folder(tag).exists() or self._claim(tag).exists()

    def _claim(self, tag: str) -> Path:
        return self.root / ".locks" / "tags" / tag

    @contextmanager
    def claiming(self, choose: Callable[[], str]) -> Iterator[str]:
        """Claim a tag that nobody else has, once and for all; it is given back where no image of it comes to be.

        Args:
            choose: returns a tag that is not taken at that moment.
        """
        while True:
            tag = choose()
            claim = self._claim(tag)
            claim.parent.mkdir(parents=True, exist_ok=True)
            try:
                claim.touch(exist_ok=False)
                break
            except FileExistsError:
                continue
        try:
            yield tag
        finally:
            if not self.folder(tag).exists():
                claim.unlink(missing_ok=True)

    @contextmanager
    def adding(self, name: str, tag: str) -> Iterator[Path]:
        """Give a folder to fill; it becomes the image's when the block ends well, and is removed otherwise."""
        self.root.mkdir(parents=True, exist_ok=True)
        incoming = self.root / f"{INCOMING}{name}+{tag}"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        try:
            yield incoming
            if not (incoming / records.FILE_NAME).is_file():
                raise BakehouseError(f"no record was written for {tag}")
            sync(incoming)
            incoming.rename(self.folder(tag))
            sync_folder(self.root)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def amend(self, tag: str, changes: dict[str, object]) -> Record:
        """Write more into the record of an image: what is found out about it later.

        Args:
            tag: the image.
            changes: fields of the record and their new values.

        Raises:
            BakehouseError: the image is gone meanwhile.
        """
        path = self.folder(tag) / records.FILE_NAME
        amended = records.read(path).model_copy(update=changes)
        # All else stays as it was written: a newer Bakehouse may have written more, and signatures are about all of it.
        written = json.loads(path.read_text(encoding="utf-8")) | amended.model_dump(mode="json", include={*changes})
        write_atomically(path, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
        return amended

    def remove(self, record: Record) -> int:
        """Remove an image. Return the bytes that this frees."""
        folder = self.folder(record.tag)
        freed = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
        # The rename takes the image out of the store at once, whatever becomes of the deletion.
        leaving = self.root / f"{INCOMING}{record.name}+removed-{record.tag}"
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving)
        return freed

    def leftovers(self, name: str) -> list[Path]:
        """Return folders that a killed run left of a manifest's images. Call it under the manifest's lock."""
        return [*self.root.glob(f"{INCOMING}{name}+*")]


def sync(folder: Path) -> None:
    """Write a folder's files to disk."""
    for path in [*folder.iterdir()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Write a folder's own entries to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
