"""The Triton kernel and its launcher: every tensor of a recipe on a device in one launch.

The rule is rule.h's, operation by operation and under the same names; the records are tables.h's.
A program takes one chunk: it works out the constants of the chunk's tensor, then walks the elements
block by block. The constants need float64: where a device has none (some Intel GPUs) the kernel
does not compile, and another backend has to serve.
"""

from collections import namedtuple
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# Elements that a program takes. As in the CUDA kernel: a 100M-element model makes thousands of
# programs, and a chunk is large enough that working out the constants does not show.
CHUNK = 16384
# Few warps, so that several programs share a multiprocessor and one loads while another computes.
NUM_WARPS = 4
# Elements that a thread takes at a time: a 16-byte access of a 2-byte stream, two of a 4-byte one.
THREAD_ELEMENTS = 8
# The interpreter's costs are by the operation, not by the element.
INTERPRETER_BLOCK = 4096
# Contraction off: a fused multiply-add stands where the rule spells one, and nowhere else.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
INTERPRETED = bool(triton.knobs.runtime.interpret)

GRANULE = tl.constexpr(16)  # elements: whole 16-byte vectors in every format
ROW_WORDS = tl.constexpr(8)  # a row of TensorTable.rows
HYPER_WORDS = tl.constexpr(6)  # sizeof(Hyper) / 8
launches = 0  # kernels launched since import

# What the rule needs of a tensor at this step; from float64, each rounded once.
CONSTANTS = (
    "grad_factor coupled_decay decoupled_decay step_size eps_hat weight1 weight2 beta1 beta2"
)
Constants = namedtuple("Constants", CONSTANTS)
# Addresses of a tensor's streams, and which element is the chunk's first.
Streams = namedtuple("Streams", "param grad exp_avg exp_avg_sq max_exp_avg_sq first")
# Triton's types of a recipe's streams, the type computed in, and whether there is amsgrad.
Formats = namedtuple("Formats", "param grad moment compute amsgrad")


def device_function(fn: Any) -> Any:
    """`triton.jit` for functions that kernels call.

    The interpreter patches the whole language anew at each call of a jitted function, 240 us where
    an operation takes 20. Called as plain Python, a function finds the language patched.
    """
    return fn if INTERPRETED else triton.jit(fn)


@device_function
def power(base, exponent):
    """base^exponent by squaring: products only, hence the same bits on every machine."""
    result = tl.full((), 1, tl.float64)
    while exponent != 0:
        result = tl.where(exponent & 1 != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@device_function
def read(word, kind):
    """A hyper-parameter: the word is a number or the address of one (`Scalar` in tables.h)."""
    value = word.to(tl.float64, bitcast=True)
    if kind == 1:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif kind == 2:
        value = tl.load(word.to(tl.pointer_type(tl.float64)))
    return value


@device_function
def constants_of(hyper, step, grad_scale, T: tl.constexpr):
    """The constants of a tensor; `step` counts the steps taken before this one."""
    word = tl.load(hyper + 5)  # 32 bits of flags, then a byte each: kinds of lr, beta1, beta2
    lr = read(tl.load(hyper), word >> 32 & 255)
    beta1 = read(tl.load(hyper + 1), word >> 40 & 255)
    beta2 = read(tl.load(hyper + 2), word >> 48 & 255)
    eps = tl.load(hyper + 3).to(tl.float64, bitcast=True)
    weight_decay = tl.load(hyper + 4).to(tl.float64, bitcast=True)
    t = step.to(tl.uint32) + 1
    bias_correction1 = 1 - power(beta1, t)
    bias_correction2_sqrt = tl.sqrt(1 - power(beta2, t))
    grad_factor = tl.where(word & 1 != 0, -1.0, 1.0).to(tl.float64)
    if grad_scale is not None:
        grad_factor = grad_factor / tl.load(grad_scale).to(tl.float64)
    coupled = tl.where(word & 2 != 0, 0, weight_decay).to(T)
    decoupled = tl.where(word & 2 != 0, lr * weight_decay, 0).to(T)
    step_size = (lr / bias_correction1 * bias_correction2_sqrt).to(T)
    eps_hat = (eps * bias_correction2_sqrt).to(T)
    betas = ((1 - beta1).to(T), (1 - beta2).to(T), beta1.to(T), beta2.to(T))
    return Constants(grad_factor.to(T), coupled, decoupled, step_size, eps_hat, *betas)


@device_function
def divide(a, b):
    """a / b as IEEE rounds it, which Triton's plain operator does in float64 only."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@device_function
def square_root(a):
    """The root as IEEE rounds it, which Triton's plain function does in float64 only."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@device_function
def lerp(start, end, weight, complement):
    """(1 - weight) * start + weight * end, written from the nearer end as torch.lerp is."""
    difference = end - start
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, -complement), difference, tl.where(near, start, end))


