"""Parameters that are as they usually are, sorted at one native call each.

A plan looks at every tensor of every parameter when it is made. Where nothing is unusual about a
parameter (`_native.survey` tells), that takes a microsecond or two and not some forty; all others
go the long way, which can tell what is wrong with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep import backends
from warpstep.allocation import new_zeros
from warpstep.entries import Entry
from warpstep.precision import Precision
from warpstep.recipes import MOMENTS, RESIDUAL, Recipe, codes_of, ema_dtype, ema_dtypes
from warpstep.rules import Rule

Sorted = tuple[str, Recipe]  # a backend, and the recipe that it has a kernel for


class Survey:
    """One group's parameters, for a plan."""

    def __init__(
        self,
        group: dict[str, Any],
        rule: Rule,
        *,
        backend: str,
        precision: Precision,
    ) -> None:
        module, _ = backends.native()
        self._native = None if module is None else module.survey
        self._rule = rule
        self._backend = backend
        self._precision = precision
        self._fused = bool(group.get("fused"))
        self._moments = rule.moments_of(group)
        self._ema = "ema" if group.get("ema_decay") is not None else None
        self._counter = "step" if precision.counts_steps(rule, group) else None
        none = (None,) * (MOMENTS - len(self._moments))
        others = (*(None,) * MOMENTS, None, self._ema, None, None)  # no scales, residual or copy
        self._keys = (None, *self._moments, *none, *others)
        self._of_codes = frozenset(map(codes_of, rule.moments))
        self._found: dict[Any, Sorted | None] = {}

    def sorts(self, entry: Entry) -> bool:
        """Gives an entry its backend and recipe, and a new parameter its state; or leaves it."""
        state = entry.state
        if self._native is None or RESIDUAL in state or not self._of_codes.isdisjoint(state):
            return False
        formats = self._native(entry.param, entry.state, self._keys, self._counter)
        if formats is None:
            return False
        param: Tensor = entry.param
        is_new = not entry.state
        key = (formats, param.device, is_new)
        if key not in self._found:
            self._found[key] = self._sorted(param, formats, is_new)
        if (found := self._found[key]) is None:
            return False
        if is_new:
            entry.new_state = self._new_state(param)
        entry.backend, entry.recipe = found
        return True

    def _sorted(self, param: Tensor, formats: tuple[Any, ...], is_new: bool) -> Sorted | None:
        """What takes parameters of such formats, like ``param``; None for the long way."""
        chosen = backends.choose(self._backend, param.device)
        if chosen == "reference":
            return None
        if is_new and self._fused:
            backends.check_device_for_fused("", param)
        dtypes: list[Any] = [None if name is None else getattr(torch, name) for name in formats]
        if torch.uint8 in dtypes:  # no numbers, which their keys are for
            return None
        moments, ema, grad = tuple(dtypes[1 : 1 + len(self._moments)]), dtypes[-3], dtypes[-1]
        precision = self._precision
        if is_new:
            moments = tuple(
                precision.moment_dtype(param, which, False) for which in range(len(self._moments))
            )
            ema = ema_dtype(param, precision.ema_dtype) if self._ema else None
        recipe = Recipe(
            self._rule.name,
            precision.format_of_param(param, False),
            grad,
            tuple(
                precision.format_of_moment(self._rule, key, dtype)
                for key, dtype in zip(self._moments, moments, strict=True)
            ),
            ema,
            self._counter is not None,
        )
        takes_ema = ema is None or ema in ema_dtypes(param)
        return (chosen, recipe) if takes_ema and backends.has_kernel(chosen, recipe) else None

    def _new_state(self, param: Tensor) -> dict[str, Any] | None:
        state: dict[str, Any] = {}
        if self._counter is not None:
            state[self._counter] = torch.zeros((), dtype=torch.float32, device=param.device)
        for which, key in enumerate(self._moments):
            dtype = self._precision.moment_dtype(param, which, False)
            state[key] = new_zeros(param, dtype)
        if self._ema is not None:
            average = ema_dtype(param, self._precision.ema_dtype)
            state[self._ema] = new_zeros(param, average)
            state[self._ema].copy_(param)
        return state or None
