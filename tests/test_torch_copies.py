"""Pickling, deepcopy, autograd's version counters, differentiable steps, torch.compile."""

import copy
import io
import pickle

import pytest
import torch

import warpstep
from support.cases import PAIRS, on_each_device
from support.parameters import new_params, params_of, random, set_grads, take_steps
from support.tolerance import bound

LR = 0.01


def by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def by_torch_save(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"pickle": by_pickle, "torch.save": by_torch_save, "deepcopy": copy.deepcopy}


@on_each_device
@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "after-two-steps"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_step_independently(how, before, device):
    options = {"lr": LR, "backend": "reference" if device == "cpu" else "auto"}
    options["state_dtype"] = torch.float64
    original = warpstep.AdamW(new_params(device=device), **options)
    take_steps(original, range(before))
    copied = COPIES[how](original)
    assert type(copied) is warpstep.AdamW
    assert (copied.backend, copied.state_dtype) == (options["backend"], torch.float64)
    assert copied.plan is None
    mine, its = params_of(original), params_of(copied)
    assert all(p is not q for p, q in zip(mine, its, strict=True))

    # The copy goes another way; the original does not notice, and then goes that way too.
    at_copy = [p.detach().clone() for p in mine]
    take_steps(copied, range(10, 13))
    assert all(torch.equal(p, then) for p, then in zip(mine, at_copy, strict=True))
    take_steps(original, range(10, 13))
    for p, q in zip(mine, its, strict=True):
        assert torch.equal(p, q)
        assert not set(map(id, original.state[p].values())) & set(map(id, copied.state[q].values()))


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_model_and_optimizer_together(how):
    model = torch.nn.Linear(3, 2)
    optimizer = warpstep.AdamW(model.parameters(), lr=LR)
    take_steps(optimizer, range(1))
    twin_model, twin = COPIES[how]((model, optimizer))
    assert params_of(twin)[0] is twin_model.weight
    take_steps(twin, range(1, 3))
    take_steps(optimizer, range(1, 3))
    assert torch.equal(model.weight, twin_model.weight)
    assert twin_model.weight.data_ptr() != model.weight.data_ptr()


@pytest.mark.parametrize("how", ["auto", "reference"])
@on_each_device
def test_backward_after_step_is_caught(how, device):
    w = random((4,), 0, device).requires_grad_()
    x = random((4,), 1, device).requires_grad_()
    optimizer = warpstep.AdamW([w], lr=LR, backend=how)
    loss = (w * x).sum()
    loss.backward(retain_graph=True)
    for _ in range(2):  # a new plan, and a bound one
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
        loss = (w * x).sum()
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_version_counters(how):
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR, backend=how)
    set_grads(params, 0)
    optimizer.step()
    for skip in (1, 2, None):  # which parameter has no gradient
        set_grads(params, 1)
        if skip is not None:
            params[skip].grad = None
        versions = [p._version for p in params]
        grad_versions = [p.grad._version for p in params if p.grad is not None]
        optimizer.step()
        for i, (p, version) in enumerate(zip(params, versions, strict=True)):
            assert (p._version == version) == (i == skip)
        assert [p.grad._version for p in params if p.grad is not None] == grad_versions


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("name", PAIRS)
def test_differentiable_step(name, amsgrad):
    # The gradient of a loss after two steps, with respect to where they started and the gradients.
    # Under amsgrad, torch itself cannot go back through more than one.
    seeds = (1,) if amsgrad else (1, 2)

    def hypergradients(cls):
        start = random((6,), 0, dtype=torch.float64).requires_grad_()
        grads = [random((6,), i, dtype=torch.float64).requires_grad_() for i in seeds]
        p = start.clone()
        options = {"lr": LR, "weight_decay": 0.1, "amsgrad": amsgrad, "differentiable": True}
        optimizer = cls([p], **options)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        value = p.detach().clone()
        (p**3).sum().backward()
        return value, start.grad, [g.grad for g in grads]

    # torch's own operations run: the same bits.
    ours, theirs = (hypergradients(cls) for cls in PAIRS[name])
    assert theirs[1].abs().min() > 0
    assert all(g.abs().max() > 0 for g in theirs[2])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_differentiable_lr():
    def result(cls):
        lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
        p = random((6,), 0, dtype=torch.float64).requires_grad_().clone()
        p.grad = random((6,), 1, dtype=torch.float64)
        cls([p], lr=lr, differentiable=True).step()
        (p**2).sum().backward()
        return lr.grad

    assert result(torch.optim.AdamW) != 0
    assert torch.equal(result(warpstep.AdamW), result(torch.optim.AdamW))


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("compiled", ["function", "step"])
def test_compiled_caller(compiled):
    p, q = new_params(), new_params()
    a, b = warpstep.AdamW(p, lr=LR), warpstep.AdamW(q, lr=LR)

    def train_step():
        loss = sum((x * x).sum() for x in p)
        loss.backward()
        a.step()
        a.zero_grad()
        return loss.detach()

    step = a.step
    if compiled == "function":
        train_step = torch.compile(train_step, backend="eager")
    else:
        step = torch.compile(a.step, backend="eager")
    for _ in range(3):
        if compiled == "function":
            train_step()
        else:
            sum((x * x).sum() for x in p).backward()
            step()
            a.zero_grad()
        sum((x * x).sum() for x in q).backward()
        b.step()
        b.zero_grad()
    for x, y in zip(p, q, strict=True):
        assert a.state[x]["step"].item() == 3
        torch.testing.assert_close(x, y, rtol=0, atol=bound(3, LR, y))
