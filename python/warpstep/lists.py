"""Lists of tensors to the native kernels: the one way in for functional, torch_ops and override."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpstep import backends
from warpstep.rules import ADAMW, SGD, Rule


class Options(NamedTuple):
    """What a step takes beside its lists. ``_native.list_options`` has the same fields."""

    lr: float | Tensor
    numbers: tuple[float, ...]  # the rule's others, in the order of Rule.numbers
    maximize: bool
    coupled: bool  # else the decay is decoupled
    grad_scale: Tensor | None
    found_inf: Tensor | None
    advance_steps: bool
    unscale_grads: bool


class Lists(NamedTuple):
    """The lists of one call, with an entry a tensor in each."""

    rule: Rule
    names: tuple[str, ...]
    tensors: Sequence[list[Tensor]]  # params, grads, the rule's moments, step counters


# As aten::_fused_adamw_ takes them: without amsgrad the fifth counts for nothing.
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
_WITHOUT = (*NAMES[:4], NAMES[5])


def adam_lists(tensors: Sequence[list[Tensor]], amsgrad: bool) -> Lists:
    """The lists of a call whose arguments are `NAMES`."""
    if amsgrad:
        return Lists(ADAMW, NAMES, tensors)
    return Lists(ADAMW, _WITHOUT, (*tensors[:4], tensors[5]))


def sgd_lists(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> Lists:
    """The lists of a call of ``aten::_fused_sgd_``, whose last is empty without momentum."""
    if buffers:
        names = ("params", "grads", "momentum_buffers", "state_steps")
        return Lists(SGD, names, (params, grads, buffers, []))
    return Lists(SGD, ("params", "grads", "state_steps"), (params, grads, []))


Tables = tuple[Tensor, ...]
RESIDENT_BYTES = 32 << 20  # of tables kept on GPUs: those of some 300,000 tensors


def _upload(device: int, *tables: bytes) -> tuple[Any, ...]:
    """Puts tables into the memory of CUDA device ``device``: what keeps them, their addresses."""
    where = torch.device(backends.cuda_device_type() or "cuda", device)
    held = tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8).to(where) for t in tables)
    return (held, *(table.data_ptr() for table in held))


def _use(tables: Tables) -> None:
    """Keeps the tables' memory from reuse until what the current stream does by now is done."""
    if tables[0].is_cuda:
        stream = torch.cuda.current_stream(tables[0].device)
        for table in tables:
            table.record_stream(stream)


@functools.cache
def stepper() -> Any:
    """The process's native ListStepper. Raises BackendUnavailableError without native module."""
    module, reason = backends.native()
    if module is None:
        raise backends.BackendUnavailableError(reason)
    return module.ListStepper(upload=_upload, use=_use, resident_bytes=RESIDENT_BYTES)
