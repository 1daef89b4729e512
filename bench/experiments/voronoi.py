"""Which decoupled decay? Nets that learn a partition of the plane, with the forms of decay.

Yu, The effect of AdamW decoupled weight decay regularization on model structures, 2022.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.experiments.methods import PACKAGES, Method, beside_torch
from bench.experiments.runs import FULL, Budget, Run, Study
from bench.tables import table

mpl.use("Agg")
from matplotlib import pyplot as plt

ENVIRONMENT_SEED = 42
POINTS = 10_000  # each for evaluation and test
EVALUATIONS = 20
CENTRES = 1024  # of the model; the environment has 100 to 150
SCALE = 10.0
FORMS = {"L2": "decoupled", "L1": "l1", "min": "min", "L1+L2": "l1l2"}
STRENGTHS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
BETA1, BETA2 = (0.85, 0.9, 0.95), (0.98, 0.99, 0.995)
LRS = (2e-3, 3e-3, 5e-3)
PUBLISHED_SIZE, SMALL, OF_CENTRES = (
    {"model": "final", "width": 512, "batch": 1024, "steps": 10_000},
    {"model": "final", "width": 256, "batch": 256, "steps": 4_000},
    {"model": "centres", "width": CENTRES, "batch": 32, "steps": 10_000, "lr": 1e-2},
)
USUAL = {"form": "L2", "lr": 3e-3, "weight_decay": 1e-2, "beta1": 0.9, "beta2": 0.99}
PUBLISHED = {"final": {"L2": 77.0}, "centres": {"L2": 86.46, "L1": 87.72, "L1+L2": 87.15}}
STEP_SECONDS = {512: 47e-3, 256: 4e-3, CENTRES: 1e-3}
PAIR = ["model", "width", "form", "lr", "weight_decay", "beta1", "beta2", "seed"]


class Environment:
    """Points of [-100, 100]^2 and the labels of their regions."""

    def __init__(self, seed: int = ENVIRONMENT_SEED) -> None:
        generator = torch.Generator().manual_seed(seed)
        number = int(torch.randint(100, 151, (), generator=generator))
        centres = 200 * torch.rand(number, 2, generator=generator) - 100
        self.directions = (centres / centres.square().sum(1, keepdim=True)).T
        self.labels = torch.randint(2, (number,), generator=generator)

    def label(self, points: Tensor) -> Tensor:
        """That of argmin_c (x.c / |c|^2 - 1)^2."""
        return self.labels[(points @ self.directions - 1).square().argmin(1)]

    def draw(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """So many points, uniform, and their labels."""
        points = 200 * torch.rand(number, 2, generator=generator) - 100
        return points, self.label(points)


class Dense(nn.Module):
    """A scale for each dimension, a linear layer, ReLU and another; no biases."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(inputs))
        self.up = nn.Linear(inputs, hidden, bias=False)
        self.down = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) to (batch, outputs)."""
        return self.down(torch.relu(self.up(self.scale * x)))


class Final(nn.Module):
    """The study's final model: two Dense with a softmax of scaled numbers between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Dense(2, width, width), Dense(width, width, 2)
        self.middle = nn.Parameter(torch.ones(width))
        self.last = nn.Parameter(torch.ones(2))

    def forward(self, points: Tensor) -> Tensor:
        """(batch, 2) points to (batch, 2) logits."""
        chosen = torch.softmax(self.middle * self.first(points / 100), dim=1)
        return self.last * self.second(chosen)


