"""Trains one small GPT from one seed with torch's AdamW, fused and foreach, and with warpstep's.

The text is the source code of Python's standard library. The trainings go on side by side, step by
step on the same batches, so that whatever else the machine does disturbs all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

import warpstep

mpl.use("Agg")
from matplotlib import pyplot as plt

SEED = 1337
LEAST_STEPS = 10
PEAK_LR = 3e-3
COLORS = {"torch fused": "#0969da", "torch foreach": "#8250df", "warpstep": "#d1242f"}


@dataclass(frozen=True)
class Size:
    """How large the model and its batches are."""

    layers: int = 4
    heads: int = 4
    width: int = 64
    context: int = 64
    batch: int = 8


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only transformer over characters, its head tied to its embedding."""

    def __init__(self, size: Size, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) characters to (batch, time, characters) logits of the next."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return linear(self.norm(self.blocks(x)), self.embedding.weight)


class Text:
    """The standard library's source as a tensor of characters, its last tenth for validation."""

    def __init__(self, device: str, files: int | None = None) -> None:
        root = Path(os.__file__).parent
        others = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
        paths = sorted(p for p in root.rglob("*.py") if not others & {*p.relative_to(root).parts})
        paths = paths[:files]
        text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in paths)
        raw = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
        used = torch.bincount(raw, minlength=128) > 0
        codes = (used.cumsum(0) - 1)[raw]
        self.files = len(paths)
        self.characters = used.nonzero().flatten()
        cut = len(codes) * 9 // 10
        self.train, self.val = codes[:cut].to(device), codes[cut:].to(device)

    def batch(self, part: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random passages, and the same one character on."""
        starts = torch.randint(len(part) - size.context, (size.batch, 1), generator=generator)
        at = starts.to(part.device) + torch.arange(size.context, device=part.device)
        return part[at], part[at + 1]

    def decode(self, codes: Tensor) -> str:
        """Characters as text."""
        return bytes(self.characters[codes.cpu()].tolist()).decode("ascii")


@dataclass
class Training:
    """One of the trainings: its model, its optimizer and what it has recorded."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Forward, backward, step. Only the step is timed, with the device awaited around it."""
        loss = self.loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.losses.append(loss.item())
        wait(x.device)
        start = time.perf_counter()
        self.optimizer.step()
        wait(x.device)
        self.step_ms.append((time.perf_counter() - start) * 1e3)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy in nats a character."""
        return cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def validate(self, text: Text, size: Size, batches: int) -> float:
        """The mean loss over passages that no one trained on, the same for every training."""
        generator = torch.Generator().manual_seed(SEED)
        return statistics.fmean(
            self.loss(*text.batch(text.val, size, generator)).item() for _ in range(batches)
        )

    def state_bytes(self) -> int:
        """What the optimizer keeps in memory."""
        tensors = (t for s in self.optimizer.state.values() for t in s.values())
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def start(
    name: str, make: Callable[..., torch.optim.Optimizer], size: Size, text: Text, device: str
) -> Training:
    """A training from the common seed. As usual, only matrices decay."""
    torch.manual_seed(SEED)
    model = GPT(size, len(text.characters)).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Training(name, model, make(groups, lr=PEAK_LR, betas=(0.9, 0.99)))


def lr_at(progress: float) -> float:
    """A linear warm-up over the first twentieth of the training, then linearly down to a tenth."""
    warm = 0.05
    return PEAK_LR * min((progress + 0.001) / warm, 1 - 0.9 * (progress - warm) / (1 - warm))


@torch.no_grad()
def furthest(a: GPT, b: GPT) -> float:
    """The largest difference between two weights, as a part of the largest weight."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    scale = max(float(p.abs().max()) for p, _ in pairs)
    return max(float((p - q).abs().max()) for p, q in pairs) / scale


def differences(trainings: list[Training]) -> list[float]:
    """How far each other training's weights are from the first one's."""
    first, *others = (training.model for training in trainings)
    return [furthest(other, first) for other in others]


@torch.no_grad()
def sample(model: GPT, text: Text, size: Size, characters: int) -> str:
    """What the model writes after `def `."""
    device = text.train.device
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.searchsorted(text.characters, torch.tensor(list(b"def ")))
    tokens = prompt.unsqueeze(0).to(device)
    for _ in range(characters):
        logits = model(tokens[:, -size.context :])[0, -1].float().cpu()
        drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.unsqueeze(0).to(device)], dim=1)
    return text.decode(tokens[0])


