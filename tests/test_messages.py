"""Mistakes that everybody makes once: the message says what was expected, found, and what to do."""

import copy
import re

import numpy
import pytest
import torch

import warpstep
from support import programs
from warpstep.functional import adamw_

CLASSES = [warpstep.AdamW, warpstep.Adam]
MODEL = torch.nn.Linear(2, 2)
MODULES = torch.nn.Sequential(MODEL)
AS_PARAMS = (
    r"params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
    r"torch.nn.modules.\w+.\w+, a module: pass its parameters\(\)"
)


def params():
    return [torch.nn.Parameter(torch.ones(3))]


# What is given, and what is said. torch raises a TypeError for each, in words of Python's.
ARGUMENTS = {
    "model": (MODEL, {}, AS_PARAMS),
    "modules": (MODULES, {}, AS_PARAMS),
    "model-in-a-group": ([{"params": MODEL}], {}, AS_PARAMS),
    "lr-text": (
        None,
        {"lr": "1e-3"},
        r"lr should .*'1e-3', a str: pass float\('1e-3'\)",
    ),
    "lr-none": (None, {"lr": None}, "lr should be a number or a tensor of one, but got None"),
    "lr-list": (None, {"lr": [0.1]}, r"lr should be a number .*\[0.1\], a list"),
    "betas-number": (None, {"betas": 0.9}, r"betas should be a pair like \(0.9, 0.999\), .* 0.9"),
    "betas-one": (None, {"betas": (0.9,)}, r"betas should be a pair .*\(0.9,\)"),
    "betas-three": (None, {"betas": (0.9, 0.9, 0.9)}, "betas should be a pair"),
    "betas-text": (None, {"betas": ("0.9", 0.999)}, r"betas\[0\] should be .*'0.9', a str"),
    "eps-text": (None, {"eps": "1e-8"}, "eps should be a number, but got '1e-8', a str"),
    "decay-none": (None, {"weight_decay": None}, "weight_decay should be a number, but got None"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments(cls, case):
    given, options, message = ARGUMENTS[case]
    with pytest.raises(TypeError, match=message):
        cls(params() if given is None else given, **options)


def test_a_model_as_a_later_group():
    with pytest.raises(TypeError, match=AS_PARAMS):
        warpstep.AdamW(params()).add_param_group({"params": MODEL})


TAKEN = {
    "parameter-list": (torch.nn.ParameterList(params()), {}),
    "named": (list(MODEL.named_parameters()), {}),
    "betas-array": (None, {"betas": numpy.array([0.9, 0.999])}),
    "betas-tensor": (None, {"betas": torch.tensor([0.9, 0.999])}),
    "lr-array": (None, {"lr": numpy.float32(0.5)}),
    "lr-tensor": (None, {"lr": torch.tensor([0.5])}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_torch_takes_is_taken(case):
    given, options = TAKEN[case]
    made = []
    for cls in (warpstep.AdamW, torch.optim.AdamW):
        optimizer = cls(params() if given is None else list(given), **copy.deepcopy(options))
        made.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    assert repr(made[0]) == repr(made[1])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("method", ["step", "zero_grad", "clip_grad_norm_"])
def test_errors_of_python_name_a_class_that_users_know(cls, method):
    with pytest.raises(
        TypeError, match=rf"^(Optimizer|Adam|AdamW)\.{method}\(\) got an unexpected keyword"
    ):
        getattr(cls(params()), method)(nonsense=1)


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_group_that_has_lost_a_hyper_parameter_is_told(key):
    optimizer = warpstep.AdamW(params())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=rf"^'{key}' is missing \(in parameter group 0\)"):
        optimizer.step()


def test_text_for_a_number_in_a_group_is_told():
    message = r"learning rate: '1e-3' is not a number \(in parameter group 0\)"
    with pytest.raises(ValueError, match=message):
        warpstep.AdamW([{"params": params(), "lr": "1e-3"}])


def test_choices_are_listed_in_english():
    choices = "'auto', 'cuda', 'triton', 'cpu' and 'reference'"
    with pytest.raises(ValueError, match=f"^Invalid backend: 'gpu'. Choose one of {choices}.$"):
        warpstep.AdamW(params(), backend="gpu")
    with pytest.raises(
        ValueError,
        match=r"^Invalid decay_form: 'l2' .*group 0\). Choose .*, 'l1l2' and 'min'\.$",
    ):
        warpstep.AdamW(params(), decay_form="l2")
    with pytest.raises(ValueError, match=r"^Invalid state_dtype: torch.int8. Choose one of torch"):
        warpstep.AdamW(params(), state_dtype=torch.int8)


REPLACED = {
    "class": (lambda: torch.optim.AdamW, "the class AdamW: pass an optimizer that was made of it"),
    "ours": (lambda: warpstep.AdamW(params()), "it is warpstep's already, step with it as it is"),
    "list": (list, "but got a builtins.list$"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_what_cannot_be_replaced_is_told(case):
    make, message = REPLACED[case]
    with pytest.raises(TypeError, match=message):
        warpstep.replace(make())


def test_enable_beside_an_optimizer_that_is_not_fused_gives_a_hint():
    code = """
import torch, warpstep
p = torch.nn.Parameter(torch.ones(3))
with warpstep.enabled():
    p.grad = torch.ones(3)
    torch.optim.AdamW([p]).step()
    print(warpstep.status())
    torch.optim.AdamW([p], fused=True).step()
    print(warpstep.status())
"""
    done = programs.run(code)
    assert done.returncode == 0, done.stderr
    first, second = re.findall("torch's fused optimizers: (.*)", done.stdout)
    assert "no call yet: it takes those of optimizers constructed with fused=True" in first
    assert "no call yet" not in second
    assert "1 calls taken" in second


def test_lists_that_hold_no_tensor():
    one = [torch.ones(2)]
    with pytest.raises(TypeError, match=r"grads\[0\] is of type int, expected a tensor"):
        adamw_(
            one, [1], [torch.zeros(2)], [torch.zeros(2)], [], [torch.zeros(())],
            lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8,
        )  # fmt: skip
