"""``clip_grad_norm_``: what an optimizer that clips in its step has for it."""

from __future__ import annotations

import inspect
import threading

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports torch._dynamo only when used
from torch.optim.optimizer import Optimizer

from warpstep import modes, signals
from warpstep.clipping import Clipping
from warpstep.plan import Plan
from warpstep.transfers import brought
from warpstep.unscaling import defer_unscale, report_found_inf


class ClipsGradNorm(Optimizer):
    """An optimizer whose step multiplies the gradients by what clipped norms ask for."""

    plan: Plan | None = None
    _turn: threading.RLock  # held by the thread that steps, clips or drops gradients
    _clipping: Clipping | None = None  # for the next step
    _unscales: bool = False  # whether torch would have GradScaler leave the unscaling to the step

    def _plan_of_grads(self) -> Plan | None:
        """A plan that has gathered the gradients; None where torch's own step is taken."""
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``GradScaler.step`` leaves the unscaling to this step, with no synchronisation.

        As torch has it: where ``fused=True`` was asked for. Else GradScaler unscales the gradients
        and looks for infs before it steps or skips, and what is built on that works: Lightning
        clips only what it has unscaled, accelerate tells skipped steps. And where the step has a
        clipping to apply, which goes with the scale: it may have left the unscaling to the step, or
        have been told of no scale where there is one.
        """
        return self._unscales or self._clipping is not None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:  # by torch's constructor
        self._unscales = value

    @_disable_dynamo
    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Clips the norm of all gradients together, in the next step.

        In place of :func:`torch.nn.utils.clip_grad_norm_`, where that is called. One pass reads the
        gradients; they stay as they are, and the next ``step`` multiplies them by
        ``min(1, max_norm / (total_norm + 1e-6))`` in registers. There is no synchronisation. A
        second call before the step clips what the first has left, as it would in torch.

        The clipping is for the gradients that it has seen. ``zero_grad`` forgets it, as do new
        gradients in place of all of them; a gradient that is written to in between makes ``step``
        and a second clipping raise. What autograd's version counter does not count (a write
        through ``.grad.data``, through NumPy, or by a kernel of one's own; any write to a tensor
        made in inference mode) goes unnoticed, and is clipped with the rest. So write gradients
        before they are clipped; to add noise to clipped ones, clip with torch's function.

        Args:
            max_norm: what the norm is to be at most; at least 0.
            norm_type: 2 and inf take one fused pass; others go through torch.
            error_if_nonfinite: raise if the norm is NaN or infinite (this waits for the device).
            scaler: a :class:`torch.amp.GradScaler` whose ``unscale_`` has not been called. The norm
                is then that of the unscaled gradients, which ``step`` unscales in its own pass; a
                norm that is not finite makes ``scaler.step`` skip, so no other inf check is made.
                Needed where the scaler is used without ``unscale_``; ``scaler.step`` raises if it
                is forgotten.

        Returns:
            The norm before clipping, a float32 scalar tensor on the gradients' device, of the same
            bits each time. Each parameter counts once. Of a DTensor the whole tensor counts, and
            every rank has to call this; plain tensors of other ranks do not count.

        Raises:
            ValueError: ``max_norm`` is negative or NaN.
            RuntimeError: the norm is not finite and ``error_if_nonfinite``; a gradient is invalid,
                or was written to since the clipping before; or ``scaler`` has stepped already. A
                clipping before it stays in force then.
        """
        with self._turn:
            return self._clip(float(max_norm), float(norm_type), error_if_nonfinite, scaler)

    def _clip(
        self,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor:
        # A clipping that fails changes nothing. The gradients stay as they are, so that a second
        # clipping sees what the first has seen. Norms are homogeneous: the norm of the gradients
        # that torch would have clipped by then is the one seen times the coefficient so far, which
        # the new coefficient multiplies.
        if not max_norm >= 0:
            raise ValueError(f"Invalid max_norm: {max_norm}. It has to be at least 0.")
        scale = defer_unscale(scaler, self)
        if scaler is not None and scale is not None and norm_type <= 0:
            scaler.unscale_(self)  # these norms do not show every infinity
            scale = None
        plan = None if modes.are_active() else self._plan_of_grads()
        if plan is None:
            self._forget_clipping()
            if scaler is not None and scale is not None:
                scaler.unscale_(self)
            params = [p for g in self.param_groups for p in g["params"] if p.numel() > 0]
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        before = self._clipping
        if before is not None and not before.still_holds():
            before = None
        if before is not None and before.measured != plan.count_grads(self):
            before.raise_changed(plan.count_grads(self))
        if before is not None and before.grad_scale is not None:  # the scaler was told, not they
            scale = before.grad_scale if scale is None else before.grad_scale * scale

        total_norm = plan.grad_norm(self, norm_type)
        if scale is not None and norm_type != 0:  # which counts
            total_norm = total_norm / brought(scale, total_norm.device)
        if before is not None and norm_type != 0:
            total_norm = total_norm * brought(before.coef, total_norm.device)
        if error_if_nonfinite and not total_norm.isfinite():
            if before is None:
                self._forget_clipping()
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients is non-finite ({total_norm}), "
                "so it cannot be clipped. Nothing has been changed. To disable this error and "
                "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        # A tensor over a tensor: a number over one is its reciprocal's multiple, rounded twice.
        coef = torch.full_like(total_norm, max_norm).div_(total_norm + 1e-6)
        coef.clamp_(max=1.0)  # NaN stays, as in torch
        if before is not None:
            coef = coef * brought(before.coef, coef.device)
        found_inf, norm = (~total_norm.isfinite()).float(), total_norm.float()
        replaced, clipping = self._clipping, plan.clipping(self, coef, scale)
        if scale is None or scaler is None:
            self._clipping = clipping
        else:
            # Both or neither: a scaler that was told leaves the unscaling to this clipping.
            with signals.deferred():
                report_found_inf(scaler, self, found_inf)
                self._clipping = clipping
        if replaced is not None and replaced.plan is not plan:
            replaced.plan.forget_grads()
        return norm

    def _forget_clipping(self) -> None:
        """Drops a clipping, and lets go of the gradients that it or its attempt held."""
        with self._turn:
            for plan in (self.plan, self._clipping.plan if self._clipping is not None else None):
                if plan is not None:
                    plan.forget_grads()
            self._clipping = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients, and forgets a clipping that no step has applied."""
        self._forget_clipping()
        super().zero_grad(set_to_none)


for _method in (ClipsGradNorm.clip_grad_norm_, ClipsGradNorm.zero_grad):
    # What Python says of wrong arguments is to name a class that users know.
    inspect.unwrap(_method).__qualname__ = f"Optimizer.{_method.__name__}"
