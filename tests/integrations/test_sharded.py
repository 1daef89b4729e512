"""Parameters that are DTensors: each process steps its own shard with a kernel."""

import functools
import math
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

import warpstep
from support.parameters import params_of, random
from support.tolerance import bound
from training import LR, OPTIONS, launches, on_two_ranks

STEPS = 4
# Uneven shards, one of columns, one that leaves a process without elements.
PLACED = [
    *(((5, 4), Shard(0)), ((4, 6), Shard(1)), ((1, 2), Shard(0))),
    *(((7,), Shard(0)), ((3, 3), Replicate()), ((), Replicate())),
]
LAYOUTS = 3  # among them, and a launch for each
ROWS, COLUMNS, COPIED = 0, 1, 4


def distributed(whole, placement):
    return distribute_tensor(whole, init_device_mesh("cpu", (2,)), [placement])


def pair(**options):
    """A warpstep optimizer over DTensors, and torch's over the whole tensors."""
    wholes = [random(shape, i) for i, (shape, _) in enumerate(PLACED)]
    ours = [Parameter(distributed(w, place)) for w, (_, place) in zip(wholes, PLACED, strict=True)]
    theirs = [Parameter(w.clone()) for w in wholes]
    return (
        warpstep.AdamW(ours, **OPTIONS, **options),
        torch.optim.AdamW(theirs, **OPTIONS, fused=True),
    )


def set_grads_of_both(ours, theirs, step):
    for i, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        q.grad = random(q.shape, 100 * step + i)
        p.grad = distributed(q.grad.clone(), PLACED[i][1])  # a replica may be what it is made of


def assert_agree(ours, theirs, steps=STEPS):
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=bound(steps, LR, q))
        assert ours.state[p]["step"] == theirs.state[q]["step"] == steps


def nothing(optimizer):
    pass


def grad_transposed(optimizer):
    p = params_of(optimizer)[COLUMNS]
    shard = p.grad.to_local().t().contiguous().t()
    p.grad = DTensor.from_local(shard, p.device_mesh, p.placements)


def grad_on_all(optimizer):
    p = params_of(optimizer)[ROWS]
    p.grad = p.grad.redistribute(placements=[Replicate()])


def grad_of_summands(optimizer):
    """As long as the parameter, and not yet its gradient."""
    p = params_of(optimizer)[COPIED]
    p.grad = DTensor.from_local(p.grad.to_local() / 2, p.device_mesh, [Partial()])


def memory_moved(optimizer):
    p = params_of(optimizer)[ROWS]
    p._local_tensor = p._local_tensor.clone()


def moment_moved(optimizer):
    moment = optimizer.state[params_of(optimizer)[COLUMNS]]["exp_avg"]
    moment._local_tensor = moment._local_tensor.clone()


def counter_moved(optimizer):
    step = optimizer.state[params_of(optimizer)[ROWS]]["step"]
    step.data = step.data.clone()


def change_worker(change, rank):
    ours, theirs = pair()
    for step in range(STEPS):
        set_grads_of_both(ours, theirs, step)
        if step == 2:
            assert sum(len(bucket.entries) for bucket in ours.plan.buckets) == len(PLACED)
            change(ours)
        versions = [p._version for p in params_of(ours)]
        with launches(LAYOUTS):
            ours.step()
        theirs.step()
        assert all(p._version > v for p, v in zip(params_of(ours), versions, strict=True))
    assert_agree(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        *(nothing, grad_transposed, grad_on_all, grad_of_summands),
        *(memory_moved, moment_moved, counter_moved),
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_followed(change, tmp_path):
    on_two_ranks(functools.partial(change_worker, change), tmp_path)


def clip_worker(norm_type, rank):
    ours, theirs = pair(stats=True)
    for step in range(STEPS):
        set_grads_of_both(ours, theirs, step)
        expected = torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.1, norm_type)
        found = ours.clip_grad_norm_(0.1, norm_type)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        unclipped = [p.grad.full_tensor().clone() for p in params_of(ours)]
        ours.step(zero_grads=True)
        theirs.step()
    assert_agree(ours, theirs)
    assert all(p.grad.full_tensor().count_nonzero() == 0 for p in params_of(ours))
    statistics = ours.statistics()
    for i, p in enumerate(statistics.params):
        at = next(k for k, q in enumerate(params_of(ours)) if q is p)
        norm = unclipped[at].norm()
        torch.testing.assert_close(statistics.grad_norm[i], norm, rtol=1e-6, atol=0)
        norm = p.full_tensor().detach().norm()
        torch.testing.assert_close(statistics.param_norm[i], norm, rtol=1e-6, atol=0)
    assert statistics.nonfinite.tolist() == [0] * len(PLACED)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0])
