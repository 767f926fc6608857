"""Fixtures of the image suites: what is asked of a booted node.

Run against any node: ``pytest tests/image/test_node.py --hosts=ssh://debian@ADDRESS --sudo``; with
``--record PATH`` of the image's record, its identity is compared too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="the record of the image that the node was booted from")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = request.config.getoption("--record")
    if path is None:
        pytest.skip("no --record was given")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
