"""Does low precision train? `make recipes`: two small models, every recipe, several seeds.

Each seed's trainings begin with the same weights and see the same batches. What counts is how near
a recipe's loss stays to float32's of the same seed, not how low it is: an exp_avg_sq that is biased
low acts as a larger learning rate, and looks better.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor, nn

import warpstep
from bench.machine import REPOSITORY
from bench.trained import FLOAT32, RESULTS, SUMMARY

mpl.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(REPOSITORY / "examples"))
import digits_cnn
from train_gpt import GPT, Size, Text

PICTURE = REPOSITORY / "docs" / "images" / "recipes.png"
BF16 = torch.bfloat16
LR = 3e-3
EVERY = 20  # steps between two looks at the validation loss


@dataclass(frozen=True)
class Recipe:
    """An optimizer of weights in `dtype`, and what is asked of it."""

    dtype: torch.dtype
    options: dict[str, Any]
    module: str = "warpstep"
    name: str = "AdamW"

    def make(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer."""
        kind = getattr(importlib.import_module(self.module), self.name)
        made: torch.optim.Optimizer = kind(params, lr=LR, weight_decay=0.1, **self.options)
        return made


RECIPES = {
    FLOAT32: Recipe(torch.float32, {}),
    "all bfloat16, torch's": Recipe(BF16, {"fused": True}, "torch.optim"),
    "master, float32 moments": Recipe(BF16, {"master": "residual"}),
    "master, bfloat16 moments": Recipe(BF16, {"master": "residual", "state_dtype": BF16}),
    "master, 8-bit moments": Recipe(BF16, {"master": "residual", "state_dtype": "8bit"}),
    "stochastic, bfloat16 moments": Recipe(BF16, {"rounding": "stochastic"}),
    "stochastic, 8-bit moments": Recipe(BF16, {"rounding": "stochastic", "state_dtype": "8bit"}),
    "float32, 8-bit moments": Recipe(torch.float32, {"state_dtype": "8bit"}),
    "float32, bitsandbytes' 8 bits": Recipe(torch.float32, {}, "bitsandbytes.optim", "AdamW8bit"),
    "float32, torchao's 8 bits": Recipe(torch.float32, {}, "torchao.optim", "AdamW8bit"),
}


def installed() -> dict[str, Recipe]:
    """Those whose library is here."""
    tops = {name: recipe.module.split(".")[0] for name, recipe in RECIPES.items()}
    return {n: r for n, r in RECIPES.items() if importlib.util.find_spec(tops[n]) is not None}


Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """A model and its data."""

    model: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    validation: Batch


def gpt() -> Task:
    """The demo's GPT, over characters."""
    size, text = Size(layers=2), Text("cpu")
    generator = torch.Generator().manual_seed(0)
    validation = text.batch(text.val, Size(batch=64), generator)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield text.batch(text.train, size, generator)

    return Task(lambda: GPT(size, len(text.characters)), batches, validation)


def digits() -> Task:
    """The example's convolutional net on scikit-learn's digits, 8 x 8 pixels."""
    images, labels = digits_cnn.digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:360], order[360:]

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            at = kept[torch.randint(len(kept), (32,), generator=generator)]
            yield images[at], labels[at]

    return Task(digits_cnn.CNN, batches, (images[held], labels[held]))


TASKS = {"gpt": gpt, "digits": digits}


