"""clip_grad_norm_: which gradients it is for, how clippings compose, and what is refused."""

import copy
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import warpstep
from support.pairs import assert_near, give, pair


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


INF = float("inf")
CLIPPINGS = {
    "smaller then larger": [(0.01, 2.0), (0.5, 2.0)],
    "larger then smaller": [(0.5, 2.0), (0.01, 2.0)],
    "inf-norm then 2-norm": [(0.5, INF), (1.0, 2.0)],
    "2-norm then inf-norm": [(3.0, 2.0), (0.01, INF)],
    "a norm through torch": [(1.0, 3.0), (0.5, 2.0), (0.1, 1.0)],
    "five": [(5.0, 2.0), (1e9, 2.0), (1.0, INF), (0.3, 2.0), (0.2, 2.0)],
    "to zero and on": [(0.0, 2.0), (5.0, 2.0)],
    "to zero at last": [(5.0, 2.0), (0.0, 2.0)],
}


@pytest.mark.parametrize("clippings", CLIPPINGS.values(), ids=CLIPPINGS.keys())
def test_clippings_compose_as_torchs_do(backend, clippings):
    """Each measures what the ones before have left, and multiplies it."""
    mine, their, ours, theirs = pair(backend)
    for seed in range(2):
        give(ours, theirs, seed)
        for max_norm, norm_type in clippings:
            norm = mine.clip_grad_norm_(max_norm, norm_type)
            expected = clip_grad_norm_(theirs, max_norm, norm_type)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for optimizer in (mine, their):
            optimizer.step()
    assert_near(ours, theirs, 2 * len(clippings))
    for param, other in zip(ours, theirs, strict=True):  # where Adam does not divide it away
        average, expected = mine.state[param]["exp_avg"], their.state[other]["exp_avg"]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("norm_type", [2.0, INF, -INF, 1.0], ids=str)
def test_norms_of_complex_gradients_are_torchs(backend, norm_type):
    """Of magnitudes, not of real and imaginary parts; beside gradients that are real."""
    params = [Parameter(torch.zeros(20, dtype=d)) for d in (torch.complex64, torch.float32)]
    for param in params:
        param.grad = torch.randn_like(param)
    found = warpstep.AdamW(params, backend=backend).clip_grad_norm_(1.0, norm_type)
    expected = torch.nn.utils.get_total_norm([p.grad for p in params], norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_second_clipping_finds_the_norm_that_the_first_has_left(backend):
    """Exact numbers: gradients of 10 have norm 20, and are 0.5 once clipped to 1."""
    param = Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 10.0)
    optimizer = warpstep.AdamW([param], backend=backend)
    norms = [optimizer.clip_grad_norm_(1.0), optimizer.clip_grad_norm_(5.0)]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([20.0, 1.0]), rtol=1e-6, atol=0)
    assert param.grad.eq(10).all()
    optimizer.step()
    expected = torch.full((4,), 0.05)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
@pytest.mark.parametrize("norm_types", [(2.0, 2.0), (INF, 2.0), (2.0, INF)], ids=str)
def test_norms_that_are_not_finite_compose_as_torchs_do(backend, bad, norm_types):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    ours[0].grad[1, 1] = theirs[0].grad[1, 1] = bad
    for norm_type in norm_types:
        norm = mine.clip_grad_norm_(1.0, norm_type)
        expected = clip_grad_norm_(theirs, 1.0, norm_type)
        torch.testing.assert_close(norm, expected, equal_nan=True)
    for optimizer in (mine, their):
        optimizer.step()
    for param, other in zip(ours, theirs, strict=True):
        assert torch.equal(param.isnan(), other.isnan())


def test_a_clipping_that_is_refused_leaves_the_one_before_it(backend):
    """As torch, which has multiplied by the first coefficient and not by the second."""
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    ours[1].grad[3] = theirs[1].grad[3] = INF
    assert mine.clip_grad_norm_(1.0).isinf()
    assert clip_grad_norm_(theirs, 1.0).isinf()
    with pytest.raises(RuntimeError, match="is non-finite"):
        mine.clip_grad_norm_(0.1, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="Invalid max_norm"):
        mine.clip_grad_norm_(-1.0)
    for optimizer in (mine, their):
        optimizer.step()
    for param, other in zip(ours, theirs, strict=True):
        assert torch.equal(param.isnan(), other.isnan())
        average, expected = mine.state[param]["exp_avg"], their.state[other]["exp_avg"]
        torch.testing.assert_close(average, expected, equal_nan=True)


@pytest.mark.parametrize("between", ["written", "one replaced", "one more"])
def test_a_second_clipping_of_other_gradients_is_refused(backend, between):
    """torch would have measured the clipped gradients as they were changed: not to be had."""
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    if between == "one more":
        ours[2].grad = None
    mine.clip_grad_norm_(0.1)
    if between == "written":
        ours[1].grad.add_(1)
    else:
        ours[2].grad = torch.ones(())
    for attempt in (lambda: mine.clip_grad_norm_(1.0), mine.step):  # neither makes the other pass
        with pytest.raises(RuntimeError, match=r"changed after clip_grad_norm_\(\)"):
            attempt()
    give(ours, theirs, 1)  # all new: the clipping was of those that are gone
    expected = clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(mine.clip_grad_norm_(1.0), expected, rtol=1e-6, atol=0)


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
    with pytest.raises(RuntimeError, match=r"changed after clip_grad_norm_\(\)"):
        mine.step()
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    mine.zero_grad()
    give(ours, theirs, 1)
    mine.step()


@pytest.mark.parametrize("how", ["set_", "data", "foreach", "detached"])
def test_writes_that_torch_lets_be_seen_are_refused(backend, how):
    """Also where the gradient stays the same object, or its version counter the same."""
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    grad = ours[1].grad
    if how == "set_":
        grad.set_(torch.ones(100))
    elif how == "data":
        grad.data = torch.ones(100)
    elif how == "foreach":
        torch._foreach_add_([grad], 1.0)
    else:
        grad.detach().add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed after clip_grad_norm_\(\).* 1 written to"):
        mine.step()


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_writes_that_no_counter_sees_are_clipped_with_the_rest(backend, how):
    """As the docstring says: noise that is added so after a clipping is scaled; write before it."""
    mine, _, ours, theirs = pair(backend, betas=(0.0, 0.999))
    give(ours, theirs, 0)
    seen = [p.grad.clone() for p in ours]
    coef = 0.1 / mine.clip_grad_norm_(0.1)
    for param in ours:
        if how == "data":
            param.grad.data.add_(1.0)
        else:
            param.grad.numpy()[...] += 1.0
    mine.step()
    for param, grad in zip(ours, seen, strict=True):
        expected = coef * (grad + 1.0)
        torch.testing.assert_close(mine.state[param]["exp_avg"], expected, rtol=1e-5, atol=0)


def test_noise_after_a_clipping_takes_torchs(backend):
    """What the docstring gives as the way: gradients rewritten by torch's clipping, then noise."""
    mine, their, ours, theirs = pair(backend)
    for params, optimizer in ((ours, mine), (theirs, their)):
        give(params, params, 0)
        clip_grad_norm_(params, 0.1)
        for param in params:
            param.grad.data.add_(1.0)
        optimizer.step()
    assert_near(ours, theirs, 1)


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
