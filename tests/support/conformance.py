"""A step of an optimizer against the oracle: every stream within the bounds of its roundings."""

import numpy as np

from support import oracle
from support.oracle import Streams
from warpstep.recipes import real_dtype


def streams_of(optimizer, param):
    state = optimizer.state[param]
    peak = oracle.wide(state["max_exp_avg_sq"]) if "max_exp_avg_sq" in state else None
    m, v = oracle.wide(state["exp_avg"]), oracle.wide(state["exp_avg_sq"])
    return Streams(oracle.wide(param), m, v, peak)


def zeros_of(param, amsgrad):
    zero = np.zeros_like(oracle.wide(param))
    return Streams(oracle.wide(param), zero, zero, zero if amsgrad else None)


def assert_step(optimizer, params, t, options_of, grads, before):
    """Takes step t and holds every stream against the oracle."""
    optimizer.step()
    for index, param in enumerate(params):
        options, grad = options_of(index), grads[index]
        exact = oracle.step(before[index], oracle.wide(grad), t, options)
        moment = real_dtype(optimizer.state[param]["exp_avg"].dtype)
        bound = oracle.bounds(exact, options, real_dtype(param.dtype), moment)
        after = streams_of(optimizer, param)
        for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if getattr(after, name) is None:
                assert not options.amsgrad
                continue
            error = np.abs(getattr(after, name) - getattr(exact.after, name))
            worst = np.argmax(error - getattr(bound, name)) if error.size else None
            assert np.all(error <= getattr(bound, name)), (
                f"{name} of tensor {index} ({tuple(param.shape)}) at step {t}, element {worst}: "
                f"error {error.flat[worst]:.3g}, bound {getattr(bound, name).flat[worst]:.3g}"
            )
        assert optimizer.state[param]["step"].item() == t
