"""torch.ops.warpstep: what torch's own checks of operators say, and compiled against eager."""

import pytest
import torch

import warpstep
from support.lists import HYPERS, assert_same_lists, assert_within_bounds, clones, streams
from warpstep.functional import adam_, adamw_
from warpstep.lists import Options

OPERATORS = ["adamw_", "adam_"]
SMALL = [(3,), (4, 5), (0,)]


def operator(name, overload="default"):
    return getattr(getattr(torch.ops.warpstep, name), overload)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("overload", ["default", "tensor_lr"])
def test_opcheck(name, amsgrad, overload):
    """Schema, fake implementation, autograd registration and AOT dispatch hold."""
    lists = streams(SMALL)
    lists[4] = lists[4] if amsgrad else []
    options = {**HYPERS, "amsgrad": amsgrad}
    if overload == "tensor_lr":
        options["lr"] = torch.tensor(1e-2)
    torch.library.opcheck(operator(name, overload), tuple(lists), options)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_scaled(name):
    """The same with everything that writes, and everything optional."""
    scalars = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
    options = {**HYPERS, **scalars, "unscale_grads": True, "advance_steps": False}
    torch.library.opcheck(operator(name), (*streams(SMALL)[:4], [], streams(SMALL)[5]), options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True, "amsgrad": True},
        {"advance_steps": False},
        {"grad_scale": torch.tensor(4.0), "unscale_grads": True},
        {"found_inf": torch.tensor(1.0)},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize(("name", "function"), [("adamw_", adamw_), ("adam_", adam_)])
def test_is_the_functional(name, function, options):
    """Operator and function give the same bits."""
    lists, others = streams(), streams()
    operator(name)(*lists, **HYPERS, **options)
    function(*others, **HYPERS, **options)
    assert_same_lists(lists, others)


def test_every_written_list_is_declared():
    """All lists are mutable in the schema, and nothing is returned."""
    for name in OPERATORS:
        for overload in ("default", "tensor_lr"):
            schema = operator(name, overload)._schema
            written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            assert len(written) == 6 + 5  # those of low precision
            assert schema.returns == []


def test_odd_tensors():
    """What has no kernel goes by the reference; what is lazy the dispatcher refuses."""
    lists = streams([(4,), (4,)])
    lists[1][1] = lists[1][1].double()
    before = clones(lists)
    torch.ops.warpstep.adamw_(*lists, **HYPERS)
    assert_within_bounds(lists, before, 5)
    lists[1][0] = torch.randn(4, dtype=torch.complex64).conj().imag
    with pytest.raises(RuntimeError, match="negation"):
        torch.ops.warpstep.adamw_(*lists, **HYPERS)


def test_errors_come_through():
    """An operator's errors are the function's."""
    lists = streams([(3,)] * 2)
    lists[2].pop()
    with pytest.raises(ValueError, match="exp_avgs has 1 tensors"):
        torch.ops.warpstep.adamw_(*lists, **HYPERS)


def test_autograd_notices():
    """Backward through what the operator has overwritten raises."""
    param = torch.ones(3, requires_grad=True)
    hidden = param * 1
    loss = (hidden * hidden).sum()
    lists = streams([(3,)])
    with torch.no_grad():
        torch.ops.warpstep.adamw_([hidden], *lists[1:], **HYPERS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call", ["operator", "function"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_compiled(call, tensor_lr):
    """Whole under fullgraph=True, and of the eager call's bits."""
    called = torch.ops.warpstep.adamw_ if call == "operator" else adamw_
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2

    def step(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr):
        halves = [grad * 0.5 for grad in grads]
        hypers = {**HYPERS, "lr": lr}
        called(params, halves, exp_avgs, exp_avg_sqs, [], state_steps, **hypers)
        return [param * 2 for param in params]

    lists, others = streams(SMALL), streams(SMALL)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = [f(*ls[:4], ls[5], lr) for f, ls in ((compiled, lists), (step, others))]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_same_lists(lists, others)


def test_modes_see_the_operator():
    """A dispatch mode around the function sees one operator, and not a call past it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    lists = streams(SMALL)
    with Watching():
        adamw_(*lists, **HYPERS)
    assert seen == ["warpstep.adamw_.default"]


def test_nothing_to_step():
    """Under a mode too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        adamw_([], [], [], [], [], [], **HYPERS)


def test_fake_tensors():
    """Under FakeTensorMode nothing is computed, and nothing fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        lists = [[torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], []]
        adamw_(*lists, [torch.ones(())], **HYPERS)


def test_the_native_module_reads_the_options_in_their_order():
    module, _ = warpstep.backends.native()
    assert module.list_options == Options._fields
