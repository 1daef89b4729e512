"""What fails around a step: allocation, backends that are missing, imports, the report."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import warpstep
from support import programs
from support.bits import assert_same
from support.parameters import new_params, random, set_grads
from warpstep import backends, reference

LR = 0.01
SHAPES = [(5, 3), (17,), ()]


# No process has a variable of ours but those given.
WITHOUT = {"WARPSTEP_BACKEND": None, "TRITON_INTERPRET": None}


def python(code, **environment):
    """Runs a program in a process of its own, which begins with torch imported."""
    return programs.run(textwrap.dedent(code), **{**WITHOUT, **environment})


def anew(*arguments):
    """Runs Python itself, which imports torch as well."""
    env = {name: value for name, value in os.environ.items() if name not in WITHOUT}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


# ---- allocation

ALLOCATORS = ("zeros_like", "zeros", "empty_like", "empty", "tensor", "full", "full_like")


class FailingAllocator:
    """Counts what torch's factory functions are asked for, and raises at the n-th request."""

    def __init__(self, monkeypatch, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at
        for name in ALLOCATORS:
            monkeypatch.setattr(torch, name, self.counting(getattr(torch, name)))

    def counting(self, make):
        def allocate(*args, **kwargs):
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise torch.OutOfMemoryError("out of memory (a test's)")
            return make(*args, **kwargs)

        return allocate


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("how", ["auto", "reference"])
def test_allocation_that_fails_during_the_first_step(how, amsgrad):
    options = {"lr": LR, "backend": how, "amsgrad": amsgrad}
    expected = new_params(SHAPES)
    set_grads(expected)
    with pytest.MonkeyPatch.context() as patch:
        optimizer = warpstep.AdamW(expected, **options)
        counter = FailingAllocator(patch)
        optimizer.step()
    # The state of three parameters, at least.
    assert counter.calls >= 3 * (4 if amsgrad else 3)

    for fail_at in range(counter.calls):
        params = new_params(SHAPES)
        start = [p.detach().clone() for p in params]
        set_grads(params)
        optimizer = warpstep.AdamW(params, **options)
        with pytest.MonkeyPatch.context() as patch:
            FailingAllocator(patch, fail_at)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        assert len(optimizer.state) == 0, fail_at
        assert optimizer.plan is None
        assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
        assert [optimizer.state[p]["step"].item() for p in params] == [1, 1, 1]


def test_allocation_that_fails_when_a_parameter_joins():
    params = new_params(SHAPES)
    optimizer = warpstep.AdamW(params[:2], lr=LR)
    set_grads(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    before = [p.detach().clone() for p in params]
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params[:2]}
    for fail_at in range(2):
        with pytest.MonkeyPatch.context() as patch:
            FailingAllocator(patch, fail_at)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        assert set(optimizer.state) == set(params[:2])
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p, q)
        torch.testing.assert_close(dict(optimizer.state), state, rtol=0, atol=0)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2, 1]


def test_interrupted_gradient_layout_change():
    # A gradient of another layout is copied in each step: memory may run out in steady state too.
    params = [random((6, 7), 0).requires_grad_(), random((5,), 1).requires_grad_()]
    optimizer = warpstep.AdamW(params, lr=LR)
    set_grads(params)
    optimizer.step()
    set_grads(params, 1)
    params[0].grad = params[0].grad.t().contiguous().t()
    before = [p.detach().clone() for p in params]
    with pytest.MonkeyPatch.context() as patch:
        allocator = FailingAllocator(patch, 0)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert allocator.calls == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


