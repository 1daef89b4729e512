"""What the integration tests share: a model, its data, and how far two runs may be apart.

NOTE [same gradients]
The model's loss is linear in its weights, so its gradients depend on the data alone. Two runs on
the same data meet the same gradients bit for bit, whatever their optimizers did, and their weights
differ by the optimizers' roundings only. NOTE [tolerance] in support/tolerance.py bounds those.
"""

import contextlib
import faulthandler
import multiprocessing
import time

import torch
import torch.distributed as dist
from torch import nn

import warpstep
from support.tolerance import bound

LR = 0.01
OPTIONS = {"lr": LR, "weight_decay": 0.1, "betas": (0.9, 0.99)}
SIZES = (5, 1)  # outputs of the layers; two ranks share 5 rows unevenly and leave one without any
FEATURES = 6


class SideBySide(nn.Module):
    """Linear layers on the same input, summed. See NOTE [same gradients]."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList(nn.Linear(FEATURES, size) for size in SIZES)

    def forward(self, x, target):
        return {"loss": (sum(part(x) for part in self.parts) * target).mean()}


def rows(count):
    """A data set: ``count`` rows of input and target."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((count, FEATURES), generator=generator)
    target = torch.randn((count, max(SIZES)), generator=generator)
    return [{"x": a, "target": b} for a, b in zip(x, target, strict=True)]


def batches(steps, size=4, rank=0, ranks=1):
    """One batch a step; a rank's own rows, where there are several."""
    loader = list(torch.utils.data.DataLoader(rows(steps * size * ranks), batch_size=size))
    return loader[rank::ranks]


def train(model, optimizer, data):
    for batch in data:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


def weights(model):
    """A model's parameters by name, whole and detached."""
    found = {}
    for name, param in model.named_parameters():
        whole = param.full_tensor() if hasattr(param, "full_tensor") else param
        found[name] = whole.detach().clone()
    return found


def assert_agree(ours, theirs, steps, lr=LR):
    """Weights of two runs on the same gradients. See NOTE [same gradients]."""
    start = weights(SideBySide())
    assert ours.keys() == theirs.keys()
    for name, p in theirs.items():
        assert not torch.equal(p, start[name]), f"{name} was not trained"
        atol = bound(steps, lr, p)
        torch.testing.assert_close(ours[name], p, rtol=0, atol=atol, msg=name)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, p in one.items():
        assert torch.equal(p, other[name]), name


@contextlib.contextmanager
def launches(expected):
    """Within, warpstep's CPU kernel must be launched that many times."""
    before = warpstep.status().launches["cpu"]
    yield
    assert warpstep.status().launches["cpu"] - before == expected


@contextlib.contextmanager
def calls_taken(steps):
    """Within, plans must take ``steps`` of torch's fused steps or more, and nothing be left."""
    before = warpstep.status()
    with warpstep.enabled():
        yield
    after = warpstep.status()
    assert after.by_plans - before.by_plans >= steps
    assert (after.passed_on, after.unplanned) == (before.passed_on, before.unplanned)


# ---- Several processes

# Forked from a process that has imported these, and has run and stepped nothing: a rank costs 4
# seconds less than one that imports them itself.
multiprocessing.set_forkserver_preload(
    [
        *("pytest", "warpstep", "torch.distributed.checkpoint.state_dict"),
        *("torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.tensor.debug"),
    ]
)


def on_two_ranks(worker, folder, *, timeout=60):
    """Runs ``worker(rank)`` in two processes on gloo. Returns what each returned."""
    return on_ranks(2, worker, folder, timeout=timeout)


def on_ranks(ranks, worker, folder, *, timeout=60):
    """Runs ``worker(rank)`` in so many processes on gloo. Returns what each returned.

    They meet at a file, so no port has to be free. One that hangs is killed, and fails the test.
    """
    context = torch.multiprocessing.start_processes(
        _rank,
        args=(ranks, worker, str(folder)),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"a rank did not end within {timeout} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _rank(rank, ranks, worker, folder):
    faulthandler.enable()
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    try:
        result = worker(rank)
        dist.barrier()  # neither leaves while the other still talks to it
    finally:
        dist.destroy_process_group()
    torch.save(result, f"{folder}/rank{rank}.pt")
