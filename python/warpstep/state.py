"""One parameter's state: checked against the parameter, completed where something is missing.

Nothing here changes an optimizer: functions return what the state is to be, or raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpstep.allocation import new_zeros
from warpstep.codecs import BLOCK, split
from warpstep.precision import Precision, check_has_master
from warpstep.recipes import (
    RESIDUAL,
    codes_of,
    dtype_name,
    ema_dtype,
    ema_dtypes,
    is_codes,
    scale_of,
)
from warpstep.rules import Rule
from warpstep.shards import holds_values, layout_of, own_part
from warpstep.stored import (
    can_be_8bit,
    decode_from,
    encode_into,
    has_codes,
    moments_in,
    new_moment,
    scales_shape,
)

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
    names = given_names(groups[group])
    name = f" ({names[index]!r})" if index < len(names) else ""
    return f"parameter {index} of group {group}{name}"


def given_names(group: dict[str, Any]) -> Sequence[str]:
    """The names that were given to a group's first parameters.

    Who edits ``group["params"]`` edits no names: what is appended has none, and where parameters
    were taken away nobody knows whose is whose.
    """
    names = group.get("param_names") or ()
    return names if len(names) <= len(group["params"]) else ()


def names_of(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Each parameter's name where names were given, else ``parameter 3 of group 0``."""
    names: dict[Tensor, str] = {}
    for g, group in enumerate(groups):
        given = given_names(group)
        for i, param in enumerate(group["params"]):
            name = given[i] if i < len(given) else parameter_name(groups, g, i)
            names.setdefault(param, name)
    return names


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is one of torch's own kind with memory that kernels can walk."""
    return not oddity_of(tensor)


def oddity_of(tensor: Tensor) -> str:
    """What the tensor is, if kernels cannot walk its memory; empty if they can.

    They cannot walk subclasses that intercept operations (DTensor, FakeTensor, quantised weights),
    tensors inside a transform of torch.func, or lazily negated or conjugated ones, whose memory
    holds other numbers.
    """
    kind = type(tensor)
    plain = (
        kind in (Tensor, torch.nn.Parameter)
        or kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # a mere subclass
    )
    if not plain:
        return f"a {kind.__name__}, which intercepts operations"
    if tensor.layout != torch.strided:
        return f"of the layout {tensor.layout}"
    if tensor.is_meta:
        return "on the meta device"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside a transform of torch.func"
    return "lazily negated or conjugated" if tensor.is_neg() or tensor.is_conj() else ""


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


def unwalkable_reason(
    param: Tensor, grad: Tensor, others: dict[str, Tensor | None], step: Tensor | None
) -> str:
    """Why kernels cannot walk a parameter's tensors (or this process's shards) side by side.

    Empty if they can. ``others`` are its moments and the like, by name; None for what is not there.
    A gradient may have other strides: it is copied.
    """
    there = {name: tensor for name, tensor in others.items() if tensor is not None}
    tensors = {"gradient": grad, **there}
    layout, own = layout_of(param), own_part(param)
    if oddity := oddity_of(own):
        return f"it is {oddity}"
    for name, tensor in tensors.items():
        if oddity := oddity_of(own_part(tensor)):
            return f"its {name} is {oddity}"
    if step is not None and (oddity := oddity_of(step)):
        return f"its step counter is {oddity}"
    if not holds_values(layout):
        return "its shards are summands of its values"
    for name, tensor in tensors.items():
        if layout_of(tensor) != layout:
            return f"its {name} is laid out over processes otherwise than it is"
    if not is_dense(own):
        return f"its memory has gaps: strides {own.stride()} for shape {tuple(own.shape)}"
    for name, tensor in there.items():
        if not same_layout(own_part(tensor), own):
            return f"its {name} has other strides than it has"
    return ""


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
    found = {"step": state.get("step"), **moments_in(state, rule.moments_of(group))}
    return [key for key, value in found.items() if value is None]


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
    missing, held = missing_keys(state, rule, group), moments_in(state, rule.moments)
    if missing and any(value is not None for value in (state.get("step"), *held.values())):
        raise RuntimeError(
            f"{name}: its state has {', '.join(map(repr, state))} and no "
            f"{' and no '.join(map(repr, missing))}. Add what is missing, or remove the "
            "parameter's whole state to begin it anew."
        )
    if precision.counts_steps(rule, group):
        begun = any(moment is not None for moment in held.values())  # and did not count
        anew = any(held[key] is None for key in rule.moments_of(group))
        counted = None if anew and rule.needs_count(group) else state.get("step")
        step = _completed_step(name, counted, step_device, 1.0 if begun else 0.0)
        if step is not None:
            new["step"] = step

    has_master = group.get("master") is not None
    new |= _completed_master(name, param, state, has_master)
    for which, key in enumerate(rule.moments_of(group)):
        dtype = precision.moment_dtype(param, which, has_master)
        squares, is_asked = key in rule.squares, precision.state_dtype is not None
        if held[key] is None:
            new |= new_moment(param, key, dtype)
        elif has_codes(state, key):
            new |= _completed_codes(name, param, state, key, dtype if is_asked else None, squares)
        else:
            new |= _completed_numbers(name, param, state, key, dtype, squares)
    if group.get("ema_decay") is not None:
        new |= _completed_average(name, param, state, precision)
    return new or None