def loss_of(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Cross-entropy, of logits in float32."""
    x, y = batch
    logits = model(x.to(dtype) if x.is_floating_point() else x).float()
    return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def train(task: Task, recipe: Recipe, seed: int, steps: int) -> list[dict[str, float]]:
    """The validation losses on the way; the last one with what the state takes and a step costs."""
    torch.manual_seed(seed)
    exact = task.model()
    model = copy.deepcopy(exact).to(recipe.dtype)
    optimizer = recipe.make(list(model.parameters()))
    if "master" in recipe.options:  # from the float32 weights, not from their bfloat16
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        optimizer.set_master_parameters({p: q.detach() for p, q in pairs})  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    rows, taken = [], 0.0
    for step, batch in zip(range(1, steps + 1), task.batches(generator), strict=False):
        loss = loss_of(model, batch, recipe.dtype)
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        taken += time.perf_counter() - start
        if step % EVERY == 0:
            with torch.no_grad():
                validation = loss_of(model, task.validation, recipe.dtype).item()
            rows.append({"step": step, "loss": validation})
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    elements = sum(p.numel() for p in model.parameters())
    rows[-1]["state_bytes"] = sum(bytes_of(t) for t in state if t.dim() > 0) / elements
    rows[-1]["step_ms"] = 1e3 * taken / steps
    return rows


def bytes_of(tensor: Tensor) -> int:
    """What a tensor takes; one that is made of others, as torchao's are, takes what these take."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)


def measure(tasks: list[str], seeds: int, steps: int) -> pd.DataFrame:
    """Every training, with a progress bar."""
    made, recipes = {name: TASKS[name]() for name in tasks}, installed()
    runs = [(t, r, s) for t in tasks for s in range(seeds) for r in recipes]
    rows = []
    for name, recipe, seed in track(runs, description="Training"):
        about = {"task": name, "recipe": recipe, "seed": seed}
        rows += [{**about, **row} for row in train(made[name], recipes[recipe], seed, steps)]
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a task and recipe: the last loss with its spread over the seeds, and how far the curve
    is from float32's of the same seed, beside how far float32's seeds are from their mean.
    """
    keys = ["task", "seed", "step"]
    exact = rows[rows["recipe"] == FLOAT32].set_index(keys)["loss"]
    rows = rows.join(exact.rename("exact"), on=keys)
    rows["off"] = rows["loss"] - rows["exact"]
    mean = rows.groupby(["task", "recipe", "step"])["loss"].transform("mean")
    rows["spread"] = rows["loss"] - mean
    lines = []
    for (task, recipe), of_one in rows.groupby(["task", "recipe"], sort=False):
        last = of_one[of_one["step"] == of_one["step"].max()]
        lines.append(
            {
                "task": task,
                "recipe": recipe,
                "loss": last["loss"].mean(),
                "std": last["loss"].std(),
                "off_float32": of_one["off"].mean(),
                "off_float32_abs": of_one["off"].abs().mean(),
                "seeds_abs": of_one["spread"].abs().mean(),
                "state_bytes": last["state_bytes"].mean(),
                "step_ms": last["step_ms"].median(),
            }
        )
    return pd.DataFrame(lines)


def plot(rows: pd.DataFrame, path: Path) -> None:
    """How far each recipe's curve is from float32's, in the mean of the seeds."""
    tasks = list(rows["task"].unique())
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(6 * len(tasks), 5), squeeze=False, layout="constrained"
    )
    keys = ["task", "seed", "step"]
    exact = rows[rows["recipe"] == FLOAT32].set_index(keys)["loss"].rename("exact")
    rows = rows.join(exact, on=keys)
    for panel, task in zip(panels[0], tasks, strict=True):
        for recipe, of_one in rows[rows["task"] == task].groupby("recipe", sort=False):
            if recipe != FLOAT32:
                off = (of_one["loss"] - of_one["exact"]).groupby(of_one["step"]).mean()
                panel.plot(off.index, off, label=recipe, linewidth=1.4)
        panel.axhline(0, color="#1f2328", linewidth=0.8)
        of_task = rows[(rows["task"] == task) & (rows["recipe"] == FLOAT32)]
        by_step = of_task.groupby("step")["loss"]
        apart = (of_task["loss"] - by_step.transform("mean")).abs().groupby(of_task["step"]).mean()
        label = "float32's seeds from their mean"
        panel.fill_between(apart.index, -apart, apart, color="#1f2328", alpha=0.08, label=label)
        panel.set(title=task, xlabel="step", ylabel="validation loss less float32's, same seed")
        panel.grid(True, alpha=0.25)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def main() -> None:
    """Trains, writes curves.csv, summary.csv and a picture, prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", choices=TASKS, action="append", help="some tasks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for models this small more only wait for each other
    rows = measure(arguments.only or list(TASKS), arguments.seeds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(arguments.out / "curves.csv", index=False, float_format="%.6g")
    table = summary(rows)
    table.to_csv(arguments.out / SUMMARY, index=False, float_format="%.6g")
    plot(rows, PICTURE if arguments.out == RESULTS else arguments.out / "curves.png")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    print(f"warpstep {warpstep.__version__}; written to {arguments.out}")


if __name__ == "__main__":
    main()
