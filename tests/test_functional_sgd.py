"""warpstep.functional.sgd_ and sgdw_, and their operators: against the oracle, torch, the class."""

import itertools

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import sgd
from support.bits import assert_same_bits
from support.modes import Dispatched
from support.oracle import ROUNDOFF, TINY, stored, wide
from support.sgd import Options, Streams
from warpstep.functional import sgd_, sgdw_
from warpstep.recipes import real_dtype

SHAPES = [(1,), (3, 5), (257,), (0,), (2, 3, 4), (40_001,), ()]
FUNCTIONS = {"coupled": sgd_, "decoupled": sgdw_}
NAMES = ("params", "grads", "momentum_buffers", "state_steps")
OPTIONS = {
    name: options
    for name, options in sgd.OPTIONS.items()
    if options.decay_form in FUNCTIONS and not (options.dampening and not options.momentum)
}
MOMENTUM = Options(momentum=0.9, weight_decay=0.1)
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
both = pytest.mark.parametrize("function", [sgd_, sgdw_])


@pytest.fixture
def lists_backend(backend):
    if backend == "triton":
        pytest.skip("Triton takes no lists")
    return backend


def lists_of(shapes=SHAPES, dtypes=(torch.float32,) * 3, device="cpu", step=3.0, seed=0):
    """The four lists, in a state as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]
        for dtype in dtypes
    ]
    return [*made, [torch.full((), step, device=device) for _ in shapes]]


def clones(lists):
    return [[tensor.clone() for tensor in stream] for stream in lists]


def hypers_of(options, **more):
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    return {name: getattr(options, name) for name in names} | more


def call(options, lists, **more):
    FUNCTIONS[options.decay_form](*lists, **hypers_of(options), **more)


def assert_same(lists, others):
    for name, stream, other in zip(NAMES, lists, others, strict=True):
        for i, (a, b) in enumerate(zip(stream, other, strict=True)):
            assert torch.equal(a, b), f"{name}[{i}]"


def assert_within_bounds(after, before, options, first=False):
    """As support.sgd.assert_step, of lists."""
    for i, param in enumerate(before[0]):
        buffer = wide(before[2][i]) if options.momentum and not first else None
        if options.momentum and buffer is None and options.dampening == 0:
            buffer = wide(before[2][i])
        start = Streams(wide(param), buffer)
        exact, off, _ = sgd.step(start, wide(before[1][i]), options)
        compute = torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
        u, tiny = ROUNDOFF[compute] * (1 + 2.0**-10), 8 * TINY[compute]
        bound = stored(off.param * u + tiny, exact.param, real_dtype(param.dtype))
        sgd.check(f"params[{i}]", wide(after[0][i]), exact.param, bound)
        if options.momentum:
            kept = real_dtype(before[2][i].dtype)
            bound = stored(off.buffer * u + tiny, exact.buffer, kept)
            sgd.check(f"momentum_buffers[{i}]", wide(after[2][i]), exact.buffer, bound)


@each_options
@pytest.mark.parametrize("counted", [True, False])
def test_against_the_oracle(lists_backend, device, options, counted):
    """All streams are within the derived bounds; counters advance where there are any."""
    lists = lists_of(device=device)
    lists[2] = lists[2] if options.momentum else []
    lists[3] = lists[3] if counted else []
    before = clones(lists)
    call(options, lists, backend=lists_backend)
    assert_within_bounds(lists, before, options)
    assert all(map(torch.equal, lists[1], before[1]))
    assert [s.item() for s in lists[3]] == [4.0] * len(SHAPES) * counted


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_a_first_step_is_told_by_its_counter(lists_backend, device, dampening):
    options = Options(momentum=0.9, dampening=dampening)
    lists = lists_of(device=device, step=0.0)
    for buffer in lists[2]:
        buffer.zero_()
    before = clones(lists)
    call(options, lists, backend=lists_backend)
    assert_within_bounds(lists, before, options, first=True)
    assert all(map(torch.equal, lists[2], lists[1]))  # as torch: b is g
    call(options, lists, backend=lists_backend)
    expected = [0.9 * g + (1 - dampening) * g for g in lists[1]]
    for buffer, wanted in zip(lists[2], expected, strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64,) * 3,
        (torch.bfloat16,) * 3,
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),  # by the reference
        (torch.complex64,) * 3,
    ],
    ids=str,
)
@pytest.mark.parametrize("counted", [True, False])
def test_dtypes(lists_backend, device, dtypes, counted):
    lists = lists_of(dtypes=dtypes, device=device)
    lists[3] = lists[3] if counted else []
    before = clones(lists)
    call(MOMENTUM, lists, backend=lists_backend)
    assert_within_bounds(lists, before, MOMENTUM)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_near_torchs_kernel(lists_backend, device, momentum, nesterov):
    """A few roundings from torch's fused kernel after several steps."""
    options = Options(momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    lists = lists_of(device=device)
    lists[3] = []
    theirs = clones(lists)
    for seed in range(5):
        for i, (mine, other) in enumerate(zip(lists[1], theirs[1], strict=True)):
            mine.copy_(torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed + i)))
            other.copy_(mine)
        call(options, lists, backend=lists_backend)
        buffers = theirs[2] if momentum else []
        torch._fused_sgd_(*theirs[:2], buffers, **hypers_of(options), is_first_step=False)
    for mine, other in zip(lists[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_bits_of_the_optimizer(lists_backend, device, dampening):
    params = [Parameter(p) for p in lists_of(device=device)[0]]
    lists = [[p.detach().clone() for p in params], lists_of(device=device, seed=1)[1]]
    lists += [[torch.zeros_like(p) for p in lists[0]]]
    lists += [[torch.zeros((), device=device) for _ in params] if dampening else []]
    for p, g in zip(params, lists[1], strict=True):
        p.grad = g.clone()
    options = Options(momentum=0.9, dampening=dampening, weight_decay=0.1)
    optimizer = warpstep.SGD(params, **hypers_of(options), backend=lists_backend)
    for _ in range(3):
        optimizer.step()
        call(options, lists, backend=lists_backend)
    assert all(map(torch.equal, params, lists[0]))


@both
def test_advanced_steps_and_the_tail(lists_backend, device, function):
    """Counters that the caller has advanced; scaled gradients; a skipped step."""
    options = {"momentum": 0.9, "dampening": 0.3, "lr": 0.1, "weight_decay": 0.1}
    options["backend"] = lists_backend
    lists, advanced = lists_of(device=device), lists_of(device=device, step=4.0)
    function(*lists, **options)
    function(*advanced, **options, advance_steps=False)
    assert_same(lists, advanced)
    for uncounted, advances in ((lists, True), (advanced, False)):
        function(*uncounted[:3], [], **options, advance_steps=advances)
    assert_same(lists, advanced)  # the first says nothing of the second

    scale, inf = torch.tensor(8.0, device=device), torch.ones((), device=device)
    scaled = clones(lists)
    scaled[1] = [8 * grad for grad in scaled[1]]
    kept = clones(scaled)
    function(*scaled, **options, grad_scale=scale, found_inf=inf, unscale_grads=True)
    assert_same(scaled, kept)
    function(*scaled, **options, grad_scale=scale, found_inf=inf - 1, unscale_grads=True)
    function(*lists, **options)
    assert_same(scaled, lists)


def test_buffers_count_for_nothing_without_momentum(lists_backend, device):
    lists, without = lists_of(device=device), lists_of(device=device)
    without[2] = []
    kept = clones(lists)[2]
    for each in (lists, without):
        call(Options(weight_decay=0.1), each, backend=lists_backend)
    assert all(map(torch.equal, lists[0], without[0]))
    assert all(map(torch.equal, lists[2], kept))


def test_odd_tensors_among_others(lists_backend, device):
    """What has no kernel goes by the reference, with and without counters."""
    for counted in (True, False):
        lists = lists_of([(4,), (5,), (3,)], device=device)
        lists[1][1] = lists[1][1].double()
        lists[0][2] = torch.randn(3, 2, device=device)[:, 0]
        lists[3] = lists[3] if counted else []
        before = clones(lists)
        call(MOMENTUM, lists, backend=lists_backend)
        assert_within_bounds(lists, before, MOMENTUM)
        assert [s.item() for s in lists[3]] == [4.0] * 3 * counted


def test_without_native_module(monkeypatch):
    monkeypatch.setattr(warpstep.backends, "native", lambda: (None, "taken away"))
    lists = lists_of()
    before = clones(lists)
    call(MOMENTUM, lists)
    assert_within_bounds(lists, before, MOMENTUM)


def change(stream, index, tensor):
    return lambda lists: lists[NAMES.index(stream)].__setitem__(index, tensor)


BAD = {
    "no buffers": (lambda ls: ls[2].clear(), ValueError, "momentum_buffers has 0 tensors and para"),
    "few counters": (lambda ls: ls[3].pop(), ValueError, "state_steps has 2 tensors and params 3"),
    "buffer's shape": (
        change("momentum_buffers", 2, torch.ones(1)),
        RuntimeError,
        r"params\[2\].*momentum_buffers\[2\] is float32 of shape \(1,\)",
    ),
    "no tensor": (change("grads", 1, 3.0), TypeError, r"grads\[1\] is of type float"),
    "no counter": (
        change("state_steps", 1, torch.tensor(3)),
        TypeError,
        r"state_steps\[1\] is int64",
    ),
}


@pytest.mark.parametrize("name", BAD)
@both
def test_errors_name_the_tensor_and_change_nothing(lists_backend, function, name):
    spoil, kind, message = BAD[name]
    lists = lists_of([(3,)] * 3)
    spoil(lists)
    kept = [t for stream in lists for t in stream if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in kept]
    with pytest.raises(kind, match=message):
        function(*lists, **hypers_of(MOMENTUM), backend=lists_backend)
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "learning rate"),
        ({"momentum": "high"}, "momentum value"),
        ({"dampening": None}, "dampening value"),
        ({"nesterov": "yes"}, "nesterov flag"),
        ({"backend": "triton"}, "does not take lists"),
    ],
    ids=str,
)
def test_invalid_options(options, message):
    lists = lists_of([(3,)])
    before = clones(lists)
    with pytest.raises(ValueError, match=message):
        sgd_(*lists, **{**hypers_of(MOMENTUM), **options})
    assert_same(lists, before)


