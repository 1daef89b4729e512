"""A step happens as a whole or not at all, whatever interrupts it, and with odd gradients too."""

import signal

import pytest
import torch

import warpstep
from support.interruptions import interrupted_at, raise_interruption
from warpstep import backends, signals


@pytest.fixture
def raising_handler():
    before = signal.signal(signal.SIGUSR1, raise_interruption)
    yield raise_interruption
    signal.signal(signal.SIGUSR1, before)


def strided(size, seed):
    """A parameter with gaps in its memory, which goes to the reference."""
    whole = torch.randn(2 * size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(whole[::2])


def params_with_grads(kinds):
    params = []
    for seed, kind in enumerate(kinds):
        values = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        param = strided(5, seed) if kind == "strided" else torch.nn.Parameter(values)
        param.grad = torch.randn(5, generator=torch.Generator().manual_seed(100 + seed))
        params.append(param)
    return params


def seen(optimizer, params):
    """For each parameter: steps counted, values, and writes counted."""
    steps = [optimizer.state[p]["step"].item() if optimizer.state.get(p) else 0 for p in params]
    return steps, [p.detach().clone() for p in params], [p._version for p in params]


CASES = {
    "kernels": (["plain"] * 3, {}),
    "kernels-clipped": (["plain"] * 3, {"clip": True}),
    "kernels-and-reference": (["plain", "strided", "plain"], {}),
    "kernels-and-reference-clipped": (["plain", "strided", "plain"], {"clip": True}),
    "reference": (["strided", "strided"], {}),
}


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "first"])
@pytest.mark.parametrize("case", CASES)
def test_a_signal_at_any_line_leaves_a_whole_step_or_none(case, planned, raising_handler):
    kinds, options = CASES[case]

    def prepare():
        params = params_with_grads(kinds)
        optimizer = warpstep.AdamW(params, lr=0.1)
        if planned:
            optimizer.step()
        if options.get("clip"):
            optimizer.clip_grad_norm_(0.5)
        return optimizer, params

    optimizer, params = prepare()
    steps_before, values_before, versions_before = seen(optimizer, params)
    optimizer.step()
    _, values_after, _ = seen(optimizer, params)
    step_before = steps_before[0]

    came, outcomes, line = True, set(), 0
    while came:
        optimizer, params = prepare()
        came, raised = interrupted_at(line, optimizer.step)
        steps, values, versions = seen(optimizer, params)
        assert len(set(steps)) == 1, f"line {line}: the counters are {steps}"
        stepped = steps[0] == step_before + 1
        expected = values_after if stepped else values_before
        assert stepped or steps[0] == step_before
        for value, wanted in zip(values, expected, strict=True):
            assert torch.equal(value, wanted), f"line {line}: {steps}"
        written = [v > before for v, before in zip(versions, versions_before, strict=True)]
        assert all(written) if stepped else not any(written), f"line {line}"
        assert (raised is not None) == came
        assert signal.getsignal(signal.SIGUSR1) is raising_handler
        outcomes.add(stepped)
        if stepped:  # a clipping is used once
            assert optimizer._clipping is None or optimizer._clipping.compare()[0] == 0
        line += 1
    assert outcomes == {True, False}  # the signal came before and after what is written
    assert line > 10


def test_a_signal_at_any_line_of_the_functional(raising_handler):
    def prepare():
        params = params_with_grads(["plain", "strided", "plain"])
        moments = [[torch.zeros(5) for _ in params] for _ in range(2)]
        steps = [torch.zeros(()) for _ in params]
        return params, moments, steps

    def call(params, moments, steps):
        warpstep.functional.adamw_(
            [p.detach() for p in params],
            [p.grad for p in params],
            *moments,
            [],
            steps,
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            eps=1e-8,
        )

    came, outcomes, line = True, set(), 0
    while came:
        params, moments, steps = prepare()
        before = [p._version for p in params]
        came, _ = interrupted_at(line, lambda: call(params, moments, steps))  # noqa: B023
        counted = {s.item() for s in steps}
        assert len(counted) == 1, f"line {line}: {counted}"
        written = {p._version > b for p, b in zip(params, before, strict=True)}
        assert written == {counted == {1.0}}, f"line {line}"
        outcomes |= counted
        line += 1
    assert outcomes == {0.0, 1.0}


