"""``warpstep.AdamW`` and ``warpstep.Adam``: torch's classes, stepped in one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports torch._dynamo only when used
from torch.optim.optimizer import ParamsT

from warpstep import checkpoint
from warpstep.backends import requested_backend
from warpstep.hypers import check_group
from warpstep.plan import Plan
from warpstep.recipes import FORMATS
from warpstep.tail import (
    Clipping,
    Statistics,
    Tail,
    defer_unscale,
    report_found_inf,
    swapped,
)

Betas = tuple[float | Tensor, float | Tensor]
EmaDecay = float | Callable[[int], float]


class OnePass(torch.optim.Adam):
    """What AdamW and Adam share: the step by a plan, and a state dict that keeps its dtypes.

    Attributes:
        backend: what was asked for (``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``).
        state_dtype: the dtype of new moments; None for each parameter's own.
        plan: how the last step was run, or None before the first. Printing it tells.
    """

    # torch.amp.GradScaler then leaves unscaling and the inf check to the step, with no device
    # synchronisation. Set to False on instances that step through autograd.
    _step_supports_amp_scaling = True

    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    ema_decay: EmaDecay | None = None
    ema_dtype: torch.dtype | None = None
    stats: bool = False
    plan: Plan | None = None
    # Plans in captured CUDA graphs, whose tables the graphs go on reading.
    _captured_plans: list[Plan]
    _clipping: Clipping | None = None  # of clip_grad_norm_, for the next step
    _averages_swapped: bool = False
    _ema_steps: int = 0  # steps taken, as far as the host knows; for a callable ema_decay

    def _set_options(
        self,
        differentiable: bool,
        *,
        backend: str,
        state_dtype: torch.dtype | None,
        decay_form: str | None,
        ema_decay: EmaDecay | None,
        ema_dtype: torch.dtype | None,
        stats: bool,
    ) -> None:
        for name, dtype in (("state_dtype", state_dtype), ("ema_dtype", ema_dtype)):
            if dtype is not None and dtype not in FORMATS:
                raise ValueError(f"Invalid {name}: {dtype} is none of {FORMATS}")
        ours = {"state_dtype": state_dtype, "stats": stats or None}
        for group in ({"decay_form": decay_form, "ema_decay": ema_decay}, *self.param_groups):
            ours |= {key: group[key] for key in ("decay_form", "ema_decay") if group.get(key)}
        for name, value in ours.items():
            if differentiable and value is not None:
                raise ValueError(f"`{name}` is not supported with `differentiable`")
        self.backend = requested_backend(backend)
        self.state_dtype = state_dtype
        self.ema_decay = ema_decay
        self.ema_dtype = ema_dtype
        self.stats = stats
        self._captured_plans = []
        self._step_supports_amp_scaling = not differentiable
        # Only what is asked for: groups and state dicts are torch's where nothing is.
        if decay_form is not None:
            self.defaults["decay_form"] = decay_form
        if ema_decay is not None:
            self.defaults["ema_decay"] = ema_decay(0) if callable(ema_decay) else ema_decay
        for index, group in enumerate(self.param_groups):
            self._complete_group(group)
            check_group(group, f" (in parameter group {index})")

    def _complete_group(self, group: dict[str, Any]) -> None:
        """Adds what a group needs beside torch's keys."""
        for key in ("decay_form", "ema_decay"):
            if key in self.defaults:
                group.setdefault(key, self.defaults[key])
        if group.get("decay_form") == "independent":
            group.setdefault("base_lr", float(group["lr"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch does."""
        super().add_param_group(param_group)
        self._complete_group(self.param_groups[-1])

    @_disable_dynamo
    def _step(self, zero_grads: bool = False) -> None:
        if self._averages_swapped:
            raise RuntimeError("step() inside swap_ema(): the parameters are not in their place")
        capturing = self._check_capture()
        if capturing and callable(self.ema_decay):
            raise RuntimeError("a graph would keep what a callable ema_decay returns now, for good")
        self._update_ema_decay()
        plan = self._valid_plan(capturing)
        if plan is None:
            if zero_grads or self._clipping is not None:
                raise RuntimeError("`zero_grads` and clip_grad_norm_() need `differentiable=False`")
            _torch_step(self)
            return
        # Set and deleted by GradScaler around its call of step().
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        tail = Tail(grad_scale, found_inf, zero_grads=zero_grads, statistics=self.stats)
        clipping = self._clipping
        if clipping is not None and clipping.still_holds(plan.count_grads()):
            scale = clipping.grad_scale if clipping.grad_scale is not None else grad_scale
            tail = replace(
                tail,
                grad_scale=scale,
                total_norm=clipping.total_norm,
                max_norm=clipping.max_norm,
            )
        plan.run(self, tail)
        self._ema_steps += 1
        self._forget_clipping()
        if capturing and plan not in self._captured_plans:
            self._captured_plans.append(plan)

    def _valid_plan(self, capturing: bool = False) -> Plan | None:
        """The plan, made anew if it is stale, its inputs gathered; None for torch's own step."""
        plan = self.plan
        reason = "there is none yet"
        if plan is not None and plan.checked_by_native:
            reason = plan.stale(self) or ""
        if reason:
            if any(group.get("differentiable") for group in self.param_groups):
                return None
            if capturing:
                raise RuntimeError(
                    f"step() is being captured in a graph and needs a new plan ({reason}): take "
                    "a step on the same parameters and state before capturing"
                )
            self.plan = None  # never a stale one, should the next line raise
            plan = Plan(self)
            if plan.checked_by_native and (reason := plan.stale(self) or ""):
                raise RuntimeError(f"a new plan is stale at once: {reason}")
            self.plan = plan
        assert plan is not None
        return plan

    def _plan_of_grads(self) -> Plan | None:
        """The plan, with gradients gathered and remembered; nothing else is looked at."""
        plan = self.plan
        if plan is None or not plan.checked_by_native or plan.stale_grads(self):
            plan = self._valid_plan()
            if plan is not None and plan.checked_by_native and (reason := plan.stale_grads(self)):
                raise RuntimeError(f"a new plan is stale at once: {reason}")
        return plan

    def _update_ema_decay(self) -> None:
        if callable(self.ema_decay):
            decay, before = self.ema_decay(self._ema_steps), self.defaults["ema_decay"]
            for group in self.param_groups:
                if group["ema_decay"] == before:  # else it has its own, or none
                    group["ema_decay"] = decay
            self.defaults["ema_decay"] = decay

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
        ``min(1, max_norm / (total_norm + 1e-6))`` in registers. There is no synchronisation.

        The clipping is for the gradients that it has seen. ``zero_grad`` forgets it, as do new
        gradients in place of all of them; a gradient that is written to in between makes ``step``
        raise.

        Args:
            max_norm: what the norm is to be at most; at least 0.
            norm_type: 2 and inf take one fused pass; others go through torch.
            error_if_nonfinite: raise if the norm is NaN or infinite (this waits for the device).
            scaler: a :class:`torch.amp.GradScaler` whose ``unscale_`` has not been called. The norm
                is then that of the unscaled gradients, which ``step`` unscales in its own pass; a
                norm that is not finite makes ``scaler.step`` skip, so no other inf check is made.
                Needed where the scaler is used without ``unscale_``.

        Returns:
            The norm before clipping, a float32 scalar tensor on the gradients' device, of the same
            bits each time. Each parameter counts once; other ranks' gradients do not count.

        Raises:
            ValueError: ``max_norm`` is negative or NaN.
            RuntimeError: the norm is not finite and ``error_if_nonfinite``; a gradient is invalid;
                or ``scaler`` has stepped already.
        """
        max_norm, norm_type = float(max_norm), float(norm_type)
        if not max_norm >= 0:
            raise ValueError(f"Invalid max_norm: {max_norm} is not at least 0")
        scale = defer_unscale(scaler, self)
        if scale is None and self._clipping is not None and self._clipping.compare()[1] > 0:
            scale = self._clipping.grad_scale  # clipped before: the scaler was told, not they
        self._forget_clipping()
        plan = self._plan_of_grads()
        if plan is None:
            if scaler is not None and scaler.is_enabled() and scale is not None:
                scaler.unscale_(self)
            params = [p for group in self.param_groups for p in group["params"]]
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        total_norm = plan.grad_norm(norm_type)
        if scale is not None:
            total_norm = total_norm / scale.to(total_norm.device, non_blocking=True)
        if error_if_nonfinite and not total_norm.isfinite():
            self._forget_clipping()
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients is non-finite ({total_norm}), "
                "so it cannot be clipped. Nothing has been changed. To disable this error and "
                "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        if scale is not None and scaler is not None:
            report_found_inf(scaler, self, (~total_norm.isfinite()).float())
        self._clipping = plan.clipping(total_norm, max_norm)
        self._clipping.grad_scale = scale
        return total_norm.float()

    def _forget_clipping(self) -> None:
        """Drops a clipping, and lets go of the gradients that it or its attempt held."""
        for plan in (self.plan, self._clipping.plan if self._clipping is not None else None):
            if plan is not None:
                plan.forget_grads()
        self._clipping = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients, and forgets a clipping that no step has applied."""
        self._forget_clipping()
        super().zero_grad(set_to_none)

    def ema_parameters(self) -> dict[Tensor, Tensor]:
        """Each parameter's average; the parameter itself where it has had no step yet.

        After each step, ``ema <- ema_decay * ema + (1 - ema_decay) * p``, beginning as p after the
        first: :class:`torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn``.

        Raises:
            RuntimeError: the optimizer keeps no averages.
        """
        kept = self._kept_averages()
        params = (param for group in self.param_groups for param in group["params"])
        return {param: kept.get(param, param.detach()) for param in params}

    def _kept_averages(self) -> dict[Tensor, Tensor]:
        averaged = [group for group in self.param_groups if group.get("ema_decay") is not None]
        if not averaged:
            raise RuntimeError("no averages are kept: construct the optimizer with ema_decay=")
        states = {p: self.state.get(p) or {} for group in averaged for p in group["params"]}
        return {param: state["ema"] for param, state in states.items() if "ema" in state}

    def swap_ema(self) -> AbstractContextManager[None]:
        """The parameters are their averages inside ``with optimizer.swap_ema():``, for evaluation.

        Afterwards, whatever happens inside, they are what they were, bit for bit. A step inside
        raises. The parameters' values are kept in a copy meanwhile.
        """
        return swapped(self, self._kept_averages())

    def statistics(self) -> Statistics:
        """What the last step saw of each parameter: norms and counts, from its own pass.

        Nothing waits for the device. The same bits each time. GPUs sum in float64; CPUs in runs of
        1,024 elements in float32, and the runs' sums in float64.

        Raises:
            RuntimeError: ``stats=True`` was not asked for, or no step has been taken since.
        """
        found = self.plan.statistics() if self.stats and self.plan is not None else None
        if found is None:
            raise RuntimeError("no statistics: construct the optimizer with stats=True, then step")
        return found

    def _check_capture(self) -> bool:
        """Whether a CUDA graph is being captured; raises as torch does if that cannot work."""
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return False
        check = getattr(self, "_accelerator_graph_capture_health_check", None)  # torch >= 2.12
        (check or self._cuda_graph_capture_health_check)()
        return True

    def step(self, closure: Callable[[], Any] | None = None, *, zero_grads: bool = False) -> Any:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.
            zero_grads: leave the gradients zero, written in the same pass; also if the step is
                skipped for an inf.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError: a gradient or a state is invalid, or a
                hyper-parameter no number; the message names it. No parameter and no state has been
                changed then. A number is taken whatever it is, as torch does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(zero_grads)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        names = ("backend", "state_dtype", "ema_decay", "ema_dtype", "stats", "_ema_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plan = None
        self.__dict__.setdefault("_captured_plans", [])
        self._step_supports_amp_scaling = not any(g["differentiable"] for g in self.param_groups)
        for group in self.param_groups:
            self._complete_group(group)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer, in whole or not at all.

        As torch's, except that the moments keep the dtypes they were saved with (torch casts them
        to the parameter's), or get ``state_dtype`` where one was given.

        Raises:
            ValueError: the groups, or the shape of a tensor of the state, do not fit.
        """
        checkpoint.load(self, state_dict)


def _torch_step(optimizer: OnePass) -> None:
    """torch's own step, for ``differentiable=True``: autograd goes through its operations."""
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):  # the hooks have been called for warpstep's step
        step = step.__wrapped__  # type: ignore[attr-defined]  # set by functools.wraps
    step(optimizer)


class AdamW(OnePass, torch.optim.AdamW):
    """AdamW (decoupled weight decay) for a whole model in one kernel launch.

    A drop-in for :class:`torch.optim.AdamW`. With gradient g, and t counting from 1::

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * weight_decay * p
               - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Arithmetic is in float32 (float64 for float64 parameters), and each stored value is rounded
    once. Complex parameters are stepped as pairs of real numbers.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).

    Args:
        params: parameters, named parameters, or dicts of groups, as torch takes them.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            torch's. ``fused=False`` selects the reference backend.
        state_dtype: dtype of the moments (``torch.float32``, ``bfloat16``, ``float16``,
            ``float64``); None (default) for each parameter's own, as torch.
        decay_form: ``"decoupled"`` (AdamW's), ``"coupled"`` (Adam's), ``"independent"``, ``"l1"``
            or ``"cautious"``: how weight decay acts. The README has the formulas.
        ema_decay: keep ``ema <- ema_decay * ema + (1 - ema_decay) * p`` of each parameter: a number
            in [0, 1], or a function of how often ``step`` was called.
        ema_dtype: the averages' dtype where parameters are 16-bit: theirs, or float32 (default).
        stats: gather what ``statistics()`` returns, in each step.
        backend: ``"auto"`` (default; the environment variable ``WARPSTEP_BACKEND`` may say
            otherwise), ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Parameters that
            a backend has no kernel for are stepped by the reference.

    Raises:
        ValueError: a hyper-parameter, ``state_dtype`` or ``backend`` is invalid.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        decay_form: str | None = None,
        ema_decay: EmaDecay | None = None,
        ema_dtype: torch.dtype | None = None,
        stats: bool = False,
    ) -> None:
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(
            differentiable,
            backend=backend,
            state_dtype=state_dtype,
            decay_form=decay_form,
            ema_decay=ema_decay,
            ema_dtype=ema_dtype,
            stats=stats,
        )


class Adam(OnePass):
    """Adam (weight decay coupled: added to the gradient) in one kernel launch.

    A drop-in for :class:`torch.optim.Adam`: as :class:`AdamW`, but with ``g + weight_decay * p`` in
    place of g and no other decay, unless ``decoupled_weight_decay=True``. Arguments, dtypes and
    errors are those of :class:`AdamW`.

    Source: Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        decay_form: str | None = None,
        ema_decay: EmaDecay | None = None,
        ema_dtype: torch.dtype | None = None,
        stats: bool = False,
    ) -> None:
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_options(
            differentiable,
            backend=backend,
            state_dtype=state_dtype,
            decay_form=decay_form,
            ema_decay=ema_decay,
            ema_dtype=ema_dtype,
            stats=stats,
        )
