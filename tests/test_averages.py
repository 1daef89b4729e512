"""ema_decay: against torch's AveragedModel, swapped in and out, in checkpoints, and refused."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import warpstep
from support.networks import model, train


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_agrees_with_averaged_model(backend, decay):
    """AveragedModel sees the very weights that warpstep's optimizer makes."""
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), lr=0.1, ema_decay=decay, backend=backend)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    train(net, optimizer, 20, after=lambda: theirs.update_parameters(net))
    averages = optimizer.ema_parameters()
    for param, expected in zip(net.parameters(), theirs.parameters(), strict=True):
        bound = 20 * 4 * 2**-24 * float(expected.detach().abs().max())
        torch.testing.assert_close(averages[param], expected.detach(), rtol=0, atol=bound)


def test_with_no_decay_the_average_is_the_weight(backend):
    """Exactly: written from the nearer end, or a large average would leave its rounding behind."""
    param = nn.Parameter(torch.full((70,), 1e8))
    optimizer = warpstep.AdamW([param], weight_decay=0.0, ema_decay=0.0, backend=backend)
    param.grad = torch.ones(70)
    optimizer.step()
    with torch.no_grad():
        param.fill_(1.2345)
    optimizer.step()
    assert torch.equal(optimizer.ema_parameters()[param], param.detach())


def test_a_decay_by_the_step(backend):
    """A callable is given the number of steps taken; a restart goes on counting."""
    seen = []

    def decay(step):
        seen.append(step)
        return min(0.99, (1 + step) / (10 + step))

    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=decay, backend=backend)
    expected = {}

    def follow():
        d = (1 + seen[-1]) / (10 + seen[-1])
        for param in net.parameters():
            now = param.detach().double()
            old = expected.get(param, now)
            expected[param] = d * old + (1 - d) * now

    seen.clear()
    train(net, optimizer, 5, after=follow)
    assert seen == [0, 1, 2, 3, 4]
    for param, average in optimizer.ema_parameters().items():
        torch.testing.assert_close(average.double(), expected[param], rtol=1e-6, atol=1e-7)

    resumed = warpstep.AdamW(net.parameters(), ema_decay=decay, backend=backend)
    saved = optimizer.state_dict()
    saved["state"][3] = {**saved["state"][3], "step": torch.tensor(2.0)}  # its gradient came later
    resumed.load_state_dict(saved)
    seen.clear()
    train(net, resumed, 1)
    assert seen == [5]


def test_a_decay_is_asked_for_in_a_steps_turn():
    """A step of another thread waits until this one has been taken, and has the next number."""
    seen, others = [], []

    def decay(step):
        seen.append(step)
        if step == 1 and not others:
            others.append(threading.Thread(target=optimizer.step))
            others[0].start()
            others[0].join(0.1)
        return 0.9

    param = nn.Parameter(torch.ones(8))
    optimizer = warpstep.AdamW([param], ema_decay=decay)
    seen.clear()
    param.grad = torch.ones(8)
    for _ in range(2):
        optimizer.step()
    others[0].join()
    assert seen == [0, 1, 2]
    assert optimizer.state[param]["step"] == 3


def test_swapped_in_and_back_exactly(backend):
    net = model().bfloat16()
    optimizer = warpstep.AdamW(net.parameters(), lr=0.1, ema_decay=0.9, backend=backend)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    own = [p.detach().clone() for p in net.parameters()]
    averages = optimizer.ema_parameters()
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():  # noqa: PT012 (its inside is tested)
        for param, before in zip(net.parameters(), own, strict=True):
            assert torch.equal(param, averages[param].bfloat16())
            assert not torch.equal(param, before)
        with pytest.raises(RuntimeError, match=r"step\(\) inside swap_ema\(\)"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside"), optimizer.swap_ema():
            pass
        raise ZeroDivisionError
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), own, strict=True))
    optimizer.step()


