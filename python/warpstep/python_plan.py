"""What the native ``Plan`` does, in Python: for Triton's buckets without the native module."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer

from warpstep.clipping import RememberedGrad
from warpstep.entries import Entry, with_grads
from warpstep.hypers import pack_groups
from warpstep.rules import Rule
from warpstep.shards import own_part
from warpstep.state import match_layout

Gathered = tuple[Tensor, Tensor, Tensor]  # parameter, gradient, and this laid out as the parameter


class PythonPlan:
    """Gathers what launches read. It cannot tell that a plan is stale: it serves one step.

    Its methods are those of ``_native.Plan`` (see csrc/plan.h).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        buckets: list[list[Entry]],
        grad_name: str = "grad",
    ) -> None:
        self._rule = rule
        self._grad_name = grad_name
        self._groups = optimizer.param_groups
        self._entries = buckets
        self._found: list[dict[Entry, Gathered]] = [
            {
                entry: (param, grad, match_layout(own_part(param), own_part(grad)))
                for entry, param, grad in with_grads(optimizer, entries, grad_name)
            }
            for entries in buckets
        ]
        self._remembered: list[RememberedGrad] = []

    def _gathered(self) -> list[Gathered]:
        return [one for found in self._found for one in found.values()]

    def check(self, _state: Any, _groups: Any, _threads: int) -> None:
        """Nothing to compare with."""

    def written_params(self, _groups: Any) -> list[Tensor]:
        """It serves one step, and does not know of another."""
        return []

    def note_versions(self, _groups: Any) -> None:
        """Nor does it remember."""

    def keep_alive(self) -> None:
        """Everything that was gathered is owned."""

    let_go = keep_alive

    def remember_grads(self) -> int:
        """Remembers the gradients gathered, as they are; how many."""
        name = self._grad_name
        self._remembered = [RememberedGrad.of(p, grad, name) for p, grad, _ in self._gathered()]
        return len(self._remembered)

    def compare_grads(self) -> tuple[int, int]:
        """How many of those remembered are kept; and of those, how many unwritten."""
        kept = [one for one in self._remembered if one.is_kept()]
        return len(kept), sum(one.is_unwritten() for one in kept)

    def forget_grads(self) -> None:
        """Lets go of the gradients remembered."""
        self._remembered = []

    def count_grads(self) -> int:
        """How many gradients were gathered."""
        return len(self._gathered())

    def has_shared_grads(self) -> bool:
        """Whether gradients share memory, so that one must not be zeroed before others are read."""
        parts = [own_part(grad) for _, grad, _ in self._gathered()]
        runs = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in parts if g.numel() > 0)
        return any(after[0] < one[1] for one, after in itertools.pairwise(runs))

    def copied_grads(self) -> list[tuple[Tensor, Tensor]]:
        """Gradients that were laid out as their parameters, each with what a launch sees of it."""
        return [(grad, seen) for _, grad, seen in self._gathered()]

    def grad_table(self, bucket: int) -> bytes:
        """The addresses of a bucket's gradients, 0 where there is none, as int64."""
        found = [self._found[bucket].get(entry) for entry in self._entries[bucket]]
        # An empty tensor's gradient has no address; any but 0 makes its step count.
        addresses = (0 if one is None else one[2].data_ptr() or 1 for one in found)
        return array("q", addresses).tobytes()

    def hyper_table(self, _bucket: int) -> bytes:
        """The groups' hyper-parameters, as in kernels/layout.h."""
        return pack_groups(self._groups, self._rule)

    def launch(self, _threads: int, _tensors: Any, zero_grads: bool, unscale_grads: bool) -> None:
        """Counts the writes of the launches that there have been."""
        written = self._gathered()
        increment_version([param for param, _, _ in written])
        if zero_grads or unscale_grads:
            increment_version([grad for _, grad, _ in written])
        for _, grad, seen in written:
            if zero_grads and seen.data_ptr() != own_part(grad).data_ptr():
                grad.zero_()
