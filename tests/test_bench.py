"""The benchmark's own arithmetic: cases, floors, ratios, what fits, and when it ends."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import copying, measure, run  # noqa: E402
from bench.cases import CASES, Case, equal, gpt2, resnet50, select, vit  # noqa: E402
from bench.competitors import (  # noqa: E402
    BASELINE,
    COMPETITORS,
    OURS,
    that_fit,
)
from bench.devices import DEVICES  # noqa: E402
from bench.machine import Others, busy_core, slug  # noqa: E402
from bench.processes import Processes  # noqa: E402
from bench.run import row  # noqa: E402

BY_ID = {competitor.id: competitor for competitor in COMPETITORS}
CPU = DEVICES["cpu"]


def test_ids_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)
    assert len(BY_ID) == len(COMPETITORS)


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        pytest.param(gpt2(12, 768), 148, 124_439_808, id="gpt2-124m"),
        pytest.param(gpt2(48, 1600), 580, 1_557_611_200, id="gpt2-1.5b"),
        pytest.param(resnet50(), 161, 25_557_032, id="resnet50"),
        pytest.param(vit(24, 1024), 296, 304_326_632, id="vit-l"),
    ],
)
def test_models_have_the_published_number_of_parameters(shapes, tensors, elements):
    case = Case("model", "model", shapes)
    assert (case.tensors, case.elements) == (tensors, elements)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 28), ("bfloat16", 14)])
def test_floor_counts_each_live_byte_once(dtype, bytes_each):
    case = Case("floor", "small", equal(3, 5), dtype=dtype)
    assert case.floor_bytes == 15 * bytes_each
    assert case.state_bytes == 15 * bytes_each * 3 // 7


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 20), ("bfloat16", 10)])
def test_floor_of_sgd_has_one_moment_less(dtype, bytes_each):
    case = Case("floor", "small", equal(3, 5), dtype=dtype, optimizer="SGD")
    assert case.floor_bytes == 15 * bytes_each
    assert case.state_bytes == 15 * bytes_each * 2 // 5


def test_sgd_is_measured_with_momentum_against_torchs():
    case = Case("tiny", "small", equal(3, 70_000), optimizer="SGD")
    competitors = [c for c in COMPETITORS if c.declines(case, "cpu") is None]
    ids = [OURS, BASELINE, "torch-foreach", "torch-forloop"]
    assert [c.id for c in competitors] == ids
    effort = measure.Effort(1, 1, 0)
    result = measure.measure(case, competitors, CPU, effort=effort, say=lambda what: None)
    assert all(len(times.step) == 1 for times in result.times.values())
    assert all(times.difference_lr < 1e-3 for times in result.times.values())
    for competitor in competitors:
        params = [torch.nn.Parameter(torch.zeros(1))]
        optimizer, _ = competitor.build([{"params": params}], case)
        assert optimizer.defaults["momentum"] == 0.9
        assert isinstance(optimizer, torch.optim.SGD)


def test_select_takes_patterns_and_refuses_those_that_match_nothing():
    assert [c.id for c in select("cpu", False, ("vit-l*",))] == ["vit-l", "vit-l/bf16"]
    assert all(case.quick for case in select("cpu", True))
    with pytest.raises(ValueError, match=r"gpt2-1\.5b.*matches no cpu case"):
        select("cpu", False, ("gpt2-1.5b",))


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    # The third round was disturbed as a whole: both took ten times as long.
    ratio = measure.ratio([20.0, 22.0, 200.0], [10.0, 10.0, 100.0])
    assert ratio.median == 2.0
    assert 2.0 <= ratio.p10 <= ratio.p90 <= 2.2
    with pytest.raises(ValueError, match="3 rounds against 2"):
        measure.ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_when_memory_is_short_the_first_competitors_are_kept():
    case = Case("big", "large", equal(1, 1000))
    fits = 2**30 + 4 * 4000 + 2 * case.state_bytes
    kept, left = that_fit(COMPETITORS, case, fits)
    assert [c.id for c in kept] == [OURS, BASELINE]
    assert len(left) == len(COMPETITORS) - 2
    assert that_fit(COMPETITORS, case, 0)[0] == []


def test_offset_displaces_by_whole_elements():
    placed = measure.placed_like(torch.arange(10.0), 1)
    assert placed.data_ptr() % 16 == 4
    assert placed.tolist() == list(range(10))


def test_measuring_a_tiny_case_gives_a_sample_a_round_for_each():
    case = Case("tiny", "small", equal(3, 7), groups=2, offset=1)
    competitors = [BY_ID[OURS], BY_ID[BASELINE], BY_ID["torch-forloop"]]
    result = measure.measure(
        case, competitors, CPU, effort=measure.Effort(2, 2, 0), say=lambda what: None
    )
    assert {name: len(times.step) for name, times in result.times.items()} == {
        c.id: 2 for c in competitors
    }
    assert result.copy == []  # a bandwidth says nothing about tensors so small
    assert all(times.difference_lr < 1e-3 for times in result.times.values())
    line = row(result, BY_ID[BASELINE])
    assert line.ratio > 0
    assert line.left_out == ""


THREADS = "__import__('warpstep').status().native['threads']"
PROCESS = f"""
from bench.competitors import found
from bench.processes import Processes
context = Processes(found("cpu")[0]).context
with context.Pool(1) as pool:
    print(pool.apply(eval, ("{THREADS}",)) == {THREADS})
