"""Loading other kinds of state: torch's into 8 bits, Transformer Engine's, bitsandbytes'."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

import warpstep
from support.low_precision import (
    BF16,
    RECIPES,
    SQUARES,
    Float32,
    flat,
    moments_of,
    new_params,
    numbers_of,
    stored,
)
from support.parameters import params_of, random
from warpstep import codecs

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99)}
STEP = 3  # that was taken last where the state comes from


def set_grads(optimizer, step):
    for i, p in enumerate(params_of(optimizer)):
        p.grad = random(p.shape, 100 * step + i).to(p.dtype)


def take_steps(optimizer, steps):
    for step in steps:
        set_grads(optimizer, step)
        optimizer.step()


def clones(optimizer):
    return [Parameter(p.detach().clone()) for p in params_of(optimizer)]


def assert_same_bits(one, other):
    for p, q in zip(params_of(one), params_of(other), strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            assert other.state[q][key].dtype == value.dtype, key
            assert torch.equal(value, other.state[q][key]), key


# ---- torch's, into 8 bits and out of them


def moments_over_decades(shape, seed):
    """exp_avg and exp_avg_sq, over more than 8 bits reach: some is below the least code."""
    exp_avg = random(shape, seed) * 10 ** (4 * random(shape, seed + 1))
    return exp_avg, exp_avg.square() * 10 ** random(shape, seed + 2)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("master", [None, "residual"])
def test_moments_become_8_bits_at_the_first_step(dtype, master, backend, device):
    """Encoded to nearest; then it is the step of every other."""
    params = new_params(device=device)
    options = {"state_dtype": "8bit", "master": master, "seed": 42}
    optimizer = warpstep.AdamW(params, backend=backend, **options, **OPTIONS)
    theirs = torch.optim.AdamW(params, **OPTIONS)
    take_steps(theirs, [0])
    saved = copy.deepcopy(theirs.state_dict())
    numbers = []
    for i, (p, state) in enumerate(zip(params, saved["state"].values(), strict=True)):
        state["step"] = torch.tensor(float(STEP))
        pair = moments_over_decades(p.shape, 1000 + i)
        of_param = {"param": flat(p).float()}
        for key, moment in zip(("exp_avg", "exp_avg_sq"), pair, strict=True):
            state[key] = moment.to(dtype)
            of_param[key] = flat(state[key]).float()
            if optimizer.precision.moment_dtype(p, 0, bool(master)) == torch.uint8:
                middle = torch.full((p.numel(),), 0x8000, dtype=torch.int32)
                squares = key in SQUARES
                code, scale = codecs.encoded(of_param[key], random=middle if squares else None)
                found = codecs.decoded(code, scale, signed=not squares)
                if squares:
                    assert (found[of_param[key] > 0] > 0).all()
                of_param[key] = found
        numbers.append(of_param)
    optimizer.load_state_dict(saved)
    for p in params:  # until then they are what was loaded
        assert optimizer.state[p]["exp_avg"].dtype == dtype
    set_grads(optimizer, STEP)
    grads = [p.grad for p in params]
    optimizer.step()
    after = Float32(warpstep.AdamW, backend, device, OPTIONS).step(numbers, grads, STEP)
    for number, (p, of_param) in enumerate(zip(params, after, strict=True)):
        state = optimizer.state[p]
        expected = stored(of_param, p, state, optimizer, number, STEP + 1)
        for key, value in expected.items():
            assert torch.equal(flat(p if key == "param" else state[key]), value), (number, key)
    assert any("exp_avg_sq_codes" in optimizer.state[p] for p in params)
    assert not any({"exp_avg", "exp_avg_codes"} <= optimizer.state[p].keys() for p in params)


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_8_bits_elsewhere(state_dtype, backend, device):
    """They are kept where nothing is asked for, and decoded where a dtype is."""
    first = warpstep.AdamW(new_params(device=device), state_dtype="8bit", backend=backend)
    take_steps(first, range(2))
    options = {"state_dtype": state_dtype, "backend": backend}
    second = warpstep.AdamW(clones(first), **options)
    second.load_state_dict(first.state_dict())
    if state_dtype is None:
        take_steps(first, range(2, 4))
        take_steps(second, range(2, 4))
        assert_same_bits(first, second)
        return
    numbers = [numbers_of(p, first.state[p]) for p in params_of(first)]
    for group in second.param_groups:
        group["betas"] = (1.0, 1.0)  # the moments stay
    take_steps(second, [2])
    for p, expected in zip(params_of(second), numbers, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert second.state[p][key].dtype == torch.float32
            assert torch.equal(flat(second.state[p][key]), expected[key])
        assert second.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_8_bits_elsewhere_under_a_mode():
    first = warpstep.AdamW(new_params(), state_dtype="8bit")
    take_steps(first, range(2))
    second = warpstep.AdamW(clones(first))
    second.load_state_dict(first.state_dict())
    take_steps(first, range(2, 4))
    with FlopCounterMode(display=False):
        take_steps(second, range(2, 4))
    assert_same_bits(first, second)


# ---- Transformer Engine's


def as_transformer_engines(optimizer, masters):
    """The state dict of its FusedAdam: the count is the group's; residuals or float32 masters."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        kept = ("params", "lr", "betas", "eps", "weight_decay")
        for key in list(group):
            if key not in kept:
                del group[key]
        group |= {"bias_correction": True, "step": int(saved["state"][0]["step"])}
    values = optimizer.master_parameters().values()
    for state, master in zip(saved["state"].values(), values, strict=True):
        del state["step"]
        if masters:
            state["master_param"] = master
    return saved


