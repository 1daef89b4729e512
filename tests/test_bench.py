"""The benchmark's own arithmetic: cases, floors, ratios, what fits, and the report."""

import json
import re
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

pytest.importorskip("rich")
pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from bench import measure, report, run  # noqa: E402
from bench.cases import CASES, Case, equal, gpt2, resnet50, select, vit  # noqa: E402
from bench.competitors import BASELINE, COMPETITORS, OURS, PLAIN, that_fit  # noqa: E402
from bench.machine import Others, busy_core, slug  # noqa: E402
from bench.run import Row, row, write  # noqa: E402

BY_ID = {competitor.id: competitor for competitor in COMPETITORS}


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
        case, competitors, "cpu", effort=measure.Effort(2, 2, 0), say=lambda what: None
    )
    assert {name: len(times.step) for name, times in result.times.items()} == {
        c.id: 2 for c in competitors
    }
    assert result.copy == []  # a bandwidth says nothing about tensors so small
    assert all(times.difference_lr < 1e-3 for times in result.times.values())
    line = row(result, BY_ID[BASELINE])
    assert line.ratio > 0
    assert line.left_out == ""


def test_a_competitor_that_fails_is_left_out_with_its_reason():
    broken = measure.Competitor("broken", "torch.optim", "AdamW", (("nonsense", 1),))
    case = Case("tiny", "small", equal(1, 4))
    result = measure.measure(
        case,
        [BY_ID[BASELINE], broken],
        "cpu",
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
        measure.measure(each, [BY_ID[OURS]], "cpu", effort=effort, say=begun.append)
    assert [word for word in begun if not word.startswith("warming")] == [
        *("busy", "round 1", "round 2", "over"),
        *("round 1", "round 2"),
    ]


def test_slug_is_a_plain_folder_name():
    name = {"device": "cpu", "name": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2}
    assert slug(name) == "cpu-intel-xeon-cpu-2-20ghz-2-cores"
    assert slug({"device": "cuda", "name": "NVIDIA H200", "cores": 16}) == "nvidia-h200"


MACHINE = {
    "device": "cpu",
    "name": "A CPU",
    "cores": 2,
    "threads": 2,
    "torch": "2.13.0",
    "warpstep": "0.1.0",
    "commit": "abc",
    "date": "2026-01-01",
    "driver": "570.1",
    "cuda": "12.8",
    "absent": {"optimi": "not there"},
}


def line(case: str, family: str, competitor: str, tensors: int, **more: object) -> Row:
    measured: dict[str, object] = {
        "rounds": 7,
        "step_us": 250.0,
        "step_us_mean": 300.0,
        "ratio": 1.0,
        "ratio_p10": 0.9,
        "ratio_p90": 1.1,
        "gb_s": 10.0,
        "copy_gb_s": 12.0,
        "copy_share": 0.83,
        "copy_kind": "torch copy_",
    }
    return Row(case, family, "step", "f32", tensors, 1, 64 * tensors, competitor, **measured | more)


def save(folder: Path, machine: dict[str, object], rows: list[Row]) -> None:
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps(machine))
    write(folder / "steps.csv", rows)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    nothing = dict.fromkeys(("step_us", "ratio", "ratio_p10", "ratio_p90", "gb_s", "copy_gb_s"))
    rows = [
        line("lost", "model", OURS, 2),
        line("lost", "model", BASELINE, 2, ratio=0.9, ratio_p10=0.8, ratio_p90=0.95),
        line("lost", "model", "torch-compiled", 2, **nothing, rounds=0, left_out="too long"),
        *(line(f"host-{n}", "host", c, n) for n in (10, 100) for c in (OURS, BASELINE)),
        *(line(f"t-{n}", "sweep-tensors", c, n) for n in (10, 100) for c in (OURS, BASELINE)),
        *(line(f"e-{n}", "sweep-elements", c, n) for n in (10, 100) for c in (OURS, BASELINE)),
        line("b-10/busy-core", "busy-core", OURS, 10, step_us_mean=5000.0),
        line("b-10/busy-core", "busy-core", BASELINE, 10, step_us=500.0),
    ]
    save(folder / "a-cpu", MACHINE, rows)
    save(folder / "b-gpu", MACHINE | {"device": "cuda", "name": "A GPU"}, rows)
    save(folder / "cpu.partial", MACHINE | {"name": "Unfinished"}, rows)
    return folder


def test_report_fills_the_blocks_gpu_first_with_losses_and_conditions(results):
    text = "\n".join(
        f"<!-- bench:begin {name} -->\nold\n<!-- bench:end {name} -->\nkept"
        for name in ("summary", "host", "busy-core", "tail")
    )
    blocks = report.blocks(report.load(results))
    filled = report.insert(text, blocks)
    assert filled.index("A GPU") < filled.index("A CPU")
    assert "Unfinished" not in filled
    assert "old" not in filled
    assert filled.count("kept") == 4
    assert "0.90x ▼" in filled
    assert "optimi" in filled
    assert "A dash means not measured: compiled (too long)." in filled
    assert "| b-10 | 250 µs | 500 µs | 2.0x | 5 ms | 300 µs | 0.1x ▼ |" in filled
    assert blocks["tail"] == ""  # no machine has measured it
    assert report.insert(filled, blocks) == filled


