"""What is uploaded for Triton's kernels, and how often they are compiled: for a GPU not here."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import warpstep

pytest.importorskip("triton")
from support.fake_triton_gpu import FakeGpu, variant_of
from support.triton_model import L1, MIN, SGD, AdamW, adamw, kernel, sgd

pytestmark = pytest.mark.skipif(kernel.INTERPRETED, reason="Triton interprets in this process")

f32, f64 = torch.float32, torch.float64


class Training:
    """Steps and clippings of one table's tensors. Nothing reads their elements."""

    def __init__(
        self,
        gpu: FakeGpu,
        tensors: int = 5,
        groups: int = 1,
        ema: bool = False,
        numel: int = 40_000,
        rule: str = "adamw",
        seed: int = 0,
    ) -> None:
        self.gpu, self.groups = gpu, groups
        self.recipe = adamw(f32, ema=f32 if ema else None) if rule == "adamw" else sgd(f32)
        params, steps = [torch.zeros(1).expand(numel)] * tensors, [torch.zeros(())] * tensors
        moments = [params if i < len(self.recipe.moments) else None for i in range(3)]
        others = (*[None] * 4, params if ema else None, None)  # no scales, no residual, no copy
        operands = (params, *moments, *others)
        groups_of = [index % groups for index in range(tensors)]
        self.table = kernel.TensorTable(operands, steps, groups_of, torch.device("cuda"), seed=seed)
        self.grads, self.lr = torch.arange(1, tensors + 1), 1.0

    def number(self, dtype: torch.dtype = f32) -> Tensor:
        return self.gpu.tensor([1.0], dtype=dtype)

    def step(self, l1: bool = False, **tail: Any) -> None:
        hyper = (AdamW if self.recipe.rule == "adamw" else SGD)(lr=self.lr)
        hypers = (hyper._replace(decay=L1) if l1 else hyper).pack() * self.groups
        kernel.launch(self.table, self.grads.clone(), hypers, recipe=self.recipe, **tail)

    def clip(self, largest: bool = False) -> Tensor:
        """As clip_grad_norm_ does; what the step is to multiply the gradients by."""
        out = self.gpu.tensor([0.0] * (2 + self.table.programs), dtype=f64)
        kernel.grad_norm(self.table, self.grads.clone(), out, recipe=self.recipe, largest=largest)
        return self.number(f64)

    def find_least(self) -> Tensor:
        """As for decay_form="min"."""
        least = self.gpu.tensor([0.0] * (len(self.grads) + self.table.programs), dtype=f64)
        hypers = AdamW(lr=self.lr, decay=MIN).pack() * self.groups
        grads = self.grads.clone()
        kernel.least_magnitudes(self.table, grads, hypers, least, recipe=self.recipe)
        return least

    def clip_and_step(self) -> None:
        self.step(clip_coef=self.clip())

    def change(self) -> None:
        """As after zero_grad() and with a scheduler."""
        self.grads, self.lr = self.grads + 1, self.lr / 2

    def assert_launched(self, launches: int, grads: Tensor, lr: float) -> None:
        """The latest launches read these gradients' addresses, and this learning rate."""
        assert len(self.gpu.launched) >= launches
        for values in self.gpu.launched[-launches:]:
            assert values["grads"].equal(grads)
            assert "hypers" not in values or values["hypers"].view(f64)[0] == lr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch, kernel, compiles=False)


def test_a_table_is_refused_where_triton_compiles_for_no_gpu() -> None:
    with pytest.raises(RuntimeError, match="cpu with TRITON_INTERPRET not set"):
        kernel.TensorTable([[], *[None] * 9], None, [], torch.device("cpu"))


def test_each_launch_reads_what_is_now(gpu: FakeGpu) -> None:
    training = Training(gpu)
    for _ in range(3):
        training.clip_and_step()
        training.assert_launched(2, training.grads, training.lr)
        training.change()


def test_what_is_on_the_device_is_not_sent_again(gpu: FakeGpu) -> None:
    training = Training(gpu)
    training.clip_and_step()
    copies = gpu.copies
    training.clip_and_step()
    assert gpu.copies == copies
    training.lr /= 2
    training.clip_and_step()
    assert gpu.copies == copies + 1
    training.grads += 1
    training.clip_and_step()
    assert gpu.copies == copies + 2


