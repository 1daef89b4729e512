"""Every layout, dtype and option that torch's optimizers take: the same numbers as torch's."""

import math

import pytest
import torch

import warpstep
from support.cases import PAIRS, on_each_device
from support.tolerance import bound

LR = 0.01
STEPS = 4


def assert_close(ours, theirs, atol):
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.detach(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)


def memory(tensor):
    """All of the storage that a view looks into, as bits."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return flat.clone()


def away_from_zero(shape, seed, dtype=torch.float32, device="cpu"):
    """Random numbers of magnitude 0.5 and more: their squares are normal numbers in float16."""
    generator = torch.Generator().manual_seed(seed)
    wide = dtype if dtype.is_complex else torch.float64
    x = torch.randn(shape, generator=generator, dtype=wide)
    x = torch.sgn(x) * (x.abs() + 0.5)
    return x.to(device=device, dtype=dtype)


LAYOUTS = {
    "zero-size": lambda new: new(0, 3),
    "0-dim": lambda new: new(),
    "1-element": lambda new: new(1),
    "odd-1d": lambda new: new(1027),
    "offset-by-one": lambda new: new(1030)[1:],
    "every-second": lambda new: new(60)[::2],
    "gap-columns": lambda new: new(9, 12)[:, 2:9:3],
    "gap-rows": lambda new: new(9, 5)[1:8:2],
    "transposed": lambda new: new(6, 7).t(),
    "permuted-3d": lambda new: new(3, 4, 5).permute(2, 0, 1),
    "channels-last": lambda new: new(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels-last-3d": lambda new: new(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "size-1-dim-odd-stride": lambda new: new(6, 4)[:, :1],
    "zero-stride-size-1": lambda new: new(5).as_strided((5, 1), (1, 0)),
}


def leaf(layout, device, dtype=torch.float32, seed=0):
    view = LAYOUTS[layout](lambda *shape: away_from_zero(shape, seed, dtype, device))
    return view.detach().requires_grad_()


@on_each_device
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["float32", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_parameter(layout, dtype, amsgrad, device):
    ours, theirs = leaf(layout, device, dtype), leaf(layout, device, dtype)
    before = memory(ours)
    a = warpstep.AdamW([ours], lr=LR, amsgrad=amsgrad)
    b = torch.optim.AdamW([theirs], lr=LR, amsgrad=amsgrad, foreach=False)
    for step in range(STEPS):
        for p in (ours, theirs):
            p.grad = away_from_zero(p.shape, 10 + step, dtype, device)
        a.step()
        b.step()
    assert ours.stride() == theirs.stride()
    assert_close(ours, theirs, bound(STEPS, LR, theirs, torch.float32))
    assert a.state[ours]["step"].item() == STEPS

    # What lies between the elements has the bits it had.
    after, inside = memory(ours), torch.zeros(before.shape, dtype=torch.bool, device=device)
    inside.as_strided(ours.shape, ours.stride(), ours.storage_offset()).fill_(True)
    assert torch.equal(after[~inside], before[~inside])
    if ours.numel():
        assert not torch.equal(after[inside], before[inside])


def with_gaps(g):
    wide = g.new_full((*g.shape[:-1], 2 * g.shape[-1] + 1), math.nan)
    return wide[..., 1::2].copy_(g)


def with_negative_bit(g):
    negative = torch.complex(torch.zeros_like(g), -g).conj().imag
    assert negative.is_neg()
    return negative


def with_graph(g):
    return g.clone().requires_grad_() * 1.0


GRADIENTS = {
    "contiguous": lambda g: g,
    "transposed": lambda g: g.t().contiguous().t(),
    "expanded-rows": lambda g: g[:1].expand_as(g),
    "expanded-all": lambda g: g[0, 0].expand_as(g),
    "gaps": with_gaps,
    "misaligned": lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view_as(g),
    "negative-bit": with_negative_bit,
    "requires-grad": with_graph,
}


@on_each_device
@pytest.mark.parametrize("layout", ["transposed", "gap-columns", "contiguous"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_layout_of_gradient(kind, layout, device):
    def new():
        if layout == "contiguous":
            return away_from_zero((6, 7), 0, device=device).requires_grad_()
        return leaf(layout, device)

    ours, theirs = new(), new()
    a = warpstep.AdamW([ours], lr=LR)
    b = torch.optim.AdamW([theirs], lr=LR, foreach=False)
    for step in range(STEPS):
        # Ordinary gradients and this kind by turns: neither may be taken for the other.
        make = GRADIENTS[kind] if step % 2 == 0 else GRADIENTS["contiguous"]
        grad = make(away_from_zero(ours.shape, 10 + step, device=device))
        expected = grad.detach().clone()
        for p in (ours, theirs):
            p.grad = grad
        a.step()
        assert ours.grad is grad
        assert torch.equal(grad, expected)
        with torch.no_grad():
            theirs.grad = expected
        b.step()
    assert_close(ours, theirs, bound(STEPS, LR, theirs))


@on_each_device
@pytest.mark.parametrize("layout", ["transposed", "gap-columns", "odd-1d"])
@pytest.mark.parametrize("first", [True, False], ids=["lazy-first", "lazy-later"])
def test_lazily_conjugated_gradient(first, layout, device):
    dtype = torch.complex64
    ours, theirs = leaf(layout, device, dtype), leaf(layout, device, dtype)
    a = warpstep.AdamW([ours], lr=LR)
    b = torch.optim.AdamW([theirs], lr=LR, foreach=False)
    for step in range(STEPS):
        grad = away_from_zero(ours.shape, 10 + step, dtype, device)
        is_lazy = (step % 2 == 0) == first
        ours.grad = grad.conj() if is_lazy else grad
        theirs.grad = ours.grad.resolve_conj()
        assert ours.grad.is_conj() == is_lazy
        a.step()
        b.step()
    assert_close(ours, theirs, bound(STEPS, LR, theirs, torch.float32))


@on_each_device
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["lazy-first", "lazy-later"])
def test_lazily_negated_gradient_of_one_element(first, shape, device):
    # Strides of one element say nothing: only the negative bit tells it from an ordinary gradient.
    ours, theirs = (away_from_zero(shape, 0, device=device).requires_grad_() for _ in range(2))
    a = warpstep.AdamW([ours], lr=LR)
    b = torch.optim.AdamW([theirs], lr=LR, foreach=False)
    for step in range(STEPS):
        grad = away_from_zero(shape, 10 + step, device=device)
        is_lazy = step > 0 or first
        ours.grad = with_negative_bit(grad) if is_lazy else grad
        theirs.grad = ours.grad.resolve_neg()
        assert ours.grad.is_neg() == is_lazy
        a.step()
        b.step()
    assert_close(ours, theirs, bound(STEPS, LR, theirs))


LAZY_PARAMETERS = {
    "negated": lambda: with_negative_bit(away_from_zero((5,), 0)),
    "negated-1-element": lambda: with_negative_bit(away_from_zero((1,), 0)),
    "conjugated": lambda: away_from_zero((5,), 0, torch.complex64).conj(),
}


@pytest.mark.parametrize("case", LAZY_PARAMETERS)
@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_lazily_negated_or_conjugated_parameter(case, requested):
    # torch steps the first and refuses the second: the right numbers or an error, nothing else.
    ours = LAZY_PARAMETERS[case]().detach()
    theirs = ours.resolve_conj().resolve_neg().clone().requires_grad_()
    start = theirs.detach().clone()
    ours.requires_grad_()
    assert ours.is_neg() or ours.is_conj()
    a, b = warpstep.AdamW([ours], lr=LR, backend=requested), torch.optim.AdamW([theirs], lr=LR)
    try:
        for step in range(STEPS):
            ours.grad = away_from_zero(ours.shape, 10 + step, ours.dtype)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
    except RuntimeError as error:
        assert "parameter 0 of group 0" in str(error)  # noqa: PT017
        assert torch.equal(ours.resolve_conj().resolve_neg(), start)
        assert not a.state
        return
    assert_close(ours.resolve_conj().resolve_neg(), theirs, bound(STEPS, LR, theirs, torch.float32))


OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "maximize-amsgrad": {"maximize": True, "amsgrad": True},
    "eps-0": {"eps": 0.0},
    "eps-large": {"eps": 0.1},
    "no-decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.3},
    "decay-int": {"weight_decay": 1},
    "decay-maximize": {"weight_decay": 0.3, "maximize": True},
    "lr-0": {"lr": 0.0},
    "beta1-0": {"betas": (0.0, 0.99)},
    "betas-low": {"betas": (0.3, 0.6)},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "fused": {"fused": True},
    "not-fused": {"fused": False},
}


@on_each_device
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, name, device):
    options = {"lr": LR, **OPTIONS[option]}
    shapes = [(33,), (4, 5), (), (0,)]
    ours = [away_from_zero(s, i, device=device).requires_grad_() for i, s in enumerate(shapes)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    first = [p.detach().clone() for p in ours]
    our_class, their_class = PAIRS[name]
    a, b = our_class(ours, **options), their_class(theirs, **options)
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = away_from_zero(p.shape, 100 * step + i, device=device)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, first, strict=True):
        assert_close(p, q, bound(STEPS, LR, q))
        if p.numel() and options["lr"]:
            assert not torch.equal(p, start)
        for key, value in b.state[q].items():
            mine = a.state[p][key]
            assert mine.shape == value.shape
            # Moments: ten roundings of numbers no larger than they are, or than the gradient's.
            scale = 0 if value.numel() == 0 else max(1.0, value.abs().max().item())
            if key == "step":  # which torch has on the CPU, but for fused=True
                mine, value = mine.cpu(), value.cpu()
            assert_close(mine, value, STEPS * 10 * torch.finfo(torch.float32).eps * scale)


DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}


@on_each_device
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_dtypes(dtype_name, name, maximize, device):
    dtype = DTYPES[dtype_name]
    options = {"lr": LR, "weight_decay": 0.1, "maximize": maximize}
    ours = away_from_zero((7, 9), 0, dtype, device).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    our_class, their_class = PAIRS[name]
    # torch's fused kernel, like ours, rounds half-precision values once; it takes no complex ones.
    a = our_class([ours], **options)
    b = their_class([theirs], fused=None if dtype.is_complex else True, **options)
    for step in range(STEPS):
        ours.grad = away_from_zero(ours.shape, 10 + step, dtype, device)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert_close(ours, theirs, bound(STEPS, LR, theirs, theirs.real.dtype))
    assert {k: v.dtype for k, v in a.state[ours].items()} == {
        k: v.dtype for k, v in b.state[theirs].items()
    }


class RoundedAdamW:
    """torch.optim.AdamW in float32 on one parameter, each stored value rounded once a step."""

    def __init__(self, param, moment_dtype, **options):
        self.param = param.detach().float().requires_grad_()
        self.dtype, self.moment_dtype = param.dtype, moment_dtype
        self.optimizer = torch.optim.AdamW([self.param], foreach=False, **options)

    @torch.no_grad()
    def step(self, grad):
        self.param.grad = grad.float()
        self.optimizer.step()
        self.param.copy_(self.param.to(self.dtype))
        for key, value in self.optimizer.state[self.param].items():
            if key != "step":
                value.copy_(value.to(self.moment_dtype))


MIXED = {
    "bfloat16-float32-moments": (torch.bfloat16, None, torch.float32),
    "float16-float32-moments": (torch.float16, None, torch.float32),
    "float32-bfloat16-moments": (torch.float32, None, torch.bfloat16),
    "bfloat16-float32-gradients": (torch.bfloat16, torch.float32, None),
    "bfloat16-float32-both": (torch.bfloat16, torch.float32, torch.float32),
}


@on_each_device
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("case", MIXED)
def test_mixed_dtypes(case, amsgrad, device):
    dtype, grad_dtype, state_dtype = MIXED[case]
    param = away_from_zero((5, 13), 0, dtype, device).requires_grad_()
    if grad_dtype is not None:
        if not hasattr(param, "grad_dtype"):
            pytest.skip("this torch has no Tensor.grad_dtype")
        param.grad_dtype = grad_dtype
    oracle = RoundedAdamW(param, state_dtype or dtype, lr=LR, amsgrad=amsgrad)
    optimizer = warpstep.AdamW([param], lr=LR, amsgrad=amsgrad, state_dtype=state_dtype)
    for step in range(STEPS):
        param.grad = away_from_zero(param.shape, 10 + step, grad_dtype or dtype, device)
        optimizer.step()
        oracle.step(param.grad)
    coarsest = max(dtype, state_dtype or dtype, key=lambda d: torch.finfo(d).eps)
    # A moment's rounding error moves the update, the parameter's own the parameter.
    atol = bound(STEPS, LR, param) + bound(STEPS, LR, torch.zeros(1), coarsest)
    assert_close(param, oracle.param.to(dtype), atol)
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (state_dtype or dtype)
    assert state["step"].dtype == torch.float32


@on_each_device
def test_several_dtypes_and_layouts_in_one_group(device):
    kinds = [(layout, dtype) for layout in ("odd-1d", "gap-columns") for dtype in DTYPES.values()]
    ours = [leaf(layout, device, dtype, i) for i, (layout, dtype) in enumerate(kinds)]
    theirs = [leaf(layout, device, dtype, i) for i, (layout, dtype) in enumerate(kinds)]
    a = warpstep.AdamW(ours, lr=LR)
    b = torch.optim.AdamW(theirs, lr=LR, foreach=False)
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = away_from_zero(p.shape, 100 * step + i, p.dtype, device)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        dtype = q.real.dtype
        # torch's for-loop rounds half-precision intermediates too: as many roundings in `bound`.
        assert_close(p, q, bound(STEPS, LR, q, dtype))


@on_each_device
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_gradients(eps, device):
    # 0 / (sqrt(0) + eps): NaN for eps = 0, as in torch, and no update otherwise.
    ours = away_from_zero((9,), 0, device=device).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    a = warpstep.AdamW([ours], lr=LR, eps=eps)
    b = torch.optim.AdamW([theirs], lr=LR, eps=eps)
    for p in (ours, theirs):
        p.grad = torch.zeros_like(p)
    a.step()
    b.step()
    assert theirs.isnan().all() if eps == 0 else not theirs.isnan().any()
    assert_close(ours, theirs, bound(1, LR, torch.nan_to_num(theirs.detach())))


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["param", "grad"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_nonfinite_values_spread_as_in_torch(where, bad, amsgrad, device):
    ours = away_from_zero((9,), 0, device=device)
    grads = [away_from_zero((9,), 10 + i, device=device) for i in range(3)]
    (ours if where == "param" else grads[1])[4] = bad
    ours.requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    a = warpstep.AdamW([ours], lr=LR, amsgrad=amsgrad)
    b = torch.optim.AdamW([theirs], lr=LR, amsgrad=amsgrad, foreach=False)
    for grad in grads:
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = grad.clone()
            optimizer.step()
    assert torch.isfinite(theirs).sum() == 8
    finite = torch.where(theirs.isfinite(), theirs, 0)
    assert_close(ours, theirs, bound(3, LR, finite))
    for key in ("exp_avg", "exp_avg_sq"):
        mine, other = a.state[ours][key], b.state[theirs][key]
        assert_close(mine, other, 30 * torch.finfo(torch.float32).eps * 10)


@on_each_device
def test_one_large_tensor_among_small_ones(device):
    # More elements than one chunk, and a tail that is no multiple of a vector.
    shapes = [(3,), (70_001,), (1,), (257, 131)]
    ours = [away_from_zero(s, i, device=device).requires_grad_() for i, s in enumerate(shapes)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    a, b = warpstep.AdamW(ours, lr=LR), torch.optim.AdamW(theirs, lr=LR)
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = away_from_zero(p.shape, 100 * step + i, device=device)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, bound(STEPS, LR, q))


def hundred_groups(cls):
    params = [away_from_zero((i % 7 + 1,), i).requires_grad_() for i in range(100)]
    groups = [
        {"params": [p], "lr": LR * (i + 1) / 100, "weight_decay": i / 100, "betas": (i / 150, 0.99)}
        for i, p in enumerate(params)
    ]
    optimizer = cls(groups)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = away_from_zero(p.shape, 1000 * step + i)
        optimizer.step()
    return params


def test_a_hundred_groups_each_with_its_own_options():
    ours = hundred_groups(warpstep.AdamW)
    theirs = hundred_groups(torch.optim.AdamW)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, bound(STEPS, LR, q))
