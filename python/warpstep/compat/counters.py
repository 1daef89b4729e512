"""A group's ``step``, for kernels, which have a counter for each parameter and advance it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]

# Without bias correction, kernels are told of so many steps that beta**t is 0 for every beta below
# 1. They differ from step to step all the same, since random bits depend on them.
_LONG_AGO, _APART = 2.0**23, 2.0**40


class Counters:
    """Counters for kernels, in no state: filled from the groups' ``step`` before each step.

    Attributes:
        of: by parameter, its counter: a float32 scalar on its device.
    """

    def __init__(self, groups: list[Group]) -> None:
        self.of: dict[Tensor, Tensor] = {}
        lengths: defaultdict[torch.device, int] = defaultdict(int)
        places: dict[Tensor, int] = {}
        spans: list[tuple[int, torch.device, int, int]] = []
        for index, group in enumerate(groups):
            for param in group["params"]:
                if param in places:
                    continue
                at, device = lengths[param.device], param.device
                places[param] = at
                lengths[device] += 1
                if spans and spans[-1][:2] == (index, device) and spans[-1][3] == at:
                    spans[-1] = (*spans[-1][:3], at + 1)
                else:
                    spans.append((index, device, at, at + 1))
        self._all = {
            device: torch.zeros(length, dtype=torch.float32, device=device)
            for device, length in lengths.items()
        }
        self._of_groups = [(i, self._all[device][a:b]) for i, device, a, b in spans]
        for param, at in places.items():
            self.of[param] = self._all[param.device][at]

    def fill(self, groups: list[Group]) -> None:
        """Sets every counter to its group's: one operation, where the groups have the same."""
        steps = [group.get("step", 0) for group in groups]
        corrected = [bool(group.get("bias_correction", True)) for group in groups]
        first = steps[0] if steps else 0
        if all(corrected) and all(step is first or _same(step, first) for step in steps):
            for counters in self._all.values():
                _set(counters, first)
            return
        for index, counters in self._of_groups:
            _set(counters, steps[index])
            if not corrected[index]:
                counters.add_(_LONG_AGO).mul_(_APART)


def _same(a: Any, b: Any) -> bool:
    """Whether two counts are the same number; of tensors, which are not read, False."""
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _set(counters: Tensor, step: Any) -> None:
    if isinstance(step, Tensor):
        counters.copy_(step)
    else:
        counters.fill_(step)


def count_of(step: Any) -> int:
    """A group's ``step`` as an int; of one on a device, this waits for it."""
    return int(step.item()) if isinstance(step, Tensor) else int(step)


def put_on_devices(groups: list[Group]) -> None:
    """Makes the groups' counts tensors that captured graphs advance: one for those that are equal.

    As in Transformer Engine: int32 of shape (1,).
    """
    made: dict[tuple[int, torch.device], Tensor] = {}
    fallback = next((p.device for g in groups for p in g["params"]), torch.device("cpu"))
    for group in groups:
        step = group.get("step", 0)
        device = group["params"][0].device if group["params"] else fallback
        if isinstance(step, Tensor) and step.device == device:
            continue
        key = (count_of(step), device)
        if key not in made:
            made[key] = torch.tensor([key[0]], dtype=torch.int32, device=device)
        group["step"] = made[key]


def advance(groups: list[Group], found_inf: Tensor | None) -> None:
    """Counts a step, of groups without parameters, too, but not one that was skipped for an inf."""
    taken: Any = None
    seen: set[int] = set()
    for group in groups:
        step = group.get("step", 0)
        if isinstance(step, Tensor):
            if id(step) in seen:
                continue
            seen.add(id(step))
            if found_inf is None:
                step.add_(1)
            else:
                step.add_((found_inf.to(step.device) == 0).to(step.dtype).view_as(step))
        else:
            if taken is None:
                taken = 1 if found_inf is None else int(found_inf.item() == 0)
            group["step"] = step + taken
