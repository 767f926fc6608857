"""A plugin of pytest for image suites: what is asked of a booted node, with testinfra.

``invoke verify`` loads it. By hand, against any node::

    pytest -p bakehouse.suite --confcutdir=tests/image tests/image --hosts=ssh://debian@ADDRESS --sudo

With ``--record PATH`` of the image's record, its identity is compared too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--record``."""
    parser.addoption("--record", type=Path, help="the record of the image that the node was booted from")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the record of the image that the node was booted from, as plain data; skip where none was given."""
    path = request.config.getoption("--record")
    if path is None:
        pytest.skip("no --record was given")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
