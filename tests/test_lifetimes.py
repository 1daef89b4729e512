"""Who keeps what alive: launches own what they read, plans own neither parameters nor state."""

import gc
import weakref

import pytest
import torch

import warpstep
from support import programs
from warpstep.buckets import CudaBucket
from warpstep.recipes import Recipe
from warpstep.tail import Tail


def stepped(**options):
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(4)
    optimizer = warpstep.AdamW(params, **options)
    optimizer.step()
    return optimizer, params


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tie_to_parameter(optimizer, params):
    params[0].optimizer = optimizer


def tie_to_group(optimizer, _params):
    optimizer.param_groups[0]["owner"] = optimizer


@pytest.mark.parametrize("tie", [tie_to_parameter, tie_to_group])
@pytest.mark.parametrize("options", [{}, {"stats": True, "ema_decay": 0.9}], ids=["plain", "tail"])
def test_the_collector_frees_a_cycle_through_a_plan(tie, options, no_collector):
    optimizer, params = stepped(**options)
    tie(optimizer, params)
    optimizer.step()  # a plan of what there is now
    gone = weakref.ref(optimizer)
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    del optimizer, params
    gc.collect()
    assert gone() is None
    assert moment() is None


@pytest.mark.parametrize("options", [{}, {"stats": True}, {"backend": "reference"}])
def test_cleared_groups_and_state_free_the_parameters_at_once(options, no_collector):
    optimizer, params = stepped(**options)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    kept = [weakref.ref(p) for p in params]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    del params
    assert [ref() for ref in kept] == [None] * 3
    if options.get("stats"):
        assert optimizer.statistics().params == []


def test_cleared_groups_between_clipping_and_step(no_collector):
    optimizer, _ = stepped()
    optimizer.clip_grad_norm_(1.0)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.zero_grad()
    optimizer.step()  # of nothing


def test_swapped_tensors_are_still_possible():
    """torch.utils.swap_tensors refuses tensors that have weak references."""
    optimizer, params = stepped(stats=True)
    assert not any(weakref.getweakrefs(p) for p in params)
    assert not any(weakref.getweakrefs(t) for p in params for t in optimizer.state[p].values())


# While one thread steps, another replaces what is stepped. Memory of this size goes back to the
# system when it is freed, so that whoever reads it then dies. (No `p.grad = None` here: in a thread
# beside one that reads `p.grad`, it crashes torch 2.13 itself, which then frees without the GIL.)
RACE = """
import ctypes, sys, threading, time, torch, warpstep
assert ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed memory is given back at once
torch.manual_seed(0)
what = sys.argv[1]
size = 1 << 21
strided = [torch.nn.Parameter(torch.randn(2 * 64)[::2])] if what.endswith("-in-parts") else []
params = [torch.nn.Parameter(torch.randn(size)) for _ in range(6)] + strided
optimizer = warpstep.AdamW(params, lr=1e-3)
lists = [[torch.randn(size) for _ in range(6)] for _ in range(4)]
steps = [torch.zeros(()) for _ in range(6)]
for p in params:
    p.grad = torch.randn(p.shape)
optimizer.step()
done, deadline = False, time.monotonic() + float(sys.argv[2])

def disturb():
    while not done:
        for i, p in enumerate(params):
            if what.startswith("grads"):
                p.grad = torch.randn(p.shape)
            elif what.startswith("state"):
                optimizer.state[p]["exp_avg"] = torch.zeros(p.shape)
            elif what.startswith("load"):
                optimizer.load_state_dict(optimizer.state_dict())
                break
            elif what == "lists" and i < 6:
                for some in lists[1:]:
                    some[i] = torch.randn(size)
            time.sleep(0)

thread = threading.Thread(target=disturb)
thread.start()
count = 0
try:
    while time.monotonic() < deadline:
        if what == "lists":
            warpstep.functional.adamw_(*lists, [], steps, lr=1e-3, beta1=0.9, beta2=0.99,
                                       weight_decay=0.0, eps=1e-8)
        else:
            try:
                optimizer.step()
                if what.startswith("grads") and count % 4 == 0:
                    optimizer.clip_grad_norm_(1.0)
            except RuntimeError as error:
                assert "gradients changed" in str(error) or "while it looked" in str(error), error
                optimizer._forget_clipping()  # as zero_grad(), which would drop what another reads
        count += 1
finally:
    done = True
    thread.join()
print("steps", count)
"""


RACES = ["grads", "state", "load", "lists", "grads-in-parts", "state-in-parts"]


@pytest.mark.parametrize(
    ("what", "torch_abi"),
    [*((what, "1") for what in RACES), ("grads", "0"), ("state", "0"), ("lists", "0")],
)
def test_another_thread_replaces_what_is_being_stepped(what, torch_abi):
    run = programs.run(RACE, what, "0.7", WARPSTEP_TORCH_ABI=torch_abi)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-2000:]}"
    assert int(run.stdout.split()[1]) > 0


DROPPED = """
import ctypes, threading, torch, warpstep
assert ctypes.CDLL(None).mallopt(-3, 65536)  # as above

class Copy(torch.nn.Parameter):  # which the plan reads through Python
    pass

size = 2**23
param = torch.nn.Parameter(torch.zeros(size))
optimizer = warpstep.AdamW([param], copies=[Copy(torch.zeros(size, dtype=torch.bfloat16))])
torch.set_num_threads(1)
for _ in range(3):
    param.grad, other = torch.ones(size), torch.ones(size)
    stepping = threading.Event()

    def replace():
        stepping.wait()
        param.grad = other

    thread = threading.Thread(target=replace)
    thread.start()
    stepping.set()  # the thread goes on once the launch has let go of the GIL
    optimizer.step()
    thread.join()
    assert param.eq(param[0]).all()
"""


def test_a_gradient_beside_a_copy_of_a_subclass_lives_until_the_launch_has_ended():
    run = programs.run(DROPPED)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-2000:]}"


def test_a_gradient_with_strides_of_its_own_is_free_after_the_step(no_collector):
    param = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = warpstep.AdamW([param])
    for _ in range(2):
        param.grad = torch.ones(4, 8).t()
        optimizer.step()
    grad = weakref.ref(param.grad)
    param.grad = None
    assert grad() is None


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True
    stream = None

    def record_stream(self, stream):
        self.stream = stream


def test_what_a_clipping_made_is_recorded_for_the_stream_of_the_step(monkeypatch):
    """It is let go of after the launch, and may have been made on another stream."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "side stream")
    scale, found_inf, coef = (torch.ones(1).as_subclass(OnGpu) for _ in range(3))
    recipe = Recipe("adamw", torch.float32, torch.float32, (torch.float32, torch.float32))
    bucket = CudaBucket("cuda", recipe, torch.device("cuda"), shards=None)
    bucket.use_on_current_stream(Tail(scale, found_inf, coef))
    assert scale.stream == found_inf.stream == coef.stream == "side stream"
