"""warpstep.functional: lists of tensors against the oracle and torch's kernel; every error."""

import pytest
import torch

import warpstep
from support.lists import (
    HYPERS,
    NAMES,
    SHAPES,
    assert_same_lists,
    assert_within_bounds,
    clones,
    flat,
    streams,
)
from warpstep.functional import adam_, adamw_


@pytest.fixture
def lists_backend(backend):
    if backend == "triton":
        pytest.skip("Triton takes no lists")
    return backend


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("function", [adamw_, adam_])
def test_against_the_oracle(lists_backend, device, function, amsgrad, maximize):
    """All streams are within the derived bounds, the counters advance, gradients stay."""
    lists = streams(device=device)
    before = clones(lists)
    options = {"amsgrad": amsgrad, "maximize": maximize}
    function(*lists, **HYPERS, **options, backend=lists_backend)
    assert_within_bounds(lists, before, 5, coupled=function is adam_, **options)
    assert_same_lists(lists, before, [1] if amsgrad else [1, 4])
    assert {s.item() for s in lists[5]} == {5.0}


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64,) * 3,
        (torch.bfloat16,) * 3,
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),  # by the reference
    ],
    ids=str,
)
def test_dtypes(lists_backend, device, dtypes):
    """Recipes with a kernel and without one."""
    lists = streams(dtypes=dtypes, device=device)
    before = clones(lists)
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 5)


def test_mixed_recipes_take_a_launch_each(lists_backend, device):
    """Tensors of several recipes in one list are all stepped."""
    some = [streams(dtypes=(d,) * 3, device=device) for d in (torch.float32, torch.bfloat16)]
    lists = [a[:3] + b + a[3:] for a, b in zip(*some, strict=True)]
    before = clones(lists)
    launches = warpstep.status().launches
    adamw_(*lists, **HYPERS, backend=lists_backend)
    if lists_backend != "reference":
        assert warpstep.status().launches[lists_backend] - launches[lists_backend] == 2
    assert_within_bounds(lists, before, 5)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_near_torchs_kernel(lists_backend, device, amsgrad):
    """A few roundings from torch's fused kernel after several steps."""
    lists = streams(device=device, step=0.0)
    theirs = clones(lists)
    for seed in range(5):
        for mine, other in zip(lists[1], theirs[1], strict=True):
            other.copy_(torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed)))
            mine.copy_(other)
        adamw_(*lists, **HYPERS, amsgrad=amsgrad, backend=lists_backend)
        torch._foreach_add_(theirs[5], 1)
        maxima = theirs[4] if amsgrad else []
        torch._fused_adamw_(
            *theirs[:4], maxima, theirs[5], **HYPERS, amsgrad=amsgrad, maximize=False
        )
    for mine, other in zip(lists[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-6, atol=3e-7)


def test_advanced_steps(lists_backend, device):
    """With advance_steps=False the counters say which step this is, and stay."""
    lists, advanced = streams(device=device), streams(device=device, step=5.0)
    adamw_(*lists, **HYPERS, backend=lists_backend)
    adamw_(*advanced, **HYPERS, advance_steps=False, backend=lists_backend)
    assert_same_lists(lists, advanced)


def test_counters_in_float64(lists_backend, device):
    """As torch makes them where that is its default dtype."""
    lists = streams(device=device)
    lists[5] = [step.double() for step in lists[5]]
    before = clones(lists)
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 5)
    assert all(step.dtype == torch.float64 and step == 5 for step in lists[5])


def test_shared_counter(lists_backend, device):
    """One counter for all tensors is fine if the caller advances it, and an error if not."""
    lists = streams(device=device, step=5.0)
    apart = clones(lists)
    shared = [*lists[:5], lists[5][:1] * len(SHAPES)]
    adamw_(*shared, **HYPERS, advance_steps=False, backend=lists_backend)
    adamw_(*apart, **HYPERS, advance_steps=False, backend=lists_backend)
    assert_same_lists(shared, apart)
    with pytest.raises(RuntimeError, match=r"state_steps\[1\].*its own"):
        adamw_(*shared, **HYPERS, backend=lists_backend)
    assert_same_lists(shared, apart)


