"""swap_ema: averages in their parameters' place for a while, and the parameters back after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warpstep import signals
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
    has_failed: bool = False  # to be restored

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
def swapped(
    groups: list[dict[str, Any]], averages: Mapping[Tensor, Tensor], leave: Callable[[], None]
) -> Iterator[None]:
    """Puts averages in their parameters' place, and the parameters back, exactly, in any event.

    ``leave`` is called when they are back, before any signal's handler.
    """
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
    left = [_Own.of(param, names[param]) for param in averages]
    left.reverse()
    complaints: list[str] = []

    def end() -> None:
        leave()
        compute_anew(averages)

    compute_anew(averages)
    try:
        try:
            with torch.no_grad():
                for param, average in averages.items():
                    param.copy_(average)
            yield
        finally:
            _restore(left, complaints, end)
    except BaseException as error:
        _restore(left, complaints, end)  # what is left, where a signal came as it was called
        if complaints:  # beside what was raised inside, not in its place
            getattr(error, "add_note", warnings.warn)(_said(complaints))  # 3.10 has no notes
        raise
    if complaints:
        raise RuntimeError(_said(complaints))


def _restore(left: list[_Own], complaints: list[str], end: Callable[[], None]) -> None:
    """Restores all that can be restored, for steps to go on; says what cannot; calls ``end``."""
    with signals.deferred():  # they can wait until all are restored
        while left:
            own = left[-1]
            again = False
            try:
                own.restore()
            except Exception as error:
                again = not own.has_failed  # once more, when the copies of all others are freed
                own.has_failed = True
                if not again:
                    complaints.append(
                        f"swap_ema() could not restore {own.name}: it was {describe(own.memory)} "
                        f"and is now {describe(own.param)} ({type(error).__name__}: {error})"
                    )
            left.pop()
            if again:
                left.insert(0, own)
        end()


def _said(complaints: list[str]) -> str:
    last = "All other parameters are restored. Load a checkpoint to go on."
    return ". ".join((*complaints, last))


def compute_anew(params: Iterable[Tensor]) -> None:
    """Has what comes next read these parameters, and not what a forward pass has made of them."""
    torch.clear_autocast_cache()
    gather_anew(params)
