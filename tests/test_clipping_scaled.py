"""clip_grad_norm_ with a GradScaler: as its unscale_ and torch's clipping, and what is refused."""

import math

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import warpstep
from support.pairs import assert_near, give, pair


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("told", [(True, True), (True, False), (False, True)], ids=str)
def test_clippings_with_a_grad_scaler_compose_as_torchs_do(backend, told, fused):
    """The scaler told at both, at the first, or after a clipping of the scaled gradients; and then
    by how many gradients there are, which no scale and no clipping changes."""
    mine, their, ours, theirs = pair(backend, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for seed in range(2):
        for scaler in scalers:
            scaler.scale(torch.ones(()))
        give(ours, theirs, seed, scale=1024.0)
        unscaled = False
        clippings = zip((*told, False), (2.0, 0.5, 1.0), (2.0, 2.0, 0.0), strict=True)
        for is_told, max_norm, norm_type in clippings:
            scaler = scalers[0] if is_told else None
            norm = mine.clip_grad_norm_(max_norm, norm_type, scaler=scaler)
            if is_told and not unscaled:
                scalers[1].unscale_(their)
                unscaled = True
            expected = clip_grad_norm_(theirs, max_norm, norm_type)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for scaler, optimizer in zip(scalers, (mine, their), strict=True):
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_near(ours, theirs, 6)
    for param, other in zip(ours, theirs, strict=True):
        average, expected = mine.state[param]["exp_avg"], their.state[other]["exp_avg"]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", [warpstep.AdamW, warpstep.SGD])
def test_a_scalers_step_without_gradients_changes_nothing(backend, kind):
    """As with torch's fused optimizers, which GradScaler gives the number 0 as found_inf then."""
    param = Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.1, fused=True, stats=True, backend=backend)
    param.grad = torch.ones(3)
    optimizer.step()
    param.grad = None
    before = param.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(param, before)
    assert optimizer.statistics().nonfinite.tolist() == [-1]
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_with_a_grad_scaler_as_torchs_sequence(backend, unscaled_before):
    """Three optimizer steps, of which the second meets an inf: skipped, and the scale halved."""
    mine, their, ours, theirs = pair(backend)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for seed in range(4):
        for scaler in scalers:
            scaler.scale(torch.ones(()))  # makes the scale
        give(ours, theirs, seed, scale=float(scalers[0].get_scale()))
        if seed == 1:
            ours[0].grad[0, 0] = theirs[0].grad[0, 0] = float("inf")
        if unscaled_before:
            scalers[0].unscale_(mine)
        kept = [p.grad.clone() for p in ours]
        norm = mine.clip_grad_norm_(1.0, scaler=scalers[0])
        scalers[1].unscale_(their)
        expected = clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        scalers[0].step(mine)
        scalers[1].step(their)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True))
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 512.0
    assert {s["step"].item() for s in mine.state.values()} == {3.0}
    assert_near(ours, theirs, 3)


