"""Fire drills as text: a fault on purpose, so that the way back is known before it is needed. Torch-free.

`zaya submit --drill 'crash:rank=1,iteration=3'`, several separated by `;`. Every drill happens in one attempt only
(`attempt=0` unless given), after the given iteration:

    crash   an exception in user code          kill    SIGKILL, as by the kernel when memory runs out
    hang    the rank sleeps for ever           stop    SIGSTOP: it does not even answer
    slow    every micro-batch comes `seconds=0.2` late from then on
    nan     a weight becomes NaN
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_zaya.config.errors import ConfigError

KINDS = ("crash", "kill", "hang", "stop", "slow", "nan")


@dataclass(frozen=True)
class Drill:
    """One fault."""

    kind: str
    rank: int
    iteration: int
    attempt: int = 0
    seconds: float = 0.2


def parse_drills(text: str) -> list[Drill]:
    """Read `kind:key=value,...;...`.

    Raises:
        ConfigError: an unknown kind or key, or no number.
    """
    drills = []
    for part in filter(None, (item.strip() for item in text.split(";"))):
        kind, _, settings = part.partition(":")
        try:
            values = dict(item.split("=") for item in settings.split(","))
            if kind not in KINDS:
                raise ValueError(f"kinds are {', '.join(KINDS)}")
            seconds = float(values.pop("seconds", 0.2))
            drills.append(Drill(kind, seconds=seconds, **{key: int(value) for key, value in values.items()}))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"drill {part!r}: {error}; write crash:rank=1,iteration=3") from None
    return drills
