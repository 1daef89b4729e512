"""warpstep.compat.FusedAdam's steps: numbers, gradients, counts, options and what they refuse."""

import inspect

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import warpstep
from support.fused_adam import (
    BETAS,
    BF16,
    DECAY,
    EPS,
    F16,
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
    assert optimizer.plan is plan  # counting and what steps write make no plan stale
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
        # A step moves an element by a unit of 2^-8 of it at most, with a variance below a quarter of
        # its square: 200 steps' sum has a deviation below 2^-8 * sqrt(200 / 4) of it, and the mean
        # of 4,096 elements a 64th: 0.05%. Six of them:
        ratio = (state.double().mean() / begun).item()
        assert ratio == pytest.approx(0.999**200, rel=6 * 2**-8 * 50**0.5 / 64)


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


def test_a_float32_parameter_is_its_own_master():
    param = Parameter(torch.randn(9))
    optimizer = fused_adam([param], master_weights=True)
    optimizer.initialize_state(param)
    assert optimizer.state[param]["master_param"].data_ptr() == param.data_ptr()
    param.data = torch.randn(9)  # which counts
    value = param.detach().clone()
    param.grad = torch.zeros(9)
    optimizer.step()
    assert torch.equal(param, value * (1 - LR * DECAY)) or torch.allclose(
        param, value * (1 - LR * DECAY), rtol=2**-23, atol=0
    )
    assert optimizer.state[param]["master_param"].data_ptr() == param.data_ptr()


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


# ---- Gradients


def test_gradients_are_those_asked_for():
    for decoupled in (True, False):
        param = Parameter(torch.zeros(3, dtype=BF16))
        param.grad = torch.ones(3, dtype=BF16)
        param.decoupled_grad = -torch.ones(3)
        optimizer = fused_adam([param], use_decoupled_grad=decoupled, weight_decay=0.0)
        optimizer.step()
        assert (param > 0).all() if decoupled else (param < 0).all()


def test_gradients_may_change_their_dtype_and_go():
    params = params_of(BF16)
    optimizer = fused_adam(params, use_decoupled_grad=True, master_weights=True)
    take_steps(optimizer, 1)
    take_steps(optimizer, 1, first=1, dtype=BF16)
    assert "bfloat16 gradients" in str(optimizer.plan)
    before = [p.detach().clone() for p in params]
    del params[0].decoupled_grad
    for param in params[1:]:
        param.decoupled_grad = None
    optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_gradient_that_is_wrong_leaves_all_as_it_was():
    params = params_of(BF16, ((3,), (4,)))
    optimizer = fused_adam(params, use_decoupled_grad=True, master_weights=True)
    params[0].decoupled_grad, params[1].decoupled_grad = torch.ones(3), torch.ones(5)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="parameter 1 of group 0.*gradient is float32 of shape"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state
    assert "step" not in optimizer.param_groups[0]


def test_zero_grad_resets_what_the_step_reads():
    param = Parameter(torch.zeros(3))
    optimizer = fused_adam([param], use_decoupled_grad=True)
    optimizer.zero_grad(set_to_none=False)  # there is none
    param.decoupled_grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert param.decoupled_grad.tolist() == [0, 0, 0]
    optimizer.zero_grad()
    assert param.decoupled_grad is None
    with pytest.warns(DeprecationWarning, match="set_to_none"):
        kept = fused_adam([param], set_grad_none=False)
    param.grad = torch.ones(3)
    kept.zero_grad()
    assert param.grad.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="set_grad_none=False"):
        kept.zero_grad(set_to_none=True)


def test_gradients_are_zeroed_in_the_steps_pass():
    params = params_of(BF16, ((3,), (40,)))
    optimizer = fused_adam(params, use_decoupled_grad=True, master_weights=True)
    take_steps(optimizer, 1)
    grads = [p.decoupled_grad for p in params]
    for grad in grads:
        grad.fill_(1)
    optimizer.step(zero_grads=True)
    assert all(not grad.any() for grad in grads)


def test_decoupled_gradients_are_clipped(backend):
    params, others = params_of(F32, ((30,), (5,))), params_of(F32, ((30,), (5,)))
    optimizer = fused_adam(params, use_decoupled_grad=True, backend=backend)
    expected = warpstep.AdamW(others, lr=LR, weight_decay=DECAY, betas=BETAS, backend=backend)
    for step in range(3):
        for param, other, grad in zip(params, others, grads_of(params, step), strict=True):
            param.decoupled_grad, other.grad = grad, grad
        norms = [o.clip_grad_norm_(0.5) for o in (optimizer, expected)]
        assert torch.equal(*norms)
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, params, others))


