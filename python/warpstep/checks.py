"""What a step has beside a parameter and its state: its gradient and its copy, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from warpstep.recipes import FORMATS, one_of, real_dtype
from warpstep.state import describe, is_freed


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises where ``grad`` cannot be ``param``'s gradient; ``name`` is the parameter's."""
    if real_dtype(param.dtype) not in FORMATS:
        raise TypeError(
            f"{name} is {describe(param)}: only parameters of {one_of(FORMATS)}, or complex ones, "
            "can be stepped. Leave it out of the optimizer."
        )
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            "sparse gradients are not supported (torch.optim.SparseAdam takes them, and SGD does, "
            f"without options of warpstep's own): {name} has a gradient of layout {grad.layout}"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{name} is {describe(param)}, its gradient is {describe(grad)}: shape and device "
            "must be the same"
        )
    if grad.is_complex() != param.is_complex() or real_dtype(grad.dtype) not in FORMATS:
        raise TypeError(
            f"{name} is {describe(param)}, its gradient is {describe(grad)}: both must be real, of "
            f"{one_of(FORMATS)}, or both complex"
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


def check_copy(name: str, param: Tensor, copy: Tensor | None) -> None:
    """Raises where ``copy`` cannot hold a copy of ``param``."""
    if copy is None:
        return
    if param.dtype != torch.float32 or copy.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} is {describe(param)}, its copy {describe(copy)}: copies= takes bfloat16 or "
            "float16 copies of float32 parameters"
        )
    if copy.shape != param.shape or copy.device != param.device:
        raise RuntimeError(
            f"{name} is {describe(param)}, its copy {describe(copy)}: shape and device must be "
            "the same"
        )
    if is_freed(copy):
        raise RuntimeError(f"{name}: its copy has no memory, its storage was freed")
