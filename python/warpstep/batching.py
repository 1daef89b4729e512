"""torch.vmap over ``torch.ops.warpstep``: a batch of tensors is one tensor, or one an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from warpstep.lists import Operator, list_names, used_lists

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
    entry of the batch has a step counter of its own, as so many tensors, in the same call. Only
    where lr, grad_scale or found_inf differ is there a call an entry.
    """

    def batched(_keys: Any, *lists: list[Tensor], **options: Any) -> None:
        level = _functorch.current_level()

        def outside(tensor: Tensor) -> Batch:
            value, dim = _functorch._unwrap_batched(tensor, level)
            return Batch(value, False) if dim is None else Batch(value.movedim(dim, 0), True)

        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            given = dict.fromkeys(operator.flags, False) | options
            used = used_lists(operator.rule, given)
            streams = [
                [outside(tensor) for tensor in stream] if is_used else []
                for stream, is_used in zip(lists, used, strict=True)
            ]
            scalars = {
                key: outside(options[key])
                for key in SCALARS
                if isinstance(options.get(key), Tensor)
            }
            for call, numbers in _calls(operator, streams, scalars, options):
                if any(call):  # a batch may have no entry
                    overload(*call, **{**options, **numbers})

    return batched


def _calls(
    operator: Operator,
    streams: list[list[Batch]],
    scalars: dict[str, Batch],
    options: dict[str, Any],
) -> list[tuple[list[list[Tensor]], dict[str, Tensor]]]:
    """The operator's calls that make up one: its lists, and the scalars that are tensors."""
    numbers = {key: scalar.tensor for key, scalar in scalars.items()}
    optional = [i for i, k in enumerate(operator.rule.moments, 2) if k in operator.rule.optional]
    optional += [len(streams) - 1] if operator.rule.counted_for is not None else []
    needed = [s for s in range(len(streams)) if streams[s] or s not in optional]
    if any(len(streams[s]) != len(streams[0]) for s in needed):  # which the operator complains of
        return [([[batch.tensor for batch in stream] for stream in streams], numbers)]
    of_scalars = next((key for key, scalar in scalars.items() if scalar.mapped), "")
    _check(operator, streams, needed, of_scalars, options)
    if of_scalars:
        return [
            (
                [[batch.at(index) for batch in stream] for stream in streams],
                {key: scalar.at(index) for key, scalar in scalars.items()},
            )
            for index in range(len(scalars[of_scalars].tensor))
        ]
    call: list[list[Tensor]] = [[] for _ in streams]
    for i, param in enumerate(streams[0]):
        step = streams[-1][i] if streams[-1] else None
        for s in needed:
            batch = streams[s][i]
            if step is not None and step.mapped:
                call[s] += [batch.at(index) for index in range(len(step.tensor))]
            elif s == 1 and param.mapped and not batch.mapped:
                call[s].append(batch.tensor.expand(param.tensor.shape))
            else:
                call[s].append(batch.tensor)
    return [(call, numbers)]


def _check(
    operator: Operator,
    streams: list[list[Batch]],
    needed: list[int],
    of_scalars: str,
    options: dict[str, Any],
) -> None:
    """Raises where one tensor would have to take the results of a whole batch."""
    names, steps = list_names(operator.rule), len(streams) - 1
    advances = options.get("advance_steps", True)
    unscales = options.get("unscale_grads", False) and options.get("grad_scale") is not None
    for i in range(len(streams[0])):
        of_lists = (f"{names[s]}[{i}]" for s in needed if streams[s][i].mapped)
        mapped = of_scalars or next(of_lists, "")
        for s in needed if mapped else ():
            written = s != steps or (advances and of_scalars)
            if not streams[s][i].mapped and written and (s != 1 or unscales):
                raise RuntimeError(
                    f"vmap: the step writes to {names[s]}[{i}], of which there is one for the "
                    f"whole batch, while {mapped} is vmapped over. Give each entry of the batch "
                    f"its own: stack {names[s]} as well, and name its dimension in vmap's in_dims."
                )
