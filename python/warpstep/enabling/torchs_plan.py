"""Torch's own optimizers, stepped by plans while warpstep is enabled.

The optimizer stays torch's: its class, its ``__dict__``, the keys, dtypes and counters of its
state. Its plan is kept beside it, for as long as it lives. A step that no plan takes is torch's
own, from which the operators' overrides may yet take it.

docs/design.md, NOTE [what enable() replaces].
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import CellType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import Adam as TorchAdam
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import SGD as TorchSGD  # noqa: N811 - not torch.optim's, where ours may be

from warpstep import modes, signals
from warpstep.enabling.counts import Counts
from warpstep.entries import Entry
from warpstep.options import Options
from warpstep.plan import Plan
from warpstep.rules import ADAMW, SGD, Rule
from warpstep.tail import Tail

# By torch's class, the rule that its instances step by. Plans are made for `foreach`, too.
KINDS: dict[type[Optimizer], Rule] = {
    kind: replace(rule, flags=(*rule.flags, "foreach"))
    for kind, rule in ((TorchAdam, ADAMW), (TorchSGD, SGD))
}
# What warpstep's own classes have in a group and torch's do not read.
_OWN_KEYS = frozenset({"decay_form", "base_lr", "ema_decay", "master"})
# So many plans in a row may last for one step, as when a run begins; then steps are left to torch,
# so many at most before another plan is tried.
_BRIEF, _LONGEST_REST = 2, 64

CHOSEN = "fused=False, foreach or differentiable=True was asked for"
UNCHOSEN = "fused=True was not asked for: enable(unfused=True) takes these, too"


class NotPlanned(TypeError):  # noqa: N818 - no error: torch's step is taken
    """Why a plan does not take an optimizer of torch's. Nothing has been changed."""


class TorchsPlan(Plan):
    """A plan that leaves an optimizer's state as torch's own step would make it.

    Raises `NotPlanned` where warpstep's classes would convert something of it, or step a parameter
    otherwise than by a native kernel.
    """

    def _prepare(self, optimizer: Any, entry: Entry, repeated: bool = False) -> None:
        super()._prepare(optimizer, entry, repeated)
        if repeated:
            raise NotPlanned("a parameter that is there twice")
        if entry.backend == "reference":
            raise NotPlanned("a parameter that no kernel can step where it lies")

    def _bucket_of(self, entry: Entry) -> int:
        if entry.backend not in ("cpu", "cuda"):
            raise NotPlanned("a device without native kernels")
        state, rule = entry.state, self.options.rule
        for key in entry.new_state or () if state else ():
            converts = state.get(key) is not None
            # torch's loop may have its counters elsewhere, and in float64.
            if (converts or rule.is_whole) and (key != "step" or self.options.as_fused):
                raise NotPlanned(f"a state whose {key!r} is not as torch's step makes it")
        return super()._bucket_of(entry)

    def _writes_grads_later(self, tail: Tail) -> bool:
        if super()._writes_grads_later(tail):
            raise NotPlanned("gradients to unscale that share memory or have other strides")
        return False


@dataclass(eq=False)
class _Beside:
    """What is kept of one optimizer, outside of it."""

    optimizer: weakref.ref[Optimizer]
    turn: Any = field(default_factory=threading.RLock)  # one thread at a time steps
    plan: Plan | None = None
    owner: type | None = None  # the optimizer's class when the plan was made
    is_fused: bool = True
    served: int = 0  # steps that the plan has taken
    brief: int = 0  # how many plans in a row have taken only one
    patience: int = 0  # how many steps are left to torch where a plan is of no use
    rest: int = 0  # how many still are
    why: str = ""
    captured: list[Plan] = field(default_factory=list)  # in CUDA graphs, which read their tables

    def step(self, optimizer: Optimizer, kind: type[Optimizer], unfused: bool) -> None:
        """Takes a step by a plan. Raises `NotPlanned` where torch is to take it."""
        if modes.are_active():
            raise NotPlanned("a mode or a transform looks at operators")
        with self.turn:
            capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            stale: str | None = "there is none yet"
            if self.owner is type(optimizer) and (self.is_fused or unfused):
                stale = self._run(optimizer, capturing)
            if stale is None:
                return
            is_fused = _check(optimizer, kind, unfused)
            if capturing:
                raise NotPlanned("a graph capture before such a step was taken eagerly")
            if self.plan is not None:
                self.plan = None
                self.brief = self.brief + 1 if self.served == 1 else 0
                if self.brief == 0:
                    self.patience = 0
                elif self.brief > _BRIEF:  # making them may cost more than they save
                    self._leave_steps(f"plans that last for one step: {stale}")
            if self.rest > 0:
                self.rest -= 1
                raise NotPlanned(self.why)
            self._make_plan(optimizer, kind, is_fused)
            if (stale := self._run(optimizer, capturing)) is not None:
                raise NotPlanned(f"what is stepped changes meanwhile: {stale}")

    def _make_plan(self, optimizer: Any, kind: type[Optimizer], is_fused: bool) -> None:
        try:
            self.plan = TorchsPlan(optimizer, Options(KINDS[kind], as_fused=is_fused))
        except Exception as error:  # torch's step may take it, or raises an error of its own
            self._leave_steps(str(error))
            raise NotPlanned(self.why) from error
        self.owner, self.is_fused, self.served = type(optimizer), is_fused, 0

    def _run(self, optimizer: Any, capturing: bool) -> str | None:
        """Takes the step by the plan that there is; or says why it is stale."""
        plan = self.plan
        if plan is None:
            return "there is none"
        # Set and deleted by GradScaler around its call of step().
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        if not self.is_fused and not (grad_scale is None and found_inf is None):
            raise NotPlanned("a gradient scale without fused=True")
        for number in (grad_scale, found_inf):
            if number is not None and not (isinstance(number, Tensor) and number.numel() == 1):
                raise NotPlanned("a gradient scale, or a found_inf, of not one element")
        tail = Tail(grad_scale, found_inf, unscale_grads=True)
        with nullcontext() if plan.is_one_call(tail) else signals.deferred():
            reason = plan.step(optimizer, tail)
            if reason is None:
                self.served += 1
                if capturing and plan not in self.captured:
                    self.captured.append(plan)
        return reason

    def _leave_steps(self, why: str) -> None:
        """Leaves the next steps to torch: twice as many as the last time."""
        self.patience = min(2 * self.patience or 1, _LONGEST_REST)
        self.rest, self.why = self.patience, why


