"""``clip_grad_norm_``: what the gradients are to be multiplied by, kept for the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from warpstep import modes
from warpstep.reference import real_view
from warpstep.shards import own_part, whole
from warpstep.state import is_plain
from warpstep.tail import Tail

if TYPE_CHECKING:
    from warpstep.optimizer import Adam
    from warpstep.plan import Plan

_summed_in = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass
class Clipping:
    """What all clippings since the last step make together, for the next step to apply.

    It holds for the gradients that were measured, as they were: see ``still_holds``.
    """

    coef: Tensor  # float64, one number: the gradients are to be multiplied by it
    grad_scale: Tensor | None  # that the gradients still carry
    plan: Plan | None  # remembers the gradients that its native part looks at
    others: list[RememberedGrad]
    measured: int  # gradients remembered, by the plan and here

    def compare(self) -> tuple[int, int]:
        """How many of the gradients measured are still there; and of those, how many unwritten."""
        kept, unwritten = (0, 0) if self.plan is None else self.plan.compare_grads()
        for other in self.others:
            is_kept = other.param.grad is other.grad
            kept += is_kept
            unwritten += is_kept and other.is_unwritten()
        return kept, unwritten

    def still_holds(self) -> bool:
        """Whether the gradients are those that were measured; False if they were all replaced.

        Raises RuntimeError where some are and some are not, or where one was written to: what was
        measured is then no longer there, and what is there was not measured.
        """
        kept, unwritten = self.compare()
        if kept > 0 and unwritten < self.measured:
            self.raise_changed(self.measured)
        return kept > 0

    def raise_changed(self, grads_now: int) -> NoReturn:
        """Raises RuntimeError: the gradients, ``grads_now`` of them, are not what was measured."""
        kept, unwritten = self.compare()
        raise RuntimeError(
            f"gradients changed after clip_grad_norm_(): of the {self.measured} that were "
            f"measured, {self.measured - kept} were replaced and {kept - unwritten} written to, "
            f"and there are {grads_now} now. Clip right before the step, after everything else "
            "that writes gradients; or forget the clipping with zero_grad()."
        )

    def added_to(self, tail: Tail, optimizer: Adam) -> Tail:
        """The step's tail with this clipping in it.

        Raises RuntimeError where the step is told of a scale that the clipping knew nothing of.
        """
        if self.grad_scale is None and tail.grad_scale is not None:
            for name in ("grad_scale", "found_inf"):  # which GradScaler leaves after an exception
                vars(optimizer).pop(name, None)
            raise RuntimeError(
                "clip_grad_norm_() has clipped gradients that are scaled by a GradScaler, to a "
                "norm that is meant for unscaled ones: their step would be too small by the "
                "scale. Pass scaler= to clip_grad_norm_(), or call scaler.unscale_(optimizer) "
                "before it. No parameter has been changed; zero_grad() forgets the clipping."
            )
        scale = tail.grad_scale if self.grad_scale is None else self.grad_scale
        return replace(tail, grad_scale=scale, clip_coef=self.coef, measured_grads=self.measured)


@dataclass(frozen=True, eq=False)
class RememberedGrad:
    """A gradient that no native plan looks at, as it was."""

    param: Tensor
    grad: Tensor
    version: int
    address: int

    @classmethod
    def of(cls, param: Tensor, grad: Tensor) -> RememberedGrad:
        """``param``'s gradient, as it is now."""
        return cls(param, grad, *_version_and_address(grad))

    def is_unwritten(self) -> bool:
        """Whether neither its version counter nor its memory is another since."""
        return _version_and_address(self.grad) == (self.version, self.address)


def _version_and_address(grad: Tensor) -> tuple[int, int]:
    own = own_part(grad)
    version = 0 if grad.is_inference() else grad._version  # which has no counter
    return version, own.data_ptr() if is_plain(own) else 0


def clip_grad_norm(
    optimizer: Adam,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """``Adam.clip_grad_norm_``, which documents it. A clipping that fails changes nothing.

    The gradients stay as they are, so that a second clipping sees what the first has seen. Norms
    are homogeneous: the norm of the gradients that torch would have clipped by then is the one
    seen times the coefficient so far, which the new coefficient multiplies.
    """
    if not max_norm >= 0:
        raise ValueError(f"Invalid max_norm: {max_norm}. It has to be at least 0.")
    scale = defer_unscale(scaler, optimizer)
    if scaler is not None and scale is not None and norm_type <= 0:
        scaler.unscale_(optimizer)  # these norms do not show every infinity
        scale = None
    plan = None if modes.are_active() else optimizer._plan_of_grads()
    if plan is None:
        optimizer._forget_clipping()
        if scaler is not None and scale is not None:
            scaler.unscale_(optimizer)
        params = [p for g in optimizer.param_groups for p in g["params"] if p.numel() > 0]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
    before = optimizer._clipping
    if before is not None and not before.still_holds():
        before = None
    if before is not None and before.measured != plan.count_grads(optimizer):
        before.raise_changed(plan.count_grads(optimizer))
    if before is not None and before.grad_scale is not None:  # the scaler was told, not they
        scale = before.grad_scale if scale is None else before.grad_scale * scale

    total_norm = plan.grad_norm(optimizer, norm_type)
    if scale is not None and norm_type != 0:  # which counts
        total_norm = total_norm / scale.to(total_norm.device, non_blocking=True)
    if before is not None and norm_type != 0:
        total_norm = total_norm * before.coef.to(total_norm.device, non_blocking=True)
    if error_if_nonfinite and not total_norm.isfinite():
        if before is None:
            optimizer._forget_clipping()
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite ({total_norm}), "
            "so it cannot be clipped. Nothing has been changed. To disable this error and "
            "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    if scale is not None and scaler is not None:
        report_found_inf(scaler, optimizer, (~total_norm.isfinite()).float())
    # A tensor over a tensor: a number over one is its reciprocal's multiple, rounded twice.
    coef = torch.full_like(total_norm, max_norm).div_(total_norm + 1e-6)
    coef.clamp_(max=1.0)  # NaN stays, as in torch
    if before is not None:
        coef = coef * before.coef.to(coef.device, non_blocking=True)
    replaced = optimizer._clipping
    optimizer._clipping = plan.clipping(optimizer, coef, scale)
    if replaced is not None and replaced.plan not in (None, plan):
        replaced.plan.forget_grads()
    return total_norm.float()


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


def norm_of_norms(grads: list[Tensor], norm_type: float) -> Tensor:
    """One float64 norm as torch.nn.utils.get_total_norm takes it, of gradients in any format.

    16-bit ones are summed in float32: scaled by a GradScaler, they would soon be infinite.
    """
    norms = [
        torch.linalg.vector_norm(g, norm_type, dtype=_summed_in.get(g.dtype)).to(
            grads[0].device, non_blocking=True
        )
        for g in grads
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total.double()


def share_of_norm(grad: Tensor, norm_type: float) -> Tensor:
    """One gradient's share of `combined_norm`."""
    norm = torch.linalg.vector_norm(real_view(grad.detach()), norm_type, dtype=torch.float64)
    norm = whole(norm)
    return norm if math.isinf(norm_type) else norm.square()
