"""Lists of tensors to the native kernels: the one way in for functional, torch_ops and override."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from warpstep import backends

Tables = tuple[Tensor, ...]
RESIDENT_BYTES = 32 << 20  # of tables kept on GPUs: those of some 300,000 tensors


def _upload(device: int, *tables: bytes) -> tuple[Any, ...]:
    """Puts tables into the memory of CUDA device ``device``: what keeps them, their addresses."""
    module, _ = backends.native()
    emulated = module is not None and module.cuda_architectures == "host emulation"
    where = torch.device("cpu") if emulated else torch.device("cuda", device)
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
