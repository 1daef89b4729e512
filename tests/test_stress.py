"""The stress test itself: at a small size on every backend, and that it finds what it looks for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stress
from stress import Model, Size
from support import fake_torch_cuda

SMALL = Size(chunks=2, short=12)


@pytest.mark.parametrize("scenario", stress.SCENARIOS)
def test_a_small_one(backend, device, scenario):
    said = []
    assert stress.run(SMALL, scenario, 5, 2, {backend: device}, said.append) == []
    assert said[-1].startswith(f"{scenario}: 5 of 5 steps")


@pytest.mark.parametrize("way", ["side stream", "graph"])
def test_streams_and_graphs_take_each_step_once(monkeypatch, way):
    """In the place of a GPU: what is captured does not run, and runs at each replay."""
    fake_torch_cuda.install(monkeypatch)
    monkeypatch.setattr(Model, "clip_and_step", fake_torch_cuda.launched(Model.clip_and_step))
    for scenario in stress.SCENARIOS:
        expected = Model(SMALL, scenario, "cpu", "cpu", "eager")
        model = Model(SMALL, scenario, "cpu", "cpu", way)
        for first, last in ((0, 2), (2, 5)):
            expected.run(first, last)
            model.run(first, last)
            assert model.findings(expected, expected.operands()) == []
        assert model.side.waits == 2
        assert model.graph is None if way == "side stream" else model.graph.replays == 4


def damage_counter(model):
    model.optimizer.state[model.params[7]]["step"] += 1


def damage_bit(model):
    model.optimizer.state[model.params[0]]["exp_avg_sq"].view(torch.int32)[20_000] ^= 1


def damage_moment(model):
    model.optimizer.state[model.params[0]]["exp_avg_sq"][20_000] *= 1.1


def damage_average(model):
    model.optimizer.state[model.params[12]]["ema"].view(torch.int32)[-1] ^= 1


def damage_zeroed(model):
    model.flat_grad[-1] = 1e-30


def damage_arrivals(model):
    model.arrivals()[0][0] = 1


# What is damaged -> what is found. damage_moment is for the reference, whose bits are its own.
DAMAGE = {
    damage_moment: "exp_avg_sq",
    damage_counter: "step counters: 1 of 13 differ, the first in tensor 7 (element 0)",
    damage_bit: "exp_avg_sq: 1 of 33054 differ, the first in tensor 0 (element 20000)",
    damage_average: "ema: 1 of 33054 differ, the first in tensor 12 (element 16)",
    damage_zeroed: "gradients are not zero",
    damage_arrivals: "1 arrival counters are not zero",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_it_finds(backend, device, damage):
    """Counters and gradients on every backend, bits where they are the CPU's, arrivals on GPUs."""
    if backend == "reference" and damage in (damage_bit, damage_average):
        damage = damage_moment
    if backend in ("reference", "cpu") and damage is damage_arrivals:
        damage = damage_counter
    expected = Model(SMALL, "tail", "cpu", "cpu", "eager")
    model = Model(SMALL, "tail", backend, device, "eager")
    for each in (expected, model):
        each.run(0, 2)
    operands = {name: t.to(device) for name, t in expected.operands().items()}
    assert model.findings(expected, operands) == []
    damage(model)
    found = model.findings(expected, operands)
    assert len(found) == 1
    assert found[0].startswith(DAMAGE[damage])


def test_what_is_wrong_in_one_does_not_end_the_others(backend, device, monkeypatch):
    """A model that raises, and one that goes wrong, are told; the rest is stepped to the end."""
    step = Model.step

    def wrong(model, t):
        step(model, t)
        if model.is_wrong and t == 3:
            if model.tail:
                raise RuntimeError("a launch failed")
            damage_counter(model)

    made = iter(range(100))
    initialize = Model.__init__

    def numbered(model, *arguments):
        model.is_wrong = next(made) % 3 == 1  # the first is what the others are compared with
        initialize(model, *arguments)

    monkeypatch.setattr(Model, "step", wrong)
    monkeypatch.setattr(Model, "__init__", numbered)
    monkeypatch.setattr(stress, "WAYS", ("eager",))
    said = []
    other = "reference" if backend == "cpu" else "cpu"
    for scenario, what in (("plain", "step counters"), ("tail", "RuntimeError: a launch failed")):
        backends = {backend: device, other: "cpu"}
        found = stress.run(SMALL, scenario, 5, 2, backends, said.append)
        assert len(found) == 1
        assert found[0].startswith(f"{scenario}, {backend}, eager, after step 4: {what}")
        assert said[-1].startswith(f"{scenario}: 5 of 5 steps in ")
        assert said[-1].endswith(f", as on the CPU: {other}, eager")


def test_from_the_command_line():
    script = Path(stress.__file__)
    command = [sys.executable, script, "--steps", "4", "--every", "2", "--chunks", "2"]
    command += ["--short", "10", "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 findings"