@pytest.mark.parametrize("recipe", ["residual", "residual-bf16", "residual-8bit"])
@pytest.mark.parametrize("masters", [False, True], ids=["residuals", "float32-masters"])
def test_transformer_engines_state(masters, recipe, backend, device):
    """A run goes on from it bit for bit; in 8 bits as from the same state of torch's names."""
    options = {**OPTIONS, **RECIPES[recipe], "backend": backend}
    source = warpstep.AdamW(new_params(device=device), **{**options, "state_dtype": None})
    take_steps(source, range(2))
    saved = as_transformer_engines(source, masters)
    params = clones(source)
    if masters:  # as FusedAdam rounds them: to nearest, ties to even
        for p, master in zip(params, source.master_parameters().values(), strict=True):
            p.data = master.to(BF16)
    optimizer = warpstep.AdamW(params, **options)
    optimizer.load_state_dict(saved)
    expected = warpstep.AdamW(clones(source), **options)
    expected.load_state_dict(source.state_dict())
    for one in (optimizer, expected):
        take_steps(one, range(2, 4))
    assert_same_bits(optimizer, expected)
    assert all(optimizer.state[p]["master_param"].dtype == torch.int16 for p in params)
    assert all(float(optimizer.state[p]["step"]) == 4 for p in params)
    again = optimizer.state_dict()["param_groups"][0]
    assert "step" not in again  # it would be an old one


def test_a_float32_master_counts_not_the_parameter():
    params = new_params(shapes=[(100,), (64, 64)])
    source = warpstep.AdamW(params, master="residual", **OPTIONS)
    take_steps(source, range(2))
    saved = as_transformer_engines(source, masters=True)
    masters = list(source.master_parameters().values())
    others = [Parameter(torch.zeros_like(p)) for p in params]
    optimizer = warpstep.AdamW(others, master="residual", **{**OPTIONS, "lr": 0.0})
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(optimizer, [2])
    for p, q, master in zip(params, others, masters, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.master_parameters()[q], master)


def test_a_loaded_float32_master_is_one_before_the_first_step():
    params = new_params(shapes=[(100,)])
    source = warpstep.AdamW(params, master="residual", **OPTIONS)
    take_steps(source, range(2))
    optimizer = warpstep.AdamW(clones(source), master="residual", **OPTIONS)
    optimizer.load_state_dict(as_transformer_engines(source, masters=True))
    (found,) = optimizer.master_parameters().values()
    assert torch.equal(found, source.master_parameters()[params[0]])
    (param,) = params_of(optimizer)
    optimizer.set_master_parameters({param: found + 1})
    assert torch.equal(optimizer.master_parameters()[param], found + 1)
    assert optimizer.state[param]["master_param"].dtype == torch.int16


def test_without_bias_correction_is_an_error():
    source = warpstep.AdamW(new_params(shapes=[(4,)]), master="residual", **OPTIONS)
    take_steps(source, range(2))
    saved = as_transformer_engines(source, masters=False)
    saved["param_groups"][0]["bias_correction"] = False
    optimizer = warpstep.AdamW(clones(source), master="residual", **OPTIONS)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*bias_correction=False"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


# ---- bitsandbytes'


