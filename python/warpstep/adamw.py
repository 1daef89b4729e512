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
            ``float64``), or a pair, of exp_avg and of exp_avg_sq; None (default) for each
            parameter's own, as torch, and float32 beside a master. ``"8bit"``: a byte a number, in
            blocks of 64 that share a scale, as ``exp_avg_codes`` and ``exp_avg_scale`` in the
            state; parameters of less than 4,096 elements keep 32 bits, and those whose rows (what
            the first dimension counts) no block divides keep 16.
        master: ``"residual"`` keeps an exact float32 master of bfloat16 parameters in 16 bits more:
            the parameter is its nearest bfloat16, and the state's ``master_param`` the rest, as in
            Transformer Engine. A run is bit for bit that of a float32 model with the same
            gradients. ``master_parameters()`` and ``set_master_parameters()`` read and write it.
            What is written to a parameter between steps becomes its master; but writes that
            autograd does not count (``p.data.copy_``) go unnoticed: call
            ``set_master_parameters`` after them. A group may have another ``"master"``, or None.
        rounding: of what is stored in bfloat16. ``"nearest"``; ``"stochastic"``: parameters without
            a master and exp_avg_sq are rounded up or down at random, right in the mean, and exp_avg
            to nearest. None (default) is what is right for the recipe: exp_avg_sq stochastic where
            ``state_dtype`` asks for bfloat16, since to nearest it cannot decay by 0.1%; all else to
            nearest, as torch, all of an all-bfloat16 optimizer too.
        seed: of the random bits, which are a function of it, the step, the parameter's place among
            the optimizer's, and the element's index in the whole parameter: the same on every
            backend, for any number of threads and processes.
        copies: bfloat16 or float16 tensors, one a parameter in their order (or a dict of some),
            each getting its float32 parameter's value in the step's pass: the weights that a model
            computes with, where the optimizer steps their masters.
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
        ValueError: a value is out of its range, names no choice, or does not go with another.
        RuntimeError: ``fused`` goes with neither ``foreach`` nor ``differentiable``, as in torch.
        TypeError: an argument is of a wrong type: ``params``, a number, ``seed`` or ``copies``.
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
