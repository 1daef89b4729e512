"""A low-precision step as it is defined: the float32 step between decoding and encoding."""

import torch
from torch.nn import Parameter

import warpstep
from support.environment import SLOW
from support.parameters import random
from support.recipes import set_grad
from warpstep import codecs

BF16 = torch.bfloat16
# Options of an optimizer of bfloat16 parameters, by name.
RECIPES = {
    "residual": {"master": "residual"},
    "residual-bf16": {"master": "residual", "state_dtype": BF16},
    "residual-8bit": {"master": "residual", "state_dtype": "8bit"},
    "stochastic": {"rounding": "stochastic"},
    "stochastic-8bit": {"rounding": "stochastic", "state_dtype": "8bit"},
    "8bit": {"state_dtype": "8bit"},
    "bf16-float32": {"state_dtype": (BF16, torch.float32)},
    "float32-bf16": {"state_dtype": (torch.float32, BF16)},
    "float32-nearest-bf16": {"state_dtype": (torch.float32, BF16), "rounding": "nearest"},
}
# Blocks of 8 bits, whole and cut short; and what is too small, or cut otherwise, for them.
SHAPES = [(70, 64), (17,), (100, 33), (0,), ()]
LONG = (65_536 + 37,)  # a vector of whole blocks, but for its end
if not SLOW:
    SHAPES += [(3, 128, 64), LONG]
SQUARES = {"exp_avg_sq", "max_exp_avg_sq"}


def new_params(dtype=BF16, shapes=SHAPES, device="cpu"):
    return [Parameter(random(s, i, device).to(dtype)) for i, s in enumerate(shapes)]


def flat(tensor):
    """A copy, in a row: steps write in place."""
    return tensor.detach().cpu().flatten().clone()


def key_in(state, moment):
    """What a state calls a moment: codes of 8 bits have a key of their own."""
    codes = f"{moment}_codes"
    return codes if codes in state else moment


def moments_of(state):
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    return [moment for moment in names if key_in(state, moment) in state]


def numbers_of(param, state):
    """The float32 numbers of a parameter and its moments, flat."""
    found = {"param": flat(param).float()}
    if "master_param" in state:
        found["param"] = codecs.joined(flat(param), flat(state["master_param"]))
    for key in moments_of(state):
        found[key] = flat(state[key_in(state, key)])
        if f"{key}_codes" in state:
            scales = flat(state[f"{key}_scale"])
            found[key] = codecs.decoded(found[key], scales, signed=key not in SQUARES)
        found[key] = found[key].float()
    return found


def stored(numbers, param, state, optimizer, number, step):
    """What is to be stored of the numbers after a step, by the names that the state has."""
    seed = optimizer.precision.seed
    stochastic = optimizer.precision.rounding == "stochastic"
    asked = stochastic or (
        optimizer.precision.rounding is None and optimizer.state_dtype is not None
    )

    def draws(operand):
        return codecs.draws(seed, torch.tensor(float(step)), number, operand, 0, param.numel())

    def rounded(key, operand, at_random, dtype):
        if at_random and dtype == BF16:
            return codecs.rounded_stochastic(numbers[key], draws(operand))
        return numbers[key].to(dtype)

    if "master_param" in state:
        high, low = codecs.split(numbers["param"])
        found = {"param": high, "master_param": low}
    else:
        found = {"param": rounded("param", 0, stochastic, param.dtype)}
    for index, key in enumerate(moments_of(state)):
        if f"{key}_codes" in state:
            random = draws(1 + index) if key in SQUARES else None
            codes, scales = codecs.encoded(numbers[key], random=random)
            found |= {f"{key}_codes": codes, f"{key}_scale": scales}
        else:
            found[key] = rounded(key, 1 + index, asked and key in SQUARES, state[key].dtype)
    return found


class Float32:
    """The same steps in float32 by the same backend, from whatever numbers there are."""

    def __init__(self, kind, backend, device, options):
        ours = ("master", "state_dtype", "rounding", "seed", "copies", "ema_dtype")
        self.options = {k: v for k, v in options.items() if k not in ours}
        self.kind, self.backend, self.device = kind, backend, device

    def step(self, numbers, grads, counter, groups=(), **how):
        """The numbers after a step; `numbers` and `grads` have an entry for each parameter."""
        params = [Parameter(n["param"].clone().to(self.device)) for n in numbers]
        optimizer = self.kind(params, backend=self.backend, **self.options)
        for param, grad, of_param in zip(params, grads, numbers, strict=True):
            param.grad = grad.flatten().to(self.device, torch.float32)
            moments = {k: v.clone().to(self.device) for k, v in of_param.items() if k != "param"}
            optimizer.state[param] = {"step": torch.tensor(float(counter)), **moments}
        optimizer.step()
        after = []
        for param in params:
            state = optimizer.state[param]
            kept = {key: flat(state[key]) for key in (*moments_of(state), "ema") if key in state}
            after.append({"param": flat(param), **kept})
        return after


def assert_step_is_float32s(optimizer, reference, grads, step, **how):
    """Takes a step and holds each bit of what is stored against the definition."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [
        numbers_of(p, optimizer.state[p]) if p in optimizer.state else {"param": flat(p).float()}
        for p in params
    ]
    fresh = {p for p in params if p not in optimizer.state}
    for param, grad in zip(params, grads, strict=True):
        set_grad(param, grad)
    optimizer.step()
    for param, numbers in zip(params, before, strict=True):
        for key in moments_of(optimizer.state[param]) if param in fresh else ():
            numbers[key] = torch.zeros(param.numel())
    after = reference.step(before, grads, step - 1)
    for number, (param, numbers) in enumerate(zip(params, after, strict=True)):
        state = optimizer.state[param]
        expected = stored(numbers, param, state, optimizer, number, step)
        for key, value in expected.items():
            found = flat(param if key == "param" else state[key])
            assert torch.equal(found, value), (
                f"{key} of parameter {number} {tuple(param.shape)}: "
                f"{(found != value).sum().item()} of {found.numel()} differ"
            )
        assert state.keys() - expected.keys() <= {"step", "ema"}


__all__ = ["RECIPES", "SHAPES", "Float32", "assert_step_is_float32s", "new_params", "warpstep"]
