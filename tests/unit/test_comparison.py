"""What a comparison answers, and how its results are kept."""

from __future__ import annotations

import datetime
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bakehouse import comparison
from bakehouse.comparison import (
    PLAIN,
    Candidate,
    Comparison,
    Measure,
    PathName,
    Run,
    Scenario,
    Spread,
    Step,
    break_even,
    is_worse,
    pairing,
    phases,
    spread,
    summary,
)
from bakehouse.errors import BakehouseError
from bakehouse.timeline import JOINED, Moment, Timeline
from tests.support.comparisons import CANDIDATES, FOUR, SLOW, STARTED, failed, run, sample, timeline

SECONDS = st.floats(min_value=0, max_value=1e6)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "bakehouse" / "comparisons"


def of_runs(*runs: Run) -> Comparison:
    return sample(runs=runs, candidates=tuple(one for one in CANDIDATES if one.path in {run.path for run in runs}))


def texts(one: Comparison, *, against_bake: bool) -> str:
    return "\n".join(found.text for found in comparison.findings(one) if found.against_bake == against_bake)


# What a result may hold ----------------------------------------------------------------------------------------------


def test_a_result_is_the_same_after_it_was_written_and_read() -> None:
    assert Comparison.model_validate_json(sample().model_dump_json()) == sample()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda: Run(path="bake", number=1), "not all nodes joined"),
        (lambda: run("bake", 1, 5.0, nodes=()), "not all nodes joined"),
        (lambda: run("bake", 1, 5.0, nodes=run("bake", 1, 5.0, FOUR).nodes), "not all nodes joined"),
        (lambda: run("bake", 0, 5.0), "greater than or equal to 1"),
        (lambda: of_runs(run("bake", 1, 5.0), run("bake", 1, 6.0)), "a run is there twice"),
        (lambda: sample(candidates=CANDIDATES[:2]), "a path that is not there"),
        (lambda: sample(candidates=CANDIDATES + CANDIDATES[:1]), "a path is there twice"),
        (lambda: sample(started=datetime.datetime(2026, 1, 1)), "timezone"),
        (lambda: Step(name="bake", seconds=-1), "greater than or equal to 0"),
        (lambda: Step(name="bake", seconds=math.inf), "finite"),
    ],
)
def test_a_result_that_cannot_be_is_refused(broken: object, why: str) -> None:
    assert callable(broken)
    with pytest.raises(ValidationError, match=why):
        broken()


def test_a_run_of_several_nodes_has_joined_when_the_last_one_has() -> None:
    assert run("bake", 1, 118.0, FOUR).joined == 118.0
    assert failed("bake", 1, "no", FOUR).joined is None


def test_scenarios_are_called_by_what_is_special() -> None:
    names = [one.name for one in (PLAIN, SLOW, FOUR, Scenario(nodes=2, mirror_rate=1_500_000))]
    assert names == ["plain", "mirror at 10 Mbit/s", "4 nodes together", "2 nodes together, mirror at 1.5 Mbit/s"]


# Arithmetic ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.none() | SECONDS))
def test_a_median_lies_between_the_least_and_the_most(values: list[float | None]) -> None:
    known = [one for one in values if one is not None]
    found = spread(values)
    if not known:
        assert found is None
        return
    assert found is not None
    assert (found.least, found.most, found.count) == (min(known), max(known), len(known))
    assert found.least <= found.median <= found.most
    assert 2 * sum(one <= found.median for one in known) >= len(known)
    assert 2 * sum(one >= found.median for one in known) >= len(known)


@given(making=SECONDS, boot=SECONDS, other_making=SECONDS, other_boot=SECONDS, boots=st.integers(1, 10**6))
def test_break_even_is_where_the_totals_meet(
    making: float, boot: float, other_making: float, other_boot: float, boots: int
) -> None:
    verdict, edge = break_even(making, boot, other_making, other_boot)

    def pays_off(count: int) -> bool:
        ours, theirs = (Fraction(one) + count * Fraction(each)
                        for one, each in ((making, boot), (other_making, other_boot)))  # fmt: skip
        return ours <= theirs

    def expected(count: int) -> bool:
        if edge is None:
            return verdict == "always"
        return count >= edge if verdict == "from" else count <= edge

    assert (edge is None) == (verdict in {"always", "never"})
    for count in {1, boots, *([edge - 1, edge, edge + 1] if edge else [])} - {0}:
        assert pays_off(count) == expected(count)
    if verdict == "from":
        assert edge is not None
        assert edge > 1, "else it is always"


