"""Edges of the tail: what a review and deliberate breaks of the code found untested."""

import copy
import pickle
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import warpstep
from support.networks import model, train
from support.pairs import assert_near, give, pair


def ones(*sizes):
    params = [Parameter(torch.ones(n)) for n in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def test_zero_grad_in_place_forgets_a_clipping(backend):
    """The gradients stay the same objects: only zero_grad can tell."""
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    mine.zero_grad(set_to_none=False)
    for param, other in zip(ours, theirs, strict=True):
        param.grad.copy_(other.grad)
    mine.step()
    their.step()
    assert_near(ours, theirs, 1)


def test_a_scaler_makes_no_inf_check_of_its_own(backend, monkeypatch):
    mine, _, ours, theirs = pair(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    give(ours, theirs, 0, scale=8.0)
    mine.clip_grad_norm_(1.0, scaler=scaler)
    monkeypatch.setattr(scaler, "_check_inf_per_device", pytest.fail)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(mine)
    scaler.step(mine)
    scaler.update()


def test_a_clipping_survives_a_loaded_state():
    mine, their, ours, theirs = pair()
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1)
    clip_grad_norm_(theirs, 0.1)
    for optimizer in (mine, their):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert_near(ours, theirs, 1)


def test_clipping_twice_clips_what_is_unscaled(backend):
    mine, their, ours, theirs = pair(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    give(ours, theirs, 0, scale=1024.0)
    for their_param in theirs:
        their_param.grad /= 1024
    first = mine.clip_grad_norm_(10.0, scaler=scaler)
    torch.testing.assert_close(first, clip_grad_norm_(theirs, 10.0), rtol=1e-6, atol=0)
    for given in ({"scaler": scaler}, {}):
        norm = mine.clip_grad_norm_(1.0, **given)
        torch.testing.assert_close(norm, clip_grad_norm_(theirs, 1.0), rtol=1e-5, atol=0)
    scaler.step(mine)
    their.step()
    assert_near(ours, theirs, 1)


def test_the_norm_returned_is_not_the_one_that_the_step_reads(backend):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    mine.clip_grad_norm_(0.1).mul_(100)
    clip_grad_norm_(theirs, 0.1)
    mine.step()
    their.step()
    assert_near(ours, theirs, 1)


def test_a_refused_norm_lets_the_gradients_go(backend):
    mine, _, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    ours[0].grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="is non-finite"):
        mine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    seen = weakref.ref(ours[0].grad)
    mine.zero_grad()
    assert seen() is None


def test_the_norm_of_a_gradient_laid_out_as_its_new_parameter(backend):
    """Both have gaps since the plan was made."""
    param = Parameter(torch.randn(4, 6))
    param.grad = torch.randn(4, 6)
    optimizer = warpstep.AdamW([param], backend=backend)
    optimizer.step()
    gaps = torch.zeros(4, 12)
    gaps[:, ::2] = 1
    param.data = torch.randn(4, 12)[:, ::2]
    param.grad = gaps[:, ::2]
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), torch.tensor(24.0).sqrt())


def test_the_norm_of_lazily_conjugated_gradients(backend):
    param = Parameter(torch.ones(5, dtype=torch.complex64))
    param.grad = torch.full((5,), 3 + 4j).conj()
    optimizer = warpstep.AdamW([param], backend=backend)
    for norm_type in (2.0, 3.0):
        expected = torch.nn.utils.get_total_norm([param.grad], norm_type)
        found = optimizer.clip_grad_norm_(float("inf"), norm_type)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("became", [torch.float32, torch.float64])
