"""Settings: where they come from, which one wins, and which mirrors they come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bakehouse import settings
from bakehouse.errors import BakehouseError
from bakehouse.settings import Settings


def load(folder: Path, text: str = "", **environment: str) -> Settings:
    """Load settings from a file with this text, and variables given without their prefix."""
    path = folder / "bakehouse.yaml"
    path.write_text(text)
    named = {f"BAKEHOUSE_{name}": value for name, value in environment.items()}
    return settings.load({"BAKEHOUSE_CONFIG": str(path), **named})


def refused(folder: Path, text: str = "", **environment: str) -> BakehouseError:
    with pytest.raises(BakehouseError) as caught:
        load(folder, text, **environment)
    return caught.value


# The mirrors of the host's apt.


def apt(folder: Path, **files: str) -> dict[str, str]:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return settings.host_mirrors(folder)


ONE_LINE = """
# deb http://commented.example/debian trixie main
deb-src http://source.example/debian trixie main
  deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://one.example/debian/ trixie main
deb http://two.example/debian trixie main
deb http://three.example/debian-security trixie-security main
"""

DEB822 = """# A comment
Types: deb deb-src
# http://snapshot.debian.org/archive/debian/20250520T000000Z
URIs: http://one.example/debian/
Suites: trixie trixie-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs:
 http://three.example/debian-security
Suites: trixie-security
Components: main
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [("sources_list", ONE_LINE), ("sources.list.d__x_list", ONE_LINE), ("sources.list.d__x_sources", DEB822)],
)
def test_the_hosts_mirrors_are_read_in_either_form(tmp_path: Path, name: str, text: str) -> None:
    assert apt(tmp_path, **{name: text}) == {
        "debian": "http://one.example/debian",
        "debian-security": "http://three.example/debian-security",
    }


def test_a_disabled_stanza_does_not_count(tmp_path: Path) -> None:
    text = "Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n\n"
    on = "Enabled: yes\nTypes: deb\nURIs: http://on.example/debian\nSuites: trixie\nComponents: main\n"
    assert apt(tmp_path, **{"sources.list.d__x_sources": text}) == {}
    assert apt(tmp_path, **{"sources.list.d__x_sources": text + on}) == {"debian": "http://on.example/debian"}


def test_a_stanza_of_sources_only_does_not_count(tmp_path: Path) -> None:
    text = "Types: deb-src\nURIs: http://src.example/debian\nSuites: trixie\nComponents: main\n"
    assert apt(tmp_path, **{"sources.list.d__x_sources": text}) == {}


def test_the_suite_says_which_archive_it_is(tmp_path: Path) -> None:
    text = (
        "deb http://one.example/mirror/debian bullseye/updates main\ndeb http://two.example/debian trixie-updates x\n"
    )
    assert apt(tmp_path, sources_list=text) == {
        "debian-security": "http://one.example/mirror/debian",
        "debian": "http://two.example/debian",
    }


def test_other_archives_are_not_mirrors_of_debian(tmp_path: Path) -> None:
    text = (
        "deb https://deb.nodesource.com/node_20.x nodistro main\n"
        "deb http://archive.ubuntu.com/ubuntu noble main\n"
        "deb cdrom:[Debian GNU/Linux 13 _Trixie_]/ trixie main\n"
    )
    assert apt(tmp_path, sources_list=text) == {}


def test_a_host_without_apt_has_no_mirrors(tmp_path: Path) -> None:
    assert settings.host_mirrors(tmp_path / "nothing") == {}


def test_the_hosts_mirrors_serve_where_none_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "host_mirrors", lambda: {"debian": "http://host.example/debian"})
    assert Settings().mirrors() == ("http://host.example/debian", "http://deb.debian.org/debian-security")
    named = Settings(mirror="http://site.example/debian", security_mirror="http://site.example/debian-security")
    assert named.mirrors() == ("http://site.example/debian", "http://site.example/debian-security")


def test_a_snapshot_has_mirrors_of_its_own() -> None:
    assert Settings(mirror="http://site.example/debian").mirrors("20261101T000000Z") == (
        "https://snapshot.debian.org/archive/debian/20261101T000000Z",
        "https://snapshot.debian.org/archive/debian-security/20261101T000000Z",
    )
    other = Settings(snapshot_mirror="http://snap.example/{snapshot}/{archive}")
    assert other.mirrors("20261101T000000Z")[1] == "http://snap.example/20261101T000000Z/debian-security"


@pytest.mark.parametrize("address", ["http://snap.example/{arhive}/{snapshot}", "http://snap.example/{archive"])
def test_a_snapshot_mirror_that_cannot_be_filled_in_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(BakehouseError, match="snapshot_mirror"):
        load(tmp_path, f"snapshot_mirror: '{address}'\n").mirrors("20261101T000000Z")


# Where settings come from.


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    text = "store: /file/store\ncache: /file/cache\ncache_limit_gib: 5\n"
    found = load(tmp_path, text, STORE="/variable/store", CACHE_LIMIT_GIB="7.5")
    assert (found.store, found.cache) == (Path("/variable/store"), Path("/file/cache"))
    assert found.cache_limit_gib == 7.5


