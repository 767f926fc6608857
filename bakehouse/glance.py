"""Images of a cloud as its Image API (v2) tells them: list, read, create, change, upload, download, delete."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

from bakehouse.cloud import CONNECT_SECONDS, Cloud, CloudError, explain
from bakehouse.errors import BakehouseError

PAGE = 1000
"""Images a page; more is not given (Glance's api_limit_max)."""

CHUNK = 1 << 20
"""Bytes a read and a write."""

STALL_SECONDS = 300
"""How long an upload may stand still, or the answer after it may take: Glance may still write to its own store."""

PATCH_TYPE = "application/openstack-images-v2.1-json-patch"

BASE_FIELDS = frozenset(
    "id name status visibility protected os_hidden owner size virtual_size disk_format container_format min_disk "
    "min_ram checksum os_hash_algo os_hash_value tags created_at updated_at self file schema locations direct_url "
    "stores member_status".split()
)
"""Fields of an image that are not properties (Image API v2, image schema)."""


@dataclass(frozen=True)
class CloudImage:
    """One image in a cloud."""

    id: str
    name: str
    status: str
    """``queued`` (no data yet), ``saving``, ``active``, ``deactivated``, ``killed``, ... (Image API v2)."""
    visibility: str
    hidden: bool
    protected: bool
    owner: str
    size: int
    """Bytes; 0 as long as there is no data."""
    disk_format: str
    min_disk: int
    """GiB."""
    min_ram: int
    """MiB."""
    hash_algorithm: str
    hash_value: str
    tags: tuple[str, ...]
    created: datetime.datetime
    updated: datetime.datetime
    properties: Mapping[str, str]
    """What is not a field of the Image API."""


def _image(data: Mapping[str, Any]) -> CloudImage:
    return CloudImage(
        id=data["id"],
        name=data.get("name") or "",
        status=data["status"],
        visibility=data["visibility"],
        hidden=bool(data.get("os_hidden")),
        protected=bool(data.get("protected")),
        owner=data.get("owner") or "",
        size=data.get("size") or 0,
        disk_format=data.get("disk_format") or "",
        min_disk=data.get("min_disk") or 0,
        min_ram=data.get("min_ram") or 0,
        hash_algorithm=data.get("os_hash_algo") or "",
        hash_value=data.get("os_hash_value") or "",
        tags=tuple(sorted(data.get("tags") or ())),
        created=datetime.datetime.fromisoformat(data["created_at"]),
        updated=datetime.datetime.fromisoformat(data["updated_at"]),
        properties={key: str(value) for key, value in data.items() if key not in BASE_FIELDS and value is not None},
    )


def _is(image: CloudImage, key: str, value: object) -> bool:
    """Say whether an image has a value of a field or property; None: whether it has no such property."""
    if key == "tags":
        return isinstance(value, list) and sorted(value) == [*image.tags]
    if key in BASE_FIELDS:
        return getattr(image, "hidden" if key == "os_hidden" else key, None) == value
    return image.properties.get(key) == value


class Chunks(Protocol):
    """The data of an upload: it knows its length, and begins anew each time that it is iterated."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes]: ...


class Glance:
    """The images of a cloud.

    Args:
        cloud: the connection.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def list(self, **filters: str) -> list[CloudImage]:
        """Return images, hidden ones too, the newest first.

        Args:
            filters: of the Image API: tag, owner, name, visibility, or a property.

        Raises:
            CloudError: they cannot be listed.
        """
        found: dict[str, CloudImage] = {}
        # Glance lists hidden images by themselves only.
        for hidden in ("false", "true"):
            query = "&".join(f"{key}={quote(value, safe='')}" for key, value in filters.items())
            path: str | None = f"/images?limit={PAGE}&os_hidden={hidden}&{query}"
            while path:
                page = self.cloud.request("GET", path, what="listing images").json()
                found |= {data["id"]: _image(data) for data in page["images"]}
                # Relative to the endpoint's host, with the version that our endpoint has too.
                path = page.get("next") and "/" + page["next"].partition("/v2/")[2]
        return sorted(found.values(), key=lambda image: (image.created, image.id), reverse=True)

    def get(self, identity: str) -> CloudImage | None:
        """Return an image, or None where there is none.

        Raises:
            CloudError: it cannot be read.
        """
        answer = self.cloud.request("GET", f"/images/{identity}", ok=(200, 404), what=f"reading image {identity}")
        return _image(answer.json()) if answer.status == HTTPStatus.OK else None

    def create(self, fields: Mapping[str, object]) -> CloudImage | None:
        """Create an image without data. Return None where its id has been used before.

        Args:
            fields: of the Image API, and properties.

        Raises:
            CloudError: the cloud does not allow it.
        """
        what = f"creating image {fields['name']}"
        answer = self.cloud.request("POST", "/images", json=dict(fields), ok=(201, 409), what=what)
        return _image(answer.json()) if answer.status == HTTPStatus.CREATED else None

    def change(self, image: CloudImage, changes: Mapping[str, object]) -> CloudImage:
        """Change fields, tags and properties in one step: all of them or none.

        Where the answer is lost, the request is sent again; then a property that was to be removed is gone already, and
        Glance says so. That is no error where the image is as it was to be.

        Args:
            image: the image as it was read.
            changes: new values; None removes a property.

        Raises:
            CloudError: the cloud does not allow it, or the image is gone (status 404).
        """
        patch = []
        for key, value in changes.items():
            path = "/" + key.replace("~", "~0").replace("/", "~1")
            if value is not None:
                patch.append({"op": "add" if key not in BASE_FIELDS else "replace", "path": path, "value": value})
            elif key in image.properties:
                patch.append({"op": "remove", "path": path})
        if not patch:
            return image
        headers = {"Content-Type": PATCH_TYPE}
        what = f"changing image {image.name}"
        answer = self.cloud.request(
            "PATCH", f"/images/{image.id}", data=json.dumps(patch), headers=headers, ok=(200, 409), what=what
        )
        if answer.status == HTTPStatus.OK:
            return _image(answer.json())
        found = self.get(image.id)
        if found is None or not all(_is(found, key, value) for key, value in changes.items()):
            raise self.cloud.refusal(answer.status, answer.text, what)
        return found

    def upload(self, identity: str, data: Chunks) -> None:
        """Send an image's data. It is sent once; who calls looks what came of it.

        Raises:
            CloudError: it was refused (status 409: somebody else sends just now), or the connection broke (status 0).
        """
        self.cloud.request(
            "PUT",
            f"/images/{identity}/file",
            data=data,
            headers={"Content-Type": "application/octet-stream"},
            timeout=(STALL_SECONDS, STALL_SECONDS),
            what="uploading",
            retry=False,
        )

    def download(self, image: CloudImage) -> Iterator[bytes]:
        """Return an image's data, piece by piece.

        Raises:
            CloudError: it cannot be read, or the connection breaks.
        """
        doing = f"downloading {image.name}"
        try:
            answer = self.cloud.connection.image.request(
                f"/images/{image.id}/file",
                "GET",
                raise_exc=False,
                stream=True,
                timeout=(CONNECT_SECONDS, STALL_SECONDS),
            )
            with answer:
                if answer.status_code != HTTPStatus.OK:
                    raise self.cloud.refusal(answer.status_code, answer.text, doing)
                yield from answer.iter_content(CHUNK)
        except BakehouseError:
            raise
        except OSError as error:
            # What requests raises once data has begun to come.
            raise CloudError(f"{self.cloud.place}: {doing}: the connection broke: {error}", hint="try again") from error
        except Exception as error:
            explained = explain(error, self.cloud.name, doing)
            if explained is None:
                raise
            raise explained from error

    def delete(self, image: CloudImage) -> bool:
        """Delete an image. Return whether it was there.

        Raises:
            CloudError: it is protected (status 403) or in use (status 409).
        """
        what = f"deleting image {image.name}"
        return (
            self.cloud.request("DELETE", f"/images/{image.id}", ok=(204, 404), what=what).status
            == HTTPStatus.NO_CONTENT
        )
