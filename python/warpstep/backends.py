"""Which backend steps a parameter, and why: ``cuda``, ``triton``, ``cpu`` or ``reference``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from warpstep.recipes import FORMATS, Format, Recipe, one_of

BACKENDS = ("cuda", "triton", "cpu", "reference")
OLDEST_TRITON = (3, 6)  # which torch 2.10 brings; 3.5 does not compile the kernels
BackendName = Literal["auto", "cuda", "triton", "cpu", "reference"]
ENVIRONMENT_VARIABLE = "WARPSTEP_BACKEND"
# "0": no function of torch's C ABI is used (csrc/torch_handles.h). Slower, with the same results.
TORCH_ABI_VARIABLE = "WARPSTEP_TORCH_ABI"

# REQUIRED: what prevents the build is then an error of pip's. --no-deps: torch stays as it is.
REINSTALL = "WARPSTEP_NATIVE=REQUIRED pip install --force-reinstall --no-deps ."
_BUILD_HINT = (
    f"To build it, install a C++ compiler and run `{REINSTALL}` in warpstep's source folder"
)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


@contextmanager
def _no_modes() -> Iterator[None]:
    """Tensors made inside are plain ones on the CPU, whatever the caller has switched on."""
    disabled = getattr(torch.utils._python_dispatch, "_disable_current_modes", nullcontext)
    with torch.inference_mode(False), disabled(), torch.device("cpu"):
        yield


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The native module, or None and the reason why there is none."""
    try:  # not `from warpstep import`, whose error in a package half imported tells of a circle
        _native = importlib.import_module("warpstep._native")
    except ImportError as error:
        why, others = str(error), sorted(Path(__file__).parent.glob("_native.*.so"))
        if others and isinstance(error, ModuleNotFoundError):
            why += f"; {others[0].name} was built for another Python"
        return None, f"the native module is missing ({why}). {_BUILD_HINT}"
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None, (
            f"torch {torch.__version__} has no DLPack C exchange API, by which the native module "
            "reads tensors. Install torch 2.10 or later"
        )
    try:
        with _no_modes():
            wanted = os.environ.get(TORCH_ABI_VARIABLE) != "0"
            _native.connect_to_torch(capsule, torch_abi=wanted)
    except RuntimeError as error:
        return None, str(error)
    return _native, ""


@functools.cache
def triton_kernel() -> tuple[ModuleType | None, str]:
    """The module of the Triton kernel, or None and the reason why there is none."""
    install = f"Install one with `pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'`"
    try:
        import triton

        found: str = triton.__version__
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
            return None, f"triton {found} is too old. {install}"
        from warpstep.kernels.triton import launch
    except ImportError as error:
        return None, f"triton cannot be imported ({error}). {install}"
    return launch, ""


def _triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _asked_device(index: int) -> str:
    """Why GPU ``index`` itself cannot run the kernels, asked once; empty if it can."""
    module, _ = native()
    assert module is not None
    reason: str = module.cuda_device_reason(index)
    return reason


@functools.cache
def _cuda_reason(index: int) -> str:
    """Why the ``cuda`` backend cannot run on GPU ``index``, so far as is known without using it."""
    module, reason = native()
    if module is None:
        return reason
    if module.cuda_architectures is None:
        return (
            f"the native module was built without CUDA kernels: {module.why_no_cuda}. To build "
            f"them, run `WARPSTEP_CUDA=ON {REINSTALL}` in warpstep's source folder with an nvcc"
        )
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, and the CUDA kernels for NVIDIA's"
    if module.cuda_device_count() == 0:
        return (
            "there is no NVIDIA GPU, or its driver is older than the CUDA runtime that warpstep "
            "was built with"
        )
    built = [int(a.split("-")[0]) for a in module.cuda_architectures.split() if a[0].isdigit()]
    major, minor = torch.cuda.get_device_capability(index)
    if built and major * 10 + minor < min(built):
        return (
            f"GPU {index} has compute capability {major}.{minor}, and the CUDA kernels were built "
            f"for {module.cuda_architectures}. Run `WARPSTEP_CUDA_ARCHS={major * 10 + minor} "
            f"{REINSTALL}` in warpstep's source folder"
        )
    return ""


