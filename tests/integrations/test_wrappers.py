"""Optimizers that hold another one: SAM, Lookahead, and classes made of the class they wrap."""

import pytest
import torch

import warpstep
from training import OPTIONS, SideBySide, assert_agree, batches, calls_taken, launches, weights

STEPS = 4


class Sam:
    """Sharpness-aware minimisation: the gradients of the weights a little uphill (Foret 2020)."""

    def __init__(self, optimizer, model):
        self.optimizer, self.model = optimizer, model

    def values(self):
        return {p: p.detach().clone() for p in self.model.parameters()}

    def put_back(self, values):
        for p, value in values.items():
            p.copy_(value)

    def step(self, closure):
        closure()
        values = self.values()
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(p.grad, alpha=0.05)
        closure()
        with torch.no_grad():
            self.put_back(values)
        self.optimizer.step()


class SamOfMasters(Sam):
    def values(self):
        return self.optimizer.master_parameters()

    def put_back(self, values):
        self.optimizer.set_master_parameters(values)


class Lookahead:
    """Every second step the weights go halfway back to where they were (Zhang 2019)."""

    def __init__(self, optimizer, model):
        self.optimizer, self.model, self.steps = optimizer, model, 0
        self.slow = {p: p.detach().clone() for p in model.parameters()}

    def step(self, closure):
        closure()
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            with torch.no_grad():
                for p, slow in self.slow.items():
                    p.copy_(slow.lerp_(p, 0.5))


class Clipping(torch.optim.Optimizer):
    """Derived from the class of what it wraps, as Horovod's is: see `wrapped_by_class`."""

    def step(self, closure):
        closure()
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, 1e-3)
        return super(type(self), self).step()


def wrapped_by_class(optimizer, model):
    base = type(optimizer)
    return type(base.__name__, (base,), dict(vars(Clipping)))(optimizer.param_groups)


def run(wrapper, cls, model=None, **options):
    model = SideBySide() if model is None else model
    optimizer = wrapper(cls(model.parameters(), **OPTIONS, **options), model)
    for batch in batches(STEPS):
        floats = {name: value.to(next(model.parameters()).dtype) for name, value in batch.items()}

        def closure(floats=floats):
            model.zero_grad()
            model(**floats)["loss"].backward()

        optimizer.step(closure)
    return weights(model), getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize("wrapper", [Sam, Lookahead, wrapped_by_class], ids=lambda f: f.__name__)
def test_a_wrapped_class(wrapper):
    theirs, _ = run(wrapper, torch.optim.AdamW)
    with launches(STEPS):
        ours, _ = run(wrapper, warpstep.AdamW)
    assert_agree(ours, theirs, STEPS)
    with calls_taken(STEPS):
        enabled, _ = run(wrapper, torch.optim.AdamW, fused=True)
    assert_agree(enabled, theirs, STEPS)


def test_sam_with_masters():
    """Masters that are put back as such: the run of float32 weights from the same gradients."""
    model = SideBySide().to(torch.bfloat16)
    exact = SideBySide()
    exact.load_state_dict(model.state_dict())
    _, optimizer = run(SamOfMasters, warpstep.AdamW, model, master="residual")
    twin = warpstep.AdamW(exact.parameters(), **OPTIONS)
    for batch in batches(STEPS):  # whose gradients depend on the data alone
        model.zero_grad()
        model(**{name: value.to(torch.bfloat16) for name, value in batch.items()})[
            "loss"
        ].backward()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.float()
        twin.step()
    masters = optimizer.master_parameters().values()
    assert all(map(torch.equal, masters, exact.parameters()))


def test_a_class_made_again_keeps_what_is_in_groups():
    options = {"decay_form": "cautious", "ema_decay": 0.5, "state_dtype": torch.bfloat16}
    _, optimizer = run(wrapped_by_class, warpstep.AdamW, **options)
    assert optimizer.param_groups[0]["decay_form"] == "cautious"
    assert len(optimizer.ema_parameters()) == len(optimizer.param_groups[0]["params"])
    assert optimizer.state_dtype is None
