"""The paper that every picture of this project is drawn on: figures, colours, and how they become SVG or PNG.

matplotlib is imported where it is used; it comes with the extra `plots`.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_zaya.report.errors import ReportError

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8527f", "#b07800", "#2f7f9f", "#6b4fa0", "#5f6b7a")
"""Told apart by people who see colours differently; dark enough on white for thin lines."""
BLUE, RED, GREEN = COLOURS[:3]
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.fonttype": "none",
    "axes.prop_cycle": f"cycler('color', {[colour.lstrip('#') for colour in COLOURS]})",
}
POINTS = 1200
"""More points of a line than this no screen shows."""


def figure(width: float = 10.5, height: float = 3.3) -> Any:
    """Return an empty figure, inches.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("pictures need matplotlib: install the extra `plots`") from None
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made


def styled(draw: Any, *arguments: Any) -> Any:
    """Call a drawing function in this project's style."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ReportError("pictures need matplotlib: install the extra `plots`") from None
    with rc_context(STYLE):
        return draw(*arguments)


def png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, format="png")


def svg(figure: Any, name: str, text: str) -> str:
    """Return a figure as an `<svg>` element for the body of a page: it scales, and ``text`` is what it says.

    Every id in it begins with ``name``, so that many of them live in one page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(href="|url\()#', rf"\1#{name}-", drawn)
    label = html.escape(text, quote=True)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" aria-label="{label}">',
        drawn,
        count=1,
    )


def binned(x: NDArray[np.float64], y: NDArray[np.float64], points: int = POINTS) -> tuple[Any, Any]:
    """Return a line with at most ``points`` points: means over equal numbers of neighbours, gaps left out."""
    seen = np.isfinite(x) & np.isfinite(y)
    x, y = x[seen], y[seen]
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def smooth(y: NDArray[np.float64], share: float = 0.03) -> NDArray[np.float64]:
    """Return the centred moving average over that share of the points; shorter windows at the ends."""
    window = max(1, int(len(y) * share) // 2 * 2 + 1)
    total = np.concatenate([[0.0], np.cumsum(y)])
    half = window // 2
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean: NDArray[np.float64] = (total[high] - total[low]) / (high - low)
    return mean


def legend(axes: Any) -> None:
    """Put the legend above the plot, at the right, where it covers nothing."""
    entries = len(axes.get_legend_handles_labels()[0])  # those without a name are not counted
    if entries:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(entries, 8), borderaxespad=0.2)


def count(number: int, word: str) -> str:
    """Return `1 step`, `2 steps`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """Return a number in a few characters: 950, 12.3k, 4.56M, 1.2B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def big_numbers(axis: Any) -> None:
    """Label an axis with short numbers."""
    axis.set_major_formatter(lambda value, _: short(value))
