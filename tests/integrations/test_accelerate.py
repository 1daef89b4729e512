"""Hugging Face accelerate: prepare, gradient accumulation, clipping, save_state and load_state."""

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    calls_taken,
    launches,
    rows,
    weights,
)

STEPS, ACCUMULATED = 4, 2


def prepare(cls, **options):
    """An accelerator, and what it prepared: model, optimizer, scheduler, loader."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = SideBySide()
    optimizer = cls(model.parameters(), **OPTIONS, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader(rows(4 * STEPS * ACCUMULATED), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)


def run(prepared, first=0, last=STEPS, rates=None):
    """Takes the optimizer's steps from ``first`` up to ``last``. Returns the weights."""
    accelerator, model, optimizer, scheduler, loader = prepared
    for batch in list(loader)[first * ACCUMULATED : last * ACCUMULATED]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                assert accelerator.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.step()
            scheduler.step()
            if rates is not None:
                rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


def torch_run():
    return run(prepare(torch.optim.AdamW, fused=True))


def test_accelerate():
    prepared = prepare(warpstep.AdamW)
    with launches(STEPS):
        ours = run(prepared)
    optimizer = prepared[2].optimizer
    assert type(optimizer) is warpstep.AdamW
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(ours)]
    assert_agree(ours, torch_run(), STEPS)


def test_accelerate_resumes(tmp_path):
    whole = run(prepare(warpstep.AdamW))
    first = prepare(warpstep.AdamW)
    run(first, last=STEPS // 2)
    first[0].save_state(str(tmp_path))

    resumed = prepare(warpstep.AdamW)
    resumed[0].load_state(str(tmp_path))
    with launches(STEPS - STEPS // 2):
        ours = run(resumed, first=STEPS // 2)
    assert_same_bits(ours, whole)
    assert_agree(ours, torch_run(), STEPS)


def test_accelerate_with_the_optimizer_replaced_in_mid_run():
    """What accelerate has wrapped goes on with it, the scheduler that is running included."""
    expected, found = [], []
    theirs = run(prepare(torch.optim.AdamW, fused=True), rates=expected)
    prepared = prepare(torch.optim.AdamW, fused=True)
    run(prepared, last=1, rates=found)
    warpstep.replace(prepared[2].optimizer)
    with launches(STEPS - 1):
        ours = run(prepared, first=1, rates=found)
    assert found == expected
    assert_agree(ours, theirs, STEPS)


def test_accelerate_enabled():
    theirs = torch_run()
    with calls_taken(STEPS):
        ours = torch_run()
    assert_agree(ours, theirs, STEPS)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, warpstep.AdamW], ids=["torch", "warpstep"])
def test_accelerate_tells_skipped_steps(cls):
    """By which its schedulers and transformers' Trainer decide whether to step, too."""
    Accelerator(cpu=True)
    param = torch.nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(cls([param]), scaler=scaler)
    for value, skipped in ((8.0, False), (float("inf"), True), (4.0, False)):
        scaler.scale(torch.ones(()))
        param.grad = torch.full((4,), value)
        optimizer.step()
        assert optimizer.step_was_skipped == skipped