@pytest.mark.parametrize("gaps", [False, True])
def test_a_counter_of_tensors_far_apart(gaps, lists_backend, device):
    """Of other dtypes between them, or with one that the reference steps: nothing is written."""
    lists = [
        [*a[:1], *b[:1], *c[-2:]]
        for a, b, c in zip(
            streams(device=device),
            streams(dtypes=(torch.bfloat16,) * 3, device=device),
            streams(device=device, seed=1),
            strict=True,
        )
    ]
    if gaps:
        for some in lists[:5]:
            some[2] = torch.ones(6, 4, device=device)[:, ::2]
    counters = lists[5]
    counters[3] = counters[0].view(())  # another tensor of the same memory
    before = clones(lists)
    with pytest.raises(RuntimeError, match=r"state_steps\[3\] is state_steps\[0\].*its own"):
        adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_same_lists(lists, before)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scale(lists_backend, device, unscale):
    """Gradients are divided by it in registers, and in memory if asked for, in any order."""
    lists = streams(device=device)
    lists[1][1] = lists[1][1].t().contiguous().t()
    before = clones(lists)
    scale = torch.tensor(8.0, device=device)
    options = {"unscale_grads": unscale, "backend": lists_backend}
    adamw_(*lists, **HYPERS, grad_scale=scale, found_inf=torch.zeros((), device=device), **options)
    assert_within_bounds(lists, before, 5, grad_scale=8.0)
    expected = [g / 8 for g in before[1]] if unscale else before[1]
    for grad, wanted in zip(lists[1], expected, strict=True):
        assert torch.equal(grad, wanted)


def test_found_inf(lists_backend, device):
    """Nothing at all is changed, the gradients included."""
    lists = streams(device=device)
    before = clones(lists)
    tail = {name: torch.ones((), device=device) for name in ("grad_scale", "found_inf")}
    adamw_(*lists, **HYPERS, **tail, unscale_grads=True, backend=lists_backend)
    assert_same_lists(lists, before)


def test_lr_tensor(lists_backend, device):
    """A learning rate in a tensor gives the bits of the number."""
    lists = streams(device=device)
    others = clones(lists)
    adamw_(*lists, **{**HYPERS, "lr": torch.tensor(0.5)}, backend=lists_backend)
    adamw_(*others, **{**HYPERS, "lr": 0.5}, backend=lists_backend)
    assert_same_lists(lists, others)


def test_layouts(lists_backend, device):
    """Views with gaps, other orders of dimensions and gradients of other strides: right, no more
    memory than theirs written."""
    base = torch.zeros(6, 8, 5, device=device)
    param = base[:, 1:4]
    transposed = torch.randn(5, 7, device=device).t()
    params = [param, transposed]
    lists = [
        params,
        [torch.randn(p.shape, device=device) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [],
        [torch.zeros((), device=device) for _ in params],
    ]
    before = clones(lists)
    before[4] = before[3]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 1)
    assert not base[:, 0].any()
    assert not base[:, 4:].any()
    assert base[:, 1:4].all()


def test_complex_and_lazy(lists_backend, device):
    """Complex tensors are pairs of real ones; lazily conjugated and negated gradients count."""
    z = torch.randn(9, dtype=torch.complex64, device=device)
    grad = torch.randn(9, dtype=torch.complex64, device=device)
    one = torch.randn(1, dtype=torch.complex64, device=device)
    params = [z, torch.randn(1, device=device)]
    grads = [grad.conj(), one.conj().imag]
    assert grads[0].is_conj()
    assert grads[1].is_neg()
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    lists = [params, grads, *moments, [], [torch.zeros((), device=device) for _ in params]]
    before = clones(lists)
    before[1] = [g.resolve_conj().resolve_neg() for g in before[1]]
    before[4] = before[3]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 1)


@pytest.mark.parametrize("kind", ["negated", "conjugated"])
def test_lazy_alone(lists_backend, device, kind):
    """One lazy gradient, with nothing else in the lists that a kernel could refuse."""
    z = torch.randn(1, dtype=torch.complex64, device=device).conj()
    grad = z.imag if kind == "negated" else z
    lists = [[torch.ones_like(grad.resolve_neg().resolve_conj())], [grad]]
    lists += [[torch.zeros_like(lists[0][0])] for _ in range(2)]
    lists += [[], [torch.zeros((), device=device)]]
    before = clones(lists)
    before[1] = [grad.resolve_neg().resolve_conj()]
    before[4] = before[3]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 1)


@pytest.mark.parametrize("stream", [2, 3, 4])
def test_moments_of_different_dtypes(lists_backend, device, stream):
    """A moment in another format than the others is read as what it is."""
    lists = streams(device=device)
    lists[stream] = [moment.bfloat16() for moment in lists[stream]]
    before, wide = clones(lists), clones(lists)
    wide[stream] = [moment.float() for moment in wide[stream]]
    adamw_(*lists, **HYPERS, amsgrad=True, backend=lists_backend)
    adamw_(*wide, **HYPERS, amsgrad=True, backend="reference")
    for s in range(6):
        for mine, other, was in zip(lists[s], wide[s], before[s], strict=True):
            assert mine.dtype == was.dtype
            close = {"rtol": 1e-2, "atol": 1e-3} if s == stream else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(mine.float(), other.float(), **close)


