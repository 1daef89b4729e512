"""swap_ema: averages in their parameters' place for a while, and the parameters back after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warpstep.shards import gather_anew, is_flattened, own_part
from warpstep.state import describe, is_freed, is_plain, parameter_name, same_layout


@dataclass
class _Own:
    """What a parameter was: its memory, as it was laid out, and a copy of its values."""

    param: Tensor
    name: str
    memory: Tensor
    values: Tensor
    bytes_of_storage: int

    @staticmethod
    @torch.no_grad()
    def of(param: Tensor, name: str) -> _Own:
        part = own_part(param)
        size = part.untyped_storage().nbytes() if is_plain(part) else 0
        return _Own(param, name, param.detach(), param.detach().clone(), size)

    @torch.no_grad()
    def restore(self) -> None:
        """Makes the parameter what it was. Doing it twice does no harm."""
        if is_freed(self.memory):
            own_part(self.memory).untyped_storage().resize_(self.bytes_of_storage)
        self.memory.copy_(self.values)
        if not self._is_in_place():
            self.param.data = self.memory

    def _is_in_place(self) -> bool:
        """Whether the parameter still has its memory, and as it had it."""
        now, then = own_part(self.param), own_part(self.memory)
        if now.shape != then.shape or now.dtype != then.dtype or now.device != then.device:
            return False
        if not is_plain(now) or not is_plain(then):
            return is_plain(now) == is_plain(then)  # of another kind; what is in it is its own
        return now.data_ptr() == then.data_ptr() and same_layout(now, then)


@contextmanager
def swapped(groups: list[dict[str, Any]], averages: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts averages in their parameters' place, and the parameters back, exactly, in any event."""
    names = {
        param: parameter_name(groups, g, i)
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    }
    if any(map(is_flattened, averages)):
        raise RuntimeError(
            "swap_ema() cannot reach what FullyShardedDataParallel computes with, which may be "
            "gathered already. FullyShardedDataParallel.optim_state_dict(model, optimizer) has the "
            "averages as 'ema', by parameter name: load them into another model"
        )
    kept = [_Own.of(param, names[param]) for param in averages]
    compute_anew(averages)
    try:
        with torch.no_grad():
            for param, average in averages.items():
                param.copy_(average)
        yield
    except BaseException as error:
        complaint = _restored(kept)
        if complaint:  # beside what was raised inside, not in its place
            getattr(error, "add_note", warnings.warn)(complaint)  # Python 3.10 has no notes
        raise
    complaint = _restored(kept)
    if complaint:
        raise RuntimeError(complaint)


def _restored(kept: list[_Own]) -> str:
    """Restores all that can be restored, for steps to go on; what to say of the others, if any."""
    left, complaints = list(reversed(kept)), []
    interrupt: BaseException | None = None
    while left:
        try:
            while left:
                left[-1].restore()
                left.pop()
        except Exception as error:
            own = left.pop()
            complaints.append(
                f"swap_ema() could not restore {own.name}: it was {describe(own.memory)} and is "
                f"now {describe(own.param)} ({type(error).__name__}: {error})"
            )
        except BaseException as error:  # a signal's: it can wait until all are restored
            interrupt = error
    compute_anew(own.param for own in kept)
    if complaints:
        complaints.append("All other parameters are restored. Load a checkpoint to go on.")
    if interrupt is not None:
        raise interrupt
    return ". ".join(complaints)


def compute_anew(params: Iterable[Tensor]) -> None:
    """Has what comes next read these parameters, and not what a forward pass has made of them."""
    torch.clear_autocast_cache()
    gather_anew(params)