@pytest.mark.parametrize("changed", [False, True])
def test_captured_clippings_and_steps(gpu: FakeGpu, changed: bool) -> None:
    """A replay reads what was there at its capture, whatever was stepped or captured since."""
    training, graphs = Training(gpu), []
    training.clip_and_step()
    for _ in range(2):
        if changed:  # gradients from the graph's pool, say
            training.change()
        launches = len(gpu.launched)
        with gpu.capture() as replay:
            training.clip_and_step()
        graphs.append((replay, training.grads.clone(), training.lr))
        assert len(gpu.launched) == launches
        training.clip_and_step()
        training.assert_launched(2, training.grads, training.lr)
    training.change()
    training.clip_and_step()
    for replay, grads, lr in graphs:
        replay()
        training.assert_launched(2, grads, lr)
    training.clip_and_step()
    training.assert_launched(2, training.grads, training.lr)


@pytest.mark.parametrize("changed", [False, True])
def test_captures_in_a_row(gpu: FakeGpu, changed: bool) -> None:
    training, graphs = Training(gpu), []
    training.clip_and_step()
    for _ in range(2):
        with gpu.capture() as replay:
            training.clip_and_step()
        graphs.append((replay, training.grads.clone(), training.lr))
        if changed:
            training.change()
            gpu.pins_in_captures = True
    for replay, grads, lr in graphs:
        replay()
        training.assert_launched(2, grads, lr)


def test_other_streams(gpu: FakeGpu) -> None:
    """Each launch has what it reads made or recorded for its stream: the fake GPU looks."""
    training = Training(gpu)
    for stream in (1, 0, 1, 2):
        gpu.stream = stream
        coef = training.clip()
        gpu.stream = stream + 3
        numbers = {name: training.number() for name in ("grad_scale", "found_inf", "statistics")}
        gpu.stream = stream + 6
        training.step(clip_coef=coef, **numbers)


