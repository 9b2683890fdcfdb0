"""YAML with line numbers: every complaint about a file can name the line it is about.

`Document` pairs the plain data of a YAML file with a map from the path of each value (`("rails", "count")`,
`("cabling", 3, "nic")`) to its line. Invariant: a file that loads has no duplicate key.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from topology.errors import TopologyError

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Document:
    """Plain data of one YAML text, its name for messages, and the 1-based line of every path."""

    name: str
    data: dict[str, Any]
    lines: dict[Key, int]

    def where(self, path: Key) -> str:
        """Return `name:line` of `path`, or of its nearest known ancestor."""
        for cut in range(len(path), -1, -1):
            if path[:cut] in self.lines:
                return f"{self.name}:{self.lines[path[:cut]]}"
        return self.name

    def error(self, path: Key, what: str, *, value: object = None, remedy: str = "") -> TopologyError:
        """Build (not raise) the error about the value at `path`."""
        return TopologyError(what, where=self.where(path), value=value, remedy=remedy)

    def validate(self, model: type[Model], path: Key = ()) -> Model:
        """Check the value at `path` against a pydantic model; the first problem becomes a `TopologyError`."""
        value: Any = self.data
        for key in path:
            value = value[key]
        try:
            return model.model_validate(value)
        except ValidationError as failure:
            raise self._from_pydantic(failure, model, path) from None

    def _from_pydantic(self, failure: ValidationError, model: type[BaseModel], path: Key) -> TopologyError:
        first = failure.errors(include_url=False)[0]
        loc = tuple(first["loc"])
        dotted = ".".join(str(part) for part in loc) or "the document"
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(loc[-1]), _fields_at(model, loc[:-1]), n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "remove it"
            return self.error(path + loc, f"unknown key {dotted!r}", remedy=remedy)
        if first["type"] == "missing":
            return self.error(path + loc, f"key {dotted!r} is missing", remedy="add it")
        message = first["msg"].removeprefix("Value error, ")
        return self.error(path + loc, f"{dotted}: {message}", value=first["input"])


def _fields_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Field names of the (nested) model at `loc`, for the did-you-mean."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        arguments = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        current = next((a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return list(getattr(current, "model_fields", {}))


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        TopologyError: the file is missing, is not YAML, or holds a duplicate key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TopologyError(f"cannot read the file: {why}", where=str(path), remedy="check the path") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parse YAML text; `name` is used in messages. Raises like `read`."""
    try:
        root = yaml.compose(text, Loader=_LOADER)
        data = yaml.load(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TopologyError(f"not valid YAML: {error.problem}", where=f"{name}:{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TopologyError(f"not valid YAML: {str(error).splitlines()[0]}", where=f"{name}:1") from None
    if not isinstance(data, dict):
        raise TopologyError("the document must be a mapping", where=f"{name}:1", value=type(data).__name__)
    lines: dict[Key, int] = {}
    _index(root, (), lines, name)
    return Document(name, data, lines)


def _index(node: yaml.Node | None, path: Key, lines: dict[Key, int], name: str) -> None:
    """Record the line of `node` and of everything below it."""
    if node is None:
        return
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, str(key.value))
            if child in lines:
                raise TopologyError(
                    f"duplicate key {key.value!r} (first on line {lines[child]})",
                    where=f"{name}:{key.start_mark.line + 1}",
                    remedy="keep one of them",
                )
            lines[child] = key.start_mark.line + 1
            _index(value, child, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _index(item, (*path, index), lines, name)