class Centres(nn.Module):
    """A softmax over learned centres of -scale * |x.C / |C|^2 - offset|, on their learned labels.

    The published formula has pm * ReLU(.) in place of |.|. Which of both signs pm stands for is not
    told; here it is both, for their sum is what the environment's square depends on.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(200 * torch.rand(number, 2) - 100)
        self.offset = nn.Parameter(torch.ones(number))
        self.scale = nn.Parameter(torch.full((number,), SCALE))
        self.labels = nn.Parameter(torch.randn(number, 2))

    def forward(self, points: Tensor) -> Tensor:
        """(batch, 2) points to (batch, 2) logits."""
        directions = self.centres / self.centres.square().sum(1, keepdim=True)
        distance = (points @ directions.T - self.offset).abs()
        return torch.softmax(-self.scale * distance, dim=1) @ self.labels


MODELS = {"final": Final, "centres": Centres}


def runs(budget: Budget, data: str) -> list[Run]:
    """The baseline in its published size; all that is compared, on smaller nets."""
    if data != "digits":  # the points are made, whatever the pictures are
        return []
    changes: list[dict[str, Any]] = [{}]  # of the small final model
    changes += [{"form": form} for form in FORMS]
    changes += [{"weight_decay": decay} for decay in STRENGTHS]
    changes += [{"beta1": a, "beta2": b} for a in BETA1 for b in BETA2]
    changes += [{"lr": lr} for lr in LRS]
    asked = [(SMALL | change, budget.seeds, PACKAGES[0]) for change in changes]
    asked += [(SMALL, budget.seeds, PACKAGES[1])]
    asked += [(PUBLISHED_SIZE, min(2, budget.seeds), PACKAGES[0])]
    seeds = 5 if budget.seeds == FULL.seeds else budget.seeds
    asked += [(OF_CENTRES | {"form": form}, seeds, PACKAGES[0]) for form in FORMS]
    found: list[Run] = []
    for about, number, package in asked:
        run: Run = USUAL | about | {"package": package, "steps": budget.steps(about["steps"])}
        found += [
            run | {"seed": seed} for seed in range(number) if run | {"seed": seed} not in found
        ]
    return found


@functools.cache
def environment() -> tuple[Environment, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The partition, the points for evaluation and those for the test."""
    made, generator = Environment(), torch.Generator().manual_seed(0)
    return made, made.draw(POINTS, generator), made.draw(POINTS, generator)


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """In percent; logits that are not numbers are all wrong."""
    points, labels = part
    logits = torch.cat([model(some) for some in points.split(1000)])
    right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
    return 100 * right.double().mean().item()


