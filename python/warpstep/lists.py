"""Lists of tensors as the native kernels take them, whoever calls: functions, operators, torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpstep import backends
from warpstep.rules import ADAMW, SGD, Rule

RESIDUALS, COPIES = "residuals", "copies"  # lists of low precision


class Options(NamedTuple):
    """What a step takes beside its lists. ``_native.list_options`` has the same fields."""

    lr: float | Tensor
    numbers: tuple[float, ...]  # the rule's others, in the order of Rule.numbers
    maximize: bool
    coupled: bool  # else the decay is decoupled
    grad_scale: Tensor | None
    found_inf: Tensor | None
    advance_steps: bool
    unscale_grads: bool
    rounding: str | None = None  # of what is stored in bfloat16
    seed: int = 0  # of random bits, which depend on the next two as well
    param_indices: Sequence[int] | None = None  # by default the places in the lists
    first_elements: Sequence[int] | None = None  # of ranges of parameters; by default 0


class Caller(NamedTuple):
    """Who asks for a step on lists, so far as that matters to it."""

    dispatched: bool  # torch's dispatcher, which leaves no subclass and nothing lazy
    always: bool  # even where uploading tables costs more than the launch saves
    count_writes: bool  # the version counters of what is written are to be incremented


FUNCTION = Caller(dispatched=False, always=True, count_writes=True)
OPERATOR = Caller(dispatched=True, always=True, count_writes=True)
# Torch's own step, which takes what this does not; and the operators that it calls.
TORCHS_STEP = Caller(dispatched=False, always=False, count_writes=False)
TORCHS_OPERATOR = Caller(dispatched=True, always=False, count_writes=False)


class Lists(NamedTuple):
    """The lists of one call, with an entry a tensor in each."""

    rule: Rule
    names: tuple[str, ...]
    tensors: Sequence[list[Tensor]]  # params, grads, the rule's moments, step counters (or none)
    low_precision: Mapping[str, list[Tensor]] = MappingProxyType({})  # those given, by name

    @property
    def moments(self) -> tuple[str, ...]:
        """What a state calls the moments that there are."""
        return self.rule.moments[: len(self.tensors) - 3]

    def chosen(self, indices: Sequence[int], grads: Sequence[Tensor]) -> Lists:
        """Some of the tensors, with gradients of these in place of their own."""
        tensors = [[one[i] for i in indices] if one else [] for one in self.tensors]
        tensors[1] = [grads[i] for i in indices]
        low = {name: [one[i] for i in indices] for name, one in self.low_precision.items()}
        return self._replace(tensors=tensors, low_precision=low)

    def for_kernels(self) -> tuple[list[Tensor] | None, ...] | None:
        """The lists of low precision as the native module takes them."""
        if not self.low_precision:
            return None
        return tuple(map(self.low_precision.get, low_precision_names(self.moments)))


@functools.cache
def low_precision_names(moments: tuple[str, ...]) -> tuple[str, ...]:
    """What the lists of low precision are called: of moments, the scales; and of parameters."""
    return (*(scales_of(moment) for moment in moments), RESIDUALS, COPIES)


def scales_of(moment: str) -> str:
    """What the list of the scales of an 8-bit moment is called."""
    return f"{moment}_scales"


def list_names(rule: Rule) -> tuple[str, ...]:
    """What the lists of a rule are called, of which some calls use all."""
    return ("params", "grads", *(f"{key}s" for key in rule.moments), "state_steps")


def used_lists(rule: Rule, given: Mapping[str, Any]) -> list[bool]:
    """Which of them a call uses: without amsgrad, say, there are no maxima."""
    moments = [key not in rule.optional or bool(given[rule.optional[key]]) for key in rule.moments]
    return [True, True, *moments, True]


def lists_of(rule: Rule, tensors: Sequence[list[Tensor]], given: Mapping[str, Any]) -> Lists:
    """The lists that a call uses, of all that it has."""
    used = used_lists(rule, given)
    return Lists(rule, tuple(compress(list_names(rule), used)), tuple(compress(tensors, used)))


class Operator(NamedTuple):
    """A step on lists as libraries call it: a function of functional, an operator of torch_ops."""

    name: str
    rule: Rule
    coupled: bool  # else the decay is decoupled

    @property
    def numbers(self) -> dict[str, bool]:
        """The rule's numbers as arguments are called, in their order; whether each is a flag."""
        return {
            n.key if n.which is None else f"{n.key.removesuffix('s')}{n.which + 1}": n.is_flag
            for n in self.rule.numbers[1:]
        }

    @property
    def flags(self) -> list[str]:
        """Arguments that are true or false: numbers of the rule, and what decides about a list."""
        of_lists = [key for key in self.rule.optional.values() if key in self.rule.flags]
        return [name for name, is_flag in self.numbers.items() if is_flag] + of_lists

    def bound(self, tensors: Sequence[list[Tensor]], given: Mapping[str, Any]) -> Call:
        """A call's lists and options, from its arguments."""
        numbers = tuple(given[name] for name in self.numbers)
        common = {key: given[key] for key in Options._fields if key in given}
        if not tensors[-1]:  # no counter that the caller could have advanced
            common["advance_steps"] = True
        options = Options(**common, numbers=numbers, coupled=self.coupled)
        lists = lists_of(self.rule, tensors, given)
        low = {n: given[n] for n in low_precision_names(lists.moments) if given[n] is not None}
        return (lists._replace(low_precision=low) if low else lists), options

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the arguments that may be left out."""
        low = dict.fromkeys(low_precision_names(self.rule.moments))
        return {**dict.fromkeys(self.flags, False), **low, **_DEFAULTS}


Call = tuple[Lists, Options]
# Of the arguments that every operator has.
_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "grad_scale": None,
    "found_inf": None,
    "advance_steps": True,
    "unscale_grads": False,
    "rounding": None,
    "seed": 0,
    "param_indices": None,
    "first_elements": None,
}
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("adamw_", ADAMW, coupled=False),
        Operator("adam_", ADAMW, coupled=True),
        Operator("sgdw_", SGD, coupled=False),
        Operator("sgd_", SGD, coupled=True),
    )
}

Tables = tuple[Tensor, ...]
RESIDENT_BYTES = 32 << 20  # of tables kept on GPUs: those of some 300,000 tensors


def _upload(device: int, *tables: bytes) -> tuple[Any, ...]:
    """Puts tables into the memory of CUDA device ``device``: what keeps them, their addresses."""
    where = torch.device(backends.cuda_device_type() or "cuda", device)
    held = tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8).to(where) for t in tables)
    return (held, *(table.data_ptr() for table in held))


def _use(tables: Tables) -> None:
    """Keeps the tables' memory from reuse until what the current stream does by now is done."""
    if tables[0].is_cuda:
        stream = torch.cuda.current_stream(tables[0].device)
        for table in tables:
            table.record_stream(stream)


@functools.cache
def stepper() -> Any:
    """The process's native ListStepper. Raises BackendUnavailableError without native module."""
    module, reason = backends.native()
    if module is None:
        raise backends.BackendUnavailableError(reason)
    return module.ListStepper(upload=_upload, use=_use, resident_bytes=RESIDENT_BYTES)
