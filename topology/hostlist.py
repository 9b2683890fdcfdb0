"""Slurm host lists: `zaya[000-127]` to names and back.

Invariant: `expand(compress(names)) == sorted(names)` for names that end in digits or not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby

from topology.errors import TopologyError

_PART = re.compile(r"[^,\[\]]+(?:\[[^\]]*\])?[^,\[\]]*")


def expand(text: str, where: str = "") -> list[str]:
    """Expand a Slurm host list with at most one bracket per name.

    Raises:
        TopologyError: a bracket is not closed, or a range runs backwards.
    """
    if text.count("[") != text.count("]"):
        raise TopologyError("host list with an unbalanced bracket", where=where, value=text)
    names: list[str] = []
    for part in _PART.findall(text.replace(" ", "")):
        match = re.fullmatch(r"(.*?)\[([^\]]*)\](.*)", part)
        if not match:
            names.append(part)
            continue
        head, body, tail = match.groups()
        for item in body.split(","):
            names += [f"{head}{number}{tail}" for number in _range(item, text, where)]
    return names


def _range(item: str, text: str, where: str) -> list[str]:
    low, _, high = item.partition("-")
    high = high or low
    if not (low.isdigit() and high.isdigit()) or int(low) > int(high):
        raise TopologyError(f"host list with a bad range {item!r}", where=where, value=text)
    return [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]


def compress(names: Iterable[str]) -> str:
    """Write names as the shortest Slurm host list with one bracket per prefix, sorted."""
    plain: list[str] = []
    numbered: dict[tuple[str, int], list[int]] = defaultdict(list)
    for name in sorted(set(names)):
        match = re.fullmatch(r"(.*?)(\d+)", name)
        if match:
            numbered[match[1], len(match[2])].append(int(match[2]))
        else:
            plain.append(name)
    parts = list(plain)
    for (prefix, width), numbers in sorted(numbered.items()):
        spans = []
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
            values = [str(value).zfill(width) for _, value in run]
            spans.append(values[0] if len(values) == 1 else f"{values[0]}-{values[-1]}")
        single = len(spans) == 1 and "-" not in spans[0]
        parts.append(f"{prefix}{spans[0]}" if single else f"{prefix}[{','.join(spans)}]")
    return ",".join(parts)
