"""Steps in a captured CUDA graph: what a replay repeats, and what a capture refuses.

Without a GPU on the emulated stream, which keeps launches while it is being captured.
"""

import ctypes
import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.bits import assert_same_bits
from support.environment import EMULATED
from support.lists import HYPERS, assert_same_lists, clones, streams
from warpstep import backends
from warpstep.functional import adamw_


@pytest.fixture
def capture(backend, monkeypatch):
    """capture(step) captures what it launches, and returns what replays that."""
    if backend != "cuda":
        pytest.skip("of the CUDA backend")

    def on_gpu(step):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def emulated(step):
        module, _ = backends.native()
        stream = ctypes.CDLL(module.__file__)
        with monkeypatch.context() as now:
            now.setattr(torch.cuda, "is_initialized", lambda: True)
            now.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            now.setattr(torch.backends.cuda, "is_built", lambda: True)
            stream.emulated_capture_begin()
            try:
                step()
            finally:
                stream.emulated_capture_end()
        return stream.emulated_replay

    return emulated if EMULATED else on_gpu


def made(groups, device, backend):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(3, generator=generator).to(device)) for _ in range(groups)]
    for param in params:
        param.grad = torch.randn(3, generator=generator).to(device)
    given = [{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(params)]
    return warpstep.AdamW(given, weight_decay=0.1, capturable=True, backend=backend), params


def scale_lr(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] *= factor


@pytest.mark.parametrize("groups", [1, 500, 1200])
def test_a_replay_repeats_the_numbers_of_the_capture(backend, device, capture, groups):
    """Whatever the number of groups, and whatever steps outside the graph were taken with."""
    optimizer, params = made(groups, device, backend)
    twin, expected = made(groups, "cpu", "cpu")
    optimizer.step()
    scale_lr(optimizer, 2.0)
    replay = capture(optimizer.step)
    scale_lr(optimizer, 4.0)
    optimizer.step()
    replay()
    for factor in (1.0, 8.0, 0.25):
        scale_lr(twin, factor)
        twin.step()
    for param, other in zip(params, expected, strict=True):
        assert torch.equal(param.detach().cpu(), other.detach())
        for key, state in optimizer.state[param].items():
            assert torch.equal(state.cpu(), twin.state[other][key]), key


def test_a_replay_finds_smallest_magnitudes_anew(backend, device, capture):
    optimizers = []
    for where, kind in ((device, backend), ("cpu", "cpu")):
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(n, generator=generator).to(where)) for n in (3, 20_000)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizers.append(
            warpstep.AdamW(params, lr=0.1, capturable=True, decay_form="min", backend=kind)
        )
    optimizer, twin = optimizers
    optimizer.step()
    replay = capture(optimizer.step)
    for _ in range(3):
        replay()
    for _ in range(4):
        twin.step()
    assert_same_bits(optimizer, twin)


def test_a_capture_refuses_what_it_would_have_to_upload(backend, device, capture):
    optimizer, params = made(2, device, backend)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="is being captured in a graph and needs a new plan"):
        capture(optimizer.step)
    assert not optimizer.state
    assert all(map(torch.equal, params, before))
    optimizer.step()
    before = [param.detach().clone() for param in params]
    capture(optimizer.step)()
    assert not any(map(torch.equal, params, before))


def test_a_capture_of_a_clipping_refuses_so_too(backend, device, capture):
    optimizer, _ = made(2, device, backend)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) is being captured .* a new plan"):
        capture(lambda: optimizer.clip_grad_norm_(1.0))
    assert not optimizer.state
    assert optimizer.plan is None
    optimizer.step()
    capture(lambda: optimizer.clip_grad_norm_(1.0))


def test_the_tables_of_a_captured_norm_outlive_their_plan(backend, device, capture):
    """Also where the step is not captured. Replays read them."""
    optimizer, _ = made(2, device, backend)
    optimizer.step()
    tables = [weakref.ref(t) for bucket in optimizer.plan.buckets for t in bucket.tables.values()]
    capture(lambda: optimizer.clip_grad_norm_(1.0))
    optimizer.add_param_group({"params": [Parameter(torch.ones(3, device=device))]})
    optimizer.step()
    gc.collect()
    assert len(tables) == 3
    assert all(table() is not None for table in tables)


def test_a_capture_refuses_what_no_graph_repeats(device, capture):
    """What is stepped on the CPU."""
    params = [Parameter(torch.ones(3, device="cpu")) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params, capturable=True, backend="cpu")
    optimizer.step()
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"not repeat what is stepped on the CPU \(cpu: 2 tens"):
        capture(optimizer.step)
    assert all(map(torch.equal, params, before))


def test_a_capture_refuses_to_make_room_for_statistics(backend, device, capture):
    params = [Parameter(torch.ones(3, device=device))]
    params[0].grad = torch.ones_like(params[0])
    optimizer = warpstep.AdamW(params, capturable=True, stats=True, backend=backend)
    optimizer.clip_grad_norm_(1.0)  # makes the plan
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="no room for statistics yet: take a step before"):
        capture(optimizer.step)
    assert torch.equal(params[0], before)
    optimizer.step()
    capture(optimizer.step)()
    assert optimizer.statistics().grad_norm.shape == (1,)


def test_a_capture_of_lists_wants_their_tables_on_the_device(backend, device, capture):
    lists = streams(device=device)
    before = clones(lists)
    with pytest.raises(RuntimeError, match="a graph capture before such a step was taken eagerly"):
        capture(lambda: adamw_(*lists, **HYPERS, backend=backend))
    assert_same_lists(lists, before)
    plain = clones(lists)
    adamw_(*lists, **HYPERS, backend=backend)
    replay = capture(lambda: adamw_(*lists, **HYPERS, backend=backend))
    replay()
    for _ in range(2):
        adamw_(*plain, **HYPERS, backend="reference")
    assert [step.item() for step in lists[5]] == [step.item() for step in plain[5]]
    for mine, other in zip(lists[0], plain[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
