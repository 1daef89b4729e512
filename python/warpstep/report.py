"""``warpstep.status()``: what is available here, what is chosen, what has run, and why not more."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from warpstep import backends
from warpstep.enabling import override
from warpstep.version import __version__

_NONE = "none"


@dataclass(frozen=True)
class Status:
    """What ``warpstep.status()`` found. Printing it gives a report.

    Attributes:
        versions: of ``warpstep``, ``torch`` and ``Python``.
        chosen: for each device of this machine, the backend that ``backend="auto"`` (or the
            environment variable ``WARPSTEP_BACKEND``) takes there; ``"none"`` where the variable
            asks for what cannot run, and a step raises.
        unavailable: for each (device, backend) that cannot run, the reason.
        launches: how many kernels each of ``cpu``, ``cuda`` and ``triton`` has launched in this
            process.
        native: what the native module has: its ``CPU code`` (instruction set), its ``CUDA code``
            (compute capabilities), how tensors are read, whose threads it uses; or ``missing``, and
            why.
        enabled: whether torch's fused optimizers run on warpstep's kernels (``warpstep.enable()``).
        taken: how many of their calls warpstep's kernels have taken in this process: whole steps,
            and calls of torch's operators.
        by_plans: how many of those were whole steps.
        passed_on: how many calls went to torch's kernels all the same, by reason.
        unplanned: how many steps of theirs no plan took, by reason; their calls of torch's fused
            operators, if they make any, are among those of ``taken`` and ``passed_on``.
        override: the report's line about these.
        problem: what is wrong with ``WARPSTEP_BACKEND``, if it names no backend.
    """

    versions: dict[str, str]
    chosen: dict[str, str]
    unavailable: dict[tuple[str, str], str]
    launches: dict[str, int]
    native: dict[str, Any] = field(default_factory=dict)
    enabled: bool = False
    taken: int = 0
    by_plans: int = 0
    passed_on: dict[str, int] = field(default_factory=dict)
    unplanned: dict[str, int] = field(default_factory=dict)
    override: str = ""
    problem: str = ""

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        missing = self.native.get("missing")
        if missing:
            lines.append(f"{missing[0].upper()}{missing[1:]}.")
        else:
            lines.append("native module: " + ", ".join(f"{k} {v}" for k, v in self.native.items()))
        for device, backend in self.chosen.items():
            if backend == _NONE:
                variable = backends.ENVIRONMENT_VARIABLE
                why = self.problem or f"{variable}={os.environ.get(variable)} cannot run here"
                lines.append(f"{device}: steps raise an error: {why}")
            else:
                lines.append(f"{device}: steps run on the {backend!r} backend")
            lines += [
                f"  not {other}: {'there is no native module' if reason == missing else reason}"
                for (where, other), reason in self.unavailable.items()
                if where == device
            ]
        lines.append("launches so far: " + ", ".join(f"{n} {c}" for n, c in self.launches.items()))
        lines.append(self.override)
        return "\n".join(lines)


def _about(module: Any) -> dict[str, Any]:
    """What the native module has."""
    code, asked = module.cpu_instruction_set(), os.environ.get("WARPSTEP_ISA", "")
    return {
        "CPU code": code if asked in ("", code) else f"{code} (not {asked}, as WARPSTEP_ISA asks)",
        "CUDA code": module.cuda_architectures or f"none: {module.why_no_cuda}",
        "tensors read through": "torch" if module.uses_handles() else "DLPack",
        "threads": "torch's" if module.uses_torchs_threads() else "its own",
    }


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            devices += [torch.device(kind, i) for i in range(module.device_count())]
    return devices


def status() -> Status:
    """What is available on this machine, what would be chosen, and why not the others.

    Nothing is launched, and no GPU is touched that the process has not used. Raises nothing: what
    is wrong with the environment is part of the report.

    Returns:
        A `Status`; printed, it is the report of ``python -m warpstep``.
    """
    versions = {"warpstep": __version__, "torch": str(torch.__version__)}
    versions["Python"] = platform.python_version()
    problem = ""
    try:
        requested = backends.requested_backend("auto")
    except ValueError as error:
        requested, problem = "auto", str(error)
    chosen, unavailable = {}, {}
    for device in _devices():
        in_use = device.type != "cuda" or torch.cuda.memory_reserved(device) > 0
        reasons = {
            b: backends.unavailable_reason(b, device, in_use=in_use) for b in backends.BACKENDS
        }
        unavailable.update({(str(device), b): r for b, r in reasons.items() if r})
        usable = not problem and (requested == "auto" or not reasons[requested])
        by_itself = backends.first_available(device, in_use=in_use)
        available = by_itself if requested == "auto" else requested
        chosen[str(device)] = available if usable else _NONE

    module, reason = backends.native()
    about: dict[str, Any] = {"missing": reason}
    launches = {"cpu": 0, "cuda": 0}
    if module is not None:
        about = _about(module)
        launches = module.launch_counts()
    kernel, _ = backends.triton_kernel()
    launches["triton"] = 0 if kernel is None else kernel.launches
    return Status(
        versions,
        chosen,
        unavailable,
        launches,
        about,
        override.is_enabled(),
        override.counts.taken,
        override.counts.by_plans,
        dict(override.counts.passed_on),
        dict(override.counts.unplanned),
        override.report(),
        problem,
    )
