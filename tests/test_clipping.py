"""clip_grad_norm_: which gradients it is for, with GradScaler, and what is refused."""

import copy
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import warpstep

SHAPES = [(7, 5), (100,), ()]


def pair(backend="auto", **options):
    """The same parameters twice, with warpstep's optimizer and torch's."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([Parameter(v.clone()) for v in values] for _ in range(2))
    mine = warpstep.AdamW(ours, backend=backend, **options)
    return mine, torch.optim.AdamW(theirs, foreach=False), ours, theirs


def give(ours, theirs, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for mine, their in zip(ours, theirs, strict=True):
        grad = torch.randn(mine.shape, generator=generator) * scale
        mine.grad, their.grad = grad.clone(), grad.clone()


def assert_near(ours, theirs, steps):
    """Within 12 roundings a step of the update and the weight, as test_torch_layouts derives."""
    for mine, their in zip(ours, theirs, strict=True):
        bound = steps * 12 * 2**-24 * (their.detach().abs() + 1e-3)
        assert ((mine - their).detach().abs() <= bound).all()


def test_ten_clipped_steps_agree_with_torchs_pair(backend):
    mine, their, ours, theirs = pair(backend)
    for seed in range(10):
        give(ours, theirs, seed)
        norm = mine.clip_grad_norm_(1.0)
        expected = clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        mine.step()
        their.step()
    assert_near(ours, theirs, 10)


def test_a_clipping_is_for_one_step(backend):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    clip_grad_norm_(theirs, 0.1)
    for optimizer in (mine, their):
        optimizer.step()
    give(ours, theirs, 1)
    for optimizer in (mine, their):
        optimizer.step()
    assert_near(ours, theirs, 2)


@pytest.mark.parametrize("how", ["zero_grad", "replaced", "gone"])
def test_a_clipping_that_no_step_followed_is_forgotten(backend, how):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    if how == "zero_grad":
        mine.zero_grad()
    elif how == "gone":
        for param in ours:
            param.grad = None
        mine.step()
        assert not mine.state or all(s["step"] == 0 for s in mine.state.values())
    give(ours, theirs, 1)
    for optimizer in (mine, their):
        optimizer.step()
    assert_near(ours, theirs, 1)


def test_the_last_clipping_counts(backend):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.01)
    mine.clip_grad_norm_(0.5)
    clip_grad_norm_(theirs, 0.5)
    for optimizer in (mine, their):
        optimizer.step()
    assert_near(ours, theirs, 1)


@pytest.mark.parametrize("change", ["written", "one replaced", "one more", "one less"])
def test_gradients_that_changed_in_between_are_refused(backend, change):
    """What was measured is not what is there; neither torch's result nor another is to be had."""
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    if change == "one more":
        ours[2].grad = None
    mine.clip_grad_norm_(0.1)
    if change == "written":
        ours[1].grad.add_(1)
    elif change == "one replaced":
        ours[0].grad = torch.ones(7, 5)
    elif change == "one more":
        ours[2].grad = torch.ones(())
    else:
        ours[0].grad = None
    before = [p.detach().clone() for p in ours]
    with pytest.raises(RuntimeError, match=r"changed between clip_grad_norm_\(\) and step\(\)"):
        mine.step()
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    mine.zero_grad()
    give(ours, theirs, 1)
    mine.step()


def test_gradients_that_no_step_follows_are_let_go(backend):
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(1.0)
    mine.step()
    seen = weakref.ref(ours[0].grad)
    for param in ours:
        param.grad = None
    assert seen() is None


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_an_invalid_max_norm_is_refused(backend, max_norm):
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    with pytest.raises(ValueError, match="Invalid max_norm"):
        mine.clip_grad_norm_(max_norm)
    assert mine._clipping is None
    assert not mine.state


def test_a_norm_that_is_not_finite_can_be_refused(backend):
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    ours[1].grad[3] = float("inf")
    with pytest.raises(RuntimeError, match="is non-finite"):
        mine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert mine._clipping is None
    assert mine.clip_grad_norm_(1.0).isinf()


def test_without_gradients_the_norm_is_zero(backend):
    mine, _, _, _ = pair(backend)
    assert mine.clip_grad_norm_(1.0) == 0
    mine.step()


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


def test_differentiable_steps_clip_as_torch_does():
    mine, _, ours, theirs = pair(differentiable=True)
    give(ours, theirs, 0)
    assert torch.equal(mine.clip_grad_norm_(1.0), clip_grad_norm_(theirs, 1.0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(RuntimeError, match="zero_grads"):
        mine.step(zero_grads=True)


def test_inside_a_compiled_function():
    mine, _, ours, theirs = pair(ema_decay=0.9)
    eager, _, expected, _ = pair(ema_decay=0.9)

    @torch.compile(backend="eager")
    def clip_and_step():
        norm = mine.clip_grad_norm_(0.5)
        mine.step(zero_grads=True)
        return norm * 2

    for seed in range(3):
        give(ours, theirs, seed)
        give(expected, theirs, seed)
        doubled = clip_and_step()
        assert torch.equal(doubled, eager.clip_grad_norm_(0.5) * 2)
        eager.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_parameter_in_two_groups_counts_once():
    param = Parameter(torch.ones(4))
    param.grad = torch.full((4,), 3.0)
    optimizer = warpstep.AdamW([{"params": [param, param]}])
    assert optimizer.clip_grad_norm_(1.0) == 6.0


def test_copies_and_pickles_carry_no_clipping():
    mine, _, ours, theirs = pair()
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    assert copy.deepcopy(mine)._clipping is None
    assert mine._clipping is not None