def test_a_variable_holds_folders_with_a_colon_between(tmp_path: Path) -> None:
    found = load(tmp_path, "manifests: [mine]\n", MANIFESTS="/one:/two")
    assert found.manifests == [Path("/one"), Path("/two")]


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load(tmp_path, "store: images\ncache: ../cache\nmanifests: [mine, /abs]\nelements: [theirs]\n")
    assert found.store == tmp_path / "images"
    assert found.cache.resolve() == tmp_path.parent / "cache"
    assert found.manifests == [tmp_path / "mine", Path("/abs")]
    assert found.elements == [tmp_path / "theirs"]


def test_paths_in_variables_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load(tmp_path, "cache: cache\n", STORE="images", ELEMENTS="mine")
    assert found.store == tmp_path / "elsewhere" / "images"
    assert found.elements == [tmp_path / "elsewhere" / "mine"]


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    found = load(tmp_path, "store: ~/images\nmanifests: [~/mine]\n")
    assert (found.store, found.manifests) == (Path("/home/someone/images"), [Path("/home/someone/mine")])


def test_the_current_folders_file_comes_before_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setenv("HOME", str(tmp_path))
    users = tmp_path / ".config" / "bakehouse"
    for folder in (tmp_path / "here", tmp_path / "checkout", users):
        folder.mkdir(parents=True)
    (users / "bakehouse.yaml").write_text("cache_limit_gib: 3\n")
    assert settings.load({}, tmp_path / "here").cache_limit_gib == 3
    (tmp_path / "checkout" / "bakehouse.yaml").write_text("cache_limit_gib: 2\n")
    assert settings.load({}, tmp_path / "here").cache_limit_gib == 2
    (tmp_path / "here" / "bakehouse.yaml").write_text("cache_limit_gib: 1\n")
    assert settings.load({}, tmp_path / "here").cache_limit_gib == 1


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError) as caught:
        settings.load({"BAKEHOUSE_CONFIG": str(tmp_path / "nothing.yaml")})
    assert caught.value.message == f"BAKEHOUSE_CONFIG names {tmp_path}/nothing.yaml, which is not a file"


def test_an_unknown_variable_is_refused_with_a_guess(tmp_path: Path) -> None:
    error = refused(tmp_path, STOER="/x")
    assert error.message == (
        "the variable BAKEHOUSE_STOER is not a setting (did you mean 'BAKEHOUSE_STORE'?)"
    )  # fmt: skip
    assert error.hint == "docs/settings.md lists them"


def test_the_two_other_variables_are_known(tmp_path: Path) -> None:
    assert load(tmp_path, "cache_limit_gib: 4\n", DEBUG="1").cache_limit_gib == 4


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("stoer: /x", "2: unknown key 'stoer' (did you mean 'store'?)"),
        (
            "mirror: ftp://x.example/debian",
            "2: mirror: must be an address that begins with http://, https:// or file:// (it is 'ftp://x.example/debian')",
        ),
        ("node_mirror: deb.debian.org/debian", "2: node_mirror: must be an address"),
        ("node_mirror: http://u:p@mirror.example/debian", "2: node_mirror: must not hold a password"),
        ("security_mirror: 'http://'", "2: security_mirror: must be an address"),
        ("cache_limit_gib: 0", "2: cache_limit_gib: Input should be greater than 0 (it is 0)"),
        ("cache_limit_gib: much", "2: cache_limit_gib: "),
        ("manifests: mine", "2: manifests: Input should be a valid list"),
        ("store: 5", "2: store: "),
    ],
)
def test_a_faulty_setting_is_named_by_file_and_line(tmp_path: Path, text: str, fault: str) -> None:
    assert refused(tmp_path, f"# settings\n{text}\n").message.startswith(f"{tmp_path}/bakehouse.yaml:{fault}")


def test_a_faulty_variable_is_named_in_place_of_the_file(tmp_path: Path) -> None:
    message = refused(tmp_path, "store: /x\nmirror: http://good.example/debian\n", MIRROR="bad").message
    assert "BAKEHOUSE_MIRROR" in message
    assert "bakehouse.yaml" not in message


def test_a_slash_at_the_end_of_a_mirror_does_not_count(tmp_path: Path) -> None:
    assert load(tmp_path, "mirror: http://x.example/debian/\n").mirror == "http://x.example/debian"


def test_a_dump_loads_as_the_same_settings(tmp_path: Path) -> None:
    found = load(tmp_path, "store: images\nmirror: http://x.example/debian\nelements: [mine]\n")
    text = settings.dump(found)
    assert yaml.safe_load(text)["store"] == str(tmp_path / "images")
    assert load(tmp_path, text) == found


def test_what_soaks_is_kept() -> None:
    with pytest.raises(ValueError, match=r"keep must be more than promote\.soak_nights"):
        Settings.model_validate({"nightly": {"keep": 3, "promote": {"soak_nights": 3}}})
    assert Settings.model_validate({"nightly": {"keep": 0, "promote": {}}}).nightly.keep == 0