@given(making=SECONDS, boot=SECONDS)
def test_a_path_pays_off_against_one_that_costs_the_same(making: float, boot: float) -> None:
    assert break_even(making, boot, making, boot) == ("always", None)


@pytest.mark.parametrize(
    ("numbers", "answer"),
    [
        ((100, 10, 0, 20), ("from", 10)),
        ((101, 10, 0, 20), ("from", 11)),
        ((10, 10, 0, 20), ("always", None)),
        ((100, 20, 0, 20), ("never", None)),
        ((100, 30, 0, 20), ("never", None)),
        ((0, 30, 100, 20), ("until", 10)),
        ((0, 30, 5, 20), ("never", None)),
    ],
)
def test_break_even_by_hand(numbers: tuple[float, float, float, float], answer: tuple[str, int | None]) -> None:
    assert break_even(*numbers) == answer


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4)), min_size=1, max_size=8))
def test_pairs_are_those_of_one_round(pairs: list[tuple[float, float]]) -> None:
    runs = [run("bake", number, ours) for number, (ours, _) in enumerate(pairs, 1)]
    runs += [run("bootstrap", number, theirs) for number, (_, theirs) in enumerate(pairs, 1)]
    one = of_runs(*reversed(runs), failed("bake", 99, "no"), run("bootstrap", 99, 1.0), run("bootstrap", 100, 1.0))
    found = pairing(one, "bake", "bootstrap", PLAIN)
    assert found is not None
    assert found.saved == spread(theirs - ours for ours, theirs in pairs)
    assert found.ratio == spread(ours / theirs for ours, theirs in pairs)
    assert found.wins == sum(ours < theirs for ours, theirs in pairs)


def test_without_a_round_in_which_both_joined_there_is_no_pair() -> None:
    assert pairing(of_runs(run("bake", 1, 5.0), run("hybrid", 2, 5.0)), "bake", "hybrid", PLAIN) is None


MOMENTS = ["kernel", "userspace", *comparison.SET_UP_BEGINS, *comparison.SET_UP_ENDS, JOINED]


@given(st.dictionaries(st.sampled_from(MOMENTS), SECONDS))
def test_phases_follow_one_another_without_gaps(moments: dict[str, float]) -> None:
    found = phases(Timeline(moments=tuple(Moment(name=name, seconds=at, source="host") for name, at in moments.items()),
                            power_on=0.0))  # fmt: skip
    ends = [0.0, *(span.end for span in found)]
    assert [span.start for span in found] == ends[:-1]
    assert all(span.end > span.start for span in found)
    if JOINED in moments:
        assert ends[-1] >= moments[JOINED], "nothing is lost"


def test_phases_of_a_baked_node_and_of_one_that_is_set_up_at_boot() -> None:
    assert [span.name for span in phases(timeline(50.0))] == [
        "firmware and loader", "kernel and initramfs", "system start", "join", "first job"
    ]  # fmt: skip
    assert ("set-up", 60.0) in [(span.name, span.end - span.start) for span in phases(timeline(100.0, 60.0))]


@given(st.lists(SECONDS, min_size=1), st.lists(SECONDS, min_size=1), st.floats(0, 100))
def test_worse_is_above_all_older_values_and_by_more_than_the_percentage(
    before: list[float], after: list[float], percent: float
) -> None:
    old, new = spread(before), spread(after)
    assert old is not None
    assert new is not None
    assert is_worse(old, new, percent) == (
        all(new.median > one for one in before) and new.median > old.median * (1 + percent / 100)
    )
    assert not is_worse(old, old, percent)


