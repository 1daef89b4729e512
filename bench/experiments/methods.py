"""The optimizers that are compared, by the names that papers give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

import warpstep

PACKAGES = ("warpstep", "torch")


@dataclass(frozen=True)
class Method:
    """A class that both packages have, and its arguments; a decay form only warpstep's takes."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    decay_form: str | None = None

    def make(
        self, params: list[nn.Parameter], package: str = "warpstep", **numbers: Any
    ) -> torch.optim.Optimizer:
        """The optimizer, of warpstep or torch's fused one."""
        if package == "warpstep":
            options = {**self.options, **numbers, "decay_form": self.decay_form}
            ours: type[torch.optim.Optimizer] = getattr(warpstep, self.name)
            return ours(params, **options)
        if self.decay_form is not None:
            raise ValueError(f"torch has no {self.name} with decay_form={self.decay_form!r}")
        kind: type[torch.optim.Optimizer] = getattr(torch.optim, self.name)
        return kind(params, **self.options, **numbers, fused=True)


MOMENTUM = {"momentum": 0.9}
METHODS = {
    "SGD with L2": Method("SGD", MOMENTUM),
    "SGDW": Method("SGD", MOMENTUM, "decoupled"),
    "SGDW, independent": Method("SGD", MOMENTUM, "independent"),
    "Adam with L2": Method("Adam"),
    "AdamW": Method("AdamW"),
    "AdamW, independent": Method("AdamW", {}, "independent"),
    "AdamW with amsgrad": Method("AdamW", {"amsgrad": True}),
}


def beside_torch(rows: pd.DataFrame, keys: list[str]) -> str:
    """A sentence: how far apart are the pairs that only differ in the package that steps?"""
    ours, torchs = (rows[rows["package"] == package].set_index(keys) for package in PACKAGES)
    pairs = ours.merge(torchs, left_index=True, right_index=True, suffixes=("", "_torch"))
    if pairs.empty:
        return ""
    off = pairs["test_error_torch"] - pairs["test_error"]  # the accuracy of ours less torch's
    return (
        f"{len(pairs)} trainings were repeated with torch's fused optimizer in place of warpstep's."
        f" In {(off == 0).sum()} of them the test accuracy is the same; warpstep's less torch's is "
        f"{off.mean():+.2f} points in the mean, {off.abs().median():.2f} in size in the median, "
        f"{off.abs().max():.2f} at most."
    )