def _check(optimizer: Optimizer, kind: type[Optimizer], unfused: bool) -> bool:
    """Whether all groups have fused=True. Raises `NotPlanned` for what is not to be planned."""
    rule, fused = KINDS[kind], set()
    for group in optimizer.param_groups:
        unchosen = group.get("fused") is None and group.get("foreach") is None
        if group.get("differentiable") or not (group.get("fused") or unchosen):
            raise NotPlanned(CHOSEN)
        if unchosen and not unfused:
            raise NotPlanned(UNCHOSEN)
        if not _OWN_KEYS.isdisjoint(group):
            raise NotPlanned("a group with a key that warpstep's own classes read")
        if rule.counts_steps(group) and not rule.is_whole:
            raise NotPlanned("dampened momentum, for which torch's state has no count of steps")
        is_refused = unchosen and group.get("capturable")
        if is_refused and any(param.device.type == "cpu" for param in group["params"]):
            raise NotPlanned("capturable=True on the CPU, which torch's unfused steps refuse")
        fused.add(not unchosen)
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    counters = [id(state["step"]) for state in states if isinstance(state.get("step"), Tensor)]
    if len(set(counters)) < len(counters):
        raise NotPlanned("parameters that share a step counter")
    if len(fused) == 2:
        raise NotPlanned("groups with and without fused=True")
    # A `step` of its own has called torch's, which is what is asked for. torch._dynamo wraps both.
    if _init_group_of(optimizer) is not _init_group_of(kind):
        raise NotPlanned("an '_init_group' of its own")
    return True in fused


def _init_group_of(owner: Any) -> Any:
    """The function that torch's step calls: the class's, or one that an instance was given."""
    method = owner._init_group
    return inspect.unwrap(getattr(method, "__func__", method))


_all_beside: dict[int, _Beside] = {}  # by the optimizer's id: some classes compare otherwise


def _beside(optimizer: Optimizer) -> _Beside:
    """What is kept of an optimizer: made at its first step, dropped when it dies."""
    key = id(optimizer)
    found = _all_beside.get(key)
    if found is None:
        reference = weakref.ref(optimizer, lambda _: _all_beside.pop(key, None))
        found = _all_beside.setdefault(key, _Beside(reference))
    return found


def planning(
    original: Any,
    kind: type[Optimizer],
    counts: Counts,
    takes_unfused: Callable[[], bool],
    is_on: Callable[[], bool],
) -> Any:
    """In place of torch's ``original``, the ``step`` of ``kind`` inside its decorators."""
    checks_capture = "capturable" in KINDS[kind].flags

    @functools.wraps(original)
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling() or not is_on():
            return original(self, closure)
        if checks_capture:
            check = getattr(self, "_accelerator_graph_capture_health_check", None)  # torch >= 2.12
            (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            _beside(self).step(self, kind, takes_unfused())
        except NotPlanned as reason:
            counts.note_unplanned(str(reason))
        else:
            counts.taken += 1
            counts.by_plans += 1
            return loss
        original(self)
        return loss

    return step


def _place_of_step(kind: type[Optimizer]) -> CellType | None:
    """The variable in which the decorator of torch's ``step`` has the function that it decorates.

    All ways to a step go through it: subclasses, hooks, the methods that schedulers have wrapped
    before. None in a torch where it is otherwise.
    """
    function: Any = kind.step
    decorator = None
    while hasattr(function, "__wrapped__"):
        decorator, function = function, function.__wrapped__
    if decorator is None or list(inspect.signature(function).parameters) != ["self", "closure"]:
        return None
    places = [cell for cell in decorator.__closure__ or () if cell.cell_contents is function]
    return places[0] if len(places) == 1 else None


def put_on(counts: Counts, takes_unfused: Callable[[], bool]) -> Callable[[], None]:
    """Has the steps of torch's optimizers go by plans. Returns what undoes it.

    ``takes_unfused`` tells whether to take optimizers for which no implementation was chosen.
    """
    on = True
    places = []
    for kind in KINDS:
        if (place := _place_of_step(kind)) is not None:
            original = place.cell_contents
            ours = planning(original, kind, counts, takes_unfused, lambda: on)
            places.append((place, ours, original))

    def take_off() -> None:
        nonlocal on
        on = False
        for place, ours, original in places:
            if place.cell_contents is ours:  # else someone has replaced it, and may hold ours
                place.cell_contents = original

    for place, ours, _ in places:  # last: what would fail has not
        place.cell_contents = ours
    return take_off
