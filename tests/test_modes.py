"""Steps that modes and tracers are to see: the same results, and all of it seen."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils import _pytree as pytree

import warpstep
from support.modes import (
    ALL,
    BY_OPERATOR,
    BY_REFERENCE,
    LR,
    SHAPES,
    Called,
    Dispatched,
    assert_same_tensors,
    give_gradients,
    optimizer_of,
    tensors_of,
)
from support.parameters import params_of, random

STEPS = 3


@pytest.mark.parametrize("mode", [Dispatched, Called])
@pytest.mark.parametrize("options", BY_OPERATOR.values(), ids=BY_OPERATOR)
def test_operators_give_the_bits_of_a_launch(options, mode):
    watched, launched = optimizer_of(**options), optimizer_of(**options)
    name = "adamw_" if launched.param_groups[0]["decoupled_weight_decay"] else "adam_"
    name = "adam_" if options.get("decay_form") == "coupled" else name
    for step in range(STEPS):
        give_gradients(watched, step)
        give_gradients(launched, step)
        versions = [p._version for p in params_of(watched)]
        with mode() as watch:
            watched.step()
        launched.step()
        calls = [f for f in watch.seen if f.startswith("warpstep.")]
        assert [call.split(".")[1] for call in calls] == [name] * 2  # one a group
        assert [p._version for p in params_of(watched)] == [v + 1 for v in versions]
        assert str(watched.plan).startswith("operators")
    assert_same_tensors(watched, launched)
    give_gradients(watched, STEPS)
    watched.step()  # with nobody looking: a launch, and it goes on
    assert watched.plan.lasts


@pytest.mark.parametrize("mode", [Dispatched, Called])
@pytest.mark.parametrize("options", BY_REFERENCE.values(), ids=BY_REFERENCE)
def test_the_rest_goes_by_the_reference(options, mode):
    """Bias corrections are then powers of tensors, which may round otherwise: 4 ulp a step."""
    watched = optimizer_of(**options)
    plain = optimizer_of(**{**options, "backend": "reference"})
    for step in range(STEPS):
        give_gradients(watched, step)
        give_gradients(plain, step)
        with mode() as watch:
            watched.step()
        plain.step()
        assert not any("adamw_" in f for f in watch.seen)
        assert any("copy_" in f for f in watch.seen)
    others = tensors_of(plain)
    for name, tensor in tensors_of(watched).items():
        bound = STEPS * 4 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, others[name], rtol=bound, atol=LR * bound)
    if options.get("stats"):
        found, expected = watched.statistics(), plain.statistics()
        for field in ("grad_norm", "param_norm", "update_norm"):
            torch.testing.assert_close(
                getattr(found, field), getattr(expected, field), rtol=1e-5, atol=0
            )
        assert torch.equal(found.nonfinite, expected.nonfinite)
        assert [p is q for p, q in zip(found.params, params_of(watched), strict=True)]


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "stats": True}], ids=["plain", "tail"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_scaled_gradients(options, found):
    """grad_scale and found_inf as GradScaler sets them; a step that is skipped changes nothing."""
    watched, plain = optimizer_of(**options), optimizer_of(**options)
    for optimizer in (watched, plain):
        give_gradients(optimizer, 0)
        optimizer.step()
        give_gradients(optimizer, 1)
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(found)
    before = copy.deepcopy(tensors_of(watched))
    with Dispatched():
        watched.step()
    plain.step()
    for name, tensor in tensors_of(watched).items():
        torch.testing.assert_close(tensor, tensors_of(plain)[name], rtol=1e-6, atol=1e-8)
        assert torch.equal(tensor, before[name]) == (found == 1.0 or tensor.numel() == 0), name


@pytest.mark.parametrize("taken", ["taken", "skipped"])
@pytest.mark.parametrize("options", [{}, {"stats": True}], ids=["operator", "reference"])
def test_gradients_are_zeroed(options, taken):
    """After all were read: two parameters have one gradient, and one parameter is met twice."""
    optimizers = []
    for _ in range(2):
        params = [Parameter(torch.ones(3)), Parameter(torch.ones(3)), Parameter(torch.ones(4))]
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizers.append(warpstep.AdamW([*params, params[2]], lr=LR, **options))
        params[0].grad = params[1].grad = torch.full((3,), 2.0)
        params[2].grad = torch.ones(4)
        optimizers[-1].found_inf = torch.tensor(float(taken == "skipped"))
    with Dispatched():
        optimizers[0].step(zero_grads=True)
    optimizers[1].step(zero_grads=True)
    for ours, theirs in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * 2**-23, atol=0)
        assert not ours.grad.any()
    assert optimizers[0].state[params_of(optimizers[0])[2]]["step"] == 2 * (taken == "taken")


@pytest.mark.parametrize("clipped", ["inside", "outside"])
@pytest.mark.parametrize("stepped", ["inside", "outside"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping(clipped, stepped, norm_type):
    """Wherever the mode begins, the step is that of torch's clipping; torch's fused is the truth.

    A coefficient, a norm in another order of additions, a product: some 10 roundings.
    """
    ours, theirs = optimizer_of(), optimizer_of(torch.optim.AdamW, fused=True)
    for step in range(STEPS):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, step)
        if clipped == "inside":
            with Dispatched() as watch:
                norm = ours.clip_grad_norm_(0.5, norm_type)
            assert any("norm" in f for f in watch.seen)
        else:
            norm = ours.clip_grad_norm_(0.5, norm_type)
        nonempty = [p for p in params_of(theirs) if p.numel()]  # torch has no inf-norm of these
        expected = torch.nn.utils.clip_grad_norm_(nonempty, 0.5, norm_type)
        torch.testing.assert_close(norm, expected, rtol=10 * 2**-23, atol=0)
        if stepped == "inside":
            with Dispatched() as watch:
                ours.step()
            assert len(watch.seen) > 2
        else:
            ours.step()
        theirs.step()
    for name, tensor in tensors_of(ours).items():
        torch.testing.assert_close(tensor, tensors_of(theirs)[name], rtol=3e-6, atol=1e-7)


def test_everything_is_checked_first():
    """What cannot be stepped is named, and nothing has been written, nor published."""
    optimizer = optimizer_of()
    give_gradients(optimizer, 0)
    params_of(optimizer)[1].grad = torch.ones(4, 5).to_sparse()
    before = [p.detach().clone() for p in params_of(optimizer)]
    with Dispatched(), pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(optimizer), before, strict=True))
    assert not optimizer.state


def test_a_parameter_without_a_state_gets_none():
    """SGD's without momentum: a state dict has nothing of it, as after a step that none watches."""
    params = [Parameter(random((4, 5), seed)) for seed in range(2)]
    optimizer = warpstep.SGD(params, lr=LR)
    for param in params:
        param.grad = torch.ones_like(param)
    with Dispatched():
        optimizer.step()
    assert not optimizer.state
    assert not optimizer.state_dict()["state"]


