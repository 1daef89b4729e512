"""warpstep.SGD is torch's class: signature, groups, state, what changes in mid-run, GradScaler."""

import copy
import inspect
import math

import pytest
import torch
from torch.optim import lr_scheduler

import warpstep
from support.bits import assert_same
from support.parameters import SHAPES, new_params, params_of, random, set_grads, take_steps
from support.sgd_pairs import LR, assert_near, assert_states_near, both, bound, each_variant
from warpstep.plan import Plan


def run_both(pair, steps):
    for optimizer in pair:
        take_steps(optimizer, steps)


# ---- The class


def test_subclass_signature_and_repr():
    assert issubclass(warpstep.SGD, torch.optim.SGD)
    mine = dict(inspect.signature(warpstep.SGD).parameters)
    torchs = inspect.signature(torch.optim.SGD).parameters
    own = ("backend", "state_dtype", "decay_form", "ema_decay", "ema_dtype", "stats")
    for name in (*own, "unscale_grads", "master", "rounding", "seed", "copies"):
        mine.pop(name)
    described = {n: (p.kind, p.default) for n, p in mine.items()}
    assert described == {n: (p.kind, p.default) for n, p in torchs.items()}
    a, b = both(momentum=0.9, nesterov=True, weight_decay=0.1)
    assert repr(a) == repr(b)


@each_variant
def test_defaults_groups_and_state_have_torchs_keys(options):
    a, b = both(**options)
    assert a.defaults == b.defaults
    assert list(a.defaults) == list(b.defaults)
    assert a.step() is None
    assert not a.state
    run_both((a, b), range(2))
    assert [list(g) for g in a.param_groups] == [list(g) for g in b.param_groups]
    counts = options.get("momentum") and options.get("dampening")
    for p, q in zip(params_of(a), params_of(b), strict=True):
        keys = [*b.state.get(q, {}), *(["step"] if counts else [])]
        assert sorted(a.state.get(p, {})) == sorted(keys)
        for key, value in b.state.get(q, {}).items():
            mine = a.state[p][key]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]


def step_both(ours, theirs, step):
    """Every second step has a sparse gradient."""
    for optimizer in (ours, theirs):
        (param,) = params_of(optimizer)
        param.grad = random((6, 2), step)
        param.grad = param.grad.to_sparse() if step % 2 else param.grad
        optimizer.step()


