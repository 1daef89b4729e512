"""The tail: what training loops do around the step, and the step does in its pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from warpstep.state import describe

if TYPE_CHECKING:
    from warpstep.plan import Plan


@dataclass(frozen=True, eq=False)  # comparing tensors would wait for their device
class Tail:
    """One step's tail. What it does to a gradient g, before the rule sees it::

    g <- g / grad_scale
    g <- g * min(1, max_norm / (total_norm + 1e-6))
    """

    grad_scale: Tensor | None = None  # torch's GradScaler
    found_inf: Tensor | None = None  # anything but zero: the step is not taken
    total_norm: Tensor | None = None  # of the unscaled gradients
    max_norm: float = 0.0
    zero_grads: bool = False
    statistics: bool = False
    measured_grads: int | None = None  # how many gradients total_norm is of

    @property
    def needs_tensors(self) -> bool:
        """Whether there is more than a plain step, or one that zeroes gradients."""
        numbers = (self.grad_scale, self.found_inf, self.total_norm)
        return self.statistics or any(number is not None for number in numbers)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three tensors as kernels read them: float32, float32 and float64, on ``device``.

        Raises ValueError for one that is not a single number.
        """
        return (
            _number_on("grad_scale", self.grad_scale, device, torch.float32),
            _number_on("found_inf", self.found_inf, device, torch.float32),
            _number_on("total_norm", self.total_norm, device, torch.float64),
        )


def _number_on(
    name: str, number: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if number is None:
        return None
    if number.numel() != 1:
        raise ValueError(f"{name} must have one element, not {describe(number)}")
    return number.to(device=device, dtype=dtype, non_blocking=True)


@dataclass
class Clipping:
    """What ``clip_grad_norm_`` found, for the next step to apply.

    It holds for the gradients that it has seen, as they were: see ``still_holds``.
    """

    total_norm: Tensor
    max_norm: float
    plan: Plan | None
    grad_scale: Tensor | None = None  # that the gradients still carry
    # Gradients that no native plan looks at: each with its parameter and version counter.
    others: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    def compare(self) -> tuple[int, int, int]:
        """Gradients remembered; of those, the ones still there; of those, the unwritten."""
        remembered, kept, unwritten = 0, 0, 0
        if self.plan is not None:
            remembered, kept, unwritten = self.plan.compare_grads()
        for param, grad, version in self.others:
            remembered += 1
            kept += param.grad is grad
            unwritten += param.grad is grad and version_of(grad) == version
        return remembered, kept, unwritten

    def still_holds(self) -> bool:
        """Whether the gradients are those that were measured; False if they were all replaced.

        Raises RuntimeError where some are and some are not, or where one was written to: what was
        measured is then no longer there, and what is there was not measured.
        """
        remembered, kept, unwritten = self.compare()
        if kept > 0 and unwritten < remembered:
            self.raise_changed(remembered)
        return kept > 0

    def raise_changed(self, grads_now: int) -> NoReturn:
        """Raises RuntimeError: the gradients, ``grads_now`` of them, are not what was measured."""
        remembered, kept, unwritten = self.compare()
        raise RuntimeError(
            f"gradients changed between clip_grad_norm_() and step(): of the {remembered} that "
            f"were measured, {remembered - kept} were replaced and {kept - unwritten} written to, "
            f"and there are {grads_now} now. Clip right before the step, after everything else "
            "that writes gradients; or forget the clipping with zero_grad()."
        )


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to; 0 for an inference tensor, where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def defer_unscale(scaler: Any, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Tells a GradScaler that this optimizer's gradients are seen to; the scale that they carry.

    As ``scaler.unscale_(optimizer)``, but the gradients stay as they are: the step divides them.
    None where they carry none (no scaling, or unscaled already). The caller owes the scaler the
    inf check: see ``report_found_inf``.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler is a {type(scaler).__name__}, expected a torch.amp.GradScaler")
    if not scaler.is_enabled():
        return None
    states = scaler._per_optimizer_states[id(optimizer)]
    stage = states["stage"].name
    if stage == "STEPPED":
        raise RuntimeError("clip_grad_norm_() with this scaler is being called after step().")
    if stage == "UNSCALED":
        return None
    scaler._check_scale_growth_tracker("unscale_")
    scale: Tensor | None = scaler._scale
    return scale


def report_found_inf(scaler: Any, optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Leaves the result of the inf check where ``scaler.step`` and ``update`` look for it."""
    states = scaler._per_optimizer_states[id(optimizer)]
    states["found_inf_per_device"] = {found_inf.device: found_inf}
    states["stage"] = type(states["stage"]).UNSCALED


def combined_norm(shares: list[Tensor], norm_type: float) -> Tensor:
    """One float64 norm from shares of it, one-element tensors on any devices.

    A share is the sum of squares for the 2-norm, the norm itself for the inf-norm.
    """
    device = shares[0].device
    together = torch.stack([s.to(device, torch.float64, non_blocking=True) for s in shares])
    if math.isinf(norm_type):
        return together.amax()  # NaN if any is
    return together.sum().sqrt()


@dataclass(frozen=True)
class Statistics:
    """What the last step saw, one number a parameter, on the first parameter's device.

    Attributes:
        params: the parameters, in the order of the plan's buckets. The other fields have theirs.
        grad_norm: 2-norm of the unscaled gradient, before clipping. float32.
        param_norm: 2-norm of the parameter after the step. float32.
        update_norm: 2-norm of what the step changed the parameter by, decay included. float32.
        nonfinite: how many values of the gradient were NaN or infinite; -1 where there was no
            gradient. int64. A step that was skipped for found_inf is counted as well.
        names: the parameters' names, if they were given to the optimizer with their parameters
            (``model.named_parameters()``), else ``parameter 3 of group 0``.
    """

    params: list[Tensor]
    grad_norm: Tensor
    param_norm: Tensor
    update_norm: Tensor
    nonfinite: Tensor
    names: list[str] = field(default_factory=list)


def statistics_of(params: list[Tensor | None], tables: list[Tensor]) -> Statistics:
    """From tables float64[tensors, 4] of sums, as kernels leave them (kernels/tables.h).

    Rows of parameters that are no more (None) are left out.
    """
    device = tables[0].device
    sums = torch.cat([table.to(device, non_blocking=True) for table in tables])
    alive = [param for param in params if param is not None]
    if len(alive) < len(params):
        sums = sums[[row for row, param in enumerate(params) if param is not None]]
    norms = sums[:, :3].sqrt().float()
    counts = sums[:, 3].clamp(min=-1).to(torch.int64)
    return Statistics(alive, norms[:, 0], norms[:, 1], norms[:, 2], counts)
