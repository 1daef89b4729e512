"""The plots of measured steps, each for light pages and for dark ones: lines with their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from bench.competitors import BASELINE, OURS
from bench.tables import Results

mpl.use("Agg")  # Before pyplot, which would look for a screen.
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

LABEL_POINTS = 11  # the least distance between two labels, in points


@dataclass(frozen=True)
class Theme:
    """The colours of a page, and of the lines that are to be seen on it."""

    suffix: str
    page: str
    text: str
    faint: str
    lines: dict[str, str]


THEMES = (
    Theme(
        *("", "#ffffff", "#1f2328", "#d1d9e0"),
        {OURS: "#cf222e", BASELINE: "#0969da", "torch-foreach": "#8250df"},
    ),
    Theme(
        *("-dark", "#0d1117", "#f0f6fc", "#3d444d"),
        {OURS: "#ff7b72", BASELINE: "#58a6ff", "torch-foreach": "#bc8cff"},
    ),
)
NAMES = {
    OURS: "warpstep",
    BASELINE: "torch, fused",
    "torch-foreach": "torch, foreach",
    "torch-forloop": "torch, for-loop",
}
Draw = Callable[[Any, pd.DataFrame, Theme], None]


def figures(results: list[Results], family: str, draw: Draw, path: Path) -> None:
    """One plot with a panel for each machine that measured `family`, in every theme: `path`, and
    beside it its twin for dark pages. Nothing where no machine has.
    """
    measured = [(r.rows["family"] == family) & r.rows["step_us"].notna() for r in results]
    shown = [(r, r.rows[rows]) for r, rows in zip(results, measured, strict=True) if rows.any()]
    for theme in THEMES if shown else ():
        settings = dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.page)
        for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
            settings[key] = theme.text
        settings |= {"axes.edgecolor": theme.faint, "grid.color": theme.faint}
        with plt.rc_context(settings):
            size = (6.6 * len(shown), 3.9)
            figure, panels = plt.subplots(1, len(shown), figsize=size, squeeze=False)
            figure.set_layout_engine("constrained")
            for panel, (r, rows) in zip(panels[0], shown, strict=True):
                panel.spines[["top", "right"]].set_visible(False)
                panel.grid(True, linewidth=0.6, alpha=0.6)
                about = f"{r.title}, torch {r.machine['torch']}, {r.machine['date']}"
                panel.set_title(about, fontsize=9, loc="left")
                draw(panel, rows, theme)
            name = path.with_stem(path.stem + theme.suffix)
            figure.savefig(name, dpi=140, metadata={"Software": None})
            plt.close(figure)


End = tuple[float, float, str, str]  # of a line: where it is, its name and its colour


def lines(panel: Any, rows: pd.DataFrame, x: str, y: str, theme: Theme) -> list[End]:
    """One line a competitor; where they end."""
    ends = []
    for competitor, name in NAMES.items():
        of_one = rows[rows["competitor"] == competitor].sort_values(x)
        if of_one.empty:
            continue
        color, width = theme.lines.get(competitor, theme.text), 2.4 if competitor == OURS else 1.5
        panel.plot(of_one[x], of_one[y], "o-", markersize=3.5, linewidth=width, color=color)
        ends.append((of_one[x].iloc[-1], of_one[y].iloc[-1], name, color))
    return ends


def label(panel: Any, ends: list[End]) -> None:
    """Names beside points, moved up or down until none is over another. Scales must be set."""
    panel.autoscale_view()
    points_a_pixel = 72 / panel.figure.dpi
    lowest = float("-inf")
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        at = panel.transData.transform((x, y))[1] * points_a_pixel
        lowest = max(at, lowest + LABEL_POINTS)
        panel.annotate(
            *(name, (x, y), (7, lowest - at)),
            textcoords="offset points",
            **{"color": color, "va": "center", "annotation_clip": False},
        )


def draw_tensors(panel: Any, rows: pd.DataFrame, theme: Theme) -> None:
    """Step time against the number of tensors."""
    panel.set(xscale="log", yscale="log", xlabel="tensors of 1,024 float32 each")
    panel.set_ylabel("one step, ms")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    label(panel, lines(panel, rows.assign(ms=rows["step_us"] / 1e3), "tensors", "ms", theme))


def draw_bandwidth(panel: Any, rows: pd.DataFrame, theme: Theme) -> None:
    """Bandwidth against size, with what the copy loop reached where no cache holds the tensor."""
    panel.set_xscale("log", base=2)
    panel.set(xlabel="elements of one float32 tensor", ylabel="GB/s")
    copy = rows[(rows["competitor"] == OURS) & rows["is_memory_bound"]].sort_values("elements")
    panel.plot(copy["elements"], copy["copy_gb_s"], "--", color=theme.text, linewidth=1.2)
    ends = [(e, gb_s, "a copy", theme.text) for e, gb_s in copy[["elements", "copy_gb_s"]].values]
    panel.set_ylim(0, 1.05 * rows[["gb_s", "copy_gb_s"]].max().max())
    label(panel, lines(panel, rows, "elements", "gb_s", theme) + ends[-1:])
