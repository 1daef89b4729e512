"""enable(unfused=True): torch's optimizers for which no implementation was chosen, too."""

import contextlib
import copy

import pytest
import torch

import warpstep
from support.bits import assert_same_bits
from support.enabling import LR, SHAPES, assert_near, by_plans, each_kind, step_both, torchs
from support.environment import EMULATED
from support.parameters import new_params, params_of, random, set_grads, take_steps
from warpstep.enabling import override
from warpstep.enabling.counts import MOST_REASONS, OTHER_REASONS, Counts
from warpstep.enabling.torchs_plan import CHOSEN, UNCHOSEN

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    warpstep.disable()


def unfused(kind="AdamW", params=None, **options):
    return torchs(kind, params, **{"fused": None, **options})


@pytest.mark.parametrize(
    "options", [{}, {"maximize": True}, {"lr": torch.tensor(LR).double()}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_kind
def test_steps_as_torch(kind, dtype, options):
    ours, theirs = (unfused(kind, new_params(SHAPES, dtype=dtype), **options) for _ in range(2))
    before = warpstep.status().launches["cpu"]
    with by_plans(4):
        step_both(ours, theirs, range(4), unfused=True)
    assert warpstep.status().launches["cpu"] - before == 4
    assert_near(ours, theirs, 4, dtype)
    for p in params_of(ours):  # a backward pass that meets it notices
        assert p._version == 4


@each_kind
def test_the_bits_are_those_of_the_fused_instance(kind):
    pair = [torchs(kind, fused=fused) for fused in (None, True)]
    with warpstep.enabled(unfused=True), by_plans(8):
        for optimizer in pair:
            take_steps(optimizer, range(4))
    assert_same_bits(*pair)


def test_without_it_they_are_torchs():
    """Also where another scope has it, once that has ended; the status says what would take it."""
    ours, theirs = unfused(), unfused()
    with by_plans(0, UNCHOSEN):
        step_both(ours, theirs, range(2))
    assert_same_bits(ours, theirs)
    assert "enable(unfused=True)" in str(warpstep.status())
    with warpstep.enabled():
        with warpstep.enabled(unfused=True), by_plans(1):
            take_steps(ours, [2])
        with by_plans(0, UNCHOSEN):
            take_steps(ours, [3])


def test_switching():
    """What was asked for once stays, until disable(); each scope has its own."""
    warpstep.enable()
    assert not override._takes_unfused()
    warpstep.enable(unfused=True)
    warpstep.enable()
    assert override._takes_unfused()
    assert "and those for which nothing was chosen" in str(warpstep.status())
    warpstep.disable()
    assert not override._takes_unfused()
    with warpstep.enabled(unfused=True), warpstep.enabled():
        assert override._takes_unfused()
        warpstep.disable()
        assert override._takes_unfused()
    assert not override._takes_unfused()


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}, {"foreach": False}])
def test_what_was_chosen_is_torchs(options):
    """Its bits; also where it is chosen in mid-run, and in one group only."""
    ours, theirs = unfused(**options), unfused(**options)
    with by_plans(0, CHOSEN):
        step_both(ours, theirs, range(3), unfused=True)
    assert_same_bits(ours, theirs)
    ours, theirs = unfused(), unfused()
    with by_plans(2):
        step_both(ours, theirs, range(2), unfused=True)
    for optimizer in (ours, theirs):
        optimizer.param_groups[1].update(options)
    with by_plans(0, CHOSEN):
        step_both(ours, theirs, range(2, 4), unfused=True)
    assert_near(ours, theirs, 4)


def test_differentiable_is_torchs():
    params = [random((3,), 1).requires_grad_().clone()]
    ours = torch.optim.SGD(params, lr=LR, differentiable=True)
    params[0].grad = random((3,), 2).requires_grad_()
    with by_plans(0, CHOSEN), warpstep.enabled(unfused=True):
        ours.step()
    assert params[0].grad_fn is not None


@each_kind
def test_disable_in_mid_run(kind):
    """What torch's loop finds is a state of its own, and it goes on from there."""
    ours, theirs = unfused(kind), unfused(kind)
    step_both(ours, theirs, range(2), unfused=True)
    twin = copy.deepcopy(ours)
    with by_plans(0):
        for optimizer in (ours, twin, theirs):
            take_steps(optimizer, range(2, 4))
    assert_same_bits(ours, twin)
    assert_near(ours, theirs, 4)
    with by_plans(2):
        step_both(ours, theirs, range(4, 6), unfused=True)
    assert_near(ours, theirs, 6)


def test_groups_of_both_kinds():
    params = new_params(SHAPES)
    ours = torch.optim.AdamW([{"params": params[:2], "fused": True}, {"params": params[2:]}])
    with by_plans(0, "groups with and without fused=True"), warpstep.enabled(unfused=True):
        take_steps(ours, range(1))