def test_differentiable_steps_are_torchs():
    """Inside a mode as outside."""
    for mode in (nullcontext(), Dispatched()):
        param = torch.ones(3, requires_grad=True)
        hidden = param * 1
        hidden.grad = torch.ones(3)
        optimizer = warpstep.AdamW([param], lr=LR, differentiable=True)
        optimizer.param_groups[0]["params"] = [hidden]
        with mode:
            optimizer.step()
        hidden.sum().backward()
        assert torch.allclose(param.grad, torch.tensor(1 - LR * 1e-2))


# ---------------------------------------------------------------------------------------- tracing


def names_of(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_a_traced_step_steps_when_replayed(options):
    """make_fx records the step: with other gradients, the graph does what the step would do."""
    traced, plain = optimizer_of(**options), optimizer_of(**options)
    for optimizer in (traced, plain):
        give_gradients(optimizer, 0)
        optimizer.step()

    def step(*grads):
        for p, grad in zip(params_of(traced), grads, strict=True):
            p.grad = grad * 1
        traced.step()
        return grads[0] + 1

    def grads_of(step):
        give_gradients(plain, step)
        return [p.grad.clone() for p in params_of(plain)]

    graph = make_fx(step)(*grads_of(1))
    plain.step()
    for i in range(2, 2 + STEPS):
        graph(*grads_of(i))
        plain.step()
    called = [name for name in names_of(graph) if name.startswith("warpstep")]
    assert len(called) == 2 * (options in BY_OPERATOR.values())
    for name, tensor in tensors_of(traced).items():
        bound = (STEPS + 1) * 8 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, tensors_of(plain)[name], rtol=bound, atol=LR * bound)
        if options in BY_OPERATOR.values():
            assert torch.equal(tensor, tensors_of(plain)[name]), name


