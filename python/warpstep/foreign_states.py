"""States of other optimizers: Transformer Engine's and bitsandbytes' are read, torch's is written.

What is read becomes a state with torch's names and float32 moments; a step converts these where it
keeps 8 bits (see state.py). What a master is converted to, Transformer Engine's names included, is
there too: `master_param` is its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.recipes import RESIDUAL, codes_of, scale_of
from warpstep.rules import Rule
from warpstep.shards import layout_of, like_shards
from warpstep.stored import decode_from, has_codes, moments_in

# Where newer versions of bitsandbytes keep what is quantised; older ones keep it beside the step.
_NESTED = "__bnb_optimizer_quant_state__"
_QUANTISED = ("state", "absmax", "qmap")
_BLOCK = 256  # numbers that share an absmax there


# ---- Written


def portable(state_dict: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """A state dict as torch's class takes it: no codes, no residuals, and moments in float32.

    Moments of float64 and complex parameters stay what they are.
    """
    return {
        **state_dict,
        "state": {
            key: _portable_state(value, rule) if isinstance(value, dict) else value
            for key, value in state_dict["state"].items()
        },
        "param_groups": [
            {key: value for key, value in group.items() if key != "master"}
            for group in state_dict["param_groups"]
        ],
    }


@torch.no_grad()
def _portable_state(state: dict[str, Any], rule: Rule) -> dict[str, Any]:
    left_out = (RESIDUAL, *map(codes_of, rule.moments), *map(scale_of, rule.moments))
    found = {key: value for key, value in state.items() if key not in left_out}
    for key, moment in moments_in(state, rule.moments).items():
        if not isinstance(moment, Tensor):
            continue
        if has_codes(state, key):
            part = decode_from(state, key, squares=key in rule.squares)
            found[key] = like_shards(moment, part, tuple(moment.shape))
        elif moment.dtype in (torch.bfloat16, torch.float16):
            found[key] = moment.to(torch.float32)
    return found


# ---- Read


def translated(
    misfit: str, saved: dict[str, Any], group: dict[str, Any], rule: Rule
) -> dict[str, Any]:
    """One parameter's state with torch's names and moments that are numbers, or as it was.

    Args:
        misfit: how messages begin.
        saved: the state as it was saved.
        group: the parameter's saved group, which has the step's count in Transformer Engine's.
        rule: of the optimizer that is to have it.

    Raises:
        ValueError: it is of a foreign kind and cannot be converted.
    """
    if isinstance(nested := saved.get(_NESTED), dict):
        saved = {**{key: value for key, value in saved.items() if key != _NESTED}, **nested}
    if "state1" in saved and "exp_avg" in rule.moments and "exp_avg" not in saved:
        saved = _of_bitsandbytes(misfit, saved)
    if saved and "step" not in saved and "step" in group and "exp_avg" in saved:
        if not group.get("bias_correction", True):
            raise ValueError(
                f"{misfit}: its group has bias_correction=False, and a step corrects the moments' "
                "bias. Set that to True, and the group's 'step' to 1000000: there is none then."
            )
        saved = {"step": group["step"], **saved}
    return saved


def forget_count(group: dict[str, Any]) -> None:
    """Removes Transformer Engine's count from a group, now that states have it: it would be old."""
    if "bias_correction" in group:
        group.pop("step", None)


def _of_bitsandbytes(misfit: str, saved: dict[str, Any]) -> dict[str, Any]:
    known = {f"{name}{which}" for name in _QUANTISED for which in (1, 2)}
    found = {key: value for key, value in saved.items() if key not in known}
    for which, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        if f"state{which}" in saved:
            found[key] = _dequantised(misfit, which, saved)
    return found


@torch.no_grad()
def _dequantised(misfit: str, which: int, saved: dict[str, Any]) -> Tensor:
    """``qmap[code] * absmax`` of the code's block, in float32; or the numbers that it has already.

    Blocks of 256 numbers lie in the order of the parameter's elements, the last one may be shorter.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
    (https://arxiv.org/abs/2110.02861).
    """
    state, absmax, qmap = (saved.get(f"{name}{which}") for name in _QUANTISED)
    if not isinstance(state, Tensor):
        raise ValueError(f"{misfit}: 'state{which}' is {state!r}, expected a tensor")
    if state.dtype != torch.uint8:
        return state
    if layout_of(state) is not None or not state.is_contiguous():
        raise ValueError(
            f"{misfit}: 'state{which}' is sharded or not contiguous, and blocks of bitsandbytes "
            "run through whole, contiguous tensors. Load its state where it is whole."
        )
    blocks = -(-state.numel() // _BLOCK)
    of_code = _numbers(misfit, which, "qmap", qmap, 256, state.device)[state.flatten().long()]
    of_block = _numbers(misfit, which, "absmax", absmax, blocks, state.device)
    return (of_code * of_block.repeat_interleave(_BLOCK)[: state.numel()]).view(state.shape)


def _numbers(
    misfit: str, which: int, name: str, found: Any, count: int, device: torch.device
) -> Tensor:
    """``found`` as so many float32."""
    if isinstance(found, Tensor) and found.numel() == count:
        return found.to(device, torch.float32).flatten()
    is_other = isinstance(found, Tensor)
    described = f"of shape {tuple(found.shape)}" if is_other else repr(found)
    raise ValueError(
        f"{misfit}: 'state{which}' has 8 bits a number, and '{name}{which}' is {described}, "
        f"expected {count} numbers: only bitsandbytes' states in blocks of {_BLOCK} numbers "
        "(block_wise=True) can be converted"
    )
