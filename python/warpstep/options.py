"""What an optimizer asks of its plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from warpstep.precision import Precision
from warpstep.rules import Rule


@dataclass(frozen=True)
class Options:
    """What an optimizer asks of its plans: see its class."""

    rule: Rule
    backend: str = "auto"
    precision: Precision = field(default_factory=Precision)
    copies: Mapping[Tensor, Tensor] = field(default_factory=dict)  # by parameter

    def is_of_dtypes(self, group: dict[str, Any]) -> bool:
        """Whether dtypes alone tell how a group's parameters are stored."""
        return not (group.get("master") or self.copies) and self.precision.is_of_dtypes
