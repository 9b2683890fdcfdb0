"""Read a run file: YAML, then dotted overrides (`key=value`), then validation. Write it back resolved.

Invariant: dump_config(load_config(f)) loads to an equal tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_zaya.config.errors import ConfigError, explain
from megatron_zaya.config.phases import set_dotted
from megatron_zaya.config.run_config import RunConfig


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 wants 1.0e-5) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in ``tree``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    value = _read_yaml(text, f"override {override!r}") if text.strip() else None
    set_dotted(tree, key, value, f"override {override!r}")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the validated run configuration of a YAML file with overrides applied in order.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value has the wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such run file; see configs/ for complete ones")
    tree = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be sections (run, model, ...), not {type(tree).__name__}")
    tree = {name: {} if section is None else section for name, section in tree.items()}
    for override in overrides:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(RunConfig, error, str(path))) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved tree as YAML that :func:`load_config` accepts."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a run file (for editors and for checks outside Python)."""
    return RunConfig.model_json_schema()


__all__ = ["dump_config", "json_schema", "load_config"]
