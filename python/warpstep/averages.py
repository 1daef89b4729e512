"""Averages of the weights: what an optimizer that keeps them (``ema_decay``) does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep import signals
from warpstep.swapping import swapped

EmaDecay = float | Callable[[int], float]
# Where that is callable, in each group: whether its ``ema_decay`` follows, or is its own.
SCHEDULED = "ema_decay_scheduled"


class Averaging(Optimizer):
    """An optimizer whose steps may keep an average of each parameter, in its state as ``"ema"``."""

    ema_decay: EmaDecay | None = None
    _averages_swapped: bool = False
    _ema_steps: int = 0  # steps taken, as far as the host knows; for a callable ema_decay

    def _note_schedule(self, group: dict[str, Any], has_own_decay: bool) -> None:
        if callable(self.ema_decay):
            group.setdefault(SCHEDULED, not has_own_decay)

    def _update_ema_decay(self) -> None:
        if not callable(self.ema_decay):
            return
        before, decay = self.defaults["ema_decay"], self.ema_decay(self._ema_steps)
        # What was written into a group in between is its own from now on.
        follow = [
            bool(group.get(SCHEDULED)) and group.get("ema_decay") == before
            for group in self.param_groups
        ]
        pairs = list(zip(self.param_groups, follow, strict=True))
        with signals.deferred():  # half of it would be taken for what somebody has written
            for group, follows in pairs:
                group[SCHEDULED] = follows
                if follows:
                    group["ema_decay"] = decay
            self.defaults["ema_decay"] = decay

    def ema_parameters(self) -> dict[Tensor, Tensor]:
        """Each parameter's average; where it has had no step yet, an alias of the parameter.

        After each step, ``ema <- ema_decay * ema + (1 - ema_decay) * p``, beginning as p after the
        first: :class:`torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn``.

        No value requires a gradient. All of them share memory with what the next step writes: an
        average with the optimizer's state, an alias with its parameter.

        Raises:
            RuntimeError: the optimizer keeps no averages.
        """
        kept = self._kept_averages()
        params = (param for group in self.param_groups for param in group["params"])
        return {param: kept.get(param, param.detach()) for param in params}

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` with the averages in their parameters' place, for checkpoints.

        It is what ``model.state_dict()`` returns inside ``swap_ema()``, bit for bit and in the
        model's dtypes, while the model stays as it is. Buffers are the model's own, and so are
        parameters without an average: those that this optimizer does not average, or that have had
        no step yet. Tied parameters have their average under each of their names.

        As with ``model.state_dict()``, the tensors may share memory with what the next step writes:
        save or copy them before.

        Args:
            model: a module with parameters of this optimizer. It may be wrapped (in
                DistributedDataParallel, by ``torch.compile``); the keys are then the wrapper's. Of
                a model that FSDP2 has sharded, each process gets its own shards, as DTensors.

        Raises:
            RuntimeError: the optimizer keeps no averages.
            TypeError: ``model`` is no module.
            ValueError: the optimizer averages none of the model's parameters; or
                ``model.state_dict()`` holds something else in place of one.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
        kept = self._kept_averages()
        # First, since it has FSDP2 put the shards in the place of what a forward pass gathered.
        found: dict[str, Any] = model.state_dict(keep_vars=True)
        names = {param: name for name, param in model.named_parameters()}
        if names.keys().isdisjoint(self._averaged_parameters()):
            raise ValueError(
                f"this optimizer averages none of the model's {len(names)} parameters: give it the "
                "model (not a copy) whose parameters it was constructed with"
            )
        missed = names.keys() & kept.keys()
        for key, value in found.items():
            if isinstance(value, Tensor):
                missed.discard(value)
                found[key] = kept.get(value, value).detach().to(value.dtype)
        if missed:
            raise ValueError(
                f"model.state_dict() holds something else in place of {names[missed.pop()]!r}, as "
                "a hook may have it: call model.state_dict() inside `with optimizer.swap_ema():`"
            )
        return found

    def swap_ema(self) -> AbstractContextManager[None]:
        """The parameters are their averages inside ``with optimizer.swap_ema():``, for evaluation.

        Afterwards, whatever happens inside, they are what they were, bit for bit: in their own
        memory, of their own shape and dtype, on their own device. A step inside raises. The
        parameters' values are kept in a copy meanwhile.

        With FSDP2 the averages are gathered anew, and the parameters after them.

        Raises:
            RuntimeError: the optimizer keeps no averages, or FSDP1 has the parameters; or, at the
                end, a parameter cannot be restored: the message names it, and all others are
                restored.
        """
        return self._swapped(self._kept_averages())

    @contextmanager
    def _swapped(self, averages: dict[Tensor, Tensor]) -> Iterator[None]:
        if self._averages_swapped:
            raise RuntimeError("swap_ema() inside swap_ema(): the averages are in place already")
        try:
            self._averages_swapped = True
            with swapped(self.param_groups, averages, self._leave_averages):
                yield
        finally:
            self._averages_swapped = False

    def _leave_averages(self) -> None:
        self._averages_swapped = False

    def _averaged_parameters(self) -> list[Tensor]:
        averaged = [group for group in self.param_groups if group.get("ema_decay") is not None]
        if not averaged:
            raise RuntimeError("no averages are kept: construct the optimizer with ema_decay=")
        return [param for group in averaged for param in group["params"]]

    def _kept_averages(self) -> dict[Tensor, Tensor]:
        states = {param: self.state.get(param) or {} for param in self._averaged_parameters()}
        return {param: state["ema"] for param, state in states.items() if "ema" in state}