class FailingOperations(TorchDispatchMode):
    """Raises at the n-th operation that makes a tensor, as one does that finds no memory."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.calls = 0
        self.fail_at = fail_at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        makes = not func._schema.is_mutable and not func.is_view
        if makes and func.namespace == "aten":  # the profiler's have a namespace of their own
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise torch.OutOfMemoryError("out of memory (a test's)")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_reference_step_that_runs_out_of_memory(amsgrad):
    # The reference makes temporary tensors. A parameter, its moments and its count stay together.
    def prepared():
        p = random((5, 3), 0).requires_grad_()
        optimizer = warpstep.AdamW([p], lr=LR, amsgrad=amsgrad, backend="reference")
        set_grads([p])
        optimizer.step()
        set_grads([p], 1)
        return optimizer, p

    optimizer, expected = prepared()
    with FailingOperations() as counter:
        optimizer.step()
    assert counter.calls > 5
    for fail_at in range(counter.calls):
        optimizer, p = prepared()
        before = [p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}]
        with pytest.raises(torch.OutOfMemoryError), FailingOperations(fail_at):
            optimizer.step()
        assert_same([p.detach(), dict(optimizer.state[p])], before)
        optimizer.step()
        assert torch.equal(p, expected)


class FailingTorch:
    """In place of ``torch`` in a module: raises at the n-th tensor that is made by a function."""

    MAKE = ("lerp", "maximum", "scalar_tensor", "stack", "where")

    def __init__(self, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at

    def __getattr__(self, name):
        function = getattr(torch, name)
        return functools.partial(self.make, function) if name in self.MAKE else function

    def make(self, function, *args, **kwargs):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise torch.OutOfMemoryError("out of memory (a test's)")
        return function(*args, **kwargs)


def test_reference_that_runs_out_of_memory_beside_a_kernel(monkeypatch):
    # One parameter is the kernel's, one (with gaps) the reference's: both are stepped, or none.
    def prepared():
        params = [random((7,), 0), random((6, 8), 1)[:, ::2]]
        optimizer = warpstep.AdamW([p.detach().requires_grad_() for p in params], lr=LR)
        params = optimizer.param_groups[0]["params"]
        set_grads(params)
        optimizer.step()
        set_grads(params, 1)
        return optimizer, params

    def step(optimizer, failing):
        # No mode: the step would not be the one that is taken without.
        with monkeypatch.context() as patch:
            patch.setattr(reference, "torch", failing)
            optimizer.step()

    optimizer, _ = prepared()
    counter = FailingTorch()
    step(optimizer, counter)
    assert counter.calls > 5
    for fail_at in range(counter.calls):
        optimizer, params = prepared()
        before = [p.detach().clone() for p in params]
        with pytest.raises(torch.OutOfMemoryError):
            step(optimizer, FailingTorch(fail_at))
        assert_same([p.detach() for p in params], before)
        assert [optimizer.state[p]["step"].item() for p in params] == [1, 1]


# ---- options of our own


@pytest.mark.parametrize("cls", [warpstep.AdamW, warpstep.Adam])
@pytest.mark.parametrize("name", ["gpu", "", "CPU", "torch"])
def test_unknown_backend(name, cls):
    with pytest.raises(ValueError, match=r"backend.*reference"):
        cls(new_params(SHAPES), backend=name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, "float32"], ids=str)
def test_invalid_state_dtype(dtype):
    with pytest.raises((ValueError, TypeError), match="state_dtype"):
        warpstep.AdamW(new_params(SHAPES), state_dtype=dtype)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_cannot_run_here(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    params = new_params(SHAPES)
    set_grads(params)
    start = [p.detach().clone() for p in params]
    optimizer = warpstep.AdamW(params, backend=name)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"'{name}'.*cpu.*'auto'"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))
        assert len(optimizer.state) == 0


def test_backend_from_the_environment(monkeypatch):
    params = new_params(SHAPES)
    set_grads(params)
    monkeypatch.setenv("WARPSTEP_BACKEND", "cudda")
    with pytest.raises(ValueError, match=r"WARPSTEP_BACKEND.*cudda"):
        warpstep.AdamW(params)
    monkeypatch.setenv("WARPSTEP_BACKEND", "reference")
    optimizer = warpstep.AdamW(params, lr=LR)
    optimizer.step()
    assert "reference" in str(optimizer.plan)
    assert warpstep.AdamW(params, backend="cpu").backend == "cpu"  # the argument wins


# ---- import, report, a missing native module


def test_import_is_silent():
    done = anew("-W", "error", "-c", "import warpstep")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_is_silent_with_a_bad_environment():
    done = python("import warpstep", WARPSTEP_BACKEND="nonsense", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_report_of_the_module():
    done = anew("-m", "warpstep")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("warpstep", warpstep.__version__, "torch", torch.__version__, "cpu:", "launches"):
        assert word in done.stdout
    assert "not triton" in done.stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WARPSTEP_BACKEND": "nonsense"}, "steps raise an error: Invalid WARPSTEP_BACKEND"),
        ({"WARPSTEP_BACKEND": "cuda"}, "steps raise an error: WARPSTEP_BACKEND=cuda cannot run"),
        ({"WARPSTEP_ISA": "nonsense"}, "(not nonsense, as WARPSTEP_ISA asks)"),
        ({"WARPSTEP_ISA": "baseline"}, "CPU code baseline,"),
    ],
    ids=str,
)
def test_the_report_says_what_is_wrong_with_the_environment(variables, expected):
    done = python("import warpstep; print(warpstep.status())", **variables)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_status():
    status = warpstep.status()
    assert status.versions["torch"] == torch.__version__
    assert status.versions["warpstep"] == warpstep.__version__
    assert status.chosen["cpu"] in ("cpu", "reference")
    for (device, backend), reason in status.unavailable.items():
        assert device in status.chosen
        assert status.chosen[device] != backend
        assert reason
    assert set(status.launches) == {"cpu", "cuda", "triton"}
    assert all(isinstance(count, int) and count >= 0 for count in status.launches.values())
    assert str(status).startswith("warpstep")


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "3.6.0+rocm7.0"])
def test_a_triton_that_is_too_old_is_named(version):
    pytest.importorskip("triton")
    done = python(f"""
        import triton
        triton.__version__ = {version!r}
        from warpstep import backends
        print(*backends.triton_kernel())
    """)
    assert done.returncode == 0, done.stderr
    said = "None triton 3.5.1 is too old. Install one with `pip install 'triton>=3.6'`"
    assert (done.stdout.strip() == said) == (version == "3.5.1"), done.stdout


def test_the_package_asks_for_the_oldest_triton_that_does():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'triton = ["triton>={".".join(map(str, backends.OLDEST_TRITON))}"]' in text


WITHOUT_NATIVE = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name == "warpstep._native":
                raise ImportError("hidden by a test")

    sys.meta_path.insert(0, Block())
    import copy, torch, warpstep
"""


