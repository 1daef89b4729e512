"""Memory that is freed, moved or of another kind under an optimizer; and plans that stay."""

import copy
import math
import weakref

import pytest
import torch

import warpstep
from support.cases import on_each_device
from support.parameters import new_params, params_of, random, take_steps
from support.tolerance import bound

LR = 0.01


def copies_of(optimizer):
    """Copies of parameters and state, of what has memory."""
    tensors = list(params_of(optimizer))
    tensors += [t for p in params_of(optimizer) for t in optimizer.state.get(p, {}).values()]
    return [(t, t.detach().clone()) for t in tensors if t.numel() == 0 or t.data_ptr() != 0]


def assert_unchanged(before):
    for tensor, then in before:
        assert torch.equal(tensor.detach(), then)


# ---- freed storage

FREED = {
    "parameter": lambda p, state: p,
    "gradient": lambda p, state: p.grad,
    "exp_avg": lambda p, state: state["exp_avg"],
    "exp_avg_sq": lambda p, state: state["exp_avg_sq"],
}
# Not "step": the check does not look at its address. See docs/design.md, "what the check compares".


@on_each_device
@pytest.mark.parametrize("requested", ["auto", "reference"])
@pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize("what", FREED)
def test_freed_storage_is_an_error_and_nothing_changes(what, steps, requested, device):
    if steps == 0 and what not in ("parameter", "gradient"):
        pytest.skip("there is no state yet")
    optimizer = warpstep.AdamW(new_params(device=device), lr=LR, backend=requested)
    take_steps(optimizer, range(steps))
    params = params_of(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    tensor = FREED[what](params[2], optimizer.state.get(params[2]))
    values, size = tensor.detach().clone(), tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    before = copies_of(optimizer)
    published = {id(p): list(optimizer.state.get(p, {})) for p in params}
    for _ in range(2):  # again and again, not only when noticed first
        with pytest.raises(RuntimeError, match=r"parameter 2 of group 0"):
            optimizer.step()
        assert_unchanged(before)
        assert {id(p): list(optimizer.state.get(p, {})) for p in params} == published

    # Brought back, elsewhere: the run goes on as if nothing had been.
    keep = torch.full((17,), 3.0, device=device)
    tensor.untyped_storage().resize_(size)
    tensor.data.copy_(values)
    control = copy.deepcopy(optimizer)
    take_steps(optimizer, range(5, 7))
    take_steps(control, range(5, 7))
    for p, q in zip(params, params_of(control), strict=True):
        assert torch.equal(p, q)
    assert torch.all(keep == 3)


@on_each_device
def test_freed_parameters_without_gradient_are_left_alone(device):
    # As sharded modules are, between steps.
    optimizer = warpstep.AdamW(new_params(device=device), lr=LR)
    take_steps(optimizer, range(2))
    twin = torch.optim.AdamW(new_params(device=device), lr=LR)
    take_steps(twin, range(2))
    for opt in (optimizer, twin):
        for i, p in enumerate(params_of(opt)):
            p.grad = None if i == 2 else torch.ones_like(p)
        params_of(opt)[2].untyped_storage().resize_(0)
        opt.step()
        opt.step()
    for p, q in list(zip(params_of(optimizer), params_of(twin), strict=True))[:2]:
        torch.testing.assert_close(p, q, rtol=0, atol=bound(4, LR, q))
    assert optimizer.state[params_of(optimizer)[2]]["step"].item() == 2


@on_each_device
@pytest.mark.parametrize("shape", [(3, 2), (40,), ()], ids=str)
def test_another_shape_without_gradient_does_not_disturb_the_others(shape, device):
    # torch looks at no parameter that has no gradient.
    def result(cls):
        optimizer = cls(new_params(device=device), lr=LR)
        take_steps(optimizer, range(2))
        params = params_of(optimizer)
        for p in params:
            p.grad = torch.ones_like(p)
        params[2].grad = None
        params[2].data = torch.ones(shape, device=device)
        optimizer.step()
        assert torch.all(params[2] == 1)
        return params

    for p, q in zip(result(warpstep.AdamW), result(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(3, LR, q))


# ---- another shape or dtype


@on_each_device
@pytest.mark.parametrize("at_address", ["same", "another"])
@pytest.mark.parametrize("shape", [(3, 5), (15,), (5,), (1, 15)], ids=str)
def test_another_shape_needs_another_state(shape, at_address, device):
    optimizer = warpstep.AdamW(new_params(device=device), lr=LR)
    take_steps(optimizer, range(2))
    p = params_of(optimizer)[0]
    old = p.data
    new = old.flatten()[: math.prod(shape)].view(shape)
    p.data = new if at_address == "same" else new.clone()
    for q in params_of(optimizer):
        q.grad = torch.ones_like(q)
    before = copies_of(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*exp_avg"):
        optimizer.step()
    assert_unchanged(before)
    del optimizer.state[p]  # what the message asks for, in short
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1
    assert optimizer.state[p]["exp_avg"].shape == shape


@on_each_device
@pytest.mark.parametrize("state_dtype", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_module_to_dtype_keeps_the_moments(dtype, state_dtype, device):
    # Moments stay as they are (torch's step fails there): a recipe of mixed dtypes.
    module = torch.nn.Linear(6, 4).to(device)
    optimizer = warpstep.AdamW(module.parameters(), lr=LR, state_dtype=state_dtype)
    take_steps(optimizer, range(2))
    moments = [optimizer.state[p]["exp_avg"] for p in module.parameters()]
    module.to(dtype)

    # The oracle: torch in float64 from the same numbers, rounded once at the end.
    exact = [p.detach().double().requires_grad_() for p in module.parameters()]
    oracle = torch.optim.AdamW(exact, lr=LR)
    oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i, (p, q) in enumerate(zip(module.parameters(), exact, strict=True)):
        p.grad = random(p.shape, 50 + i, device, dtype)
        q.grad = p.grad.double()
    optimizer.step()
    oracle.step()
    for p, q, moment in zip(module.parameters(), exact, moments, strict=True):
        assert p.dtype == dtype
        atol = bound(1, LR, p) + bound(3, LR, q, torch.float32)
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=atol)
        assert optimizer.state[p]["exp_avg"] is moment
        assert moment.dtype == (state_dtype or torch.float32)


@on_each_device
def test_another_dtype_at_the_same_address(device):
    start = random((16,), 0, device, torch.bfloat16)
    p = start.clone().requires_grad_()
    optimizer = warpstep.AdamW([p], lr=LR, state_dtype=torch.float32)
    p.grad = torch.ones_like(p)
    optimizer.step()
    address = p.data_ptr()
    p.grad = None
    p.data = p.data.view(torch.float16)  # the same bits, other numbers
    assert p.data_ptr() == address
    twin = copy.deepcopy(optimizer)
    for opt in (optimizer, twin):
        params_of(opt)[0].grad = torch.ones_like(params_of(opt)[0])
        opt.step()
    assert torch.equal(p, params_of(twin)[0])
    assert p.dtype == torch.float16


@on_each_device
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moment_of_another_order_at_the_same_address(key, device):
    def result(cls, **options):
        p = random((4, 4), 0, device).requires_grad_()
        optimizer = cls([p], lr=LR, **options)
        take_steps(optimizer, range(2))
        moment = optimizer.state[p][key]
        moment.data = moment.data.t()
        take_steps(optimizer, range(2, 4))
        return p

    q = result(torch.optim.AdamW, foreach=False)
    torch.testing.assert_close(result(warpstep.AdamW), q, rtol=0, atol=bound(4, LR, q))


@on_each_device
def test_moment_of_another_shape_at_the_same_address(device):
    # Fewer elements than the plan bound: what lies behind them belongs to somebody else.
    p = random((4, 4), 0, device).requires_grad_()
    optimizer = warpstep.AdamW([p], lr=LR)
    take_steps(optimizer, range(2))
    moment = optimizer.state[p]["exp_avg"]
    whole = moment.data
    moment.data = whole[:2]
    p.grad = torch.ones_like(p)
    before = [(whole, whole.clone()), *copies_of(optimizer)]
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*exp_avg"):
        optimizer.step()
    assert_unchanged(before)


@pytest.mark.parametrize("shapes", [[(0, 3)], [(0,), (2, 0)]], ids=str)
def test_state_of_empty_parameters_that_moves_is_followed(shapes):
    # They have no elements, but each has a step counter in memory.
    optimizer = warpstep.AdamW(new_params(shapes), lr=LR)
    take_steps(optimizer, range(2))
    old = []
    for p in params_of(optimizer):
        for tensor in optimizer.state[p].values():
            old.append(tensor.data)
            tensor.data = tensor.data.clone()
    before = [t.clone() for t in old]
    take_steps(optimizer, range(2, 4))
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [4] * len(shapes)
    assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_step_counter_of_another_dtype(dtype, device):
    def result(cls, dtype):
        optimizer = cls(new_params(device=device), lr=LR)
        take_steps(optimizer, range(2))
        for state in optimizer.state.values():
            state["step"] = state["step"].to(dtype)
        take_steps(optimizer, range(2, 4))
        return optimizer

    ours, theirs = result(warpstep.AdamW, dtype), result(torch.optim.AdamW, torch.float32)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(4, LR, q))
        assert ours.state[p]["step"].item() == 4


# ---- gradients that come and go, and plans that stay


@on_each_device
def test_gradients_appearing_and_disappearing_each_step(device):
    def result(cls):
        optimizer = cls(new_params([(7,)] * 6, device), lr=LR)
        params = params_of(optimizer)
        for step in range(24):
            for i, p in enumerate(params):
                present = (step * 7 + i * 5) % 6 < 3
                p.grad = random(p.shape, 100 * step + i, device) if present else None
            optimizer.step()
        return params, [optimizer.state[p]["step"].item() for p in params]

    (ours, counts), (theirs, expected) = result(warpstep.AdamW), result(torch.optim.AdamW)
    assert counts == expected
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(24, LR, q))


STEADY = {
    "fresh-gradients": lambda opt, step: None,
    "zero_grad": lambda opt, step: opt.zero_grad(),
    "lr": lambda opt, step: opt.param_groups[0].update(lr=LR / (step + 1)),
    "betas": lambda opt, step: opt.param_groups[0].update(betas=(0.5 + step / 100, 0.99)),
    "decay-and-eps": lambda opt, step: opt.param_groups[0].update(weight_decay=0.1, eps=1e-3),
    "tensor-lr": lambda opt, step: opt.param_groups[0].update(lr=torch.tensor(LR / (step + 1))),
    "in-place-data": lambda opt, step: [p.data.mul_(0.9) for p in params_of(opt)],
    "state_dict": lambda opt, step: opt.state_dict(),
}


@pytest.mark.parametrize("case", STEADY)
def test_the_plan_stays_in_steady_state(case):
    assert warpstep.AdamW(new_params()).plan is None
    optimizer = warpstep.AdamW(new_params(), lr=LR)
    twin = torch.optim.AdamW(new_params(), lr=LR)
    take_steps(optimizer, range(1))
    take_steps(twin, range(1))
    plan = optimizer.plan
    assert plan is not None
    for step in range(1, 5):
        for opt in (optimizer, twin):
            STEADY[case](opt, step)
            take_steps(opt, [step])
        assert optimizer.plan is plan
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(5, LR, q))


