"""warpstep.enable(): torch's own optimizers step by plans, which follow every change."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import warpstep
from support.bits import assert_same_bits
from support.enabling import KINDS, LR, SHAPES, assert_near, by_plans, each_kind, step_both, torchs
from support.environment import EMULATED
from support.parameters import new_params, params_of, random, set_grads, take_steps
from warpstep.enabling import torchs_plan

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    warpstep.disable()


@each_kind
def test_a_step_is_one_launch_of_a_plan(kind):
    ours, theirs = torchs(kind), torchs(kind)
    before = warpstep.status().launches["cpu"]
    with by_plans(4):
        step_both(ours, theirs, range(4))
    assert warpstep.status().launches["cpu"] - before == 4  # two groups each
    assert_near(ours, theirs, 4)


@each_kind
def test_the_bits_are_those_of_warpsteps_own(kind):
    ours, own = torchs(kind), KINDS[kind][0]
    mine = getattr(warpstep, own.__name__)
    twin = torchs(kind)
    twin = mine([{**g, "params": g["params"]} for g in twin.param_groups], **KINDS[kind][1])
    with warpstep.enabled():
        take_steps(ours, range(4))
    take_steps(twin, range(4))
    assert_same_bits(ours, twin)


def nothing(optimizer):
    pass


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def one_more_group(optimizer):
    optimizer.add_param_group({"params": [random((6,), 9).requires_grad_()], "lr": LR / 2})


def memory_swapped(optimizer):
    for p in params_of(optimizer):
        p.data = p.data.clone()


def state_moved(optimizer):
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.data = tensor.data.clone()


def state_dropped(optimizer):
    optimizer.state.clear()


def in_float64(optimizer):
    for p in params_of(optimizer):
        p.grad, p.data = None, p.data.double()
    for state in optimizer.state.values():
        for key, tensor in state.items():
            tensor.data = tensor.data if key == "step" else tensor.data.double()


def hypers_changed(optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["maximize"] = True


def lr_becomes_a_tensor(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])


def a_parameter_leaves(optimizer):
    optimizer.state.pop(optimizer.param_groups[1]["params"].pop())


CHANGES = (
    *(nothing, loaded, one_more_group, memory_swapped, state_moved, state_dropped, in_float64),
    *(hypers_changed, lr_becomes_a_tensor, a_parameter_leaves),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@each_kind
def test_a_change_is_followed(kind, change):
    ours, theirs = torchs(kind), torchs(kind)
    with by_plans(6):
        step_both(ours, theirs, range(3))
        for optimizer in (ours, theirs):
            change(optimizer)
        step_both(ours, theirs, range(3, 6))
    assert_near(ours, theirs, 6)


@each_kind
def test_gradients_come_go_and_lie_otherwise(kind):
    ours, theirs = torchs(kind), torchs(kind)
    with warpstep.enabled():
        ours.step()  # without any
    theirs.step()
    assert_near(ours, theirs, 1)
    for step in range(5):
        step_both(ours, theirs, [step], skip=[step])
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    for optimizer in (ours, theirs):
        set_grads(params_of(optimizer), 5)
    matrix = params_of(ours)[0]
    matrix.grad = matrix.grad.t().contiguous().t()  # of which torch's kernel reads other elements
    with warpstep.enabled(), by_plans(1):
        ours.step()
    theirs.step()
    assert_near(ours, theirs, 6)


class Equal(torch.optim.AdamW):
    """All of which are equal, and none can be hashed."""

    def __eq__(self, other):
        return True

    __hash__ = None


def test_classes_that_compare_otherwise_have_plans_of_their_own():
    pair = [Equal(new_params(SHAPES[:n]), lr=LR, fused=True) for n in (2, 4)]
    with by_plans(6), warpstep.enabled():
        for step in range(3):
            for optimizer in pair:
                take_steps(optimizer, [step])
    assert [len(o.state) for o in pair] == [2, 4]


def test_captured_plans_are_kept(monkeypatch):
    """Graphs read their tables. A step that needs a new plan is not captured by one."""
    ours = torchs()
    with warpstep.enabled():
        take_steps(ours, range(1))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch's own check asks
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with by_plans(1):
            take_steps(ours, range(1))
        kept = weakref.ref(torchs_plan._all_beside[id(ours)].captured[0])
        loaded(ours)
        with by_plans(0, "a graph capture before"):
            take_steps(ours, range(1))
        monkeypatch.undo()
        with by_plans(1):
            take_steps(ours, range(1))
    gc.collect()
    assert kept() is not None
    del ours
    gc.collect()
    assert kept() is None


@each_kind
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_scaled_gradients(kind, found_inf):
    """They are left as torch leaves them: scaled where the step is skipped."""
    ours, theirs = torchs(kind), torchs(kind)
    step_both(ours, theirs, range(1))
    for optimizer in (ours, theirs):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(16.0), torch.tensor(found_inf)
    with by_plans(1):
        step_both(ours, theirs, range(1, 2), scale=16.0)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert (p._version, p.grad._version) == (q._version, q.grad._version)
    assert_near(ours, theirs, 2)


def test_scaled_gradients_that_share_memory_are_torchs():
    ours, theirs = torchs("SGD"), torchs("SGD")
    for optimizer in (ours, theirs):
        flat = random((400,), 3)
        for p in params_of(optimizer):
            p.grad = flat[: p.numel()].view(p.shape)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with warpstep.enabled(), by_plans(0, "share memory"):
        ours.step()
    theirs.step()
    assert_near(ours, theirs, 1)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(p.grad, q.grad)


def twice(params):
    return torch.optim.AdamW([params[0], *params], lr=LR, fused=True)


def gaps(params):
    wide = torch.zeros(4, 2)
    wide[:, 0] = random((4,), 5)
    return torch.optim.AdamW([*params, wide[:, 0].requires_grad_()], lr=LR, fused=True)


def mixed_groups(params):
    groups = [{"params": params[:2]}, {"params": params[2:], "fused": None}]
    return torch.optim.AdamW(groups, lr=LR, fused=True)


def own_key(params):
    return torch.optim.AdamW([{"params": params, "ema_decay": 0.9}], lr=LR, fused=True)


def state_laid_out_otherwise(params):
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    take_steps(optimizer, range(1))
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    return optimizer


def counters_in_float64(params):
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    take_steps(optimizer, range(1))
    for state in optimizer.state.values():
        state["step"] = state["step"].double()
    return optimizer


UNPLANNED = {
    "twice": (twice, "there twice"),
    "gaps": (gaps, "no kernel can step"),
    "mixed": (mixed_groups, "fused=True was not asked for"),
    "own key": (own_key, "a key that warpstep's own"),
    "state": (state_laid_out_otherwise, "a state whose 'exp_avg'"),
    "counters": (counters_in_float64, "a state whose 'step'"),
    "dampening": (
        lambda params: torch.optim.SGD(params, LR, momentum=0.9, dampening=0.5, fused=True),
        "dampened momentum",
    ),
    "not fused": (lambda params: torch.optim.AdamW(params, LR), "fused=True was not asked for"),
    "loop": (lambda params: torch.optim.AdamW(params, LR, fused=False), "fused=False"),
    "foreach": (lambda params: torch.optim.AdamW(params, LR, foreach=True), "fused=False"),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("case", UNPLANNED)
def test_what_no_plan_takes_is_counted(case):
    """And goes the way it went: by the operators, or torch's own."""
    make, reason = UNPLANNED[case]
    ours, theirs = make(new_params(SHAPES)), make(new_params(SHAPES))
    with by_plans(0, reason):
        step_both(ours, theirs, range(1, 4))
    assert_near(ours, theirs, 4)
    assert reason in str(warpstep.status())