def test_an_average_follows_its_parameters_dtype(backend, became):
    """Kernels take an average that is not of the parameter's format for float32."""
    param = Parameter(torch.ones(4000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW([param], ema_decay=0.5, ema_dtype=torch.bfloat16, backend=backend)
    optimizer.step()
    old = optimizer.state[param]["ema"].to(became)
    param.data = param.data.to(became)
    param.grad = None
    param.grad = torch.ones_like(param)
    optimizer.step()
    average = optimizer.state[param]["ema"]
    assert average.dtype == became
    torch.testing.assert_close(average, (old + param.detach()) / 2)


def test_an_average_of_a_wider_dtype_is_narrowed(backend):
    param = Parameter(torch.ones(300))
    param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW([param], ema_decay=0.5, backend=backend)
    optimizer.step()
    optimizer.state[param]["ema"] = optimizer.state[param]["ema"].double()
    optimizer.step()
    assert optimizer.state[param]["ema"].dtype == torch.float32
    assert (optimizer.state[param]["ema"] - param.detach()).abs().max() < 1e-3


def test_statistics_where_nothing_has_a_gradient(backend, device):
    params = [Parameter(torch.ones(n, device=device)) for n in (5, 40_001)]
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer = warpstep.AdamW(params, stats=True, backend=backend)
    optimizer.step()
    assert optimizer.statistics().nonfinite.tolist() == [5, 40_001]
    for param in params:
        param.grad = None
    optimizer.step()
    assert optimizer.statistics().nonfinite.tolist() == [-1, -1]


@pytest.mark.parametrize("zeroed", [True, False])
def test_gradients_that_several_read_are_zeroed_last(backend, zeroed):
    """A parameter mentioned twice; and one gradient of two parameters."""
    shared = torch.ones(50_000)
    params = [Parameter(torch.ones(50_000)) for _ in range(2)]
    for param in params:
        param.grad = shared
    twice = Parameter(torch.ones(3))
    twice.grad = torch.ones(3)
    optimizers = [
        warpstep.AdamW(params, backend=backend),
        warpstep.AdamW([{"params": [twice, twice]}], backend=backend),
    ]
    for optimizer in optimizers:
        optimizer.step(zero_grads=zeroed)
    assert torch.equal(params[0], params[1])
    assert torch.equal(optimizers[0].state[params[1]]["exp_avg"], torch.full((50_000,), 0.1))
    torch.testing.assert_close(optimizers[1].state[twice]["exp_avg"], torch.full((3,), 0.19))
    assert shared.eq(0).all() == zeroed
    assert twice.grad.eq(0).all() == zeroed


def test_a_gradient_that_requires_one_is_zeroed(backend):
    param = Parameter(torch.randn(4, 5))
    param.grad = torch.randn(5, 4).t().requires_grad_()
    warpstep.AdamW([param], backend=backend).step(zero_grads=True)
    assert param.grad.eq(0).all()


def test_a_callable_decay_leaves_groups_with_their_own():
    params = ones(3, 3, 3)
    groups = [{"params": [p]} for p in params]
    groups[1]["ema_decay"] = 0.25
    groups[2]["ema_decay"] = None
    optimizer = warpstep.AdamW(groups, ema_decay=lambda step: 0.5 + step / 100)
    optimizer.step()
    optimizer.step()
    assert [g["ema_decay"] for g in optimizer.param_groups] == [0.51, 0.25, None]


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"decay_form": "l1"}], ids=str)
def test_differentiable_groups_have_no_tail(options):
    with pytest.raises(ValueError, match="not supported with `differentiable`"):
        warpstep.AdamW([{"params": ones(3), **options}], differentiable=True)


def test_statistics_of_parameters_without_gradient(backend, device):
    """One of several chunks: -1 once, and no sums of the step before."""
    params = [Parameter(torch.ones(n, device=device)) for n in (5, 40_001, 7)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params, stats=True, backend=backend)
    optimizer.step()
    params[0].grad = params[1].grad = None
    optimizer.step()
    found = optimizer.statistics()
    assert [p is q for p, q in zip(found.params, params, strict=True)] == [True] * 3
    assert found.nonfinite.tolist() == [-1, -1, 0]
    for norm in (found.grad_norm, found.param_norm, found.update_norm):
        assert norm[:2].eq(0).all()