"""


def test_a_cases_process_steps_with_torchs_threads():
    """Forked after warpstep's import it would not. In a process with no server of others yet."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_peers_of_8_bits_are_measured_beside_8_bits():
    measured = {c.id for c in CASES if BY_ID["torchao-8bit"].declines(c, "cpu") is None}
    sizes = ("gpt2-124m", "one-2^26", "one-2^28", "2000x64x64")
    assert measured == {f"{size}/{r}-8bit" for size in sizes for r in ("residual", "stochastic")}
    declined = BY_ID["bitsandbytes-8bit"].declines(Case("tiny", "small", equal(3, 5)), "cpu")
    assert declined == "is not measured on tiny"


def test_threads_are_the_cases_own_and_no_more_than_cores(monkeypatch):
    ids = [c.id for c in select("cpu", False, ("*-threads",), cores=4)]
    assert "gpt2-124m/bf16/4-threads" in ids
    assert "2000x256/tail/1-threads" in ids
    assert not any("/8-" in id or "/16-" in id for id in ids)
    before = torch.get_num_threads()
    case = next(c for c in CASES if c.id == "one-2^26/1-threads")
    with measure.threads_of(case):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert BY_ID[BASELINE].declines(case, "cpu") is None
    assert BY_ID["torch-foreach"].declines(case, "cpu").startswith("is not measured on")


def test_a_competitor_that_fails_is_left_out_with_its_reason():
    broken = measure.Competitor("broken", "torch.optim", "AdamW", (("nonsense", 1),))
    case = Case("tiny", "small", equal(1, 4))
    result = measure.measure(
        case,
        [BY_ID[BASELINE], broken],
        CPU,
        effort=measure.Effort(1, 1, 0),
        say=lambda what: None,
    )
    assert "nonsense" in row(result, broken).left_out
    assert row(result, BY_ID[BASELINE]).step_us > 0


def test_the_mean_shows_what_the_median_does_not():
    spread = measure.spread([1.0, 1.0, 1.0, 1.0, 96.0])
    assert (spread.median, spread.mean) == (1.0, 20.0)


def test_beside_a_busy_core_another_process_computes_and_is_no_stranger():
    """It has ended when its time is over, and its work then counts as the benchmark's own."""
    _, before, _ = Others._seconds()
    own = time.process_time()
    with busy_core():
        time.sleep(1)
    used_here = time.process_time() - own
    _, after, _ = Others._seconds()
    assert after - before - used_here > 0.1  # seconds: it may have had to share a core


def test_a_case_beside_a_busy_core_is_measured_beside_one(monkeypatch):
    begun = []

    @contextmanager
    def noted():
        begun.append("busy")
        yield
        begun.append("over")

    monkeypatch.setattr(measure, "busy_core", noted)
    effort = measure.Effort(2, 2, 0)
    case = Case("tiny", "busy-core", equal(3, 1), beside_busy_core=True)
    for each in (case, replace(case, beside_busy_core=False)):
        measure.measure(each, [BY_ID[OURS]], CPU, effort=effort, say=begun.append)
    assert [word for word in begun if not word.startswith("warming")] == [
        *("busy", "round 1", "round 2", "over"),
        *("round 1", "round 2"),
    ]


