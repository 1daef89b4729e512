"""What low precision cannot do is an error that names the parameter, and nothing is changed."""

import copy

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.bits import assert_same
from support.low_precision import BF16, new_params
from support.parameters import params_of, random

SHAPES = [(64, 64), (100,)]


def stepped(**options):
    optimizer = warpstep.AdamW(zip("ab", new_params(shapes=SHAPES), strict=True), **options)
    take_step(optimizer)
    return optimizer


def take_step(optimizer):
    for i, p in enumerate(params_of(optimizer)):
        p.grad = random(p.shape, i).to(p.dtype)
    optimizer.step()


# ---- States


def with_value(key, value):
    return lambda state: state.update({key: value})


def fewer_rows(key):
    return lambda state: state.update({key: state[key][1:].clone()})


def renamed(key, other):
    return lambda state: state.update({other: state.pop(key)})


def blocks_of_128(state):
    state["exp_avg_scale"] = state["exp_avg_scale"].flatten()[::2].clone()


MASTER, CODES = {"master": "residual"}, {"state_dtype": "8bit"}
SPOILT = {
    "residual-shape": (MASTER, fewer_rows("master_param"), r"'master_param'.*\(63, 64\)"),
    "residual-int32": (
        MASTER,
        with_value("master_param", torch.zeros(64, 64, dtype=torch.int32)),
        "'master_param' is int32 .*int16 residuals or float32 masters",
    ),
    "residual-bfloat16": (
        MASTER,
        with_value("master_param", torch.zeros(64, 64, dtype=BF16)),
        "'master_param' is bfloat16",
    ),
    "residual-text": (MASTER, with_value("master_param", "x"), "'master_param' is 'x'"),
    "residual-without-a-master": (
        {},
        with_value("master_param", torch.zeros(64, 64, dtype=torch.int16)),
        "'master_param'.*master='residual'",
    ),
    "other-blocks": (CODES, blocks_of_128, r"'exp_avg_scale'.*\(32,\).*\(64, 1\).*block size"),
    "no-scales": (CODES, lambda s: s.pop("exp_avg_sq_scale"), "'exp_avg_sq_scale' is None"),
    "float-scales": (
        CODES,
        with_value("exp_avg_scale", torch.zeros(64, 1)),
        "'exp_avg_scale' is float32 .*expected uint8",
    ),
    "codes-shape": (
        CODES,
        fewer_rows("exp_avg_codes"),
        r"'exp_avg_codes' is uint8 of shape \(63, 64\)",
    ),
    "codes-as-numbers": (
        CODES,
        renamed("exp_avg_codes", "exp_avg"),
        r"'exp_avg' is uint8 of shape \(64, 64\) .*codes have keys of their own.*'exp_avg_codes'",
    ),
    "numbers-as-codes": (
        {},
        renamed("exp_avg_sq", "exp_avg_sq_codes"),
        "'exp_avg_sq_codes' is bfloat16 .*codes are uint8",
    ),
    "codes-and-numbers": (
        CODES,
        with_value("exp_avg", torch.zeros(64, 64)),
        "'exp_avg_codes' and 'exp_avg', which are one moment",
    ),
    "codes-text": (CODES, with_value("exp_avg_codes", "x"), "'exp_avg_codes' is 'x'"),
    "no-codes": (CODES, lambda s: s.pop("exp_avg_sq_codes"), "and no 'exp_avg_sq'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_that_does_not_fit_is_not_loaded(case):
    options, change, message = SPOILT[case]
    saved = copy.deepcopy(stepped(**options).state_dict())
    change(saved["state"][0])
    optimizer = stepped(**options)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=rf"(?s)parameter 0 of group 0 \('a'\).*{message}"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], before)


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_that_does_not_fit_is_not_stepped(case, backend):
    options, change, message = SPOILT[case]
    optimizer = stepped(backend=backend, **options)
    a, b = params_of(optimizer)
    change(optimizer.state[a])
    before = copy.deepcopy([a.detach(), b.detach(), optimizer.state[b]])
    with pytest.raises(RuntimeError, match=rf"(?s)parameter 0 of group 0 \('a'\).*{message}"):
        take_step(optimizer)
    assert_same([a.detach(), b.detach(), optimizer.state[b]], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_codes_for_what_has_none(dtype, backend):
    codes = torch.zeros((64, 64), dtype=torch.uint8)
    scales = torch.zeros((64, 1), dtype=torch.uint8)
    state = {"step": torch.tensor(1.0)}
    for key in ("exp_avg", "exp_avg_sq"):
        state |= {f"{key}_codes": codes.clone(), f"{key}_scale": scales.clone()}
    param = Parameter(torch.ones((64, 64), dtype=dtype))
    optimizer = warpstep.AdamW([param], backend=backend)
    saved = {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*'exp_avg_codes' is uint8"):
        optimizer.load_state_dict(saved)
    optimizer.state[param] = state
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0: .*'exp_avg_codes' is uint8"):
        optimizer.step()
    assert (param == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_8_bits_asked_for_keep_what_has_none(dtype, backend):
    param = Parameter(torch.ones((64, 64), dtype=dtype))
    optimizer = warpstep.AdamW([param], state_dtype="8bit", backend=backend)
    take_step(optimizer)
    assert optimizer.state[param]["exp_avg"].dtype == dtype


# ---- Options

WRONG = {
    "state_dtype-text": ({"state_dtype": "4bit"}, ValueError, "Invalid state_dtype: '4bit'"),
    "state_dtype-int": ({"state_dtype": torch.int8}, ValueError, "Invalid state_dtype: torch.int8"),
    "state_dtype-one": ({"state_dtype": (BF16,)}, ValueError, "a pair of dtypes"),
    "state_dtype-half-8": ({"state_dtype": ("8bit", BF16)}, ValueError, "'8bit' is for both"),
    "rounding": ({"rounding": "up"}, ValueError, "Invalid rounding: 'up'.*'stochastic'"),
    "master": ({"master": "float32"}, ValueError, "Invalid master: 'float32'.*'residual'"),
    "master-min": (
        {"master": "residual", "decay_form": "min"},
        ValueError,
        "Invalid decay_form: 'min'.*is not supported with a master",
    ),
    "master-differentiable": (
        {"master": "residual", "differentiable": True},
        ValueError,
        "`master` is not supported with `differentiable`",
    ),
    "copies-differentiable": (
        {"copies": [torch.zeros(2, dtype=BF16)], "differentiable": True},
        ValueError,
        "`copies` is not supported with `differentiable`",
    ),
    "seed-float": ({"seed": 1.5}, TypeError, "seed should be an integer, but got 1.5"),
    "seed-bool": ({"seed": True}, TypeError, "seed should be an integer"),
    "seed-negative": ({"seed": -1}, ValueError, "Invalid seed: -1"),
    "seed-large": ({"seed": 2**64}, ValueError, "Invalid seed"),
    "copies-fewer": ({"copies": []}, ValueError, "0 tensors, and there are 1 parameters"),
    "copies-no-tensor": ({"copies": [3]}, TypeError, "copy 0 of copies is 3"),
    "copies-number": ({"copies": 3}, TypeError, "copies is of type int"),
    "copies-others": (
        {"copies": {torch.zeros(2): torch.zeros(2)}},
        ValueError,
        "no parameter of this optimizer",
    ),
}


@pytest.mark.parametrize("cls", [warpstep.AdamW, warpstep.SGD])
@pytest.mark.parametrize("case", WRONG)
def test_an_option_that_is_no_choice(case, cls):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        cls([Parameter(torch.zeros(2))], **options)


def test_a_group_with_an_option_that_is_no_choice():
    for options in ({"master": "float32"}, {"decay_form": "x"}, {"ema_decay": 2}):
        with pytest.raises(ValueError, match=rf"Invalid {next(iter(options))}.*group 0"):
            warpstep.AdamW([{"params": [Parameter(torch.zeros(2))], **options}])
        optimizer = warpstep.AdamW([Parameter(torch.zeros(2))])
        with pytest.raises(ValueError, match=rf"Invalid {next(iter(options))}.*group 1"):
            optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (torch.float32, "it needs no master"),
        (torch.float64, "it needs no master"),
        (torch.float16, "smaller range"),
        (torch.complex64, "only real"),
    ],
    ids=str,
)
def test_a_master_for_what_has_none(dtype, why, backend):
    fits, other = Parameter(torch.ones(4, dtype=BF16)), Parameter(torch.ones(4, dtype=dtype))
    named = zip(("fits", "other"), (fits, other), strict=True)
    optimizer = warpstep.AdamW(named, master="residual", backend=backend)
    message = rf"parameter 1 of group 0 \('other'\) is .*{why}.*'master': None"
    with pytest.raises(TypeError, match=message):
        take_step(optimizer)
    assert (fits == 1).all()
    assert (other == 1).all()
    assert not optimizer.state


def test_masters_that_are_written_have_to_fit():
    param = Parameter(torch.ones(4, dtype=BF16))
    optimizer = warpstep.AdamW([("a", param)], master="residual")
    for master in (torch.zeros(3), torch.zeros(4, dtype=BF16), torch.zeros(4, device="meta")):
        with pytest.raises(ValueError, match=r"the master of a is .*expected float32"):
            optimizer.set_master_parameters({param: master})
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        optimizer.set_master_parameters({Parameter(torch.zeros(4)): torch.zeros(4)})
    assert (param == 1).all()
    assert not optimizer.state


COPIES = {
    "float32": (torch.zeros(4), TypeError, "bfloat16 or float16 copies of float32"),
    "shape": (torch.zeros(3, dtype=BF16), RuntimeError, r"copy bfloat16 of shape \(3,\)"),
    "device": (torch.zeros(4, dtype=BF16, device="meta"), RuntimeError, "on meta"),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_have_to_fit(case, backend):
    wrong, error, message = COPIES[case]
    params = [Parameter(torch.ones(4)) for _ in range(2)]
    copies = [torch.ones(4, dtype=BF16), wrong]
    optimizer = warpstep.AdamW(params, copies=copies, backend=backend)
    with pytest.raises(error, match=f"parameter 1 of group 0 is float32.*{message}"):
        take_step(optimizer)
    assert all((p == 1).all() for p in (*params, copies[0]))
    assert not optimizer.state