def test_errors_are_torchs():
    """What torch refuses it refuses in its own words; nothing has been changed."""
    ours = torchs()
    set_grads(params_of(ours))
    before = copy.deepcopy(params_of(ours))
    params_of(ours)[0].grad = params_of(ours)[0].grad.to_sparse()
    message = "Adam does not support sparse gradients, please consider SparseAdam instead"
    with warpstep.enabled(), by_plans(0, "sparse"), pytest.raises(RuntimeError, match=message):
        ours.step()
    assert not any(ours.state.values())
    assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))
    theirs = torchs(amsgrad=True)
    with warpstep.enabled():
        take_steps(theirs, range(2))
        del theirs.state[params_of(theirs)[1]]["max_exp_avg_sq"]
        with by_plans(0, "max_exp_avg_sq"), pytest.raises(KeyError):
            take_steps(theirs, range(1))


def test_a_plan_that_cannot_be_made_is_tried_again_more_and_more_seldom(monkeypatch):
    made = []

    class Failing:
        def __init__(self, *_):
            made.append(None)
            raise OSError("no plan today")

    ours = torchs()
    monkeypatch.setattr(torchs_plan, "TorchsPlan", Failing)
    with warpstep.enabled():
        with by_plans(0, "no plan today"):
            take_steps(ours, range(100))
        assert len(made) == 7  # after 1, 2, 4, ... steps
        monkeypatch.undo()
        take_steps(ours, range(100))
    assert torchs_plan._all_beside[id(ours)].plan is not None
    assert {state["step"].item() for state in ours.state.values()} == {200.0}


def test_plans_that_last_for_one_step_are_left(monkeypatch):
    """Who replaces the state at each step does not pay for a plan each time."""
    made = []

    class Counting(torchs_plan.TorchsPlan):
        def __init__(self, *args):
            made.append(None)
            super().__init__(*args)

    monkeypatch.setattr(torchs_plan, "TorchsPlan", Counting)
    ours, theirs = torchs(), torchs()
    for step in range(60):
        step_both(ours, theirs, [step])
        loaded(ours)
    assert 3 < len(made) < 10
    assert_near(ours, theirs, 60)


def test_threads():
    """Several threads may step one optimizer, while others switch the rest on and off."""
    ours = torchs()
    set_grads(params_of(ours))

    def steps():
        for _ in range(25):
            ours.step()

    with warpstep.enabled(), by_plans(100):
        threads = [threading.Thread(target=steps) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with warpstep.enabled(unfused=True):
                pass
        for thread in threads:
            thread.join()
    assert {state["step"].item() for state in ours.state.values()} == {100.0}


def test_plans_outlast_a_scope():
    """`with enabled():` around each step does not make a plan each time."""
    ours = torchs()
    with warpstep.enabled():
        take_steps(ours, range(1))
    plan = torchs_plan._all_beside[id(ours)].plan
    for step in range(1, 3):
        with warpstep.enabled(), by_plans(1):
            take_steps(ours, [step])
    assert torchs_plan._all_beside[id(ours)].plan is plan


def test_modes_see_torchs_operators():
    ours = torchs()
    with warpstep.enabled():
        take_steps(ours, range(1))
        set_grads(params_of(ours))
        with by_plans(0, "a mode"), FlopCounterMode(display=False):
            ours.step()
        with by_plans(1), torch.device("cpu"):
            ours.step()