# Answers -------------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_the_runs() -> None:
    found = comparison.answers(sample())
    joined = {(one.path, one.scenario): one.joined for one in found.summaries}
    assert joined["bake", "plain"] == Spread(53.9, 52.8, 54.6, 3)
    assert joined["bootstrap", SLOW.name] is None
    assert [(one.path, one.other, one.wins) for one in found.pairings][:2] == [
        ("bake", "hybrid", 3),
        ("bake", "bootstrap", 3),
    ]
    evens = {(one.path, one.other, one.occasion): one.text for one in found.break_evens}
    assert evens["bake", "bootstrap", comparison.EVERYTHING] == "from 4 boots per rebuild"
    assert evens["hybrid", "bootstrap", comparison.ONE_PACKAGE] == "from the first boot"


def test_what_all_nodes_took_is_added_up_and_what_one_does_not_tell_is_not_known() -> None:
    nodes = run("bake", 1, 10.0, FOUR).nodes
    one = of_runs(run("bake", 1, 10.0, FOUR), run("bake", 1, 9.0, nodes=(nodes[0].model_copy(update={"disk": None}),)))
    found = summary(one, "bake", FOUR).measures[Measure.MEMORY]
    assert found is not None
    assert found.median == 4 * 150 * (1 << 20)
    assert summary(one, "bake", PLAIN).measures[Measure.DISK] is None


def test_it_says_where_bake_loses_and_where_it_wins() -> None:
    lost, won = (texts(sample(), against_bake=against) for against in (True, False))
    assert "Bake loses in making everything anew: 244.3 s, against 55.0 s with hybrid and 2.0 s with bootstrap." in lost
    assert "Bake loses in what a change of one package costs" in lost
    assert "Bake wins in seconds to joined (mirror at 10 Mbit/s): 55.0 s, against 210.0 s with hybrid." in won
    assert "Bake pays off against bootstrap from 4 boots per rebuild (everything made anew)." in won
    assert f"Seconds to joined ({SLOW.name}) against the plain runs: bake 1.02 times, hybrid 2.33 times." in won
    assert f"Bootstrap failed in 1 of 1 runs ({SLOW.name})." in won


def test_it_says_that_bake_never_pays_off_and_that_it_failed() -> None:
    one = of_runs(run("bake", 1, 200.0), failed("bake", 2, "no"), run("bootstrap", 1, 100.0))
    lost = texts(one, against_bake=True)
    assert "Bake loses in seconds to joined (plain): 200.0 s, against 100.0 s with bootstrap." in lost
    assert "Bake loses against bootstrap: it never pays off (everything made anew)." in lost
    assert "Bake loses: it failed in 1 of 2 runs (plain)." in lost


def test_it_says_that_bake_loses_nowhere_only_where_there_is_another_path() -> None:
    free = tuple(Candidate(path=path, making=(), change=()) for path in ("bake", "hybrid"))
    both = sample(candidates=free, runs=(run("bake", 1, 5.0), run("hybrid", 1, 9.0)))
    assert "Bake loses nowhere in what was measured." in texts(both, against_bake=False)
    assert comparison.findings(of_runs(run("bake", 1, 5.0))) == []


def test_what_reads_the_same_is_a_draw() -> None:
    one = of_runs(run("bake", 1, 50.04), run("hybrid", 1, 50.0))
    assert "seconds to joined (plain)" not in texts(one, against_bake=True) + texts(one, against_bake=False)


@pytest.mark.parametrize("path", ["bake", "hybrid", "bootstrap"])
def test_one_path_alone_or_only_failures_are_no_error(path: PathName) -> None:
    assert comparison.answers(of_runs(run(path, 1, 5.0))).pairings == []
    found = comparison.answers(of_runs(failed(path, 1, "no")))
    assert [one.failed for one in found.summaries] == [1]


# Regressions ---------------------------------------------------------------------------------------------------------


def worse(old: Comparison, new: Comparison, percent: float = 10.0) -> list[str]:
    return [f"{one.path}: {one.what}" for one in comparison.changes(old, new, percent) if one.worse]


def test_the_same_again_is_no_regression() -> None:
    assert worse(sample(), sample()) == []


def test_slower_boots_are_a_regression_and_quicker_ones_are_not() -> None:
    assert "bake: seconds to joined (plain)" in worse(sample(), sample(1.2))
    assert worse(sample(), sample(1.05)) == []
    assert "bake: seconds to joined (plain)" in worse(sample(), sample(1.05), percent=2)
    assert worse(sample(), sample(0.5)) == []


