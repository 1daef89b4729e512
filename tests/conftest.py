"""Runs tests on the backends of this process (support/environment.py); skips what needs a GPU.

torch is imported by hooks that need it: not by the process that only hands tests to others.
"""

import gc
import zlib

import pytest

pytest.register_assert_rewrite("support")  # its assertions show values, as those of tests do


def pytest_collectstart():
    """What a test module imports of warpstep is of the native module that is asked for."""
    from support import environment  # noqa: F401


def pytest_generate_tests(metafunc):
    """A test that takes ``backend`` runs once for each, with its ``device`` if it takes that.

    Without, it is for parameters on the CPU.
    """
    if "backend" not in metafunc.fixturenames:
        return
    from support.environment import runnable_backends

    pairs = runnable_backends().items()
    if "device" in metafunc.fixturenames:
        cases = [pytest.param(b, d, id=b) for b, d in pairs]
        metafunc.parametrize(("backend", "device"), cases, scope="session")
    else:
        metafunc.parametrize("backend", [b for b, d in pairs if d == "cpu"], scope="session")


@pytest.fixture(autouse=True)
def _seed(request):
    """A test's random numbers are its own, whatever ran before it: a failure can be run again."""
    import torch

    # torch.manual_seed formats its stack for each kind of device that there may be: 1 ms a test.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What modules make stays: the collector need not look through it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="one case of each test for each backend, without what takes seconds",
    )


def pytest_collection_modifyitems(config, items):
    from support.environment import HAS_GPU

    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # none waits for these
    if config.getoption("--quick"):
        kept = {}
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if not any(map(item.get_closest_marker, ("gpu", "integration", "not_quick", "slow"))):
                kept.setdefault((item.path, item.originalname, params.get("backend")), item)
        chosen = set(kept.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
