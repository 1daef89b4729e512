"""swap_ema restores the parameters whatever happens inside, and the optimizer goes on."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import warpstep
from support.parameters import take_steps


def stepped(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [("first", (6, 5)), ("victim", (4, 4)), ("last", (7,))]
    named = [(n, nn.Parameter(torch.randn(s, generator=generator))) for n, s in shapes]
    optimizer = warpstep.AdamW(named, lr=0.1, ema_decay=0.9, backend=backend)
    take_steps(optimizer, range(3))
    return optimizer, optimizer.param_groups[0]["params"]


def free(p):
    p.untyped_storage().resize_(0)


def set_data(make):
    def change(p):
        p.data = make(p.data)

    return change


def in_place(name, *arguments):
    def change(p):
        with torch.no_grad():
            getattr(p, name)(*arguments)

    return change


def resized(*shape):
    def change(p):
        p.requires_grad_(False).resize_(shape).requires_grad_()

    return change


def swap_for(make):
    def change(p):
        torch.utils.swap_tensors(p, nn.Parameter(make(p.detach())))

    return change


CHANGES = {
    "written": in_place("fill_", 7.0),
    "other-shape": set_data(lambda d: torch.ones(9)),
    "emptied": set_data(lambda d: torch.empty(0)),
    "other-dtype": set_data(lambda d: d.bfloat16()),
    "moved": set_data(lambda d: d.clone()),
    "transposed": set_data(lambda d: d.t()),
    "transposed-copy": set_data(lambda d: d.t().contiguous().t()),
    "freed": free,
    "transposed-in-place": in_place("t_"),
    "resized": resized(40, 40),
    "shrunk": resized(2),
    "another-storage": in_place("set_", torch.ones(3)),
    "swapped": swap_for(lambda d: torch.ones(2, 2)),
}


@pytest.mark.parametrize("raises", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_parameter_is_restored(backend, change, raises):
    optimizer, params = stepped(backend)
    control, others = stepped(backend)
    before = [p.detach().clone() for p in params]
    memory = [p.detach() for p in params]
    expected = pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext()
    with expected, optimizer.swap_ema():
        for p in params if change == "freed" else params[:2]:
            CHANGES[change](p)
        if raises:
            raise ZeroDivisionError
    for p, own, kept in zip(params, before, memory, strict=True):
        assert torch.equal(p, own)
        assert (p.stride(), p.dtype, p.device) == (own.stride(), own.dtype, own.device)
        assert p.data_ptr() == kept.data_ptr()  # what shared its memory does so again
    take_steps(optimizer, range(3, 5))
    take_steps(control, range(3, 5))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


class Stubborn(torch.Tensor):
    """Refuses to be written to once it is frozen."""

    frozen = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and Stubborn.frozen:
            raise PermissionError("frozen")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def stubborn(monkeypatch):
    monkeypatch.setattr(Stubborn, "frozen", False)
    first, last = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    middle = torch.ones(5).as_subclass(Stubborn).requires_grad_()
    named = [("first", first), ("middle", middle), ("last", last)]
    optimizer = warpstep.AdamW(named, lr=0.1, ema_decay=0.9)
    take_steps(optimizer, range(3))
    return optimizer, [first, middle, last]


def test_one_that_cannot_be_restored_is_named_after_the_others(stubborn):
    optimizer, params = stubborn
    before = [p.detach().clone() for p in params]
    message = r"parameter 1 of group 0 \('middle'\).*float32 of shape \(5,\).*frozen"
    with pytest.raises(RuntimeError, match=message), optimizer.swap_ema():  # noqa: PT012
        Stubborn.frozen = True
        params[0].data = torch.ones(1)
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])
    Stubborn.frozen = False
    take_steps(optimizer, range(3, 4))
    assert optimizer.state[params[1]]["step"].item() == 4


def test_one_that_left_its_kind_of_device_is_named():
    optimizer, params = stepped("auto")
    before = [p.detach().clone() for p in params]
    message = r"parameter 1 of group 0 \('victim'\).*on cpu and is now .* on meta"
    with pytest.raises(RuntimeError, match=message), optimizer.swap_ema():
        swap_for(lambda d: d.to("meta"))(params[1])
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])


def test_what_was_raised_inside_comes_first(stubborn):
    optimizer, _ = stubborn
    with pytest.raises(ZeroDivisionError) as caught, optimizer.swap_ema():  # noqa: PT012
        Stubborn.frozen = True
        raise ZeroDivisionError
    if hasattr(caught.value, "add_note"):  # Python 3.11; a warning before
        assert "'middle'" in caught.value.__notes__[0]
    Stubborn.frozen = False
    take_steps(optimizer, range(3, 4))


def test_a_signal_waits_until_all_are_restored(monkeypatch):
    from warpstep import swapping

    optimizer, params = stepped("auto")
    before = [p.detach().clone() for p in params]
    restore, interrupts = swapping._Own.restore, [KeyboardInterrupt(), None, None, None]

    def interrupted(own):
        restore(own)
        if interrupt := interrupts.pop(0):
            raise interrupt

    monkeypatch.setattr(swapping._Own, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.swap_ema():
        pass
    assert not interrupts
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    take_steps(optimizer, range(3, 4))


def test_groups_that_change_inside():
    optimizer, params = stepped("auto")
    before = [p.detach().clone() for p in params]
    groups = copy.copy(optimizer.param_groups)
    with optimizer.swap_ema():
        optimizer.param_groups.clear()
        params[1].data = torch.ones(2)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[:] = groups
    take_steps(optimizer, range(3, 4))


def test_autocast_casts_what_is_there():
    """Within one ``torch.autocast``, which keeps its casts of parameters until it ends."""
    model = nn.Linear(6, 5)
    optimizer = warpstep.AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    take_steps(optimizer, range(3))
    x = torch.ones(2, 6)

    def computed():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).detach()

    own = computed()
    with optimizer.swap_ema():
        averaged = computed()
    assert not torch.equal(own, averaged)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), own)
        with optimizer.swap_ema():
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), own)
