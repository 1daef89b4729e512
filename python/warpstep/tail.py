"""The tail: what training loops do around the step, and the step does in its pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warpstep.state import describe
from warpstep.transfers import brought


@dataclass(frozen=True, eq=False)  # comparing tensors would wait for their device
class Tail:
    """One step's tail. What it does to a gradient g, before the rule sees it::

    g <- g / grad_scale
    g <- g * clip_coef
    """

    grad_scale: Tensor | None = None  # torch's GradScaler
    found_inf: Tensor | None = None  # anything but zero: the step is not taken
    clip_coef: Tensor | None = None  # of the unscaled gradients
    zero_grads: bool = False
    unscale_grads: bool = False  # and leave them clipped; zero_grads goes first
    statistics: bool = False
    measured_grads: int | None = None  # how many gradients clip_coef is of

    @property
    def unscales(self) -> bool:
        """Whether gradients are left unscaled or clipped, which they were not."""
        has_factor = self.grad_scale is not None or self.clip_coef is not None
        return self.unscale_grads and has_factor and not self.zero_grads

    @property
    def needs_tensors(self) -> bool:
        """Whether there is more than a plain step, or one that zeroes gradients."""
        numbers = (self.grad_scale, self.found_inf, self.clip_coef)
        return self.statistics or any(number is not None for number in numbers)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three tensors as kernels read them: float32, float32 and float64, on ``device``.

        Raises ValueError for one that is not a single number.
        """
        return (
            _number_on("grad_scale", self.grad_scale, device, torch.float32),
            _number_on("found_inf", self.found_inf, device, torch.float32),
            _number_on("clip_coef", self.clip_coef, device, torch.float64),
        )


def _number_on(
    name: str, number: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if number is None:
        return None
    if number.numel() != 1:
        raise ValueError(f"{name} must have one element, not {describe(number)}")
    return brought(number, device, dtype)
