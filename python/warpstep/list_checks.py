"""Lists of tensors and their options, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpstep.checks import check_copy, check_gradient
from warpstep.codecs import BLOCK
from warpstep.lists import COPIES, RESIDUALS, Lists, Options, scales_of
from warpstep.precision import check_seed
from warpstep.recipes import FORMATS, one_of, real_dtype
from warpstep.state import describe, is_dense, is_freed, is_plain, same_layout
from warpstep.stored import can_be_8bit

STOCHASTIC_SQUARES = "stochastic_exp_avg_sq"


def check_options(lists: Lists, options: Options) -> None:
    """Raises where the options of rounding are none: what kernels would take as they are."""
    if options.rounding is not None or options.seed != 0:
        _check_rounding(lists, options)
    if options.param_indices is not None:
        _check_numbers("param_indices", options.param_indices, lists, 2**32)
    if options.first_elements is not None:
        _check_numbers("first_elements", options.first_elements, lists, 2**63)


def _check_numbers(name: str, given: Sequence[int], lists: Lists, limit: int) -> None:
    for i, number in enumerate(given):
        if not isinstance(number, int):
            raise TypeError(f"{name}[{i}] is {number!r}, expected an integer")
        if not 0 <= number < limit:
            raise ValueError(f"{name}[{i}] is {number}, which is not in [0, {limit})")
    if len(given) != len(lists.tensors[0]):
        raise ValueError(
            f"{name} has {len(given)} numbers and params {len(lists.tensors[0])} tensors: give one "
            "for each"
        )


def _check_rounding(lists: Lists, options: Options) -> None:
    squares = (STOCHASTIC_SQUARES,) if lists.rule.squares else ()
    choices = ("nearest", "stochastic", *squares)
    if options.rounding not in (None, *choices):
        raise ValueError(f"Invalid rounding: {options.rounding!r}. Choose {one_of(choices)}.")
    check_seed(options.seed)


def goes_uncounted(lists: Lists) -> bool:
    """Whether no steps are counted, where the rule allows that."""
    return not lists.tensors[-1] and lists.rule.counted_for is not None


def check(lists: Lists, options: Options) -> None:
    """Raises what `adamw_` documents; nothing has been written yet."""
    params, grads, *moments, steps = lists.tensors
    every = [*zip(lists.names, lists.tensors, strict=True), *lists.low_precision.items()]
    for name, tensors in every:
        if len(tensors) != len(params) and not (tensors is steps and goes_uncounted(lists)):
            raise ValueError(
                f"{name} has {len(tensors)} tensors and params {len(params)}: the lists must be of "
                "one length"
            )
    counted: dict[int, int] = {}  # which step counter came first at an address
    for i, param in enumerate(params):
        name = f"params[{i}]"
        for of_list, tensors in every:
            if not tensors:
                continue
            tensor = tensors[i]
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"{of_list}[{i}] is of type {kind}, expected a tensor")
            if tensor.layout != torch.strided:
                raise RuntimeError(
                    f"{of_list}[{i}] is of layout {tensor.layout}, expected torch.strided: call "
                    "to_dense() on it"
                )
            has_numbers = tensors is not steps and of_list not in lists.low_precision
            is_8bit = tensor.dtype == torch.uint8 and any(tensors is of for of in moments)
            if has_numbers and not is_8bit and real_dtype(tensor.dtype) not in FORMATS:
                raise TypeError(
                    f"{of_list}[{i}] is {describe(tensor)}: its dtype has to be "
                    f"{one_of(FORMATS)}, or complex"
                )
        check_gradient(name, param, grads[i])
        for of_list, of_moment in zip(lists.names[2:], moments, strict=False):
            _check_moment(name, param, f"{of_list}[{i}]", of_moment[i])
        for key, of_moment in zip(lists.moments, moments, strict=True):
            _check_8bit(lists, options, key, of_moment[i], i)
        if RESIDUALS in lists.low_precision:
            _check_residual(name, param, f"residuals[{i}]", lists.low_precision[RESIDUALS][i])
        if COPIES in lists.low_precision:
            check_copy(name, param, lists.low_precision[COPIES][i])
        _check_scalars(name, param, options)
        _check_draws(lists, options, i)
        if not steps:
            continue
        step = steps[i]
        if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64) or is_freed(step):
            raise TypeError(f"state_steps[{i}] is {describe(step)}, expected one float32")
        address = step.data_ptr() if is_plain(step) else 0
        first = counted.setdefault(address or id(step), i)
        if options.advance_steps and first != i:
            raise RuntimeError(
                f"state_steps[{i}] is state_steps[{first}]: several tensors would advance one step "
                "counter. Give each its own, or advance it once and pass advance_steps=False."
            )


def _check_scalars(name: str, param: Tensor, options: Options) -> None:
    for label, scalar in (("grad_scale", options.grad_scale), ("found_inf", options.found_inf)):
        if scalar is None:
            continue
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            raise RuntimeError(f"{label} is {describe(scalar)}, expected a tensor of one element")
        if scalar.device != param.device:
            raise RuntimeError(
                f"{label} is on {scalar.device}, {name} on {param.device}: move {label} there"
            )


def _check_moment(name: str, param: Tensor, of_moment: str, moment: Tensor) -> None:
    _check_shape(name, param, of_moment, moment)
    if moment.is_complex() != param.is_complex():
        raise TypeError(
            f"{name} is {describe(param)}, {of_moment} is {describe(moment)}: both must be real, "
            "or both complex"
        )
    _check_memory(of_moment, moment)


def _check_shape(name: str, param: Tensor, other_name: str, other: Tensor) -> None:
    if other.shape != param.shape or other.device != param.device:
        raise RuntimeError(
            f"{name} is {describe(param)}, {other_name} is {describe(other)}: shape and device "
            "must be the same"
        )


def _check_memory(name: str, tensor: Tensor) -> None:
    if is_freed(tensor):
        raise RuntimeError(
            f"{name} has elements and no memory: its storage was freed. Bring it back before "
            "the step."
        )


def _check_residual(name: str, param: Tensor, of_residual: str, residual: Tensor) -> None:
    if param.dtype != torch.bfloat16 or residual.dtype != torch.int16:
        raise TypeError(
            f"{name} is {describe(param)}, {of_residual} is {describe(residual)}: residuals are "
            "int16, of bfloat16 parameters. Step parameters without one in another call."
        )
    _check_shape(name, param, of_residual, residual)
    _check_memory(of_residual, residual)


def _check_8bit(lists: Lists, options: Options, key: str, moment: Tensor, i: int) -> None:
    """Raises where a moment's dtype and its scales, or the parameter, do not belong together."""
    of_moment, of_scales = f"{key}s[{i}]", f"{scales_of(key)}[{i}]"
    all_scales = lists.low_precision.get(scales_of(key))
    scales = None if all_scales is None else all_scales[i]
    if moment.dtype != torch.uint8:
        if scales is not None and scales.numel() != 0:
            raise TypeError(
                f"{of_moment} is {describe(moment)}, which has no scales, and {of_scales} is "
                f"{describe(scales)}, expected an empty tensor"
            )
        return
    param, expected = lists.tensors[0][i], -(-moment.numel() // BLOCK)
    fits = (
        scales is not None
        and scales.dtype == torch.uint8
        and scales.numel() == expected
        and scales.is_contiguous()
        and scales.device == param.device
    )
    if scales is None or not fits:
        raise TypeError(
            f"{of_moment} is {describe(moment)}, 8 bits a number, and {of_scales} is "
            f"{describe(scales)}, expected a contiguous uint8 of {expected} elements on "
            f"{param.device}: a scale for each block of {BLOCK} numbers"
        )
    _check_memory(of_scales, scales)
    if not can_be_8bit(param):
        raise TypeError(
            f"params[{i}] is {describe(param)} and {of_moment} of 8 bits, which float32, bfloat16 "
            "and float16 parameters can have: use a dtype of its own"
        )
    if not is_dense(param) or not same_layout(moment, param):
        raise RuntimeError(
            f"params[{i}] has strides {param.stride()}, {of_moment} {moment.stride()}: with 8 bits "
            "they must be the same, without gaps, because blocks are runs of memory"
        )
    first = 0 if options.first_elements is None else options.first_elements[i]
    if first % BLOCK != 0:
        raise ValueError(
            f"first_elements[{i}] is {first}, and {of_moment} of 8 bits: such a range begins at a "
            f"multiple of {BLOCK} of its parameter's elements, so that it has whole blocks"
        )


def _check_draws(lists: Lists, options: Options, i: int) -> None:
    """Raises where random bits have no step to be of: SGD does without counters otherwise."""
    if options.rounding == "stochastic" and goes_uncounted(lists):
        found: Any = describe(lists.tensors[0][i])
        raise ValueError(
            f"params[{i}] is {found} and state_steps is empty: rounding='stochastic' needs a step "
            "counter for each tensor, because random bits depend on the step"
        )