def test_subclass_goes_by_the_reference(lists_backend, device):
    """What intercepts operations is stepped through them, the others by the kernel."""

    class Watched(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    lists = streams([(4,), (5,)], device=device)
    lists[0][1] = lists[0][1].as_subclass(Watched)
    before = [[t.detach().as_subclass(torch.Tensor).clone() for t in s] for s in lists]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    plain = [[t.detach().as_subclass(torch.Tensor) for t in s] for s in lists]
    assert_within_bounds(plain, before, 5)


def test_gaps_in_every_stream(lists_backend, device):
    """Gaps that all streams share are no table's either: what lies in them stays."""
    wide = [torch.ones(4, 6, device=device) for _ in range(4)]
    lists = [[w[:, ::2]] for w in wide] + [[], [torch.zeros((), device=device)]]
    before = clones(lists)
    before[4] = before[3]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    assert_within_bounds(lists, before, 1)
    assert all((w[:, 1::2] == 1).all() for w in wide)


def test_sequences_and_nothing(lists_backend, device):
    """Tuples do as well as lists; empty lists are a step of nothing."""
    lists = streams([(3,)], device=device)
    others = clones(lists)
    adamw_(*map(tuple, lists), **HYPERS, backend=lists_backend)
    adamw_(*others, **HYPERS, backend=lists_backend)
    assert_same_lists(lists, others)
    adamw_([], [], [], [], [], [], **HYPERS, backend=lists_backend)


def test_versions(lists_backend, device):
    """What is written to is newer for autograd afterwards."""
    lists = streams([(3,)], device=device)
    before = [t._version for t in flat(lists)]
    adamw_(*lists, **HYPERS, backend=lists_backend)
    newer = [t._version > v for t, v in zip(flat(lists), before, strict=True)]
    assert newer == [True, False, True, True, False, True]
    before = [t._version for t in flat(lists)]
    options = {"amsgrad": True, "unscale_grads": True, "advance_steps": False}
    scale = torch.ones((), device=device)
    adamw_(*lists, **HYPERS, **options, grad_scale=scale, backend=lists_backend)
    newer = [t._version > v for t, v in zip(flat(lists), before, strict=True)]
    assert newer == [True, True, True, True, True, False]


def change(lists, stream, index, tensor):
    lists[NAMES.index(stream)][index] = tensor


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


BAD = {
    "shorter list": (lambda ls: ls[2].pop(), ValueError, r"exp_avgs has 2 tensors and params 3"),
    "no counters": (lambda ls: ls[5].clear(), ValueError, r"state_steps has 0 tensors"),
    "no maxima": (lambda ls: ls[4].clear(), ValueError, r"max_exp_avg_sqs has 0"),
    "no tensor": (
        lambda ls: change(ls, "grads", 1, 3.0),
        TypeError,
        r"grads\[1\] is of type float",
    ),
    "gradient's shape": (
        lambda ls: change(ls, "grads", 1, torch.ones(4)),
        RuntimeError,
        r"params\[1\].*its gradient is float32 of shape \(4,\)",
    ),
    "gradient's dimensions": (
        lambda ls: change(ls, "grads", 1, torch.ones(3, 1)),
        RuntimeError,
        r"params\[1\].*its gradient is float32 of shape \(3, 1\)",
    ),
    "moment's shape": (
        lambda ls: change(ls, "exp_avg_sqs", 2, torch.ones(1)),
        RuntimeError,
        r"params\[2\].*exp_avg_sqs\[2\] is float32 of shape \(1,\)",
    ),
    "moment's device": (
        lambda ls: change(ls, "exp_avgs", 0, torch.ones(3, device="meta")),
        RuntimeError,
        r"exp_avgs\[0\] is .* on meta",
    ),
    "gradient's device": (
        lambda ls: change(ls, "grads", 2, torch.ones(3, device="meta")),
        RuntimeError,
        r"params\[2\].*on meta",
    ),
    "moment's kind": (
        lambda ls: change(ls, "exp_avgs", 0, torch.ones(3, dtype=torch.complex64)),
        TypeError,
        r"exp_avgs\[0\] is complex64",
    ),
    "integers": (
        lambda ls: change(ls, "params", 1, torch.ones(3, dtype=torch.int64)),
        TypeError,
        r"params\[1\] is int64",
    ),
    "float8": (
        lambda ls: change(ls, "params", 1, torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        r"params\[1\].*float8_e4m3fn.*has to be one of torch",
    ),
    "sparse": (
        lambda ls: change(ls, "grads", 1, torch.ones(3).to_sparse()),
        RuntimeError,
        r"grads\[1\] is of layout torch.sparse_coo",
    ),
    "freed parameter": (
        lambda ls: change(ls, "params", 1, freed()),
        RuntimeError,
        r"params\[1\] has 3 elements and no memory",
    ),
    "freed gradient": (
        lambda ls: change(ls, "grads", 1, freed()),
        RuntimeError,
        r"params\[1\]'s gradient has 3 elements and no memory",
    ),
    "freed moment": (
        lambda ls: change(ls, "exp_avgs", 1, freed()),
        RuntimeError,
        r"exp_avgs\[1\] has elements and no memory",
    ),
    "expanded": (
        lambda ls: change(ls, "params", 1, torch.ones(1).expand(3)),
        RuntimeError,
        r"params\[1\] is an expanded tensor",
    ),
    "step of two": (
        lambda ls: change(ls, "state_steps", 1, torch.ones(2)),
        TypeError,
        r"state_steps\[1\] is float32 of shape \(2,\)",
    ),
    "integer step": (
        lambda ls: change(ls, "state_steps", 1, torch.tensor(3)),
        TypeError,
        r"state_steps\[1\] is int64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_tensor_and_change_nothing(lists_backend, device, name):
    """Each thing that can be wrong is told with its list and index, before anything is written."""
    if device != "cpu":
        pytest.skip("the cases are tensors of the CPU")
    spoil, kind, message = BAD[name]
    lists = streams([(3,)] * 3)
    spoil(lists)
    kept = [t for t in flat(lists) if isinstance(t, torch.Tensor)]
    kept = [t for t in kept if t.layout == torch.strided and t.device.type == "cpu"]
    kept = [t for t in kept if t.untyped_storage().size()]
    before = [t.clone() for t in kept]
    with pytest.raises(kind, match=message):
        adamw_(*lists, **HYPERS, amsgrad=True, backend=lists_backend)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": "fast"}, ValueError, "learning rate"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be 1-element"),
        ({"beta1": None}, ValueError, "beta parameter at index 0"),
        ({"eps": "1e-8"}, ValueError, "epsilon"),
        ({"weight_decay": 1j}, ValueError, "weight_decay"),
        ({"maximize": torch.ones(2)}, ValueError, "maximize"),
        ({"grad_scale": torch.ones(2)}, RuntimeError, "grad_scale is float32 of shape"),
        ({"grad_scale": torch.ones((), device="meta")}, RuntimeError, "grad_scale is on meta"),
        ({"found_inf": torch.ones(0)}, RuntimeError, "found_inf is float32 of shape"),
        ({"found_inf": 0.0}, RuntimeError, "found_inf is 0.0"),
        ({"backend": "triton"}, ValueError, "does not take lists"),
        ({"backend": "fast"}, ValueError, "Choose one of 'auto', 'cuda'"),
    ],
    ids=str,
)
def test_invalid_options(options, kind, message):
    """Hyper-parameters and scalars are checked before anything is written."""
    lists = streams([(3,)])
    before = clones(lists)
    with pytest.raises(kind, match=message):
        adamw_(*lists, **{**HYPERS, **options})
    assert_same_lists(lists, before)


def test_unavailable_backend():
    """A backend that cannot run is an error that says why."""
    if "cuda" in warpstep.status().chosen.values() or torch.cuda.is_available():
        pytest.skip("it can run here")
    lists = streams([(3,)])
    reason = warpstep.backends.unavailable_reason("cuda", torch.device("cpu"))
    if not reason:
        pytest.skip("it is emulated here")
    with pytest.raises(warpstep.backends.BackendUnavailableError, match="cuda"):
        adamw_(*lists, **HYPERS, backend="cuda")


def test_without_native_module(monkeypatch):
    """The reference does it all where there is no native module."""
    monkeypatch.setattr(warpstep.backends, "native", lambda: (None, "taken away"))
    lists = streams()
    before = clones(lists)
    with pytest.warns(UserWarning, match="steps are slow here: taken away"):
        adamw_(*lists, **HYPERS)
    assert_within_bounds(lists, before, 5)


def test_bits_of_the_optimizer(lists_backend, device):
    """The functional and the optimizer's plan run the same kernels on the same chunks."""
    params = [torch.nn.Parameter(p) for p in streams(device=device, step=0.0)[0]]
    lists = clones([params, params, params, params])
    lists[2:] = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    lists += [[], [torch.zeros((), device=device) for _ in params]]
    lists[0] = [p.detach() for p in lists[0]]
    lists[1] = [g.detach() for g in streams(device=device, seed=3)[1]]
    for p, g in zip(params, lists[1], strict=True):
        p.grad = g.clone()
    names = {k: HYPERS[k] for k in ("lr", "eps", "weight_decay")}
    optimizer = warpstep.AdamW(params, betas=(0.9, 0.99), backend=lists_backend, **names)
    for _ in range(3):
        optimizer.step()
        adamw_(*lists, **HYPERS, backend=lists_backend)
    assert all(torch.equal(p, q) for p, q in zip(params, lists[0], strict=True))