def test_checkpoints_carry_the_averages(backend, tmp_path):
    def run(steps, checkpoint=None):
        net = model()
        optimizer = warpstep.AdamW(net.parameters(), lr=0.1, ema_decay=0.9, backend=backend)
        if checkpoint is not None:
            weights, state = torch.load(checkpoint, weights_only=True)
            net.load_state_dict(weights)
            optimizer.load_state_dict(state)
        train(net, optimizer, steps, seed=steps)
        return net, optimizer

    net, optimizer = run(3)
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    train(net, optimizer, 4, seed=4)
    _, resumed = run(4, tmp_path / "checkpoint")
    for ours, theirs in zip(
        optimizer.ema_parameters().values(), resumed.ema_parameters().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_to_torch_and_back():
    """torch carries the averages along, and warpstep goes on where they were."""
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.9)
    train(net, optimizer, 2)
    torchs = torch.optim.AdamW(net.parameters())
    torchs.load_state_dict(optimizer.state_dict())
    train(net, torchs, 1)
    back = warpstep.AdamW(net.parameters(), ema_decay=0.9)
    back.load_state_dict(torchs.state_dict())
    for param, average in optimizer.ema_parameters().items():
        assert torch.equal(back.ema_parameters()[param], average)
    train(net, back, 1)


def test_averages_begun_in_the_middle_begin_as_the_weights(backend):
    net = model()
    plain = warpstep.AdamW(net.parameters(), backend=backend)
    train(net, plain, 3)
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.5, backend=backend)
    optimizer.load_state_dict(plain.state_dict())
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, 1)
    for (param, average), old in zip(optimizer.ema_parameters().items(), before, strict=True):
        expected = (param.detach() + old) / 2
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


def test_some_groups_with_an_average_and_some_without(backend):
    net = model()
    groups = [
        {"params": list(net[0].parameters()), "ema_decay": 0.9},
        {"params": list(net[2].parameters())},
    ]
    optimizer = warpstep.AdamW(groups, backend=backend)
    train(net, optimizer, 2)
    assert all("ema" in optimizer.state[p] for p in net[0].parameters())
    assert not any("ema" in optimizer.state[p] for p in net[2].parameters())
    optimizer.param_groups[1]["ema_decay"] = 0.5  # from now on
    train(net, optimizer, 1)
    assert all("ema" in optimizer.state[p] for p in net[2].parameters())
    optimizer.param_groups[1]["ema_decay"] = None
    kept = [optimizer.state[p]["ema"].clone() for p in net[2].parameters()]
    train(net, optimizer, 1)
    for param, average in zip(net[2].parameters(), kept, strict=True):
        assert torch.equal(optimizer.state[param]["ema"], average)


def test_an_average_moved_or_replaced_is_followed(backend):
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.5, backend=backend)
    train(net, optimizer, 1)
    first, second, *_ = net.parameters()
    optimizer.state[first]["ema"] = torch.zeros_like(first)
    optimizer.state[second]["ema"].data = torch.zeros_like(second)
    train(net, optimizer, 1)
    for param in (first, second):
        torch.testing.assert_close(
            optimizer.state[param]["ema"], param.detach() / 2, rtol=1e-6, atol=1e-8
        )


def to_loaded(optimizer, net, schedule):
    another = warpstep.AdamW(net.parameters(), ema_decay=schedule)
    another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return another


def to_rolled_back(optimizer, net, schedule):
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 3)
    optimizer.load_state_dict(saved)
    return optimizer


def schedule(step):
    return (1 + step) / (10 + step)


@pytest.mark.parametrize(
    "resumed",
    [
        to_loaded,
        to_rolled_back,
        lambda optimizer, net, schedule: copy.deepcopy(optimizer),
        lambda optimizer, net, schedule: pickle.loads(pickle.dumps(optimizer)),
    ],
    ids=["loaded", "rolled-back", "copied", "unpickled"],
)
def test_a_schedule_goes_on_in_what_is_resumed(resumed):
    """In the groups that have the optimizer's decay; another's is its own, though it is equal."""
    net = model()
    own = schedule(2)  # as the third step's
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "ema_decay": own}]
    optimizer = warpstep.AdamW(groups, ema_decay=schedule)
    if resumed is to_loaded:
        optimizer = warpstep.AdamW(net.parameters(), ema_decay=schedule)
    train(net, optimizer, 3)
    optimizer = resumed(optimizer, net, schedule)
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        param.grad = torch.ones_like(param)
    for step in range(3, 6):
        optimizer.step()
        first, *others = optimizer.param_groups
        assert first["ema_decay"] == schedule(step)
        assert all(group["ema_decay"] == own for group in others)