@device_function
def finite_or_zero(x):
    """x, or 0 where x is infinite or NaN: keeps inf - inf out of forms where torch's has none."""
    return tl.where(tl.abs(x) < float("inf"), x, 0)


@device_function
def maximum(a, b):
    """The larger, NaN if either is (as torch.maximum)."""
    return tl.where((a > b) | (a != a), a, b)


@device_function
def adamw_rule(c, param, grad, m, v, peak, AMSGRAD: tl.constexpr):
    """One step of a block: the new parameter, exp_avg, exp_avg_sq and max_exp_avg_sq."""
    g = grad * c.grad_factor
    g = tl.where(c.coupled_decay != 0, tl.fma(c.coupled_decay, param, g), g)

    m = lerp(m, g, c.weight1, c.beta1)
    kept = tl.fma(-c.weight2, finite_or_zero(v), v)
    kept = tl.where(c.weight2 < 0.5, kept, c.beta2 * v)
    v = tl.fma(c.weight2 * g, g, kept)
    peak = maximum(peak, v) if AMSGRAD else v

    update = c.step_size * divide(m, square_root(peak) + c.eps_hat)
    return param - tl.fma(c.decoupled_decay, finite_or_zero(param), update), m, v, peak


# NOTE [bfloat16 in the interpreter]
# Triton's interpreter truncates where the compiled kernel rounds to nearest even, and garbles
# subnormal numbers. So there, and only there, bfloat16 is read and written as the bits it is.