def test_more_failures_are_a_regression() -> None:
    good = of_runs(run("bake", 1, 5.0), run("bake", 2, 5.0))
    bad = of_runs(run("bake", 1, 5.0), failed("bake", 2, "no"))
    assert worse(good, bad) == ["bake: runs that failed (plain)"]
    assert worse(bad, good) == []


def test_dearer_making_is_a_regression() -> None:
    dear = Candidate(path="bake", making=(Step(name="bake", seconds=500),), change=CANDIDATES[0].change)
    assert worse(sample(), sample(candidates=(dear, *CANDIDATES[1:]))) == ["bake: everything made anew"]


def test_what_only_one_of_them_has_is_told_and_no_regression() -> None:
    one, both = of_runs(run("bake", 1, 5.0)), of_runs(run("bake", 1, 5.0), run("hybrid", 1, 5.0))
    for old, new in ((one, both), (both, one)):
        found = comparison.changes(old, new)
        assert any(change.path == "hybrid" and None in {change.old, change.new} for change in found)
        assert not any(change.worse for change in found)


# Results that are kept -----------------------------------------------------------------------------------------------


def test_results_are_kept_the_newest_first(kept_in: Path) -> None:
    assert comparison.kept() == ([], [])
    later = sample(started=STARTED + DAY)
    paths = [comparison.keep(one) for one in (sample(), later, sample(), sample(platform="roce"))]
    assert [path.name for path in paths] == [
        "slurm-20260102T030405Z.json", "slurm-20260103T030405Z.json", "slurm-20260102T030405Z.2.json",
        "roce-20260102T030405Z.json",
    ]  # fmt: skip
    assert {path.parent for path in paths} == {kept_in}
    found, bad = comparison.kept("slurm")
    assert bad == []
    assert found[0].comparison == later
    assert len(found) == 3


def test_a_result_is_found_by_name_beginning_platform_and_file(kept_in: Path) -> None:
    old, new = comparison.keep(sample()), comparison.keep(sample(started=STARTED + DAY))
    comparison.keep(sample(platform="roce", started=STARTED - DAY))
    assert comparison.get().path == new
    assert comparison.get("roce").name == "roce-20260101T030405Z"
    assert comparison.get("slurm-20260102").path == old
    assert comparison.get(old.stem).path == old
    assert comparison.get(str(old)).path == old
    assert comparison.before(comparison.get()).path == old
    with pytest.raises(BakehouseError, match="beginning of 2 results"):
        comparison.get("slurm-2026")
    with pytest.raises(BakehouseError, match="no result nonsense"):
        comparison.get("nonsense")
    with pytest.raises(BakehouseError, match="no older result of slurm"):
        comparison.before(comparison.get(old.stem))


def test_without_results_it_says_so(kept_in: Path) -> None:
    with pytest.raises(BakehouseError, match="there is no result"):
        comparison.get()


BAD = {
    "": "is not a result of a comparison",
    "[]": "is not a result of a comparison: the whole",
    "{": "is not a result of a comparison",
    "[" * 100_000: "is not a result of a comparison",
    '{"format": 99}': "has format 99, written by a newer Bakehouse",
    '{"format": 0}': "is not a result of a comparison",
    "\udcff": "is not a result of a comparison",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_a_clear_error_and_does_not_hide_the_others(kept_in: Path, text: str) -> None:
    good = comparison.keep(sample())
    (kept_in / "slurm-bad.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BakehouseError, match=BAD[text]):
        comparison.get("slurm-bad")
    found, bad = comparison.kept()
    assert ([one.path for one in found], len(bad)) == ([good], 1)
    assert comparison.get().path == good


def test_a_field_that_is_wrong_is_named(kept_in: Path) -> None:
    path = comparison.keep(sample())
    written = json.loads(path.read_text())
    written["runs"][2]["number"] = 0
    path.write_text(json.dumps(written))
    with pytest.raises(BakehouseError, match=r"runs\.2\.number: Input should be greater"):
        comparison.get(path.stem)
    with pytest.raises(BakehouseError, match="cannot be read: No such file"):
        comparison.get("/nowhere/x.json")


def test_what_a_newer_bakehouse_adds_is_passed_over(kept_in: Path) -> None:
    path = comparison.keep(sample())
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    assert comparison.get().comparison == sample()
