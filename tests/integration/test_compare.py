"""The paths, measured side by side for real: machines, a controller, a package mirror."""

from __future__ import annotations

import pytest
from rich.console import Console

from bakehouse import compare, comparison
from bakehouse.comparison import PLAIN, Measure
from bakehouse.settings import Settings

pytestmark = pytest.mark.long


def test_a_bake_joins_sooner_than_the_others_and_costs_more_to_change(real_settings: Settings) -> None:
    found = compare.compare("slurm", real_settings, Console(width=160), runs=1)
    assert [run.failure for run in found.runs] == ["", "", ""]
    bake, hybrid, bootstrap = (comparison.summary(found, path, PLAIN).measures for path in found.paths)
    for measure in (Measure.JOINED, Measure.RECEIVED, Measure.DISK):
        ours = bake[measure]
        assert ours is not None
        for theirs in (hybrid[measure], bootstrap[measure]):
            assert theirs is not None
            assert ours.median < theirs.median, measure
    costs = [found.candidate(path).change_seconds for path in ("bake", "hybrid", "bootstrap")]
    assert costs == sorted(costs, key=lambda seconds: seconds or 0.0, reverse=True)
    (node,) = next(run for run in found.runs if run.path == "bootstrap").nodes
    assert node.memory
    assert {"bootstrap started", "bootstrap ansible", "agent joined"} <= {one.name for one in node.timeline.moments}
    assert not [*real_settings.cache.glob("compare-*")], "nothing is left"
