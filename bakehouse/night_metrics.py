"""Metrics of nights for Prometheus, as a file for node_exporter's textfile collector."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from bakehouse.errors import BakehouseError
from bakehouse.night import Night

PREFIX = "bakehouse_"


IMAGES = "{images}"


def write(path: Path, night: Night, before: Sequence[Night]) -> None:
    """Write the metrics of a night, in place of those of the night before.

    Args:
        path: a ``.prom`` file. ``{images}`` in its name stands for the night's images: where a job for each image runs
            on one machine, each has a file of its own.
        night: the night, ended.
        before: the nights before, the newest first: they tell when an image was last good.

    Raises:
        BakehouseError: it cannot be written.
    """
    path = path.with_name(path.name.replace(IMAGES, "+".join(night.names)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), collect(night, before))
    except OSError as error:
        raise BakehouseError(
            f"the metrics {path} cannot be written: {error.strerror}", hint="nightly.metrics in bakehouse.yaml"
        ) from error


def collect(night: Night, before: Sequence[Night]) -> CollectorRegistry:
    """Return the metrics of a night."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=registry)

    of = ",".join(night.names)
    ended = gauge("night_last_end_timestamp_seconds", "When the last night ended.", "images")
    ended.labels(of).set(_unix(night.ended))
    gauge("night_duration_seconds", "Seconds that the last night took.", "images").labels(of).set(night.seconds)
    needs = gauge("night_needs_person", "Things of the last night that need a person.", "images")
    needs.labels(of).set(len(night.all_needs))
    success = gauge("image_last_success_timestamp_seconds", "End of the last night in which it did not fail.", "image")
    failed = gauge("image_failed", "1 where it failed in the last night.", "image")
    verified = gauge("image_verified", "1 where its newest passed its verification, 0 where it did not.", "image")
    built = gauge("image_built", "1 where it was built in the last night.", "image")
    seconds = gauge("image_stage_duration_seconds", "Seconds that a stage took in the last night.", "image", "stage")
    size = gauge("image_size_bytes", "Size of the newest image file.", "image")
    joined = gauge("image_joined_seconds", "Seconds from power-on to joined, as verified.", "image", "accelerator")
    changed = gauge("image_packages_changed", "Packages that changed with the last build.", "image")
    age = gauge(
        "channel_image_created_timestamp_seconds", "When the image that a channel points to was baked.",
        "image", "channel",
    )  # fmt: skip
    for image in night.images:
        good = next(
            (
                one
                for one in [night, *before]
                for other in one.images
                if other.name == image.name and _good(other.state)
            ),
            None,
        )
        if good:
            success.labels(image.name).set(_unix(good.ended))
        failed.labels(image.name).set(image.state == "failed")
        built.labels(image.name).set(image.state == "built")
        if image.verified != "none":
            verified.labels(image.name).set(image.verified == "passed")
        changed.labels(image.name).set(len(image.changes))
        for stage in image.stages:
            seconds.labels(image.name, stage.name).set(stage.seconds)
        if image.size:
            size.labels(image.name).set(image.size)
        if image.joined is not None:
            joined.labels(image.name, image.accelerator).set(image.joined)
        for channel, old in image.ages.items():
            age.labels(image.name, channel).set(_unix(night.ended) - old)
    return registry


def _good(state: str) -> bool:
    return state in {"built", "unchanged"}


def _unix(moment: datetime.datetime | None) -> float:
    return moment.timestamp() if moment else 0.0
