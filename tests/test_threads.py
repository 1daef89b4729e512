"""The CPU's threads: torch's, or our own where torch's do not come along."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn import Parameter

import warpstep

COUNT = 2**20 + 3


def large():
    """An optimizer with its first step taken, over one parameter that is worth several threads, and
    so many others that looking at them is.
    """
    generator = torch.Generator().manual_seed(0)
    param, *others = [Parameter(torch.randn(n, generator=generator)) for n in (COUNT, *[1] * 1000)]
    for p in (param, *others):
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = warpstep.AdamW([param, *others], backend="cpu")
    optimizer.step()
    return optimizer, param


def stepped():
    optimizer, param = large()
    optimizer.step()
    return param.detach()


# In the child torch's own operations would hang, were they large: it steps what the parent has made
# and compares small pieces.
FORK = """
import os, sys
sys.path.insert(0, {tests!r})
from test_threads import large, stepped
expected = stepped().split(4096)
optimizer, param = large()
pieces = param.detach().split(4096)
child = os.fork()
if child == 0:
    optimizer.step()
    os._exit(0 if all(a.tolist() == b.tolist() for a, b in zip(pieces, expected)) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("torch_abi", ["0", "1"])
def test_a_forked_child_steps(torch_abi):
    """GNU's OpenMP waits for ever in the child for threads that only the parent has."""
    done = subprocess.run(
        [sys.executable, "-c", FORK.format(tests=os.path.dirname(__file__))],
        env={**os.environ, "WARPSTEP_TORCH_ABI": torch_abi},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "0\n", done.stderr


LATE = """
import multiprocessing, numpy, torch, warpstep

def work():
    tensors = [torch.from_numpy(numpy.full(2**20, x, numpy.float32)) for x in (1, 1, 0, 0)]
    lists = [[tensor] for tensor in tensors]
    warpstep.functional.adamw_(
        *lists, [], [torch.tensor(0.0)], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0,
        eps=1e-8, amsgrad=False, maximize=False,
    )

torch.ones(2**22).add_(1)
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
print(child.exitcode)
child.kill()
"""


def test_a_forked_child_takes_the_first_step_of_all():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr


def test_threads_that_step_at_once():
    """Each with its optimizer: they take turns or work side by side, and the bits are the same."""
    expected = stepped()
    results = {}

    def run(name):
        results[name] = stepped()

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for result in results.values():
        assert torch.equal(result, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_is_done_whatever_the_threads(threads):
    """Also where there are more threads than cores, or than torch has."""
    expected = stepped()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(stepped(), expected)
    finally:
        torch.set_num_threads(before)
