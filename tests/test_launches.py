"""How a step is launched: once for all tensors and groups of a recipe on a device."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED, INTERPRETED
from warpstep import backends


def launches(backend):
    return warpstep.status().launches[backend]


def small_params(count, device, dtype=torch.float32):
    params = [Parameter(torch.ones(1, dtype=dtype, device=device)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@pytest.mark.parametrize(
    ("tensors", "groups", "expected"),
    [(1, 1, 1), (148, 2, 1), (465, 465, 1), (4000, 10, 1), (4001, 1, 2), (1000, 1000, 2)],
)
def test_one_launch_a_step(backend, device, tensors, groups, expected):
    if backend == "reference":
        assert launches("cpu") >= 0  # the reference launches torch's operations, uncounted
        return
    if backend != "cuda":
        expected = 1  # only CUDA's arguments are limited
    if INTERPRETED and backend == "triton":
        tensors, groups = min(tensors, 20), min(groups, 20)  # at some 5 ms a tensor
    params = small_params(tensors, device)
    if groups > 1:
        per_group = tensors // groups
        params = [
            {"params": params[i : i + per_group], "lr": 1e-3 + i * 1e-6}
            for i in range(0, tensors, per_group)
        ]
    optimizer = warpstep.AdamW(params, backend=backend)
    for _ in range(2):
        before = launches(backend)
        optimizer.step()
        assert launches(backend) - before == expected
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert steps == {2.0}


def test_one_launch_a_recipe(backend, device):
    if backend == "reference":
        return
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [p for dtype in dtypes for p in small_params(3, device, dtype)]
    optimizer = warpstep.AdamW(params, backend=backend)
    before = launches(backend)
    optimizer.step()
    assert launches(backend) - before == len(dtypes)
    assert len(str(optimizer.plan).splitlines()) == len(dtypes)


@pytest.mark.parametrize(
    ("elements", "chunk"),
    [(1, 2048), (2**20, 2048), (2**22 + 5, 4096), (2**23 + 5, 8192), (2**24 + 5, 16384)],
)
def test_a_cuda_launch_has_blocks_for_every_multiprocessor(
    backend, device, elements, chunk, monkeypatch
):
    """A thousand, or as many as chunks of 2,048 elements give; the bits are those of the CPU."""
    if backend != "cuda":
        return
    chunks = max(1, elements // chunk)  # aligned: a few more elements make one more
    chunks += elements > chunks * chunk
    if EMULATED:  # fibers are slow: only the last blocks, which are looked at
        monkeypatch.setenv("EMULATED_BLOCKS_FROM", str(max(0, chunks - 4)))
    values = torch.randn(2, elements)
    looked_at = slice(max(0, elements - 2 * chunk - 5), elements)
    after = []
    for name, where in ((backend, device), ("cpu", "cpu")):
        param = Parameter(values[0].to(where, copy=True))
        param.grad = values[1].to(where)
        optimizer = warpstep.AdamW([param], backend=name)
        optimizer.step()
        after.append(param.detach()[looked_at].cpu())
        if name == "cuda":
            assert optimizer.plan.buckets[0].chunks == chunks
    assert torch.equal(*after)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_a_norm_adds_up_what_every_block_found(backend, device, norm_type):
    """Of more blocks than the last one's threads read at once; whole numbers, so exactly."""
    tensors = 2500 if not INTERPRETED else 100
    params = small_params(tensors, device)
    for i, param in enumerate(params):
        param.grad.fill_(i % 50)
    params[-1].grad.fill_(-1000)
    optimizer = warpstep.AdamW(params, backend=backend)
    norm = optimizer.clip_grad_norm_(1.0, norm_type)
    squares = sum((i % 50) ** 2 for i in range(tensors - 1)) + 1000**2
    expected = squares**0.5 if norm_type == 2 else 1000.0
    assert norm.item() == torch.tensor(expected, dtype=norm.dtype).item()


def test_a_steady_step_keeps_its_plan(backend, device):
    params = small_params(5, device)
    optimizer = warpstep.AdamW(params, backend=backend)
    optimizer.step()
    plan = optimizer.plan
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        assert optimizer.plan is plan


@pytest.mark.parametrize("where", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize(
    "flags", [{"fused": False}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("how", ["constructed", "in a group", "edited", "loaded", "replaced"])
def test_torchs_choice_of_implementation_costs_no_kernel(where, flags, how):
    """To torch fused=False is any of its other implementations: what is fastest and exact is one.

    torchtitan's implementation="foreach" passes both; torch's checkpoints bring them into groups.
    """
    params = small_params(3, where)
    if how == "in a group":
        optimizer = warpstep.AdamW([{"params": params, **flags}])
    elif how == "replaced":
        optimizer = warpstep.replace(torch.optim.AdamW(params, **flags))
    else:
        optimizer = warpstep.AdamW(params, **(flags if how == "constructed" else {}))
    if how == "edited":
        optimizer.step()
        optimizer.param_groups[0].update(flags)
    elif how == "loaded":
        optimizer.load_state_dict(torch.optim.AdamW(params, **flags).state_dict())
    optimizer.step()
    chosen = backends.choose("auto", torch.device(where))
    assert chosen != "reference"
    assert [(b.backend, len(b.entries)) for b in optimizer.plan.buckets] == [(chosen, 3)]
    assert all(s["step"].device == p.device for p, s in optimizer.state.items())
    named = warpstep.AdamW(params, backend="reference", **flags)
    named.step()
    assert not named.plan.buckets
