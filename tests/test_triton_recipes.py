"""Low-precision recipes in the Triton kernel, in its interpreter: the CPU kernel's bits, shards."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import warpstep
from support.bits import raw_bits
from support.environment import INTERPRETED
from support.parameters import random
from support.recipes import set_grad
from warpstep import buckets, codecs, recipes

pytest.importorskip("triton")
from support.triton_model import AdamW, Recipe, kernel

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton does not interpret here")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
STOCHASTIC, E4M3, UE5M3 = recipes.BFLOAT16_STOCHASTIC, recipes.E4M3, recipes.UE5M3

# Whole blocks of 8 bits, a last one cut short, several chunks; and what is too small for 8 bits.
SHAPES = [(0,), (5,), (17, 33), (64, 64), (66_001,)]
# The dtypes of parameters and gradients, and options; `copy` is the dtype of copies.
CASES = {
    "residual": (bf16, bf16, {"master": "residual"}),
    "residual, float32 gradients": (bf16, f32, {"master": "residual", "state_dtype": bf16}),
    "residual, 8 bits": (bf16, bf16, {"master": "residual", "state_dtype": "8bit"}),
    "stochastic": (bf16, bf16, {"rounding": "stochastic", "seed": 2**64 - 1}),
    "stochastic, 8 bits": (bf16, f32, {"rounding": "stochastic", "state_dtype": "8bit"}),
    "pair": (bf16, bf16, {"state_dtype": (f32, bf16), "seed": 2**31}),
    "float16, 8 bits": (f16, f16, {"state_dtype": "8bit", "eps": 1e-3}),
    "copies": (f32, bf16, {"copy": bf16}),
    "8 bits, copies": (f32, f16, {"copy": f16, "state_dtype": "8bit"}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Trained:
    """An optimizer with all of the tail, of one backend."""

    def __init__(self, backend: str, case: tuple, kind: type = warpstep.AdamW, **more) -> None:
        dtype, self.grad_dtype, options = case
        self.params = [Parameter(random(s, i, "cpu").to(dtype)) for i, s in enumerate(SHAPES)]
        options = {**options, **more}
        copy = options.pop("copy", None)
        if kind is warpstep.SGD:
            options.pop("eps", None)
        self.copies = [torch.full_like(p, 7, dtype=copy) for p in self.params if copy]
        options["copies"] = self.copies or None
        self.optimizer = kind(self.params, lr=1e-2, backend=backend, **options)

    def step(self, step: int, scale: float = 1.0, **how) -> None:
        for i, param in enumerate(self.params):
            decades = 10.0 ** (3 * random(param.shape, 50 + i, "cpu")).clamp(-4, 4)
            grad = random(param.shape, 100 * step + i, "cpu") * decades * scale
            set_grad(param, grad.to(self.grad_dtype))
        self.optimizer.step(**how)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"copy {i}": copy for i, copy in enumerate(self.copies)}
        for i, param in enumerate(self.params):
            found[f"param {i}"], found[f"grad {i}"] = param.detach(), param.grad
            found |= {f"{k} {i}": x for k, x in self.optimizer.state[param].items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(found: Trained, expected: Trained) -> None:
    """Bits are the same; a NaN is one."""
    assert "reference" not in str(found.optimizer.plan)
    mine, others = found.tensors(), expected.tensors()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=0, equal_nan=True, msg=name)


@each_case
@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True, "decay_form": "cautious"},
        {"decay_form": "coupled", "maximize": True},
        {"decay_form": "min"},
    ],
    ids=["amsgrad", "coupled", "min"],
)
def test_adamw_has_the_cpu_kernels_bits(case: tuple, options: dict) -> None:
    """With averages, statistics and zeroed gradients."""
    if "master" in case[2] and options["decay_form"] == "min":
        options = {"decay_form": "l1l2"}  # there is no min with a master
    more = {"ema_decay": 0.7, "stats": True, "weight_decay": 0.1, **options}
    trained = [Trained(backend, case, **more) for backend in ("triton", "cpu")]
    for step in range(3):
        for one in trained:
            one.step(step, zero_grads=step == 1)
        assert_same(*trained)
        found, expected = (one.optimizer.statistics() for one in trained)
        # Sums are of float32 numbers, in float64 here and there a tile in float32: 1,024 roundings.
        for name in ("grad_norm", "param_norm", "update_norm"):
            of_cpu, of_triton = getattr(expected, name), getattr(found, name)
            torch.testing.assert_close(of_triton, of_cpu, rtol=1024 * 2.0**-24, atol=0)


@each_case
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_has_the_cpu_kernels_bits(case: tuple, momentum: float) -> None:
    dtype, grad_dtype, options = case
    if isinstance(options.get("state_dtype"), tuple):
        options = {**options, "state_dtype": bf16, "rounding": "stochastic"}
    case = (dtype, grad_dtype, options)
    more = {"momentum": momentum, "weight_decay": 0.1, "kind": warpstep.SGD}
    trained = [Trained(backend, case, **more) for backend in ("triton", "cpu")]
    for step in range(3):
        for one in trained:
            one.step(step)
        assert_same(*trained)


@each_case
def test_the_scaled_tail_has_the_cpu_kernels_bits(case: tuple) -> None:
    """Gradients unscaled by a scaler, left so, and a step that is not taken."""
    trained = [Trained(backend, case, unscale_grads=True) for backend in ("triton", "cpu")]
    for step, found_inf in enumerate([0.0, 1.0, 0.0]):
        for one in trained:
            one.optimizer.grad_scale = torch.tensor(1024.0)
            one.optimizer.found_inf = torch.tensor(found_inf)
            before = one.tensors() if found_inf else {}
            one.step(step, scale=8.0)
            after = one.tensors()
            kept = [name for name in before if not name.startswith("grad")]
            assert all(raw_bits(before[name]).equal(raw_bits(after[name])) for name in kept)
        assert_same(*trained)


# ---- Where a tensor is cut makes no difference


def launched(recipe, tensors, grads, steps=3, **where) -> None:
    """Steps of tensors, given by operand, in a table of their own; gradients are one a step."""
    names = recipe.formats()[:-1]
    operands = [tensors.get(i) if name is not None else None for i, name in enumerate(names)]
    counters = [torch.zeros(()) for _ in operands[0]]
    table = kernel.TensorTable(
        operands, counters, [0] * len(counters), torch.device("cpu"), **where
    )
    for step in range(steps):
        addresses = torch.tensor([g.data_ptr() for g in grads[step]])
        kernel.launch(table, addresses, AdamW(lr=0.1).pack(), recipe=recipe)


PARAM, EXP_AVG, SCALE, RESIDUAL, COPY = 0, 1, 4, 7, 9
CUTS = {
    "by elements": (Recipe("adamw", STOCHASTIC, bf16, (bf16, STOCHASTIC)), [1, 8, 13, 1021, 5000]),
    "by blocks": (Recipe("adamw", STOCHASTIC, bf16, (E4M3, UE5M3)), [64, 192, 1024, 5056]),
    "master": (Recipe("adamw", bf16, bf16, (f32, STOCHASTIC), has_master=True), [3, 1021, 5000]),
    "copy": (Recipe("adamw", f32, f32, (E4M3, UE5M3), copy=bf16), [64, 4096]),
}


@pytest.mark.parametrize("chunk", [1024, 16384])
@pytest.mark.parametrize(("recipe", "cuts"), CUTS.values(), ids=CUTS)
def test_shards_have_the_bits_of_the_whole(recipe, cuts, chunk, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "CHUNKS", (chunk,))
    numel, origin = 10_007, 2**35  # the whole is itself a part, to see the index's upper half
    blocks = -(-numel // codecs.BLOCK)
    tensors = {
        operand: torch.zeros(blocks if SCALE <= operand < RESIDUAL else numel, dtype=dtype)
        for operand, dtype in enumerate(dtypes_of(recipe))
        if dtype is not None
    }
    tensors[PARAM].copy_(random((numel,), 1, "cpu"))
    grads = [random((numel,), 10 + step, "cpu").to(recipe.grad) for step in range(3)]
    where = {"numbers": [3], "seed": 2**63 + 1}
    whole = {operand: [x.clone()] for operand, x in tensors.items()}
    launched(recipe, whole, [[g] for g in grads], firsts=[origin], **where)

    edges = [0, *cuts, numel]
    bounds = list(itertools.pairwise(edges))

    def parts(operand: int, tensor: Tensor) -> list[Tensor]:
        one = codecs.BLOCK if SCALE <= operand < RESIDUAL else 1
        # Clones, which begin at a boundary of 16 bytes as shards do.
        return [tensor[begin // one : -(-end // one)].clone() for begin, end in bounds]

    cut = {operand: parts(operand, x) for operand, x in tensors.items()}
    firsts = [origin + begin for begin, _ in bounds]
    where["numbers"] *= len(firsts)
    launched(recipe, cut, [parts(PARAM, g) for g in grads], firsts=firsts, **where)
    for operand, (expected,) in whole.items():
        found = torch.cat(cut[operand])
        assert raw_bits(found).equal(raw_bits(expected)), operand


def dtypes_of(recipe) -> list[torch.dtype | None]:
    """Of each operand but the gradient."""
    names = [None if n is None else n.removesuffix("_stochastic") for n in recipe.formats()[:-1]]
    codes = {"e4m3": torch.uint8, "ue5m3": torch.uint8}
    return [None if n is None else codes.get(n) or getattr(torch, n) for n in names]


@pytest.mark.parametrize("first", [0, 3, 8, 2**32 - 4, 2**35 + 7])
@pytest.mark.parametrize(("seed", "number"), [(0, 0), (1, 7), (2**64 - 1, 2**29 + 1)])
def test_random_bits_are_the_codecs(first: int, seed: int, number: int) -> None:
    """Of both operands: the float32 step's numbers, rounded by codecs.draws()."""
    numel = 5003
    start, grad = random((numel,), 1, "cpu").to(bf16), random((numel,), 2, "cpu")
    exact = {i: [torch.zeros(numel)] for i in range(3)}
    exact[PARAM] = [start.float()]
    rounded = {i: [torch.zeros(numel, dtype=bf16)] for i in range(3)}
    rounded[PARAM] = [start.clone()]
    launched(Recipe("adamw", f32, f32, (f32, f32)), exact, [[grad]], steps=1)
    where = {"firsts": [first], "numbers": [number], "seed": seed}
    recipe = Recipe("adamw", STOCHASTIC, f32, (STOCHASTIC, STOCHASTIC))
    launched(recipe, rounded, [[grad]], steps=1, **where)
    for operand, (found,) in rounded.items():
        bits = codecs.draws(seed, torch.tensor(1.0), number, operand, first, numel)
        (numbers,) = exact[operand]
        assert found.view(torch.int16).equal(
            codecs.rounded_stochastic(numbers, bits).view(torch.int16)
        )


