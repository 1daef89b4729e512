"""The compiled CUDA code, read: 16-byte accesses, no local memory, for every architecture built."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from environment import EMULATED
from warpstep import backends

FORMAT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def find_cuobjdump():
    try:
        from triton import backends as triton_backends
    except ImportError:
        return shutil.which("cuobjdump")
    wheel = Path(triton_backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    return str(wheel) if wheel.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def kernels():
    """(architecture, demangled kernel name) -> its machine code."""
    native, _ = backends.native()
    if native is None or native.cuda_architectures is None or EMULATED:
        pytest.skip("the native module has no CUDA code")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump (Triton's wheel has one) and c++filt")
    dump = subprocess.run(
        [cuobjdump, "-sass", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    dump = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True).stdout
    found = {}
    for part in re.split(r"\n\s*code for ", dump)[1:]:
        architecture = part.split()[0]
        for function in re.split(r"Function : ", part)[1:]:
            name, _, code = function.partition("\n")
            found[architecture, name] = code
    return found


def recipe_of(name):
    """Formats of parameter, gradient and moments, amsgrad, and whether with the tail."""
    flag = r"\(?(?:bool\))?(true|false|0|1)"
    match = re.search(rf"adamw_kernel<.*Recipe<(.+?), {flag}>, {flag}>", name)
    formats = [part.split("::")[-1] for part in match.group(1).split(", ")]
    return *formats, match.group(2) in ("true", "1"), match.group(3) in ("true", "1")


def of_the_step(kernels):
    return {key: code for key, code in kernels.items() if "adamw_kernel" in key[1]}


def test_every_recipe_was_compiled_for_every_architecture(kernels):
    native, _ = backends.native()
    architectures = {architecture for architecture, _ in kernels}
    built = {f"sm_{a.split('-')[0]}" for a in native.cuda_architectures.split()}
    assert architectures == built
    for architecture in architectures:
        recipes = {recipe_of(name) for a, name in of_the_step(kernels) if a == architecture}
        assert len(recipes) == 44  # eleven, with and without amsgrad, with and without the tail
        norms = [n for a, n in kernels if a == architecture and "grad_norm_kernel" in n]
        assert len(norms) == len(FORMAT_BYTES)


def test_aligned_streams_are_accessed_16_bytes_at_a_time(kernels):
    for (architecture, name), code in of_the_step(kernels).items():
        param, grad, moment, amsgrad, tail = recipe_of(name)
        size = FORMAT_BYTES
        elements = 16 // min(size[param], size[grad], size[moment])
        moments = (3 if amsgrad else 2) * elements * size[moment] // 16
        stores = elements * size[param] // 16 + moments
        loads = stores + elements * size[grad] // 16
        if tail:  # gradients are written, and averages of the parameter's format or float32
            averages = elements * (size[param] + (4 if param != "float32" else 0)) // 16
            averages = elements * 8 // 16 if param == "float64" else averages
            stores, loads = loads + averages, loads + averages
        label = f"{architecture}: {param}, {grad}, {moment}"
        assert len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", code)) >= loads, label
        assert len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128", code)) >= stores, label


def test_the_norm_reads_16_bytes_at_a_time(kernels):
    norms = {key: code for key, code in kernels.items() if "grad_norm_kernel" in key[1]}
    assert norms
    for key, code in norms.items():
        assert re.search(r"\bLDG\.E(?:\.\w+)*\.128", code), key


def test_nothing_lives_in_local_memory(kernels):
    for (architecture, name), code in kernels.items():
        assert not re.findall(r"\b(?:LDL|STL)\b", code), f"{architecture}: {name}"


def test_blocks_count_their_arrivals_without_a_sequentially_consistent_fence(kernels):
    """Counting releases and acquires: an order of all fences on the device would only cost time."""
    for (architecture, name), code in kernels.items():
        fences = re.findall(r"\bMEMBAR\.(\w+)\.GPU\b", code)
        norms = "grad_norm_kernel" in name  # it counts in two places, one for each kind of norm
        assert fences == ["ALL"] * (2 if norms else 1), f"{architecture}: {name}"
        ordered = re.findall(
            r"\bMEMBAR\.ALL\.GPU\b.*?\bATOMG\.E\.ADD\b.*?\bCCTL\.IVALL\b", code, re.S
        )
        assert len(ordered) == len(fences), f"{architecture}: {name}"