def of_summary(folder: Path, *rows: Row) -> str:
    save(folder, MACHINE, list(rows))
    return report.summary(report.load(folder.parent)[0])


def test_report_shows_no_share_of_a_copy_that_was_slower_than_the_step(tmp_path):
    large = {"step_us": 31e3, "gb_s": 92.0}  # 2.9 GB
    text = of_summary(
        tmp_path / "a",
        line("most", "model", OURS, 2, **large, copy_gb_s=90.0, copy_share=1.02),
        line("slow", "model", OURS, 2, **large, copy_gb_s=46.0, copy_share=1.99),
        line("small", "model", OURS, 2, copy_share=0.4),
    )
    assert re.findall(r"\d+%", text) == ["102%"]
    assert "No share is shown where copying was slower than the step" in text
    assert "It ran at 46 to 90 GB/s" in text
    assert "not between lines or tables" in text


def test_report_says_in_english_why_there_are_dashes(tmp_path):
    missing = {"rounds": 0, "step_us": None, "ratio": None}
    text = of_summary(
        tmp_path / "a",
        *(line(case, "model", OURS, 2) for case in ("one", "two")),
        *(line("one", "model", c, 2) for c in ("torch-foreach", "optimi")),
        *(
            line("two", "model", c, 2, **missing, left_out="no memory left for its copy")
            for c in ("torch-foreach", "optimi")
        ),
        line("one", "model", PLAIN, 2, **missing, left_out="is not measured on step"),
    )
    assert text.endswith("A dash means not measured: foreach and optimi where no memory was left.")


def test_names_are_listed_as_in_a_sentence():
    assert report.listed(["a"]) == "a"
    assert report.listed(["a", "b", "c"]) == "a, b and c"


def test_report_shows_a_sequence_beside_the_step_of_the_same_rounds(tmp_path):
    times = {OURS: 400.0, BASELINE: 800.0, PLAIN: 300.0}
    rows = [line("m/clip", "tail", c, 2, step_us=t, ratio=t / 400) for c, t in times.items()]
    save(tmp_path / "a", MACHINE, [replace(row, sequence="clip") for row in rows])
    text = report.tail(report.load(tmp_path)[0])
    header, _, cells = text.splitlines()
    assert header.endswith("warpstep's step alone, same rounds |")
    assert [cell.strip() for cell in cells.split("|")[3:5]] == ["400 µs", "800 µs"]
    assert cells.endswith("| 300 µs |")


def test_copying_leaves_what_it_moves_as_it_was():
    case = Case("m", "model", ((70_000,), (131_077,), (3,)), dtype="bfloat16", offset=1)
    entry = measure.Entry(
        BY_ID[OURS],
        case,
        measure.random_tensors(case, "cpu", 0.02),
        measure.random_tensors(case, "cpu", 1e-3),
    )
    entry.backward()
    entry.step()
    before = [[t.clone() for t in (p, s, v)] for p, _, s, v in entry.operands()]
    copy = measure.copy_loop(case, [entry])
    assert copy is not None
    assert copy.nanoseconds() > 0
    after = [(p, s, v) for p, _, s, v in entry.operands()]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.view(torch.int16), b.detach().view(torch.int16))


def test_copying_covers_all_but_an_edge_of_the_memory_that_is_stepped():
    base = torch.zeros(200_003, dtype=torch.bfloat16)
    parts = measure.as_floats(base[1:200_002], torch.zeros(200_001, dtype=torch.bfloat16))
    assert parts[0].data_ptr() == base.data_ptr() + 4
    assert {part.numel() for part in parts} == {100_000}
    assert measure.as_floats(torch.zeros(100)) == []


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


def test_report_refuses_a_block_that_it_cannot_fill(results):
    blocks = report.blocks(report.load(results))
    with pytest.raises(ValueError, match="no table is called 'wrong'; there are: summary, host"):
        report.insert("<!-- bench:begin wrong -->", blocks)
    with pytest.raises(ValueError, match="has no <!-- bench:end host -->"):
        report.insert("<!-- bench:begin host -->", blocks)


def test_report_draws_the_plots(results, tmp_path):
    loaded = report.load(results)
    report.figure(loaded, "sweep-tensors", report.draw_tensors, tmp_path / "tensors.png")
    report.figure(loaded, "sweep-elements", report.draw_bandwidth, tmp_path / "bandwidth.png")
    report.figure(loaded, "no such family", report.draw_tensors, tmp_path / "none.png")
    assert (tmp_path / "tensors.png").stat().st_size > 1000
    assert (tmp_path / "bandwidth.png").stat().st_size > 1000
    assert not (tmp_path / "none.png").exists()