def deciles(samples: list[float]) -> tuple[float, float, float]:
    """The 10th percentile, the median and the 90th percentile."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[0], statistics.median(samples), cuts[-1]


def steady(training: Training) -> list[float]:
    """The optimizer's times without the first steps, which allocate the state."""
    return training.step_ms[min(3, len(training.step_ms) // 2) :]


def is_disturbed(trainings: list[Training]) -> bool:
    """Whether someone's median step took over twice its fast ones: on an idle machine none does."""
    return any(median > 2 * low for low, median, _ in map(deciles, map(steady, trainings)))


def plot(trainings: list[Training], path: Path) -> None:
    """The loss curves over each other, and the optimizers' times below each other."""
    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(10, 3.6), width_ratios=(3, 2), layout="constrained"
    )
    window = max(1, len(trainings[0].losses) // 60)
    longest = 0.0
    for training, width in zip(trainings, (6, 3.5, 1.2), strict=True):
        means = torch.tensor(training.losses).unfold(0, window, 1).mean(1)
        steps = range(window, len(training.losses) + 1)
        curves.plot(steps, means, color=COLORS[training.name], linewidth=width)
        low, median, high = statistics.quantiles(steady(training), n=4, method="inclusive")
        longest = max(longest, high)
        spread = [[median - low], [high - median]]
        bars.barh(training.name, median, xerr=spread, color=COLORS[training.name], height=0.6)
        bars.annotate(
            *(f"{median:.3g} ms", (high, training.name), (6, 0)),
            textcoords="offset points",
            va="center",
        )
    curves.set_title("Training loss: three curves, each thinner than the one below it", fontsize=10)
    curves.set(xlabel="step", ylabel="nats a character")
    bars.set_title("One optimizer.step(): median and quartiles", fontsize=10)
    bars.set(xlabel="ms", xlim=(0, 1.3 * longest))
    bars.invert_yaxis()
    bars.tick_params(axis="y", length=0)
    for panel in (curves, bars):
        panel.grid(True, axis="y" if panel is curves else "x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(
    console: Console,
    trainings: list[Training],
    validation: list[float],
    after_first: list[float],
    at_the_end: list[float],
) -> None:
    """The table, and what it means. Differences are those of all but the first from the first."""
    ours = trainings[-1]
    steps = len(ours.losses)
    last = max(1, steps // 20)
    table = Table(title=f"{steps:,} steps from one seed, on the same batches")
    table.add_column("")
    for training in trainings:
        table.add_column(training.name, justify="right", style=COLORS[training.name])
    table.add_row(
        "training loss, last 5%",
        *(f"{statistics.fmean(t.losses[-last:]):.4f}" for t in trainings),
    )
    table.add_row("validation loss", *(f"{loss:.4f}" for loss in validation))
    table.add_row("weights, first step", "", *(f"{far:.0e} away" for far in after_first))
    table.add_row(
        "weights, at the end", "", *(f"{far:.0e} away" for far in at_the_end), end_section=True
    )
    table.add_row("optimizer state", *(f"{t.state_bytes() / 1e6:.2f} MB" for t in trainings))
    medians = [statistics.median(steady(t)) for t in trainings]
    table.add_row("optimizer.step(), median", *(f"{median:.3f} ms" for median in medians))
    ratios = [
        deciles([a / b for a, b in zip(steady(t), steady(ours), strict=True)])
        for t in trainings[:-1]
    ]
    table.add_row("  as long as warpstep's", *(f"[bold]{mid:.2f} x[/]" for _, mid, _ in ratios), "")
    table.add_row("  10% to 90% of steps", *(f"{a:.1f} to {b:.1f}" for a, _, b in ratios), "")
    console.print(table)
    console.print(
        "Weights are so far from torch fused's as a part of the largest one. All three compute the "
        "same formula and round differently in the last bits, and training magnifies that like any "
        "other noise: torch's own foreach shows how far.",
        style="dim",
    )
    (_, ratio, _), *_ = ratios
    if is_disturbed(trainings):
        fast = [deciles(steady(t))[0] for t in trainings]
        told = (
            f"The times of the steps differ so much that their medians say little: is this machine "
            f"busy with something else? In its fastest tenth, warpstep's step takes "
            f"{fast[-1]:.2f} ms at most, and torch's fused one {fast[0]:.2f} ms."
        )
    else:
        told = (
            f"warpstep's step takes {medians[-1]:.2f} ms, and torch's fused one "
            f"{medians[0]:.2f} ms: {ratio:.1f} times as long."
        )
    console.print(
        f"\n[bold]{told} Their validation losses are {validation[-1]:.3f} and "
        f"{validation[0]:.3f}.[/]"
    )


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=on_cuda)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each model")
    parser.add_argument("--seconds", type=float, default=85, help="stop training after so long")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model for 20 steps")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if given.steps < LEAST_STEPS:
        parser.error(f"--steps must be at least {LEAST_STEPS}, not {given.steps}")
    return given


def main() -> None:
    """Trains all, then tells how they compare."""
    given = arguments()
    console = Console(highlight=False)
    size = Size(layers=2, heads=2, width=32, batch=4) if given.quick else Size()
    steps = 20 if given.quick else given.steps
    text = Text(given.device, files=40 if given.quick else None)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")

    fused, foreach = (partial(torch.optim.AdamW, **{kind: True}) for kind in ("fused", "foreach"))
    makers = (fused, foreach, warpstep.AdamW)
    trainings = [
        start(name, make, size, text, given.device)
        for name, make in zip(COLORS, makers, strict=True)
    ]
    *_, ours = trainings
    parameters = list(ours.model.parameters())
    console.print(
        f"Text: {text.files:,} files of the standard library, {len(text.train) / 1e6:.1f} M "
        f"characters to train on, {len(text.characters)} different ones."
    )
    console.print(
        f"Model: {size.layers} layers, width {size.width}, "
        f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters in {len(parameters)} tensors."
    )
    console.print(
        f"Optimizers: torch.optim.AdamW, fused and foreach, and warpstep.AdamW on its "
        f"[bold]{warpstep.status().chosen[str(device)]}[/] backend."
    )

    generator = torch.Generator().manual_seed(SEED)
    first: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=1)
        began = time.monotonic()
        for step in range(steps):
            # A machine too slow or too busy for all the steps is given fewer.
            done = max(step / steps, (time.monotonic() - began) / given.seconds)
            if done >= 1 and step >= LEAST_STEPS:
                break
            x, y = text.batch(text.train, size, generator)
            turn = step % len(trainings)
            for training in trainings[turn:] + trainings[:turn]:
                training.step(x, y, lr_at(done))
            first = first or differences(trainings)
            described = f"step {step + 1}, loss {ours.losses[-1]:.3f}"
            progress.update(task, completed=done, description=described)
        progress.update(task, completed=1)
    if len(ours.losses) < steps:
        console.print(
            f"Time was up after {len(ours.losses):,} of {steps:,} steps: this machine is slow, or "
            "busy with something else, and then times vary."
        )

    validation = [t.validate(text, size, 2 if given.quick else 20) for t in trainings]
    report(console, trainings, validation, first, differences(trainings))
    if not given.quick:
        console.print("\n[bold]The warpstep-trained model writes:[/]")
        console.print(sample(ours.model, text, size, 200), markup=False, style="dim")
    plot(trainings, given.out)
    console.print(f"\nThe plot is in {given.out}.")


if __name__ == "__main__":
    main()
