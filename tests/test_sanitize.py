"""What compute-sanitizer is given to run, run without it."""

import pytest

import sanitize
from support.environment import runnable_backends

COMPARED = [pair for pair in runnable_backends().items() if pair[0] in ("cpu", "cuda")]


@pytest.mark.parametrize("pair", COMPARED, ids=lambda pair: pair[0])
def test_it_compares_all_bits_with_the_cpus(pair, capsys):
    sanitize.main([pair, ("cpu", "cpu")])
    lines = capsys.readouterr().out.splitlines()
    names = [*sanitize.RECIPES, *sanitize.TILED, "many groups"]
    assert lines == [f"{name}: all bits as on the CPU" for name in names]
