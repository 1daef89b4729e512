"""One parameter's state: checked against the parameter, completed where something is missing.

Nothing here changes an optimizer: functions return what the state is to be, or raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.recipes import dtype_name, ema_dtype, ema_dtypes, moment_dtype
from warpstep.rules import Rule
from warpstep.shards import holds_values, layout_of, own_part


def describe(tensor: Tensor) -> str:
    """``float32 of shape (3, 4) on cpu``, for messages."""
    shape = "scalar" if tensor.dim() == 0 else f"shape {tuple(tensor.shape)}"
    return f"{dtype_name(tensor.dtype)} of {shape} on {tensor.device}"


def parameter_name(groups: list[dict[str, Any]], group: int, index: int) -> str:
    """``parameter 3 of group 0 ('layer.weight')``, for messages."""
    names = groups[group].get("param_names")
    name = f" ({names[index]!r})" if names else ""
    return f"parameter {index} of group {group}{name}"


def names_of(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Each parameter's name where names were given, else ``parameter 3 of group 0``."""
    names: dict[Tensor, str] = {}
    for g, group in enumerate(groups):
        given = group.get("param_names") or ()
        for i, param in enumerate(group["params"]):
            names.setdefault(param, given[i] if given else parameter_name(groups, g, i))
    return names


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is one of torch's own kind with memory that kernels can walk.

    Subclasses that intercept operations (DTensor, FakeTensor, quantised weights) are not, nor are
    tensors inside a transform of torch.func, or lazily negated or conjugated ones, whose memory
    holds other numbers.
    """
    kind = type(tensor)
    plain = (
        kind in (Tensor, torch.nn.Parameter)
        or kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # a mere subclass
    )
    if not plain or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_neg() or tensor.is_conj())


def is_freed(tensor: Tensor) -> bool:
    """Whether the tensor, or this process's shard of it, has elements and no memory."""
    tensor = own_part(tensor)
    if not is_plain(tensor) or tensor.numel() == 0:
        return False
    return tensor.data_ptr() == 0 or tensor.untyped_storage().nbytes() == 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory, in any order of dimensions, none twice."""
    expected = 1
    dims = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
    if tensor.numel() == 0:
        return True
    for stride, size in sorted(dims):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def is_walkable(param: Tensor, grad: Tensor, moments: list[Tensor], step: Tensor | None) -> bool:
    """Whether kernels can walk a parameter's tensors side by side, or this process's shards.

    A gradient may have other strides: it is copied.
    """
    parts = [own_part(t) for t in (param, grad, *moments)] + ([] if step is None else [step])
    if not all(is_plain(part) for part in parts):
        return False
    layout, own = layout_of(param), own_part(param)
    if not holds_values(layout) or any(layout_of(t) != layout for t in (grad, *moments)):
        return False
    return is_dense(own) and all(same_layout(own_part(t), own) for t in moments)


def match_layout(param: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of the dense ``param``: itself, or a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if same_layout(tensor, param):
        return tensor
    with torch.no_grad():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises where ``grad`` cannot be ``param``'s gradient; ``name`` is the parameter's."""
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(
            f"{name} is {describe(param)}: only floating point and complex parameters can be "
            "stepped. Leave it out of the optimizer."
        )
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported (torch.optim.SparseAdam takes them): {name} has a "
            f"gradient of layout {grad.layout}"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{name} is {describe(param)}, its gradient is {describe(grad)}: shape and device "
            "must be the same"
        )
    if grad.is_complex() != param.is_complex() or not (
        grad.is_floating_point() or grad.is_complex()
    ):
        raise TypeError(
            f"{name} is {describe(param)}, its gradient is {describe(grad)}: both must be real, or "
            "both complex, of a floating point dtype"
        )
    if any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)):
        raise RuntimeError(
            f"{name} is an expanded tensor of strides {param.stride()}: several of its elements "
            "share their memory and cannot be stepped apart. Use a clone as the parameter."
        )
    for what, tensor in (("", param), ("'s gradient", grad)):
        if is_freed(tensor):
            raise RuntimeError(
                f"{name}{what} has {tensor.numel()} elements and no memory: its storage was "
                "freed. Bring it back (for a sharded module, gather it) before the step."
            )


