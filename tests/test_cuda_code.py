"""The compiled CUDA code, read: 16-byte accesses, no local memory, for every architecture built."""

import re
import sys
from pathlib import Path

import pytest

from environment import EMULATED
from warpstep import backends

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import machine_code  # noqa: E402
from bench.machine_code import FORMAT_BYTES  # noqa: E402


@pytest.fixture(scope="module")
def kernels():
    native, _ = backends.native()
    if native is None or native.cuda_architectures is None or EMULATED:
        pytest.skip("the native module has no CUDA code")
    if missing := machine_code.missing_tool():
        pytest.skip(f"needs {missing}")
    return machine_code.read(native.__file__)


def name_of(kernel):
    return f"{kernel.architecture}: {kernel.name}"


def of_the_step(kernels):
    return [kernel for kernel in kernels if kernel.is_step]


def test_every_recipe_was_compiled_for_every_architecture(kernels):
    native, _ = backends.native()
    architectures = {kernel.architecture for kernel in kernels}
    built = {f"sm_{a.split('-')[0]}" for a in native.cuda_architectures.split()}
    assert architectures == built
    for architecture in architectures:
        here = [kernel for kernel in kernels if kernel.architecture == architecture]
        recipes = {kernel.recipe for kernel in of_the_step(here)}
        assert len(recipes) == 44  # eleven, with and without amsgrad, with and without the tail
        assert len([kernel for kernel in here if kernel.is_norm]) == len(FORMAT_BYTES)


def test_aligned_streams_are_accessed_16_bytes_at_a_time(kernels):
    for kernel in of_the_step(kernels):
        recipe = kernel.recipe
        moments = [recipe.moment] * (3 if recipe.amsgrad else 2)
        stores = recipe.vectors(recipe.param, *moments)
        loads = stores + recipe.vectors(recipe.grad)
        if recipe.tail:  # gradients are written, and averages of the parameter's format or float32
            averages = recipe.vectors(recipe.param)
            averages += recipe.vectors("float32") if recipe.elements > 2 else 0
            averages -= recipe.vectors("float32") if recipe.param == "float32" else 0
            stores, loads = loads + averages, loads + averages
        for kind, least in (("LDG", loads), ("STG", stores)):
            found = [c for c in kernel.hot_loop.code if c.kind == kind and c.moves_16_bytes]
            assert len(found) >= least, name_of(kernel)


def test_the_norm_reads_16_bytes_at_a_time(kernels):
    norms = [kernel for kernel in kernels if kernel.is_norm]
    assert norms
    for kernel in norms:
        assert any(c.kind == "LDG" and c.moves_16_bytes for c in kernel.code), name_of(kernel)


def test_nothing_lives_in_local_memory(kernels):
    for kernel in kernels:
        assert not re.findall(r"\b(?:LDL|STL)\b", kernel.text), name_of(kernel)


def test_blocks_count_their_arrivals_without_a_sequentially_consistent_fence(kernels):
    """Counting releases and acquires: an order of all fences on the device would only cost time."""
    for kernel in kernels:
        fences = re.findall(r"\bMEMBAR\.(\w+)\.GPU\b", kernel.text)
        # The norm counts in two places, one for each kind of norm.
        assert fences == ["ALL"] * (2 if kernel.is_norm else 1), name_of(kernel)
        ordered = re.findall(
            r"\bMEMBAR\.ALL\.GPU\b.*?\bATOMG\.E\.ADD\b.*?\bCCTL\.IVALL\b", kernel.text, re.S
        )
        assert len(ordered) == len(fences), name_of(kernel)
