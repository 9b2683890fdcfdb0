"""One error type for everything a user can get wrong in a run file, and the text of its message.

Invariant: a message says what is wrong, where (file and dotted key), the value seen and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """A run file, an override or a precondition of the run is wrong. The message is for the user."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest candidate, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _section_at(model: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the section class that the keys of ``path`` lead to."""
    section: Any = model
    for key in path:
        field = section.model_fields.get(str(key))
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
    return section if isinstance(section, type) else None


def _all_keys(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Map each leaf key name to the dotted paths where it is legal."""
    found: dict[str, list[str]] = {}
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            for key, paths in _all_keys(nested, f"{prefix}{name}.").items():
                found.setdefault(key, []).extend(paths)
        else:
            found.setdefault(name, []).append(f"{prefix}{name}")
    return found


def unknown_key_message(root: type[BaseModel], path: tuple[str | int, ...]) -> str:
    """Describe an unknown key: its dotted path and the nearest legal key, here or in another section."""
    *parents, key = path
    dotted = ".".join(str(part) for part in path)
    section = _section_at(root, tuple(parents))
    names = list(section.model_fields) if section is not None else []
    hint = did_you_mean(str(key), names)
    if not hint:
        everywhere = _all_keys(root)
        if str(key) in everywhere:
            hint = f"; it belongs to {' or '.join(everywhere[str(key)])}"
        else:
            hint = did_you_mean(str(key), everywhere)
    return f"{dotted}: unknown key{hint}"


def explain(root: type[BaseModel], error: ValidationError, source: str) -> str:
    """Turn pydantic's report into one line per mistake, each with its dotted key and the value seen."""
    lines = []
    for item in error.errors():
        path = item["loc"]
        dotted = ".".join(str(part) for part in path) or "(whole file)"
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key_message(root, path))
        elif item["type"] == "missing":
            lines.append(f"{dotted}: required, but not given")
        else:
            message = item["msg"].removeprefix("Value error, ")
            seen = "" if isinstance(item["input"], dict | BaseModel) else f" (got {item['input']!r})"
            lines.append(f"{dotted}: {message}{seen}")
    return "\n".join([f"{source}: {len(lines)} problem{'s' * (len(lines) > 1)}", *(f"  {x}" for x in lines)])
