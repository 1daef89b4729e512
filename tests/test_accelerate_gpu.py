"""What only a GPU shows of lists and enable(): the CUDA key, graphs, streams, lr on the device."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import runnable_backends
from support.lists import HYPERS, assert_same_lists, clones, flat, streams
from warpstep.functional import adamw_

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda_kernel():
    if runnable_backends().get("cuda") != "cuda":
        pytest.skip("the cuda backend cannot run on this GPU")
    yield
    warpstep.disable()


def model():
    torch.manual_seed(0)
    params = [Parameter(torch.randn(n, device="cuda")) for n in (3, 4096, 100_003)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("lr", ["number", "cpu", "cuda"])
def test_steps_as_torch(lr, scaled):
    """torch's fused optimizer on the GPU is taken, and a few roundings away."""
    results = []
    for on in (False, True):
        params = model()
        rate = 1e-2 if lr == "number" else torch.tensor(1e-2, device=lr)
        capturable = lr == "cuda"
        optimizer = torch.optim.AdamW(params, lr=rate, fused=True, capturable=capturable)
        if scaled:
            optimizer.grad_scale = torch.tensor(4.0, device="cuda")
            optimizer.found_inf = torch.tensor(0.0, device="cuda")
        (warpstep.enable if on else warpstep.disable)()
        taken = warpstep.status().taken
        for _ in range(3):
            optimizer.step()
        assert warpstep.status().taken - taken == (3 if on else 0)
        state = [t for s in optimizer.state.values() for t in s.values()]
        results.append([*params, *(p.grad for p in params), *state])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_bits_of_the_cpu():
    """CUDA's kernel and the CPU's give the same bits by way of lists too."""
    on_cpu = streams()
    on_gpu = [[t.cuda() for t in stream] for stream in on_cpu]
    adamw_(*on_cpu, **HYPERS, backend="cpu")
    adamw_(*on_gpu, **HYPERS, backend="cuda")
    assert_same_lists([[t.cpu() for t in stream] for stream in on_gpu], on_cpu)


def test_capture():
    """A captured torch step replays warpstep's kernel; with no step before, torch's is captured."""
    for warm in (True, False):
        params, eager = model(), model()
        lr = torch.tensor(1e-2, device="cuda")
        optimizers = [
            torch.optim.AdamW(ps, lr=lr, fused=True, capturable=True) for ps in (params, eager)
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (warpstep.enable if warm else warpstep.disable)()
            for optimizer in optimizers:
                optimizer.step()
            warpstep.enable()
        torch.cuda.current_stream().wait_stream(side)
        before = warpstep.status()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizers[0].step()
        after = warpstep.status()
        assert after.taken - before.taken == int(warm)
        assert sum(after.passed_on.values()) - sum(before.passed_on.values()) == int(not warm)
        for _ in range(3):
            graph.replay()
            optimizers[1].step()
        for a, b in zip(params, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        warpstep.disable()


def test_streams_and_evicted_tables():
    """Tables used on a side stream outlive what runs there, though others push them out."""
    lists = [[t.cuda() for t in stream] for stream in streams()]
    expected = clones(lists)
    for _ in range(2):
        adamw_(*expected, **HYPERS, backend="reference")
    adamw_(*lists, **HYPERS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        adamw_(*lists, **HYPERS)
    warpstep.lists.stepper.cache_clear()  # the tables go
    filled = [torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    del filled
    for a, b in zip(flat(lists), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_scalars_on_another_device():
    """grad_scale and found_inf must be where the parameters are."""
    lists = [[t.cuda() for t in stream] for stream in streams()]
    with pytest.raises(RuntimeError, match=r"grad_scale is on cpu, params\[0\] on cuda:0"):
        adamw_(*lists, **HYPERS, grad_scale=torch.tensor(1.0))
