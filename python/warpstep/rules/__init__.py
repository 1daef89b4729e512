"""The rules: the updates that optimizers are made of, by name."""

from warpstep.rules.adamw import ADAMW
from warpstep.rules.rule import Rule
from warpstep.rules.sgd import SGD

RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, SGD)}

__all__ = ["ADAMW", "RULES", "SGD", "Rule"]
