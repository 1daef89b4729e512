"""examples/offload.py: chunks stepped beside the backward pass give the bits of a plain step."""

import importlib.util
import threading
from pathlib import Path

import torch

PATH = Path(__file__).parent.parent / "examples" / "offload.py"


def loaded():
    spec = importlib.util.spec_from_file_location("offload", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_offload(monkeypatch):
    offload, threads = loaded(), []
    step = offload.adamw_

    def noted(params, *lists, **options):
        threads.append((threading.current_thread(), params[0].numel()))
        step(params, *lists, **options)

    monkeypatch.setattr(offload, "adamw_", noted)
    steps, width = 60, 32
    overlapped, losses = offload.train(2, steps, width)
    assert len(threads) == steps * 6  # a weight and a bias of three layers
    assert threading.main_thread() not in {thread for thread, _ in threads}
    threads.clear()
    plain, _ = offload.train(0, steps, width)
    assert threads == [(threading.main_thread(), overlapped.numel())] * steps
    assert torch.equal(overlapped, plain)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])  # batches differ by less
