"""The tail of steps in low precision, beside the same steps without it: bit for bit."""

import pytest
import torch

import warpstep
from support.bits import raw_bits
from support.low_precision import BF16, RECIPES, SHAPES, flat, new_params, numbers_of
from support.parameters import random

OPTIONS = {"lr": 1e-2, "seed": 42}
STEPS = 3
pytestmark = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture
def pair(recipe, backend, device):
    """pair(**more): an optimizer with more than the recipe and one without, on equal parameters."""

    def made(**more):
        lists = [new_params(BF16, SHAPES, device) for _ in range(2)]
        return [
            warpstep.AdamW(params, backend=backend, **recipe, **OPTIONS, **options)
            for params, options in zip(lists, (more, {}), strict=True)
        ]

    return made


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def set_grads(optimizer, step, factor=1.0):
    for i, param in enumerate(params_of(optimizer)):
        param.grad = random(param.shape, 100 * step + i, param.device).to(BF16) * factor


def assert_same_steps(one, plain):
    for p, q in zip(params_of(one), params_of(plain), strict=True):
        assert torch.equal(raw_bits(p), raw_bits(q))
        for key, value in plain.state[q].items():
            assert torch.equal(raw_bits(one.state[p][key]), raw_bits(value)), key


def numbers(optimizer):
    return [numbers_of(p, optimizer.state[p])["param"] for p in params_of(optimizer)]


@pytest.mark.parametrize("ema_dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_averages_are_of_what_is_stored(pair, ema_dtype):
    """As those of float32 parameters that no step moves, rounded to their dtype at each step."""
    one, plain = pair(ema_decay=0.9, ema_dtype=ema_dtype)
    still = [torch.nn.Parameter(torch.zeros(p.numel())) for p in params_of(one)]
    average = warpstep.AdamW(still, lr=0.0, weight_decay=0.0, ema_decay=0.9)
    for step in range(STEPS):
        for optimizer in (one, plain):
            set_grads(optimizer, step)
            optimizer.step()
        for param, stored in zip(still, numbers(one), strict=True):
            param.data.copy_(stored)
            param.grad = torch.zeros_like(param)
        average.step()
        for param in still:
            ema = average.state[param]["ema"]
            ema.copy_(ema.to(ema_dtype))
    assert_same_steps(one, plain)
    for param, other in zip(params_of(one), still, strict=True):
        ema = flat(one.state[param]["ema"])
        assert ema.dtype == ema_dtype
        assert torch.equal(ema.float(), average.state[other]["ema"])


def test_statistics_are_of_what_is_stored(pair):
    one, plain = pair(stats=True)
    for step in range(STEPS):
        for optimizer in (one, plain):
            set_grads(optimizer, step)
        params_of(one)[0].grad[3, 5] = params_of(plain)[0].grad[3, 5] = float("nan")
        before = numbers(one) if step > 0 else [flat(p).float() for p in params_of(one)]
        grads = [flat(p.grad).double() for p in params_of(one)]
        one.step(), plain.step()
    assert_same_steps(one, plain)
    found = one.statistics()
    after = numbers(one)
    places = [next(i for i, p in enumerate(found.params) if p is q) for q in params_of(one)]
    assert found.nonfinite[places].tolist() == [1] + [0] * (len(after) - 1)
    changes = [a.double() - b.double() for a, b in zip(after, before, strict=True)]
    for name, of in (("grad_norm", grads), ("param_norm", after), ("update_norm", changes)):
        expected = torch.stack([x.double().norm() for x in of])
        # Rounded to float32, from float32 sums of at most 2^10 squares in 2^5 or more places: some
        # 2^5 roundings of a sum; a root halves them.
        torch.testing.assert_close(
            getattr(found, name)[places].double().cpu(),
            expected,
            rtol=2**5 * 2**-24,
            atol=0,
            equal_nan=True,
        )


def test_gradients_are_zeroed_behind_the_step(pair):
    one, plain = pair()
    for step in range(STEPS):
        for optimizer in (one, plain):
            set_grads(optimizer, step)
            if step == STEPS - 1:  # what is not finite becomes zero as well
                params_of(optimizer)[1].grad[3:5] = torch.tensor([float("inf"), float("nan")])
        one.step(zero_grads=True)
        plain.step()
    assert_same_steps(one, plain)
    assert not any(p.grad.any() for p in params_of(one))


def test_gradients_are_left_unscaled_behind_the_step(pair):
    """By a power of two, which no number of theirs is rounded by."""
    one, plain = pair(unscale_grads=True)
    for step in range(STEPS):
        set_grads(one, step, 8.0)
        set_grads(plain, step)
        one.grad_scale = torch.tensor(8.0, device=params_of(one)[0].device)
        one.step()
        plain.step()
    assert_same_steps(one, plain)
    for p, q in zip(params_of(one), params_of(plain), strict=True):
        assert torch.equal(raw_bits(p.grad), raw_bits(q.grad))


def test_a_step_that_is_not_taken_leaves_all_but_statistics(pair):
    one, plain = pair(ema_decay=0.9, stats=True)
    for optimizer in (one, plain):
        set_grads(optimizer, 0)
        optimizer.step()
    averages = [flat(one.state[p]["ema"]) for p in params_of(one)]
    set_grads(one, 1)
    one.found_inf = torch.tensor(1.0, device=params_of(one)[0].device)
    one.step()
    assert_same_steps(one, plain)
    for p, average in zip(params_of(one), averages, strict=True):
        assert torch.equal(flat(one.state[p]["ema"]), average)
    assert one.statistics().update_norm.count_nonzero() == 0
    assert one.statistics().grad_norm.count_nonzero() > 0