def unavailable_reason(backend: str, device: torch.device, *, in_use: bool = True) -> str:
    """Why ``backend`` cannot step parameters on ``device``; empty if it can.

    A GPU that is not ``in_use`` is not asked itself: that would make a context there.
    """
    if backend == "reference":
        return ""
    if backend == "cpu":
        return native()[1] if device.type == "cpu" else f"it cannot run on {device.type} devices"
    if backend == "cuda":
        if device.type == "cpu" == cuda_device_type():
            return _asked_device(0)
        if device.type != "cuda":
            return f"it cannot run on {device.type} devices"
        index = device.index or 0
        return _cuda_reason(index) or (_asked_device(index) if in_use else "")
    if device.type == "cpu" and not _triton_interprets():
        return "Triton has no CPU code (TRITON_INTERPRET=1 runs its interpreter, for tests)"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"it cannot run on {device.type} devices"
    return triton_kernel()[1]


def cuda_device_type() -> str | None:
    """The type of the devices that the CUDA kernels run on: ``cuda``; the tests have a build for
    the ``cpu``. None where there are no CUDA kernels.
    """
    module, _ = native()
    return None if module is None else module.cuda_device_type


def has_kernel(backend: str, recipe: Recipe) -> bool:
    """Whether ``backend`` has a kernel for ``recipe`` (the reference takes anything)."""
    if backend == "reference":
        return True
    dtypes = (recipe.param, recipe.grad, *recipe.moments)
    if any(dtype not in FORMATS for dtype in dtypes if not isinstance(dtype, Format)):
        return False
    if backend == "triton":
        return True
    module, _ = native()
    return module is not None and module.has_recipe(recipe.rule, recipe.formats())


def requested_backend(argument: str) -> BackendName:
    """The backend asked for: the argument, else the environment variable, else ``auto``.

    Raises ValueError for a name that is none.
    """
    name = argument
    source = "backend"
    if name == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        name, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Invalid {source}: {name!r}. Choose {one_of(('auto', *BACKENDS))}.")
    return cast(BackendName, name)


_told_of_slow_steps = False


def _tell_of_slow_steps() -> None:
    """Says, once a process, why steps are slow, to who has not chosen that by name."""
    global _told_of_slow_steps
    _, reason = native()
    if reason and not _told_of_slow_steps:
        _told_of_slow_steps = True  # also if warnings are errors: the next step is taken
        message = f"warpstep's steps are slow here: {reason}."
        warnings.warn(message, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How many frames a warning is above whoever warns: in code that is not ours, nor torch's, nor
    of the decorators of either.
    """
    ours = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
    ours += (contextlib.__file__,)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


def choose(requested: str, device: torch.device) -> str:
    """The backend for parameters on ``device``.

    ``auto`` takes the first of ``cuda`` (NVIDIA GPUs), ``triton`` (other GPUs), ``cpu`` that can
    run there, else ``reference``; the first time that it lacks the native module, it warns.
    Raises BackendUnavailableError for a named one that cannot.
    """
    if requested == "auto":
        _tell_of_slow_steps()
        return first_available(device)
    reason = unavailable_reason(requested, device)
    if reason:
        raise BackendUnavailableError(
            f"backend {requested!r} cannot step parameters on {device}: {reason}. "
            f"Or use backend='auto', which would choose {first_available(device)!r}."
        )
    return requested


def first_available(device: torch.device, *, in_use: bool = True) -> str:
    """The backend that ``auto`` takes on ``device``."""
    candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    able = (b for b in candidates if not unavailable_reason(b, device, in_use=in_use))
    return next(able, "reference")


def check_device_for_fused(name: str, param: Tensor) -> None:
    """Raises, as torch does, where ``fused=True`` is asked for on a device that has no kernels."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    if param.device.type not in supported:
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported "
            f"devices: {supported} but {param.dtype} and {param.device.type}: {name}. Leave out "
            "`fused`, or move the parameters first."
        )
