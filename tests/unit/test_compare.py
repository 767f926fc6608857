"""Measuring the paths: what is asked for, and what a change of one package is. The real thing is in the long tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import cli_compare, compare, comparison, plan, sudo
from bakehouse import settings as site_settings
from bakehouse.comparison import PLAIN, Comparison, Scenario
from bakehouse.errors import BakehouseError
from bakehouse.settings import Settings
from tests.support import comparisons


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", cache=tmp_path / "cache")


def test_a_platform_that_cannot_be_compared_is_refused_before_anything_is_made(settings: Settings) -> None:
    with pytest.raises(BakehouseError, match="the paths of kubernetes cannot be compared yet"):
        compare.compare("kubernetes", settings, Console(quiet=True))
    assert not settings.cache.exists()


def test_a_change_is_one_more_package(settings: Settings, tmp_path: Path) -> None:
    wanted = plan.make("slurm", settings)
    changed = compare._changed(wanted, settings, tmp_path)
    assert {*changed.manifest.packages} - {*wanted.manifest.packages} == {compare.CHANGED_PACKAGE}
    assert changed.digest != wanted.digest
    assert changed.base_key == wanted.base_key, "its base root is in the cache"


def test_a_result_says_what_it_was_measured_on() -> None:
    found = compare._host([comparisons.run("bake", 1, 50.0)])
    assert found.accelerator == "tcg"
    assert found.cores >= 1
    assert found.cpu


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"runs": -1}, "--runs -1"),
        ({"together": -1}, "--together -1"),
        ({"together": 1}, "--together 1"),
        ({"mirror_rate": "10"}, "--mirror-rate 10 is no rate"),
        ({"mirror_rate": "0mbit"}, "--mirror-rate 0mbit is no rate"),
    ],
)
def test_flags_that_say_nothing_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BakehouseError, match=message):
        run(**flags)


def run(**flags: Any) -> None:
    cli_compare.run("slurm", **{"runs": 3, "together": 0, "mirror_rate": "", "html": "", "as_json": False, **flags})


def test_a_comparison_is_kept_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int, tuple[Scenario, ...]]] = []

    def measured(
        name: str, _settings: Settings, _console: Console, *, runs: int, more: tuple[Scenario, ...], keep: Any
    ) -> Comparison:
        asked.append((name, runs, more))
        keep(comparisons.sample())
        return comparisons.sample()

    monkeypatch.setattr(comparison, "folder", lambda: tmp_path / "comparisons")
    monkeypatch.setattr(compare, "compare", measured)
    monkeypatch.setattr(site_settings, "load", lambda: settings)
    monkeypatch.setattr(sudo, "must_be_root", lambda _settings: None)
    run(runs=2, together=4, mirror_rate="10Mbit", html=str(tmp_path / "report.html"))
    assert asked == [("slurm", 2, (Scenario(nodes=4), Scenario(mirror_rate=10_000_000)))]
    assert len([*(tmp_path / "comparisons").iterdir()]) == 1
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "Bake" in capsys.readouterr().out
    assert PLAIN not in asked[0][2]