# torch.ops.warpstep
SMALL = [(3,), (4, 5), (0,)]


def operator(function, overload="default"):
    return getattr(getattr(torch.ops.warpstep, function.__name__), overload)


@both
@pytest.mark.parametrize("overload", ["default", "tensor_lr"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(function, overload, momentum):
    options = hypers_of(Options(momentum=momentum))
    if overload == "tensor_lr":
        options["lr"] = torch.tensor(0.1)
    lists = lists_of(SMALL)
    lists[2:] = lists[2:] if momentum else [[], []]
    torch.library.opcheck(operator(function, overload), tuple(lists), options)


@each_options
def test_the_operator_is_the_functional(options):
    lists, others = lists_of(), lists_of()
    operator(FUNCTIONS[options.decay_form])(*lists, **hypers_of(options))
    call(options, others)
    assert_same(lists, others)


@both
def test_every_written_list_is_declared(function):
    schema = operator(function)._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert tuple(written) == (*NAMES, "momentum_buffer_scales", "residuals", "copies")
    assert schema.returns == []


@both
def test_compiled_and_seen(function):
    """Whole under fullgraph=True, and of the eager call's bits; one operator under a mode."""

    def step(*lists):
        halves = [grad * 0.5 for grad in lists[1]]
        function(lists[0], halves, *lists[2:], **hypers_of(MOMENTUM))
        return [param * 2 for param in lists[0]]

    lists, others = lists_of(SMALL), lists_of(SMALL)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert all(map(torch.equal, compiled(*lists), step(*others)))
    assert_same(lists, others)

    with Dispatched() as mode:
        function(*lists, **hypers_of(MOMENTUM))
    function(*others, **hypers_of(MOMENTUM))
    assert mode.seen == [f"warpstep.{function.__name__}.default"]
    assert_same(lists, others)


def vmapped(function, lists, in_dims, **options):
    def step(*lists):
        function(*lists, **options)
        return lists[0][0]

    torch.vmap(step, in_dims=tuple(in_dims))(*lists)


@both
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("counted", ["own", "shared", "none"])
def test_vmap(function, momentum, counted):
    """A batch of tensors at once: the bits of an entry after the other."""
    entries = [lists_of([(3,), (4, 5)], seed=b, step=float(b)) for b in range(3)]
    stacked = [
        [torch.stack(tensors) for tensors in zip(*streams, strict=True)]
        for streams in zip(*entries, strict=True)
    ]
    in_dims = [0, 0, 0, 0]
    if counted == "shared":
        stacked[3] = [torch.full((), 2.0) for _ in range(2)]
        in_dims[3] = None
        for lists in entries:
            lists[3] = [torch.full((), 2.0) for _ in range(2)]
    if counted == "none":
        for lists in (stacked, *entries):
            lists[3] = []
    options = hypers_of(Options(momentum=momentum, dampening=0.3, weight_decay=0.1))
    vmapped(function, stacked, in_dims, **options)
    for b, lists in enumerate(entries):
        function(*lists, **options)
        for s, i in itertools.product(range(3), range(2)):
            assert torch.equal(stacked[s][i][b], lists[s][i]), NAMES[s]


def test_vmap_says_what_it_cannot_do():
    stacked = [[torch.ones(3, 4)] for _ in range(3)] + [[]]
    one = [[torch.ones(3, 4)], [torch.ones(3, 4)], [torch.ones(4)], []]
    options = hypers_of(MOMENTUM)
    vmapped(sgd_, stacked, (0, 0, 0, 0), **options)
    with pytest.raises(RuntimeError, match=r"writes to momentum_buffers\[0\]"):
        vmapped(sgd_, one, (0, 0, None, 0), **options)


@each_options
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_under_a_mode_is_the_operators(options, scaled):
    """And gives the bits of a launch; dampened momentum counts its steps."""
    watched, launched = [], []
    for params in (watched, launched):
        params += [Parameter(p) for p in lists_of()[0]]
    kinds = {"decay_form": options.decay_form} if options.decay_form != "coupled" else {}
    ours, theirs = (warpstep.SGD(p, **hypers_of(options), **kinds) for p in (watched, launched))
    for step in range(3):
        for optimizer, params in ((ours, watched), (theirs, launched)):
            for param, grad in zip(params, lists_of(seed=step + 1)[1], strict=True):
                param.grad = grad
            if scaled:
                optimizer.grad_scale = torch.tensor(4.0)
                optimizer.found_inf = torch.tensor(float(step == 1))
        with Dispatched() as mode:
            ours.step()
        theirs.step()
        name = FUNCTIONS[options.decay_form].__name__
        assert [f for f in mode.seen if f.startswith("warpstep.")] == [f"warpstep.{name}.default"]
    assert_same_bits(ours, theirs)
