"""YAML that people write: read with line numbers, checked by pydantic, faults named by file, line and field."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bakehouse.errors import BakehouseError
from bakehouse.run import redact

FieldPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A mapping read from a file, and where each of its fields stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[FieldPath, int] = field(default_factory=dict)

    def where(self, field_path: FieldPath) -> str:
        """Return ``file:line`` of a field, or of the nearest thing around it."""
        for length in range(len(field_path), 0, -1):
            if field_path[:length] in self.lines:
                return f"{self.path}:{self.lines[field_path[:length]]}"
        return f"{self.path}:1"


def read(path: Path) -> Document:
    """Read a YAML mapping.

    Raises:
        BakehouseError: the file cannot be read, is not YAML, is not a mapping, or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BakehouseError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BakehouseError(f"{path} is not UTF-8 text: {error}") from error
    lines: dict[FieldPath, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _note_lines(path, node, (), lines, set(), ())
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise BakehouseError(
            f"{path}:{line}: not valid YAML: {error.problem or error.context}",
            hint="mind the indentation, and quote values that hold ': ' or begin with a special character",
        ) from error
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0) or 0) + 1
        raise BakehouseError(f"{path}:{line}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise BakehouseError(f"{path}: nested too deep to be read", hint="an alias may hold itself") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise BakehouseError(f"{path}:1: holds a {type(data).__name__}, not a mapping", hint="write 'key: value' lines")
    return Document(path, data, lines)


class _Loader(yaml.SafeLoader):
    """Says on which line a value stands that cannot be read, such as the 45th of a month."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            reason = f"a value cannot be read ({error})"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error


def _note_lines(
    path: Path,
    node: yaml.Node,
    at: FieldPath,
    lines: dict[FieldPath, int],
    seen_nodes: set[int],
    around: tuple[int, ...],
) -> None:
    if id(node) in around:
        line = node.start_mark.line + 1
        raise BakehouseError(f"{path}:{line}: nested too deep to be read", hint="an alias holds itself")
    if isinstance(node, yaml.ScalarNode) or id(node) in seen_nodes:
        return  # An alias leads to a node once more.
    seen_nodes.add(id(node))
    around = (*around, id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag not in {
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:merge",
            }:
                kind = key_node.tag.rpartition(":")[2]
                raise BakehouseError(f"{path}:{line}: the key {key} is a {kind} to YAML, not a name", hint="quote it")
            if key in seen:
                raise BakehouseError(
                    f"{path}:{line}: '{key}' stands twice in one mapping", hint="keep one; YAML would take the last"
                )
            seen.add(key)
            lines[(*at, key)] = line
            _note_lines(path, value_node, (*at, key), lines, seen_nodes, around)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*at, number)] = item.start_mark.line + 1
            _note_lines(path, item, (*at, number), lines, seen_nodes, around)


def check(model: type[Model], document: Document) -> Model:
    """Check a document against a model.

    Raises:
        BakehouseError: every fault, one a line, with file, line, field and a hint.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        faults = [_describe(model, document, item) for item in error.errors()]
        raise BakehouseError("\n".join(faults)) from error


def _describe(model: type[BaseModel], document: Document, item: Any) -> str:
    at: FieldPath = tuple(item["loc"])
    name = ".".join(str(part) for part in at)
    where = document.where(at)
    if item["type"] == "extra_forbidden":
        known = sorted(_known_keys(model, at[:-1]))
        beside = did_you_mean(str(at[-1]), known) or f" (known: {', '.join(known)})"
        return f"{where}: unknown key '{name}'{beside}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "literal_error":
        allowed = str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        message = f"'{item['input']}' is not one of {', '.join(allowed)}" + did_you_mean(str(item["input"]), allowed)
    elif "input" in item and item["type"] != "missing" and not isinstance(item["input"], dict | list):
        message = f"{message} (it is {redact(repr(item['input']))})"
    return f"{where}: {name}: {message}"


def _known_keys(model: type[BaseModel], at: FieldPath) -> list[str]:
    for part in at:
        info = model.model_fields.get(str(part))
        candidates = [info.annotation, *get_args(info.annotation)] if info else []
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return [info.alias or name for name, info in model.model_fields.items()]


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