def check_device_for_fused(name: str, param: Tensor) -> None:
    """Raises, as torch does, where ``fused=True`` is asked for on a device that has no kernels."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    if param.device.type not in supported:
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported "
            f"devices: {supported} but {param.dtype} and {param.device.type}: {name}. Leave out "
            "`fused`, or move the parameters first."
        )


def missing_keys(state: dict[str, Any], rule: Rule, group: dict[str, Any]) -> list[str]:
    """What a parameter that was stepped has in its state, and this one lacks."""
    if not rule.is_whole:
        return []
    return [key for key in ("step", *rule.moments_of(group)) if state.get(key) is None]


def completed(
    name: str,
    param: Tensor,
    state: dict[str, Any],
    rule: Rule,
    group: dict[str, Any],
    *,
    state_dtype: torch.dtype | None,
    step_device: torch.device,
    wanted_ema_dtype: torch.dtype | None = None,
) -> dict[str, Any] | None:
    """The tensors that ``state`` lacks or has in another form than a step needs; None if none.

    Moments get ``param``'s strides; what a checkpoint brought keeps its dtype. In a group with an
    ``ema_decay`` there is an average of the parameter, which begins as the parameter; one of a
    dtype that no kernel takes is converted. Raises RuntimeError where a tensor of the state does
    not fit ``param``, or where a state that was begun has lost one.
    """
    new: dict[str, Any] = {}
    missing = missing_keys(state, rule, group)
    if missing and any(state.get(key) is not None for key in ("step", *rule.moments)):
        raise RuntimeError(
            f"{name}: its state has {', '.join(map(repr, state))} and no "
            f"{' and no '.join(map(repr, missing))}. Add what is missing, or remove the "
            "parameter's whole state to begin it anew."
        )
    if rule.counts_steps(group):
        begun = any(state.get(key) is not None for key in rule.moments)  # and did not count
        anew = any(state.get(key) is None for key in rule.moments_of(group))
        counted = None if anew and rule.needs_count(group) else state.get("step")
        step = _completed_step(name, counted, step_device, 1.0 if begun else 0.0)
        if step is not None:
            new["step"] = step

    ema = group.get("ema_decay") is not None
    for key in (*rule.moments_of(group), *(("ema",) if ema else ())):
        moment = state.get(key)
        if moment is None and key == "ema":
            with torch.no_grad():
                average = torch.empty_like(
                    param, dtype=ema_dtype(param, wanted_ema_dtype), requires_grad=False
                )
                new[key] = average.copy_(param)
            continue
        if moment is None:
            new[key] = torch.zeros_like(
                param,
                dtype=moment_dtype(param, state_dtype),
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
            continue
        if (
            not isinstance(moment, Tensor)
            or moment.shape != param.shape
            or moment.device != param.device
            or moment.is_complex() != param.is_complex()
            or moment.is_floating_point() != param.is_floating_point()
        ):
            found = describe(moment) if isinstance(moment, Tensor) else repr(moment)
            raise RuntimeError(
                f"{name} is {describe(param)}, its state {key!r} is {found}: shape, device and "
                "kind must be the same. Load a state dict that fits, or move the state."
            )
        if is_freed(moment):
            raise RuntimeError(
                f"{name}: its state {key!r} has no memory, its storage was freed. Bring it back "
                "before the step, or load a state dict."
            )
        if key == "ema" and moment.dtype not in ema_dtypes(param):
            moment = new[key] = moment.to(ema_dtype(param, wanted_ema_dtype))
        if is_plain(moment) and is_dense(param) and not same_layout(moment, param):
            new[key] = match_layout(param, moment)
    return new or None


def _completed_step(name: str, step: Any, device: torch.device, beginning: float) -> Tensor | None:
    """A step counter on ``device`` in place of ``step``; None where that is one."""
    if step is None:
        return torch.full((), beginning, dtype=torch.float32, device=device)
    if isinstance(step, (int, float)):
        return torch.tensor(float(step), dtype=torch.float32, device=device)
    if not isinstance(step, Tensor) or step.numel() != 1 or is_freed(step):
        found = describe(step) if isinstance(step, Tensor) else repr(step)
        raise RuntimeError(f"{name}: its state 'step' is {found}, expected one number")
    if step.dtype != torch.float32 or step.device != device:
        return step.to(device, torch.float32)
    return None
