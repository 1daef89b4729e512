"""bitsandbytes' 8-bit states: what the library makes is loaded as the library would decode it."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.parameters import params_of, random, take_steps

SHAPES = [(64, 70), (4, 1024), (10,)]


@pytest.mark.parametrize("cls", ["AdamW8bit", "Adam8bit", "AdamW32bit"])
def test_a_run_goes_on(cls):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [Parameter(random(s, i)) for i, s in enumerate(SHAPES)]
    theirs = getattr(bitsandbytes.optim, cls)(params, lr=1e-2, weight_decay=0.1)
    take_steps(theirs, range(3))
    nested = theirs.state_dict()
    # As the optimizer has it in memory, and older versions in their state dicts.
    flat = {**nested, "state": {i: dict(theirs.state[p]) for i, p in enumerate(params)}}
    for saved in (nested, flat):
        ours = warpstep.AdamW([Parameter(p.detach().clone()) for p in params], lr=1e-2)
        ours.load_state_dict(saved)
        for p, q in zip(params, params_of(ours), strict=True):
            state = theirs.state[p]
            for which, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
                expected = state[f"state{which}"]
                if expected.dtype == torch.uint8:
                    expected = bitsandbytes.functional.dequantize_blockwise(
                        expected,
                        absmax=state[f"absmax{which}"],
                        code=state[f"qmap{which}"],
                        blocksize=256,
                    )
                assert torch.equal(ours.state[q][key], expected)
            assert ours.state[q]["step"] == 3
        group = ours.param_groups[0]
        assert (group["weight_decay"], group["lr"]) == (0.1, 1e-2)
        take_steps(ours, range(3, 4))
