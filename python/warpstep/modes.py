"""Who looks at the operators that are called: modes, tracers, transforms, compilers."""

from __future__ import annotations

import torch
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.utils._device import DeviceContext


def are_active() -> bool:
    """Whether operators called now go through a mode, a tracer or a transform of torch.func.

    A kernel that is reached otherwise than by an operator would go past them: unseen by a profiler
    that counts operators, missing in the graph that ``make_fx`` records. A default device is a mode
    too, which concerns only operators that make tensors.
    """
    return (  # asked at each step: some 25 ns each
        _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _is_tracing()
        or (_len_torch_function_stack() > 0 and _has_watching_function_mode())
    )


def _has_watching_function_mode() -> bool:
    modes = map(torch._C._get_function_stack_at, range(_len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def is_watched() -> bool:
    """Whether someone looks at the operators that are called: a compiler, or one of the above."""
    return torch.compiler.is_compiling() or are_active()
