"""An optimizer that plans step stays torch's in everything else, and torch gets back its own."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import warpstep
from support.bits import assert_same_bits
from support.enabling import LR, SHAPES, assert_near, by_plans, each_kind, step_both, torchs
from support.environment import EMULATED
from support.parameters import new_params, params_of, set_grads, take_steps
from warpstep.enabling import torchs_plan

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    warpstep.disable()


def places():
    """What torch's steps are now, inside their decorators."""
    found = []
    for kind in torchs_plan.KINDS:
        decorator = kind.step
        while hasattr(decorator.__wrapped__, "__wrapped__"):
            decorator = decorator.__wrapped__
        found += [cell.cell_contents for cell in decorator.__closure__]
    return found


@each_kind
def test_disable_in_mid_run_leaves_a_plain_torch_optimizer(kind):
    """A deep copy that was taken before goes on with the same bits."""
    ours = torchs(kind)
    with warpstep.enabled():
        take_steps(ours, range(2))
        twin = copy.deepcopy(ours)
    with by_plans(0):
        for optimizer in (ours, twin):
            take_steps(optimizer, range(2, 4))
    assert_same_bits(ours, twin)


def test_disable_restores_every_function():
    """The very ones; and the classes are not written to at all."""
    torchs("AdamW"), torchs("SGD")
    before, classes = places(), [dict(vars(kind)) for kind in torchs_plan.KINDS]
    own = dict(vars(torch.optim.AdamW))
    warpstep.enable()
    assert places() != before
    warpstep.enable(unfused=True)
    with warpstep.enabled():
        take_steps(torchs("AdamW"), range(1))
    assert [dict(vars(kind)) for kind in torchs_plan.KINDS] == classes
    warpstep.disable()
    assert all(a is b for a, b in zip(places(), before, strict=True))
    assert [dict(vars(kind)) for kind in torchs_plan.KINDS] == classes
    assert dict(vars(torch.optim.AdamW)) == own


def test_a_failure_while_enabling_is_undone(monkeypatch):
    before = places()
    broken = functools.partial(pytest.fail, "no place")
    monkeypatch.setattr(torchs_plan, "_place_of_step", lambda kind: broken())
    with pytest.raises(pytest.fail.Exception):
        warpstep.enable()
    assert places() == before
    assert not warpstep.status().enabled


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    twin = torchs(params=[p.detach().clone().requires_grad_() for p in params_of(optimizer)])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved])
def test_copies_in_mid_run(copied):
    """They are torch's, know nothing of warpstep, and go on by plans of their own."""
    ours, theirs = torchs(), torchs()
    step_both(ours, theirs, range(2))
    assert b"warpstep" not in pickle.dumps(ours)
    twin = copied(ours)
    assert type(twin) is torch.optim.AdamW
    with by_plans(4):
        step_both(ours, theirs, range(2, 4))
        with warpstep.enabled():
            take_steps(twin, range(2, 4))
    assert_near(ours, theirs, 4)
    assert_same_bits(twin, ours)


@pytest.mark.parametrize("enabled_first", [True, False])
@each_kind
def test_schedulers(kind, enabled_first):
    """Made before or after, they wrap the instance's step and see that it is called."""
    ours, theirs = torchs(kind), torchs(kind)
    if enabled_first:
        warpstep.enable()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    warpstep.disable()
    assert "step" in vars(ours)
    with by_plans(4):
        for step in range(4):
            step_both(ours, theirs, [step])
            for scheduler in schedulers:
                scheduler.step()
    assert ours._opt_called
    assert [g["lr"] for g in ours.param_groups] == [LR / 16, LR / 8]
    assert_near(ours, theirs, 4)


def test_a_method_that_was_kept():
    """Whoever has bound the method before steps by plans, and after disable() by torch."""
    ours = torchs()
    step = ours.step
    set_grads(params_of(ours))
    with warpstep.enabled(), by_plans(1):
        step()
        kept = ours.step
    with by_plans(0):
        kept()
    assert {state["step"].item() for state in ours.state.values()} == {2.0}


