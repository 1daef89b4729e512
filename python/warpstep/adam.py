"""``warpstep.Adam``: torch's class, stepped in one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import Adam as TorchAdam  # not torch.optim's: someone may put ours there
from torch.optim.optimizer import ParamsT

from warpstep.averages import EmaDecay
from warpstep.backends import BackendName
from warpstep.groups import Members
from warpstep.hypers import DecayForm, check_arguments
from warpstep.optimizer import Optimizer
from warpstep.precision import Copies, Master, Rounding, StateDtype
from warpstep.rules import ADAMW

Betas = tuple[float | Tensor, float | Tensor]


class Adam(Optimizer, TorchAdam):
    """Adam (weight decay coupled: added to the gradient) in one kernel launch.

    A drop-in for :class:`torch.optim.Adam`. With gradient g, and t counting from 1::

        g <- g + weight_decay * p
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    ``decoupled_weight_decay=True`` leaves the first line out, and takes ``lr * weight_decay * p``
    from p, as :class:`AdamW` does. AdamW is derived from this class, as torch's is from torch's.

    Source: Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980); amsgrad: Reddi et al.
    (https://arxiv.org/abs/1904.09237).

    Args:
        params: parameters, named parameters, or dicts of groups, as torch takes them.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
        decoupled_weight_decay: torch's, with the meanings that :class:`AdamW` tells.
        backend, state_dtype, master, rounding, seed, copies, decay_form, ema_decay, ema_dtype,
        stats, unscale_grads: as :class:`AdamW` has them; ``decay_form`` is ``"coupled"`` by
            default, or ``"decoupled"`` with ``decoupled_weight_decay=True``.

    Raises:
        ValueError: a value is out of its range, names no choice, or does not go with another.
        RuntimeError: ``fused`` goes with neither ``foreach`` nor ``differentiable``, as in torch.
        TypeError: an argument is of a wrong type: ``params``, a number, ``seed`` or ``copies``.
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
        check_arguments(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._members = Members()
        TorchAdam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
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
