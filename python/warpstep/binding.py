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
        numbers=[(n.key, -1 if n.which is None else n.which) for n in rule.numbers],
        switches=rule.switches(),
        flags=[key for key in rule.flags if key in _PLANNED_FOR],
        decoupled=_DECOUPLED if _DECOUPLED in rule.flags else None,
    )
    return module.Plan(
        state=optimizer.state,
        param_groups=optimizer.param_groups,
        keys=keys,
        assignments=assignments,
        buckets=[
            module.BucketSpec(
                backend=b.backend if b.is_native else "external",
                rule=b.recipe.rule,
                formats=b.recipe.formats(),
                keys=b.recipe.keys(),
                counter="step" if b.recipe.counts_steps else None,
            )
            for b in buckets
        ],
        match_layout=match_layout,
        options=module.PlanOptions(
            seed=options.precision.seed,
            firsts=_firsts(buckets),
            copies=dict(options.copies),
            counters=dict(options.counters),
            grad_name=None if options.grad_name == "grad" else options.grad_name,
            watches_masters=options.watches_masters,
            as_fused=options.as_fused,
        ),
    )


def _firsts(buckets: list[Bucket]) -> dict[Tensor, int]:
    """Where shards whose elements draw random bits begin in their whole tensors."""
    sharded = (b for b in buckets if b.shards is not None and not b.recipe.is_plain)
    return {e.param: first_element(e.param) for bucket in sharded for e in bucket.entries}
