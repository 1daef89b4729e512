"""Launches the Triton kernels: the tensor table, what is sent each step, ahead-of-time compiles."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .arithmetic import INTERPRETED
from .formats import Format
from .grad_norm import grad_norm_kernel
from .layout import (
    BLOCK,
    CAUTIOUS,
    DECAY,
    FLAGS,
    HYPER_WORDS,
    L1,
    L1L2,
    MIN,
    MOMENTS,
    STABLE,
    UPPER,
)
from .least_magnitude import least_magnitude_kernel
from .step import Recipe, step_kernel
from .tail import NO_TAIL, Tail

# Elements that a program takes: enough that working out the constants does not show, but fewer
# where there would be less than PROGRAMS programs, some eight for a large GPU's multiprocessor.
CHUNKS = (2048, 4096, 8192, 16384)
PROGRAMS = 1024
# Few warps, so that several programs share a multiprocessor and one loads while another computes.
NUM_WARPS = 4
# Elements that a thread takes at a time: a 16-byte access of a 2-byte operand, two of a 4-byte one.
THREAD_ELEMENTS = 8
# Elements of which every format has whole 16-byte vectors.
GRANULE = 16
# The interpreter's costs are by the operation, not by the element.
INTERPRETER_BLOCK = 4096
# Contraction off: a fused multiply-add stands where the rule spells one, and nowhere else.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
launches = 0  # kernels launched since import


class TensorTable:
    """Every tensor of one recipe on one device, as the kernel reads it. Made once per plan.

    `operands` are lists of the tensors of each operand that has a place in layout.h's TensorRow
    (the parameters, three moments, their scales, residuals, averages, copies), or None for one that
    the recipe is without.
    Lists have an entry a tensor; tensors are read flat, as their elements lie in memory. Only
    addresses are kept: the caller keeps the tensors alive, and makes another table when one moves.

    Raises:
        RuntimeError: for the CPU without Triton's interpreter, or another device with it.
    """

    def __init__(
        self,
        operands: Sequence[Sequence[Tensor] | None],
        steps: Sequence[Tensor | None] | None,  # one float32 each; None where none are counted
        groups: Sequence[int],  # index of each tensor's parameter group
        device: torch.device,
        *,
        firsts: Sequence[int] | None = None,  # where shards begin in their tensors; None: all at 0
        numbers: Sequence[int] | None = None,  # the parameters' among the optimizer's; None: all 0
        seed: int = 0,  # of random bits, 64 of its own
    ) -> None:
        self.device = torch.device(device)
        self.seed = seed
        self.device_module = torch.get_device_module(self.device)
        if (self.device.type == "cpu") != INTERPRETED:
            found = f"{self.device} with TRITON_INTERPRET {'set' if INTERPRETED else 'not set'}"
            raise RuntimeError(f"{found} at import: set it for the CPU, and for the CPU alone")
        assert len(operands) == STABLE
        host = torch.device("cpu")  # named, so that a default device is not taken
        params = operands[0] or ()
        numels = torch.tensor([p.numel() for p in params], dtype=torch.int64, device=host)
        self.chunk = chunk_of(int(numels.sum()))
        counts = ((numels + self.chunk - 1) // self.chunk).clamp(min=1)
        tensors = torch.arange(len(params), device=host).repeat_interleave(counts)
        indices = torch.arange(len(tensors), device=host) - (counts.cumsum(0) - counts)[tensors]
        columns = [
            torch.tensor([0 if t is None else t.data_ptr() for t in column], device=host)
            for column in (each or [None] * len(params) for each in (*operands, steps))
        ]
        none = torch.zeros_like(numels)
        columns.append(numels)
        columns.append(none if firsts is None else torch.tensor(firsts, device=host))
        columns.append(torch.tensor(groups, device=host) | counts << UPPER.value)
        # Behind heads of no elements.
        columns.append(
            none if numbers is None else torch.tensor(numbers, device=host) << UPPER.value
        )

        self.programs = len(tensors)
        self.chunk_counts = counts
        self.rows = torch.stack(columns, dim=1).to(self.device)
        self.chunks = torch.stack([tensors, indices], dim=1).to(self.device, torch.int32)
        self.arrivals = torch.zeros(len(params), dtype=torch.int32, device=self.device)
        self.block = INTERPRETER_BLOCK
        if not INTERPRETED:
            with self.device_module.device(self.device):
                self.block = block_of(triton.runtime.driver.active.get_current_target())
        self.hypers = Uploaded(self.device)
        self.grads = Uploaded(self.device)

    def current_stream(self) -> Any:
        """The stream that a launch goes to; None in the interpreter."""
        return None if INTERPRETED else self.device_module.current_stream(self.device)

    def all_with(self, hypers: bytes, grads: Tensor, stream: Any) -> tuple[Tensor, ...]:
        """All tables that kernels of the step read, for a launch on `stream`."""
        words = torch.frombuffer(bytearray(hypers), dtype=torch.int64)
        uploaded = (self.hypers.send(words, stream), self.grads.send(grads, stream))
        return (self.rows, self.chunks, self.arrivals, *uploaded)

    def use_on(self, stream: Any, *others: Tensor | None) -> None:
        """Keeps these tables, and `others`, from being freed before `stream` is done with them."""
        for tensor in (self.rows, self.chunks, self.arrivals, *others):
            if tensor is not None and stream is not None:
                tensor.record_stream(stream)


class Uploaded:
    """One kind of words that launches read: sent to the device when they have changed.

    Host buffers are pinned, so that nobody waits for a copy, and each is written once: a copy under
    way, or a captured graph at each replay, may yet read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._words: Tensor | None = None  # on the host, as last sent
        # Written next. Pinned ahead, because not every driver pins memory during a capture.
        self._spare: Tensor | None = None
        self._sent: tuple[Any, Tensor] | None = None  # a stream; `_words` on the device, for it
        self._captured: list[Tensor] = []  # host buffers that graphs read

    def send(self, words: Tensor, stream: Any) -> Tensor:
        """`words` on the device, for launches on `stream`, which is the current one."""
        if stream is None:
            return words
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._words is None or not torch.equal(self._words, words):
            host = torch.empty_like(words, pin_memory=True) if self._spare is None else self._spare
            self._words, self._spare, self._sent = host.copy_(words), None, None
        if self._spare is None and not capturing:
            self._spare = torch.empty_like(words, pin_memory=True)

        # A captured copy is made at replay: it is of no use to a step before, or to another graph.
        if not capturing and self._sent is not None and self._sent[0] == stream:
            return self._sent[1]
        on_device = self._words.to(self.device, non_blocking=True)
        if capturing:
            self._captured.append(self._words)
        else:
            self._sent = (stream, on_device)
        return on_device


