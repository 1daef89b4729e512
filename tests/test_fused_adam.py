"""warpstep.compat.FusedAdam's steps: their numbers, their state and their counts."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.fused_adam import (
    BETAS,
    BF16,
    DECAY,
    EPS,
    F32,
    KINDS,
    LR,
    Truth,
    bound_of,
    fused_adam,
    grads_of,
    params_of,
    take_steps,
)
from warpstep.compat import FusedAdam

STEPS = 5


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def assert_near_truth(optimizer, truth, steps):
    masters = list(optimizer.master_parameters().items())
    bound = bound_of(truth.p, steps)
    for (param, master), expected in zip(masters, truth.p, strict=True):
        assert master.dtype == F32
        torch.testing.assert_close(master.double(), expected, rtol=0, atol=bound)
        assert torch.equal(param, master.to(param.dtype))


# ---- Numbers


@pytest.mark.parametrize("decoupled_decay", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "uncorrected"])
def test_steps_are_the_formulas(kind, decoupled_decay, corrected, backend):
    dtype, options = kind
    params = params_of(dtype)
    optimizer = fused_adam(
        params,
        adam_w_mode=decoupled_decay,
        bias_correction=corrected,
        use_decoupled_grad=True,
        backend=backend,
        **options,
    )
    truth = Truth(params, decoupled_decay, corrected)
    for step in range(STEPS):
        truth.step(grads_of(params, step), step + 1)
    take_steps(optimizer, STEPS)
    assert_near_truth(optimizer, truth, STEPS)
    assert ("reference" in str(optimizer.plan)) == (backend == "reference")


def test_a_form_of_decay_that_is_set_counts_from_then_on(kind, backend):
    dtype, options = kind
    params = params_of(dtype)
    optimizer = fused_adam(params, use_decoupled_grad=True, backend=backend, **options)
    truth = Truth(params)
    for step, decoupled in enumerate((True, False, True)):
        optimizer.adam_w_mode = truth.decoupled = decoupled
        truth.step(grads_of(params, step), step + 1)
        take_steps(optimizer, 1, first=step)
    assert_near_truth(optimizer, truth, 3)


@pytest.mark.parametrize("capturable", [False, True])
def test_masters_are_a_float32_models(kind, capturable):
    """Bit for bit what warpstep.AdamW makes of float32 parameters with the same gradients."""
    dtype, options = kind
    params = params_of(dtype)
    wide = [Parameter(p.detach().float()) for p in params]
    optimizer = fused_adam(params, use_decoupled_grad=True, capturable=capturable, **options)
    # A tensor's lr is float32, as in Transformer Engine.
    lr = torch.tensor(LR) if capturable else LR
    expected = warpstep.AdamW(wide, lr=lr, weight_decay=DECAY, betas=BETAS, eps=EPS)
    for step in range(STEPS):
        for param, grad in zip(wide, grads_of(wide, step), strict=True):
            param.grad = grad
        expected.step()
    take_steps(optimizer, STEPS)
    for (param, master), other in zip(optimizer.master_parameters().items(), wide, strict=True):
        assert torch.equal(master, other)
        for name in ("exp_avg", "exp_avg_sq"):
            found = optimizer.get_unscaled_state(param, name)
            assert torch.equal(found, expected.state[other][name])


def test_all_is_one_launch(kind):
    dtype, options = kind
    options = {"use_decoupled_grad": True, "backend": "cpu", **options}
    optimizer = fused_adam(params_of(dtype), **options)
    take_steps(optimizer, 1)
    plan = optimizer.plan
    before = warpstep.status().launches["cpu"]
    take_steps(optimizer, 3, first=1)
    assert optimizer.plan is plan  # neither counting nor what steps write makes it stale
    assert warpstep.status().launches["cpu"] == before + 3


def test_moments_in_bfloat16_decay():
    """With no gradient, exp_avg_sq is beta2^n of itself in the mean; to nearest it would stay."""
    for corrected in (True, False):
        param = Parameter(torch.zeros(4096))
        dtypes = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}
        optimizer = FusedAdam([param], betas=(0.9, 0.999), bias_correction=corrected, **dtypes)
        param.grad = torch.ones_like(param)
        optimizer.step()
        begun = optimizer.get_unscaled_state(param, "exp_avg_sq").double().mean()
        param.grad = torch.zeros_like(param)
        for _ in range(200):
            optimizer.step()
        state = optimizer.state[param]["exp_avg_sq"]
        assert state.dtype == BF16
        # Rounding moves an element by a unit, 2^-7 of it at most, with a variance of a quarter of
        # its square at most: the sum of 201 has a deviation of 2^-7 * sqrt(201 / 4) at most, and
        # the mean of 4,096 elements a 64th of that. Six of them:
        ratio = (state.double().mean() / begun).item()
        assert ratio == pytest.approx(0.999**200, rel=6 * 2**-7 * (201 / 4) ** 0.5 / 64)


# ---- The state


def test_the_state_has_three_names_and_no_other(kind):
    dtype, options = kind
    params = params_of(dtype)
    optimizer = fused_adam(params, use_decoupled_grad=True, **options)
    take_steps(optimizer, 2)
    names = ["exp_avg", "exp_avg_sq", *(["master_param"] if options else [])]
    for param in params:
        state = optimizer.state[param]
        assert sorted(state) == names
        assert all(tensor.shape == param.shape for tensor in state.values())
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == F32
    if options:
        is_remainder = "store_param_remainders" in options
        assert state["master_param"].dtype == (torch.int16 if is_remainder else F32)


def test_parameters_without_a_gradient_get_a_state(kind):
    """Megatron makes states by a step that has no decoupled gradients."""
    dtype, options = kind
    params = params_of(dtype)
    before = [p.detach().clone() for p in params]
    optimizer = fused_adam(params, use_decoupled_grad=True, **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(len(optimizer.state[p]) == (3 if options else 2) for p in params)
    assert all(map(torch.equal, params, before))
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_a_parameter_of_more_than_16_bits_is_its_own_master(dtype):
    param = Parameter(torch.randn(9, dtype=dtype))
    optimizer = fused_adam([param], master_weights=True)
    optimizer.initialize_state(param)
    assert optimizer.state[param]["master_param"].data_ptr() == param.data_ptr()
    param.data = torch.randn(9, dtype=dtype)  # which counts
    value = param.detach().clone()
    param.grad = torch.zeros(9, dtype=dtype)
    optimizer.step()
    assert torch.equal(param, value * (1 - LR * DECAY)) or torch.allclose(
        param, value * (1 - LR * DECAY), rtol=2**-23, atol=0
    )
    assert optimizer.state[param]["master_param"].data_ptr() == param.data_ptr()
    assert torch.equal(optimizer.get_unscaled_state(param, "master_param"), param)


@pytest.mark.parametrize("kind_name", ["bfloat16-master", "bfloat16-remainder"])
def test_what_is_written_to_a_parameter_does_not_replace_its_master(kind_name):
    dtype, options = KINDS[kind_name]
    params, others = params_of(dtype, ((40,),)), params_of(dtype, ((40,),))
    one = fused_adam(params, use_decoupled_grad=True, **options)
    other = fused_adam(others, use_decoupled_grad=True, **options)
    for optimizer in (one, other):
        take_steps(optimizer, 2)
    plan = one.plan
    with torch.no_grad():  # an all-gather brings the same values back
        params[0].copy_(params[0].clone())
    for optimizer in (one, other):
        take_steps(optimizer, 2, first=2)
    assert one.plan is plan
    assert torch.equal(
        *(o.master_parameters()[p] for o, p in ((one, params[0]), (other, others[0])))
    )


# ---- Counts


def test_groups_count_alike_also_without_parameters():
    params = params_of(F32, ((3,), (4,)))
    groups = [{"params": params[:1]}, {"params": []}, {"params": params[1:], "lr": 0.5}]
    optimizer = fused_adam(groups)
    assert all("step" not in group for group in optimizer.param_groups)
    params[0].grad = torch.ones(3)  # and the last group has no gradient
    for count in (1, 2, 3):
        optimizer.step()
        assert [group["step"] for group in optimizer.param_groups] == [count] * 3
        assert all(type(group["step"]) is int for group in optimizer.param_groups)


def test_an_optimizer_without_any_parameter_counts():
    optimizer = fused_adam([{"params": []}])
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_a_late_gradient_has_its_groups_count():
    params = params_of(F32, ((6,), (6,)))
    optimizer = fused_adam(params)
    truth = Truth(params)
    zeros = torch.zeros(6)
    for step in range(4):
        grads = grads_of(params, step)
        params[0].grad, params[1].grad = grads[0], grads[1] if step == 3 else None
        optimizer.step()
        alone = Truth([truth.p[0]])
        alone.m, alone.v = truth.m[:1], truth.v[:1]
        alone.step(grads[:1], step + 1)
        truth.p[0] = alone.p[0]
    late = Truth([params_of(F32, ((6,), (6,)))[1]])
    late.step([grads_of(params, 3)[1]], 4)  # its first step, and the group's fourth
    assert not torch.equal(params[1].detach(), zeros)
    torch.testing.assert_close(params[1].double(), late.p[0], rtol=0, atol=bound_of(late.p, 1))


def test_a_count_that_is_set_counts():
    params = params_of(F32, ((6,),))
    optimizer = fused_adam(params)
    take_steps(optimizer, 1)
    optimizer.param_groups[0]["step"] = 9
    truth = Truth(params)
    truth.m = [optimizer.state[params[0]]["exp_avg"].double()]
    truth.v = [optimizer.state[params[0]]["exp_avg_sq"].double()]
    truth.step(grads_of(params, 1), 10)
    take_steps(optimizer, 1, first=1)
    torch.testing.assert_close(params[0].double(), truth.p[0], rtol=0, atol=bound_of(truth.p, 2))
    assert optimizer.param_groups[0]["step"] == 10


def test_groups_may_count_apart(kind):
    dtype, options = kind
    params, others = params_of(dtype), params_of(dtype)
    options = {"use_decoupled_grad": True, **options}
    optimizer = fused_adam([{"params": [p]} for p in params], **options)
    alone = [fused_adam([p], **options) for p in others]
    for index, one in enumerate(alone):
        optimizer.param_groups[index]["step"] = one.param_groups[0]["step"] = 3 * index
        one.param_groups[0]["params"][0].decoupled_grad = grads_of(params, 0)[index]
        one.step()
    take_steps(optimizer, 1)
    assert all(map(torch.equal, params, others))
    assert [group["step"] for group in optimizer.param_groups] == [1, 4, 7, 10, 13, 16]


def test_capturable_may_be_set_after_a_step():
    optimizer = fused_adam(params_of(F32, ((6,),)))
    take_steps(optimizer, 1)
    optimizer.capturable = True
    take_steps(optimizer, 1, first=1)
    step = optimizer.param_groups[0]["step"]
    assert (step.dtype, step.tolist()) == (torch.int32, [2])


def test_capturable_counts_on_the_device():
    params = params_of(BF16, ((6,), (6,)))
    groups = [{"params": params[:1]}, {"params": params[1:]}, {"params": []}]
    optimizer = fused_adam(
        groups, capturable=True, master_weights=True, store_param_remainders=True
    )
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups[:2])
    take_steps(optimizer, 3)
    steps = [group["step"] for group in optimizer.param_groups]
    assert all(step is steps[0] for step in steps)  # one tensor, which a graph advances
    assert (steps[0].dtype, steps[0].tolist()) == (torch.int32, [3])
    saved = optimizer.state_dict()["param_groups"]
    assert [group["step"] for group in saved] == [3, 3, 3]
    assert type(saved[0]["step"]) is int
