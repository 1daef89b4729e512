"""torch.vmap over ``torch.ops.warpstep``: a batch of tensors is one tensor, or one an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from warpstep.lists import Operator, list_names, low_precision_names, used_lists

SCALARS = ("lr", "grad_scale", "found_inf")
_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


class Batch(NamedTuple):
    """A tensor as it is outside of vmap; if ``mapped``, its first dimension counts the batch."""

    tensor: Tensor
    mapped: bool

    def at(self, index: int) -> Tensor:
        """What one entry of the batch sees of it."""
        return self.tensor[index] if self.mapped else self.tensor


def rule(overload: Callable[..., None], operator: Operator) -> Callable[..., None]:
    """What vmap calls for ``overload``, one of torch.ops.warpstep's, in its place.

    A step is element by element, so that a batch of tensors is stepped as one tensor; where each
    entry of the batch has a step counter of its own, or draws random bits or lies in blocks, as so
    many tensors, in the same call. Only where lr, grad_scale or found_inf differ is there a call an
    entry. All entries have the random bits that one of them would have alone.
    """
    names = list_names(operator.rule)
    low = low_precision_names(operator.rule.moments)

    def batched(_keys: Any, *lists: list[Tensor], **options: Any) -> None:
        level = _functorch.current_level()
        lists_of_low = [options.pop(name, None) for name in low]

        def outside(tensor: Tensor) -> Batch:
            value, dim = _functorch._unwrap_batched(tensor, level)
            return Batch(value, False) if dim is None else Batch(value.movedim(dim, 0), True)

        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            given = operator.defaults | options
            used = [
                *used_lists(operator.rule, given),
                *(each is not None for each in lists_of_low),
            ]
            all_lists = [
                [outside(tensor) for tensor in one] if is_used else []
                for one, is_used in zip((*lists, *lists_of_low), used, strict=True)
            ]
            scalars = {
                key: outside(options[key])
                for key in SCALARS
                if isinstance(options.get(key), Tensor)
            }
            for call, numbers in _calls(operator, all_lists, scalars, given):
                if any(call):  # a batch may have no entry
                    of_low = dict(zip(low, call[len(names) :], strict=True))
                    of_low = {name: one for name, one in of_low.items() if one}
                    overload(*call[: len(names)], **{**options, **numbers, **of_low})

    return batched


def _calls(
    operator: Operator,
    all_lists: list[list[Batch]],
    scalars: dict[str, Batch],
    given: dict[str, Any],
) -> list[tuple[list[list[Tensor]], dict[str, Any]]]:
    """The operator's calls that make up one: its lists, and the options that differ.

    ``all_lists`` has the lists of low precision after the others.
    """
    numbers: dict[str, Any] = {key: scalar.tensor for key, scalar in scalars.items()}
    steps = len(list_names(operator.rule)) - 1
    optional = [i for i, k in enumerate(operator.rule.moments, 2) if k in operator.rule.optional]
    optional += [steps] if operator.rule.counted_for is not None else []
    optional += range(steps + 1, len(all_lists))
    needed = [s for s in range(len(all_lists)) if all_lists[s] or s not in optional]
    if any(
        len(all_lists[s]) != len(all_lists[0]) for s in needed
    ):  # which the operator complains of
        return [([[batch.tensor for batch in one] for one in all_lists], numbers)]
    of_scalars = next((key for key, scalar in scalars.items() if scalar.mapped), "")
    _check(operator, all_lists, needed, of_scalars, given)
    if of_scalars:
        return [
            (
                [[batch.at(index) for batch in one] for one in all_lists],
                {key: scalar.at(index) for key, scalar in scalars.items()},
            )
            for index in range(len(scalars[of_scalars].tensor))
        ]
    draws = given["rounding"] not in (None, "nearest") or any(
        all_lists[steps + 1 : -2]
    )  # or blocks
    call: list[list[Tensor]] = [[] for _ in all_lists]
    origins: list[int] = []
    for i, param in enumerate(all_lists[0]):
        batches = {s: all_lists[s][i] for s in needed}
        step = batches.get(steps)
        apart = (step is not None and step.mapped) or (draws and param.mapped)
        size = len(next(b for b in batches.values() if b.mapped).tensor) if apart else 1
        for s, batch in batches.items():
            if apart:
                call[s] += [batch.at(index) for index in range(size)]
            elif s == 1 and param.mapped and not batch.mapped:
                call[s].append(batch.tensor.expand(param.tensor.shape))
            else:
                call[s].append(batch.tensor)
        if apart and step is not None and not step.mapped:  # which advances by one
            others = [step.tensor.clone() for _ in range(size - 1)]
            call[steps][len(origins) + 1 :] = others
        origins += [i] * size
    indices, firsts = given["param_indices"], given["first_elements"]
    if draws or indices is not None or firsts is not None:
        numbers["param_indices"] = [i if indices is None else indices[i] for i in origins]
        numbers["first_elements"] = [0 if firsts is None else firsts[i] for i in origins]
    return [(call, numbers)]


def _check(
    operator: Operator,
    all_lists: list[list[Batch]],
    needed: list[int],
    of_scalars: str,
    given: dict[str, Any],
) -> None:
    """Raises where one tensor would have to take the results of a whole batch."""
    names = list_names(operator.rule)
    steps = len(names) - 1
    names += low_precision_names(operator.rule.moments)
    unscales = given["unscale_grads"] and given["grad_scale"] is not None
    for i in range(len(all_lists[0])):
        of_lists = (f"{names[s]}[{i}]" for s in needed if all_lists[s][i].mapped)
        mapped = of_scalars or next(of_lists, "")
        for s in needed if mapped else ():
            written = s != steps or (given["advance_steps"] and of_scalars)
            written = written and all_lists[s][i].tensor.numel() > 0
            if not all_lists[s][i].mapped and written and (s != 1 or unscales):
                raise RuntimeError(
                    f"vmap: the step writes to {names[s]}[{i}], of which there is one for the "
                    f"whole batch, while {mapped} is vmapped over. Give each entry of the batch "
                    f"its own: stack {names[s]} as well, and name its dimension in vmap's in_dims."
                )
