"""Does AdamW let super-convergence happen? 1cycle with four optimizers, and five times the steps.

fast.ai, AdamW and super-convergence is now the fastest way to train neural nets
(https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from torch.optim.lr_scheduler import OneCycleLR

from bench.experiments.methods import METHODS, PACKAGES, beside_torch
from bench.experiments.pictures import judged, pictures, train
from bench.experiments.runs import FULL, Budget, Run, Study
from bench.tables import table

mpl.use("Agg")
from matplotlib import pyplot as plt

STEPS = {"digits": 150, "cifar10": 21_000}  # on CIFAR-10, 30 epochs
LONGER = 5
STEP_SECONDS = {"digits": 1.6e-3, "cifar10": 40e-3}
SEEDS = 5
BETAS = {"betas": (0.95, 0.99)}  # the schedule moves the first one: 0.95, 0.85, 0.95
COUPLED, DECOUPLED = (1e-6, 1e-4, 1e-3, 1e-2), (1e-2, 0.1, 0.3, 1.0)
GRIDS = {
    "AdamW": ((1e-3, 3e-3, 1e-2, 3e-2), DECOUPLED),
    "Adam with L2": ((1e-3, 3e-3, 1e-2, 3e-2), COUPLED),
    "AdamW with amsgrad": ((1e-3, 3e-3, 1e-2, 3e-2), DECOUPLED),
    "SGD with L2": ((0.03, 0.1, 0.3, 1.0), COUPLED),
}


def runs(budget: Budget, data: str) -> list[Run]:
    """Every lr and decay with every seed; torch's beside warpstep's with the first seed."""
    seeds = SEEDS if budget.seeds == FULL.seeds else budget.seeds
    return [
        {
            "data": data,
            "method": method,
            "package": package,
            "lr": lr,
            "weight_decay": decay,
            "steps": longer * budget.steps(STEPS[data]),
            "longer": longer,
            "seed": seed,
        }
        for method, (lrs, decays) in GRIDS.items()
        for lr in budget.thinned(lrs)
        for decay in budget.thinned(decays)
        for longer in (1, LONGER)
        for package in PACKAGES
        for seed in range(seeds if package == PACKAGES[0] else 1)
    ]


def train_one(run: Run) -> dict[str, float]:
    """The lr rises for half of the steps and falls again, momentum or beta1 against it."""
    seed, steps = int(run["seed"]), int(run["steps"])
    data, method = pictures(str(run["data"]), seed), METHODS[str(run["method"])]
    numbers = {"lr": run["lr"], "weight_decay": run["weight_decay"]}
    if method.name != "SGD":
        numbers |= BETAS
    model = train(
        data,
        lambda params: method.make(params, str(run["package"]), **numbers),
        lambda optimizer: OneCycleLR(optimizer, float(run["lr"]), steps, pct_start=0.5),
        steps,
        seed,
    )
    return judged(model, "validation", data.validation) | judged(model, "test", data.test)


def seconds(run: Run) -> float:
    """About what a run takes."""
    return STEP_SECONDS[str(run["data"])] * float(run["steps"])


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method's best lr and decay, by the validation loss and for each budget."""
    keys = ["method", "longer", "lr", "weight_decay"]
    ours = rows[rows["package"] == PACKAGES[0]]
    means = ours.groupby(keys)["validation_loss"].mean()
    best = means.groupby(["method", "longer"]).idxmin()
    return ours[ours.set_index(keys).index.isin(best)]


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """A line a method and budget, and one of how far torch's trainings are from warpstep's."""
    best, lines = chosen(rows), []
    for longer in (1, LONGER):
        for method in GRIDS:
            one = best[(best["method"] == method) & (best["longer"] == longer)]
            if one.empty:
                continue
            first, accuracy = one.iloc[0], 100 - one["test_error"]
            spread = f" ± {accuracy.std():.2f}" if len(one) > 1 else ""
            lines.append(
                [
                    method,
                    f"{first['steps']:,}",
                    f"{first['lr']:.2g}",
                    f"{first['weight_decay']:.2g}",
                    f"{accuracy.mean():.2f}%{spread}",
                    f"{one['test_loss'].mean():.3f}",
                ]
            )
    header = ["Method", "steps", "best maximum lr", "best decay", "test accuracy", "test loss"]
    return {
        "one-cycle": table(header, lines),
        "one-cycle-torch": beside_torch(rows, ["method", "lr", "weight_decay", "steps", "seed"]),
    }


def plot(rows: pd.DataFrame, path: Path) -> None:
    """The chosen trainings' accuracies, a dot a seed and a bar for the mean."""
    best = chosen(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, layout="constrained")
    for panel, longer in zip(panels, (1, LONGER), strict=True):
        of_one = best[best["longer"] == longer]
        for place, method in enumerate(reversed(GRIDS)):
            accuracy = 100 - of_one[of_one["method"] == method]["test_error"]
            if accuracy.empty:
                continue
            panel.plot(accuracy, [place] * len(accuracy), "o", color="#0969da", alpha=0.5, ms=5)
            panel.plot(accuracy.mean(), place, "|", color="#d1242f", ms=18, mew=2)
            panel.annotate(
                f"{accuracy.mean():.1f}",
                (accuracy.mean(), place),
                (0, 12),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        steps = of_one["steps"].iloc[0] if len(of_one) else 0
        panel.set(title=f"{steps:,} steps", xlabel="test accuracy, %", ylim=(-0.5, 3.7))
        panel.set_yticks(range(len(GRIDS)), list(reversed(GRIDS)))
        panel.grid(True, axis="x", alpha=0.25)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[1].set_yticklabels([])
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


STUDY = Study("one-cycle", runs, train_one, seconds, tables, plot)
