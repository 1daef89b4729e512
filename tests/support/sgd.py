"""SGD: the truth in extended precision, how far a right kernel may be from it, and optimizers.

`step` is written from the papers (Sutskever et al., in torch's form; Loshchilov and Hutter's
Algorithm 1) and shares nothing with the package.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import warpstep
from support.oracle import ROUNDOFF, TINY, WIDE, stored, wide
from warpstep.recipes import Recipe, real_dtype


@dataclass(frozen=True)
class Options:
    """Hyper-parameters, with torch's names. `grad_factor`: what gradients are multiplied by before
    anything else (unscaled, clipped)."""

    lr: float = 0.1
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    decay_form: str = "coupled"
    base_lr: float = 1.0
    grad_factor: float = 1.0


PLAIN = {
    "plain": Options(),
    "maximize": Options(maximize=True, weight_decay=0.3),
    "coupled": Options(weight_decay=0.3),
    "decoupled": Options(weight_decay=0.3, decay_form="decoupled"),
    "independent": Options(weight_decay=0.3, decay_form="independent", base_lr=0.7),
    "l1": Options(weight_decay=0.3, decay_form="l1"),
    "cautious": Options(weight_decay=0.3, decay_form="cautious"),
    "l1l2": Options(weight_decay=0.3, decay_form="l1l2"),
    "min": Options(weight_decay=0.3, decay_form="min"),
}
OPTIONS = {
    **PLAIN,
    **{f"momentum-{name}": replace(o, momentum=0.9) for name, o in PLAIN.items()},
    "nesterov": Options(momentum=0.9, nesterov=True),
    "nesterov-coupled-maximize": Options(
        momentum=0.7, nesterov=True, weight_decay=0.2, maximize=True
    ),
    "nesterov-decoupled": Options(
        momentum=0.7, nesterov=True, weight_decay=0.2, decay_form="decoupled"
    ),
    "dampening": Options(momentum=0.9, dampening=0.4),
    "dampening-coupled": Options(momentum=0.6, dampening=0.9, weight_decay=0.1),
    "dampening-decoupled-maximize": Options(
        momentum=0.6, dampening=0.5, weight_decay=0.1, decay_form="decoupled", maximize=True
    ),
    "dampening-alone": Options(dampening=0.5),  # torch takes it, to no effect
}
# Those that are kernels of their own: no buffer, a buffer, a count of steps. Others are read.
KERNELS = ("plain", "momentum-plain", "dampening")


@dataclass
class Streams:
    """A parameter and its buffer, which there is after a first step, in extended precision."""

    param: np.ndarray
    buffer: np.ndarray | None = None


def step(
    before: Streams, grad: np.ndarray, options: Options
) -> tuple[Streams, Streams, np.ndarray]:
    """The exact results of a step; how far a kernel that computes with the unit roundoff u may be
    from each, in units of u: to first order, counting every rounding; and what the parameter may be
    off besides where the sign of an update within its error decides.

    * g: a factor is rounded, and so is the product with it (2 of |g|, where there is one); coupled,
      weight_decay, its product and the sum: 2 of the product, 1 of the sum.
    * b = momentum * b + (1 - dampening) * g: both weights and both products (2 of each term), the
      sum, and g's error times its weight. Nesterov's sum likewise.
    * p: lr and its product (2 of lr * b), b's error times lr; of the decay the factor (2 roundings
      if divided by base_lr), and the product; the sum of both; the difference.
    """
    lr, momentum, decay = (WIDE(x) for x in (options.lr, options.momentum, options.weight_decay))
    p = before.param
    g = grad * WIDE(options.grad_factor) * (-1 if options.maximize else 1)
    off = (0 if options.grad_factor == 1 else 2) * np.abs(g)
    if options.decay_form == "coupled" and decay != 0:
        g = g + decay * p
        off = off + 2 * np.abs(decay * p) + np.abs(g)
    buffer = off_buffer = None
    if momentum != 0:
        if before.buffer is None:
            buffer, off_buffer = g, off
        else:
            weight = 1 - WIDE(options.dampening)
            buffer = momentum * before.buffer + weight * g
            off_buffer = 2 * np.abs(momentum * before.buffer) + 2 * np.abs(weight * g)
            off_buffer += np.abs(buffer) + weight * off
        if options.nesterov:
            off = off + momentum * off_buffer + 2 * np.abs(momentum * buffer)
            g = g + momentum * buffer
            off = off + np.abs(g)
        else:
            g, off = buffer, off_buffer
    update = lr * g
    off = lr * off + 2 * np.abs(update)
    decayed = {
        "coupled": np.zeros_like(p),
        "decoupled": lr * decay * p,
        "independent": lr / WIDE(options.base_lr) * decay * p,
        "l1": lr * decay * np.sign(p),
        "cautious": lr * decay * p * (np.sign(update) * np.sign(p) >= 0),
        "l1l2": lr * decay / 2 * (p + np.sign(p)),
        "min": lr * (decay != 0) * (np.abs(p).min() if p.size else 0) * np.sign(p),
    }[options.decay_form]
    after = p - decayed - update
    off_param = off + 4 * np.abs(decayed) + np.abs(decayed + update) + np.abs(after)
    anyones = np.zeros_like(p)
    if options.decay_form == "cautious":
        anyones = np.where(np.abs(update) <= off * 2.0**-24, lr * decay * np.abs(p), 0)
    return Streams(after, buffer), Streams(off_param, off_buffer), anyones


def streams_of(optimizer, param):
    buffer = optimizer.state[param].get("momentum_buffer") if param in optimizer.state else None
    return Streams(wide(param), None if buffer is None else wide(buffer))


def assert_step(optimizer, params, options_of, grads, before):
    """Takes a step and holds parameters and buffers against the truth."""
    optimizer.step()
    for index, param in enumerate(params):
        options = options_of(index)
        exact, off, anyones = step(before[index], wide(grads[index]), options)
        compute = torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
        after = streams_of(optimizer, param)
        # Second-order terms, and products that are subnormal.
        u, tiny = ROUNDOFF[compute] * (1 + 2.0**-10), 8 * TINY[compute]
        bound = stored(off.param * u + tiny, exact.param, real_dtype(param.dtype)) + anyones
        check(f"param {index}", after.param, exact.param, bound)
        state = optimizer.state.get(param, {})
        assert ("momentum_buffer" in state) == (options.momentum != 0)
        if options.momentum != 0:
            kept = real_dtype(state["momentum_buffer"].dtype)
            bound = stored(off.buffer * u + tiny, exact.buffer, kept)
            check(f"momentum_buffer {index}", after.buffer, exact.buffer, bound)


def check(name, found, exact, bound):
    error = np.abs(found - exact)
    worst = np.argmax(error - bound) if error.size else None
    assert np.all(error <= bound), (
        f"{name} {found.shape}, element {worst}: error {error.flat[worst]:.3g}, bound "
        f"{bound.flat[worst]:.3g}"
    )


def optimizer_for(groups, options, recipe, backend, **more):
    optimizer = warpstep.SGD(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        dampening=options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        maximize=options.maximize,
        state_dtype=None if recipe[2] == recipe[0] else recipe[2],
        decay_form=None if options.decay_form == "coupled" else options.decay_form,
        backend=backend,
        **more,
    )
    for group in optimizer.param_groups if options.decay_form == "independent" else ():
        group["base_lr"] = options.base_lr
    return optimizer


def assert_ran_on(optimizer, backend, recipe, options, ema=None):
    """That the step went through the backend's kernel, and not through the fallback."""
    if backend == "reference":
        assert not optimizer.plan.buckets
        return
    param, grad, moment = recipe
    moments = (moment,) if options.momentum else ()
    counts = ema is not None or bool(options.momentum and options.dampening)
    assert [b.backend for b in optimizer.plan.buckets] == [backend]
    expected = Recipe("sgd", param, grad, moments, ema, counts)
    assert optimizer.plan.buckets[0].recipe == expected
    assert not optimizer.plan.python_only
