"""``warpstep.Adam``, torch's class stepped in one launch, and all that AdamW has of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports torch._dynamo only when used
from torch.optim.adam import Adam as TorchAdam
from torch.optim.optimizer import ParamsT

from warpstep import checkpoint, modes, signals, watched
from warpstep.averages import Averaging, EmaDecay
from warpstep.backends import BackendName, requested_backend
from warpstep.clipping import Clipping, clip_grad_norm
from warpstep.groups import Members
from warpstep.hypers import DecayForm, check_arguments, check_group
from warpstep.plan import Plan
from warpstep.recipes import FORMATS, one_of
from warpstep.state import names_of
from warpstep.tail import Statistics, Tail

Betas = tuple[float | Tensor, float | Tensor]

# How often a plan is made where another thread changes what is stepped while that is looked at.
_ATTEMPTS = 5
_CHANGING = "step() found that {} while it looked: no other thread may change what is stepped"


class Adam(Averaging):
    """Adam (weight decay coupled: added to the gradient) in one kernel launch.

    A drop-in for :class:`torch.optim.Adam`: as :class:`AdamW`, but with ``g + weight_decay * p`` in
    place of g and no other decay, unless ``decoupled_weight_decay=True``. Arguments, dtypes and
    errors are those of :class:`AdamW`, which is derived from it, as torch's is from torch's.

    Source: Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980).

    Attributes:
        backend: what was asked for (``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``).
        state_dtype: the dtype of new moments; None for each parameter's own.
        plan: how the last step was run, or None before the first. ``print(optimizer.plan)`` has a
            line for each bucket, the tensors that one kernel launch steps: their backend, number,
            device and dtypes; and one for those that the reference steps.
    """

    backend: BackendName = "auto"
    state_dtype: torch.dtype | None = None
    stats: bool = False
    unscale_grads: bool = False
    plan: Plan | None = None
    # Plans in captured CUDA graphs, whose tables the graphs go on reading.
    _captured_plans: list[Plan]
    _turn: threading.RLock  # held by the thread that steps, clips or drops gradients
    _clipping: Clipping | None = None  # of clip_grad_norm_, for the next step
    _unscales: bool = False  # whether torch would have GradScaler leave the unscaling to the step
    _members: Members | None = None  # while constructed

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
        backend: BackendName = "auto",
        state_dtype: torch.dtype | None = None,
        decay_form: DecayForm | None = None,
        ema_decay: EmaDecay | None = None,
        ema_dtype: torch.dtype | None = None,
        stats: bool = False,
        unscale_grads: bool = False,
    ) -> None:
        check_arguments(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._members = Members()
        TorchAdam.__init__(
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
            unscale_grads=unscale_grads,
        )

    def _set_options(
        self,
        differentiable: bool,
        *,
        backend: BackendName,
        state_dtype: torch.dtype | None,
        decay_form: DecayForm | None,
        ema_decay: EmaDecay | None,
        ema_dtype: torch.dtype | None,
        stats: bool,
        unscale_grads: bool,
    ) -> None:
        for name, dtype in (("state_dtype", state_dtype), ("ema_dtype", ema_dtype)):
            if dtype is not None and dtype not in FORMATS:
                raise ValueError(f"Invalid {name}: {dtype}. Choose {one_of(FORMATS)}.")
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
        self.unscale_grads = unscale_grads
        self._members = None
        self._captured_plans = []
        self._turn = threading.RLock()
        # Only what is asked for: groups and state dicts are torch's where nothing is.
        if decay_form is not None:
            self.defaults["decay_form"] = decay_form
        if ema_decay is not None:
            self.defaults["ema_decay"] = ema_decay(0) if callable(ema_decay) else ema_decay
        for index, group in enumerate(self.param_groups):
            self._complete_group(group)
            check_group(group, f" (in parameter group {index})")

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

    def _complete_group(self, group: dict[str, Any]) -> None:
        """Adds what a group needs beside torch's keys."""
        for key in ("decay_form", "ema_decay"):
            if key in self.defaults:
                group.setdefault(key, self.defaults[key])
        if group.get("decay_form") == "independent":
            group.setdefault("base_lr", float(group["lr"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch does."""
        if isinstance(param_group, dict):
            check_arguments(param_group.get("params"))
        add = super().add_param_group
        members = self._members
        with members.stand_in(self, param_group, add) if members else nullcontext():
            add(param_group)
        self._complete_group(self.param_groups[-1])

    @_disable_dynamo
    def _step(self, zero_grads: bool = False) -> None:
        with self._turn:
            self._step_now(zero_grads)

    def _step_now(self, zero_grads: bool) -> None:
        if self._averages_swapped:
            raise RuntimeError(
                "step() inside swap_ema(): the parameters hold their averages. Leave it first."
            )
        capturing = self._check_capture()
        if capturing and callable(self.ema_decay):
            raise RuntimeError(
                "step() is being captured in a graph, which would keep for good what the callable "
                "ema_decay returns now: construct the optimizer with a number"
            )
        self._update_ema_decay()
        tail, plan = self._tail(zero_grads), self.plan
        reason: str | None = "there is none yet"
        is_watched = modes.are_active()
        if plan is not None and plan.checked_by_native and not is_watched:
            reason = self._run(plan, tail, capturing)
        if reason is None:
            return
        kind = watched.WatchedPlan if is_watched else Plan
        for _ in range(_ATTEMPTS):
            plan = self._new_plan(reason, capturing, kind)
            if plan is None:
                break
            reason = self._run(plan, tail, capturing)
            if reason is None:
                return
            if tail.measured_grads is not None and self._clipping is not None:
                self._clipping.raise_changed(plan.count_grads(self))
        if plan is None:
            if zero_grads or self._clipping is not None:
                raise RuntimeError(
                    "step(zero_grads=True) and clip_grad_norm_() are not supported with "
                    "`differentiable`: use zero_grad() and torch.nn.utils.clip_grad_norm_()"
                )
            _torch_step(self)
            return
        raise RuntimeError(_CHANGING.format(reason))

    def _tail(self, zero_grads: bool) -> Tail:
        """What surrounds the step that is asked for."""
        # Set and deleted by GradScaler around its call of step().
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        tail = Tail(
            grad_scale,
            found_inf,
            zero_grads=zero_grads,
            unscale_grads=self.unscale_grads,
            statistics=self.stats,
        )
        if self._clipping is not None and self._clipping.still_holds():
            tail = self._clipping.added_to(tail, self)
        return tail

    def _run(self, plan: Plan, tail: Tail, capturing: bool) -> str | None:
        """Takes the step by a plan and counts it; or says why the plan is stale."""
        at_once = plan.is_one_call(tail) and not callable(self.ema_decay)
        with nullcontext() if at_once else signals.deferred():
            reason = plan.step(self, tail)
            if reason is None:
                self._ema_steps += 1
                self._forget_clipping()
                if capturing and plan not in self._captured_plans:
                    self._captured_plans.append(plan)
        return reason

    def _new_plan(
        self, reason: str, capturing: bool = False, kind: type[Plan] = Plan
    ) -> Plan | None:
        """A plan in place of one that is stale for that reason; None for torch's own step."""
        if any(group.get("differentiable") for group in self.param_groups):
            return None
        if capturing:
            raise RuntimeError(
                f"step() is being captured in a graph and needs a new plan ({reason}): take "
                "a step on the same parameters and state before capturing"
            )
        self.plan = None  # never a stale one, should the next line raise
        self.plan = kind(self)
        return self.plan

    def _plan_of_grads(self) -> Plan | None:
        """The plan, with gradients gathered; nothing else is looked at."""
        plan = self.plan
        reason: str | None = "there is none yet"
        if plan is not None and plan.checked_by_native:
            reason = plan.stale_grads(self)
        if reason is not None:
            plan = self._new_plan(reason)
            if plan is not None and plan.checked_by_native and (reason := plan.stale_grads(self)):
                raise RuntimeError(_CHANGING.format(reason))
        return plan

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
        norms = float(max_norm), float(norm_type)
        with self._turn:
            return clip_grad_norm(self, *norms, error_if_nonfinite, scaler)

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

    def statistics(self) -> Statistics:
        """What the last step saw of each parameter: norms and counts, from its own pass.

        Nothing waits for the device. The same bits each time. GPUs sum in float64; CPUs in runs of
        1,024 elements in float32, and the runs' sums in float64.

        Raises:
            RuntimeError: ``stats=True`` was not asked for, or no step has been taken since.
        """
        plan = self.plan
        found = plan.statistics(self) if self.stats and plan is not None else None
        if found is None:
            raise RuntimeError("no statistics: construct the optimizer with stats=True, then step")
        names = names_of(self.param_groups)
        return replace(found, names=[names[param] for param in found.params])

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
                skipped for an inf. (A ``GradScaler`` calls ``step`` then only with ``fused=True``
                or after ``clip_grad_norm_``; else use ``zero_grad``.)

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
        names = ("backend", "state_dtype", "ema_decay", "ema_dtype", "stats", "unscale_grads")
        ours = {name: getattr(self, name) for name in (*names, "_ema_steps")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with torch.device("cpu"):  # torch makes a tensor of a step that is a number, where that is
            super().__setstate__(state)
        self.plan = None
        self.__dict__.setdefault("_captured_plans", [])
        self.__dict__.setdefault("_turn", threading.RLock())
        self.__dict__.setdefault("_unscales", bool(self.defaults.get("fused")))
        for group in self.param_groups:
            self._complete_group(group)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer, in whole or not at all.

        As torch's, except that the moments keep the dtypes they were saved with (torch casts them
        to the parameter's), or get ``state_dtype`` where one was given.

        Raises:
            ValueError: something does not fit, or is missing; the message names it.
        """
        checkpoint.load(self, state_dict)


def _torch_step(optimizer: Adam) -> None:
    """torch's own step, for ``differentiable=True``: autograd goes through its operations."""
    step = TorchAdam.step
    if getattr(step, "hooked", False):  # the hooks have been called for warpstep's step
        step = step.__wrapped__  # type: ignore[attr-defined]  # set by functools.wraps
    step(optimizer)
