"""What only a GPU shows: streams, CUDA graphs, huge tensors, several devices."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.bits import assert_same_bits, bits
from support.environment import runnable_backends

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    if runnable_backends().get(request.param) != "cuda":
        pytest.skip(f"the {request.param} backend cannot run on this GPU")
    return request.param


def pair(sizes, **arguments):
    """Two optimizers over equal parameters, and the lists of those."""
    torch.manual_seed(0)
    starts = [torch.randn(n, device="cuda") for n in sizes]
    lists = [[Parameter(s.clone()) for s in starts] for _ in range(2)]
    return [(warpstep.AdamW(params, **arguments), params) for params in lists]


def set_same_grads(*lists, seed):
    torch.manual_seed(seed)
    for params in zip(*lists, strict=True):
        grad = torch.randn_like(params[0])
        for param in params:
            if param.grad is None:
                param.grad = grad.clone()
            else:
                param.grad.copy_(grad)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_capture_and_replay_give_the_bits_of_eager_steps(gpu_backend, scaled, tail):
    """With the tail: clipped, averaged, counted and zeroed inside the graph, too. Then nothing is
    scaled: a scale that the clipping was not told of makes the step raise.
    """
    sizes = (1, 1000, 40_001)
    lr = torch.tensor(1e-2, device="cuda")
    arguments = {"lr": lr, "capturable": True, "backend": gpu_backend}
    if tail:
        arguments |= {"ema_decay": 0.9, "stats": True, "decay_form": "min"}

    def step(optimizer):
        if tail:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step(zero_grads=tail)

    (eager, eager_params), (graphed, graphed_params) = pair(sizes, **arguments)
    if scaled:
        for optimizer in (eager, graphed):
            if not tail:
                optimizer.grad_scale = torch.tensor(8.0, device="cuda")
            optimizer.found_inf = torch.tensor(0.0, device="cuda")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    set_same_grads(eager_params, graphed_params, seed=1)
    with torch.cuda.stream(side):
        for optimizer in (eager, graphed):
            step(optimizer)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed)
    for seed in range(2, 6):
        lr.fill_(1e-2 / seed)  # a changed learning rate takes effect at the next replay
        if scaled:
            for optimizer in (eager, graphed):
                optimizer.found_inf.fill_(float(seed == 4))
        set_same_grads(eager_params, graphed_params, seed=seed)
        step(eager)
        graph.replay()
        if tail:
            assert all(p.grad.eq(0).all() for p in graphed_params)
            found = [o.statistics() for o in (eager, graphed)]
            for name in ("grad_norm", "param_norm", "update_norm", "nonfinite"):
                assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert_same_bits(eager, graphed)
    expected = 4.0 if scaled else 5.0
    assert {s["step"].item() for s in graphed.state.values()} == {expected}


def test_a_callable_ema_decay_cannot_be_captured(gpu_backend):
    ((optimizer, params), _) = pair(
        (10,), capturable=True, backend=gpu_backend, ema_decay=lambda step: 0.9
    )
    set_same_grads(params, seed=1)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="callable ema_decay"), torch.cuda.graph(graph):
        optimizer.step()


def test_capture_without_a_plan_says_what_to_do(gpu_backend):
    ((optimizer, params), _) = pair((10,), capturable=True, backend=gpu_backend)
    set_same_grads(params, seed=1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(graph):
        optimizer.step()


def test_the_step_runs_on_the_current_stream(gpu_backend):
    """On a side stream behind a long kernel: nothing may overtake it, nothing may wait for it."""
    ((optimizer, params), (plain, plain_params)) = pair((1 << 20,), backend=gpu_backend)
    set_same_grads(params, plain_params, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # The first turn loads kernels and allocates, for which a host may wait; the second must not.
    with torch.cuda.stream(side):
        for pause in (1, 200_000_000):
            torch.cuda._sleep(pause)
            params[0].grad.mul_(2)
            optimizer.step()
        assert not side.query()  # the host did not wait
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(2):
        plain_params[0].grad.mul_(2)
        plain.step()
    assert torch.equal(bits(params[0]), bits(plain_params[0]))


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-then-".join)
def test_the_cpu_waits_for_what_the_gpu_has_yet_to_work_out(devices):
    """The norm, the coefficient and the statistics, all behind a long kernel."""
    starts = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    on_gpu = devices.index("cuda")

    def stepped(devices):
        pairs = list(zip(starts, devices, strict=True))
        params = [Parameter(start.to(device, copy=True)) for start, device in pairs]
        optimizer = warpstep.SGD(params, lr=1.0, stats=True)  # moves by the coefficient
        for param, (start, device) in zip(params, pairs, strict=True):
            param.grad = start.to(device, copy=True)
            if device == "cuda":
                torch.cuda._sleep(200_000_000)
        params[on_gpu].grad.mul_(3)  # on a GPU: once it has slept
        norm = optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        found = optimizer.statistics()
        assert found.grad_norm.device == params[0].device
        statistics = torch.stack([found.grad_norm, found.update_norm])
        return [x.detach().cpu() for x in (statistics, norm, *params)]

    (statistics, *numbers), (expected, *others) = stepped(devices), stepped(("cpu", "cpu"))
    # The CPU's sums of a run are float32, of 2^10 squares in 2^6 places; a root halves the error.
    torch.testing.assert_close(statistics, expected, rtol=2**4 * 2**-24, atol=0)
    for one, other in zip(numbers, others, strict=True):
        # Norms of another order of additions: the coefficient may be another by one rounding.
        torch.testing.assert_close(one, other, rtol=4 * 2**-24, atol=2 * 2**-24)


def test_a_step_does_not_synchronise(gpu_backend):
    ((optimizer, params), _) = pair((10, 1000), backend=gpu_backend, ema_decay=0.9, stats=True)
    set_same_grads(params, seed=1)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.clip_grad_norm_(1.0, scaler=scaler)
        scaler.step(optimizer, zero_grads=True)
        optimizer.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_steady_step_allocates_nothing():
    ((optimizer, params), _) = pair((10, 1000), backend="cuda")
    set_same_grads(params, seed=1)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_2_to_the_31_elements(gpu_backend):
    """The same values around 2^31 and at the end as in a small tensor of the same elements."""
    size = 2**31 + 1003
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("needs 22 GB of GPU memory")
    param = Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    looked_at = torch.cat([torch.arange(0, 100), torch.arange(2**31 - 20_000, size)]).cuda()
    torch.manual_seed(0)
    values, grads = (torch.randn(looked_at.numel(), device="cuda").bfloat16() for _ in range(2))
    with torch.no_grad():
        param[looked_at] = values
    param.grad[looked_at] = grads
    small = Parameter(values.clone())
    small.grad = grads
    for p in (param, small):
        warpstep.AdamW([p], backend=gpu_backend).step()
    assert torch.equal(bits(param.detach()[looked_at]), bits(small))
    assert param.detach()[2**31 - 30_000] == 0


def test_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params)
    optimizer.step()
    assert torch.cuda.current_device() == 0
    assert len(optimizer.plan.buckets) == 2
    assert torch.equal(params[0].cpu(), params[1].cpu())
