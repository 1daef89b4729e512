"""Large states lie where a processor's L1 cache has room for all that is written of an element."""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED, INTERPRETED
from warpstep import allocation
from warpstep.allocation import new_zeros

pytestmark = pytest.mark.skipif(EMULATED or INTERPRETED, reason="of the CPU's own kernels")

LARGE = 2**25  # bytes: from here on tensors lie apart
BF16 = torch.bfloat16


def way(address):
    """The hash by which AMD's processors find a line's way (Lipp et al., 2020): a bit a pair."""
    pairs = ((12, 27), (13, 26), (14, 25), (15, 20), (16, 21), (17, 22), (18, 23), (19, 24))
    return tuple((address >> a ^ address >> b) & 1 for a, b in pairs)


def exclude_each_other(a, b):
    is_same_set = (a ^ b) & 0xFC0 == 0
    return is_same_set and way(a) == way(b)


@pytest.mark.parametrize("size", [2**25, 2**26, 2**27], ids=lambda size: f"{size >> 20}-MiB")
@pytest.mark.parametrize("moments", [2, 3])
def test_operands_mapped_one_after_another_find_room(size, moments):
    """As the C library maps them: below the one before, each with a page of its own."""
    zeros = new_zeros(torch.empty(size // 2, dtype=BF16), BF16)
    of_torch, ours = size + 4096, zeros.untyped_storage().nbytes() + 4096
    for gradient_between in (False, True):
        param = address = 2**46
        address -= of_torch * gradient_between
        written = [param, *(address - ours * (i + 1) for i in range(moments))]
        for a, b in itertools.combinations(written, 2):
            assert not exclude_each_other(a, b)
    assert size != 2**27 or exclude_each_other(0, of_torch), "what it is for"


@pytest.mark.parametrize("options", [{}, {"master": "residual", "ema_decay": 0.9}], ids=str)
def test_a_large_state_is_as_any_other(options):
    """All elements alike, so that those of a small parameter tell what they are to be."""
    states = []
    for columns in (64, LARGE // 128):
        param = Parameter(torch.ones(64, columns, dtype=BF16).t())
        param.grad = torch.ones((), dtype=BF16).expand(param.shape)
        optimizer = warpstep.AdamW([param], **options)
        optimizer.step()
        states.append(optimizer.state[param])
    small, large = states
    assert large["exp_avg"].untyped_storage().nbytes() > large["exp_avg"].nbytes
    assert small["exp_avg"].untyped_storage().nbytes() == small["exp_avg"].nbytes
    for key in small.keys() - {"step"}:
        assert large[key].stride() == param.stride()
        assert large[key].storage_offset() == 0
        assert not large[key]._is_view()
        assert torch.equal(large[key], small[key][0, 0].expand(param.shape))


def test_a_loaded_state_has_room_too():
    param = Parameter(torch.ones(LARGE // 2, dtype=BF16))
    param.grad = torch.ones_like(param)
    first, second = (warpstep.AdamW([param]) for _ in range(2))
    first.step()
    second.load_state_dict(first.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        loaded = second.state[param][key]
        assert torch.equal(loaded, first.state[param][key])
        assert loaded.data_ptr() != first.state[param][key].data_ptr()
        assert loaded.untyped_storage().nbytes() > loaded.nbytes


def stepped(x, begin=None):
    """A parameter made inside a transform and stepped, with a state that begins in the step."""
    param = Parameter(torch.linspace(-1, 1, 4) if begin is None else begin.clone())
    param.grad = x
    warpstep.AdamW([param], lr=0.1).step()
    return param * x


TRANSFORMS = {
    "vmap": lambda xs: torch.vmap(stepped)(xs, -xs),
    "jvp": lambda xs: torch.func.jvp(stepped, (xs[0],), (xs[1],)),
    "make_fx": lambda xs: make_fx(lambda x: stepped(x))(xs[0])(xs[1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_state_that_begins_inside_a_transform_may_be_large(transform, monkeypatch):
    """What stands for a tensor there has no memory to be chosen."""
    xs = torch.linspace(1, 2, 8).view(2, 4)
    expected = transform(xs)
    monkeypatch.setattr(allocation, "_LARGE", 1)
    torch.testing.assert_close(transform(xs), expected, rtol=0, atol=0)
