"""What is measured: every case is data, with a readable id. Knows neither torch nor a machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# By optimizer, the moments that it keeps of each parameter; SGD's here is with momentum.
MOMENTS = {"AdamW": 2, "SGD": 1}


@dataclass(frozen=True)
class Recipe:
    """What warpstep keeps of bfloat16 parameters, beside torch, which keeps all in bfloat16.

    `moved` is how many bytes an element a step moves, `kept` what its parameter and state take.
    """

    words: str
    options: tuple[tuple[str, str], ...]
    moved: float
    kept: float

    @property
    def code(self) -> str:
        """The arguments that ask for it, as one writes them."""
        values = {"bfloat16": "torch.bfloat16"}
        return ", ".join(f"`{k}={values.get(v, chr(34) + v + chr(34))}`" for k, v in self.options)


SCALES = 2 / 64  # bytes an element: a scale a block, of two moments
RESIDUAL, EIGHT_BITS = ("master", "residual"), ("state_dtype", "8bit")
RECIPES = {
    "residual": Recipe("exact float32 master, float32 moments", (RESIDUAL,), 26, 12),
    "residual-bf16": Recipe(
        "exact master, bfloat16 moments, exp_avg_sq stochastic",
        (RESIDUAL, ("state_dtype", "bfloat16")),
        *(18, 8),
    ),
    "residual-8bit": Recipe(
        "exact master, 8-bit moments", (RESIDUAL, EIGHT_BITS), 14 + 2 * SCALES, 6 + SCALES
    ),
    "stochastic-8bit": Recipe(
        "weights rounded stochastically, 8-bit moments",
        (("rounding", "stochastic"), EIGHT_BITS),
        *(10 + 2 * SCALES, 4 + SCALES),
    ),
}

PEERS_OF_8_BITS = ("bitsandbytes-8bit", "torchao-8bit")


@dataclass(frozen=True)
class Case:
    """One model (or caricature of a model) whose step is timed.

    `dtype` is the format of parameters, gradients and moments alike. `groups` spreads the tensors
    evenly over that many parameter groups, each with its own learning rate. `offset` displaces the
    parameters by so many elements from an aligned address. `after_backward` times the step right
    after a backward pass, when other data fill the caches and torch's threads still spin, and not
    as one of several steps in a row. `beside_busy_core` times it while another process keeps a core
    busy, as data loaders do: threads that share work then wait for the scheduler. `compiled_on`
    says on which devices torch.compile joins in: it takes from seconds to minutes a case.
    `sequence` names what a competitor runs inside the clock (bench/sequences.py). `threads` is how
    many of torch's the CPU has for it, all if None; `only` who is measured, all if empty.
    With `sharded`, tensors are DTensors, over a mesh of this one process. `optimizer` is the class
    that steps. `recipe` names what warpstep keeps (RECIPES), if it is not what torch does.
    """

    id: str
    family: str
    shapes: Shapes
    dtype: str = "float32"
    groups: int = 1
    offset: int = 0
    after_backward: bool = False
    beside_busy_core: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled_on: tuple[str, ...] = ()
    quick: bool = False
    sequence: str = "step"
    threads: int | None = None
    only: tuple[str, ...] = ()
    sharded: bool = False
    optimizer: str = "AdamW"
    recipe: str = ""

    @property
    def tensors(self) -> int:
        """How many parameters there are."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """How many elements all of them have."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def accesses(self) -> int:
        """How many tensors of a parameter's size one step moves, each live byte counted once: it
        reads the parameter, gradient and moments, and writes all back except the gradient."""
        return 3 + 2 * MOMENTS[self.optimizer]

    @property
    def param_bytes(self) -> int:
        """Bytes of the parameters."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def floor_bytes(self) -> int:
        """Bytes one step cannot do without: for AdamW 28 an element in float32, 14 in bfloat16."""
        if self.recipe:
            return int(self.elements * RECIPES[self.recipe].moved)
        return self.param_bytes * self.accesses

    @property
    def state_bytes(self) -> int:
        """Bytes of one competitor's own copy: the parameters and their moments."""
        return self.param_bytes * (1 + MOMENTS[self.optimizer])

    @property
    def moves_the_floor(self) -> bool:
        """Whether warpstep moves the floor bytes and no more: with bfloat16 gradients in and a
        bfloat16 copy out they are as many as with float32 gradients.
        """
        return self.sequence in ("step", "copies")

    @property
    def is_memory_bound(self) -> bool:
        """Whether its bandwidth says something: it moves more than the caches keep."""
        return self.floor_bytes >= 2**28


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2's tensors, the head tied to the embedding: 12 a layer and 4 more."""
    block: Shapes = (
        *((width,), (width,)),
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    )
    return ((vocabulary, width), (context, width), *(block * layers), (width,), (width,))


def resnet50() -> Shapes:
    """ResNet-50's 161 tensors: convolutions without bias, batch norms, the classifier."""
    shapes: list[Shape] = []

    def convolution(out: int, into: int, size: int) -> None:
        shapes.extend([(out, into, size, size), (out,), (out,)])

    convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, into, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, into, 1)
            into = 4 * width
    return (*shapes, (1000, into), (1000,))


