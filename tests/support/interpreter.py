"""Triton's interpreter, made to fuse multiply-adds as a GPU does, and to look things up once."""

import dataclasses
import inspect
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


def look_up_once() -> None:
    """Spares the interpreter what it works out anew at each operation or call. For tests, and after
    fuse_multiply_adds(): what an operation calls is remembered.

    It patches the whole language at each launch and at each call of a function of Triton's own,
    makes a table of all types to look one up, and works out whether an integer overflows without
    looking at the answer (TritonSemantic.device_assert, without `debug`): a third of the time. Of
    the rest, more than half is an operation's types (support/remembered.py).
    """
    from triton.runtime import interpreter

    from support import remembered

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        languages = {id(x) for x in fn.__globals__.values() if inspect.ismodule(x)}
        if not languages <= patched:
            patch(fn)
            patched.update(languages)
        return interpreter._LangPatchScope()  # with nothing to take back

    interpreter._patch_lang = patch_once
    np_dtype_of, by_name = interpreter._get_np_dtype, {}

    def np_dtype_by_name(dtype: Any) -> np.dtype:
        if dtype.name not in by_name:
            by_name[dtype.name] = np_dtype_of(dtype)
        return by_name[dtype.name]

    interpreter._get_np_dtype = np_dtype_by_name

    def patch_operation(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        scope.set_attr(owner, name, remembered.remembering(member))

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        for name in ("__bool__", "__index__"):
            scope.set_attr(tensor, name, remembered.asking(getattr(tensor, name)))

    interpreter._patch_attr = patch_operation
    interpreter._patch_lang_tensor = patch_tensor_too
