"""Pipelines: what is rendered is what each system takes, and the examples in ci/ are up to date."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bakehouse import REPOSITORY, pipelines
from bakehouse.errors import BakehouseError
from bakehouse.pipelines import EXAMPLE, Pipeline

PIPELINE = Pipeline(images=("slurm", "slurm-debian-12"), hour=3, minute=5, cloud="site", runner="builders")


def rendered(tmp_path: Path, system: str, pipeline: Pipeline = PIPELINE) -> list[Path]:
    return pipelines.write(pipelines.render(pipeline, system), tmp_path)


def check(*words: str | Path) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("system", pipelines.COPIES)
def test_the_examples_are_up_to_date(system: str) -> None:
    for name, text in pipelines.render(EXAMPLE, system).items():
        assert (REPOSITORY / "ci" / name).read_text() == text, f"`invoke ci.render` makes another ci/{name}"


def test_gitlab_takes_both_pipelines(tmp_path: Path) -> None:
    paths = [*rendered(tmp_path, "gitlab"), *rendered(tmp_path, "gitlab-images")]
    tool = Path(sys.executable).with_name("check-jsonschema")
    check(tool, "--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci", *paths)
    parent, child = (yaml.safe_load(path.read_text()) for path in paths)
    assert parent["images"]["trigger"]["include"] == [{"artifact": "gitlab/images.yml", "job": "plan"}]
    assert "gitlab/images.yml" in parent["plan"]["artifacts"]["paths"]
    jobs = {name: job for name, job in child.items() if "extends" in job}
    assert {name: job["variables"]["IMAGE"] for name, job in jobs.items()} == {name: name for name in PIPELINE.images}
    assert child[".image"]["variables"]["OS_CLOUD"] == "site"
    assert child[".image"]["artifacts"]["reports"]["junit"]


def test_the_command_of_the_gitlab_pipeline_makes_its_child(tmp_path: Path) -> None:
    (path,) = rendered(tmp_path, "gitlab")
    (command,) = yaml.safe_load(path.read_text())["plan"]["script"]
    words = command.removeprefix("./run ").split()
    check(sys.executable, "-m", "invoke", "--search-root", REPOSITORY, *words[:-1], tmp_path, "--platform", "slurm")
    assert "slurm" in yaml.safe_load((tmp_path / "gitlab" / "images.yml").read_text())


def test_github_takes_the_workflow(tmp_path: Path) -> None:
    (path,) = rendered(tmp_path, "github")
    check(Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", path)
    workflow = yaml.safe_load(path.read_text())
    job = workflow["jobs"]["image"]
    assert job["strategy"]["matrix"]["image"] == [*PIPELINE.images]
    assert job["runs-on"] == ["self-hosted", "builders"]
    # YAML 1.1 reads the key "on" as true.
    assert workflow[True]["schedule"] == [{"cron": "5 3 * * *"}]
    for step in job["steps"]:
        # A secret in a script would stand in the process's arguments and, escaped badly, run.
        assert "secrets." not in step.get("run", "")
        if "run" in step:
            check("bash", "-n", "-c", re.sub(r"\$\{\{.*?\}\}", "x", step["run"]))


def test_zuul_takes_its_configuration(tmp_path: Path) -> None:
    configuration, *playbooks = rendered(tmp_path, "zuul")
    schema = json.loads(importlib.resources.files("zuul_lint").joinpath("zuul-schema.json").read_text())
    found: list[dict[str, Any]] = yaml.safe_load(configuration.read_text())
    jsonschema.validate(found, schema)
    jobs = [entry["job"]["name"] for entry in found if "job" in entry]
    assert jobs == ["bakehouse-nightly", *(f"bakehouse-nightly-{name}" for name in PIPELINE.images)]
    for playbook in playbooks:
        assert (tmp_path / "zuul" / found[0]["job"]["run"]).exists()
        check("ansible-lint", "--offline", "--project-dir", REPOSITORY, playbook)
    (copy,) = yaml.safe_load(playbooks[0].read_text())[0]["tasks"][:1]
    assert copy["no_log"] is True


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    service, timer = rendered(tmp_path, "systemd", Pipeline(images=("slurm",), folder=str(REPOSITORY)))
    check("systemd-analyze", "verify", service, timer)
    check("systemd-analyze", "calendar", re.findall(r"OnCalendar=(.*)", timer.read_text())[0])
    assert "LoadCredential=clouds.yaml" in service.read_text()


def test_names_that_would_break_a_file_are_refused() -> None:
    with pytest.raises(BakehouseError, match="cannot stand in a pipeline"):
        pipelines.render(Pipeline(images=("slurm: x",)), "gitlab")
    with pytest.raises(BakehouseError, match="--system jenkins"):
        pipelines.render(PIPELINE, "jenkins")


@pytest.mark.parametrize("text", ["", "24:00", "2", "02:60", "02:17:00"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BakehouseError, match="time of day"):
        pipelines.parse_time(text)


def test_it_is_printed_where_no_folder_is_named() -> None:
    command = [sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), "ci.render", "--system", "github"]
    out = subprocess.run([*command, "--at", "4:30"], capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(out)[True]["schedule"] == [{"cron": "30 4 * * *"}]
