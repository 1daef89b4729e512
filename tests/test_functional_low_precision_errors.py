"""Low precision in warpstep.functional: an error names the tensor, and changes nothing."""

import pytest
import torch

from support.lists import HYPERS
from support.low_precision import BF16
from support.low_precision_lists import operator_arguments
from warpstep.functional import adamw_, sgd_


@pytest.fixture
def lists_backend(backend):
    if backend == "triton":
        pytest.skip("Triton takes no lists")
    return backend


def change(name, index, tensor):
    return lambda lists: lists[name].__setitem__(index, tensor)


BAD = {
    "too few residuals": (
        lambda ls: ls["residuals"].pop(),
        ValueError,
        r"residuals has 1 tensors and params 2",
    ),
    "residual's dtype": (
        change("residuals", 1, torch.zeros(3)),
        TypeError,
        r"residuals\[1\] is float32.*residuals are int16, of bfloat16 parameters",
    ),
    "residual's shape": (
        change("residuals", 1, torch.zeros(4, dtype=torch.int16)),
        RuntimeError,
        r"params\[1\].*residuals\[1\] is int16 of shape \(4,\)",
    ),
    "residual's parameter": (
        change("params", 1, torch.zeros(3)),
        TypeError,
        r"params\[1\] is float32.*of bfloat16 parameters",
    ),
    "no scales": (
        lambda ls: ls.pop("exp_avg_scales"),
        TypeError,
        r"exp_avgs\[0\] is uint8.*exp_avg_scales\[0\] is None, expected a contiguous uint8 of 64",
    ),
    "another block size": (
        change("exp_avg_sq_scales", 0, torch.zeros(32, dtype=torch.uint8)),
        TypeError,
        r"exp_avg_sq_scales\[0\] is uint8 of shape \(32,\) on cpu, expected .* 64 elements",
    ),
    "scales in another order": (
        change("exp_avg_sq_scales", 0, torch.zeros((8, 8), dtype=torch.uint8).t()),
        TypeError,
        r"exp_avg_sq_scales\[0\] is uint8 of shape \(8, 8\) on cpu, expected a contiguous",
    ),
    "scales of what has none": (
        change("exp_avg_scales", 1, torch.zeros(1, dtype=torch.uint8)),
        TypeError,
        r"exp_avgs\[1\] is float32 .*exp_avg_scales\[1\] is uint8.*expected an empty tensor",
    ),
    "codes in another order": (
        change("exp_avgs", 0, torch.zeros((64, 64), dtype=torch.uint8).t()),
        RuntimeError,
        r"params\[0\] has strides \(64, 1\), exp_avgs\[0\] \(1, 64\)",
    ),
    "a copy of 16 bits": (
        lambda ls: ls.update(copies=[torch.zeros_like(p) for p in ls["params"]]),
        TypeError,
        r"params\[0\] is bfloat16.*copies of float32 parameters",
    ),
    "no tensor": (
        change("residuals", 1, 3),
        TypeError,
        r"residuals\[1\] is of type int",
    ),
    "a rounding": (
        lambda ls: ls.update(rounding="up"),
        ValueError,
        r"Invalid rounding: 'up'. Choose one of 'nearest', 'stochastic' and",
    ),
    "a seed": (lambda ls: ls.update(seed=1.5), TypeError, "seed should be an integer"),
    "a large seed": (lambda ls: ls.update(seed=2**64), ValueError, "Invalid seed"),
    "an index": (
        lambda ls: ls.update(param_indices=[0, -1]),
        ValueError,
        r"param_indices\[1\] is -1",
    ),
    "a large index": (
        lambda ls: ls.update(param_indices=[0, 2**32]),
        ValueError,
        r"param_indices\[1\] is 4294967296",
    ),
    "too few indices": (
        lambda ls: ls.update(param_indices=[0]),
        ValueError,
        r"param_indices has 1 numbers and params 2 tensors",
    ),
    "an element": (
        lambda ls: ls.update(first_elements=["0", 0]),
        TypeError,
        r"first_elements\[0\] is '0', expected an integer",
    ),
    "within a block": (
        lambda ls: ls.update(first_elements=[32, 0]),
        ValueError,
        r"first_elements\[0\] is 32.*a multiple of 64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_tensor_and_change_nothing(lists_backend, device, name):
    if device != "cpu":
        pytest.skip("the cases are tensors of the CPU")
    spoil, kind, message = BAD[name]
    lists, options = operator_arguments()
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
    arguments = {**dict(zip(names, lists, strict=True)), **options, "backend": lists_backend}
    spoil(arguments)
    tensors = [t for v in arguments.values() if isinstance(v, list) for t in v]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    with pytest.raises(kind, match=message):
        adamw_(**arguments)
    assert all(map(torch.equal, tensors, before))


def test_random_bits_need_counters():
    """Which SGD does without otherwise."""
    param = torch.ones(3, dtype=BF16)
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
    with pytest.raises(ValueError, match=r"params\[0\].*state_steps is empty.*'stochastic' needs"):
        sgd_([param], [param], [], [], **options, rounding="stochastic")
    assert torch.equal(param, torch.ones(3, dtype=BF16))


def test_float64_has_no_8_bits():
    lists = [[torch.ones(64, dtype=torch.float64)] for _ in range(2)]
    lists += [[torch.zeros(64, dtype=torch.uint8)] for _ in range(2)]
    scales = [torch.zeros(1, dtype=torch.uint8)]
    with pytest.raises(TypeError, match=r"params\[0\] is float64.*exp_avgs\[0\] of 8 bits"):
        adamw_(
            *(*lists, [], [torch.zeros(())]),
            **HYPERS,
            exp_avg_scales=scales,
            exp_avg_sq_scales=scales,
        )
