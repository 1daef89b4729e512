"""The optimizers that are compared, by the names that papers give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import warpstep


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
