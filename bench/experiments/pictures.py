"""The data of the studies with pictures: scikit-learn's digits, or CIFAR-10 from a given folder."""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.machine import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))
import digits_cnn

DIGITS, CIFAR10 = "digits", "cifar10"
# Of the digits few are trained on: with all of them no decay has anything to add.
TRAINED, HELD = 200, 1000
BATCH = 64
MODELS = {
    DIGITS: functools.partial(digits_cnn.CNN, width=16),
    CIFAR10: functools.partial(digits_cnn.CNN, channels=3, pixels=32),
}
cifar10_folder: Path | None = None

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pictures:
    """Images with labels to train on, to choose hyper-parameters by, and to test with."""

    train: Labelled
    validation: Labelled
    test: Labelled
    model: Callable[[], nn.Module]


@functools.cache
def load(data: str) -> tuple[Labelled, Labelled]:
    """Images, float32, with their labels: those to train or choose with, and those for the test."""
    if data == DIGITS:
        images, labels = digits_cnn.digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held, rest = order[:HELD], order[HELD:]
        return (images[rest], labels[rest]), (images[held], labels[held])
    if cifar10_folder is None:
        raise FileNotFoundError("CIFAR-10: no folder is given; --cifar10 names it")
    files = [cifar10_read(cifar10_folder / f"data_batch_{number}") for number in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*files, strict=True))
    return (images, labels), cifar10_read(cifar10_folder / "test_batch")


def cifar10_read(path: Path) -> Labelled:
    """A file as its authors publish it, which is a pickle; pixels from -1 to 1."""
    with path.open("rb") as file:
        content = pickle.load(file, encoding="bytes")
    pixels = torch.tensor(content[b"data"]).view(-1, 3, 32, 32)
    return pixels / 127.5 - 1, torch.tensor(content[b"labels"])


def pictures(data: str, seed: int) -> Pictures:
    """The seed decides which images are trained on and which are for validation; the test images
    are the same for all.
    """
    (images, labels), test = load(data)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    trained = TRAINED if data == DIGITS else len(labels) * 9 // 10
    parts = [(images[at], labels[at]) for at in (order[:trained], order[trained:])]
    return Pictures(*parts, test, MODELS[data])


def train(
    data: Pictures,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    steps: int,
    seed: int,
) -> nn.Module:
    """The model after so many steps, its first weights and batches decided by the seed."""
    torch.manual_seed(seed)
    model = data.model()
    optimizer = make(list(model.parameters()))
    scheduler = schedule(optimizer)
    images, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
        scheduler.step()
    return model


@torch.no_grad()
def judged(model: nn.Module, name: str, part: Labelled) -> dict[str, float]:
    """Mean loss, and error in percent; what is not a number counts as guessing."""
    images, labels = part
    logits = torch.cat([model(some) for some in images.split(1000)])
    if not logits.isfinite().all():
        logits = torch.zeros_like(logits)
    wrong = (logits.argmax(1) != labels).double().mean().item()
    loss = cross_entropy(logits.double(), labels).item()
    return {f"{name}_loss": loss, f"{name}_error": 100 * wrong}
