"""Steps inside torch.func's transforms: jvp and grad as torch's fused optimizer, and vmap."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.lists import HYPERS, assert_same_lists
from warpstep.functional import adam_, adamw_

B = 3  # entries of a batch
LR = 1e-2
EPS = torch.finfo(torch.float32).eps


def stepped(kind, x, in_grad, **options):
    """A parameter made inside a transform and stepped twice, times x."""
    param = Parameter(torch.linspace(-1, 1, 4))
    optimizer = kind([param], lr=LR, **options)
    for _ in range(2):
        param.grad = x if in_grad else torch.ones(4)
        optimizer.step()
    return param * x


OURS = {
    "operator": {},
    "fused": {"fused": True},
    "reference": {"backend": "reference"},
    "tail": {"ema_decay": 0.5, "stats": True},
}
ours = pytest.mark.parametrize("options", OURS.values(), ids=OURS)
in_grad = pytest.mark.parametrize("in_grad", [False, True], ids=["x elsewhere", "x the gradient"])


@ours
@in_grad
def test_jvp(options, in_grad):
    x, tangent = torch.linspace(1, 2, 4), torch.ones(4)

    def jvp(kind, **options):
        return torch.func.jvp(lambda x: stepped(kind, x, in_grad, **options), (x,), (tangent,))

    found, expected = jvp(warpstep.AdamW, **options), jvp(torch.optim.AdamW, fused=True)
    torch.testing.assert_close(found[0], expected[0], rtol=16 * EPS, atol=LR * EPS)
    by_operations = "backend" in options or "stats" in options
    if not (in_grad and by_operations):  # which have a tangent of their own, as torch's for-loop
        torch.testing.assert_close(found[1], expected[1], rtol=16 * EPS, atol=LR * EPS)


@ours
@in_grad
def test_grad(options, in_grad):
    x = torch.linspace(1, 2, 4)

    def grad(kind, **options):
        return torch.func.grad(lambda x: stepped(kind, x, in_grad, **options).sum())(x)

    found, expected = grad(warpstep.AdamW, **options), grad(torch.optim.AdamW, fused=True)
    torch.testing.assert_close(found, expected, rtol=16 * EPS, atol=LR * EPS)


def test_a_captured_optimizer_steps():
    """Parameters from outside, as a training loop that is differentiated by its input has them."""
    found = []
    for kind in (warpstep.AdamW, torch.optim.AdamW):
        param = Parameter(torch.ones(4))
        optimizer = kind([param], lr=LR, fused=True)
        param.grad = torch.ones(4)
        optimizer.step()

        def loss(x, param=param, optimizer=optimizer):
            optimizer.step()
            return (param * x).sum()

        found.append((torch.func.grad(loss)(torch.ones(4)).detach(), param.detach()))
        assert optimizer.state[param]["step"] == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * EPS, atol=0)


# ------------------------------------------------------------------------------------------- vmap


def batch(seed=0, steps="own", size=B):
    """Two tensors' six lists, each with a first dimension that counts the batch."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape):
        return torch.randn((size, *shape), generator=generator)

    shapes = [(3, 5), ()]
    counters = torch.arange(1.0, 1 + size) if steps == "own" else torch.tensor(4.0)
    return [
        [random(s) for s in shapes],
        [random(s) for s in shapes],
        [random(s) * 0.1 for s in shapes],
        [random(s).abs() for s in shapes],
        [random(s).abs() for s in shapes],
        [counters.clone() for _ in shapes],
    ]


def entry(lists, b):
    """One entry of a batch, as views."""
    return [[t[b] if t.dim() else t for t in stream] for stream in lists]


def vmapped(function, lists, in_dims, **options):
    def step(lists, options):
        function(*lists, **{**HYPERS, **options})
        return torch.zeros(())

    torch.vmap(step, in_dims=(in_dims, dict.fromkeys(options, 0)))(lists, options)


@pytest.mark.parametrize("function", [adamw_, adam_])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_counters_of_their_own(function, amsgrad):
    """A batch of models of different ages: the bits of a loop over the entries."""
    lists, others = batch(), batch()

    def step(lists):
        function(*lists, **HYPERS, amsgrad=amsgrad)
        return lists[0][0] * 1

    torch.vmap(step)(lists)
    for b in range(B):
        function(*entry(others, b), **HYPERS, amsgrad=amsgrad)
    assert_same_lists(lists, others)


