"""The documents' tables and plots, made of invented results."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from bench import plots, report, tables  # noqa: E402
from bench.cases import CASES, RECIPES  # noqa: E402
from bench.competitors import (  # noqa: E402
    BASELINE,
    BASELINE_GRAPH,
    OUR_GRAPH,
    OURS,
    PLAIN,
    TRITON,
)
from bench.run import Row, write  # noqa: E402
from bench.trained import trained  # noqa: E402

MACHINE = {
    "device": "cpu",
    "name": "A CPU",
    "cores": 2,
    "native": {"CPU code": "avx2"},
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


def test_report_shows_a_gpu_with_host_device_graphs_and_triton(tmp_path):
    gpu = MACHINE | {
        "device": "cuda",
        "name": "A GPU",
        "clocks": {"clocks.sm MHz": {"min": 1200.0, "median": 1755.0, "max": 1980.0}},
    }
    more = {"host_us": 70.0, "device_us": 1000.0, "step_us": 1100.0, "gb_s": 3800.0}
    more |= {"copy_gb_s": 4000.0, "copy_share": 0.95}
    small = {"host_us": 3000.0, "device_us": 70.0, "step_us": 3100.0, "gb_s": 256.0}
    slow = {"ratio": 1.05, "host_ratio": 5.5, "device_ratio": 0.98}
    rows = [
        line("gpt2", "model", OURS, 148, **more),
        line("gpt2", "model", BASELINE, 148, **(more | slow)),
        line("gpt2", "model", TRITON, 148, **(more | {"device_ratio": 1.07})),
        line("many", "small", OURS, 10_000, **small),
        line("many", "small", BASELINE, 10_000, **(small | {"ratio": 15.0})),
        line("many", "small", OUR_GRAPH, 10_000, **(small | {"step_us": 90.0})),
        line("many", "small", BASELINE_GRAPH, 10_000, against=OUR_GRAPH, **(small | slow)),
    ]
    threads = [
        line(f"m/{n}-threads", "threads", c, 2, threads=n, step_us=1e5 / n, gb_s=20.0 * n)
        for n in (1, 16)
        for c in (OURS, BASELINE)
    ]
    save(tmp_path / "gpu", gpu, rows)
    save(tmp_path / "gpu" / "cpu", MACHINE | {"cores": 16}, threads)
    blocks = report.blocks(report.load(tmp_path))
    summary = blocks["summary"].splitlines()
    assert "A GPU" in summary[0]
    assert "The GPU's clock was 1,755 MHz in the median, 1,200 to 1,980." in summary[0]
    cells = [[cell.strip() for cell in text.split("|")[1:-1]] for text in summary[2:]]
    named = dict(zip(cells[0], cells[2], strict=True))
    assert (named["host"], named["device"], named["of copy"]) == ("70 µs", "1 ms", "95%")
    assert (named["vs fused, host"], named["vs fused, device"]) == ("5.50x", "0.98x ▼")
    assert named["vs own Triton, device"] == "1.07x"
    assert named["vs fused"].startswith("1.05x <sub>")
    many = dict(zip(cells[0], cells[3], strict=True))
    assert many["GB/s"] == "-"  # 18 MB: what the caches keep
    assert "vs warpstep-graph" not in named
    assert blocks["graph"].splitlines()[-1] == (
        "| many | 10,000 | 3.1 ms | 15.00x <sub>0.90 to 1.10</sub> "
        "| 90 µs | 1.05x <sub>0.90 to 1.10</sub> |"
    )
    assert "There are no GPU figures" not in blocks["graph"]
    assert "A CPU (avx2), 16 cores" in blocks["threads"]
    assert blocks["threads"].splitlines()[-3].endswith("| 1 thread | 16 threads |")
    assert (
        blocks["threads"]
        .splitlines()[-1]
        .startswith("| m | 100 ms, 1.00x <sub>0.90 to 1.10</sub>, 83% of copy | 6.25 ms, ")
    )


def test_report_says_that_there_are_no_gpu_figures_while_there_are_none(tmp_path):
    save(tmp_path / "a", MACHINE, [line("m", "model", OURS, 2)])
    blocks = report.blocks(report.load(tmp_path))
    assert blocks["graph"].startswith("There are no GPU figures here yet")
    assert blocks["threads"] == ""


def of_summary(folder: Path, *rows: Row) -> str:
    save(folder, MACHINE, list(rows))
    return tables.summary(report.load(folder.parent)[0])


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
    assert tables.listed(["a"]) == "a"
    assert tables.listed(["a", "b", "c"]) == "a, b and c"


def test_report_shows_a_sequence_beside_the_step_of_the_same_rounds(tmp_path):
    times = {OURS: 400.0, BASELINE: 800.0, PLAIN: 300.0}
    rows = [line("m/clip", "tail", c, 2, step_us=t, ratio=t / 400) for c, t in times.items()]
    save(tmp_path / "a", MACHINE, [replace(row, sequence="clip") for row in rows])
    text = tables.tail(report.load(tmp_path)[0])
    header, _, cells = text.splitlines()
    assert header.endswith("warpstep's step alone, same rounds |")
    assert [cell.strip() for cell in cells.split("|")[3:5]] == ["400 µs", "800 µs"]
    assert cells.endswith("| 300 µs |")


def test_report_refuses_a_block_that_it_cannot_fill(results):
    blocks = report.blocks(report.load(results))
    with pytest.raises(ValueError, match="no table is called 'wrong'; there are: summary, recipes"):
        report.insert("<!-- bench:begin wrong -->", blocks)
    with pytest.raises(ValueError, match="has no <!-- bench:end host -->"):
        report.insert("<!-- bench:begin host -->", blocks)


def test_the_short_table_has_the_cases_that_were_measured_and_eight_at_most(tmp_path):
    many = [
        line(case, "model", c, 2, step_us=250.0 * (1 + (c == BASELINE)), ratio=2.0)
        for case in tables.SPEED
        for c in (OURS, BASELINE)
    ]
    save(tmp_path / "a", MACHINE, many[:2])
    texts = report.blocks(report.load(tmp_path))
    head, _, row, empty, machine = texts["speed"].splitlines()
    assert head == "| Inside the clock | torch, fused | warpstep | ratio |"
    words = tables.SPEED["gpt2-124m"]
    assert row == f"| {words} | 500 µs | 250 µs | 2.00x <sub>0.90 to 1.10</sub> |"
    assert empty == ""
    assert machine.startswith("**A CPU (avx2), 2 cores**")
    save(tmp_path / "b", MACHINE | {"device": "cuda", "name": "A GPU"}, many)
    texts = report.blocks(report.load(tmp_path))
    assert len(texts["speed"].splitlines()) == 2 + tables.SPEED_ROWS + 2
    assert "A GPU" in texts["speed"]
    assert "A CPU" not in texts["speed"]  # one machine's


def test_the_short_tables_are_of_the_newest_results_of_a_gpu_else_a_cpu(tmp_path):
    some = [line("gpt2-124m", "model", OURS, 2)]
    save(tmp_path / "a", MACHINE | {"name": "Old"}, some)  # as results were dated once
    save(tmp_path / "b", MACHINE | {"name": "Newest", "date": "2026-01-01 11:00"}, some)
    save(tmp_path / "c", MACHINE | {"name": "New", "date": "2026-01-01 10:59"}, some)
    gpu = {"device": "cuda", "name": "A GPU", "date": "2025-01-01 10:00"}
    save(tmp_path / "d", MACHINE | gpu, some)
    names = [results.machine["name"] for results in report.load(tmp_path)]
    assert names == ["A GPU", "Newest", "New", "Old"]


def test_every_case_of_the_short_tables_is_one_of_the_benchmarks():
    known = {case.id for case in CASES}
    assert known >= set(tables.SPEED)
    assert known >= {f"{tables.RECIPE_SHAPES}/{name}" for name in RECIPES}


def test_the_recipes_are_shown_with_their_times_once_these_are_known(tmp_path):
    save(tmp_path / "a", MACHINE, [line("m", "model", OURS, 2)])
    (known,) = report.load(tmp_path)
    head, _, *rows = tables.recipe(known).splitlines()
    assert head.endswith("| bytes an element | bytes that a step moves |")
    assert rows[1] == "| all bfloat16, as torch | - | 6 | 14 |"
    assert rows[4].endswith('| `master="residual"`, `state_dtype="8bit"` | 6.03 | 14.1 |')
    assert len(rows) == 2 + len(RECIPES)
    case = f"{tables.RECIPE_SHAPES}/residual"
    pair = [line(case, "recipe", c, 2, ratio=1.5) for c in (OURS, BASELINE)]
    save(tmp_path / "b", MACHINE, pair)
    of_b = report.load(tmp_path)[1]
    text = tables.recipe(of_b)
    assert "| 26 | 250 µs | 1.50x <sub>0.90 to 1.10</sub> |" in text
    assert text.endswith("2026-01-01.")
    assert f"| {tables.RECIPE_SHAPES} | 12 | 26 | 250 µs | 1.50x" in tables.recipes(of_b)
    case = f"{tables.RECIPE_SHAPES}/residual-8bit"
    ids = (OURS, BASELINE, "bitsandbytes-8bit", "torchao-8bit")
    save(tmp_path / "c", MACHINE, [line(case, "recipe", c, 2, ratio=20) for c in ids])
    of_c = report.load(tmp_path)[2]
    others = "bitsandbytes-8bit 20.00x <sub>0.90 to 1.10</sub>, torchao-8bit 20.00x"
    for text in (tables.recipe(of_c), tables.recipes(of_c)):
        assert "vs others' 8-bit moments" in text
        assert others in text


def test_every_block_of_the_documents_is_filled():
    """README has the short tables and no other; no table is in no document."""
    named = {}
    for path in report.DOCUMENTS:
        named[path.name] = re.findall(r"<!-- bench:begin (\S+) -->", path.read_text())
    assert set(named["README.md"]) == {*tables.SHORT_TABLES, "trained-short"}
    assert set(named["benchmarks.md"]) == set(tables.TABLES)
    assert set(named["low-precision.md"]) == {"recipe", "trained"}


def test_report_draws_the_plots_for_light_and_dark_pages(results, tmp_path):
    loaded = report.load(results)
    plots.figures(loaded, "sweep-tensors", plots.draw_tensors, tmp_path / "tensors.png")
    plots.figures(loaded, "sweep-elements", plots.draw_bandwidth, tmp_path / "bandwidth.png")
    rows = loaded[0].rows.assign(step_us=float("nan"))  # where the time did not suffice
    none = [tables.Results(loaded[0].machine, rows)]
    plots.figures(none, "sweep-elements", plots.draw_bandwidth, tmp_path / "none.png")
    plots.figures(loaded, "no such family", plots.draw_tensors, tmp_path / "none.png")
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    names = ("bandwidth-dark.png", "bandwidth.png", "tensors-dark.png", "tensors.png")
    assert tuple(sorted(made)) == names
    assert len(set(made.values())) == 4
    assert min(map(len, made.values())) > 1000


def test_labels_are_not_over_each_other():
    figure, panel = plots.plt.subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    plots.label(panel, [(1, y, name, "red") for name, y in (("b", 0.5), ("a", 0.499), ("c", 0.9))])
    offsets = {text.get_text(): text.xyann[1] for text in panel.texts}
    assert offsets["a"] == offsets["c"] == 0
    apart = 0.001 * panel.bbox.height * 72 / figure.dpi
    assert offsets["b"] + apart == pytest.approx(plots.LABEL_POINTS)
    plots.plt.close(figure)


def test_main_fills_documents_or_none(results, tmp_path, monkeypatch):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- bench:begin host -->\n<!-- bench:end host -->\n")
    bad.write_text("<!-- bench:begin wrong -->")
    given = ["report", "--results", str(results), "--images", str(tmp_path / "images")]
    before = good.read_text()
    monkeypatch.setattr(sys, "argv", [*given, "--documents", str(good), str(bad)])
    with pytest.raises(SystemExit, match=r"bad\.md: no table is called 'wrong'"):
        report.main()
    assert good.read_text() == before
    monkeypatch.setattr(sys, "argv", [*given, "--documents", str(good)])
    report.main()
    assert "A GPU" in good.read_text()
    assert (tmp_path / "images" / "tensors-dark.png").exists()


def test_what_was_trained_is_shown_beside_the_spread_of_float32s_seeds(tmp_path):
    assert trained(tmp_path) == ""
    columns = "task,recipe,loss,std,off_float32,off_float32_abs,seeds_abs,state_bytes,step_ms\n"
    rows = (
        "float32,2,0.25,0,0,0.03,8,1",
        "near,2.01,0.2,0,0.03,0.5,4,1",
        "far,1,0.1,-1,0.04,0,4,1",
    )
    (tmp_path / "summary.csv").write_text(columns + "".join(f"gpt,{row}\n" for row in rows))
    text = trained(tmp_path)
    assert "| float32 | 8 | 2.0000 <sub>± 0.2500</sub> | - |" in text
    assert "| near | 4 | 2.0100 <sub>± 0.2000</sub> | 0.0300 |" in text
    assert "| far | 4 | 1.0000 <sub>± 0.1000</sub> | 0.0400, outside |" in text
    assert "seeds are 0.0300 (GPT)" in text
    assert "digits" not in text
    assert "| near | 0.0300 |\n" in trained(tmp_path, short=True)
