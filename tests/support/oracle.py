"""The truth: textbook AdamW in extended precision, and how far a right kernel may be from it.

`step` is written from the papers (Loshchilov and Hutter's Algorithm 2; Kingma and Ba; Reddi et al.)
and shares nothing with the package. numpy's longdouble has a 64-bit significand on x86 and more on
other machines: at least 2,000 times finer than float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

WIDE = np.longdouble
# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# Half the distance between subnormal numbers.
TINY = {
    torch.float64: 2.0**-1075,
    torch.float32: 2.0**-150,
    torch.bfloat16: 2.0**-134,
    torch.float16: 2.0**-25,
}


@dataclass(frozen=True)
class Options:
    """Hyper-parameters, with torch's names and defaults. `grad_factor`: what gradients are
    multiplied by before anything else (unscaled, clipped)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = True
    decay_form: str | None = None
    base_lr: float | None = None
    grad_factor: float = 1.0

    @property
    def form(self) -> str:
        return self.decay_form or ("decoupled" if self.decoupled else "coupled")


@dataclass
class Streams:
    """One parameter's streams, in extended precision."""

    param: np.ndarray
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray
    max_exp_avg_sq: np.ndarray | None = None


@dataclass
class Step:
    """Exact results of a step, and what bounds the error of a kernel's."""

    after: Streams
    grad: np.ndarray  # with sign and coupled decay
    before: Streams
    decay: np.ndarray  # lr * weight_decay * p
    update: np.ndarray  # lr * mhat / (sqrt(vhat) + eps)
    slope: np.ndarray  # of the update with regard to exp_avg
    t: int


def wide(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in extended precision, complex ones as pairs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().cpu().double().numpy().astype(WIDE)


def exact_norm(params: Iterable[torch.Tensor], kind: float = 2.0) -> np.floating:
    """The norm of all gradients: Euclidean, or the largest magnitude."""
    flat = np.concatenate([wide(p.grad).ravel() for p in params])
    return np.sqrt(np.sum(flat * flat)) if kind == 2.0 else np.abs(flat).max()


def step(before: Streams, grad: np.ndarray, t: int, options: Options) -> Step:
    """Step number t, counting from 1."""
    lr, eps, decay = WIDE(options.lr), WIDE(options.eps), WIDE(options.weight_decay)
    beta1, beta2 = (WIDE(b) for b in options.betas)
    p = before.param
    g = grad * WIDE(options.grad_factor)
    g = -g if options.maximize else g
    if options.form == "coupled":
        g = g + decay * p
    m = beta1 * before.exp_avg + (1 - beta1) * g
    v = beta2 * before.exp_avg_sq + (1 - beta2) * g * g
    peak = np.maximum(before.max_exp_avg_sq, v) if options.amsgrad else v
    step_size = lr / (1 - beta1**t)
    denominator = np.sqrt(peak / (1 - beta2**t)) + eps
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(denominator > 0, step_size / denominator, 0)
        update = np.where(denominator > 0, step_size * m / denominator, np.nan)
    decayed = {
        "coupled": np.zeros_like(p),
        "decoupled": lr * decay * p,
        "independent": lr / WIDE(options.base_lr or 1) * decay * p,
        "l1": lr * decay * np.sign(p),
        "cautious": lr * decay * p * (np.sign(update) * np.sign(p) >= 0),
        "l1l2": lr * decay / 2 * (p + np.sign(p)),
        "min": lr * (decay != 0) * (np.abs(p).min() if p.size else 0) * np.sign(p),
    }[options.form]
    after = Streams(p - decayed - update, m, v, peak if options.amsgrad else None)
    return Step(after, g, before, decayed, update, slope, t)


def stored(error: np.ndarray, exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What an error becomes where the value is rounded once more, to the format it is kept in."""
    return error + ROUNDOFF[dtype] * (np.abs(exact) + error) + TINY[dtype]


def bounds(step: Step, options: Options, param: torch.dtype, moment: torch.dtype) -> Streams:
    """How far each stream of a kernel that computes in float32 (or float64) may be from `step`.

    With u the unit roundoff of the arithmetic, to first order, counting every rounding:

    * exp_avg = fma(w, g - m, m): the product of a rounded weight and a rounded difference (3 u of
      w |g - m|, the third for a coupled g or a scaled one, whose own size is |g|), then 1 u of the
      result: 4 u (|m| + |g|). Not fused (reference, interpreter): one more.
    * exp_avg_sq: w2 rounded, w2 * g, the kept part (2), the sum, g twice: 7 u of a sum of
      positive terms. Coupled decay makes g itself a rounded sum of g and decay * p, which
      may cancel: that error counts through its derivative.
    * param: step_size, eps_hat, square root (half of exp_avg_sq's 7 u), sum, quotient, product: 9 u
      of |update|; exp_avg's error times the slope; 2 u of |decay|; the sum and the difference.
      Bias corrections are worked out in float64: beta^t, a product of t factors, is off by t
      roundings of its own size, and 1 - beta^t by one more, which counts relative to 1 - beta^t.

    Each stream is then rounded once to its format: its unit roundoff, or half a subnormal step.
    """
    u = ROUNDOFF[torch.float64 if param == torch.float64 else torch.float32]
    tiny = TINY[torch.float64 if param == torch.float64 else torch.float32]
    beta2 = options.betas[1]
    coupled = options.weight_decay if options.form == "coupled" else 0
    before, after = step.before, step.after
    # A factor of the gradient is rounded, and so is its product with one.
    factor = 0 if options.grad_factor == 1 else 2
    raw_grad = np.abs(step.grad) + 2 * coupled * np.abs(before.param)

    m = (5 + factor) * u * (np.abs(before.exp_avg) + raw_grad) + tiny
    v = (7 + 2 * factor) * u * after.exp_avg_sq + 4 * tiny
    g = 3 * u * coupled * np.abs(before.param)
    v += (1 - beta2) * (2 * np.abs(step.grad) + g) * g
    peak = after.max_exp_avg_sq if options.amsgrad else after.exp_avg_sq
    with np.errstate(divide="ignore", invalid="ignore"):
        # v's absolute error through the square root, where it is not simply relative to v.
        root = np.where(peak > 0, np.maximum(v / peak, 7 * u) / 2, 0)
    powers = [float(beta) ** step.t for beta in options.betas]
    correction1, correction2 = ((step.t * power + 1) * 2.0**-53 / (1 - power) for power in powers)
    relative = 9 * u + root + correction1 + correction2 / 2
    p = relative * np.abs(step.update) + 3 * u * np.abs(step.decay)
    p += m * step.slope + 2 * u * np.abs(after.param) + tiny
    if options.form == "cautious":  # the sign of an update within its error is anyone's
        decay = options.lr * options.weight_decay * np.abs(before.param)
        p += np.where(np.abs(step.update) <= 2 * m * step.slope, decay, 0)

    return Streams(
        stored(p, after.param, param),
        stored(m, after.exp_avg, moment),
        stored(v, after.exp_avg_sq, moment),
        stored(v, peak, moment) if options.amsgrad else None,
    )