def test_import_without_the_native_module_is_silent():
    done = python(WITHOUT_NATIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_status_without_the_native_module():
    code = """
    status = warpstep.status()
    assert status.chosen["cpu"] == "reference", status.chosen
    assert "native module" in status.unavailable["cpu", "cpu"]
    print(status)
    """
    done = python(textwrap.dedent(WITHOUT_NATIVE) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "native module is missing" in done.stdout
    assert "C++ compiler" in done.stdout


STRICT = """
    import warnings
    warnings.simplefilter("error")
"""


def without_native(*parts, **environment):
    return python("".join(map(textwrap.dedent, (WITHOUT_NATIVE, *parts))), **environment)


FIRST_STEPS = """
    p = torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        p.grad = torch.ones(3)
        {step}
    print("stepped")
"""
SLOW = {
    "AdamW": "warpstep.AdamW([p]).step()",
    "functional": "warpstep.functional.adamw_([p.detach()], [p.grad], [torch.zeros(3)], "
    "[torch.zeros(3)], [], [torch.zeros(())], lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.0, "
    "eps=1e-8)",
}


@pytest.mark.parametrize("case", SLOW)
def test_slow_steps_are_told_once_with_the_remedy(case):
    done = without_native(FIRST_STEPS.format(step=SLOW[case]))
    assert (done.returncode, done.stdout) == (0, "stepped\n"), done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert done.stderr.startswith("<string>:"), done.stderr  # the line that stepped
    assert "steps are slow here: the native module is missing (hidden by a test)." in done.stderr
    assert f"install a C++ compiler and run `{backends.REINSTALL}`" in done.stderr


def test_slow_steps_that_were_chosen_are_not_told():
    chosen = {"WARPSTEP_BACKEND": "reference"}
    for step, environment in (
        ('warpstep.AdamW([p], backend="reference").step()', {}),
        ("warpstep.status()", {}),
        ("warpstep.AdamW([p]).step()", chosen),
    ):
        done = without_native(STRICT, FIRST_STEPS.format(step=step), **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "stepped\n", "")


def test_a_warning_that_is_an_error_leaves_the_step_to_be_taken_again():
    code = """
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = warpstep.AdamW([p])
    try:
        optimizer.step()
    except UserWarning:
        assert not optimizer.state
        assert torch.equal(p, torch.ones(3))
        optimizer.step()
        print(optimizer.state[p]["step"])
    """
    done = without_native(STRICT, code)
    assert (done.returncode, done.stdout) == (0, "tensor(1.)\n"), done.stderr


def test_the_report_says_why_there_is_no_native_module():
    halted = """
    import sys
    sys.modules["warpstep._native"] = None
    import warpstep
    """
    for start, cause in ((WITHOUT_NATIVE, "hidden by a test"), (halted, "import of warpstep._nat")):
        done = python(textwrap.dedent(start) + "\nprint(warpstep.status())")
        second = done.stdout.splitlines()[1]
        assert second.startswith(f"The native module is missing ({cause}"), done.stdout
        assert second.endswith("in warpstep's source folder.")
        assert "circular" not in done.stdout
        assert "  not cpu: there is no native module" in done.stdout.splitlines()


def test_steps_without_the_native_module():
    code = """
    def run(cls, **options):
        g = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=g).requires_grad_() for s in [(5, 3), (), (0,), (17,)]]
        optimizer = cls(params, lr=0.01, **options)
        for step in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            if step == 1:
                params[3].grad = None
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return params, [optimizer.state[p]["step"].item() for p in params]

    (ours, counts), (theirs, expected) = run(warpstep.AdamW), run(torch.optim.AdamW)
    assert counts == expected == [5, 5, 5, 4], counts
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    try:
        run(warpstep.AdamW, backend="cpu")
    except RuntimeError as error:
        print(error)
    """
    done = python(textwrap.dedent(WITHOUT_NATIVE) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "'cpu'" in done.stdout
    assert "native module is missing" in done.stdout
