"""Triton's interpreter, made to fuse multiply-adds as a GPU does."""

from typing import Any

import numpy as np


def exact_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """An exact product, and a sum rounded to odd in float64, so that float32 rounds once."""
    if x.data.dtype == np.float64:
        return type(z)(
            x.data * y.data + z.data, z.dtype.scalar
        )  # not fused: there is nothing wider
    product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
    total = product + addend
    error = (product - (total - (total - product))) + (addend - (total - product))
    even = (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return type(z)(total.astype(np.float32), z.dtype.scalar)


def fuse_multiply_adds() -> None:
    """Replaces the interpreter's multiply-add, which rounds twice. For tests."""
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_fma = exact_fma
