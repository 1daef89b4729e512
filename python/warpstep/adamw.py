"""``warpstep.AdamW``: torch's class, stepped in one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import AdamW as TorchAdamW
from torch.optim.optimizer import ParamsT

from warpstep.adam import Adam, Betas
from warpstep.averages import EmaDecay
from warpstep.backends import BackendName
from warpstep.hypers import DecayForm
from warpstep.precision import Copies, Master, Rounding, StateDtype


class AdamW(Adam, TorchAdamW):
    """AdamW (decoupled weight decay) for a whole model in one kernel launch.

    A drop-in for :class:`torch.optim.AdamW`. With gradient g, and t counting from 1::

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * weight_decay * p
               - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Arithmetic is in float32 (float64 for float64 parameters), and each stored value is rounded
    once. Complex parameters are stepped as pairs of real numbers.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).

    Args:
        params: parameters, named parameters, or dicts of groups, as torch takes them.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            torch's. ``foreach`` and ``fused`` choose among torch's implementations; here kernels
            step all the same (``backend="reference"`` is plain PyTorch). As in torch,
            ``fused=True`` has ``GradScaler.step`` leave the unscaling to the step's own pass.
        state_dtype: dtype of the moments (``torch.float32``, ``bfloat16``, ``float16``,
            ``float64``); None (default) for each parameter's own, as torch.
        decay_form: how weight decay acts, by default as torch's class has it. What is taken from p,
            with u the update in the last line above (lr times a quotient):

            * ``"decoupled"``, AdamW's: ``lr * weight_decay * p``
            * ``"independent"``: ``(lr / base_lr) * weight_decay * p``, where ``base_lr`` is the
              group's lr at construction: only the schedule's multiple of it counts (Loshchilov and
              Hutter, Algorithm 2)
            * ``"coupled"``, Adam's: nothing; ``g <- g + weight_decay * p`` comes first
            * ``"l1"``: ``lr * weight_decay * sign(p)``
            * ``"cautious"``: ``lr * weight_decay * p`` where u and p do not differ in sign, else
              nothing (Chen et al., https://arxiv.org/abs/2510.12402)
            * ``"l1l2"``: ``lr * weight_decay / 2 * (p + sign(p))``
            * ``"min"``: ``lr * min(abs(p)) * sign(p)``, the minimum being over the parameter's
              tensor (all shards of it, real and imaginary parts; NaN if any is). ``weight_decay``
              has no part in it, except that 0 means no decay, as with every form. One more read of
              these parameters, in a launch of its own
        ema_decay: keep ``ema <- ema_decay * ema + (1 - ema_decay) * p`` of each parameter: a number
            in [0, 1], or a function of how often ``step`` was called.
        ema_dtype: the averages' dtype where parameters are 16-bit: theirs, or float32 (default).
        stats: gather what ``statistics()`` returns, in each step.
        unscale_grads: leave the gradients as torch would have: without the scale and clipped, where
            the step was left to do that, also if it is skipped. For who reads them afterwards: they
            are written, which costs an eighth more memory traffic. ``zero_grads`` goes first.
        backend: ``"auto"`` (default; the environment variable ``WARPSTEP_BACKEND`` may say
            otherwise), ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Parameters that
            a backend has no kernel for are stepped by the reference.

    Raises:
        ValueError: a hyper-parameter, ``state_dtype`` or ``backend`` is invalid.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
        super().__init__(
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
            decoupled_weight_decay=True,
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
