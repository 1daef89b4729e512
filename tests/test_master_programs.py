"""Random programs: an optimizer with masters beside one of float32 parameters, bit for bit.

With `master="residual"` a run is that of float32 parameters with the same gradients, whatever
happens to the optimizers between steps. After each operation masters, moments and counters are
compared.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import warpstep
from support.low_precision import BF16
from support.parameters import params_of, random
from warpstep.codecs import split

SHAPES = [(5, 3), (), (100,), (0,), (2, 8)]
KINDS = {
    "AdamW": (warpstep.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (warpstep.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
}


class Twin:
    """One of two optimizers. What happens to it depends on numbers alone, not on its dtype."""

    def __init__(self, kind, dtype, backend):
        cls, options = KINDS[kind]
        self.dtype = dtype
        self.master = {"master": "residual"} if dtype == BF16 else {}
        params = [self.new(number) for number in range(4)]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2e-2}]
        self.optimizer = cls(groups, backend=backend, **options, **self.master)

    def numbers(self, shape, number):
        return random(shape, number).to(BF16).to(self.dtype)

    def new(self, number):
        return self.numbers(SHAPES[number % len(SHAPES)], number).requires_grad_()

    def chosen(self, number):
        params = params_of(self.optimizer)
        return params[number % len(params)]

    def forget(self, param):
        """Removes a parameter's state: what is left of its master is the nearest bfloat16."""
        self.optimizer.state.pop(param, None)
        if not self.master:
            param.data = split(param.data)[0].to(self.dtype)

    def values(self):
        masters = self.optimizer.master_parameters()
        return [masters[param] for param in params_of(self.optimizer)]


# ---- Operations: on one twin, with a number that chooses


def step(twin, number, watch=nullcontext):
    for i, param in enumerate(params_of(twin.optimizer)):
        none = (number + i) % 4 == 0
        param.grad = None if none else twin.numbers(param.shape, 10 * number + i)
    with watch():
        twin.optimizer.step()


def step_watched(twin, number):
    step(twin, number, lambda: FlopCounterMode(display=False))


def write(twin, number):
    param = twin.chosen(number)
    with torch.no_grad():
        param.copy_(twin.numbers(param.shape, number))


def remove_state(twin, number):
    twin.forget(twin.chosen(number))


def clear_state(twin, number):
    for param in params_of(twin.optimizer):
        twin.forget(param)


def remove_parameter(twin, number):
    params = twin.optimizer.param_groups[number % len(twin.optimizer.param_groups)]["params"]
    if len(params) > 1:
        twin.optimizer.state.pop(params.pop(number % len(params)), None)


def insert_parameter(twin, number):
    params = twin.optimizer.param_groups[0]["params"]
    params.insert(number % (len(params) + 1), twin.new(number))


def add_group(twin, number):
    twin.optimizer.add_param_group({"params": [twin.new(number)], "lr": 0.1 / (1 + number)})


def reverse_groups(twin, number):
    twin.optimizer.param_groups.reverse()


def change_rate(twin, number):
    twin.optimizer.param_groups[0]["lr"] = 0.01 * (number % 4)


def load(twin, number):
    twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))
    step(twin, number)  # until then parameters are taken to be the checkpoint's


def copy_all(twin, number):
    twin.optimizer = copy.deepcopy(twin.optimizer)
    step(twin, number)


def move_memory(twin, number):
    param = twin.chosen(number)
    param.data = param.data.clone()


OPERATIONS = [
    *(step, step, step, step_watched, write, remove_state, clear_state, remove_parameter),
    *(insert_parameter, add_group, reverse_groups, change_rate, load, copy_all, move_memory),
]


def assert_same(low, wide, after):
    """Masters and states; where operators have stepped, these are a few roundings apart."""
    exact = {"rtol": 1e-5, "atol": 1e-6} if after is step_watched else {"rtol": 0, "atol": 0}
    for mine, expected in zip(low.values(), wide.values(), strict=True):
        torch.testing.assert_close(mine, expected, **exact)
    for p, q in zip(params_of(low.optimizer), params_of(wide.optimizer), strict=True):
        mine, expected = (t.optimizer.state.get(x, {}) for t, x in ((low, p), (wide, q)))
        assert [key for key in mine if key != "master_param"] == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, **exact)


def make_same(low, wide):
    with torch.no_grad():
        for p, q, master in zip(
            params_of(low.optimizer), params_of(wide.optimizer), low.values(), strict=True
        ):
            q.copy_(master)
            for key, value in wide.optimizer.state.get(q, {}).items():
                value.copy_(low.optimizer.state[p][key])


@pytest.mark.parametrize("by", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(
    program=st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 30)), min_size=4, max_size=25
    )
)
def test_a_program_with_masters_is_that_of_float32_parameters(kind, by, program):
    low, wide = (Twin(kind, dtype, by) for dtype in (BF16, torch.float32))
    for operation, number in program:
        for twin in (low, wide):
            operation(twin, number)
        assert_same(low, wide, operation)
        if operation is step_watched:
            make_same(low, wide)