class Plain(torch.optim.AdamW):
    """A derived class without a step of its own."""


class Stepping(torch.optim.AdamW):
    """One that steps as torch does, but every second time only, and by half of the gradients."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2 == 0:
            return None
        for p in params_of(self):
            if p.grad is not None:
                p.grad /= 2
        return super().step(closure)


class Beginning(torch.optim.AdamW):
    """One whose state begins otherwise."""

    def _init_group(self, group, params, *others):
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                ones = {key: torch.ones_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.zeros(()), **ones)
        return super()._init_group(group, params, *others)


@pytest.mark.parametrize(
    ("kind", "steps", "reasons"),
    [(Plain, 4, []), (Stepping, 2, []), (Beginning, 0, ["'_init_group' of its own"])],
)
def test_derived_classes(kind, steps, reasons):
    """They go by plans where torch's step is called; one that begins otherwise by operators."""
    ours, theirs = (kind(new_params(SHAPES), lr=LR, fused=True) for _ in range(2))
    taken = warpstep.status().taken
    with by_plans(steps, *reasons):
        step_both(ours, theirs, range(4))
    assert warpstep.status().taken - taken == (2 if kind is Stepping else 4)
    assert_near(ours, theirs, 4)


def test_an_instance_with_an_init_group_of_its_own():
    """It says what is stepped: here all parameters but the first."""

    def without_first():
        optimizer = torchs()
        whole = optimizer._init_group

        def init_group(group, *lists):
            has_complex = whole(group, *lists)
            for one in lists:
                del one[:1]
            return has_complex

        optimizer._init_group = init_group
        return optimizer

    ours, theirs = without_first(), without_first()
    with by_plans(0, "'_init_group' of its own"):
        step_both(ours, theirs, range(2))
    assert_near(ours, theirs, 2)


def test_an_optimizer_that_gets_another_class():
    """Goes on as that one does."""
    ours, theirs = torchs(), torchs()
    with by_plans(2, "'_init_group' of its own"):
        step_both(ours, theirs, range(2))
        ours.__class__ = theirs.__class__ = Beginning
        step_both(ours, theirs, range(2, 4))
    assert_near(ours, theirs, 4)


def test_hooks():
    """In torch's order, with torch's arguments; the profiler finds torch's name."""
    seen = []

    def hook(name, result=None):
        return lambda optimizer, args, kwargs: seen.append((name, optimizer.fired)) or result

    ours = torchs()
    ours.fired = 0
    handles = [
        ours.register_step_pre_hook(lambda o, a, k: seen.append("pre") or None),
        ours.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    with warpstep.enabled(), by_plans(1):
        set_grads(params_of(ours))
        with torch.profiler.profile() as profile:
            ours.step()
    for handle in handles:
        handle.remove()
    assert seen == [("global pre", 0), "pre", ("post", 0), ("global post", 0)]
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_raise(before):
    ours = torchs()
    set_grads(params_of(ours))
    register = ours.register_step_pre_hook if before else ours.register_step_post_hook

    def hook(optimizer, args, kwargs):
        raise KeyError("hook")

    register(hook)
    with warpstep.enabled(), by_plans(0 if before else 1), pytest.raises(KeyError):
        ours.step()
    assert (len(ours.state) == 0) == before


@pytest.mark.parametrize("dampening", [0, 0.5], ids=["planned", "not planned"])
def test_closures(dampening):
    """Called once, with gradients on; what it returns comes back. What it raises stops the step."""
    ours, theirs = (torchs("SGD", dampening=dampening) for _ in range(2))
    calls = []

    def closure(optimizer):
        calls.append(torch.is_grad_enabled())
        set_grads(params_of(optimizer), len(calls) // 2)
        return 7.0

    for _ in range(2):
        assert theirs.step(lambda: closure(theirs)) == 7.0
        calls.append(None)
        with warpstep.enabled():
            assert ours.step(closure=lambda: closure(ours)) == 7.0
        calls.append(None)
    assert calls == [True, None] * 4
    before = copy.deepcopy(params_of(ours))
    with warpstep.enabled(), pytest.raises(ZeroDivisionError):
        ours.step(lambda: 1 / 0)
    assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))