def chunk_of(elements: int) -> int:
    """How many elements a program takes where there are so many in all."""
    if INTERPRETED:
        return CHUNKS[-1]
    return next((c for c in reversed(CHUNKS) if c * PROGRAMS <= elements), CHUNKS[0])


def block_of(target: GPUTarget) -> int:
    """How many elements a program takes at a time on a target."""
    return THREAD_ELEMENTS * NUM_WARPS * target.warp_size


def format_of(name: str | None) -> Format | None:
    """A format of layout.h by its name; None for none."""
    if name is None:
        return None
    if name in ("e4m3", "ue5m3"):
        return Format(name, tl.uint8, stochastic=name == "ue5m3", in_blocks=True)
    if name == "bfloat16_stochastic":
        return Format(name, tl.uint16, stochastic=True)
    if name == "bfloat16" and INTERPRETED:
        return Format(name, tl.uint16)  # NOTE [bfloat16 in the interpreter] in formats.py
    return Format(name, getattr(tl, name))


def recipe_of(recipe: Any) -> Recipe:
    """A recipe in formats of Triton's."""
    param, *others = map(format_of, recipe.formats())
    moments = tuple(f for f in others[:MOMENTS] if f is not None)
    residual, ema, copy, grad = others[-4:]
    if residual is not None:
        param = Format(param.name, tl.uint16)  # split as bits
    compute = tl.float64 if param.dtype == tl.float64 else tl.float32
    granule = max(BLOCK.value if f.in_blocks else GRANULE for f in (param, *moments))
    draws = any(f.stochastic for f in (param, *moments))
    moments = tuple(map(constant, moments))
    operands = (constant(param), constant(grad), moments, *map(constant, (residual, ema, copy)))
    return Recipe(recipe.rule, *operands, compute, granule, draws)


def constant(value: Any) -> Any:
    """A part of a constant as a kernel passes it on: Triton 3.6 takes a tuple for values."""
    return value if INTERPRETED or value is None else tl.constexpr(value)


def is_selective(hypers: bytes) -> bool:
    """Whether some group's decay is l1, cautious, l1l2 or min."""
    forms = hypers[8 * FLAGS.value + DECAY.value :: 8 * HYPER_WORDS.value]
    return any(form in (L1.value, CAUTIOUS.value, L1L2.value, MIN.value) for form in forms)


