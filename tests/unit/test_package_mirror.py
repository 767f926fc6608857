"""What stands between nodes and Debian's mirrors."""

from __future__ import annotations

import pytest

from bakehouse.package_mirror import proxy_to

MIRRORS = ("http://deb.example.org/debian", "http://deb.example.org/debian-security")


@pytest.mark.parametrize(
    ("direct", "proxy"), [("", "http://proxy:3128"), ("other.example.org", "http://proxy:3128"), (".example.org", "")]
)
def test_mirrors_are_reached_by_the_proxy_of_this_host(
    monkeypatch: pytest.MonkeyPatch, direct: str, proxy: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", direct)
    assert proxy_to(MIRRORS) == proxy


def test_without_a_proxy_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    assert proxy_to(MIRRORS) == ""