def test_clipping_and_statistics(norm_type, tmp_path):
    on_two_ranks(functools.partial(clip_worker, norm_type), tmp_path)


def nan_worker(norm_type, rank):
    ours, theirs = pair()
    set_grads_of_both(ours, theirs, 0)
    if rank == 1:
        params_of(ours)[ROWS].grad.to_local()[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="is non-finite"):
        ours.clip_grad_norm_(0.1, norm_type, error_if_nonfinite=True)
    assert ours.clip_grad_norm_(0.1, norm_type).isnan()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_nan_in_one_shard_is_everyones(norm_type, tmp_path):
    on_two_ranks(functools.partial(nan_worker, norm_type), tmp_path)


def freed_worker(rank):
    ours, theirs = pair()
    set_grads_of_both(ours, theirs, 0)
    ours.step()
    before = [p.full_tensor().detach().clone() for p in params_of(ours)]
    set_grads_of_both(ours, theirs, 1)
    storage = params_of(ours)[ROWS].grad._local_tensor.untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0's gradient.*no memory"):
        ours.step()
    for p, old in zip(params_of(ours), before, strict=True):
        assert torch.equal(p.full_tensor(), old)


def test_a_freed_shard_is_an_error(tmp_path):
    on_two_ranks(freed_worker, tmp_path)


def watched_worker(change, options, rank):
    """Under a mode that counts communication, which a step of shards needs none of."""
    ours, theirs = pair(**options)
    for step in range(STEPS):
        set_grads_of_both(ours, theirs, step)
        if step == 2:
            change(ours)
        versions = [p._version for p in params_of(ours)]
        with CommDebugMode() as communication:
            ours.step()
        theirs.step()
        if change is nothing and not options:
            assert communication.get_total_counts() == 0
        assert all(p._version > v for p, v in zip(params_of(ours), versions, strict=True))
    assert_agree(ours, theirs)
    if options:
        found = ours.statistics()
        for p, norm in zip(found.params, found.param_norm, strict=True):
            expected = p.full_tensor().detach().norm()
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("change", [nothing, grad_on_all, grad_of_summands])
@pytest.mark.parametrize("options", [{}, {"stats": True}], ids=["operator", "reference"])
def test_a_mode_sees_the_shards(change, options, tmp_path):
    on_two_ranks(functools.partial(watched_worker, change, options), tmp_path)


def least_worker(options, rank):
    """decay_form="min": the smallest magnitude of all shards, which may be another process's."""
    watched = nullcontext
    options = dict(options)
    if options.pop("watched", False):
        watched = CommDebugMode
    nan = options.pop("nan", False)
    ours, _ = pair(decay_form="min", **options)
    wholes = [p.full_tensor().detach().clone().requires_grad_() for p in params_of(ours)]
    theirs = warpstep.AdamW(wholes, **OPTIONS, decay_form="min", backend="cpu")
    for step in range(STEPS):
        set_grads_of_both(ours, theirs, step)
        if nan and step == STEPS - 1:
            wholes[ROWS].data[-1, -1] = math.nan
            if rank == 1:
                params_of(ours)[ROWS]._local_tensor.data[-1, -1] = math.nan
        with watched():
            ours.step()
        theirs.step()
    for index, (p, q) in enumerate(zip(params_of(ours), wholes, strict=True)):
        if nan and index == ROWS:
            assert p.full_tensor().isnan().all()
            assert q.isnan().all()
            continue
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=bound(STEPS, LR, q))


@pytest.mark.parametrize(
    "options",
    [{}, {"nan": True}, {"watched": True}, {"backend": "reference"}],
    ids=["kernel", "nan", "watched", "reference"],
)
def test_the_least_magnitude_is_of_all_shards(options, tmp_path):
    on_two_ranks(functools.partial(least_worker, options), tmp_path)