def test_a_bucket_tells_the_kernel_where_shards_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """And which number each parameter has, and the seed."""
    tables = []

    class Table(kernel.TensorTable):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            tables.append((options, self.rows[:, COPY].tolist()))

    monkeypatch.setattr(kernel, "TensorTable", Table)
    monkeypatch.setattr(buckets, "first_element", lambda param: 100 * param.numel())
    params = [Parameter(random((n,), n, "cpu")) for n in (3, 5, 7)]
    copies = {p: torch.zeros_like(p, dtype=bf16) for p in params[1:]}
    groups = [{"params": params[1:]}, {"params": params[:1]}]
    optimizer = warpstep.AdamW(groups, backend="triton", copies=copies, seed=9)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    (copied, to), (plain, none) = tables
    assert copied == {"firsts": [500, 700], "numbers": [0, 1], "seed": 9}
    assert to == [copies[p].data_ptr() for p in params[1:]]
    assert plain == {"firsts": None, "numbers": [2], "seed": 9}
    assert none == [0]


def test_what_is_masked_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU leaves it undefined; the interpreter has zeros there, and here large numbers."""
    from triton.runtime.interpreter import InterpreterBuilder

    case = (f32, f32, {"state_dtype": "8bit", "stats": True})
    expected, found = (Trained("triton", case) for _ in range(2))
    load = InterpreterBuilder.create_masked_load

    def load_numbers(builder, pointers, mask, other, *how):
        read = load(builder, pointers, mask, other, *how)
        if other is None:
            size = read.data.itemsize
            read.data.view(f"u{size}")[~mask.data] = int("7d" * size, 16)
        return read

    for step in range(2):
        expected.step(step)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load_numbers)
    for step in range(2):
        found.step(step)
    assert_same(found, expected)
    for name in ("grad_norm", "param_norm", "update_norm", "nonfinite"):
        kept = (getattr(one.optimizer.statistics(), name) for one in (found, expected))
        assert torch.equal(*kept)
