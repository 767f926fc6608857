"""Metrics of nights in a real Prometheus, by way of a real node_exporter: rules, alerts, the dashboard's queries."""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from bakehouse import REPOSITORY, night_metrics
from bakehouse.daemon import free_ports
from bakehouse.night import ImageNight, Night, Stage
from tests.integration.conftest import host_cache

pytestmark = pytest.mark.slow

MONITORING = REPOSITORY / "ci" / "monitoring"
PACKAGES = ("prometheus", "prometheus-node-exporter")


@pytest.fixture(scope="module")
def programs() -> Path:
    """Return the folder with Debian's programs: unpacked, not installed, so that no service starts here."""
    folder = host_cache() / "prometheus"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "--quiet=2", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, folder], check=True)
            package.unlink()
        (folder / "complete").touch()
    return folder / "usr" / "bin"


def test_rules_hold_by_their_own_tests(programs: Path) -> None:
    for words in (["check", "rules", "bakehouse.rules.yml"], ["test", "rules", "bakehouse.rules.test.yml"]):
        done = subprocess.run(
            [programs / "promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def night(**image: Any) -> Night:
    now = datetime.datetime.now(datetime.UTC)
    facts: dict[str, Any] = {
        "state": "failed", "verified": "failed", "size": 1 << 28, "joined": 61.5, "accelerator": "kvm",
        "ages": {"stable": 20 * 86400, "candidate": 60}, "stages": (Stage(name="bake", result="done", seconds=50),),
        "needs": ("look at it",),
    }  # fmt: skip
    return Night(
        name="2026-11-27", number=1, started=now, ended=now, host="here", executor="local", names=("slurm", "roce"),
        seconds=99, images=(ImageNight(name="slurm", **facts | image), ImageNight(name="roce", state="unchanged")),
    )  # fmt: skip


class Prometheus:
    """One that scrapes a node_exporter with our file."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        return answer.json()["data"]

    def query(self, expression: str) -> list[Any]:
        found = self.get("query", query=expression)
        return list(found["result"])


@pytest.fixture(scope="module")
def prometheus(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    night_metrics.write(folder / "textfile" / "bakehouse.prom", night(), [])
    exporter, own = free_ports(2)
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "bakehouse.rules.yml")],
        "scrape_configs": [
            {"job_name": "node", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    commands = [
        [programs / "prometheus-node-exporter", f"--web.listen-address=127.0.0.1:{exporter}",
         "--collector.disable-defaults", "--collector.textfile", f"--collector.textfile.directory={folder}/textfile"],
        [programs / "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{own}"],
    ]  # fmt: skip
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w"))
        for command in commands:
            process = stack.enter_context(subprocess.Popen([*map(str, command)], stdout=log, stderr=log))
            stack.callback(process.terminate)
        made = Prometheus(f"http://127.0.0.1:{own}")
        deadline = time.monotonic() + 60
        while True:
            try:
                if made.query("bakehouse_image_failed"):
                    break
            except (requests.RequestException, KeyError):
                pass
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield made


def test_alerts_that_wait_for_nothing_fire(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + 30
    wanted = {
        ("BakehouseImageFailed", "firing"),
        ("BakehouseStableOld", "pending"),
        ("BakehouseNeedsPerson", "pending"),
    }
    while True:
        alerts = prometheus.get("alerts")["alerts"]
        found = {(alert["labels"]["alertname"], alert["state"]) for alert in alerts}
        if wanted <= found or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert wanted <= found
    assert "BakehouseNightMissing" not in {name for name, _ in found}
    (failed,) = [alert for alert in alerts if alert["labels"]["alertname"] == "BakehouseImageFailed"]
    assert failed["annotations"]["summary"] == "slurm failed in the last night"


def test_each_panel_of_the_dashboard_shows_something(prometheus: Prometheus) -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            assert prometheus.query(target["expr"]), f"{panel['title']}: {target['expr']}"


def test_each_metric_is_documented_and_has_its_help(prometheus: Prometheus) -> None:
    names = {name for name in prometheus.get("label/__name__/values") if name.startswith("bakehouse_")}
    text = (MONITORING / "README.md").read_text()
    assert [name for name in sorted(names) if f"`{name}" not in text] == []
    assert all(entry[0]["help"] for name, entry in prometheus.get("metadata").items() if name in names)
