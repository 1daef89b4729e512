"""Classes of other libraries, drop-ins for theirs that step by warpstep's plans."""

from warpstep.compat.fused_adam import FusedAdam

__all__ = ["FusedAdam"]
