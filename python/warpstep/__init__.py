"""warpstep: AdamW, Adam and SGD in one pass, in place of ``torch.optim``'s."""

from warpstep import compat, functional, torch_ops
from warpstep.adam import Adam
from warpstep.adamw import AdamW
from warpstep.backends import BackendUnavailableError, native
from warpstep.enabling.override import disable, enable, enable_if_asked, enabled
from warpstep.enabling.replacement import replace
from warpstep.report import status
from warpstep.sgd import SGD
from warpstep.version import __version__

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "__version__",
    "compat",
    "disable",
    "enable",
    "enabled",
    "functional",
    "replace",
    "status",
    "torch_ops",
]

native()  # finds and tries torch's functions now: a fork may come before the first step
enable_if_asked()
