"""Runs tests on the backends of this process (environment.py), and skips what needs a GPU."""

import pytest

from environment import HAS_GPU, runnable_backends


def pytest_generate_tests(metafunc):
    """A test that takes ``backend`` runs once for each, with its ``device`` if it takes that.

    Without, it is for parameters on the CPU.
    """
    if "backend" not in metafunc.fixturenames:
        return
    pairs = runnable_backends().items()
    if "device" in metafunc.fixturenames:
        cases = [pytest.param(b, d, id=b) for b, d in pairs]
        metafunc.parametrize(("backend", "device"), cases, scope="session")
    else:
        metafunc.parametrize("backend", [b for b, d in pairs if d == "cpu"], scope="session")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
