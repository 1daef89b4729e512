"""``warpstep.SGD``: torch's class, stepped in one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import SGD as TorchSGD  # noqa: N811 - not torch.optim's, where ours may be

from warpstep.averages import EmaDecay
from warpstep.backends import BackendName
from warpstep.groups import Members
from warpstep.hypers import DecayForm, check_arguments
from warpstep.optimizer import Optimizer
from warpstep.precision import Copies, Master, Rounding, StateDtype
from warpstep.rules import SGD as RULE


class SGD(Optimizer, TorchSGD):
    """SGD with or without momentum, for a whole model in one kernel launch.

    A drop-in for :class:`torch.optim.SGD`. With gradient g::

        g <- g + weight_decay * p
        b <- momentum * b + (1 - dampening) * g        g at the first step
        p <- p - lr * b                                lr * (g + momentum * b) with nesterov

    and without momentum ``p <- p - lr * g``. ``decay_form="decoupled"`` makes it SGDW: the first
    line is left out, and ``lr * weight_decay * p`` is taken from p. Arithmetic is in float32
    (float64 for float64 parameters), and each stored value is rounded once. Complex parameters are
    stepped as pairs of real numbers. A step with sparse gradients is torch's own.

    The state has ``momentum_buffer`` where there is momentum, as torch's; and ``step``, a count of
    steps, only with dampened momentum or ``ema_decay``, whose first step is another. A buffer that
    begins later (momentum was switched on) begins the count anew where it is dampened, and so an
    average, too.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning
    (https://proceedings.mlr.press/v28/sutskever13.html), in torch's form; decoupled decay:
    Loshchilov and Hutter, Algorithm 1 (https://arxiv.org/abs/1711.05101).

    Args:
        params: parameters, named parameters, or dicts of groups, as torch takes them.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            torch's. ``foreach`` and ``fused`` choose among torch's implementations; here kernels
            step all the same (``backend="reference"`` is plain PyTorch).
        backend, state_dtype, master, rounding, seed, copies, decay_form, ema_decay, ema_dtype,
        stats, unscale_grads: as :class:`AdamW` has them; ``decay_form`` is ``"coupled"`` by
            default, and ``rounding`` is of parameters: momentum_buffer is rounded to nearest.

    Raises:
        ValueError: a value is out of its range, names no choice, or does not go with another.
        RuntimeError: ``fused`` goes with neither ``foreach`` nor ``differentiable``, as in torch.
        TypeError: an argument is of a wrong type: ``params``, a number, ``seed`` or ``copies``.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: BackendName = "auto",
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        copies: Copies | None = None,
        decay_form: DecayForm | None = None,
        ema_decay: EmaDecay | None = None,
        ema_dtype: torch.dtype | None = None,
        stats: bool = False,
        unscale_grads: bool = False,
    ) -> None:
        numbers = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        check_arguments(params, lr=lr, **numbers)
        self._members = Members()
        TorchSGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(
            differentiable,
            backend=backend,
            state_dtype=state_dtype,
            master=master,
            rounding=rounding,
            seed=seed,
            copies=copies,
            decay_form=decay_form,
            ema_decay=ema_decay,
            ema_dtype=ema_dtype,
            stats=stats,
            unscale_grads=unscale_grads,
        )
