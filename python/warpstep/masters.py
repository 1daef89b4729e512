"""Float32 masters of bfloat16 parameters: read, written, and noticed to be stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from warpstep import signals
from warpstep.allocation import new_zeros
from warpstep.averages import Averaging
from warpstep.codecs import joined, split
from warpstep.plan import Plan
from warpstep.recipes import RESIDUAL
from warpstep.shards import like_shards, own_part
from warpstep.state import describe, names_of
from warpstep.swapping import compute_anew


class KeepsMasters(Averaging):
    """An optimizer whose bfloat16 parameters may have float32 masters (``master="residual"``)."""

    plan: Plan | None

    @torch.no_grad()
    def master_parameters(self) -> dict[Tensor, Tensor]:
        """Each parameter's float32 value: its master where it has one, else a copy of itself.

        The values are new tensors; of a sharded parameter, sharded as it is.

        Raises:
            RuntimeError: inside ``swap_ema()``.
        """
        self._check_not_swapped("master_parameters")
        self._forget_stale_residuals()
        found = {}
        for param in (param for group in self.param_groups for param in group["params"]):
            residual = (self.state.get(param) or {}).get(RESIDUAL)
            if residual is None or residual.dtype != torch.int16:  # a loaded float32 master
                value = param if residual is None else residual
                found[param] = value.detach().to(torch.float32, copy=True)
            else:
                part = joined(own_part(param.detach()), own_part(residual))
                found[param] = like_shards(param, part, tuple(param.shape))
        return found

    @torch.no_grad()
    def set_master_parameters(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Writes masters, and into their parameters the nearest bfloat16.

        For beginning from float32 weights. Call it before the first step, or between steps.

        Args:
            masters: by parameter, float32 tensors of its shape, on its device.

        Raises:
            ValueError: a parameter has no master, or its value does not fit; nothing is written.
            RuntimeError: inside ``swap_ema()``.
        """
        self._check_not_swapped("set_master_parameters")
        names = names_of(self.param_groups)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        new = []
        for param, master in masters.items():
            if param not in groups or groups[param].get("master") is None:
                name = names.get(param, "a tensor that is no parameter of this optimizer")
                raise ValueError(f"{name} has no master: construct it with master='residual'")
            fits = (master.dtype, master.shape, master.device) == (
                torch.float32,
                param.shape,
                param.device,
            )
            if not fits:
                raise ValueError(
                    f"the master of {names[param]} is {describe(master)}, expected float32 of "
                    f"shape {tuple(param.shape)} on {param.device}"
                )
            high, low = split(own_part(master))
            new.append((param, high, low))
        self._forget_stale_residuals()
        with signals.deferred():  # a parameter and its residual belong together
            for param, high, low in new:
                residual = self.state[param].get(RESIDUAL)
                if residual is None or residual.dtype != torch.int16:
                    residual = new_zeros(param, torch.int16)
                    self.state[param][RESIDUAL] = residual
                own_part(param.detach()).copy_(high)
                own_part(residual).copy_(low)
            compute_anew(masters)
            if self.plan is not None:
                self.plan.note_versions(self)

    def _check_not_swapped(self, name: str) -> None:
        if self._averages_swapped:
            raise RuntimeError(
                f"{name}() inside swap_ema(): the parameters hold their averages. Leave it first."
            )

    def _forget_stale_residuals(self) -> None:
        """What was written to a parameter counts, not the residual of its value before."""
        if self.plan is None or self._averages_swapped:  # these were written to for a while
            return
        with torch.no_grad():
            for param in self.plan.written_params(self):
                residual = (self.state.get(param) or {}).get(RESIDUAL)
                # None where the state was removed; a float32 master is no residual.
                if residual is not None and residual.dtype == torch.int16:
                    residual.zero_()
        self.plan.note_versions(self)

    @contextmanager
    def _swapped(self, averages: dict[Tensor, Tensor]) -> Iterator[None]:
        self._forget_stale_residuals()
        with super()._swapped(averages):
            yield

    def _leave_averages(self) -> None:
        if self.plan is not None:  # the parameters are what they were, bit for bit
            self.plan.note_versions(self)
        super()._leave_averages()