@pytest.mark.parametrize(("left", "norm"), [(1, 3.0), (0, 2.0)], ids=["last", "first"])
def test_statistics_leave_out_a_parameter_that_has_left(left, norm, backend, device):
    params = [Parameter(torch.ones(n, device=device)) for n in (9, 4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params, stats=True, backend=backend)
    optimizer.step()
    del optimizer.param_groups[0]["params"][left]
    found = optimizer.statistics()
    assert [p is params[1 - left] for p in found.params] == [True]
    assert found.grad_norm.tolist() == [norm]
    assert len(found.names) == len(found.param_norm) == len(found.nonfinite) == 1


def test_cautious_decay_where_there_is_no_update(backend, device):
    param = Parameter(torch.ones(40, device=device))
    param.grad = torch.zeros_like(param)
    arguments = {"lr": 0.5, "weight_decay": 0.5, "decay_form": "cautious"}
    warpstep.AdamW([param], backend=backend, **arguments).step()
    assert param.eq(0.75).all()


@pytest.mark.parametrize("size", [1e-21, 1e21])
def test_statistics_of_numbers_whose_squares_leave_float32(backend, device, size):
    param = Parameter(torch.full((3000,), size, device=device))
    param.grad = torch.full((3000,), size, device=device)
    optimizer = warpstep.AdamW([param], lr=0.0, stats=True, backend=backend)
    optimizer.step()
    found = optimizer.statistics()
    exact = param.detach().double().norm()
    for norm in (found.grad_norm, found.param_norm):
        torch.testing.assert_close(norm[0].double(), exact, rtol=2**-20, atol=0)


def test_pickles_keep_the_options_of_the_tail():
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.9, ema_dtype=torch.float32, stats=True)
    train(net, optimizer, 1)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.ema_dtype == torch.float32
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    assert twin.statistics().nonfinite.eq(0).all()


def test_copies_go_on_counting_for_a_decay_by_the_step():
    seen = []
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=lambda step: seen.append(step) or 0.5)
    train(net, optimizer, 2)
    twin = copy.deepcopy({"net": net, "optimizer": optimizer})
    seen.clear()
    train(twin["net"], twin["optimizer"], 1)
    assert seen == [2]


def test_groups_added_later_take_the_defaults(backend):
    first, second = ones(4, 5)
    optimizer = warpstep.AdamW(
        [first], lr=0.1, decay_form="independent", ema_decay=0.5, backend=backend
    )
    optimizer.add_param_group({"params": [second], "lr": 0.2})
    group = optimizer.param_groups[1]
    assert (group["decay_form"], group["base_lr"], group["ema_decay"]) == ("independent", 0.2, 0.5)
    optimizer.step()
    assert "ema" in optimizer.state[second]


def test_the_base_lr_survives_a_checkpoint():
    optimizer = warpstep.AdamW(ones(4), lr=0.1, decay_form="independent")
    optimizer.param_groups[0]["lr"] = 0.01
    resumed = warpstep.AdamW(ones(4), lr=0.1, decay_form="independent")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["base_lr"] == 0.1
    assert copy.deepcopy(optimizer).param_groups[0]["base_lr"] == 0.1


def test_averages_of_a_checkpoint_get_the_dtype_asked_for():
    def optimizer_of(**more):
        params = [Parameter(torch.ones(4, dtype=torch.bfloat16))]
        params[0].grad = torch.ones_like(params[0])
        return warpstep.AdamW(params, ema_decay=0.5, **more)

    saved = optimizer_of()
    saved.step()
    resumed = optimizer_of(ema_dtype=torch.bfloat16, state_dtype=torch.float32)
    resumed.load_state_dict(saved.state_dict())
    (state,) = resumed.state.values()
    assert (state["ema"].dtype, state["exp_avg"].dtype) == (torch.bfloat16, torch.float32)
    resumed.step()


def test_an_average_of_another_shape_is_refused_when_loaded():
    optimizer = warpstep.AdamW(ones(4), ema_decay=0.5)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["ema"] = torch.ones(5)
    with pytest.raises(ValueError, match="'ema' is float32 of shape"):
        optimizer.load_state_dict(saved)
    optimizer.step()


def test_a_skipped_step_leaves_the_averages(backend, device):
    param = Parameter(torch.ones(2000, device=device))
    param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW([param], lr=0.1, ema_decay=0.5, stats=True, backend=backend)
    for _ in range(2):
        optimizer.step()
    kept = optimizer.state[param]["ema"].clone()
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step(zero_grads=True)  # so that there is something to do
    assert torch.equal(optimizer.state[param]["ema"], kept)


@pytest.mark.parametrize("at", [0, 20_000, 40_000])
@pytest.mark.parametrize("kind", [2.0, float("inf")])
def test_a_nan_anywhere_makes_the_norm_nan(backend, device, kind, at):
    param = Parameter(torch.ones(40_001, device=device))
    param.grad = torch.ones_like(param)
    param.grad[at] = float("nan")
    assert warpstep.AdamW([param], backend=backend).clip_grad_norm_(1.0, kind).isnan()