def test_slug_is_a_plain_folder_name():
    name = {"device": "cpu", "name": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2}
    name["native"] = {"CPU code": "avx512_bf16"}
    assert slug(name) == "cpu-intel-xeon-cpu-2-20ghz-avx512-bf16-2-cores"
    assert slug({"device": "cuda", "name": "NVIDIA H200", "cores": 16}) == "nvidia-h200"


def test_copying_leaves_what_it_moves_as_it_was():
    case = Case("m", "model", ((70_000,), (131_077,), (3,)), dtype="bfloat16", offset=1)
    entry = measure.Entry(
        BY_ID[OURS],
        case,
        measure.random_tensors(case, CPU.memory, 0.02),
        measure.random_tensors(case, CPU.memory, 1e-3),
        CPU,
    )
    entry.backward()
    entry.step()
    before = [[t.clone() for t in (p, s, v)] for p, _, s, v in entry.operands()]
    copy = copying.copy_loop(case, [entry], CPU)
    assert copy is not None
    assert copy.nanoseconds() > 0
    after = [(p, s, v) for p, _, s, v in entry.operands()]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.view(torch.int16), b.detach().view(torch.int16))


def test_copying_covers_all_but_an_edge_of_the_memory_that_is_stepped():
    base = torch.zeros(200_003, dtype=torch.bfloat16)
    parts = copying.as_floats(base[1:200_002], torch.zeros(200_001, dtype=torch.bfloat16))
    assert parts[0].data_ptr() == base.data_ptr() + 4
    assert {part.numel() for part in parts} == {100_000}
    assert copying.as_floats(torch.zeros(100)) == []


def test_a_run_says_how_long_it_takes_and_leaves_the_kept_results_alone(monkeypatch, capsys):
    quick = ["bench.run", "--device", "cpu", "--quick"]
    monkeypatch.setattr(sys, "argv", quick)
    given = run.arguments()
    assert not given.record
    present = [BY_ID[OURS], BY_ID[BASELINE]]
    whole = [run.expected_seconds(c, present, given) for c in select("cpu", True)]
    assert 10 < sum(whole) < 600
    assert run.TRIALS.relative_to(ROOT).parts[0] == "build"
    monkeypatch.setattr(sys, "argv", [*quick, "--record"])
    with pytest.raises(SystemExit):
        run.arguments()
    assert "--record is for whole runs" in capsys.readouterr().err


def test_a_run_ends_in_time_and_says_what_it_left_out(monkeypatch, tmp_path, capsys):
    only = ["--device", "cpu", "--only", "host-100", "--only", "host-1000"]
    ends = ["--minutes", "1e-9", "--out", str(tmp_path), "--commit", "abc123"]
    monkeypatch.setattr(sys, "argv", ["bench.run", *only, *ends])
    run.main()
    assert "host-100: warpstep was not measured: no time left" in capsys.readouterr().out
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) > 4
    assert all(text.endswith(",no time left") for text in lines[1:])
    assert json.loads((tmp_path / "machine.json").read_text())["commit"] == "abc123"


@pytest.mark.slow
def test_a_partial_run_from_the_command_line(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.run", "--device", "cpu", "--rounds", "1"),
            *("--only", "host-100", "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 cases, about 1 min on an idle machine" in done.stdout
    assert "host-100" in (tmp_path / "steps.csv").read_text()


@pytest.mark.not_quick
def test_a_case_whose_process_dies_says_so():
    """And the next one is measured."""
    processes = Processes([BY_ID[OURS]])
    case = Case("dies", "small", equal(1, 10), dtype="no such format")
    said = []
    effort = measure.Effort(1, 1, 0)
    result = processes.measure(case, [BY_ID[OURS]], "cpu", effort=effort, say=said.append)
    assert result.times[OURS].left_out == "the case's process ended with exit code 1"
    result = processes.measure(
        replace(case, dtype="float32"), [BY_ID[OURS]], "cpu", effort=effort, say=said.append
    )
    assert len(result.times[OURS].step) == 1
    assert said[0] == "warming up warpstep"
