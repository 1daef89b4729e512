"""Bad input: a clear error that names the parameter, before anything is changed."""

import copy
import math
import warnings

import pytest
import torch

import warpstep
from support.cases import on_each_device
from support.parameters import new_params, params_of, random, set_grads, take_steps
from support.tolerance import bound
from warpstep.rules import ADAMW

LR = 0.01
SHAPES = [(5, 3), (17,), (), (4, 4)]
NAMES = ["embed", "norm.weight", "scale", "head"]
BAD = 1  # the parameter that gets what is bad: neither the first nor the last

on_each_backend = pytest.mark.parametrize("how", ["auto", "reference"])


class Snapshot:
    """Bits of parameters, gradients and state, and which objects the state is made of."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.then = self.now()

    def now(self):
        params = [p for p in params_of(self.optimizer) if p.layout == torch.strided]
        kept = {
            id(p): {k: (id(t), t.clone()) for k, t in self.optimizer.state[p].items()}
            for p in params_of(self.optimizer)
            if p in self.optimizer.state
        }
        return [p.detach().clone() for p in params], kept, [p._version for p in params]

    def assert_unchanged(self):
        params, kept, versions = self.now()
        then_params, then_kept, then_versions = self.then
        assert all(torch.equal(p, q) for p, q in zip(params, then_params, strict=True))
        assert kept.keys() == then_kept.keys()
        for key, state in kept.items():
            assert state.keys() == then_kept[key].keys()
            for name, (identity, tensor) in state.items():
                assert identity == then_kept[key][name][0]
                assert torch.equal(tensor, then_kept[key][name][1])
        assert versions == then_versions


# ---- gradients and parameters


def sparse_gradient(p):
    p.grad = torch.ones_like(p).to_sparse()


def longer_gradient(p):
    p.grad.data = torch.ones(18, device=p.device)


def broadcastable_gradient(p):
    p.grad.data = torch.ones(1, device=p.device)


def same_size_other_shape_gradient(p):
    p.grad.data = torch.ones(17, 1, device=p.device)


def shorter_parameter(p):
    p.data = p.data[:5].clone()


def integer_gradient(p):
    p.grad.data = torch.ones(17, dtype=torch.int32, device=p.device)


def complex_gradient(p):
    p.grad.data = torch.ones(17, dtype=torch.complex64, device=p.device)


def float8_parameter(p):
    p.data = p.data.to(torch.float8_e4m3fn)
    p.grad = torch.ones_like(p)


def complex_parameter_real_gradient(p):
    p.data = p.data.to(torch.complex64)


BAD_GRADIENTS = {
    "sparse": (sparse_gradient, RuntimeError, "sparse"),
    "longer": (longer_gradient, RuntimeError, r"\(18,\)"),
    "broadcastable": (broadcastable_gradient, RuntimeError, r"\(1,\)"),
    "other-shape": (same_size_other_shape_gradient, RuntimeError, r"\(17, 1\)"),
    "shorter-parameter": (shorter_parameter, RuntimeError, r"\(5,\)"),
    "integer-gradient": (integer_gradient, (TypeError, RuntimeError), "int32"),
    "complex-gradient": (complex_gradient, (TypeError, RuntimeError), "complex64"),
    "float8-parameter": (float8_parameter, (TypeError, RuntimeError), "float8"),
    "complex-parameter": (complex_parameter_real_gradient, (TypeError, RuntimeError), "complex64"),
}


@on_each_device
@on_each_backend
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradient(case, steps, named, how, device):
    change, error, message = BAD_GRADIENTS[case]
    params = new_params(SHAPES, device)
    optimizer = warpstep.AdamW(
        zip(NAMES, params, strict=True) if named else params, lr=LR, backend=how
    )
    take_steps(optimizer, range(steps))
    set_grads(params, steps)
    good = params[BAD].data
    change(params[BAD])
    before = Snapshot(optimizer)
    place = f"parameter {BAD} of group 0" + (r" \('norm.weight'\)" if named else "")
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            optimizer.step()
        assert caught.match(place)
        before.assert_unchanged()

    # Put right, the optimizer goes on as one that had met no error.
    params[BAD].grad = None
    params[BAD].data = good
    control = copy.deepcopy(optimizer)
    take_steps(optimizer, range(5, 7))
    take_steps(control, range(5, 7))
    for p, q in zip(params, params_of(control), strict=True):
        assert torch.equal(p, q)
    assert optimizer.state[params[0]]["step"].item() == steps + 2


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integer_parameter_with_a_gradient(dtype, how):
    good, whole = random((5,), 0).requires_grad_(), torch.ones(3, dtype=dtype)
    optimizer = warpstep.AdamW([{"params": [good]}, {"params": [whole]}], backend=how)
    good.grad = torch.ones_like(good)
    optimizer.step()  # without a gradient, it is none of the step's business
    whole.grad = torch.ones(3, dtype=dtype)
    before = Snapshot(optimizer)
    with pytest.raises((TypeError, RuntimeError), match=r"parameter 0 of group 1.*"):
        optimizer.step()
    before.assert_unchanged()


@on_each_backend
def test_parameter_whose_elements_share_memory(how):
    # torch refuses to write to one, in the middle of its step; here nothing has been written.
    params = [random((4,), 0).requires_grad_(), torch.zeros(1).expand(4).requires_grad_()]
    params.append(random((3,), 1).requires_grad_())
    optimizer = warpstep.AdamW(params, lr=LR, backend=how)
    set_grads(params, 0)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.step()
    before.assert_unchanged()


BAD_STATE = {
    "exp_avg-shape": ("exp_avg", lambda t: t[:3].clone()),
    "exp_avg-none-tensor": ("exp_avg", lambda t: 1.0),
    "exp_avg_sq-integer": ("exp_avg_sq", lambda t: t.int()),
    "exp_avg_sq-complex": ("exp_avg_sq", lambda t: t.to(torch.complex64)),
    "exp_avg-meta": ("exp_avg", lambda t: t.to("meta")),
    "step-two-elements": ("step", lambda t: t.expand(2).clone()),
    "step-text": ("step", lambda t: "three"),
}


@on_each_backend
@pytest.mark.parametrize("case", BAD_STATE)
def test_state_that_does_not_fit(case, how):
    key, change = BAD_STATE[case]
    optimizer = warpstep.AdamW(new_params(SHAPES), lr=LR, backend=how)
    take_steps(optimizer, range(2))
    params = params_of(optimizer)
    good = optimizer.state[params[BAD]][key]
    before = Snapshot(optimizer)
    set_grads(params, 2)
    optimizer.state[params[BAD]][key] = change(good)
    with pytest.raises(RuntimeError, match=f"parameter {BAD} of group 0.*{key}"):
        optimizer.step()
    optimizer.state[params[BAD]][key] = good
    before.assert_unchanged()
    optimizer.step()
    assert optimizer.state[params[BAD]]["step"].item() == 3


# ---- hyper-parameters

BAD_HYPERS = {
    "lr-negative": ({"lr": -1.0}, "learning rate"),
    "lr-nan": ({"lr": math.nan}, "learning rate"),
    "lr-tensor-nan": ({"lr": torch.tensor(math.nan)}, "learning rate"),
    "lr-tensor-negative": ({"lr": torch.tensor(-0.1)}, "learning rate"),
    "lr-2-elements": ({"lr": torch.ones(2)}, "1-element"),
    "beta1-negative": ({"betas": (-0.1, 0.9)}, "beta parameter at index 0"),
    "beta1-one": ({"betas": (1.0, 0.9)}, "beta parameter at index 0"),
    "beta1-nan": ({"betas": (math.nan, 0.9)}, "beta parameter at index 0"),
    "beta2-one": ({"betas": (0.9, 1.0)}, "beta parameter at index 1"),
    "beta2-nan": ({"betas": (0.9, math.nan)}, "beta parameter at index 1"),
    "eps-negative": ({"eps": -1e-8}, "epsilon"),
    "eps-nan": ({"eps": math.nan}, "epsilon"),
    "decay-negative": ({"weight_decay": -1.0}, "weight_decay"),
    "decay-nan": ({"weight_decay": math.nan}, "weight_decay"),
}


@pytest.mark.parametrize("cls", [warpstep.AdamW, warpstep.Adam])
@pytest.mark.parametrize("case", BAD_HYPERS)
def test_bad_hyper_parameter_at_construction(case, cls):
    options, message = BAD_HYPERS[case]
    with pytest.raises(ValueError, match=message):
        cls(new_params(SHAPES), **options)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, warpstep.AdamW])
def test_betas_of_two_kinds(cls):
    with pytest.raises(ValueError, match="both floats or both Tensors"):
        cls(new_params(SHAPES), betas=(torch.tensor(0.9), 0.9))


def two_groups(how, **options):
    params = new_params(SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], **options}]
    return warpstep.AdamW(groups, lr=LR, backend=how)


# torch steps with whatever number a group has by then (test_every_value.py); these are none.
NO_NUMBER = {
    "lr-2-elements": ({"lr": torch.ones(2)}, "lr must be 1-element"),
    "lr-text": ({"lr": "0.1"}, "learning rate"),
    "lr-none": ({"lr": None}, "learning rate"),
    "lr-complex": ({"lr": 1j}, "learning rate"),
    "lr-too-large": ({"lr": 10**400}, "learning rate"),
    "betas-one": ({"betas": (0.9,)}, "betas.*not a pair"),
    "betas-number": ({"betas": 0.9}, "betas.*not a pair"),
    "betas-three": ({"betas": (0.9, 0.9, 0.9)}, "betas.*not a pair"),
    "betas-text": ({"betas": "12"}, "beta parameter at index 0"),
    "beta2-none": ({"betas": (0.9, None)}, "beta parameter at index 1"),
    "eps-none": ({"eps": None}, "epsilon"),
    "decay-text": ({"weight_decay": "0.1"}, "weight_decay"),
    "decay-2-elements": ({"weight_decay": torch.ones(2)}, "weight_decay must be 1-element"),
    "maximize-2-elements": ({"maximize": torch.ones(2)}, "maximize.*not a flag"),
    "amsgrad-2-elements": ({"amsgrad": torch.ones(2)}, "amsgrad.*not a flag"),
}
on_each_that_is_no_number = pytest.mark.parametrize("case", NO_NUMBER)


@on_each_backend
@on_each_that_is_no_number
def test_hyper_parameter_of_a_group_that_is_no_number(case, how):
    # torch does not look at a group's own options when it is made.
    options, message = NO_NUMBER[case]
    with pytest.raises(ValueError, match=message) as caught:
        take_steps(two_groups(how, **options), range(1))
    assert caught.match("group 1")


@on_each_backend
@pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "third-step"])
@on_each_that_is_no_number
def test_hyper_parameter_set_later_that_is_no_number(case, steps, how):
    options, message = NO_NUMBER[case]
    optimizer = two_groups(how)
    take_steps(optimizer, range(steps))
    good = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(options)
    set_grads(params_of(optimizer), steps)
    before = Snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            optimizer.step()
        assert caught.match("group 1")
        before.assert_unchanged()
    optimizer.param_groups[1].update(good)
    optimizer.step()
    assert optimizer.state[params_of(optimizer)[3]]["step"].item() == steps + 1


@on_each_backend
@pytest.mark.parametrize(
    "key",
    ["params", *dict.fromkeys(number.key for number in ADAMW.numbers), *ADAMW.flags],
)
def test_missing_option_is_an_error_and_changes_nothing(key, how):
    optimizer = two_groups(how)
    take_steps(optimizer, range(2))
    before = Snapshot(optimizer)
    good = optimizer.param_groups[1].pop(key)
    missing = (ValueError, f"'{key}' is missing")
    kind, message = (TypeError, "the 'params' of") if key == "params" else missing
    for _ in range(2):
        with pytest.raises(kind, match=f"{message}.*group 1"):
            optimizer.step()
    optimizer.param_groups[1][key] = good
    before.assert_unchanged()
    optimizer.step()


# ---- what torch refuses, with its words

REFUSED = {
    "empty-list": (lambda cls: cls([]), ValueError, "empty parameter list"),
    "tensor": (lambda cls: cls(torch.zeros(1)), TypeError, "iterable"),
    "not-tensors": (lambda cls: cls([1.0]), TypeError, "can only optimize Tensors"),
    "non-leaf": (lambda cls: cls([new_params(SHAPES)[0] * 2]), ValueError, "non-leaf"),
    "fused-differentiable": (
        lambda cls: cls(new_params(SHAPES), fused=True, differentiable=True),
        RuntimeError,
        "differentiable",
    ),
    "fused-foreach": (
        lambda cls: cls(new_params(SHAPES), fused=True, foreach=True),
        RuntimeError,
        "fused.*foreach",
    ),
    "foreach-tensor-lr": (
        lambda cls: cls(new_params(SHAPES), lr=torch.tensor(LR), foreach=True),
        ValueError,
        "lr as a Tensor",
    ),
    "unknown-option": (lambda cls: cls(new_params(SHAPES), momentum=0.9), TypeError, "momentum"),
}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, warpstep.AdamW, warpstep.Adam])
@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses(case, cls):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make(cls)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, warpstep.AdamW])
def test_parameter_in_two_groups(cls):
    params = new_params(SHAPES)
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": params[:2]}, {"params": params[1:]}])


@on_each_backend
@pytest.mark.parametrize("steps", [1, 4])
def test_parameter_listed_twice_is_stepped_twice(steps, how):
    # torch warns, and steps it once for each mention.
    def result(cls, **options):
        params = new_params(SHAPES)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([params[0], params[1], params[0], params[2]], lr=LR, **options)
        for step in range(steps):
            set_grads(params, step)
            optimizer.step()
        return params[:3], [optimizer.state[p]["step"].item() for p in params[:3]]

    ours, counts = result(warpstep.AdamW, backend=how)
    theirs, expected = result(torch.optim.AdamW, foreach=False)
    assert counts == expected == [2 * steps, steps, steps]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(2 * steps, LR, q))


def test_parameter_listed_twice_by_a_later_edit():
    # In two groups with their own options, and while a plan exists.
    def result(cls, **options):
        params = new_params(SHAPES)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2 * LR, "maximize": True}]
        optimizer = cls(groups, lr=LR, **options)
        for step in range(4):
            if step == 2:
                optimizer.param_groups[1]["params"].append(params[0])
            set_grads(params, step)
            optimizer.step()
        return params, optimizer.state[params[0]]["step"].item()

    ours, count = result(warpstep.AdamW)
    theirs, expected = result(torch.optim.AdamW, foreach=False)
    assert count == expected == 6
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(6, 2 * LR, q))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hook_that_raises(when):
    # Before the step nothing has happened; after it, the step is whole.
    def stop(*_):
        raise KeyboardInterrupt

    optimizer, control = (warpstep.AdamW(new_params(SHAPES), lr=LR) for _ in range(2))
    take_steps(optimizer, range(2))
    take_steps(control, range(3 if when == "post" else 2))
    handle = getattr(optimizer, f"register_step_{when}_hook")(stop)
    set_grads(params_of(optimizer), 2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    for p, q in zip(params_of(optimizer), params_of(control), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(optimizer.state[p], control.state[q], rtol=0, atol=0)


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = warpstep.AdamW(new_params(SHAPES), lr=LR)
        take_steps(optimizer, range(2))
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