def test_counters_that_lie_elsewhere_are_moved():
    """Of a run whose default dtype is float64: they become float32, as documented."""
    ours, theirs = unfused(), unfused()
    torch.set_default_dtype(torch.float64)
    try:
        step_both(ours, theirs, range(1))
        assert ours.state[params_of(ours)[0]]["step"].dtype == torch.float64
        with by_plans(2):
            step_both(ours, theirs, range(1, 3), unfused=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.state[p]["step"].dtype == torch.float32
        assert ours.state[p]["step"] == theirs.state[q]["step"] == 3


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients_of_sgd_are_torchs(momentum):
    def embedding():
        return torch.nn.Parameter(random((6, 2), 1))

    pair = [torch.optim.SGD([embedding()], lr=LR, momentum=momentum) for _ in range(2)]
    with by_plans(1, "sparse gradients"):
        for step in range(4):
            for optimizer in pair:
                (p,) = params_of(optimizer)
                p.grad = random((6, 2), step)
                p.grad = p.grad.to_sparse() if step % 2 else p.grad
            with warpstep.enabled(unfused=True):
                pair[0].step()
            pair[1].step()
    torch.testing.assert_close(params_of(pair[0]), params_of(pair[1]), rtol=1e-6, atol=1e-6)


def test_a_buffer_that_is_none():
    """As in a checkpoint that was taken before the first step with momentum."""
    pair = [unfused("SGD"), unfused("SGD")]
    for optimizer in pair:
        for p in params_of(optimizer):
            optimizer.state[p]["momentum_buffer"] = None
    with by_plans(3):
        step_both(*pair, range(3), unfused=True)
    assert_near(*pair, 3)


@pytest.mark.parametrize("options", [{"capturable": True}, {}], ids=["capturable", "grad_scale"])
def test_what_torch_refuses_it_refuses(options):
    results = []
    for on in (True, False):
        ours = unfused(**options)
        set_grads(params_of(ours))
        if not options:
            ours.grad_scale = torch.tensor(2.0)
        scope = warpstep.enabled(unfused=True) if on else contextlib.nullcontext()
        with scope, pytest.raises((AssertionError, RuntimeError)) as raised:
            ours.step()
        results.append((type(raised.value), str(raised.value)))
    assert results[0] == results[1]


@each_kind
def test_grad_scaler(kind):
    """It unscales by itself, and skips the step with the inf."""
    pair = [unfused(kind), unfused(kind)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in pair]
    for step in range(4):
        for optimizer, scaler in zip(pair, scalers, strict=True):
            scaler.scale(torch.zeros(()))
            set_grads(params_of(optimizer), step, scale=scaler.get_scale())
            if step == 2:
                params_of(optimizer)[0].grad[0, 0] = torch.inf
            is_ours = optimizer is pair[0]
            with warpstep.enabled(unfused=True) if is_ours else contextlib.nullcontext():
                scaler.step(optimizer)
            scaler.update()
    assert_near(*pair, 3)


def test_complex_parameters():
    """As pairs of real numbers, in a state of complex tensors."""
    pair = [
        torch.optim.AdamW([random((4,), 1, dtype=torch.complex64).requires_grad_()], lr=LR)
        for _ in range(2)
    ]
    with by_plans(3):
        step_both(*pair, range(3), unfused=True)
    (p,), (q,) = map(params_of, pair)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert {k: v.dtype for k, v in pair[0].state[p].items()} == {
        k: v.dtype for k, v in pair[1].state[q].items()
    }


def test_reasons_with_values_in_them_do_not_add_up_for_ever():
    counts = Counts()
    for i in range(2 * MOST_REASONS):
        counts.note_unplanned(f"eps is {i}")
        counts.note_unplanned("eps is 0")
    assert len(counts.unplanned) == MOST_REASONS + 1
    assert counts.unplanned["eps is 0"] == 2 * MOST_REASONS + 1
    assert counts.unplanned[OTHER_REASONS] == MOST_REASONS


def test_a_counter_that_two_parameters_share_counts_as_torch_has_it():
    pair = []
    for on in (False, True):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        pair.append(torch.optim.AdamW(params, lr=LR, fused=True))
        with warpstep.enabled() if on else contextlib.nullcontext():
            for step in range(4):
                for param in params:
                    param.grad = torch.ones(3)
                pair[-1].step()
                if step == 0:
                    pair[-1].state[params[1]]["step"] = pair[-1].state[params[0]]["step"]
    theirs, ours = pair
    assert_near(ours, theirs, 7)


def test_a_gradient_scale_of_several_elements_is_left_to_torch():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=LR, fused=True)
    param.grad = torch.full((3,), 2.0)
    optimizer.grad_scale, optimizer.found_inf = torch.full((2,), 2.0), torch.tensor(0.0)
    with warpstep.enabled():
        before = override.counts.by_plans
        optimizer.step()
        assert override.counts.by_plans == before
    assert torch.allclose(param, torch.full((3,), 1 - LR))
