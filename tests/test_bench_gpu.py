"""What the benchmark does on a GPU, on one that is the CPU: host, device and replayed times."""

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import fake_torch_cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import copying, devices, measure  # noqa: E402
from bench.cases import Case, equal, select  # noqa: E402
from bench.clocks import Clocks  # noqa: E402
from bench.competitors import (  # noqa: E402
    BASELINE,
    BASELINE_GRAPH,
    COMPETITORS,
    OUR_GRAPH,
    OURS,
    that_fit,
)
from bench.devices import DEVICES, Cuda  # noqa: E402
from bench.run import row  # noqa: E402

BY_ID = {competitor.id: competitor for competitor in COMPETITORS}
CPU = DEVICES["cpu"]


class FakeCuda(Cuda):
    """A GPU whose memory is the CPU's, and which does everything at once."""

    memory = CPU.memory

    def captured(self, step):
        return super().captured(fake_torch_cuda.launched(step))


def on_fake_gpu(monkeypatch, case, *ids):
    """What measuring gives there. torch's fused optimizer is capturable on GPUs only."""
    fake_torch_cuda.install(monkeypatch)
    graph = replace(BY_ID[BASELINE_GRAPH], options=(("fused", True),))
    competitors = [graph if id == BASELINE_GRAPH else BY_ID[id] for id in ids]
    effort = measure.Effort(3, 3, 0)
    return measure.measure(case, competitors, FakeCuda(), effort=effort, say=lambda what: None)


def test_on_a_gpu_host_device_and_graphs_have_columns_of_their_own(monkeypatch):
    # Other processes may disturb.
    monkeypatch.setattr(measure, "MOST_QUEUED_NS", float("inf"))
    device_time = Cuda.device_time
    monkeypatch.setattr(
        FakeCuda, "device_time", lambda self, step, head_start_ns: device_time(self, step, 1e12)
    )
    case = Case("tiny", "small", equal(5, 70), groups=2)
    ids = (OURS, BASELINE, OUR_GRAPH, BASELINE_GRAPH)
    result = on_fake_gpu(monkeypatch, case, *ids)
    for id in ids:
        times = result.times[id]
        assert len(times.step) == len(times.host) == len(times.device) == 3, times.left_out
        assert all(step >= host > 0 for step, host in zip(times.step, times.host, strict=True))
        # A graph holds the addresses of the gradients, and the others get new ones.
        assert times.difference_lr < 1e-3
    assert len(result.copy) == 3
    lines = {id: row(result, BY_ID[id]) for id in ids}
    assert [lines[id].against for id in ids] == [OURS, OURS, OURS, OUR_GRAPH]
    for id, line in lines.items():
        other = result.times[line.against]
        mine = result.times[id]
        assert line.ratio == measure.ratio(mine.step, other.step).median
        assert line.host_ratio == measure.ratio(mine.host, other.host).median
        assert line.device_ratio == measure.ratio(mine.device, other.device).median
        assert line.gb_s == case.floor_bytes / measure.spread(mine.device).median
        assert line.copy_share == measure.ratio(result.copy, mine.device).median


def test_device_time_is_left_out_where_the_host_was_not_ahead(monkeypatch):
    rounds = iter(range(100))
    device_time = Cuda.device_time

    def sometimes_late(self, step, head_start_ns):
        ns = device_time(self, step, 1e12)
        return ns if next(rounds) % 3 == 2 else math.nan

    monkeypatch.setattr(FakeCuda, "device_time", sometimes_late)
    monkeypatch.setattr(measure, "MOST_QUEUED_NS", float("inf"))
    monkeypatch.setattr(copying.DeviceCopyLoop, "nanoseconds", lambda self: 1000.0)
    line = row(on_fake_gpu(monkeypatch, Case("tiny", "small", equal(5, 70)), OURS), BY_ID[OURS])
    assert line.host_ratio == 1
    assert (line.device_us, line.device_ratio, line.gb_s, line.copy_share) == (None,) * 4


