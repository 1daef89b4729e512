"""The tensors of a plan's buckets, bound by the native module or by what stands in for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep import backends
from warpstep.buckets import Bucket
from warpstep.options import Options
from warpstep.python_plan import PythonPlan
from warpstep.shards import first_element
from warpstep.state import match_layout

# Flags that choose an implementation; and torch's flag for the form of decay.
_PLANNED_FOR = ("fused", "foreach", "capturable", "differentiable")
_DECOUPLED = "decoupled_weight_decay"
# What the native module calls parameters that are in no bucket of its own (csrc/plan.h).
NO_STATE, PYTHON_ONLY = -1, -2


def bound(
    optimizer: Optimizer, options: Options, buckets: list[Bucket], assignments: list[int]
) -> Any:
    """What holds the tensors, looks at them at each step and launches: see csrc/plan.h."""
    module, _ = backends.native()
    rule = options.rule
    if module is None:
        entries = [bucket.entries for bucket in buckets]
        return PythonPlan(optimizer, rule, entries, options.grad_name)
    keys = module.GroupKeys(
        [(n.key, -1 if n.which is None else n.which) for n in rule.numbers],
        rule.switches(),
        [key for key in rule.flags if key in _PLANNED_FOR],
        _DECOUPLED if _DECOUPLED in rule.flags else None,
    )
    specs = [
        module.BucketSpec(
            b.backend if b.is_native else "external",
            b.recipe.rule,
            b.recipe.formats(),
            b.recipe.keys(),
            "step" if b.recipe.counts_steps else None,
        )
        for b in buckets
    ]
    of_plan = module.PlanOptions(
        options.precision.seed,
        _firsts(buckets),
        dict(options.copies),
        dict(options.counters),
        None if options.grad_name == "grad" else options.grad_name,
        options.watches_masters,
        options.as_fused,
    )
    groups = optimizer.param_groups
    return module.Plan(optimizer.state, groups, keys, assignments, specs, match_layout, of_plan)


def _firsts(buckets: list[Bucket]) -> dict[Tensor, int]:
    """Where shards whose elements draw random bits begin in their whole tensors."""
    sharded = (b for b in buckets if b.shards is not None and not b.recipe.is_plain)
    return {e.param: first_element(e.param) for bucket in sharded for e in bucket.entries}
