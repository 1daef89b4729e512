"""What a type checker tells warpstep's users: mypy reads this file, nothing runs it."""

import torch
from typing_extensions import assert_type

import warpstep


def replaced(adamw: torch.optim.AdamW, adam: torch.optim.Adam) -> None:
    """``replace`` returns the class that it makes, which torch's variable can hold."""
    assert_type(warpstep.replace(adamw), warpstep.AdamW)
    assert_type(warpstep.replace(adam), warpstep.Adam)
    adamw = warpstep.replace(adamw)
    adam = warpstep.replace(adam)
