"""Makes README's tables and the plots from the committed results: `python -m bench.report`."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from bench.cases import RECIPES
from bench.competitors import (
    BASELINE,
    BASELINE_GRAPH,
    COMPETITORS,
    OUR_GRAPH,
    OURS,
    PLAIN,
    TRITON,
)
from bench.machine import REPOSITORY
from bench.run import BUSY_CORES, RESULTS, Row
from bench.sequences import IN_WORDS

mpl.use("Agg")  # Before pyplot, which would look for a screen.
from matplotlib import pyplot as plt

MEMORY_BOUND_BYTES = 2**28
# Copying is measured beside the step, and both vary by a few percent. Where it was slower by more
# than that, it was not the limit, and a share of it would say nothing.
MOST_COPY_SHARE = 1.05
# Why something was not measured, as bench.run writes it, and as a sentence ends.
REASONS = {
    "no memory left for its copy": "where no memory was left",
    "not among those compiled": "where compiling takes minutes",
    "keeps other formats": "where it keeps other formats",
    "takes too long for --quick": "in a quick run",
    "no time left": "where no time was left",
}
SLOWER = "▼"
BLOCK = "<!-- bench:begin {name} -->", "<!-- bench:end {name} -->"
COLORS = {OURS: "#d1242f", BASELINE: "#0969da", "torch-foreach": "#8250df"}
PLOTTED = (OURS, BASELINE, "torch-foreach", "torch-forloop")


@dataclass
class Results:
    """What one machine measured."""

    machine: dict[str, Any]
    rows: pd.DataFrame

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU made the steps."""
        return bool(self.machine["device"] == "cuda")

    @property
    def title(self) -> str:
        """The machine's name, as short as it can be."""
        m = self.machine
        return m["name"] if self.on_gpu else f"{m['name']}, {m['cores']} cores"


def load(folder: Path) -> list[Results]:
    """All whole results under `folder`, GPUs first."""
    found = []
    columns = [column.name for column in fields(Row)]  # of which older results lack some
    for path in sorted(folder.rglob("steps.csv")):
        if path.parent.suffix == ".partial":
            continue
        machine = json.loads((path.parent / "machine.json").read_text())
        rows = pd.read_csv(path).reindex(columns=columns)
        # Whether it moves more than the caches keep: elsewhere a bandwidth says nothing.
        moved = rows["gb_s"] * 1e3 * rows["device_us"].fillna(rows["step_us"])
        found.append(Results(machine, rows.assign(is_memory_bound=moved >= MEMORY_BOUND_BYTES)))
    return sorted(found, key=lambda results: not results.on_gpu)


def short(competitor: str) -> str:
    """A competitor's name where torch goes without saying."""
    return competitor.removeprefix("torch-").replace("forloop", "for-loop")