@device_function
def pointers(address, first, offsets, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of a format; ALIGNED promises that `first` is at a 16-byte boundary."""
    base = address.to(tl.pointer_type(FORMAT)) + first
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offsets


@device_function
def load(pointer, mask, T: tl.constexpr):
    """Elements as numbers to compute with."""
    x = tl.load(pointer, mask=mask)
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(T)


@device_function
def store(pointer, x, mask):
    """Numbers as elements, rounded to nearest, ties to even."""
    if pointer.dtype.element_ty == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        x = tl.where(x != x, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@device_function
def step_range(
    c, at, begin, end, BLOCK: tl.constexpr, FORMATS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The step of a chunk's [begin, end). ALIGNED streams: 0 none, 1 all but grad, 2 all."""
    start = tl.cast(begin, tl.int32)
    while start < end:  # range() of a tensor fails in Triton 3.6's interpreter with NumPy 2.4
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < end
        param_at = pointers(at.param, at.first, offsets, FORMATS.param, ALIGNED > 0)
        grad_at = pointers(at.grad, at.first, offsets, FORMATS.grad, ALIGNED > 1)
        m_at = pointers(at.exp_avg, at.first, offsets, FORMATS.moment, ALIGNED > 0)
        v_at = pointers(at.exp_avg_sq, at.first, offsets, FORMATS.moment, ALIGNED > 0)
        peak_at = pointers(at.max_exp_avg_sq, at.first, offsets, FORMATS.moment, ALIGNED > 0)

        param = load(param_at, mask, FORMATS.compute)
        grad = load(grad_at, mask, FORMATS.compute)
        m = load(m_at, mask, FORMATS.compute)
        v = load(v_at, mask, FORMATS.compute)
        peak = load(peak_at, mask, FORMATS.compute) if FORMATS.amsgrad else v
        param, m, v, peak = adamw_rule(c, param, grad, m, v, peak, FORMATS.amsgrad)
        store(param_at, param, mask)
        store(m_at, m, mask)
        store(v_at, v, mask)
        if FORMATS.amsgrad:
            store(peak_at, peak, mask)
        start += BLOCK


@device_function
def take_step(counter, arrivals, chunks):
    """Reads the step counter; the last of the tensor's programs to have read it advances it."""
    step = tl.load(counter, volatile=True)
    tl.debug_barrier()  # each thread reads for itself, and none may come after the write
    if chunks == 1:
        tl.store(counter, step + 1)
    elif tl.atomic_add(arrivals, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals, 0)
        tl.store(counter, step + 1)
    return step


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def adamw_kernel(
    rows,  # int64[tensors, ROW_WORDS]: param, exp_avg, exp_avg_sq, max_exp_avg_sq, step, numel, ...
    chunks,  # int32[programs, 2]: tensor, index of the chunk within it
    arrivals,  # int32[tensors], zeros: programs that have read the step counter
    hypers,  # int64[groups, HYPER_WORDS]: `Hyper` in tables.h
    grads,  # int64[tensors]: addresses, 0 for a tensor to leave alone
    grad_scale,  # float32[1] or None
    found_inf,  # float32[1] or None
    FORMATS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step of one chunk."""
    chunk = chunks + 2 * tl.program_id(0)
    tensor = tl.load(chunk)
    grad = tl.load(grads + tensor)
    if grad == 0:
        return
    if found_inf is not None and tl.load(found_inf) != 0:
        return

    row = rows + tensor * ROW_WORDS
    counter = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    step = take_step(counter, arrivals + tensor, tl.load(row + 7))
    c = constants_of(hypers + tl.load(row + 6) * HYPER_WORDS, step, grad_scale, FORMATS.compute)

    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(row + 5) - first, CHUNK).to(tl.int32)
    at = Streams(tl.load(row), grad, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), first)

    # NOTE [alignment]
    # A vector access takes a proof that address and mask come in whole vectors (CHUNK is whole
    # vectors). So the address is looked at here and the promise made in the branch, and whole
    # granules have a bound of their own; what they leave, and streams that begin anywhere, go one
    # element at a time. Gradients have their own case: views into a bucket are often misaligned.
    if (at.param | at.exp_avg | at.exp_avg_sq | at.max_exp_avg_sq) & 15 == 0:
        body = size // GRANULE * GRANULE
        if at.grad & 15 == 0:
            step_range(c, at, 0, body, BLOCK, FORMATS, 2)
        else:
            step_range(c, at, 0, body, BLOCK, FORMATS, 1)
        step_range(c, at, body, size, GRANULE, FORMATS, 0)
    else:
        # Half a block: blocks of one shape get one layout; here neighbours go to neighbours.
        step_range(c, at, 0, size, BLOCK // 2, FORMATS, 0)


class TensorTable:
    """Every tensor of one recipe on one device, as the kernel reads it. Made once per plan.

    Only addresses are kept: the caller keeps the tensors alive, and makes another table when one
    moves. Lists have an entry a tensor; tensors are read flat, as their elements lie in memory.

    Raises:
        RuntimeError: for the CPU without Triton's interpreter, or another device with it.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor] | None,  # None without amsgrad
        steps: Sequence[Tensor],  # one float32 each
        groups: Sequence[int],  # index of each tensor's parameter group
        device: torch.device,
    ) -> None:
        self.device = torch.device(device)
        self.device_module = torch.get_device_module(self.device)
        if (self.device.type == "cpu") != INTERPRETED:
            found = f"{self.device} with TRITON_INTERPRET {'set' if INTERPRETED else 'not set'}"
            raise RuntimeError(f"{found} at import: set it for the CPU, and for the CPU alone")
        numels = torch.tensor([p.numel() for p in params])
        counts = ((numels + CHUNK - 1) // CHUNK).clamp(min=1)
        tensors = torch.arange(len(params)).repeat_interleave(counts)
        indices = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
        streams = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [None] * len(params), steps)
        addresses = [[0 if t is None else t.data_ptr() for t in stream] for stream in streams]
        columns = [*map(torch.tensor, addresses), numels, torch.tensor(groups), counts]

        self.programs = len(tensors)
        self.rows = torch.stack(columns, dim=1).to(self.device)
        self.chunks = torch.stack([tensors, indices], dim=1).to(self.device, torch.int32)
        self.arrivals = torch.zeros(len(params), dtype=torch.int32, device=self.device)
        self.block = INTERPRETER_BLOCK
        if not INTERPRETED:
            with self.device_module.device(self.device):
                self.block = block_of(triton.runtime.driver.active.get_current_target())
        self._last: tuple[int, Tensor, Tensor] | None = None
        self._spare: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def upload(self, hypers: bytes, grads: Tensor) -> Tensor:
        """`hypers`, then `grads`, as int64 words on the device; sent if they are not there yet."""
        words = torch.cat([torch.frombuffer(bytearray(hypers), dtype=torch.int64), grads])
        if self.device.type == "cpu":
            return words
        stream = self.device_module.current_stream(self.device)
        # A captured copy happens at replay: steps before it cannot use it.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._last is not None and not capturing:
            last_stream, last_words, on_device = self._last
            if last_stream != stream.stream_id:
                for tensor in (self.rows, self.chunks, self.arrivals, on_device):
                    tensor.record_stream(stream)  # so that it is not freed under the new stream
            elif torch.equal(last_words, words):
                return on_device

        # A buffer that a copy under way, or a captured graph, may yet read is never written again.
        # Older versions of torch cannot pin memory during a capture, so one buffer is kept ready.
        host = torch.empty_like(words, pin_memory=True) if self._spare is None else self._spare
        self._spare = None if capturing else torch.empty_like(words, pin_memory=True)
        on_device = host.copy_(words).to(self.device, non_blocking=True)
        if capturing:
            self._captured.append((host, on_device))
        else:
            self._last = (stream.stream_id, words, on_device)
        return on_device


def block_of(target: GPUTarget) -> int:
    """How many elements a program takes at a time on a target."""
    return THREAD_ELEMENTS * NUM_WARPS * target.warp_size


def formats_of(recipe: Any) -> Formats:
    """The streams' types in Triton, which names them as torch does."""
    formats = [getattr(tl, str(d)[6:]) for d in (recipe.param, recipe.grad, recipe.moment)]
    compute = tl.float64 if recipe.param == torch.float64 else tl.float32
    if INTERPRETED:
        formats = [tl.uint16 if f == tl.bfloat16 else f for f in formats]
    return Formats(*formats, compute, bool(recipe.amsgrad))


def launch(
    table: TensorTable,
    grads: Tensor,
    hypers: bytes,
    *,
    recipe: Any,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of a table's tensors: one kernel on the current stream, nothing waited for.

    Args:
        table: the tensors, of `recipe`.
        grads: int64[tensors] on the CPU: each gradient's address, or 0 where a parameter has none
            and is left alone, its step counter too. (An empty gradient needs another number.)
        hypers: a `Hyper` of tables.h for each group, as in memory.
        recipe: dtypes `param`, `grad` and `moment`, and whether `amsgrad`.
        grad_scale: float32[1] on the device; gradients are divided by it.
        found_inf: float32[1] on the device; if anything but zero, nothing is changed.
    """
    global launches
    if not grads.any():
        return
    with nullcontext() if INTERPRETED else table.device_module.device(table.device):
        changing = table.upload(hypers, grads).split([len(hypers) // 8, len(grads)])
        tables = (table.rows, table.chunks, table.arrivals, *changing, grad_scale, found_inf)
        constants = (formats_of(recipe), CHUNK, table.block)
        adamw_kernel[(table.programs,)](*tables, *constants, **OPTIONS)
    launches += 1


def compile_for(target: GPUTarget, recipe: Any) -> CompiledKernel:
    """The kernel compiled ahead of time, for a target that need not be present."""
    assert not INTERPRETED, "Triton's interpreter compiles nothing"
    types = ["*i64", "*i32", "*i32", "*i64", "*i64", "*fp32", "*fp32", *["constexpr"] * 3]
    signature = dict(zip(adamw_kernel.arg_names, types, strict=True))
    constants = {"FORMATS": formats_of(recipe), "CHUNK": CHUNK, "BLOCK": block_of(target)}
    # As the tables at a launch: torch allocates at 16-byte boundaries.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    return triton.compile(ASTSource(adamw_kernel, signature, constants, aligned), target, OPTIONS)
