"""Options of ``FusedAdam`` that have no meaning here: refused, with what there is instead."""

from __future__ import annotations

from typing import Any

import torch

from warpstep.recipes import dtype_name

_MOMENT_DTYPES = (torch.float32, torch.bfloat16)
_INSTEAD = {
    torch.uint8: (
        "moments of 8 bits have scales, which this class's state has no place for: "
        "warpstep.AdamW(state_dtype='8bit') keeps them"
    ),
    torch.float16: (
        "Transformer Engine scales each tensor, as the range is too small for squares of "
        "gradients: bfloat16 takes as many bytes and needs no scale"
    ),
}


def check_options(
    *,
    betas: Any,
    amsgrad: bool,
    master_weight_dtype: Any,
    exp_avg_dtype: Any,
    exp_avg_sq_dtype: Any,
) -> None:
    """Raises for what there is not."""
    if isinstance(betas, bool):
        raise TypeError(
            f"betas should be a pair like (0.9, 0.999), but got {betas}. apex's third positional "
            "argument is bias_correction: pass arguments after lr by name"
        )
    if amsgrad:
        raise RuntimeError(
            "amsgrad=True is not supported, as in Transformer Engine and apex: use "
            "warpstep.AdamW(amsgrad=True)"
        )
    for name, dtype in (("exp_avg_dtype", exp_avg_dtype), ("exp_avg_sq_dtype", exp_avg_sq_dtype)):
        if dtype not in _MOMENT_DTYPES:
            why = f" ({_INSTEAD[dtype]})" if dtype in _INSTEAD else ""
            raise RuntimeError(
                f"{name}={_named(dtype)} is not supported: choose torch.float32 or "
                f"torch.bfloat16{why}"
            )
    if master_weight_dtype != torch.float32:
        raise RuntimeError(
            f"master_weight_dtype={_named(master_weight_dtype)} is not supported: choose "
            "torch.float32; with store_param_remainders=True, 16 bits of it are stored beside a "
            "bfloat16 parameter"
        )


def _named(dtype: Any) -> str:
    return f"torch.{dtype_name(dtype)}" if isinstance(dtype, torch.dtype) else repr(dtype)