@pytest.mark.parametrize("is_replaced", [False, True], ids=["constructed", "replaced"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients_are_torchs(momentum, is_replaced):
    """In turn with steps by kernels, which the first and the third are."""
    ours, theirs = (
        cls([torch.nn.Parameter(random((6, 2), 1))], lr=LR, momentum=momentum)
        for cls in (torch.optim.SGD if is_replaced else warpstep.SGD, torch.optim.SGD)
    )
    if is_replaced:
        warpstep.replace(ours)
    for step in range(4):
        step_both(ours, theirs, step)
    torch.testing.assert_close(params_of(ours), params_of(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("why", ["asked for", "gaps"])
def test_sparse_gradients_of_the_references_parameters_are_torchs(why, momentum):
    """As are all others, though the reference has stepped them before, which takes none."""

    def optimizer_of(cls, **options):
        wide = random((6, 2, 2), 1)
        one = wide[..., 0] if why == "gaps" else wide[..., 0].clone()
        return cls([torch.nn.Parameter(one)], lr=LR, momentum=momentum, **options)

    ours = optimizer_of(warpstep.SGD, backend="reference" if why == "asked for" else "cpu")
    theirs = optimizer_of(torch.optim.SGD)
    for step in range(4):
        step_both(ours, theirs, step)
        assert ours.plan is None or "reference: 1" in str(ours.plan)
    torch.testing.assert_close(params_of(ours), params_of(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [warpstep.SGD, warpstep.AdamW])
def test_a_sparse_gradient_of_the_references_parameter_is_named(cls):
    """Where it is refused: nothing is stepped, as with a plan of kernels."""
    params = [torch.nn.Parameter(random((6, 2), seed)) for seed in range(2)]
    more = {"stats": True} if cls is warpstep.SGD else {}
    optimizer = cls(params, lr=LR, backend="reference", **more)
    take_steps(optimizer, range(1))
    set_grads(params, 1)
    params[1].grad = params[1].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"sparse gradients.*parameter 1 of group 0"):
            call()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    "options",
    [
        {"stats": True},
        {"ema_decay": 0.9},
        {"decay_form": "decoupled"},
        {"state_dtype": torch.bfloat16, "momentum": 0.9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sparse_gradients_are_refused_where_torchs_step_does_not_do(options):
    param = torch.nn.Parameter(random((6, 2), 1))
    param.grad = random((6, 2), 2).to_sparse()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="SGD does, without options of warpstep's own"):
        warpstep.SGD([param], lr=LR, **options).step()
    assert torch.equal(param, before)


def test_sparse_gradients_are_not_zeroed_or_clipped_in_the_pass():
    param = torch.nn.Parameter(random((6, 2), 1))
    param.grad = random((6, 2), 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"zero_grads=True.*nor with sparse gradients"):
        warpstep.SGD([param], lr=LR).step(zero_grads=True)


INVALID = [
    {"lr": -1.0},
    {"lr": torch.zeros(2)},
    {"momentum": -0.5},
    {"weight_decay": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
    {"params": []},
    {"params": [torch.zeros(1), 7]},
    {"params": [{"params": [torch.zeros(1)], "lr": "big"}], "lr": -1.0},
]


@pytest.mark.parametrize("arguments", INVALID, ids=str)
def test_what_torch_refuses_is_refused_in_its_words(arguments):
    messages = []
    for kind in (warpstep.SGD, torch.optim.SGD):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            kind(**{"params": new_params(), **arguments})
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


OURS_INVALID = [
    ({"momentum": "0.9"}, TypeError, "momentum should be a number"),
    ({"dampening": None}, TypeError, "dampening should be a number"),
    ({"decay_form": "l2"}, ValueError, "Invalid decay_form"),
    ({"state_dtype": torch.int8}, ValueError, "Invalid state_dtype"),
    ({"ema_decay": 1.5}, ValueError, "Invalid ema_decay"),
    ({"backend": "tpu"}, ValueError, "backend"),
    ({"differentiable": True, "stats": True}, ValueError, "not supported with `differentiable`"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), OURS_INVALID, ids=str)
def test_invalid_arguments_of_ours(arguments, error, message):
    with pytest.raises(error, match=message):
        warpstep.SGD(new_params(), **arguments)


# ---- Steps


@each_variant
@pytest.mark.parametrize("ours", [{}, {"fused": True}, {"foreach": True}, {"backend": "reference"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_as_torch(options, ours, dtype):
    shapes = [*SHAPES, (0, 2), (1000,)]
    mine, theirs = new_params(shapes, dtype=dtype), new_params(shapes, dtype=dtype)
    a = warpstep.SGD(mine, lr=LR, **options, **ours)
    b = torch.optim.SGD(theirs, lr=LR, **options)
    run_both((a, b), range(6))
    assert_near(mine, theirs, 6)
    assert_states_near(a, b, 6)


SCHEDULERS = {
    "OneCycleLR": {"max_lr": LR, "total_steps": 12},  # cycles momentum
    "CyclicLR": {"base_lr": LR / 10, "max_lr": LR, "step_size_up": 4},  # cycles momentum
    "CosineAnnealingLR": {"T_max": 8},
}


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR), torch.tensor([LR], dtype=torch.float64)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name, lr):
    pair = both(lr=lr, momentum=0.9)
    seen = [[], []]
    for optimizer, of in zip(pair, seen, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = copy.deepcopy(lr)
        scheduler = getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])
        for step in range(10):
            take_steps(optimizer, [step])
            scheduler.step()
            of.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
    assert seen[0] == seen[1]
    assert len({lr for step in seen[0] for lr, _ in step}) > 1
    assert_near(params_of(pair[0]), params_of(pair[1]), 10)


def test_weight_decay_as_a_tensor():
    a, b = both(weight_decay=torch.tensor(0.1))
    run_both((a, b), range(3))
    assert_near(params_of(a), params_of(b), 3)


def edited(**values):
    def edit(optimizer):
        for group in optimizer.param_groups:
            group.update(values)

    return edit


def cleared(optimizer):
    optimizer.state.clear()


def replaced(optimizer):
    optimizer.state[params_of(optimizer)[1]].pop("momentum_buffer", None)


def grown(optimizer):
    more = [p.mul(2).detach().requires_grad_() for p in new_params([(4,), (3, 2)])]
    optimizer.add_param_group({"params": more, "momentum": 0.5, "lr": 2 * LR})


CHANGES = {
    "momentum-on": ({}, edited(momentum=0.9)),
    "momentum-on-dampened": ({"dampening": 0.4}, edited(momentum=0.9)),
    "momentum-and-dampening-on": ({}, edited(momentum=0.9, dampening=0.4)),
    "momentum-off": ({"momentum": 0.9}, edited(momentum=0)),
    "momentum-off-dampened": ({"momentum": 0.9, "dampening": 0.4}, edited(momentum=0.0)),
    "momentum-other": ({"momentum": 0.9}, edited(momentum=0.5)),
    "dampening-on": ({"momentum": 0.9}, edited(dampening=0.4)),
    "dampening-off": ({"momentum": 0.9, "dampening": 0.4}, edited(dampening=0)),
    "nesterov-on": ({"momentum": 0.9}, edited(nesterov=True)),
    "nesterov-off": ({"momentum": 0.9, "nesterov": True}, edited(nesterov=False)),
    "nesterov-without-momentum": ({}, edited(nesterov=True)),
    "maximize-on": ({"momentum": 0.9}, edited(maximize=True)),
    "decay-on": ({"momentum": 0.9}, edited(weight_decay=0.1)),
    "lr": ({"momentum": 0.9}, edited(lr=LR / 2)),
    "lr-tensor": ({"momentum": 0.9}, edited(lr=torch.tensor(LR / 2))),
    "group": ({"momentum": 0.9}, grown),
    "cleared": ({"momentum": 0.9}, cleared),
    "cleared-dampened": ({"momentum": 0.9, "dampening": 0.4}, cleared),
    "one-buffer-removed": ({"momentum": 0.9, "dampening": 0.4}, replaced),
}


@pytest.mark.parametrize("requested", ["auto", "reference"])
@pytest.mark.parametrize("case", CHANGES)
def test_changes_in_mid_run(case, requested):
    options, change = CHANGES[case]
    a, b = both({"backend": requested}, {"foreach": False}, **options)
    for optimizer in (a, b):
        take_steps(optimizer, range(3))
        change(optimizer)
        take_steps(optimizer, range(3, 6))
    assert_near(params_of(a), params_of(b), 6, 2 * LR)
    assert_states_near(a, b, 6)
    for optimizer in (a, b):  # and back again, where there is a way
        edited(**{k: optimizer.defaults[k] for k in options})(optimizer)
        take_steps(optimizer, range(6, 9))
    assert_near(params_of(a), params_of(b), 9, 2 * LR)


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_an_average_and_a_buffer_that_begins_later(dampening):
    """A dampened buffer begins with an undampened step; the count, and the average, with it."""
    a, b = both({"ema_decay": 0.9}, dampening=dampening)
    for optimizer in (a, b):
        take_steps(optimizer, range(2))
        edited(momentum=0.9)(optimizer)
        take_steps(optimizer, range(2, 4))
    assert_near(params_of(a), params_of(b), 4)
    assert {s["step"].item() for s in a.state.values()} == {2.0 if dampening else 4.0}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@each_variant
def test_complex_parameters(options, dtype):
    values = [random((9, 2), i, dtype=torch.float64) for i in range(2)]
    models = [
        [torch.view_as_complex(v).to(dtype).clone().requires_grad_() for v in values]
        for _ in range(2)
    ]
    a = warpstep.SGD(models[0], lr=LR, **options)
    b = torch.optim.SGD(models[1], lr=LR, foreach=False, **options)
    run_both((a, b), range(4))
    for p, q in zip(*models, strict=True):
        real = torch.view_as_real(q.detach())
        torch.testing.assert_close(p, q, rtol=0, atol=bound(4, LR, real))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 3), (0.9, 1)])  # a buffer is written over
def test_differentiable_is_torchs_own_step(momentum, steps):
    """Gradients go through the steps, to the learning rate too."""
    found = []
    for kind in (warpstep.SGD, torch.optim.SGD):
        lr = torch.tensor(LR, requires_grad=True)
        start = random((5,), 0).requires_grad_()
        param = start.clone()
        optimizer = kind([param], lr=lr, momentum=momentum, differentiable=True)
        for step in range(steps):
            param.grad = random((5,), 10 + step)
            optimizer.step()
        found.append(torch.autograd.grad(param.square().sum(), (start, lr)))
        assert found[-1][1] != 0
    assert_same(*found)


def test_closures_and_hooks():
    a, b = both(momentum=0.9)
    seen = []

    def closure_of(optimizer):
        def closure():
            seen.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((x * x).sum() for x in params_of(optimizer))
            loss.backward()
            return loss

        return closure

    handle = a.register_step_pre_hook(lambda *_: seen.append("pre"))
    a.register_step_post_hook(lambda *_: seen.append("post"))
    for _ in range(3):
        with torch.no_grad():
            mine, their = a.step(closure_of(a)), b.step(closure_of(b))
        assert mine.item() == pytest.approx(their.item(), rel=1e-5)
    assert seen == ["pre", True, "post", True] * 3
    handle.remove()
    # Gradients depend on the parameters: errors of one step enter the next gradient, 2 p.
    assert_near(params_of(a), params_of(b), 9)


def test_named_parameters():
    module = torch.nn.Linear(3, 2)
    optimizer = warpstep.SGD(module.named_parameters(), lr=LR, momentum=0.9)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    twin = torch.optim.SGD(copy.deepcopy(module).named_parameters(), lr=LR, momentum=0.9)
    run_both((optimizer, twin), range(2))
    a, b = optimizer.state_dict(), twin.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])


# ---- Gradients that are None

PRESENCE = {
    "first-late": [(0,), (0,), (), ()],
    "last-never": [(2,)] * 4,
    "none-at-first": [(0, 1, 2), (), (), ()],
    "vanishing": [(), (1,), (1,), ()],
    "by-turns": [(0,), (1,), (2,), (0, 1), (1, 2), ()] * 2,
}
# A parameter with a buffer, or that may get none, is in the plan without a gradient; one whose
# buffer is to begin with its first gradient is not.
PLANS = {"first-late": (1, 2), "last-never": (1, 1), "none-at-first": (1, 2), "vanishing": (1, 1)}
PLANS["by-turns"] = (1, 2)


@pytest.mark.parametrize("case", PRESENCE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_gradients_that_are_none(case, momentum, dampening, monkeypatch):
    plans = []
    init = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda *args: plans.append(1) or init(*args))
    pair = both(momentum=momentum, dampening=dampening)
    for step, skip in enumerate(PRESENCE[case]):
        for optimizer in pair:
            set_grads(params_of(optimizer), step, skip=skip)
            optimizer.step()
    a, b = pair
    assert_near(params_of(a), params_of(b), len(PRESENCE[case]))
    assert_states_near(a, b)
    assert len(plans) == PLANS[case][momentum != 0]


# ---- GradScaler


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-then-step"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.4}])
@pytest.mark.parametrize("bad", [None, 0, 2])
def test_grad_scaler(bad, options, fused, unscale):
    """Steps with an inf change nothing, the first among them; and nothing of the scaler stays."""
    a, b = both({"fused": fused}, {"foreach": False}, **options)
    for optimizer in (a, b):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        for step in range(4):
            set_grads(params_of(optimizer), step, scale=scaler.get_scale())
            if step == bad:
                params_of(optimizer)[2].grad[5] = math.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    assert getattr(a, "_step_supports_amp_scaling", False) == bool(fused)
    assert getattr(a, "found_inf", None) is None
    assert_near(params_of(a), params_of(b), 4)
    assert_states_near(a, b, 4)


def test_an_optimizer_that_waits_for_its_gradients_steps_wholly_or_not_at_all():
    """A sparse gradient among others: nothing is stepped, and the message names it."""
    params = new_params()
    optimizer = warpstep.SGD(params, lr=LR, momentum=0.9, stats=True)  # else the step is torch's
    set_grads(params)
    params[2].grad = params[2].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"sparse gradients.*parameter 2 of group 0"):
        optimizer.step()
    assert_same([p.detach() for p in params], before)
    assert not optimizer.state
