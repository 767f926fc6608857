"""What Invoke prints of comparisons that are kept."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from bakehouse import comparison
from tests.support.comparisons import MACHINE, STARTED, sample
from tests.unit.test_cli import Tasks

LATER = STARTED + datetime.timedelta(days=1)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tasks:
    return Tasks(tmp_path, monkeypatch, capsys)


def test_without_results_list_says_where_they_would_be_and_show_fails(invoke: Tasks) -> None:
    done = invoke.run("compare.list")
    assert (done.status, "No results in" in done.out) == (0, True)
    assert json.loads(invoke.run("compare.list", "--json").out) == []
    done = invoke.run("compare.show")
    assert (done.status, "there is no result of a comparison" in done.err) == (1, True)


def test_results_are_listed_and_bad_ones_named(invoke: Tasks) -> None:
    comparison.keep(sample())
    comparison.keep(sample(platform="roce"))
    (comparison.folder() / "bad.json").write_text("{}")
    done = invoke.run("compare.list")
    assert "slurm-20260102T030405Z" in done.out
    assert "bad.json is not a result of a comparison: platform: Field required" in done.err
    found = json.loads(invoke.run("compare.list", "--platform", "roce", "--json").out)
    assert [(one["name"], one["runs"]) for one in found] == [("roce-20260102T030405Z", 15)]


def test_the_last_result_is_shown_as_tables_as_json_and_as_a_page(invoke: Tasks, tmp_path: Path) -> None:
    comparison.keep(sample(platform="roce"))
    comparison.keep(sample(started=LATER))
    page = tmp_path / "new" / "report.html"
    done = invoke.run("compare.show", "--html", str(page))
    assert done.status == 0
    assert "slurm-20260103T030405Z" in done.out
    assert "Bake loses in making everything anew" in done.out
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert str(page) in done.err
    found = json.loads(invoke.run("compare.show", "--result", "roce", "--json").out)
    assert found["name"] == "roce-20260102T030405Z"
    assert comparison.Comparison.model_validate(found["result"]) == sample(platform="roce")
    assert found["answers"]["break_evens"][0] == {
        "path": "bake", "other": "hybrid", "occasion": "everything made anew", "verdict": "from", "boots": 6
    }  # fmt: skip
    assert found["answers"]["summaries"][0]["measures"]["seconds to joined"]["median"] == 53.9


def test_a_page_that_cannot_be_written_is_an_error(invoke: Tasks, tmp_path: Path) -> None:
    comparison.keep(sample())
    (tmp_path / "file").write_text("")
    done = invoke.run("compare.show", "--html", str(tmp_path / "file" / "report.html"))
    assert (done.status, "report.html cannot be written: " in done.err) == (1, True)


def test_the_page_is_opened(invoke: Tasks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    comparison.keep(sample())
    opened: list[str] = []

    def note(address: str) -> bool:
        opened.append(address)
        return True

    monkeypatch.setattr("webbrowser.open", note)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert invoke.run("compare.show", "--open", "--html", str(tmp_path / "report.html")).status == 0
    assert invoke.run("compare.show", "--open").status == 0
    assert opened[0] == (tmp_path / "report.html").as_uri()
    assert opened[1].endswith("/slurm-20260102T030405Z.html")
    monkeypatch.setattr("webbrowser.open", lambda _address: False)
    done = invoke.run("compare.show", "--open")
    assert (done.status, "no browser could be started" in done.err) == (1, True)


def test_a_regression_fails_and_is_named(invoke: Tasks) -> None:
    comparison.keep(sample())
    comparison.keep(sample(1.2, started=LATER))
    done = invoke.run("compare.regression")
    assert done.status == 1
    assert "slurm-20260102T030405Z -> slurm-20260103T030405Z" in done.out
    assert "bake: seconds to joined (plain)" in done.err
    done = invoke.run("compare.regression", "--json", "--result", "slurm")
    found = json.loads(done.out)
    assert (done.status, found["same_machine"]) == (1, True)
    first = found["changes"][0]
    assert (first["what"], first["worse"], round(first["percent"])) == ("seconds to joined (plain)", True, 20)
    assert invoke.run("compare.regression", "--percent", "25").status == 0


def test_no_regression_is_exit_status_0_and_another_machine_is_told(invoke: Tasks) -> None:
    comparison.keep(sample())
    other = MACHINE.model_copy(update={"cores": 64})
    comparison.keep(sample(0.5, started=LATER, machine=other))
    done = invoke.run("compare.regression", "--against", "slurm-20260102")
    assert (done.status, "different machines" in done.out) == (0, True)


def test_what_cannot_be_compared_is_an_error(invoke: Tasks) -> None:
    comparison.keep(sample())
    done = invoke.run("compare.regression")
    assert (done.status, "there is no older result of slurm" in done.err) == (1, True)
    comparison.keep(sample(platform="roce"))
    done = invoke.run("compare.regression", "--result", "slurm", "--against", "roce")
    assert (done.status, "is of roce" in done.err) == (1, True)
    done = invoke.run("compare.regression", "--percent", "-1")
    assert (done.status, "--percent -1: it is 0 or more" in done.err) == (1, True)
