"""warpstep.enable(): torch's fused SGD on warpstep's kernels, in torch's semantics."""

import copy
import math

import pytest
import torch

import warpstep
from support.bits import assert_same
from support.enabling import go
from support.environment import EMULATED
from support.parameters import new_params, params_of, random, set_grads, take_steps
from support.sgd_pairs import LR, assert_near, assert_states_near, each_variant

SIZES = [(3,), (40, 7), (), (0, 2), (1000,)] * 2
HYPERS = {"weight_decay": 0.1, "momentum": 0.9, "lr": LR, "dampening": 0.0, "nesterov": False}
HYPERS |= {"maximize": False, "is_first_step": False}
OVERLOADS = ("default", "tensor_lr")
SHAPES = [(5,), (3, 7), (), (40_001,)]

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    warpstep.disable()


def counts():
    status = warpstep.status()
    return status.taken, sum(status.passed_on.values())


def lists_of(buffers=True, garbage=False, shapes=SHAPES):
    """Parameters, gradients and buffers; these empty, or NaN, as memory that was found may be."""
    params, grads, moments = (
        [random(s, 10 * k + i) for i, s in enumerate(shapes)] for k in (0, 1, 2)
    )
    if garbage:
        moments = [torch.full_like(m, math.nan) for m in moments]
    return params, grads, moments if buffers else []


def call(lists, overload="default", **options):
    options = {**HYPERS, **options}
    if overload == "tensor_lr":
        options["lr"] = torch.tensor(options["lr"])
    getattr(torch.ops.aten._fused_sgd_, overload)(*lists, **options)


def taken_call(lists, *args, **options):
    """The call while enabled, which warpstep's kernel takes."""
    before = counts()
    with warpstep.enabled():
        call(lists, *args, **options)
    assert counts() == (before[0] + 1, before[1])


def assert_lists_near(mine, theirs, steps=1):
    """`assert_near` takes in a buffer of the largest size there is."""
    for ours, torchs in zip(mine, theirs, strict=True):
        assert_near(ours, torchs, steps, lr=1.0)


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_variant
@pytest.mark.parametrize("way", ["plans", "operators"])
def test_steps_as_torch(way, options, dtype, lr, monkeypatch):
    """Parameters and buffers are a few roundings from torch's; all calls are taken."""
    go(way, monkeypatch)
    pair = [
        torch.optim.SGD(new_params(SIZES, dtype=dtype), lr=lr, fused=True, **options)
        for _ in range(2)
    ]
    take_steps(pair[0], range(4))
    before = counts()
    with warpstep.enabled():
        take_steps(pair[1], range(4))
    assert counts() == (before[0] + 4, before[1])
    assert_near(params_of(pair[1]), params_of(pair[0]), 4)
    assert_states_near(pair[1], pair[0], 4)
    for p, q in zip(params_of(pair[1]), params_of(pair[0]), strict=True):
        assert p._version == q._version
        for key, value in pair[0].state.get(q, {}).items():
            mine = pair[1].state[p][key]
            assert (mine.dtype, mine._version) == (value.dtype, value._version)


@each_variant
@pytest.mark.parametrize("way", ["plans", "operators"])
def test_bits_of_warpsteps_own(way, options, monkeypatch):
    go(way, monkeypatch)
    if options.get("dampening"):
        options = {**options, "dampening": 0.25}
    ours, mine = new_params(SIZES), new_params(SIZES)
    take_steps(warpstep.SGD(ours, lr=LR, **options), range(4))
    with warpstep.enabled():
        take_steps(torch.optim.SGD(mine, lr=LR, fused=True, **options), range(4))
    assert_same(mine, ours)


CALLS = {
    "momentum": {},
    "without": {"momentum": 0.0},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.4},
    "maximize": {"maximize": True},
    "scaled": {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    "inf": {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(1.0)},
}


@pytest.mark.parametrize("overload", OVERLOADS)
@pytest.mark.parametrize("case", CALLS)
def test_operators(case, overload):
    """Gradients are left unscaled where the step is taken, as torch leaves them."""
    options = CALLS[case]
    mine, theirs = (lists_of(buffers=case != "without") for _ in range(2))
    before = copy.deepcopy(mine)
    call(theirs, overload, **options)
    taken_call(mine, overload, **options)
    assert_lists_near(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine[0], before[0], strict=True)) == (
        case == "inf"
    )
    if case != "scaled":
        assert_same(mine[1], before[1])


