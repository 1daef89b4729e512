"""The tables of what `make recipes` found: does low precision train?"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.machine import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results" / "recipes"
SUMMARY = "summary.csv"
TASKS = {"gpt": "GPT", "digits": "digits"}
FLOAT32 = "float32"


def distance(row: pd.Series, of_seeds: float) -> str:
    """How far a curve is from float32's, and whether float32's own seeds are as far apart."""
    off = row["off_float32_abs"]
    return f"{off:.4f}" if off <= of_seeds else f"{off:.4f}, outside"


def trained(folder: Path = RESULTS, *, short: bool = False) -> str:
    """A line a recipe, without losses and bytes where `short`; empty where nothing was trained."""
    path = folder / SUMMARY
    if not path.exists():
        return ""
    rows = pd.read_csv(path).set_index(["task", "recipe"])
    tasks = {name: words for name, words in TASKS.items() if name in rows.index.levels[0]}
    of_seeds = {task: rows.loc[(task, FLOAT32), "seeds_abs"] for task in tasks}
    columns: dict[str, list[str]] = {"Weights and state": []}
    for recipe in rows.index.unique("recipe"):
        cells = {"Weights and state": recipe}
        for task, words in tasks.items():
            row = rows.loc[(task, recipe)]
            if not short:
                cells.setdefault("state, bytes an element", f"{row['state_bytes']:.3g}")
                cells[f"{words}: last loss"] = f"{row['loss']:.4f} <sub>± {row['std']:.4f}</sub>"
            off = "-" if recipe == FLOAT32 else distance(row, of_seeds[task])
            cells[f"{words}: distance from float32"] = off
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    rule = [":--", *["--:"] * (len(columns) - 1)]
    lines = (columns, rule, *zip(*columns.values(), strict=True))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    seeds = ", ".join(f"{of_seeds[task]:.4f} ({words})" for task, words in tasks.items())
    return (
        f"{text}\n\nThe distance is that of the validation loss from float32's with the same seed, "
        f"in the mean of the whole curve and of the seeds. float32's own seeds are {seeds} from "
        "their mean; what is further away is outside."
    )