def test_a_decay_written_into_a_group_is_its_own_as_saved():
    net = model()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    optimizer = warpstep.AdamW(groups, ema_decay=schedule)
    train(net, optimizer, 2)
    scheduled = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[1]["ema_decay"] = 0.5
    train(net, optimizer, 1)
    edited = copy.deepcopy(optimizer.state_dict())
    for saved, step, expected in ((edited, 3, 0.5), (scheduled, 2, schedule(2))):
        another = warpstep.AdamW(copy.deepcopy(groups_of(optimizer)), ema_decay=schedule)
        for resumed in (another, optimizer):
            resumed.load_state_dict(copy.deepcopy(saved))
            for param in (p for group in resumed.param_groups for p in group["params"]):
                param.grad = torch.ones_like(param)
            resumed.step()
            found = [group["ema_decay"] for group in resumed.param_groups]
            assert found == [schedule(step), expected]


def groups_of(optimizer):
    return [{"params": group["params"]} for group in optimizer.param_groups]


def test_copies_keep_their_averages():
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.9)
    train(net, optimizer, 2)
    twin = copy.deepcopy({"net": net, "optimizer": optimizer})
    train(net, optimizer, 2, seed=5)
    train(twin["net"], twin["optimizer"], 2, seed=5)
    for ours, theirs in zip(
        optimizer.ema_parameters().values(),
        twin["optimizer"].ema_parameters().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), "0.9", lambda step: 2.0])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        warpstep.AdamW(model().parameters(), ema_decay=decay)


def test_a_decay_edited_later_is_refused_before_anything_changes(backend):
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.9, backend=backend)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["ema_decay"] = 1.5
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"Invalid ema_decay: 1.5 .* group 0"):
        train(net, optimizer, 1)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_an_average_has_at_least_the_parameters_precision():
    net = model()
    optimizer = warpstep.AdamW(net.parameters(), ema_decay=0.9, ema_dtype=torch.float16)
    train(net, optimizer, 1)
    before = [average.clone() for average in optimizer.ema_parameters().values()]
    optimizer.load_state_dict(optimizer.state_dict())
    assert {s["ema"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert all(map(torch.equal, optimizer.ema_parameters().values(), before))
    with pytest.raises(ValueError, match="Invalid ema_dtype"):
        warpstep.AdamW(net.parameters(), ema_dtype=torch.int32)


def test_no_averages_no_swap():
    optimizer = warpstep.AdamW(model().parameters())
    for use in (optimizer.ema_parameters, optimizer.swap_ema):
        with pytest.raises(RuntimeError, match="no averages are kept"):
            use()
    with pytest.raises(RuntimeError, match="no statistics"):
        optimizer.statistics()


@pytest.mark.parametrize("form", ["l2", None, 3])
def test_an_unknown_form_of_decay_is_refused(form):
    params = list(model().parameters())
    if form is not None:
        with pytest.raises(ValueError, match="Invalid decay_form"):
            warpstep.AdamW(params, decay_form=form)
    optimizer = warpstep.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0]["decay_form"] = form
    with pytest.raises(ValueError, match="Invalid decay_form"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("base_lr", [0.0, -1.0, None, float("nan")])
def test_an_independent_decay_needs_its_base_lr(base_lr):
    params = list(model().parameters())
    optimizer = warpstep.AdamW(params, decay_form="independent")
    params[0].grad = torch.ones_like(params[0])
    optimizer.param_groups[0]["base_lr"] = base_lr
    with pytest.raises(ValueError, match="Invalid base_lr"):
        optimizer.step()
    with pytest.raises(ValueError, match="Invalid base_lr"):
        warpstep.AdamW(params, lr=0.0, decay_form="independent")


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.9}, {"stats": True}, {"decay_form": "l1"}], ids=str
)
def test_differentiable_steps_have_no_tail(options):
    with pytest.raises(ValueError, match="not supported with `differentiable`"):
        warpstep.AdamW(model().parameters(), differentiable=True, **options)
