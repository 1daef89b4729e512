"""``warpstep.compat.FusedAdam``: Transformer Engine's and apex's class, stepped in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer as TorchOptimizer
from torch.optim.optimizer import ParamsT

from warpstep import signals
from warpstep.backends import BackendName
from warpstep.compat.counters import Counters, advance, put_on_devices
from warpstep.compat.masters import FUSED_ADAM, OWN_KEYS, FusedOptions, Kept
from warpstep.compat.refused import check_options
from warpstep.compat.state_dicts import LoadsStates, load, saved
from warpstep.groups import Members
from warpstep.hypers import check_arguments
from warpstep.optimizer import Optimizer
from warpstep.options import Options
from warpstep.plan import Plan
from warpstep.tail import Tail
from warpstep.unscaling import scale_and_found_inf


class FusedAdam(Optimizer, LoadsStates):
    """A drop-in for Transformer Engine's and apex's ``FusedAdam``, in one kernel launch.

    The formula is `warpstep.AdamW`'s, or `warpstep.Adam`'s with ``adam_w_mode=False``. The state of
    a parameter is ``exp_avg``, ``exp_avg_sq`` and, with ``master_weights``, ``master_param``, and
    nothing else; a group counts its steps in ``"step"``. All parameters of a group get a state at
    the first step, those without a gradient, too.

    Args:
        params, lr, betas, eps, weight_decay: as ``torch.optim.AdamW``'s; ``weight_decay`` is 0.
        amsgrad: must be False.
        bias_correction: False leaves the moments as they are: they begin as zeros, and are small
            at first.
        adam_w_mode: decoupled weight decay; False adds ``weight_decay * p`` to the gradient.
        capturable: for CUDA graphs: ``lr`` and the groups' ``"step"`` are tensors on the device.
            With every other option, too.
        master_weights: keep a float32 master of bfloat16 and float16 parameters in the state as
            ``master_param``. It is what counts: what is written to the parameter is overwritten by
            the next step. Of other parameters ``master_param`` is the parameter itself.
        master_weight_dtype: float32.
        exp_avg_dtype, exp_avg_sq_dtype: float32 or bfloat16. exp_avg_sq is rounded to bfloat16 at
            random, right in the mean, since it could not decay otherwise.
        use_decoupled_grad: gradients are ``p.decoupled_grad``, of any dtype, not ``p.grad``.
        store_param_remainders: with ``master_weights``, of a bfloat16 parameter's master keep only
            the 16 bits (int16) that the parameter does not have. No effect on other parameters.
        set_grad_none: deprecated: what ``zero_grad`` does by default.
        backend, seed: as those of `warpstep.AdamW`.

    Raises:
        RuntimeError: an option asks for what there is not here; the message says what there is.
        TypeError, ValueError: an option is of no kind or value that is known.
    """

    rule = FUSED_ADAM
    _planned_for: tuple[Any, ...] | None = None  # what `_asked` said when the plan was made

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
        backend: BackendName = "auto",
        seed: int = 0,
    ) -> None:
        check_options(
            betas=betas,
            amsgrad=amsgrad,
            master_weight_dtype=master_weight_dtype if master_weights else torch.float32,
            exp_avg_dtype=exp_avg_dtype,
            exp_avg_sq_dtype=exp_avg_sq_dtype,
        )
        check_arguments(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.adam_w_mode = int(adam_w_mode)
        self.capturable = capturable
        self.master_weights = master_weights
        self.master_weight_dtype = master_weight_dtype
        self.exp_avg_dtype = exp_avg_dtype
        self.exp_avg_sq_dtype = exp_avg_sq_dtype
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights
        self.set_grad_none = set_grad_none
        if set_grad_none is not None:
            warnings.warn(
                "set_grad_none is deprecated: pass set_to_none to zero_grad()",
                DeprecationWarning,
                stacklevel=2,
            )
        self._members = Members()
        defaults = {
            "lr": torch.as_tensor(lr, dtype=torch.float32) if capturable else lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        TorchOptimizer.__init__(self, params, defaults)
        self._set_options(
            False,
            backend=backend,
            state_dtype=(exp_avg_dtype, exp_avg_sq_dtype),
            master=None,
            rounding=None,
            seed=seed,
            copies=None,
            decay_form=None,
            ema_decay=None,
            ema_dtype=None,
            stats=False,
            unscale_grads=False,
        )
        self._unscales = capturable  # as in Transformer Engine: GradScaler leaves it to the step

    # ---- Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch does."""
        if isinstance(param_group, dict):
            param_group = {**param_group, **self._own_items()}
        super().add_param_group(param_group)
        self.complete_group(self.param_groups[-1])

    def _own_items(self) -> dict[str, bool]:
        return dict(zip(OWN_KEYS, (False, bool(self.adam_w_mode)), strict=True))

    def complete_group(self, group: dict[str, Any]) -> None:
        """Adds what a step reads of a group, whoever has made it."""
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        group.update(self._own_items())
        if self.capturable and group["params"]:
            device = group["params"][0].device
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)

    # ---- State

    def _kept(self) -> Kept:
        remainders = bool(self.store_param_remainders and self.master_weights)
        dtypes = (self.exp_avg_dtype, self.exp_avg_sq_dtype)
        return Kept(*dtypes, bool(self.master_weights), remainders)

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """Gives a parameter its state anew: zeros, and its value as its master.

        Args:
            param: one of the optimizer's parameters.
            store_param_remainders: must be what the constructor was told, or None.

        Raises:
            ValueError: ``store_param_remainders`` is otherwise for a bfloat16 parameter.
        """
        kept = self._kept()
        if (
            store_param_remainders is not None
            and param.dtype == torch.bfloat16
            and kept.masters
            and bool(store_param_remainders) != kept.has_remainder(param)
        ):
            raise ValueError(
                f"store_param_remainders is {store_param_remainders}, and the optimizer was "
                f"constructed with {self.store_param_remainders}: a step needs what that keeps"
            )
        self.state[param] = {name: kept.new(name, param) for name in kept.names}

    def get_unscaled_state(
        self, param: Tensor, state_name: str, skip_unscale: bool = False
    ) -> Tensor:
        """A state's numbers: in float32, or the int16 remainders of a master as they are.

        What is float32 already is returned itself, else a copy.

        Args:
            param: one of the optimizer's parameters.
            state_name: ``"exp_avg"``, ``"exp_avg_sq"`` or ``"master_param"``.
            skip_unscale: return what is stored, in its dtype.
        """
        stored: Tensor = self.state.get(param, {})[state_name]
        as_stored = skip_unscale or stored.dtype in (torch.int16, torch.float64)
        return stored if as_stored else stored.to(torch.float32)

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Writes numbers into a parameter's state, which is made where there is none.

        A float32 master may be written where remainders are kept: the parameter becomes the nearest
        bfloat16. The master of a parameter that is its own is written to the parameter.

        Args:
            param: one of the optimizer's parameters.
            state_name: ``"exp_avg"``, ``"exp_avg_sq"`` or ``"master_param"``.
            unscaled_state: float32 of the parameter's shape; of a master, also int16 remainders.

        Raises:
            ValueError: the name is another, or the numbers do not fit.
        """
        kept = self._kept()
        if state_name not in kept.names:
            raise ValueError(f"{state_name!r} is no state here: there are {', '.join(kept.names)}")
        state = self.state.get(param, {}).get(state_name)
        if state is None or state.dtype != kept.dtype_of(state_name, param):
            state = kept.new(state_name, param)
        kept.write(state_name, param, state, unscaled_state)
        self.state[param][state_name] = state

    def _forget_stale_residuals(self) -> None:
        """As in Transformer Engine, a master counts whatever is written to its parameter."""

    # ---- Checkpoints

    @_disable_dynamo
    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state as Transformer Engine's: moments in float32, and ``"step"`` an int.

        ``portable=True``: for torch's optimizers: with a ``"step"`` in each state and no masters.
        """
        return saved(super().state_dict(), portable)

    @_disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of Transformer Engine's, of apex's or of torch's AdamW.

        In whole or not at all. Parameters are not written to: a float32 master of a parameter with
        a remainder counts from the next step on.

        Raises:
            ValueError: something does not fit, or is missing; the message names it.
        """
        load(self, self._kept(), state_dict)

    def __getstate__(self) -> dict[str, Any]:
        names = (
            *("adam_w_mode", "capturable", "master_weights", "master_weight_dtype"),
            *("exp_avg_dtype", "exp_avg_sq_dtype", "use_decoupled_grad"),
            *("store_param_remainders", "set_grad_none", "_unscales"),
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    # ---- Steps

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Resets the gradients that the step reads; by default they are None afterwards."""
        if set_to_none is None:
            set_to_none = True if self.set_grad_none is None else self.set_grad_none
        elif self.set_grad_none not in (None, set_to_none):
            raise ValueError(
                f"zero_grad(set_to_none={set_to_none}), and the optimizer was constructed with "
                f"set_grad_none={self.set_grad_none}"
            )
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        self._forget_clipping()
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if set_to_none:
                param.decoupled_grad = None
            elif getattr(param, "decoupled_grad", None) is not None:
                param.decoupled_grad.detach().zero_()

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        grads: None = None,
        output_params: None = None,
        scale: None = None,
        grad_norms: None = None,
        zero_grads: bool = False,
    ) -> Any:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
            grad_scaler: whose scale the gradients carry, unless it has unscaled them: they are
                divided by it in the step's pass, which is skipped where one is not finite.
            grads, output_params, scale, grad_norms: apex's, which must be None, as there.
            zero_grads: leave the gradients zero, written in the same pass.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError: as `warpstep.AdamW`'s.
        """
        given = {"grads": grads, "output_params": output_params}
        given |= {"scale": scale, "grad_norms": grad_norms}
        for name, value in given.items():
            if value is not None:
                raise RuntimeError(
                    f"step({name}=...) is not supported, as in apex: gradients are the "
                    "parameters', and their scale that of grad_scaler="
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grad_scaler is None or not grad_scaler.is_enabled():
            self._step(zero_grads)
            return loss
        if self.use_decoupled_grad:
            raise RuntimeError(
                "step(grad_scaler=...) with use_decoupled_grad: a GradScaler looks at p.grad for "
                "infs, not at p.decoupled_grad. Unscale the gradients before the step."
            )
        self.grad_scale, self.found_inf = scale_and_found_inf(grad_scaler, self)
        try:
            self._step(zero_grads)
        finally:
            del self.grad_scale, self.found_inf
        return loss

    def _asked(self) -> tuple[Any, ...]:
        """What of the options a plan depends on: they may be set in mid-run, as Megatron does."""
        return (
            self.master_weights,
            self.store_param_remainders,
            self.use_decoupled_grad,
            self.adam_w_mode,
            self.capturable,
        )

    def _plan_options(self) -> Options:
        for group in self.param_groups:
            self.complete_group(group)
        if self.capturable:
            put_on_devices(self.param_groups)
        self._planned_for = self._asked()
        kept, counts = self._kept(), Counters(self.param_groups)
        return FusedOptions(
            self.rule,
            self.backend,
            self.precision,
            copies={param: param for param in counts.of if kept.has_own_master(param)},
            counters=counts.of,
            grad_name="decoupled_grad" if self.use_decoupled_grad else "grad",
            kept=kept,
            counts=counts,
            capturable=bool(self.capturable),
        )

    def _step_now(self, zero_grads: bool) -> None:
        if self._planned_for != self._asked():
            self.plan = None
        super()._step_now(zero_grads)

    def _plan_of_grads(self) -> Plan | None:
        if self._planned_for != self._asked():
            self.plan = None
        return super()._plan_of_grads()

    def _run(self, plan: Plan, tail: Tail, capturing: bool) -> str | None:
        options = plan.options
        assert isinstance(options, FusedOptions)
        options.counts.fill(self.param_groups)
        with signals.deferred():  # a step counts
            reason = super()._run(plan, tail, capturing)
            if reason is None:
                advance(self.param_groups, tail.found_inf)
        return reason

    def _check_capture(self) -> bool:
        capturing = super()._check_capture()
        if capturing and not self.capturable:
            raise RuntimeError(
                "step() is being captured in a graph, which would keep this step's count for good: "
                "construct the optimizer with capturable=True"
            )
        return capturing
