"""Tensors of more than 2^31 elements, on memory that a machine has.

Address space is cheap: almost all pages of a stream are one file's, mapped again and again; only
the windows around element 2^31 and at the end have memory of their own, and are looked at. Mapping
the pages still takes minutes: the CPU kernel is run with WARPSTEP_TEST_HUGE=1 (`make test-huge`),
the CUDA source, emulated, always, on the last blocks only.
"""

import ctypes
import mmap
import os

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import oracle
from support.environment import EMULATED
from support.oracle import Options

WINDOW = 1 << 26  # bytes
SIZE = 2**31 + 2 * WINDOW // 2 - 5  # bfloat16 elements, not a multiple of anything

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]


def giant(numel):
    """A bfloat16 tensor of zeros; its last three windows are memory of their own."""
    size = -(-numel * 2 // WINDOW) * WINDOW
    base = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    file = os.memfd_create("giant")
    os.ftruncate(file, WINDOW)
    fixed, both = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
    for at in range(0, size, WINDOW):
        own = at >= size - 3 * WINDOW
        flags = fixed | (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if own else mmap.MAP_SHARED)
        assert libc.mmap(base + at, WINDOW, both, flags, -1 if own else file, 0) == base + at
    os.close(file)
    memory = (ctypes.c_int16 * numel).from_address(base)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.slow
def test_elements_beyond_2_to_the_31(backend, device, monkeypatch):
    if backend == "reference" or backend == "triton":
        return  # torch's own indexing; and the interpreter would take hours
    if device != "cpu":
        pytest.skip("on a GPU test_gpu.py steps real memory")
    if not EMULATED and os.environ.get("WARPSTEP_TEST_HUGE") != "1":
        pytest.skip("takes minutes: make test-huge")
    param, grad, exp_avg, exp_avg_sq = (giant(SIZE) for _ in range(4))
    looked_at = slice(2**31 - 1000, SIZE)
    if EMULATED:  # fibers are slow: only the last blocks, two and more
        looked_at = slice(SIZE - 20_000, SIZE)
        monkeypatch.setenv("EMULATED_BLOCKS_FROM", str(looked_at.start // 16384 - 1))
    generator = torch.Generator().manual_seed(0)
    count = SIZE - looked_at.start
    for stream in (param, grad, exp_avg):
        stream[looked_at] = torch.randn(count, generator=generator).bfloat16()
    exp_avg_sq[looked_at] = torch.rand(count, generator=generator).bfloat16()

    p = Parameter(param)
    p.grad = grad
    optimizer = warpstep.AdamW([p], backend=backend)
    optimizer.state[p] = {
        "step": torch.tensor(4.0),
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }
    wide = [oracle.wide(t[looked_at]) for t in (param, grad, exp_avg, exp_avg_sq)]
    optimizer.step()
    assert [b.backend for b in optimizer.plan.buckets] == [backend]

    exact = oracle.step(oracle.Streams(wide[0], wide[2], wide[3]), wide[1], 5, Options())
    bound = oracle.bounds(exact, Options(), torch.bfloat16, torch.bfloat16)
    for tensor, name in ((param, "param"), (exp_avg, "exp_avg"), (exp_avg_sq, "exp_avg_sq")):
        error = np.abs(oracle.wide(tensor[looked_at]) - getattr(exact.after, name))
        assert np.all(error <= getattr(bound, name)), name
