"""Which backend steps a parameter, and why: ``cuda``, ``triton``, ``cpu`` or ``reference``."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from warpstep.recipes import FORMATS, Recipe
from warpstep.version import __version__

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "WARPSTEP_BACKEND"
# "0": no function of torch's C ABI is used (csrc/torch_handles.h). Slower, with the same results.
TORCH_ABI_VARIABLE = "WARPSTEP_TORCH_ABI"

_BUILD_HINT = "install a C++ compiler and reinstall warpstep (pip install --force-reinstall)"


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
    try:
        from warpstep import _native
    except ImportError as error:
        return None, f"the native module is missing ({error}): {_BUILD_HINT}"
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None, f"torch {torch.__version__} has no DLPack C exchange API: 2.10 is the first"
    try:
        with _no_modes():
            wanted = os.environ.get(TORCH_ABI_VARIABLE) != "0"
            _native.set_exchange_api(capsule, torch_abi=wanted)
    except RuntimeError as error:
        return None, str(error)
    return _native, ""


@functools.cache
def triton_kernel() -> tuple[ModuleType | None, str]:
    """The module of the Triton kernel, or None and the reason why there is none."""
    try:
        from warpstep.kernels import launch_triton
    except ImportError as error:
        return None, f"triton cannot be imported ({error}): pip install triton"
    return launch_triton, ""


def _triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _cuda_reason(index: int) -> str:
    """Why the ``cuda`` backend cannot run on GPU ``index``; empty if it can."""
    module, reason = native()
    if module is None:
        return reason
    if module.cuda_architectures is None:
        return "the native module was built without nvcc: have nvcc on PATH and reinstall"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    if module.cuda_device_count() == 0:
        return "no NVIDIA GPU, or its driver is older than the CUDA runtime"
    built = [int(a.split("-")[0]) for a in module.cuda_architectures.split() if a[0].isdigit()]
    major, minor = torch.cuda.get_device_capability(index)
    if built and major * 10 + minor < min(built):
        return (
            f"GPU {index} has compute capability {major}.{minor}, built for "
            f"{module.cuda_architectures}: set WARPSTEP_CUDA_ARCHS and reinstall"
        )
    return ""


def unavailable_reason(backend: str, device: torch.device) -> str:
    """Why ``backend`` cannot step parameters on ``device``; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return native()[1] if device.type == "cpu" else f"it does not run on {device.type} devices"
    if backend == "cuda":
        if device.type == "cpu" and _emulates_cuda():
            return ""
        if device.type != "cuda":
            return f"it does not run on {device.type} devices"
        return _cuda_reason(device.index or 0)
    if device.type == "cpu" and not _triton_interprets():
        return "Triton has no CPU code (TRITON_INTERPRET=1 runs its interpreter, for tests)"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"it does not run on {device.type} devices"
    return triton_kernel()[1]


def _emulates_cuda() -> bool:
    """Whether the native module is the tests' build that runs the CUDA source on the CPU."""
    module, _ = native()
    return module is not None and module.cuda_architectures == "host emulation"


def has_kernel(backend: str, recipe: Recipe) -> bool:
    """Whether ``backend`` has a kernel for ``recipe`` (the reference takes anything)."""
    if backend == "reference":
        return True
    if any(dtype not in FORMATS for dtype in recipe[:3]):
        return False
    if backend == "triton":
        return True
    module, _ = native()
    return module is not None and module.has_recipe(*recipe.names(), recipe.amsgrad)


def requested_backend(argument: str) -> str:
    """The backend asked for: the argument, else the environment variable, else ``auto``.

    Raises ValueError for a name that is none.
    """
    name = argument
    source = "backend"
    if name == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        name, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Invalid {source}: {name!r} is none of {('auto', *BACKENDS)}")
    return name


def choose(requested: str, device: torch.device) -> str:
    """The backend for parameters on ``device``.

    ``auto`` takes the first of ``cuda`` (NVIDIA GPUs), ``triton`` (other GPUs), ``cpu`` that can
    run there, else ``reference``. Raises BackendUnavailableError for a named one that cannot.
    """
    if requested == "auto":
        candidates = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        return next((b for b in candidates if not unavailable_reason(b, device)), "reference")
    reason = unavailable_reason(requested, device)
    if reason:
        raise BackendUnavailableError(
            f"backend {requested!r} cannot step parameters on {device}: {reason}. "
            f"Use backend='auto', which would choose {choose('auto', device)!r}."
        )
    return requested


@dataclass(frozen=True)
class Status:
    """What ``warpstep.status()`` found. Printing it gives a report.

    ``chosen`` maps each device of this machine to the backend that ``auto`` (or the environment
    variable) takes there; ``unavailable`` maps (device, backend) to the reason. ``enabled`` tells
    whether torch's fused optimizers run on warpstep's kernels (``warpstep.enable()``), ``taken``
    how many calls they have taken, ``passed_on`` how many went to torch's kernel, by reason.
    """

    versions: dict[str, str]
    chosen: dict[str, str]
    unavailable: dict[tuple[str, str], str]
    launches: dict[str, int]
    native: dict[str, Any] = field(default_factory=dict)
    enabled: bool = False
    taken: int = 0
    passed_on: dict[str, int] = field(default_factory=dict)
    override: str = ""  # the report's line about them

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"native module: {', '.join(f'{k} {v}' for k, v in self.native.items())}"]
        for device, backend in self.chosen.items():
            lines.append(f"{device}: steps run on the {backend!r} backend")
            lines += [
                f"  not {other}: {reason}"
                for (where, other), reason in self.unavailable.items()
                if where == device
            ]
        lines.append("launches so far: " + ", ".join(f"{n} {c}" for n, c in self.launches.items()))
        lines.append(self.override)
        return "\n".join(lines)


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            devices += [torch.device(kind, i) for i in range(module.device_count())]
    return devices


def status() -> Status:
    """What is available on this machine, what would be chosen, and why not the others."""
    versions = {"warpstep": __version__, "torch": torch.__version__}
    versions["Python"] = platform.python_version()
    requested = requested_backend("auto")
    chosen, unavailable = {}, {}
    for device in _devices():
        reasons = {b: unavailable_reason(b, device) for b in BACKENDS}
        unavailable.update({(str(device), b): r for b, r in reasons.items() if r})
        usable = requested == "auto" or not reasons[requested]
        chosen[str(device)] = choose(requested, device) if usable else "none (see below)"

    module, reason = native()
    about: dict[str, Any] = {"missing": reason}
    launches = {"cpu": 0, "cuda": 0}
    if module is not None:
        about = {"CPU code": module.cpu_instruction_set()}
        about["CUDA code"] = module.cuda_architectures or "none"
        about["tensors read through"] = "torch" if module.uses_handles() else "DLPack"
        about["threads"] = "torch's" if module.uses_torchs_threads() else "its own"
        launches = module.launch_counts()
    kernel, _ = triton_kernel()
    launches["triton"] = 0 if kernel is None else kernel.launches
    from warpstep import override  # which imports this module

    return Status(
        versions,
        chosen,
        unavailable,
        launches,
        about,
        override.is_enabled(),
        override.taken,
        dict(override.passed_on),
        override.report(),
    )


__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "Status",
    "choose",
    "has_kernel",
    "native",
    "requested_backend",
    "status",
    "triton_kernel",
    "unavailable_reason",
]
