"""How tensors are read: through torch's own functions (csrc/torch_handles.h), or through DLPack.

test_elsewhere.py runs the tests of odd and of changing tensors again through DLPack.
"""

import pytest
import torch

import warpstep
from support import programs


def run(program, **environment):
    """What a program prints in a process of its own."""
    done = programs.run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


STEP = """
torch.set_default_device(None)
p = torch.nn.Parameter(torch.ones(5))
optimizer = warpstep.AdamW([p], backend="cpu")
for _ in range(2):
    p.grad = torch.ones(5)
    version = p._version
    optimizer.step()
    assert p._version == version + 1
assert (p < 1).all()
native = warpstep.backends.native()[0]
print(native.uses_handles(), native.uses_torchs_threads())
"""


def test_torchs_functions_are_used():
    """All torches so far have them; a new one without would be slower, and this should tell."""
    assert run("import torch, warpstep" + STEP, WARPSTEP_TORCH_ABI="1") == "True True\n"


def test_a_variable_turns_them_off():
    assert run("import torch, warpstep" + STEP, WARPSTEP_TORCH_ABI="0") == "False False\n"


BREAKS = {
    "no handles to compare with": "del torch._C._aoti.unsafe_alloc_void_ptr_from_tensor",
    "another tensor's handle": """
make, other = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor, torch.ones(1)
torch._C._aoti.unsafe_alloc_void_ptr_from_tensor = lambda tensor: make(other)
""",
    "another module": "torch._C.__file__ = '/nowhere/_C.so'",
    "no file of its module": "del torch._C.__file__",
    "another answer": """
class Version:
    def __get__(self, tensor, owner=None):
        return 1000
torch.nn.Parameter._version = Version()
""",
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_torch_that_differs_is_read_through_dlpack(broken):
    restore = "\nif '_version' in vars(torch.nn.Parameter): del torch.nn.Parameter._version\n"
    program = f"import torch\n{BREAKS[broken]}\nimport warpstep{restore}{STEP}"
    threads = "False" if "module" in broken else "True"
    assert run(program, WARPSTEP_TORCH_ABI="1") == f"False {threads}\n"


MODES = {
    "default device": "torch.set_default_device('meta')\nimport warpstep",
    "inference": "with torch.inference_mode(): import warpstep",
    "fake tensors": """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode(): import warpstep""",
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_not_in_the_way(mode):
    """torch is tried out when warpstep is imported, whatever is switched on then."""
    program = f"import torch\n{MODES[mode]}\n{STEP}"
    assert run(program, WARPSTEP_TORCH_ABI="1") == "True True\n"


ODD = {
    "meta": lambda: torch.empty(4, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "integers": lambda: torch.ones(4, dtype=torch.int32),
    "freed": lambda: freed(torch.ones(4)),
    "zeros without memory": lambda: torch._efficientzerotensor(4),
    "no tensor": lambda: 4.0,
}


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("odd", ODD)
def test_what_has_no_plain_memory_is_not_read(odd):
    """Nor written to: touch_streams reads its arguments as every step does."""
    touch_streams = warpstep.backends.native()[0].touch_streams
    plain = [torch.ones(4) for _ in range(3)]
    for place in range(4):
        with pytest.raises(TypeError, match="four float32 CPU tensors"):
            touch_streams([(*plain[:place], ODD[odd](), *plain[place:])], 1)
    assert all((t == 1).all() for t in plain)


def test_subclasses_are_read_too():
    class Weight(torch.nn.Parameter):
        pass

    ours, torchs = (Weight(torch.ones(4)) for _ in range(2))
    optimizer = warpstep.AdamW([ours], backend="cpu")
    reference = torch.optim.AdamW([torchs], fused=True)
    for _ in range(3):
        ours.grad, torchs.grad = torch.arange(4.0), torch.arange(4.0)
        version = ours._version
        optimizer.step()
        reference.step()
        assert ours._version == version + 1
    torch.testing.assert_close(ours.data, torchs.data, rtol=1e-6, atol=0)


def test_a_gradient_that_is_a_property():
    """Asked for in Python, and held: each time it is a new tensor."""

    class Weight(torch.nn.Parameter):
        @property
        def grad(self):
            return getattr(self, "main", torch.zeros(4)) * 1.0

        @grad.setter
        def grad(self, value):
            self.main = value

    ours, torchs = Weight(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = warpstep.AdamW([ours], backend="cpu")
    reference = torch.optim.AdamW([torchs], fused=True)
    for _ in range(3):
        ours.grad = torchs.grad = torch.tensor([1.0, -2.0, 3.0, 1e-3])
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.data, torchs.data, rtol=1e-6, atol=0)


def test_a_freed_gradient_at_an_offset():
    """As flat buffers have them: its address is not null, but its offset."""
    param = torch.nn.Parameter(torch.ones(6))
    optimizer = warpstep.AdamW([param], backend="cpu")
    param.grad = torch.ones(12)[6:]
    optimizer.step()
    before = param.detach().clone()
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage was freed"):
        optimizer.step()
    assert torch.equal(param, before)


def test_inference_tensors_have_no_version_to_count():
    """torch's fused step takes them as they are."""
    with torch.inference_mode():
        ours, torchs = torch.ones(3), torch.ones(3)
    for param, kind in ((ours, warpstep.AdamW), (torchs, torch.optim.AdamW)):
        optimizer = kind([param], fused=True)
        for _ in range(2):
            param.grad = torch.ones(3)
            optimizer.step()
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)