@pytest.mark.parametrize("grads", ["own", "shared"])
def test_a_shared_counter(grads):
    """It is advanced once; a gradient may be shared too."""
    lists, others = batch(steps="shared"), batch(steps="shared")
    dims = [[0, 0]] * 5 + [[None, None]]
    if grads == "shared":
        dims[1] = [None, None]
        lists[1] = [g[0] for g in lists[1]]
        others[1] = [g[:1].expand(g.shape).clone() for g in others[1]]
    vmapped(adamw_, lists, dims)
    adamw_(*others, **HYPERS)
    assert_same_lists(lists, others, [0, 2, 3, 4, 5])
    assert all(step == 5 for step in lists[5])


def test_other_dimensions_and_nesting():
    """The batch may be any dimension, and several."""
    lists, others = batch(steps="shared"), batch(steps="shared")
    for stream in (lists, others):
        for s in range(6):
            stream[s].pop()
    adamw_(*others, **HYPERS)

    def step(*tensors):
        adamw_(*([t] for t in tensors), **HYPERS)
        return tensors[0] * 1

    inner = torch.vmap(step, in_dims=(2 - 1, *[1] * 4, None))
    torch.vmap(inner, in_dims=(*[0] * 5, None))(*(s[0] for s in lists))
    assert_same_lists(lists, others)


@pytest.mark.parametrize("name", ["lr", "grad_scale", "found_inf"])
def test_scalars_of_their_own(name):
    """One learning rate an entry, as a sweep has: the bits of a loop."""
    lists, others = batch(), batch()
    values = torch.tensor([0.0, 1e-3, 0.5]) + (name == "grad_scale")
    vmapped(adamw_, lists, [[0, 0]] * 6, **{name: values})
    for b in range(B):
        adamw_(*entry(others, b), **{**HYPERS, name: values[b]})
    assert_same_lists(lists, others)


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size):
    lists = batch(size=size)
    vmapped(adamw_, lists, [[0, 0]] * 6)
    assert all(torch.equal(s, torch.arange(2.0, 2 + size)) for s in lists[5])


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (0, r"writes to params\[0\].*while grads\[0\] is vmapped.*stack params.*in_dims"),
        (3, r"writes to exp_avg_sqs\[0\].*while params\[0\] is vmapped"),
    ],
)
def test_one_tensor_cannot_take_a_batch(shared, message):
    """And nothing is written before that is known."""
    lists, before = batch(steps="shared"), batch(steps="shared")
    dims = [[0, 0] for _ in range(5)] + [[None, None]]
    dims[shared] = [None, None]
    lists[shared] = [t[0].clone() for t in lists[shared]]
    before[shared] = [t[0] for t in before[shared]]
    with pytest.raises(RuntimeError, match=message):
        vmapped(adamw_, lists, dims)
    assert_same_lists(lists, before)


def test_a_counter_cannot_take_a_batch_of_skips():
    lists = batch(steps="shared")
    dims = [[0, 0]] * 5 + [[None, None]]
    with pytest.raises(RuntimeError, match=r"state_steps\[0\].*while found_inf is vmapped"):
        vmapped(adamw_, lists, dims, found_inf=torch.tensor([0.0, 1.0, 0.0]))


def test_errors_come_through():
    lists = batch()
    lists[2].pop()
    with pytest.raises(ValueError, match="exp_avgs has 1 tensors and params 2"):
        vmapped(adamw_, lists, [[0] * len(stream) for stream in lists])


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_optimizers_inside(options):
    """An ensemble: each entry's optimizer as it would be alone, to the bit."""
    start = torch.randn(B, 5, generator=torch.Generator().manual_seed(0))

    def train(x):
        param = x.clone()
        optimizer = warpstep.AdamW([param], lr=LR, **options)
        for _ in range(3):
            param.grad = param * 2
            optimizer.step()
        return param

    expected = torch.stack([train(x) for x in start])
    assert torch.equal(torch.vmap(train)(start), expected)


def test_an_optimizer_outside_says_what_to_do():
    param = Parameter(torch.ones(5))
    optimizer = warpstep.AdamW([param], lr=LR)

    def train(x):
        param.grad = x
        optimizer.step()
        return x

    with pytest.raises(RuntimeError, match="Give each entry of the batch its own"):
        torch.vmap(train)(torch.ones(B, 5))