def launch(
    table: TensorTable,
    grads: Tensor,
    hypers: bytes,
    *,
    recipe: Any,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    statistics: Tensor | None = None,
    least: Tensor | None = None,
    zero_grads: bool = False,
    unscale_grads: bool = False,
) -> None:
    """One step of a table's tensors: one kernel on the current stream, nothing waited for.

    Args:
        table: the tensors, of `recipe`.
        grads: int64[tensors] on the CPU: each gradient's address, or 0 where a parameter has none
            and is left alone, its step counter too. (An empty gradient needs another number.)
        hypers: a `Hyper` of layout.h for each group, as in memory.
        recipe: the name of its `rule`, and `formats()`: the name of each operand's format, or None,
            in the order of layout.h.
        grad_scale: float32[1] on the device; gradients are divided by it.
        found_inf: float32[1] on the device; if anything but zero, nothing is stepped.
        clip_coef: float64[1] on the device; the unscaled gradients are multiplied by it.
        statistics: float64[table.programs, 4] on the device: Tail::statistics of layout.h.
        least: float64[tensors + table.programs] on the device, of `least_magnitudes`, where some
            group's decay is min.
        zero_grads: the gradients are left zero.
        unscale_grads: they are left unscaled and clipped. One of the two at most.
    """
    global launches
    if not grads.any() and statistics is None:
        return
    writes = zero_grads or unscale_grads
    skippable = found_inf is not None and (statistics is not None or writes)
    parts = (statistics is not None, zero_grads, unscale_grads)
    tail = Tail(*parts, is_selective(hypers), skippable)
    with nullcontext() if INTERPRETED else table.device_module.device(table.device):
        stream = table.current_stream()
        tables = table.all_with(hypers, grads, stream)
        scalars = (grad_scale, found_inf, clip_coef, statistics, least)
        table.use_on(stream, *scalars)
        constants = (recipe_of(recipe), tail, table.block)
        numbers = (table.chunk, table.seed)
        step_kernel[(table.programs,)](*tables, *scalars, *numbers, *constants, **OPTIONS)
    launches += 1


def least_magnitudes(
    table: TensorTable, grads: Tensor, hypers: bytes, least: Tensor, *, recipe: Any
) -> None:
    """The smallest magnitude of each parameter with a gradient and decay min, before the step.

    One kernel on the current stream, nothing waited for. Without an element it is infinite.

    Args:
        table, grads, hypers, recipe: as `launch` takes them.
        least: float64[tensors + table.programs] on the device: what is found comes first; the rest
            is scratch.
    """
    global launches
    if not grads.any():
        return
    with nullcontext() if INTERPRETED else table.device_module.device(table.device):
        stream = table.current_stream()
        tables = table.all_with(hypers, grads, stream)
        table.use_on(stream, least)
        found_and_shares = least.split([len(grads), table.programs])
        constants = (recipe_of(recipe).param, table.block)
        arguments = (*tables, *found_and_shares, table.chunk, *constants)
        least_magnitude_kernel[(table.programs,)](*arguments, **OPTIONS)
    launches += 1


def grad_norm(
    table: TensorTable, grads: Tensor, out: Tensor, *, recipe: Any, largest: bool
) -> None:
    """The norm of a table's gradients: one kernel on the current stream, nothing waited for.

    Args:
        table, grads, recipe: as `launch` takes them.
        out: float64[2 + table.programs] on the device, zeros: the sum of squares, or with `largest`
            the largest magnitude, comes first; the rest is scratch.
        largest: which of the two.
    """
    global launches
    with nullcontext() if INTERPRETED else table.device_module.device(table.device):
        stream = table.current_stream()
        tables = (table.rows, table.chunks, table.grads.send(grads, stream))
        table.use_on(stream, out)
        constants = (recipe_of(recipe).grad, largest, table.block)
        grad_norm_kernel[(table.programs,)](*tables, out, table.chunk, *constants, **OPTIONS)
    launches += 1


def compile_for(target: GPUTarget, recipe: Any, tail: Tail = NO_TAIL) -> CompiledKernel:
    """The step's kernel compiled ahead of time, for a target that need not be present."""
    assert not INTERPRETED, "Triton's interpreter compiles nothing"
    types = ["*i64", "*i32", "*i32", "*i64", "*i64", "*fp32", "*fp32", "*fp64", "*fp64", "*fp64"]
    types += ["i32", "u64", *["constexpr"] * 3]
    signature = dict(zip(step_kernel.arg_names, types, strict=True))
    constants = {
        "RECIPE": recipe_of(recipe),
        "TAIL": tail,
        "BLOCK": block_of(target),
    }
    return _compiled(step_kernel, signature, constants, target)


def compile_grad_norm_for(target: GPUTarget, recipe: Any, largest: bool) -> CompiledKernel:
    """The norm's kernel compiled ahead of time, for a target that need not be present."""
    types = ["*i64", "*i32", "*i64", "*fp64", "i32", *["constexpr"] * 3]
    signature = dict(zip(grad_norm_kernel.arg_names, types, strict=True))
    constants = {
        "FORMAT": recipe_of(recipe).grad,
        "LARGEST": largest,
        "BLOCK": block_of(target),
    }
    return _compiled(grad_norm_kernel, signature, constants, target)


def compile_least_magnitude_for(target: GPUTarget, recipe: Any) -> CompiledKernel:
    """The kernel of smallest magnitudes compiled ahead of time, as the others."""
    types = ["*i64", "*i32", "*i32", "*i64", "*i64", "*fp64", "*fp64", "i32", *["constexpr"] * 2]
    signature = dict(zip(least_magnitude_kernel.arg_names, types, strict=True))
    constants = {"FORMAT": recipe_of(recipe).param, "BLOCK": block_of(target)}
    return _compiled(least_magnitude_kernel, signature, constants, target)


def _compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> CompiledKernel:
    # As the tables at a launch: torch allocates at 16-byte boundaries.
    tables = ("rows", "chunks", "arrivals", "hypers", "grads")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in tables
    }
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target, OPTIONS)
