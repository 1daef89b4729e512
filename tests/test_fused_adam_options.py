"""warpstep.compat.FusedAdam's gradients, GradScalers and options, and what it refuses."""

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
    F16,
    F32,
    KINDS,
    LR,
    fused_adam,
    grads_of,
    params_of,
    take_steps,
)
from warpstep.compat import FusedAdam


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


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
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*gradient is float32"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state
    assert "step" not in optimizer.param_groups[0]


def test_zero_grad_resets_what_the_step_reads():
    param = Parameter(torch.zeros(3))
    optimizer = fused_adam([param], use_decoupled_grad=True)
    optimizer.zero_grad(set_to_none=False)  # there is none
    for requires_grad in (False, True):
        param.decoupled_grad = torch.ones(3, requires_grad=requires_grad)
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
    versions = [grad._version for grad in grads]
    optimizer.step(zero_grads=True)
    assert all(not grad.any() for grad in grads)
    assert all(grad._version > v for grad, v in zip(grads, versions, strict=True))


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


def test_zero_grad_in_place_forgets_a_clipping_of_decoupled_gradients(backend):
    params, others = params_of(F32, ((30,), (5,))), params_of(F32, ((30,), (5,)))
    optimizer = fused_adam(params, use_decoupled_grad=True, backend=backend)
    plain = fused_adam(others, use_decoupled_grad=True, backend=backend)
    for param in params:
        param.decoupled_grad = torch.ones_like(param)
    optimizer.clip_grad_norm_(0.1)
    optimizer.zero_grad(set_to_none=False)
    for param, other, grad in zip(params, others, grads_of(params, 0), strict=True):
        param.decoupled_grad.add_(grad)
        other.decoupled_grad = grad
    for one in (optimizer, plain):
        one.step()
    assert all(map(torch.equal, params, others))
    for param, other in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[param]["exp_avg"], plain.state[other]["exp_avg"])


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


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_count_on_the_device_counts_what_is_taken(shape, found):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], lr=0.1, capturable=True)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["step"] = torch.full(shape, 5, dtype=torch.int32)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(1.0)
    before = param.detach().clone()
    optimizer.step()
    assert optimizer.param_groups[0]["step"].item() == (5 if found else 6)
    assert torch.equal(param, before) == bool(found)


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
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_a_step_that_raises_leaves_no_scale_to_the_next():
    param = Parameter(torch.ones(8))
    optimizer = fused_adam([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="found no gradients: step after backward"):
        optimizer.step(grad_scaler=scaler)
    param.grad = torch.ones(8)
    optimizer.param_groups[0]["lr"] = "high"
    with pytest.raises(ValueError, match="high"):
        optimizer.step(grad_scaler=scaler)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_a_grad_scaler_does_not_see_decoupled_gradients():
    param = Parameter(torch.ones(8))
    optimizer = fused_adam([param], use_decoupled_grad=True)
    param.decoupled_grad = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"looks at p\.grad"):
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
    assert seen
    assert watched.param_groups[0]["step"] == 3
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
    assert (param > 0).all()
    assert list(optimizer.state[param]) == ["exp_avg", "exp_avg_sq"]
    optimizer.use_decoupled_grad = False
    param.grad = torch.full((3,), 2.0)
    assert optimizer.clip_grad_norm_(torch.inf).item() == pytest.approx(12**0.5)
    for _ in range(30):
        optimizer.step()
    assert (param < 0).all()
