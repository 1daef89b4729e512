"""Hyper-parameters of a parameter group: checked as torch checks them, packed for kernels."""

from __future__ import annotations

import struct
from typing import Any

from torch import Tensor


def check_group(group: dict[str, Any], where: str) -> None:
    """Raises ValueError if a hyper-parameter of ``group`` is invalid.

    lr, eps and weight_decay are at least 0, betas in [0, 1); none is NaN. Tensors have one element;
    the values of those on an accelerator are not read, which would wait for it.
    """

    def check(key: str, label: str, value: Any, below_one: bool = False) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {key} must be 1-element{where}")
            if value.device.type != "cpu":
                return
        try:
            valid = value >= 0.0 and not (below_one and value >= 1.0)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"Invalid {label}: {value}{where}")

    check("lr", "learning rate", group["lr"])
    check("eps", "epsilon value", group["eps"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} is not a pair{where}")
    for index in range(2):
        check(f"betas[{index}]", f"beta parameter at index {index}", betas[index], below_one=True)
    check("weight_decay", "weight_decay value", group["weight_decay"])


def pack_groups(groups: list[dict[str, Any]]) -> bytes:
    """The groups' hyper-parameters as the table of ``Hyper`` structs in kernels/tables.h.

    Tensors are read on the host. The native module packs without that; this is for where it is
    missing.
    """
    table = b""
    for group in groups:
        beta1, beta2 = group["betas"]
        flags = 1 * bool(group["maximize"]) | 2 * bool(group["decoupled_weight_decay"])
        table += struct.pack(
            "<5dI4B",
            *(float(x) for x in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])),
            flags,
            *(0, 0, 0, 0),
        )
    return table
