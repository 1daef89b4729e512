"""Are learning rate and weight decay independent? Their test loss over a grid of both.

Loshchilov and Hutter, Decoupled Weight Decay Regularization (https://arxiv.org/abs/1711.05101),
figures 1 and 2: with L2 the good basin lies on a diagonal, decoupled along the axes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from torch.optim.lr_scheduler import CosineAnnealingLR

from bench.experiments.methods import METHODS
from bench.experiments.pictures import judged, pictures, train
from bench.experiments.runs import Budget, Run, Study
from bench.tables import table

mpl.use("Agg")
from matplotlib import pyplot as plt

STEPS = {"digits": 800, "cifar10": 7000}
STEP_SECONDS = {"digits": 1.4e-3, "cifar10": 40e-3}
# Powers of ten that the axes begin with: lr goes on in quarters, decay in thirds. A coarse trial
# showed where the basins are; they lie inside.
LR = {"SGD": -2.5, "Adam": -3.5}
DECAY = {
    "SGD with L2": -4.0,
    "SGDW": -3.0,
    "SGDW, independent": -4.5,
    "Adam with L2": -4.0,
    "AdamW": -2.0,
    "AdamW, independent": -4.5,
}
SIDE = 10
GOOD = 0.1  # the share of the cells that are called the basin


def axes(method: str) -> tuple[list[float], list[float]]:
    """The learning rates and decays of a method's map."""
    lr, decay = LR["SGD" if method.startswith("SGD") else "Adam"], DECAY[method]
    return (
        [float(f"{10 ** (lr + i / 4):.3g}") for i in range(SIDE)],
        [float(f"{10 ** (decay + i / 3):.3g}") for i in range(SIDE)],
    )


def runs(budget: Budget, data: str) -> list[Run]:
    """Every cell of every map, with every seed."""
    found: list[Run] = []
    for method in DECAY:
        lrs, decays = (budget.thinned(axis) for axis in axes(method))
        found += [
            {
                "data": data,
                "method": method,
                "lr": lr,
                "weight_decay": decay,
                "steps": budget.steps(STEPS[data]),
                "seed": seed,
            }
            for lr in lrs
            for decay in decays
            for seed in range(budget.seeds)
        ]
    return found


def train_one(run: Run) -> dict[str, float]:
    """A training with a cosine schedule, as the paper's."""
    seed, steps = int(run["seed"]), int(run["steps"])
    data, method = pictures(str(run["data"]), seed), METHODS[str(run["method"])]
    model = train(
        data,
        lambda params: method.make(params, lr=run["lr"], weight_decay=run["weight_decay"]),
        lambda optimizer: CosineAnnealingLR(optimizer, steps),
        steps,
        seed,
    )
    return judged(model, "test", data.test)


def seconds(run: Run) -> float:
    """About what a run takes."""
    return STEP_SECONDS[str(run["data"])] * float(run["steps"])


def grid(rows: pd.DataFrame, column: str = "test_loss") -> pd.DataFrame:
    """The mean over the seeds, a row a decay and a column a learning rate. Of losses the logarithm
    is averaged: diverged ones would outweigh all others.
    """
    values = np.log(rows[column]) if column == "test_loss" else rows[column]
    means = values.groupby([rows["weight_decay"], rows["lr"]]).mean().unstack("lr")
    return np.exp(means) if column == "test_loss" else means


def correlation(x: pd.Series, y: pd.Series) -> float:
    """Pearson's; 0 where one does not vary, for then it does not depend on the other."""
    return 0.0 if x.nunique() < 2 or y.nunique() < 2 else float(x.corr(y))


def alignment(losses: pd.DataFrame) -> dict[str, float]:
    """How far the best value of one axis depends on the other: 0 is aligned with the axes, -1 a
    falling diagonal.

    `rows` is Spearman's rank correlation of each decay's best lr with the decay, `columns` that of
    each lr's best decay with the lr, `basin` Pearson's of log lr and log decay over the best tenth
    of all cells. `in_turn` is the loss that is found by choosing the best lr at the smallest decay
    and then the best decay at that lr, over the least of all.
    """
    best_lr, best_decay = losses.idxmin(axis=1), losses.idxmin(axis=0)
    cells = losses.stack().sort_values()
    basin = cells.index[: max(3, round(GOOD * len(cells)))].to_frame(index=False)
    lr = losses.iloc[0].idxmin()
    return {
        "rows": correlation(best_lr.rank(), pd.Series(best_lr.index, best_lr.index).rank()),
        "columns": correlation(
            best_decay.rank(), pd.Series(best_decay.index, best_decay.index).rank()
        ),
        "basin": correlation(np.log(basin["lr"]), np.log(basin["weight_decay"])),
        "in_turn": losses[lr].min() / losses.min(axis=None),
    }


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """A line a method: the best cell, and how its map is aligned; in brackets the seeds' range."""
    lines = []
    for method in DECAY:
        of_one = rows[rows["method"] == method]
        if of_one.empty:
            continue
        losses, errors = grid(of_one), grid(of_one, "test_error")
        decay, lr = losses.stack().idxmin()
        whole = alignment(losses)
        seeds = pd.DataFrame([alignment(grid(part)) for _, part in of_one.groupby("seed")])
        cells = [
            f"{whole[k]:+.2f} <sub>{seeds[k].min():+.2f} to {seeds[k].max():+.2f}</sub>"
            for k in ("rows", "columns", "basin")
        ]
        best = [f"{lr:.2g}", f"{decay:.2g}", f"{losses.min(axis=None):.3f}"]
        in_turn = f"{100 * (whole['in_turn'] - 1):.0f}%"
        lines.append([method, *best, f"{errors.loc[decay, lr]:.1f}%", *cells, in_turn])
    header = ["Method", "best lr", "best decay", "its test loss", "its error"]
    header += ["best lr with decay", "best decay with lr", "within the basin", "tuned in turn"]
    return {"decay-maps": table(header, lines)}


def plot(rows: pd.DataFrame, path: Path) -> None:
    """The maps; a dot marks each decay's best lr, contours the best tenth of the cells."""
    figure, panels = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
    least, most = rows["test_loss"].quantile([0.0, 1.0])
    shades = mpl.colors.LogNorm(least, min(most, np.log(10)))
    for panel, method in zip(panels.flat, DECAY, strict=True):
        of_one = rows[rows["method"] == method]
        panel.set_title(method, fontsize=10)
        if of_one.empty:
            continue
        losses = grid(of_one)
        x, y = (np.array(axis, dtype=float) for axis in (losses.columns, losses.index))
        image = panel.pcolormesh(x, y, losses, norm=shades, cmap="viridis_r", shading="nearest")
        level = losses.stack().nsmallest(max(3, round(GOOD * losses.size))).iloc[-1]
        if min(losses.shape) > 1:
            panel.contour(x, y, losses, levels=[level], colors="#d1242f", linewidths=1.2)
        panel.plot(losses.idxmin(axis=1), y, "o", color="white", mec="#1f2328", ms=4.5)
        decay, lr = losses.stack().idxmin()
        label = f"{losses.loc[decay, lr]:.3f}"
        panel.annotate(label, (lr, decay), (6, 5), textcoords="offset points", fontsize=8)
        panel.set(xscale="log", yscale="log")
    for panel in panels[-1]:
        panel.set_xlabel("learning rate")
    for panel in panels[:, 0]:
        panel.set_ylabel("weight decay")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, label="test loss, mean of the seeds")
    bar.ax.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%.2g"))
    bar.ax.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.2g"))
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


STUDY = Study("decay-maps", runs, train_one, seconds, tables, plot)