@pytest.mark.parametrize("overload", OVERLOADS)
@pytest.mark.parametrize("options", [{}, {"dampening": 0.4}, {"nesterov": True}], ids=str)
def test_the_first_step_reads_no_buffer(options, overload):
    """It may be memory as it was found. The gradient becomes the buffer, undampened."""
    mine, theirs = (lists_of(garbage=True) for _ in range(2))
    call(theirs, overload, is_first_step=True, **options)
    taken_call(mine, overload, is_first_step=True, **options)
    assert_lists_near(mine, theirs)
    assert all(buffer.isfinite().all() for buffer in mine[2])
    call(theirs, overload, **options)
    taken_call(mine, overload, **options)
    assert_lists_near(mine, theirs, 2)


def test_a_first_step_that_is_skipped_leaves_no_garbage():
    """torch's does: it skips filling the buffers, and reads them at the next step."""
    mine, theirs = lists_of(garbage=True), lists_of()
    kept = copy.deepcopy(mine[:2])
    taken_call(mine, is_first_step=True, found_inf=torch.tensor(1.0))
    assert_same(mine[:2], kept)
    taken_call(mine)
    call(theirs, is_first_step=True)
    assert_lists_near(mine, theirs)


@pytest.mark.parametrize("way", ["plans", "operators"])
def test_grad_scaler(way, monkeypatch):
    """torch.amp.GradScaler skips the step with the inf, and goes on."""
    go(way, monkeypatch)
    pair = [torch.optim.SGD(new_params(), lr=LR, momentum=0.9, fused=True) for _ in range(2)]
    for on, optimizer in zip((False, True), pair, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        (warpstep.enable if on else warpstep.disable)()
        for seed in range(4):
            set_grads(params_of(optimizer), seed, scale=scaler.get_scale())
            if seed == 2:
                params_of(optimizer)[2].grad[3] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0
    assert_near(params_of(pair[1]), params_of(pair[0]), 4)
    assert_states_near(pair[1], pair[0], 4)


def test_a_launch_a_step():
    optimizer = torch.optim.SGD(new_params([(2,)] * 300), lr=LR, momentum=0.9, fused=True)
    with warpstep.enabled():
        before = warpstep.status().launches["cpu"]
        take_steps(optimizer, range(3))
        assert warpstep.status().launches["cpu"] - before == 3


# At a first step buffers are memory as it was found, and torch does not fill all of one with gaps.
@pytest.mark.parametrize(
    ("stream", "first"), [(0, False), (0, True), (1, False), (1, True), (2, False)]
)
def test_layouts_go_to_torch(stream, first):
    """Gaps in memory, or strides that differ, are torch's: its bits, whatever they are."""
    mine, theirs = lists_of(shapes=[(5,), (4,)]), lists_of(shapes=[(5,), (4,)])
    for lists in (mine, theirs):
        wide = torch.zeros(4, 2)
        wide[:, 0] = lists[stream][1]
        lists[stream][1] = wide[:, 0]
    call(theirs, is_first_step=first)
    before = counts()
    with warpstep.enabled():
        call(mine, is_first_step=first)
    assert counts() == (before[0], before[1] + 1)
    assert_same(mine, theirs)


def test_disable_restores_torchs_kernels():
    """Before, after and without: the same bits of torch, and its very kernels."""
    kernels = [torch._C._dispatch_dump(f"aten::_fused_sgd_{o}") for o in ("", ".tensor_lr")]
    untouched, restored = new_params(SIZES), new_params(SIZES)
    take_steps(torch.optim.SGD(untouched, lr=LR, momentum=0.9, fused=True), range(3))
    warpstep.enable()
    changed = [torch._C._dispatch_dump(f"aten::_fused_sgd_{o}") for o in ("", ".tensor_lr")]
    assert all(a != b for a, b in zip(kernels, changed, strict=True))
    take_steps(torch.optim.SGD(new_params(SIZES), lr=LR, momentum=0.9, fused=True), range(2))
    warpstep.disable()
    after = [torch._C._dispatch_dump(f"aten::_fused_sgd_{o}") for o in ("", ".tensor_lr")]
    assert after == kernels
    before = counts()
    take_steps(torch.optim.SGD(restored, lr=LR, momentum=0.9, fused=True), range(3))
    assert counts() == before
    assert_same(restored, untouched)
