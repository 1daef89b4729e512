"""Constructs optimizers of many parameter groups in time linear in their number.

torch's ``add_param_group`` looks a new group's parameters up in a set that it makes anew, of all
groups before: 100,000 groups of one parameter each take hours. While an optimizer is constructed
nobody else edits its groups, so here one set is kept and added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

_TORCHS_ADD = Optimizer.add_param_group


class Members:
    """The parameters of the groups that were added so far."""

    def __init__(self) -> None:
        self._params: set[Tensor] = set()
        self._last: dict[str, Any] | None = None

    @contextmanager
    def stand_in(
        self, optimizer: Optimizer, group: dict[str, Any], add: Callable[..., None]
    ) -> Iterator[None]:
        """Shows torch one group in place of all before, with what ``group`` shares with them.

        torch's own code goes on to check, to complain and to add, as if it saw them all. Where
        ``add``, which will be called, is somebody else's, it does see them all.
        """
        if getattr(add, "__func__", None) is not _TORCHS_ADD:
            yield
            return
        groups = optimizer.param_groups
        if groups and groups[-1] is not self._last:  # a derived class has added one past us
            self._params = {param for known in groups for param in known["params"]}
        shown: list[dict[str, Any]] = []
        if groups:
            shown.append({**groups[0], "params": _Shared(group, self._params)})
        before = len(shown)
        optimizer.param_groups = shown
        try:
            yield
        finally:
            added = shown[before:]
            groups += added
            optimizer.param_groups = groups
            for one in added:
                self._params.update(one["params"])
                self._last = one


class _Shared:
    """Those of a group's parameters that are known; looked up once torch has made a list of them"""

    def __init__(self, group: dict[str, Any], known: set[Tensor]) -> None:
        self._group, self._known = group, known

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param in self._group["params"] if param in self._known)
