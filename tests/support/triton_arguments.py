"""What Triton's kernels are launched with: a recipe, and hyper-parameters as the C struct."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Recipe(NamedTuple):
    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    amsgrad: bool = False
    ema: torch.dtype | None = None

    def __str__(self) -> str:
        return "-".join(str(x).removeprefix("torch.") for x in self[: 4 if self.amsgrad else 3])


class Hyper(NamedTuple):
    lr: float | Tensor = 1e-3
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    decoupled: bool = True

    def pack(self) -> bytes:
        """The C struct `Hyper`: tensors go by address."""
        kinds = [{f32: 1, f64: 2}[x.dtype] if isinstance(x, Tensor) else 0 for x in self[:3]]
        words = [x.data_ptr() if isinstance(x, Tensor) else x for x in self[:5]]
        types = "".join("Q" if kind else "d" for kind in kinds)
        flags = (*kinds, self.decoupled, self.maximize)
        return struct.pack(f"<{types}ddd5B3x", *words, 0.0, *flags)
