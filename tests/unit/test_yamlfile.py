"""Reading YAML that people write: every fault is named by file and line, and nothing but a BakehouseError comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from bakehouse import yamlfile
from bakehouse.errors import BakehouseError
from bakehouse.yamlfile import Document

QUICK = hypothesis_settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    weight: int = 0
    kind: Literal["big", "small"] = "big"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = ""
    inner: Inner = Inner()
    words: list[str] = []
    must: str = Field(default="x", min_length=1)


def read(folder: Path, content: str | bytes) -> Document:
    path = folder / "file.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return yamlfile.read(path)


def refused(folder: Path, content: str | bytes) -> BakehouseError:
    with pytest.raises(BakehouseError) as caught:
        read(folder, content)
    return caught.value


def faults(folder: Path, content: str) -> list[str]:
    document = read(folder, content)
    with pytest.raises(BakehouseError) as caught:
        yamlfile.check(Outer, document)
    return caught.value.message.splitlines()


def test_each_field_knows_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, "# a comment\nname: x\ninner:\n  weight: 3\nwords:\n  - a\n  - b\n")
    assert document.data == {"name": "x", "inner": {"weight": 3}, "words": ["a", "b"]}
    assert document.where(("name",)) == f"{tmp_path}/file.yaml:2"
    assert document.where(("inner", "weight")) == f"{tmp_path}/file.yaml:4"
    assert document.where(("words", 1)) == f"{tmp_path}/file.yaml:7"


def test_a_field_that_is_not_there_is_placed_by_what_is_around_it(tmp_path: Path) -> None:
    document = read(tmp_path, "name: x\ninner:\n  weight: 3\n")
    assert document.where(("inner", "kind", "deeper")) == f"{tmp_path}/file.yaml:2"
    assert document.where(("nothing",)) == f"{tmp_path}/file.yaml:1"


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n"])
def test_a_file_that_holds_nothing_is_an_empty_mapping(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content).data == {}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="No such file or directory") as caught:
        yamlfile.read(tmp_path / "nothing.yaml")
    assert caught.value.message.startswith(f"{tmp_path}/nothing.yaml ")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match=f"{tmp_path} cannot be read: Is a directory"):
        yamlfile.read(tmp_path)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, b"name: caf\xe9\n").message.startswith(f"{tmp_path}/file.yaml is not UTF-8 text")


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("a: 1\nb: [1, 2\n", 3, "expected ',' or ']'"),
        ("a: 1\nb: c: d\n", 2, "mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: *nothing\n", 1, "undefined alias 'nothing'"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "could not determine a constructor"),
        ("a: 1\n[b]: 2\n", 2, "unhashable key"),
    ],
)
def test_what_is_not_yaml_is_named_by_line(tmp_path: Path, content: str, line: int, reason: str) -> None:
    error = refused(tmp_path, content)
    assert error.message.startswith(f"{tmp_path}/file.yaml:{line}: not valid YAML: ")
    assert reason in error.message
    assert "quote values" in error.hint


@pytest.mark.parametrize(
    ("content", "line"),
    [("a: 1\n\nb: \x07\n", 3), ("a: 1\nb: 2026-13-45\n", 2), ("a: 1\nb: 0x_\n", 2)],
    ids=["a control character", "no such date", "no such number"],
)
def test_a_value_that_cannot_be_read_is_named_by_line(tmp_path: Path, content: str, line: int) -> None:
    assert refused(tmp_path, content).message.startswith(f"{tmp_path}/file.yaml:{line}: ")


@pytest.mark.parametrize("tagged", ["!!int ''", "!!float ''", "!!bool perhaps", "!!timestamp yesterday"])
def test_a_tag_that_does_not_fit_its_value_is_refused(tmp_path: Path, tagged: str) -> None:
    assert f"{tmp_path}/file.yaml" in refused(tmp_path, f"a: {tagged}\n").message


def test_an_alias_that_holds_itself_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "a: &a [*a]\n")
    assert "nested too deep" in error.message
    assert "alias" in error.hint


@pytest.mark.parametrize(("content", "kind"), [("- a\n", "list"), ("just words\n", "str"), ("3\n", "int")])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, content: str, kind: str) -> None:
    error = refused(tmp_path, content)
    assert error.message == f"{tmp_path}/file.yaml:1: holds a {kind}, not a mapping"
    assert error.hint == "write 'key: value' lines"


@pytest.mark.parametrize(
    ("content", "line", "key"),
    [("a: 1\nb: 2\na: 3\n", 3, "a"), ("x:\n  b: 1\n  b: 2\n", 3, "b"), ("x:\n- y: 1\n  'y': 2\n", 3, "y")],
)
def test_a_key_that_stands_twice_is_named_by_its_second_line(tmp_path: Path, content: str, line: int, key: str) -> None:
    error = refused(tmp_path, content)
    assert error.message == f"{tmp_path}/file.yaml:{line}: '{key}' stands twice in one mapping"
    assert "keep one" in error.hint


def test_the_same_key_in_two_mappings_is_fine(tmp_path: Path) -> None:
    assert read(tmp_path, "a: {x: 1}\nb: {x: 2}\n").data == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_document_that_fits_becomes_the_model(tmp_path: Path) -> None:
    outer = yamlfile.check(Outer, read(tmp_path, "name: x\ninner: {weight: 3, kind: small}\nwords: [a]\n"))
    assert outer == Outer(name="x", inner=Inner(weight=3, kind="small"), words=["a"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("nmae: x\n", "1: unknown key 'nmae' (did you mean 'name'?)"),
        ("name: x\nfrobnicate: y\n", "2: unknown key 'frobnicate' (known: inner, must, name, words)"),
        ("inner:\n  wieght: 3\n", "2: unknown key 'inner.wieght' (did you mean 'weight'?)"),
        ("name: [x]\n", "1: name: Input should be a valid string"),
        (
            "inner:\n  weight: heavy\n",
            "2: inner.weight: Input should be a valid integer, unable to parse string as an integer (it is 'heavy')",
        ),
        ("inner:\n  kind: smal\n", "2: inner.kind: 'smal' is not one of big, small (did you mean 'small'?)"),
        ("inner:\n  kind: green\n", "2: inner.kind: 'green' is not one of big, small"),
        ("words:\n- a\n- 5\n", "3: words.1: Input should be a valid string (it is 5)"),
        ("words: a\n", "1: words: Input should be a valid list (it is 'a')"),
        ("inner: 5\n", "1: inner: Input should be a valid dictionary or instance of Inner (it is 5)"),
    ],
)
def test_a_fault_names_file_line_field_and_what_may_be_meant(tmp_path: Path, content: str, fault: str) -> None:
    assert faults(tmp_path, content) == [f"{tmp_path}/file.yaml:{fault}"]


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    lines = faults(tmp_path, "nmae: x\ninner:\n  kind: smal\nmust: ''\n")
    assert sorted(line.removeprefix(f"{tmp_path}/file.yaml:")[:2] for line in lines) == ["1:", "3:", "4:"]


def test_a_key_that_is_not_a_word_is_named_by_its_line(tmp_path: Path) -> None:
    # YAML reads an unquoted 5 as a number, and "on" as true.
    for key, kind in (("5", "int"), ("on", "bool")):
        error = refused(tmp_path, f"name: x\n{key}: y\n")
        assert error.message == f"{tmp_path}/file.yaml:2: the key {key} is a {kind} to YAML, not a name"
        assert error.hint == "quote it"


@pytest.mark.parametrize(
    ("word", "guess"),
    [("slrum", " (did you mean 'slurm'?)"), ("kubernets", " (did you mean 'kubernetes'?)"), ("x", "")],
)
def test_the_nearest_known_word_is_offered(word: str, guess: str) -> None:
    assert yamlfile.did_you_mean(word, ["slurm", "kubernetes", "roce"]) == guess


def gives_a_document_or_says_why(folder: Path, content: bytes) -> None:
    try:
        document = read(folder, content)
    except BakehouseError as error:
        assert str(folder / "file.yaml") in error.message
    else:
        assert isinstance(document.data, dict)


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_gives_a_document_or_a_bakehouse_error(tmp_path: Path, text: str) -> None:
    gives_a_document_or_says_why(tmp_path, text.encode())


@QUICK
@given(st.binary(max_size=40))
def test_any_bytes_give_a_document_or_a_bakehouse_error(tmp_path: Path, content: bytes) -> None:
    gives_a_document_or_says_why(tmp_path, content)


YAML_PIECES = (
    "a b 1 -1 1.5 .inf 0x1f 0b_ 1_0:3 2026-01-01 2026-02-30 12:30:61 ~ null true on = << & * ! !!int !!str !!set !!map "
    "!!omap !!binary &x *x - ? : , [ ] { } | > % @ ` ' \" # --- ... %YAML \ufeff"
).split()


@QUICK
@given(st.lists(st.sampled_from([*YAML_PIECES, "\n", "\n  ", " ", ": ", "- ", "? "]), max_size=16))
def test_anything_like_yaml_gives_a_document_or_a_bakehouse_error(tmp_path: Path, pieces: list[str]) -> None:
    gives_a_document_or_says_why(tmp_path, "".join(pieces).encode())