def test_a_grad_scaler_is_applied_in_the_steps_pass():
    param, other = (Parameter(torch.ones(64)) for _ in range(2))
    optimizer = fused_adam([param], capturable=True)
    expected = fused_adam([other], capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        grad = torch.full((64,), torch.inf) if step == 1 else grads_of([param], step)[0]
        scaler.scale(torch.zeros(()))  # makes the scale
        scale = scaler.get_scale()
        param.grad = grad * scale
        optimizer.step(grad_scaler=scaler)
        scaler.update()
        if step != 1:
            other.grad = grad
            expected.step()
        assert optimizer.param_groups[0]["step"].item() == expected.param_groups[0]["step"].item()
    assert scaler.get_scale() == 512.0
    assert torch.equal(param, other)  # the scale is a power of two


def test_a_grad_scaler_that_has_unscaled_is_not_applied_again():
    param, other = (Parameter(torch.ones(8)) for _ in range(2))
    optimizer, expected = fused_adam([param]), fused_adam([other])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    param.grad, other.grad = torch.full((8,), 1024.0), torch.ones(8)
    scaler.unscale_(optimizer)
    optimizer.step(grad_scaler=scaler)
    expected.step()
    assert torch.equal(param, other)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_a_grad_scaler_does_not_see_decoupled_gradients():
    param = Parameter(torch.ones(8))
    optimizer = fused_adam([param], use_decoupled_grad=True)
    param.decoupled_grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="looks at p.grad"):
        optimizer.step(grad_scaler=torch.amp.GradScaler("cpu"))


# ---- Who looks on


def test_a_mode_that_watches_sees_the_same_step(kind):
    dtype, options = kind
    params, others = params_of(dtype), params_of(dtype)
    optimizer = fused_adam(params, use_decoupled_grad=True, backend="reference", **options)
    watched = fused_adam(others, use_decoupled_grad=True, backend="reference", **options)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    take_steps(optimizer, 3)
    take_steps(watched, 1)
    with Watching():
        take_steps(watched, 2, first=1)
    assert seen and watched.param_groups[0]["step"] == 3
    assert all(map(torch.equal, params, others))


# ---- Options


def test_the_arguments_are_transformer_engines():
    expected = {
        **{"params": inspect.Parameter.empty, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
        **{"weight_decay": 0.0, "amsgrad": False, "bias_correction": True, "adam_w_mode": True},
        **{"capturable": False, "master_weights": False, "master_weight_dtype": F32},
        **{"exp_avg_dtype": F32, "exp_avg_sq_dtype": F32, "use_decoupled_grad": False},
        **{"store_param_remainders": False, "set_grad_none": None},
    }
    found = inspect.signature(FusedAdam).parameters
    assert {name: found[name].default for name in expected} == expected
    assert list(found)[:6] == list(expected)[:6]  # what may be given by position
    assert list(FusedAdam(params_of(F32)).defaults) == [
        *("lr", "bias_correction", "betas", "eps", "weight_decay"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, r"amsgrad=True.*warpstep\.AdamW\(amsgrad=True\)"),
        ({"exp_avg_dtype": F16}, "exp_avg_dtype=torch.float16.*choose torch.float32 or torch.bf"),
        ({"exp_avg_sq_dtype": torch.uint8}, "choose torch.float32 or torch.bfloat16.*8bit"),
        ({"exp_avg_dtype": torch.float64}, "choose torch.float32 or torch.bfloat16$"),
        ({"exp_avg_dtype": "fp8"}, "exp_avg_dtype='fp8'.*choose"),
        (
            {"master_weights": True, "master_weight_dtype": F16},
            "master_weight_dtype=torch.float16.*choose torch.float32.*store_param_remainders",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_there_are_not_are_refused(options, message):
    with pytest.raises(RuntimeError, match=message):
        FusedAdam(params_of(F32), **options)


def test_options_without_effect_are_taken():
    FusedAdam(params_of(F32), master_weight_dtype=F16)  # of masters that there are not
    optimizer = FusedAdam(params_of(BF16), store_param_remainders=True)
    assert not optimizer.store_param_remainders


def test_apexs_third_positional_argument_is_told_apart():
    with pytest.raises(TypeError, match="bias_correction: pass arguments after lr by name"):
        FusedAdam(params_of(F32), 1e-3, True)
    optimizer = fused_adam(params_of(F32))
    for name in ("grads", "output_params", "scale", "grad_norms"):
        with pytest.raises(RuntimeError, match=rf"step\({name}=\.\.\.\) is not supported"):
            optimizer.step(**{name: 1.0})


def test_options_that_megatron_sets_count():
    """Megatron-FSDP constructs with masters, and sets the attributes then."""
    param = Parameter(torch.zeros(3))
    optimizer = fused_adam([param], master_weights=True, weight_decay=0.0)
    optimizer.master_weights = False
    optimizer.use_decoupled_grad = True
    param.decoupled_grad, param.grad = -torch.ones(3), torch.ones(3)
    optimizer.step()
    assert (param > 0).all() and list(optimizer.state[param]) == ["exp_avg", "exp_avg_sq"]
    optimizer.use_decoupled_grad = False
    for _ in range(30):
        optimizer.step()
    assert (param < 0).all()