@pytest.mark.parametrize("fused", [None, True])
def test_a_first_step_is_traced_with_its_state(fused):
    """As torch's fused optimizer: the graph makes the state, and each replay is a first step."""

    def traced_twice(optimizer):
        def step(x):
            optimizer.step()
            return x + 1

        give_gradients(optimizer, 0)
        graph = make_fx(step)(torch.ones(1))
        graph(torch.ones(1))
        assert names_of(graph).count("aten.zeros_like.default") == 2 * len(SHAPES)
        return params_of(optimizer)

    ours = traced_twice(optimizer_of(fused=fused))
    theirs = traced_twice(optimizer_of(torch.optim.AdamW, fused=True))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * 2**-23, atol=0)


def swapped_in(kind, **options):
    """A step traced over fake parameters and a fake state dict, as torch's docstring shows."""
    stateless = pytest.importorskip("torch.optim._stateless")
    optimizer = optimizer_of(kind, shapes=SHAPES[:2], **options)
    give_gradients(optimizer, 0)
    optimizer.step()
    before = copy.deepcopy(tensors_of(optimizer))
    params = {f"p{i}": p for i, p in enumerate(params_of(optimizer))}

    def step(params, state, grads):
        with stateless.swap_in_optimizer_params_and_state(optimizer, params, state):
            for name, param in params.items():
                param.grad = grads[name]
            optimizer.step()
        return params, state

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given = (params, optimizer.state_dict(), {n: torch.ones_like(p) for n, p in params.items()})
    with fake:
        fakes = pytree.tree_map_only(torch.Tensor, fake.from_tensor, given)
    graph = make_fx(step)(*fakes)
    for name, tensor in tensors_of(optimizer).items():
        assert torch.equal(tensor, before[name]), name  # tracing has changed nothing

    grads = {n: random(p.shape, 7) for n, p in params.items()}
    detached = {n: p.detach() for n, p in params.items()}
    graph(detached, optimizer.state_dict(), grads)
    return optimizer, names_of(graph)


@pytest.mark.parametrize("fused", [None, True])
def test_swapped_in_parameters_and_state(fused):
    ours, names = swapped_in(warpstep.AdamW, fused=fused)
    assert names.count("warpstep.adamw_.default") == 1
    theirs, names = swapped_in(torch.optim.AdamW, fused=True)
    assert names.count("aten._fused_adamw_.default") == 1
    for name, tensor in tensors_of(ours).items():
        other = tensors_of(theirs)[name]
        torch.testing.assert_close(tensor, other, rtol=8 * 2**-23, atol=LR * 2**-20)
        assert "step" not in name or tensor == 2


def test_swapped_in_without_a_mode():
    """The plan of one set of parameters is not taken for the other."""
    stateless = pytest.importorskip("torch.optim._stateless")
    optimizer, other = optimizer_of(shapes=SHAPES[:2]), optimizer_of(shapes=SHAPES[:2], lr=0.5)
    for one in (optimizer, other):
        give_gradients(one, 0)
        one.step()
    before = copy.deepcopy(tensors_of(optimizer))
    params = {str(i): p for i, p in enumerate(params_of(other))}
    expected = copy.deepcopy(other)
    give_gradients(expected, 0)
    for _ in range(2):
        with stateless.swap_in_optimizer_params_and_state(optimizer, params, other.state_dict()):
            optimizer.step()
        expected.step()
    assert_same_tensors(other, expected)
    for name, tensor in tensors_of(optimizer).items():
        assert torch.equal(tensor, before[name]), name
    optimizer.step()
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 2


def test_a_master_of_a_scalar_under_a_mode():
    """Its constants are float64 tensors there, which a tensor of no dimensions is promoted by."""
    params = [Parameter(torch.tensor(1.5, dtype=torch.bfloat16)) for _ in range(2)]
    for param, mode in zip(params, (nullcontext(), Dispatched()), strict=True):
        optimizer = warpstep.AdamW([param], master="residual", backend="reference")
        param.grad = torch.ones_like(param)
        with mode:
            optimizer.step()
    assert torch.equal(*params)
