"""What optimizers of warpstep have in common: steps by plans, options, pickles, state dicts."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports torch._dynamo only when used

from warpstep import checkpoint, foreign_states, modes, operator_plan, signals
from warpstep.averages import EmaDecay
from warpstep.backends import BackendName, requested_backend
from warpstep.clip_grad_norm import ClipsGradNorm
from warpstep.groups import Members
from warpstep.hypers import (
    DecayForm,
    check_arguments,
    check_group,
    check_own_options,
    complete_group,
)
from warpstep.masters import KeepsMasters
from warpstep.options import Options
from warpstep.plan import Plan
from warpstep.precision import Copies, Master, Precision, Rounding, StateDtype, paired_copies
from warpstep.rules import Rule
from warpstep.shards import own_part
from warpstep.state import names_of
from warpstep.statistics import Statistics
from warpstep.tail import Tail

# How often a plan is made for one step. It is stale at once only where another thread changed what
# is stepped meanwhile: that may happen once or twice, and so often in a row only if it goes on.
_ATTEMPTS = 5
_CHANGING = "step() found that {} while it looked: no other thread may change what is stepped"


class Optimizer(KeepsMasters, ClipsGradNorm):
    """What every optimizer of warpstep has, beside one of torch's classes that it is derived from.

    Attributes:
        rule: what it steps by.
        backend: what was asked for (``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``).
        precision: what was asked for: the dtypes of states, and how they are rounded.
        plan: how the last step was run, or None before the first. ``print(optimizer.plan)`` has a
            line for each bucket, the tensors that one kernel launch steps: their backend, number,
            device and dtypes; and says which parameters the reference steps, and why.
    """

    rule: Rule
    backend: BackendName = "auto"
    precision: Precision = Precision()
    stats: bool = False
    unscale_grads: bool = False
    plan: Plan | None = None
    # Plans in captured CUDA graphs, whose tables the graphs go on reading.
    _captured_plans: list[Plan]
    _members: Members | None = None  # while constructed

    def _set_options(
        self,
        differentiable: bool,
        *,
        backend: BackendName,
        state_dtype: StateDtype | None,
        master: Master | None,
        rounding: Rounding | None,
        seed: int,
        copies: Copies | None,
        decay_form: DecayForm | None,
        ema_decay: EmaDecay | None,
        ema_dtype: torch.dtype | None,
        stats: bool,
        unscale_grads: bool,
    ) -> None:
        self.precision = Precision(state_dtype, ema_dtype, rounding, seed)
        self.precision.check()
        ours: dict[str, Any] = {"state_dtype": state_dtype, "rounding": rounding, "copies": copies}
        ours["stats"] = stats or None
        given = {"decay_form": decay_form, "ema_decay": ema_decay, "master": master}
        for group in (given, *self.param_groups):
            ours |= {key: group[key] for key in given if group.get(key)}
        for name, value in ours.items():
            if differentiable and value is not None:
                raise ValueError(f"`{name}` is not supported with `differentiable`")
        self.backend = requested_backend(backend)
        self.ema_decay = ema_decay
        self._copies: dict[Tensor, Tensor] = {}
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
        if master is not None:
            self.defaults["master"] = master
        for index, group in enumerate(self.param_groups):
            self._note_schedule(group, "ema_decay" in group)
            complete_group(group, self.defaults)
            check_group(group, self.rule, f" (in parameter group {index})")
        if copies is not None:
            self._copies = paired_copies(self.param_groups, copies)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch does. Raises for what is no option, and adds nothing."""
        if isinstance(param_group, dict):
            check_arguments(param_group.get("params"))
            completed = {**self.defaults, **param_group}
            complete_group(completed, self.defaults)
            check_own_options(completed, f" (in parameter group {len(self.param_groups)})")
        has_own_decay = isinstance(param_group, dict) and "ema_decay" in param_group
        add = super().add_param_group
        members = self._members
        with members.stand_in(self, param_group, add) if members else nullcontext():
            add(param_group)
        self._note_schedule(self.param_groups[-1], has_own_decay)
        complete_group(self.param_groups[-1], self.defaults)

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
        if plan is not None and plan.lasts and not is_watched:
            reason = self._run(plan, tail, capturing)
        if reason is None:
            return
        kind = operator_plan.OperatorPlan if is_watched else Plan
        for _ in range(_ATTEMPTS):
            plan = self._new_plan(reason, "step" if capturing else None, kind)
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
                    "`differentiable`, nor with sparse gradients: use zero_grad() and "
                    "torch.nn.utils.clip_grad_norm_()"
                )
            self._torch_step()
            return
        raise RuntimeError(_CHANGING.format(reason))

    @property
    def state_dtype(self) -> StateDtype | None:
        """The dtype of new moments, as it was asked for."""
        return self.precision.state_dtype

    @property
    def ema_dtype(self) -> torch.dtype | None:
        """The dtype of new averages, as it was asked for."""
        return self.precision.ema_dtype

    def _torch_step(self) -> None:
        """torch's own step, through whose operations autograd goes, and which has sparse ones."""
        step: Any = super().step
        if getattr(step, "hooked", False):  # the hooks have been called for warpstep's step
            step = functools.partial(step.__wrapped__, self)
        step()

    def _tail(self, zero_grads: bool) -> Tail:
        """What surrounds the step that is asked for."""
        # Set and deleted by GradScaler around its call of step().
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if isinstance(found_inf, int):  # GradScaler's sum where it has found no gradient
            found_inf = None
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
        if capturing:
            plan.check_capture(tail)
        at_once = plan.is_one_call(tail) and not callable(self.ema_decay)
        with nullcontext() if at_once else signals.deferred():
            reason = plan.step(self, tail)
            if reason is None:
                self._ema_steps += 1
                self._forget_clipping()
                if capturing:
                    self._keep_for_graph(plan)
        return reason

    def _keep_for_graph(self, plan: Plan) -> None:
        """Keeps a plan whose tables a captured graph goes on reading."""
        if plan not in self._captured_plans:
            self._captured_plans.append(plan)

    def _new_plan(
        self, reason: str, captured: str | None = None, kind: type[Plan] = Plan
    ) -> Plan | None:
        """A plan in place of one that is stale for that reason; None for torch's own step.

        ``captured``: the method that a graph is being captured of, if one is.
        """
        if self._is_torchs():
            return None
        if captured is not None:
            raise RuntimeError(
                f"{captured}() is being captured in a graph and needs a new plan ({reason}): take "
                "a step on the same parameters and state before capturing"
            )
        self._forget_stale_residuals()
        self.plan = None  # never a stale one, should the next line raise
        self.plan = kind(self, self._plan_options())
        return self.plan

    def _is_torchs(self) -> bool:
        """Whether the step is torch's own: a differentiable one, or, where torch's optimizer takes
        them and nothing else is asked for, one of sparse gradients.
        """
        if any(group.get("differentiable") for group in self.param_groups):
            return True
        more = self.stats or self._copies or self.precision != Precision(seed=self.precision.seed)
        more = more or any(
            group.get(key) is not None
            for group in self.param_groups
            for key in ("decay_form", "ema_decay", "master")
        )
        if more or not self.rule.takes_sparse:
            return False
        params = (param for group in self.param_groups for param in group["params"])
        grads = (param.grad for param in params if isinstance(param, Tensor))
        return any(grad is not None and grad.is_sparse for grad in grads)

    @property
    def copies(self) -> Mapping[Tensor, Tensor]:
        """By parameter, what gets its value at each step: as constructed, and not to be changed."""
        return MappingProxyType(self._copies)

    def _plan_options(self) -> Options:
        """What a new plan is asked for."""
        return Options(self.rule, self.backend, self.precision, self.copies)

    def _plan_of_grads(self) -> Plan | None:
        """The plan, with gradients gathered; nothing else is looked at."""
        plan = self.plan
        reason: str | None = "there is none yet"
        if plan is not None and plan.lasts:
            reason = plan.gather_grads(self)
        if reason is not None:
            plan = self._new_plan(reason, "clip_grad_norm_" if self._check_capture() else None)
            if plan is not None and plan.lasts and (reason := plan.gather_grads(self)):
                raise RuntimeError(_CHANGING.format(reason))
        if plan is not None and _is_capturing():
            self._keep_for_graph(plan)  # the step may stay outside, and keep another
        return plan

    def statistics(self) -> Statistics:
        """What the last step saw of each parameter: norms and counts, from its own pass.

        Nothing waits for the device. The bits are the same each time; a CPU's last ones may differ
        from a GPU's (docs/concepts/numerics.md says how either sums).

        Raises:
            RuntimeError: ``stats=True`` was not asked for, or no step has been taken since.
        """
        plan = self.plan
        found = plan.statistics(self) if self.stats and plan is not None else None
        if found is None:
            missing = (
                "no step has been taken since the optimizer was made, loaded or copied"
                if self.stats
                else "construct the optimizer with stats=True, then step"
            )
            raise RuntimeError(f"no statistics: {missing}")
        names = names_of(self.param_groups)
        return replace(found, names=[names[param] for param in found.params])

    def state_bytes(self) -> dict[str, int]:
        """How many bytes the state takes in this process, by its keys (``"exp_avg"``, ...).

        What each parameter's state is kept in: ``print(optimizer.plan)``.
        """
        found: Counter[str] = Counter()
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found[key] += own_part(value).nbytes
        return dict(found)

    def _check_capture(self) -> bool:
        """Whether a CUDA graph is being captured; raises as torch does if that cannot work."""
        if not _is_capturing():
            return False
        if "capturable" in self.rule.flags:
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
            BackendUnavailableError: ``backend`` names one that cannot run here; the message says
                why.
            RuntimeError, TypeError, ValueError: a gradient or a state is invalid, or a
                hyper-parameter no number; the message names it. A number is taken whatever it is,
                as torch does.

        No parameter and no state has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(zero_grads)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        self._forget_stale_residuals()
        names = ("backend", "precision", "ema_decay", "stats", "unscale_grads", "_copies")
        ours = {name: getattr(self, name) for name in (*names, "_ema_steps")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with torch.device("cpu"):  # torch makes a tensor of a step that is a number, where that is
            super().__setstate__(state)
        self.plan = None
        self.__dict__.setdefault("_captured_plans", [])
        self.__dict__.setdefault("_turn", threading.RLock())
        self.__dict__.setdefault("_copies", {})
        self.__dict__.setdefault("_unscales", bool(self.defaults.get("fused")))
        for group in self.param_groups:
            complete_group(group, self.defaults)

    @_disable_dynamo
    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state as torch's: tensors are the optimizer's own. Hooks are called as torch does.

        Args:
            portable: for torch's optimizers, and others that take their state dicts: moments in
                float32, whatever they are stored in (those of float64 and complex parameters as
                they are), and no masters, whose values are ``master_parameters()``. Moments that
                are stored otherwise are copied.
        """
        self._forget_stale_residuals()
        if not portable:
            return super().state_dict()
        convert = self.register_state_dict_post_hook(
            lambda _, state_dict: foreign_states.portable(state_dict, self.rule), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            convert.remove()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer, in whole or not at all.

        As torch's, except that the moments keep the dtypes they were saved with (torch casts them
        to the parameter's), or get ``state_dtype`` where one was given.

        Raises:
            KeyError: there is no ``"state"`` or no ``"param_groups"``: it is no optimizer's.
            ValueError: something does not fit, or is missing; the message names it.
        """
        checkpoint.load_for_rule(self, self.rule, state_dict, self.precision)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
