"""``warpstep.AdamW`` and ``warpstep.Adam``: torch's classes, stepped in one launch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports torch._dynamo only when used
from torch.optim.optimizer import ParamsT

from warpstep.backends import requested_backend
from warpstep.plan import Plan, parameter_name
from warpstep.recipes import FORMATS
from warpstep.state import MOMENTS, describe

Betas = tuple[float | Tensor, float | Tensor]


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
    plan: Plan | None = None
    # Plans in captured CUDA graphs, whose tables the graphs go on reading.
    _captured_plans: list[Plan]

    def _set_options(
        self, state_dtype: torch.dtype | None, backend: str, differentiable: bool
    ) -> None:
        if state_dtype is not None and state_dtype not in FORMATS:
            raise ValueError(f"Invalid state_dtype: {state_dtype} is none of {FORMATS}")
        if state_dtype is not None and differentiable:
            raise ValueError("`state_dtype` is not supported with `differentiable`")
        self.backend = requested_backend(backend)
        self.state_dtype = state_dtype
        self._captured_plans = []
        self._step_supports_amp_scaling = not differentiable

    @_disable_dynamo
    def _step(self) -> None:
        capturing = self._check_capture()
        plan = self.plan
        reason = "there is none yet"
        if plan is not None and plan.checked_by_native:
            reason = plan.stale(self) or ""
        if reason:
            if any(group["differentiable"] for group in self.param_groups):
                _torch_step(self)
                return
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
        # Set and deleted by GradScaler around its call of step().
        plan.run(self, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        if capturing and plan not in self._captured_plans:
            self._captured_plans.append(plan)

    def _check_capture(self) -> bool:
        """Whether a CUDA graph is being captured; raises as torch does if that cannot work."""
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return False
        check = getattr(self, "_accelerator_graph_capture_health_check", None)  # torch >= 2.12
        (check or self._cuda_graph_capture_health_check)()
        return True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError: a gradient, a state or a hyper-parameter is
                invalid; the message names it. No parameter and no state has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        options = {"backend": self.backend, "state_dtype": self.state_dtype}
        return {**super().__getstate__(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plan = None
        self.__dict__.setdefault("_captured_plans", [])
        self._step_supports_amp_scaling = not any(g["differentiable"] for g in self.param_groups)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer, in whole or not at all.

        As torch's, except that the moments keep the dtypes they were saved with (torch casts them
        to the parameter's), or get ``state_dtype`` where one was given.

        Raises:
            ValueError: the groups, or the shape of a tensor of the state, do not fit.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict

        groups = deepcopy(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                "loaded state dict has a different number of parameter groups: "
                f"{len(groups)}, the optimizer {len(self.param_groups)}"
            )
        for index, (mine, loaded) in enumerate(zip(self.param_groups, groups, strict=True)):
            if len(mine["params"]) != len(loaded["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: group {index} has {len(loaded['params'])} parameters, "
                    f"the optimizer's {len(mine['params'])}"
                )
        ids = chain.from_iterable(group["params"] for group in groups)
        places = (
            (param, loaded, parameter_name(self.param_groups, g, i))
            for g, (mine, loaded) in enumerate(zip(self.param_groups, groups, strict=True))
            for i, param in enumerate(mine["params"])
        )
        place_of = dict(zip(ids, places, strict=True))

        state: dict[Any, Any] = type(self.state)(dict)
        for key, value in state_dict["state"].items():
            if key in place_of:
                param, group, name = place_of[key]
                state[param] = self._loaded_state(name, param, group, value)
            else:
                state[key] = value
        for mine, loaded in zip(self.param_groups, groups, strict=True):
            loaded["params"] = mine["params"]
            if "param_names" in mine:
                loaded.setdefault("param_names", mine["param_names"])
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_state(
        self, name: str, param: Tensor, group: dict[str, Any], saved: dict[str, Any]
    ) -> dict[str, Any]:
        """Copies of the tensors of one parameter's saved state, where and as they are needed."""
        state = dict(saved)
        for key, value in saved.items():
            if not isinstance(value, Tensor):
                state[key] = deepcopy(value)
            elif key == "step":
                if value.numel() != 1:
                    raise ValueError(
                        f"loaded state dict does not fit {name}: 'step' is {describe(value)}, "
                        "expected one number"
                    )
                on_device = group.get("capturable") or group.get("fused")
                device = param.device if on_device else value.device
                state[key] = value.detach().to(device, torch.float32, copy=True)
            elif key in MOMENTS:
                if value.shape != param.shape:
                    raise ValueError(
                        f"loaded state dict does not fit {name}: {key!r} is {describe(value)}, "
                        f"the parameter {describe(param)}"
                    )
                recast = self.state_dtype is not None and value.is_floating_point()
                dtype = self.state_dtype if recast else value.dtype
                state[key] = value.detach().to(param.device, dtype, copy=True)
            else:
                state[key] = value.detach().to(param.device, copy=True)
        return state


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
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
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
        self._set_options(state_dtype, backend, differentiable)


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
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
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
        self._set_options(state_dtype, backend, differentiable)