def test_the_norm_leaves_out_parameters_that_had_a_gradient_once(backend, device):
    params = [Parameter(torch.ones(4, device=device)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params, backend=backend)
    optimizer.step()
    params[0].grad = None
    for kind in (2.0, float("inf")):
        assert optimizer.clip_grad_norm_(float("inf"), kind) == (2.0 if kind == 2.0 else 1.0)


def test_l1_decay_leaves_zeros_alone(backend, device):
    param = Parameter(torch.zeros(40, device=device))
    param.grad = torch.zeros_like(param)
    arguments = {"lr": 0.5, "weight_decay": 0.5, "decay_form": "l1"}
    warpstep.AdamW([param], backend=backend, **arguments).step()
    assert param.eq(0).all()


def test_a_clipping_after_a_refused_one_holds(backend):
    mine, their, ours, theirs = pair(backend)
    give(ours, theirs, 0)
    good = ours[2].grad.clone()
    ours[2].grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="is non-finite"):
        mine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    ours[2].grad.copy_(good)
    mine.clip_grad_norm_(0.1)
    torch.nn.utils.clip_grad_norm_(theirs, 0.1)
    mine.step()
    their.step()
    assert_near(ours, theirs, 1)


def test_zeroed_gradients_count_as_written(backend, device):
    params = [Parameter(torch.ones(n, device=device)) for n in (4, 9)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = warpstep.AdamW(params, backend=backend)
    versions = [p.grad._version for p in params]
    optimizer.step()
    assert [p.grad._version for p in params] == versions
    optimizer.step(zero_grads=True)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


def test_an_average_moved_under_its_name_is_followed(backend):
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.5, backend=backend)
    train(net, optimizer, 1)
    first, *_ = net.parameters()
    optimizer.state[first]["ema"].data = torch.zeros_like(first)
    train(net, optimizer, 1)
    expected = first.detach() / 2
    torch.testing.assert_close(optimizer.state[first]["ema"], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("base_lr", [0.0, -1.0, None, float("nan")])
def test_a_base_lr_edited_later_is_refused_before_anything_changes(backend, base_lr):
    (param,) = ones(4)
    optimizer = warpstep.AdamW([param], decay_form="independent", backend=backend)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["base_lr"] = base_lr
    with pytest.raises(ValueError, match="Invalid base_lr"):
        optimizer.step()
    assert torch.equal(param, before)


def test_gradients_of_steps_before_are_left_alone(backend, device):
    """Copied to the parameter's strides once; theirs no more."""
    param = Parameter(torch.randn(6, 10, device=device))
    optimizer = warpstep.AdamW([param], backend=backend)
    first = param.grad = torch.ones(10, 6, device=device).t()
    optimizer.step()
    param.grad = torch.ones(10, 6, device=device).t()
    optimizer.step(zero_grads=True)
    assert first.eq(1).all()
    assert param.grad.eq(0).all()


def test_the_norm_is_of_the_parameters_that_there_are(backend):
    first, second = ones(4, 9)
    optimizer = warpstep.AdamW([first], backend=backend)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [second]
    assert optimizer.clip_grad_norm_(1.0) == 3.0


def test_parameters_without_gradient_do_not_count_as_written(backend):
    first, second = ones(4, 9)
    optimizer = warpstep.AdamW([first, second], backend=backend)
    optimizer.step()
    first.grad = None
    version = first._version
    optimizer.step()
    assert first._version == version


def test_tensors_of_one_group_at_different_steps(backend, device):
    """Each has the constants of its own counter: the bits of an optimizer of its own."""
    params = [torch.nn.Parameter(torch.ones(40, device=device)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = warpstep.AdamW(params, lr=0.1, backend=backend)
    apart = [warpstep.AdamW([p], lr=0.1, backend=backend) for p in alone]
    for t in range(5):
        for index, (param, other) in enumerate(zip(params, alone, strict=True)):
            grad = torch.full((40,), 1.0 + t, device=device) if t % (index + 1) == 0 else None
            param.grad = other.grad = grad
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))