def train_one(run: Run) -> dict[str, float]:
    """The test accuracy where that of the evaluation was best on the way, and the last one."""
    seed, steps = int(run["seed"]), int(run["steps"])
    made, evaluation, test = environment()
    torch.manual_seed(seed)
    model = MODELS[str(run["model"])](int(run["width"]))
    form = FORMS[str(run["form"])]
    optimizer = Method("AdamW", {}, None if form == "decoupled" else form).make(
        list(model.parameters()),
        str(run["package"]),
        lr=run["lr"],
        weight_decay=run["weight_decay"],
        betas=(run["beta1"], run["beta2"]),
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    best = found = -1.0
    for step in range(1, steps + 1):
        points, labels = made.draw(int(run["batch"]), generator)
        optimizer.zero_grad()
        cross_entropy(model(points), labels).backward()
        optimizer.step()
        if step % max(1, steps // EVALUATIONS) == 0 and (now := accuracy(model, evaluation)) > best:
            best, found = now, accuracy(model, test)
    return {"test_error": 100 - found, "last_error": 100 - accuracy(model, test)}


def seconds(run: Run) -> float:
    """About what a run takes."""
    return STEP_SECONDS[int(run["width"])] * float(run["steps"])


def which(rows: pd.DataFrame, size: dict[str, Any], **change: Any) -> pd.Series:
    """The test accuracies of a size with the usual values but for a change, warpstep's."""
    wanted = {**USUAL, **size, **change}
    del wanted["steps"]
    is_one = rows["package"] == PACKAGES[0]
    for key, value in wanted.items():
        is_one &= rows[key] == value
    return 100 - rows[is_one].sort_values("seed")["test_error"].reset_index(drop=True)


def cell(accuracies: pd.Series) -> str:
    """Mean and standard deviation."""
    if accuracies.empty:
        return ""
    spread = f" ± {accuracies.std():.1f}" if len(accuracies) > 1 else ""
    return f"{accuracies.mean():.1f}%{spread}"


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """The baseline, the forms, what a form does beyond L2 with the same seeds, strengths, betas."""
    texts = {}
    lines = [
        [name, f"{s['width']:,}", f"{s['batch']:,}", f"{s['steps']:,}", cell(which(rows, s)), told]
        for name, s, told in (
            ("final, as published", PUBLISHED_SIZE, "77%"),
            ("final, small", SMALL, ""),
            ("centres", OF_CENTRES, "86.46%"),
        )
    ]
    header = ["Model", "width or centres", "batch", "steps", "test accuracy", "published"]
    texts["voronoi-baseline"] = table(header, lines)
    lines = []
    for form in FORMS:
        line = [form]
        for size in (SMALL, OF_CENTRES):
            ours, l2 = (which(rows, size, form=f) for f in (form, "L2"))
            off = (ours - l2).dropna()
            spread = f" ± {off.std():.1f}" if len(off) > 1 else ""
            line += [cell(ours), f"{off.mean():+.1f}{spread}" if form != "L2" and len(off) else ""]
        told = PUBLISHED["centres"].get(form)
        lines.append([*line, f"{told:.2f}%" if told else ""])
    header = ["Decay", "final, small", "less L2, same seed", "centres", "less L2, same seed"]
    texts["voronoi-forms"] = table([*header, "published, centres"], lines)
    line = [cell(which(rows, SMALL, weight_decay=s)) for s in STRENGTHS]
    header = [f"{s:g}" for s in STRENGTHS]
    texts["voronoi-strengths"] = table(["Weight decay", *header], [["test accuracy", *line]])
    line = [cell(which(rows, SMALL, lr=lr)) for lr in LRS]
    texts["voronoi-lr"] = table(
        ["Learning rate", *(f"{lr:g}" for lr in LRS)], [["test accuracy", *line]]
    )
    header = ["beta1 \\ beta2", *(f"{b:g}" for b in BETA2)]
    lines = [
        [f"{a:g}", *(cell(which(rows, SMALL, beta1=a, beta2=b)) for b in BETA2)] for a in BETA1
    ]
    texts["voronoi-betas"] = table(header, lines)
    texts["voronoi-torch"] = beside_torch(rows, PAIR)
    return texts


def dots(panel: Any, place: float, accuracies: pd.Series) -> None:
    """A dot a seed and a bar for the mean, with its number."""
    if accuracies.empty:
        return
    panel.plot([place] * len(accuracies), accuracies, "o", color="#0969da", alpha=0.5, ms=5)
    panel.plot(place, accuracies.mean(), "_", color="#d1242f", ms=18, mew=2)
    at = (place, accuracies.mean())
    text = f"{accuracies.mean():.1f}"
    panel.annotate(text, at, (12, 0), textcoords="offset points", fontsize=8, va="center")


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Forms on both models with the published values, strengths, betas."""
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for panel, size, title in zip(
        panels,
        (SMALL, OF_CENTRES),
        ("Decay, small final model", "Decay, centres model"),
        strict=False,
    ):
        for place, form in enumerate(FORMS):
            dots(panel, place, which(rows, size, form=form))
            told = PUBLISHED["centres"].get(form) if size is OF_CENTRES else None
            if told:
                panel.plot(place, told, "x", color="#6e7781", ms=6)
        panel.set_xticks(range(len(FORMS)), list(FORMS))
        panel.set_title(title + (" (x: published)" if size is OF_CENTRES else ""), fontsize=10)
    for place, strength in enumerate(STRENGTHS):
        dots(panels[2], place, which(rows, SMALL, weight_decay=strength))
    panels[2].set_xticks(range(len(STRENGTHS)), [f"{s:g}" for s in STRENGTHS])
    panels[2].set_title("Weight decay, L2", fontsize=10)
    betas = [(a, b) for a in BETA1 for b in BETA2]
    for place, (a, b) in enumerate(betas):
        dots(panels[3], place, which(rows, SMALL, beta1=a, beta2=b))
    panels[3].set_xticks(range(len(betas)), [f"{a:g}\n{b:g}" for a, b in betas], fontsize=7)
    panels[3].set_title("beta1 above beta2", fontsize=10)
    for panel in panels:
        panel.set_ylabel("test accuracy, %")
        panel.margins(x=0.15, y=0.15)
        panel.grid(True, axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


STUDY = Study("voronoi", runs, train_one, seconds, tables, plot)
