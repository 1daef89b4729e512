"""The CPU's threads: torch's, or our own where torch's do not come along."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import programs

ROOT = Path(__file__).parent.parent
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
    program = FORK.format(tests=os.path.dirname(__file__))
    done = programs.run(program, WARPSTEP_TORCH_ABI=torch_abi)
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
    done = programs.run(LATE)
    assert done.stdout == "0\n", done.stderr


ENABLING = """
import os, signal, threading, warpstep

held, done = threading.Event(), threading.Event()

def hold():
    with warpstep.enabling.override._lock:
        held.set()
        done.wait(1)  # the fork may wait for this, or not

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    with warpstep.enabled():
        os._exit(0)
done.set()
holder.join()
with warpstep.enabled():
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_enables():
    """Whatever another thread of its parent's was just enabling or disabling."""
    done = programs.run(ENABLING)
    assert done.stdout == "0\n", done.stderr


# An import may run Python: here what sleeps where the native module imports, which alone gives a
# list, so that both threads come to the first use of what is imported.
FIRST = """
import builtins, faulthandler, threading, time, torch, warpstep
faulthandler.dump_traceback_later(30, exit=True)

def step():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    warpstep.AdamW([param], lr=0.1, backend="cpu").step()

def slow(name, *others):
    if others[2:] and others[2] == []:
        time.sleep(0.3)
    return of_python(name, *others)

of_python, builtins.__import__ = builtins.__import__, slow
threads = [threading.Thread(target=step) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("stepped")
"""


def test_threads_that_take_the_first_steps():
    done = programs.run(FIRST, WARPSTEP_TORCH_ABI="0")  # which counts writes by torch's Python
    assert done.stdout == "stepped\n", done.stderr


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


# Whether subnormal numbers count as zero is a thread's own setting, which torch changes on the
# calling thread alone. Bits are drawn and compared as integers, to which the setting does nothing.
FLUSH = """
import torch, warpstep

def bits(*tensors):
    return [t.detach().view(torch.int32).numpy().tobytes() for t in tensors]

def step(threads, flush):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    subnormal = torch.randint(1, 2**23, (4, {count}), generator=generator, dtype=torch.int32)
    param, grad, exp_avg, exp_avg_sq = subnormal.view(torch.float32)
    param = torch.nn.Parameter(param)
    param.grad = grad
    optimizer = warpstep.AdamW([param], lr=1e-3, backend="cpu")
    optimizer.state[param] = dict(
        step=torch.tensor(3.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq
    )
    assert torch.set_flush_denormal(flush)
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    torch.set_flush_denormal(False)
    return bits(norm, param, exp_avg, exp_avg_sq)

alone = {{flush: step(1, flush) for flush in (False, True)}}
assert all(kept != flushed for kept, flushed in zip(*alone.values()))
print(all(step(2, flush) == alone[flush] for _ in range(5) for flush in alone))
"""


@pytest.mark.parametrize("torch_abi", ["0", "1"])
def test_all_threads_flush_subnormal_numbers_if_the_calling_one_does(torch_abi):
    done = programs.run(FLUSH.format(count=COUNT), WARPSTEP_TORCH_ABI=torch_abi)
    assert done.stdout == "True\n", done.stderr


@pytest.fixture(scope="module")
def sharing_program(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("sharing") / "sharing"
    sources = [ROOT / "tests" / "sharing.cpp", ROOT / "kernels" / "cpu" / "threads.cpp"]
    options = ["-std=c++17", "-O1", "-pthread", "-I", ROOT / "kernels"]
    subprocess.run([compiler, *options, *sources, "-o", program], check=True)
    return program


@pytest.mark.parametrize(
    "case", ["rare_waits", "every_wait", "large_work", "sizes", "late_helper", "held_up_caller"]
)
def test_sharing_never_costs_more_than_it_saves(sharing_program, case):
    done = subprocess.run([sharing_program, case], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