def test_each_step_is_one_launch():
    groups = [{"params": [p]} for p in new_params([(3,)] * 40)]
    optimizer = warpstep.AdamW(groups, lr=LR)
    take_steps(optimizer, range(1))
    key = "cpu"
    if not (counts := warpstep.status().launches)[key]:
        pytest.skip("no native module")
    take_steps(optimizer, range(1, 6))
    assert warpstep.status().launches[key] == counts[key] + 5


def test_state_that_is_moved_away_is_freed_at_once():
    """A framework that takes state off the device between steps gets the memory back then."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = warpstep.AdamW([p])
    optimizer.step()
    optimizer.step()
    keys = ("exp_avg", "exp_avg_sq", "step")
    old = [weakref.ref(optimizer.state[p][key]) for key in keys]
    for key in keys:
        optimizer.state[p][key] = optimizer.state[p][key].clone()
    assert [reference() for reference in old] == [None, None, None]


def test_clipping_reads_no_state_that_was_replaced():
    """A gradient of other strides is found through Python, before which all that was found is kept
    alive: not what the clipping did not look at.
    """
    params = [torch.nn.Parameter(random((4, 6), i)) for i in range(30)]
    optimizer = warpstep.AdamW(params, lr=LR)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = random((6, 4), 100 * step + i).t()
        if step < 2:
            optimizer.step()
    for param in params:
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key] = optimizer.state[param][key].clone()
    expected = torch.stack([p.grad.double().norm() for p in params]).norm()
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.item() == pytest.approx(expected.item(), rel=2 * torch.finfo(torch.float32).eps)
    others = [torch.zeros(2) for _ in range(200)]  # where freed tensors would have been
    optimizer.step()
    assert all(torch.isfinite(t).all() for p in params for t in optimizer.state[p].values())
    assert all((other == 0).all() for other in others)
