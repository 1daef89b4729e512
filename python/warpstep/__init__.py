"""warpstep: AdamW in one pass, in place of ``torch.optim.AdamW``."""

from warpstep.backends import status
from warpstep.override import disable, enable, enabled
from warpstep.optimizer import Adam, AdamW
from warpstep.version import __version__

__all__ = ["Adam", "AdamW", "__version__", "status"]
