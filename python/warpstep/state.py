"""One parameter's state: checked against the parameter, completed where something is missing.

Nothing here changes an optimizer: functions return what the state is to be, or raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.codecs import BLOCK, split
from warpstep.precision import Precision, check_has_master
from warpstep.recipes import RESIDUAL, dtype_name, ema_dtype, ema_dtypes, scale_of
from warpstep.rules import Rule
from warpstep.shards import holds_values, layout_of, like_shards, own_part
from warpstep.stored import decode_from, encode_into

# Not of a state: what a parameter is to become, where a float32 master was loaded.
PARAM = "param"


def describe(tensor: Any) -> str:
    """``float32 of shape (3, 4) on cpu``, for messages; of what is no tensor, its ``repr``."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
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
    precision: Precision,
    step_device: torch.device,
) -> dict[str, Any] | None:
    """The tensors that ``state`` lacks or has in another form than a step needs; None if none.

    Moments get ``param``'s strides; what a checkpoint brought keeps its dtype, unless 8 bits are
    asked for, or a dtype where there are 8 bits. In a group with an ``ema_decay`` there is an
    average of the parameter, which begins as the parameter; one of a dtype that no kernel takes is
    converted. A value of None is to be removed. Raises RuntimeError where a tensor of the state
    does not fit ``param``, or where a state that was begun has lost one.
    """
    new: dict[str, Any] = {}
    missing = missing_keys(state, rule, group)
    if missing and any(state.get(key) is not None for key in ("step", *rule.moments)):
        raise RuntimeError(
            f"{name}: its state has {', '.join(map(repr, state))} and no "
            f"{' and no '.join(map(repr, missing))}. Add what is missing, or remove the "
            "parameter's whole state to begin it anew."
        )
    if precision.counts_steps(rule, group):
        begun = any(state.get(key) is not None for key in rule.moments)  # and did not count
        anew = any(state.get(key) is None for key in rule.moments_of(group))
        counted = None if anew and rule.needs_count(group) else state.get("step")
        step = _completed_step(name, counted, step_device, 1.0 if begun else 0.0)
        if step is not None:
            new["step"] = step

    has_master = group.get("master") is not None
    new |= _completed_master(name, param, state, has_master)
    for which, key in enumerate(rule.moments_of(group)):
        dtype = precision.moment_dtype(param, which, has_master)
        if (moment := state.get(key)) is None:
            new |= new_moment(param, key, dtype)
            continue
        fits = isinstance(moment, Tensor) and (
            is_like(moment, param) or (moment.dtype == torch.uint8 and can_be_8bit(param))
        )
        if not fits or moment.shape != param.shape or moment.device != param.device:
            raise _misfit(name, param, key, moment)
        check_has_memory(name, key, moment)
        if moment.dtype == torch.uint8:
            if (wrong := wrong_scales(param, key, state)) is not None:
                raise RuntimeError(f"{name}: {wrong}")
            check_has_memory(name, scale_of(key), state[scale_of(key)])
        wants_8bit, has_8bit = dtype == torch.uint8, moment.dtype == torch.uint8
        squares = key in rule.squares
        if wants_8bit and not has_8bit:
            new |= new_moment(param, key, dtype)
            encode_into(new, key, own_part(moment), squares=squares)
        elif has_8bit and not wants_8bit and precision.state_dtype is not None:
            numbers = decode_from(state, key, squares=squares)
            new[key] = torch.empty_like(param, dtype=dtype, requires_grad=False)
            own_part(new[key]).copy_(numbers)
            new[scale_of(key)] = None
        elif is_plain(moment) and is_dense(param) and not same_layout(moment, param):
            if has_8bit:
                raise _misfit(name, param, key, moment)  # its blocks run in another order
            new[key] = match_layout(param, moment)
    if group.get("ema_decay") is not None:
        new |= _completed_average(name, param, state, precision)
    return new or None


def is_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor's numbers are of the kind of ``param``'s: real or complex ones."""
    return (
        tensor.is_complex() == param.is_complex()
        and tensor.is_floating_point() == param.is_floating_point()
    )


def can_be_8bit(param: Tensor) -> bool:
    """Whether there are 8-bit moments of such a parameter."""
    return param.is_floating_point() and param.dtype != torch.float64


def check_has_memory(name: str, key: str, tensor: Tensor) -> None:
    """Raises where a tensor of a state has been freed."""
    if is_freed(tensor):
        raise RuntimeError(
            f"{name}: its state {key!r} has no memory, its storage was freed. Bring it back "
            "before the step, or load a state dict."
        )


def _misfit(name: str, param: Tensor, key: str, found: Any) -> RuntimeError:
    return RuntimeError(
        f"{name} is {describe(param)}, its state {key!r} is {describe(found)}: shape, device and "
        "kind must be the same. Load a state dict that fits, or move the state."
    )


def new_moment(param: Tensor, key: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A moment of zeros, and of an 8-bit one the scales."""
    zeros = torch.zeros_like(
        param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
    )
    if dtype != torch.uint8:
        return {key: zeros}
    part, shape = own_part(param), _scales_shape(param)
    of_part = (part.shape[0], *shape[1:]) if len(shape) > 1 else _scales_shape(part)
    scales = torch.zeros(of_part, dtype=torch.uint8, device=part.device)
    return {key: zeros, scale_of(key): like_shards(param, scales, shape)}


