"""Comparisons for tests: made-up numbers, of the shape that real ones have."""

from __future__ import annotations

import datetime
from typing import Any

from bakehouse.comparison import (
    PLAIN,
    SET_UP_BEGINS,
    Candidate,
    Comparison,
    Image,
    Machine,
    Node,
    PathName,
    Run,
    Scenario,
    Step,
)
from bakehouse.timeline import FIRST_JOB, JOINED, POWER_ON, Moment, Timeline

MIB = 1 << 20
STARTED = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
SLOW = Scenario(mirror_rate=10_000_000)
FOUR = Scenario(nodes=4)

MACHINE = Machine(
    cpu="Example Processor 9000", cores=2, memory=24 << 30, kernel="6.12.1", accelerator="tcg", qemu="10.0.2"
)


def timeline(joined: float, set_up: float = 0.0) -> Timeline:
    """Return a boot that takes so many seconds to joined, some of which a set-up at boot takes."""
    boot = joined - set_up
    moments = [
        (POWER_ON, 0.0), ("kernel", boot * 0.1), ("userspace", boot * 0.25), ("agent started", boot * 0.8 + set_up),
        (JOINED, joined), (FIRST_JOB, joined + 6.0),
    ]  # fmt: skip
    if set_up:
        moments += [(SET_UP_BEGINS[0], boot * 0.8)]
    found = (Moment(name=name, seconds=at, source="host") for name, at in moments)
    return Timeline(moments=tuple(sorted(found, key=lambda moment: moment.seconds)), power_on=0.0, accelerator="tcg")


def run(path: PathName, number: int, joined: float, scenario: Scenario = PLAIN, **changes: Any) -> Run:
    """Return a run whose nodes join a second after one another."""
    set_up = {"bake": 0.0, "hybrid": 0.3, "bootstrap": 0.6}[path] * joined
    received = {"bake": 1, "hybrid": 180, "bootstrap": 95}[path]
    nodes = tuple(
        Node(
            name=f"node-{index}", timeline=timeline(joined - index, set_up), received=received * MIB, disk=700 * MIB,
            memory=150 * MIB,
        )
        for index in range(scenario.nodes)
    )  # fmt: skip
    return Run(**({"path": path, "number": number, "scenario": scenario, "nodes": nodes} | changes))


def failed(path: PathName, number: int, why: str, scenario: Scenario = PLAIN) -> Run:
    """Return a run that failed."""
    return Run(path=path, number=number, scenario=scenario, failure=why)


CANDIDATES = (
    Candidate(
        path="bake",
        images=(Image(name="slurm", tag="20260102-0123456", digest="0123456" + "8" * 57),),
        making=(Step(name="bake", seconds=244.3),),
        change=(Step(name="bake with the base root from the cache", seconds=97.0),),
    ),
    Candidate(
        path="hybrid",
        images=(Image(name="debian-cloud", tag="20260101-abcdef0"), Image(name="slurmd", tag="1")),
        making=(Step(name="bake of the base image", seconds=30.0), Step(name="container build", seconds=25.0)),
        change=(Step(name="container build", seconds=25.0),),
    ),
    Candidate(
        path="bootstrap",
        images=(Image(name="debian-cloud", tag="20260101-abcdef0"),),
        making=(Step(name="bundle", seconds=2.0),),
        change=(),
    ),
)


def sample(factor: float = 1.0, **changes: Any) -> Comparison:
    """Return a comparison of three paths with everything in it; boots take so many times as long."""
    plain: dict[PathName, tuple[float, ...]] = {
        "bake": (53.9, 54.6, 52.8), "hybrid": (88.0, 91.5, 90.1), "bootstrap": (131.0, 127.4, 140.2)
    }  # fmt: skip
    runs = [run(path, at, one * factor) for path, each in plain.items() for at, one in enumerate(each, 1)]
    runs += [run("bake", 1, 55.0 * factor, SLOW), run("hybrid", 1, 210.0 * factor, SLOW)]
    runs += [failed("bootstrap", 1, "set-up did not end within 600 s: apt-get <update> & more", SLOW)]
    runs += [run("bake", 1, 118.0 * factor, FOUR), run("hybrid", 1, 196.0 * factor, FOUR)]
    runs += [run("bootstrap", 1, 402.0 * factor, FOUR)]
    return Comparison(
        **(
            {
                "platform": "slurm", "started": STARTED, "commit": "c0ffee0", "machine": MACHINE,
                "method": ("The paths took turns in each round, on one private network with a controller.",
                           "These numbers are made up."),
                "changed_package": "munge", "candidates": CANDIDATES, "runs": tuple(runs),
            }
            | changes
        )
    )  # fmt: skip
