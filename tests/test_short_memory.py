"""Allocations that fail: an error, a step that is whole or not begun, and steps after it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import warpstep
from support import programs
from support.environment import EMULATED
from warpstep import reference, swapping
from warpstep.reference import Computed

# What a program does at each call that fails: a step, and another one, compared with whole steps.
COMMON = """
import gc, sys, torch, warpstep
gc.disable()
torch.set_num_threads(int(sys.argv[1]))

def new_params():
    torch.manual_seed(0)
    sizes = (5, 300_000) if torch.get_num_threads() > 1 else (5, 3)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return [torch.randn(n).to(d).requires_grad_() for n, d in zip((*sizes, 4), dtypes)]

def prepare():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=0.1)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    set_grads(params, 2)
    return optimizer, params

def set_grads(params, seed):
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn_like(param)

def found(optimizer, params):
    states = [optimizer.state[param] for param in params]
    return [*(param.detach() for param in params), *(t for s in states for t in s.values())]

def is_same(some, others):
    return all(map(torch.equal, some, others))

def call(optimizer):
    if sys.argv[2] == "clip":
        optimizer.clip_grad_norm_(0.1)
    else:
        optimizer._step_now(zero_grads=False)  # without torch's hooks, which have bugs of their own

def assert_whole(optimizer, params):
    now = found(optimizer, params)
    whole = is_same(now, after) or is_same(now, before)
    assert whole, f"call {n}: half a step"
    stepped = is_same(now, after)
    assert is_same(one_more(optimizer, params), later[stepped]), f"call {n}: another step"

def one_more(optimizer, params):
    set_grads(params, 3)
    optimizer.zero_grad()
    set_grads(params, 3)
    optimizer.step()
    return found(optimizer, params)

before = found(*prepare())
optimizer, params = prepare()
call(optimizer)
after = [tensor.clone() for tensor in found(optimizer, params)]
later = [one_more(*prepare()), one_more(optimizer, params)]
"""

PYTHONS = (
    COMMON
    + """
import _testcapi
failed = worked = n = 0
while worked < 40:  # calls in a row
    optimizer, params = prepare()
    try:
        _testcapi.set_nomemory(n, n + 1)
        try:
            call(optimizer)
        finally:
            _testcapi.remove_mem_hooks()
        worked += 1
    except (MemoryError, torch.OutOfMemoryError):
        failed += 1
        worked = 0
    assert_whole(optimizer, params)
    n += 1
assert failed > 10, failed
"""
)


@pytest.mark.parametrize("call", ["step", "clip"])
def test_pythons_allocations_that_fail(call):
    pytest.importorskip("_testcapi", reason="of CPython's own tests")
    ended = programs.run(PYTHONS, "1", call)
    assert ended.returncode == 0, ended.stderr[-2000:]


NATIVE = (
    COMMON
    + """
import ctypes
preloaded = ctypes.CDLL(None)
n, calls = 0, 1
while n < calls:
    optimizer, params = prepare()
    preloaded.fail_at(ctypes.c_long(n))
    try:
        call(optimizer)
    except MemoryError:
        pass
    finally:
        calls = preloaded.stop_failing()
    assert_whole(optimizer, params)
    n += 1
print(calls)
"""
)


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(EMULATED, reason="of the native module that is installed")
def test_the_native_modules_allocations_that_fail(tmp_path):
    """Tensors of three dtypes are three launches: the second must not find that memory is short."""
    library, source = tmp_path / "failing_new.so", Path(__file__).parent / "failing_new.cpp"
    build = ["c++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(build, check=True)
    for threads, call in (("1", "step"), ("2", "step"), ("1", "clip")):
        ended = subprocess.run(
            [sys.executable, "-c", NATIVE, threads, call],
            env={**os.environ, "LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert int(ended.stdout) > 0


def strided(seed):
    """A parameter with gaps in its memory, which goes to the reference."""
    whole = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    param = torch.nn.Parameter(whole[::2])
    param.grad = torch.randn(5, generator=torch.Generator().manual_seed(100 + seed))
    return param


def test_the_reference_writes_again_where_memory_is_short(monkeypatch):
    """What refuses nothing is written in the end: half of a step is none."""

    def step(failing):
        writes = 0
        write = reference.write

        def write_or_fail(tensor, value):
            nonlocal writes
            writes += 1
            if writes == failing:
                raise MemoryError
            write(tensor, value)

        params = [strided(0), strided(1)]
        optimizer = warpstep.AdamW(params, lr=0.1)
        with monkeypatch.context() as patched:
            patched.setattr(reference, "write", write_or_fail)
            optimizer.step()
        steps = [optimizer.state[param]["step"].item() for param in params]
        return steps, [param.detach().clone() for param in params], writes

    steps, expected, writes = step(None)
    assert steps == [1, 1]
    assert writes == 8
    for failing in range(1, writes + 1):
        steps, found, _ = step(failing)
        assert steps == [1, 1]
        assert all(map(torch.equal, found, expected))


def test_the_reference_writes_nothing_where_the_launch_raises():
    willing, reluctant = torch.zeros(3), torch.zeros(1).expand(3)

    def launch():
        raise MemoryError

    stores = [(reluctant, torch.ones(3)), (willing, torch.ones(3))]
    with pytest.raises((MemoryError, RuntimeError)):
        reference.store([Computed(willing, stores)], launch)
    assert not willing.any()
    with pytest.raises(MemoryError):
        reference.store([Computed(willing, stores[1:])], launch)
    assert not willing.any()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_swap_ema_restores_a_parameter_for_which_memory_was_short(failing, monkeypatch):
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(3)]
    optimizer = warpstep.AdamW(params, lr=0.1, ema_decay=0.5)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(4)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    restore, failed = swapping._Own.restore, []

    def restore_or_fail(own):
        if own.param is params[failing] and not failed:
            failed.append(own)
            raise MemoryError
        restore(own)

    monkeypatch.setattr(swapping._Own, "restore", restore_or_fail)
    with optimizer.swap_ema():
        pass
    assert failed
    assert all(map(torch.equal, params, before))
    optimizer.step()