def test_two_optimizers_on_one_scaler(backend):
    """The one whose gradients are finite steps, the other does not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    params = [Parameter(torch.ones(4)) for _ in range(2)]
    params[0].grad = torch.full((4,), 8.0)
    params[1].grad = torch.full((4,), float("inf"))
    optimizers = [warpstep.AdamW([p], backend=backend) for p in params]
    norms = [o.clip_grad_norm_(1.0, scaler=scaler) for o in optimizers]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert norms[0] == 2.0
    assert norms[1].isinf()
    assert not torch.equal(params[0], torch.ones(4))
    assert torch.equal(params[1], torch.ones(4))
    assert scaler.get_scale() == 4.0


def test_a_scaler_that_has_stepped_or_is_none_is_refused():
    mine, _, ours, theirs = pair()
    give(ours, theirs, 0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(mine)
    with pytest.raises(RuntimeError, match=r"called after step"):
        mine.clip_grad_norm_(1.0, scaler=scaler)
    with pytest.raises(TypeError, match=r"expected a torch\.amp\.GradScaler"):
        mine.clip_grad_norm_(1.0, scaler=object())


def test_a_disabled_scaler_is_none():
    mine, their, ours, theirs = pair()
    give(ours, theirs, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mine.clip_grad_norm_(1.0, scaler=scaler)
    clip_grad_norm_(theirs, 1.0)
    scaler.step(mine)
    their.step()
    assert_near(ours, theirs, 1)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("is_inf", [False, True])
def test_a_forgotten_scaler_is_noticed(backend, fused, is_inf):
    """The norm was that of scaled gradients: the step would be too small by the scale."""
    mine, their, ours, theirs = pair(backend, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    give(ours, theirs, 0, scale=2.0**16)
    if is_inf:
        ours[0].grad[0] = math.inf
    before = [p.detach().clone() for p in ours]
    mine.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"Pass scaler= to clip_grad_norm_\(\), or call scaler"):
        scaler.step(mine)
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    # What the message says then goes through, in the same session.
    mine.zero_grad()
    give(ours, theirs, 0, scale=2.0**16)
    mine.clip_grad_norm_(1.0, scaler=scaler)
    scaler.step(mine)
    scaler.update()
    for param in theirs:
        param.grad /= 2.0**16
    clip_grad_norm_(theirs, 1.0)
    their.step()
    assert_near(ours, theirs, 1)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_unscaled_gradients_are_clipped_without_the_scaler(backend, enabled, fused):
    """No false alarm after unscale_, also after an alarm; nor where nothing is scaled."""
    mine, their, ours, theirs = pair(backend, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=enabled)
    for seed in range(2):
        scaler.scale(torch.ones(()))
        give(ours, theirs, seed, scale=scaler.get_scale())
        if enabled and seed == 1:
            mine.clip_grad_norm_(1.0)
            with pytest.raises(RuntimeError, match="scaled by a GradScaler"):
                scaler.step(mine)
            mine.zero_grad()
            give(ours, theirs, seed, scale=scaler.get_scale())
        scaler.unscale_(mine)
        for param in theirs:
            param.grad /= scaler.get_scale()
        mine.clip_grad_norm_(1.0)
        clip_grad_norm_(theirs, 1.0)
        scaler.step(mine)
        scaler.update()
        their.step()
    assert_near(ours, theirs, 2)


@pytest.mark.parametrize("norm_type", [0.0, 0.5, 1.0, 3.0, -1.0, -math.inf, 2.0, math.inf])
@pytest.mark.parametrize("value", [1.5, math.inf])
def test_every_norm_with_a_scaler(norm_type, value):
    """As torch's unscale_ and clip_grad_norm_, for norms too that no infinity makes infinite."""

    def clipped_and_stepped(ours):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        for i, param in enumerate(params):
            param.grad = 1024 * torch.tensor([1.0 + i, -2.0, 0.5])
        params[1].grad[0] = 1024 * value
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        optimizer = (warpstep.AdamW if ours else torch.optim.AdamW)(params, lr=0.1)
        if ours:
            norm = optimizer.clip_grad_norm_(0.5, norm_type, scaler=scaler)
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, 0.5, norm_type)
        scaler.step(optimizer)
        scaler.update()
        return norm, params, scaler.get_scale()

    norm, params, scale = clipped_and_stepped(True)
    expected_norm, others, expected_scale = clipped_and_stepped(False)
    # Sums of nine float32 numbers, and their roots.
    torch.testing.assert_close(norm, expected_norm, rtol=20 * 2.0**-23, atol=0, equal_nan=True)
    assert scale == expected_scale
    for p, q in zip(params, others, strict=True):
        # The first step's update is lr * g / |g|; p is about 1.
        torch.testing.assert_close(p, q, rtol=0, atol=8 * 2.0**-23)


def test_a_norm_of_scaled_float16_gradients_does_not_overflow():
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.float16))
    param.grad = torch.full_like(param, 100.0)  # scaled: the sum of 1,000 exceeds float16
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    norm = warpstep.AdamW([param]).clip_grad_norm_(1.0, 1.0, scaler=scaler)
    assert norm.item() == pytest.approx(1000 * 100 / 1024, rel=1000 * 2.0**-24)