def count(n: float) -> str:
    """A number of elements, as people write it."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if n >= size:
            return f"{n / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{n:.0f}"


def duration(us: float) -> str:
    """Microseconds, as people write them."""
    return f"{us / 1e3:,.3g} ms" if us >= 1e3 else f"{us:.3g} µs"


def times(row: pd.Series, column: str = "ratio") -> str:
    """A ratio, marked where warpstep loses; that of whole steps with its spread. Empty if there is
    none.
    """
    if pd.isna(row[column]):
        return ""
    ratio = f"{row[column]:.2f}"
    text = f"{ratio}x{f' {SLOWER}' if float(ratio) < 1 else ''}"
    if column != "ratio":
        return text
    return f"{text} <sub>{row['ratio_p10']:.2f} to {row['ratio_p90']:.2f}</sub>"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, without the columns that are empty. Nothing
    where there are no lines.
    """
    if not lines:
        return ""
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in lines)]
    rules = [":--" if i == 0 else "--:" for i in kept]
    rows = [[header[i] for i in kept], rules, *([line[i] or "-" for i in kept] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def conditions(results: Results) -> str:
    """Where and how it was measured, in a paragraph."""
    m = results.machine
    where = [f"**{results.title}**"]
    if results.on_gpu:
        where += [f"driver {m['driver']}", f"CUDA {m['cuda']}"]
    else:
        where += [f"{m['threads']} threads"]
    where += [
        f"torch {m['torch']}",
        f"warpstep {m['warpstep']}",
        f"commit {m['commit']}",
        m["date"],
    ]
    measured = results.rows[results.rows["step_us"].notna()]
    rounds = measured["rounds"]
    text = (
        f"{' · '.join(where)}. Medians of {rounds.min()} to {rounds.max()} interleaved rounds; "
        "a ratio is the competitor's step time over warpstep's, the median of the rounds' own "
        f"ratios with their 10th to 90th percentile, and {SLOWER} marks where warpstep is slower."
    )
    if (sm := m.get("clocks", {}).get("clocks.sm MHz")) is not None:
        text += (
            f" The GPU's clock was {sm['median']:,.0f} MHz in the median, {sm['min']:,.0f} to "
            f"{sm['max']:,.0f}."
        )
    disturbed = measured[measured["others_cores"] > BUSY_CORES]["case"].unique()
    if len(disturbed):
        text += f" Other processes disturbed {len(disturbed)} cases: {', '.join(disturbed)}."
    if m["absent"]:
        text += f" Not installed, so not measured: {', '.join(sorted(m['absent']))}."
    return text


def about_copy(results: Results) -> str:
    """What the shares of copy are shares of, and what its spread means for a reader."""
    ours = results.rows[results.rows["competitor"] == OURS]
    ours = ours[ours["is_memory_bound"] & ours["copy_share"].notna()]
    if ours.empty:
        return ""
    low, high = ours["copy_gb_s"].min(), ours["copy_gb_s"].max()
    text = f"Copy is {'; '.join(sorted(ours['copy_kind'].unique()))}, in the same rounds"
    if high > 1.3 * low:
        text += (
            f". It ran at {low:.0f} to {high:.0f} GB/s, because not all memory of this machine has "
            "one speed: times compare within a line, not between lines or tables"
        )
    if (ours["copy_share"] > MOST_COPY_SHARE).any():
        text += (
            ". No share is shown where copying was slower than the step: it had got slower memory"
        )
    return f"{text}."


def not_measured(rows: pd.DataFrame) -> str:
    """Why there are dashes in a table of these rows; empty where there are none."""
    missing = rows[rows["left_out"].notna()].astype({"left_out": str})
    missing = missing[~missing["left_out"].str.startswith("is not measured on")]
    reasons: dict[str, list[str]] = {}
    for row in missing.itertuples():
        known = (text for start, text in REASONS.items() if row.left_out.startswith(start))
        names = reasons.setdefault(next(known, f"({row.left_out})"), [])
        if short(row.competitor) not in names:
            names.append(short(row.competitor))
    clauses = [f"{listed(names)} {why}" for why, names in reasons.items()]
    return f"A dash means not measured: {'; '.join(clauses)}." if clauses else ""


def listed(names: list[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def summary(results: Results) -> str:
    """The cases that stand for real use: one line each, wins and losses alike."""
    rows = results.rows[results.rows["family"].isin(["model", "large", "small", "layout"])]
    others = [c.id for c in COMPETITORS if c.id in set(rows["competitor"])]
    apart = (OURS, TRITON, OUR_GRAPH, BASELINE_GRAPH)  # graphs have a table of their own
    others = [other for other in others if other not in apart]
    header = ["Case", "Format", "Tensors", "Elements", "warpstep", "host", "device"]
    header += ["GB/s", "of copy", *(f"vs {short(other)}" for other in others)]
    header += ["vs fused, host", "vs fused, device", "vs own Triton, device"]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        ours = by_id.loc[OURS]
        line = [str(case).removesuffix("/bf16"), str(ours["recipe"])]
        line += [f"{ours['tensors']:,}", count(ours["elements"])]
        if pd.isna(ours["step_us"]):
            lines.append([*line, str(ours["left_out"]), *[""] * (len(header) - len(line) - 1)])
            continue
        durations = (ours[column] for column in ("step_us", "host_us", "device_us"))
        line += [duration(us) if pd.notna(us) else "" for us in durations]
        bound = ours["is_memory_bound"]
        line.append(f"{ours['gb_s']:,.0f}" if bound else "")
        limited = bound and ours["copy_share"] <= MOST_COPY_SHARE
        line.append(f"{ours['copy_share']:.0%}" if limited else "")
        wanted = [(other, "ratio") for other in others]
        wanted += [(BASELINE, "host_ratio"), (BASELINE, "device_ratio"), (TRITON, "device_ratio")]
        line += [times(by_id.loc[i], how) if i in by_id.index else "" for i, how in wanted]
        lines.append(line)
    if not lines:
        return ""
    text = table(header, lines)
    return "\n\n".join(filter(None, (text, about_copy(results), not_measured(rows))))


def graph(results: Results) -> str:
    """Steps replayed from a CUDA graph beside the same steps called: one line a case."""
    rows = results.rows[results.rows["step_us"].notna()]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        if not {OURS, BASELINE, OUR_GRAPH, BASELINE_GRAPH} <= set(by_id.index):
            continue
        line = [str(case), f"{by_id.loc[OURS, 'tensors']:,}"]
        for mine, theirs in ((OURS, BASELINE), (OUR_GRAPH, BASELINE_GRAPH)):
            line += [duration(by_id.loc[mine, "step_us"]), times(by_id.loc[theirs])]
        lines.append(line)
    header = ["Case", "Tensors", "warpstep, called", "vs fused"]
    return table([*header, "warpstep, replayed", "vs fused, replayed"], lines)


def threads(results: Results) -> str:
    """What more threads give: a line a case, and in it, for each number of threads, the step's
    time, the ratio to torch's fused and the share of what copying reached with as many threads.
    """
    rows = results.rows[(results.rows["family"] == "threads") & results.rows["step_us"].notna()]
    numbers = sorted({int(n) for n in rows["threads"]})
    lines: dict[str, list[str]] = {}
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        if not {OURS, BASELINE} <= set(by_id.index):
            continue
        ours = by_id.loc[OURS]
        name = str(case).rsplit("/", 1)[0]
        line = lines.setdefault(name, [name, *[""] * len(numbers)])
        cell = f"{duration(ours['step_us'])}, {times(by_id.loc[BASELINE])}"
        if ours["is_memory_bound"] and ours["copy_share"] <= MOST_COPY_SHARE:
            cell += f", {ours['copy_share']:.0%} of copy"
        line[1 + numbers.index(int(ours["threads"]))] = cell
    words = [f"{n} thread{'s' if n > 1 else ''}" for n in numbers]
    return table(["Step, vs fused, of copy", *words], list(lines.values()))


def host(results: Results) -> str:
    """The cost of a step that has nothing to compute: tensors of one element."""
    rows = results.rows[(results.rows["family"] == "host") & results.rows["step_us"].notna()]
    ids = [c.id for c in COMPETITORS if c.id in set(rows["competitor"])]
    column = "host_us" if results.on_gpu else "step_us"
    lines = []
    for tensors, of_case in rows.groupby("tensors", sort=True):
        by_id = of_case.set_index("competitor")[column]
        cells = [
            f"{duration(by_id[i])} <sub>{by_id[i] / tensors:.2g} µs each</sub>"
            if i in by_id.index
            else ""
            for i in ids
        ]
        lines.append([f"{tensors:,}", *cells])
    return table(["Tensors of one element", *(short(i) for i in ids)], lines)


def tail(results: Results) -> str:
    """What training loops do around the step: one line a sequence."""
    rows = results.rows[(results.rows["family"] == "tail") & results.rows["step_us"].notna()]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        rivals = [i for i in by_id.index if i != OURS]
        if OURS not in by_id.index or not rivals:
            continue
        mine, rival = by_id.loc[OURS], by_id.loc[rivals[0]]
        alone = duration(by_id.loc[PLAIN, "step_us"]) if PLAIN in rivals[1:] else ""
        what = IN_WORDS[mine["sequence"]]
        medians = (duration(mine["step_us"]), duration(rival["step_us"]))
        lines.append([str(case).rsplit("/", 1)[0], what, *medians, times(rival), alone])
    header = ["Tensors of", "Inside the clock", "warpstep", "against", "ratio"]
    return table([*header, "warpstep's step alone, same rounds"], lines)


def busy_core(results: Results) -> str:
    """Beside a process that keeps a core busy: medians and means, since waits are rare and long."""
    rows = results.rows[(results.rows["family"] == "busy-core") & results.rows["step_us"].notna()]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        if not {OURS, BASELINE} <= set(by_id.index):
            continue
        cells = []
        for column in ("step_us", "step_us_mean"):
            mine, torchs = (float(by_id.loc[id][column]) for id in (OURS, BASELINE))
            mark = f" {SLOWER}" if mine > torchs else ""
            cells += [duration(mine), duration(torchs), f"{torchs / mine:.1f}x{mark}"]
        lines.append([str(case).removesuffix("/busy-core"), *cells])
    header = ["Beside a busy core", "warpstep", "fused", "ratio"]
    return table([*header, "warpstep, mean", "fused, mean", "ratio of means"], lines)


def recipe(results: Results) -> str:
    """Low precision: what warpstep keeps, against torch's all-bfloat16 step of the same shapes."""
    rows = results.rows[(results.rows["family"] == "recipe") & results.rows["step_us"].notna()]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        if not {OURS, BASELINE} <= set(by_id.index):
            continue
        ours, (shapes, name) = by_id.loc[OURS], str(case).rsplit("/", 1)
        limited = ours["is_memory_bound"] and ours["copy_share"] <= MOST_COPY_SHARE
        one = RECIPES[name]
        lines.append(
            [
                one.words,
                shapes,
                f"{one.kept:.3g}",
                f"{one.moved:.3g}",
                duration(ours["step_us"]),
                times(by_id.loc[BASELINE]),
                f"{ours['copy_share']:.0%}" if limited else "",
            ]
        )
    header = ["Kept", "Tensors of", "bytes an element, with the weight", "bytes moved"]
    return table([*header, "warpstep", "vs torch's fused, all bfloat16", "of copy"], lines)


TABLES = {
    "summary": summary,
    "recipe": recipe,
    "host": host,
    "busy-core": busy_core,
    "tail": tail,
    "graph": graph,
    "threads": threads,
}
NO_GPU = """\
There are no GPU figures here yet: none has been measured. `make gpu` measures them, writes them
under `bench/results/`, and `make report` puts them into the tables. Until then, what is known of
the CUDA kernel is what can be known without a GPU: it is compiled for sm_80 and sm_90, its machine
code has 128-bit accesses and no local memory, and its source, run on the CPU under the address
sanitizer, gives the CPU kernel's bits."""
ABOUT_GRAPHS = "Steps replayed from a CUDA graph, beside the same steps called, whole steps both:"
ABOUT_THREADS = "What more threads of the CPU give:"


def blocks(results: list[Results]) -> dict[str, str]:
    """The text of each block: under its conditions the table of every machine that has one."""
    tables = {name: [(r, make(r)) for r in results] for name, make in TABLES.items()}
    texts = {
        name: "\n\n".join(f"{conditions(r)}\n\n{text}" for r, text in of_block if text)
        for name, of_block in tables.items()
    }
    if not any(r.on_gpu for r in results):
        texts["graph"] = NO_GPU
    for name, about in (("graph", ABOUT_GRAPHS), ("threads", ABOUT_THREADS)):
        if texts[name] and texts[name] != NO_GPU:
            texts[name] = f"{about}\n\n{texts[name]}"
    return texts


def insert(document: str, texts: dict[str, str]) -> str:
    """The document with each `bench:begin NAME` block filled anew.

    Raises ValueError for a block whose name is unknown or that has no end.
    """
    for name in re.findall(r"<!-- bench:begin (\S+) -->", document):
        if name not in texts:
            raise ValueError(f"no table is called {name!r}; there are: {', '.join(texts)}")
        begin, end = (mark.format(name=name) for mark in BLOCK)
        head, rest = document.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{begin} has no {end}")
        tail = rest.split(end, 1)[1]
        document = f"{head}{begin}\n{texts[name]}\n{end}{tail}"
    return document


def figure(results: list[Results], family: str, draw: Any, path: Path) -> None:
    """One plot with a panel for each machine that measured `family`."""
    shown = [r for r in results if (r.rows["family"] == family).any()]
    if not shown:
        return
    size = (5.2 * len(shown), 3.8)
    fig, panels = plt.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    for panel, r in zip(panels[0], shown, strict=True):
        draw(panel, r.rows[(r.rows["family"] == family) & r.rows["step_us"].notna()])
        panel.set_title(f"{r.title}\ntorch {r.machine['torch']}, {r.machine['date']}", fontsize=9)
        panel.grid(True, alpha=0.25, linewidth=0.6)
        panel.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    fig.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(fig)


def lines_of(panel: Any, rows: pd.DataFrame, x: str, y: str) -> None:
    """One line a competitor."""
    for name in PLOTTED:
        of_one = rows[rows["competitor"] == name].sort_values(x)
        if len(of_one):
            panel.plot(
                *(of_one[x], of_one[y]),
                marker="o",
                markersize=3.5,
                linewidth=2.2 if name == OURS else 1.4,
                color=COLORS.get(name, "#6e7781"),
                label=name if name == OURS else f"torch {short(name)}",
            )


def draw_tensors(panel: Any, rows: pd.DataFrame) -> None:
    """Step time against the number of tensors."""
    lines_of(panel, rows.assign(ms=rows["step_us"] / 1e3), "tensors", "ms")
    panel.set(xscale="log", yscale="log", xlabel="tensors of 1,024 float32", ylabel="step, ms")


def draw_bandwidth(panel: Any, rows: pd.DataFrame) -> None:
    """Bandwidth against size, with what the copy loop reached where no cache holds the tensor."""
    copy = rows[(rows["competitor"] == OURS) & rows["is_memory_bound"]].sort_values("elements")
    label = "copying, beyond the caches"
    panel.plot(copy["elements"], copy["copy_gb_s"], "--", color="#1f2328", label=label)
    lines_of(panel, rows, "elements", "gb_s")
    panel.set_xscale("log", base=2)
    panel.set(ylim=(0, None), xlabel="elements of one float32 tensor", ylabel="GB/s")


def main() -> None:
    """Reads the results, fills README's blocks, draws the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images")
    given = parser.parse_args()
    results = load(given.results)
    if not results:
        raise SystemExit(f"no results under {given.results}; `python -m bench.run` makes them")
    try:
        text = insert(given.readme.read_text(), blocks(results))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{given.readme}: {error}") from None
    given.readme.write_text(text)
    given.images.mkdir(parents=True, exist_ok=True)
    figure(results, "sweep-tensors", draw_tensors, given.images / "tensors.png")
    figure(results, "sweep-elements", draw_bandwidth, given.images / "bandwidth.png")
    print(f"{len(results)} machines: tables in {given.readme}, plots in {given.images}")


if __name__ == "__main__":
    main()