def test_rows_of_the_table(gpu: FakeGpu) -> None:
    """As layout.h has them, with and without a step counter."""
    sizes, groups = [3, 100_000, 0], [0, 7, 2]
    params, moments, emas = ([torch.zeros(n) for n in sizes] for _ in range(3))
    steps = [torch.zeros(()), None, torch.zeros(())]
    operands = [params, moments, *[None] * 6, emas, None]
    device = torch.device("cuda")
    where = {"firsts": [5, 2**33, 0], "numbers": [4, 2**30, 1]}
    table = kernel.TensorTable(operands, steps, groups, device, **where)
    chunks = [1, -(-100_000 // table.chunk), 1]
    columns = (params, moments, emas, steps, groups, chunks, *where.values())
    assert table.rows.tolist() == [
        [
            *(p.data_ptr(), m.data_ptr(), *[0] * 6, ema.data_ptr(), 0),
            *(step.data_ptr() if step is not None else 0, p.numel(), first),
            *(group + (count << 32), number << 32),
        ]
        for p, m, ema, step, group, count, first, number in zip(*columns, strict=True)
    ]
    assert table.chunk_counts.tolist() == chunks
    assert table.chunks.tolist() == [[i, j] for i, n in enumerate(chunks) for j in range(n)]
    without = kernel.TensorTable(operands, None, groups, device)
    assert not without.rows[:, [10, 12]].any()
    assert without.rows[:, 14].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("numel", "chunk", "programs"),
    [
        (10, 2048, 1),
        (2**20, 2048, 512),  # 3.9 for each multiprocessor of an H100
        (2**22, 4096, 1024),
        (2**24 - 1, 8192, 2048),
        (2**24, 16384, 1024),
        (2**28, 16384, 16384),
    ],
)
def test_few_elements_make_small_chunks(
    gpu: FakeGpu, numel: int, chunk: int, programs: int
) -> None:
    table = Training(gpu, tensors=1, numel=numel).table
    assert (table.chunk, table.programs) == (chunk, programs)


TAILS = {
    "plain": {},
    "clipped": {"clip_coef": f64},
    "scaled": {"grad_scale": f32, "found_inf": f32},
    "scaled and clipped": {"grad_scale": f32, "found_inf": f32, "clip_coef": f64},
    "zeroed": {"zero_grads": True},
    "clipped, zeroed": {"clip_coef": f64, "zero_grads": True},
    "scaled, unscaled": {"grad_scale": f32, "found_inf": f32, "unscale_grads": True},
    "statistics": {"statistics": f64},
    "all": {"grad_scale": f32, "found_inf": f32, "clip_coef": f64, "statistics": f64},
    "l1": {"l1": True},
}


@pytest.mark.parametrize(("rule", "ema"), [("adamw", False), ("adamw", True), ("sgd", False)])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_sizes_make_no_variants(gpu: FakeGpu, tail: dict[str, Any], rule: str, ema: bool) -> None:
    """A kernel is compiled once for a kind of step, so that none is in a capture."""

    def train(tensors: int, groups: int, numel: int = 10, seed: int = 0) -> None:
        training = Training(gpu, tensors, groups, ema, numel, rule, seed)
        for _ in range(2):
            given = {n: x if x is True else training.number(x) for n, x in tail.items()}
            training.clip()
            training.clip(largest=True)
            training.step(**given)
            training.change()

    train(1, 1)
    assert len(gpu.variants) == 3
    for tensors, groups in itertools.product((1, 2, 3, 16), (1, 2, 3, 16)):
        train(tensors, groups)
    for numel in (1, 2**20, 2**21 + 1, 2**24, 2**26):
        train(1, 1, numel)
    for seed in (1, 16, 2**31, 2**64 - 1):
        train(1, 1, seed=seed)
    assert len(gpu.variants) == 3, gpu.variants[3:]


def test_an_optimizer_meets_its_variants_at_once(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes later: other gradients, another learning rate, a capture."""

    class Table(kernel.TensorTable):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments[:-1], torch.device("cuda"), **options)

    monkeypatch.setattr(kernel, "TensorTable", Table)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that parameters on the CPU are its own
    params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 40_000, 7)]
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)]
    optimizer = warpstep.AdamW(groups, backend="triton", ema_decay=0.9, stats=True)
    grads = []

    def step(lr: float) -> list[int]:
        grads[:] = [torch.ones_like(p) for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.clip_grad_norm_(1.0)
        optimizer.step(zero_grads=True)
        return [grad.data_ptr() for grad in grads]

    for lr in (0.1, 0.2, 0.2):
        addresses = step(lr)
        assert len(gpu.variants) == 2
        for values in gpu.launched[-2:]:
            assert values["grads"].tolist() == addresses
        assert gpu.launched[-1]["hypers"].view(torch.float64)[0] == lr
    with gpu.capture() as replay:
        addresses = step(0.3)
    step(0.4)
    replay()
    for values in gpu.launched[-2:]:
        assert values["grads"].tolist() == addresses
    assert gpu.launched[-1]["hypers"].view(torch.float64)[0] == 0.3
    assert len(gpu.variants) == 2


def test_variants_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with Triton's compiler: a plain step, a clipped one, and the norm."""
    gpu = FakeGpu(monkeypatch, kernel, compiles=True)
    for tensors, groups in [(1, 1), (2, 1), (2, 2), (5, 3)]:
        training = Training(gpu, tensors, groups)
        training.step()
        training.clip_and_step()
        with gpu.capture() as replay:
            training.clip_and_step()
        replay()
        training.assert_launched(5, training.grads, training.lr)
    names = [variant.split()[0] for variant in gpu.variants]
    assert names == ["step_kernel", "grad_norm_kernel", "step_kernel"]


def test_code_is_compiled_ahead_as_at_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests which read code for a GPU that is not here read what would run there."""
    gpu = FakeGpu(monkeypatch, kernel, compiles=False)
    training = Training(gpu)
    training.clip()
    least = training.find_least()
    numbers = {name: training.number(dtype) for name, dtype in TAILS["all"].items()}
    training.step(**numbers, least=least)
    monkeypatch.setattr(kernel.triton, "compile", lambda source, target, options: source)
    target = kernel.GPUTarget("cuda", 90, 32)
    norm = kernel.compile_grad_norm_for(target, training.recipe, largest=False)
    tail = kernel.NO_TAIL._replace(statistics=True, skippable=True)
    step = kernel.compile_for(target, training.recipe, tail)
    ahead = [norm, kernel.compile_least_magnitude_for(target, training.recipe), step]
    assert gpu.variants == [variant_of(code) for code in ahead]
