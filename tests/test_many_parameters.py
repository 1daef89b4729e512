"""So many parameters that several threads look at them: no change is missed, wherever it stands."""

import functools
import os

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import programs
from support.parameters import params_of, random
from support.tolerance import bound

COUNT, SHAPE = 1100, (3, 2)
LR = 0.01
STEPS = 4
PLACES = [0, 127, 128, 700, COUNT - 1]  # a thread takes runs of 128


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 2))
    yield
    torch.set_num_threads(before)


@functools.cache
def numbers_of(step):
    """A step's gradients, and with 0 the parameters too. Drawn once, which takes ten times as long
    as to copy them.
    """
    return [random(SHAPE, 2000 * step + i) for i in range(COUNT)]


def optimizer_of(make, **options):
    params = [Parameter(numbers.clone()) for numbers in numbers_of(0)]
    return make(
        [{"params": params[:300]}, {"params": params[300:], "lr": LR / 2}], lr=LR, **options
    )


def set_grads_of(optimizer, step):
    for param, numbers in zip(params_of(optimizer), numbers_of(step), strict=True):
        param.grad = numbers.clone()


def grad_removed(optimizer, param):
    param.grad = None


def grad_elsewhere(optimizer, param):
    param.grad = param.grad.clone()


def grad_transposed(optimizer, param):
    param.grad = param.grad.t().contiguous().t()


def grad_of_a_subclass(optimizer, param):
    class Tagged(torch.Tensor):
        pass

    param.grad = param.grad.as_subclass(Tagged)


def memory_moved(optimizer, param):
    param.data = param.data.clone()


def memory_transposed(optimizer, param):
    param.data = param.data.t().contiguous().t()


def moment_moved(optimizer, param):
    moment = optimizer.state[param]["exp_avg_sq"]
    moment.data = moment.data.clone()


def moment_replaced(optimizer, param):
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()


def counter_replaced(optimizer, param):
    optimizer.state[param]["step"] = torch.tensor(1.0)


def counter_moved(optimizer, param):
    counter = optimizer.state[param]["step"]
    counter.data = counter.data.clone()


def state_removed(optimizer, param):
    del optimizer.state[param]


CHANGES = [
    *(grad_removed, grad_elsewhere, grad_transposed, grad_of_a_subclass),
    *(memory_moved, memory_transposed, moment_moved),
    *(moment_replaced, counter_replaced, counter_moved, state_removed),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(change, place):
    ours, torchs = optimizer_of(warpstep.AdamW), optimizer_of(torch.optim.AdamW, foreach=True)
    for step in range(STEPS):
        for optimizer in (ours, torchs):
            set_grads_of(optimizer, step)
            if step == 2:
                change(optimizer, params_of(optimizer)[place])
            optimizer.step()
    for i, (a, b) in enumerate(zip(params_of(ours), params_of(torchs), strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=bound(STEPS, LR, b)), f"parameter {i}"
        assert ours.state[a]["step"] == torchs.state[b]["step"], f"parameter {i}"


@pytest.mark.parametrize("place", PLACES)
def test_a_first_gradient_is_noticed(place):
    ours, torchs = optimizer_of(warpstep.AdamW), optimizer_of(torch.optim.AdamW, foreach=True)
    for step in range(STEPS):
        for optimizer in (ours, torchs):
            set_grads_of(optimizer, step)
            if step < 2:
                params_of(optimizer)[place].grad = None
            optimizer.step()
    a, b = params_of(ours)[place], params_of(torchs)[place]
    assert torch.allclose(a, b, rtol=0, atol=bound(STEPS, LR, b))
    assert ours.state[a]["step"] == torchs.state[b]["step"] == 2


@pytest.mark.parametrize("place", PLACES)
def test_an_error_names_the_parameter(place):
    optimizer = optimizer_of(warpstep.AdamW)
    set_grads_of(optimizer, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params_of(optimizer)]
    params_of(optimizer)[place].grad = torch.ones(SHAPE).to_sparse()
    group, index = (0, place) if place < 300 else (1, place - 300)
    with pytest.raises(RuntimeError, match=f"parameter {index} of group {group}.*sparse"):
        optimizer.step()
    for param, old in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(param, old)


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_written_to_after_clipping(place):
    optimizer = optimizer_of(warpstep.AdamW)
    for step in range(2):
        set_grads_of(optimizer, step)
        norm = optimizer.clip_grad_norm_(1.0)
        exact = torch.stack([p.grad.double().square().sum() for p in params_of(optimizer)]).sum()
        assert norm.item() == pytest.approx(exact.sqrt().item(), rel=torch.finfo(torch.float32).eps)
        if step == 0:
            optimizer.step()
    params_of(optimizer)[place].grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed after clip_grad_norm_\(\)"):
        optimizer.step()


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_the_same_bits_whatever_the_threads(threads):
    results = []
    for count in (torch.get_num_threads(), 1):
        torch.set_num_threads(count)
        optimizer = optimizer_of(warpstep.AdamW)
        for step in range(STEPS):
            set_grads_of(optimizer, step)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params_of(optimizer)]))
    assert torch.equal(*results)


# A gradient that answers through Python what it is: on a thread that has not the GIL it would wait
# for the one that has, which waits for it.
ANSWERS_IN_PYTHON = """
import sys
sys.path.insert(0, {tests!r})
import torch, warpstep
from test_many_parameters import optimizer_of, params_of, set_grads_of

ANSWERS = {{"device": torch.device("cpu"), "layout": torch.strided, "size": (3, 2),
            "stride": (2, 1), "dim": 2, "numel": 6}}

class Answering(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1].removeprefix("sym_")
        if name in ANSWERS:
            return ANSWERS[name]
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {{}}))

POLICIES = [{{"dispatch_sizes_strides_policy": policy}} for policy in ("sizes", "strides")]
KINDS = [{{"dispatch_device": True}}, {{"dispatch_layout": True}}, *POLICIES]
ours, twin = optimizer_of(warpstep.AdamW), optimizer_of(warpstep.AdamW)
for step, kind in enumerate([{{}}, {{}}, *KINDS]):
    for optimizer in (ours, twin):
        set_grads_of(optimizer, step)
    for place in (5, 1000) if kind else ():
        param = params_of(ours)[place]
        param.grad = torch.Tensor._make_subclass(Answering, param.grad, False, **kind)
    ours.step()
    twin.step()
print(all(torch.equal(a, b) for a, b in zip(params_of(ours), params_of(twin))))
"""


def test_gradients_that_answer_in_python():
    script = ANSWERS_IN_PYTHON.format(tests=os.path.dirname(__file__))
    done = programs.run(script)
    assert done.stdout == "True\n", done.stderr
