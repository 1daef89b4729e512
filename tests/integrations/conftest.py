"""Integration tests: offline, marked ``integration``."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library is imported
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)