def quantised(numbers, qmap):
    """Codes and absmax by their definition: the nearest of qmap times the block's largest."""
    padded = torch.nn.functional.pad(numbers.flatten(), (0, -numbers.numel() % 256)).view(-1, 256)
    absmax = padded.abs().amax(dim=1)
    scaled = padded / absmax.clamp(min=1e-38)[:, None]
    codes = (scaled[..., None] - qmap).abs().argmin(dim=-1).to(torch.uint8)
    return codes.flatten()[: numbers.numel()].view(numbers.shape), absmax


def by_definition(codes, absmax, qmap):
    flat_codes = codes.flatten().tolist()
    found = [qmap[c] * absmax[i // 256] for i, c in enumerate(flat_codes)]
    return torch.stack(found).view(codes.shape)


BNB_SHAPES = [(64, 70), (4, 1024), (10,)]


def bitsandbytes_state(nested):
    """A state dict as its AdamW8bit has it, and the numbers that it stands for."""
    maps = (torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256) ** 2)
    state, numbers = {}, []
    for i, shape in enumerate(BNB_SHAPES):
        pair = (random(shape, i), random(shape, 10 + i).square())
        kept = {}
        for which, (moment, qmap) in enumerate(zip(pair, maps, strict=True), 1):
            kept[f"state{which}"] = moment
            if moment.numel() >= 4096:
                codes, absmax = quantised(moment, qmap)
                named = {"state": codes, "absmax": absmax, "qmap": qmap}
                kept |= {f"{name}{which}": value for name, value in named.items()}
        found = [
            by_definition(*(kept[f"{n}{w}"] for n in ("state", "absmax", "qmap")))
            if f"qmap{w}" in kept
            else kept[f"state{w}"]
            for w in (1, 2)
        ]
        numbers.append(dict(zip(("exp_avg", "exp_avg_sq"), found, strict=True)))
        state[i] = {"step": STEP, **({"__bnb_optimizer_quant_state__": kept} if nested else kept)}
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "alpha": 0.0}
    group |= {"t_alpha": None, "t_beta3": None, "params": [0, 1, 2]}
    return {"state": state, "param_groups": [group]}, numbers


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_bitsandbytes_state(nested, state_dtype):
    saved, numbers = bitsandbytes_state(nested)
    given = copy.deepcopy(saved)
    found, expected = (
        warpstep.AdamW(new_params(torch.float32, BNB_SHAPES), state_dtype=state_dtype, **OPTIONS)
        for _ in range(2)
    )
    found.load_state_dict(saved)
    torch.testing.assert_close(saved["state"], given["state"], rtol=0, atol=0)
    for p, of_param in zip(params_of(found), numbers, strict=True):
        assert found.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in of_param.items():
            assert torch.equal(found.state[p][key], value), key
    plain = {i: {"step": torch.tensor(float(STEP)), **n} for i, n in enumerate(numbers)}
    expected.load_state_dict({**saved, "state": plain})
    for one in (found, expected):
        take_steps(one, range(STEP, STEP + 2))
    assert_same_bits(found, expected)
    if state_dtype == "8bit":
        assert found.state[params_of(found)[1]]["exp_avg_codes"].dtype == torch.uint8
        assert moments_of(found.state[params_of(found)[1]]) == ["exp_avg", "exp_avg_sq"]


def without(key):
    return lambda state: state.pop(key)


def with_value(key, value):
    return lambda state: state.update({key: value})


SPOILT = {
    "no-absmax": (without("absmax1"), "'absmax1' is None, expected 18 numbers.*block_wise"),
    "other-blocks": (with_value("absmax2", torch.ones(3)), r"'absmax2' is of shape \(3,\)"),
    "no-map": (without("qmap2"), "'qmap2' is None, expected 256"),
    "short-map": (with_value("qmap1", torch.ones(16)), r"'qmap1' is of shape \(16,\)"),
    "no-tensor": (with_value("state1", 3), "'state1' is 3, expected a tensor"),
    "two-in-one": (with_value("state1", torch.zeros(2, 64, 70)), r"'exp_avg'.*\(2, 64, 70\)"),
    "transposed": (
        with_value("state1", torch.zeros((70, 64), dtype=torch.uint8).t()),
        "not contiguous",
    ),
    "one-moment": (without("state2"), "no 'exp_avg_sq'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_converted_is_named(case):
    change, message = SPOILT[case]
    saved, _ = bitsandbytes_state(nested=False)
    change(saved["state"][0])
    optimizer = warpstep.AdamW(new_params(torch.float32, BNB_SHAPES), **OPTIONS)
    with pytest.raises(ValueError, match=f"parameter 0 of group 0: .*{message}"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