def test_the_capture_check_comes_before_the_closure(monkeypatch):
    def check(self):
        raise RuntimeError("Attempting CUDA graph capture")

    name = "_accelerator_graph_capture_health_check"
    if not hasattr(Optimizer, name):
        name = "_cuda_graph_capture_health_check"
    monkeypatch.setattr(Optimizer, name, check)
    with warpstep.enabled(), pytest.raises(RuntimeError, match="graph capture"):
        torchs().step(lambda: pytest.fail("called"))


def test_what_is_kept_dies_with_the_optimizer():
    """Also where it is found by the garbage collector; and it keeps nothing alive."""
    gc.collect()
    before = len(torchs_plan._all_beside)
    with warpstep.enabled():
        first, second = torchs(), torchs()
        second.itself = second
        optimizers = [weakref.ref(o) for o in (first, second)]
        params = [weakref.ref(p) for p in params_of(first)]
        for optimizer in (first, second):
            take_steps(optimizer, range(2))
        plans = [weakref.ref(torchs_plan._all_beside[id(o)].plan) for o in (first, second)]
        assert len(torchs_plan._all_beside) == before + 2
        del optimizer, first, second
        gc.collect()
    assert len(torchs_plan._all_beside) == before
    assert not any(reference() for reference in (*optimizers, *params, *plans))


def test_a_compiled_step_after_disable():
    """What was compiled while enabled goes on as torch's."""
    ours, theirs = torchs(), torchs()
    step = torch.compile(ours.step, backend="eager")
    for number in range(4):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), number)
        (warpstep.enable if number % 2 == 0 else warpstep.disable)()
        with by_plans(0):
            step()
        warpstep.disable()
        theirs.step()
    assert_near(ours, theirs, 4)


def test_replace_while_enabled():
    """It is warpstep's own from then on."""
    ours, theirs = torchs(), torchs()
    step_both(ours, theirs, range(2))
    replaced = warpstep.replace(ours)
    with by_plans(0):
        step_both(replaced, theirs, range(2, 4))
    assert replaced.plan is not None


class Undecorated(torch.optim.AdamW):
    """As a torch might be whose steps are not decorated."""

    def step(self, closure=None):
        raise NotImplementedError


def decorated_otherwise(self, closure=None):
    raise NotImplementedError


decorated_otherwise.__wrapped__ = Undecorated.step


def test_another_torch(monkeypatch):
    """Where the place of the step is not as it is known, the operators alone are taken."""
    assert torchs_plan._place_of_step(Undecorated) is None
    monkeypatch.setattr(Undecorated, "step", decorated_otherwise)
    assert torchs_plan._place_of_step(Undecorated) is None
    monkeypatch.setattr(torchs_plan, "_place_of_step", lambda kind: None)
    before = places()
    ours, theirs = torchs(), torchs()
    taken = warpstep.status().taken
    with by_plans(0):
        step_both(ours, theirs, range(2))
    assert warpstep.status().taken - taken == 4
    assert places() == before
    assert_near(ours, theirs, 2)


def test_the_place_of_the_step_is_known():
    for kind in torchs_plan.KINDS:
        assert torchs_plan._place_of_step(kind) is not None


def test_what_someone_else_puts_there_stays():
    """It may hold ours, which passes on then."""
    place = torchs_plan._place_of_step(torch.optim.AdamW)
    torchs_own, calls = place.cell_contents, []
    warpstep.enable()
    ours = place.cell_contents

    def theirs(self, closure=None):
        calls.append(self)
        return ours(self, closure)

    place.cell_contents = theirs
    try:
        warpstep.disable()
        assert place.cell_contents is theirs
        with by_plans(0):
            take_steps(torchs(), range(1))
        assert len(calls) == 1
    finally:
        place.cell_contents = torchs_own
