"""Which backends the suite runs on in this process.

The CPU and the reference run everywhere. The CUDA source runs on a GPU, or, with
WARPSTEP_TEST_NATIVE set to the emulated build of the native module, on the CPU. Triton runs on a
GPU, or, with TRITON_INTERPRET=1, in its interpreter. test_elsewhere.py starts these processes.
"""

import importlib.util
import os
import sys

import torch

if path := os.environ.get("WARPSTEP_TEST_NATIVE"):
    spec = importlib.util.spec_from_file_location("warpstep._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["warpstep._native"] = module

from support import interpreter
from warpstep import backends

EMULATED = bool(os.environ.get("WARPSTEP_TEST_NATIVE"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOW = EMULATED or INTERPRETED  # where a test takes fewer cases and steps
if INTERPRETED:
    interpreter.fuse_multiply_adds()
    interpreter.look_up_once()
HAS_GPU = torch.cuda.is_available()


def runnable_backends() -> dict[str, str]:
    """Backend -> the device whose parameters it steps in this process."""
    found = {"reference": "cpu", "cpu": "cpu"}
    if EMULATED:
        found["cuda"] = "cpu"
    elif HAS_GPU and not backends.unavailable_reason("cuda", torch.device("cuda", 0)):
        found["cuda"] = "cuda"
    if INTERPRETED:
        found["triton"] = "cpu"
    elif HAS_GPU and not backends.unavailable_reason("triton", torch.device("cuda", 0)):
        found["triton"] = "cuda"
    return found