def _scales_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of an 8-bit moment's scales: sharded by rows as the parameter is."""
    blocks = -(-param.numel() // BLOCK)
    if param.dim() < 2:
        return (blocks,)
    rows = param.shape[0]
    divides = rows > 0 and param.numel() // rows % BLOCK == 0
    return (rows, blocks // rows) if divides else (blocks,)


def wrong_scales(param: Tensor, key: str, state: dict[str, Any]) -> str | None:
    """What is wrong with the scales of the 8-bit moment ``key``; None where nothing is."""
    scales, expected = state.get(scale_of(key)), _scales_shape(param)
    if (
        isinstance(scales, Tensor)
        and scales.dtype == torch.uint8
        and scales.shape == expected
        and scales.device == param.device
    ):
        return None
    return (
        f"its state {key!r} has 8 bits a number, and {scale_of(key)!r} is {describe(scales)}, "
        f"expected uint8 of shape {expected}: a scale for each block of {BLOCK} numbers. Is "
        "the checkpoint of another block size? Load one that fits."
    )


def wrong_master(param: Tensor, state: dict[str, Any], has_master: bool) -> str | None:
    """What is wrong with a residual, or a float32 master; None where nothing is."""
    residual = state.get(RESIDUAL)
    if residual is None:
        return None
    if not has_master:
        return (
            f"its state has {RESIDUAL!r}, which a step without a master would leave "
            "behind. Construct the optimizer with master='residual', or remove it."
        )
    if (
        isinstance(residual, Tensor)
        and residual.shape == param.shape
        and residual.device == param.device
        and residual.dtype in (torch.int16, torch.float32)
    ):
        return None
    return (
        f"the parameter is {describe(param)}, its state {RESIDUAL!r} is {describe(residual)}: "
        "expected int16 residuals or float32 masters of the parameter's shape, on its device"
    )


def _completed_master(
    name: str, param: Tensor, state: dict[str, Any], has_master: bool
) -> dict[str, Any]:
    """The residual that a state lacks. A float32 master becomes the parameter and a residual."""
    if (wrong := wrong_master(param, state, has_master)) is not None:
        raise RuntimeError(f"{name}: {wrong}")
    if not has_master:
        return {}
    check_has_master(name, param)
    residual = state.get(RESIDUAL)
    if residual is None:
        return {RESIDUAL: torch.zeros_like(param, dtype=torch.int16, requires_grad=False)}
    check_has_memory(name, RESIDUAL, residual)
    if residual.dtype == torch.int16:
        same = not is_plain(residual) or not is_dense(param) or same_layout(residual, param)
        return {} if same else {RESIDUAL: match_layout(param, residual)}
    low = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    high = torch.empty_like(param, requires_grad=False)
    parts = split(own_part(residual).detach())
    own_part(high).copy_(parts[0])
    own_part(low).copy_(parts[1])
    return {RESIDUAL: low, PARAM: high}


def _completed_average(
    name: str, param: Tensor, state: dict[str, Any], precision: Precision
) -> dict[str, Any]:
    average, dtype = state.get("ema"), ema_dtype(param, precision.ema_dtype)
    if average is None:
        new = torch.empty_like(param, dtype=dtype, requires_grad=False)
        with torch.no_grad():
            return {"ema": new.copy_(param)}
    if (
        not isinstance(average, Tensor)
        or average.shape != param.shape
        or average.device != param.device
        or not is_like(average, param)
    ):
        raise _misfit(name, param, "ema", average)
    check_has_memory(name, "ema", average)
    new = average if average.dtype in ema_dtypes(param) else average.to(dtype)
    if is_plain(new) and is_dense(param) and not same_layout(new, param):
        new = match_layout(param, new)
    return {} if new is average else {"ema": new}


def _completed_step(name: str, step: Any, device: torch.device, beginning: float) -> Tensor | None:
    """A step counter on ``device`` in place of ``step``; None where that is one."""
    if step is None:
        return torch.full((), beginning, dtype=torch.float32, device=device)
    if isinstance(step, (int, float)):
        return torch.tensor(float(step), dtype=torch.float32, device=device)
    if not isinstance(step, Tensor) or step.numel() != 1 or is_freed(step):
        raise RuntimeError(f"{name}: its state 'step' is {describe(step)}, expected one number")
    if step.dtype != torch.float32 or step.device != device:
        return step.to(device, torch.float32)
    return None