def test_a_host_that_enqueues_for_longer_than_the_pause_was_not_ahead(monkeypatch):
    fake_torch_cuda.install(monkeypatch)
    assert math.isnan(Cuda().device_time(lambda: time.sleep(0.01), head_start_ns=5e6))
    assert Cuda().device_time(lambda: time.sleep(0.01), head_start_ns=5e12) > 9e6


def test_a_round_in_which_it_was_not_is_left_out():
    nan = math.nan
    assert measure.spread([1.0, nan, 3.0]).median == 2.0
    assert measure.ratio([2.0, nan, 6.0, 2.0], [1.0, 1.0, 2.0, nan]).median == 2.5
    assert measure.spread([1.0, nan, nan]) is None
    assert measure.spread([]) is None


def test_a_gpu_does_not_rest_and_a_cpu_does(monkeypatch):
    slept = []
    monkeypatch.setattr(devices.time, "sleep", slept.append)
    case = Case("tiny", "small", equal(1, 7))
    on_fake_gpu(monkeypatch, case, OURS)
    assert not slept
    effort = measure.Effort(2, 2, 0)
    measure.measure(case, [BY_ID[OURS]], CPU, effort=effort, say=lambda what: None)
    assert slept == [devices.SETTLE_SECONDS] * 2


def test_a_copy_of_a_part_stands_for_all(monkeypatch):
    fake_torch_cuda.install(monkeypatch)
    case = Case("large", "large", equal(1, 1000))
    monkeypatch.setattr(copying, "MOST_COPY_BYTES", 4000)
    loop = copying.DeviceCopyLoop(case, FakeCuda())
    assert loop.source.nbytes + loop.target.nbytes == 4000
    monkeypatch.setattr(FakeCuda, "device_time", lambda self, step, head_start_ns: 10.0)
    assert loop.nanoseconds() == 10 * 28_000 / 4000


def test_a_graph_counts_its_gradients_as_memory():
    case = Case("big", "large", equal(1, 1200))
    ours, graph = BY_ID[OURS], BY_ID[OUR_GRAPH]
    assert (ours.bytes_for(case), graph.bytes_for(case)) == (14_400, 19_200)
    fits = 2**30 + 4 * 4800 + 14_400 + 19_200
    assert that_fit([ours, graph], case, fits)[0] == [ours, graph]
    assert that_fit([ours, graph], case, fits - 1)[0] == [ours]


def test_the_gpus_cases_are_those_that_are_asked_for():
    ids = {case.id for case in select("cuda", False)}
    named = {"one-2^28", "gpt2-124m", "gpt2-1.5b", "llama2-7b-shard-8", "odd-100x1000003"}
    assert named | {f"{id}/bf16" for id in named} <= ids
    assert {"1000x1024", "10000x64", "465-groups", "gpt2-124m/tail"} <= ids
    assert not any("busy-core" in id or "after-backward" in id or "-threads" in id for id in ids)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """One that tells four samples, of which the GPU hides the power, and then half a line."""
    lines = [f"2026/01/01 00:00:0{i}, {1500 + 100 * i}, 3201, [N/A], 4{i}" for i in range(4)]
    text = "\n".join([*lines, "2026/01/01 00:00:04, 19"])
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/called\nprintf '{text}'\nexec sleep 60"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return tmp_path


def test_clocks_are_logged_and_summarised(nvidia_smi):
    with Clocks(nvidia_smi / "clocks.csv") as clocks:
        end = time.monotonic() + 30
        while clocks.count() < 4 and time.monotonic() < end:
            time.sleep(0.01)
        process = clocks.process
    assert process.poll() is not None
    called = (nvidia_smi / "called").read_text()
    assert "--id=GPU-1234" in called
    assert "clocks.sm,clocks.mem,power.draw,temperature.gpu" in called
    whole, last = clocks.summary(), clocks.summary(first=3)
    assert whole["clocks.sm MHz"] == {"min": 1500, "median": 1650, "max": 1800}
    assert whole["temperature.gpu C"]["max"] == 43
    assert "power.draw W" not in whole
    assert last["clocks.sm MHz"] == {"min": 1800, "median": 1800, "max": 1800}


def test_without_nvidia_smi_there_are_no_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Clocks(tmp_path / "clocks.csv") as clocks:
        assert clocks.count() == 0
        assert clocks.summary() == {}
