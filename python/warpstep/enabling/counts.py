"""What ``enable()`` has taken of torch's steps and calls, and what not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Reasons that are told apart: some have values in them, of which there is no end. A process has a
# few as a rule, and more than these nobody reads.
MOST_REASONS, OTHER_REASONS = 64, "for other reasons"


@dataclass
class Counts:
    """Of this process.

    Attributes:
        taken: steps and calls that warpstep's kernels took.
        by_plans: of those, whole steps.
        passed_on: calls that went to torch's kernels, by reason.
        unplanned: steps that no plan took, by reason.
    """

    taken: int = 0
    by_plans: int = 0
    passed_on: Counter[str] = field(default_factory=Counter)
    unplanned: Counter[str] = field(default_factory=Counter)

    def note_unplanned(self, reason: str) -> None:
        """Counts one. Reasons can have values in them: after so many, the rest are one."""
        known = reason in self.unplanned or len(self.unplanned) < MOST_REASONS
        self.unplanned[reason if known else OTHER_REASONS] += 1

    def __str__(self) -> str:
        line = ""
        if self.taken or self.passed_on:
            line = f"; {self.taken} calls taken, {self.by_plans} of them whole steps by plans"
        line += "".join(f", {n} passed on to torch ({why})" for why, n in self.passed_on.items())
        return line + "".join(f"; {n} without a plan ({why})" for why, n in self.unplanned.items())