def vit(layers: int, width: int, patch: int = 16, image: int = 224) -> Shapes:
    """A vision transformer's tensors, as torchvision names them: 12 a layer and 8 more."""
    block: Shapes = (
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    )
    positions = (image // patch) ** 2 + 1
    stem: Shapes = ((1, 1, width), (width, 3, patch, patch), (width,), (1, positions, width))
    return (*stem, *(block * layers), (width,), (width,), (1000, width), (1000,))


def llama2_7b(ways: int) -> Shapes:
    """One rank's share of Llama-2-7B, every tensor split along dimension 0 as FSDP2 does."""
    width, hidden, vocabulary = 4096, 11008, 32000
    block: Shapes = (
        *((width, width),) * 4,
        *((hidden, width), (hidden, width), (width, hidden)),
        *((width,), (width,)),
    )
    whole: Shapes = ((vocabulary, width), *(block * 32), (width,), (vocabulary, width))
    return tuple((shape[0] // ways, *shape[1:]) for shape in whole)


def equal(tensors: int, elements: int) -> Shapes:
    """So many vectors of one length."""
    return ((elements,),) * tensors


def _in_both(case: Case) -> tuple[Case, Case]:
    """The case as it is, and all in bfloat16."""
    return case, replace(case, id=f"{case.id}/bf16", dtype="bfloat16", compiled_on=(), quick=False)


def _in_a_row_and_after_backward(case: Case) -> tuple[Case, Case]:
    """The case as it is, hot in the caches, and as training meets it."""
    return case, replace(
        case,
        id=f"{case.id}/after-backward",
        after_backward=True,
        devices=CPU,
        compiled_on=(),
        quick=False,
    )


def _of_sgd(*cases: Case) -> tuple[Case, ...]:
    """The same models, stepped by SGD with momentum."""
    return tuple(
        replace(case, id=f"{case.id}/sgd", optimizer="SGD", compiled_on=()) for case in cases
    )


def _recipes(case: Case) -> tuple[Case, ...]:
    """The case in bfloat16, with each recipe."""
    return tuple(
        replace(
            case,
            id=f"{case.id}/{recipe}",
            family="recipe",
            dtype="bfloat16",
            recipe=recipe,
            only=("warpstep", "torch-fused", *(PEERS_OF_8_BITS if "8bit" in recipe else ())),
        )
        for recipe in RECIPES
    )


def _sequences(id: str, shapes: Shapes) -> tuple[Case, ...]:
    """What training loops do around the step, as one case each."""
    sequences = ("clip", "tail", "stats", "enabled")
    return tuple(Case(f"{id}/{s}", "tail", shapes, quick=True, sequence=s) for s in sequences)


def _enabled(case: Case, *more: str) -> tuple[Case, ...]:
    """Torch's optimizers on warpstep's kernels."""
    return tuple(
        replace(case, id=f"{case.id}/{s}", sequence=s, quick=True) for s in ("enabled", *more)
    )


def _beside_busy_core(id: str, shapes: Shapes, quick: bool = False) -> Case:
    """What the threads of a step cost where one of them has to wait for a core."""
    id = f"{id}/busy-core"
    return Case(id, "busy-core", shapes, beside_busy_core=True, devices=CPU, quick=quick)


def _on_threads(case: Case) -> tuple[Case, ...]:
    """The case with one thread of the CPU's, and with more of them."""
    return tuple(
        replace(
            case,
            id=f"{case.id}/{n}-threads",
            family="threads",
            devices=CPU,
            quick=False,
            threads=n,
            only=("warpstep", "torch-fused"),
        )
        for n in (1, 2, 4, 8, 16)
    )


CPU, CUDA = ("cpu",), ("cuda",)
BOTH = (*CPU, *CUDA)

CASES: tuple[Case, ...] = (
    # Models, with the shapes they have.
    *_in_both(Case("gpt2-124m", "model", gpt2(12, 768), compiled_on=BOTH, quick=True)),
    *_in_both(Case("gpt2-1.5b", "model", gpt2(48, 1600), devices=CUDA)),
    *_in_both(Case("resnet50", "model", resnet50(), quick=True)),
    Case("resnet50/after-backward", "model", resnet50(), after_backward=True, devices=CPU),
    *_in_both(Case("vit-l", "model", vit(24, 1024))),
    *_in_both(Case("llama2-7b-shard-8", "model", llama2_7b(8), devices=CUDA)),
    *_in_both(Case("llama2-7b-shard-64", "model", llama2_7b(64), devices=CPU)),
    # Many small tensors: what a step costs beside the memory traffic.
    *_in_a_row_and_after_backward(Case("400x1024", "small", equal(400, 1024), quick=True)),
    Case("1000x1024", "small", equal(1000, 1024)),
    *_in_a_row_and_after_backward(Case("2000x256", "small", equal(2000, 256), quick=True)),
    *_in_a_row_and_after_backward(Case("10000x64", "small", equal(10_000, 64), quick=True)),
    *_in_a_row_and_after_backward(
        Case("465-groups", "small", equal(465, 64), groups=465, quick=True)
    ),
    # The tail in one pass, and torch's optimizers on warpstep's kernels.
    *_sequences("gpt2-124m", gpt2(12, 768)),
    *_sequences("2000x256", equal(2000, 256)),
    *_enabled(Case("465-groups", "tail", equal(465, 64), groups=465)),
    *_enabled(Case("400x1024", "tail", equal(400, 1024)), "unfused"),
    *_enabled(Case("300-shards", "tail", equal(300, 256), sharded=True, devices=CPU)),
    # One large tensor: nothing but memory traffic.
    *_in_both(Case("one-2^26", "large", equal(1, 2**26), devices=CPU, compiled_on=CPU, quick=True)),
    *_in_both(
        Case("one-2^28", "large", equal(1, 2**28), devices=CUDA, compiled_on=CUDA, quick=True)
    ),
    # SGD with momentum, the rule with one moment.
    *_of_sgd(
        Case("gpt2-124m", "model", gpt2(12, 768), quick=True),
        Case("2000x256", "small", equal(2000, 256), quick=True),
        *_in_both(Case("one-2^26", "large", equal(1, 2**26), devices=CPU, quick=True)),
    ),
    # Low precision that loses nothing, against torch's all-bfloat16 step of the same shapes.
    *_recipes(Case("gpt2-124m", "recipe", gpt2(12, 768), quick=True)),
    *_recipes(Case("one-2^26", "recipe", equal(1, 2**26), devices=CPU)),
    Case("gpt2-124m/copies", "tail", gpt2(12, 768), sequence="copies"),
    Case("one-2^26/copies", "tail", equal(1, 2**26), sequence="copies", devices=CPU),
    *_recipes(Case("one-2^28", "recipe", equal(1, 2**28), devices=CUDA)),
    *_recipes(Case("2000x64x64", "recipe", ((64, 64),) * 2000)),
    # Sizes that are no multiple of a vector, addresses that are not aligned to one, and neither.
    *_in_both(Case("even-100x100000", "layout", equal(100, 100_000), devices=CPU)),
    *_in_both(Case("odd-100x100003", "layout", equal(100, 100_003), devices=CPU)),
    *_in_both(Case("offset-100x100000", "layout", equal(100, 100_000), devices=CPU, offset=1)),
    *_in_both(Case("even-100x1000000", "layout", equal(100, 1_000_000), devices=CUDA)),
    *_in_both(Case("odd-100x1000003", "layout", equal(100, 1_000_003), devices=CUDA)),
    *_in_both(Case("offset-100x1000000", "layout", equal(100, 1_000_000), devices=CUDA, offset=1)),
    # One element a tensor, so the step is all host: the cost of a launch that does no work.
    Case("host-100", "host", equal(100, 1), quick=True),
    Case("host-1000", "host", equal(1000, 1), quick=True),
    Case("host-10000", "host", equal(10_000, 1)),
    # The same where another process has one of the cores.
    *(_beside_busy_core(f"host-{n}", equal(n, 1), n == 1000) for n in (300, 400, 1000, 3000)),
    _beside_busy_core("400x1024", equal(400, 1024)),
    _beside_busy_core("2000x256", equal(2000, 256)),
    # What more threads give.
    *(
        on_threads
        for case in (
            *_in_both(Case("gpt2-124m", "threads", gpt2(12, 768))),
            *_in_both(Case("one-2^26", "threads", equal(1, 2**26))),
            Case("2000x256", "threads", equal(2000, 256)),
            Case("gpt2-124m/tail", "threads", gpt2(12, 768), sequence="tail"),
            Case("2000x256/tail", "threads", equal(2000, 256), sequence="tail"),
        )
        for on_threads in _on_threads(case)
    ),
    # Time against the number of tensors.
    *(
        Case(f"tensors-{n}", "sweep-tensors", equal(n, 1024))
        for n in (10, 30, 100, 300, 1000, 3000, 10_000)
    ),
    # Bandwidth against the size of one tensor.
    *(Case(f"elements-2^{k}", "sweep-elements", equal(1, 2**k)) for k in range(10, 29, 2)),
)


def select(
    device: str, quick: bool, patterns: tuple[str, ...] = (), cores: int | None = None
) -> list[Case]:
    """The cases of a run: those of `device`, only the quick ones or only those matching a pattern,
    with no more threads than there are cores.

    Raises ValueError when a pattern matches no case of the device.
    """
    cases = [case for case in CASES if device in case.devices]
    cases = [case for case in cases if cores is None or (case.threads or 0) <= cores]
    for pattern in patterns:
        if not any(fnmatchcase(case.id, pattern) for case in cases):
            known = ", ".join(case.id for case in cases)
            raise ValueError(f"--only {pattern!r} matches no {device} case; there are: {known}")
    if patterns:
        return [c for c in cases if any(fnmatchcase(c.id, pattern) for pattern in patterns)]
    return [case for case in cases if case.quick or not quick]
