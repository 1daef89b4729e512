"""The tables of measured steps, as Markdown: knows the results, and no document that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from bench.machine import cpu_code
from bench.run import BUSY_CORES
from bench.sequences import IN_WORDS

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
# The cases of the short table and what they are in words; of those measured, the first eight.
SPEED_ROWS = 8
SPEED = {
    "gpt2-124m": "GPT-2 (124M), float32",
    "gpt2-124m/bf16": "GPT-2 (124M), bfloat16",
    "gpt2-124m/tail": "GPT-2, float32: unscale, clip, step, average the weights",
    "resnet50/after-backward": "ResNet-50, float32, after a backward pass",
    "2000x256": "2,000 tensors of 256",
    "2000x256/after-backward": "the same, after a backward pass",
    "2000x256/clip": "the same: clip, step",
    "465-groups/after-backward": "465 parameter groups, after a backward pass",
    "465-groups": "465 parameter groups",
    "llama2-7b-shard-8": "an eighth of Llama 2 7B, float32",
    "llama2-7b-shard-8/bf16": "an eighth of Llama 2 7B, bfloat16",
}
# The model that the short table of low precision is of, and what torch keeps of it.
RECIPE_SHAPES = "gpt2-124m"
TORCHS_FORMATS = {"all float32, as torch": (12, 28), "all bfloat16, as torch": (6, 14)}


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
        if self.on_gpu:
            return m["name"]
        return f"{m['name']} ({cpu_code(m)}), {m['cores']} cores"


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


def where(results: Results) -> str:
    """Where it was measured, in a line."""
    m = results.machine
    named = [f"**{results.title}**"]
    if results.on_gpu:
        named += [f"driver {m['driver']}", f"CUDA {m['cuda']}"]
    else:
        named += [f"{m['threads']} threads"]
    named += [
        f"torch {m['torch']}",
        f"warpstep {m['warpstep']}",
        f"commit {m['commit']}",
        m["date"],
    ]
    return " · ".join(named)


def conditions(results: Results) -> str:
    """Where and how it was measured, in a paragraph."""
    m = results.machine
    measured = results.rows[results.rows["step_us"].notna()]
    rounds = measured["rounds"]
    text = (
        f"{where(results)}. Medians of {rounds.min()} to {rounds.max()} interleaved rounds; "
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
        line.append(f"{ours['copy_share']:.0%}" if limited_by_copy(ours) else "")
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
        if limited_by_copy(ours):
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


def times_of_others(by_id: pd.DataFrame) -> str:
    """How many times longer peers take, beside torch's fused optimizer."""
    peers = [i for i in by_id.index if i not in (OURS, PLAIN, BASELINE)]
    return ", ".join(f"{short(i)} {times(by_id.loc[i])}" for i in peers)


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
        others = times_of_others(by_id) if rivals[0] == BASELINE else ""
        what = IN_WORDS[mine["sequence"]]
        medians = (duration(mine["step_us"]), duration(rival["step_us"]))
        lines.append([str(case).rsplit("/", 1)[0], what, *medians, times(rival), others, alone])
    header = ["Tensors of", "Inside the clock", "warpstep", "against", "ratio", "others"]
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


def limited_by_copy(ours: pd.Series) -> bool:
    """Whether a step's share of the copy says something."""
    return bool(ours["is_memory_bound"] and ours["copy_share"] <= MOST_COPY_SHARE)


def recipes(results: Results) -> str:
    """Low precision: what warpstep keeps, against torch's all-bfloat16 step of the same shapes."""
    rows = results.rows[(results.rows["family"] == "recipe") & results.rows["step_us"].notna()]
    lines = []
    for case, of_case in rows.groupby("case", sort=False):
        by_id = of_case.set_index("competitor")
        if not {OURS, BASELINE} <= set(by_id.index):
            continue
        ours, (shapes, name) = by_id.loc[OURS], str(case).rsplit("/", 1)
        one = RECIPES[name]
        share = f"{ours['copy_share']:.0%}" if limited_by_copy(ours) else ""
        line = [one.words, shapes, f"{one.kept:.3g}", f"{one.moved:.3g}"]
        line += [duration(ours["step_us"]), times(by_id.loc[BASELINE]), times_of_others(by_id)]
        lines.append([*line, share])
    header = ["Kept", "Tensors of", "bytes an element, with the weight", "bytes moved", "warpstep"]
    header += ["vs torch's fused, all bfloat16", "vs others' 8-bit moments", "of copy"]
    return table(header, lines)


def recipe(results: Results) -> str:
    """The same in short: how to ask for it, its bytes, and how long one model's step takes where
    that was measured.
    """
    rows = results.rows[results.rows["step_us"].notna()].set_index(["case", "competitor"])
    lines = [[f"{k}", "", f"{a}", f"{b}", "", "", ""] for k, (a, b) in TORCHS_FORMATS.items()]
    for name, one in RECIPES.items():
        case, cells = f"{RECIPE_SHAPES}/{name}", ["", "", ""]
        if {(case, OURS), (case, BASELINE)} <= set(rows.index):
            by_id = rows.loc[case]
            cells = [duration(by_id.loc[OURS, "step_us"]), times(by_id.loc[BASELINE])]
            cells.append(times_of_others(by_id))
        lines.append([one.words, one.code, f"{one.kept:.3g}", f"{one.moved:.3g}", *cells])
    header = ["What is kept", "asked for by", "bytes an element", "bytes that a step moves"]
    header += ["GPT-2's step", "vs torch's fused, all bfloat16", "vs others' 8-bit moments"]
    text = table(header, lines)
    return f"{text}\n\n{where(results)}." if any(any(line[4:]) for line in lines) else text


def speed(results: Results) -> str:
    """The short table: whole steps of torch's fused optimizer and of warpstep's."""
    rows = results.rows[results.rows["step_us"].notna()].set_index(["case", "competitor"])
    lines = []
    for case, words in SPEED.items():
        if not {(case, OURS), (case, BASELINE)} <= set(rows.index) or len(lines) == SPEED_ROWS:
            continue
        ours, torchs = rows.loc[(case, OURS)], rows.loc[(case, BASELINE)]
        cells = [duration(torchs["step_us"]), duration(ours["step_us"]), times(torchs)]
        lines.append([words, *cells])
    text = table(["Inside the clock", "torch, fused", "warpstep", "ratio"], lines)
    return f"{text}\n\n{where(results)}." if text else ""


# For the pages: each with its conditions, of every machine.
TABLES = {
    "summary": summary,
    "recipes": recipes,
    "host": host,
    "busy-core": busy_core,
    "tail": tail,
    "graph": graph,
    "threads": threads,
}
# For README: of one machine.
SHORT_TABLES = {"speed": speed, "recipe": recipe}