def test_several_signals_wait_and_each_handler_runs():
    ran = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = {n: signal.signal(n, lambda number, _: ran.append(number)) for n in numbers}
    handlers = {n: signal.getsignal(n) for n in numbers}
    try:
        with signals.deferred():
            for number in numbers:
                signal.raise_signal(number)
            assert ran == []
        assert sorted(ran) == sorted(numbers)
        assert {n: signal.getsignal(n) for n in numbers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_system_calls_go_on_after_a_signal_as_they_did(raising_handler):
    optimizer = warpstep.AdamW(params_with_grads(["strided"]))
    for interrupts in (False, True):
        signal.siginterrupt(signal.SIGUSR1, interrupts)
        optimizer.step()
        assert backends.native()[0].restarts_calls(signal.SIGUSR1) is not interrupts


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_expanded_gradients_are_zeroed(backend, kind):
    params, others = params_with_grads(["plain", kind]), params_with_grads(["plain", kind])
    for some in (params, others):
        some[1].grad = torch.full((1,), 0.5).expand(5)
    ours = warpstep.AdamW(params, lr=0.1, backend=backend)
    theirs = torch.optim.AdamW(others, lr=0.1)
    for _ in range(3):
        ours.step(zero_grads=True)
        theirs.step()
        theirs.zero_grad(set_to_none=False)
    for p, q in zip(params, others, strict=True):
        # Two roundings of float32 a step, of numbers below 4.
        torch.testing.assert_close(p, q, rtol=0, atol=3 * 2 * 4 * torch.finfo(torch.float32).eps)
        assert not p.grad.any()
        assert ours.state[p]["step"] == 3


@pytest.mark.parametrize("kinds", [["plain", "strided"], ["strided"], ["plain"]])
@pytest.mark.parametrize("first_inside", [True, False])
def test_inference_mode_for_one_of_two_steps(kinds, first_inside):
    params, others = params_with_grads(kinds), params_with_grads(kinds)
    optimizer = warpstep.AdamW(params, lr=0.1, ema_decay=0.5)
    plainly = warpstep.AdamW(others, lr=0.1, ema_decay=0.5)
    for step in range(2):
        with torch.inference_mode(first_inside == (step == 0)):
            optimizer.step()
        plainly.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, tensor in plainly.state[q].items():
            assert torch.equal(optimizer.state[p][key], tensor), key
            assert not optimizer.state[p][key].is_inference(), key


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        params = params_with_grads(["plain", "strided"])
    others = params_with_grads(["plain", "strided"])
    ours, theirs = warpstep.AdamW(params, lr=0.1), warpstep.AdamW(others, lr=0.1)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


class Reluctant(torch.Tensor):
    """Refuses to be written to."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            raise PermissionError("read only")
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


def test_a_tensor_that_refuses_to_be_written_leaves_all_as_it_was():
    params = params_with_grads(["plain", "strided", "plain"])
    refusing = torch.randn(5).as_subclass(Reluctant).requires_grad_()
    refusing.grad = torch.ones(5)
    params.insert(2, refusing)
    optimizer = warpstep.AdamW(params, lr=0.1)
    before = [p.detach().as_subclass(torch.Tensor).clone() for p in params]
    with pytest.raises(PermissionError, match="read only"):
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param.detach().as_subclass(torch.Tensor), value)
        assert optimizer.state[param]["step"] == 0
        assert not optimizer.state[param]["exp_avg"].as_subclass(torch.Tensor).any()


def test_gradients_that_overlap_in_part_are_all_read_before_one_is_zeroed(backend):
    memory = torch.arange(1.0, 7.0)
    grads = [memory[:4], memory[1:5], memory[5:]]
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    others = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    for param, other, grad in zip(params, others, grads, strict=True):
        param.grad, other.grad = grad, grad.clone()
    ours = warpstep.AdamW(params, lr=0.1, backend=backend)
    ours.step(zero_grads=True)
    warpstep.AdamW(others, lr=0.1, backend=backend).step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    assert not memory.any()
