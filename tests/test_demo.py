"""The demo, in small: it is the first that a new user sees."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

DEMO = Path(__file__).parent.parent / "examples" / "train_gpt.py"


@pytest.mark.not_quick
def test_the_demo_trains_compares_and_draws(monkeypatch, capsys, tmp_path):
    plot = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--quick", "--device", "cpu", "--out", str(plot)])
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for others
    try:
        runpy.run_path(str(DEMO), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "20 steps from one seed, on the same batches" in said
    rows = [line.strip("│ ").split("│") for line in said.splitlines() if line.startswith("│")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    losses = [float(cell) for cell in table["validation loss"]]
    assert max(losses) - min(losses) < 1e-3
    assert table["optimizer state"] == [table["optimizer state"][0]] * 3
    for row in ("weights, first step", "weights, at the end"):
        assert all(float(cell.removesuffix(" away")) < 1e-3 for cell in table[row][1:])
    assert "" not in table  # no row takes two lines
    assert "warpstep's step takes" in said
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("busy", [False, True])
def test_the_demo_says_when_its_times_say_little(busy):
    from rich.console import Console

    demo = runpy.run_path(str(DEMO))
    console = Console(width=200)
    times = {"torch fused": 0.6, "torch foreach": 0.8, "warpstep": 0.4}
    trainings = []
    for name, fast in times.items():
        slow = 250.0 if busy and name == "torch fused" else fast
        model = torch.nn.Linear(2, 2)
        training = demo["Training"](name, model, torch.optim.AdamW(model.parameters()))
        training.losses = [1.0] * 100
        training.step_ms = [fast] * 20 + [slow] * 80
        trainings.append(training)
    with console.capture() as captured:
        demo["report"](console, trainings, [1.0] * 3, [0.0] * 2, [0.0] * 2)
    said = " ".join(captured.get().split())
    assert ("torch's fused one 0.60 ms: 1.5 times as long" in said) == (not busy)
    assert ("their medians say little" in said) == busy
    fastest = "warpstep's step takes 0.40 ms at most, and torch's fused one 0.60 ms."
    assert (fastest in said) == busy
