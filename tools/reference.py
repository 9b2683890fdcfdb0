"""`make reference`: docs/reference/*.md from the configuration tree, the command line, the events and the metrics.

python tools/reference.py [--check]     # --check writes nothing and fails if a page is not up to date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.cli import app
from launch.site import Site
from megatron_zaya.config import RunConfig
from megatron_zaya.telemetry import events
from megatron_zaya.telemetry.metrics import markdown_table

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE = "<!-- Made by tools/reference.py (make reference): change the code, not this page. -->\n\n"


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


# -- settings ----------------------------------------------------------------------------------------------------------


def type_text(annotation: Any) -> str:
    """Return a type as a person writes it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_text(part) for part in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, dict, tuple):
        inner = ", ".join(type_text(part) for part in arguments)
        return f"{origin.__name__} of {inner}"
    return getattr(annotation, "__name__", str(annotation))


def limits(field: FieldInfo) -> str:
    """Return the bounds of a value, such as ` >= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{signs[name]} {getattr(rule, name):g}" for rule in field.metadata for name in signs if hasattr(rule, name)
    ]
    return f" {', '.join(found)}" if found else ""


def default_text(field: FieldInfo) -> str:
    value = field.default if field.default is not PydanticUndefined else None
    if value is None and field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    elif field.is_required():
        return "needed"
    return f"`{json.dumps(value)}`"


def nested(annotation: Any) -> type | None:
    """Return the section that a field is, or is a list of."""
    for part in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(part) and (issubclass(part, BaseModel) or dataclasses.is_dataclass(part)):
            return part
    return None


def section(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yield a model as a table, then its sections."""
    rows, below = [], []
    for name, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None:
            below.append((name, inner))
        else:
            kind = cell(type_text(field.annotation) + limits(field))
            rows.append((f"`{name}`", kind, cell(default_text(field)), cell(field.description or "")))
    if path:
        yield f"## {path}\n\n{(model.__doc__ or '').strip()}\n\n"
    if rows:
        yield table(("key", "type", "default", "meaning"), rows)
    for name, inner in below:
        title = f"{path}.{name}" if path else name
        if issubclass(inner, BaseModel):
            yield from section(inner, title)
        else:
            yield f"## {title}\n\n{(inner.__doc__ or '').strip().splitlines()[0]}\n\n" + fields_table(inner)


def config_page() -> str:
    text = "# Run file\n\nEvery setting, its default and its meaning. `zaya config schema` prints the same as a JSON "
    text += "Schema for editors; any key can be set on the command line as `section.key=value`.\n\n"
    return MADE + text + "".join(section(RunConfig, ""))


def site_page() -> str:
    text = "# Site file\n\nEverything about a cluster that a run file must not know: `zaya submit --site site.yaml`. "
    text += "Examples are in `slurm/sites/`.\n\n"
    return MADE + text + "".join(section(Site, ""))


# -- events and other records ------------------------------------------------------------------------------------------


def attribute_docs(record: type) -> dict[str, str]:
    """Return the string below each field of a class, by the name of the field."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(record))).body
    found, name = {}, ""
    for node in typing.cast(ast.ClassDef, definition).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = str(node.value.value)
            name = ""
    return found


def fields_table(record: type) -> str:
    documented, hints = attribute_docs(record), typing.get_type_hints(record)
    rows = []
    for field in dataclasses.fields(record):
        default = "" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"
        rows.append(
            (f"`{field.name}`", cell(type_text(hints[field.name])), default, cell(documented.get(field.name, "")))
        )
    return table(("field", "type", "default", "meaning"), rows)


def events_page() -> str:
    text = "# Events\n\nWhat a run says, one JSON object a line in `metrics.jsonl`: `event` is the name, `time` the "
    text += "seconds since 1970. Fields are added, never renamed; `null` stands for what is not known.\n\n"
    for record in typing.get_args(events.Event):
        text += f"## {record.__name__}\n\n{(record.__doc__ or '').strip()}\n\n" + fields_table(record)
    return MADE + text


def metrics_page() -> str:
    text = "# Metrics\n\nWhat Prometheus gets (`telemetry.prometheus`), and what the dashboard and the alert rules in "
    text += "`monitoring/` are made from.\n\n"
    return MADE + text + markdown_table()


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below a group with its full name."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def command_text(path: str, command: Any) -> str:
    """Return one command: what it does, its usage, its arguments and options."""
    usage = " ".join([path, *command.collect_usage_pieces(command.context_class(command, info_name=path))])
    rows = []
    for parameter in command.params:
        is_argument = parameter.param_type_name == "argument"
        name = parameter.name.upper() if is_argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
        shown = parameter.default not in (None, False, "", ..., [], ()) and not parameter.required
        default = f"`{parameter.default}`" if shown and not callable(parameter.default) else ""
        rows.append((f"`{name}`", cell(default), cell(parameter.help or "")))
    text = f"## {path}\n\n{inspect.cleandoc(command.help or '')}\n\n```text\n{usage}\n```\n\n"
    return text + (table(("argument", "default", "meaning"), rows) if rows else "")


def cli_page() -> str:
    text = (
        "# Command line\n\nEvery command checks its input first and answers a mistake with one message. Exit status: 0 "
    )
    text += "done, 2 the input cannot work, anything else is that of the job.\n\n"
    return MADE + text + "".join(command_text(*found) for found in commands(typer.main.get_command(app), "zaya"))


PAGES = {"config": config_page, "site": site_page, "cli": cli_page, "events": events_page, "metrics": metrics_page}


def pages() -> dict[Path, str]:
    """Return the text of every page by its path."""
    return {FOLDER / f"{name}.md": make().rstrip("\n") + "\n" for name, make in PAGES.items()}


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them; return the exit status."""
    made = pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is not up to date: make reference", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
