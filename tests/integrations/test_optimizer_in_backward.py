"""One optimizer for each parameter, stepped by a hook as soon as its gradient is there."""

import torch

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    batches,
    calls_taken,
    launches,
    weights,
)

STEPS = 5


def run(cls, **options):
    model = SideBySide()
    optimizers = {p: cls([p], **OPTIONS, **options) for p in model.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for batch in batches(STEPS):
        model(**batch)["loss"].backward()
        assert all(p.grad is None for p in model.parameters())
    return weights(model), optimizers


def test_optimizer_in_backward():
    theirs, _ = run(torch.optim.AdamW, fused=True)
    with launches(STEPS * len(theirs)):
        ours, optimizers = run(warpstep.AdamW)
    assert_agree(ours, theirs, STEPS)
    for optimizer in optimizers.values():
        assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [1]


def test_optimizer_in_backward_enabled():
    theirs, _ = run(torch.optim.AdamW, fused=True)
    with calls_taken(STEPS * len(theirs)):
        ours, _ = run(torch.optim.AdamW, fused=True)
    assert_agree(ours, theirs, STEPS)