def _completed_codes(
    name: str,
    param: Tensor,
    state: dict[str, Any],
    moment: str,
    dtype: torch.dtype | None,
    squares: bool,
) -> dict[str, Any]:
    """What takes the place of an 8-bit moment: nothing, or numbers where these are asked for."""
    key, scale = codes_of(moment), scale_of(moment)
    if (wrong := wrong_codes(param, moment, state)) is not None:
        raise RuntimeError(f"{name}: {wrong}")
    for part in (key, scale):
        check_has_memory(name, part, state[part])
    codes = state[key]
    if dtype is not None and not is_codes(dtype):
        numbers = new_zeros(param, dtype)
        own_part(numbers).copy_(decode_from(state, moment, squares=squares))
        return {moment: numbers, key: None, scale: None}
    if is_plain(codes) and is_dense(param) and not same_layout(codes, param):
        raise RuntimeError(
            f"{name} has strides {param.stride()}, its state {key!r} {codes.stride()}: they must "
            "be the same, because blocks are runs of memory. Load a state dict that fits."
        )
    return {}


def _completed_numbers(
    name: str,
    param: Tensor,
    state: dict[str, Any],
    key: str,
    dtype: torch.dtype,
    squares: bool,
) -> dict[str, Any]:
    """What takes the place of a moment that is numbers: these in ``param``'s order, or codes."""
    numbers = state[key]
    if (
        not isinstance(numbers, Tensor)
        or numbers.shape != param.shape
        or numbers.device != param.device
        or not is_like(numbers, param)
    ):
        raise _misfit(name, param, key, numbers)
    check_has_memory(name, key, numbers)
    if is_codes(dtype):
        new = new_moment(param, key, dtype)
        encode_into(new, key, own_part(numbers), squares=squares)
        return {**new, key: None}
    if is_plain(numbers) and is_dense(param) and not same_layout(numbers, param):
        return {key: match_layout(param, numbers)}
    return {}


def is_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor's numbers are of the kind of ``param``'s: real or complex ones."""
    return (
        tensor.is_complex() == param.is_complex()
        and tensor.is_floating_point() == param.is_floating_point()
    )


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
        f"kind must be the same{hint_at_codes(found)}. Load a state dict that fits, or move the "
        "state."
    )


def hint_at_codes(found: Any) -> str:
    """What messages add where numbers are expected and codes may have been found."""
    if isinstance(found, Tensor) and found.dtype == torch.uint8:
        return f", and 8-bit codes have keys of their own, as {codes_of('exp_avg')!r}"
    return ""


def wrong_codes(param: Tensor, moment: str, state: dict[str, Any]) -> str | None:
    """What is wrong with a moment's codes and scales; None where nothing is, or it has none."""
    key, scale = codes_of(moment), scale_of(moment)
    codes, scales, expected = state.get(key), state.get(scale), scales_shape(param)
    if codes is None:
        return None
    if state.get(moment) is not None:
        return f"its state has {key!r} and {moment!r}, which are one moment: remove one of them"
    if not (can_be_8bit(param) and _is_of_bytes(codes, tuple(param.shape), param.device)):
        return (
            f"the parameter is {describe(param)}, its state {key!r} is {describe(codes)}: codes "
            "are uint8 of the parameter's shape, on its device, of real parameters of 16 or 32 bits"
        )
    if not _is_of_bytes(scales, expected, param.device):
        return (
            f"its state {scale!r} is {describe(scales)}, expected uint8 of shape {expected}: a "
            f"scale for each block of {BLOCK} numbers of {key!r}. Is the checkpoint of another "
            "block size? Load one that fits."
        )
    return None


def _is_of_bytes(found: Any, shape: tuple[int, ...], device: torch.device) -> bool:
    is_of_bytes = isinstance(found, Tensor) and found.dtype == torch.uint8
    return is_of_bytes and found.shape == shape and found.device == device


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
        return {RESIDUAL: new_zeros(param, torch.int16)}
    check_has_memory(name, RESIDUAL, residual)
    if residual.dtype == torch.int16:
        same = not is_plain(residual) or not is_dense(param) or same_layout(residual, param)
        return {} if same else {RESIDUAL: match_layout(param, residual)}
    low = new_zeros(param, torch.int16)
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
        with torch.no_grad():
            return {"ema": new_zeros(param, dtype).copy_(param)}
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
